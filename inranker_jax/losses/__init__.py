"""Training objectives: arrays in, a scalar out. `losses.contract` says what they share.

Every loss is called as `loss(logits, *, <targets>, where=None, weights=None, reduce_fn=jnp.mean)`, where
`logits` are `[..., L, 2]`: label logits [false, true] for the L documents of each query's list.
"""

from __future__ import annotations

from inranker_jax.losses.combination import WeightedSum, mean_over, parts_of, valid_counts, weighted_sum
from inranker_jax.losses.contract import Loss, ReduceFn, call, count, name_of, targets_of
from inranker_jax.losses.listwise import listwise_kl_divergence
from inranker_jax.losses.pointwise import (
    centre,
    hard_cross_entropy,
    kl_divergence,
    normalized_logit_mse,
    true_logit_mse,
)

__all__ = [
    "Loss",
    "ReduceFn",
    "WeightedSum",
    "call",
    "centre",
    "count",
    "hard_cross_entropy",
    "kl_divergence",
    "listwise_kl_divergence",
    "mean_over",
    "name_of",
    "normalized_logit_mse",
    "parts_of",
    "targets_of",
    "true_logit_mse",
    "valid_counts",
    "weighted_sum",
]
