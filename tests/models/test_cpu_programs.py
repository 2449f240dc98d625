"""What XLA:CPU makes of a training step: the products and attention that it can run fast.

The compiled program is read, in the text that jax 0.10.2 gives, because a slow form gives the same values. Each check
failed when it was written, on the form that it rules out.
"""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inranker_jax.models import Compute, apply, attention, init_params
from tests.models.reference import config_of

ROWS, LENGTH = 4, 24
# Entries of a row's queries in one head: every product of the encoder has at least as many in all three arrays.
SMALLEST = LENGTH * 6
LABELS = np.array([6, 7], np.int32)


def compiled(dtype: str, variant: str = "v1.0", *, packed: bool = False) -> tuple[str, object]:
    """The text of the program of a loss and its gradients, and the config."""
    config = config_of(variant, num_layers=2, num_decoder_layers=1)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    segments = np.repeat([1, 2], LENGTH // 2)[None].repeat(ROWS, 0)
    options = {"segment_ids": jnp.asarray(segments), "slots": 2} if packed else {}

    def loss(params):
        return jnp.mean(apply(config, params, tokens, LABELS, compute=Compute(dtype=dtype), **options) ** 2)

    return jax.jit(jax.value_and_grad(loss)).lower(init_params(config, 0)).compile().as_text(), config


def size_of(shape: str) -> int:
    """Entries of an array whose shape is written "4,24"."""
    return math.prod(int(size) for size in shape.split(",") if size)


def bodies(program: str) -> list[str]:
    """The computations of a program's text."""
    return re.split(r"\n\n", program)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", ["v1.0", "v1.1"])
def test_every_product_of_bfloat16_training_is_in_bfloat16(monkeypatch, variant, packed):
    # Attention a row at a time, as for real lengths and heads.
    monkeypatch.setattr(attention, "_BLOCK_BYTES", 1)
    program, _ = compiled("bfloat16", variant, packed=packed)
    slow, fast = [], []
    for body in bodies(program):
        arrays = {
            name: (kind, shape) for name, kind, shape in re.findall(r"%([\w.\-]+) = (\w+)\[([\d,]*)\]", body)
        }
        for line in body.splitlines():
            dot = re.search(r"%([\w.\-]+) = .* dot\(%([\w.\-]+), %([\w.\-]+)\)", line)
            # Not those of the decoder's few positions, and of the head, which is float32 by choice.
            if dot and min(size_of(arrays[name][1]) for name in dot.groups()) >= SMALLEST:
                both = {arrays[name][0] for name in dot.groups()[1:]}
                (fast if both == {"bf16"} else slow).append(line.strip())
    assert slow == []
    assert len(fast) > 40


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exponentials_read_the_bias_and_do_not_look_it_up(dtype):
    program, config = compiled(dtype)
    table = f"[{config.num_heads},{2 * LENGTH}]"
    assert table in program
    exponentials = [body for body in bodies(program) if " exponential(" in body]
    assert exponentials
    assert [body for body in exponentials if table in body] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scoring_copies_the_bias_for_no_row(dtype):
    """Nothing [rows, heads, length, length] is written to memory that is but the bias again."""
    config = config_of("v1.0", num_layers=2, num_decoder_layers=1)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    score = jax.jit(lambda params: apply(config, params, tokens, LABELS, compute=Compute(dtype=dtype)))
    program = score.lower(init_params(config, 0)).compile().as_text()
    whole = f"[{ROWS},{config.num_heads},{LENGTH},{LENGTH}]"
    entry = next(body for body in bodies(program) if body.lstrip().startswith("ENTRY"))
    written = [line for line in entry.splitlines() if whole in line.split(" = ")[-1].split("{")[0]]
    assert written, "scores and weights are, at this size"
    for line in written:
        called = re.search(r"calls=(%[\w.\-]+)", line)
        body = next((one for one in bodies(program) if called and one.startswith(called[1] + " (")), line)
        read = body.split("->")[0]
        assert whole in read or " dot(" in body, f"made of nothing of its size: {line}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_narrow_kernels_transpose_their_narrower_operand(dtype):
    """The last one of attention and of the MLP, here; the others are wide."""
    program, config = compiled(dtype)
    dots = [line for line in program.splitlines() if " dot(" in line]
    assert len([line for line in dots if "ot,ti->oi" in line]) >= 2 * config.num_layers
    others = [line.split(" dot(")[0] for line in dots if "...i,...o->io" in line]
    assert others
    for width in (config.inner_dim, config.d_ff):
        assert width > config.d_model
        assert [shape for shape in others if f"[{width},{config.d_model}]" in shape] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(12, 5), (7, 7), (5, 12)], ids=["narrow", "square", "wide"])
def test_gradients_of_a_product_are_those_of_an_einsum(shape, dtype):
    rng = np.random.default_rng(0)
    left, right, weight = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((3, 4, shape[0]), shape, (3, 4, shape[1]))
    )

    def plain(left, right):
        return jnp.sum(weight * jnp.einsum("...i,io->...o", left, right))

    def ours(left, right):
        return jnp.sum(weight * attention.product("...i,io->...o", left, right, dtype))

    expected = jax.grad(plain, argnums=(0, 1))(left, right)
    found = jax.jit(jax.grad(ours, argnums=(0, 1)))(left, right)
    for one, other in zip(found, expected, strict=True):
        # Operands rounded to 8 bits: each of the few terms of a sum is off by 2 * 2**-9 at most.
        limit = 1e-5 if dtype == "float32" else 2**-8 * 12 * float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, atol=limit)
