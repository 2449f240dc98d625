"""One task of each kind, for offline caching: registered from the folder in CACHED_TASKS_FOLDER.

Beside these, tasks that ship (`SHIPPED`), which read the folder in INRANKER_DATA_DIR.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import seqio
import tensorflow as tf
from inranker_jax.tasks import beir_synthetic, label_folders, msmarco

from inranker_jax import data
from inranker_jax.data.tfds_tasks import add_judged_task

FOLDER = pathlib.Path(os.environ["CACHED_TASKS_FOLDER"])
NUMBERED = ("cached_translated", "cached_tsv", "cached_tfds")
SHIPPED = (*(f"beir_synthetic_scifact{suffix}" for suffix in ("", "_lists")), "msmarco_human_soft")
assert set(SHIPPED) <= set(seqio.TaskRegistry.names()), (beir_synthetic, msmarco)
UNNUMBERED = ("cached_lines", "cached_judged")

# Its split "validation" is empty.
label_folders.register(
    "cached_translated", FOLDER / "labels", queries=FOLDER / "pt", documents=FOLDER / "pt", list_size=4
)
msmarco.register(
    "cached_tsv",
    FOLDER / "labels.tsv",
    FOLDER / "labels_source",
    FOLDER / "labels_source",
    judged=True,
    qrels=FOLDER / "labels_source" / "qrels" / "test.tsv",
    list_size=3,
    validation_fraction=0.2,
)
data.add_tfds_task("cached_tfds", "toy_labels", FOLDER / "tfds")
add_judged_task("cached_judged", "toy_beir", FOLDER / "tfds", splits={"train": "test"})


@seqio.map_over_dataset
def parse(line: Any) -> dict[str, Any]:
    """`query<tab>document<tab>false logit<tab>true logit`."""
    fields = tf.strings.split(line, "\t")
    return {
        "query_id": fields[0],
        "query": fields[0],
        "document_ids": fields[1:2],
        "documents": fields[1:2],
        "teacher_logits": tf.strings.to_number(fields[2:])[tf.newaxis],
    }


seqio.TaskRegistry.add(
    "cached_lines",
    source=seqio.TextLineDataSource({"train": str(FOLDER / "lines.tsv")}),
    preprocessors=[parse, seqio.CacheDatasetPlaceholder()],
    output_features=data.OUTPUT_FEATURES,
)
