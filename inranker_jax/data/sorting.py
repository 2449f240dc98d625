"""Sorts the examples of a split that come in no order, in bounded memory: sorted runs on disk, then a merge."""

from __future__ import annotations

import hashlib
import heapq
import os
import pathlib
import struct
import tempfile
from collections.abc import Iterable, Iterator

from inranker_jax.errors import InputError

_HEADER = struct.Struct(">16sI")
_BUFFER = 1 << 20


def sort_key(number: int | None, record: bytes) -> bytes:
    """16 bytes by which a record is sorted: its number, or a digest of the record where it has none.

    The digest's order means nothing; it is the same whatever order the records come in.
    """
    if number is not None:
        return number.to_bytes(16, "big")
    return hashlib.sha256(record).digest()[:16]


def sort_records(
    keyed: Iterable[tuple[bytes, bytes]], memory_limit: int, folder: pathlib.Path
) -> Iterator[tuple[bytes, bytes]]:
    """Sorts (key, record) pairs by key, then record.

    Args:
      keyed: pairs of a 16-byte key and a record.
      memory_limit: bytes of records that are kept in memory.
      folder: where sorted runs are kept when there are more; they are removed at the end.

    Yields:
      The pairs, sorted.

    Raises:
      InputError: the folder cannot be written.
    """
    kept: list[tuple[bytes, bytes]] = []
    size = 0
    with tempfile.TemporaryDirectory(prefix="sort_", dir=_writable(folder)) as scratch:
        runs: list[pathlib.Path] = []
        for pair in keyed:
            kept.append(pair)
            size += len(pair[1]) + 100  # and what Python adds to two bytes objects and a tuple
            if size > memory_limit:
                runs.append(_write_run(kept, pathlib.Path(scratch) / str(len(runs))))
                kept, size = [], 0
        kept.sort()
        yield from heapq.merge(kept, *(_read_run(path) for path in runs))


def _writable(folder: pathlib.Path) -> pathlib.Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError.at(
            folder,
            None,
            f"cannot be made ({error})",
            "a local folder",
            "Set INRANKER_CACHE_DIR to another one",
        ) from error
    return folder


def _write_run(pairs: list[tuple[bytes, bytes]], path: pathlib.Path) -> pathlib.Path:
    pairs.sort()
    with open(path, "wb", buffering=_BUFFER) as out:
        for key, record in pairs:
            out.write(_HEADER.pack(key, len(record)))
            out.write(record)
    return path


def _read_run(path: pathlib.Path) -> Iterator[tuple[bytes, bytes]]:
    with open(path, "rb", buffering=_BUFFER) as file:
        os.unlink(path)  # the open file keeps the data, and nothing is left behind
        while header := file.read(_HEADER.size):
            key, length = _HEADER.unpack(header)
            yield key, file.read(length)
