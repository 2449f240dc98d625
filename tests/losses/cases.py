"""The losses that the shared suite (`test_suite.py`) runs over. A new loss joins by adding one `Case`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from inranker_jax import losses

Targets = Callable[[np.random.Generator, tuple[int, ...]], dict[str, np.ndarray]]


def teacher(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Raw teacher logits `[*shape, 2]`, off centre as monoT5's are."""
    return {"teacher_logits": rng.normal(-4.0, 3.0, (*shape, 2)).astype(np.float32)}


def judgements(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Relevance `[*shape]` of 1 or 0, all known."""
    return {"relevance": rng.integers(0, 2, shape).astype(np.float32)}


def teacher_and_judgements(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Both of the above."""
    return teacher(rng, shape) | judgements(rng, shape)


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss under test.

    Attributes:
      name: the test id.
      loss: the loss.
      targets: draws its targets for `[*shape]` documents.
      per_list: True for a listwise loss, whose unreduced values are `[...]` rather than `[..., L]`.
      extreme_limit: largest finite value that logits of +-1e4 may lead to.
    """

    name: str
    loss: losses.Loss
    targets: Targets
    per_list: bool = False
    extreme_limit: float = 1e9


CASES = (
    Case("normalized_logit_mse", losses.normalized_logit_mse, teacher),
    Case(
        "normalized_logit_mse-sum",
        functools.partial(losses.normalized_logit_mse, label_reduction="sum"),
        teacher,
    ),
    Case("true_logit_mse", losses.true_logit_mse, teacher),
    Case("kl_divergence", losses.kl_divergence, teacher),
    Case("kl_divergence-warm", functools.partial(losses.kl_divergence, temperature=4.0), teacher),
    Case("listwise_kl_divergence", losses.listwise_kl_divergence, teacher, per_list=True),
    Case("hard_cross_entropy", losses.hard_cross_entropy, judgements),
    Case(
        "weighted_sum",
        losses.weighted_sum((losses.kl_divergence, losses.hard_cross_entropy), (0.25, 2.0)),
        teacher_and_judgements,
    ),
)
