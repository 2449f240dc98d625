"""Products and attention with their own backward pass, against JAX's."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inranker_jax.models import Compute, attention, init_params
from inranker_jax.models.attention import attend, product
from inranker_jax.models.dropout import derived, dropout
from inranker_jax.models.t5 import apply
from inranker_jax.partitioning import make_mesh
from tests.models.reference import config_of, ragged_tokens

SEED = jnp.array([11, 12], jnp.uint32)


def names_of(rows, length):
    return derived(jnp.zeros((), jnp.uint32), jnp.arange(rows * length).reshape(rows, length))


def inputs(rows, heads, length, width, *, segments):
    keys = jax.random.split(jax.random.key(0), 6)
    states = [jax.random.normal(key, (rows, heads, length, width)) for key in keys[:4]]
    bias = jax.random.normal(keys[4], (1, heads, length, length))
    if segments:
        ids = jnp.sort(jax.random.randint(keys[5], (rows, length), 0, 4), axis=1)
        mask = ids[:, None, :, None] == ids[:, None, None, :]
    else:
        real = jax.random.randint(keys[5], (rows, 1), 1, length)
        mask = (jnp.arange(length)[None] < real)[:, None, None, :]
    return *states, bias, mask


def plain(query, key, value, bias, mask, seed=None, *, rate=0.0):
    scores = jnp.einsum("nhqd,nhkd->nhqk", query, key) + bias
    weights = jax.nn.softmax(jnp.where(mask, scores, attention.MASKED_SCORE), axis=-1)
    names = names_of(weights.shape[0], weights.shape[2])
    by_head = derived(names[:, None], jnp.arange(weights.shape[1])[:, None])
    weights = dropout(weights, rate, seed, by_head, names[:, None, None])
    return jnp.einsum("nhqk,nhkd->nhqd", weights, value)


def values_and_gradients(function, query, key, value, gradient, bias, mask):
    def weighted(arrays):
        result = function(*arrays, mask)
        return jnp.sum(result * gradient), result

    (_, result), gradients = jax.jit(jax.value_and_grad(weighted, has_aux=True))((query, key, value, bias))
    return result, *gradients


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("rows_a_block", [1, 2, 5, 100])
def test_attention_equals_its_definition_in_blocks_of_any_size(monkeypatch, rows_a_block, rate, segments):
    arrays = inputs(5, 3, 12, 4, segments=segments)
    monkeypatch.setattr(attention, "_BLOCK_BYTES", rows_a_block * 4 * 3 * 12 * 12)
    found = values_and_gradients(
        lambda *a: attend(*a, SEED if rate else None, names_of(5, 12), dtype="float32", rate=rate), *arrays
    )
    expected = values_and_gradients(lambda *a: plain(*a, SEED, rate=rate), *arrays)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_blocks_drop_the_same_entries_as_one_block(monkeypatch):
    arrays = inputs(4, 2, 16, 8, segments=True)
    results = []
    for rows in (1, 100):
        monkeypatch.setattr(attention, "_BLOCK_BYTES", rows * 4 * 2 * 16 * 16)
        results.append(values_and_gradients(lambda *a: attend(*a, SEED, names_of(4, 16), rate=0.5), *arrays))
    kept = [np.asarray(values) != 0 for values in (results[0][3], results[1][3])]
    np.testing.assert_array_equal(*kept)  # the same dropout masks


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (4, 1, 1)])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_loop_of_a_tpu_gives_the_same_as_all_rows_at_once(monkeypatch, sizes, rate):
    arrays = inputs(8, 2, 12, 4, segments=True)

    def run():
        return values_and_gradients(
            lambda *a: attend(*a, SEED if rate else None, names_of(8, 12), rate=rate), *arrays
        )

    expected = run()
    turns = []

    def as_on_a_tpu(*arrays, default, tpu=None, **_):
        if tpu is None:
            return default(*arrays)
        turns.append(tpu.__name__)
        return tpu(*arrays)

    monkeypatch.setattr(attention.jax.lax, "platform_dependent", as_on_a_tpu)
    monkeypatch.setattr(attention, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(attention, "_TURN_BYTES", 1)  # one row of each device at a time
    devices = sizes and jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    with jax.set_mesh(make_mesh(*sizes, devices=devices)) if sizes else contextlib.nullcontext():
        found = run()
    assert set(turns) == {"turns"}
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_query_without_any_key_is_finite():
    query, key, value, gradient, bias, _ = inputs(2, 2, 6, 4, segments=False)
    nothing = jnp.zeros((2, 1, 1, 6), bool)
    for array in values_and_gradients(attend, query, key, value, gradient, bias, nothing):
        assert np.isfinite(array).all()


def test_huge_scores_do_not_overflow():
    query, key, value, gradient, bias, mask = inputs(2, 2, 6, 4, segments=False)
    found = values_and_gradients(attend, query * 300, key * 300, value, gradient, bias, mask)
    expected = values_and_gradients(plain, query * 300, key * 300, value, gradient, bias, mask)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3 * max(1.0, float(np.abs(other).max())))


def test_bfloat16_attention_is_as_close_as_its_operands():
    arrays = inputs(4, 2, 24, 8, segments=True)
    exact = values_and_gradients(attend, *arrays)
    rounded = values_and_gradients(functools.partial(attend, dtype="bfloat16"), *arrays)
    for one, other in zip(rounded, exact, strict=True):
        assert one.dtype == jnp.float32
        assert 0 < np.sqrt(np.mean((one - other) ** 2)) < 0.02 * np.sqrt(np.mean(np.square(other)))


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("...i,io->...o", (3, 5, 4), (4, 6)),
        ("nshd,ehd->nshe", (3, 2, 4, 5), (6, 4, 5)),
        ("she,nle->nshl", (2, 4, 5), (3, 6, 5)),
        ("nshl,nle->nshe", (3, 2, 4, 6), (3, 6, 5)),
    ],
)
def test_gradients_of_products_equal_those_of_einsum(equation, left, right):
    keys = jax.random.split(jax.random.key(1), 3)
    left, right = jax.random.normal(keys[0], left), jax.random.normal(keys[1], right)
    cotangent = jax.random.normal(keys[2], jnp.einsum(equation, left, right).shape)

    def gradients(function):
        return jax.grad(lambda pair: jnp.sum(function(*pair) * cotangent))((left, right))

    expected = gradients(functools.partial(jnp.einsum, equation))
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.1)):
        found = gradients(lambda a, b, dtype=dtype: product(equation, a, b, dtype))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == jnp.float32
            np.testing.assert_allclose(one, other, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 9), (9, 33), (16, 2)])
@pytest.mark.parametrize("variant", ["v1.0", "v1.1"])
def test_bfloat16_gradients_compile_and_run_for_any_shape(variant, shape):
    """XLA:CPU has no kernel for some bfloat16 products and says so only when they run."""
    config = config_of(variant, num_layers=1, num_decoder_layers=1)
    params = init_params(config, 0)
    tokens = ragged_tokens(*shape, config.vocab_size)
    segments, slots = np.ones_like(tokens), 2
    segments[:, shape[1] // 2 :] = 2
    labels = np.array([6, 7], np.int32)

    def total(params, dtype, packed):
        options = {"segment_ids": segments, "slots": slots} if packed else {}
        logits = apply(config, params, tokens, labels, compute=Compute(dtype=dtype), **options)
        return jnp.sum(logits[..., 1] - logits[..., 0])

    for packed in (False, True):
        run = jax.jit(jax.grad(total), static_argnums=(1, 2))
        found, expected = run(params, "bfloat16", packed), run(params, "float32", packed)
        difference = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), found, expected)
        size = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(expected))
        assert sum(map(float, jax.tree.leaves(difference))) < 0.1**2 * size
