"""FlagEmbedding's training files: `{"query", "pos": [], "neg": [], "pos_scores": [], "neg_scores": []}` a line.

Neither queries nor documents have ids there; they get `text_id`. A score is the teacher's margin m = true -
false logit, and becomes the logits (-m/2, +m/2); what a margin loses is the logits' common shift, which no
loss on centred logits sees.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping

from inranker_jax.corpora import files, rows
from inranker_jax.corpora.inranker import text_id
from inranker_jax.corpora.malformed import BadRow, MalformedReport, OnMalformed, RowPolicy
from inranker_jax.errors import InputError
from inranker_jax.records import Document, LabelledPair, PathType, Query, atomic_text

_EXPECTED = '{"query": text, "pos": [texts], "neg": [texts]}'


def query(row: rows.Fields) -> Query:
    """The query of a row, its id `text_id`.

    Raises:
      BadRow: it is missing, no text, or empty.
    """
    text = rows.text_of(row, ("query",)).strip()
    if not text:
        raise BadRow("empty_text", "the query is empty", "a text")
    return Query(text_id(text), text)


def documents(row: rows.Fields) -> tuple[list[Document], list[Document]]:
    """The positive and the negative documents of a row, their ids `text_id`.

    Raises:
      BadRow: a list is missing (`neg` may be) or holds something else than texts, or there is no positive.
    """
    positives, negatives = _documents(row, "pos", required=True), _documents(row, "neg", required=False)
    if not positives:
        raise BadRow("missing_field", "'pos' is empty", "at least one positive document")
    return positives, negatives


def _documents(row: rows.Fields, name: str, *, required: bool) -> list[Document]:
    if name not in row and required:
        raise BadRow("missing_field", f"no {name!r} among the fields {sorted(row)}", _EXPECTED)
    texts = row.get(name)
    if texts is None and not required:
        return []
    if not isinstance(texts, list):
        raise BadRow("bad_field", f"{name!r} is not a list", _EXPECTED)
    found = []
    for text in texts:
        contents = rows.text_of({name: text}, (name,)).strip()
        found.append(Document(text_id(contents), contents))
    return found


def read(
    path: PathType, *, on_malformed: OnMalformed = "raise", report: MalformedReport | None = None
) -> Iterator[LabelledPair]:
    """Yields the labelled pairs of a file with scores: a row's positives first, then its negatives.

    Args:
      path: the JSONL, `.gz` and `.zst` included; a glob or a comma-separated list is read in order.
      on_malformed: "raise" at the first bad row, or "skip" and count it in `report`.
      report: filled while reading.

    Raises:
      InputError: naming file and line, for a row that cannot be used or has no scores.
    """
    policy = RowPolicy(on_malformed, report if report is not None else MalformedReport(), os.fspath(path))
    for name in files.find(path):
        source = rows.JsonLines(name)
        for number, _, raw in source.rows():
            try:
                pairs = _pairs(source.fields(raw))
            except BadRow as bad:
                policy.bad(name, number, bad)
                continue
            yield from pairs


def _pairs(row: rows.Fields) -> list[LabelledPair]:
    asked = query(row)
    positives, negatives = documents(row)
    pairs = []
    for kind, found in (("pos", positives), ("neg", negatives)):
        for document, margin in zip(found, _scores(row, f"{kind}_scores", len(found)), strict=True):
            if not document.text:
                raise BadRow("empty_text", f"a document of {kind!r} is empty", "a text")
            logits = (-margin / 2, margin / 2)
            pairs.append(LabelledPair(asked.id, document.id, asked.text, document.text, logits))
    return pairs


def _scores(row: rows.Fields, name: str, count: int) -> list[float]:
    scores = row.get(name)
    if scores is None and not count:
        return []
    if scores is None:
        raise BadRow(
            "missing_field", f"no {name!r}: the row has no teacher labels", "one score a document",
            "Label the pairs first: `python -m inranker_jax.label` reads this file as queries and corpus",
        )  # fmt: skip
    if not isinstance(scores, list) or len(scores) != count:
        have = len(scores) if isinstance(scores, list) else "no list"
        raise BadRow("bad_field", f"{name!r}: {have} scores for {count} documents", "one score a document")
    for score in scores:
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if not number or not math.isfinite(score):
            raise BadRow("bad_field", f"{name!r} holds {score!r}", "finite numbers")
    return [float(score) for score in scores]


def write(
    path: PathType,
    pairs: Iterable[LabelledPair],
    *,
    relevant: Mapping[str, Collection[str]] | None = None,
    prompt: str | None = None,
) -> int:
    """Writes labelled pairs, one row a query; streaming, and the file appears whole or not at all.

    Args:
      path: the JSONL to write; compressed where the name ends with `.gz` or `.zst`.
      pairs: the pairs, each query's consecutive.
      relevant: query id -> ids of its positives; by default the first document of a query is its positive.
      prompt: the instruction to put into each row's `prompt`, if any.

    Returns:
      How many rows were written.

    Raises:
      InputError: a query's pairs are not consecutive, or it has no positive among its documents.
    """
    seen: set[str] = set()
    with atomic_text(path) as out:
        for query_id, group in itertools.groupby(pairs, key=lambda pair: pair.query_id):
            if query_id in seen:
                raise InputError.at(
                    path, None, f"cannot write: the pairs of query {query_id!r} are not consecutive",
                    "all pairs of a query one after another", "Sort the pairs by query",
                )  # fmt: skip
            seen.add(query_id)
            found = list(group)
            known = {found[0].document_id} if relevant is None else set(relevant.get(query_id, ()))
            row: dict[str, object] = {"query": found[0].query}
            for kind, positive in (("pos", True), ("neg", False)):
                chosen = [pair for pair in found if (pair.document_id in known) == positive]
                row[kind] = [pair.document for pair in chosen]
                row[f"{kind}_scores"] = [pair.logits[1] - pair.logits[0] for pair in chosen]
            if not row["pos"]:
                raise InputError.at(
                    path, None, f"cannot write query {query_id!r}: none of its documents is relevant",
                    "a positive among the documents of each query", "Leave the query out",
                )  # fmt: skip
            ordered = {key: row[key] for key in ("query", "pos", "neg", "pos_scores", "neg_scores")}
            if prompt is not None:
                ordered["prompt"] = prompt
            out.write(json.dumps(ordered, ensure_ascii=False) + "\n")
    return len(seen)
