"""InPars' synthetic queries, v1 and toolkit."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from inranker_jax.corpora import MalformedReport, inpars, open_corpus, open_queries_any
from inranker_jax.errors import InputError
from inranker_jax.records import Document, Query
from tests.corpora.test_corpus import write

V1 = [
    {"question": "what is a?", "doc_text": "about a", "doc_id": "d1", "log_probs": [-0.5, -1]},
    {"question": "what is b?", "doc_text": "about b", "doc_id": 2, "log_probs": [-0.25]},
]
TOOLKIT = [
    {
        "doc_id": row["doc_id"],
        "text": row["doc_text"],
        "query": row["question"],
        "log_probs": row["log_probs"],
        "prompt_text": "Example 1: ...",
        "fewshot_examples": [],
    }
    for row in V1
]


@pytest.mark.parametrize("rows", [V1, TOOLKIT])
@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_both_kinds_give_the_same_queries(tmp_path: pathlib.Path, rows: list[Any], name: str) -> None:
    path = write(tmp_path / name, rows)
    first, second = inpars.read(path)
    assert first == inpars.SyntheticQuery(first.id, "what is a?", "d1", "about a", (-0.5, -1.0))
    assert (first.mean_log_prob, second.mean_log_prob) == (-0.75, -0.25)
    assert first.id == inpars.query_id("d1", "what is a?")
    assert first.id.startswith("d1-")
    assert len(first.id) == len("d1-") + 8
    queries = open_queries_any(path)
    assert queries.format == "inpars"
    assert list(queries.queries()) == [Query(first.id, "what is a?"), Query(second.id, "what is b?")]
    assert queries.positives == {first.id: ["d1"], second.id: ["2"]}
    assert list(open_corpus(path).documents()) == [Document("d1", "about a"), Document("2", "about b")]


def test_an_id_in_the_file_wins_and_a_query_may_have_several_positives(tmp_path: pathlib.Path) -> None:
    rows = [
        {"query_id": "q1", "query": "x", "doc_id": "a"},
        {"query_id": "q1", "query": "x", "doc_id": "b"},
        {"query_id": "q1", "query": "x", "doc_id": "a"},
    ]
    queries = open_queries_any(write(tmp_path / "q.jsonl", rows))
    assert list(queries.queries()) == [Query("q1", "x")]
    assert queries.positives == {"q1": ["a", "b"]}


def test_one_document_with_several_queries_is_one_document(tmp_path: pathlib.Path) -> None:
    rows = [{"doc_id": "a", "text": "t", "query": f"q{number}"} for number in range(3)]
    path = write(tmp_path / "q.jsonl", rows)
    corpus = open_corpus(path)
    assert list(corpus.documents()) == [Document("a", "t")]
    assert corpus.texts() == {"a": "t"}
    write(path, [*rows, {"doc_id": "a", "text": "other", "query": "q"}])
    with pytest.raises(
        InputError, match=r"q.jsonl:4: id 'a' occurs twice with another text, first on line 1"
    ):
        list(open_corpus(path).documents())


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"doc_id": "a"}, "missing_field", "no 'query'"),
        ({"doc_id": "a", "query": " "}, "empty_text", "the query of document 'a' is empty"),
        ({"query": "x"}, "missing_field", "no id"),
        ({"doc_id": "a", "query": "x", "text": 3}, "bad_field", "'text' is 3"),
        (
            {"doc_id": "a", "query": "x", "log_probs": ["-1"]},
            "bad_field",
            "'log_probs' is not a list of numbers",
        ),
        ({"doc_id": "a", "query": "x", "query_id": "q 1"}, "bad_id", "'query_id' is 'q 1'"),
    ],
)
def test_bad_rows_are_named(tmp_path: pathlib.Path, row: Any, kind: str, message: str) -> None:
    path = write(tmp_path / "q.jsonl", [TOOLKIT[0], row, TOOLKIT[1]])
    with pytest.raises(InputError, match=f"q.jsonl:2: {message}"):
        list(inpars.read(path))
    report = MalformedReport()
    assert len(list(inpars.read(path, on_malformed="skip", report=report))) == 2
    assert report.counts == {kind: 1}
    queries = open_queries_any(path, "inpars", on_malformed="skip")
    assert queries.positives is not None
    assert len(queries.positives) == 2
    assert queries.report.counts == {kind: 1}


def test_a_file_without_documents_is_no_corpus(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"doc_id": "a", "query": "x"}])
    assert next(inpars.read(path)).document is None
    with pytest.raises(InputError, match=r"q.jsonl:1: no 'text'"):
        list(open_corpus(path).documents())


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("scifact", "scifacts_synthetic_queries_100k.jsonl"),
        ("signal1m", "signal_synthetic_queries_100k.jsonl.gz"),
        ("webis-touche2020", "touche_synthetic_queries_100k.jsonl"),
        ("trec-covid", "trec_covid_synthetic_queries_100k.jsonl"),
        ("trec-covid", "trec-covid/queries.jsonl"),
        ("nq", "nq_synthetic_queries_100k.jsonl"),
    ],
)
def test_the_sets_are_found_however_they_are_spelt(tmp_path: pathlib.Path, dataset: str, name: str) -> None:
    path = write(tmp_path / name, V1)
    assert inpars.find(tmp_path, dataset) == str(path)
    with pytest.raises(InputError, match=r"queries_filtered_v2.jsonl"):
        inpars.find(tmp_path, dataset, filtered=True)
    best = write(tmp_path / dataset / "queries_filtered_v2.jsonl.gz", V1)
    assert inpars.find(tmp_path, dataset, filtered=True) == str(best)
    with pytest.raises(InputError, match=r"no synthetic queries of 'fiqa'.*fiqa/queries.jsonl"):
        inpars.find(tmp_path, "fiqa")
