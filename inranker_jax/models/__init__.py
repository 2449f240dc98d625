"""T5 rerankers as pure functions of arrays."""

from __future__ import annotations

from inranker_jax.models.config import ArchitectureError, Compute, T5Config
from inranker_jax.models.t5 import (
    Params,
    T5CrossEncoder,
    abstract_params,
    apply,
    check_params,
    init_params,
    logical_axes,
)

__all__ = [
    "ArchitectureError",
    "Compute",
    "Params",
    "T5Config",
    "T5CrossEncoder",
    "abstract_params",
    "apply",
    "check_params",
    "init_params",
    "logical_axes",
]
