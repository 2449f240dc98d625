"""Compiles a program and says what it needs: memory, operations, bytes, collectives, and a time from a roofline."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from inranker_jax.aot import costs, hlo
from inranker_jax.aot.costs import Collective, Costs
from inranker_jax.aot.programs import Program
from inranker_jax.aot.topologies import Topology
from inranker_jax.hardware import Chip

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of device memory on each chip.

    Attributes:
      arguments: parameters, optimiser state and batch.
      outputs: results, including those that reuse arguments.
      aliased: arguments whose memory results reuse.
      temporaries: activations, gradients, collectives' buffers.
      code: the program itself.
      capacity: what programs may use; None where unknown.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    capacity: int | None

    @property
    def total(self) -> int:
        """What the step needs at its peak."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one execution, each part at the chip's published peak.

    Attributes:
      compute: matrix products alone.
      memory: traffic to the device's memory alone.
      network: collectives alone.
      instructions: computation one instruction after another, each as slow as the slower of its products and traffic.
      hidden: collectives that may run while something else is computed.
      modelled: computation one instruction after another by the compiler's own cost model; None where it has none.
    """

    compute: float
    memory: float
    network: float
    instructions: float
    hidden: float
    modelled: float | None

    @property
    def best(self) -> float:
        """Everything overlaps everything: no program on this chip takes less for this work."""
        return max(self.compute, self.memory, self.network)

    @property
    def estimate(self) -> float:
        """Instructions one after another, with only those collectives beside them that were compiled so."""
        return max(self.instructions, self.hidden) + self.network - self.hidden

    @property
    def by_compiler(self) -> float | None:
        """The same with the compiler's own cost model in place of the roofline; None where it has none."""
        if self.modelled is None:
            return None
        return max(self.modelled, self.hidden) + self.network - self.hidden


@dataclasses.dataclass(frozen=True)
class Proof:
    """What the compiler says of a program.

    Attributes:
      program: what was compiled.
      topology: for which machine.
      fits: whether it fits into the devices' memory; None where the capacity is unknown.
      memory: its memory; None where the compiler gave up because it does not fit.
      needed: bytes that it would need, where the compiler said so when it gave up.
      costs: of one execution on one device; None likewise.
      counted: FLOPs and bytes of XLA's cost analysis, which counts bodies of loops once.
      roofline: None without published figures of the chip.
      seconds: of lowering and compiling, on this machine.
    """

    program: Program
    topology: Topology
    fits: bool | None
    memory: Memory | None
    needed: int | None
    costs: Costs | None
    counted: Mapping[str, float]
    roofline: Roofline | None
    seconds: float

    @property
    def pairs_per_second(self) -> float | None:
        """Of the whole machine, by the estimate."""
        if self.roofline is None:
            return None
        return len(self.program.lengths) * self.program.copies / self.roofline.estimate

    @property
    def mfu(self) -> float | None:
        """Useful FLOPs by hand over what the chips could do in the estimated time: an upper bound of the real one."""
        if self.roofline is None or self.topology.chip is None:
            return None
        peak = self.topology.chip.peak_flops[self.program.dtype] * self.program.mesh.devices.size
        return self.program.useful_flops / (peak * self.roofline.estimate)


def prove(program: Program, topology: Topology) -> Proof:
    """Compiles a program.

    Args:
      program: see `programs`.
      topology: the machine for which it was made.

    Returns:
      What the compiler says of it, also where that is that it does not fit.
    """
    started = time.perf_counter()
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - started
        return Proof(program, topology, False, None, _used(str(error)), None, {}, None, seconds)
    seconds = time.perf_counter() - started
    found = costs.of(hlo.parse(compiled.as_text() or ""), program.mesh.devices.size, program.trips)
    capacity = None if topology.chip is None else topology.chip.program_bytes
    memory = _memory(compiled, capacity)
    return Proof(
        program=program,
        topology=topology,
        fits=None if capacity is None else memory.total <= capacity,
        memory=memory,
        needed=memory.total,
        costs=found,
        counted=_counted(compiled),
        roofline=None if topology.chip is None else roofline(found, topology, topology.chip, program),
        seconds=seconds,
    )


def _memory(compiled: jax.stages.Compiled, capacity: int | None) -> Memory:
    stats: Any = compiled.memory_analysis()
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        capacity=capacity,
    )


def _counted(compiled: jax.stages.Compiled) -> dict[str, float]:
    found: Any = compiled.cost_analysis() or {}
    found = found[0] if isinstance(found, list) else found
    return {name: float(found[name]) for name in ("flops", "bytes accessed") if name in found}


def _used(message: str) -> int | None:
    """Bytes that the TPU compiler wanted, from its error; None where that has none.

    >>> _used("the total memory required for HLO temporaries (24.00G) exceeds available HBM (15.75G)") == 24 * 2**30
    True
    """
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds", message) or re.search(
        r"Used ([\d.]+)([KMGT]?) of", message
    )
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def roofline(found: Costs, topology: Topology, chip: Chip, program: Program) -> Roofline:
    """Times of a program from published peaks.

    Collectives inside a slice use all links of a chip; in a slice that is no torus a ring goes one way and back on the
    same links, which halves that. Those between slices send the group's share of a chip over the data-centre network.

    Args:
      found: what was counted.
      topology: the machine.
      chip: its figures.
      program: whose matrix products have its `dtype`.

    Returns:
      The times of one execution.
    """
    peak, bandwidth = chip.peak_flops[program.dtype], chip.hbm_bandwidth
    devices = program.mesh.devices.size
    times = [(item, network_seconds(item, topology, chip, devices)) for item in found.collectives]
    return Roofline(
        compute=found.flops / peak,
        memory=found.bytes / bandwidth,
        network=sum(seconds for _, seconds in times),
        instructions=found.seconds(peak, bandwidth),
        hidden=sum(seconds for item, seconds in times if item.overlapped),
        modelled=found.cycles / chip.clock if chip.clock and found.cycles else None,
    )


def network_seconds(item: Collective, topology: Topology, chip: Chip, devices: int) -> float:
    """Seconds of all executions of a collective; see `roofline`."""
    if is_far(item, topology, devices):
        return item.wire_bytes / chip.dcn_bandwidth
    return item.wire_bytes / (chip.ici_bandwidth * (1.0 if topology.wraps else 0.5))


def is_far(item: Collective, topology: Topology, devices: int) -> bool:
    """Whether a collective takes the network between slices; a mesh has its devices one slice after another."""
    return item.between_slices or len({place * topology.slices // devices for place in item.group}) > 1
