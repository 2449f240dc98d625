"""Looks through teacher labels before a student is trained on them: bad labels cost a run.

`verify` reads a source once and holds 22 bytes a pair. What it finds is an error, which a script should stop
at, or a note. Errors: pairs that cannot be read or have no finite label, swapped logits, a positive among the
negatives, a pair listed twice, one and the same margin everywhere, margins that disagree with judgments.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from inranker_jax.corpora.inranker import OrientationCheck
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.labeling.verification_sources import PROBLEMS, LabelSource, Problems
from inranker_jax.records import LabelledPair, Qrels

POSITIVES = ("first", "qrels", "none")
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
# Fewer judged queries than this prove nothing.
MIN_QUERIES = OrientationCheck.MIN_QUERIES
_CENTRED_TOLERANCE = 1e-3
_REPORT_EVERY = 100_000


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
      check: a short name for scripts, such as "duplicates".
      is_error: whether labels should not be used like this; otherwise it is a note.
      count: how many pairs, lists or lines it concerns.
      message: what was found, with an example, and what to do.
    """

    check: str
    is_error: bool
    count: int
    message: str


@dataclasses.dataclass
class Verification:
    """What is known of one set of labels.

    Attributes:
      name: what the report calls it.
      path: where it lies.
      form: its format.
      teacher: whose labels, where there are several.
      figures: JSON-ready numbers: counts, centring, quantiles, agreement.
      findings: errors and notes.
      positives: margins (true - false) of positives, float32.
      others: margins of all other pairs.
    """

    name: str
    path: str
    form: str
    teacher: str
    figures: dict[str, Any]
    findings: list[Finding]
    positives: np.ndarray
    others: np.ndarray

    @property
    def errors(self) -> list[Finding]:
        """Findings that are errors."""
        return [finding for finding in self.findings if finding.is_error]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name,
            "path": self.path,
            "format": self.form,
            "teacher": self.teacher,
            "ok": not self.errors,
            **self.figures,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }


@dataclasses.dataclass(slots=True)
class _Tally:
    """A count with its first example."""

    count: int = 0
    example: str = ""

    def add(self, example: str) -> None:
        self.count += 1
        self.example = self.example or example


