"""Ranking measures by trec_eval (through pytrec_eval), with the conventions of published BEIR figures.

- nDCG has linear gain, `rel / log2(rank + 1)`, and the ideal ranking is over all judged documents. The
  InRanker thesis prints `2^rel - 1` in equation 6; `gain="exponential"` computes that.
- Scores are compared as float32, and ties are broken by document id, descending.
- A judged query that is missing from the run scores 0 and counts in the mean.
- A document with the id of its query is dropped, as BEIR does: ArguAna's and Quora's queries are documents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.records import Qrels, ranking

DEFAULT_MEASURES = ("ndcg_cut_10", "ndcg_cut_20", "recip_rank_10", "map", "P_10", "recall_100", "recall_1000")
GAINS = ("linear", "exponential")

_PLAIN = ("map", "ndcg", "recip_rank", "Rprec", "bpref")
_WITH_CUT = ("ndcg_cut", "map_cut", "recall", "P", "success", "recip_rank")
_LABELS = {
    "ndcg_cut": "nDCG",
    "map_cut": "MAP",
    "recall": "R",
    "P": "P",
    "success": "Success",
    "recip_rank": "MRR",
}
_PLAIN_LABELS = {"map": "MAP", "ndcg": "nDCG", "recip_rank": "MRR", "Rprec": "Rprec", "bpref": "bpref"}
_MAX_EXPONENTIAL_GRADE = 16

PerQuery = dict[str, dict[str, float]]


def label(measure: str) -> str:
    """The name that tables print.

    >>> label("ndcg_cut_10"), label("recip_rank_10"), label("map")
    ('nDCG@10', 'MRR@10', 'MAP')
    """
    family, cut = _parse(measure)
    return f"{_LABELS[family]}@{cut}" if cut else _PLAIN_LABELS[family]


def evaluate(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    measures: Sequence[str] = DEFAULT_MEASURES,
    gain: str = "linear",
    *,
    drop_identical_ids: bool = True,
) -> PerQuery:
    """Measures a run on every judged query.

    Args:
      run: query id -> document id -> score. Queries without judgments are ignored.
      qrels: query id -> document id -> grade; grades below 1 mean not relevant.
      measures: trec_eval's names, such as "ndcg_cut_10", "recall_100", "map", "P_10"; "recip_rank_10" is the
        reciprocal rank of the first relevant document among the first ten (MRR@10).
      gain: "linear" (trec_eval) or "exponential" (`2^rel - 1`, in the nDCG measures only).
      drop_identical_ids: drop documents whose id is the id of their query, as BEIR does.

    Returns:
      query id -> measure -> value from 0 to 1, for the queries of `qrels` in their order.

    Raises:
      InputError: an unknown measure or gain, a score that is not a number, or a grade above 16 with the
        exponential gain.
    """
    import pytrec_eval

    families = {measure: _parse(measure) for measure in measures}
    if gain not in GAINS:
        raise InputError(
            f"unknown gain {gain!r}.{did_you_mean(gain, GAINS)} Choose one of {', '.join(GAINS)}."
        )
    judged = {
        query: {document: int(grade) for document, grade in grades.items()}
        for query, grades in qrels.items()
        if grades
    }
    if gain == "exponential":
        judged = _exponential(judged)
    kept = {
        query: _scores_of(query, run[query], drop_identical_ids) for query in judged if run.get(query)
    }  # fmt: skip
    kept = {query: scores for query, scores in kept.items() if scores}

    values: PerQuery = {query: dict.fromkeys(measures, 0.0) for query in qrels}
    cuts = {cut if family == "recip_rank" else 0 for family, cut in families.values()}
    for cut in sorted(cuts):
        head = kept if not cut else {query: _head(scores, cut) for query, scores in kept.items()}
        wanted = {
            measure: "recip_rank" if cut else measure
            for measure, (family, own) in families.items()
            if (own if family == "recip_rank" else 0) == cut
        }
        evaluator: Any = pytrec_eval.RelevanceEvaluator(judged, set(wanted.values()))
        for query, row in evaluator.evaluate(head).items():
            for measure, name in wanted.items():
                values[query][measure] = float(row[name])
    return values


def aggregate(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over the queries, one per measure; empty without queries.

    >>> aggregate({"q1": {"map": 1.0}, "q2": {"map": 0.5}})
    {'map': 0.75}
    """
    return mean_rows(per_query.values())


def mean_rows(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each measure over rows that hold the same measures."""
    rows = list(rows)
    return {measure: float(np.mean([row[measure] for row in rows])) for measure in (rows[0] if rows else ())}


def identical_ids(run: Mapping[str, Mapping[str, float]], qrels: Qrels) -> tuple[int, int]:
    """Counts what `drop_identical_ids` removes: (documents with their query's id, those judged relevant).

    The second count is a warning: queries that are documents are not judged relevant to themselves, so ids of
    such a collection coincide by accident.
    """
    dropped = [query for query, scores in run.items() if query in qrels and query in scores]
    return len(dropped), sum(qrels[query].get(query, 0) > 0 for query in dropped)


def _parse(measure: str) -> tuple[str, int]:
    if measure in _PLAIN:
        return measure, 0
    found = re.fullmatch(r"(.+)_([1-9][0-9]*)", measure)
    if found and found[1] in _WITH_CUT:
        return found[1], int(found[2])
    options = [*_PLAIN, *(f"{family}_10" for family in _WITH_CUT)]
    raise InputError(
        f"unknown measure {measure!r}.{did_you_mean(measure, options)} Known: {', '.join(_PLAIN)}, and with "
        f"any cut in place of 10: {', '.join(options[len(_PLAIN):])}."
    )  # fmt: skip


def _scores_of(query: str, scores: Mapping[str, float], drop_identical_ids: bool) -> dict[str, float]:
    kept = {document: float(score) for document, score in scores.items()}
    for document, score in kept.items():
        if math.isnan(score):
            raise InputError(f"the score of document {document!r} for query {query!r} is not a number (NaN).")
    if drop_identical_ids:
        kept.pop(query, None)
    return kept


def _head(scores: dict[str, float], cut: int) -> dict[str, float]:
    return {document: scores[document] for document in ranking(scores)[:cut]}


def _exponential(qrels: Qrels) -> Qrels:
    """Grades as gains `2^rel - 1`: linear gain over these is exponential gain over the grades."""
    highest = max((grade for grades in qrels.values() for grade in grades.values()), default=0)
    if highest > _MAX_EXPONENTIAL_GRADE:
        raise InputError(f"exponential gain is for grades up to {_MAX_EXPONENTIAL_GRADE}; got {highest}.")
    return {
        query: {document: 2 ** max(grade, 0) - 1 for document, grade in grades.items()}
        for query, grades in qrels.items()
    }
