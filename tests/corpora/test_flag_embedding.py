"""FlagEmbedding's files: read as labels, queries and corpus, and written."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from inranker_jax.corpora import MalformedReport, flag_embedding, open_corpus, open_queries_any
from inranker_jax.corpora.inranker import read_beir_jsonl, text_id
from inranker_jax.errors import InputError
from inranker_jax.records import LabelledPair, Query
from tests.corpora.test_corpus import write

ROW = {
    "query": "q",
    "pos": ["a"],
    "neg": ["b", "c"],
    "pos_scores": [3.0],
    "neg_scores": [-1, 0.5],
    "prompt": "Find",
}


def test_scores_are_margins(tmp_path: pathlib.Path) -> None:
    pairs = list(flag_embedding.read(write(tmp_path / "f.jsonl.gz", [ROW])))
    assert [(pair.query, pair.document, pair.logits) for pair in pairs] == [
        ("q", "a", (-1.5, 1.5)),
        ("q", "b", (0.5, -0.5)),
        ("q", "c", (-0.25, 0.25)),
    ]
    assert {pair.query_id for pair in pairs} == {text_id("q")}
    assert [pair.document_id for pair in pairs] == [text_id("a"), text_id("b"), text_id("c")]


def test_as_queries_and_as_corpus(tmp_path: pathlib.Path) -> None:
    other = {"query": "r", "pos": ["b"], "neg": ["a"]}
    path = write(tmp_path / "f.jsonl", [ROW, other, {"query": "q", "pos": ["c"]}])
    queries = open_queries_any(path)
    assert list(queries.queries()) == [Query(text_id("q"), "q"), Query(text_id("r"), "r")]
    assert queries.positives == {text_id("q"): [text_id("a"), text_id("c")], text_id("r"): [text_id("b")]}
    assert open_corpus(path).texts() == {text_id(text): text for text in "abc"}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"pos_scores": None}, "missing_field", "no 'pos_scores': the row has no teacher labels"),
        ({"neg_scores": [1]}, "bad_field", "'neg_scores': 1 scores for 2 documents"),
        ({"neg_scores": [1, "2"]}, "bad_field", "'neg_scores' holds '2'"),
        ({"neg_scores": [1, float("nan")]}, "bad_field", "'neg_scores' holds nan"),
        ({"pos": []}, "missing_field", "'pos' is empty"),
        ({"pos": "a"}, "bad_field", "'pos' is not a list"),
        ({"neg": [None]}, "missing_field", "'neg' is null"),
        ({"neg": ["", "c"]}, "empty_text", "a document of 'neg' is empty"),
        ({"query": " "}, "empty_text", "the query is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path: pathlib.Path, change: Any, kind: str, message: str) -> None:
    path = write(tmp_path / "f.jsonl", [ROW, {**ROW, **change}])
    with pytest.raises(InputError, match=f"f.jsonl:2: {message}"):
        list(flag_embedding.read(path))
    report = MalformedReport()
    assert len(list(flag_embedding.read(path, on_malformed="skip", report=report))) == 3
    assert report.counts == {kind: 1}


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.jsonl.zst"])
def test_what_is_written_reads_back(tmp_path: pathlib.Path, name: str) -> None:
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    pairs = list(flag_embedding.read(write(tmp_path / "in.jsonl", [ROW, {**ROW, "query": "r"}])))
    assert flag_embedding.write(tmp_path / name, iter(pairs), prompt="Find") == 2
    assert list(flag_embedding.read(tmp_path / name)) == pairs
    if name == "f.jsonl":
        assert json.loads((tmp_path / name).read_text().splitlines()[0]) == ROW


def test_positives_by_judgment_and_what_cannot_be_written(tmp_path: pathlib.Path) -> None:
    pairs = [LabelledPair("q", key, "text", f"document {key}", (0.0, 1.0)) for key in "abc"]
    flag_embedding.write(tmp_path / "f.jsonl", pairs, relevant={"q": {"b", "c"}})
    row = json.loads((tmp_path / "f.jsonl").read_text())
    assert (row["pos"], row["neg"]) == (["document b", "document c"], ["document a"])
    with pytest.raises(InputError, match="cannot write query 'q': none of its documents is relevant"):
        flag_embedding.write(tmp_path / "g.jsonl", pairs, relevant={})
    again = [*pairs, LabelledPair("r", "a", "other", "d", (0.0, 1.0)), pairs[0]]
    with pytest.raises(InputError, match="the pairs of query 'q' are not consecutive"):
        flag_embedding.write(tmp_path / "g.jsonl", again)
    assert [path.name for path in tmp_path.iterdir()] == ["f.jsonl"]


def test_real_labels_keep_their_margins(shared_data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pairs = list(read_beir_jsonl(shared_data / "teacher" / "cranfield_synthetic.jsonl"))
    assert flag_embedding.write(tmp_path / "f.jsonl", pairs) == 400
    assert list(flag_embedding.read(tmp_path / "f.jsonl")) == pairs
