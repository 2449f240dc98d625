"""What every loss has in common: shapes, masks, weights, reduction, and how the trainer finds its targets.

Notation of all shape notes: `...` is any number of leading batch dimensions (usually one), `L` the documents
of one query's list, and the last axis of size 2 holds the label logits in the order [false, true].

A loss is a plain function:

    def my_loss(logits, *, teacher_logits, where=None, weights=None, reduce_fn=jnp.mean): ...

Required keyword-only arguments name the target arrays it reads from the batch. Its body calls
`document_mask`, then `per_label` / `per_document` on each array, computes one value per document, and ends
with `reduce`. Masked entries are replaced before the computation and again after it, so whatever padding
holds (infinities and NaN included) changes neither a value nor a gradient.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from inranker_jax.errors import InputError, did_you_mean

FALSE, TRUE = 0, 1
"""Positions on the label axis."""

ReduceFn = Callable[..., jax.Array]
"""Called as `reduce_fn(values, where=mask)`; `values` and `mask` have one shape, masked values are 0."""

_COMMON = ("where", "weights", "reduce_fn")


class Loss(Protocol):
    """The call signature shared by all losses; targets are further keyword arguments."""

    def __call__(
        self,
        logits: jax.Array,
        *,
        where: jax.Array | None = None,
        weights: jax.Array | None = None,
        reduce_fn: ReduceFn | None = jnp.mean,
        **targets: Any,
    ) -> jax.Array:
        """Returns the reduced loss, or one value per document (or list) when `reduce_fn` is None."""


def document_mask(logits: jax.Array, where: jax.Array | None) -> jax.Array:
    """Checks the shapes of `logits` and `where` and returns the mask of real documents.

    Args:
      logits: `[..., L, 2]`, the student's label logits [false, true].
      where: bool `[..., L]`, True for real documents; None means that all are.

    Returns:
      bool `[..., L]`.

    Raises:
      InputError: `logits` lacks the list axis or a label axis of size 2; `where` has another shape or type.

    >>> document_mask(jnp.zeros((2, 2)), None)
    Array([ True,  True], dtype=bool)
    """
    shape = jnp.shape(logits)
    if len(shape) < 2 or shape[-1] != 2:
        raise InputError(
            f"logits: shape {shape}. Expected [..., L, 2], label logits [false, true] of a list of L "
            "documents. A single pair is a list of one: logits[None]."
        )
    if where is None:
        return jnp.ones(shape[:-1], bool)
    mask = jnp.asarray(where)
    if mask.shape != shape[:-1]:
        raise InputError(
            f"where: shape {mask.shape}. Expected {shape[:-1]}, one entry per document of logits {shape}."
        )
    if mask.dtype != jnp.bool_:
        raise InputError(
            f"where: dtype {mask.dtype}. Expected bool. Compare it first, for instance where > 0."
        )
    return mask


def per_label(name: str, array: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns `array` in float32 (float64 stays) with the label pairs of masked documents set to 0.

    Args:
      name: what to call the array in an error.
      array: `[..., L, 2]`, any real dtype.
      mask: bool `[..., L]`.

    Returns:
      `[..., L, 2]`.

    Raises:
      InputError: the shape is not that of the mask plus a label axis of size 2.

    >>> per_label("logits", jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]]), jnp.array([True, False])).tolist()
    [[1.0, 2.0], [0.0, 0.0]]
    """
    expected = (*mask.shape, 2)
    if jnp.shape(array) != expected:
        raise InputError(
            f"{name}: shape {jnp.shape(array)}. Expected {expected}, one [false, true] pair per document, "
            "as in logits."
        )
    return jnp.where(mask[..., None], at_least_float32(array), 0.0)


