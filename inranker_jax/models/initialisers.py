"""Initial parameters for small students that are trained from nothing.

A cross-encoder must find out that a query's word occurs in the document before it can learn anything else. From
T5's own initialisation that takes many more steps. `mimetic` starts the attention of the first
encoder layers in the form that attention takes in trained Transformers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from inranker_jax.errors import InputError
from inranker_jax.models.config import T5Config
from inranker_jax.models.t5 import init_params

Params = dict[str, Any]


def mimetic(
    config: T5Config,
    seed: int | jax.Array,
    *,
    layers: int = 1,
    query_key: float = 1.0,
    value_out: float = -1.0,
    self_bias: float = -8.0,
) -> Params:
    """T5's initialisation, with the self-attention of the first encoder layers in mimetic form.

    Asher Trockman and J. Zico Kolter, "Mimetic Initialization of Self-Attention Layers" (ICML 2023): in trained
    Transformers `W_q W_k^T` is close to a positive and `W_v W_o` to a negative multiple of the identity. Here they
    are such multiples, from orthogonal `W_k` and `W_v`. Equal tokens then attend to one another from the first
    step. Since a token always equals itself, the relative-position bias of offset 0 starts at `self_bias`.

    Args:
      config: the architecture.
      seed: as for `init_params`.
      layers: how many encoder layers start so; the others, and all of the decoder, start as T5's.
      query_key: `W_q = query_key * W_k / sqrt(d_kv)`.
      value_out: `W_o = value_out * W_v^T`.
      self_bias: added to the bias of offset 0, in every head and, since T5 shares it, in every encoder layer.

    Returns:
      Parameters in the structure of `init_params`.

    Raises:
      InputError: `layers` is out of range.
    """
    if not 0 <= layers <= config.num_layers:
        raise InputError(
            f"mimetic: layers={layers}. Expected 0 to {config.num_layers}, the encoder's layers."
        )
    params = init_params(config, seed)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), max(layers, 1))
    for number in range(layers):
        attention = params["encoder"][f"layers_{number}"]["attention"]
        key_seed, value_seed = jax.random.split(keys[number])
        shape = attention["key"]["kernel"].shape
        key = _orthogonal(key_seed, shape)
        value = _orthogonal(value_seed, shape)
        attention["key"]["kernel"] = key
        attention["query"]["kernel"] = key * (query_key * config.d_kv**-0.5)
        attention["value"]["kernel"] = value
        attention["out"]["kernel"] = value.T * value_out
    bias = params["encoder"]["relpos_bias"]
    bias["rel_embedding"] = bias["rel_embedding"].at[:, 0].add(self_bias)
    return params


def _orthogonal(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A float32 matrix with orthonormal columns, or rows where it is wide."""
    return jax.nn.initializers.orthogonal()(key, shape, jnp.float32)
