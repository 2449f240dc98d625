"""BEIR folders: what a good one gives, and which line of a bad one is named."""

from __future__ import annotations

import gzip
import json

import pytest

from inranker_jax.corpora import beir
from inranker_jax.errors import InputError

CORPUS = [
    {"_id": "d1", "title": "Um", "text": "texto", "metadata": {"url": "x"}},
    {"_id": "d2", "text": "sem título"},
    {"_id": 3, "title": None, "text": ""},
]
QUERIES = [{"_id": "q1", "text": "um"}, {"_id": "q2", "text": "dois"}, {"_id": "q3", "text": "três"}]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "mini"
    (root / "qrels").mkdir(parents=True)
    _jsonl(root / "corpus.jsonl", CORPUS)
    _jsonl(root / "queries.jsonl", QUERIES)
    (root / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq3\td1\t2\nq1\td2\t1\nq9\td1\t1\n", encoding="utf-8"
    )
    return root


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def test_load_reads_documents_queries_and_judgments(folder):
    collection = beir.BeirCollection.load(folder)
    assert collection.name == "mini"
    assert {key: document.contents for key, document in collection.documents.items()} == {
        "d1": "Um texto",
        "d2": "sem título",
        "3": "",
    }
    assert list(collection.queries) == ["q1", "q2", "q3"]
    assert collection.qrels == {"q3": {"d1": 2}, "q1": {"d2": 1}, "q9": {"d1": 1}}
    assert list(collection.judged_queries) == ["q1", "q3"]
    assert collection.judged_without_text == ["q9"]


def test_other_judgments_and_name(folder, tmp_path):
    (tmp_path / "other.txt").write_text("q2 0 d1 1\n")
    collection = beir.BeirCollection.load(folder, "train", name="x", qrels_file=tmp_path / "other.txt")
    assert (collection.name, collection.qrels) == ("x", {"q2": {"d1": 1}})


def test_compressed_corpus(folder):
    data = (folder / "corpus.jsonl").read_bytes()
    (folder / "corpus.jsonl").unlink()
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(data))
    assert [document.id for document in beir.read_corpus(folder)] == ["d1", "d2", "3"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"_id": "a", "text": "x"}', '{"_id": "b", "text": '], r"corpus.jsonl:2: not JSON"),
        (["[1, 2]"], r"corpus.jsonl:1: a JSON list"),
        (['{"id": "a", "text": "x"}'], r"corpus.jsonl:1: '_id' is None"),
        (['{"_id": "a b", "text": "x"}'], r"corpus.jsonl:1: '_id' is 'a b'"),
        (['{"_id": "", "text": "x"}'], r"corpus.jsonl:1: '_id' is ''"),
        (['{"_id": "a", "Text": "x"}'], r"corpus.jsonl:1: no 'text'; did you mean 'Text'"),
        (['{"_id": "a", "text": ["x"]}'], r"corpus.jsonl:1: 'text' of 'a' is \['x'\]"),
        (['{"_id": "a", "text": "x", "title": 7}'], r"corpus.jsonl:1: 'title' of 'a' is 7"),
        (['{"_id": "a", "text": "x"}', "", '{"_id": "a", "text": "y"}'], r"corpus.jsonl:3: id 'a' .* line 1"),
        ([], r"the corpus is empty"),
    ],
)
def test_bad_corpus_line_is_named(folder, lines, message):
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        beir.BeirCollection.load(folder)


def test_missing_parts_are_named_with_suggestions(folder, tmp_path):
    with pytest.raises(InputError, match=r"no judgments for split 'tets'; .* has test. Did you mean 'test'"):
        beir.BeirCollection.load(folder, "tets")
    with pytest.raises(InputError, match=r"no such folder. Did you mean 'mini'"):
        beir.BeirCollection.load(tmp_path / "minni")
    (tmp_path / "other.txt").write_text("Q1 0 d1 1\n")
    with pytest.raises(InputError, match=r"other.txt: none of its queries \(such as 'Q1'\) is in"):
        beir.BeirCollection.load(folder, qrels_file=tmp_path / "other.txt")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"queries.jsonl: no such file"):
        beir.BeirCollection.load(folder)


def test_real_collections(shared_data):
    scifact = beir.BeirCollection.load(shared_data / "beir" / "scifact")
    assert (len(scifact.documents), len(scifact.judged_queries)) == (5183, 300)
    assert sum(map(len, scifact.qrels.values())) == 339
    train = beir.BeirCollection.load(shared_data / "beir" / "scifact", "train")
    assert (len(train.judged_queries), sum(map(len, train.qrels.values()))) == (809, 919)
