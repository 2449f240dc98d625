"""Matrix products and attention with a backward pass of their own.

Both exist for speed and memory. A product in bfloat16 keeps bfloat16 operands and float32 sums in its gradient
too, where JAX's own rule would multiply float32 by bfloat16 and round the result. Attention saves its inputs and
one number per query instead of all weights (as FlashAttention does: Dao et al. 2022, section 3.1) and takes a few rows
at a time, so that their scores stay in a CPU's cache, or in the memory on a TPU's chip (`docs/performance.md`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from inranker_jax.models.dropout import derived, dropout
from inranker_jax.partitioning import BATCH_AXES, MODEL_AXIS

# Finite, so that a query without any key gets a uniform distribution instead of NaN.
MASKED_SCORE = float(np.finfo(np.float32).min)

# Scores of one block on a CPU: about what one core's second-level cache holds.
_BLOCK_BYTES = 2 * 2**20
# Scores of one turn of the loop on a TPU, and how many do without one: its compiler keeps them on the chip, which has
# 128 MiB (v5e) for them, as long as they are few.
_TURN_BYTES, _WHOLE_BYTES = 64 * 2**20, 160 * 2**20
# Each block is written out in the program, which takes time to compile.
_MOST_BLOCKS = 16


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(equation: str, left: jax.Array, right: jax.Array, dtype: str) -> jax.Array:
    """`einsum` with operands in `dtype` and a float32 accumulator and result; gradients likewise.

    Args:
      equation: of two operands, such as "...i,io->...o"; every index occurs in two of the three terms.
      left: the first operand, float32 or `dtype`.
      right: the second.
      dtype: "float32" or "bfloat16".

    Returns:
      float32.
    """
    return _einsum(equation, left, right, dtype)


def _einsum(equation: str, left: Any, right: Any, dtype: str) -> Any:
    return jnp.einsum(equation, left.astype(dtype), right.astype(dtype), preferred_element_type=jnp.float32)


def _product_forward(equation: str, left: jax.Array, right: jax.Array, dtype: str) -> tuple[jax.Array, Any]:
    types = (jnp.zeros((), left.dtype), jnp.zeros((), right.dtype))
    left, right = left.astype(dtype), right.astype(dtype)
    return _einsum(equation, left, right, dtype), (left, right, types)


def _product_backward(
    equation: str, dtype: str, saved: Any, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    left, right, types = saved
    inputs, result = equation.split("->")
    first, second = inputs.split(",")
    to_left = _einsum(f"{result},{second}->{first}", gradient, right, dtype)
    to_right = functools.partial(_einsum, f"{first},{result}->{second}", dtype=dtype)
    if equation == "...i,io->...o" and right.shape[0] >= right.shape[1] and not is_divided():
        narrow = functools.partial(_to_narrow_kernel, dtype=dtype)
        gradients = jax.lax.platform_dependent(left, gradient, cpu=narrow, default=to_right)
    else:
        gradients = to_right(left, gradient)
    return to_left.astype(types[0].dtype), gradients.astype(types[1].dtype)


def _to_narrow_kernel(left: jax.Array, gradient: jax.Array, dtype: str) -> jax.Array:
    """`einsum("...i,...o->io")`: transposes its narrower operand, the gradient, where XLA:CPU takes the first one."""
    left, gradient = left.reshape(-1, left.shape[-1]), gradient.reshape(-1, gradient.shape[-1]).astype(dtype)
    return jnp.swapaxes(_kept(_einsum("ot,ti->oi", _turned(gradient), left, dtype)), 0, 1)


product.defvjp(_product_forward, _product_backward)


_kept = jax.lax.optimization_barrier


def _turned(x: Any) -> Any:
    """The last two axes swapped, in memory too.

    XLA:CPU (jax 0.10.2) multiplies a bfloat16 operand that it sees as a transpose in float32, at less than half the
    speed: a barrier, and a way through one axis, hide that it is one. Divided arrays keep their axes.
    """
    swapped = jnp.swapaxes(x, -1, -2)
    if is_divided():
        return _kept(swapped)

    def flat(swapped: Any) -> Any:
        return _kept(swapped.reshape(-1)).reshape(swapped.shape)

    return jax.lax.platform_dependent(swapped, cpu=flat, default=_kept)


def is_divided() -> bool:
    """Whether the context mesh has more than one device."""
    return any(size > 1 for size in jax.sharding.get_abstract_mesh().shape.values())


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static settings of `attend`.

    Attributes:
      dtype: of the products' operands.
      rate: of dropout.
      rows: of a block on a CPU, 0 for all of them.
      turn: rows of each device in a turn of the loop on a TPU, 0 for no loop.
      ways: devices over which the rows are divided.
    """

    dtype: str
    rate: float
    rows: int
    turn: int = 0
    ways: int = 1


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    mask: jax.Array,
    seed: jax.Array | None = None,
    names: jax.Array | None = None,
    *,
    dtype: str = "float32",
    rate: float = 0.0,
) -> jax.Array:
    """`softmax(query key^T + bias) value` over the keys that `mask` allows, with dropout on the weights.

    Scores and softmax are float32 whatever `dtype`. Weights are divided by their sum after the product with the
    values, which is the same and cheaper.

    Args:
      query: [n, heads, length, d_kv]; T5 does not divide scores by sqrt(d_kv).
      key: the same shape.
      value: the same shape.
      bias: float32 [1, heads, length, length].
      mask: bool [n, 1, 1 or length, length], True where a query may attend to a key.
      seed: uint32 [2] of dropout, or None for none.
      names: uint32 [n, length], of the tokens; needed with a seed.
      dtype: of the products' operands.
      rate: of dropout.

    Returns:
      float32 [n, heads, length, d_kv].

    Raises:
      ValueError: a rate and a seed without `names`.
    """
    n, heads, length, _ = query.shape
    rows = 0 if is_divided() else max(1, _BLOCK_BYTES // (4 * heads * length * length), -(-n // _MOST_BLOCKS))
    ways = math.prod(_axis(name) for name in BATCH_AXES)
    turn = _turn(n // ways, 4 * max(1, heads // _axis(MODEL_AXIS)) * length * length) if n % ways == 0 else 0
    options = _Options(dtype, 0.0 if seed is None else rate, rows if rows < n else 0, turn, ways)
    if options.rate and names is None:
        raise ValueError("dropout with a seed needs names of the tokens, which decide its masks")
    seed = jnp.zeros(2, jnp.uint32) if seed is None else seed
    names = jnp.zeros((n, length), jnp.uint32) if names is None else names
    return _attend(options, query, key, value, bias, mask, seed, names)


def _axis(name: str) -> int:
    """Size of an axis of the context mesh, 1 where it has none of that name."""
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def _turn(rows: int, row_bytes: int) -> int:
    """Rows of a device that its loop takes at a time: a divisor of `rows`, or 0 where no loop is needed.

    >>> _turn(32, 12 * 2**20), _turn(8, 12 * 2**20), _turn(7, 100 * 2**20)
    (4, 0, 1)
    """
    if rows * row_bytes <= _WHOLE_BYTES:
        return 0
    return max(
        part
        for part in range(1, rows + 1)
        if rows % part == 0 and (part == 1 or part * row_bytes <= _TURN_BYTES)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: _Options, query: Any, key: Any, value: Any, bias: Any, mask: Any, seed: Any, names: Any
) -> Any:
    return _attend_forward(options, query, key, value, bias, mask, seed, names)[0]


@jax.named_scope("encoder_attention")  # the profile of benchmarks/profile_steps.py reads it
def _attend_forward(
    options: _Options, query: Any, key: Any, value: Any, bias: Any, mask: Any, seed: Any, names: Any
) -> tuple[Any, Any]:
    query, key, value = (x.astype(options.dtype) for x in (query, key, value))

    def block(query: Any, key: Any, value: Any, mask: Any, names: Any) -> Any:
        scores = _scores(options, query, key, bias, mask)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if options.rate:
            weights = _drop(options, weights, seed, names)
        context = _einsum("nhqk,nhkd->nhqd", weights, value, options.dtype) / total
        return (context, highest + jnp.log(total)), ()

    (context, log_total), _ = _by_blocks(options, block, query, key, value, mask, names)
    return context, (query, key, value, bias, mask, seed, names, context, log_total)


@jax.named_scope("encoder_attention")
def _attend_backward(options: _Options, saved: Any, gradient: Any) -> tuple[Any, ...]:
    query, key, value, bias, mask, seed, names, context, log_total = saved
    dtype = options.dtype

    def block(
        query: Any, key: Any, value: Any, mask: Any, names: Any, log_total: Any, gradient: Any, inner: Any
    ) -> Any:
        weights = jnp.exp(_scores(options, query, key, bias, mask) - log_total)
        to_weights = _einsum("nhqd,nhkd->nhqk", gradient, value, dtype)
        dropped = weights
        if options.rate:
            dropped, to_weights = (_drop(options, x, seed, names) for x in (weights, to_weights))
        to_value = _over_queries(dropped, gradient, dtype)
        to_scores = weights * (to_weights - inner)
        to_query = _einsum("nhqk,nhkd->nhqd", to_scores, key, dtype)
        to_key = _over_queries(to_scores, query, dtype)
        return (to_query, to_key, to_value), (jnp.sum(to_scores, axis=0, keepdims=True),)

    inner = jnp.sum(gradient * context, axis=-1, keepdims=True)
    arrays = (query, key, value, mask, names, log_total, gradient, inner)
    gradients, (to_bias,) = _by_blocks(options, block, *arrays)
    return *gradients, to_bias, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(options: _Options, query: Any, key: Any, bias: Any, mask: Any) -> Any:
    scores = _einsum("nhqd,nhkd->nhqk", query, key, options.dtype) + bias
    return jnp.where(mask, scores, MASKED_SCORE)


def _drop(options: _Options, weights: Any, seed: Any, names: Any) -> Any:
    """Dropout of weights [n, heads, query, key], by the names of both tokens and the head's number."""
    heads = jax.lax.iota(jnp.uint32, weights.shape[1])[:, None]
    return dropout(weights, options.rate, seed, derived(names[:, None], heads), names[:, None, None])


def _over_queries(weights: Any, states: Any, dtype: str) -> Any:
    """`einsum("nhqk,nhqd->nhkd")`, with the smaller operand and the result transposed and not the weights.

    XLA:CPU has no bfloat16 product that sums over the rows of its first operand, and notices only when it runs
    (jax 0.10.2: "Unsupported element type for DotThunk"); the barrier keeps it from making one of this.
    """
    transposed = _turned(states.astype(dtype))
    return jnp.swapaxes(_kept(_einsum("nhdq,nhqk->nhdk", transposed, weights, dtype)), 2, 3)


def _by_blocks(options: _Options, block: Any, *arrays: Any) -> Any:
    """`block(*parts)` over parts of the leading axis; it returns (arrays to concatenate, arrays to add).

    On a CPU they are written out, where `lax.map` was slower; on a TPU they are turns of a loop, in which every device
    takes some of its own rows.
    """

    if not options.rows and not options.turn:
        return block(*arrays)

    def parts(*arrays: Any) -> Any:
        starts = range(0, arrays[0].shape[0], options.rows)
        done = [block(*(x[i : i + options.rows] for x in arrays)) for i in starts]
        rows, sums = (zip(*results, strict=True) for results in zip(*done, strict=True))
        return tuple(map(jnp.concatenate, rows)), tuple(
            map(functools.partial(functools.reduce, jnp.add), sums)
        )

    def turns(*arrays: Any) -> Any:
        rows, sums = jax.lax.map(
            lambda part: jax.vmap(block)(*part), tuple(_split(options, x) for x in arrays)
        )
        joined = tuple(jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:]) for x in rows)
        return joined, tuple(jnp.sum(x, axis=(0, 1)) for x in sums)

    return jax.lax.platform_dependent(
        *arrays,
        cpu=parts if options.rows else block,
        tpu=turns if options.turn else block,
        default=block,
    )


def _split(options: _Options, x: Any) -> Any:
    """[n, ...] -> [turns, devices, rows of a turn, ...], without moving a row to another device."""
    x = x.reshape(options.ways, -1, options.turn, *x.shape[1:])
    if options.ways > 1:
        axes = tuple(name for name in BATCH_AXES if _axis(name) > 1)
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(axes))
    return jnp.moveaxis(x, 1, 0)
