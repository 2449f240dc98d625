"""The cross-encoder: a T5 encoder, one decoder position, and the rows of the head that the labels need.

`T5CrossEncoder` is the NNX module. `apply` runs it on a plain nested dictionary of arrays, which is what
training, scoring and checkpoints hold:

>>> import jax.numpy as jnp
>>> from inranker_jax.models import T5Config, apply, init_params
>>> layers = {"num_layers": 1, "num_decoder_layers": 1}
>>> config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_heads=2, **layers)
>>> params = init_params(config, seed=0)
>>> params["encoder"]["layers_0"]["attention"]["query"]["kernel"].shape
(8, 8)
>>> apply(config, params, jnp.array([[3, 4, 1], [5, 1, 0]]), jnp.array([6, 7])).shape
(2, 2)
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from inranker_jax.errors import InputError
from inranker_jax.models import trees
from inranker_jax.models.attention import product
from inranker_jax.models.config import Compute, T5Config
from inranker_jax.models.dropout import Names, dropout, part
from inranker_jax.models.layers import (
    DecoderLayer,
    Embedding,
    EncoderLayer,
    Norm,
    Projection,
    RelativePositionBias,
)
from inranker_jax.partitioning import BATCH_AXES

Params = dict[str, Any]


class Encoder(nnx.Module):
    """Encoder layers, which share one relative-position bias, and the final norm."""

    def __init__(self, config: T5Config, compute: Compute, *, rngs: nnx.Rngs) -> None:
        self.num_layers = config.num_layers
        self.rate = config.dropout_rate
        self.compute = compute
        self.relpos_bias = RelativePositionBias(config, rngs=rngs)
        for i in range(config.num_layers):
            setattr(self, f"layers_{i}", EncoderLayer(config, compute, rngs=rngs))
        self.encoder_norm = Norm(config)

    def __call__(
        self, x: jax.Array, mask: jax.Array, seeds: jax.Array | None, names: Names | None
    ) -> jax.Array:
        """Embedded tokens [n, length, embed], the rest as for `Attention.full` -> [n, length, embed]."""
        bias = self.relpos_bias(x.shape[1])
        rows = names and names.tokens
        x = _divide_batch(dropout(x, self.rate, part(seeds, 0), rows))

        def step(layer: EncoderLayer, x: jax.Array, seeds: jax.Array | None) -> jax.Array:
            return _divide_batch(layer(x, bias, mask, seeds, names))

        layers = [getattr(self, f"layers_{i}") for i in range(self.num_layers)]
        x = _through(layers, step, x, part(seeds, 2, 4 * self.num_layers), self.compute)
        return dropout(self.encoder_norm(x), self.rate, part(seeds, 1), rows)


class Decoder(nnx.Module):
    """Decoder layers at one position, the final norm, and the head where it is not the embedding."""

    def __init__(self, config: T5Config, compute: Compute, *, rngs: nnx.Rngs) -> None:
        self.num_layers = config.num_decoder_layers
        self.rate = config.dropout_rate
        self.compute = compute
        # Without a second position it never matters; it is kept so that a checkpoint survives a round trip.
        self.relpos_bias = RelativePositionBias(config, rngs=rngs)
        for i in range(config.num_decoder_layers):
            setattr(self, f"layers_{i}", DecoderLayer(config, compute, rngs=rngs))
        self.decoder_norm = Norm(config)
        if not config.tie_word_embeddings:
            shape, names = (config.d_model, config.vocab_size), ("embed", "vocab")
            self.logits_dense = Projection(shape, names, config.initializer_factor, compute.dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array,
        mask: jax.Array,
        seeds: jax.Array | None,
        names: Names | None,
    ) -> jax.Array:
        """Start state [embed], encoder output [n, length, embed], mask bool [n, slots, length].

        Returns:
          float32 [n, slots, embed].
        """
        # Until its first look at the encoder's output, the decoder's state is the same for all; dropout ends that.
        shape = (1, 1) if seeds is None else mask.shape[:2]
        x = jnp.broadcast_to(x, (*shape, *x.shape))
        rows = names and names.documents
        x = _divide_batch(dropout(x, self.rate, part(seeds, 0), rows))

        def step(layer: DecoderLayer, x: jax.Array, seeds: jax.Array | None) -> jax.Array:
            return layer(x, encoded, mask, seeds, names)

        # The first layer may change the shape of the state; all others keep it.
        layers = [getattr(self, f"layers_{i}") for i in range(self.num_layers)]
        x = _through(layers[:1], step, x, part(seeds, 2, 6), self.compute)
        x = _through(layers[1:], step, x, part(seeds, 8, 6 * len(layers[1:])), self.compute)
        return dropout(self.decoder_norm(x), self.rate, part(seeds, 1), rows)


class T5CrossEncoder(nnx.Module):
    """T5 that reads one (query, document) sequence and gives one logit per label token.

    Attributes:
      config: the architecture.
      compute: how it runs.
    """

    def __init__(self, config: T5Config, *, compute: Compute | None = None, rngs: nnx.Rngs) -> None:
        self.config = config
        self.compute = compute or Compute()
        self.token_embedder = Embedding(config, rngs=rngs)
        self.encoder = Encoder(config, self.compute, rngs=rngs)
        self.decoder = Decoder(config, self.compute, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        label_ids: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        slots: int | None = None,
        dropout_key: jax.Array | None = None,
        numbers: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the label tokens at decoder position 0, of one sequence a row or of several.

        Packed sequences (`segment_ids`) attend to themselves only. Each is contiguous, so the offsets between its
        tokens, which are all that T5 knows of positions, are those of a row of its own.

        Args:
          tokens: int32 [n, length]; `config.pad_token_id` is padding on either side of the sequence, and a token
            like others within it. A row of nothing but padding gives finite values of no meaning. A row with an id
            outside the vocabulary gives NaN (another model's tokenizer, most likely).
          segment_ids: int32 [n, length] for packed rows: 0 is padding, whatever the token, and i marks the
            tokens of the row's sequence in slot i - 1.
          slots: most sequences a row; required with `segment_ids`.
          dropout_key: turns dropout on, with masks that depend on the key, on the numbers of the sequences and on
            positions in them (in rows without segments: columns), not on rows, padding on the right, or how arrays
            are divided over a mesh.
          numbers: int32 [n], or [n, slots] of packed rows: the sequences' own numbers for dropout, wherever they
            lie; by default they are counted, row by row.

        Returns:
          float32 [n, K]; with `segment_ids` [n, slots, K], finite values of no meaning for a slot without tokens.

        Raises:
          InputError: for arrays of another rank or type, or label ids outside the vocabulary.
        """
        tokens, label_ids = jnp.asarray(tokens), jnp.asarray(label_ids)
        _check_inputs(self.config, tokens, label_ids, segment_ids, slots)
        in_encoder, in_decoder = 2 + 4 * self.encoder.num_layers, 2 + 6 * self.decoder.num_layers
        seeds: jax.Array | None = None
        names: Names | None = None
        if dropout_key is not None:
            seeds = jax.random.bits(dropout_key, (in_encoder + in_decoder, 2), jnp.uint32)
            if numbers is None:
                numbers = jnp.arange(tokens.shape[0] * (slots or 1))
            names = Names.of(numbers.reshape(tokens.shape[0], slots or 1), segment_ids, tokens.shape[1])
        self_mask, cross_mask = _masks(tokens, self.config.pad_token_id, segment_ids, slots)
        encoded = self.encoder(self.token_embedder(tokens), self_mask, part(seeds, 0, in_encoder), names)
        start = _whole(self.token_embedder(jnp.asarray(self.config.decoder_start_token_id)))
        x = self.decoder(start, encoded, cross_mask, part(seeds, in_encoder, in_decoder), names)
        logits = self._label_logits(x, label_ids)
        unknown = jnp.any((tokens < 0) | (tokens >= self.config.vocab_size), axis=1)
        logits = jnp.where(unknown[:, None, None], jnp.nan, logits)
        return logits[:, 0] if segment_ids is None else logits

    def _label_logits(self, x: jax.Array, label_ids: jax.Array) -> jax.Array:
        """Decoder output [n, slots, embed] -> [n, slots, K]: only the rows of the head that are asked for.

        In float32, which costs nothing here, and because XLA:CPU fails on a bfloat16 gradient that is one value.
        """
        if self.config.scale_decoder_outputs:
            x = x * self.config.d_model**-0.5
        if self.config.tie_word_embeddings:
            return product("nse,ke->nsk", x, _whole(self.token_embedder(label_ids)), "float32")
        head = _whole(jnp.take(self.decoder.logits_dense.kernel[...], label_ids, axis=1))
        return product("nse,ek->nsk", x, head, "float32")


