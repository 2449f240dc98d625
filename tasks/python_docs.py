"""The collection that ships with the package: docstrings of the Python standard library.

Teacher labels are those of `inranker_jax/collections/python_docs/teacher`, one positive and nine negatives
a query.
Splits: `train`, and `validation`, whose queries share no text or passage with the training queries.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator

from inranker_jax.corpora import inranker
from inranker_jax.corpora.shipped import FOLDER
from inranker_jax.data import add_labelled_task
from inranker_jax.records import LabelledPair

COLLECTION = FOLDER / "python_docs"
LABELS = {"train": "train.tsv.gz", "validation": "dev.tsv.gz"}


def read_pairs(split: str) -> Iterator[LabelledPair]:
    """Reads the labels of a split; the collection's folder holds both the queries and the passages."""
    return inranker.read_msmarco_tsv(COLLECTION / "teacher" / LABELS[split], COLLECTION, COLLECTION)


def files() -> list[pathlib.Path]:
    """The files behind both splits."""
    labels = [COLLECTION / "teacher" / name for name in LABELS.values()]
    return [*labels, COLLECTION / "queries.jsonl.gz", COLLECTION / "corpus.jsonl.gz"]


for name, list_size in (("python_docs", 10), ("python_docs_pairs", 1)):
    add_labelled_task(
        name,
        {split: functools.partial(read_pairs, split) for split in LABELS},
        files=files,
        list_size=list_size,
        relevance="first",
    )
