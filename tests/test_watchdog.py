"""The watchdog: what it tells of threads that are really stuck, when, and that it otherwise does nothing."""

from __future__ import annotations

import math
import queue
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from benchmarks.process_group import Group
from inranker_jax.errors import InputError
from inranker_jax.telemetry.phases import Phases
from inranker_jax.watchdog import EXIT_STATUS, Watchdog, stacks
from tests import tiny_run
from tests.telemetry.test_phases import Clock


def stuck_in_the_pipeline(release, batches):
    """Makes no batch until it is let go."""
    release.wait()
    batches.put("a batch")


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_stuck_pipeline_is_reported_with_its_stack_and_then_that_it_goes_on():
    said, release, batches = [], threading.Event(), queue.Queue()
    maker = threading.Thread(
        target=stuck_in_the_pipeline, args=(release, batches), name="inranker-batches", daemon=True
    )
    maker.start()
    phases = Phases()

    def of_data():
        return [text for text in said if "  phase: data" in text]

    phases.begin("host")
    phases.step_done(1206)
    phases.step_done(1207)
    with Watchdog(phases, seconds=0.2, process=(1, 4), report=said.append):
        # Only when two reports came is the batch made that this thread waits for.
        threading.Thread(
            target=lambda: (wait_until(lambda: len(of_data()) >= 2), release.set()), daemon=True
        ).start()
        with phases.phase("data"):
            assert batches.get(timeout=30) == "a batch"
        phases.step_done(1208)
        wait_until(lambda: said[-1].startswith("it goes on"))
    first = of_data()[0].splitlines()
    assert re.match(r"HANG\? no step was finished for \d+s \(allowed: 0s\)", first[0])
    assert re.match(r"  process 1 of 4 on \S+, pid \d+", first[1])
    assert first[2] == "  last finished step: 1207"
    assert re.match(r"  phase: data, for \d+s: waiting for the next batch of its own data pipeline", first[3])
    assert first[4] == "  thread MainThread, innermost call first:"
    report = of_data()[0]
    assert "in test_a_stuck_pipeline_is_reported" in report
    maker_stack = report.split("thread inranker-batches, innermost call first:")[1]
    assert "in stuck_in_the_pipeline" in maker_stack
    assert "inranker-watchdog" not in report
    assert re.match(r"end of report; next report in \d+s unless it goes on", first[-1])


def test_reports_of_one_hang_come_at_growing_distances():
    times, begun = [], time.monotonic()
    phases = Phases()
    phases.begin("host")
    phases.step_done(1)
    phases.step_done(2)
    with Watchdog(phases, seconds=0.3, report=lambda _: times.append(time.monotonic() - begun)):
        time.sleep(2.0)
        waited = time.monotonic() - begun
    # After 0.3, 0.6, 1.2, 2.4 s ..., and one tenth of 0.3 s later at most, if the machine is not busy.
    assert 2 <= len(times) <= 1 + math.log2(waited / 0.3)
    for number, moment in enumerate(times):
        assert moment >= 0.3 * 2**number - 0.01


def test_steps_that_go_on_are_not_reported():
    said = []
    phases = Phases()
    phases.begin("host")
    with Watchdog(phases, seconds=2.0, report=said.append):
        for step in range(1, 41):
            time.sleep(0.1)
            phases.step_done(step)
    assert said == []


@pytest.fixture
def clock():
    return Clock()


def test_what_is_allowed(clock):
    phases = Phases(now=clock)
    dog = Watchdog(phases, seconds=600, factor=20)
    clock.time += 7
    assert dog.limit() == (7, 3600)  # startup
    phases.begin("host")
    clock.time += 100
    assert dog.limit() == (100, 3600)  # the first step compiles
    phases.step_done(1)
    clock.time += 30
    assert dog.limit() == (30, 3600)  # how long a step takes is not known yet
    clock.time -= 30
    for step, seconds in enumerate((10, 10, 100), 2):
        clock.time += seconds
        phases.step_done(step)
    clock.time += 5
    assert dog.limit() == (5, 600)  # 20 x 10 s are less
    for phase in ("validation", "checkpoint"):
        with phases.phase(phase):
            clock.time += 1000
            assert dog.limit() == (1000, 3600)
    clock.time += 1
    assert dog.limit() == (1, 600)  # it has just come back
    for step in range(5, 12):
        clock.time += 50
        phases.step_done(step)
    assert dog.limit() == (0, 1000)


def test_what_is_allowed_to_commands_that_score(clock):
    phases = Phases.of_scoring(now=clock)
    dog = Watchdog(phases, seconds=600, factor=20)
    clock.time += 3000
    assert dog.limit() == (3000, 3600)  # an index of millions of documents
    with phases.phase("scoring"):
        assert dog.limit() == (0, 3600)
        for _ in range(3):
            clock.time += 50
            assert dog.limit() == (50, 3600 if phases.last_step in (None, 1) else 1000)
            phases.step_done()
        assert phases.last_step == 3
        clock.time += 7
        assert dog.limit() == (7, 1000)
    with phases.phase("waiting"):
        for _ in range(100):  # for a host that is slower
            clock.time += 60
            phases.alive()
        clock.time += 5
        assert dog.limit() == (5, 600)
    with phases.phase("scoring"):
        assert dog.limit() == (0, 1000)


