"""What one execution of a compiled program costs a device: operations, bytes, collectives; loops times their trips."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

from inranker_jax.aot import hlo, loops
from inranker_jax.aot.hlo import Array, Computation, Instruction, Module
from inranker_jax.aot.traffic import Traffic

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
# They name, unpack or wait for what others move.
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "iota",
    "after-all",
    "partition-id",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal collectives of one kind.

    Attributes:
      kind: of `COLLECTIVES`.
      count: executions.
      payload: bytes of the larger of input and output of one, on a device.
      group: partitions that take part, of the first group.
      in_loop: whether a loop runs it.
      overlapped: whether computation goes on while it runs.
      between_slices: whether the compiler made it a transfer between TPU slices; `group` then counts slices.
    """

    kind: str
    count: float
    payload: float
    group: tuple[int, ...]
    in_loop: bool
    overlapped: bool
    between_slices: bool = False

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends in all executions, over a ring of the group's size g.

        (g-1)/g of the payload, and for an all-reduce twice that, which is the least possible (Patarasuk and Yuan 2009,
        "Bandwidth optimal all-reduce algorithms"); a permute sends all.
        """
        size = len(self.group)
        share = 1.0 if self.kind == "collective-permute" else (size - 1) / max(size, 1)
        return self.count * self.payload * share * (2.0 if self.kind == "all-reduce" else 1.0)


@dataclasses.dataclass(frozen=True)
class Work:
    """One instruction that takes time.

    Attributes:
      flops: operations of matrix products, in all executions.
      bytes: read from and written to the device's memory, in all executions.
      cycles: in all executions, by the compiler's own cost model; 0 where it has none.
    """

    flops: float
    bytes: float
    cycles: float = 0.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one execution of a program, on one device.

    Attributes:
      work: instructions one after another, collectives left out.
      collectives: collectives, equal ones together.
      unknown_loops: loops whose trips the compiler does not know, for which the caller's number was taken.
    """

    work: tuple[Work, ...]
    collectives: tuple[Collective, ...]
    unknown_loops: int

    @property
    def flops(self) -> float:
        """Operations of all matrix products."""
        return sum(item.flops for item in self.work)

    @property
    def bytes(self) -> float:
        """Bytes between the device and its memory."""
        return sum(item.bytes for item in self.work)

    @property
    def cycles(self) -> float:
        """Cycles of a TPU's core, by the compiler's own cost model; 0 from other compilers."""
        return sum(item.cycles for item in self.work)

    def seconds(self, peak_flops: float, bandwidth: float) -> float:
        """Time of all instructions one after another, each as long as its slower half: products or memory."""
        return sum(max(item.flops / peak_flops, item.bytes / bandwidth) for item in self.work)


def of(module: Module, devices: int, trips: float = 1.0) -> Costs:
    """Counts a program.

    Of a conditional the branch with most operations counts: the one that computes a whole micro-batch.

    Args:
      module: the compiled program.
      devices: partitions it runs on.
      trips: executions of loops whose number of trips the compiler does not know.

    Returns:
      Its costs.
    """
    counter = _Counter(module, devices, trips)
    work = tuple(counter.visit(module.entry, 1.0, False))
    return Costs(work, tuple(counter.collectives()), counter.unknown_loops)


