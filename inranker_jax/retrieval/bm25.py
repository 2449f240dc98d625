"""BM25 candidates through bm25s with Lucene's scoring, as published BEIR baselines use it (k1 0.9, b 0.4)."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from inranker_jax.corpora import Corpus
from inranker_jax.errors import InputError
from inranker_jax.records import Document, PathType, Query, Run
from inranker_jax.retrieval import index_files
from inranker_jax.retrieval.postings import Postings, build
from inranker_jax.retrieval.words import LANGUAGES, check_language, words_of

__all__ = ["LANGUAGES", "BM25Index"]

_QUERIES = 256  # queries tokenised at once


@dataclass(frozen=True)
class BM25Index:
    """An inverted index, in memory or memory-mapped. Make one with `BM25Index.build` or `BM25Index.load`.

    Attributes:
      language: whose stemmer and stop words were used.
      k1: term frequency saturation.
      b: length normalisation.
      ids: document ids, descending, so that the lower position wins a tie as trec_eval decides it.
    """

    language: str
    k1: float
    b: float
    _postings: Postings

    @property
    def ids(self) -> Sequence[str]:
        return self._postings.ids

    @classmethod
    def build(
        cls,
        documents: Iterable[Document],
        language: str = "english",
        k1: float = 0.9,
        b: float = 0.4,
        *,
        folder: PathType | None = None,
        corpus: Corpus | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> BM25Index:
        """Indexes the contents (title and text) of documents.

        Words are runs of two or more letters or digits, lower-cased, without stop words, stemmed. Documents
        are read once and not kept; see benchmarks/retrieval.py for memory and time.

        Args:
          documents: what to index; a document without a word is allowed and never found.
          language: one of `LANGUAGES`; only those in `words.STOP_WORDS` have stop words.
          k1: term frequency saturation, at least 0.
          b: length normalisation, from 0 to 1.
          folder: build straight into this folder and open it memory-mapped, as `save` and `load` would.
          corpus: where the documents come from: what decides them is kept with a saved index and checked on
            loading, and so is how many malformed rows were left out.
          on_progress: called with the number of documents read so far; what it raises ends the build.

        Returns:
          The index.

        Raises:
          InputError: an unknown language, parameters out of range, no documents, an id given twice, or a
            folder that holds something else.
        """
        check_language(language)
        if not (k1 >= 0 and 0 <= b <= 1):
            raise InputError(f"BM25 needs k1 >= 0 and 0 <= b <= 1; got k1={k1}, b={b}.")
        if folder is None:
            return cls(language, k1, b, build(documents, language, k1, b, on_progress=on_progress))
        with index_files.Writer(folder) as writer:
            postings = build(documents, language, k1, b, writer.allocate, on_progress)
            _finish(writer, postings, corpus, language, k1, b)
        return cls.load(folder)

    def save(self, folder: PathType, corpus: Corpus | None = None) -> None:
        """Writes the index into a folder, which appears whole or not at all.

        `bm25s.BM25.load(folder, mmap=True)` opens it too.

        Args:
          folder: a new or empty folder, or an older index, which is replaced.
          corpus: where the documents come from, as in `build`.

        Raises:
          InputError: the folder holds something else, or another process is writing it.
        """
        with index_files.Writer(folder) as writer:
            _finish(writer, self._postings, corpus, self.language, self.k1, self.b)

    @classmethod
    def load(
        cls,
        folder: PathType,
        mmap: bool = True,
        *,
        corpus: Corpus | None = None,
        language: str | None = None,
        k1: float | None = None,
        b: float | None = None,
    ) -> BM25Index:
        """Opens a saved index, and checks that it is the one that is meant.

        Args:
          folder: a folder that `save` or `build` wrote.
          mmap: leave the index on disk, where several processes share one copy in the page cache.
          corpus: where the documents must come from; None takes any. The malformed rows that were left out
            when the index was made are counted in its report.
          language: the language that it must have; None takes any.
          k1: the parameter that it must have; None takes any.
          b: the parameter that it must have; None takes any.

        Raises:
          index_files.TornIndexError: the folder is not whole.
          InputError: there is no index, or it was made of other documents, or otherwise.
        """
        state = index_files.read_state(folder)
        stored = state["identity"]
        wanted = index_files.identity_of(
            _corpus_identity(corpus),
            stored["language"] if language is None else language,
            stored["k1"] if k1 is None else k1,
            stored["b"] if b is None else b,
        )
        index_files.check_identity(folder, stored, wanted)
        postings, _ = index_files.read(folder, mmap)
        if corpus is not None:
            corpus.recall(state["left_out"])
        return cls(stored["language"], stored["k1"], stored["b"], postings)

    def search(
        self,
        queries: Iterable[Query],
        k: int = 1000,
        among: Mapping[str, Iterable[str]] | None = None,
        threads: int = 1,
    ) -> Run:
        """Finds the best `k` documents of each query.

        Documents that share no word with the query (score 0) are left out, so fewer than `k` may come back.
        The order, and who is in at the cut, is trec_eval's: score descending, then document id descending.

        Args:
          queries: what to search for.
          k: how many documents at most per query, at least 1; more than the corpus holds is fine.
          among: query id -> the only documents to rank, for collections whose judged pool is reranked. They
            are all kept, those with score 0 too; ids that the index does not hold are passed over.
          threads: how many queries are searched at a time. The result does not depend on it.

        Returns:
          query id -> document id -> BM25 score (float32 values), best first. A query without a known word has
          an empty entry (without `among`).
        """
        return dict(self.stream_search(queries, k, among, threads))

    def stream_search(
        self,
        queries: Iterable[Query],
        k: int = 1000,
        among: Mapping[str, Iterable[str]] | None = None,
        threads: int = 1,
    ) -> Iterator[tuple[str, dict[str, float]]]:
        """Yields (query id, its documents) as `search` returns them, query by query in the order given.

        Needs 4 bytes a document and thread, beside the index. See `search` for the arguments.
        """
        if k < 1:
            raise InputError(f"BM25 needs a depth k of at least 1; got {k}.")
        if threads < 1:
            raise InputError(f"BM25 needs at least 1 thread; got {threads}.")
        return self._stream(queries, k, among, threads)

    def _stream(
        self, queries: Iterable[Query], k: int, among: Mapping[str, Iterable[str]] | None, threads: int
    ) -> Iterator[tuple[str, dict[str, float]]]:
        place = {document: i for i, document in enumerate(self.ids)} if among is not None else {}
        local = threading.local()

        def one(query: Query, words: list[str]) -> tuple[str, dict[str, float]]:
            if not hasattr(local, "scores"):
                local.scores = np.zeros(len(self.ids), np.float32)
            self._score(words, local.scores, threads)
            if among is None:
                found = _candidates(local.scores, k)
            else:
                known = {place[document] for document in among.get(query.id, ()) if document in place}
                found = np.array(sorted(known), np.int64)
            return query.id, self._best(local.scores, found, k)

        stream = iter(queries)
        with ThreadPoolExecutor(threads) if threads > 1 else _NoPool() as pool:
            while batch := list(itertools.islice(stream, _QUERIES)):
                words = words_of([query.text for query in batch], self.language)
                yield from pool.map(one, batch, words)

    def _score(self, words: list[str], scores: np.ndarray, threads: int) -> None:
        """Sums the words' postings in the query's order, repeated words repeatedly, as bm25s does.

        A document occurs once in a word's postings, so both ways below round alike. The first takes twice as
        long but lets go of the interpreter's lock. On two threads both took the same time; beyond, it is taken.
        """
        scores.fill(0)
        postings = self._postings
        for number in (postings.vocabulary[word] for word in words if word in postings.vocabulary):
            part = slice(postings.indptr[number], postings.indptr[number + 1])
            if threads > 2:
                scores[postings.indices[part]] += postings.data[part]
            else:
                np.add.at(scores, postings.indices[part], postings.data[part])

    def _best(self, scores: np.ndarray, found: np.ndarray, k: int) -> dict[str, float]:
        """The best `k` of the positions `found` (ascending); a lower position wins a tie."""
        values = scores[found]
        if len(found) > k:
            cut = np.partition(values, len(values) - k)[len(values) - k]
            above, level = found[values > cut], found[values == cut]
            found = np.sort(np.concatenate([above, level[: k - len(above)]]))
            values = scores[found]
        order = np.argsort(-values, kind="stable")
        best = found[order]
        ids = self.ids
        names = ids.at(best) if isinstance(ids, index_files.DocumentIds) else [ids[i] for i in best.tolist()]
        return dict(zip(names, values[order].tolist(), strict=True))


def _corpus_identity(corpus: Corpus | None) -> dict[str, str]:
    return {} if corpus is None else corpus.identity()


def _finish(
    writer: index_files.Writer, postings: Postings, corpus: Corpus | None, language: str, k1: float, b: float
) -> None:
    identity = index_files.identity_of(_corpus_identity(corpus), language, k1, b)
    writer.finish(postings, identity, {} if corpus is None else corpus.left_out())


def _candidates(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions (ascending) of positive scores, without most of those that cannot be among the best `k`.

    The k-th best of any sample is no better than the k-th best of all, so nothing below it is needed. With a
    sample of sqrt(k * n) of n scores about as many pass. At n = 8.8M and k = 1000 this takes a third of the time
    of going through all positive scores.
    """
    step = math.isqrt(len(scores) // k)
    sample = scores[::step] if step > 1 else scores[:0]
    bound = np.partition(sample, len(sample) - k)[len(sample) - k] if len(sample) > k else 0.0
    return np.flatnonzero(scores >= bound) if bound > 0 else np.flatnonzero(scores > 0)


class _NoPool:
    """Stands in for a pool of one thread: `map` runs here, lazily."""

    map: Any = staticmethod(map)

    def __enter__(self) -> _NoPool:
        return self

    def __exit__(self, *_: object) -> None:
        return None