class _Lists:
    """Takes pairs in order, and judges each query's list when it ends."""

    def __init__(self, source: LabelSource, qrels: Qrels | None, positives: str) -> None:
        self._source, self._qrels, self._positives = source, qrels, positives
        self._list: list[tuple[LabelledPair, bool]] = []
        relevant = None
        if positives == "qrels" and qrels is not None:
            relevant = {q: {d for d, grade in docs.items() if grade > 0} for q, docs in qrels.items()}
        self._orientation: OrientationCheck | None = None
        if positives != "none":
            self._orientation = OrientationCheck(source.path, relevant)
        self.swapped = ""
        self.margins = array.array("f")
        self.kinds = array.array("b")  # 1 for a positive
        self.judged = array.array("b")  # 1 relevant, 0 another document of a judged query, -1 not judged
        self.keys = bytearray()  # 16 bytes a pair
        self.queries = bytearray()  # 8 bytes a list
        self.sizes: dict[int, int] = {}
        self.sums = [0.0, 0.0, 0]  # of z_false + z_true: total, largest, how many are not 0
        self.among, self.relevant_among = _Tally(), _Tally()
        self.twice, self.same_text, self.no_positive = _Tally(), _Tally(), _Tally()
        self.top, self.with_both, self.difference = 0, 0, 0.0
        self.accuracies = array.array("d")
        self.concordant, self.comparisons, self.judged_lists = 0.0, 0, 0

    def add(self, pair: LabelledPair, marked: bool) -> None:
        """Takes the next pair; `marked` if it opens its list, or is stored as a positive."""
        if self._list and self._list[0][0].query_id != pair.query_id:
            self.close()
        grades = None if self._qrels is None else self._qrels.get(pair.query_id)
        relevant = grades is not None and grades.get(pair.document_id, 0) > 0
        positive = {"first": marked, "qrels": relevant, "none": False}[self._positives]
        self._list.append((pair, positive))
        self.margins.append(pair.logits[1] - pair.logits[0])
        self.kinds.append(positive)
        self.judged.append(-1 if grades is None else int(relevant))
        self.keys += _digest(f"{len(pair.query_id)}:{pair.query_id}{pair.document_id}", 16)
        total = abs(pair.logits[0] + pair.logits[1])
        self.sums = [
            self.sums[0] + total,
            max(self.sums[1], total),
            self.sums[2] + (total > _CENTRED_TOLERANCE),
        ]
        if self._orientation is not None and not self.swapped:
            try:
                self._orientation.add(pair)
            except InputError as error:
                self.swapped = _swapped(error, self._source.path)

    def finish(self) -> None:
        """Ends the last list."""
        self.close()
        if self._orientation is not None and not self.swapped:
            try:
                self._orientation.finish()
            except InputError as error:
                self.swapped = _swapped(error, self._source.path)

    def close(self) -> None:
        """Judges the list that has ended."""
        if not self._list:
            return
        pairs, self._list = self._list, []
        query_id = pairs[0][0].query_id
        self.queries += _digest(query_id, 8)
        self.sizes[len(pairs)] = self.sizes.get(len(pairs), 0) + 1
        positives = [pair for pair, positive in pairs if positive]
        others = [pair for pair, positive in pairs if not positive]
        if self._positives != "none":
            if not positives:
                self.no_positive.add(f"query {query_id!r}")
            self._look_for_positives(positives, others)
        self._look_for_repetition([pair for pair, _ in pairs])
        if positives and others:
            best = max(_margin(pair) for pair in positives)
            self.top += best > max(_margin(pair) for pair in others)
            self.with_both += 1
            self.difference += _mean(positives) - _mean(others)
        grades = None if self._qrels is None else self._qrels.get(query_id)
        if grades is not None:
            self.judged_lists += 1
            self._compare([(_margin(pair), grades.get(pair.document_id, 0)) for pair, _ in pairs])

    def _look_for_positives(self, positives: list[LabelledPair], others: list[LabelledPair]) -> None:
        ids = {pair.document_id for pair in positives}
        texts = {pair.document for pair in positives} if self._source.has_texts else set()
        grades = (self._qrels or {}).get((positives or others)[0].query_id, {})
        for pair in others:
            where = f"query {pair.query_id!r}, document {pair.document_id!r}"
            if pair.document_id in ids:
                self.among.add(f"{where} is the positive itself")
            elif pair.document in texts:
                self.among.add(f"{where} has the positive's text")
            elif grades.get(pair.document_id, 0) > 0:
                self.relevant_among.add(f"{where} is judged {grades[pair.document_id]}")

    def _look_for_repetition(self, pairs: list[LabelledPair]) -> None:
        ids: set[str] = set()
        texts: set[str] = set()
        for pair in pairs:
            where = f"query {pair.query_id!r}, document {pair.document_id!r}"
            if pair.document_id in ids:
                self.twice.add(where)
            elif self._source.has_texts and pair.document in texts:
                self.same_text.add(where)
            ids.add(pair.document_id)
            texts.add(pair.document)

    def _compare(self, judged: list[tuple[float, int]]) -> None:
        """Shares of document pairs with different grades that the margins order alike; a tie counts half."""
        agreed, count = 0.0, 0
        for margin, grade in judged:
            if grade > 0:
                for other, lower in judged:
                    if max(lower, 0) < grade:
                        agreed += 0.5 if margin == other else float(margin > other)
                        count += 1
        if count:
            self.accuracies.append(agreed / count)
            self.concordant += agreed
            self.comparisons += count


def verify(
    source: LabelSource,
    name: str,
    *,
    qrels: Qrels | None = None,
    positives: str = "first",
    on_progress: Callable[[int], None] | None = None,
) -> Verification:
    """Looks through one source of labels.

    Args:
      source: see `open_sources`.
      name: what the report calls it.
      qrels: judgments of the labelled queries. A document that they do not list counts as not relevant.
      positives: which documents are positives: "first" (each list's first, as published files have it, and what
        a label folder stores), "qrels" (those judged relevant) or "none" (unknown).
      on_progress: called every 100,000 pairs with the number of pairs read.

    Returns:
      The figures and findings.

    Raises:
      InputError: the source cannot be read at all, or the options contradict each other.
    """
    if positives not in POSITIVES:
        raise InputError(
            f"positives={positives!r}.{did_you_mean(positives, POSITIVES)} Expected one of {', '.join(POSITIVES)}."
        )
    if positives == "qrels" and qrels is None:
        raise InputError("positives=qrels needs judgments: give qrels.")
    problems = Problems({})
    lists = _Lists(source, qrels, positives)
    for number, (pair, marked) in enumerate(source.pairs(problems), start=1):
        lists.add(pair, marked)
        if on_progress is not None and number % _REPORT_EVERY == 0:
            on_progress(number)
    lists.finish()
    margins = np.frombuffer(lists.margins, np.float32) if lists.margins else np.zeros(0, np.float32)
    kinds = np.frombuffer(lists.kinds, np.int8) if lists.kinds else np.zeros(0, np.int8)
    figures, repeated = _figures(lists, margins, kinds, qrels), _repeated(lists)
    findings = _findings(source, problems, lists, figures, repeated, qrels)
    return Verification(
        name,
        source.path,
        source.form,
        source.teacher,
        figures,
        findings,
        margins[kinds > 0],
        margins[kinds == 0],
    )


