"""The cross-encoder against transformers, and against itself under every way of running it."""

from __future__ import annotations

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from inranker_jax import partitioning
from inranker_jax.errors import InputError
from inranker_jax.models import (
    Compute,
    T5CrossEncoder,
    abstract_params,
    apply,
    init_params,
    logical_axes,
    t5,
    trees,
)
from tests.models.reference import VARIANTS, config_of, our_tree, ragged_tokens, torch_logits, torch_model

LABELS = np.array([7, 3], np.int32)
# For tests whose programs are large: layers only cost compilation there.
SHALLOW = {"num_layers": 1, "num_decoder_layers": 1}


def our_loss(config, params, tokens, labels=LABELS, **options):
    logits = apply(config, params, tokens, labels, **options)
    target = jnp.linspace(-1.0, 2.0, logits.size).reshape(logits.shape)
    return jnp.mean(jnp.square(logits - target))


@functools.cache
def logits_of(config, **options):
    return jax.jit(functools.partial(apply, config, **options))


@functools.cache
def gradient_of(config, **options):
    return jax.jit(jax.grad(functools.partial(our_loss, config, **options)))


@functools.cache
def parity_case(variant):
    config = config_of(variant)
    model = torch_model(config)
    return config, model, our_tree(config, model.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant):
    config, model, params = parity_case(variant)
    tokens = ragged_tokens(5, 23, config.vocab_size)
    expected = torch_logits(model, tokens, LABELS).detach().numpy()
    np.testing.assert_allclose(apply(config, params, tokens, LABELS), expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(logits_of(config)(params, tokens, LABELS), expected, rtol=1e-4, atol=2e-5)
    # One label is a sigmoid ranker's output; padding on the left shifts every position alike.
    left = np.stack([np.roll(row, (row == 0).sum()) for row in tokens])
    single = logits_of(config)(params, left, LABELS[1:])
    np.testing.assert_allclose(single, expected[:, 1:], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_torch_autograd(variant):
    import torch

    config, model, params = parity_case(variant)
    tokens = ragged_tokens(4, 17, config.vocab_size, seed=1)
    logits = torch_logits(model, tokens, LABELS)
    target = torch.linspace(-1.0, 2.0, logits.numel()).reshape(logits.shape)
    named = dict(model.named_parameters(remove_duplicate=False))
    model.zero_grad()
    torch.mean((logits - target) ** 2).backward()
    expected = trees.flatten(our_tree(config, {n: p.grad for n, p in named.items() if p.grad is not None}))
    gradients = trees.flatten(gradient_of(config)(params, tokens))
    assert gradients.keys() == expected.keys()
    # What a decoder of one position cannot depend on; everything else must have a gradient to compare.
    idle = {p for p in gradients if "self_attention/query" in p or "self_attention/key" in p}
    idle.add("decoder/relpos_bias/rel_embedding")
    for path, gradient in gradients.items():
        assert bool(jnp.any(gradient != 0)) == (path not in idle), path
        scale = float(np.abs(expected[path]).max())
        np.testing.assert_allclose(
            gradient, expected[path], rtol=1e-3, atol=1e-4 * scale + 1e-7, err_msg=path
        )


@pytest.mark.parametrize("variant", ["v1.0", "v1.1"])
def test_absorbed_decoder_equals_plain_decoder(variant):
    """A decoder that computes keys, values and a softmax over its own position, and the whole head."""
    config, _, params = parity_case(variant)
    assert config.inner_dim != config.d_model
    tokens = ragged_tokens(3, 11, config.vocab_size, seed=2)
    model = nnx.merge(t5._definition(config, Compute())[0], params)
    mask = tokens != 0
    encoded = model.encoder(model.token_embedder(tokens), jnp.asarray(mask)[:, None, None, :], None, None)

    def norm(weights, x):
        return (
            x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.layer_norm_epsilon) * weights["scale"]
        )

    def attention(weights, x, source, allowed):
        def heads(name, states):
            projected = states @ np.asarray(weights[name]["kernel"], np.float64)
            return projected.reshape(*states.shape[:-1], config.num_heads, config.d_kv)

        scores = np.einsum("nqhd,nkhd->nhqk", heads("query", x), heads("key", source))
        scores = np.where(allowed[:, None, None, :], scores, -np.inf)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        context = np.einsum("nhqk,nkhd->nqhd", weight, heads("value", source))
        return context.reshape(*x.shape[:-1], -1) @ np.asarray(weights["out"]["kernel"], np.float64)

    with jax.numpy_rank_promotion("allow"):
        source = np.asarray(encoded, np.float64)
        embedding = np.asarray(params["token_embedder"]["embedding"], np.float64)
        decoder = jax.tree.map(lambda x: np.asarray(x, np.float64), params["decoder"])
        x = np.broadcast_to(embedding[config.decoder_start_token_id], (3, 1, config.d_model))
        for i in range(config.num_decoder_layers):
            layer = decoder[f"layers_{i}"]
            normed = norm(layer["pre_self_attention_layer_norm"], x)
            x = x + attention(layer["self_attention"], normed, normed, np.ones((3, 1), bool))
            normed = norm(layer["pre_cross_attention_layer_norm"], x)
            x = x + attention(layer["encoder_decoder_attention"], normed, source, mask)
            normed = norm(layer["pre_mlp_layer_norm"], x)
            w = {name: value["kernel"] for name, value in layer["mlp"].items()}
            if config.gated:
                hidden = np.asarray(jax.nn.gelu(normed @ w["wi_0"], approximate=True)) * (normed @ w["wi_1"])
            else:
                hidden = np.maximum(normed @ w["wi"], 0.0)
            x = x + hidden @ w["wo"]
        x = norm(decoder["decoder_norm"], x) * (config.d_model**-0.5 if config.scale_decoder_outputs else 1.0)
        head = embedding.T if config.tie_word_embeddings else decoder["logits_dense"]["kernel"]
        expected = (x @ head)[:, 0, LABELS]
    found = logits_of(config)(params, tokens, LABELS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_no_gradient(remat):
    config = config_of("v1.0", **SHALLOW)
    params = init_params(config, 0)
    tokens = ragged_tokens(3, 11, config.vocab_size)
    key = jax.random.key(3)

    plain, saved = (
        jax.jit(jax.grad(functools.partial(our_loss, config, compute=Compute(remat=r), dropout_key=key)))
        for r in ("none", remat)
    )
    assert "remat" in str(saved.trace(params, tokens).jaxpr)
    assert "remat" not in str(plain.trace(params, tokens).jaxpr)
    ours, theirs = saved(params, tokens), plain(params, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


@pytest.mark.parametrize(("remat", "dropout"), [("none", True), ("full", True), ("dots", False)])
def test_layers_in_a_loop_give_the_same_values_and_gradients(remat, dropout):
    config = config_of("v1.0", **{**SHALLOW, "num_layers": 3, "num_decoder_layers": 3})
    params = init_params(config, 0)
    tokens = ragged_tokens(3, 11, config.vocab_size)
    key = jax.random.key(3) if dropout else None
    written_out, looped = (
        jax.jit(
            jax.value_and_grad(
                functools.partial(our_loss, config, compute=Compute(remat=remat, scan=scan), dropout_key=key)
            )
        )
        for scan in (False, True)
    )
    program = str(looped.trace(params, tokens).jaxpr)
    assert len(program) < 0.8 * len(str(written_out.trace(params, tokens).jaxpr))
    ours, theirs = looped(params, tokens), written_out(params, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


@pytest.mark.parametrize("variant", ["v1.0", "v1.1"])
def test_bfloat16_stays_close_and_multiplies_in_bfloat16(variant):
    config = config_of(variant, **SHALLOW)
    params = init_params(config, 0)
    tokens = ragged_tokens(4, 19, config.vocab_size)
    compute = Compute(dtype="bfloat16")
    run = logits_of(config, compute=compute)
    exact = np.asarray(logits_of(config)(params, tokens, LABELS))
    rounded = np.asarray(run(params, tokens, LABELS))
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()
    program = run.lower(params, tokens, LABELS).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) > 10
    # All but the label rows of the head take bfloat16 operands.
    assert sum(line.count("bf16>") != 2 for line in products) == 1, products
    backward = gradient_of(config, compute=compute).lower(params, tokens).as_text()
    products = [line for line in backward.splitlines() if "dot_general" in line]
    assert sum(line.count("bf16>") != 2 for line in products) == 3, products
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    np.testing.assert_allclose(run(stored, tokens, LABELS), exact, atol=0.05 * np.abs(exact).max())
    gradients = gradient_of(config, compute=compute)(params, tokens)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradients))
    expected = gradient_of(config)(params, tokens)
    difference = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), gradients, expected)
    size = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(expected))
    assert sum(map(float, jax.tree.leaves(difference))) < 0.05**2 * size


