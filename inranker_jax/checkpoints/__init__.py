"""Reading and writing models: our own training checkpoints, T5X's, and Hugging Face folders.

`load_model` finds out which of the three a path is, so that training, scoring and export can start from any.
`check_model` looks whether there is one, before the work that comes first.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from inranker_jax import hub, paths
from inranker_jax.errors import InputError
from inranker_jax.models import Params, T5Config, trees

if TYPE_CHECKING:
    from inranker_jax.prompts import ScoringContract, Tokenizer

__all__ = ["LoadedModel", "check_model", "load_model"]


@dataclasses.dataclass
class LoadedModel:
    """Everything needed to score text with a model.

    Attributes:
      config: the architecture.
      params: the parameters, float32, in the tree of `models.init_params`.
      tokenizer: None where the checkpoint has no tokenizer files.
      contract: prompt, labels and truncation; None where the checkpoint has none and the name of the model is
        not one whose contract is known.
      source: the path or hub id that it was read from.
      step: of a T5X checkpoint, the number of optimizer steps behind it, from which T5X goes on counting; None
        of every other.
    """

    config: T5Config
    params: Params
    tokenizer: Tokenizer | None
    contract: ScoringContract | None
    source: str
    step: int | None = None


def load_model(
    path_or_hub_id: str | os.PathLike[str],
    *,
    on_host: bool = False,
    place: Callable[[str, np.ndarray], Any] | None = None,
) -> LoadedModel:
    """Reads a model from wherever it is.

    Args:
      path_or_hub_id: a training output folder or one of its checkpoints, a checkpoint of T5X (a step's folder,
        or the folder of several, of which the newest is read), a Hugging Face folder, or the id of a model on
        the Hugging Face hub such as "unicamp-dl/InRanker-small".
      on_host: leave the parameters in host memory, as NumPy arrays.
      place: see `huggingface.load`.

    Returns:
      The model.

    Raises:
      InputError: where there is no such model or its parts do not fit together.
    """
    from inranker_jax.checkpoints import folders, huggingface, places, t5x_folders

    source = os.fspath(path_or_hub_id)
    place = (lambda _, array: array) if on_host else place
    if folders.is_native(source):
        from inranker_jax.checkpoints import native  # and Orbax, which takes a while

        model: LoadedModel = native.load(source)
        if place is not None:
            placed = {path: place(path, value) for path, value in trees.flatten(model.params).items()}
            model.params = trees.unflatten(placed)
        return model
    t5x_checkpoint = t5x_folders.locate(source)
    if t5x_checkpoint is not None:
        from inranker_jax.checkpoints import t5x

        return t5x.load(t5x_checkpoint, source, place)
    if paths.is_remote(source):
        places.check_folder(source)  # before all of it is copied
        copy = paths.local_copy(source, skip=hub.NOT_DOWNLOADED)
        return dataclasses.replace(huggingface.load(copy, place=place), source=source)
    return huggingface.load(source, place=place)


def check_model(path_or_hub_id: str | os.PathLike[str]) -> None:
    """Looks whether `load_model` would find a model and its architecture, without reading weights.

    Of a model on the hub its `config.json` is fetched, or found in the cache.

    Raises:
      InputError: there is no such model, it has another architecture, or its weights are not there.
    """
    from inranker_jax.checkpoints import folders, huggingface, places, t5x_folders

    source = os.fspath(path_or_hub_id)
    if folders.is_native(source):
        places.check_steps(source)
    elif t5x_folders.locate(source) is not None:
        return
    elif paths.is_remote(source):
        paths.check_reachable(source)
        if not paths.of(source).is_dir():
            raise InputError.at(source, None, "no such file or folder", remedy="Check the path")
        places.check_folder(source)
    else:
        huggingface.check(source)
