"""The process of one contender: `python -m contenders.worker`, commands in and answers out, one JSON line each.

The first line has `module` (one with a class `Contender`), `options` for that class, and `cores`
to which the process is confined before anything that starts threads is imported. The commands that follow:

- `{"do": "prepare", "workload": name, "file": path, "mode": mode}`: warms up, and answers what there is to say;
- `{"do": "run", "workload": name, "mode": mode, "round": number}`: answers `seconds`, `values` and `peak_bytes`;
- `{"do": "peak"}`: answers the rates of matrix products, FLOP/s by precision.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import pathlib
import signal
import sys
import time
import traceback
from typing import Any, Protocol

import numpy as np

PR_SET_PDEATHSIG = 1


class Contender(Protocol):
    """What an engine's class offers."""

    def about(self) -> dict[str, Any]:
        """Versions and settings, for the report."""

    def prepare(self, name: str, arrays: dict[str, np.ndarray], mode: str) -> dict[str, Any]:
        """Makes a workload ready in a mode and runs it until nothing is compiled any more.

        Returns:
          What there is to say, such as `useful_share`; `values` where the run gave what is to be compared.
        """

    def run(self, name: str, mode: str, number: int) -> list[float]:
        """What is timed: round `number` of a workload, until the results are on the host."""

    def peak(self) -> dict[str, float]:
        """FLOP/s of matrix products by precision; empty for engines that cannot measure them."""


def reset_peak() -> bool:
    """Makes the kernel forget this process's largest memory so far; False where it does not let us."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak_bytes() -> int:
    """Largest resident memory since `reset_peak`, or since the start."""
    with contextlib.suppress(OSError):
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """A workload's file: `ids` int32, all sequences on end; `lengths` int64 [n]; and what else it has."""
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def sequences_of(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The token ids of each pair, int32 [length]."""
    return np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])


def answer(contender: Contender, command: dict[str, Any]) -> dict[str, Any]:
    """Carries out one command."""
    if command["do"] == "prepare":
        return contender.prepare(command["workload"], read_arrays(command["file"]), command["mode"])
    if command["do"] == "peak":
        return {"peak": contender.peak()}
    reset_peak()
    started = time.perf_counter()
    values = contender.run(command["workload"], command["mode"], command["round"])
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "values": [float(value) for value in values], "peak_bytes": peak_bytes()}


def explained(error: BaseException) -> dict[str, str]:
    """One line for the table; the log gets the rest."""
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    if isinstance(error, ModuleNotFoundError):
        return {"error": f"{error.name} is not installed"}
    lines = str(error).strip().splitlines() or ["no message"]
    return {"error": f"{type(error).__name__}: {lines[0][:200]}"}


def main() -> None:
    """Serves until the parent closes the pipe or dies."""
    # Libraries print to standard output as they like; answers have a channel of their own.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if sys.platform == "linux":
        # SIGKILL reaches a stopped process too, so that none outlives a parent that was killed.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def send(reply: dict[str, Any]) -> None:
        channel.write(json.dumps(reply) + "\n")
        channel.flush()

    first = json.loads(sys.stdin.readline())
    if first["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, first["cores"])
    try:
        module = importlib.import_module(first["module"])
        contender: Contender = module.Contender(first["options"])
        send({"about": contender.about()})
    except Exception as error:
        return send(explained(error))
    for line in sys.stdin:
        try:
            send(answer(contender, json.loads(line)))
        except Exception as error:
            send(explained(error))


if __name__ == "__main__":
    main()
