"""One dataset from a folder to its report: candidates, notes, settings, and what is computed again."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from inranker_jax import records
from inranker_jax.errors import InputError
from inranker_jax.evaluation.pipeline import Model, Settings, evaluate_dataset
from inranker_jax.evaluation.shared_work import SharedWork
from inranker_jax.labeling.processes import Processes
from tests.evaluation.tiny_collection import overlap, write_beir


@pytest.fixture
def mini(tmp_path):
    return write_beir(tmp_path / "mini")


class _Counting:
    """A model that counts its pairs, and can die after some."""

    def __init__(self, identity="m", dies_at=None):
        self.pairs, self.dies_at = 0, dies_at
        self.model = Model(self, {"fingerprint": identity})

    def __call__(self, pairs):
        if self.dies_at is not None and self.pairs + len(pairs) > self.dies_at:
            raise KeyboardInterrupt
        self.pairs += len(pairs)
        return np.array(overlap(pairs), np.float32)


def _evaluate(mini, out, settings=None, model=None, **files):
    lines = []
    summary = evaluate_dataset(
        "mini", mini, out, settings or Settings(), model, announce=lines.append, **files
    )  # fmt: skip
    return summary, lines


def test_bm25_alone_then_a_model(mini, tmp_path):
    out = tmp_path / "out"
    summary, _ = _evaluate(mini, out)
    assert list(summary.systems) == ["bm25"]
    assert summary.queries == 3
    assert set(records.read_run(out / "bm25.trec")) == {"q1", "q2", "q3"}
    counting = _Counting()
    summary, _ = _evaluate(mini, out, model=counting.model)
    assert list(summary.systems) == ["bm25", "model"]
    assert counting.pairs == sum(map(len, records.read_run(out / "bm25.trec").values()))
    assert summary.provenance["documents"] == 6
    assert summary.provenance["settings"]["k1"] == 0.9
    assert summary.provenance["model"] == {"fingerprint": "m"}
    assert not (out / "unfinished.jsonl").exists()


def test_finished_dataset_is_read_back_until_something_changes(mini, tmp_path):
    out, counting = tmp_path / "out", _Counting()
    first, _ = _evaluate(mini, out, model=counting.model)
    pairs = counting.pairs
    again, lines = _evaluate(mini, out, model=counting.model)
    assert again == first
    assert counting.pairs == pairs
    assert lines == [f"mini: finished in {out}, not computed again"]

    changes = [
        lambda: _evaluate(mini, out, Settings(depth=1), counting.model),
        lambda: _evaluate(mini, out, Settings(depth=1), _Counting("other").model),
        lambda: _evaluate(mini, out, Settings(depth=1)),
    ]
    for change in changes:
        summary, lines = change()
        assert not any("not computed again" in line for line in lines)
        assert change()[0] == summary
    text = (mini / "corpus.jsonl").read_text()
    (mini / "corpus.jsonl").write_text(text.replace("slipstream", "airstream"))
    assert not any("not computed again" in line for line in _evaluate(mini, out, Settings(depth=1))[1])


def test_interrupted_dataset_goes_on(mini, tmp_path):
    by_query = Settings(pairs_per_call=1)
    whole, _ = _evaluate(mini, tmp_path / "whole", by_query, _Counting().model)
    out, dying = tmp_path / "out", _Counting(dies_at=4)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(mini, out, by_query, dying.model)
    assert not (out / "result.json").exists()
    counting = _Counting()
    summary, lines = _evaluate(mini, out, by_query, counting.model)
    assert lines[0].startswith("mini: going on after")
    assert 0 < counting.pairs < counting.pairs + dying.pairs
    assert summary.systems == whole.systems
    for name in ("bm25.trec", "model.trec", "per_query.tsv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_overrides_hold_for_their_dataset_only():
    settings = Settings(
        overrides={"mini": {"language": "portuguese", "depth": 7}, "cqadupstack": {"k1": 1.2}, "x": {"b": 0}}
    )
    mini = settings.for_dataset("mini")
    assert (mini.language, mini.depth, mini.k1, mini.overrides) == ("portuguese", 7, 0.9, {})
    assert settings.for_dataset("cqadupstack/android").k1 == 1.2
    assert settings.for_dataset("other") == dataclasses.replace(settings, overrides={})
    with pytest.raises(
        InputError, match=r"dataset 'a': there is no setting 'langage'. Did you mean 'language'"
    ):
        Settings(overrides={"a": {"langage": "english"}}).for_dataset("a")


def test_candidates_from_a_run_and_other_judgments(mini, tmp_path):
    (tmp_path / "r.trec").write_text("q1 Q0 d3 1 2 t\nq1 Q0 d1 2 1 t\nq4 Q0 d6 1 1 t\n")
    (tmp_path / "q.txt").write_text("q1 0 d1 1\nq4 0 d6 1\n")
    files = {"run_file": tmp_path / "r.trec", "qrels_file": tmp_path / "q.txt"}
    summary, _ = _evaluate(mini, tmp_path / "out", Settings(measures=("recip_rank",)), **files)
    assert summary.queries == 2
    assert summary.systems == {"candidates": {"recip_rank": 0.75}}
    assert summary.provenance["candidates"] == str(tmp_path / "r.trec")


def test_run_of_something_else_is_refused(mini, tmp_path):
    for text, message in [
        ("q1 Q0 d1 1 2 t\nq2 Q0 d77 1 2 t\n", r"r.trec: document 'd77' \(query 'q2'\) is not in the corpus"),
        ("z Q0 d1 1 2 t\n", r"r.trec: no query of this run is judged in 'mini'"),
    ]:
        (tmp_path / "r.trec").write_text(text)
        with pytest.raises(InputError, match=message):
            _evaluate(mini, tmp_path / "out", run_file=tmp_path / "r.trec")


def test_judged_only_ranks_the_pool(mini, tmp_path):
    summary, _ = _evaluate(mini, tmp_path / "out", Settings(judged_only=True))
    run = records.read_run(tmp_path / "out" / "bm25.trec")
    assert {query: set(documents) for query, documents in run.items()} == {
        "q1": {"d1", "d5"}, "q2": {"d2", "d6"}, "q3": {"d4"},
    }  # fmt: skip
    assert summary.systems["bm25"]["recall_100"] == 1.0


def test_depth_limits_the_model_and_not_the_candidates(mini, tmp_path):
    counting = _Counting()
    summary, _ = _evaluate(mini, tmp_path / "out", Settings(depth=1), counting.model)
    assert counting.pairs == 3
    assert summary.systems["bm25"] == summary.systems["model"]
    _evaluate(mini, tmp_path / "few", Settings(depth=1, candidates=2))
    assert {len(row) for row in records.read_run(tmp_path / "few" / "bm25.trec").values()} == {1, 2}


def test_the_reader_is_told_what_the_numbers_hide(mini, tmp_path):
    with open(mini / "qrels" / "test.tsv", "a") as qrels:
        qrels.write("lost\td1\t1\nq4\tq4\t1\nq9\td1\t1\n")
    with open(mini / "queries.jsonl", "a") as queries:
        queries.write(json.dumps({"_id": "q9", "text": "zebra"}) + "\n")
    summary, lines = _evaluate(mini, tmp_path / "out")
    assert summary.queries == 6
    assert lines == [f"mini: {note}" for note in summary.notes]
    assert [note[:52] for note in summary.notes] == [
        "1 judged queries (such as 'lost') are not in queries",
        "1 judged queries have no candidates; they score 0 an",
        "1 queries share their id with a document that is jud",
    ]
    assert len(_evaluate(mini, tmp_path / "out", Settings(drop_identical_ids=False))[0].notes) == 2


def test_bad_settings_fail_before_any_work(mini, tmp_path):
    counting = _Counting()
    for settings in (Settings(measures=("ndcg10",)), Settings(gain="cubic"), Settings(split="dev")):
        with pytest.raises(InputError):
            _evaluate(mini, tmp_path / "out", settings, counting.model)
    assert counting.pairs == 0
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text("{")
    with pytest.raises(InputError, match=r"result.json: not a result of this program"):
        _evaluate(mini, tmp_path / "out")


def test_a_query_that_finds_itself_does_not_cost_a_place(tmp_path):
    folder = write_beir(tmp_path / "self")
    with open(folder / "corpus.jsonl", "a") as corpus:
        corpus.write(json.dumps({"_id": "q2", "text": "flat plate"}) + "\n")
    evaluate_dataset(
        "self", folder, tmp_path / "out", Settings(depth=2, candidates=2), announce=lambda line: None
    )
    run = records.read_run(tmp_path / "out" / "bm25.trec")
    assert "q2" not in run["q2"]
    assert len(run["q2"]) == 2


@pytest.mark.parametrize("run_file", [None, "r.trec"])
def test_independent_processes_write_the_results_of_one(mini, tmp_path, run_file):
    (tmp_path / "r.trec").write_text("q1 Q0 d3 1 2 t\nq1 Q0 d1 2 1 t\nq2 Q0 d6 1 1 t\nq3 Q0 d6 1 1 t\n")
    files = {"run_file": tmp_path / run_file} if run_file else {}
    by_query, out = Settings(pairs_per_call=1), tmp_path / "out"
    alone = _Counting()
    whole, _ = _evaluate(mini, tmp_path / "whole", by_query, alone.model, **files)
    models = [_Counting() for _ in range(3)]
    for index in (1, 2, 0, 1):  # process 0 would wait for the others; one more comes late
        summary, _ = _evaluate(
            mini, out, by_query, models[index].model, processes=Processes(index, 3), **files
        )
        assert (summary is None) == (index != 0)
        if index == 0:
            assert summary.systems == whole.systems
    assert sum(model.pairs for model in models) == alone.pairs
    assert all(model.pairs for model in models), "each has a share"
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        if name != "result.json":
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_process_that_finds_all_taken_away_has_nothing_to_do(mini, tmp_path, monkeypatch):
    """Process 0 has written the result between this one's look at it and its look at the scores."""
    out, late = tmp_path / "out", _Counting()
    _evaluate(mini, out, model=_Counting().model)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    looks = []
    real = SharedWork.finished

    def finished(self):
        looks.append(1)
        return real(self) if len(looks) > 1 else None

    monkeypatch.setattr(SharedWork, "finished", finished)
    summary, _ = _evaluate(mini, out, model=late.model, processes=Processes(1, 2))
    assert (summary, late.pairs) == (None, 0)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
