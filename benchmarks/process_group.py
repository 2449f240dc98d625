"""Several processes of one JAX program on this machine, for tests and the soak."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence

HEARTBEAT = "INRANKER_JAX_HEARTBEAT_SECONDS"


def free_port() -> int:
    """A port that nobody listens on now, below the range from which the kernel deals out ports by itself.

    Raises:
      OSError: none was found.
    """
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port between 20000 and 32000")


@dataclasses.dataclass
class Ended:
    """How a process ended."""

    status: int
    stdout: str
    stderr: str


class Group:
    """Processes that were told of each other by the environment; kills what is left at the end of its block."""

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        devices: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        port = free_port()
        self.processes: list[subprocess.Popen[str]] = []
        self.lines: list[list[str]] = []
        self.errors: list[list[str]] = []
        self._readers: list[threading.Thread] = []
        for index in range(count):
            told = {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "PYTHONUNBUFFERED": "1",
            }
            if count > 1:
                told |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
                told["JAX_PROCESS_ID"] = str(index)
            process = subprocess.Popen(
                command,
                env={HEARTBEAT: "60", **os.environ, **(environment or {}), **told},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.processes.append(process)
            for stream, lines in ((process.stdout, self.lines), (process.stderr, self.errors)):
                lines.append([])
                reader = threading.Thread(target=lines[-1].extend, args=(stream,), daemon=True)
                reader.start()
                self._readers.append(reader)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for reader in self._readers:
            reader.join()

    def wait_for(self, marker: str, index: int = 0, seconds: float = 400.0, errors: bool = False) -> None:
        """Waits until a process has printed a line with `marker` to stdout, or to stderr with `errors`."""
        end = time.monotonic() + seconds
        lines = self.errors[index] if errors else self.lines[index]
        while not any(marker in line for line in lines):
            assert self.processes[index].poll() is None, "".join(self.errors[index])
            assert time.monotonic() < end, f"no {marker!r} in {lines}"
            time.sleep(0.005)

    def pause(self, seconds: float) -> None:
        """Lets them run for a moment."""
        time.sleep(seconds)

    def kill(self, *indices: int) -> None:
        """Kills the processes of these numbers, all at once."""
        for index in indices:
            self.processes[index].send_signal(signal.SIGKILL)

    def end(self, seconds: float = 400.0) -> list[Ended]:
        """Waits until all have ended."""
        limit = time.monotonic() + seconds
        statuses = [process.wait(max(0.1, limit - time.monotonic())) for process in self.processes]
        for reader in self._readers:
            reader.join()
        texts = zip(statuses, self.lines, self.errors, strict=True)
        return [Ended(status, "".join(out), "".join(err)) for status, out, err in texts]
