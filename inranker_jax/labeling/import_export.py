"""Label folders from the files in which InRanker published its logits, and such files from label folders."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np

from inranker_jax import paths
from inranker_jax.corpora import files, inranker, label_folder, label_store, open_corpus, open_queries_any
from inranker_jax.corpora.label_folder import FORMAT, INFO, LISTS, Lists, ListsWriter
from inranker_jax.corpora.label_store import LabelStore, LabelTable, pair_key
from inranker_jax.errors import InputError
from inranker_jax.labeling.provenance import absolute, check_same, versions
from inranker_jax.records import LabelledPair, PathType, atomic_text

_PART_PAIRS = 65536
# Published files have four decimals or so; what differs by more is another label.
_TOLERANCE = 1e-3
TEXTS = "texts"
_LEAVE_OUT = "Correct the line, or leave such lines out with --skip_malformed"


def import_tsv(
    path: str,
    output_dir: str,
    teacher_name: str,
    *,
    queries: str,
    corpus: str,
    queries_format: str = "auto",
    corpus_format: str = "auto",
    titles: bool = True,
    store: str | None = None,
    skip_malformed: bool = False,
    announce: Callable[[str], None],
) -> None:
    """Makes a label folder from InRanker's MS MARCO TSV; each query's first document is its positive.

    Args:
      path: the TSV (see `corpora.inranker.read_msmarco_tsv`), a query's lines together.
      output_dir: the label folder.
      teacher_name: what the teacher is called.
      queries: path of the queries.
      corpus: path of the corpus.
      queries_format: see `corpora.open_queries_any`.
      corpus_format: see `corpora.open_corpus`.
      titles: whether the teacher read a document's title and text, or its text only.
      store: the label store; None for one inside the folder.
      skip_malformed: leave bad lines out, and count them.
      announce: prints a line.

    Raises:
      InputError: with file and line, for a bad line or an unknown id; a query in two places of the file;
        logits that look swapped; or a folder with other lists.
    """
    policy: Any = "skip" if skip_malformed else "raise"
    query_set = open_queries_any(queries, queries_format, on_malformed=policy)
    documents = open_corpus(corpus, corpus_format, on_malformed=policy)
    sources = {
        "queries": {"fingerprint": query_set.fingerprint(), "format": query_set.format},
        "corpus": {"fingerprint": documents.fingerprint(), "format": documents.format, "titles": titles},
        "on_malformed": policy,
    }
    report = inranker.ReadReport()
    texts = {query.id: query.text for query in query_set.queries()}
    document_texts = documents.texts(titles=titles)
    pairs = inranker.read_msmarco_tsv(path, texts, document_texts, policy, report=report, advice=_LEAVE_OUT)
    _import(
        path,
        pairs,
        report,
        output_dir,
        teacher_name,
        sources,
        (absolute(queries), absolute(corpus)),
        store,
        announce,
    )


def import_jsonl(
    path: str,
    output_dir: str,
    teacher_name: str,
    *,
    store: str | None = None,
    skip_malformed: bool = False,
    announce: Callable[[str], None],
) -> None:
    """Makes a label folder from InRanker's BEIR JSONL, which has texts but no ids.

    Ids are made from the texts (`corpora.inranker.text_id`), and the texts are kept in the folder, as the BEIR
    collection `texts/`. Arguments and errors as in `import_tsv`. Memory: the ids of all distinct texts (about 120
    bytes each) beside the 24 bytes a pair that every import holds, but no text.
    """
    policy: Any = "skip" if skip_malformed else "raise"
    report = inranker.ReadReport()
    folder = paths.of(output_dir) / TEXTS
    with _text_writer(folder) as write:
        pairs = inranker.read_beir_jsonl(path, policy, report=report, advice=_LEAVE_OUT)
        sources = {"queries": {"format": "beir"}, "corpus": {"format": "beir"}, "on_malformed": "raise"}
        _import(
            path,
            map(write, pairs),
            report,
            output_dir,
            teacher_name,
            sources,
            (TEXTS, TEXTS),
            store,
            announce,
        )


@contextlib.contextmanager
def _text_writer(folder: Any) -> Iterator[Callable[[LabelledPair], LabelledPair]]:
    """Gives a function that passes pairs on and writes down their texts; the files appear at the end, whole.

    It holds the id of every distinct text, so that each is written once.
    """
    known: tuple[set[str], set[str]] = (set(), set())
    with atomic_text(folder / "queries.jsonl") as queries, atomic_text(folder / "corpus.jsonl") as corpus:

        def write(pair: LabelledPair) -> LabelledPair:
            texts = ((pair.query_id, pair.query), (pair.document_id, pair.document))
            for file, seen, (identifier, text) in zip((queries, corpus), known, texts, strict=True):
                if identifier not in seen:
                    seen.add(identifier)
                    file.write(json.dumps({"_id": identifier, "text": text}, ensure_ascii=False) + "\n")
            return pair

        yield write


def _import(
    path: str,
    pairs: Iterable[LabelledPair],
    report: inranker.ReadReport,
    output_dir: str,
    teacher_name: str,
    sources: dict[str, Any],
    places: tuple[str, str],
    store_path: str | None,
    announce: Callable[[str], None],
) -> None:
    folder = paths.of(output_dir)
    fingerprint = files.fingerprint(files.find(path))
    settings = {"import": {"fingerprint": fingerprint}, **sources}
    if (folder / LISTS).exists():
        given = {"import": absolute(path), "queries": places[0], "corpus": places[1]}
        now = {name: {"path": place} for name, place in given.items()}
        check_same(folder, Lists(folder).settings, settings, now, "Choose another --output_dir.")
    store = LabelStore(store_path or folder / "store")
    identity = {"kind": "import", "file": fingerprint}
    keys, logits, counts = _write_lists(path, pairs, folder, settings)
    if not len(keys):
        raise InputError.at(path, None, "it has no pairs", "labelled pairs")
    table = LabelTable(keys, logits)
    _, stored = table.lookup(keys)
    counts["conflicting_labels"] = int((np.abs(stored - logits).max(axis=-1) > _TOLERANCE).sum())
    key = store.add_teacher(identity, {"imported_from": absolute(path), "versions": versions()})
    job = label_store.teacher_key(settings)
    parts = []
    for number, start in enumerate(range(0, len(table), _PART_PAIRS)):
        part = slice(start, start + _PART_PAIRS)
        part_keys = table.keys[part].view(np.uint8).reshape(-1, label_store.KEY_BYTES)
        parts.append(f"part-{job}-{number:06d}")
        store.write_part(key, parts[-1], part_keys, table.logits[part])
    lists = Lists(folder)
    info = {
        "format": FORMAT,
        "complete": True,
        "import": {"path": absolute(path), "fingerprint": fingerprint},
        "queries": {"path": places[0], **sources["queries"], "on_malformed": sources["on_malformed"]},
        "corpus": {"path": places[1], **sources["corpus"], "on_malformed": sources["on_malformed"]},
        "candidates": None,
        "qrels": None,
        "sampling": None,
        "counts": {**lists.counts, **counts, "distinct_pairs": len(table)},
        "teachers": {teacher_name: key},
        "pending": {},
        "store": "store" if store_path is None else absolute(store_path),
        "versions": versions(),
        "cost": None,
        "parts": {key: parts},
    }
    label_store.write_json(folder / INFO, info)
    announce(report.summary())
    announce(f"{folder}: {lists.num_queries:,} lists, {lists.num_pairs:,} pairs, {len(table):,} distinct")
    for kind, words in _WORDS.items():
        if counts[kind]:
            announce(f"{counts[kind]:,} {words}")


_WORDS = {
    "repeated_rows": "rows that repeat a query and document were left out (the first counts)",
    "conflicting_labels": "pairs have the same texts as an earlier pair and other logits; the first counts",
}


def _write_lists(
    path: str, pairs: Iterable[LabelledPair], folder: Any, settings: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
    """Writes the lists; returns keys uint8 [n, 16], logits float32 [n, 2] and what was counted."""
    counts: Counter[str] = Counter()
    keys = bytearray()
    logits: list[np.ndarray] = [np.zeros((0, 2), np.float32)]
    seen: set[str] = set()
    with ListsWriter(folder, settings) as writer:
        for query_id, group in groupby(pairs, key=lambda pair: pair.query_id):
            if query_id in seen:
                raise InputError.at(
                    path, None, f"the lines of query {query_id!r} do not stand together",
                    "a query's documents in a row, its positive first",
                    "Sort the file by query, keeping the order within (for a TSV: `sort -s -t'\t' -k3,3`)",
                )  # fmt: skip
            seen.add(query_id)
            own: dict[str, tuple[bytes, tuple[float, float]]] = {}
            for pair in group:
                if pair.document_id in own:
                    counts["repeated_rows"] += 1
                    continue
                own[pair.document_id] = (pair_key(pair.query, pair.document), pair.logits)
            writer.add(query_id, [(doc, int(place == 0), own[doc][0]) for place, doc in enumerate(own)])
            keys += b"".join(key for key, _ in own.values())
            logits.append(np.array([values for _, values in own.values()], np.float32))
        writer.counts = dict(counts)
    return np.frombuffer(bytes(keys), np.uint8).reshape(-1, 16), np.concatenate(logits), counts


def export_tsv(
    path: str,
    folder: str,
    teacher: str | None = None,
    *,
    queries: PathType | None = None,
    documents: PathType | None = None,
) -> int:
    """Writes a folder's labels as InRanker's MS MARCO TSV.

    Args:
      path: the file; `.gz` and `.zst` are compressed.
      folder: the label folder.
      teacher: which teacher; needless with one.
      queries: other texts for the queries, see `label_folder.read_labels`.
      documents: other texts for the documents.

    Returns:
      The number of pairs.

    Raises:
      InputError: as `label_folder.read_labels`.
    """
    pairs = label_folder.read_labels(folder, teacher=teacher, queries=queries, documents=documents)
    return inranker.write_msmarco_tsv(path, pairs)


def export_jsonl(
    path: str,
    folder: str,
    teacher: str | None = None,
    *,
    queries: PathType | None = None,
    documents: PathType | None = None,
) -> int:
    """Writes a folder's labels as InRanker's BEIR JSONL; as `export_tsv`."""
    pairs = label_folder.read_labels(folder, teacher=teacher, queries=queries, documents=documents)
    return inranker.write_beir_jsonl(path, pairs)
