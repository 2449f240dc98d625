"""What a run shows while it trains: a progress line, scalars, and the stop on a non-finite loss."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from inranker_jax import paths
from inranker_jax.progress import announce, clock
from inranker_jax.telemetry import usage
from inranker_jax.telemetry.goodput import Goodput
from inranker_jax.telemetry.phases import TRAINING, Phases
from inranker_jax.telemetry.writers import Writer, open_writers

COLUMNS = 110
# Of each step's metrics, those that are summed rather than averaged.
_COUNTS = ("documents", "useful_tokens", "tokens")


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient of a batch is NaN or infinite; the message names the batch."""


@dataclasses.dataclass
class _Pending:
    step: int
    metrics: Mapping[str, Any]
    examples: Sequence[tuple[str, Sequence[str]]]
    flops_per_token: float
    learning_rate: Any


class StepMonitor:
    """Collects the metrics of steps without stalling the device, and logs means now and then.

    Metrics are read `lag` steps late, when they are long computed. Every step's loss and gradient norm are
    checked: `drain` (called before every checkpoint) leaves none unchecked, so no poisoned state is saved. In several
    processes all read and check the same values, and the first alone prints and writes.

    Args:
      output_dir: the run's folder; TensorBoard events go to `tensorboard/` in it.
      total_steps: the step at which the run ends.
      start_step: the step at which this process starts.
      log_every: steps between progress lines.
      schedule: learning rate of a step, or None when unknown.
      lag: number of steps that may be in flight.
      process: (index, count) of this process.
      phases: the session's, if it began before.
      training_flops: operations of a training step over sequences of given lengths; None: no MFU.
      peak_flops: FLOP/s that all devices can do; None where that is not known: no MFU.
      wandb_project: of Weights & Biases; see `writers.open_writers`.
      settings: shown there.

    Raises:
      InputError: `wandb_project` is given, but its package is not installed.
    """

    def __init__(
        self,
        output_dir: str,
        total_steps: int,
        start_step: int,
        log_every: int,
        schedule: Any = None,
        lag: int = 2,
        *,
        process: tuple[int, int] = (0, 1),
        phases: Phases | None = None,
        training_flops: usage.Flops | None = None,
        peak_flops: float | None = None,
        wandb_project: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._output_dir = paths.of(output_dir)
        self._total = total_steps
        self._start = start_step
        self._log_every = max(1, log_every)
        self._schedule = schedule
        self._lag = lag
        self._process = process
        self.phases = phases or Phases()
        self._training_flops = training_flops if peak_flops and process[0] == 0 else None
        self._peak_flops = peak_flops
        self._writers: list[Writer] = []
        self._goodput: Goodput | None = None
        if process[0] == 0:
            self._writers = open_writers(output_dir, start_step, announce, wandb_project, settings)
            self._goodput = Goodput(output_dir, start_step, self.phases, announce)
        self._pending: collections.deque[_Pending] = collections.deque()
        self._window: list[dict[str, float]] = []
        self._first_step_done = False
        self._rate: float | None = None
        self.last_step = start_step
        self.phases.begin("host")
        self._window_start = self.phases.seconds()

    def add(self, step: int, metrics: Mapping[str, Any], batch: Any) -> None:
        """Takes the metrics of `step` (device scalars) and its batch (arrays on the host, and `examples`).

        Raises:
          NonFiniteLossError: an earlier step's loss or gradient was not finite.
        """
        work = usage.flops_per_token(batch, self._training_flops) if self._training_flops else 0.0
        # A schedule computes on the device, behind the steps in flight: asked for now, it is there with the metrics.
        wanted = self._schedule and self._writers and self._is_logged(step)
        rate = self._schedule(step - 1) if wanted else None
        self._pending.append(_Pending(step, metrics, batch.examples, work, rate))
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
        with self.phases.phase("device"):
            values = {name: float(value) for name, value in pending.metrics.items()}
            rate = None if pending.learning_rate is None else float(pending.learning_rate)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            self._stop(pending, values)
        self.last_step = pending.step
        self.phases.step_done(pending.step)
        values["flops"] = pending.flops_per_token * values["useful_tokens"]
        if not self._first_step_done:
            # The first step's time is compilation, which would spoil every rate.
            self._first_step_done = True
            self._log(pending.step, [values], rate, rates=False)
            return
        self._window.append(values)
        if self._is_logged(pending.step):
            window, self._window = self._window, []
            self._log(pending.step, window, rate, rates=True)

    def _is_logged(self, step: int) -> bool:
        return step == self._start + 1 or step % self._log_every == 0 or step == self._total

    def _seconds_of_window(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        now = self.phases.seconds()
        found = {name: now[name] - before for name, before in self._window_start.items()}
        self._window_start = now
        return found

    def _stop(self, pending: _Pending, values: Mapping[str, float]) -> None:
        index, count = self._process
        suffix = f"_process_{index}" if count > 1 else ""
        path = self._output_dir / f"nonfinite_step_{pending.step}{suffix}.json"
        examples = [
            {"query_id": query, "document_ids": list(documents)} for query, documents in pending.examples
        ]
        content = {"step": pending.step, "metrics": dict(values), "examples": examples}
        paths.write(path, json.dumps(content, indent=1))
        part = "This process's part of the batch" if count > 1 else "The batch"
        raise NonFiniteLossError(
            f"step {pending.step}: loss {values['loss']}, gradient norm {values['grad_norm']}. {part} begins with "
            f"{examples[:2]}; all its query and document ids are in {path}. Nothing after the last checkpoint was "
            "saved. Look at those examples' texts and teacher logits, lower the learning rate, or compute in float32."
        )

    def _log(
        self, step: int, window: Sequence[Mapping[str, float]], learning_rate: float | None, rates: bool
    ) -> None:
        memory = usage.memory_peaks()
        if not self._writers:
            return
        seconds = self._seconds_of_window()
        sums = {name: sum(values[name] for values in window) for name in window[0]}
        scalars = {
            f"train/{name}": total / len(window)
            for name, total in sums.items()
            if name not in (*_COUNTS, "flops")
        }
        scalars["train/useful_token_share"] = sums["useful_tokens"] / max(1.0, sums["tokens"])
        if learning_rate is not None:
            scalars["train/learning_rate"] = learning_rate
        elapsed = sum(seconds[name] for name in TRAINING)
        if rates and elapsed > 0:
            scalars |= self._rates(sums, len(window), elapsed)
            for name in TRAINING:
                scalars[f"time/{name}_seconds"] = seconds[name]
                scalars[f"time/{name}_share"] = seconds[name] / elapsed
        for name in ("compile", "validation", "checkpoint"):
            scalars[f"time/{name}_seconds"] = seconds[name]
        scalars |= memory
        if self._goodput:
            scalars["goodput/share"] = self._goodput.share()
            self._goodput.write(step, hurry=False)
        self._write(step, scalars)
        print(self._line(step, scalars), flush=True)

    def _rates(self, sums: Mapping[str, float], steps: int, elapsed: float) -> dict[str, float]:
        self._rate = steps / elapsed
        found = {
            "time/step_seconds": elapsed / steps,
            "speed/examples_per_second": sums["documents"] / elapsed,
            "speed/useful_tokens_per_second": sums["useful_tokens"] / elapsed,
        }
        if self._peak_flops and sums["flops"]:
            found["speed/useful_tflops_per_second"] = sums["flops"] / elapsed / 1e12
            found["speed/mfu"] = sums["flops"] / elapsed / self._peak_flops
        return found

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, scalars)

    def _line(self, step: int, scalars: Mapping[str, float]) -> str:
        left = f"{clock((self._total - step) / self._rate)} left" if self._rate else None
        return progress_line(step, self._total, scalars, left)

    def validation(self, step: int, loss: float, is_best: bool) -> None:
        """Reports a validation loss."""
        if self._writers:
            self._write(step, {"validation/loss": loss})
            print(
                f"step {step}/{self._total}  validation loss {loss:.4f}{'  (best)' if is_best else ''}",
                flush=True,
            )

    @contextlib.contextmanager
    def pause(self, phase: str) -> Iterator[None]:
        """Context manager: time inside it does not count as training time.

        Args:
          phase: "validation", or "checkpoint": a save of the last step, all steps being drained.
        """
        with self.phases.phase(phase):
            yield
        if phase == "checkpoint" and self._goodput:
            self._goodput.saved(self.last_step)
            for writer in self._writers:
                writer.flush()

    def close(self) -> None:
        """Tells what became of the time, and ends the writers."""
        if self._goodput and self._first_step_done:
            self._goodput.write(self.last_step, finished=self.last_step >= self._total)
            announce(self._goodput.describe())
        for writer in self._writers:
            writer.close()


def progress_line(step: int, total: int, scalars: Mapping[str, float], left: str | None = None) -> str:
    """One line of at most `COLUMNS` characters, without the learning rate where it would be longer.

    >>> progress_line(50, 900, {"train/loss": 0.5, "train/useful_token_share": 0.97}, "3m07s left")
    'step 50/900  loss 0.5000  97% useful  3m07s left'
    """
    parts = {"step": f"step {step}/{total}", "loss": f"loss {scalars['train/loss']:.4f}"}
    if "train/learning_rate" in scalars:
        parts["rate"] = f"lr {scalars['train/learning_rate']:.1e}"
    if "speed/examples_per_second" in scalars:
        parts["examples"] = f"{short(scalars['speed/examples_per_second'])} examples/s"
    parts["useful"] = f"{scalars['train/useful_token_share']:.0%} useful"
    if "speed/mfu" in scalars:
        parts["mfu"] = f"MFU {scalars['speed/mfu']:.0%}"
    if "time/data_share" in scalars:
        # The rest is the host's.
        parts["time"] = f"data {scalars['time/data_share']:.0%} device {scalars['time/device_share']:.0%}"
    if left:
        parts["left"] = left
    if len("  ".join(parts.values())) > COLUMNS:
        parts.pop("rate", None)
    return "  ".join(parts.values())


def short(value: float) -> str:
    """A number in three digits.

    >>> short(87.31), short(1234.0), short(1_234_567.0)
    ('87.3', '1.23k', '1.23M')
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"
