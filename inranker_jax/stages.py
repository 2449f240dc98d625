"""Runs commands one after another, each in a process of its own, with a record of what ran and what it took.

A stage is a command line that a person could type. It is skipped when the record says that the same command
finished, its outputs are there, and no stage before it ran in this session.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import pathlib
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from inranker_jax.errors import InputError
from inranker_jax.interruption import Interruption
from inranker_jax.progress import announce, clock
from inranker_jax.records import atomic_text


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of a pipeline.

    Attributes:
      name: what the record and the summary call it.
      command: makes the command line, when the stage's turn has come: it may depend on earlier outputs.
      outputs: files or folders that a finished stage leaves.
      about: reads what the outputs hold, in a few words for the summary.
      hints: what to do about an exit status, by status.
    """

    name: str
    command: Callable[[], Sequence[str]]
    outputs: tuple[pathlib.Path, ...]
    about: Callable[[], str] = lambda: ""
    hints: dict[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A line of the summary: `status` is "ran", "done before" or "left out"; seconds over all sessions."""

    stage: str
    status: str
    seconds: float
    about: str


class StageFailed(Exception):
    """A stage ended with a status other than 0, which the message explains.

    Attributes:
      status: its exit status, as a shell reports it.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def run_stages(
    stages: Sequence[Stage], record: pathlib.Path, interruption: Interruption, skipped: Sequence[str] = ()
) -> Iterator[Outcome]:
    """Runs what is not done yet, and yields an outcome after each stage.

    Args:
      stages: in the order in which they depend on each other.
      record: a JSON file which is brought up to date after each stage.
      interruption: signals that arrive are passed on to the running stage, which is then waited for.
      skipped: names of stages to leave out.

    Raises:
      StageFailed: a stage did not end with status 0, or a signal arrived.
      InputError: the record cannot be read.
    """
    entries = _read(record)
    ran = False
    for position, stage in enumerate(stages, start=1):
        title = f"[{position}/{len(stages)}] {stage.name}"
        entry = entries.setdefault(stage.name, {"seconds": 0.0, "sessions": 0})
        if stage.name in skipped:
            announce(f"{title}: left out")
            yield Outcome(stage.name, "left out", 0.0, "")
            continue
        command = list(stage.command())
        exists = all(path.exists() for path in stage.outputs)
        if not ran and exists and entry.get("finished") and entry.get("command") == command:
            announce(f"{title}: done before ({clock(entry['seconds'])})")
            yield Outcome(stage.name, "done before", entry["seconds"], stage.about())
            continue
        ran = True
        if entry.get("command") != command:
            entry.update(seconds=0.0, sessions=0)
        entry.update(command=command, finished=None, sessions=entry["sessions"] + 1)
        _write(record, entries)
        announce(f"{title}: {shlex.join(command)}")
        started = time.perf_counter()
        status = _wait(command, interruption)
        entry["seconds"] = round(entry["seconds"] + time.perf_counter() - started, 1)
        if status == 0 and not interruption.requested:
            entry["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        _write(record, entries)
        if interruption.requested:
            raise StageFailed(f"interrupted during {stage.name!r}", interruption.exit_status)
        if status:
            hint = stage.hints.get(status, "Its message is above.")
            raise StageFailed(f"stage {stage.name!r} ended with status {status}. {hint}", status)
        yield Outcome(stage.name, "ran", entry["seconds"], stage.about())


def _wait(command: Sequence[str], interruption: Interruption) -> int:
    """Waits for a command, in a session of its own so that a signal reaches it once, from here."""
    with subprocess.Popen(command, start_new_session=True) as process:
        passed_on = False
        while True:
            try:
                status = process.wait(timeout=0.2)
                return status if status >= 0 else 128 - status
            except subprocess.TimeoutExpired:
                if interruption.requested and not passed_on:
                    passed_on = True
                    process.send_signal(interruption.signal_number or signal.SIGTERM)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                raise


def _read(record: pathlib.Path) -> dict[str, Any]:
    if not record.exists():
        return {}
    try:
        entries: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))["stages"]
    except (ValueError, KeyError) as error:
        raise InputError.at(
            record,
            None,
            f"not a record of stages ({error})",
            remedy="Remove it: each stage resumes by itself",
        ) from error
    return entries


def _write(record: pathlib.Path, entries: dict[str, Any]) -> None:
    with atomic_text(record) as out:
        json.dump({"stages": entries}, out, indent=1)
