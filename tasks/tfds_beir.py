"""Judged pairs of TFDS's own `beir` datasets, for hard labels.

TensorFlow Datasets has one family of this kind, `beir` (MS MARCO is in it as `beir/msmarco`), and none with
teacher logits. Its pairs are those of BEIR's qrels, so nearly all are positives, and where several queries
share a passage its preparation keeps one of them. These tasks (`tfds_beir_{config}`, for the sets with a `train`
split) are therefore for mixtures which have their negatives from elsewhere. (A mixture does not validate on a query
that one of its tasks trains on: it is refused, see `data/division.py`.) To retrieve, label and train on such a
collection, write it as a BEIR folder first:

    python -m inranker_jax.prepare_tfds --from_tfds=beir/scifact:1.0.0 --output_dir=scifact

TFDS prepares a dataset with `tfds build beir/scifact --data_dir=$TFDS_DATA_DIR`, which downloads it (and needs
Apache Beam and `pip install importlib_resources`); the tasks read the folder in TFDS_DATA_DIR.
"""

from __future__ import annotations

from inranker_jax.data.tasks import data_path
from inranker_jax.data.tfds_tasks import add_judged_task

# TFDS has no other splits of queries for these; its splits `query` and `passage` are the texts.
SPLITS = {
    "msmarco": ("train", "validation", "test"),
    "nfcorpus": ("train", "validation", "test"),
    "hotpotqa": ("train", "validation", "test"),
    "fiqa": ("train", "validation", "test"),
    "fever": ("train", "validation", "test"),
    "scifact": ("train", "test"),
}


def data_dir() -> str:
    """The folder of TFDS datasets."""
    return data_path(variable="TFDS_DATA_DIR")


for config, splits in SPLITS.items():
    add_judged_task(f"tfds_beir_{config}", f"beir/{config}", data_dir, splits=splits)
