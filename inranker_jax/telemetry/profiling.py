"""Traces of a few training steps for xprof, TensorBoard's profile plugin: planned, or asked for by a signal."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from inranker_jax import paths
from inranker_jax.errors import InputError
from inranker_jax.progress import announce

VARIABLE = "INRANKER_JAX_PROFILE_STEPS"
SIGNAL_STEPS = 5


class Profiler:
    """Traces steps into `profile/` of the run's folder; in several processes each its own, in `profile/process_I/`.

    While its block is open, SIGUSR1 asks for a trace of the next `SIGNAL_STEPS` steps of the process that gets it.

    Args:
      folder: the run's folder.
      steps: (first, end): trace the steps from `first` to before `end`, numbered as in the progress line. By default
        what INRANKER_JAX_PROFILE_STEPS says, as `FIRST:END`; else none.
      process: (index, count) of this process.
      settle: waits until no step is in flight, so that a trace holds whole steps.

    Raises:
      InputError: the steps are not two numbers in order.
    """

    def __init__(
        self,
        folder: str,
        steps: Sequence[int] | None,
        process: tuple[int, int] = (0, 1),
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        index, count = process
        self.folder = f"{folder}/profile" + (f"/process_{index}" if count > 1 else "")
        self._planned = planned_steps(steps)
        self._settle = settle
        self._requested = False
        self._end: int | None = None
        self._mirror: paths.Mirror | None = None

    def __enter__(self) -> Profiler:
        self._previous = signal.signal(signal.SIGUSR1, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGUSR1, self._previous)
        self._stop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Goes around everything that belongs to training step `step`, which a trace shows under this number."""
        import jax

        if self._end is not None and step >= self._end:
            self._settle()
            self._stop()
        if self._end is None:
            first, end = self._planned or (0, 0)
            if first <= step < end:
                self._start(step, end)
            elif self._requested:
                self._requested = False
                self._start(step, step + SIGNAL_STEPS)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def _start(self, step: int, end: int) -> None:
        import jax

        self._settle()
        self._mirror = paths.Mirror(self.folder)
        try:
            jax.profiler.start_trace(str(self._mirror.folder))
        except (RuntimeError, OSError) as error:
            self._planned = None
            announce(f"no trace: {error}")
            return
        self._end = end
        announce(f"tracing steps {step} to {end - 1} into {self.folder}")

    def _stop(self) -> None:
        if self._end is None or self._mirror is None:
            return
        import jax

        self._end = None
        try:
            jax.profiler.stop_trace()
            self._mirror.close()
        except (RuntimeError, OSError) as error:
            announce(f"the trace was not written: {error}")
            return
        announce(f"trace written: tensorboard --logdir={self.folder} (with the package xprof)")


def planned_steps(steps: Sequence[int] | None) -> tuple[int, int] | None:
    """(first, end) from an argument, else from INRANKER_JAX_PROFILE_STEPS; None for no trace.

    Raises:
      InputError: see `Profiler`.
    """
    given = os.environ.get(VARIABLE, "").strip()
    if steps is None and given:
        if not re.fullmatch(r"\d+:\d+", given):
            raise InputError(f"{VARIABLE}={given}: expected FIRST:END, such as 100:105.")
        steps = tuple(map(int, given.split(":")))
    if steps is None:
        return None
    found = tuple(steps)
    if len(found) != 2 or not all(isinstance(step, int) for step in found) or not 0 < found[0] < found[1]:
        raise InputError(
            f"profile_steps={steps}: expected (first, end) with 0 < first < end, such as (100, 105)."
        )
    return found[0], found[1]
