"""Rows of text files: where each one starts, and its fields by name.

A row source yields (row number from 1, byte offset, raw row) without judging it; `fields` judges one raw row.
The two are apart so that a bad row costs only itself, and so that a row can be read again by its offset.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator, Mapping
from typing import Any, Protocol

from inranker_jax.corpora.malformed import BadRow
from inranker_jax.errors import did_you_mean, json_problem
from inranker_jax.records import PathType, open_bytes

Fields = Mapping[str, Any]

DOCUMENT_ID = ("_id", "id", "doc_id", "docid", "document_id", "pid", "passage_id")
DOCUMENT_TEXT = ("text", "contents", "body", "passage", "document", "doc_text")
TITLE = ("title",)
QUERY_ID = ("_id", "id", "query_id", "qid")
QUERY_TEXT = ("query", "question", "text", "title", "contents")
_IDS = frozenset((*DOCUMENT_ID, *QUERY_ID))
_TEXTS = frozenset((*DOCUMENT_TEXT, *QUERY_TEXT))
_BOM = b"\xef\xbb\xbf"


class RowSource(Protocol):
    """How the rows of one kind of file are found and read."""

    def rows(self) -> Iterator[tuple[int, int, Any]]:
        """Yields (row number from 1, byte offset in the file as read, raw row); blank rows are left out."""
        ...

    def fields(self, raw: Any) -> Fields:
        """Reads one raw row.

        Raises:
          BadRow: it cannot be used.
        """
        ...


def byte_lines(path: PathType) -> Generator[tuple[int, int, bytes], None, None]:
    """Yields (line number from 1, byte offset, line with its end), blank lines and a byte-order mark left out.

    Raises:
      InputError: the file cannot be opened or decompressed.
    """
    with open_bytes(path) as file:
        position = 0
        for number, line in enumerate(file, start=1):
            start, position = position, position + len(line)
            if number == 1 and line.startswith(_BOM):
                start, line = len(_BOM), line[len(_BOM) :]
            if line.strip():
                yield number, start, line


def decode(line: bytes) -> str:
    """A line as text, without its end.

    Raises:
      BadRow: it is not UTF-8.
    """
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadRow(
            "encoding",
            f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8",
            "UTF-8 text",
            "Convert the file, for example with `iconv -f latin1 -t utf-8`",
        ) from error


class JsonLines:
    """One JSON object a line."""

    def __init__(self, path: PathType):
        self.path = path

    def rows(self) -> Iterator[tuple[int, int, bytes]]:
        """As in `RowSource`."""
        return byte_lines(self.path)

    def fields(self, raw: bytes) -> Fields:
        """As in `RowSource`."""
        try:
            row = json.loads(decode(raw))
        except json.JSONDecodeError as error:
            raise BadRow("json", json_problem(error), "one JSON object a line") from error
        except (ValueError, RecursionError) as error:
            raise BadRow("json", f"not JSON that can be read ({error})", "one JSON object a line") from error
        if not isinstance(row, dict):
            raise BadRow("json", f"a JSON {type(row).__name__}", "one JSON object a line")
        return row


def header(path: PathType) -> list[str]:
    """The column names of a TSV whose first line is a header, in lower case; else an empty list."""
    with contextlib.closing(byte_lines(path)) as lines:
        return next((_header(line) for _, _, line in lines), [])


def _header(line: bytes) -> list[str]:
    names = [name.strip().lower() for name in line.decode("utf-8", "replace").split("\t")]
    return names if names[0] in _IDS and _TEXTS.intersection(names[1:]) else []


class TabSeparated:
    """`id<tab>text`, or columns named by a header.

    The first line is a header when its first column is one of the known names of ids and another one of the
    known names of texts (`passage_id<tab>passage`); a file without header has two columns.
    """

    def __init__(self, path: PathType):
        self.path = path
        self._header: list[str] = []

    def rows(self) -> Iterator[tuple[int, int, bytes]]:
        """As in `RowSource`; a header is no row."""
        for count, (number, start, line) in enumerate(byte_lines(self.path)):
            if count == 0:
                self._header = _header(line)
                if self._header:
                    continue
            yield number, start, line

    def fields(self, raw: bytes) -> Fields:
        """As in `RowSource`."""
        columns = decode(raw).split("\t")
        names = self._header or ["_id", "text"]
        if len(columns) != len(names):
            expected = (
                "\\t".join(names) if self._header else "'id<tab>text' (or a header that names the columns)"
            )
            count = len(columns)
            problem = "no tab in the line" if count == 1 else f"{count} tab-separated columns"
            raise BadRow("columns", problem, f"{len(names)} columns: {expected}")
        return {name: column.strip() for name, column in zip(names, columns, strict=True)}


def text_of(
    row: Fields, names: tuple[str, ...], *, required: bool = True, kind: str = "missing_field"
) -> str:
    """The text of the first of `names` that the row has.

    Raises:
      BadRow: it has none of them though one is required, or the value is no text.
    """
    for name in names:
        if name in row and row[name] is not None:
            value = row[name]
            if not isinstance(value, str):
                raise BadRow("bad_field", f"{name!r} is {_short(value)}", "a string")
            if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
                raise BadRow("encoding", f"{name!r} holds half a surrogate pair", "valid Unicode text")
            return value
    if not required:
        return ""
    null = next((name for name in names if name in row), None)
    if null is not None:
        raise BadRow(kind, f"{null!r} is null", "a string")
    hint = did_you_mean(names[0], map(str, row))
    raise BadRow(
        kind, f"no {names[0]!r} among the fields {sorted(map(str, row))}", f"one of {', '.join(names)}",
        hint.strip(),
    )  # fmt: skip


def id_of(row: Fields, names: tuple[str, ...]) -> str:
    """The id in the first of `names` that the row has; a whole number is taken as its digits.

    Raises:
      BadRow: there is none, or it is empty, holds a blank or is of another type.
    """
    name = next((name for name in names if name in row), None)
    if name is None:
        hint = did_you_mean(names[0], map(str, row))
        raise BadRow(
            "missing_field", f"no id among the fields {sorted(map(str, row))}", f"one of {', '.join(names)}",
            hint.strip(),
        )  # fmt: skip
    value = row[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value or value.split() != [value]:
        raise BadRow(
            "bad_id", f"{name!r} is {_short(value)}",
            "a string without blanks: ids are columns of TREC run files",
        )  # fmt: skip
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow("encoding", f"{name!r} holds half a surrogate pair", "valid Unicode text")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
