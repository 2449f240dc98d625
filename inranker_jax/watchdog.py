"""Notices when a process stands still, and tells where: which host, which step, which phase, which line of code."""

from __future__ import annotations

import argparse
import faulthandler
import io
import math
import os
import re
import socket
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable

from inranker_jax.errors import InputError
from inranker_jax.progress import announce, clock
from inranker_jax.telemetry.phases import Phases

EXIT_STATUS = 75
"""Of a process that `exit_after` ended: "temporary failure; the same command may succeed" in sysexits.h."""

_PATIENCE = 6.0
_NAME = "inranker-watchdog"
_MEANINGS = {
    "startup": "reading data, restoring or making parameters",
    "data": "waiting for the next batch of its own data pipeline",
    "host": "placing a batch, dispatching a step, or bookkeeping",
    "device": "waiting for a step's result: for its devices, or for another host which they wait for",
    "validation": "computing the validation loss",
    "checkpoint": "saving, writing the final report, or waiting for other hosts to do so",
    "scoring": "scoring pairs and saving their scores",
    "waiting": "looking for the work of other processes in the shared folder",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--hang_seconds`, for commands without gin parameters of their own."""
    parser.add_argument(
        "--hang_seconds",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="report where this process is when it has saved nothing for so long, 0 for never (default 600)",
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds of 0 or more")
    return value


class Watchdog:
    """A thread that prints a report when no step was finished for too long. It ends nothing unless told to.

    Too long is `seconds`, or `factor` times the median step if that is more. The start, the first two steps (the first
    compiles, and only the second tells how long one takes), a validation and a save may each take six times as long.
    Who waits for other processes (phase `waiting`) is late when it has not looked for them for `seconds`. While nothing
    moves, reports come again after twice, four times, eight times as long. Each process reports on itself, to standard
    error: in a job of several hosts, the one whose phase is neither `device` nor `waiting` holds up the others.

    Should the interpreter itself be stuck (native code that never gives back its lock), no Python thread can report;
    then faulthandler's own thread prints the bare stacks, some time later.

    Args:
      phases: where the main thread is.
      seconds: see above; 0 for no watch.
      factor: see above.
      process: (index, count) of this process.
      exit_after: seconds without a step after which the process is ended with status 75, for launchers that start it
        again; None for never. Not before the first batch: what takes long to start would be ended for ever.
      step: what a step is called.
      report: prints a text.

    Raises:
      InputError: a number is negative.
    """

    def __init__(
        self,
        phases: Phases,
        seconds: float = 600.0,
        factor: float = 20.0,
        process: tuple[int, int] = (0, 1),
        exit_after: float | None = None,
        step: str = "step",
        report: Callable[[str], None] = announce,
    ) -> None:
        if seconds < 0 or factor < 0 or (exit_after is not None and exit_after <= 0):
            raise InputError(
                f"hang_seconds={seconds}, hang_factor={factor}, hang_exit_seconds={exit_after}: expected seconds and "
                "factor of 0 or more, and more than 0 (or None) to exit."
            )
        self._phases = phases
        self._seconds = seconds
        self._factor = factor
        self._process = process
        self._exit_after = exit_after
        self._step = step
        self._report = report
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=_NAME, daemon=True)
        self._reports = 0
        self._stood_at = 0.0

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def limit(self) -> tuple[float, float]:
        """Seconds for which nothing has moved, and how many are allowed now."""
        phase, since = self._phases.current
        if phase in ("startup", "validation", "checkpoint"):
            return since, self._seconds * _PATIENCE
        if phase == "waiting":
            return self._phases.seconds_without_step, self._seconds
        steps = self._phases.step_seconds
        if not steps:
            return self._phases.seconds_without_step, self._seconds * _PATIENCE
        usual = self._factor * statistics.median(steps)
        return self._phases.seconds_without_step, max(self._seconds, usual)

    def _watch(self) -> None:
        pause = min(10.0, self._seconds / 10)
        while not self._stop.wait(pause):
            stood, limit = self.limit()
            self._have_native_watch(limit + 3 * pause)
            if self._reports and stood < self._stood_at:
                self._report(f"it goes on, after it stood still for {clock(self._stood_at)} or more")
                self._reports = 0
            if stood >= limit * 2**self._reports:
                self._reports += 1
                self._report(self.describe(stood, limit))
            starting = self._phases.current[0] == "startup"
            if self._exit_after is not None and not starting and stood >= max(limit, self._exit_after):
                self._report(
                    f"ending this process with status {EXIT_STATUS}: no {self._step} for {clock(stood)}"
                )
                sys.stdout.flush()
                os._exit(EXIT_STATUS)
            self._stood_at = stood

    def describe(self, stood: float, limit: float) -> str:
        """Where this process is, in lines."""
        index, count = self._process
        phase, since = self._phases.current
        step = self._phases.last_step
        following = f"next report in {clock(max(0.0, limit * 2**self._reports - stood))} unless it goes on"
        lines = [
            f"HANG? no {self._step} was finished for {clock(stood)} (allowed: {clock(limit)})",
            f"  process {index} of {count} on {socket.gethostname()}, pid {os.getpid()}",
            f"  last finished {self._step}: {'none in this session' if step is None else step}",
            f"  phase: {phase}, for {clock(since)}: {_MEANINGS.get(phase, phase)}",
            *("  " + line for line in stacks().splitlines()),
            f"end of report; {following}",
        ]
        return "\n".join(lines)

    def _have_native_watch(self, seconds: float) -> None:
        """Sets faulthandler's alarm, which needs no lock of the interpreter, to after the next look of this thread."""
        try:
            faulthandler.dump_traceback_later(seconds, file=sys.stderr)
        except (AttributeError, ValueError, io.UnsupportedOperation):
            return  # standard error is no file, as in a notebook


def stacks() -> str:
    """Python's stack of every thread, innermost call first, the main thread's before the others."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        blocks = file.read().strip().split("\n\n")
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for block in blocks:
        match = re.match(r"(?:Current thread|Thread) 0x([0-9a-f]+)[^\n]*", block)
        name = names.get(int(match[1], 16), "of native code") if match else ""
        if match:
            block = f"thread {name}, innermost call first:{block[match.end() :]}"
        if name != _NAME:
            found.append((name != "MainThread", block))
    return "\n".join(block for _, block in sorted(found, key=lambda pair: pair[0]))
