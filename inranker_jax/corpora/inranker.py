"""Readers and writers of the two formats in which InRanker published its teacher logits.

- MS MARCO TSV, four tab-separated columns `positive_score negative_score query_id doc_id`: the teacher's
  logits of the true and the false label piece. Texts are joined from a queries file and a collection.
- BEIR JSONL, one object a line: `{"query", "contents", "true_logit", "false_logit"}`.

Logits stay raw; a loss centres them. Bad lines raise one `InputError` with file and line, or, with
`on_error="skip"`, are left out and counted by kind in a `ReadReport`, and told at the end.

**Swapped logits.** No single line tells whether its two logits are swapped: a teacher may well dislike a
document. A whole file can: where the first document of each query is the positive (or where `relevant` names
the relevant ones), the teacher's margin true - false of the relevant document must on average exceed that of
the query's other documents. `OrientationCheck` tests this and the readers
raise when the file says the opposite beyond chance. It cannot tell anything about a file with one document
a query, with fewer than `OrientationCheck.MIN_QUERIES` such queries, or in which relevant documents have no
particular place; and a file that lists each query's documents from worst to best looks swapped to it
(`check_orientation=False`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from inranker_jax.corpora.msmarco import open_documents, open_queries
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.progress import announce
from inranker_jax.records import LabelledPair, PathType, atomic_text, numbered_lines

OnError = Literal["raise", "skip"]
Relevant = Mapping[str, Collection[str]]

_TSV_EXPECTED = "'positive_score<tab>negative_score<tab>query_id<tab>doc_id'"
_JSONL_KEYS = ("query", "contents", "true_logit", "false_logit")
_JSONL_EXPECTED = '{"query": text, "contents": text, "true_logit": number, "false_logit": number}'
_CENTRED_TOLERANCE = 1e-3
_LARGEST = 3e38  # logits are float32
_ADVICE = 'Correct the line, or read with on_error="skip" to leave such lines out'
_LOG = logging.getLogger(__name__)
# A file is read once to count its examples, once for each split and once an epoch; what it lacks is told once.
_TOLD: set[str] = set()


@dataclass
class ReadReport:
    """What a reader met in one file; pass one in to look at it afterwards.

    Attributes:
      path: the file.
      lines: lines read, blank ones left out.
      pairs: pairs yielded.
      skipped: lines left out under `on_error="skip"`, by kind: `columns`, `json`, `number`, `not_finite`,
        `unknown_query`, `unknown_document`, `empty_query`, `empty_document`, `encoding`. Bytes that are not
        UTF-8 always raise.
      first: the first such line: its file, its number and the problem.
      uncentred: pairs whose two logits do not add up to 0 (within 0.001). Both kinds are fine: see `centred`.
      orientation: what the check for swapped logits found, in words.
    """

    path: str = ""
    lines: int = 0
    pairs: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first: str = ""
    uncentred: int = 0
    orientation: str = "not checked"

    @property
    def centred(self) -> bool:
        """Whether the file's logits are centred already (thesis eq. 10). Losses centre either way."""
        return self.pairs > 0 and self.uncentred == 0

    def skip(self, kind: str, problem: str) -> None:
        """Counts a line that is left out."""
        self.skipped[kind] += 1
        self.first = self.first or problem

    def left_out(self) -> str:
        """One line such as `left out 3 lines (2 json, 1 number); the first: labels.jsonl:7: not JSON`."""
        total, kinds = self.skipped.total(), self._kinds()
        return f"left out {total:,} line{'s' * (total != 1)} ({kinds}); the first: {self.first}"

    def _kinds(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.skipped.items()))

    def summary(self) -> str:
        """One line for a log."""
        left_out = f"{self._kinds()} (the first: {self.first})" if self.skipped else "none"
        return (
            f"{self.path}: {self.pairs} pairs from {self.lines} lines; skipped: {left_out}; "
            f"logits {'are' if self.centred else 'are not'} centred; orientation: {self.orientation}"
        )


class _BadLine(Exception):
    """A line that cannot be used: its kind for the report, and the words for the error."""

    def __init__(self, kind: str, problem: str, expected: str = "", remedy: str = ""):
        super().__init__(problem)
        self.kind, self.problem, self.expected, self.remedy = kind, problem, expected, remedy