def test_row_of_padding_is_finite_and_leaves_other_rows_alone():
    config = config_of("v1.0", **SHALLOW)
    params = init_params(config, 0)
    tokens = ragged_tokens(3, 9, config.vocab_size)
    alone = logits_of(config)(params, tokens, LABELS)
    with_empty = np.concatenate([tokens, np.zeros((1, 9), np.int32)])
    logits = logits_of(config)(params, with_empty, LABELS)
    gradients = gradient_of(config)(params, with_empty)
    np.testing.assert_allclose(logits[:3], alone, rtol=1e-5, atol=1e-6)
    assert np.isfinite(logits).all()
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))


def test_dropout_is_reproducible_and_unbiased_in_the_mean():
    config = config_of("v1.1", dropout_rate=0.2, **SHALLOW)
    params = init_params(config, 0)
    tokens = ragged_tokens(2, 9, config.vocab_size)
    run = jax.jit(lambda key: apply(config, params, tokens, LABELS, dropout_key=key))
    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    samples = np.stack([run(key) for key in jax.random.split(jax.random.key(2), 300)])
    exact = logits_of(config)(params, tokens, LABELS)
    assert float(samples.std(axis=0).min()) > 0.01
    # Not exactly unbiased, because of the softmax and norms; but scaling by 1 - rate would be far off.
    error = np.abs(np.asarray(samples.mean(axis=0) - exact))
    assert (error < 0.5 * np.asarray(samples.std(axis=0)) + 0.05).all()
    still = config_of("v1.1", dropout_rate=0.0, **SHALLOW)
    unchanged = jax.jit(lambda key: apply(still, params, tokens, LABELS, dropout_key=key))(jax.random.key(0))
    np.testing.assert_allclose(unchanged, exact, rtol=1e-6)


