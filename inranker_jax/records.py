"""Plain data records and the text files that hold them: queries, documents, TREC runs, relevance judgments.

Order everywhere is trec_eval's: score descending as float32, then document id **descending**. `ranking` is
the one function that decides it, so that a run in memory and the file written from it rank alike.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, TextIO, cast

import numpy as np

from inranker_jax.errors import InputError
from inranker_jax.paths import PathType, is_remote, open_file, upload

Run = dict[str, dict[str, float]]
Qrels = dict[str, dict[str, int]]

_BLANKS = re.compile(r"[ \t]+")
_ANY_BLANK = re.compile(r"[ \t\r\n]")
_QRELS_EXPECTED = (
    "'query-id<tab>corpus-id<tab>score' (BEIR) or 'query 0 document grade' (TREC), whole-number grades"
)


@dataclass(frozen=True, slots=True)
class Query:
    """A query: its id in the collection and its text."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """A document (or passage) of a collection."""

    id: str
    text: str
    title: str = ""

    @property
    def contents(self) -> str:
        """What rankers see, as in BEIR: `(title + " " + text).strip()`."""
        return f"{self.title} {self.text}".strip()


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """A (query, document) pair with its teacher label.

    Attributes:
      query_id: id of the query.
      document_id: id of the document.
      query: text of the query.
      document: contents of the document (title and text joined).
      logits: raw teacher logits in the order (false, true), not centred.
    """

    query_id: str
    document_id: str
    query: str
    document: str
    logits: tuple[float, float]


# ---------------------------------------------------------------------------------------------- files


def _zstandard(path: PathType) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise InputError.at(
            path,
            None,
            "the file is zstd-compressed and the 'zstandard' package is not installed",
            remedy="Run `pip install zstandard`, or decompress the file",
        ) from error
    return zstandard  # fmt: skip


def open_raw(path: PathType) -> BinaryIO:
    """Opens a local or remote file for reading its bytes as they are stored, compressed or not.

    Raises:
      InputError: there is no such file, it is a folder, or it may not be read.
    """
    try:
        return cast(BinaryIO, open_file(path, "rb"))
    except FileNotFoundError as error:
        raise InputError.at(path, None, "no such file", remedy="Check the path") from error
    except IsADirectoryError as error:
        raise InputError.at(path, None, "this is a folder", "a file") from error
    except PermissionError as error:
        raise InputError.at(path, None, "the file may not be read", remedy="Check its permissions") from error


@contextlib.contextmanager
def open_bytes(path: PathType) -> Iterator[BinaryIO]:
    """Opens a local or remote file for reading bytes; `.gz` and `.zst` files are decompressed."""
    name = os.fspath(path)
    with open_raw(path) as raw:
        if name.endswith(".gz"):
            try:
                with gzip.open(raw, "rb") as unzipped:
                    yield cast(BinaryIO, unzipped)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise InputError.at(
                    path, None, f"not a whole gzip file ({error})", remedy="Fetch the file again"
                ) from error
        elif name.endswith(".zst"):
            zstandard = _zstandard(path)
            try:
                with io.BufferedReader(_ZstdReader(raw, zstandard), 1 << 17) as unzipped:
                    yield cast(BinaryIO, unzipped)
            except (zstandard.ZstdError, EOFError) as error:
                raise InputError.at(
                    path, None, f"not a whole zstd file ({error})", remedy="Fetch the file again"
                ) from error
        else:
            yield raw


class _ZstdReader(io.RawIOBase):
    """Decompresses the frames of a file; unlike zstandard's own reader, a cut-off file is an EOFError."""

    def __init__(self, raw: BinaryIO, zstandard: Any):
        self._raw, self._new = raw, zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._packed = b""  # read from the file, not yet decompressed
        self._ready = memoryview(b"")  # decompressed, not yet asked for

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._packed or self._raw.read(1 << 16)
            self._packed = b""
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._frame = self._frame or self._new()
            self._ready = memoryview(self._frame.decompress(packed))
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextlib.contextmanager
def open_text(path: PathType) -> Iterator[TextIO]:
    """Opens a text file for reading: strict UTF-8, `.gz` and `.zst` decompressed, remote paths through etils.

    Only `\\n` ends a line. Prefer `numbered_lines`, which names the line that is not UTF-8.

    Raises:
      InputError: the file does not exist, or needs a package that is not installed.
    """
    with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="\n") as text:
        yield text


