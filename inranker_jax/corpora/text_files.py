"""A folder of documents, one text file each: `*.txt` and `*.md`, in whatever folder below it.

A document's id is its path below the folder, blanks percent-encoded as TREC runs need it
(`notes/my file.txt` is `notes/my%20file.txt`); its text is the file. There is no title.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import quote

from inranker_jax.corpora import files
from inranker_jax.corpora.rows import Fields, decode
from inranker_jax.records import PathType, open_bytes

ENDINGS = (".txt", ".md")


def find(folder: PathType, unless: tuple[str, ...] = ()) -> list[str]:
    """The text files of a folder and of those below it, hidden ones left out, in natural order.

    Args:
      folder: where to look.
      unless: endings of data files: when the folder holds one of them, its text files are notes about it,
        and none is returned.
    """
    found, folders = [], [files.as_path(folder)]
    while folders:
        for path in folders.pop().iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir():
                folders.append(path)
            elif unless and files.bare_name(path).endswith(unless):
                return []
            elif files.bare_name(path).endswith(ENDINGS):
                found.append(os.fspath(path))
    return sorted(found, key=files.natural_key)


def document_id(path: str, root: str) -> str:
    """The id of the document in a file below `root`."""
    below = os.path.relpath(path, root) if root else os.path.basename(path)
    # A name that is not UTF-8 has surrogates in Python, which no run file could hold.
    return re.sub(
        r"[\s%\ud800-\udfff]",
        lambda found: quote(found[0], encoding="utf-8", errors="surrogateescape"),
        below.replace(os.sep, "/"),
    )


class TextFile:
    """One document as a row source."""

    def __init__(self, path: str, root: str):
        self.path = path
        self._id = document_id(path, root)

    def rows(self) -> Iterator[tuple[int, int, bytes]]:
        """As in `RowSource`: the one row, the whole file."""
        with open_bytes(self.path) as file:
            yield 1, 0, file.read().removeprefix(b"\xef\xbb\xbf")

    def fields(self, raw: bytes) -> Fields:
        """As in `RowSource`."""
        return {"_id": self._id, "text": decode(raw)}
