"""Tasks over TensorFlow Datasets: those that `tfds_collections` prepares, and TFDS's own `beir`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import seqio
import tensorflow as tf
from tensorflow_datasets.core.utils import gcs_utils

from inranker_jax import paths
from inranker_jax.data import features
from inranker_jax.data.tfds_collections import MARKER, VERSION, local_folder
from inranker_jax.errors import InputError
from inranker_jax.records import PathType


class PreparedTfds(seqio.TfdsDataSource):
    """A `seqio.TfdsDataSource` whose data, where missing, is missed in words."""

    def __init__(
        self,
        name: str,
        data_dir: PathType | Callable[[], PathType],
        splits: Iterable[str] | Mapping[str, str],
        remedy: str,
    ):
        """Describes the source; nothing is read.

        Args:
          name: `dataset:version`.
          data_dir: folder of TFDS datasets, or a function that returns it.
          splits: its splits; or a mapping from the task's to the dataset's.
          remedy: how to make the dataset, for the error; `{data_dir}` stands for the folder.
        """
        self._folder, self._remedy = data_dir, remedy
        super().__init__(name, splits=splits)

    @property
    def tfds_dataset(self) -> Any:
        """SeqIO's lazy loader, once the dataset's folder was seen to be there."""
        folder = os.fspath(self._folder() if callable(self._folder) else self._folder)
        loader = self._tfds_dataset
        path = paths.of(folder).joinpath(*str(loader.name).split(":"))
        if not (path / MARKER).exists():
            raise InputError.at(
                path, None, "no prepared TFDS dataset", "its dataset_info.json",
                self._remedy.format(data_dir=folder),
            )  # fmt: skip
        gcs_utils._is_gcs_disabled = True
        loader._data_dir = local_folder(folder, str(loader.name))
        return loader


@seqio.map_over_dataset
def _judged_pair(row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """A row of a `beir` dataset as an example of one document, without teacher."""
    title = tf.numpy_function(_title, [row["passage_metadata"]], tf.string)
    title.set_shape([])
    return {
        "query_id": row["query_id"],
        "query": row["query"],
        "document_ids": row["passage_id"][tf.newaxis],
        "documents": tf.strings.strip(title + " " + row["passage"])[tf.newaxis],
        "relevance": tf.cast(row["score"] > 0, tf.float32)[tf.newaxis],
    }


def _title(metadata: bytes) -> bytes:
    return str(json.loads(metadata or "{}").get("title", "")).encode()


def add_judged_task(
    name: str,
    tfds_name: str,
    data_dir: PathType | Callable[[], PathType],
    *,
    splits: Iterable[str] | Mapping[str, str] = ("train",),
) -> seqio.Task:
    """Registers a task over the judged pairs of a TFDS dataset of the `beir` form: hard labels, no teacher.

    A document is its title and text joined; its relevance is 1 for a grade above 0.

    Args:
      name: the task's name.
      tfds_name: `beir/scifact`, or the name of one that `prepare_beir` wrote.
      data_dir: folder of TFDS datasets, or a function that returns it.
      splits: its splits; or a mapping from the task's to the dataset's.

    Returns:
      The task.

    Raises:
      ValueError: from SeqIO, when the name is taken.
    """
    remedy = f"Run `tfds build {tfds_name} --data_dir={{data_dir}}`, which downloads it"
    if "/" not in tfds_name:
        remedy = f"Run `python -m inranker_jax.prepare_tfds --beir=FOLDER --name={tfds_name} --data_dir={{data_dir}}`"
    return seqio.TaskRegistry.add(
        name,
        source=PreparedTfds(f"{tfds_name}:{VERSION}", data_dir, splits, remedy),
        preprocessors=[_judged_pair, seqio.CacheDatasetPlaceholder()],
        output_features=features.OUTPUT_FEATURES,
    )


def add_tfds_task(
    name: str,
    tfds_name: str,
    data_dir: PathType | Callable[[], PathType],
    *,
    splits: Iterable[str] = ("train", "validation"),
) -> seqio.Task:
    """Registers a task over a dataset that `prepare_labels` (or `prepare_tfds`) wrote.

    Its examples come in the order of the labels they were prepared from. Nothing is read until it is used.

    Args:
      name: the task's name.
      tfds_name: name of the dataset.
      data_dir: folder of TFDS datasets, or a function that returns it.
      splits: its splits.

    Returns:
      The task.

    Raises:
      ValueError: from SeqIO, when the name is taken.
    """
    return seqio.TaskRegistry.add(
        name,
        source=PreparedTfds(
            f"{tfds_name}:{VERSION}",
            data_dir,
            tuple(splits),
            f"Run `python -m inranker_jax.prepare_tfds --labels=LABEL_FOLDER --name={tfds_name} "
            "--data_dir={data_dir}`",
        ),
        preprocessors=[seqio.CacheDatasetPlaceholder()],
        output_features=features.OUTPUT_FEATURES,
    )
