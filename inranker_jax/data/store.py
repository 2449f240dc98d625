"""Random access to the examples of one split of a SeqIO task.

A task is a stream; `GlobalOrder` needs examples by number. So a split is read once, in the task's own order:
a small one is kept in memory, a large one goes to an ArrayRecord file in a cache folder. The file's name
holds a fingerprint of what the examples come from, its last record describes it, and it gets its name only
when it is whole: a killed run leaves nothing that a later one could mistake for it, and processes of one machine
share it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inranker_jax.errors import InputError

_FORMAT_VERSION = 1
_PROGRESS_SECONDS = 10.0
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_WRITER_OPTIONS = "group_size:8"


class EmptySplitError(InputError):
    """A split without examples: an error where it stands alone, and nothing to wonder at in a mixture."""


@dataclass(frozen=True, slots=True)
class Example:
    """One query with its documents and labels.

    Attributes:
      query_id: id of the query.
      query: its text.
      document_ids: ids of the L documents.
      documents: their texts.
      teacher_logits: float32 `[L, 2]`, raw, in the order [false, true]; None when the task has none.
      relevance: float32 `[L]`: 1, 0, or -1 where unknown.
    """

    query_id: str
    query: str
    document_ids: tuple[str, ...]
    documents: tuple[str, ...]
    teacher_logits: np.ndarray | None
    relevance: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    def to_bytes(self) -> bytes:
        """The record of this example: JSON. float32 values survive it exactly."""
        logits = None if self.teacher_logits is None else self.teacher_logits.tolist()
        fields = [
            self.query_id,
            self.query,
            self.document_ids,
            self.documents,
            logits,
            self.relevance.tolist(),
        ]
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")

    @classmethod
    def from_bytes(cls, record: bytes) -> Example:
        """The inverse of `to_bytes`."""
        query_id, query, document_ids, documents, logits, relevance = json.loads(record)
        return cls(
            query_id,
            query,
            tuple(document_ids),
            tuple(documents),
            None if logits is None else np.asarray(logits, np.float32).reshape(-1, 2),
            np.asarray(relevance, np.float32),
        )


def example_from_features(features: dict[str, Any], place: str) -> Example:
    """Checks the features of one example, as a task yields them, and makes the record.

    Args:
      features: feature name -> NumPy value, text as bytes.
      place: how errors name the example.

    Returns:
      The example.

    Raises:
      InputError: a feature is missing, has another shape than the documents, is empty, not UTF-8 or not
        finite.
    """

    def text(value: Any, name: str) -> str:
        try:
            decoded = value.decode("utf-8") if isinstance(value, bytes) else str(value)
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: feature {name!r} is not UTF-8 ({error.reason}).") from error
        if not decoded.strip():
            raise InputError(f"{place}: feature {name!r} holds an empty text. Expected a non-empty one.")
        return decoded

    missing = [name for name in ("query_id", "query", "document_ids", "documents") if name not in features]
    if missing:
        raise InputError(f"{place}: no feature {missing[0]!r}; the task yields {sorted(features)}.")
    documents = tuple(text(value, "documents") for value in features["documents"])
    document_ids = tuple(text(value, "document_ids") for value in features["document_ids"])
    count = len(documents)
    if not count or len(document_ids) != count:
        raise InputError(
            f"{place}: {count} documents and {len(document_ids)} document_ids; expected one each."
        )
    logits = features.get("teacher_logits")
    relevance = features.get("relevance")
    values = {
        "teacher_logits": None if logits is None else np.asarray(logits, np.float32),
        "relevance": np.full(count, -1, np.float32)
        if relevance is None
        else np.asarray(relevance, np.float32),
    }
    for name, shape in (("teacher_logits", (count, 2)), ("relevance", (count,))):
        value = values[name]
        if value is not None and value.shape != shape:
            raise InputError(f"{place}: feature {name!r} has shape {value.shape}; expected {shape}.")
        if value is not None and not np.isfinite(value).all():
            raise InputError(f"{place}: feature {name!r} holds NaN or infinity: {value.tolist()}.")
    relevance = values["relevance"]
    assert relevance is not None
    return Example(
        text(features["query_id"], "query_id"),
        text(features["query"], "query"),
        document_ids,
        documents,
        values["teacher_logits"],
        relevance,
    )


def default_cache_dir() -> pathlib.Path:
    """`$INRANKER_CACHE_DIR`, or `~/.cache/inranker_jax`."""
    return pathlib.Path(os.environ.get("INRANKER_CACHE_DIR") or "~/.cache/inranker_jax").expanduser()


class ExampleStore:
    """The examples of one split, by number.

    Attributes:
      name: `task:split`.
      fingerprint: SHA-256 of all examples in order, hexadecimal: goes into a run's manifest.
      max_list_size: most documents of an example.
      has_teacher_logits: whether the examples carry teacher logits.
    """

    def __init__(self, name: str, description: dict[str, Any], records: list[bytes] | None, path: str | None):
        """For `from_examples` and `open`."""
        self.name = name
        self.path = path
        self.fingerprint: str = description["sha256"]
        self.max_list_size: int = description["max_list_size"]
        self.has_teacher_logits: bool = description["has_teacher_logits"]
        self._count: int = description["examples"]
        self._records = records
        self._reader = None if path is None else _open_reader(path)
        self._lock = threading.Lock()

    @classmethod
    def from_examples(cls, examples: Iterable[Example], name: str = "examples") -> ExampleStore:
        """Keeps examples in memory.

        Raises:
          InputError: there are none, or only some carry teacher logits.
        """
        writer = _Writer(name, memory_limit=None, path=None)
        for example in examples:
            writer.add(example)
        return cls(name, writer.finish(), writer.records, None)

    @classmethod
    def open(
        cls,
        name: str,
        examples: Iterator[Example],
        *,
        identity: str | None,
        cache_dir: str | os.PathLike[str] | None = None,
        memory_limit: int = 256 << 20,
    ) -> ExampleStore:
        """Reads a split, or finds what an earlier run stored of it.

        Args:
          name: `task:split`.
          examples: the examples; not touched when they are stored already.
          identity: fingerprint of what the examples come from; None when that cannot be told, so that nothing
            stored may be used again.
          cache_dir: a local folder; default: `default_cache_dir() / "examples"`.
          memory_limit: bytes up to which a split stays in memory.

        Returns:
          The store.

        Raises:
          InputError: there are no examples, or only some carry teacher logits; or whatever `examples` raises.
        """
        folder = pathlib.Path(cache_dir) if cache_dir is not None else default_cache_dir() / "examples"
        safe = "".join(character if character.isalnum() else "_" for character in name)
        suffix = identity[:20] if identity is not None else f"once_{os.getpid()}_{time.time_ns()}"
        path = folder / f"{safe}-{suffix}.array_record"
        if identity is not None and (description := _describe(path)) is not None:
            return cls(name, description, None, str(path))
        with _locked(path) if identity is not None else contextlib.nullcontext(False) as alone:
            # Another process may have written it while this one waited for the lock.
            if identity is not None and (description := _describe(path)) is not None:
                return cls(name, description, None, str(path))
            if alone:
                for left_behind in folder.glob(f"{path.stem}.*.part"):
                    left_behind.unlink(
                        missing_ok=True
                    )  # by a run that was killed: no one else holds the lock
            writer = _Writer(name, memory_limit, path)
            try:
                for example in examples:
                    writer.add(example)
                description = writer.finish()
            except BaseException:
                writer.discard()
                raise
        if writer.records is not None:
            return cls(name, description, writer.records, None)
        store = cls(name, description, None, str(path))
        if identity is None:
            path.unlink()  # the open reader keeps the data; nobody may find it later
        return store

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        return self.take([index])[0]

    def take(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        """The examples of some numbers, in that order.

        Raises:
          IndexError: a number is not in [0, len).
        """
        numbers = [int(index) for index in indices]
        for number in numbers:
            if not 0 <= number < self._count:
                raise IndexError(f"{self.name} has {self._count} examples, no number {number}")
        if self._records is not None:
            return [Example.from_bytes(self._records[number]) for number in numbers]
        if not numbers:
            return []
        assert self._reader is not None
        with self._lock:
            return [Example.from_bytes(record) for record in self._reader.read(numbers)]


class _Writer:
    """Collects records in memory, and moves to a temporary file once they are too many."""

    def __init__(self, name: str, memory_limit: int | None, path: pathlib.Path | None):
        self.records: list[bytes] | None = []
        self._name, self._limit, self._path = name, memory_limit, path
        self._hash = hashlib.sha256()
        self._count = self._bytes = self._longest = 0
        self._has_logits: bool | None = None
        self._file: Any = None
        self._temporary: pathlib.Path | None = None
        self._started = self._shown = time.monotonic()

    def add(self, example: Example) -> None:
        has_logits = example.teacher_logits is not None
        if self._has_logits not in (None, has_logits):
            raise InputError(f"{self._name}: only some examples carry teacher_logits; expected all or none.")
        self._has_logits = has_logits
        record = example.to_bytes()
        self._hash.update(len(record).to_bytes(8, "big") + record)
        self._count += 1
        self._bytes += len(record)
        self._longest = max(self._longest, len(example))
        if self.records is not None:
            self.records.append(record)
            if self._limit is not None and self._bytes > self._limit:
                self._spill()
        else:
            self._file.write(record)
        now = time.monotonic()
        if now - self._shown > _PROGRESS_SECONDS:
            self._shown = now
            rate = self._count / (now - self._started)
            print(
                f"reading {self._name}: {self._count:,} examples, {rate:,.0f}/s, {self._bytes / 1e6:,.0f} MB",
                file=sys.stderr,
                flush=True,
            )

    def _spill(self) -> None:
        from array_record.python import array_record_module

        assert self._path is not None
        assert self.records is not None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = self._path.with_suffix(f".{os.getpid()}_{time.time_ns()}.part")
            self._file = array_record_module.ArrayRecordWriter(str(self._temporary), _WRITER_OPTIONS)
        except (OSError, RuntimeError) as error:
            raise InputError.at(
                self._path.parent,
                None,
                f"cannot store the examples of {self._name} here ({error})",
                "a local folder with space",
                "Set INRANKER_CACHE_DIR to another one",
            ) from error
        for record in self.records:
            self._file.write(record)
        self.records = None

    def finish(self) -> dict[str, Any]:
        if not self._count:
            raise EmptySplitError(
                f"{self._name} holds no examples. Expected at least one; check its files and split. (Few "
                "queries may leave split 'validation' empty: train with train.validation_split = None.)"
            )
        description = {
            "format": _FORMAT_VERSION,
            "name": self._name,
            "examples": self._count,
            "sha256": self._hash.hexdigest(),
            "max_list_size": self._longest,
            "has_teacher_logits": self._has_logits,
        }
        if self._file is not None:
            assert self._temporary is not None
            assert self._path is not None
            self._file.write(json.dumps(description).encode())
            self._file.close()
            self._file = None
            with open(self._temporary, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(self._temporary, self._path)
        return description

    def discard(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)


def _open_reader(path: str) -> Any:
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(path, _READER_OPTIONS)


def _describe(path: pathlib.Path) -> dict[str, Any] | None:
    """The description of a stored split, or None when there is none or it cannot be read."""
    if not path.is_file():
        return None
    try:
        reader = _open_reader(str(path))
        try:
            description = json.loads(reader.read([reader.num_records() - 1])[0])
        finally:
            reader.close()
        if description["format"] != _FORMAT_VERSION or description["examples"] < 1:
            raise ValueError(f"format {description['format']}")
    except (ValueError, RuntimeError, IndexError, KeyError, TypeError) as error:
        print(f"{path} cannot be used ({error}); reading the examples again.", file=sys.stderr, flush=True)
        return None
    return description


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[bool]:
    """Holds a lock of this machine while a split is read, so that processes beside this one wait for it.

    Yields whether the lock could be had.

    The system drops the lock when its holder dies. Without the lock (a folder that cannot be written, or a
    file system without locks) two processes do the same work and the later rename wins: wasteful, not wrong.
    """
    handle, held = None, False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path.with_suffix(".lock"), "w")  # noqa: SIM115 - closed below, after the caller's work
        fcntl.flock(handle, fcntl.LOCK_EX)
        held = True
    except OSError as error:
        # The lock saves work; correctness does not rest on it.
        logging.getLogger(__name__).info(
            "no lock for %s (%s): another process may do the same work", path, error
        )
    try:
        yield held
    finally:
        if handle is not None:
            handle.close()
