"""Reports: averages as BEIR counts them, tables, and files that say what the object says."""

from __future__ import annotations

import csv
import json

import pytest

from inranker_jax import records
from inranker_jax.evaluation import measures
from inranker_jax.evaluation.pipeline import evaluate_systems
from inranker_jax.evaluation.reports import DatasetSummary, Report, format_table, slug
from tests.evaluation.tiny_collection import QRELS, collection, overlap

RUN = {"q1": {"d3": 9.0, "d1": 8.0, "d5": 7.0}, "q2": {"d6": 3.0, "d2": 2.0}, "q3": {"d1": 1.0}}


def _summary(name, queries=10, **ndcg):
    return DatasetSummary(name, "test", queries, {key: {"ndcg_cut_10": value} for key, value in ndcg.items()})


def test_systems_are_measured_side_by_side():
    report = evaluate_systems(
        collection(),
        RUN,
        {"BM25": RUN, "student": overlap, "teacher": {"q3": {"d4": 1.0}}},
        10,
        ["ndcg_cut_10"],
    )
    assert list(report.summary.systems) == list(report.runs) == ["BM25", "student", "teacher"]
    assert report.summary.systems["teacher"]["ndcg_cut_10"] == pytest.approx(1 / 3)
    for system, run in report.runs.items():
        assert report.per_query[system] == measures.evaluate(run, QRELS, ["ndcg_cut_10"])
    assert report.table().splitlines()[0].split() == ["mini", "nDCG@10"]
    assert report.table().splitlines()[3].split() == ["teacher", "0.3333"]
    assert len({len(line) for line in report.table().splitlines()}) == 1


def test_identical_ids_are_neither_reranked_nor_measured():
    docs = collection()
    docs.documents["q1"] = docs.documents["d6"]
    run = {"q1": {"q1": 5.0, "d1": 1.0}}
    seen = []

    def score_pairs(pairs):
        seen.extend(pairs)
        return overlap(pairs)

    report = evaluate_systems(docs, run, {"first": run, "model": score_pairs}, 10, ["P_1"])
    assert report.runs["first"]["q1"] == {"d1": 1.0}
    assert [document for _, document in seen] == ["shock waves over a flat plate"]
    kept = evaluate_systems(docs, run, {"first": run}, 10, ["P_1"], drop_identical_ids=False)
    assert list(kept.runs["first"]["q1"]) == ["q1", "d1"]


def test_files_hold_what_the_report_says(tmp_path):
    report = evaluate_systems(collection(), RUN, {"bm25": RUN, "trained student": overlap})
    report.write(tmp_path / "mini")
    assert sorted(path.name for path in (tmp_path / "mini").iterdir()) == [
        "bm25.trec", "per_query.tsv", "result.json", "trained_student.trec",
    ]  # fmt: skip
    for system, run in report.runs.items():
        back = records.read_run(tmp_path / "mini" / f"{slug(system)}.trec")
        assert measures.evaluate(back, QRELS) == report.per_query[system]
        assert {query: list(scores) for query, scores in back.items()} == {
            query: records.ranking(scores) for query, scores in run.items()
        }
    with open(tmp_path / "mini" / "per_query.tsv", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    assert [(row["system"], row["query"]) for row in rows] == [
        (system, query) for system in report.runs for query in QRELS
    ]
    for row in rows:
        assert float(row["map"]) == pytest.approx(
            report.per_query[row["system"]][row["query"]]["map"], abs=1e-6
        )
    stored = json.loads((tmp_path / "mini" / "result.json").read_text())
    assert DatasetSummary.from_dict(stored) == report.summary


def test_average_gives_every_row_the_same_weight_and_cqadupstack_is_one_row():
    report = Report(
        (
            _summary("scifact", 300, bm25=0.6, model=0.8),
            _summary("cqadupstack/android", 10, bm25=0.2, model=0.4),
            _summary("arguana", 50, bm25=0.3, model=0.3),
            _summary("cqadupstack/english", 90, bm25=0.4, model=0.6),
        )
    )
    rows = report.rows()
    assert list(rows) == ["scifact", "cqadupstack", "arguana"]
    assert rows["cqadupstack"][0] == 100
    assert rows["cqadupstack"][1]["bm25"]["ndcg_cut_10"] == pytest.approx(0.3)
    assert report.average()["bm25"]["ndcg_cut_10"] == pytest.approx((0.6 + 0.3 + 0.3) / 3)
    assert report.average()["model"]["ndcg_cut_10"] == pytest.approx((0.8 + 0.5 + 0.3) / 3)
    values = report.to_dict(checkpoint="x")
    assert values["checkpoint"] == "x"
    assert list(values["datasets"]) == ["scifact", "cqadupstack/android", "arguana", "cqadupstack/english"]
    assert values["average_over"] == list(rows)
    assert values["cqadupstack"]["model"]["ndcg_cut_10"] == pytest.approx(0.5)
    assert report.table().splitlines() == [
        "nDCG@10                       queries    bm25   model",
        "scifact                           300  0.6000  0.8000",
        "cqadupstack (2 of 12 forums)      100  0.3000  0.5000",
        "arguana                            50  0.3000  0.3000",
        "average of 3                           0.4000  0.5333",
    ]


def test_all_forums_need_no_remark_and_one_row_no_average():
    report = Report(tuple(_summary(f"cqadupstack/{i}", bm25=i / 12) for i in range(12)))
    assert report.table().splitlines()[1:] == ["cqadupstack      120  0.4583"]


def test_a_system_that_some_rows_lack_has_no_average():
    report = Report((_summary("a", bm25=0.5, model=0.6), _summary("b", candidates=0.1, model=0.2)))
    assert report.average() == {"model": {"ndcg_cut_10": pytest.approx(0.4)}}
    assert report.table().splitlines()[-1].split() == ["average", "of", "2", "-", "0.4000", "-"]


def test_format_table_aligns():
    assert format_table(["a", "bb"], [["long name", "1"], ["x", "22"]]) == (
        "a          bb\nlong name   1\nx          22"
    )


def test_slug():
    assert [slug(name) for name in ("bm25", "trained student", "a/b:c", "é", "//")] == [
        "bm25", "trained_student", "a_b_c", "é", "system",
    ]  # fmt: skip
