"""Losses that look at one (query, document) pair at a time, from the InRanker thesis.

Shapes as in `losses.contract`: `[..., L, 2]` label logits in the order [false, true], one value per document.
The soft losses take the teacher's logits as they are, centred or not: centring an already centred pair
changes nothing, and a softmax does not see it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.losses.contract import (
    FALSE,
    TRUE,
    ReduceFn,
    document_mask,
    per_document,
    per_label,
    reduce,
)

_LABEL_REDUCTIONS = {"mean": jnp.mean, "sum": jnp.sum}


def centre(teacher_logits: jax.Array) -> jax.Array:
    """Subtracts from each [false, true] pair its own mean (thesis eq. 10).

    Computed as plus and minus half the difference, which equals eq. 10 and makes the result exactly symmetric
    and a second centring exactly neutral.

    Args:
      teacher_logits: `[..., 2]`, raw or centred, any real dtype.

    Returns:
      `[..., 2]`, float32 (float64 stays), each pair summing to 0.

    Raises:
      InputError: the last axis does not have size 2.

    >>> centre(jnp.array([[-7.0, -1.0], [2.0, 2.0]])).tolist()
    [[-3.0, 3.0], [0.0, 0.0]]
    """
    logits = jnp.asarray(teacher_logits)
    if logits.ndim < 1 or logits.shape[-1] != 2:
        raise InputError(f"teacher_logits: shape {logits.shape}. Expected [..., 2], pairs [false, true].")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return (logits - logits[..., ::-1]) / 2


def normalized_logit_mse(
    logits: jax.Array,
    *,
    teacher_logits: jax.Array,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    reduce_fn: ReduceFn | None = jnp.mean,
    label_reduction: str = "mean",
) -> jax.Array:
    """Squared error between the student's logits and the teacher's centred logits: the loss of InRanker.

    Thesis eq. 10 and 11: `(Y_true - L'_true)^2 + (Y_false - L'_false)^2`, where `L'` are the centred teacher
    logits. The thesis prints that sum; the published training code takes the mean of the two terms, half as
    much, and so do we unless told otherwise: the published recipe belongs to the mean.

    Args:
      logits: `[..., L, 2]`, the student's.
      teacher_logits: `[..., L, 2]`, raw or centred.
      where: bool `[..., L]`, real documents; None means all.
      weights: `[..., L]`, a factor per document.
      reduce_fn: as in `contract.reduce`; None returns `[..., L]`.
      label_reduction: "mean" over the two logits (the published code) or their "sum" (the printed eq. 11).

    Returns:
      A scalar, or `[..., L]`, in squared logits.

    Raises:
      InputError: a shape does not fit, or `label_reduction` is neither of the two.

    The first pair below has centred targets [-3, 3], so the errors are 2 and -1; the second has no error:

    >>> student = jnp.array([[-1.0, 2.0], [0.0, 0.0]])
    >>> teacher = jnp.array([[-7.0, -1.0], [4.0, 4.0]])
    >>> float(normalized_logit_mse(student, teacher_logits=teacher))  # ((4 + 1) / 2 + 0) / 2 documents
    1.25
    >>> float(normalized_logit_mse(student, teacher_logits=teacher, label_reduction="sum"))
    2.5
    """
    if label_reduction not in _LABEL_REDUCTIONS:
        raise InputError(
            f"label_reduction: {label_reduction!r}. Expected 'mean' or 'sum'."
            f"{did_you_mean(str(label_reduction), _LABEL_REDUCTIONS)}"
        )
    mask = document_mask(logits, where)
    student = per_label("logits", logits, mask)
    teacher = centre(per_label("teacher_logits", teacher_logits, mask))
    values = _LABEL_REDUCTIONS[label_reduction](jnp.square(student - teacher), axis=-1)
    return reduce(values, mask, weights, reduce_fn)


def true_logit_mse(
    logits: jax.Array,
    *,
    teacher_logits: jax.Array,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    reduce_fn: ReduceFn | None = jnp.mean,
) -> jax.Array:
    """Squared error of the 'true' logit alone: "MSE with 'true' logit only" of thesis table 3.

    `(Y_true - L'_true)^2` with the centred teacher logit of eq. 10. The 'false' logit gets no gradient.

    Args:
      logits: `[..., L, 2]`, the student's.
      teacher_logits: `[..., L, 2]`, raw or centred.
      where: bool `[..., L]`, real documents; None means all.
      weights: `[..., L]`, a factor per document.
      reduce_fn: as in `contract.reduce`; None returns `[..., L]`.

    Returns:
      A scalar, or `[..., L]`, in squared logits.

    Raises:
      InputError: a shape does not fit.

    The centred 'true' targets are 3 and 0:

    >>> student = jnp.array([[-1.0, 2.0], [9.0, 3.0]])
    >>> teacher = jnp.array([[-7.0, -1.0], [4.0, 4.0]])
    >>> float(true_logit_mse(student, teacher_logits=teacher))  # (1 + 9) / 2 documents
    5.0
    """
    mask = document_mask(logits, where)
    student = per_label("logits", logits, mask)[..., TRUE]
    teacher = centre(per_label("teacher_logits", teacher_logits, mask))[..., TRUE]
    return reduce(jnp.square(student - teacher), mask, weights, reduce_fn)


def kl_divergence(
    logits: jax.Array,
    *,
    teacher_logits: jax.Array,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    reduce_fn: ReduceFn | None = jnp.mean,
    temperature: float = 1.0,
) -> jax.Array:
    """KL(teacher || student) over the two labels [false, true] of each pair (thesis table 3).

    `T^2 * sum_c p_c (log p_c - log q_c)` with `p = softmax(teacher / T)` and `q = softmax(student / T)`. The
    factor `T^2` keeps the size of the gradients when the temperature changes (Hinton et al. 2015, section 2).
    Only the difference of the two logits matters, so centring has no effect.

    Args:
      logits: `[..., L, 2]`, the student's.
      teacher_logits: `[..., L, 2]`, raw or centred.
      where: bool `[..., L]`, real documents; None means all.
      weights: `[..., L]`, a factor per document.
      reduce_fn: as in `contract.reduce`; None returns `[..., L]`.
      temperature: T above; larger softens both distributions.

    Returns:
      A scalar, or `[..., L]`, in nats (times `T^2`).

    Raises:
      InputError: a shape does not fit, or the temperature is not a positive finite number.

    The teacher gives p(true) = 3/4 and the student 1/2, so the value is 3/4 log(3/2) + 1/4 log(1/2):

    >>> teacher = jnp.array([[5.0, 5.0 + jnp.log(3.0)]])
    >>> round(float(kl_divergence(jnp.zeros((1, 2)), teacher_logits=teacher)), 4)
    0.1308
    """
    if isinstance(temperature, bool) or not 0.0 < temperature < float("inf"):
        raise InputError(
            f"temperature: {temperature!r}. Expected a positive finite number; 1.0 changes nothing."
        )
    mask = document_mask(logits, where)
    student = jax.nn.log_softmax(per_label("logits", logits, mask) / temperature, axis=-1)
    teacher = jax.nn.log_softmax(per_label("teacher_logits", teacher_logits, mask) / temperature, axis=-1)
    values = temperature**2 * jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return reduce(values, mask, weights, reduce_fn)


def hard_cross_entropy(
    logits: jax.Array,
    *,
    relevance: jax.Array,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    reduce_fn: ReduceFn | None = jnp.mean,
) -> jax.Array:
    """Cross-entropy with human judgements, the "human hard" training of monoT5 (thesis eq. 12).

    `-log p(true)` for a relevant document and `-log p(false)` for another, with `p = softmax([false, true])`.
    Eq. 12 prints the sum over one pair of a relevant and a non-relevant document; here every judged document
    is one entry of the mean. Unjudged documents count as masked: they enter no mean and get no gradient.

    Args:
      logits: `[..., L, 2]`, the student's.
      relevance: `[..., L]`; above 0 relevant (any grade), 0 not relevant, below 0 (-1) unknown.
      where: bool `[..., L]`, real documents; None means all.
      weights: `[..., L]`, a factor per document.
      reduce_fn: as in `contract.reduce`, with unknown documents masked; None returns `[..., L]`.

    Returns:
      A scalar, or `[..., L]`, in nats. A real document with relevance NaN gives NaN, so that it is noticed.

    Raises:
      InputError: a shape does not fit.

    The three documents have p(true) = 3/4: a relevant one, one that is not, and one that nobody judged:

    >>> student = jnp.tile(jnp.array([0.0, jnp.log(3.0)]), (3, 1))
    >>> judged = jnp.array([1.0, 0.0, -1.0])
    >>> [round(v, 4) for v in hard_cross_entropy(student, relevance=judged, reduce_fn=None).tolist()]
    [0.2877, 1.3863, 0.0]
    >>> round(float(hard_cross_entropy(student, relevance=judged)), 4)  # (log 4/3 + log 4) / 2
    0.837
    """
    mask = document_mask(logits, where)
    relevance = per_document("relevance", relevance, mask)
    mask = mask & ~(relevance < 0)
    log_p = jax.nn.log_softmax(per_label("logits", logits, mask), axis=-1)
    values = -jnp.where(relevance > 0, log_p[..., TRUE], log_p[..., FALSE])
    values = jnp.where(jnp.isnan(relevance), jnp.nan, values)
    return reduce(values, mask, weights, reduce_fn)
