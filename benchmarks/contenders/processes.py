"""The parent's side of a contender: starts its process, asks, waits, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1]


class ContenderError(Exception):
    """A contender could not do what it was asked; the message becomes its row of the table."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """One contender.

    Attributes:
      name: in tables, such as "PyTorch float32".
      module: the module with its `Contender`, such as "contenders.torch_scorer".
      options: for that class; must be plain data.
      modes: ways in which it is run, each a row of the tables.
      precision: "float32", "bfloat16" or "int8".
    """

    name: str
    module: str
    options: Mapping[str, Any]
    modes: tuple[str, ...]
    precision: str


class Worker:
    """A running contender. Between commands it is stopped, so that only one contender at a time uses a core."""

    def __init__(
        self, spec: Spec, cores: list[int], log: pathlib.Path, environment: Mapping[str, str], timeout: float
    ) -> None:
        """Starts the process and waits until its model is loaded.

        Args:
          spec: the contender.
          cores: core numbers to which it is confined; it is told to use as many threads.
          log: where its standard error goes.
          environment: variables beside the parent's own.
          timeout: seconds after which a command counts as failed.

        Raises:
          ContenderError: it did not start.
        """
        self.spec = spec
        self._timeout = timeout
        self._buffer = b""
        threads = str(len(cores))
        threading = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "contenders.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=BENCHMARKS,
                env={**os.environ, **threading, **environment},
                # Ctrl-C goes to the parent alone, which then ends its workers.
                start_new_session=True,
            )
        options = {**spec.options, "threads": len(cores)}
        try:
            reply = self._exchange({"module": spec.module, "options": options, "cores": cores})
        except BaseException:
            self.close()
            raise
        self.about: dict[str, Any] = reply["about"]

    def ask(self, **command: Any) -> dict[str, Any]:
        """Carries out one command.

        Raises:
          ContenderError: it failed, died, or took too long; after the last two the worker is gone.
        """
        if self._process.poll() is not None:
            raise ContenderError(f"the process has ended with status {self._process.returncode}")
        self._process.send_signal(signal.SIGCONT)
        return self._exchange(command)

    def _exchange(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
            reply: dict[str, Any] = json.loads(self._read_line())
        except BrokenPipeError:
            raise ContenderError(f"the process ended with status {self._process.wait()}") from None
        self._process.send_signal(signal.SIGSTOP)
        if "error" in reply:
            raise ContenderError(reply["error"])
        return reply

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        channel, deadline = self._process.stdout.fileno(), time.monotonic() + self._timeout
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([channel], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(channel, 1 << 16) if ready else b""
            if not part:
                alive = self._process.poll() is None and not ready
                self.close()
                raise ContenderError(
                    f"no answer in {self._timeout:.0f} s"
                    if alive
                    else f"the process ended with status {self._process.returncode}"
                )
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def close(self) -> None:
        """Kills the process with all that it started (PyTorch's compilers), and waits for its end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_module(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
    """Runs a module of this package to its end, for work that must not share a process with a contender.

    Raises:
      ContenderError: it failed; the message is its last line.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"contenders.{module}", *arguments],
        cwd=BENCHMARKS,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise ContenderError(lines[-1][:300])
