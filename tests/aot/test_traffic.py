"""Bytes that instructions move, against hand-counted programs and loops of real compilers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from inranker_jax.aot import costs, hlo, topologies
from inranker_jax.aot.traffic import Traffic
from inranker_jax.hardware import CHIPS
from tests.aot.recipes import needs_libtpu

LAYERS, ROWS, SIDE = 12, 8, 16
STACK, LAYER = LAYERS * ROWS * SIDE * 4, ROWS * SIDE * 4

# What the TPU compiler makes of one layer of a loop: slices that begin early, views of other tiling, stacks updated in
# place among other results.
LOOPED = """HloModule m

%view (p: f32[12,8,16]) -> f32[12,8,16] {
  ROOT %p = f32[12,8,16]{2,1,0} parameter(0)
}

%inner (p: f32[12,8,16], i: s32[]) -> f32[8,16] {
  %p = f32[12,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %row = f32[1,8,16]{2,1,0} dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,8,16}
  ROOT %b = f32[8,16]{1,0} bitcast(%row)
}

%layer (stack: f32[12,8,16], i: s32[], weights: f32[12,8,16], x: f32[8,16]) -> (f32[12,8,16], bf16[8,16]) {
  %stack = f32[12,8,16]{2,1,0} parameter(0)
  %viewed = f32[12,8,16]{2,1,0} fusion(%stack), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%view
  %i = s32[] parameter(1)
  %weights = f32[12,8,16]{2,1,0} parameter(2)
  %row = f32[8,16]{1,0} fusion(%weights, %i), kind=kLoop, calls=%inner
  %x = f32[8,16]{1,0} parameter(3)
  %y = f32[8,16]{1,0} add(%x, %row)
  %z = s32[] constant(0)
  %new = f32[1,8,16]{2,1,0} bitcast(%y)
  %updated = f32[12,8,16]{2,1,0} dynamic-update-slice(%viewed, %new, %i, %z, %z)
  %small = bf16[8,16]{1,0} convert(%y)
  ROOT %t = (f32[12,8,16]{2,1,0}, bf16[8,16]{1,0}) tuple(%updated, %small)
}

%sum (stack: f32[12,8,16], i: s32[]) -> f32[12,8,16] {
  %stack = f32[12,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %row = f32[1,8,16]{2,1,0} dynamic-slice(%stack, %i, %z, %z), dynamic_slice_sizes={1,8,16}
  %all = f32[12,8,16]{2,1,0} broadcast(%row), dimensions={0,1,2}
  ROOT %s = f32[12,8,16]{2,1,0} add(%stack, %all)
}

ENTRY %e (stack: f32[12,8,16], weights: f32[12,8,16], x: f32[8,16], i: s32[]) -> f32[12,8,16] {
  %stack = f32[12,8,16]{2,1,0} parameter(0)
  %weights = f32[12,8,16]{2,1,0} parameter(1)
  %x = f32[8,16]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %z = s32[] constant(0)
  %start = ((f32[12,8,16]{2,1,0}), f32[1,8,16]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%weights), slice={[0:1], [0:8], [0:16]}
  %done = f32[1,8,16]{2,1,0:S(1)} slice-done(%start)
  %update = (f32[12,8,16]{2,1,0}, bf16[8,16]{1,0}) fusion(%stack, %i, %weights, %x), kind=kLoop, calls=%layer
  %next = f32[12,8,16]{2,1,0} get-tuple-element(%update), index=0
  %place = f32[12,8,16]{2,1,0} dynamic-update-slice(%next, %done, %i, %z, %z)
  ROOT %whole = f32[12,8,16]{2,1,0} fusion(%place, %i), kind=kLoop, calls=%sum
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("start", LAYER),  # the slice is read; where it goes, S(1), is on the chip
        (
            "update",
            LAYER + 4 + LAYER + LAYER + LAYER // 2,
        ),  # weights, index, x; the layer, and its copy in bf16
        ("place", 0 + 4 * 3 * 2),  # an update that is on the chip already; only the indices
        ("whole", STACK + 4 + STACK),  # all of it is used beside the slice
    ],
)
def test_only_what_is_sliced_and_updated_counts(name: str, moved: float) -> None:
    module = hlo.parse(LOOPED)
    entry = module.computations[module.entry]
    assert Traffic(module).of(entry[name], entry) == moved


@needs_libtpu
def test_bytes_of_a_loop_over_layers_grow_with_the_layers_not_with_their_square() -> None:
    device = topologies.describe("v5e:1x1").devices[0]

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, weights)[0].sum()

    def count(layers: int) -> costs.Costs:
        shapes = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=SingleDeviceSharding(device))
            for shape in ((layers, 1024, 1024), (4096, 1024))
        ]
        compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
        return costs.of(hlo.parse(compiled.as_text() or ""), 1)

    few, many = count(8), count(64)
    assert few.bytes > 8 * 4 * 1024 * (1024 + 4096) * 2
    assert 7 < many.bytes / few.bytes < 10
    # The compiler has a cost model of its own.
    chip = CHIPS["v5e"]
    assert chip.clock is not None
    roofline = many.seconds(chip.peak_flops["float32"], chip.hbm_bandwidth)
    assert 0.5 < many.cycles / chip.clock / roofline < 2
