"""A journal in an object store, which has no append: a folder of numbered objects, each written once and whole."""

from __future__ import annotations

import os
import time

from inranker_jax import paths
from inranker_jax.errors import InputError
from inranker_jax.paths import PathType

_ENDING = ".jsonl"


class Segments:
    """Lines in a remote folder: what was written, in the order of the objects' numbers.

    Lines are gathered for `seconds` and then become one object, so a process that is killed loses at most those. An
    object is created and never replaced: of two processes that write the same journal, the second is told so.

    Args:
      folder: the remote folder.
      seconds: how long lines are gathered.
    """

    def __init__(self, folder: PathType, seconds: float = 10.0) -> None:
        self._folder = os.fspath(folder).rstrip("/")
        self._seconds = seconds
        self._gathered: list[bytes] = []
        self._since = time.monotonic()
        self._next = 0

    def read(self) -> bytes:
        """Everything that was written, by whom ever.

        Raises:
          InputError: an object is missing, or the folder holds another.
        """
        names = paths.names_below(self._folder)
        expected = [self._name(number) for number in range(len(names))]
        if names != expected:
            odd = sorted(set(names) ^ set(expected))[0]
            raise InputError.at(
                f"{self._folder}/{odd}", None, "missing, or not a part of a journal",
                f"the objects {self._name(0)}, {self._name(1)}, ... and no other",
                "Restore it, or choose another --output",
            )  # fmt: skip
        self._next = len(names)
        return b"".join(paths.of(f"{self._folder}/{name}").read_bytes() for name in names)

    def write(self, lines: bytes) -> None:
        """Adds whole lines; they are in the store after `seconds`, or when it is closed.

        Raises:
          InputError: another process writes this journal.
        """
        self._gathered.append(lines)
        if time.monotonic() - self._since >= self._seconds:
            self._store()

    def close(self) -> None:
        """Writes what is gathered.

        Raises:
          InputError: another process writes this journal.
        """
        self._store()

    def _store(self) -> None:
        self._since = time.monotonic()
        if not self._gathered:
            return
        name = f"{self._folder}/{self._name(self._next)}"
        if not paths.create(name, b"".join(self._gathered)):
            raise InputError.at(
                name, None, "another process is writing this journal", remedy="Wait for it, or stop it"
            )
        self._next += 1
        self._gathered = []

    @staticmethod
    def _name(number: int) -> str:
        return f"{number:08d}{_ENDING}"
