"""Counting compiled programs: loops times their trips, the larger branch, collectives."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from inranker_jax.aot import costs, hlo
from inranker_jax.aot.costs import Collective, Costs
from inranker_jax.partitioning import make_mesh

SIDE = 32
PRODUCT = 2 * SIDE**3
SQUARE = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)


def count(function: Callable[..., Any], *arguments: Any, devices: int = 1, trips: float = 1.0) -> Costs:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return costs.of(hlo.parse(text or ""), devices, trips)


def test_a_loop_of_known_length_counts_all_its_trips() -> None:
    def scanned(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 5, lambda _, y: y @ x, x)

    found = count(scanned, SQUARE)
    assert found.flops == 5 * PRODUCT
    assert found.unknown_loops == 0
    # Two operands and a result, each time.
    assert found.bytes >= 5 * 3 * 4 * SIDE**2


def test_a_loop_of_unknown_length_counts_the_trips_that_are_given() -> None:
    def looped(x: jax.Array, n: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, n, lambda _, y: y @ x, x)

    found = count(looped, SQUARE, jax.ShapeDtypeStruct((), jnp.int32), trips=2.5)
    assert found.flops == 2.5 * PRODUCT
    assert found.unknown_loops == 1


def test_a_loop_whose_counter_is_in_its_state_counts_its_trips() -> None:
    """As the TPU compiler writes them, without a note: counters that are compared, added to, fused, and passed on."""

    def stepped(x: jax.Array) -> jax.Array:
        state = (jnp.int32(3), x, jnp.int32(20))
        return jax.lax.while_loop(lambda s: s[0] < s[2], lambda s: (s[0] + 4, s[1] @ x, s[2]), state)[1]

    def falling(x: jax.Array) -> jax.Array:
        state = (jnp.int32(9), x)
        return jax.lax.while_loop(lambda s: s[0] >= 1, lambda s: (s[0] - 2, s[1] @ x), state)[1]

    for function, expected in ((stepped, 5), (falling, 5)):
        text = jax.jit(function).lower(SQUARE).compile().as_text() or ""
        module = hlo.parse(re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text))
        found = costs.of(module, 1, trips=100.0)
        assert (found.flops, found.unknown_loops) == (expected * PRODUCT, 0)


def test_layers_in_a_loop_count_each() -> None:
    def layers(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, weights)[0]

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(layers(x, weights))

    weights = jax.ShapeDtypeStruct((6, SIDE, SIDE), jnp.float32)
    text = jax.jit(jax.grad(loss)).lower(weights, SQUARE).compile().as_text() or ""
    found = costs.of(hlo.parse(text.replace("known_trip_count", "known")), 1, trips=100.0)
    # Forward, and two products backward; the gradient of the first layer's input is nobody's.
    assert 17 * PRODUCT <= found.flops <= 18 * PRODUCT
    assert found.unknown_loops == 0


def test_of_two_branches_the_larger_counts() -> None:
    def branched(x: jax.Array, which: jax.Array) -> jax.Array:
        return jax.lax.cond(which, lambda: x @ x @ x, lambda: x @ x)

    assert count(branched, SQUARE, jax.ShapeDtypeStruct((), jnp.bool_)).flops == 2 * PRODUCT


def test_the_slower_half_of_each_instruction_takes_the_time() -> None:
    found = Costs((costs.Work(8.0, 2.0), costs.Work(0.0, 6.0)), (), 0)
    assert found.seconds(peak_flops=2.0, bandwidth=1.0) == 4.0 + 6.0
    assert (found.flops, found.bytes) == (8.0, 8.0)


def test_collectives_have_kind_count_bytes_and_group() -> None:
    mesh = make_mesh(2, 4, 1)
    rows = jax.ShapeDtypeStruct((64, SIDE), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())

    def gathered(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, whole)

    found = count(gathered, rows, devices=8)
    (item,) = found.collectives
    assert (item.kind, item.count, len(item.group)) == ("all-gather", 1, 4)
    assert item.payload == 64 * SIDE * 4
    assert item.wire_bytes == item.payload * 3 / 4
    assert not item.in_loop


def test_collectives_in_loops_count_each_time() -> None:
    mesh = make_mesh(8, 1, 1)
    rows = jax.ShapeDtypeStruct((64, SIDE), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))

    def summed(x: jax.Array) -> jax.Array:
        def body(_: jax.Array, y: jax.Array) -> jax.Array:
            return y + jnp.sum(x * y[None, :], axis=0)

        return jax.lax.fori_loop(0, 7, body, jnp.ones(SIDE))

    found = count(summed, rows, devices=8)
    reduced = [item for item in found.collectives if item.kind == "all-reduce"]
    assert sum(item.count for item in reduced) == 7
    assert all(item.in_loop for item in reduced)
    assert sum(item.wire_bytes for item in reduced) == pytest.approx(7 * 2 * 7 / 8 * SIDE * 4)


def test_wire_bytes_of_each_kind() -> None:
    def wire(kind: str, size: int) -> float:
        return Collective(kind, 3, 100.0, tuple(range(size)), False, False).wire_bytes

    assert wire("all-reduce", 4) == 3 * 100 * 2 * 3 / 4
    assert wire("all-gather", 4) == wire("reduce-scatter", 4) == wire("all-to-all", 4) == 3 * 100 * 3 / 4
    assert wire("collective-permute", 2) == 300
    assert wire("all-reduce", 1) == 0


ASYNC = """HloModule m

