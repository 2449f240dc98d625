"""Texts by id without holding them: where each row starts, and one read from the file a look-up."""

from __future__ import annotations

import array
import itertools
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from inranker_jax.corpora.malformed import BadRow
from inranker_jax.corpora.rows import Fields, JsonLines, RowSource
from inranker_jax.corpora.table import Place
from inranker_jax.errors import InputError
from inranker_jax.records import Document

_FILE_SHIFT = 48  # an offset fits 48 bits; the file's number sits above it
_MASK = (1 << 64) - 1


def contents_of(document: Document, titles: bool) -> str:
    """What rankers see of a document: its title and text joined, or (`titles=False`) its text only."""
    return document.contents if titles else document.text.strip()


def hold(
    documents: Iterator[Document], *, titles: bool = True, memory_limit: int = 1 << 28
) -> Mapping[str, str]:
    """Document id -> contents of documents that cannot be read again by offset.

    Held in memory up to a limit; a larger corpus is spilled, as JSON Lines, to a temporary file (in `$TMPDIR`)
    that has no name any more once this returns, and then costs what `OffsetTexts` costs.

    Args:
      documents: the documents, ids unique.
      titles: as in `contents_of`.
      memory_limit: characters to hold in memory.
    """
    texts: dict[str, str] = {}
    size = 0
    for document in documents:
        texts[document.id] = contents_of(document, titles)
        size += len(texts[document.id])
        if size > memory_limit:
            return _spill(itertools.chain(texts.items(), _pairs(documents, titles)))
    return texts


def _pairs(documents: Iterator[Document], titles: bool) -> Iterator[tuple[str, str]]:
    return ((document.id, contents_of(document, titles)) for document in documents)


def _spill(texts: Iterator[tuple[str, str]]) -> OffsetTexts:
    def written() -> Iterator[tuple[Place, Document]]:
        position = 0
        with os.fdopen(descriptor, "wb") as out:
            for row, (identifier, text) in enumerate(texts):
                line = json.dumps({"_id": identifier, "text": text}).encode() + b"\n"
                yield Place(0, row + 1, position), Document(identifier, text)
                position += out.write(line)

    descriptor, name = tempfile.mkstemp(prefix="inranker_jax.texts.", suffix=".jsonl")
    try:
        return OffsetTexts([name], JsonLines, lambda row: (Document(row["_id"], row["text"]),), written())
    finally:
        os.unlink(name)  # the mapping keeps the file's bytes, and they go with it


class OffsetTexts(Mapping[str, str]):
    """Read-only mapping from document id to contents over uncompressed local files with one document a row.

    8 bytes a document where ids are the row numbers 0, 1, 2, ..., as in MS MARCO and mMARCO; 24 otherwise:
    the sorted hashes of the ids, and a look-up confirms the id in the file.
    """

    def __init__(
        self,
        files: Sequence[str],
        open_source: Callable[[str], RowSource],
        build: Callable[[Fields], Sequence[Document]],
        items: Iterator[tuple[Place, Document]],
        *,
        titles: bool = True,
    ):
        """Notes where the documents stand, in one pass.

        Args:
          files: uncompressed local files.
          open_source: how a row of them is read; kept, with its header.
          build: the document of a row.
          items: (place, document) in order, ids unique.
          titles: as in `contents_of`.
        """
        starts, hashes = array.array("q"), array.array("Q")
        consecutive = True
        for place, document in items:
            consecutive = consecutive and document.id == str(len(starts))
            starts.append(place.file << _FILE_SHIFT | place.offset)
            hashes.append(hash(document.id) & _MASK)
        self._starts = np.frombuffer(starts, np.int64) if starts else np.zeros(0, np.int64)
        self._hashes: np.ndarray | None = None
        if not consecutive:
            table = np.frombuffer(hashes, np.uint64)
            self._rows = np.argsort(table, kind="stable")
            self._hashes = table[self._rows]
        self.files = list(files)
        self._build, self._titles = build, titles
        self._sources = [open_source(name) for name in self.files]
        self._bytes = []
        for name, source in zip(self.files, self._sources, strict=True):
            next(iter(source.rows()), None)  # a header is known once the first row is
            with open(name, "rb") as file:
                self._bytes.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def _read(self, row: int) -> Document:
        start = int(self._starts[row])
        file, offset = start >> _FILE_SHIFT, start & (1 << _FILE_SHIFT) - 1
        data = self._bytes[file]
        end = data.find(b"\n", offset)
        try:
            return self._build(self._sources[file].fields(data[offset : end if end >= 0 else len(data)]))[0]
        except (BadRow, IndexError) as error:
            raise InputError.at(
                self.files[file], None, f"the file changed while it was read ({error})", "",
                "Leave a corpus alone while it is in use",
            ) from error  # fmt: skip

    def __getitem__(self, identifier: str) -> str:
        if not isinstance(identifier, str):
            raise KeyError(identifier)
        if self._hashes is None:
            # "007" and "+7" are not ids of row 7: only the spelling in the file counts.
            digits = identifier.isascii() and identifier.isdigit() and len(identifier) < 19
            if digits and str(int(identifier)) == identifier and int(identifier) < len(self._starts):
                return contents_of(self._read(int(identifier)), self._titles)
            raise KeyError(identifier)
        value = np.uint64(hash(identifier) & _MASK)
        index = int(np.searchsorted(self._hashes, value))
        while index < len(self._hashes) and self._hashes[index] == value:
            document = self._read(int(self._rows[index]))
            if document.id == identifier:
                return contents_of(document, self._titles)
            index += 1
        raise KeyError(identifier)

    def __iter__(self) -> Iterator[str]:
        if self._hashes is None:
            return map(str, range(len(self._starts)))
        return (self._read(row).id for row in range(len(self._starts)))

    def __len__(self) -> int:
        return len(self._starts)
