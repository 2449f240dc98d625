"""BM25 candidates through bm25s with Lucene's scoring, as published BEIR baselines use it (k1 0.9, b 0.4)."""

from __future__ import annotations

import importlib
import itertools
import logging
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.records import Document, Query, Run

# Languages with a Snowball stemmer (PyStemmer) and a list of stop words (bm25s); "none" uses neither.
LANGUAGES = (
    "danish",
    "dutch",
    "english",
    "french",
    "german",
    "italian",
    "norwegian",
    "portuguese",
    "russian",
    "spanish",
    "swedish",
    "turkish",
    "none",
)
_import_lock = threading.Lock()


def _bm25s() -> Any:
    """Imports bm25s without waking JAX.

    Its top-k module runs a JAX kernel on import when JAX is there, which starts the backend (and takes the
    accelerator) before `jax.distributed` can be set up. A `None` entry in `sys.modules` makes that one import
    fail, and bm25s then selects NumPy.
    """
    with _import_lock:
        if "bm25s" in sys.modules:
            return sys.modules["bm25s"]
        missing = object()
        before: Any = sys.modules.get("jax.lax", missing)
        sys.modules["jax.lax"] = None  # type: ignore[assignment]
        try:
            module = importlib.import_module("bm25s")
            # Its logger is set to DEBUG, and would talk through any handler that another package installed.
            logging.getLogger("bm25s").setLevel(logging.WARNING)
            return module
        except ModuleNotFoundError as error:
            raise InputError(
                f"BM25 needs the package {error.name!r}: run `pip install 'inranker_jax[eval]'`, or give "
                "candidates from a TREC run."
            ) from error
        finally:
            if before is missing:
                del sys.modules["jax.lax"]
            else:
                sys.modules["jax.lax"] = before


def _stemmer(language: str) -> Any:
    if language == "none":
        return None
    try:
        import Stemmer
    except ModuleNotFoundError as error:
        raise InputError(
            "BM25 stems with PyStemmer, which is not installed: run `pip install 'inranker_jax[eval]'`, or "
            "set the language to 'none'."
        ) from error
    return Stemmer.Stemmer(language)


@dataclass(frozen=True)
class BM25Index:
    """An inverted index in memory. Make one with `BM25Index.build`.

    Attributes:
      language: whose stemmer and stop words were used.
      ids: document ids, descending, so that the lower position wins a tie as trec_eval decides it.
    """

    language: str
    ids: tuple[str, ...]
    _retriever: Any

    @classmethod
    def build(
        cls, documents: Iterable[Document], language: str = "english", k1: float = 0.9, b: float = 0.4
    ) -> BM25Index:
        """Indexes the contents (title and text) of documents.

        Words are runs of two or more letters or digits, lower-cased, without stop words, stemmed.

        Args:
          documents: what to index; a document without a word is allowed and never found.
          language: one of `LANGUAGES`.
          k1: term frequency saturation, at least 0.
          b: length normalisation, from 0 to 1.

        Returns:
          The index.

        Raises:
          InputError: an unknown language, parameters out of range, no documents, or an id given twice.
        """
        if language not in LANGUAGES:
            raise InputError(
                f"BM25 has no stemmer and stop words for language {language!r}."
                f"{did_you_mean(language, LANGUAGES)} Choose one of {', '.join(LANGUAGES)}."
            )
        if not (k1 >= 0 and 0 <= b <= 1):
            raise InputError(f"BM25 needs k1 >= 0 and 0 <= b <= 1; got k1={k1}, b={b}.")
        ordered = sorted(documents, key=lambda document: document.id, reverse=True)
        if not ordered:
            raise InputError("BM25 cannot index a corpus without documents.")
        for first, second in itertools.pairwise(ordered):
            if first.id == second.id:
                raise InputError(f"BM25 cannot index document id {first.id!r} twice: ids must be unique.")
        ids = tuple(document.id for document in ordered)
        bm25s = _bm25s()
        tokens = bm25s.tokenize(
            [document.contents for document in ordered],
            stopwords=None if language == "none" else language,
            stemmer=_stemmer(language),
            show_progress=False,
        )
        if not tokens.vocab:
            return cls(language, ids, None)
        retriever = bm25s.BM25(method="lucene", k1=k1, b=b, backend="numpy")
        retriever.index(tokens, show_progress=False)
        return cls(language, ids, retriever)

    def search(
        self, queries: Iterable[Query], k: int = 1000, among: Mapping[str, Iterable[str]] | None = None
    ) -> Run:
        """Finds the best `k` documents of each query.

        Documents that share no word with the query (score 0) are left out, so fewer than `k` may come back.
        The order, and who is in at the cut, is trec_eval's: score descending, then document id descending.

        Args:
          queries: what to search for.
          k: how many documents at most per query, at least 1; more than the corpus holds is fine.
          among: query id -> the only documents to rank, for collections whose judged pool is reranked. They
            are all kept, those with score 0 too; ids that the index does not hold are passed over.

        Returns:
          query id -> document id -> BM25 score (float32 values), best first. A query without a known word has
          an empty entry (without `among`).
        """
        if k < 1:
            raise InputError(f"BM25 needs a depth k of at least 1; got {k}.")
        queries = list(queries)
        pools: dict[str, np.ndarray] = {}
        if among is not None:
            place = {document: i for i, document in enumerate(self.ids)}
            for query in queries:
                known = {place[document] for document in among.get(query.id, ()) if document in place}
                pools[query.id] = np.array(sorted(known), np.int64)
        run: Run = {}
        for query, terms in zip(queries, self._words(queries), strict=True):
            scores = self._scores(terms)
            found = np.flatnonzero(scores > 0) if among is None else pools[query.id]
            run[query.id] = self._best(scores, found, k)
        return run

    def _words(self, queries: list[Query]) -> list[list[str]]:
        if not queries:
            return []
        words: list[list[str]] = _bm25s().tokenize(
            [query.text for query in queries],
            stopwords=None if self.language == "none" else self.language,
            stemmer=_stemmer(self.language),
            return_ids=False,
            show_progress=False,
        )
        return words

    def _scores(self, terms: list[str]) -> np.ndarray:
        term_ids = self._retriever.get_tokens_ids(terms) if self._retriever is not None else []
        if not term_ids:
            return np.zeros(len(self.ids), np.float32)
        scores: np.ndarray = self._retriever.get_scores_from_ids(term_ids)
        return scores

    def _best(self, scores: np.ndarray, found: np.ndarray, k: int) -> dict[str, float]:
        """The best `k` of the positions `found` (ascending); a lower position wins a tie."""
        values = scores[found]
        if len(found) > k:
            cut = np.partition(values, len(values) - k)[len(values) - k]
            above, level = found[values > cut], found[values == cut]
            found = np.sort(np.concatenate([above, level[: k - len(above)]]))
            values = scores[found]
        order = np.argsort(-values, kind="stable")
        return {self.ids[found[i]]: float(values[i]) for i in order}
