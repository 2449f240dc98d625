"""Reading compiled programs."""

from __future__ import annotations

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inranker_jax.aot import hlo

TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0})->f32[4,16]{1,0}}

%fused (p0: f32[4,8], p1: bf16[8,16]) -> f32[4,16] {
  %p0 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %p1 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %dot.1 = f32[4,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op="(\\'b"}
}

ENTRY %main.3_spmd (x: f32[4,8], w: bf16[8,16]) -> (f32[4,16], /*index=1*/s32[]) {
  %x = f32[4,8]{1,0} parameter(0)
  %w = bf16[8,16]{1,0} parameter(1)
  %c = s32[]{:T(128)} constant(3)
  %fusion = f32[4,16]{1,0} fusion(%x, /*index=1*/%w), kind=kOutput, calls=%fused, backend_config={"flag":"(x"}
  ROOT %out = (f32[4,16]{1,0}, s32[]) tuple(%fusion, %c)
}
"""


def test_instructions_have_shapes_operands_and_what_they_call() -> None:
    module = hlo.parse(TEXT)
    assert module.entry == "main.3_spmd"
    main = module.computations["main.3_spmd"]
    assert list(main) == ["x", "w", "c", "fusion", "out"]
    assert main["fusion"].operands == ("x", "w")
    assert main["fusion"].called("calls") == ["fused"]
    assert main["out"].is_root
    assert [array.dims for array in main["out"].outputs] == [(4, 16), ()]
    fused = module.computations["fused"]
    assert fused["p1"].outputs[0] == hlo.Array("bf16", (8, 16), 1)
    assert fused["p1"].outputs[0].bytes == 256
    assert hlo.product_flops(fused["dot.1"], fused) == 2 * 4 * 8 * 16


def test_a_text_without_a_program_is_an_error() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")


@pytest.mark.parametrize("batch", [0, 3])
def test_products_of_a_compiled_program(batch: int) -> None:
    lead = (batch,) if batch else ()
    left, right = (jax.ShapeDtypeStruct((*lead, *shape), jnp.float32) for shape in ((5, 64), (64, 7)))
    text = jax.jit(jnp.matmul).lower(left, right).compile().as_text()
    module = hlo.parse(text or "")
    total = sum(
        hlo.product_flops(instruction, computation)
        for computation in module.computations.values()
        for instruction in computation.values()
    )
    assert total == 2 * 5 * 64 * 7 * max(batch, 1)


def convolution(line: str, left: str, right: str) -> float:
    text = f"ENTRY %e (a: f32[], b: f32[]) -> f32[] {{\n  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n"
    computation = hlo.parse(f"{text}  ROOT %c = {line}\n}}\n").computations["e"]
    return hlo.product_flops(computation["c"], computation)


@pytest.mark.parametrize(
    ("line", "left", "right", "products"),
    [
        # Taken from programs of the TPU compiler, which has no other name for products.
        (
            "f32[8,512,64]{1,2,0} convolution(%a, %b), window={size=1}, dim_labels=0bf_io0->0bf",
            "f32[8,512,128]{2,1,0}",
            "f32[128,64,1]{1,0,2}",
            8 * 512 * 64 * 128,
        ),
        (
            "f32[8,2,512,512]{2,3,1,0} convolution(%a, %b), window={size=8x2 stride=7x1 lhs_dilate=8x2}, "
            "dim_labels=01bf_01oi->01bf",
            "bf16[8,2,512,32]{3,2,1,0}",
            "bf16[8,2,512,32]{3,2,1,0}",
            8 * 2 * 512 * 512 * 32,
        ),
        (
            "f32[8,512,64]{1,2,0} convolution(%a, %b), window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=fb0_0oi->0fb",
            "f32[32,512,1]{2,1,0}",
            "f32[8,64,32]{2,1,0}",
            8 * 512 * 64 * 32,
        ),
        # An ordinary one: 28 of 30 pairs of place and kernel lie inside.
        (
            "f32[1,10,1]{2,1,0} convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            "f32[1,10,1]{2,1,0}",
            "f32[3,1,1]{2,1,0}",
            28,
        ),
    ],
    ids=["product", "batched", "reversed", "convolution"],
)
def test_convolutions_count_where_the_window_meets_the_input(
    line: str, left: str, right: str, products: int
) -> None:
    assert convolution(line, left, right) == 2 * products


def test_groups_of_mesh_axes() -> None:
    grid = np.arange(2 * 4 * 3).reshape(2, 4, 3)

    def group(axes: str) -> tuple[int, ...]:
        return hlo.group_of(f"replica_groups=mesh['a'=2,'b'=4,'c'=3] {{{axes}}}, dimensions={{0}}", 24)

    assert group("'c'") == tuple(grid[0, 0])
    assert group("'a'") == tuple(grid[:, 0, 0])
    assert group("'a','c'") == tuple(sorted(grid[:, 0].ravel()))
    # Parts of an axis: the inner 2 of 4, and the outer 2.
    assert group("'b':(2)2") == tuple(grid[0, :2, 0])
    assert group("'b':(1)2") == tuple(grid[0, ::2, 0])
    ordered = "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=({}) {{'a'}}, dimensions={{0}}"
    assert hlo.group_of(ordered.format("[2,4]T(1,0)"), 8) == (0, 1, 2, 3)
    assert hlo.group_of(ordered.format("7,6,5,4,3,2,1,0"), 8) == (1, 3, 5, 7)
    assert hlo.group_of("dimensions={0}", 4) == (0, 1, 2, 3)
    assert hlo.group_of("source_target_pairs={{0,5},{5,0}}", 8) == (0, 5)


def test_bytes_of_small_and_packed_types() -> None:
    (flag, four, token) = hlo.arrays("(pred[7]{0}, s4[10]{0}, token[])")
    assert (flag.bytes, four.bytes, token.bytes) == (7, 5, 0)
    assert math.prod(hlo.arrays("bf16[2,3]{1,0}")[0].dims) == 6


def test_examples_of_the_docstrings() -> None:
    results = doctest.testmod(hlo)
    assert (results.failed, results.attempted > 0) == (0, True)
