"""Label folders: lists and labels joined with texts, translations by id, and folders that cannot be read."""

from __future__ import annotations

import json
import pathlib
import struct

import numpy as np
import pytest

from inranker_jax.corpora import label_folder
from inranker_jax.corpora.label_folder import LabelFolder, Lists, ListsWriter, read_labels
from inranker_jax.corpora.label_store import LabelStore, pair_key
from inranker_jax.errors import InputError

pytest.importorskip("pyarrow")

QUERIES = {"q1": "wing lift", "q2": "shock wave"}
DOCUMENTS = {f"d{i}": f"text of document {i}" for i in range(6)}
LISTS = {"q1": ["d3", "d1", "d2"], "q2": ["d0", "d5"]}


def write_texts(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "queries.tsv").write_text("".join(f"{k}\t{v}\n" for k, v in QUERIES.items()))
    (folder / "corpus.tsv").write_text("".join(f"{k}\t{v}\n" for k, v in DOCUMENTS.items()))


def margin(query_id: str, document_id: str) -> float:
    return float(document_id[1:]) + 10 * float(query_id[1:])


def make_folder(folder: pathlib.Path, teachers: tuple[str, ...] = ("t5",)) -> pathlib.Path:
    """A labelled folder, written with the parts that the job uses."""
    write_texts(folder / "texts")
    keys, margins = [], []
    with ListsWriter(folder, {"seed": 1}) as writer:
        for query_id, documents in LISTS.items():
            own = [pair_key(QUERIES[query_id], DOCUMENTS[document]) for document in documents]
            keys += own
            margins += [margin(query_id, document) for document in documents]
            grades = [1] + [0] * (len(documents) - 1)
            writer.add(query_id, list(zip(documents, grades, own, strict=True)))
    store = LabelStore(folder / "store")
    known = {}
    for sign, name in zip((1, -1), teachers, strict=False):
        known[name] = store.add_teacher({"name": name}, {})
        logits = np.stack([np.zeros(5), sign * np.array(margins)], axis=-1)
        array = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        store.write_part(known[name], "part-test-000000", array, logits)
    info = {
        "format": 1,
        "queries": {"path": "texts/queries.tsv", "format": "tsv"},
        "corpus": {"path": "texts/corpus.tsv", "format": "tsv"},
        "teachers": known,
        "pending": {},
        "store": "store",
    }
    (folder / "labels.json").write_text(json.dumps(info))
    return folder


def test_pairs_in_list_order(tmp_path: pathlib.Path) -> None:
    folder = make_folder(tmp_path / "labels")
    pairs = list(read_labels(folder, queries=QUERIES, documents=DOCUMENTS))
    assert [(pair.query_id, pair.document_id) for pair in pairs] == [
        (query, document) for query, documents in LISTS.items() for document in documents
    ]
    for pair in pairs:
        assert pair.query == QUERIES[pair.query_id]
        assert pair.document == DOCUMENTS[pair.document_id]
        assert pair.logits == (0.0, margin(pair.query_id, pair.document_id))
    assert label_folder.num_pairs(folder) == 5
    assert label_folder.num_queries(folder) == 2
    middle = label_folder.read_range(folder, 1, 4, queries=QUERIES, documents=DOCUMENTS)
    assert list(middle) == pairs[1:4]
    of = label_folder.relevance(folder)
    assert [of(pair) for pair in pairs] == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert list(Lists(folder).query_sizes()) == [("q1", 3), ("q2", 2)]


def test_texts_come_from_the_named_files_also_after_a_move(tmp_path: pathlib.Path) -> None:
    made = make_folder(tmp_path / "labels")
    expected = list(read_labels(made, queries=QUERIES, documents=DOCUMENTS))
    assert list(read_labels(made)) == expected
    moved = made.rename(tmp_path / "moved")
    assert list(read_labels(moved)) == expected


def test_a_translation_with_the_same_ids(tmp_path: pathlib.Path) -> None:
    """Cross-lingual labels: the English pair was scored, the Portuguese pair is read."""
    folder = make_folder(tmp_path / "labels")
    portuguese = {key: f"texto {key}" for key in DOCUMENTS}
    perguntas = tmp_path / "perguntas.tsv"
    perguntas.write_text("q1\tsustentação da asa\nq2\tonda de choque\n")
    pairs = list(read_labels(folder, queries=perguntas, documents=portuguese))
    assert [pair.query for pair in pairs] == ["sustentação da asa"] * 3 + ["onda de choque"] * 2
    assert pairs[0].document == "texto d3"
    assert [pair.logits[1] for pair in pairs] == [13.0, 11.0, 12.0, 20.0, 25.0]
    with pytest.raises(InputError, match="document 'd3' is not in the given mapping"):
        next(read_labels(folder, queries=perguntas, documents={"d1": "x"}))


