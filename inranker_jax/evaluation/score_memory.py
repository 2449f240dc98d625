"""Finished queries of one reranking on disk, so that it goes on after any interruption.

    FILE.jsonl      what process 0 scored: a line that names the settings, then a line a query
    FILE-3.jsonl    what process 3 scored

Every process appends to its own file and reads all of them, whatever number of processes they are of.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO


class ScoreMemory:
    """The scores of finished queries, in files that grow by a line a query.

    A file of other settings (another `fingerprint`) is passed over, and started anew by its process; an unfinished
    last line, left by a kill in the middle of a write, is dropped and that query scored again.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str, index: int = 0) -> None:
        """Reads what there is; nothing is written before there are scores.

        Args:
          path: the file of process 0, which gives the others their names; folders are made.
          fingerprint: whatever decides the scores, as one string.
          index: number of this process.
        """
        self._path, self._fingerprint = Path(path), fingerprint
        self._own = self._path if index == 0 else self._path.with_stem(f"{self._path.stem}-{index}")
        self._known: dict[str, dict[str, float]] = {}
        self._read: dict[Path, int] = {}  # whole lines of each file, in bytes
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
            if self._file is None or path != self._own:
                self._read[path] = self._read_on(path, self._read.get(path, 0))

    def _paths(self) -> list[Path]:
        name = f"{glob.escape(self._path.stem)}*{glob.escape(self._path.suffix)}"
        return sorted(self._path.parent.glob(name))

    def _read_on(self, path: Path, whole: int) -> int:
        """Takes the lines after the first `whole` bytes of a file; returns how many bytes are whole lines now."""
        try:
            lines = open(path, "rb")  # noqa: SIM115 - closed below; it may vanish before it is opened
        except FileNotFoundError:
            return 0
        with lines:
            lines.seek(whole)
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
        file = self._file or self._open()
        for query, documents in scores.items():
            self._known[query] = dict(documents)
            file.write(_line({"query": query, "scores": self._known[query]}))
        file.flush()
        os.fsync(file.fileno())

    def _open(self) -> BinaryIO:
        whole = self._read.get(self._own, 0)
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
