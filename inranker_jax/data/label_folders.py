"""Label folders as sources of tasks: read in parts, with the labelled texts or with a translation of them."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import seqio

from inranker_jax import corpora, paths
from inranker_jax.corpora import label_folder
from inranker_jax.data import sources, tasks
from inranker_jax.errors import InputError
from inranker_jax.records import LabelledPair, PathType

LazyPath = PathType | Callable[[], PathType]

_RANGE_PAIRS = 100_000
_MIN_RANGES, _MAX_RANGES = 8, 256


def _now(path: LazyPath) -> str:
    return os.fspath(path() if callable(path) else path)


@dataclass(frozen=True)
class LabelFolderReader:
    """Reads a label folder: a `sources.RangeReader`.

    Attributes:
      folder: the label folder, or a function that returns it.
      teacher: whose labels: a name in labels.json or a key; needless where there is one teacher.
      queries: other texts for the same query ids, in any format of queries; by default those that were labelled.
      documents: other texts for the same document ids, in any format of corpora. With these two the teacher's
        logits of the labelled pair go with its translation (cross-lingual labels).
    """

    folder: LazyPath
    teacher: str | None = None
    queries: LazyPath | None = None
    documents: LazyPath | None = None

    def _open(self) -> tuple[_KeepsTexts, dict[str, Any]]:
        folder = _now(self.folder)
        place = paths.absolute(folder)
        if not (place / label_folder.LISTS).is_file():
            error = InputError.at(
                folder, None, f"it has no {label_folder.LISTS}", "a label folder",
                f"Make it with `python -m inranker_jax.label ... --output_dir={folder}`",
            )  # fmt: skip
            raise sources.MissingDataError(folder, str(error))
        stamps = tuple(paths.version(place / name) for name in (label_folder.LISTS, label_folder.INFO))
        arguments = {
            "teacher": self.teacher,
            "queries": None if self.queries is None else _now(self.queries),
            "documents": None if self.documents is None else _now(self.documents),
        }
        return _open_folder(os.fspath(place), stamps), arguments

    def __call__(self) -> Iterator[LabelledPair]:
        """All pairs, in list order."""
        opened, arguments = self._open()
        return opened.read(**arguments)

    def ranges(self) -> list[tuple[int, int]]:
        """Consecutive ranges of rows, of about 100,000 pairs each, between which no query is divided."""
        return self._open()[0].ranges

    def read(self, start: int, stop: int) -> Iterator[LabelledPair]:
        """The pairs of one of the ranges."""
        opened, arguments = self._open()
        return opened.read(start, stop, **arguments)

    def query_sizes(self) -> Iterator[tuple[str, int]]:
        """(query text, number of pairs) of each query, in list order."""
        opened, arguments = self._open()
        texts = opened.query_texts(arguments["queries"])
        for query_id, size in opened.lists.query_sizes():
            yield texts[query_id].strip(), size

    def files(self) -> list[str]:
        """Every file that decides the pairs: lists, labels, and texts."""
        opened, arguments = self._open()
        found = label_folder.files(opened.path)
        for kind, override in (("queries", arguments["queries"]), ("corpus", arguments["documents"])):
            path, options = opened.text_source(kind, override)
            read = corpora.open_queries_any if kind == "queries" else corpora.open_corpus
            found += read(path, **options).files
        return found


def _query_start(lists: label_folder.Lists, row: int) -> int:
    """The first row, at or after `row`, with which a query begins; the number of rows when none does."""
    if row == 0:
        return 0
    before = None
    for rows in lists.rows(row - 1):
        for offset, query_id in enumerate(rows.query_ids):
            if before is not None and query_id != before:
                return rows.start + offset
            before = query_id
    return lists.num_pairs


class _KeepsTexts(label_folder.LabelFolder):
    """A label folder that opens its texts once, for the many parts in which it is read."""

    def __init__(self, folder: PathType) -> None:
        super().__init__(folder)
        self._texts: dict[tuple[str, Any], Mapping[str, str]] = {}

    @functools.cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """See `LabelFolderReader.ranges`."""
        pairs = self.lists.num_pairs
        count = min(max(pairs // _RANGE_PAIRS, _MIN_RANGES), _MAX_RANGES, self.lists.num_queries)
        starts = {_query_start(self.lists, pairs * part // count) for part in range(count)}
        return list(itertools.pairwise(sorted({*starts, pairs})))

    def query_texts(self, queries: PathType | Mapping[str, str] | None = None) -> Mapping[str, str]:
        key = ("queries", queries)
        if key not in self._texts:
            self._texts[key] = super().query_texts(queries)
        return self._texts[key]

    def document_texts(self, documents: PathType | Mapping[str, str] | None = None) -> Mapping[str, str]:
        key = ("corpus", documents)
        if key not in self._texts:
            self._texts[key] = super().document_texts(documents)
        return self._texts[key]

    def text_source(self, kind: str, override: PathType | None) -> tuple[PathType, dict[str, Any]]:
        """(path, options for opening it) of the queries or the corpus."""
        return self._source(kind, override)


# Few at a time: a mixture reads its tasks one after another, and texts may be large.
@functools.lru_cache(maxsize=2)
def _open_folder(folder: str, stamps: tuple[str, ...]) -> _KeepsTexts:
    del stamps  # a changed folder is another one
    return _KeepsTexts(folder)


def add_label_folder_task(
    name: str,
    folder: LazyPath,
    *,
    list_size: int = 1,
    validation_fraction: float = 0.001,
    teacher: str | None = None,
    queries: LazyPath | None = None,
    documents: LazyPath | None = None,
) -> seqio.Task:
    """Registers a task over a label folder, which `python -m inranker_jax.label` writes.

    The relevance of the examples is that of the lists: 1 for a query's positive, 0 for a sampled negative.
    Nothing is read until the task is used.

    Args:
      name: the task's name.
      folder: the label folder, or a function that returns it.
      list_size: most documents per example; 1 for pairs.
      validation_fraction: share of the queries, by their text, in split "validation".
      teacher: whose labels, where the folder has those of several.
      queries: other texts for the same query ids (a path, or a function that returns one).
      documents: other texts for the same document ids.

    Returns:
      The task.

    Raises:
      InputError: an argument is out of range.
      ValueError: from SeqIO, when the name is taken.
    """
    reader = LabelFolderReader(folder, teacher, queries, documents)
    return tasks.add_labelled_task(
        name,
        reader,
        files=reader.files,
        list_size=list_size,
        validation_fraction=validation_fraction,
        relevance="first",
    )


# mypy checks here that the reader is what sources look for.
_: type[sources.RangeReader] = LabelFolderReader
