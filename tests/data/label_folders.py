"""Writes small label folders, with texts beside them, for the tests of tasks."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from inranker_jax.corpora import label_folder
from inranker_jax.corpora.label_store import LabelStore, pair_key, write_json
from inranker_jax.records import LabelledPair


def texts(kind: str, number: int, language: str = "") -> str:
    """The text of a query or document; its number can be read from it."""
    return f"{language}{kind} number {number}"


def write_beir(folder: pathlib.Path, queries: int, documents: int, language: str = "") -> pathlib.Path:
    """A BEIR folder whose ids are `q0...` and `d0...`."""
    (folder / "qrels").mkdir(parents=True)
    corpus = ({"_id": f"d{n}", "title": "", "text": texts("document", n, language)} for n in range(documents))
    asked = ({"_id": f"q{n}", "text": texts("query", n, language)} for n in range(queries))
    for name, rows in (("corpus", corpus), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"q{n}\td{n % documents}\t1\n" for n in range(queries)]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def logits(query: int, place: int) -> tuple[float, float]:
    """The teacher's logits of a query's document at some place of its list."""
    return -query - 0.5, 2.0 - place


def write_label_folder(
    folder: pathlib.Path, queries: int = 30, documents: int = 20, per_query: int = 4, first: int = 0
) -> pathlib.Path:
    """A label folder over a BEIR folder beside it; query n has documents n, n + 1, ... (modulo).

    Its queries are those from number `first` to `queries`.
    """
    source = write_beir(folder.with_name(f"{folder.name}_source"), queries, documents)

    def pairs() -> Iterator[LabelledPair]:
        for query in range(first, queries):
            for place in range(per_query):
                document = (query + place) % documents
                contents = texts("query", query), texts("document", document)
                yield LabelledPair(f"q{query}", f"d{document}", *contents, logits(query, place))

    return write_pairs(folder, pairs(), source)


def write_pairs(folder: pathlib.Path, pairs: Iterable[LabelledPair], source: pathlib.Path) -> pathlib.Path:
    """A label folder of some pairs, whose texts are those of a BEIR folder; a query's positive comes first."""
    store = LabelStore(folder / "store")
    teacher = store.add_teacher({"kind": "toy"}, {})
    keys, values, count = [], [], 0
    with label_folder.ListsWriter(folder, {"toy": str(source)}) as lists:
        for query_id, group in itertools.groupby(pairs, key=lambda pair: pair.query_id):
            rows = []
            for place, pair in enumerate(group):
                key = pair_key(pair.query, pair.document)
                rows.append((pair.document_id, int(place == 0), key))
                keys.append(np.frombuffer(key, np.uint8))
                values.append(pair.logits)
            lists.add(query_id, rows)
            count += 1
    assert count
    store.write_part(teacher, "part-toy-0", np.stack(keys), np.asarray(values, np.float32))
    place = {"path": str(source), "format": "beir", "fingerprint": ""}
    info = {"format": 1, "queries": place, "corpus": place, "teachers": {"toy": teacher}, "store": "store"}
    write_json(folder / label_folder.INFO, info)
    return folder
