"""Reranking: the head is the model's, the tail keeps its order, finished queries outlive a kill."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest

from inranker_jax import records
from inranker_jax.errors import InputError
from inranker_jax.evaluation import measures
from inranker_jax.evaluation.reranking import Progress, Reranking, check_candidates, one_by_one, rerank
from inranker_jax.evaluation.score_memory import ScoreMemory
from tests.evaluation.tiny_collection import QRELS, collection, overlap

RUN = {
    "q1": {"d3": 9.0, "d1": 8.0, "d5": 7.0, "d2": 6.0, "d4": 5.0},
    "q2": {"d6": 3.0, "d2": 2.0},
    "q3": {},
    "q4": {"d1": 1.0},
}


def _scorer(calls=None):
    def score_pairs(pairs):
        if calls is not None:
            calls.append(list(pairs))
        return np.array(overlap(pairs), np.float32)

    return score_pairs


def test_head_is_reordered_and_tail_follows_in_its_order():
    result = rerank(RUN, collection(), _scorer(), depth=3)
    # Shared words over length: d5 1/3, d1 1/6, d3 1/4 of the first three; then d2, d4 as they were.
    assert list(result["q1"]) == ["d5", "d3", "d1", "d2", "d4"]
    assert list(result["q1"].values()) == pytest.approx([1 / 3, 1 / 4, 1 / 6, 1 / 6 - 1, 1 / 6 - 2])
    assert result["q2"] == pytest.approx({"d6": 1.0, "d2": 1 / 3})
    assert result["q3"] == {}
    assert "q4" not in result


def test_recall_is_that_of_the_candidates_and_scores_survive_a_file(tmp_path):
    result = rerank(RUN, collection(), _scorer(), depth=2)
    for query in result:
        assert result[query].keys() == RUN[query].keys()
    assert (
        measures.evaluate(result, QRELS, ["recall_100"]) == measures.evaluate(RUN, QRELS, ["recall_100"])
    )  # fmt: skip
    records.write_run(tmp_path / "r", result, "t")
    assert {q: list(s) for q, s in records.read_run(tmp_path / "r").items()} == {
        q: list(s) for q, s in result.items() if s
    }


@pytest.mark.parametrize("level", [0.0, -1e9, 3e7, -2e38])
def test_tail_stays_below_the_head_in_float32(level):
    run = {"q1": {"d1": 5.0, "d2": 4.0, "d3": 3.0, "d4": 2.0}}
    result = rerank(run, collection(), lambda pairs: np.full(len(pairs), level), depth=1)
    scores = np.array(list(result["q1"].values()), np.float32)
    assert list(result["q1"]) == ["d1", "d2", "d3", "d4"]
    assert (np.diff(scores) < 0).all()
    assert np.isfinite(scores).all()


def test_ties_of_the_model_go_to_the_highest_id():
    result = rerank(RUN, collection(), lambda pairs: np.zeros(len(pairs)), depth=10)
    assert list(result["q1"]) == ["d5", "d4", "d3", "d2", "d1"]


@pytest.mark.parametrize("size", [1, 4, 6, 1000])
def test_calls_are_whole_queries_with_their_texts(size):
    calls = []
    whole = rerank(RUN, collection(), _scorer(), depth=3)
    assert rerank(RUN, collection(), _scorer(calls), depth=3, pairs_per_call=size) == whole
    assert [len(call) for call in calls] == {1: [3, 2], 4: [5], 6: [5], 1000: [5]}[size]
    assert calls[0][0] == ("shock wave", "a wave of heat")


def test_bad_candidates_and_scores_are_named():
    with pytest.raises(InputError, match=r"document 'd9' \(query 'q1'\) is not in the corpus of 'mini'"):
        rerank({"q1": {"d9": 1.0}}, collection(), _scorer())
    lost = collection()
    del lost.queries["q2"]
    with pytest.raises(InputError, match=r"run.trec: query 'q2' is judged but not among the queries"):
        check_candidates(RUN, lost, "run.trec")
    with pytest.raises(InputError, match=r"query 'q1', document 'd1' is nan \(1 of 7"):
        rerank(RUN, collection(), lambda pairs: [0, np.nan, 0, 0, 0, 0, 0])
    with pytest.raises(InputError, match=r"shape \(7, 2\) for 7 pairs"):
        rerank(RUN, collection(), lambda pairs: np.zeros((len(pairs), 2)))
    with pytest.raises(InputError, match="at least 1; got 0"):
        rerank(RUN, collection(), _scorer(), depth=0)


class _Killed(Exception):
    pass


def _interrupted(path, after):
    """Reranks one query a call, and dies in the call `after`."""
    calls = []

    def score_pairs(pairs):
        if len(calls) == after:
            raise _Killed
        calls.append(len(pairs))
        return np.array(overlap(pairs), np.float32)

    memory = ScoreMemory(path, "settings")
    try:
        return rerank(RUN, collection(), score_pairs, 3, pairs_per_call=1, memory=memory), calls
    finally:
        memory.close()


def test_finished_queries_are_not_scored_again(tmp_path):
    path = tmp_path / "new" / "unfinished.jsonl"
    with pytest.raises(_Killed):
        _interrupted(path, after=1)
    result, calls = _interrupted(path, after=9)
    assert calls == [2]
    assert result == rerank(RUN, collection(), _scorer(), 3)
    _, calls = _interrupted(path, after=0)
    assert calls == []


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_a_torn_last_line_is_scored_again(tmp_path, cut):
    path = tmp_path / "unfinished.jsonl"
    _interrupted(path, after=9)
    path.write_bytes(path.read_bytes()[:-cut])
    result, calls = _interrupted(path, after=9)
    assert calls == [2]
    assert result == rerank(RUN, collection(), _scorer(), 3)
    assert [json.loads(line).get("query") for line in path.read_text().splitlines()] == [None, "q1", "q2"]


def test_memory_of_other_settings_or_candidates_is_not_used(tmp_path):
    path = tmp_path / "unfinished.jsonl"
    _interrupted(path, after=9)
    memory = ScoreMemory(path, "other settings")
    assert len(memory) == 0
    memory.close()
    _interrupted(path, after=9)
    calls = []
    memory = ScoreMemory(path, "settings")
    rerank({"q1": {"d1": 1.0}}, collection(), _scorer(calls), 3, memory=memory)
    memory.close()
    assert [len(call) for call in calls] == [1]


def test_progress_tells_rate_and_time_left():
    lines, clock = [], iter([0.0, 0.0, 4.0, 10.0, 11.0, 20.0])
    progress = Progress("scifact model", lines.append, every=10, now=lambda: next(clock))
    progress.start(100)
    for _ in range(4):
        progress.advance(25)
    assert lines == [
        "scifact model: 50/100 pairs  5.0 pairs/s  10s left",
        "scifact model: 100/100 pairs  5.0 pairs/s  done",
    ]


def _memory(path, index=0):
    return contextlib.closing(ScoreMemory(path, "settings", index))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_processes_score_the_same_groups_whatever_their_number(tmp_path, count):
    run = {f"q{i % 3 + 1}": RUN["q1"] for i in range(3)}
    alone = []
    whole = rerank(run, collection(), _scorer(alone), 2, pairs_per_call=2)
    calls = []
    for index in range(count):
        with _memory(tmp_path / "u.jsonl", index) as memory:
            work = Reranking(run, collection(), 2, 2, memory)
            work.score(one_by_one(_scorer(calls)), (index, count))
            assert (work.unfinished() == []) == (index >= min(count, 3) - 1)
    assert sorted(calls) == sorted(alone)
    with _memory(tmp_path / "u.jsonl", 9) as memory:
        assert Reranking(run, collection(), 2, 2, memory).result() == whole


def test_a_group_of_which_a_part_is_known_is_scored_whole(tmp_path):
    """Its pairs share calls: apart from each other they would get other roundings."""
    with _memory(tmp_path / "u.jsonl") as memory:
        rerank(RUN, collection(), _scorer(), 3, pairs_per_call=1000, memory=memory)
    lines = (tmp_path / "u.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "u.jsonl").write_bytes(b"".join(lines[:-1]))
    calls = []
    with _memory(tmp_path / "u.jsonl") as memory:
        result = rerank(RUN, collection(), _scorer(calls), 3, pairs_per_call=1000, memory=memory)
    assert [len(call) for call in calls] == [5]
    assert result == rerank(RUN, collection(), _scorer(), 3)


def test_a_stream_of_groups_is_kept_group_by_group_and_closed(tmp_path):
    """The next group is asked for before the scores of the one before it are there, as `Reranker` does."""
    asked, closed = [], []

    def score_groups(groups):
        waiting = None
        try:
            for group in groups:
                asked.append(len(group))
                if waiting is not None:
                    yield waiting
                waiting = overlap(group)
            yield waiting
        finally:
            closed.append(True)

    def stop():
        raise KeyboardInterrupt

    with _memory(tmp_path / "u.jsonl") as memory:
        work = Reranking(RUN, collection(), 3, 1, memory)
        with pytest.raises(KeyboardInterrupt):
            work.score(score_groups, check=stop)
        assert (asked, closed, work.unfinished()) == ([3, 2], [True], [1])
        work.score(score_groups)
        assert asked == [3, 2, 2]
        assert work.result() == rerank(RUN, collection(), _scorer(), 3)


def test_a_model_that_loses_a_group_is_no_result():
    with pytest.raises(RuntimeError, match="no scores for 1 groups"):
        Reranking(RUN, collection(), 3, 1).score(lambda groups: (overlap(g) for g in list(groups)[:1]))
