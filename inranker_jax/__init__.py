"""Distil large T5 rerankers into small ones that rank as well on domains they never saw.

`Reranker` and `ScoringContract` are loaded on first use, so that importing the package costs next to nothing
and never needs TensorFlow.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inranker_jax.prompts import ScoringContract
    from inranker_jax.scorer import RankedDocument, Reranker

__version__ = "0.1.0"

# setup.py installs the repository's tasks/ as `inranker_jax.tasks`. In a checkout, where `python -m` finds this folder
# before the installed one, they are beside it.
_CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not os.path.isdir(os.path.join(__path__[0], "tasks")) and os.path.isfile(
    os.path.join(_CHECKOUT, "tasks", "python_docs.py")
):
    __path__.append(_CHECKOUT)

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
