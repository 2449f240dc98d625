"""A BM25 index as a folder that bm25s itself can open, with what it was made of, and whether it is whole.

The folder grows beside its place under another name and is renamed when everything is on disk, `index.json` last;
`index.json` holds the size of every file. So a killed build leaves either no folder or a whole one, and a folder
whose copy broke off is noticed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from inranker_jax.errors import InputError
from inranker_jax.records import PathType
from inranker_jax.retrieval.locks import alone
from inranker_jax.retrieval.postings import Postings

FORMAT = 2  # 2: `corpus_format` and `corpus_on_malformed` in the identity, and `left_out`
STATE = "index.json"
# The first five names are bm25s's.
_DATA, _INDICES, _INDPTR = "data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy"
_VOCABULARY, _PARAMETERS = "vocab.index.json", "params.index.json"
_IDS, _OFFSETS = "document_ids.utf8", "document_ids.offsets.npy"
_FILES = (_DATA, _INDICES, _INDPTR, _VOCABULARY, _PARAMETERS, _IDS, _OFFSETS)
_ARRAYS = {"data": _DATA, "indices": _INDICES}


class TornIndexError(InputError):
    """An index folder that is not whole: something ended while it was written or copied. Build it again."""


class DocumentIds(Sequence[str]):
    """Document ids in memory-mapped files: about 16 bytes an id on disk, none in memory until it is asked for.

    Args:
      text: uint8 [bytes], all ids after one another in UTF-8.
      offsets: int64 [ids + 1], where each id begins.
    """

    def __init__(self, text: np.ndarray, offsets: np.ndarray) -> None:
        self._text = np.asarray(text).data
        self._offsets = np.asarray(offsets)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return self.at(np.arange(*place.indices(len(self))))
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self.at(np.array([place % len(self)]))[0]

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), 65536):
            yield from self[first : first + 65536]

    def at(self, places: np.ndarray) -> list[str]:
        """The ids at several places [n], much faster than one by one."""
        text, bounds = (
            self._text,
            zip(self._offsets[places].tolist(), self._offsets[places + 1].tolist(), strict=True),
        )
        return [str(text[begin:end], "utf-8", "surrogatepass") for begin, end in bounds]


def identity_of(corpus: Mapping[str, str], language: str, k1: float, b: float) -> dict[str, Any]:
    """What an index was made of: all that may change a score or a rank.

    Args:
      corpus: what decides the documents, `Corpus.identity()` (empty when nobody vouches for them).
      language: of stems and stop words.
      k1: term frequency saturation.
      b: length normalisation.

    Raises:
      InputError: bm25s or PyStemmer is not installed.
    """
    # A patch release does not change words; a minor one may, and then queries would miss the index's stems.
    try:
        libraries = {
            name: ".".join(importlib.metadata.version(name).split(".")[:2])
            for name in ("bm25s", *(("PyStemmer",) if language != "none" else ()))
        }
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"BM25 needs the package {error.name!r}: run `pip install 'inranker_jax[eval]'`."
        ) from error
    return {
        **corpus,
        "language": language,
        "k1": float(k1),
        "b": float(b),
        "method": "lucene",
        **libraries,
    }


def exists(folder: PathType) -> bool:
    """Whether there is anything at `folder`: an empty folder counts as nothing."""
    path = Path(folder)
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def read_state(folder: PathType) -> dict[str, Any]:
    """Reads and checks `index.json` of an index folder.

    Raises:
      TornIndexError: the folder holds an index that is not whole.
      InputError: there is no such folder, or it holds something else.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError.at(path, None, "no such index folder", remedy="Build the index, or check the path")
    strangers = sorted(entry.name for entry in path.iterdir() if entry.name not in (*_FILES, STATE))
    if strangers:
        raise InputError.at(
            path, None, f"not an index folder: it holds {strangers[0]!r}", "an empty folder or a BM25 index",
            "Choose another folder for the index",
        )  # fmt: skip
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text("utf-8"))
        version, sizes = state["format"], {name: int(size) for name, size in state["files"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TornIndexError.at(
            path / STATE, None, f"the index is not whole ({type(error).__name__})", remedy="Build it again"
        ) from error
    if version != FORMAT:
        raise InputError.at(
            path / STATE, None, f"index format {version!r}", f"format {FORMAT}",
            "Delete the folder and build the index again",
        )  # fmt: skip
    for name in _FILES:
        size = (path / name).stat().st_size if (path / name).exists() else -1
        if size != sizes.get(name):
            found = "is missing" if size < 0 else f"has {size} bytes"
            raise TornIndexError.at(
                path / name, None, f"the index is not whole: the file {found}",
                f"{sizes.get(name)} bytes", "Build it again",
            )  # fmt: skip
    return state


def check_identity(folder: PathType, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises InputError, showing what differs, when a saved index is not the one that is wanted."""
    lines = [
        f"- {key}: {stored.get(key)}\n+ {key}: {value}"
        for key, value in wanted.items()
        if stored.get(key) != value
    ]
    if lines:
        raise InputError(
            f"{os.fspath(folder)} holds a BM25 index that was made otherwise (- that index, + wanted now):\n"
            + "\n".join(lines)
            + "\nChoose another index folder, or delete this one to build it again."
        )


class Writer:
    """Fills an index folder that appears whole or not at all. Use it as a context manager.

    Args:
      folder: where the index will be; replaced if it holds a torn or older index.

    Raises:
      InputError: another process is building this index, or the folder holds something else.
    """

    def __init__(self, folder: PathType) -> None:
        self.folder = Path(os.path.abspath(folder))
        self._part = self.folder.with_name(f".{self.folder.name}.part")
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Writer:
        if exists(self.folder):
            with contextlib.suppress(TornIndexError):
                read_state(self.folder)
        self._open.enter_context(alone(self.folder, "building this index"))
        shutil.rmtree(self._part, ignore_errors=True)  # what a killed build left
        self._part.mkdir()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        shutil.rmtree(self._part, ignore_errors=True)
        self._open.close()

    def allocate(self, name: str, length: int, dtype: type) -> np.ndarray:
        """Makes the array "data" or "indices" in its file; see `postings.build`."""
        array: np.ndarray = np.lib.format.open_memmap(
            self._part / _ARRAYS[name], mode="w+", dtype=np.dtype(dtype), shape=(length,)
        )
        return array

    def finish(self, postings: Postings, identity: Mapping[str, Any], left_out: Mapping[str, Any]) -> None:
        """Writes everything else, puts it on disk, and gives the folder its name.

        Args:
          postings: the index.
          identity: what it was made of, see `identity_of`.
          left_out: the malformed rows of the corpus that are not in it, `Corpus.left_out()`.
        """
        for name, array in (("data", postings.data), ("indices", postings.indices)):
            if isinstance(array, np.memmap):
                array.flush()
            else:
                np.save(self._part / _ARRAYS[name], array)
        np.save(self._part / _INDPTR, postings.indptr)
        self._write(_VOCABULARY, json.dumps(postings.vocabulary, ensure_ascii=False).encode("utf-8"))
        self._write(_PARAMETERS, json.dumps(_parameters(postings, identity), indent=1).encode("utf-8"))
        lengths = np.zeros(len(postings.ids) + 1, np.int64)
        with open(self._part / _IDS, "wb") as out:
            for place, document in enumerate(postings.ids, start=1):
                lengths[place] = out.write(document.encode("utf-8", "surrogatepass"))
        np.save(self._part / _OFFSETS, np.cumsum(lengths))
        for name in _FILES:
            _to_disk(self._part / name)
        state = {
            "format": FORMAT,
            "identity": dict(identity),
            "left_out": dict(left_out),
            "documents": len(postings.ids),
            "words": len(postings.vocabulary),
            "pairs": len(postings.data),
            "files": {name: (self._part / name).stat().st_size for name in _FILES},
        }
        self._write(STATE, json.dumps(state, indent=1).encode("utf-8"))
        _to_disk(self._part / STATE)
        _to_disk(self._part)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.rename(self._part, self.folder)
        _to_disk(self.folder.parent)

    def _write(self, name: str, content: bytes) -> None:
        (self._part / name).write_bytes(content)


def read(folder: PathType, mmap: bool = True) -> tuple[Postings, dict[str, Any]]:
    """Reads an index folder.

    Args:
      folder: an index folder.
      mmap: leave arrays and ids on disk, read as they are needed; otherwise all is read now.

    Returns:
      The postings, and `index.json`.

    Raises:
      TornIndexError: see `read_state`.
      InputError: see `read_state`.
    """
    path = Path(folder)
    state = read_state(path)
    mode: Any = "r" if mmap else None
    try:
        data, indices, indptr, offsets = (
            np.load(path / name, mmap_mode=mode) for name in (_DATA, _INDICES, _INDPTR, _OFFSETS)
        )
        size = state["files"][_IDS]
        text = np.memmap(path / _IDS, np.uint8, "r") if mmap and size else np.fromfile(path / _IDS, np.uint8)
        vocabulary = json.loads((path / _VOCABULARY).read_text("utf-8"))
    except ValueError as error:
        raise TornIndexError.at(
            path, None, f"the index is not whole ({error})", remedy="Build it again"
        ) from error
    ids = DocumentIds(text, offsets)
    # Plain arrays over the same memory: slicing a `memmap` costs several times as much. The offsets of the words are
    # looked up for every query and are small: they are read now.
    data, indices = np.asarray(data), np.asarray(indices)
    postings = Postings(ids if mmap else ids[:], vocabulary, data, indices, np.array(indptr))
    return postings, state


def _parameters(postings: Postings, identity: Mapping[str, Any]) -> dict[str, Any]:
    """`params.index.json` as bm25s writes it, so that `bm25s.BM25.load` opens the folder."""
    return {
        "k1": identity["k1"],
        "b": identity["b"],
        "delta": 0.5,
        "method": "lucene",
        "idf_method": "lucene",
        "dtype": "float32",
        "int_dtype": "int32",
        "num_docs": len(postings.ids),
        "version": importlib.metadata.version("bm25s"),
        "backend": "numpy",
    }


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
