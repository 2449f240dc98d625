"""Several losses as one, and one loss over several micro-batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.losses.contract import (
    Loss,
    ReduceFn,
    at_least_float32,
    call,
    count,
    name_of,
    targets_of,
)


@dataclasses.dataclass(frozen=True, slots=True)
class WeightedSum:
    """A loss that is a weighted sum of losses; build it with `weighted_sum`.

    Attributes:
      parts: `(coefficient, loss)` pairs, none of them a WeightedSum.
      targets: names of the target arrays of all parts, each once.
    """

    parts: tuple[tuple[float, Loss], ...]
    targets: tuple[str, ...]

    def __call__(
        self,
        logits: jax.Array,
        *,
        where: jax.Array | None = None,
        weights: jax.Array | None = None,
        reduce_fn: ReduceFn | None = jnp.mean,
        **targets: jax.Array,
    ) -> jax.Array:
        """Returns `sum_i coefficient_i * loss_i(...)`; each part is reduced over its own valid entries.

        Args:
          logits: `[..., L, 2]`.
          where: bool `[..., L]`.
          weights: `[..., L]`, given to every part.
          reduce_fn: given to every part. None adds unreduced values, so the parts must agree on their shape.
          **targets: exactly the arrays named by `self.targets`.

        Returns:
          A scalar, or unreduced values.

        Raises:
          InputError: a target is missing or unknown, or unreduced parts have different shapes.
        """
        for name in targets:
            if name not in self.targets:
                raise InputError(
                    f"{self.__name__}: unknown target {name!r}.{did_you_mean(name, self.targets)} "
                    f"Its parts read {', '.join(self.targets)}."
                )
        missing = [name for name in self.targets if name not in targets]
        if missing:
            raise InputError(f"{self.__name__}: missing target {', '.join(missing)}.")
        logits = at_least_float32(logits)  # so that the gradients of the parts add up in float32
        results = []
        for coefficient, loss in self.parts:
            own = {name: targets[name] for name in targets_of(loss)}
            value = loss(logits, where=where, weights=weights, reduce_fn=reduce_fn, **own)
            results.append(coefficient * value)
        shapes = {name_of(loss): value.shape for (_, loss), value in zip(self.parts, results, strict=True)}
        if len({value.shape for value in results}) > 1:
            raise InputError(
                f"{self.__name__}: the parts return values of different shapes, {shapes}. "
                "Give a reduce_fn that returns a scalar, or call the parts one by one."
            )
        return sum(results[1:], start=results[0])

    @property
    def __name__(self) -> str:
        """A readable formula, such as `0.5 * kl_divergence + 1 * hard_cross_entropy`."""
        return " + ".join(f"{coefficient:g} * {name_of(loss)}" for coefficient, loss in self.parts)


def weighted_sum(losses: Sequence[Loss], coefficients: Sequence[float]) -> WeightedSum:
    """Combines losses into one: `sum_i coefficients[i] * losses[i]`.

    Args:
      losses: at least one loss; a WeightedSum among them is expanded.
      coefficients: one finite number per loss.

    Returns:
      A loss that needs the targets of all parts.

    Raises:
      InputError: no losses, another number of coefficients, or one that is not finite.

    >>> from inranker_jax import losses
    >>> both = weighted_sum((losses.true_logit_mse, losses.hard_cross_entropy), (2.0, 0.5))
    >>> both.targets
    ('teacher_logits', 'relevance')
    >>> teacher, judged = jnp.array([[-4.0, 4.0]]), jnp.array([1.0])
    >>> student = jnp.array([[3.0, 3.0]])

    The value is 2 * (3 - 4)^2 + 0.5 * log 2:

    >>> round(float(both(student, teacher_logits=teacher, relevance=judged)), 4)
    2.3466
    """
    losses, coefficients = tuple(losses), tuple(coefficients)
    if not losses or len(losses) != len(coefficients):
        raise InputError(
            f"weighted_sum: {len(losses)} losses and {len(coefficients)} coefficients. "
            "Expected at least one loss, and one coefficient for each."
        )
    for coefficient in coefficients:
        if not math.isfinite(coefficient):
            raise InputError(f"weighted_sum: coefficient {coefficient}. Expected a finite number.")
    parts = tuple(
        (coefficient * factor, part)
        for coefficient, loss in zip(coefficients, losses, strict=True)
        for factor, part in parts_of(loss)
    )
    names = dict.fromkeys(name for _, loss in parts for name in targets_of(loss))
    return WeightedSum(parts, tuple(names))


def parts_of(loss: Loss) -> tuple[tuple[float, Loss], ...]:
    """The `(coefficient, loss)` terms of a loss; a plain loss is one term with coefficient 1.

    >>> from inranker_jax import losses
    >>> parts_of(losses.true_logit_mse) == ((1.0, losses.true_logit_mse),)
    True
    """
    return loss.parts if isinstance(loss, WeightedSum) else ((1.0, loss),)


def valid_counts(loss: Loss, batch: Mapping[str, jax.Array], *, where: jax.Array) -> tuple[jax.Array, ...]:
    """How many entries of a whole batch each term of a loss averages over.

    Terms differ in what they count: all documents, judged documents, lists. See `mean_over` for the use.

    Args:
      loss: any loss.
      batch: the whole batch, with the targets of the loss.
      where: bool `[..., L]`, real documents of the whole batch.

    Returns:
      One float32 scalar per term of `parts_of(loss)`.

    Raises:
      InputError: the batch lacks a target.

    >>> from inranker_jax import losses
    >>> batch = {"relevance": jnp.array([[1.0, -1.0, 0.0]])}
    >>> [float(n) for n in valid_counts(losses.hard_cross_entropy, batch, where=jnp.ones((1, 3), bool))]
    [2.0]
    """
    blank = jnp.zeros((*jnp.shape(where), 2), jnp.float32)
    return tuple(call(part, blank, batch, where=where, reduce_fn=count) for _, part in parts_of(loss))


def mean_over(
    counts: Sequence[jax.Array],
    loss: Loss,
    logits: jax.Array,
    batch: Mapping[str, jax.Array],
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """The share of a micro-batch in the mean loss of its whole batch; shares, and their gradients, add up.

    Args:
      counts: `valid_counts` of the whole batch.
      loss: the loss they were counted for.
      logits: `[..., L, 2]` of the micro-batch.
      batch: its arrays.
      where: bool `[..., L]`, its real documents.
      weights: `[..., L]`.

    Returns:
      A scalar. A term that nothing in the whole batch is valid for adds 0.

    Raises:
      InputError: another number of counts than the loss has terms, or the batch lacks a target.

    >>> from inranker_jax import losses
    >>> loss, where = losses.hard_cross_entropy, jnp.ones((2, 2), bool)
    >>> logits, batch = jnp.zeros((2, 2, 2)), {"relevance": jnp.array([[1.0, 0.0], [1.0, -1.0]])}
    >>> counts = valid_counts(loss, batch, where=where)
    >>> rows = ({"relevance": batch["relevance"][i]} for i in range(2))
    >>> [round(float(mean_over(counts, loss, logits[i], row)), 4) for i, row in enumerate(rows)]  # of log 2
    [0.4621, 0.231]
    """
    parts = parts_of(loss)
    if len(counts) != len(parts):
        raise InputError(
            f"mean_over: {len(counts)} counts for the {len(parts)} terms of {name_of(loss)}. "
            "Expected valid_counts of the same loss."
        )
    logits = at_least_float32(logits)
    shares = [
        coefficient
        * call(part, logits, batch, where=where, weights=weights, reduce_fn=jnp.sum)
        / jnp.maximum(entries, 1)
        for (coefficient, part), entries in zip(parts, counts, strict=True)
    ]
    return sum(shares[1:], start=shares[0])
