"""Any corpus and any set of queries, streamed: `open_corpus` and `open_queries_any`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from inranker_jax.corpora import files, flag_embedding, formats, inpars, rows, text_files
from inranker_jax.corpora.malformed import BadRow, MalformedReport, OnMalformed
from inranker_jax.corpora.parquet import ParquetRows
from inranker_jax.corpora.table import Table
from inranker_jax.corpora.texts import OffsetTexts, hold
from inranker_jax.records import Document, PathType, Query, is_remote


class Corpus:
    """A corpus on disk (or on another machine): its documents can be streamed as often as needed.

    Attributes:
      path: as given.
      format: one of `formats.FORMATS`.
      files: the files that hold the documents, in order.
      on_malformed: the policy, "raise" or "skip".
      report: the rows left out under "skip".
    """

    def __init__(
        self, path: PathType, found: formats.Found, on_malformed: OnMalformed, report: MalformedReport | None
    ):
        self.path, self.format, self.files = os.fspath(path), found.format, list(found.files)
        self._open = _source(found)
        self._build = _document_builder(found.format)
        repeats = found.format in ("inpars", "flagembedding")
        self._table: Table[Document] = Table(
            self.path, self.files, self._open, self._build, kind="documents", on_malformed=on_malformed,
            report=report, contents=(lambda document: document.contents) if repeats else None,
        )  # fmt: skip
        self.report, self.on_malformed = self._table.report, self._table.on_malformed
        self._roots = found.roots
        self._fingerprint = ""

    def documents(self) -> Iterator[Document]:
        """Yields the documents in the order of the files.

        Raises:
          InputError: naming file and line, at a row that cannot be used or an id that occurs twice; under
            `on_malformed="skip"` such rows are left out and counted. Also when there is no document at all.
        """
        return (document for _, document in self._table.items())

    def texts(self, *, titles: bool = True) -> Mapping[str, str]:
        """Document id -> contents.

        Args:
          titles: whether a document is its title and text joined, or its text only (stripped).

        Over uncompressed local files with a document a line the texts stay on disk (8 to 24 bytes of memory
        a document). Compressed, remote, Parquet, FlagEmbedding and `text` sources are held in memory, or, past
        256 million characters, in a temporary file.

        Raises:
          InputError: as in `documents`.
        """
        if self.format in ("beir", "tsv", "jsonl", "inpars") and not any(map(_packed, self.files)):
            return OffsetTexts(self.files, self._open, self._build, self._table.items(), titles=titles)
        return hold(self.documents(), titles=titles)

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the files as stored; of one file, what `sha256sum` prints. Kept in memory.

        Of format `text`, where names are ids: of names and files.
        """
        if not self._fingerprint:
            ids = (
                [text_files.document_id(*place) for place in zip(self.files, self._roots, strict=True)]
                if self.format == "text"
                else None
            )
            self._fingerprint = files.fingerprint(self.files, ids)
        return self._fingerprint

    def identity(self) -> dict[str, str]:
        """All that decides the documents, to be kept with what is made of them, and compared."""
        return _identity("corpus", self)

    def left_out(self) -> dict[str, Any]:
        """The malformed rows that were left out so far, by kind, as JSON: to be kept with what is made of the rest."""
        return self.report.left_out(self._table.source)

    def recall(self, left_out: Mapping[str, Any]) -> None:
        """Reports what was left out (`left_out`) when something that is used again now was made."""
        self.report.recall(self._table.source, left_out)


class QuerySet:
    """Queries on disk (or on another machine); attributes as in `Corpus`."""

    def __init__(
        self, path: PathType, found: formats.Found, on_malformed: OnMalformed, report: MalformedReport | None
    ):
        self.path, self.format, self.files = os.fspath(path), found.format, list(found.files)
        repeats = found.format in ("inpars", "flagembedding")
        self._open = _source(found)
        self._table: Table[Query] = Table(
            self.path, self.files, self._open, _query_builder(found.format), kind="queries",
            on_malformed=on_malformed, report=report,
            contents=(lambda query: query.text) if repeats else None,
        )  # fmt: skip
        self.report, self.on_malformed = self._table.report, self._table.on_malformed
        self._fingerprint = ""
        self._positives: dict[str, list[str]] | None = None

    def queries(self) -> Iterator[Query]:
        """Yields the queries in the order of the files, texts stripped; errors as in `Corpus.documents`."""
        return (query for _, query in self._table.items())

    @property
    def positives(self) -> dict[str, list[str]] | None:
        """Query id -> ids of its positives, where the format states them (`inpars`, `flagembedding`); else None.

        Read from the files once, at the first access.

        Raises:
          InputError: as in `queries`.
        """
        positives_of = {"inpars": _inpars_positives, "flagembedding": _flag_embedding_positives}.get(
            self.format
        )
        if positives_of is None:
            return None
        if self._positives is None:
            texts = {query.id: query.text for query in self.queries()}
            found: dict[str, dict[str, None]] = {identifier: {} for identifier in texts}
            for path in self.files:
                source = self._open(path)
                for _, _, raw in source.rows():
                    try:
                        query, documents = positives_of(source.fields(raw))
                    except BadRow:
                        continue  # `queries` has counted the row
                    if texts.get(query.id) == query.text:
                        found[query.id].update(dict.fromkeys(documents))
            self._positives = {identifier: list(documents) for identifier, documents in found.items()}
        return self._positives

    def fingerprint(self) -> str:
        """As `Corpus.fingerprint`."""
        if not self._fingerprint:
            self._fingerprint = files.fingerprint(self.files)
        return self._fingerprint

    def identity(self) -> dict[str, str]:
        """As `Corpus.identity`."""
        return _identity("queries", self)