class OrientationCheck:
    """Detects a file whose two logit columns are swapped, from relevance that is known or implied by order.

    For every query with a relevant and another document, d = mean margin of the relevant - mean margin of the
    others, margin = true - false logit. A file is taken as swapped when mean(d) lies more than `Z` standard
    errors below zero. It looks after `EARLY` queries, to fail before a long read, and once at the end.
    """

    MIN_QUERIES = 20
    EARLY = 500
    Z = 5.0

    def __init__(self, path: PathType, relevant: Relevant | None = None, *, swapped: bool = False):
        self._path = path
        self._swapped = swapped
        self._relevant = relevant
        self._query: str | None = None
        self._margins: tuple[list[float], list[float]] = ([], [])
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def add(self, pair: LabelledPair) -> None:
        """Takes the next pair of the file in; raises InputError as `finish` does, once enough was seen."""
        if pair.query_id != self._query:
            self._close_query()
            self._query = pair.query_id
            if self._count == self.EARLY:
                self._judge()
        if self._relevant is None:
            is_relevant = not self._margins[1]
        else:
            is_relevant = pair.document_id in self._relevant.get(pair.query_id, ())
        self._margins[is_relevant].append(pair.logits[1] - pair.logits[0])

    def finish(self) -> str:
        """Judges the whole file.

        Returns:
          The evidence in words.

        Raises:
          InputError: the file's logits look swapped.
        """
        self._close_query()
        self._judge()
        source = "the first document" if self._relevant is None else "the relevant documents"
        if self._count < self.MIN_QUERIES:
            return f"undecided, only {self._count} queries with {source} and another one"
        return f"margin of {source} {self._mean:+.2f} against the others over {self._count} queries"

    def _close_query(self) -> None:
        others, relevant = self._margins
        if others and relevant:
            difference = sum(relevant) / len(relevant) - sum(others) / len(others)
            self._count += 1
            step = difference - self._mean
            self._mean += step / self._count
            self._squares += step * (difference - self._mean)
        self._margins = ([], [])

    def _judge(self) -> None:
        if self._count < self.MIN_QUERIES or self._mean >= 0:
            return
        error = math.sqrt(self._squares / (self._count - 1) / self._count)
        if -self._mean <= self.Z * error:
            return
        source = "first document" if self._relevant is None else "relevant documents"
        raise InputError.at(
            self._path,
            None,
            f"the true and false logits look swapped: over {self._count} queries the margin true - false of "
            f"a query's {source} lies {-self._mean:.2f} (standard error {error:.2f}) BELOW that of its "
            "other documents",
            "the teacher to prefer relevant documents on average",
            (
                "Leave swapped=True out, as the file is in the published order"
                if self._swapped
                else "Pass swapped=True if the file holds the false logit where the true one belongs"
            )
            + "; or check_orientation=False if "
            + (
                "its queries do not begin with a positive document"
                if self._relevant is None
                else "the teacher is meant to disagree with these judgments"
            ),
        )


def read_msmarco_tsv(
    path: PathType,
    queries: PathType | Mapping[str, str],
    documents: PathType | Mapping[str, str],
    on_error: OnError = "raise",
    *,
    swapped: bool = False,
    titles: bool = True,
    relevant: Relevant | None = None,
    check_orientation: bool = True,
    report: ReadReport | None = None,
    advice: str = _ADVICE,
) -> Iterator[LabelledPair]:
    """Reads InRanker's MS MARCO TSV, joined with the texts of queries and documents.

    Args:
      path: the TSV, four columns: true logit, false logit, query id, document id. A header line with the
        published column names may be there.
      queries: TSV of `id<tab>text`, BEIR folder, or a mapping from id to text.
      documents: `collection.tsv` (ids are row numbers), BEIR folder, or a mapping from id to text.
      on_error: "raise" on the first bad line, or "skip" and count.
      swapped: read a file whose first column is the false logit.
      titles: for a BEIR folder of documents, prepend the title to the text.
      relevant: query id -> ids of relevant documents, evidence for the orientation check; by default the
        first document of each query is taken to be relevant.
      check_orientation: whether to check for swapped logits.
      report: filled while reading. Without one, lines that were left out are told in a line of progress.
      advice: what the error for a bad line ends with, where that line has no advice of its own.

    Yields:
      The pairs in the file's order.

    Raises:
      InputError: with file and line, for a wrong number of columns, a logit that is not a finite number, an
        unknown id, an empty query or document; or for a file whose logits look swapped.
    """
    query_texts, document_texts = open_queries(queries), open_documents(documents, titles=titles)

    def parse(number: int, line: str) -> LabelledPair | None:
        fields = line.split("\t")
        if number == 1 and [name.strip().lower() for name in fields[:2]] == [
            "positive_score",
            "negative_score",
        ]:
            return None
        if len(fields) != 4:
            raise _BadLine("columns", f"{len(fields)} columns", f"four: {_TSV_EXPECTED}")
        true_logit, false_logit = (_number(text, name) for text, name in zip(fields, _COLUMNS, strict=False))
        query_id, document_id = fields[2].strip(), fields[3].strip()
        query = _look_up(query_texts, query_id, "query", queries)
        document = _look_up(document_texts, document_id, "document", documents)
        return _pair(query_id, document_id, query, document, false_logit, true_logit)

    yield from _read(path, parse, on_error, swapped, relevant, check_orientation, report, advice)


