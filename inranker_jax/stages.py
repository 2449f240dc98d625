"""Runs commands one after another, each in a process of its own, with a record of what ran and what it took.

A stage is a command line that a person could type. It is skipped when the record says that the same command
finished with the same inputs, its outputs are there, and no stage before it has run since.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from inranker_jax import locks, paths
from inranker_jax.errors import InputError
from inranker_jax.interruption import Interruption
from inranker_jax.paths import PathType, is_remote
from inranker_jax.progress import announce, clock
from inranker_jax.records import atomic_text

# Becomes the command, after asking Linux for SIGTERM when the parent dies, however that comes about. (Nothing of ours
# may run between fork and exec in this process: it may have threads.)
_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""
# How long a stage of a command that was killed may take to leave.
_PATIENCE_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of a pipeline.

    Attributes:
      name: what the record and the summary call it.
      command: makes the command line, when the stage's turn has come: it may depend on earlier outputs.
      outputs: paths (local or `epath`) of files or folders that a finished stage leaves.
      inputs: paths that come from outside the pipeline; when one changes, the stage runs again. Of what is no
        local path (a hub id, say), the name alone counts.
      about: reads what the outputs hold, in a few words for the summary.
      hints: what to do about an exit status, by status.
      usd: reads what the stage paid to others, in dollars.
      fixed: whether, once it is finished, another command is an error, which is raised before any stage runs:
        what it made must not be mixed with what another command makes.
      free: flags of which the value may differ all the same.
    """

    name: str
    command: Callable[[], Sequence[str]]
    outputs: tuple[Any, ...]
    inputs: tuple[str, ...] = ()
    about: Callable[[], str] = lambda: ""
    hints: dict[int, str] = dataclasses.field(default_factory=dict)
    usd: Callable[[], float] = lambda: 0.0
    fixed: bool = False
    free: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A line of the summary: `status` is "ran", "done before" or "left out"; seconds over all sessions.

    `usd` is what was paid to others, such as a language model's host.
    """

    stage: str
    status: str
    seconds: float
    about: str
    usd: float = 0.0


class StageFailed(Exception):
    """A stage ended with a status other than 0, which the message explains.

    Attributes:
      status: its exit status, as a shell reports it.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def run_stages(
    stages: Sequence[Stage], record: PathType, interruption: Interruption, skipped: Sequence[str] = ()
) -> Iterator[Outcome]:
    """Runs what is not done yet, and yields an outcome after each stage.

    Args:
      stages: in the order in which they depend on each other.
      record: a JSON file which is brought up to date after each stage; its folder is locked, unless it is in a store.
      interruption: signals that arrive are passed on to the running stage, which is then waited for.
      skipped: names of stages to leave out.

    Raises:
      StageFailed: a stage did not end with status 0, or a signal arrived.
      InputError: the record cannot be read, a finished stage had another command, or another process is at work.
    """
    with _locked(record) as lock:
        entries = _read(record)
        _check_fixed(stages, entries, record)
        for position, stage in enumerate(stages):
            title = f"[{position + 1}/{len(stages)}] {stage.name}"
            entry = entries.setdefault(stage.name, {"seconds": 0.0, "sessions": 0})
            if stage.name in skipped:
                announce(f"{title}: left out")
                yield Outcome(stage.name, "left out", 0.0, "")
                continue
            command, stamps = list(stage.command()), {path: _stamp(path) for path in stage.inputs}
            same = _settings(entry) == command[1:] and entry.get("inputs") == stamps
            exists = all(path.exists() for path in stage.outputs)
            if exists and entry.get("finished") and same:
                announce(f"{title}: done before ({clock(entry['seconds'])})")
                yield Outcome(stage.name, "done before", entry["seconds"], stage.about(), stage.usd())
                continue
            if not same:
                entry.update(seconds=0.0, sessions=0)
            entry.update(command=command, inputs=stamps, finished=None, sessions=entry["sessions"] + 1)
            for later in stages[position + 1 :]:
                entries.get(later.name, {})["finished"] = None
            _write(record, entries)
            announce(f"{title}: {shlex.join(command)}")
            _run(stage, command, entry, interruption, lock, lambda: _write(record, entries))
            yield Outcome(stage.name, "ran", entry["seconds"], stage.about(), stage.usd())