%start (p: bf16[16,64]) -> bf16[64,64] {
  %p = bf16[16,64]{1,0} parameter(0)
  %g = bf16[64,64]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
  ROOT %cc = bf16[64,64]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%both (p: bf16[16,64], x: bf16[64,64]) -> bf16[64,64] {
  %p = bf16[16,64]{1,0} parameter(0)
  %x = bf16[64,64]{1,0} parameter(1)
  %g = bf16[64,64]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
  ROOT %d = bf16[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %e (a: bf16[16,64], x: bf16[64,64]) -> bf16[64,64] {
  %a = bf16[16,64]{1,0} parameter(0)
  %x = bf16[64,64]{1,0} parameter(1)
  %s = bf16[64,64]{1,0:S(1)} fusion(%a), kind=kCustom, calls=%start
  %big = f32[1000,64]{1,0} constant({...})
  %i = s32[] constant(3)
  %row = f32[1,64]{1,0} dynamic-slice(%big, %i, %i), dynamic_slice_sizes={1,64}
  %r = bf16[8,64]{1,0} reduce-scatter(%x), channel_id=9, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %b = bf16[64,64]{1,0} fusion(%a, %x), kind=kCustom, calls=%both
}
"""


def test_a_collective_beside_fusions_of_the_tpu_compiler_counts_once() -> None:
    found = costs.of(hlo.parse(ASYNC), 8)
    assert {(item.kind, item.count, item.overlapped) for item in found.collectives} == {
        ("all-gather", 1, True),
        ("reduce-scatter", 1, False),
    }
    assert found.flops == 2 * 64**3
    # What lies on the chip (S(1)) is no traffic, and of a slice only the slice is read.
    start, row = 16 * 64 * 2, 2 * 64 * 4
    assert found.bytes == start + row + (16 * 64 + 2 * 64 * 64) * 2


TRANSFERS = """HloModule m

ENTRY %e (a: f32[16,64]) -> f32[16,64] {
  %a = f32[16,64]{1,0} parameter(0)
  %t = token[] after-all()
  %send = (f32[16,64]{1,0}, u32[], token[]) send(%a, %t), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2,3}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[16,64]{1,0}, u32[], token[]) recv(%t), channel_id=2, is_host_transfer=true
  %sent = token[] send-done(%send), channel_id=1
  %gather = (f32[16,64]{1,0}, u32[], token[]) send(%a, %t), channel_id=3, frontend_attributes={_xla_megascale_target="{1,2,3}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %received = (f32[16,64]{1,0}, token[]) recv-done(%recv), channel_id=2
  ROOT %r = f32[16,64]{1,0} get-tuple-element(%received), index=0
}
"""  # noqa: E501


def test_transfers_between_slices_are_collectives_of_slices() -> None:
    found = costs.of(hlo.parse(TRANSFERS), 12)
    size = 16 * 64 * 4
    assert all(item.between_slices and len(item.group) == 3 for item in found.collectives)
    sent = {item.kind: item.wire_bytes for item in found.collectives}
    assert sent == {"all-reduce": pytest.approx(2 * 2 / 3 * size), "all-gather": pytest.approx(2 * size)}
    assert found.bytes == 0