def numbered_lines(path: PathType) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without its end) of a UTF-8 file; a byte-order mark is dropped.

    Raises:
      InputError: the file cannot be opened, or a line is not UTF-8 (the message names it).
    """
    with open_bytes(path) as raw:
        for number, line in enumerate(raw, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError.at(
                    path,
                    number,
                    f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8",
                    "UTF-8 text",
                    "Convert the file, for example with `iconv -f latin1 -t utf-8`",
                ) from error


@contextlib.contextmanager
def atomic_text(path: PathType) -> Iterator[TextIO]:
    """Opens a UTF-8 file for writing that appears whole or not at all: a temporary file, then a rename.

    Missing folders are made. A name that ends with `.gz` or `.zst` is compressed. When the body raises, an
    older file of that name stays as it was.
    """
    name = os.fspath(path)
    if is_remote(path):
        # Object stores publish an object when it is closed, whole: no rename is needed (or exists) there.
        with tempfile.NamedTemporaryFile(prefix="inranker_jax.") as local:
            with _text_over(cast("IO[bytes]", local), path) as text:
                yield text
            local.flush()
            upload(local.name, path)
        return
    folder = os.path.dirname(os.path.abspath(name))
    os.makedirs(folder, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(name)}.", suffix=".part", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as raw:
            with _text_over(raw, path) as text:
                yield text
            raw.flush()
            os.fsync(raw.fileno())
        # mkstemp makes files private to the user; give the file the permissions any new file would have.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, name)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _text_over(raw: IO[bytes], path: PathType) -> Iterator[TextIO]:
    """UTF-8 text written into `raw`, compressed as the name of `path` says; `raw` stays open."""
    name = os.fspath(path)
    compressed: Any = None
    if name.endswith(".gz"):
        compressed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
    elif name.endswith(".zst"):
        compressed = _zstandard(path).ZstdCompressor().stream_writer(raw, closefd=False)
    text = io.TextIOWrapper(compressed or raw, encoding="utf-8", newline="\n")
    try:
        yield text
    finally:
        text.detach()  # flushes, and leaves closing to the owners of the layers below
        if compressed is not None:
            compressed.close()


# ---------------------------------------------------------------------------------------------- runs


def ranking(scores: Mapping[str, float]) -> list[str]:
    """Document ids in trec_eval's order: float32 score descending, ties by document id descending.

    >>> ranking({"a": 1.0, "b": 1.0, "c": 2.0})
    ['c', 'b', 'a']
    """
    ids = list(scores)
    with np.errstate(over="ignore"):
        values = np.asarray([scores[document] for document in ids], np.float64).astype(np.float32).tolist()
    return [document for _, document in sorted(zip(values, ids, strict=True), reverse=True)]


def read_run(path: PathType) -> Run:
    """Reads a TREC run: `query Q0 document rank score tag`. As in trec_eval, scores decide, not ranks.

    Returns:
      query id -> document id -> score. Blank lines are skipped; an empty file is an empty run.

    Raises:
      InputError: naming the file and line, for a wrong number of columns, a score that is not a finite
        number, a document listed twice for one query, or bytes that are not UTF-8.
    """
    run: Run = {}
    for number, line in numbered_lines(path):
        fields = _BLANKS.split(line.strip())
        if fields == [""]:
            continue
        if len(fields) != 6:
            raise InputError.at(
                path, number, f"{len(fields)} columns", "six: 'query Q0 document rank score tag'",
                "TREC run ids hold no blanks; check that this is a run and not a qrels file",
            )  # fmt: skip
        query, _, document, _, text, _ = fields
        score = _number(text)
        if score is None or not math.isfinite(score):
            raise InputError.at(
                path, number, f"score {text!r} is not a finite number", "a number in column 5"
            )
        documents = run.setdefault(query, {})
        if document in documents:
            raise InputError.at(
                path, number, f"document {document!r} is listed twice for query {query!r}",
                "every document once per query", "Remove one of the lines",
            )  # fmt: skip
        documents[document] = score
    return run


def write_run(path: PathType, run: Mapping[str, Mapping[str, float]], tag: str) -> None:
    """Writes a TREC run, ranks from 1, queries in the order of `run`; the file appears whole or not at all.

    Scores are written as the shortest decimals that read back as the same float32.

    Raises:
      InputError: an id or the tag is empty or holds a blank, or a score is not finite in float32.
    """
    _check_token(path, "tag", tag)
    with atomic_text(path) as out:
        for query, scores in run.items():
            _check_token(path, "query id", query)
            order = ranking(scores)
            with np.errstate(over="ignore"):
                values = np.array([scores[document] for document in order], np.float64).astype(np.float32)
            lines = []
            for rank, (document, finite, score) in enumerate(
                zip(order, np.isfinite(values).tolist(), values, strict=True), start=1
            ):
                _check_token(path, "document id", document)
                if not finite:
                    problem = (
                        f"cannot write score {scores[document]!r} of query {query!r}, document {document!r}"
                    )
                    raise InputError.at(path, None, problem, "a finite float32")
                lines.append(f"{query} Q0 {document} {rank} {score!s} {tag}\n")
            out.writelines(lines)


def _check_token(path: PathType, kind: str, token: str) -> None:
    if not token or _ANY_BLANK.search(token):
        raise InputError.at(path, None, f"cannot write {kind} {token!r}", f"a {kind} without blanks")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------- qrels


def read_qrels(path: PathType) -> Qrels:
    """Reads relevance judgments in BEIR's form (three tab-separated columns) or TREC's (four).

    The header of BEIR's form may be missing.

    A pair that is repeated with the same grade counts once.

    Returns:
      query id -> document id -> grade (negative grades, which some TREC tracks use, are kept).

    Raises:
      InputError: naming the file and line, for a wrong number of columns, a grade that is not a whole number,
        two grades for one pair, bytes that are not UTF-8; or for a file without judgments.
    """
    qrels: Qrels = {}
    columns = 0
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        fields = line.rstrip().split("\t")
        if len(fields) != 3:
            fields = _BLANKS.split(line.strip())
        if not columns:
            columns = len(fields)
            if columns == 3 and fields[0].lower() in ("query-id", "query_id", "qid"):
                continue
        if len(fields) != columns or columns not in (3, 4):
            raise InputError.at(path, number, f"{len(fields)} columns", _QRELS_EXPECTED)
        query, document, text = fields[0], fields[-2], fields[-1]
        value = _number(text)
        if value is None or not math.isfinite(value) or value != int(value):
            raise InputError.at(path, number, f"grade {text!r} is not a whole number", _QRELS_EXPECTED)
        if not query or not document:
            raise InputError.at(path, number, "an id is empty", _QRELS_EXPECTED)
        grade = int(value)
        documents = qrels.setdefault(query, {})
        if documents.setdefault(document, grade) != grade:
            raise InputError.at(
                path, number, f"pair {query!r}, {document!r} is graded {documents[document]} and {grade}",
                "one grade per pair", "Remove one of the lines",
            )  # fmt: skip
    if not qrels:
        raise InputError.at(path, None, "the file holds no judgments", _QRELS_EXPECTED)
    return qrels
