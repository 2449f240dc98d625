"""Weighted ensembles: computed from labels that are stored, so that no pair is scored again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from inranker_jax.errors import InputError


def combine(logits: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Weighted sum of the members' centred logits.

    Centring (thesis eq. 10: z - mean(z)) makes members comparable that differ by a constant in both logits.

    Args:
      logits: one float [n, 2] for each member, (false, true), of the same pairs in the same order.
      weights: one finite weight for each member.

    Returns:
      float32 [n, 2], centred.

    Raises:
      InputError: no member, unequal numbers, or shapes that differ.

    >>> combine([np.array([[1.0, 3.0]]), np.array([[0.0, -4.0]])], [0.5, 0.25]).tolist()
    [[0.0, 0.0]]
    """
    _check_weights(weights, len(logits))
    shapes = {np.shape(member) for member in logits}
    if len(shapes) != 1 or len(shape := next(iter(shapes))) != 2 or shape[-1] != 2:
        raise InputError(
            f"the ensemble's members have the shapes {sorted(shapes)}; expected one shape [n, 2]."
        )
    total = np.zeros(np.shape(logits[0]), np.float64)
    for member, weight in zip(logits, weights, strict=True):
        values = np.asarray(member, np.float64)
        total += weight * (values - values.mean(axis=-1, keepdims=True))
    return total.astype(np.float32)


def ensemble_identity(member_keys: Sequence[str], weights: Sequence[float]) -> dict[str, Any]:
    """The identity of an ensemble: its members' keys with their weights, in an order of their own.

    >>> ensemble_identity(["b", "a"], [2, 1])
    {'kind': 'ensemble', 'members': [['a', 1.0], ['b', 2.0]]}
    """
    _check_weights(weights, len(member_keys))
    if len(set(member_keys)) != len(member_keys):
        raise InputError("the ensemble has the same teacher twice. Add its weights instead.")
    members = sorted([key, float(weight)] for key, weight in zip(member_keys, weights, strict=True))
    return {"kind": "ensemble", "members": members}


def parse_weights(text: str, members: int) -> list[float]:
    """Reads comma-separated weights, one for each member.

    Raises:
      InputError: not as many finite numbers as members.
    """
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"ensemble weights {text!r}: expected {members} numbers, such as 0.5,0.5.") from None
    _check_weights(weights, members)
    return weights


def _check_weights(weights: Sequence[float], members: int) -> None:
    if not members or len(weights) != members:
        raise InputError(f"{len(weights)} ensemble weights for {members} teachers; expected one for each.")
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise InputError(f"ensemble weights {list(weights)}: expected finite numbers, not all of them 0.")
