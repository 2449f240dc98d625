"""Finished queries of one reranking on disk, so that it goes on after any interruption.

    FILE.jsonl      what process 0 scored: a line that names the settings, then a line a query
    FILE-3.jsonl    what process 3 scored

Every process appends to its own file and reads all of them, whatever number of processes they are of. An object store
(`gs://`, `s3://`) cannot append: there each group of queries that is added is an object, `FILE-<hash>.jsonl`.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from inranker_jax import paths
from inranker_jax.records import PathType


class ScoreMemory:
    """The scores of finished queries, in files that grow by a line a query.

    A file of other settings (another `fingerprint`) is passed over, and started anew by its process; an unfinished
    last line, left by a kill in the middle of a write, is dropped and that query scored again.
    """

    def __init__(self, path: PathType, fingerprint: str, index: int = 0) -> None:
        """Reads what there is; nothing is written before there are scores.

        Args:
          path: the file of process 0, which gives the others their names; folders are made.
          fingerprint: whatever decides the scores, as one string.
          index: number of this process.
        """
        self._path, self._fingerprint = paths.of(path), fingerprint
        self._own = self._named(str(index)) if index else self._path
        self._known: dict[str, dict[str, float]] = {}
        self._read: dict[str, int] = {}  # whole lines of each file, in bytes
        self._file: BinaryIO | None = None
        self.refresh()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, query: str) -> dict[str, float] | None:
        """Scores of a finished query, or None."""
        return self._known.get(query)

    def refresh(self) -> None:
        """Reads what other processes have finished since."""
        for path in self._paths():
            name = path.name
            if paths.is_remote(path):
                if name not in self._read:  # an object never changes
                    with contextlib.suppress(FileNotFoundError):
                        self._read[name] = self._take(path.read_bytes().splitlines(keepends=True), 0)
            elif self._file is None or path != self._own:
                self._read[name] = self._read_on(path, self._read.get(name, 0))

    def _paths(self) -> list[Any]:
        name = f"{glob.escape(self._path.stem)}*{glob.escape(self._path.suffix)}"
        return sorted(self._path.parent.glob(name))

    def _named(self, part: str) -> Any:
        return self._path.with_name(f"{self._path.stem}-{part}{self._path.suffix}")

    def _read_on(self, path: Any, whole: int) -> int:
        """Takes the lines after the first `whole` bytes of a file; returns how many bytes are whole lines now."""
        try:
            with open(path, "rb") as lines:
                lines.seek(whole)
                return self._take(lines, whole)
        except FileNotFoundError:  # another process has just removed it
            return 0

    def _take(self, lines: Iterable[bytes], whole: int) -> int:
        for line in lines:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if whole == 0:
                if row != {"fingerprint": self._fingerprint}:
                    return 0
            elif isinstance(row, dict) and row.keys() == {"query", "scores"}:
                self._known[row["query"]] = row["scores"]
            else:
                break
            whole += len(line)
        return whole

    def add(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Keeps finished queries; they are on disk when this returns."""
        self._known.update({query: dict(documents) for query, documents in scores.items()})
        lines = b"".join(_line({"query": query, "scores": self._known[query]}) for query in scores)
        if paths.is_remote(self._path):
            # By its name, an object of other settings is another.
            named = hashlib.sha256(_line([self._fingerprint, *scores])).hexdigest()[:16]
            paths.write(self._named(named), _line({"fingerprint": self._fingerprint}) + lines)
            self._read[self._named(named).name] = len(lines)
            return
        file = self._file or self._open()
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())

    def _open(self) -> BinaryIO:
        whole = self._read.get(self._own.name, 0)
        self._own.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._own, "r+b" if whole else "wb")  # noqa: SIM115 - closed by `close`
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._file.write(_line({"fingerprint": self._fingerprint}))
        return self._file

    def close(self) -> None:
        """Closes this process's file and leaves all for the next time."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Deletes the files of all processes: the reranking is complete."""
        self.close()
        for path in self._paths():
            path.unlink(missing_ok=True)


def _line(row: object) -> bytes:
    return json.dumps(row).encode() + b"\n"
