"""The label store: teacher logits, addressed by what was scored.

    STORE/teachers/<teacher key>/teacher.json          who the teacher is (what was hashed), and where it ran
    STORE/teachers/<teacher key>/part-<job>-<n>.parquet    key, false_logit, true_logit

A pair is known by a hash of its two texts (`pair_key`) and a teacher by a hash of everything that decides its
logits (`teacher_key`: weights, contract, precision). So a label is found again whatever the ids, the mixture
or the folder that asks for it, and nothing is scored twice.

Parquet, because labels are columns: typed, compressed, with a checksum per page, and opened as they are by
pandas, Polars, DuckDB, Spark and Hugging Face `datasets`. Its footer is written last, so a torn file is
recognised; a part appears with one atomic rename, whole or not at all, and is never changed after that. In an object
store (`gs://`, `s3://`) a part is one object, which appears when its upload ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inranker_jax import paths
from inranker_jax.errors import InputError
from inranker_jax.interruption import is_running
from inranker_jax.paths import PathType

KEY_BYTES = 16
_PART = re.compile(r"part-[0-9a-zA-Z]+-[0-9]+")
_TEACHER_KEY = re.compile(r"[0-9a-f]{16}")
_TEMPORARY = re.compile(r"\..+\..+-(?P<process>\d{1,9})\.tmp")
# After this long without a write, a file of another machine is taken for a killed process's.
_STALE_SECONDS = 12 * 3600.0


def pair_key(query: str, document: str) -> bytes:
    """The key of a pair: 16 bytes of the SHA-256 of `len(query):query` and the document, both stripped.

    The length keeps ("a", "bc") and ("ab", "c") apart.

    Args:
      query: text of the query.
      document: contents of the document, as the teacher reads it.

    Raises:
      InputError: a text holds half a surrogate pair, which has no UTF-8 form.

    >>> pair_key(" what ", "text") == pair_key("what", "text")
    True
    >>> pair_key("a", "bc") == pair_key("ab", "c")
    False
    """
    query, document = query.strip(), document.strip()
    try:
        data = f"{len(query)}:{query}{document}".encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the pair of query {query!r:.80} and document {document!r:.80} holds half a surrogate pair. "
            "Expected valid Unicode text. Correct the text, or leave the query or document out."
        ) from error
    return hashlib.sha256(data).digest()[:KEY_BYTES]


def teacher_key(identity: Mapping[str, Any]) -> str:
    """The key of a teacher: 16 hexadecimal digits of the SHA-256 of its identity as canonical JSON."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text.

    Raises:
      InputError: the value is not JSON (or holds NaN).
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{value!r:.200} cannot be written as JSON ({error}).") from error