def _locked(record: PathType) -> contextlib.AbstractContextManager[int | None]:
    """Holds the record's folder; yields the lock's descriptor, None in a store, which has no locks."""
    if is_remote(record):
        return contextlib.nullcontext()
    place = pathlib.Path(record)
    who = "another command (or a stage that one left behind)"
    return locks.held(place.with_name(f".{place.name}.lock"), who, _PATIENCE_SECONDS)


def _check_fixed(stages: Sequence[Stage], entries: dict[str, Any], record: PathType) -> None:
    for stage in stages:
        entry = entries.get(stage.name, {})
        if not (stage.fixed and entry.get("finished") and all(path.exists() for path in stage.outputs)):
            continue
        old, new = (
            [part for part in command if part.partition("=")[0] not in stage.free]
            for command in (_settings(entry), list(stage.command())[1:])
        )
        lines = [f"- {part}" for part in old if part not in new] + [
            f"+ {part}" for part in new if part not in old
        ]
        if lines:
            shown = "\n".join(lines)
            raise InputError(
                f"{os.path.dirname(record)} holds what stage {stage.name!r} made with other settings (- then, + now):\n"
                f"{shown}\n"
                "Run it with those again, or choose another output folder."
            )


def _settings(entry: dict[str, Any]) -> list[str]:
    """A recorded command without its program: another machine's Python lies elsewhere."""
    return list(entry.get("command", []))[1:]


def _run(
    stage: Stage,
    command: Sequence[str],
    entry: dict[str, Any],
    interruption: Interruption,
    lock: int | None,
    save: Callable[[], None],
) -> None:
    """Runs one stage and keeps in its entry how that went."""
    started = time.perf_counter()
    try:
        status = _wait(command, interruption, lock)
        if status == 0 and not interruption.requested:
            entry["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    finally:
        entry["seconds"] = round(entry["seconds"] + time.perf_counter() - started, 1)
        save()
    if interruption.requested:
        raise StageFailed(f"interrupted during {stage.name!r}.", interruption.exit_status)
    if status:
        hint = stage.hints.get(status, "Its message is above.")
        raise StageFailed(f"stage {stage.name!r} ended with status {status}. {hint}", status)


def _wait(command: Sequence[str], interruption: Interruption, lock: int | None) -> int:
    """Waits for a command, in a session of its own so that a signal reaches it once, from here.

    It inherits the lock: should this process be killed, nobody else begins before the command has ended, too.
    """
    launched = [sys.executable, "-c", _LAUNCHER, str(os.getpid()), *command]
    kept = () if lock is None else (lock,)
    with subprocess.Popen(launched, start_new_session=True, pass_fds=kept) as process:
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


def _stamp(path: str) -> str | None:
    """Sizes and times of a local file, or of all files of a local folder; None where there is neither."""
    place = pathlib.Path(path)
    files = [place] if place.is_file() else sorted(entry for entry in place.rglob("*") if entry.is_file())
    found = [(str(file.relative_to(place)), file.stat()) for file in files]
    described = [f"{name} {status.st_size} {status.st_mtime_ns}" for name, status in found]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16] if described else None


def recorded_command(record: PathType, stage: str) -> list[str]:
    """The command with which a stage ran last; empty before it ever ran."""
    return list(_read(record).get(stage, {}).get("command", []))


def is_finished(record: PathType, stage: str) -> bool:
    """Whether a stage has ended well, with whatever command."""
    return bool(_read(record).get(stage, {}).get("finished"))


def _read(record: PathType) -> dict[str, Any]:
    try:
        content = paths.read(record)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        entries: dict[str, Any] = json.loads(content)["stages"]
    except (ValueError, KeyError) as error:
        raise InputError.at(
            record,
            None,
            f"not a record of stages ({error})",
            remedy="Remove it: each stage resumes by itself",
        ) from error
    return entries


def _write(record: PathType, entries: dict[str, Any]) -> None:
    with atomic_text(record) as out:
        json.dump({"stages": entries}, out, indent=1)
