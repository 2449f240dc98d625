"""Folders that one command at a time may work in."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from inranker_jax.errors import InputError


@contextlib.contextmanager
def held(path: str | os.PathLike[str], who: str = "another command", patience: float = 20.0) -> Iterator[int]:
    """Holds a lock file, and yields its descriptor; the system frees it with the last process that has that open.

    A system or file system without such locks lets everybody in.

    Args:
      path: of the lock file, in the folder that is held; not in an object store, which has no locks.
      who: how an error names whoever holds it.
      patience: seconds to wait for it. A process that was killed a moment ago may still be ending.

    Raises:
      InputError: somebody else holds it.
    """
    place = pathlib.Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("a+") as file:
        deadline = time.monotonic() + patience
        while not _taken(file.fileno()):
            if time.monotonic() > deadline:
                file.seek(0)
                raise InputError.at(
                    place.parent, None, f"{who} is at work there ({file.read().strip() or 'unknown process'})",
                    remedy="Wait until it has ended, or stop it; or choose another output folder",
                )  # fmt: skip
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield file.fileno()


def _taken(descriptor: int) -> bool:
    """Whether the lock is had, or cannot be had by anybody."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True