def test_nothing_watches_when_told_so():
    before = threading.active_count()
    with Watchdog(Phases(), seconds=0):
        assert threading.active_count() == before


@pytest.mark.parametrize("given", [{"seconds": -1}, {"factor": -1}, {"exit_after": 0}])
def test_numbers_out_of_range(given):
    with pytest.raises(InputError, match="hang_seconds"):
        Watchdog(Phases(), **given)


def test_stacks_name_threads_and_begin_with_the_main_one():
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="a-waiting-thread")
    thread.start()
    found = stacks()
    release.set()
    thread.join()
    assert found.startswith("thread MainThread, innermost call first:\n")
    assert "thread a-waiting-thread, innermost call first:\n" in found
    assert "0x" not in found


PROGRAM = """
import ctypes, faulthandler, sys, threading, time
from inranker_jax.telemetry.phases import Phases
from inranker_jax.watchdog import Watchdog

phases = Phases()
phases.begin("host")
phases.step_done(1)
phases.step_done(2)

def stuck_in_native_code():
    {stuck}

armed, arm = threading.Event(), faulthandler.dump_traceback_later
faulthandler.dump_traceback_later = lambda *a, **k: (arm(*a, **k), armed.set())

with Watchdog(phases, seconds=0.5, exit_after={exit_after}):
    assert armed.wait(60)
    stuck_in_native_code()
"""


def program(stuck, exit_after=None):
    text = PROGRAM.format(stuck=stuck, exit_after=exit_after)
    return subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=120
    )


def test_native_code_that_keeps_the_interpreters_lock_is_seen_too():
    # Functions of a PyDLL run with the lock held: no Python thread runs meanwhile, the watchdog's neither.
    done = program("ctypes.PyDLL(None).sleep(4)")
    assert done.returncode == 0, done.stderr
    assert "Timeout (0:00:00" in done.stderr
    stack = done.stderr.partition("Timeout (0:00:00")[2].partition("HANG?")[0]
    assert "in stuck_in_native_code" in stack


def test_a_process_ends_itself_only_when_told_to():
    done = program("time.sleep(60)", exit_after=1.5)
    assert done.returncode == EXIT_STATUS
    assert "in stuck_in_native_code" in done.stderr
    assert f"ending this process with status {EXIT_STATUS}" in done.stderr
    assert program("time.sleep(1.2)").returncode == 0


STARTING = """
import sys, time
from inranker_jax import data, train

opened = data.open_stores

def slow_files(*arguments, **more):
    time.sleep(5)
    return opened(*arguments, **more)

data.open_stores = slow_files
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_start_that_takes_long_is_reported(tmp_path):
    setting = tiny_run.write_setting(tmp_path)
    more = ["--gin.TRAIN_STEPS=2", "--gin.train.validation_split=None", "--gin.train.hang_seconds=0.5"]
    command = tiny_run.flags(setting, tmp_path / "run", *more)
    done = subprocess.run(
        [sys.executable, "-c", STARTING, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=tiny_run.environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    report = done.stderr.partition("HANG?")[2].partition("end of report")[0]
    assert "phase: startup" in report
    assert "in slow_files" in report


def test_a_start_is_never_ended():
    phases, said = Phases(), []
    with Watchdog(phases, seconds=0.05, exit_after=0.1, report=said.append):
        wait_until(lambda: len(said) >= 2)
    assert not any("ending this process" in text for text in said)


STALLING = """
import os, sys, time
from inranker_jax import train
from inranker_jax.data import batches

make = batches.BatchMaker.__call__

def never_ready(maker, step):
    if os.environ["JAX_PROCESS_ID"] == "1" and step >= 6 and not maker.order.total:
        time.sleep(600)
    return make(maker, step)

batches.BatchMaker.__call__ = never_ready
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_hosts_tell_which_holds_up_the_other(tmp_path):
    """Process 1 makes no batch any more; process 0 computes as far as it can, and waits for its own devices."""
    setting = tiny_run.write_setting(tmp_path)
    more = ["--gin.train.mesh=@partitioning.make_mesh()", "--gin.train.validation_split=None"]
    more += ["--gin.train.checkpoint_period=100", "--gin.train.hang_seconds=5", "--gin.train.hang_factor=2"]
    command = [sys.executable, "-c", STALLING, *tiny_run.flags(setting, tmp_path / "run", *more)]
    with Group(command, 2, 1, tiny_run.environment(tmp_path)) as group:

        def reports():
            # Of the hang itself: on a busy machine compiling the first step may be reported too.
            texts = ["".join(lines) for lines in group.errors]
            return [re.findall(r"last finished step: \d(?s:.*?)end of report", text) for text in texts]

        wait_until(
            lambda: all(reports()) or any(process.poll() is not None for process in group.processes), 240
        )
        found = reports()
        group.kill(0, 1)
    assert all(process.returncode == -signal.SIGKILL for process in group.processes), group.errors
    first, second = (of_process[-1] for of_process in found)
    assert "[1/2]   phase: data" in second
    assert "in never_ready" in second
    assert "[0/2]   phase: device" in first
    assert "in never_ready" not in first
    assert any("process 1 of 2" in line for line in group.errors[1])
