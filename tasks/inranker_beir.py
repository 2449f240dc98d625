"""InRanker's synthetic soft labels: `inpars_beir_dataset.jsonl` of `unicamp-dl/InRanker-BEIR`.

Put the file into a folder and name it in the environment variable INRANKER_DATA_DIR. `inranker_beir` has
pairs, as in the thesis's second phase; `inranker_beir_lists` has a query's consecutive pairs, ten together.
One query in a thousand is in split `validation`.

For labels of your own in this format, call `register` in your task file.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import seqio

from inranker_jax.corpora import inranker
from inranker_jax.data import add_labelled_task, data_path
from inranker_jax.records import LabelledPair, PathType

LABELS = "inpars_beir_dataset.jsonl"


def find_labels(labels: PathType | None) -> PathType:
    """The given file, or the published one below INRANKER_DATA_DIR."""
    return labels if labels is not None else data_path(LABELS)


def read_pairs(labels: PathType | None, on_error: inranker.OnError, swapped: bool) -> Iterator[LabelledPair]:
    """Reads the labels."""
    return inranker.read_beir_jsonl(find_labels(labels), on_error, swapped=swapped)


def register(
    name: str,
    labels: PathType | None = None,
    *,
    list_size: int = 1,
    validation_fraction: float = 0.001,
    on_error: inranker.OnError = "raise",
    swapped: bool = False,
) -> seqio.Task:
    """Registers a task over labels in InRanker's BEIR JSONL.

    Args:
      name: the task's name.
      labels: the file; default: the published one below INRANKER_DATA_DIR, looked up when it is read.
      list_size: most documents per example.
      validation_fraction: share of queries in split "validation".
      on_error: "raise" on a bad line, or "skip" and count.
      swapped: the file's two logits are swapped.

    Returns:
      The task.
    """
    return add_labelled_task(
        name,
        functools.partial(read_pairs, labels, on_error, swapped),
        files=lambda: [find_labels(labels)],
        list_size=list_size,
        validation_fraction=validation_fraction,
    )


register("inranker_beir")
register("inranker_beir_lists", list_size=10)
