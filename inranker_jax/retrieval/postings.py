"""Streams documents into BM25 postings in bm25s's layout, in far less memory than their texts take."""

from __future__ import annotations

import array
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from inranker_jax.errors import InputError
from inranker_jax.records import Document
from inranker_jax.retrieval.words import Tokenizer

_BATCH = 2048  # documents tokenised at once
_CHUNK = 65536  # documents scored at once
_LOW = np.int64(0xFFFFFFFF)

# Makes the array of one part of the index: (name, length, dtype) -> array, in memory or in a file.
Allocate = Callable[[str, int, type], np.ndarray]


def in_memory(name: str, length: int, dtype: type) -> np.ndarray:
    """Allocates an array in memory, whatever its name."""
    return np.empty(length, dtype)


@dataclass(frozen=True)
class Postings:
    """Scores of all (word, document) pairs that occur, by word: a sparse matrix in compressed columns.

    Attributes:
      ids: document ids, descending, so that the lower position wins a tie as trec_eval decides it.
      vocabulary: word -> column.
      data: float32 [pairs], what the word adds to the document's score.
      indices: int32 [pairs], positions of documents, ascending within a word.
      indptr: int64 [words + 1], where a word's pairs begin.
    """

    ids: Sequence[str]
    vocabulary: dict[str, int]
    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray


class _Counts:
    """Word counts of documents, row after row, in arrays that grow: 8 bytes a (document, word) pair."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._words = array.array("i")
        self._frequencies = array.array("i")
        self._sizes = array.array("i")
        self._lengths = array.array("i")

    def add(self, ids: list[str], numbers: list[list[int]]) -> None:
        """Adds a batch of documents with their word numbers."""
        lengths = np.fromiter(map(len, numbers), np.int32, len(numbers))
        words = np.fromiter(itertools.chain.from_iterable(numbers), np.int64, int(lengths.sum()))
        rows = np.repeat(np.arange(len(numbers), dtype=np.int64), lengths)
        pairs, frequencies = np.unique(rows << 32 | words, return_counts=True)
        self.ids.extend(ids)
        self._words.frombytes((pairs & _LOW).astype(np.int32).tobytes())
        self._frequencies.frombytes(frequencies.astype(np.int32).tobytes())
        self._sizes.frombytes(np.bincount(pairs >> 32, minlength=len(ids)).astype(np.int32).tobytes())
        self._lengths.frombytes(lengths.tobytes())

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Words and frequencies [pairs], sizes (different words) and lengths [documents]: int32 views."""
        words, frequencies, sizes, lengths = (
            np.frombuffer(part, np.int32) if part else np.zeros(0, np.int32)
            for part in (self._words, self._frequencies, self._sizes, self._lengths)
        )
        return words, frequencies, sizes, lengths


def build(
    documents: Iterable[Document],
    language: str,
    k1: float,
    b: float,
    allocate: Allocate = in_memory,
    on_progress: Callable[[int], None] | None = None,
) -> Postings:
    """Counts the words of documents, and scores every (word, document) pair with Lucene's BM25.

    score = idf * tf / (tf + k1 * (1 - b + b * length / mean length)) with
    idf = ln(1 + (N - df + 0.5) / (df + 0.5)), as in Kamphuis et al., "Which BM25 do you mean?", ECIR 2020
    (Lucene, accurate); rounded exactly as `bm25s.BM25(method="lucene").index` rounds.

    Args:
      documents: read once; no text is kept.
      language: one of `words.LANGUAGES`.
      k1: term frequency saturation.
      b: length normalisation.
      allocate: where the large arrays "data" and "indices" live.
      on_progress: called with the number of documents read, now and then. What it raises ends the build.

    Returns:
      The postings; without words (empty vocabulary) when no document holds one.

    Raises:
      InputError: no documents, or an id given twice.
    """
    tokenizer = Tokenizer(language)
    counts = _Counts()
    for batch in _batches(documents):
        ids = [document.id for document in batch]
        counts.add(ids, list(tokenizer.number(document.contents for document in batch)))
        if on_progress is not None:
            on_progress(len(counts.ids))
    if not counts.ids:
        raise InputError("BM25 cannot index a corpus without documents.")
    order = _descending(counts.ids)
    ids = [counts.ids[row] for row in order]
    vocabulary = tokenizer.vocabulary
    data, indices, indptr = _score(counts, order, len(vocabulary), k1, b, allocate)
    return Postings(ids, vocabulary, data, indices, indptr)


def _batches(documents: Iterable[Document]) -> Iterable[list[Document]]:
    stream = iter(documents)
    while batch := list(itertools.islice(stream, _BATCH)):
        yield batch


def _descending(ids: list[str]) -> np.ndarray:
    order = sorted(range(len(ids)), key=ids.__getitem__, reverse=True)
    for first, second in itertools.pairwise(order):
        if ids[first] == ids[second]:
            raise InputError(f"BM25 cannot index document id {ids[first]!r} twice: ids must be unique.")
    return np.array(order, np.int32)


def _score(
    counts: _Counts, order: np.ndarray, num_words: int, k1: float, b: float, allocate: Allocate
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    words, frequencies, sizes, lengths = counts.arrays()
    document_frequencies = np.bincount(words, minlength=num_words)
    idf = _idf(document_frequencies, len(order))
    mean_length = lengths.mean()
    starts = np.cumsum(sizes, dtype=np.int64) - sizes
    indptr = np.zeros(num_words + 1, np.int64)
    np.cumsum(document_frequencies, out=indptr[1:])
    heads = indptr[:-1].copy()
    data, indices = allocate("data", len(words), np.float32), allocate("indices", len(words), np.int32)
    for first in range(0, len(order), _CHUNK):
        rows = order[first : first + _CHUNK]
        size = sizes[rows]
        total = int(size.sum())
        if not total:
            continue
        source = np.repeat(starts[rows] - (np.cumsum(size) - size), size) + np.arange(total)
        # Sorting (word, place) is a stable sort by word: documents stay in their order within a word.
        pairs = np.sort(words[source].astype(np.int64) << 32 | np.arange(total))
        place = pairs & _LOW
        word = pairs >> 32
        # In float64 from here, and rounded once: what bm25s does with a float64 mean and NumPy's promotion.
        norm = k1 * ((1 - b) + b * lengths[rows].astype(np.float64) / mean_length)
        frequency = frequencies[source[place]].astype(np.float32)
        saturated = frequency / (np.repeat(norm, size)[place] + frequency)
        run_starts = np.flatnonzero(np.diff(word, prepend=-1))
        run_sizes = np.diff(run_starts, append=total)
        target = np.repeat(heads[word[run_starts]] - run_starts, run_sizes) + np.arange(total)
        heads[word[run_starts]] += run_sizes
        data[target] = idf[word] * saturated
        indices[target] = np.repeat(np.arange(first, first + len(rows), dtype=np.int32), size)[place]
    return data, indices, indptr


def _idf(document_frequencies: np.ndarray, num_documents: int) -> np.ndarray:
    """Lucene's inverse document frequencies, float32 [words]."""
    values, where = np.unique(document_frequencies, return_inverse=True)
    # `math.log`, not `np.log`: they may differ in the last bit, and bm25s uses the former.
    logs = [math.log(1 + (num_documents - df + 0.5) / (df + 0.5)) for df in values.tolist()]
    return np.array(logs, np.float32)[where]
