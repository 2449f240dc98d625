"""MS MARCO's files: `queries.tsv` and `collection.tsv`, one `id<tab>text` a line (mMARCO's have the same
form).

A collection of 8.8 million passages does not belong in memory: `Collection` reads the file once to note where
its lines start, and fetches a passage from the file when it is asked for.
"""

from __future__ import annotations

import array
import mmap
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping

from inranker_jax.corpora import rows
from inranker_jax.corpora.files import as_path, bare_name
from inranker_jax.errors import InputError
from inranker_jax.records import PathType, is_remote, numbered_lines

_EXPECTED = "'id<tab>text'"
_PROGRESS_SECONDS = 10.0


def _split(path: PathType, number: int, line: str) -> tuple[str, str]:
    identifier, tab, text = line.partition("\t")
    if not tab:
        raise InputError.at(
            path, number, "no tab in the line", _EXPECTED, "Check that the file is tab-separated"
        )
    identifier = identifier.strip()
    if not identifier:
        raise InputError.at(path, number, "the id is empty", _EXPECTED)
    return identifier, text.strip()


def read_id_text(path: PathType) -> dict[str, str]:
    """Reads a TSV of `id<tab>text` into a dictionary; blank lines are skipped, texts are stripped.

    An empty text is kept: only a reader that uses it can say whether it matters.

    Raises:
      InputError: naming file and line, for a line without a tab, an empty id, or an id that occurs twice.
    """
    texts: dict[str, str] = {}
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        identifier, text = _split(path, number, line)
        if identifier in texts:
            raise InputError.at(
                path, number, f"id {identifier!r} occurs twice", remedy="Remove one of the lines"
            )
        texts[identifier] = text
    return texts


def read_triples(path: PathType) -> Iterator[tuple[str, str, str]]:
    """Yields (query, positive, negative) texts of `triples.train.small.tsv` or InPars' `triples_train*.tsv`.

    Raises:
      InputError: naming file and line, for another number of columns than three or an empty text.
    """
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) != 3 or not all(columns):
            problem = f"{len(columns)} columns" if len(columns) != 3 else "an empty text"
            raise InputError.at(path, number, problem, "'query<tab>positive<tab>negative'")
        query, positive, negative = columns
        yield query, positive, negative


class Collection(Mapping[str, str]):
    """Read-only mapping from passage id to text over an uncompressed local `collection.tsv`.

    Where ids are the row numbers 0, 1, 2, ..., as in MS MARCO and mMARCO, a passage costs eight bytes of
    memory; otherwise an id table is kept as well.
    """

    def __init__(self, path: PathType):
        """Scans the file once.

        Args:
          path: a local, uncompressed TSV of `id<tab>text`.

        Raises:
          InputError: naming file and line, for a line without a tab, an empty id or an id that occurs twice.
        """
        self.path = os.fspath(path)
        self._starts = array.array("q")
        self._rows: dict[str, int] | None = None
        if not os.path.isfile(self.path):
            raise InputError.at(path, None, "no such file", remedy="Check the path of the collection")
        self._scan()
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""

    def _scan(self) -> None:
        position, shown = 0, time.monotonic()
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                start, position = position, position + len(line)
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    start, line = 3, line[3:]
                if not line.strip():
                    continue
                identifier = line.partition(b"\t")[0].strip()
                row = len(self._starts)
                if b"\t" not in line or not identifier:
                    _split(self.path, number, line.decode("utf-8", "replace").rstrip("\r\n"))
                if self._rows is None and identifier != b"%d" % row:
                    self._rows = {str(known): known for known in range(row)}
                if self._rows is not None:
                    name = identifier.decode("utf-8", "replace")
                    if name in self._rows:
                        raise InputError.at(
                            self.path, number, f"id {name!r} occurs twice", remedy="Remove one of the lines"
                        )
                    self._rows[name] = row
                self._starts.append(start)
                if time.monotonic() - shown > _PROGRESS_SECONDS:
                    shown = time.monotonic()
                    print(f"indexing {self.path}: {number:,} passages", file=sys.stderr, flush=True)

    def _row(self, identifier: str) -> int:
        if self._rows is not None:
            return self._rows[identifier]
        # "007" and "+7" are not ids of row 7: only the spelling in the file counts.
        if not identifier.isascii() or not identifier.isdigit() or str(int(identifier)) != identifier:
            raise KeyError(identifier)
        row = int(identifier)
        if row >= len(self._starts):
            raise KeyError(identifier)
        return row

    def __getitem__(self, identifier: str) -> str:
        row = self._row(identifier)
        start = self._starts[row]
        end = self._bytes.find(b"\n", start)
        line = self._bytes[start : end if end >= 0 else len(self._bytes)]
        try:
            return line.partition(b"\t")[2].decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError.at(
                self.path, None, f"passage {identifier!r} is not UTF-8 ({error.reason})", "UTF-8 text",
                "Convert the file, for example with `iconv -f latin1 -t utf-8`",
            ) from error  # fmt: skip

    def __contains__(self, identifier: object) -> bool:
        try:
            self._row(identifier)  # type: ignore[arg-type]
        except (KeyError, AttributeError):
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows) if self._rows is not None else map(str, range(len(self._starts)))

    def __len__(self) -> int:
        return len(self._starts)


def open_queries(queries: PathType | Mapping[str, str]) -> Mapping[str, str]:
    """Opens the texts of queries by id.

    Args:
      queries: such a mapping already, a TSV of `id<tab>text` (whatever its name), a BEIR folder, or whatever
        else `corpora.open_queries_any` opens.

    Returns:
      query id -> text.

    Raises:
      InputError: there is no such file, or a line of it is malformed.
    """
    if isinstance(queries, Mapping):
        return queries
    if _is_id_text(queries):
        return read_id_text(queries)
    from inranker_jax.corpora.corpus import open_queries_any

    return {query.id: query.text for query in open_queries_any(queries, _format(queries)).queries()}


def open_documents(documents: PathType | Mapping[str, str], *, titles: bool = True) -> Mapping[str, str]:
    """Opens the texts of documents by id.

    Args:
      documents: such a mapping already, a `collection.tsv` (whatever its name), a BEIR folder, or whatever
        else `corpora.open_corpus` opens.
      titles: where documents have titles, whether a document is its title and text joined, or its text only.

    Returns:
      document id -> text; see `corpora.corpus.Corpus.texts` for what stays on disk.

    Raises:
      InputError: there is no such file, or a line of it is malformed.
    """
    if isinstance(documents, Mapping):
        return documents
    if _is_id_text(documents):
        name = os.fspath(documents)
        return (
            read_id_text(documents) if is_remote(name) or name != bare_name(name) else Collection(documents)
        )
    from inranker_jax.corpora.corpus import open_corpus

    return open_corpus(documents, _format(documents)).texts(titles=titles)


_OTHER_FILES = (".jsonl", ".ndjson", ".json", ".parquet")


def _is_id_text(path: PathType) -> bool:
    """Whether a path is one file without header and without the name of another format: `id<tab>text`."""
    if bare_name(path).endswith(_OTHER_FILES):
        return False
    place = as_path(path)
    if not place.is_file():
        # A name that is neither folder nor list nor pattern is the mistake that `no such file` is about.
        return not place.is_dir() and not re.search(r"[,*?\[]", os.fspath(path))
    return not any(True for _ in rows.header(path))


def _format(path: PathType) -> str:
    """A file that is named like no other format is a TSV here, as the callers have always taken it."""
    single = as_path(path).is_file() and not bare_name(path).endswith(_OTHER_FILES)
    return "tsv" if single else "auto"
