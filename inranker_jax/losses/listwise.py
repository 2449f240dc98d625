"""Losses over the documents of one list: what counts is their order, not the level of their scores."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from inranker_jax.errors import InputError
from inranker_jax.losses.contract import FALSE, TRUE, ReduceFn, document_mask, per_document, per_label, reduce


def listwise_kl_divergence(
    logits: jax.Array,
    *,
    teacher_logits: jax.Array,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    reduce_fn: ReduceFn | None = jnp.mean,
    temperature: float = 1.0,
) -> jax.Array:
    """KL divergence from the teacher's to the student's distribution over the documents of a list.

    `KL(p || q) = sum_i p_i log(p_i / q_i)`, where p and q are softmaxes over the L documents of the margins
    `s_i = logit_true - logit_false` of teacher and student: the distillation of ListNet's top-one probabilities
    (Cao et al., ICML 2007, section 4.2). A constant added to all scores of a list changes nothing. With a
    temperature T, margins are divided by T and the loss is multiplied by T^2.

    Args:
      logits: `[..., L, 2]`, the student's.
      teacher_logits: `[..., L, 2]`, raw or centred.
      where: bool `[..., L]`, real documents; None means all.
      weights: `[..., L]`, a factor per document, on its term of the sum.
      reduce_fn: as in `contract.reduce`; None returns `[...]`, one value per list.
      temperature: above 1 for softer distributions.

    Returns:
      A scalar, or `[...]`, in nats. A list with a single document has 0.

    Raises:
      InputError: a shape does not fit, or the temperature is not a positive number.

    The teacher's margins are log 3 and 0, so p = (3/4, 1/4); the student's are equal, so q = (1/2, 1/2):

    >>> teacher = jnp.array([[0.0, jnp.log(3.0)], [0.0, 0.0]])
    >>> student = jnp.array([[1.0, 5.0], [0.0, 4.0]])
    >>> round(float(listwise_kl_divergence(student, teacher_logits=teacher)), 4)  # 3/4 log 3/2 + 1/4 log 1/2
    0.1308
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"listwise_kl_divergence: temperature {temperature}. Expected a number above 0.")
    mask = document_mask(logits, where)
    student = _log_softmax(per_label("logits", logits, mask), mask, temperature)
    teacher = _log_softmax(per_label("teacher_logits", teacher_logits, mask), mask, temperature)
    terms = jnp.where(mask, jnp.exp(teacher) * (teacher - student), 0.0)
    if weights is not None:
        terms = terms * per_document("weights", weights, mask)
    values = jnp.sum(terms, axis=-1) * temperature**2
    return reduce(values, jnp.any(mask, axis=-1), None, reduce_fn)


def _log_softmax(logits: jax.Array, mask: jax.Array, temperature: float) -> jax.Array:
    """Log probabilities `[..., L]` over the real documents; 0 at the others."""
    margins = (logits[..., TRUE] - logits[..., FALSE]) / temperature
    lowest = jnp.finfo(margins.dtype).min
    # Where a whole list is masked, all entries are equal and the softmax stays finite.
    normalised = jax.nn.log_softmax(jnp.where(mask, margins, lowest), axis=-1)
    return jnp.where(mask, normalised, 0.0)