def _figures(lists: _Lists, margins: np.ndarray, kinds: np.ndarray, qrels: Qrels | None) -> dict[str, Any]:
    queries = np.frombuffer(bytes(lists.queries), np.uint64)
    count = len(margins)
    figures: dict[str, Any] = {
        "pairs": count,
        "lists": len(queries),
        "queries": len(np.unique(queries)),
        "list_sizes": {str(size): lists.sizes[size] for size in sorted(lists.sizes)},
        "centred": count > 0 and lists.sums[2] == 0,
        "uncentred_pairs": lists.sums[2],
        "mean_abs_sum": lists.sums[0] / count if count else None,
        "margin": {"positives": summary(margins[kinds > 0]), "others": summary(margins[kinds == 0])},
        "positive_on_top": lists.top / lists.with_both if lists.with_both else None,
        "positive_minus_others": lists.difference / lists.with_both if lists.with_both else None,
    }
    if qrels is not None:
        judged = np.frombuffer(lists.judged, np.int8) if lists.judged else np.zeros(0, np.int8)
        accuracies = np.frombuffer(lists.accuracies, np.float64) if lists.accuracies else np.zeros(0)
        figures["qrels"] = {
            "judged_lists": lists.judged_lists,
            "compared_queries": len(accuracies),
            "relevant_pairs": int((judged == 1).sum()),
            "pairwise_accuracy": float(accuracies.mean()) if len(accuracies) else None,
            "pairwise_accuracy_of_all_pairs": lists.concordant / lists.comparisons
            if lists.comparisons
            else None,
            "auc": auc(margins[judged == 1], margins[judged == 0]),
        }
    return figures


def auc(relevant: np.ndarray, others: np.ndarray) -> float | None:
    """Probability that a relevant pair's margin exceeds another's, ties half (Mann-Whitney U / nm).

    >>> auc(np.array([1.0, 3.0]), np.array([0.0, 1.0]))
    0.875
    """
    if not len(relevant) or not len(others):
        return None
    ordered = np.sort(others)
    below = np.searchsorted(ordered, relevant, "left") + np.searchsorted(ordered, relevant, "right")
    return float(below.mean() / 2 / len(others))