def read_beir_jsonl(
    path: PathType,
    on_error: OnError = "raise",
    *,
    swapped: bool = False,
    relevant: Relevant | None = None,
    check_orientation: bool = True,
    report: ReadReport | None = None,
    advice: str = _ADVICE,
) -> Iterator[LabelledPair]:
    """Reads InRanker's BEIR JSONL. Ids are hashes of the texts, as the format has none (see `text_id`).

    Args:
      path: the JSONL, with the keys `query`, `contents`, `true_logit`, `false_logit`; others are ignored.
      on_error: "raise" on the first bad line, or "skip" and count.
      swapped: read a file in which the two logits are swapped.
      relevant: query id -> ids of relevant documents (both by `text_id`), evidence for the orientation
        check; by default the first document of each query is taken to be relevant.
      check_orientation: whether to check for swapped logits.
      report: filled while reading. Without one, lines that were left out are told in a line of progress.
      advice: what the error for a bad line ends with, where that line has no advice of its own.

    Yields:
      The pairs in the file's order.

    Raises:
      InputError: with file and line, for a line that is not a JSON object, a missing key, a logit that is
        not a finite number, an empty query or document; or for a file whose logits look swapped.
    """

    def parse(_: int, line: str) -> LabelledPair:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _BadLine("json", f"not JSON ({error})", _JSONL_EXPECTED) from error
        if not isinstance(record, dict):
            raise _BadLine("json", f"a JSON {type(record).__name__}, not an object", _JSONL_EXPECTED)
        for key in _JSONL_KEYS:
            if key not in record:
                hint = did_you_mean(key, record)
                raise _BadLine("json", f"no key {key!r}", _JSONL_EXPECTED, hint.strip())
        for key in _JSONL_KEYS[:2]:
            if not isinstance(record[key], str):
                raise _BadLine("json", f"{key!r} is not a string", _JSONL_EXPECTED)
        true_logit, false_logit = (_number(record[key], key) for key in _JSONL_KEYS[2:])
        query, contents = record["query"].strip(), record["contents"].strip()
        return _pair(text_id(query), text_id(contents), query, contents, false_logit, true_logit)

    yield from _read(path, parse, on_error, swapped, relevant, check_orientation, report, advice)


def text_id(text: str) -> str:
    """The id given to a text that has none: `t` and 16 hexadecimal digits of its SHA-256.

    >>> text_id("wing lift")
    't5073bfa969cadc8d'
    """
    return "t" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def write_msmarco_tsv(path: PathType, pairs: Iterable[LabelledPair]) -> int:
    """Writes pairs in the form of InRanker's MS MARCO TSV, `positive_score negative_score query_id doc_id`.

    Streaming; the file appears whole or not at all. Logits read back as the same float32 (or float64, where they
    are no float32). The texts are not
    in this format: keep the queries and the collection.

    Args:
      path: the file; compressed where its name ends with `.gz` or `.zst`.
      pairs: the pairs, in the order to write.

    Returns:
      How many pairs were written.

    Raises:
      InputError: an id is empty or holds a tab or a line end, or a logit is not finite.
    """

    def line(pair: LabelledPair) -> str:
        for kind, identifier in (("query", pair.query_id), ("document", pair.document_id)):
            if identifier.strip() != identifier or not identifier or re.search(r"[\t\r\n]", identifier):
                raise InputError.at(
                    path, None, f"cannot write {kind} id {identifier!r}", "an id without tabs or line ends"
                )
        false_logit, true_logit = map(_shortest, pair.logits)
        return f"{true_logit}\t{false_logit}\t{pair.query_id}\t{pair.document_id}\n"

    return _write(path, pairs, line)