def init_params(config: T5Config, seed: int | jax.Array) -> Params:
    """Random parameters with the standard deviations of T5 (`_init_weights` of transformers).

    Args:
      config: the architecture.
      seed: an integer, which may be traced: `jax.jit(functools.partial(init_params, config),
        out_shardings=...)(seed)` creates every parameter where it belongs.

    Returns:
      Nested dictionary of float32 arrays. The same seed gives the same values on every mesh.
    """
    rngs = nnx.Rngs(params=jax.random.key(seed))
    return nnx.to_pure_dict(nnx.state(T5CrossEncoder(config, rngs=rngs), nnx.Param))


def abstract_params(config: T5Config) -> Params:
    """The tree of `init_params` with a `jax.ShapeDtypeStruct` for every array."""
    return trees.unflatten(dict(_definition(config, Compute())[1]))


def logical_axes(config: T5Config) -> dict[str, Any]:
    """The tree of `init_params` with the logical axis names of every array, such as `("embed", "mlp")`."""
    return trees.unflatten(dict(_definition(config, Compute())[2]))


def apply(
    config: T5Config,
    params: Params,
    tokens: jax.Array,
    label_ids: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    slots: int | None = None,
    compute: Compute | None = None,
    dropout_key: jax.Array | None = None,
    numbers: jax.Array | None = None,
) -> jax.Array:
    """`T5CrossEncoder` as a function of its parameters; differentiable in `params`.

    Args:
      config: the architecture.
      params: the tree of `init_params`, in any floating type and any sharding.
      tokens: int32 [n, length].
      label_ids: int32 [K].
      segment_ids: int32 [n, length] of packed rows, or None for one sequence a row.
      slots: most sequences a packed row.
      compute: how to run it; float32 without rematerialisation by default.
      dropout_key: turns dropout on.
      numbers: of the sequences, for dropout; see `T5CrossEncoder.__call__`.

    Returns:
      float32 [n, K], or [n, slots, K] of packed rows; see `T5CrossEncoder.__call__`.

    Raises:
      InputError: for parameters of another architecture, with both trees in the message.
    """
    compute = compute or Compute()
    graph, abstract, _ = _definition(config, compute)
    check_params(config, params, abstract)
    model = nnx.merge(graph, params)
    return model(
        tokens, label_ids, segment_ids=segment_ids, slots=slots, dropout_key=dropout_key, numbers=numbers
    )


