"""A tiny recipe, and how the TPU compiler is found."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import pytest

from inranker_jax import losses, optimizers
from inranker_jax.aot.programs import Recipe
from inranker_jax.models import Compute
from inranker_jax.packing import Layout
from inranker_jax.prompts import preset
from tests.batches import TINY

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, has no wheel for this system",
)


def recipe(mesh: jax.sharding.Mesh, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "config": TINY,
        "contract": preset("monot5").replace(max_length=32),
        "mesh": mesh,
        "total_steps": 1000,
        "batch_size": 16,
        "optimizer": optimizers.adamw,
        "learning_rate": optimizers.constant(1e-3),
        "loss": losses.normalized_logit_mse,
        "compute": Compute("bfloat16", "none"),
        "layout": Layout("packed", row_length=32, tokens_per_call=64),
    }
    return Recipe(**{**fields, **changes})
