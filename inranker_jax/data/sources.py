"""SeqIO data sources made from Python readers of labelled pairs.

A reader is any function that returns an iterable of `LabelledPair`s; it is called when a split is read, never
when its task module is imported, so paths may come from the environment and may not exist yet.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import seqio
import tensorflow as tf

from inranker_jax import paths
from inranker_jax.data import features
from inranker_jax.data.shares import query_share
from inranker_jax.errors import InputError
from inranker_jax.records import LabelledPair, PathType

ReadPairs = Callable[[], Iterable[LabelledPair]]
Relevance = Literal["unknown", "first"] | Callable[[LabelledPair], float]
Files = Iterable[PathType] | Callable[[], Iterable[PathType]]

NUMBER = "example_number"
# Shards of a range reader number their examples on their own; a shard has fewer examples than this.
_SHARD_STRIDE = 1 << 40
# Shards of any other reader take turns, this many examples at a time.
_TURN = 64


@runtime_checkable
class RangeReader(Protocol):
    """A reader that can start in the middle, so that several workers share the reading."""

    def __call__(self) -> Iterable[LabelledPair]:
        """All pairs."""
        ...

    def ranges(self) -> Sequence[tuple[int, int]]:
        """Consecutive ranges that cover everything, one per shard; a function of the data alone."""
        ...

    def read(self, start: int, stop: int) -> Iterable[LabelledPair]:
        """The pairs of the queries that begin in a range: the ranges' pairs, joined, are all pairs."""
        ...

    def query_sizes(self) -> Iterable[tuple[str, int]]:
        """(query text, number of pairs) of each query, in order: what counting examples takes."""
        ...


