"""Distil large T5 rerankers into small ones that rank as well on domains they never saw.

`Reranker` and `ScoringContract` are loaded on first use, so that importing the package costs next to nothing
and never needs TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inranker_jax.prompts import ScoringContract
    from inranker_jax.scorer import RankedDocument, Reranker

__version__ = "0.1.0"
__all__ = ["RankedDocument", "Reranker", "ScoringContract"]

_HOMES = {
    "RankedDocument": "inranker_jax.scorer",
    "Reranker": "inranker_jax.scorer",
    "ScoringContract": "inranker_jax.prompts",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'inranker_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