def write_beir_jsonl(path: PathType, pairs: Iterable[LabelledPair]) -> int:
    """Writes pairs in the form of InRanker's BEIR JSONL; as `write_msmarco_tsv`, with the texts and without ids."""

    def line(pair: LabelledPair) -> str:
        false_logit, true_logit = map(_shortest, pair.logits)
        texts = f'"query": {_quoted(pair.query)}, "contents": {_quoted(pair.document)}'
        return f'{{{texts}, "true_logit": {true_logit}, "false_logit": {false_logit}}}\n'

    return _write(path, pairs, line)


def _write(path: PathType, pairs: Iterable[LabelledPair], line: Callable[[LabelledPair], str]) -> int:
    count = 0
    with atomic_text(path) as out:
        for pair in pairs:
            if not all(abs(logit) <= _LARGEST for logit in pair.logits):  # false for a NaN too
                raise InputError.at(
                    path, None, f"cannot write the logits {pair.logits} of query {pair.query_id!r}, document "
                    f"{pair.document_id!r}", "finite logits", "Label the pair again, or leave it out",
                )  # fmt: skip
            out.write(line(pair))
            count += 1
    return count


def _shortest(logit: float) -> str:
    """The shortest decimals that read back as the same number: those of a float32 where it is one."""
    single = np.float32(logit)
    return str(single) if float(single) == logit else repr(float(logit))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_COLUMNS = ("positive_score", "negative_score")


def _number(value: object, name: str) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise _BadLine("number", f"{name} {value!r} is not a number", "two logits") from None
    if not math.isfinite(number) or abs(number) > _LARGEST:
        raise _BadLine(
            "not_finite", f"{name} is {value!r}", "finite logits", "Label the pair again, or skip it"
        )
    return number


def _look_up(texts: Mapping[str, str], identifier: str, kind: str, source: object) -> str:
    try:
        return texts[identifier]
    except KeyError:
        place = "the given mapping" if isinstance(source, Mapping) else str(source)
        raise _BadLine(
            f"unknown_{kind}", f"unknown {kind} id {identifier!r}", f"an id of {place}",
            f"Check that the labels and the {'queries' if kind == 'query' else 'collection'} belong together",
        ) from None  # fmt: skip


def _pair(
    query_id: str, document_id: str, query: str, document: str, false_logit: float, true_logit: float
) -> LabelledPair:
    if not query.strip():
        raise _BadLine("empty_query", f"query {query_id!r} is empty", "a text")
    if not document.strip():
        raise _BadLine("empty_document", f"document {document_id!r} is empty", "a text")
    for name, text in (("query", query), ("document", document)):
        # JSON can spell half of a surrogate pair, which is no text and has no UTF-8 form.
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise _BadLine("encoding", f"the {name} holds half a surrogate pair", "valid Unicode text")
    return LabelledPair(query_id, document_id, query.strip(), document.strip(), (false_logit, true_logit))


def _read(
    path: PathType,
    parse: Callable[[int, str], LabelledPair | None],
    on_error: OnError,
    swapped: bool,
    relevant: Relevant | None,
    check_orientation: bool,
    report: ReadReport | None,
    advice: str,
) -> Iterator[LabelledPair]:
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error={on_error!r}: expected 'raise' or 'skip'.")
    tells = report is None
    report = report if report is not None else ReadReport()
    report.path = str(path)
    check = OrientationCheck(path, relevant, swapped=swapped) if check_orientation else None
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        report.lines += 1
        try:
            pair = parse(number, line)
        except _BadLine as bad:
            if on_error == "skip":
                report.skip(bad.kind, f"{path}:{number}: {bad.problem}")
                continue
            raise InputError.at(path, number, bad.problem, bad.expected, bad.remedy or advice) from None
        if pair is None:
            continue
        if swapped:
            false_logit, true_logit = pair.logits
            pair = LabelledPair(
                pair.query_id, pair.document_id, pair.query, pair.document, (true_logit, false_logit)
            )
        report.pairs += 1
        report.uncentred += abs(sum(pair.logits)) > _CENTRED_TOLERANCE
        if check is not None:
            check.add(pair)
        yield pair
    if check is not None:
        report.orientation = check.finish()
    _LOG.info("%s", report.summary())
    if tells and report.skipped and report.left_out() not in _TOLD:
        _TOLD.add(report.left_out())
        announce(report.left_out())