def check_params(
    config: T5Config, params: Mapping[str, Any], abstract: Mapping[str, Any] | None = None
) -> None:
    """Raises InputError with both trees in the message where `params` does not belong to `config`."""
    abstract = abstract or _definition(config, Compute())[1]
    found = {path: tuple(leaf.shape) for path, leaf in trees.flatten(params).items()}
    difference = trees.mismatch({path: leaf.shape for path, leaf in abstract.items()}, found)
    if difference:
        raise InputError(
            f"The parameters do not belong to this T5Config. Expected (-) and found (+):\n{difference}\n"
            "Load parameters and config from the same checkpoint."
        )


@functools.lru_cache(maxsize=32)
def _definition(
    config: T5Config, compute: Compute
) -> tuple[Any, dict[str, jax.ShapeDtypeStruct], dict[str, tuple[str, ...]]]:
    """Static part of the module, and flat trees of abstract parameters and logical names."""
    # Under a context mesh NNX would take the logical names for mesh axes.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        model = nnx.eval_shape(functools.partial(_untouched, config, compute))
    graph, state = nnx.split(model)
    variables = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    shapes = {path: jax.ShapeDtypeStruct(v.shape, jnp.float32) for path, v in variables.items()}
    return graph, shapes, {path: v.get_metadata("out_sharding") for path, v in variables.items()}


def _untouched(config: T5Config, compute: Compute) -> T5CrossEncoder:
    """A module only for its shapes: all parameters share a key, as tracing `nnx.Rngs` takes three times as long."""
    key = jax.random.key(0)
    rngs: Any = types.SimpleNamespace(params=lambda: key)
    return T5CrossEncoder(config, compute=compute, rngs=rngs)


