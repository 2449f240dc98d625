"""Every second belongs to one phase, whatever is opened within what."""

from __future__ import annotations

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from inranker_jax.telemetry.phases import PHASES, TRAINING, Phases


class Clock:
    """A clock that is set forward by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock():
    return Clock()


def spent(phases):
    return {name: seconds for name, seconds in phases.seconds().items() if seconds}


def test_time_belongs_to_the_innermost_phase(clock):
    phases = Phases(now=clock)
    clock.time += 3
    phases.begin("host")
    clock.time += 1
    with phases.phase("validation"):
        clock.time += 5
        with phases.phase("data"):
            clock.time += 7
        clock.time += 2
    clock.time += 4
    assert spent(phases) == {"startup": 3, "host": 5, "validation": 7, "data": 7}
    assert phases.current == ("host", 4)


def test_a_phase_that_ends_in_an_error_is_closed(clock):
    phases = Phases(now=clock)
    phases.begin("host")

    def fail():
        with phases.phase("checkpoint"):
            clock.time += 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    clock.time += 2
    assert spent(phases) == {"checkpoint": 1, "host": 2}


def test_what_went_before_counts_as_startup():
    began = time.time() - 50
    phases = Phases(started=began)
    assert 50 <= phases.seconds()["startup"] < 55
    assert phases.started == began


def test_steps_are_timed_without_what_is_no_training(clock):
    phases = Phases(now=clock)
    phases.begin("host")
    clock.time += 60
    assert phases.last_step is None
    phases.step_done(1)
    assert phases.step_seconds == []
    clock.time += 2
    with phases.phase("checkpoint"):
        clock.time += 30
    with phases.phase("device"):
        clock.time += 1
    phases.step_done(2)
    assert phases.step_seconds == [3]
    assert phases.last_step == 2


def test_a_pause_starts_the_wait_for_a_step_anew(clock):
    phases = Phases(now=clock)
    phases.begin("host")
    phases.step_done(1)
    clock.time += 10
    assert phases.seconds_without_step == 10
    with phases.phase("data"):
        clock.time += 10
    assert phases.seconds_without_step == 20
    with phases.phase("validation"):
        clock.time += 100
    clock.time += 1
    assert phases.seconds_without_step == 1


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        # (seconds after which an event comes, its duration)
        ([(5, 4)], 4),
        ([(5, 1), (5, 2)], 3),
        ([(5, 1), (1, 3)], 3),  # an outer one, around the inner
        ([(5, 1), (3, 1), (1, 5), (2, 1)], 6),  # two inner ones, the outer, another after it
        ([(5, 2), (1, 2)], 3),  # they overlap
    ],
)
def test_nested_compilation_counts_once(clock, events, expected):
    phases = Phases(now=clock)
    phases.begin("host")
    total = 0
    for pause, seconds in events:
        clock.time += pause
        total += pause
        phases._on_duration("/jax/core/compile/some_duration", seconds)
    assert phases.seconds()["compile"] == expected
    assert phases.seconds()["host"] == total - expected


def test_compiling_is_told_from_the_phase_in_which_it_happens():
    phases = Phases()
    phases.begin("host")

    def slow_to_trace(x):
        time.sleep(0.2)
        return jnp.sin(x) * 3

    with phases.counting_compilation():
        began = time.perf_counter()
        with phases.phase("validation"):
            jax.jit(slow_to_trace)(jnp.ones(3))
        took = time.perf_counter() - began
        other = threading.Thread(target=lambda: jax.jit(lambda x: slow_to_trace(x) + 1)(jnp.ones(3)))
        other.start()
        other.join()
    jax.jit(lambda x: slow_to_trace(x) + 2)(jnp.ones(3))  # nobody listens any more
    seconds = phases.seconds()
    assert seconds["compile"] >= 0.2
    assert seconds["compile"] + seconds["validation"] == pytest.approx(took, abs=0.05)
    assert seconds["host"] >= 0.4
    assert seconds["validation"] >= 0


def test_all_seconds_are_those_of_the_clock(clock):
    phases = Phases(now=clock)
    for number in range(50):
        name = (*TRAINING, "validation", "checkpoint")[number % 5]
        clock.time += 0.25
        with phases.phase(name):
            clock.time += number
            phases._on_duration("/jax/core/compile/x", number / 2)
            phases._on_duration("/jax/something/else", number / 2)
    assert sum(phases.seconds().values()) == pytest.approx(clock.time - 100)
    assert set(phases.seconds()) == set(PHASES)
