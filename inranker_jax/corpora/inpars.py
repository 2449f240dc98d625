"""InPars' synthetic queries (Bonifacio et al., 2022; Jeronymo et al., 2023): one JSON object a line.

- v1, `{set}_synthetic_queries_100k.jsonl`: `{"question", "doc_text", "doc_id", "log_probs"}`.
- the toolkit, `queries.jsonl`: `{"doc_id", "text", "query", "log_probs", "prompt_text", "fewshot_examples"}`.

Neither names its queries; `query_id` makes an id of the document and the query, and a key `query_id` in the
file wins over it. The document is the query's positive.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from inranker_jax.corpora import files, rows
from inranker_jax.corpora.malformed import BadRow, MalformedReport, OnMalformed, RowPolicy
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.records import Document, PathType

# How InPars v1 spells the sets whose files are not simply named with "_" for "-".
V1_SPELLINGS = {
    "scifact": "scifacts",
    "signal1m": "signal",
    "webis-touche2020": "touche",
}


@dataclass(frozen=True, slots=True)
class SyntheticQuery:
    """A generated query and the document it was generated from.

    Attributes:
      id: the file's `query_id`, else `query_id(document_id, text)`.
      text: the query.
      document_id: id of the document, the query's positive.
      document: the document's contents, or None where the file lacks them.
      log_probs: log-probability of each generated token, or empty where the file lacks them.
    """

    id: str
    text: str
    document_id: str
    document: str | None = None
    log_probs: tuple[float, ...] = ()

    @property
    def mean_log_prob(self) -> float | None:
        """Mean log-probability of a token, by which InPars v1 filters; None without `log_probs`."""
        return sum(self.log_probs) / len(self.log_probs) if self.log_probs else None


def query_id(document_id: str, query: str) -> str:
    """The id of a synthetic query that has none: its document's id and 8 hexadecimal digits of SHA-256.

    >>> query_id("42", "wing lift")
    '42-5073bfa9'
    """
    return f"{document_id}-{hashlib.sha256(query.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def looks_like(row: rows.Fields) -> bool:
    """Whether a JSON object is a row of InPars: a query and the id of its document."""
    return "doc_id" in row and ("query" in row or "question" in row)


def synthetic_query(row: rows.Fields) -> SyntheticQuery:
    """Builds the query of one row of either kind.

    Raises:
      BadRow: a field is missing or of another type, or the query is empty.
    """
    document_id = rows.id_of(row, ("doc_id",))
    text = rows.text_of(row, ("query", "question")).strip()
    if not text:
        raise BadRow("empty_text", f"the query of document {document_id!r} is empty", "a text")
    log_probs = row.get("log_probs") or ()
    numbers = isinstance(log_probs, list | tuple) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in log_probs
    )
    if not numbers:
        raise BadRow("bad_field", "'log_probs' is not a list of numbers", "one number a generated token")
    return SyntheticQuery(
        id=rows.id_of(row, ("query_id",)) if "query_id" in row else query_id(document_id, text),
        text=text,
        document_id=document_id,
        document=_document_text(row),
        log_probs=tuple(map(float, log_probs)),
    )


def document(row: rows.Fields) -> Document:
    """Builds the document of one row.

    Raises:
      BadRow: a field is missing or of another type.
    """
    return Document(rows.id_of(row, ("doc_id",)), rows.text_of(row, ("text", "doc_text")).strip())


def _document_text(row: rows.Fields) -> str | None:
    if "text" not in row and "doc_text" not in row:
        return None
    return rows.text_of(row, ("text", "doc_text")).strip()


def read(
    path: PathType, *, on_malformed: OnMalformed = "raise", report: MalformedReport | None = None
) -> Iterator[SyntheticQuery]:
    """Yields the synthetic queries of a file (or several: a glob or a comma-separated list), in order.

    Args:
      path: JSONL of either kind, `.gz` and `.zst` included.
      on_malformed: "raise" at the first bad row, or "skip" and count it in `report`.
      report: filled while reading.

    Raises:
      InputError: naming file and line, for a row that cannot be used.
    """
    policy = RowPolicy(on_malformed, report if report is not None else MalformedReport(), os.fspath(path))
    for name in files.find(path):
        source = rows.JsonLines(name)
        for number, _, raw in source.rows():
            try:
                item = synthetic_query(source.fields(raw))
            except BadRow as bad:
                policy.bad(name, number, bad)
                continue
            yield item


def find(folder: PathType, dataset: str, *, filtered: bool = False) -> str:
    """Finds the synthetic queries of a BEIR set in a folder laid out like either release.

    Args:
      folder: holds `{set}_synthetic_queries_100k.jsonl` (v1) or `{set}/queries.jsonl` (toolkit).
      dataset: BEIR's name, such as `webis-touche2020`.
      filtered: take the toolkit's `queries_filtered_v2.jsonl` (its best 10k) instead.

    Returns:
      The path of the file, plain or compressed; where both releases are there, the toolkit's.

    Raises:
      InputError: there is none (the message lists the names that were tried).
    """
    v1 = V1_SPELLINGS.get(dataset, dataset)
    spellings = list(dict.fromkeys((dataset, dataset.replace("-", "_"), v1, v1.replace("-", "_"))))
    if filtered:
        names = [f"{name}/queries_filtered_v2.jsonl" for name in spellings]
    else:
        names = [f"{name}/queries.jsonl" for name in spellings]
        names += [f"{name}_synthetic_queries_100k.jsonl" for name in spellings]
    for name in names:
        found = files.in_folder(folder, name)
        if found is not None:
            return found
    there = [path.name for path in files.as_path(folder).iterdir()] if files.as_path(folder).is_dir() else []
    raise InputError.at(
        folder, None, f"no synthetic queries of {dataset!r}.{did_you_mean(dataset, there)}".rstrip("."),
        f"one of {', '.join(names)}", "Check the folder",
    )  # fmt: skip
