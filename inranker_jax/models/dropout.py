"""Dropout whose masks depend on a seed and on what a value belongs to, not on where it lies.

A value belongs to a token of a document, a head and a feature. Documents have numbers within their step, so a mask is
the same in whatever row, micro-batch, process or device the document is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = np.uint32(0x9E3779B9)  # 2^32 over the golden ratio; without it the number 0 would be hashed to 0


class Names(NamedTuple):
    """Hashes that stand for documents and their tokens.

    Attributes:
      documents: uint32 [n, slots].
      tokens: uint32 [n, length].
    """

    documents: jax.Array
    tokens: jax.Array

    @classmethod
    def of(cls, numbers: jax.Array, segment_ids: jax.Array | None, length: int) -> Names:
        """Names of the documents of `n` rows, and of their tokens by position in the document.

        Args:
          numbers: int32 [n, slots], of the documents within the step.
          segment_ids: int32 [n, length] of packed rows, see `T5CrossEncoder`; None for one document a row.
          length: tokens of a row.
        """
        documents = derived(jnp.zeros((), jnp.uint32), numbers)
        columns = jax.lax.broadcasted_iota(jnp.int32, (1, length), 1)
        if segment_ids is None:
            return cls(documents, derived(documents[:, :1], columns))
        begins = segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
        first = jax.lax.cummax(jnp.where(begins, columns, 0), axis=1)
        owners = jnp.take_along_axis(documents, jnp.maximum(segment_ids - 1, 0), axis=1)
        return cls(documents, derived(owners, columns - first))


def derived(names: jax.Array, numbers: jax.Array) -> jax.Array:
    """Names of the parts of what `names` stands for, which have `numbers`; uint32, of the shape of both together."""
    hashed = _scramble(numbers.astype(jnp.uint32) + _GOLDEN)
    rank = max(names.ndim, numbers.ndim)
    return _scramble(_of_rank(names, rank) ^ _of_rank(hashed, rank))


def dropout(
    x: jax.Array,
    rate: float,
    seed: jax.Array | None,
    rows: jax.Array | None,
    columns: jax.Array | None = None,
) -> jax.Array:
    """Zeroes entries with probability `rate` and scales the others by `1 / (1 - rate)`; no seed, no dropout.

    The mask is a hash of the seed and of each entry's names. `jax.random.bernoulli` takes many times as long on
    a CPU, to run and to compile.

    Args:
      x: any shape.
      rate: probability of zero.
      seed: uint32 [2] of random bits, or None.
      rows: uint32, names that broadcast to `x.shape[:-1]`; None only without a seed.
      columns: uint32, names that broadcast to `x.shape`, of the last axis; its indices by default.

    Returns:
      The shape of `x`.

    Raises:
      ValueError: a seed without `rows`.
    """
    if seed is None or rate == 0.0:
        return x
    if rows is None:
        raise ValueError("dropout with a seed needs names of the rows, which decide its masks")
    if columns is None:
        columns = jax.lax.iota(jnp.uint32, x.shape[-1])
    by_row, by_column = _scramble(rows ^ seed[0])[..., None], _scramble(columns + seed[1])
    bits = _scramble(_of_rank(by_row, x.ndim) ^ _of_rank(by_column, x.ndim))
    keep = bits < np.uint32(round((1.0 - rate) * 2**32))
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def part(seeds: jax.Array | None, start: int, size: int | None = None) -> jax.Array | None:
    """`seeds[start]`, or `seeds[start : start + size]`; None stays None."""
    if seeds is None:
        return None
    return seeds[start] if size is None else seeds[start : start + size]


def _of_rank(x: jax.Array, rank: int) -> jax.Array:
    """`x` with leading axes of 1."""
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def _scramble(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit flips every output bit about half of the time.

    Two rounds of multiply and xor-shift with the constants of C. Wellons's `lowbias32` (2018).
    """
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