def summary(margins: np.ndarray) -> dict[str, Any]:
    """Count, mean, standard deviation and quantiles of margins; None where there are none."""
    if not len(margins):
        return {"count": 0, "mean": None, "std": None, "quantiles": None}
    wide = margins.astype(np.float64)
    quantiles = np.quantile(wide, QUANTILES)
    return {
        "count": len(margins),
        "mean": float(wide.mean()),
        "std": float(wide.std()),
        "quantiles": {f"{q:g}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
    }


def _repeated(lists: _Lists) -> tuple[int, str]:
    """Pairs that were listed before, anywhere: how many, and the numbers of the first two alike."""
    keys = np.frombuffer(lists.keys, np.uint64).reshape(-1, 2)
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal keys, the earlier comes first
    ordered = keys[order, 0]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    same = same[keys[order[same], 1] == keys[order[same + 1], 1]]
    if not same.size:
        return 0, ""
    first = same[np.argmin(order[same + 1])]
    return int(same.size), f"pairs {order[first] + 1} and {order[first + 1] + 1} of those read"


def _findings(
    source: LabelSource,
    problems: Problems,
    lists: _Lists,
    figures: dict[str, Any],
    repeated: tuple[int, str],
    qrels: Qrels | None,
) -> list[Finding]:
    found: list[Finding] = []

    def error(check: str, count: int, message: str) -> None:
        if count:
            found.append(Finding(check, True, count, message))

    def note(check: str, count: int, message: str) -> None:
        if count:
            found.append(Finding(check, False, count, message))

    pairs = figures["pairs"]
    error("empty", int(not pairs), "there is not one labelled pair.")
    for kind, count in sorted(problems.counts.items()):
        check = "finite" if kind == "not_finite" else kind
        error(check, count, f"{count} {PROBLEMS[kind]}. The first problem: {problems.first}")
    error("swapped", int(bool(lists.swapped)), lists.swapped)
    error(
        "positive_among_negatives",
        lists.among.count,
        f"{lists.among.count} negatives are their query's positive: {lists.among.example}. Leave it and its "
        "duplicates out when negatives are sampled.",
    )
    error(
        "relevant_among_negatives",
        lists.relevant_among.count,
        f"{lists.relevant_among.count} negatives are relevant by the qrels: {lists.relevant_among.example}. "
        "Leave every judged positive out when negatives are sampled.",
    )
    _repetitions(source, lists, repeated, error, note)
    error(
        "no_positive",
        lists.no_positive.count,
        f"{lists.no_positive.count} lists have no positive: {lists.no_positive.example}.",
    )
    spread = [part for part in figures["margin"].values() if part["count"]]
    values = {part["quantiles"][edge] for part in spread for edge in ("0", "1")}
    error(
        "constant",
        int(pairs > 1 and len(values) == 1),
        f"every pair has the margin {next(iter(values), 0):g}: there is nothing to learn from it.",
    )
    if qrels is not None:
        _agreement(figures["qrels"], error, note)
    note(
        "no_texts",
        0 if source.has_texts else pairs,
        "only ids were compared: give the queries and the corpus to compare texts too.",
    )
    if len(figures["list_sizes"]) > 1:
        sizes = sorted(map(int, figures["list_sizes"]))
        usual = max(sizes, key=lambda size: figures["list_sizes"][str(size)])
        count = figures["lists"] - figures["list_sizes"][str(usual)]
        many = f"{count} of {figures['lists']} lists have another number of documents than {usual}"
        note("list_sizes", count, f"{many} ({sizes[0]} to {sizes[-1]}).")
    return found


Report = Callable[[str, int, str], None]


def _repetitions(
    source: LabelSource, lists: _Lists, repeated: tuple[int, str], error: Report, note: Report
) -> None:
    count, example = repeated
    inside = lists.twice.count
    apart = count - inside
    error(
        "duplicates",
        inside,
        f"{inside} pairs stand twice in one list: {lists.twice.example}. They weigh double; leave one out.",
    )
    message = f"{apart} pairs stand in two lists: {example}."
    if source.has_ids:
        error("duplicates", apart, f"{message} They weigh double; leave one out.")
    else:
        note("duplicates", apart, f"{message} They weigh double.")
    note(
        "same_text",
        lists.same_text.count,
        f"{lists.same_text.count} documents have the text of another one of their list: {lists.same_text.example}.",
    )
    parts = len(lists.queries) // 8 - len(np.unique(np.frombuffer(lists.queries, np.uint64)))
    note(
        "scattered",
        parts,
        f"{parts} times a query begins again after others; each of its parts was taken for a list.",
    )


def _agreement(figures: dict[str, Any], error: Report, note: Report) -> None:
    accuracy, queries = figures["pairwise_accuracy"], figures["compared_queries"]
    if not figures["judged_lists"]:
        error("qrels", 1, "no labelled query is judged: these qrels belong to other queries.")
    elif accuracy is None:
        note("qrels", 1, "no list holds both a relevant document and another: nothing to compare.")
    elif accuracy < 0.5:
        message = (
            f"margins order a relevant and another document of a query rightly only {accuracy:.1%} of the time "
            f"({queries} queries): below chance. Look for swapped logits, the wrong teacher or the wrong qrels."
        )
        (error if queries >= MIN_QUERIES else note)("qrels", queries, message)


def _swapped(error: InputError, path: str) -> str:
    """The evidence out of the check's error, whose advice is for callers of the readers."""
    evidence = str(error).removeprefix(f"{path}: ").split(". Expected")[0]
    return f"{evidence}. Exchange the two columns, or label again."


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def _margin(pair: LabelledPair) -> float:
    return pair.logits[1] - pair.logits[0]


def _mean(pairs: list[LabelledPair]) -> float:
    return math.fsum(map(_margin, pairs)) / len(pairs)