def _through(
    layers: list[Any],
    step: Callable[[Any, jax.Array, jax.Array | None], jax.Array],
    x: jax.Array,
    seeds: jax.Array | None,
    compute: Compute,
) -> jax.Array:
    """`x` after `step(layer, x, its seeds)` of all layers, written out or as a loop."""
    if not layers:
        return x
    by_layer = None if seeds is None else seeds.reshape(len(layers), -1, *seeds.shape[1:])
    if not compute.scan or len(layers) == 1:
        for i, layer in enumerate(layers):
            one = _rematerialised(functools.partial(step, layer), compute.remat)
            x = one(x, part(by_layer, i))
        return x
    graph, _ = nnx.split(layers[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.split(layer)[1] for layer in layers))

    def body(x: jax.Array, inputs: tuple[Any, jax.Array | None]) -> tuple[jax.Array, None]:
        params, own_seeds = inputs
        return step(nnx.merge(graph, params), x, own_seeds), None

    return jax.lax.scan(_rematerialised(body, compute.remat), x, (stacked, by_layer))[0]


def _rematerialised(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(function, policy=policy)


def _divide_batch(x: jax.Array) -> jax.Array:
    """Pins the leading axis to the batch axes of the context mesh; without such a mesh, `x` as it is.

    With fully sharded parameters XLA may otherwise divide activations along their width.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    devices = int(np.prod([mesh.shape[name] for name in axes]))
    if devices == 1 or x.shape[0] % devices:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def _whole(x: jax.Array) -> jax.Array:
    """Has every device of the context mesh hold all of `x`, some rows of a divided parameter.

    Otherwise both the batch and `x` are divided over `fsdp`, and where XLA's partitioner (jax 0.10.2) takes the batch
    apart the other way, it mixes its rows up on a 2x2x2 mesh.
    """
    if not jax.sharding.get_abstract_mesh().axis_names:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def real_tokens(tokens: jax.Array, pad_id: int) -> jax.Array:
    """Where rows without segments hold their sequence: from the first token that is not padding to the last.

    A `<pad>` in the middle stands in the text, and is read like any token, as `transformers` reads it.

    Args:
      tokens: int [..., length].
      pad_id: the padding's id.

    Returns:
      bool [..., length].
    """
    length = tokens.shape[-1]
    places = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1)
    first = jnp.min(jnp.where(tokens != pad_id, places, length), axis=-1, keepdims=True)
    last = jnp.max(jnp.where(tokens != pad_id, places, -1), axis=-1, keepdims=True)
    return (places >= first) & (places <= last)


def _masks(
    tokens: jax.Array, pad_id: int, segment_ids: jax.Array | None, slots: int | None
) -> tuple[jax.Array, jax.Array]:
    """Who may attend to whom: bool [n, 1, 1 or length, length] in the encoder, [n, slots, length] across."""
    if segment_ids is None:
        real = real_tokens(tokens, pad_id)
        return real[:, None, None, :], real[:, None, :]
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    numbers = jnp.arange(1, (slots or 0) + 1, dtype=segment_ids.dtype)
    return same, segment_ids[:, None, :] == numbers[None, :, None]


def _check_inputs(
    config: T5Config,
    tokens: jax.Array,
    label_ids: jax.Array,
    segment_ids: jax.Array | None,
    slots: int | None,
) -> None:
    expected = [("tokens", tokens, 2, "[n, length]"), ("label_ids", label_ids, 1, "[K]")]
    if segment_ids is not None:
        expected.append(("segment_ids", segment_ids, 2, "[n, length]"))
    for name, array, rank, shape in expected:
        if array.ndim != rank or not jnp.issubdtype(array.dtype, jnp.integer):
            raise InputError(f"{name} is {array.dtype}{list(array.shape)}. Expected int32 {shape}.")
    if (segment_ids is None) != (slots is None) or (slots is not None and slots < 1):
        raise InputError(f"slots is {slots}. Expected a positive number with segment_ids, and None without.")
    if segment_ids is not None and segment_ids.shape != tokens.shape:
        raise InputError(
            f"segment_ids has shape {list(segment_ids.shape)}, tokens {list(tokens.shape)}. Expected the same."
        )
    # Inside jit the ids are usually constants all the same; traced ones cannot be checked.
    if not isinstance(label_ids, jax.core.Tracer):
        outside = [int(i) for i in np.asarray(label_ids) if not 0 <= i < config.vocab_size]
        if outside:
            raise InputError(
                f"label_ids {outside} are outside the model's vocabulary of {config.vocab_size}. Expected "
                "the ids that the tokenizer of this model gives to the label pieces."
            )
