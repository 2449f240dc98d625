"""What XLA:CPU makes of a training step: the products and attention that it can run fast.

The compiled program is read, because a slow form gives the same values. Each check failed when it was written, on the
form that it rules out.
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
    monkeypatch.setattr(
        attention, "_BLOCK_BYTES", 1
    )  # attention a row at a time, as for real lengths and heads
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
