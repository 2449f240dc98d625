"""Measures against values worked out by hand, pytrec_eval itself, and the published DL 2019 figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pytrec_eval

from inranker_jax import records
from inranker_jax.errors import InputError
from inranker_jax.evaluation import measures

QRELS = {"q": {"a": 3, "b": 0, "c": 1, "d": 2}}
RUN = {"q": {"b": 5.0, "a": 4.0, "x": 3.0, "c": 2.0}}


def _dcg(gains):
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def test_ndcg_by_hand_in_both_gains():
    # Ranking b(0) a(3) x(unjudged) c(1); ideal 3 2 1 0 counts d, which was not retrieved.
    linear = measures.evaluate(RUN, QRELS, ["ndcg_cut_10", "ndcg_cut_2"])
    assert linear["q"]["ndcg_cut_10"] == pytest.approx(_dcg([0, 3, 0, 1]) / _dcg([3, 2, 1]), abs=1e-12)
    assert linear["q"]["ndcg_cut_2"] == pytest.approx(_dcg([0, 3]) / _dcg([3, 2]), abs=1e-12)
    exponential = measures.evaluate(RUN, QRELS, ["ndcg_cut_10", "P_10", "recall_100"], gain="exponential")
    assert exponential["q"]["ndcg_cut_10"] == pytest.approx(_dcg([0, 7, 0, 1]) / _dcg([7, 3, 1]), abs=1e-12)
    assert exponential["q"]["P_10"] == pytest.approx(0.2)
    assert exponential["q"]["recall_100"] == pytest.approx(2 / 3)


def test_other_measures_by_hand():
    row = measures.evaluate(RUN, QRELS, ["map", "P_10", "recall_100", "recip_rank", "success_1"])["q"]
    assert row == pytest.approx(
        {"map": (1 / 2 + 2 / 4) / 3, "P_10": 0.2, "recall_100": 2 / 3, "recip_rank": 0.5, "success_1": 0.0}
    )


@pytest.mark.parametrize(("rank", "expected"), [(1, 1.0), (10, 0.1), (11, 0.0)])
def test_mrr_at_ten_sees_ten_documents(rank, expected):
    run = {"q": {f"x{i:02d}": float(-i) for i in range(1, 20)}}
    run["q"]["a"] = -rank + 0.5
    row = measures.evaluate(run, {"q": {"a": 1}}, ["recip_rank_10", "recip_rank", "recip_rank_3"])["q"]
    assert row["recip_rank_10"] == pytest.approx(expected)
    assert row["recip_rank"] == pytest.approx(1 / rank)
    assert row["recip_rank_3"] == pytest.approx(1.0 if rank == 1 else 0.0)


def test_missing_queries_score_zero_and_count():
    qrels = {**QRELS, "absent": {"a": 1}, "empty": {"a": 1}, "unjudged": {}, "irrelevant": {"a": 0}}
    run = {**RUN, "empty": {}, "irrelevant": {"a": 1.0}, "not in qrels": {"a": 1.0}}
    values = measures.evaluate(run, qrels, ["ndcg_cut_10", "recip_rank_10"])
    assert list(values) == list(qrels)
    zero = {"ndcg_cut_10": 0.0, "recip_rank_10": 0.0}
    assert values["absent"] == values["empty"] == values["unjudged"] == values["irrelevant"] == zero
    assert measures.aggregate(values)["ndcg_cut_10"] == pytest.approx(values["q"]["ndcg_cut_10"] / 5)
    assert measures.aggregate(measures.evaluate({}, QRELS, ["map"])) == {"map": 0.0}


def test_ties_go_to_the_highest_document_id():
    tied = {"q": {"a": 1.0, "b": 1.0}}
    for cut_by_us, by_trec_eval in [("recip_rank_1", "success_1"), ("recip_rank_10", "recip_rank")]:
        row = measures.evaluate(tied, {"q": {"a": 1}}, [cut_by_us, by_trec_eval])["q"]
        assert row[cut_by_us] == row[by_trec_eval]
    assert measures.evaluate(tied, {"q": {"b": 1}}, ["P_1"])["q"]["P_1"] == 1.0
    # The same in float32, although the first score is larger in float64.
    close = {"q": {"a": 0.1 + 1e-9, "b": 0.1}}
    row = measures.evaluate(close, {"q": {"b": 1}}, ["P_1", "recip_rank_1"])["q"]
    assert row == {"P_1": 1.0, "recip_rank_1": 1.0}


def test_documents_with_the_query_id_are_dropped_like_in_beir():
    run, qrels = {"q": {"q": 9.0, "a": 1.0}}, {"q": {"a": 1}}
    assert measures.evaluate(run, qrels, ["P_1"])["q"]["P_1"] == 1.0
    assert measures.evaluate(run, qrels, ["P_1"], drop_identical_ids=False)["q"]["P_1"] == 0.0
    assert measures.evaluate({"q": {"q": 9.0}}, qrels, ["P_1"])["q"]["P_1"] == 0.0
    assert measures.identical_ids({**run, "z": {"z": 1.0}}, qrels) == (1, 0)
    assert measures.identical_ids(run, {"q": {"q": 1}}) == (1, 1)


def _random_case(seed):
    random = np.random.default_rng(seed)
    qrels = {
        f"q{i}": {f"d{j}": int(random.integers(-1, 5)) for j in random.choice(60, 25, replace=False)}
        for i in range(12)
    }
    run = {
        f"q{i}": {f"d{j}": float(np.round(random.normal(), 1)) for j in random.choice(60, 40, replace=False)}
        for i in range(12)
    }
    return run, qrels


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pytrec_eval(seed):
    run, qrels = _random_case(seed)
    names = [
        "ndcg_cut_10",
        "ndcg_cut_20",
        "map",
        "P_10",
        "recall_100",
        "recall_5",
        "ndcg",
        "recip_rank",
        "bpref",
    ]
    ours = measures.evaluate(run, qrels, names)
    oracle = pytrec_eval.RelevanceEvaluator(qrels, set(names)).evaluate(run)
    for query in qrels:
        for name in names:
            assert ours[query][name] == oracle[query][name]


@pytest.mark.parametrize("seed", range(4))
def test_exponential_gain_against_a_direct_computation(seed):
    run, qrels = _random_case(seed)
    ours = measures.evaluate(run, qrels, ["ndcg_cut_10"], gain="exponential")
    for query, grades in qrels.items():
        gains = {document: 2 ** max(grade, 0) - 1 for document, grade in grades.items()}
        # Python's sort is stable: ids descending first, then scores descending.
        order = sorted(sorted(run[query], reverse=True), key=lambda d, q=query: -run[q][d])
        ideal = sorted(gains.values(), reverse=True)
        expected = _dcg([gains.get(document, 0) for document in order[:10]]) / _dcg(ideal[:10])
        assert ours[query]["ndcg_cut_10"] == pytest.approx(expected, abs=1e-9)


def test_a_run_file_gives_the_same_values(tmp_path):
    random = np.random.default_rng(0)
    run, qrels = _random_case(0)
    # Steps of 1e-8 around 1 are below float32's resolution: many scores differ in float64 only.
    run = {q: {d: 1 + float(random.integers(50)) * 1e-8 for d in scores} for q, scores in run.items()}
    records.write_run(tmp_path / "r.trec", run, "t")
    names = [*measures.DEFAULT_MEASURES, "recip_rank_3"]
    again = measures.evaluate(records.read_run(tmp_path / "r.trec"), qrels, names)
    assert again == measures.evaluate(run, qrels, names)


def test_labels():
    assert [measures.label(name) for name in measures.DEFAULT_MEASURES] == [
        "nDCG@10", "nDCG@20", "MRR@10", "MAP", "P@10", "R@100", "R@1000",
    ]  # fmt: skip


def test_bad_arguments_are_explained():
    with pytest.raises(InputError, match=r"unknown measure 'ndgc_cut_10'. Did you mean 'ndcg_cut_10'"):
        measures.evaluate(RUN, QRELS, ["ndgc_cut_10"])
    with pytest.raises(InputError, match="unknown measure 'recall_0'"):
        measures.evaluate(RUN, QRELS, ["recall_0"])
    with pytest.raises(InputError, match="Did you mean 'exponential'"):
        measures.evaluate(RUN, QRELS, gain="exponental")
    with pytest.raises(InputError, match="document 'a' for query 'q' is not a number"):
        measures.evaluate({"q": {"a": float("nan")}}, QRELS)
    with pytest.raises(InputError, match="grades up to 16; got 99"):
        measures.evaluate(RUN, {"q": {"a": 99}}, gain="exponential")


@pytest.mark.parametrize(("run", "expected"), [("bm25", "0.5058"), ("spladepp", "0.7308")])
def test_published_dl_2019_figures(shared_data, run, expected):
    folder = shared_data / "beir" / "trec-dl-2019-pool"
    values = measures.evaluate(
        records.read_run(folder / "runs" / f"{run}.top100.trec"),
        records.read_qrels(folder / "qrels" / "full-official.tsv"),
        ["ndcg_cut_10"],
    )
    assert len(values) == 43
    assert f"{measures.aggregate(values)['ndcg_cut_10']:.4f}" == expected