@pytest.mark.parametrize("rows", [8, 6])
def test_sharded_parameters_give_equal_logits_gradients_and_dropout(rows):
    """2 x 2 x 2 devices, with and without a context mesh, and a batch that the devices divide or not."""
    config = config_of("v1.1", vocab_size=64, **SHALLOW)
    params = init_params(config, 5)
    mesh = partitioning.make_mesh(data=2, fsdp=2, model=2)
    shardings = partitioning.param_shardings(mesh, logical_axes(config), abstract_params(config))
    assert not shardings["encoder"]["layers_0"]["mlp"]["wi_0"]["kernel"].is_fully_replicated
    sharded = jax.device_put(params, shardings)
    tokens = ragged_tokens(rows, 12, config.vocab_size)
    placed = tokens
    if rows % 4 == 0:
        placed = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    run = jax.jit(jax.value_and_grad(functools.partial(our_loss, config, dropout_key=jax.random.key(11))))
    expected = run(params, tokens)
    outside = run(sharded, placed)
    with jax.set_mesh(mesh):
        inside = run(sharded, placed)
    for found in (outside, inside):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), found, expected)


def test_parameters_born_sharded_equal_parameters_born_whole():
    config = config_of("v1.0", vocab_size=64, **SHALLOW)
    mesh = partitioning.make_mesh(data=2, fsdp=2, model=2)
    shardings = partitioning.param_shardings(mesh, logical_axes(config), abstract_params(config))
    with jax.set_mesh(mesh):
        born = jax.jit(functools.partial(init_params, config), out_shardings=shardings)(7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), born, init_params(config, 7))


@pytest.mark.parametrize("variant", VARIANTS)
def test_trees_of_shapes_names_and_values_agree(variant):
    config = config_of(variant)
    values, shapes, names = (
        trees.flatten(tree)
        for tree in (init_params(config, 0), abstract_params(config), logical_axes(config))
    )
    assert values.keys() == shapes.keys() == names.keys()
    for path, value in values.items():
        assert (value.shape, value.dtype) == (shapes[path].shape, shapes[path].dtype), path
        assert len(names[path]) == value.ndim, path
        assert set(names[path]) <= {"vocab", "embed", "heads", "mlp", "relpos_buckets"}, path
    assert sum(v.size for v in values.values()) == config.num_params