def test_a_text_that_changed_since_labelling(tmp_path: pathlib.Path) -> None:
    folder = make_folder(tmp_path / "labels")
    corpus = folder / "texts" / "corpus.tsv"
    corpus.write_text(corpus.read_text().replace("document 1", "document one"))
    pairs = read_labels(folder)
    assert next(pairs).document_id == "d3"
    with pytest.raises(InputError, match=r"document 'd1' has another text .* documents="):
        next(pairs)


def test_several_teachers(tmp_path: pathlib.Path) -> None:
    folder = make_folder(tmp_path / "labels", ("t5", "colbert"))
    keys = LabelFolder(folder).teachers
    texts = {"queries": QUERIES, "documents": DOCUMENTS}
    assert [p.logits[1] for p in read_labels(folder, teacher="t5", **texts)] == [13, 11, 12, 20, 25]
    assert next(read_labels(folder, teacher=keys["colbert"][:6], **texts)).logits[1] == -13
    ways = r"--teacher_name=t5 to `label`, .* label_folders\.register\(\.\.\., teacher='t5'\) for training"
    with pytest.raises(InputError, match=rf"labels of 2 teachers \(t5, colbert\).*{ways}"):
        next(read_labels(folder, **texts))
    with pytest.raises(InputError, match="Did you mean 'colbert'"):
        next(read_labels(folder, teacher="colbort", **texts))
    assert len(label_folder.files(folder)) == 4


def test_labels_that_are_not_complete(tmp_path: pathlib.Path) -> None:
    folder = make_folder(tmp_path / "labels")
    info = json.loads((folder / "labels.json").read_text())
    pending = {**info, "teachers": {}, "pending": info["teachers"]}
    (folder / "labels.json").write_text(json.dumps(pending))
    for teacher in (None, "t5"):
        with pytest.raises(InputError, match="labels of t5 are not complete"):
            next(read_labels(folder, teacher=teacher))
    (folder / "labels.json").write_text(json.dumps(info))
    store = LabelFolder(folder).store
    (part,) = (folder / "store").glob("teachers/*/part-*.parquet")
    part.write_bytes(part.read_bytes()[:200])
    assert store.torn(info["teachers"]["t5"]) == [part]
    with pytest.raises(
        InputError, match=r"no label for query 'q1', document 'd3' in .*torn files in the store: 1"
    ):
        next(read_labels(folder))


def test_folders_that_are_none(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"has no lists\.parquet"):
        LabelFolder(tmp_path)
    folder = make_folder(tmp_path / "labels")
    (folder / "labels.json").unlink()
    with pytest.raises(InputError, match="no such file"):
        LabelFolder(folder)
    lists = folder / "lists.parquet"
    whole = lists.read_bytes()
    (size,) = struct.unpack("<I", whole[-8:-4])
    for torn in (b"PAR1 half", whole[: -8 - size] + b"\xff" * size + whole[-8:]):
        lists.write_bytes(torn)
        with pytest.raises(InputError, match="not the lists of a label folder"):
            Lists(folder)


def test_lists_appear_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    class Trouble(Exception):
        pass

    def write() -> None:
        with ListsWriter(tmp_path, {}) as writer:
            writer.add("q1", [("d1", 1, b"k" * 16)])
            raise Trouble

    with pytest.raises(Trouble):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_query_is_never_divided(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_folder, "_GROUP_ROWS", 10)
    with ListsWriter(tmp_path, {"a": 1}) as writer:
        for number in range(20):
            documents = [(f"d{i}", int(i == 0), bytes([number, i] * 8)) for i in range(number % 5 + 1)]
            writer.add(f"q{number}", documents)
    lists = Lists(tmp_path)
    assert lists.settings == {"a": 1}
    assert (lists.num_queries, lists.num_pairs) == (20, 60)
    seen = [set(rows.query_ids) for rows in lists.rows()]
    assert len(seen) > 3
    assert sum(map(len, seen)) == 20, "no query in two row groups"
    assert list(lists.query_sizes()) == [(f"q{n}", n % 5 + 1) for n in range(20)]
    np.testing.assert_array_equal(lists.keys(), np.concatenate([rows.keys for rows in lists.rows()]))
    (part,) = lists.rows(3, 5)
    assert (part.start, part.query_ids, part.document_ids) == (3, ["q2", "q2"], ["d0", "d1"])
    assert part.relevance.tolist() == [1, 0]
