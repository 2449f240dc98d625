"""Reranks the head of a run with a model, restartable query by query.

The rule below the depth: the first `depth` candidates of a query are scored by the model; the others keep
their order and follow beneath the lowest of them. So reranking changes the order and never who was retrieved:
recall at cuts beyond the depth stays that of the candidates.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from inranker_jax.errors import InputError
from inranker_jax.evaluation.score_memory import ScoreMemory
from inranker_jax.progress import clock
from inranker_jax.records import Document, Qrels, Query, Run, ranking

# Gives one score a (query, document) pair, in their order; any number of pairs.
ScorePairs = Callable[[Sequence[tuple[str, str]]], np.ndarray]
# Gives an array of scores for each group of pairs, in order. A group's scores must not depend on the others; the next
# may be asked for before the scores of the one before it are there, so that no device waits for text.
ScoreGroups = Callable[[Iterable[Sequence[tuple[str, str]]]], Generator[np.ndarray, Any, None]]


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


def one_by_one(score_pairs: ScorePairs) -> ScoreGroups:
    """Scores groups with a function of pairs; a group is asked for when the one before it is scored."""
    return lambda groups: (score_pairs(group) for group in groups)


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
    work = Reranking(run, collection, depth, pairs_per_call, memory)
    work.score(one_by_one(score_pairs), progress=progress)
    return work.result()


class Reranking:
    """A reranking, cut into groups of queries that any process can score at any time.

    The groups follow from the candidates alone. A group is scored whole and by itself, so that its scores do not
    depend, to the bit, on what was finished before or on how many processes there are.

    Attributes:
      groups: the groups, each a list of query ids.
    """

    def __init__(
        self,
        run: Mapping[str, Mapping[str, float]],
        collection: Collection,
        depth: int = 1000,
        pairs_per_call: int = 2048,
        memory: ScoreMemory | None = None,
    ) -> None:
        """Cuts the groups; for the arguments and errors see `rerank`."""
        if depth < 1:
            raise InputError(f"the reranking depth must be at least 1; got {depth}.")
        check_candidates(run, collection, "candidates")
        self._collection, self._depth, self._memory = collection, depth, memory
        self._orders = {query: ranking(scores) for query, scores in run.items() if query in collection.qrels}
        self._scored: dict[str, dict[str, float]] = {}
        self.groups = list(_groups(self._orders, depth, pairs_per_call))

    def unfinished(self, among: Iterable[int] | None = None) -> list[int]:
        """Numbers of the groups still to be scored, by any process; of all, or of some."""
        if self._memory is not None:
            self._memory.refresh()
        numbers = range(len(self.groups)) if among is None else among
        return [number for number in numbers if any(self._known(q) is None for q in self.groups[number])]

    def _known(self, query: str) -> dict[str, float] | None:
        known = (self._scored if self._memory is None else self._memory).get(query)
        return (
            known if known is not None and known.keys() == set(self._orders[query][: self._depth]) else None
        )

    def score(
        self,
        score_groups: ScoreGroups,
        share: tuple[int, int] = (0, 1),
        *,
        progress: Progress | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Scores the unfinished groups of this process.

        Args:
          score_groups: the model.
          share: (index, count) of this process; group i belongs to process i mod count.
          progress: tells how far it is.
          check: called after each group, when its scores are on disk; raises to stop.

        Raises:
          InputError: a score that is not finite.
        """
        index, count = share
        todo = [number for number in self.unfinished() if number % count == index]
        under_way: deque[list[tuple[str, str]]] = deque()

        def texts() -> Iterator[list[tuple[str, str]]]:
            queries, documents = self._collection.queries, self._collection.documents
            for number in todo:
                keys = [(query, document) for query in self.groups[number] for document in self._head(query)]
                under_way.append(keys)
                yield [(queries[query].text, documents[document].contents) for query, document in keys]

        if progress is not None:
            progress.start(sum(len(self._head(query)) for number in todo for query in self.groups[number]))
        with contextlib.closing(score_groups(texts())) as parts:
            for values in parts:
                keys = under_way.popleft()
                self._keep(keys, _checked(np.asarray(values), keys))
                if progress is not None:
                    progress.advance(len(keys))
                check()
        if under_way:
            raise RuntimeError(f"the model gave no scores for {len(under_way)} groups of queries")

    def _head(self, query: str) -> list[str]:
        return self._orders[query][: self._depth]

    def _keep(self, keys: Sequence[tuple[str, str]], values: np.ndarray) -> None:
        scores: dict[str, dict[str, float]] = {}
        for (query, document), value in zip(keys, values.tolist(), strict=True):
            scores.setdefault(query, {})[document] = value
        if self._memory is not None:
            self._memory.add(scores)
        else:
            self._scored.update(scores)

    def result(self) -> Run:
        """All queries reranked; see `rerank`. Every group must be finished."""
        return {
            query: _append(self._known(query) or {}, order[self._depth :])
            for query, order in self._orders.items()
        }


def _groups(orders: Mapping[str, list[str]], depth: int, size: int) -> Iterator[list[str]]:
    group: list[str] = []
    pairs = 0
    for query, order in orders.items():
        if not order:
            continue
        group.append(query)
        pairs += len(order[:depth])
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