def test_initial_standard_deviations_are_those_of_transformers():
    sizes = {"vocab_size": 300, "d_model": 96, "d_kv": 16, "d_ff": 160, "num_heads": 12}
    sizes |= {"relative_attention_num_buckets": 64, "relative_attention_max_distance": 128}
    config = config_of("v1.1", **sizes, **SHALLOW, initializer_factor=0.5)
    reference = torch_model(config)
    reference.lm_head.weight.data *= 0.5
    expected = trees.flatten(our_tree(config, reference.state_dict()))
    for path, value in trees.flatten(init_params(config, 0)).items():
        if path.endswith("scale"):
            np.testing.assert_array_equal(value, 0.5)
        else:
            assert float(value.std()) == pytest.approx(float(expected[path].std()), rel=0.12), path
            assert abs(float(value.mean())) < 0.1 * float(value.std()), path


def test_module_and_function_agree():
    config = config_of("v1.0")
    model = T5CrossEncoder(config, rngs=nnx.Rngs(params=jax.random.key(3)))
    tokens = ragged_tokens(2, 7, config.vocab_size)
    expected = apply(config, init_params(config, 3), tokens, LABELS)
    np.testing.assert_array_equal(model(tokens, LABELS), expected)


def test_token_outside_the_vocabulary_gives_nan():
    config = config_of("v1.0", **SHALLOW)
    tokens = ragged_tokens(2, 7, config.vocab_size)
    tokens[1, 0] = config.vocab_size
    logits = logits_of(config)(init_params(config, 0), tokens, LABELS)
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1]).all()


def test_bad_arguments_are_named():
    config = config_of("v1.0")
    params = init_params(config, 0)
    tokens = ragged_tokens(2, 7, config.vocab_size)
    with pytest.raises(InputError, match=r"tokens is int32\[7\].*\[n, length\]"):
        apply(config, params, tokens[0], LABELS)
    with pytest.raises(InputError, match=r"label_ids is float32"):
        apply(config, params, tokens, LABELS.astype(np.float32))
    with pytest.raises(InputError, match=r"label_ids \[61\] are outside the model's vocabulary of 61"):
        apply(config, params, tokens, np.array([3, 61]))
    other = config_of("v1.1")
    with pytest.raises(InputError) as error:
        apply(other, params, tokens, LABELS)
    lines = str(error.value).splitlines()
    assert "- decoder/logits_dense/kernel (16, 61)" in lines
    assert "+ encoder/layers_0/mlp/wi/kernel (16, 20)" in lines


def test_docstring_example():
    failed, tried = doctest.testmod(t5)
    assert (failed, tried > 0) == (0, True)


@pytest.mark.parametrize("variant", ["v1.0", "v1.1"])
@pytest.mark.parametrize("lengths", [(5, 12, 1, 20), (40,), (1,) * 6])
def test_packed_sequences_equal_rows_of_their_own(variant, lengths):
    """Logits and every gradient, with other ids than the pad id in the padding of packed rows."""
    config = config_of(variant, **SHALLOW)
    params = init_params(config, 0)
    rng, slots = np.random.default_rng(3), 6
    rows = np.zeros((len(lengths), 40), np.int32)
    packed_row, segments = np.full((2, 40), 5, np.int32), np.zeros((2, 40), np.int32)
    start = 0
    for number, length in enumerate(lengths):
        rows[number, :length] = rng.integers(2, config.vocab_size, length)
        packed_row[1, start : start + length] = rows[number, :length]
        segments[1, start : start + length] = number + 1
        start += length
    weights = rng.normal(size=(len(lengths), 2)).astype(np.float32)

    def packed(params):
        logits = apply(config, params, packed_row, LABELS, segment_ids=segments, slots=slots)
        assert logits.shape == (2, slots, 2)
        return jnp.sum(weights * logits[1, : len(lengths)]), logits

    def alone(params):
        logits = apply(config, params, rows, LABELS)
        return jnp.sum(weights * logits), logits

    (_, found), gradients = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
    (_, expected), expected_gradients = jax.jit(jax.value_and_grad(alone, has_aux=True))(params)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[1, : len(lengths)], expected, atol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.abs(b).max())),
        gradients,
        expected_gradients,
    )


def test_bad_packed_inputs_are_named():
    config, _, params = parity_case("v1.0")
    tokens = np.ones((2, 8), np.int32)
    with pytest.raises(InputError, match="slots"):
        apply(config, params, tokens, np.array([6]), segment_ids=tokens)
    with pytest.raises(InputError, match="slots"):
        apply(config, params, tokens, np.array([6]), slots=2)
    with pytest.raises(InputError, match=r"segment_ids has shape \[2, 7\]"):
        apply(config, params, tokens, np.array([6]), segment_ids=tokens[:, :7], slots=2)
