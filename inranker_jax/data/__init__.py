"""Text and labels from SeqIO tasks to batches of token ids. The only room that imports SeqIO and TensorFlow.

A task file needs `add_labelled_task`, or `LabelledPairs` and `OUTPUT_FEATURES` for
`seqio.TaskRegistry.add`; a trainer needs `open_stream`. Importing SeqIO takes seconds, so each name is
loaded on first use.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

# TensorFlow only reads text here; its start-up notes about instruction sets and GPUs would bury ours.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if TYPE_CHECKING:
    from inranker_jax.data.batches import Batch, BatchStream
    from inranker_jax.data.features import OUTPUT_FEATURES
    from inranker_jax.data.label_folders import LabelFolderReader, add_label_folder_task
    from inranker_jax.data.order import GlobalOrder
    from inranker_jax.data.rates import temperature
    from inranker_jax.data.registry import open_stores, open_stream
    from inranker_jax.data.sources import LabelledPairs
    from inranker_jax.data.store import Example, ExampleStore
    from inranker_jax.data.task_modules import import_task_modules
    from inranker_jax.data.tasks import add_labelled_task, data_path
    from inranker_jax.data.tfds_tasks import add_tfds_task

__all__ = [
    "OUTPUT_FEATURES",
    "Batch",
    "BatchStream",
    "Example",
    "ExampleStore",
    "GlobalOrder",
    "LabelFolderReader",
    "LabelledPairs",
    "add_label_folder_task",
    "add_labelled_task",
    "add_tfds_task",
    "data_path",
    "import_task_modules",
    "open_stores",
    "open_stream",
    "temperature",
]

_HOMES = {
    "Batch": "batches",
    "BatchStream": "batches",
    "OUTPUT_FEATURES": "features",
    "GlobalOrder": "order",
    "LabelFolderReader": "label_folders",
    "add_label_folder_task": "label_folders",
    "temperature": "rates",
    "add_tfds_task": "tfds_tasks",
    "open_stores": "registry",
    "open_stream": "registry",
    "LabelledPairs": "sources",
    "Example": "store",
    "ExampleStore": "store",
    "import_task_modules": "task_modules",
    "add_labelled_task": "tasks",
    "data_path": "tasks",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'inranker_jax.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"inranker_jax.data.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
