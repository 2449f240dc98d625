"""Goodput: how much of a run's time, over all its sessions, went into steps that count."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from inranker_jax import paths
from inranker_jax.progress import clock
from inranker_jax.telemetry.phases import TRAINING, Phases

FILE = "goodput.json"
KINDS = ("steps", "startup", "compile", "validation", "checkpoint", "redone", "down")
_WORDS = {
    "steps": "steps", "startup": "start-up", "compile": "compilation", "validation": "validation",
    "checkpoint": "checkpoints", "redone": "steps done again", "down": "down",
}  # fmt: skip
_CHECKPOINTS_KEPT = 1000
_SECONDS_BETWEEN_WRITES = 10.0


class Goodput:
    """Keeps account of a run's wall time in `goodput.json` of its folder, over restarts.

    Time belongs to one of `KINDS`: `steps` (waiting for data, host and device: steps that are part of the result),
    `startup`, `compile`, `validation` and `checkpoint` (see `Phases`), `redone` (steps after the checkpoint from which
    a later session went on) and `down` (from the last that is known of a session to the start of the next; after a kill
    this includes what it did since it last wrote the file). Goodput is the share of `steps` in their sum, which is the
    wall time since the first session began. Time between the end of a finished run and its extension is left out.

    Args:
      folder: the run's folder.
      step: the step at which this session starts.
      phases: where this session's time goes.
      announce: prints a line.
    """

    def __init__(self, folder: str, step: int, phases: Phases, announce: Callable[[str], None]) -> None:
        self._path = paths.of(folder) / FILE
        self._phases = phases
        self._before = dict.fromkeys(KINDS, 0.0)
        self._checkpoints: dict[int, float] = {}
        self._sessions = 1
        self._first_start = phases.started
        self._step = step
        self._last_write = -_SECONDS_BETWEEN_WRITES
        stored = self._read(announce)
        if stored is None:
            return
        self._first_start = stored["first_start"]
        self._sessions = stored["sessions"] + 1
        self._before |= stored["seconds"]
        marks = {int(key): value for key, value in stored["steps_seconds_at_checkpoint"].items()}
        self._checkpoints = {key: value for key, value in marks.items() if key <= step}
        counted = self._checkpoints[max(self._checkpoints)] if self._checkpoints else 0.0
        self._before["redone"] += self._before["steps"] - counted
        self._before["steps"] = counted
        if not stored["finished"]:
            self._before["down"] += max(0.0, phases.started - stored["updated"])

    def _read(self, announce: Callable[[str], None]) -> dict[str, Any] | None:
        if not self._path.exists():
            return None
        try:
            stored = json.loads(paths.read(self._path))
            return {
                "first_start": float(stored["first_start"]),
                "updated": float(stored["updated"]),
                "finished": bool(stored["finished"]),
                "sessions": int(stored["sessions"]),
                "seconds": {kind: float(stored["seconds"][kind]) for kind in KINDS},
                "steps_seconds_at_checkpoint": dict(stored["steps_seconds_at_checkpoint"]),
            }
        except (ValueError, KeyError, TypeError) as error:
            # A machine that lost power may leave an empty file; that is no reason not to train.
            announce(f"{self._path} is damaged ({error!r}): goodput counts from this session on.")
            return None

    def seconds(self) -> dict[str, float]:
        """Seconds of each of `KINDS` since the first session began."""
        now = self._phases.seconds()
        found = dict(self._before)
        found["steps"] += sum(now[name] for name in TRAINING)
        for kind in ("startup", "compile", "validation", "checkpoint"):
            found[kind] += now[kind]
        return found

    def share(self) -> float:
        """Goodput, from 0 to 1."""
        return share_of(self.seconds())

    def describe(self) -> str:
        """Goodput and where the rest went, in a line."""
        seconds = self.seconds()
        parts = ", ".join(f"{_WORDS[kind]} {clock(seconds[kind])}" for kind in KINDS if seconds[kind] >= 0.5)
        sessions = f"{self._sessions} session{'s' if self._sessions > 1 else ''}"
        return f"goodput {share_of(seconds):.0%} of {clock(sum(seconds.values()))} in {sessions}: {parts}"

    def saved(self, step: int) -> None:
        """Takes note that a checkpoint of `step` was written, or is being written."""
        self._checkpoints[step] = self.seconds()["steps"]
        for old in sorted(self._checkpoints)[:-_CHECKPOINTS_KEPT]:
            del self._checkpoints[old]
        self.write(step)

    def write(self, step: int, finished: bool = False, hurry: bool = True) -> None:
        """Replaces the file.

        Args:
          step: the last step that is done.
          finished: whether the run is at its end.
          hurry: write even when the last time was a moment ago.
        """
        if not hurry and time.monotonic() - self._last_write < _SECONDS_BETWEEN_WRITES:
            return
        self._last_write = time.monotonic()
        seconds = self.seconds()
        content = {
            "goodput": share_of(seconds),
            "first_start": self._first_start,
            "updated": time.time(),
            "sessions": self._sessions,
            "step": step,
            "finished": finished,
            "seconds": seconds,
            "steps_seconds_at_checkpoint": self._checkpoints,
        }
        paths.write(self._path, json.dumps(content, indent=1))


def share_of(seconds: Mapping[str, float]) -> float:
    """Share of `steps` in all of `seconds`.

    >>> share_of({"steps": 3.0, "down": 1.0})
    0.75
    """
    total = sum(seconds.values())
    return seconds["steps"] / total if total > 0 else 0.0
