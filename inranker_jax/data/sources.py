"""SeqIO data sources made from Python readers of labelled pairs.

A reader is any function that returns an iterable of `LabelledPair`s; it is called when a split is read, never
when its task module is imported, so paths may come from the environment and may not exist yet.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import seqio
import tensorflow as tf

from inranker_jax.data import features
from inranker_jax.errors import InputError
from inranker_jax.records import LabelledPair, PathType

ReadPairs = Callable[[], Iterable[LabelledPair]]
Relevance = Literal["unknown", "first"] | Callable[[LabelledPair], float]
Files = Iterable[PathType] | Callable[[], Iterable[PathType]]

# Errors raised by a Python reader inside tf.data reach the consumer as a TensorFlow error which only quotes
# them. They are kept here so that `original_error` can give the consumer the real one.
_RAISED: dict[str, Exception] = {}
_RAISED_LOCK = threading.Lock()


def original_error(error: BaseException) -> Exception | None:
    """What a reader raised, when `error` is the TensorFlow error that came of it."""
    text = str(error)
    with _RAISED_LOCK:
        for message in [message for message in _RAISED if message in text]:
            return _RAISED.pop(message)
    return None


def query_share(query: str) -> float:
    """A number in [0, 1) which depends only on the query's text, whatever its case and spacing.

    Two queries that differ only in those fall on the same side of a split.
    """
    text = " ".join(query.casefold().split())
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64


def group_pairs(
    pairs: Iterable[LabelledPair], list_size: int, relevance: Relevance = "unknown"
) -> Iterator[dict[str, Any]]:
    """Groups consecutive pairs of one query into examples of at most `list_size` documents.

    With `list_size=10`, a query with 23 documents gives lists of 10, 10 and 3. With `list_size=1` every
    pair is an example.

    Args:
      pairs: the pairs; those of one query should follow one another.
      list_size: most documents per example.
      relevance: "unknown" (-1 for all), "first" (the first document of each query is relevant, the others are
        not), or a function from a pair to 1, 0 or -1.

    Yields:
      Examples as described in `features`.
    """
    query_id: str | None = None
    group: list[tuple[LabelledPair, float]] = []
    for pair in pairs:
        is_first = pair.query_id != query_id
        if group and (is_first or len(group) == list_size):
            yield _example(group)
            group = []
        query_id = pair.query_id
        if callable(relevance):
            grade = float(relevance(pair))
        else:
            grade = -1.0 if relevance == "unknown" else float(is_first)
        group.append((pair, grade))
    if group:
        yield _example(group)


def _example(group: list[tuple[LabelledPair, float]]) -> dict[str, Any]:
    pairs = [pair for pair, _ in group]
    return {
        "query_id": pairs[0].query_id,
        "query": pairs[0].query,
        "document_ids": [pair.document_id for pair in pairs],
        "documents": [pair.document for pair in pairs],
        "teacher_logits": np.asarray([pair.logits for pair in pairs], np.float32),
        "relevance": np.asarray([grade for _, grade in group], np.float32),
    }


class LabelledPairs(seqio.FunctionDataSource):
    """A SeqIO data source over readers of labelled pairs: splits by query, groups pairs into lists."""

    def __init__(
        self,
        read_pairs: ReadPairs | Mapping[str, ReadPairs],
        *,
        files: Files = (),
        list_size: int = 1,
        validation_fraction: float = 0.0,
        relevance: Relevance = "unknown",
    ):
        """Describes the source; nothing is read.

        Args:
          read_pairs: a function that returns the pairs; or one such function per split, by the split's name.
          files: the files and folders that it reads, or a function that returns them. Their sizes and times
            tell when stored examples are out of date; without them, large splits are read again in every run.
          list_size: most documents per example; pairs of a query that follow one another are grouped.
          validation_fraction: for a single function, the share of queries in split "validation"; the others
            are in "train". The side depends on the query's text only, so that every task with the same
            fraction has the same validation queries.
          relevance: see `group_pairs`.

        Raises:
          InputError: an argument is out of range.
        """
        if list_size < 1:
            raise InputError(f"list_size={list_size}: expected at least 1.")
        if not 0 <= validation_fraction < 1:
            raise InputError(f"validation_fraction={validation_fraction}: expected a share in [0, 1).")
        if not callable(relevance) and relevance not in ("unknown", "first"):
            raise InputError(f"relevance={relevance!r}: expected 'unknown', 'first' or a function of a pair.")
        if isinstance(read_pairs, Mapping):
            if validation_fraction:
                raise InputError("validation_fraction is for a single reader; these splits have one each.")
            splits = tuple(read_pairs)
        else:
            splits = ("train", "validation") if validation_fraction else ("train",)
        self._read_pairs, self._files = read_pairs, files
        self._list_size, self._validation_fraction = list_size, validation_fraction
        self._relevance = relevance
        super().__init__(self._dataset, splits=splits)

    def source_files(self, split: str) -> list[str]:
        """The files that the split is read from, as declared; of a folder, those that lie in it."""
        found: list[str] = []
        for declared in self._files() if callable(self._files) else self._files:
            path = os.fspath(declared)
            if os.path.isdir(path):
                found += sorted(entry.path for entry in os.scandir(path) if entry.is_file())
            else:
                found.append(path)
        return found

    def identity(self, split: str) -> list[Any]:
        """What decides the split's examples, beside the files: arguments and functions."""
        reader = self._read_pairs[split] if isinstance(self._read_pairs, Mapping) else self._read_pairs
        return [self._list_size, self._validation_fraction, reader, self._relevance]

    def examples(self, split: str) -> Iterator[dict[str, Any]]:
        """Reads a split in plain Python: examples as in `features`, text as `str`.

        Raises:
          InputError: as the reader does.
        """
        if isinstance(self._read_pairs, Mapping):
            pairs: Iterable[LabelledPair] = self._read_pairs[split]()
        else:
            wanted, fraction = split == "validation", self._validation_fraction
            pairs = self._read_pairs()
            if fraction:
                pairs = (pair for pair in pairs if (query_share(pair.query) < fraction) == wanted)
        return group_pairs(pairs, self._list_size, self._relevance)

    def _dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # one reader is one shard; the order of training is decided by GlobalOrder

        def generate() -> Iterator[dict[str, Any]]:
            try:
                yield from self.examples(split)
            except Exception as error:
                with _RAISED_LOCK:
                    _RAISED[f"{type(error).__name__}: {error}"] = error
                raise

        return tf.data.Dataset.from_generator(generate, output_signature=features.SIGNATURE)
