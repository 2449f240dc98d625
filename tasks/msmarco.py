"""MS MARCO with InRanker's human soft labels: `InRanker_msmarco.tsv` of `unicamp-dl/InRanker-msmarco`.

Put it into one folder with MS MARCO's `queries.train.tsv` and `collection.tsv` (and `qrels.train.tsv` for
hard labels), and name the folder in the environment variable INRANKER_DATA_DIR. Tasks:

- `msmarco_human_soft`: pairs with the teacher's logits, the thesis's first phase;
- `msmarco_human_hard`: pairs whose relevance comes from the judgments, for the hard cross-entropy (what is
  not judged counts as not relevant);
- both with `_lists`: a query's consecutive pairs, ten together.

One query in a thousand is in split `validation`. For labels of your own in this format, call `register` in
your task file; for label folders (`python -m inranker_jax.label`), see `tasks/label_folders.py`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator

import seqio

from inranker_jax.corpora import inranker
from inranker_jax.data import add_labelled_task, data_path
from inranker_jax.records import LabelledPair, PathType, Qrels, read_qrels

LABELS, QUERIES, COLLECTION, QRELS = (
    "InRanker_msmarco.tsv",
    "queries.train.tsv",
    "collection.tsv",
    "qrels.train.tsv",
)
SOURCES = {
    LABELS: "Download it from the Hugging Face dataset unicamp-dl/InRanker-msmarco, or write one with "
    "`python -m inranker_jax.label --output_dir=FOLDER --export_tsv={path}`",
    QUERIES: "It is in MS MARCO's queries.tar.gz",
    COLLECTION: "It is in MS MARCO's collection.tar.gz",
    QRELS: "Download MS MARCO's qrels.train.tsv",
}

LazyPath = PathType | Callable[[], PathType]


def find(path: LazyPath | None, name: str) -> PathType:
    """The given path, or the published name below INRANKER_DATA_DIR."""
    if path is None:
        return data_path(name, remedy=SOURCES[name])
    return path() if callable(path) else path


def read_pairs(
    labels: LazyPath | None,
    queries: LazyPath | None,
    collection: LazyPath | None,
    on_error: inranker.OnError,
    swapped: bool,
    titles: bool,
) -> Iterator[LabelledPair]:
    """Reads the labels, joined with the texts."""
    paths = find(labels, LABELS), find(queries, QUERIES), find(collection, COLLECTION)
    return inranker.read_msmarco_tsv(*paths, on_error, swapped=swapped, titles=titles)


@functools.cache
def _judgments(path: str, time: int) -> Qrels:
    del time  # a changed file is read again
    return read_qrels(path)


def judged_relevance(qrels: LazyPath | None, pair: LabelledPair) -> float:
    """1 for a document that is judged relevant to the query, else 0."""
    path = os.fspath(find(qrels, QRELS))
    judgments = _judgments(path, os.stat(path).st_mtime_ns if os.path.exists(path) else 0)
    return float(judgments.get(pair.query_id, {}).get(pair.document_id, 0) > 0)


def register(
    name: str,
    labels: LazyPath | None = None,
    queries: LazyPath | None = None,
    collection: LazyPath | None = None,
    *,
    judged: bool = False,
    qrels: LazyPath | None = None,
    list_size: int = 1,
    validation_fraction: float = 0.001,
    on_error: inranker.OnError = "raise",
    swapped: bool = False,
    titles: bool = True,
) -> seqio.Task:
    """Registers a task over labels in InRanker's MS MARCO TSV.

    Args:
      name: the task's name.
      labels: the label file; default, as for the next two: the published name below INRANKER_DATA_DIR,
        looked up when it is read. A function that returns the path is called then.
      queries: TSV of `id<tab>text`, or a BEIR folder.
      collection: `collection.tsv`, or a BEIR folder.
      judged: take the relevance of documents from judgments; otherwise it is unknown.
      qrels: the judgments.
      list_size: most documents per example.
      validation_fraction: share of queries in split "validation".
      on_error: "raise" on a bad line, or "skip" and count.
      swapped: the file's first column is the false logit.
      titles: for a BEIR folder, prepend a document's title to its text.

    Returns:
      The task.
    """

    def files() -> list[PathType]:
        found = [find(labels, LABELS), find(queries, QUERIES), find(collection, COLLECTION)]
        return [*found, find(qrels, QRELS)] if judged else found

    return add_labelled_task(
        name,
        functools.partial(read_pairs, labels, queries, collection, on_error, swapped, titles),
        files=files,
        list_size=list_size,
        validation_fraction=validation_fraction,
        relevance=functools.partial(judged_relevance, qrels) if judged else "unknown",
    )


for suffix, size in (("", 1), ("_lists", 10)):
    register(f"msmarco_human_soft{suffix}", list_size=size)
    register(f"msmarco_human_hard{suffix}", list_size=size, judged=True)
