"""Layers of T5: norm, projections, MLP, encoder attention, and the attentions of a single decoder position.

Every parameter carries logical axis names ("vocab", "embed", "heads", "mlp", "relpos_buckets") as NNX
metadata. Names and shapes follow T5X: kernels are [in, out], and all heads of a projection share one axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from inranker_jax.models.attention import MASKED_SCORE, attend, is_divided, product
from inranker_jax.models.config import Compute, T5Config
from inranker_jax.models.dropout import Names, derived, dropout, part

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis in float32, over the entries where `mask` (broadcastable) is True."""
    return jax.nn.softmax(jnp.where(mask, scores, MASKED_SCORE), axis=-1)


def relative_position_buckets(offsets: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bidirectional relative-position buckets (T5, Raffel et al. 2020, section 2.1), as in transformers.

    Half of the buckets serve each direction. Half of those hold one distance each; the others grow
    logarithmically up to `max_distance`, and the last one takes everything beyond.

    Args:
      offsets: int [...], position of the key minus position of the query.
      num_buckets: number of buckets, for both directions together.
      max_distance: distance from which the last bucket is used.

    Returns:
      int32, same shape, in `[0, num_buckets)`. For 32 buckets and distance 128: 0 -> 0, -3 -> 3, 3 -> 19,
      -16 -> 10, 1000 -> 31.
    """
    per_side = num_buckets // 2
    exact = per_side // 2
    distance = np.abs(offsets)
    # float32 throughout: transformers rounds these products in float32, and the buckets' edges depend on it.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    grown = ratio / np.float32(math.log(max_distance / exact)) * np.float32(per_side - exact)
    large = np.minimum(exact + grown.astype(np.int32), per_side - 1)
    return (np.where(distance < exact, distance, large) + per_side * (offsets > 0)).astype(np.int32)


class Embedding(nnx.Module):
    """Token embedding table, [vocab, embed]."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        shape = (config.vocab_size, config.d_model)
        self.embedding = normal_param(rngs, shape, ("vocab", "embed"), config.initializer_factor)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Rows of the table in float32: ids int32 [...] -> [..., embed]; ids outside are taken for the nearest."""
        return jnp.take(_whole_rows(self.embedding[...]), ids, axis=0, mode="clip").astype(jnp.float32)


def _whole_rows(table: jax.Array) -> jax.Array:
    """Under a context mesh with a `model` axis: the table with its width divided instead of its rows.

    Looking up in divided rows leaves the choice to XLA, whose partitioned scatter (the gradient) added other
    rows' updates to the first row of a shard on a 1x4x2 mesh (jax 0.10.2; `tests/test_trainer.py`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways = dict(mesh.shape).get("model", 1)
    if ways == 1:
        return table
    width = "model" if table.shape[1] % ways == 0 else None
    return jax.lax.with_sharding_constraint(table, PartitionSpec(None, width))


class Projection(nnx.Module):
    """Linear map without bias, kernel [in, out]."""

    def __init__(
        self, shape: tuple[int, int], names: tuple[str, str], std: float, dtype: str, *, rngs: nnx.Rngs
    ) -> None:
        self.dtype = dtype
        self.kernel = normal_param(rngs, shape, names, std)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> float32 [..., out]."""
        return product("...i,io->...o", x, self.kernel[...], self.dtype)


class Norm(nnx.Module):
    """Scaling by the inverse root mean square, in float32, without mean subtraction or bias."""

    def __init__(self, config: T5Config) -> None:
        self.epsilon = config.layer_norm_epsilon
        self.scale = nnx.Param(
            jnp.full((config.d_model,), config.initializer_factor, jnp.float32),
            out_sharding=("embed",),
            eager_sharding=False,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., embed] -> [..., embed]."""
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(jnp.float32)
        return x * inverse * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


class Mlp(nnx.Module):
    """`wo(act(wi x))`, or `wo(act(wi_0 x) * wi_1 x)` when gated; dropout on the hidden layer."""

    def __init__(self, config: T5Config, dtype: str, *, rngs: nnx.Rngs) -> None:
        self.rate = config.dropout_rate
        self.activation = config.activation
        self.gated = config.gated
        factor = config.initializer_factor
        shape, std = (config.d_model, config.d_ff), factor * config.d_model**-0.5
        first = functools.partial(Projection, shape, ("embed", "mlp"), std, dtype, rngs=rngs)
        if config.gated:
            self.wi_0, self.wi_1 = first(), first()
        else:
            self.wi = first()
        shape, std = (config.d_ff, config.d_model), factor * config.d_ff**-0.5
        self.wo = Projection(shape, ("mlp", "embed"), std, dtype, rngs=rngs)

    def __call__(self, x: jax.Array, seed: jax.Array | None, names: jax.Array | None) -> jax.Array:
        """[..., embed] -> [..., embed]; `names` uint32 [...] for dropout."""
        activation = _ACTIVATIONS[self.activation]
        hidden = activation(self.wi_0(x)) * self.wi_1(x) if self.gated else activation(self.wi(x))
        return self.wo(dropout(hidden, self.rate, seed, names))


class RelativePositionBias(nnx.Module):
    """Learned score for each head and relative-position bucket, [heads, relpos_buckets]."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.max_distance = config.relative_attention_max_distance
        shape = (config.num_heads, config.relative_attention_num_buckets)
        std = config.initializer_factor * config.d_model**-0.5
        self.rel_embedding = normal_param(rngs, shape, ("heads", "relpos_buckets"), std)

    def __call__(self, length: int) -> jax.Array:
        """Bias float32 [1, heads, length, length], query position before key position.

        A score depends on the offset `key - query` alone. So 2 * length values are looked up once, and each
        row of the result is a window of them, one step further right per query. The windows come from
        reshaping a repeated row, which keeps gather and scatter out of the program and its gradient.
        """
        table = self.rel_embedding[...].astype(jnp.float32)
        # Offsets 0 .. length-1, one filler that no window shows, then -(length-1) .. -1.
        offsets = np.concatenate([np.arange(length + 1), np.arange(1 - length, 0)])
        buckets = relative_position_buckets(offsets, table.shape[1], self.max_distance)
        row = jnp.take(table, jnp.asarray(buckets), axis=1)
        return _windows(row, length)[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _windows(row: jax.Array, length: int) -> jax.Array:
    """[heads, 2 * length] -> [heads, length, length]: row i begins i entries before the start, at the end.

    Differentiable in reverse only, like `product` and `attend`.
    """
    heads, width = row.shape
    rows = jnp.broadcast_to(row[:, None, :], (heads, length, width)).reshape(heads, length * width)
    # Cut one entry shorter, each row starts one entry earlier than the last.
    return rows[:, : length * (width - 1)].reshape(heads, length, width - 1)[:, :, :length]


@jax.named_scope("relative_bias")
def _windows_forward(row: jax.Array, length: int) -> tuple[jax.Array, None]:
    """As a loop on a CPU, whose result is kept.

    XLA:CPU writes the windows into every operation that reads them, and in exponentials their indices cost far more
    than the operation. A program without gradients adds the bias before, where a loop would only make it slower.
    Heads that are divided over devices are no axis for a loop.
    """
    if is_divided():
        return _windows(row, length), None
    by_head = functools.partial(jax.lax.map, lambda one: _windows(one[None], length)[0])
    at_once = functools.partial(_windows, length=length)
    return jax.lax.platform_dependent(row, cpu=by_head, default=at_once), None


@jax.named_scope("relative_bias")
def _windows_backward(length: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    """Sums along diagonals: the transpose of `_windows`, by the same cuts."""
    heads = gradient.shape[0]
    wide = jnp.pad(gradient, ((0, 0), (0, 0), (0, length - 1))).reshape(heads, -1)
    whole = jnp.pad(wide, ((0, 0), (0, length)))
    return (jnp.sum(whole.reshape(heads, length, 2 * length), axis=1),)


_windows.defvjp(_windows_forward, _windows_backward)


class Attention(nnx.Module):
    """The four projections of an attention block, and the three ways in which this model uses them."""

    def __init__(self, config: T5Config, dtype: str, *, rngs: nnx.Rngs) -> None:
        self.heads = config.num_heads
        self.rate = config.dropout_rate
        self.dtype = dtype
        width, inner, factor = config.d_model, config.inner_dim, config.initializer_factor
        names, std = ("embed", "heads"), factor * width**-0.5
        # Scores are not divided by sqrt(d_kv): T5 makes the query's initial values smaller instead.
        self.query = Projection((width, inner), names, std * config.d_kv**-0.5, dtype, rngs=rngs)
        self.key = Projection((width, inner), names, std, dtype, rngs=rngs)
        self.value = Projection((width, inner), names, std, dtype, rngs=rngs)
        self.out = Projection((inner, width), ("heads", "embed"), factor * inner**-0.5, dtype, rngs=rngs)

    def _split(self, x: jax.Array) -> jax.Array:
        """[n, length, heads * d_kv] -> [n, heads, length, d_kv], the layout of XLA's fastest products."""
        return x.reshape(*x.shape[:-1], self.heads, -1).swapaxes(1, 2)

    def full(
        self, x: jax.Array, bias: jax.Array, mask: jax.Array, seed: jax.Array | None, names: Names | None
    ) -> jax.Array:
        """Self-attention over all positions (the encoder's).

        Args:
          x: [n, length, embed], normed.
          bias: [1, heads, length, length].
          mask: bool [n, 1, 1 or length, length], True where a query may attend to a key.
          seed: of dropout, or None.
          names: of the tokens, for dropout.

        Returns:
          float32 [n, length, embed].
        """
        query, key_states, value = (self._split(p(x)) for p in (self.query, self.key, self.value))
        tokens = names and names.tokens
        context = attend(query, key_states, value, bias, mask, seed, tokens, dtype=self.dtype, rate=self.rate)
        return self.out(context.swapaxes(1, 2).reshape(*x.shape[:-1], -1))

    def single(self, x: jax.Array, seed: jax.Array | None, names: Names | None) -> jax.Array:
        """Self-attention of sequences of one: the softmax of one score is 1, so only the values count.

        Args:
          x: [n, slots, embed], normed; every slot is a sequence.
          seed: of dropout, or None; drops the one attention weight of each head.
          names: of the documents, for dropout.

        Returns:
          float32 [n, slots, embed].
        """
        value = self.value(x).reshape(*x.shape[:-1], self.heads, -1)
        weights = jnp.ones((*x.shape[:-1], self.heads), jnp.float32)
        weights = dropout(weights, self.rate, seed, names and names.documents)[..., None]
        return self.out((value * weights).reshape(*x.shape[:-1], -1))

    def absorbed(
        self,
        x: jax.Array,
        encoded: jax.Array,
        mask: jax.Array,
        seed: jax.Array | None,
        names: Names | None,
    ) -> jax.Array:
        """Cross-attention of one position a sequence, without the keys and values of the source positions.

        `q . (W_k e) = (W_k^T q) . e`, so the query is folded into W_k once; and
        `sum_l p_l (W_v e_l) = W_v (sum_l p_l e_l)`, so W_v is applied to the pooled state. Both are exact.

        Args:
          x: [n, slots, embed], normed; or [1, 1, embed], the same state for every sequence.
          encoded: [n, length, embed], the encoder's output.
          mask: bool [n, slots, length], True on the tokens of the slot's sequence.
          seed: of dropout, or None.
          names: of documents and tokens, for dropout.

        Returns:
          float32 [n, slots, embed].
        """
        by_head = (encoded.shape[-1], self.heads, -1)
        query = self.query(x).reshape(*x.shape[:-1], self.heads, -1)
        folded = product("nshd,ehd->nshe", query, self.key.kernel[...].reshape(by_head), self.dtype)
        if x.shape[:2] == (1, 1):
            scores = product("she,nle->nshl", folded[0], encoded, self.dtype)
        else:
            scores = product("nshe,nle->nshl", folded, encoded, self.dtype)
        weights = masked_softmax(scores, mask[:, :, None, :])
        heads = names and derived(names.documents[..., None], jnp.arange(self.heads))
        weights = dropout(weights, self.rate, seed, heads, names and names.tokens[:, None, None])
        pooled = product("nshl,nle->nshe", weights, encoded, self.dtype)
        context = product("nshe,ehd->nshd", pooled, self.value.kernel[...].reshape(by_head), self.dtype)
        return self.out(context.reshape(*context.shape[:2], -1))


class EncoderLayer(nnx.Module):
    """Self-attention and MLP, each on a normed input and added to the residual stream."""

    def __init__(self, config: T5Config, compute: Compute, *, rngs: nnx.Rngs) -> None:
        self.rate = config.dropout_rate
        self.pre_attention_layer_norm = Norm(config)
        self.attention = Attention(config, compute.dtype, rngs=rngs)
        self.pre_mlp_layer_norm = Norm(config)
        self.mlp = Mlp(config, compute.dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, bias: jax.Array, mask: jax.Array, seeds: jax.Array | None, names: Names | None
    ) -> jax.Array:
        """[n, length, embed] -> [n, length, embed]; arguments as for `Attention.full`, 4 `seeds`."""
        rows = names and names.tokens
        attended = self.attention.full(self.pre_attention_layer_norm(x), bias, mask, part(seeds, 0), names)
        x = x + dropout(attended, self.rate, part(seeds, 1), rows)
        transformed = self.mlp(self.pre_mlp_layer_norm(x), part(seeds, 2), rows)
        return x + dropout(transformed, self.rate, part(seeds, 3), rows)


class DecoderLayer(nnx.Module):
    """A decoder layer at one position: value path of self-attention, absorbed cross-attention, MLP."""

    def __init__(self, config: T5Config, compute: Compute, *, rngs: nnx.Rngs) -> None:
        self.rate = config.dropout_rate
        self.pre_self_attention_layer_norm = Norm(config)
        self.self_attention = Attention(config, compute.dtype, rngs=rngs)
        self.pre_cross_attention_layer_norm = Norm(config)
        self.encoder_decoder_attention = Attention(config, compute.dtype, rngs=rngs)
        self.pre_mlp_layer_norm = Norm(config)
        self.mlp = Mlp(config, compute.dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array,
        mask: jax.Array,
        seeds: jax.Array | None,
        names: Names | None,
    ) -> jax.Array:
        """[n or 1, slots or 1, embed] -> [n, slots, embed]; arguments as for `Attention.absorbed`, 6 `seeds`."""
        rows = names and names.documents
        attended = self.self_attention.single(self.pre_self_attention_layer_norm(x), part(seeds, 0), names)
        x = x + dropout(attended, self.rate, part(seeds, 1), rows)
        normed = self.pre_cross_attention_layer_norm(x)
        attended = self.encoder_decoder_attention.absorbed(normed, encoded, mask, part(seeds, 2), names)
        x = x + dropout(attended, self.rate, part(seeds, 3), rows)
        transformed = self.mlp(self.pre_mlp_layer_norm(x), part(seeds, 4), rows)
        return x + dropout(transformed, self.rate, part(seeds, 5), rows)


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], names: tuple[str, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from a normal distribution, with the logical name of each axis.

    NNX would shard it at once, which needs a context mesh; placement is left to whoever creates the
    parameters (see `models.t5.logical_axes`).
    """
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, out_sharding=names, eager_sharding=False)
