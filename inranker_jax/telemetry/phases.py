"""Which part of its work a process spends its time on, second by second."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

TRAINING = ("data", "host", "device")
PHASES = ("startup", *TRAINING, "compile", "validation", "checkpoint")
SCORING = ("startup", "scoring", "waiting")

# Tracing, lowering, compiling or finding the program on disk: JAX reports each when it is over.
_COMPILING = "/jax/core/compile/"
_STEPS_KEPT = 101


class Phases:
    """Adds up what the main thread does; other threads (the watchdog's) may look on.

    Every second belongs to exactly one phase, the innermost that is open:

    - `startup`: from the beginning of the session to the first batch;
    - `data`: waiting for the next batch, which a thread makes ahead of time;
    - `host`: placing the batch, dispatching the step, bookkeeping, logging;
    - `device`: waiting for the metrics of a step. Steps are dispatched asynchronously and metrics are read some steps
      late, so this is the time for which the device is behind the host, not the time for which it computes: near 100 %
      means that it never waits, near 0 % that data or host keep it waiting. Where a runtime bounds the steps in flight,
      or computes small programs at once (as JAX does on CPUs), a dispatch waits too, and counts as `host`;
    - `compile`: tracing and compiling, wherever it happened;
    - `validation`, `checkpoint`: as they say; of an asynchronous save only the part for which training waits.

    Commands that score (`of_scoring`) have `startup`, in which they read their input and load models, `scoring`, whose
    steps are what they save at once, and `waiting` for other processes.

    Args:
      started: `time.time()` at which the session began; now by default.
      now: a clock in seconds.
      names: the phases; "startup" is the first.
      stepping: those which steps are made of.
    """

    def __init__(
        self,
        started: float | None = None,
        now: Callable[[], float] = time.perf_counter,
        *,
        names: Sequence[str] = PHASES,
        stepping: Sequence[str] = TRAINING,
    ) -> None:
        self._now = now
        self._stepping = stepping
        self._owner = threading.get_ident()
        self._seconds = dict.fromkeys(names, 0.0)
        self.started = time.time() if started is None else started
        if started is not None:
            self._seconds["startup"] = max(0.0, time.time() - started)
        self._base = "startup"
        self._current = ("startup", now())
        self._compiled: list[tuple[float, float]] = []
        self._spent = 0.0
        self._durations: collections.deque[float] = collections.deque(maxlen=_STEPS_KEPT)
        self._last_step: tuple[int, float] | None = None
        self._resumed_at = now()

    @classmethod
    def of_scoring(cls, now: Callable[[], float] = time.perf_counter) -> Phases:
        """The phases of labelling and evaluation."""
        return cls(now=now, names=SCORING, stepping=("scoring",))

    @property
    def current(self) -> tuple[str, float]:
        """The phase that is open, and for how many seconds it has been."""
        name, entered = self._current
        return name, self._now() - entered

    @property
    def last_step(self) -> int | None:
        """The last step whose metrics were read; None before the first."""
        return self._last_step[0] if self._last_step else None

    @property
    def seconds_without_step(self) -> float:
        """How long ago the last step was finished, or what is no part of steps after it, or `alive` called."""
        latest = self._resumed_at
        if self._last_step:
            latest = max(latest, self._last_step[1])
        return self._now() - latest

    @property
    def step_seconds(self) -> list[float]:
        """How long each of the last steps took, without the phases that are no part of steps, the first left out."""
        return list(self._durations)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase since the session began, the open one included."""
        found = dict(self._seconds)
        name, entered = self._current
        found[name] += self._now() - entered
        return found

    def begin(self, name: str) -> None:
        """Makes `name` the phase to which time belongs while no other is open."""
        self._base = name
        self._switch(name)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Opens a phase; at the end of the block the one before goes on."""
        before = self._current[0]
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def alive(self) -> None:
        """Takes note that the process is not stuck, though no step is finished: it looked, and waits for others."""
        self._resumed_at = self._now()

    def step_done(self, step: int | None = None) -> None:
        """Takes note that a step is finished, by default the next."""
        step = (self.last_step or 0) + 1 if step is None else step
        seconds = self.seconds()
        spent = sum(seconds[name] for name in self._stepping)
        if self._last_step is not None:
            self._durations.append(spent - self._spent)
        self._spent = spent
        self._last_step = (step, self._now())

    def _switch(self, name: str) -> None:
        before, entered = self._current
        now = self._now()
        self._seconds[before] += now - entered
        self._current = (name, now)
        if before not in self._stepping:
            self._resumed_at = now  # what was no part of steps makes none of them late
        self._compiled.clear()

    @contextlib.contextmanager
    def counting_compilation(self) -> Iterator[None]:
        """While open, time which JAX spends on compiling in this thread counts as `compile`."""
        import jax.monitoring

        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(self._on_duration)

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if not event.startswith(_COMPILING) or threading.get_ident() != self._owner:
            return
        # Events lie within each other (a function's tracing within its caller's) and come innermost first.
        end = self._now()
        start = end - duration_secs
        new = duration_secs
        while self._compiled and self._compiled[-1][1] > start:
            inner_start, inner_end = self._compiled.pop()
            new -= inner_end - max(inner_start, start)
            start = min(start, inner_start)
        self._compiled.append((start, end))
        self._seconds[self._current[0]] -= new
        self._seconds["compile"] += new
