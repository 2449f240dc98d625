"""Training steps of T5 rerankers: ours beside PyTorch at its best micro-batch, on this machine.

    python benchmarks/training.py [--model=t5-base] [--rounds=5] [--workloads=equal,trec-dl-2019-pool,scifact]

A step is mean squared error to centred teacher logits, clipping and AdamW, without dropout, from the same random
weights and on the same token ids: `equal` is 16 pairs of 256 tokens, a collection's name is 32 of its pairs. The losses
of the first steps are compared first. PyTorch tries the micro-batches of --micro_batches and keeps the fastest, for
each precision (bfloat16 is autocast), workload and mode: "dynamic" pads each micro-batch to its longest pair, "padded"
every pair to 512, as the reference recipe does. Ours: packed rows (the default), or padded and bucketed with the
fastest micro-batch too. float32 and bfloat16 are measured one after the other, so that only two models are in memory.
OUTPUT_DIR gets training.md and training.json after every round.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

from contenders import flops, goals, models, report, rounds, settings, text_models, workloads
from contenders.processes import Spec
from contenders.rounds import Row
from contenders.workloads import Workload

# Largest relative differences of the first losses that still count as equal.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.05}
CHECKS = 3
EQUAL, EQUAL_LENGTH, EQUAL_BATCH, MIX_BATCH = "equal", 256, 16, 32
AUTOMATIC = "packed"


@dataclasses.dataclass
class Bench:
    """One run of the benchmark; fields as in scoring.py."""

    flags: argparse.Namespace
    model: pathlib.Path
    environment: dict[str, str]
    machine: dict[str, Any]
    sections: dict[str, list[Row]] = dataclasses.field(default_factory=dict)
    peaks: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)
    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @property
    def goals(self) -> list[report.Goal]:
        """Of all workloads."""
        roof = self.roof("bfloat16") if self.flags.device == "gpu" else None
        shape = models.SHAPES[self.flags.model]
        return [
            goal
            for name, rows in self.sections.items()
            for goal in goals.training(name, rows, AUTOMATIC, shape=shape, roof=roof)
        ]

    def roof(self, precision: str) -> float:
        """The largest rate of matrix products that was measured, FLOP/s; 0 where none was."""
        return max((rates.get(precision, 0.0) for rates in self.peaks.values()), default=0.0)

    def save(self) -> str:
        """Writes the files, and returns the Markdown."""
        text = markdown(self)
        data = {
            "command": command(),
            "model": self.flags.model,
            "machine": self.machine,
            "contenders": self.about,
            "peak_flops": self.peaks,
            "workloads": {name: [row.as_dict() for row in rows] for name, rows in self.sections.items()},
            "goals": [dataclasses.asdict(goal) for goal in self.goals],
        }
        report.save(self.flags.output_dir, "training", data, text)
        return text


def command() -> str:
    """What was typed."""
    return " ".join(["python", "benchmarks/training.py", *sys.argv[1:]])


def make_workload(name: str, folder: pathlib.Path, flags: argparse.Namespace) -> Workload:
    """Enough batches for the checks and all rounds, with random teacher logits."""
    equal = name == EQUAL
    batch_size = flags.batch_size or (EQUAL_BATCH if equal else MIX_BATCH)
    pairs = batch_size * (CHECKS + flags.rounds)
    whole = workloads.make(f"fixed-{EQUAL_LENGTH}" if equal else name, pairs, folder, flags.shared)
    return workloads.labelled(whole, name, folder, batch_size, EQUAL_LENGTH if equal else 512)


def contenders(flags: argparse.Namespace, model: pathlib.Path) -> list[Spec]:
    """PyTorch and ours in all precisions that are wanted."""
    specs = []
    for dtype in flags.precisions:
        options = {
            "folder": str(model / "transformers"),
            "dtype": dtype,
            "device": flags.device,
            "micro_batches": flags.micro_batches,
        }
        layouts = ("packed", "bucketed", "padded")
        specs += [
            Spec(f"PyTorch {dtype}", "contenders.torch_trainer", options, ("dynamic", "padded"), dtype),
            Spec(f"ours {dtype}", "contenders.ours_trainer", options, layouts, dtype),
        ]
    return settings.selected(specs, flags.contenders, flags.modes)


def chosen(workload: Workload, spec: Spec, mode: str) -> Workload | None:
    """Nothing is gained by two modes that are one and the same for pairs of equal lengths."""
    same = {"contenders.torch_trainer": "padded", "contenders.ours_trainer": "bucketed"}[spec.module]
    return None if workload.name == EQUAL and mode == same else workload


def measure(bench: Bench, specs: list[Spec], given: list[Workload], dtype: str) -> bool:
    """All workloads in one precision; False when a contender's losses were other than PyTorch's."""
    flags = bench.flags
    specs = [spec for spec in specs if spec.precision == dtype]
    if not specs:
        return True
    log = flags.output_dir / "log.txt"
    equal = True
    with rounds.started(specs, flags.cores, log, bench.environment, flags.timeout, rounds.say) as (
        workers,
        errors,
    ):
        bench.about |= {name: worker.about for name, worker in workers.items()}
        for name, rates in rounds.measure_peaks(workers, list(workers)).items():
            bench.peaks[name.split()[0]] = rates
        for workload in given:
            rows = rounds.prepare(
                specs,
                workers,
                errors,
                lambda spec, mode, workload=workload: chosen(workload, spec, mode),
                rounds.say,
                CHECKS,
            )
            reference = rounds.compare(rows, BOUNDS, relative=True, expected=bench.losses.get(workload.name))
            if reference is not None and dtype == "float32":
                bench.losses[workload.name] = reference.values
            equal = equal and not any((row.error or "").startswith("other values") for row in rows)
            bench.sections.setdefault(workload.name, []).extend(rows)
            bench.save()
            batch_size = int(workloads.read_arrays(str(workload.path))["batch_size"])

            def tokens(row: Row, number: int, batch_size: int = batch_size) -> float:
                return float(row.workload.lengths[number * batch_size :][:batch_size].sum())

            def after_round(done: int, workload: Workload = workload) -> None:
                bench.save()
                rounds.say(f"{workload.name}, {dtype}: round {done} of {flags.rounds}")

            rounds.take_turns(rows, workers, flags.rounds, after_round, CHECKS, tokens)
    return equal


def row_cells(bench: Bench, row: Row, base: Row | None) -> list[str]:
    """A row of a workload's table."""
    label = f"{row.name}, {row.mode}"
    if row.error or row.rate is None:
        return [label, "failed" if row.error else "not yet", *[""] * 8]
    lengths = row.workload.lengths
    useful = flops.useful(models.SHAPES[bench.flags.model], lengths, training=True) / lengths.sum() * row.rate
    roof = bench.roof(row.precision)
    against = rounds.ratio(row, base) if base is not None and base.seconds and not base.error else None
    steps = sorted(1 / seconds for seconds in row.seconds)
    return [
        label,
        report.number(row.rate),
        report.spread(row.rates),
        report.number(steps[len(steps) // 2]),
        f"{against:.2f}x" if against else "",
        f"{row.difference:.1e}" if row.difference is not None else "",
        str(row.notes.get("micro_batch", "")),
        f"{row.notes.get('useful_share', 0.0):.0%}",
        f"{row.peak_bytes / 2**20:,.0f}",
        f"{useful / 1e9:,.0f}" + (f" ({useful / roof:.0%})" if roof else ""),
    ]


def markdown(bench: Bench) -> str:
    """The report."""
    parts = [
        f"# Training, {bench.flags.model}, {bench.flags.device}",
        report.machine_line(bench.machine),
        *bench.remarks,
        f"Command: `{command()}`",
        "Rates are useful tokens (no padding) a second: median and range of the rounds, a step each. Ratios are "
        "medians of ratios within a round, which is on the same batch. Differences are of the first losses, relative. "
        "GFLOP/s count what the step needs: three times the forward pass with an absorbed decoder, without padding.",
    ]
    if bench.peaks:
        lines = [
            [name, *(report.number(rates.get(key, 0.0) / 1e9) for key in BOUNDS)]
            for name, rates in bench.peaks.items()
        ]
        parts.append("## Matrix products, GFLOP/s\n\n" + report.table(["", *BOUNDS], lines))
    header = [
        "contender", "useful tokens/s", "range", "steps/s", "beside PyTorch dynamic", "loss difference", "micro-batch",
        "useful tokens", "peak MiB", "needed GFLOP/s",
    ]  # fmt: skip
    for name, rows in bench.sections.items():
        base = {
            row.precision: row for row in rows if row.name.startswith("PyTorch") and row.mode == "dynamic"
        }
        cells = [row_cells(bench, row, base.get(row.precision)) for row in rows]
        parts.append(f"## {name}: {rows[0].workload.described}\n\n" + report.table(header, cells))
        parts += report.failures(rows)
    parts.append("## Goals\n\n" + report.goals_table(bench.goals))
    return "\n\n".join(parts)


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    settings.add_common(parser, "training", rounds=5)
    parser.add_argument(
        "--workloads", type=settings.commas, default=[EQUAL, "trec-dl-2019-pool"],
        help="equal, scifact, trec-dl-2019-pool, cranfield, synthetic-mix",
    )  # fmt: skip
    parser.add_argument("--precisions", type=settings.commas, default=list(BOUNDS), help="float32,bfloat16")
    parser.add_argument(
        "--batch_size", type=int, help="pairs a step; 16 for equal and 32 for mixes by default"
    )
    parser.add_argument(
        "--micro_batches", type=lambda text: [0 if part == "whole" else int(part) for part in settings.commas(text)],
        default=[4, 8, 16, 0], help="sizes to try, `whole` for the batch (default: 4,8,16,whole)",
    )  # fmt: skip
    flags = parser.parse_args()
    unknown = [name for name in flags.precisions if name not in BOUNDS]
    if unknown:
        parser.error(f"no precision {unknown[0]!r}; expected {', '.join(BOUNDS)}")
    return flags


def main() -> int:
    """Measures, saves and prints; the status is 1 when losses differ."""
    flags = parse_flags()
    environment = settings.environment(flags)
    with settings.run_folder(flags) as folder:
        model = flags.work_dir / flags.model
        specs = contenders(flags, model)
        bench = Bench(flags, model, environment, report.machine(flags.cores, environment))
        text_models.random_model(flags.model, flags.work_dir, environment)
        names, message = workloads.available(flags.workloads, flags.shared)
        if message:
            rounds.say(message)
            bench.remarks.append(message)
        given = [make_workload(name, folder, flags) for name in names]
        equal = all([measure(bench, specs, given, dtype) for dtype in flags.precisions])
        print(bench.save())
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