class _Counter:
    def __init__(self, module: Module, devices: int, trips: float) -> None:
        self._module, self._devices, self._trips = module, devices, trips
        self._traffic = Traffic(module)
        self._found: dict[tuple[object, ...], Collective] = {}
        self.unknown_loops = 0

    def collectives(self) -> list[Collective]:
        """All that were visited, equal ones together, the largest first."""
        merged: dict[tuple[object, ...], Collective] = {}
        for item in self._found.values():
            key = (*dataclasses.astuple(dataclasses.replace(item, count=0.0)),)
            count = item.count + (merged[key].count if key in merged else 0.0)
            merged[key] = dataclasses.replace(item, count=count)
        return sorted(merged.values(), key=lambda item: -item.wire_bytes)

    def visit(self, name: str, times: float, in_loop: bool) -> Iterator[Work]:
        """Work of a computation that runs `times` times."""
        computation = self._module.computations[name]
        for instruction in computation.values():
            opcode = instruction.opcode
            if opcode == "while":
                yield from self._loop(instruction, computation, times)
            elif opcode == "conditional":
                yield from self._branches(instruction, times, in_loop)
            elif opcode in ("call", "async-start") and not self._is_collective(instruction):
                for called in instruction.called("to_apply", "calls", "called_computation"):
                    yield from self.visit(called, times, in_loop)
            elif self._collect(name, instruction, computation, times, in_loop):
                continue
            elif opcode not in _FREE and not opcode.endswith("-done"):
                flops = self._flops(instruction, computation)
                moved = self._traffic.of(instruction, computation)
                yield Work(times * flops, times * moved, times * instruction.cycles)

    def _loop(self, instruction: Instruction, computation: Computation, times: float) -> Iterator[Work]:
        known = loops.trips(self._module, instruction, computation)
        self.unknown_loops += known is None
        trips = self._trips if known is None else known
        for called in instruction.called("body", "condition"):
            yield from self.visit(called, times * trips, True)

    def _branches(self, instruction: Instruction, times: float, in_loop: bool) -> Iterator[Work]:
        names = instruction.called("branch_computations", "true_computation", "false_computation")
        yield from self.visit(max(names, key=self._total_flops), times, in_loop)

    @functools.cache  # noqa: B019 - a counter lives as long as one count
    def _total_flops(self, name: str) -> float:
        """Operations of a computation and all that it calls, loops once."""
        total = 0.0
        computation = self._module.computations[name]
        for instruction in computation.values():
            total += hlo.product_flops(instruction, computation)
            keys = (
                "calls",
                "to_apply",
                "body",
                "branch_computations",
                "true_computation",
                "false_computation",
            )
            total += sum(self._total_flops(called) for called in instruction.called(*keys))
        return total

    def _flops(self, instruction: Instruction, computation: Computation) -> float:
        called = instruction.called("calls") if instruction.opcode in ("fusion", "custom-call") else []
        inner = sum(self._total_flops(name) for name in called if name in self._module.computations)
        return inner + hlo.product_flops(instruction, computation)

    def _is_collective(self, instruction: Instruction) -> bool:
        return any(
            item.opcode in COLLECTIVES
            for name in instruction.called("calls", "called_computation")
            for item in self._module.computations.get(name, {}).values()
        )

    def _collect(
        self, home: str, instruction: Instruction, computation: Computation, times: float, in_loop: bool
    ) -> bool:
        """Notes the collectives in an instruction; whether it does nothing else.

        The TPU compiler lets one run beside several fusions, each of which names it again: same channel, same
        collective.
        """
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            self._note(home, instruction, computation, times, in_loop, opcode != instruction.opcode)
            return True
        if opcode in ("send", "recv"):
            if opcode == "send":
                self._note_transfer(home, instruction, computation, times, in_loop)
            return True
        if opcode not in ("fusion", "async"):
            return False
        for name in instruction.called("calls", "called_computation"):
            inner = self._module.computations[name]
            for item in inner.values():
                if item.opcode in COLLECTIVES:
                    is_async = opcode == "async" or "AsyncCollective" in _targets(inner) or "async" in name
                    self._note(home, item, inner, times, in_loop, is_async)
        return opcode == "async"

    def _note(
        self,
        home: str,
        item: Instruction,
        computation: Computation,
        times: float,
        in_loop: bool,
        overlapped: bool,
    ) -> None:
        channel = re.search(r"channel_id=(\d+)", item.attributes)
        key = (home, item.opcode.removesuffix("-start"), channel[1] if channel else item.name)
        inputs = [
            array for name in item.operands if name in computation for array in computation[name].outputs
        ]
        # The result of a "-start" is inputs and outputs together.
        outputs = (
            item.outputs[len(inputs) :]
            if item.opcode.endswith("-start") and len(item.outputs) > len(inputs)
            else item.outputs
        )
        payload = max(_size(inputs), _size(outputs))
        before = self._found.get(key)
        if before is not None:
            overlapped, times = overlapped or before.overlapped, before.count
        group = hlo.group_of(item.attributes, self._devices)
        self._found[key] = Collective(key[1], times, payload, group, in_loop, overlapped)

    def _note_transfer(
        self, home: str, item: Instruction, computation: Computation, times: float, in_loop: bool
    ) -> None:
        """Notes a transfer between slices, which the TPU compiler writes as `send` and `recv` of the host's runtime."""
        named = dict(re.findall(r'_xla_megascale_(\w+)="([^"]*)"', item.attributes))
        kind = named.get("transfer_type", "one_to_one").lower().replace("_", "-")
        kind = kind if kind in COLLECTIVES else "collective-permute"
        slices = named.get("target", "{0,1}").split("}")[0].count(",") + 1
        payload = _size(computation[item.operands[0]].outputs) * (slices if kind == "all-gather" else 1)
        group = tuple(range(slices))
        self._found[home, "send", item.name] = Collective(kind, times, payload, group, in_loop, True, True)


def _targets(computation: Computation) -> str:
    return " ".join(item.attributes for item in computation.values() if item.opcode == "custom-call")


def _size(arrays: list[Array] | tuple[Array, ...]) -> float:
    return sum(array.bytes for array in arrays)
