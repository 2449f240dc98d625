"""What a run shows while it trains: a progress line, TensorBoard scalars, and the stop on a non-finite loss."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient of a batch is NaN or infinite; the message names the batch."""


class ScalarWriter:
    """Writes scalars for TensorBoard (event files) into a folder."""

    def __init__(self, folder: str) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(folder)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one event with all `scalars` at `step`."""
        from tensorboard.compat.proto import event_pb2, summary_pb2

        values = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        summary = summary_pb2.Summary(value=values)
        self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Writes everything to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Writes everything to disk and closes the file."""
        self._writer.close()


@dataclasses.dataclass
class _Pending:
    step: int
    metrics: Mapping[str, Any]
    examples: Sequence[tuple[str, Sequence[str]]]


class StepMonitor:
    """Collects the metrics of steps without stalling the device, and logs means now and then.

    Metrics are read `lag` steps late, when they are long computed. Every step's loss and gradient norm are
    checked: `drain` (called before every checkpoint) leaves none unchecked, so no poisoned state is saved.

    Args:
      output_dir: the run's folder; TensorBoard events go to `tensorboard/` in it.
      total_steps: the step at which the run ends.
      start_step: the step at which this process starts.
      log_every: steps between progress lines.
      schedule: learning rate of a step, or None when unknown.
      lag: number of steps that may be in flight.
    """

    def __init__(
        self,
        output_dir: str,
        total_steps: int,
        start_step: int,
        log_every: int,
        schedule: Any = None,
        lag: int = 2,
        is_writer: bool = True,
    ) -> None:
        self._output_dir = pathlib.Path(output_dir)
        self._total = total_steps
        self._log_every = max(1, log_every)
        self._schedule = schedule
        self._lag = lag
        self._is_writer = is_writer
        self._scalars = ScalarWriter(str(self._output_dir / "tensorboard")) if is_writer else None
        self._pending: collections.deque[_Pending] = collections.deque()
        self._window: list[dict[str, float]] = []
        self._window_start = time.perf_counter()
        self._first_step_done = False
        self._rate: float | None = None
        self.last_step = start_step

    def add(
        self, step: int, metrics: Mapping[str, Any], examples: Sequence[tuple[str, Sequence[str]]]
    ) -> None:
        """Takes the metrics of `step` (device scalars) and the query and document ids of its batch.

        Raises:
          NonFiniteLossError: an earlier step's loss or gradient was not finite.
        """
        self._pending.append(_Pending(step, metrics, examples))
        while len(self._pending) > self._lag:
            self._take(self._pending.popleft())

    def drain(self) -> None:
        """Waits for all steps in flight and checks them.

        Raises:
          NonFiniteLossError: see `add`.
        """
        while self._pending:
            self._take(self._pending.popleft())

    def _take(self, pending: _Pending) -> None:
        values = {name: float(value) for name, value in pending.metrics.items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            self._stop(pending, values)
        self.last_step = pending.step
        if not self._first_step_done:
            # The first step's time is compilation, which would spoil every rate.
            self._first_step_done = True
            self._window_start = time.perf_counter()
            self._log(pending.step, [values], elapsed=None)
            return
        self._window.append(values)
        if pending.step % self._log_every == 0 or pending.step == self._total:
            elapsed = time.perf_counter() - self._window_start
            self._log(pending.step, self._window, elapsed)
            self._window, self._window_start = [], time.perf_counter()

    def _stop(self, pending: _Pending, values: Mapping[str, float]) -> None:
        path = self._output_dir / f"nonfinite_step_{pending.step}.json"
        examples = [
            {"query_id": query, "document_ids": list(documents)} for query, documents in pending.examples
        ]
        path.write_text(
            json.dumps({"step": pending.step, "metrics": dict(values), "examples": examples}, indent=1)
        )
        raise NonFiniteLossError(
            f"step {pending.step}: loss {values['loss']}, gradient norm {values['grad_norm']}. The batch begins with "
            f"{examples[:2]}; all its query and document ids are in {path}. Nothing after the last checkpoint was "
            "saved. Look at those examples' texts and teacher logits, lower the learning rate, or compute in float32."
        )

    def _log(self, step: int, window: Sequence[Mapping[str, float]], elapsed: float | None) -> None:
        scalars = {
            "train/loss": sum(values["loss"] for values in window) / len(window),
            "train/grad_norm": sum(values["grad_norm"] for values in window) / len(window),
        }
        useful = sum(values["useful_tokens"] for values in window)
        scalars["train/useful_token_share"] = useful / max(1.0, sum(values["tokens"] for values in window))
        if self._schedule is not None:
            scalars["train/learning_rate"] = float(self._schedule(step - 1))
        if elapsed:
            scalars["speed/examples_per_second"] = sum(values["documents"] for values in window) / elapsed
            scalars["speed/useful_tokens_per_second"] = useful / elapsed
            self._rate = len(window) / elapsed
        if self._scalars:
            self._scalars.write(step, scalars)
            print(self._line(step, scalars), flush=True)

    def _line(self, step: int, scalars: Mapping[str, float]) -> str:
        parts = [f"step {step}/{self._total}", f"loss {scalars['train/loss']:.4f}"]
        if "train/learning_rate" in scalars:
            parts.append(f"lr {scalars['train/learning_rate']:.2e}")
        if "speed/examples_per_second" in scalars:
            parts.append(f"{scalars['speed/examples_per_second']:.0f} examples/s")
            parts.append(f"{scalars['speed/useful_tokens_per_second']:.0f} useful tokens/s")
        parts.append(f"{scalars['train/useful_token_share']:.0%} useful")
        if self._rate:
            parts.append(f"{clock((self._total - step) / self._rate)} left")
        return "  ".join(parts)

    def validation(self, step: int, loss: float, is_best: bool) -> None:
        """Reports a validation loss."""
        if self._scalars:
            self._scalars.write(step, {"validation/loss": loss})
            print(
                f"step {step}/{self._total}  validation loss {loss:.4f}{'  (best)' if is_best else ''}",
                flush=True,
            )

    def pause(self) -> _Pause:
        """Context manager: time inside it (validation, checkpoints) does not count as training time."""
        return _Pause(self)

    def close(self) -> None:
        """Flushes TensorBoard."""
        if self._scalars:
            self._scalars.close()


class _Pause:
    def __init__(self, monitor: StepMonitor) -> None:
        self._monitor = monitor

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._monitor._window_start += time.perf_counter() - self._start


def clock(seconds: float) -> str:
    """Formats a duration: `42s`, `3m07s`, `5h02m`.

    >>> clock(42), clock(187), clock(18120)
    ('42s', '3m07s', '5h02m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def cost(seconds: float) -> str:
    """Time and peak memory of this process, such as `6m35s, 1.6 GiB of memory at the peak`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return f"{clock(seconds)}, {peak * unit / 2**30:.1f} GiB of memory at the peak"


_prefix = ""


def prefix(text: str) -> None:
    """Puts `text` before every later line of `announce`: which of several processes speaks."""
    global _prefix
    _prefix = text


def announce(message: str) -> None:
    """Prints one line of progress to standard error at once."""
    print(_prefix + message, file=sys.stderr, flush=True)
