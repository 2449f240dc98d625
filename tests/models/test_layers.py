"""Position buckets, the bias made of them, and dropout."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.t5.modeling_t5 import T5Attention

from inranker_jax.models.attention import attend
from inranker_jax.models.dropout import Names, derived, dropout
from inranker_jax.models.layers import RelativePositionBias, relative_position_buckets
from tests.models.reference import config_of


@pytest.mark.parametrize("distance", [9, 20, 128, 256, 1000])
@pytest.mark.parametrize("buckets", [8, 32])
def test_buckets_equal_transformers_at_every_offset(buckets, distance):
    offsets = np.arange(-1500, 1501)
    expected = T5Attention._relative_position_bucket(
        torch.from_numpy(offsets), bidirectional=True, num_buckets=buckets, max_distance=distance
    )
    np.testing.assert_array_equal(relative_position_buckets(offsets, buckets, distance), expected.numpy())


def test_buckets_of_the_docstring():
    found = relative_position_buckets(np.array([0, -3, 3, -16, 1000]), 32, 128)
    np.testing.assert_array_equal(found, [0, 3, 19, 10, 31])


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_bias_is_the_table_looked_up_for_every_pair_of_positions(length):
    config = config_of("v1.0")
    module = RelativePositionBias(config, rngs=nnx.Rngs(0))
    table = np.asarray(module.rel_embedding[...])
    offsets = np.arange(length)[None, :] - np.arange(length)[:, None]
    buckets = relative_position_buckets(
        offsets, config.relative_attention_num_buckets, config.relative_attention_max_distance
    )
    np.testing.assert_array_equal(module(length), table[:, buckets][None])

    weights = np.random.default_rng(0).normal(size=(config.num_heads, length, length)).astype(np.float32)
    found = jax.grad(lambda module: jnp.sum(module(length)[0] * weights))(module).rel_embedding[...]
    expected = np.zeros_like(table)
    np.add.at(expected, (slice(None), buckets), weights)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def rows_of(count):
    return derived(jnp.zeros((), jnp.uint32), jnp.arange(count))


def zeros(seed, shape=(256, 512), rate=0.1):
    run = jax.jit(functools.partial(dropout, rate=rate))
    return np.asarray(run(jnp.ones(shape), seed=seed, rows=rows_of(shape[0])) == 0)


def seeds(count):
    return jax.random.bits(jax.random.key(1), (count, 2), jnp.uint32)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_its_share_and_scales_the_rest(rate):
    x = jnp.full((64, 2048), 3.0)
    dropped = np.asarray(dropout(x, rate, seeds(1)[0], rows_of(64)))
    share = (dropped == 0).mean()
    assert abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / x.size)
    np.testing.assert_allclose(dropped[dropped != 0], 3.0 / (1 - rate), rtol=1e-6)
    assert dropout(x, rate, None, None) is x
    assert dropout(x, 0.0, seeds(1)[0], rows_of(64)) is x


def test_dropout_without_names_is_refused():
    x = jnp.ones((2, 3, 4, 5))
    with pytest.raises(ValueError, match="needs names"):
        dropout(x, 0.1, seeds(1)[0], None)
    with pytest.raises(ValueError, match="needs names"):
        attend(x, x, x, jnp.zeros((1, 3, 4, 4)), jnp.ones((2, 1, 1, 4), bool), seeds(1)[0], rate=0.1)


def test_dropout_masks_are_uncorrelated_between_seeds_neighbours_and_axes():
    """Every correlation of independent masks has mean 0 and standard deviation 1 / sqrt(entries)."""
    masks = np.stack([(zeros(seed) - 0.1) / 0.3 for seed in seeds(8)])
    flat = masks.reshape(8, -1)
    bound = 4.5 / np.sqrt(flat.shape[1])
    between = flat @ flat.T / flat.shape[1]
    assert np.abs(between[~np.eye(8, dtype=bool)]).max() < bound
    for lag in (1, 2, 3, 8, 16, 64, 512, 1024):
        assert np.abs((flat[:, lag:] * flat[:, :-lag]).mean(axis=1)).max() < bound, lag
    rows, columns = masks.sum(axis=2) / np.sqrt(512), masks.sum(axis=1) / np.sqrt(256)
    assert rows.var() == pytest.approx(1.0, abs=0.15)
    assert columns.var() == pytest.approx(1.0, abs=0.15)


def test_dropout_masks_neighbouring_seeds_differ():
    """Also for seeds that a generator would hardly give."""
    base = zeros(jnp.array([0, 0], jnp.uint32))
    for seed in ([0, 1], [1, 0], [1, 1], [2**31, 0]):
        other = zeros(jnp.array(seed, jnp.uint32))
        assert (base & other).mean() < 0.05, seed


def test_names_of_tokens_are_of_their_document_and_place_wherever_they_lie():
    """Documents 7 and 5 in one packed row, after a gap and in another order, and in rows of their own."""
    alone = Names.of(jnp.array([[5], [7]]), None, 4)
    together = Names.of(jnp.array([[7, 5, 0]]), jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]]), 8)
    np.testing.assert_array_equal(together.documents[0, :2], alone.documents[::-1, 0])
    np.testing.assert_array_equal(together.tokens[0, :3], alone.tokens[1, :3])
    np.testing.assert_array_equal(together.tokens[0, 3:7], alone.tokens[0])
    assert len(np.unique(together.tokens[0, :7])) == 7
    many = Names.of(jnp.arange(512)[:, None], None, 512)
    assert len(np.unique(many.tokens)) > 0.9999 * 2**18, (
        "a hash of 2^18 tokens into 2^32 has some 8 collisions"
    )
