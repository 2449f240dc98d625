"""Progress and cost of labelling, and the plan of what is left to score."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from inranker_jax.corpora.label_folder import Lists, ListsWriter
from inranker_jax.corpora.label_store import LabelStore
from inranker_jax.labeling import plan as plans
from inranker_jax.labeling.plan import make_plan
from inranker_jax.labeling.sessions import Session, totals

pytest.importorskip("pyarrow")


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_progress_line_and_cost(tmp_path: pathlib.Path) -> None:
    clock, lines = Clock(), []
    session = Session(tmp_path, (0, 1), usd_per_hour=3.6, announce=lines.append, now=clock)
    session.begin("t5", 1000, 200)
    clock.seconds += 30  # mostly compilation
    session.add(100, 100)
    assert lines.pop() == "t5: 300 of 1,000 pairs  3.3 pairs/s  3m30s left  30s so far  $0.03 so far"
    clock.seconds += 5
    session.add(100, 100)
    assert lines == [], "at most a line every ten seconds"
    clock.seconds += 5
    session.add(300, 0)
    # 400 pairs in the 10 seconds after the first chunk: 40 a second, 300 pairs to go.
    assert lines.pop() == "t5: 700 of 1,000 pairs  40 pairs/s  8s left  40s so far  $0.04 so far"
    assert session.pairs == 200, "the last 300 were copied"


def test_the_rate_leaves_loading_out(tmp_path: pathlib.Path) -> None:
    clock = Clock()
    session = Session(tmp_path, (0, 1), usd_per_hour=None, announce=print, now=clock)
    clock.seconds += 50  # sampling
    session.begin("minilm", 600, 0)
    clock.seconds += 40  # loading
    session.hand_over()
    clock.seconds += 10
    session.add(500, 500)
    assert session.line() == "minilm: 500 of 600 pairs  50 pairs/s  2s left  1m40s so far"


def test_the_last_line_is_not_shown_twice(tmp_path: pathlib.Path) -> None:
    clock, lines = Clock(), []
    session = Session(tmp_path, (0, 1), usd_per_hour=None, announce=lines.append, now=clock)
    session.begin("minilm", 600, 0)
    for done in (300, 600):
        clock.seconds += 20
        session.add(300, 300)
        assert [line.split("  ")[0] for line in lines] == ["minilm: 300 of 600 pairs"], done


def test_costs_of_all_sessions_are_added(tmp_path: pathlib.Path) -> None:
    clock = Clock()
    for index, price in enumerate((3600.0, 7200.0)):
        session = Session(tmp_path, (index, 2), usd_per_hour=price, announce=print, now=clock)
        session.begin("t5", 50, 0)
        clock.seconds += 2
        session.add(10, 10)
        session.store()
    assert totals(tmp_path) == {"seconds": 4.0, "pairs_scored": 20, "usd": 2.0 + 4.0}
    (first, _) = sorted((tmp_path / "sessions").iterdir())
    assert json.loads(first.read_text())["process_count"] == 2
    unpriced = Session(tmp_path, (0, 1), usd_per_hour=None, announce=print, now=clock)
    unpriced.begin("t5", 50, 0)
    clock.seconds += 1
    unpriced.add(5, 5)
    assert "$" not in unpriced.line()
    assert totals(tmp_path)["usd"] is None, "the price of a part of the work is unknown"


def test_one_that_scored_nothing_leaves_no_session(tmp_path: pathlib.Path) -> None:
    Session(tmp_path, (0, 1), usd_per_hour=None, announce=print).store()
    assert list(tmp_path.iterdir()) == []


def make_lists(folder: pathlib.Path, keys: list[bytes]) -> Lists:
    with ListsWriter(folder, {}) as writer:
        for start in range(0, len(keys), 5):
            own = keys[start : start + 5]
            writer.add(f"q{start}", [(f"d{start + i}", int(i == 0), key) for i, key in enumerate(own)])
    return Lists(folder)


def some_keys(count: int) -> list[bytes]:
    return [row.tobytes() for row in np.random.default_rng(0).integers(0, 256, (count, 16), dtype=np.uint8)]


def test_a_plan_holds_every_new_pair_once_in_list_order(tmp_path: pathlib.Path) -> None:
    keys = some_keys(40)
    keys[10], keys[33] = keys[3], keys[3]
    lists = make_lists(tmp_path / "labels", keys)
    store = LabelStore(tmp_path / "store")
    teacher = store.add_teacher({"kind": "test"}, {})
    known = np.frombuffer(b"".join(keys[:2] + keys[20:22]), np.uint8).reshape(-1, 16)
    store.write_part(teacher, "part-other-000000", known, np.zeros((4, 2), np.float32))
    plan = make_plan(store, teacher, lists, 10)
    expected = [row for row in range(40) if row not in (0, 1, 20, 21, 10, 33)]
    assert plan.rows.tolist() == expected
    assert [key.tobytes() for key in plan.keys] == [keys[row] for row in expected]
    assert (plan.stored, plan.num_chunks, plan.size(3)) == (4, 4, 4)
    ids = [pair for chunk in range(4) for pair in plan.ids(lists, chunk)]
    assert [document for _, document in ids] == [f"d{row}" for row in expected]
    assert [query for query, _ in ids] == [f"q{row // 5 * 5}" for row in expected]


def test_what_others_add_later_does_not_change_a_plan(tmp_path: pathlib.Path) -> None:
    keys = some_keys(20)
    lists = make_lists(tmp_path / "labels", keys)
    store = LabelStore(tmp_path / "store")
    teacher = store.add_teacher({"kind": "test"}, {})
    plan = make_plan(store, teacher, lists, 10)
    array = np.frombuffer(b"".join(keys[:3]), np.uint8).reshape(-1, 16)
    store.write_part(teacher, "part-other-000000", array, np.zeros((3, 2), np.float32))
    again = make_plan(store, teacher, lists, 10)
    assert again.job == plan.job
    assert again.rows.tolist() == plan.rows.tolist() == list(range(20))


def test_of_two_that_begin_at_once_the_first_decides(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "jobs" / "job.json"
    plans._create(path, {"first": 1})
    plans._create(path, {"second": 2})
    assert json.loads(path.read_text()) == {"first": 1}

    def no_links(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(plans.os, "link", no_links)
    plans._create(path, {"second": 2})
    plans._create(path.with_name("other.json"), {"third": 3})
    assert json.loads(path.read_text()) == {"first": 1}
    assert json.loads(path.with_name("other.json").read_text()) == {"third": 3}
    assert sorted(other.name for other in path.parent.iterdir()) == ["job.json", "other.json"]
