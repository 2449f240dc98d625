"""Reranks the head of a run with a model, restartable query by query.

The rule below the depth: the first `depth` candidates of a query are scored by the model; the others keep
their order and follow beneath the lowest of them. So reranking changes the order and never who was retrieved:
recall at cuts beyond the depth stays that of the candidates.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from inranker_jax.errors import InputError
from inranker_jax.progress import clock
from inranker_jax.records import Document, Qrels, Query, Run, ranking

# Gives one score a (query, document) pair, in their order; any number of pairs.
ScorePairs = Callable[[Sequence[tuple[str, str]]], np.ndarray]


class Collection(Protocol):
    """What reranking and reports need of a collection; `corpora.beir.BeirCollection` is one."""

    @property
    def name(self) -> str: ...
    @property
    def documents(self) -> dict[str, Document]: ...
    @property
    def queries(self) -> dict[str, Query]: ...
    @property
    def qrels(self) -> Qrels: ...


def check_candidates(run: Mapping[str, Mapping[str, float]], collection: Collection, source: str) -> None:
    """Raises InputError, naming `source`, when a run names a judged query or a document without a text."""
    for query, scores in run.items():
        if query not in collection.qrels:
            continue
        if query not in collection.queries:
            raise InputError(
                f"{source}: query {query!r} is judged but not among the queries of {collection.name!r}. "
                "Give the run, the judgments and the queries of one dataset."
            )
        for document in scores:
            if document not in collection.documents:
                raise InputError(
                    f"{source}: document {document!r} (query {query!r}) is not in the corpus of "
                    f"{collection.name!r}. Give a run over this corpus."
                )


def rerank(
    run: Mapping[str, Mapping[str, float]],
    collection: Collection,
    score_pairs: ScorePairs,
    depth: int = 1000,
    *,
    pairs_per_call: int = 2048,
    memory: ScoreMemory | None = None,
    progress: Progress | None = None,
) -> Run:
    """Reranks the first `depth` candidates of every judged query.

    Args:
      run: candidates, query id -> document id -> score. Queries without judgments are left out of the result.
      collection: the texts, and the judgments that say which queries matter.
      score_pairs: the model; called with whole queries, at least `pairs_per_call` pairs while there are.
      depth: how many candidates of each query the model scores, at least 1.
      pairs_per_call: how many pairs to gather before calling the model (and before the next progress line).
      memory: keeps finished queries on disk, so that an interrupted run goes on where it was.
      progress: tells how far it is.

    Returns:
      query id -> document id -> score, best first. Candidates below the depth get scores under the lowest
      reranked one, in their old order; these also differ in float32.

    Raises:
      InputError: an unknown query or document, or a score that is not finite.
    """
    if depth < 1:
        raise InputError(f"the reranking depth must be at least 1; got {depth}.")
    check_candidates(run, collection, "candidates")
    orders = {query: ranking(scores) for query, scores in run.items() if query in collection.qrels}
    scored: dict[str, dict[str, float]] = {query: {} for query, order in orders.items() if not order}
    for query, order in orders.items():
        known = memory.get(query) if memory is not None else None
        if known is not None and known.keys() == set(order[:depth]):
            scored[query] = known
    todo = [query for query in orders if query not in scored]
    if progress is not None:
        progress.start(sum(len(orders[query][:depth]) for query in todo))
    for group in _groups(todo, orders, depth, pairs_per_call):
        keys = [(query, document) for query in group for document in orders[query][:depth]]
        texts = [(collection.queries[q].text, collection.documents[d].contents) for q, d in keys]
        values = _checked(np.asarray(score_pairs(texts)), keys)
        for query in group:
            scored[query] = {}
        for (query, document), value in zip(keys, values.tolist(), strict=True):
            scored[query][document] = value
        if memory is not None:
            memory.add({query: scored[query] for query in group})
        if progress is not None:
            progress.advance(len(keys))
    return {query: _append(scored[query], order[depth:]) for query, order in orders.items()}


def _groups(
    queries: list[str], orders: Mapping[str, list[str]], depth: int, size: int
) -> Iterator[list[str]]:
    group: list[str] = []
    pairs = 0
    for query in queries:
        group.append(query)
        pairs += len(orders[query][:depth])
        if pairs >= size:
            yield group
            group, pairs = [], 0
    if group:
        yield group


def _checked(values: np.ndarray, keys: Sequence[tuple[str, str]]) -> np.ndarray:
    if values.shape != (len(keys),):
        raise InputError(
            f"the scorer returned shape {values.shape} for {len(keys)} pairs; expected ({len(keys)},)."
        )
    values = values.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        query, document = keys[int(bad[0])]
        raise InputError(
            f"the model's score of query {query!r}, document {document!r} is {values[bad[0]]} ({len(bad)} of "
            f"{len(keys)} scores are not finite). T5 overflows in float16: compute in bfloat16 or float32."
        )
    return values


def _append(scores: Mapping[str, float], rest: Sequence[str]) -> dict[str, float]:
    result = {document: float(scores[document]) for document in ranking(scores)}
    lowest = np.float32(min(result.values(), default=0.0))
    for document in rest:
        lowest = min(np.float32(lowest - np.float32(1)), np.nextafter(lowest, np.float32(-np.inf)))
        result[document] = float(lowest)
    return result


class Progress:
    """Prints a line now and then: pairs done, pairs a second, time left.

    Args:
      name: what is being scored; begins every line.
      announce: prints a line.
      every: least number of seconds between two lines.
    """

    def __init__(
        self,
        name: str,
        announce: Callable[[str], None],
        every: float = 10.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._announce, self._every, self._now = name, announce, every, now
        self.start(0)

    def start(self, pairs: int) -> None:
        """Begins to count; `pairs` are to do."""
        self._total, self._done = pairs, 0
        self._began = self._last = self._now()

    def advance(self, pairs: int) -> None:
        """Counts `pairs` more as done."""
        self._done += pairs
        now = self._now()
        if now - self._last < self._every and self._done < self._total:
            return
        self._last = now
        rate = self._done / max(now - self._began, 1e-9)
        left = f"{clock((self._total - self._done) / rate)} left" if self._done < self._total else "done"
        self._announce(f"{self._name}: {self._done}/{self._total} pairs  {rate:.1f} pairs/s  {left}")


class ScoreMemory:
    """Finished queries of one reranking, in a file that grows by a line a query.

    A file of other settings (another `fingerprint`) is started anew; an unfinished last line, left by a kill
    in the middle of a write, is dropped and that query scored again.

    Args:
      path: the file; folders are made.
      fingerprint: whatever decides the scores, as one string.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._known, whole = _remembered(self._path, fingerprint)
        self._file: BinaryIO = open(self._path, "r+b" if whole else "wb")  # noqa: SIM115 - closed by `close`
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._append_row({"fingerprint": fingerprint})

    def __len__(self) -> int:
        return len(self._known)

    def get(self, query: str) -> dict[str, float] | None:
        """Scores of a finished query, or None."""
        return self._known.get(query)

    def add(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Keeps finished queries; they are on disk when this returns."""
        for query, documents in scores.items():
            self._known[query] = dict(documents)
            self._append_row({"query": query, "scores": self._known[query]})
        self._file.flush()
        os.fsync(self._file.fileno())

    def _append_row(self, row: object) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")

    def close(self) -> None:
        """Closes the file and leaves it for the next time."""
        self._file.close()


def _remembered(path: Path, fingerprint: str) -> tuple[dict[str, dict[str, float]], int]:
    """Finished queries in the file, and how many of its bytes are whole lines (0: start anew)."""
    if not path.is_file():
        return {}, 0
    known: dict[str, dict[str, float]] = {}
    whole = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if number == 0:
                if row != {"fingerprint": fingerprint}:
                    return {}, 0
            elif isinstance(row, dict) and row.keys() == {"query", "scores"}:
                known[row["query"]] = row["scores"]
            else:
                break
            whole += len(line)
    return known, whole
