"""Reading and writing models: our own training checkpoints, and Hugging Face folders.

`load_model` finds out which of the two a path is, so that training, scoring and export can start from either.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

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
    """

    config: T5Config
    params: Params
    tokenizer: Tokenizer | None
    contract: ScoringContract | None
    source: str


def load_model(path_or_hub_id: str | os.PathLike[str], *, on_host: bool = False) -> LoadedModel:
    """Reads a model from wherever it is.

    Args:
      path_or_hub_id: a training output folder or one of its checkpoints, a Hugging Face folder, or the id of
        a model on the Hugging Face hub such as "unicamp-dl/InRanker-small".
      on_host: leave the parameters in host memory, as NumPy arrays.

    Returns:
      The model.

    Raises:
      InputError: where there is no such model or its parts do not fit together.
    """
    from inranker_jax.checkpoints import folders, huggingface

    source = os.fspath(path_or_hub_id)
    if folders.is_native(source):
        from inranker_jax.checkpoints import native  # and Orbax, which takes a while

        return native.load(source)
    return huggingface.load(source, place=(lambda _, array: array) if on_host else None)
