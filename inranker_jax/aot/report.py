"""What a proof says, as text for people and as JSON for scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from inranker_jax.aot.costs import Collective
from inranker_jax.aot.proof import Proof, is_far

_DAY = 86400.0
ASSUMPTIONS = (
    "The time is an estimate: instructions one after another at the chip's published peaks, only those collectives "
    "hidden that were compiled to run beside others. Real steps take longer: no product reaches the peak."
)


def text(proof: Proof) -> str:
    """The report of one program."""
    program = proof.program
    lines = [
        f"{program.step} step for {proof.topology}",
        f"  mesh {mesh_words(program.mesh.shape)}"
        + (f", {program.copies} of them side by side" if program.copies > 1 else "")
        + f"; products in {program.dtype}; compiled in {proof.seconds:.0f}s",
        f"  {program.shape}",
        "",
        *_memory_lines(proof),
        *_cost_lines(proof),
        *_time_lines(proof),
    ]
    return "\n".join(lines)


def mesh_words(shape: Any) -> str:
    """`data=1 x fsdp=16 x model=1`."""
    return " x ".join(f"{axis}={size}" for axis, size in dict(shape).items())


def _memory_lines(proof: Proof) -> list[str]:
    chip = proof.topology.chip
    verdict = {True: "fits", False: "does NOT fit", None: "capacity unknown"}[proof.fits]
    limit = f" of {_gib(chip.program_bytes)}" if chip and chip.program_bytes else ""
    if proof.memory is None:
        needed = f"{_gib(proof.needed)}{limit}" if proof.needed else "more than there is"
        return [f"memory of each chip: {needed}: {verdict} (the compiler gave up)", ""]
    memory = proof.memory
    kinds = {
        "arguments": memory.arguments,
        "outputs": memory.outputs,
        "aliased (outputs in arguments' place)": -memory.aliased,
        "temporaries": memory.temporaries,
        "code": memory.code,
    }
    rows = [f"  {name:<38}{_gib(value):>12}" for name, value in kinds.items()]
    return ["memory of each chip", *rows, f"  {'together':<38}{_gib(memory.total):>12}{limit}: {verdict}", ""]


def _cost_lines(proof: Proof) -> list[str]:
    costs, program = proof.costs, proof.program
    devices = program.mesh.devices.size
    lines = [
        "work of each chip and step",
        f"  useful FLOPs, by hand                 {program.useful_flops / devices:12.4g}",
        f"  recomputed FLOPs, by hand             {program.recomputed_flops / devices:12.4g}",
    ]
    if costs is None:
        return [*lines, ""]
    loops = f", {costs.unknown_loops} loops taken {program.trips:g} times" if costs.unknown_loops else ""
    once = ", ".join(f"{name} {value:.4g}" for name, value in proof.counted.items())
    lines += [
        f"  products in the compiled program      {costs.flops:12.4g}{loops}",
        f"  bytes from and to memory              {costs.bytes:12.4g}",
        f"  (XLA's cost analysis, loops' bodies once: {once})",
        "",
        "collectives of each chip and step" + ("" if costs.collectives else ": none"),
    ]
    for kind, many in _by_kind(costs.collectives).items():
        count = sum(item.count for item in many)
        wire = sum(item.wire_bytes for item in many)
        hidden = sum(item.wire_bytes for item in many if item.overlapped)
        looped = sum(item.count for item in many if item.in_loop)
        far = sum(item.wire_bytes for item in many if is_far(item, proof.topology, devices))
        notes = [f"{hidden / max(wire, 1.0):.0%} beside computation"]
        notes += [f"{looped:g} in loops"] if looped else []
        notes += [f"{_mib(far)} between slices"] if far else []
        lines.append(
            f"  {kind:<20}{count:8g} x {_mib(_payload(many)):>12} sent {_mib(wire):>14}  {', '.join(notes)}"
        )
    return [*lines, ""]


def _payload(many: Sequence[Collective]) -> float:
    return sum(item.count * item.payload for item in many) / max(1.0, sum(item.count for item in many))


def _by_kind(collectives: Iterable[Collective]) -> dict[str, list[Collective]]:
    kinds: dict[str, list[Collective]] = {}
    for item in collectives:
        kinds.setdefault(item.kind, []).append(item)
    return kinds


def _time_lines(proof: Proof) -> list[str]:
    line, program, chip = proof.roofline, proof.program, proof.topology.chip
    if line is None or chip is None:
        why = "it does not fit" if proof.fits is False else "no published peaks of this device"
        return [f"time: none ({why})"]
    peak = chip.peak_flops[program.dtype]
    lines = [
        f"time of a step on {chip.name} ({peak / 1e12:g} TFLOP/s, memory {chip.hbm_bandwidth / 1e9:g} GB/s, "
        f"network {chip.ici_bandwidth / 1e9:g} GB/s each way"
        + ("" if proof.topology.wraps else ", halved: no torus")
        + ")",
        f"  alone: products {_ms(line.compute)}, memory {_ms(line.memory)}, network {_ms(line.network)}",
        f"  estimate {_ms(line.estimate)} (at the very best {_ms(line.best)}): {proof.pairs_per_second:,.0f} pairs/s, "
        f"MFU at most {proof.mfu:.0%}",
    ]
    if line.by_compiler is not None:
        lines.append(
            f"  {_ms(line.by_compiler)} with the instructions' times of the compiler's own cost model"
        )
    devices = len(proof.topology.devices)
    if program.total_steps:
        seconds = program.total_steps * line.estimate
        lines.append(
            f"  {program.total_steps:,} steps: {seconds / _DAY:.2f} days, {seconds * devices / 3600:,.0f} chip-hours"
        )
    elif proof.pairs_per_second:
        hours = 1e6 / proof.pairs_per_second / 3600
        lines.append(f"  a million pairs: {hours:.3g} hours, {hours * devices:.3g} chip-hours")
    return [*lines, f"  {ASSUMPTIONS}"]


def as_dict(proof: Proof) -> dict[str, Any]:
    """The report as JSON: bytes, operations and seconds as plain numbers."""
    program, line, costs = proof.program, proof.roofline, proof.costs
    devices = len(proof.topology.devices)
    found: dict[str, Any] = {
        "step": program.step,
        "topology": proof.topology.name,
        "slices": proof.topology.slices,
        "chips": devices,
        "mesh": dict(program.mesh.shape),
        "copies": program.copies,
        "shape": program.shape,
        "dtype": program.dtype,
        "pairs": len(program.lengths) * program.copies,
        "mean_length": float(program.lengths.mean()),
        "fits": proof.fits,
        "needed_bytes": proof.needed,
        "memory": None
        if proof.memory is None
        else dataclasses.asdict(proof.memory) | {"total": proof.memory.total},
        "useful_flops": program.useful_flops,
        "recomputed_flops": program.recomputed_flops,
        "compile_seconds": proof.seconds,
        "counted_by_xla": dict(proof.counted),
        "total_steps": program.total_steps,
    }
    if costs is not None:
        found |= {
            "flops_per_chip": costs.flops,
            "bytes_per_chip": costs.bytes,
            "unknown_loops": costs.unknown_loops,
        }
        found["collectives"] = [
            {**dataclasses.asdict(item), "group": len(item.group), "wire_bytes": item.wire_bytes}
            for item in costs.collectives
        ]
    if line is not None:
        found["seconds"] = dataclasses.asdict(line) | {
            "best": line.best,
            "estimate": line.estimate,
            "by_compiler": line.by_compiler,
        }
        found |= {"pairs_per_second": proof.pairs_per_second, "mfu": proof.mfu}
        if program.total_steps:
            run = program.total_steps * line.estimate
            found |= {"days": run / _DAY, "chip_hours": run * devices / 3600}
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first being the header, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _gib(value: int | float | None) -> str:
    return "?" if value is None else f"{value / 2**30:.3f} GiB"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.2f} MiB"


def _ms(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
