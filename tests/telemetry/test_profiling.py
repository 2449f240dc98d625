"""Traces of planned steps, and of the next ones after SIGUSR1."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import jax
import pytest

from inranker_jax.errors import InputError
from inranker_jax.telemetry import profiling
from inranker_jax.telemetry.profiling import Profiler, planned_steps


@pytest.fixture
def traces(monkeypatch):
    """Calls of JAX's profiler instead of traces."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop",)))
    return calls


def run(profiler, traces, first, last, signal_at=None):
    """Steps `first` to `last`; returns those during which a trace was being taken."""
    inside = []
    with profiler:
        for step in range(first, last + 1):
            if step == signal_at:
                os.kill(os.getpid(), signal.SIGUSR1)
            with profiler.step(step):
                if traces and traces[-1][0] == "start":
                    inside.append(step)
    return inside


def test_planned_steps_are_traced(tmp_path, traces):
    settled = []
    profiler = Profiler(str(tmp_path), (3, 6), settle=lambda: settled.append(len(traces)))
    assert run(profiler, traces, 1, 9) == [3, 4, 5]
    assert traces == [("start", f"{tmp_path}/profile"), ("stop",)]
    assert settled == [0, 1]


def test_a_session_that_starts_later_traces_the_rest(tmp_path, traces):
    assert run(Profiler(str(tmp_path), (3, 6)), traces, 5, 9) == [5]
    traces.clear()
    assert run(Profiler(str(tmp_path), (3, 6)), traces, 6, 9) == []


def test_a_trace_ends_with_the_run(tmp_path, traces):
    assert run(Profiler(str(tmp_path), (3, 60)), traces, 1, 4) == [3, 4]
    assert traces[-1] == ("stop",)


def test_a_signal_asks_for_the_next_steps(tmp_path, traces):
    before = signal.getsignal(signal.SIGUSR1)
    profiler = Profiler(str(tmp_path), None, process=(1, 2))
    assert run(profiler, traces, 1, 20, signal_at=8) == list(range(8, 8 + profiling.SIGNAL_STEPS))
    assert traces[0] == ("start", f"{tmp_path}/profile/process_1")
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_profiler_that_is_in_use_costs_a_line(tmp_path, monkeypatch, capsys):
    def refuse(folder):
        raise RuntimeError("only one profile may be run at a time")

    monkeypatch.setattr(jax.profiler, "start_trace", refuse)
    assert run(Profiler(str(tmp_path), (1, 4)), [], 1, 5) == []
    assert capsys.readouterr().err == "no trace: only one profile may be run at a time\n"


def test_steps_come_from_the_environment(monkeypatch):
    monkeypatch.setenv(profiling.VARIABLE, "100:105")
    assert planned_steps(None) == (100, 105)
    assert planned_steps((1, 2)) == (1, 2)
    monkeypatch.setenv(profiling.VARIABLE, "100")
    with pytest.raises(InputError, match="FIRST:END"):
        planned_steps(None)


@pytest.mark.parametrize("steps", [(5, 5), (0, 5), (7,), (1, 2, 3), (1.5, 3)])
def test_steps_that_are_no_range(steps):
    with pytest.raises(InputError, match=r"0 < first < end"):
        planned_steps(steps)


# A process of its own: where an earlier test has loaded libtpu to compile, its profiler crashes JAX's (jax 0.10.2,
# libtpu 0.0.51).
TRACED = """
import sys
import jax, jax.numpy as jnp
from inranker_jax.telemetry.profiling import Profiler

double = jax.jit(lambda x: x * 2)
with Profiler(sys.argv[1], (2, 4)) as profiler:
    for step in range(1, 6):
        with profiler.step(step):
            double(jnp.ones(8)).block_until_ready()
"""


def test_a_real_trace_names_its_steps(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TRACED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(trace))
    steps = {
        dict(event.stats).get("step_num")
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }
    assert steps == {2, 3}
