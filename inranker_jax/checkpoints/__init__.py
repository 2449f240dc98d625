"""Reading and writing models: our own training checkpoints, T5X's, and Hugging Face folders.

`load_model` finds out which of the three a path is, so that training, scoring and export can start from any.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from inranker_jax import paths
from inranker_jax.models import Params, T5Config

if TYPE_CHECKING:
    from inranker_jax.prompts import ScoringContract, Tokenizer

__all__ = ["LoadedModel", "load_model"]


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


def load_model(path_or_hub_id: str | os.PathLike[str], *, on_host: bool = False) -> LoadedModel:
    """Reads a model from wherever it is.

    Args:
      path_or_hub_id: a training output folder or one of its checkpoints, a checkpoint of T5X (a step's folder,
        or the folder of several, of which the newest is read), a Hugging Face folder, or the id of a model on
        the Hugging Face hub such as "unicamp-dl/InRanker-small".
      on_host: leave the parameters in host memory, as NumPy arrays.

    Returns:
      The model.

    Raises:
      InputError: where there is no such model or its parts do not fit together.
    """
    from inranker_jax.checkpoints import folders, huggingface, t5x_folders

    source = os.fspath(path_or_hub_id)
    place = (lambda _, array: array) if on_host else None
    if folders.is_native(source):
        from inranker_jax.checkpoints import native  # and Orbax, which takes a while

        return native.load(source)
    t5x_checkpoint = t5x_folders.locate(source)
    if t5x_checkpoint is not None:
        from inranker_jax.checkpoints import t5x

        return t5x.load(t5x_checkpoint, source, place)
    if paths.is_remote(source):
        return dataclasses.replace(huggingface.load(paths.local_copy(source), place=place), source=source)
    return huggingface.load(source, place=place)