class MissingDataError(InputError):
    """What a source reads is not there.

    Attributes:
      path: what is not there.
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


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


class LabelledPairs(seqio.DataSource):
    """A SeqIO data source over readers of labelled pairs: splits by query, groups pairs into lists.

    Every example of the dataset carries its number (`example_number`, int64), which rises in the order in
    which the examples are read. SeqIO's offline caching stores it, and so a cached split, whose files hold
    the examples in no order, can be read back in this one.
    """

    def __init__(
        self,
        read_pairs: ReadPairs | Mapping[str, ReadPairs],
        *,
        files: Files = (),
        list_size: int = 1,
        validation_fraction: float = 0.0,
        relevance: Relevance = "unknown",
        num_shards: int = 8,
    ):
        """Describes the source; nothing is read.

        Args:
          read_pairs: a function that returns the pairs; or one such function per split, by the split's name.
            A `RangeReader` is read in its ranges by the workers of offline caching; of any other function,
            each worker reads everything and turns only its own part into examples.
          files: the files and folders that it reads, or a function that returns them. Their sizes and times
            tell when stored examples are out of date; without them, large splits are read again in every run.
          list_size: most documents per example; pairs of a query that follow one another are grouped.
          validation_fraction: for a single function, the share of queries in split "validation"; the others
            are in "train". The side depends on the query's text only, so that every task with the same
            fraction has the same validation queries.
          relevance: see `group_pairs`.
          num_shards: into how many parts offline caching divides the work of a plain function.

        Raises:
          InputError: an argument is out of range.
        """
        if list_size < 1:
            raise InputError(f"list_size={list_size}: expected at least 1.")
        if num_shards < 1:
            raise InputError(f"num_shards={num_shards}: expected at least 1.")
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
        self._num_shards = num_shards
        self._sizes: dict[tuple[Any, ...], int] = {}
        super().__init__(splits=splits)

    @property
    def validation_fraction(self) -> float:
        """Share of the queries, by their text, in split "validation"; 0 when the splits have own readers."""
        return self._validation_fraction

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: the shards are those of `list_shards`, or groups of them."""
        return False

    def _reader(self, split: str) -> ReadPairs:
        return self._read_pairs[split] if isinstance(self._read_pairs, Mapping) else self._read_pairs

    def source_files(self, split: str) -> list[str]:
        """The files that the split is read from, as declared; of a folder, those that lie in it."""
        del split
        found: list[str] = []
        for declared in self._files() if callable(self._files) else self._files:
            path = os.fspath(declared)
            if paths.is_remote(path) and paths.of(path).is_dir():
                found += [f"{path.rstrip('/')}/{name}" for name in paths.names_below(path) if "/" not in name]
            elif os.path.isdir(path):
                found += sorted(entry.path for entry in os.scandir(path) if entry.is_file())
            else:
                found.append(path)
        return found

    def identity(self, split: str) -> list[Any]:
        """What decides the split's examples, beside the files: arguments and functions."""
        return [self._list_size, self._validation_fraction, self._reader(split), self._relevance]

    def list_shards(self, split: str) -> Sequence[str]:
        """Names of the parts that workers can read on their own, in the order of their examples."""
        reader = self._reader(split)
        count = len(reader.ranges()) if isinstance(reader, RangeReader) else self._num_shards
        return [f"{split}-{number:05d}-of-{count:05d}" for number in range(count)]

    def num_input_examples(self, split: str) -> int:
        """Number of examples of a split. Counts them the first time, which reads the data."""
        key = (split, *_stamps(self.source_files(split)))
        if key not in self._sizes:
            reader = self._reader(split)
            if isinstance(reader, RangeReader):
                sizes = (size for query, size in reader.query_sizes() if self._is_in(split, query))
                count = sum(-(-size // self._list_size) for size in sizes)
            else:
                count = sum(1 for _ in self.examples(split))
            self._sizes[key] = count
        return self._sizes[key]

    def query_shares(self) -> set[float]:
        """The shares (`shares.query_share`) of the queries of a single reader. Reads the data."""
        reader = self._reader("train")
        if isinstance(reader, RangeReader):
            return {query_share(query) for query, _ in reader.query_sizes()}
        return {query_share(pair.query) for pair in reader()}

    def _is_in(self, split: str, query: str) -> bool:
        if not self._validation_fraction:
            return True
        return (query_share(query) < self._validation_fraction) == (split == "validation")

    def _group(self, split: str, pairs: Iterable[LabelledPair]) -> Iterator[dict[str, Any]]:
        chosen = (pair for pair in pairs if self._is_in(split, pair.query))
        return group_pairs(chosen, self._list_size, self._relevance)

    def examples(self, split: str) -> Iterator[dict[str, Any]]:
        """Reads a split in plain Python: examples as in `features`, text as `str`.

        Raises:
          InputError: as the reader does.
        """
        return self._group(split, self._reader(split)())

    def numbered_examples(
        self, split: str, shard_index: int = 0, num_shards: int = 1
    ) -> Iterator[dict[str, Any]]:
        """Reads a part of a split; each example has its number under `NUMBER`.

        Args:
          split: the split.
          shard_index: which part, from 0.
          num_shards: number of parts, at most that of `list_shards`.

        Yields:
          Examples. Those of all parts, sorted by number, are `examples(split)`.

        Raises:
          InputError: as the reader does.
        """
        reader = self._reader(split)
        if isinstance(reader, RangeReader):
            ranges = list(reader.ranges())
            first, last = (len(ranges) * index // num_shards for index in (shard_index, shard_index + 1))
            for place in range(first, last):
                for number, example in enumerate(self._group(split, reader.read(*ranges[place]))):
                    yield {**example, NUMBER: np.int64(place * _SHARD_STRIDE + number)}
            return
        for number, example in enumerate(self.examples(split)):
            if number // _TURN % num_shards == shard_index:
                yield {**example, NUMBER: np.int64(number)}

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        sequence_length: Mapping[str, int] | None = None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """The examples of a split, or of a shard of it, as a `tf.data.Dataset`; see `seqio.DataSource`.

        The source itself never shuffles: the order of training is decided by `GlobalOrder`, or by the shuffle
        buffer of `seqio.Task.get_dataset`.
        """
        del shuffle, seed, sequence_length, use_cached, num_epochs
        index, count = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)

        def generate() -> Iterator[dict[str, Any]]:
            try:
                yield from self.numbered_examples(split, index, count)
            except Exception as error:
                with _RAISED_LOCK:
                    _RAISED[f"{type(error).__name__}: {error}"] = error
                raise

        return tf.data.Dataset.from_generator(generate, output_signature=features.SIGNATURE)


def _stamps(files: Iterable[str]) -> list[tuple[str, int, int | str]]:
    """Path, size and time (remote: version) of files; a path that is no file stands for itself."""
    found: list[tuple[str, int, int | str]] = []
    for path in files:
        try:
            if paths.is_remote(path):
                found.append((path, paths.size(path), paths.version(path)))
                continue
            status = os.stat(path)
        except OSError:
            found.append((path, -1, -1))
            continue
        found.append((path, status.st_size, status.st_mtime_ns))
    return found