def per_document(name: str, array: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns `array` in float32 (float64 stays) with the entries of masked documents set to 0.

    Args:
      name: what to call the array in an error.
      array: `[..., L]`, any real dtype.
      mask: bool `[..., L]`.

    Returns:
      `[..., L]`.

    Raises:
      InputError: the shape is not that of the mask.

    >>> per_document("relevance", jnp.array([1.0, jnp.nan]), jnp.array([True, False])).tolist()
    [1.0, 0.0]
    """
    if jnp.shape(array) != mask.shape:
        raise InputError(
            f"{name}: shape {jnp.shape(array)}. Expected {mask.shape}, one number per document of logits."
        )
    return jnp.where(mask, at_least_float32(array), 0.0)


def reduce(
    values: jax.Array,
    mask: jax.Array,
    weights: jax.Array | None = None,
    reduce_fn: ReduceFn | None = jnp.mean,
) -> jax.Array:
    """Applies weights and mask, then the reduction. Every loss ends here.

    `jnp.mean` (also `functools.partial(jnp.mean, axis=...)`) divides by the number of unmasked entries, not
    by the sum of the weights, and gives 0 with zero gradients where nothing is left. Any other `reduce_fn` is
    called as it is, with the true mask: `jnp.sum` gives 0 too, and `count` the number of unmasked entries.

    Args:
      values: `[..., L]` per document, or `[...]` per list.
      mask: bool, the shape of `values`.
      weights: the shape of `values`, or None for all 1.
      reduce_fn: see above; None returns the weighted values, with 0 at masked entries.

    Returns:
      What `reduce_fn` returns (a scalar for the usual ones), or the shape of `values`.

    Raises:
      InputError: `weights` has another shape.

    >>> values, mask = jnp.array([1.0, 4.0, jnp.nan]), jnp.array([True, True, False])
    >>> float(reduce(values, mask))
    2.5
    >>> float(reduce(values, mask, weights=jnp.array([3.0, 1.0, 1.0])))  # (3 * 1 + 1 * 4) / 2 documents
    3.5
    >>> reduce(values, mask, reduce_fn=None).tolist()
    [1.0, 4.0, 0.0]
    >>> float(reduce(values, jnp.zeros(3, bool)))
    0.0
    """
    if weights is not None:
        values = values * per_document("weights", weights, mask)
    values = jnp.where(mask, values, 0.0)
    if reduce_fn is None:
        return values
    return _without_empty_means(reduce_fn)(values, where=mask)


def count(values: jax.Array, *, where: jax.Array) -> jax.Array:
    """A `reduce_fn` that counts the entries which contribute: the denominator of an exact global mean.

    Args:
      values: any shape; only its dtype is used.
      where: bool, the shape of `values`.

    Returns:
      A scalar in the dtype of `values`.

    >>> float(count(jnp.zeros(3), where=jnp.array([True, False, True])))
    2.0
    """
    return jnp.sum(where, dtype=values.dtype)


def targets_of(loss: Loss) -> tuple[str, ...]:
    """Names of the target arrays that a loss reads from the batch: its required keyword-only arguments.

    Sees through `functools.partial` and gin's wrappers; a combination of losses names those of all its parts.

    Args:
      loss: any loss.

    Returns:
      Names, in the order of the signature.

    Raises:
      InputError: the function does not follow the loss contract.

    >>> def my_loss(logits, *, relevance, where=None, weights=None, reduce_fn=jnp.mean): ...
    >>> targets_of(my_loss)
    ('relevance',)
    """
    declared = getattr(loss, "targets", None)
    if declared is not None:
        return tuple(declared)
    try:
        parameters = inspect.signature(loss).parameters
    except (TypeError, ValueError) as error:
        raise InputError(f"loss: {loss!r} is not a function whose signature can be read.") from error
    missing = [name for name in _COMMON if name not in parameters]
    if missing:
        raise InputError(
            f"loss {name_of(loss)}: no argument {', '.join(missing)}. Expected "
            "f(logits, *, <targets>, where=None, weights=None, reduce_fn=jnp.mean)."
        )
    return tuple(
        name
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
    )


def call(
    loss: Loss,
    logits: jax.Array,
    batch: Mapping[str, jax.Array],
    *,
    where: jax.Array | None = None,
    reduce_fn: ReduceFn | None = jnp.mean,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Calls a loss with the targets it needs, taken from the batch by name.

    Args:
      loss: any loss.
      logits: `[..., L, 2]`.
      batch: arrays by name, at least those of `targets_of(loss)`; others are ignored.
      where: bool `[..., L]`, real documents.
      reduce_fn: as in `reduce`.
      weights: `[..., L]`.

    Returns:
      What the loss returns.

    Raises:
      InputError: the batch lacks a target; the message lists what it has.

    >>> def gap(logits, *, target, where=None, weights=None, reduce_fn=jnp.mean):
    ...     return reduce(logits[..., 1] - target, document_mask(logits, where), weights, reduce_fn)
    >>> float(call(gap, jnp.array([[0.0, 3.0]]), {"target": jnp.array([1.0]), "tokens": jnp.zeros(9)}))
    2.0
    """
    targets = {}
    for name in targets_of(loss):
        if name not in batch:
            raise InputError(
                f"loss {name_of(loss)}: the batch has no {name!r}.{did_you_mean(name, batch)} "
                f"It has {', '.join(sorted(batch)) or 'nothing'}. Use data with that target, or another loss."
            )
        targets[name] = batch[name]
    return loss(logits, where=where, weights=weights, reduce_fn=reduce_fn, **targets)


def name_of(loss: Loss) -> str:
    """The name of a loss for messages: `kl_divergence`, also inside `functools.partial`.

    >>> name_of(functools.partial(count))
    'count'
    """
    while isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, "__name__", repr(loss))


def at_least_float32(array: jax.Array) -> jax.Array:
    """`array` in float32 if it is an integer or of half precision; float64 stays.

    >>> at_least_float32(jnp.zeros(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _masked_mean(
    values: jax.Array, axis: Any = None, *, where: jax.Array, keepdims: bool = False
) -> jax.Array:
    """`jnp.mean(where=...)`, except that a mean over nothing is 0 rather than 0 / 0."""
    total = jnp.sum(values, axis=axis, where=where, keepdims=keepdims)
    entries = jnp.sum(where, axis=axis, keepdims=keepdims, dtype=values.dtype)
    return total / jnp.maximum(entries, 1)


def _without_empty_means(reduce_fn: ReduceFn) -> ReduceFn:
    if reduce_fn is jnp.mean:
        return _masked_mean
    if isinstance(reduce_fn, functools.partial) and reduce_fn.func is jnp.mean:
        return functools.partial(_masked_mean, *reduce_fn.args, **reduce_fn.keywords)
    return reduce_fn
