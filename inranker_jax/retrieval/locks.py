"""One process at a time: a lock beside what it writes."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from inranker_jax.errors import InputError


@contextlib.contextmanager
def alone(path: Path, doing: str) -> Iterator[None]:
    """Keeps other processes away from a file or folder; the system drops the lock however this process ends.

    Args:
      path: what is written; the lock is the file `.NAME.lock` beside it.
      doing: what another process would be doing, for the message: "building this index".

    Raises:
      InputError: another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The winner of a race may have removed the file that was opened here: that lock keeps nobody out.
            held = os.path.exists(file.name) and os.path.samestat(os.stat(file.name), os.fstat(file.fileno()))
        except BlockingIOError:
            held = False
        if not held:
            raise InputError.at(path, None, f"another process is {doing}", remedy="Wait for it to finish")
        try:
            yield
        finally:
            os.unlink(file.name)
