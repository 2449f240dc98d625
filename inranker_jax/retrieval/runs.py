"""TREC runs too large for memory: read query by query."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from inranker_jax.errors import InputError
from inranker_jax.records import PathType, numbered_lines, ranking

_BLANKS = re.compile(r"[ \t]+")
_EXPECTED = "six: 'query Q0 document rank score tag'"


@dataclass
class SkippedLines:
    """What a lenient reading of a run left out.

    Attributes:
      counts: kind of problem -> number of lines.
      examples: the first few problems, each with its file and line.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    max_examples: int = 5

    def add(self, kind: str, error: InputError) -> None:
        """Counts one line that was left out."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.examples) < self.max_examples:
            self.examples.append(str(error))

    def summary(self) -> str:
        """One line such as `left out 3 lines (2 unknown documents, 1 bad score)`; empty when there is none."""
        if not self.counts:
            return ""
        total = sum(self.counts.values())
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.counts.items()))
        return f"left out {total} line{'s' if total > 1 else ''} ({kinds}); the first: {self.examples[0]}"


@dataclass(frozen=True, slots=True)
class RunQuery:
    """The lines of one query: its id, its first line's number, and document -> (score, line number)."""

    query_id: str
    first_line: int
    documents: dict[str, tuple[float, int]]


def stream_run(path: PathType) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Reads a TREC run query by query, in the memory of one query (and the ids of the queries passed).

    As in trec_eval, scores decide and ranks do not: documents come score descending (as float32), ties by
    document id descending, whatever their order in the file.

    Args:
      path: a run whose lines of one query stand together; `.gz` and `.zst` are decompressed, remote is fine.

    Yields:
      (query id, [(document id, score), ...]) in the order of the file. Blank lines are passed over.

    Raises:
      InputError: naming file and line: a wrong number of columns, a score that is not a finite number, a document
        listed twice for one query, bytes that are not UTF-8, or a query whose lines do not stand together.
    """
    for query in read_queries(path):
        scores = {document: score for document, (score, _) in query.documents.items()}
        yield query.query_id, [(document, scores[document]) for document in ranking(scores)]


def read_queries(path: PathType, skipped: SkippedLines | None = None) -> Iterator[RunQuery]:
    """Reads a TREC run query by query, with line numbers. See `stream_run`.

    Args:
      path: the run.
      skipped: where bad lines are counted instead of raised. Queries in pieces are an error all the same.

    Raises:
      InputError: see `stream_run`.
    """
    seen: set[str] = set()
    current: RunQuery | None = None
    for number, line in numbered_lines(path):
        try:
            fields = _fields(path, number, line)
            if fields is None:
                continue
            query, document, score = fields
            if current is None or query != current.query_id:
                if query in seen:
                    raise _InPieces.of(path, number, query)
                if current is not None:
                    yield current
                seen.add(query)
                current = RunQuery(query, number, {})
            if document in current.documents:
                raise InputError.at(
                    path, number, f"document {document!r} is listed twice for query {query!r}",
                    f"every document once per query (first on line {current.documents[document][1]})",
                    "Remove one of the lines",
                )  # fmt: skip
            current.documents[document] = (score, number)
        except _InPieces:
            raise
        except InputError as error:
            if skipped is None:
                raise
            skipped.add("malformed line", error)
    if current is not None:
        yield current


def run_lines(query: str, scores: Mapping[str, float], tag: str) -> list[str]:
    """The lines of one query, ranks from 1, for scores that are ranked already.

    Scores are the shortest decimals that read back as the same float32.

    Args:
      query: id without blanks.
      scores: document id (without blanks) -> finite float32 value, best first.
      tag: the run's name, without blanks.
    """
    values = map(
        str, np.fromiter(scores.values(), np.float32, len(scores))
    )  # f"{value}" is slower and prints the float64
    return [
        f"{query} Q0 {document} {rank} {value} {tag}\n"
        for rank, (document, value) in enumerate(zip(scores, values, strict=True), start=1)
    ]


class _InPieces(InputError):
    @classmethod
    def of(cls, path: PathType, line: int, query: str) -> InputError:
        return cls.at(
            path, line, f"query {query!r} comes again after lines of another query",
            "the lines of one query together",
            f"Sort the file first: `sort -s -k1,1 {path} > sorted.trec`",
        )  # fmt: skip


def _fields(path: PathType, number: int, line: str) -> tuple[str, str, float] | None:
    fields = line.split(" ")
    if len(fields) != 6 or "" in fields or "\t" in line:
        fields = _BLANKS.split(line.strip(" \t"))
        if fields == [""]:
            return None
        if len(fields) != 6:
            raise InputError.at(
                path, number, f"{len(fields)} column{'s' if len(fields) > 1 else ''}", _EXPECTED,
                "TREC run ids hold no blanks; check that this is a run and not a qrels file",
            )  # fmt: skip
    query, _, document, _, text, _ = fields
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise InputError.at(path, number, f"score {text!r} is not a finite number", "a number in column 5")
    return query, document, score