class LabelTable:
    """Labels of one teacher in memory, 24 bytes a pair, found by key.

    Attributes:
      keys: `S16` [n], sorted, distinct.
      logits: float32 [n, 2], raw, in the order (false, true).
    """

    def __init__(self, keys: np.ndarray, logits: np.ndarray) -> None:
        """Sorts labels; of equal keys the first is kept.

        Args:
          keys: uint8 [n, 16].
          logits: float32 [n, 2].
        """
        flat = as_strings(keys)
        # Stable, so that which of two equal keys wins does not depend on the sort.
        order = np.argsort(flat, kind="stable")
        flat = flat[order]
        first = np.ones(len(flat), bool)
        first[1:] = flat[1:] != flat[:-1]
        self.keys = flat[first]
        self.logits = np.ascontiguousarray(logits[order[first]])

    def __len__(self) -> int:
        return len(self.keys)

    def lookup(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Finds labels.

        Args:
          keys: uint8 [m, 16].

        Returns:
          bool [m], whether a label is there, and float32 [m, 2], NaN where it is not.
        """
        wanted = as_strings(keys)
        logits = np.full((len(wanted), 2), np.nan, np.float32)
        places = np.searchsorted(self.keys, wanted)
        inside = places < len(self.keys)
        found = np.zeros(len(wanted), bool)
        found[inside] = self.keys[places[inside]] == wanted[inside]
        logits[found] = self.logits[places[found]]
        return found, logits


class LabelStore:
    """A folder of labels, shared by any number of teachers, jobs and label folders."""

    def __init__(self, path: PathType) -> None:
        """Points at a store, here or remote; nothing is read or made before it is needed."""
        self.path = paths.of(path)
        self._rows: dict[tuple[str, str], int] = {}

    def folder(self, key: str) -> Any:
        """The folder of a teacher."""
        return self.path / "teachers" / key

    def teacher_keys(self) -> list[str]:
        """Keys of the teachers that the store knows, sorted."""
        return sorted(path.parent.name for path in self.path.glob("teachers/*/teacher.json"))

    def teacher(self, key: str) -> dict[str, Any]:
        """`{"identity": ..., "provenance": ...}` of a teacher.

        Raises:
          InputError: the store has no such teacher.
        """
        path = self.folder(key) / "teacher.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            known = ", ".join(self.teacher_keys()) or "none"
            raise InputError.at(path, None, "no such teacher", f"one of this store's: {known}") from None

    def add_teacher(self, identity: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
        """Makes a teacher known; one that is known already stays as it is.

        Args:
          identity: everything that decides the logits: kind, fingerprint of the weights, contract, precision.
          provenance: what one may like to know beside it: path, versions, devices, dates.

        Returns:
          The teacher's key.
        """
        key = teacher_key(identity)
        path = self.folder(key) / "teacher.json"
        if not path.is_file():
            value = {"key": key, "identity": dict(identity), "provenance": dict(provenance)}
            write_json(path, value)
        return key

    def parts(self, key: str) -> list[str]:
        """Names of a teacher's whole parts, sorted; a torn file is no part."""
        return [name for name in self.part_names(key) if self.part_rows(key, name) is not None]

    def torn(self, key: str) -> list[Any]:
        """Files that should be parts of a teacher but cannot be read (cut short by a full or broken disk)."""
        return [self._part(key, name) for name in self.part_names(key) if self.part_rows(key, name) is None]

    def part_rows(self, key: str, name: str) -> int | None:
        """Number of labels in a part, from its footer; None where there is no such part or it is torn."""
        parquet, arrow = import_parquet()
        path = self._part(key, name)
        if (key, name) in self._rows:
            return self._rows[key, name]
        try:
            if paths.is_remote(path):
                # Neither the object nor, therefore, the answer will change.
                with paths.open_file(path, "rb") as file:
                    self._rows[key, name] = int(parquet.read_metadata(file).num_rows)
                return self._rows[key, name]
            return int(parquet.read_metadata(path).num_rows)
        except (FileNotFoundError, arrow.ArrowException):
            return None
        except OSError as error:
            if error.errno is not None:
                raise
            return None  # pyarrow's own: a footer that is no footer

    def write_part(self, key: str, name: str, keys: np.ndarray, logits: np.ndarray) -> Any:
        """Writes a part, which appears whole or not at all; an older one of that name is replaced.

        Args:
          key: the teacher's key, known by `add_teacher`.
          name: `part-<job>-<number>`, letters and digits.
          keys: uint8 [n, 16].
          logits: float32 [n, 2], raw, in the order (false, true).

        Returns:
          The file.

        Raises:
          InputError: wrong shapes, a logit that is not finite, a bad name or an unknown teacher.
        """
        if not _PART.fullmatch(name):
            raise InputError(f"part name {name!r}: expected 'part-<job>-<number>'.")
        identity = self.teacher(key)["identity"]
        keys = np.ascontiguousarray(keys, np.uint8)
        given = np.asarray(logits)
        with np.errstate(over="ignore"):
            logits = given.astype(np.float32)
        if keys.ndim != 2 or keys.shape[1] != KEY_BYTES or logits.shape != (len(keys), 2):
            raise InputError(
                f"labels of shape {logits.shape} for keys of shape {keys.shape}: expected [n, 2] and [n, 16]."
            )
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=-1))
        if bad.size:
            raise InputError(
                f"teacher {key}, {name}: {bad.size} of {len(keys)} labels are not finite float32 numbers, the "
                f"first in row {bad[0]}: {given[bad[0]].tolist()}. Check the teacher for NaN and overflow."
            )
        parquet, arrow = import_parquet()
        table = arrow.table(
            {
                "key": as_arrow(keys),
                "false_logit": arrow.array(logits[:, 0]),
                "true_logit": arrow.array(logits[:, 1]),
            }
        ).replace_schema_metadata({"teacher": key, "identity": canonical_json(identity), "format": "1"})
        path = self._part(key, name)
        with atomic_path(path) as temporary:
            parquet.write_table(
                table, temporary, compression="zstd", use_dictionary=False, write_page_checksum=True
            )
        return path

    def read_part(self, key: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Reads a part.

        Returns:
          keys uint8 [n, 16] and logits float32 [n, 2], in the order written.

        Raises:
          InputError: there is no such part, or it is damaged.
        """
        parquet, arrow = import_parquet()
        path = self._part(key, name)
        try:
            source = io.BytesIO(path.read_bytes()) if paths.is_remote(path) else path
            table = parquet.read_table(source, page_checksum_verification=True)
            logits = np.stack([table["false_logit"].to_numpy(), table["true_logit"].to_numpy()], axis=-1)
            return as_keys(table["key"]), logits.astype(np.float32).reshape(-1, 2)
        except (OSError, KeyError, arrow.ArrowException) as error:
            raise InputError.at(
                path,
                None,
                f"cannot be read ({error})".replace("\n", " "),
                "a part of a label store",
                "Delete the file and run the labelling again: only its pairs are scored anew",
            ) from error

    def load(
        self, key: str, *, only: np.ndarray | None = None, parts: Sequence[str] | None = None
    ) -> LabelTable:
        """Loads a teacher's labels; where a pair was labelled twice, the part first by name decides.

        Args:
          key: the teacher's key.
          only: sorted `S16` [m] keys to keep, so that a folder's labels can be had from a larger store.
          parts: names of the parts to read; all whole ones by default.

        Returns:
          The table.

        Raises:
          InputError: an unknown teacher, or a damaged part.
        """
        self.teacher(key)
        all_keys, all_logits = [np.zeros((0, KEY_BYTES), np.uint8)], [np.zeros((0, 2), np.float32)]
        for name in self.parts(key) if parts is None else parts:
            keys, logits = self.read_part(key, name)
            if only is not None:
                kept = is_among(keys, only)
                keys, logits = keys[kept], logits[kept]
            all_keys.append(keys)
            all_logits.append(logits)
        return LabelTable(np.concatenate(all_keys), np.concatenate(all_logits))

    def part_names(self, key: str) -> list[str]:
        """Names of a teacher's part files, sorted, whole or torn."""
        names = (path.stem for path in self.folder(key).glob("part-*.parquet"))
        return sorted(name for name in names if _PART.fullmatch(name))

    def _part(self, key: str, name: str) -> Any:
        return self.folder(key) / f"{name}.parquet"


def resolve_teacher(name: str, teachers: Mapping[str, str], source: PathType) -> str:
    """The key that a user's name for a teacher stands for: a name in `teachers`, a key, or a key's beginning.

    Raises:
      InputError: it fits none, or several.
    """
    if name in teachers:
        return teachers[name]
    keys = sorted({key for key in teachers.values() if name and key.startswith(name)})
    if len(keys) == 1:
        return keys[0]
    from inranker_jax.errors import did_you_mean

    have = ", ".join(f"{known} ({key})" for known, key in teachers.items()) or "none"
    problem = f"teacher {name!r} fits several keys" if keys else f"no teacher {name!r}"
    raise InputError(f"{source}: {problem}.{did_you_mean(name, teachers)} Its teachers: {have}.")


# ------------------------------------------------------------------------------------------ arrays and files


def as_strings(keys: np.ndarray) -> np.ndarray:
    """uint8 [n, 16] seen as `S16` [n]; comparisons are then those of the bytes, as all are 16 long."""
    return np.ascontiguousarray(keys, np.uint8).view(f"S{KEY_BYTES}").reshape(-1)


def is_among(keys: np.ndarray, known: np.ndarray) -> np.ndarray:
    """bool [n]: which keys (uint8 [n, 16]) are in `known` (sorted `S16` [m])."""
    wanted = as_strings(keys)
    places = np.searchsorted(known, wanted)
    found = places < len(known)
    found[found] = known[places[found]] == wanted[found]
    return found


def as_arrow(keys: np.ndarray) -> Any:
    """uint8 [n, 16] as an Arrow array of fixed_size_binary(16), without a copy."""
    _, arrow = import_parquet()
    contiguous = np.ascontiguousarray(keys, np.uint8)
    return arrow.FixedSizeBinaryArray.from_buffers(
        arrow.binary(KEY_BYTES), len(contiguous), [None, arrow.py_buffer(contiguous)]
    )


def as_keys(column: Any) -> np.ndarray:
    """An Arrow column of fixed_size_binary(16) as uint8 [n, 16]."""
    chunks = column.chunks if hasattr(column, "chunks") else [column]
    parts = [np.zeros((0, KEY_BYTES), np.uint8)]
    for chunk in chunks:
        values = np.frombuffer(chunk.buffers()[1], np.uint8) if len(chunk) else np.zeros(0, np.uint8)
        start = chunk.offset * KEY_BYTES
        parts.append(values[start : start + len(chunk) * KEY_BYTES].reshape(-1, KEY_BYTES))
    return np.concatenate(parts)


def import_parquet() -> tuple[Any, Any]:
    """Imports `(pyarrow.parquet, pyarrow)`.

    Raises:
      InputError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            "labels are kept in Parquet files, and the 'pyarrow' package is not installed. "
            "Run `pip install 'inranker_jax[label]'`."
        ) from error
    return pyarrow.parquet, pyarrow


@contextlib.contextmanager
def atomic_path(path: Any) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; afterwards it is on disk under `path`, by a rename.

    What is written to a remote `path` is uploaded from a temporary file of this machine.
    """
    if paths.is_remote(path):
        with tempfile.TemporaryDirectory(prefix="inranker_jax.") as here:
            yield Path(here, path.name)
            paths.upload(Path(here, path.name), path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def temporary_path(path: Path) -> Path:
    """`.<name>.<machine>-<process id>.tmp` beside `path`: two processes that write the same file do not meet."""
    return path.with_name(f".{path.name}.{_machine()}-{os.getpid()}.tmp")


def _machine() -> str:
    """Where a process id means something: this host and, as containers may share its name, this container."""
    try:
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def clear_temporaries(*folders: Any) -> None:
    """Removes what killed processes left of `atomic_path` in folders; what a live one is writing stays.

    A process of this machine is asked for by its id. Those of others cannot be: their files are removed when
    nothing was written to them for half a day.
    """
    here = (folder for folder in folders if not paths.is_remote(folder))  # a store has none
    for path in (path for folder in here for path in folder.glob(".*.tmp")):
        found = _TEMPORARY.fullmatch(path.name)
        if not found:
            continue
        with contextlib.suppress(FileNotFoundError):  # another process may clear at the same time
            if os.name == "posix" and found[0].endswith(f".{_machine()}-{found['process']}.tmp"):
                left = not is_running(int(found["process"]))
            else:
                left = time.time() - path.stat().st_mtime > _STALE_SECONDS
            if left:
                path.unlink()


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder last through a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems refuse to sync a folder; their renames are as durable as they get.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Any, value: Any) -> None:
    """Writes indented JSON that appears whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
