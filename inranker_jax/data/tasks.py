"""Registers tasks: the few lines that most task files need."""

from __future__ import annotations

import os
from collections.abc import Mapping

import seqio
from etils import epath

from inranker_jax.data import features, sources
from inranker_jax.errors import InputError


def add_labelled_task(
    name: str,
    read_pairs: sources.ReadPairs | Mapping[str, sources.ReadPairs],
    *,
    files: sources.Files = (),
    list_size: int = 1,
    validation_fraction: float = 0.0,
    relevance: sources.Relevance = "unknown",
    num_shards: int = 8,
) -> seqio.Task:
    """Registers a SeqIO task over labelled pairs: `seqio.TaskRegistry.add` with a `LabelledPairs` source.

    Nothing is read until the task is used. The task can be cached offline with SeqIO's own tools.

    Args:
      name: the task's name, unique in the process; letters, digits and `_ . :`.
      read_pairs: a function that returns the pairs; or one such function per split.
      files: the files that it reads, or a function that returns them.
      list_size: most documents per example.
      validation_fraction: share of queries, chosen by their text, in split "validation".
      relevance: "unknown", "first", or a function from a pair to 1, 0 or -1.
      num_shards: into how many parts offline caching divides the work; see `LabelledPairs`.

    Returns:
      The task.

    Raises:
      InputError: an argument is out of range.
      ValueError: from SeqIO, when the name is taken.
    """
    source = sources.LabelledPairs(
        read_pairs,
        files=files,
        list_size=list_size,
        validation_fraction=validation_fraction,
        relevance=relevance,
        num_shards=num_shards,
    )
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[seqio.CacheDatasetPlaceholder()],
        output_features=features.OUTPUT_FEATURES,
    )


def data_path(*parts: str, variable: str = "INRANKER_DATA_DIR", remedy: str = "") -> str:
    """A path below the folder that an environment variable names, looked up when it is called.

    Args:
      *parts: file or folder names below it.
      variable: the environment variable; its folder may be remote (`gs://...`).
      remedy: how to get what is missing, for the error.

    Returns:
      The path, which exists.

    Raises:
      InputError: the variable is not set, or there is nothing at the path.
    """
    folder = os.environ.get(variable)
    if not folder:
        raise InputError(
            f"the environment variable {variable} is not set: expected the folder that holds "
            f"{'/'.join(parts)}. Run `export {variable}=FOLDER`."
        )
    path = epath.Path(folder).joinpath(*parts)
    if not path.exists():
        error = InputError.at(
            path, None, "no such file or folder", f"it below {variable}={folder}", remedy.format(path=path)
        )
        raise sources.MissingDataError(str(path), str(error))
    return os.fspath(path)
