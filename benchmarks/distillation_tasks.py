"""SeqIO tasks over the teacher labels beside the checkout (`../shared/data`), for `distillation.py`."""

from __future__ import annotations

import functools
import os
import pathlib

import seqio

from inranker_jax.corpora import inranker
from inranker_jax.data import add_labelled_task

SHARED = pathlib.Path(os.environ.get("INRANKER_SHARED_DATA", "../shared/data"))
COLLECTIONS = ("scifact", "cranfield")


def files(collection: str) -> list[pathlib.Path]:
    """Labels, queries and collection of a collection's synthetic queries."""
    teacher = SHARED / "teacher" / f"{collection}_synthetic"
    return [teacher.with_suffix(".tsv"), teacher.with_suffix(".queries.tsv"), SHARED / "beir" / collection]


def read_pairs(collection: str):
    """The labelled pairs; the teacher read texts without titles, because the queries are titles."""
    return inranker.read_msmarco_tsv(*files(collection), titles=False)


for name in COLLECTIONS:
    add_labelled_task(
        f"{name}_synthetic",
        functools.partial(read_pairs, name),
        files=lambda name=name: [
            *files(name)[:2],
            files(name)[2] / "corpus.jsonl",
        ],
        list_size=10,
        validation_fraction=0.02,
        relevance="first",
    )
seqio.MixtureRegistry.add("real_synthetic", [("scifact_synthetic", 5179.0), ("cranfield_synthetic", 1397.0)])
