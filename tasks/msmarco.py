"""InRanker's human soft labels on MS MARCO: `InRanker_msmarco.tsv` of `unicamp-dl/InRanker-msmarco`.

Put it into one folder with MS MARCO's `queries.train.tsv` and `collection.tsv` (and `qrels.train.tsv` for
hard labels), and name the folder in the environment variable INRANKER_DATA_DIR. Tasks: `inranker_msmarco`,
pairs, as in the thesis's first phase; `inranker_msmarco_lists`, a query's consecutive pairs, ten together;
`inranker_msmarco_judged`, pairs whose relevance comes from the judgments, for the hard cross-entropy (what
is not judged counts as not relevant). One query in a thousand is in split `validation`.

For labels of your own in this format, call `register` in your task file.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

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


def find_files(
    labels: PathType | None, queries: PathType | None, collection: PathType | None
) -> tuple[PathType, PathType, PathType]:
    """Labels, queries and collection: as given, or the published names below INRANKER_DATA_DIR."""
    return (
        labels if labels is not None else data_path(LABELS),
        queries if queries is not None else data_path(QUERIES),
        collection if collection is not None else data_path(COLLECTION),
    )


def read_pairs(
    labels: PathType | None,
    queries: PathType | None,
    collection: PathType | None,
    on_error: inranker.OnError,
    swapped: bool,
    titles: bool,
) -> Iterator[LabelledPair]:
    """Reads the labels, joined with the texts."""
    paths = find_files(labels, queries, collection)
    return inranker.read_msmarco_tsv(*paths, on_error, swapped=swapped, titles=titles)


@functools.cache
def _judgments(path: str) -> Qrels:
    return read_qrels(path)


def judged_relevance(path: PathType | None, pair: LabelledPair) -> float:
    """1 for a document that is judged relevant to the query, else 0."""
    judgments = _judgments(os.fspath(path) if path is not None else data_path(QRELS))
    return float(judgments.get(pair.query_id, {}).get(pair.document_id, 0) > 0)


def register(
    name: str,
    labels: PathType | None = None,
    queries: PathType | None = None,
    collection: PathType | None = None,
    *,
    judged: bool = False,
    qrels: PathType | None = None,
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
        looked up when it is read.
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
        judgments = [qrels if qrels is not None else data_path(QRELS)] if judged else []
        return [*find_files(labels, queries, collection), *judgments]

    return add_labelled_task(
        name,
        functools.partial(read_pairs, labels, queries, collection, on_error, swapped, titles),
        files=files,
        list_size=list_size,
        validation_fraction=validation_fraction,
        relevance=functools.partial(judged_relevance, qrels) if judged else "unknown",
    )


register("inranker_msmarco")
register("inranker_msmarco_lists", list_size=10)
register("inranker_msmarco_judged", judged=True)
