"""Goodput over sessions: what was done again, and what lay between, is no good."""

from __future__ import annotations

import json
import time

import pytest

from inranker_jax.telemetry.goodput import FILE, KINDS, Goodput
from inranker_jax.telemetry.phases import Phases


class Session:
    """A session with a clock set by hand: wall time and phases go forward together."""

    now = 1_700_000_000.0

    def __init__(self, folder, step, monkeypatch):
        monkeypatch.setattr(time, "time", lambda: Session.now)
        self.phases = Phases(now=lambda: Session.now)
        self.said = []
        self.goodput = Goodput(str(folder), step, self.phases, self.said.append)

    def spend(self, phase, seconds):
        with self.phases.phase(phase):
            Session.now += seconds


@pytest.fixture
def start(tmp_path, monkeypatch):
    return lambda step=0: Session(tmp_path, step, monkeypatch)


def stored(folder):
    return json.loads((folder / FILE).read_text())


def nonzero(seconds):
    return {kind: value for kind, value in seconds.items() if value}


def test_one_session(start, tmp_path):
    session = start()
    first = Session.now
    Session.now += 10  # the phase of a session that just began is startup
    for phase, seconds in (("data", 5), ("host", 10), ("device", 55), ("compile", 8), ("validation", 7)):
        session.spend(phase, seconds)
    session.spend("checkpoint", 5)
    session.goodput.saved(70)
    session.goodput.write(70, finished=True)
    assert session.goodput.share() == 0.7
    content = stored(tmp_path)
    assert content["goodput"] == 0.7
    assert content["first_start"] == first
    assert content["finished"]
    assert sum(content["seconds"].values()) == content["updated"] - content["first_start"] == 100
    text = session.goodput.describe()
    assert text.startswith("goodput 70% of 1m40s in 1 session: steps 1m10s, start-up 10s, compilation 8s")
    assert "down" not in text


def test_a_killed_session_loses_what_it_had_not_saved(start, tmp_path):
    one = start()
    one.spend("device", 40)
    one.goodput.saved(4)
    one.spend("device", 20)
    one.goodput.saved(6)  # begun, but the process is killed before the checkpoint is complete
    one.spend("device", 10)
    one.goodput.write(7)
    Session.now += 25  # nobody knows of these
    two = start(step=4)
    Session.now += 5
    assert nonzero(two.goodput.seconds()) == {"steps": 40, "redone": 30, "down": 25, "startup": 5}
    two.spend("device", 30)
    two.goodput.saved(7)
    content = stored(tmp_path)
    assert content["seconds"]["steps"] == 70
    assert content["sessions"] == 2
    assert content["goodput"] == 70 / 130
    assert content["steps_seconds_at_checkpoint"] == {"4": 40, "7": 70}
    assert sum(content["seconds"].values()) == content["updated"] - content["first_start"] == 130
    three = start(step=7)
    assert nonzero(three.goodput.seconds())["redone"] == 30


def test_without_a_checkpoint_all_is_done_again(start):
    one = start()
    one.spend("device", 40)
    one.goodput.write(3)
    two = start()
    assert nonzero(two.goodput.seconds()) == {"redone": 40}
    assert two.goodput.share() == 0


def test_the_time_after_a_finished_run_is_not_down_time(start):
    one = start()
    one.spend("device", 40)
    one.goodput.saved(4)
    one.goodput.write(4, finished=True)
    Session.now += 1_000_000
    two = start(step=4)
    assert nonzero(two.goodput.seconds()) == {"steps": 40}
    two.spend("device", 40)
    assert two.goodput.share() == 1


def test_a_clock_that_runs_behind_counts_no_negative_time(start):
    one = start()
    one.spend("device", 40)
    one.goodput.saved(4)
    Session.now -= 30  # the next session is on another host
    two = start(step=4)
    assert nonzero(two.goodput.seconds()) == {"steps": 40}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"first_start": 1}', '{"first_start": "x"}'])
def test_a_damaged_file_is_told_and_replaced(start, tmp_path, text):
    (tmp_path / FILE).write_text(text)
    session = start(step=4)
    assert len(session.said) == 1
    assert "damaged" in session.said[0]
    session.spend("device", 3)
    session.goodput.saved(5)
    assert start(step=5).said == []
    assert nonzero(stored(tmp_path)["seconds"]) == {"steps": 3}


def test_unhurried_writes_are_some_seconds_apart(start, tmp_path, monkeypatch):
    session = start()
    seconds = iter([0.0, 9.0, 11.0, 11.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    session.goodput._last_write = 0.0
    session.goodput.write(1, hurry=False)
    session.goodput.write(2, hurry=False)
    assert not (tmp_path / FILE).exists()
    session.goodput.write(3, hurry=False)
    assert stored(tmp_path)["step"] == 3
    assert set(stored(tmp_path)["seconds"]) == set(KINDS)