def open_corpus(
    path: PathType,
    format: str = "auto",
    *,
    on_malformed: OnMalformed = "raise",
    report: MalformedReport | None = None,
) -> Corpus:
    """Opens a corpus of any format; nothing but the first row is read yet.

    Args:
      path: a file, a folder, a glob, or a comma-separated list of these (one corpus in parts); local or
        remote (`gs://`, `s3://`), plain, `.gz` or `.zst`.
      format: one of `formats.FORMATS`; "auto" goes by the name, see `formats`.
      on_malformed: "raise" at the first row that cannot be used, or "skip" and count it in `report`.
      report: filled while reading; without one, rows left out are logged as a warning.

    Returns:
      The corpus.

    Raises:
      InputError: no such file, or a format that is unknown or cannot be told (the message lists them).
    """
    return Corpus(path, formats.find(path, format, "corpus"), on_malformed, report)


def open_queries_any(
    path: PathType,
    format: str = "auto",
    *,
    on_malformed: OnMalformed = "raise",
    report: MalformedReport | None = None,
) -> QuerySet:
    """Opens queries of any format; arguments and errors as in `open_corpus`."""
    return QuerySet(path, formats.find(path, format, "queries"), on_malformed, report)


def _identity(role: str, source: Corpus | QuerySet) -> dict[str, str]:
    return {
        f"{role}_fingerprint": source.fingerprint(),
        f"{role}_format": source.format,
        f"{role}_on_malformed": source.on_malformed,
    }


def _packed(name: str) -> bool:
    return is_remote(name) or name.endswith((".gz", ".zst"))


def _source(found: formats.Found) -> Callable[[str], rows.RowSource]:
    if found.format == "text":
        roots = dict(zip(found.files, found.roots, strict=True))
        return lambda name: text_files.TextFile(name, roots[name])
    if found.format == "tsv":
        return rows.TabSeparated
    return ParquetRows if found.format == "parquet" else rows.JsonLines


def _document_builder(format: str) -> Callable[[rows.Fields], Sequence[Document]]:
    if format == "inpars":
        return lambda row: (inpars.document(row),)
    if format == "flagembedding":
        return lambda row: [document for found in flag_embedding.documents(row) for document in found]
    return _document


def _document(row: rows.Fields) -> Sequence[Document]:
    identifier = rows.id_of(row, rows.DOCUMENT_ID)
    text = rows.text_of(row, rows.DOCUMENT_TEXT)
    return (Document(identifier, text, rows.text_of(row, rows.TITLE, required=False)),)


def _query_builder(format: str) -> Callable[[rows.Fields], Sequence[Query]]:
    if format == "inpars":
        return _synthetic_query
    if format == "flagembedding":
        return lambda row: (flag_embedding.query(row),)
    # BEIR's queries have one text; other files may hold the query beside other texts.
    return partial(_query, names=("text",) if format == "beir" else rows.QUERY_TEXT)


def _query(row: rows.Fields, names: tuple[str, ...]) -> Sequence[Query]:
    identifier = rows.id_of(row, rows.QUERY_ID)
    text = rows.text_of(row, names).strip()
    if not text:
        raise BadRow("empty_text", f"query {identifier!r} is empty", "a text")
    return (Query(identifier, text),)


def _synthetic_query(row: rows.Fields) -> Sequence[Query]:
    return (_inpars_positives(row)[0],)


def _inpars_positives(row: rows.Fields) -> tuple[Query, list[str]]:
    query = inpars.synthetic_query(row)
    return Query(query.id, query.text), [query.document_id]


def _flag_embedding_positives(row: rows.Fields) -> tuple[Query, list[str]]:
    positives, _ = flag_embedding.documents(row)
    return flag_embedding.query(row), [document.id for document in positives]
