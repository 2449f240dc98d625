"""Pairs a second of T5 rerankers: ours beside PyTorch, CTranslate2 and ONNX Runtime, on this machine.

    python benchmarks/scoring.py [--model=t5-base] [--rounds=7] [--output_dir=outputs/scoring]
    python benchmarks/scoring.py --sweep=length,tokens,cores --model=t5-small

All contenders load the same random weights and get the same token ids: pairs of 256 tokens, and pairs of SciFact,
TREC DL 2019 and Cranfield (`../shared/data`; without it a log-normal mix). Each runs in a process of its own; they take
turns, in a new order each round, and whoever does not have the turn is stopped. First the scores of all are compared
with PyTorch's in float32. OUTPUT_DIR gets scoring.md and scoring.json after every round. A contender that cannot run is
a row that says why. The default takes about a quarter of an hour with t5-small on two cores.

Modes: "arrival" is batches of 16 in the order given, padded to their longest (what reference clients do); "sorted" is
longest first, as many as make 2048 tokens; "padded" is the reference recipe, every pair padded to 512, measured on the
first --padded_pairs pairs since each costs the same; ours: its layouts (`inranker_jax.packing`).

Install the peers with `pip install -e '.[benchmark]'`.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from contenders import flops, goals, models, report, rounds, settings, workloads
from contenders.processes import ContenderError, Spec, run_module
from contenders.rounds import Row
from contenders.workloads import Workload

from inranker_jax import packing
from inranker_jax.packing import Layout

# The largest differences of scores (true - false) that still count as equal. Random weights give scores of about 1;
# those of bfloat16 and int8 differ in the second decimal.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.3}
LAYOUTS = ("bucketed", "packed", "padded")
SWEEPS = ("length", "tokens", "cores")
MOST_PAIRS = 512
LENGTHS = (64, 128, 256, 384, 512)
CALLS = (512, 1024, 2048, 4096, 8192)


@dataclasses.dataclass
class Bench:
    """One run of the benchmark: its settings, and everything measured so far.

    Attributes:
      flags: the command line.
      folder: for files of this run only.
      model: where the forms of the model are kept.
      environment: of the workers.
      sections: rows by workload.
      sweeps: rows by kind of sweep and setting.
      goals: by workload.
      peaks: FLOP/s of matrix products by contender and precision.
      about: what contenders say about themselves.
      machine: `report.machine`.
      remarks: for the report.
    """

    flags: argparse.Namespace
    folder: pathlib.Path
    model: pathlib.Path
    environment: dict[str, str]
    sections: dict[str, list[Row]] = dataclasses.field(default_factory=dict)
    sweeps: dict[str, dict[str, list[Row]]] = dataclasses.field(default_factory=dict)
    goals: dict[str, list[report.Goal]] = dataclasses.field(default_factory=dict)
    peaks: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)

    @property
    def command(self) -> str:
        """What was typed."""
        return " ".join(["python", "benchmarks/scoring.py", *sys.argv[1:]])

    def roof(self, precision: str) -> float:
        """The largest rate of matrix products that was measured, FLOP/s; 0 where none was."""
        return max((rates.get(precision, 0.0) for rates in self.peaks.values()), default=0.0)

    def save(self) -> str:
        """Writes the files, and returns the Markdown."""
        text = markdown(self)
        data = {
            "command": self.command,
            "model": self.flags.model,
            "machine": self.machine,
            "contenders": self.about,
            "peak_flops": self.peaks,
            "workloads": {name: [row.as_dict() for row in rows] for name, rows in self.sections.items()},
            "sweeps": {
                kind: {label: [row.as_dict() for row in rows] for label, rows in columns.items()}
                for kind, columns in self.sweeps.items()
            },
            "goals": [dataclasses.asdict(goal) for found in self.goals.values() for goal in found],
        }
        report.save(self.flags.output_dir, "scoring", data, text)
        return text


def automatic(device: str) -> str:
    """The layout that ours takes by default."""
    return Layout().resolve(device, 512).kind


def contenders(bench: Bench, cores: int, tokens: int | None = None, *, brief: bool = False) -> list[Spec]:
    """The contenders in the order of the tables.

    Args:
      bench: the run.
      cores: how many they get.
      tokens: of a call; None for the default of each.
      brief: only the usual mode of each, for sweeps.
    """
    source, device = str(bench.model / "transformers"), bench.flags.device
    batch = tokens or (2048 if device == "cpu" else 16384)
    specs = []
    for compiled in (False,) if brief else (False, True):
        for dtype in ("float32", "bfloat16"):
            options = {
                "folder": source,
                "dtype": dtype,
                "compiled": compiled,
                "device": device,
                "tokens": batch,
            }
            name = f"PyTorch {dtype}" + (" compiled" if compiled else "")
            modes = ("sorted", "arrival") + (("padded",) if dtype == "float32" or device == "gpu" else ())
            specs.append(
                Spec(
                    name,
                    "contenders.torch_scorer",
                    options,
                    ("sorted",) if compiled or brief else modes,
                    dtype,
                )
            )
    if device == "cpu":
        for precision in ("float32", "int8"):
            for replicas in (1, 2) if cores % 2 == 0 else (1,):
                options = {"folder": str(bench.model / "ctranslate2"), "compute_type": precision}
                options |= {"replicas": replicas, "tokens": batch}
                name = f"CTranslate2 {precision} {replicas}x{cores // replicas}"
                specs.append(Spec(name, "contenders.ctranslate2_scorer", options, ("sorted",), precision))
        for precision in ("float32", "int8"):
            options = {"file": str(bench.model / "onnx" / f"{precision}.onnx"), "tokens": batch}
            specs.append(
                Spec(f"ONNX Runtime {precision}", "contenders.onnx_scorer", options, ("sorted",), precision)
            )
    layouts = (automatic(device),) if brief else LAYOUTS
    for dtype in ("float32", "bfloat16"):
        options = {"folder": source, "dtype": dtype, "tokens": tokens}
        specs.append(Spec(f"ours {dtype}", "contenders.ours_scorer", options, layouts, dtype))
    return settings.selected(specs, bench.flags.contenders, bench.flags.modes)


def make_models(bench: Bench) -> dict[str, str]:
    """Writes each form of the model that is not there yet; returns why an engine's form could not be made."""
    source = bench.model / "transformers"
    errors = {}
    forms = [("transformers", bench.flags.model, source, "")]
    if bench.flags.device == "cpu":
        forms += [
            ("ctranslate2", str(source), bench.model / "ctranslate2", "contenders.ctranslate2_scorer"),
            ("onnx", str(source), bench.model / "onnx", "contenders.onnx_scorer"),
        ]
    for form, origin, folder, module in forms:
        if folder.is_dir():
            continue
        rounds.say(f"writing {folder}")
        try:
            run_module("models", form, origin, str(folder), environment=bench.environment)
        except ContenderError as error:
            if form == "transformers":
                raise SystemExit(
                    f"error: no model: {error}. The benchmark needs torch and transformers: "
                    "pip install -e '.[benchmark]'"
                ) from None
            errors[module] = f"no {form} model: {error}"
    return errors


def make_workloads(bench: Bench, names: Sequence[str], pairs: int | None) -> list[tuple[Workload, Workload]]:
    """Each workload, and its first pairs for modes in which every pair costs the same."""
    flags, made = bench.flags, []
    for name in names:
        whole = workloads.make(name, pairs or MOST_PAIRS, bench.folder, flags.shared)
        whole = whole if pairs else workloads.within(whole, flags.tokens)
        made.append((whole, workloads.head(whole, flags.padded_pairs, f"{name}-first")))
    return made


def packed_shares(bench: Bench, name: str) -> dict[int, float]:
    """Share of useful tokens in packed rows of 512 and 1024, over as many pairs as a stream packs together."""
    folder = bench.folder / "window"
    folder.mkdir(exist_ok=True)
    lengths = workloads.make(name, goals.WINDOW, folder, bench.flags.shared).lengths
    shares = {}
    for row_length in (512, 1024):
        layout = Layout("packed", row_length=row_length).resolve(bench.flags.device, 512)
        assert layout.slots is not None
        *_, count = packing.assign(lengths, row_length, layout.slots)
        shares[row_length] = float(lengths.sum() / (count * row_length))
    return shares


def measure(
    bench: Bench,
    specs: Sequence[Spec],
    given: Sequence[tuple[Workload, Workload]],
    cores: list[int],
    known: dict[str, str],
    keep: Callable[[str, list[Row]], None],
    peaks: bool = False,
) -> None:
    """Starts the contenders, and gives `keep` the rows of each workload before the first round and after each.

    Args:
      bench: the run.
      specs: the contenders.
      given: from `make_workloads`.
      cores: their cores.
      known: why contenders of a module cannot start.
      keep: called with the name of the workload and its rows.
      peaks: measure matrix products too, before the first workload and after the last.
    """
    log = bench.flags.output_dir / "log.txt"
    with rounds.started(specs, cores, log, bench.environment, bench.flags.timeout, rounds.say, known) as (
        workers,
        errors,
    ):
        bench.about |= {name: worker.about for name, worker in workers.items()}
        measured = [name for name in ("PyTorch float32", "ours float32") if name in workers]

        def roof() -> None:
            for name, rates in rounds.measure_peaks(workers, measured).items() if peaks else ():
                best = bench.peaks.setdefault(name, {})
                best |= {key: max(rate, best.get(key, 0.0)) for key, rate in rates.items()}

        roof()
        for whole, first in given:
            rows = rounds.prepare(
                specs,
                workers,
                errors,
                lambda _, mode, whole=whole, first=first: first if mode == "padded" else whole,
                rounds.say,
            )
            rounds.compare(rows, BOUNDS)
            keep(whole.name, rows)

            def after_round(done: int, name: str = whole.name, rows: list[Row] = rows) -> None:
                keep(name, rows)
                rounds.say(f"{name}: round {done} of {bench.flags.rounds}")

            rounds.take_turns(rows, workers, bench.flags.rounds, after_round)
        roof()


def run_main_table(bench: Bench, known: dict[str, str]) -> None:
    """All contenders and modes on all workloads, with peaks and goals."""
    names, message = workloads.available(bench.flags.workloads, bench.flags.shared)
    if message:
        rounds.say(message)
        bench.remarks.append(message)
    given = make_workloads(bench, names, bench.flags.pairs)

    shares = {name: packed_shares(bench, name) for name in names if not name.startswith("fixed-")}

    def keep(name: str, rows: list[Row]) -> None:
        bench.sections[name] = rows
        roof = bench.roof("bfloat16") if bench.flags.device == "gpu" else None
        shape = models.SHAPES[bench.flags.model]
        bench.goals[name] = goals.scoring(
            name, rows, automatic(bench.flags.device), packed=shares.get(name, {}), shape=shape, roof=roof
        )
        bench.save()

    specs = contenders(bench, len(bench.flags.cores))
    measure(bench, specs, given, bench.flags.cores, known, keep, peaks=True)
    bench.save()


def run_sweep(bench: Bench, kind: str, known: dict[str, str]) -> None:
    """One usual mode of each contender over lengths, tokens a call, or cores."""
    all_cores, pairs = bench.flags.cores, bench.flags.sweep_pairs
    settings: list[tuple[str, list[int], int | None, list[str]]]
    if kind == "length":
        settings = [("", all_cores, None, [f"fixed-{length}" for length in LENGTHS])]
    elif kind == "tokens":
        settings = [(f"{tokens} tokens a call", all_cores, tokens, ["fixed-256"]) for tokens in CALLS]
    else:
        counts = sorted({1, len(all_cores)})
        settings = [
            (f"{count} core{'s' * (count > 1)}", all_cores[:count], None, ["fixed-256"]) for count in counts
        ]
    columns = bench.sweeps.setdefault(kind, {})
    for label, cores, tokens, names in settings:

        def keep(name: str, rows: list[Row], label: str = label) -> None:
            columns[label or f"{name.removeprefix('fixed-')} tokens"] = rows
            bench.save()

        specs = contenders(bench, len(cores), tokens, brief=True)
        measure(bench, specs, make_workloads(bench, names, pairs), cores, known, keep)


def row_cells(bench: Bench, row: Row, base: Row | None) -> list[str]:
    """A row of a workload's table."""
    label = f"{row.name}, {row.mode}"
    if row.error or row.rate is None:
        return [label, "failed" if row.error else "not yet", *[""] * 7]
    shape, lengths = models.SHAPES[bench.flags.model], row.workload.lengths
    useful = flops.useful(shape, lengths) / len(lengths) * row.rate
    plain = sum(flops.plain(shape, int(length)) for length in lengths) / len(lengths) * row.rate
    roof = bench.roof(row.precision)
    against = rounds.ratio(row, base) if base is not None and base.seconds and not base.error else None
    share = row.notes.get("useful_share")
    return [
        label,
        report.number(row.rate),
        report.spread(row.rates),
        f"{against:.2f}x" if against else "",
        f"{row.difference:.1e}" if row.difference is not None else "",
        f"{share:.0%}" if share is not None else "",
        f"{row.peak_bytes / 2**20:,.0f}",
        f"{useful / 1e9:,.0f}" + (f" ({useful / roof:.0%})" if roof else ""),
        f"{plain / 1e9:,.0f}" + (f" ({plain / roof:.0%})" if roof else ""),
    ]


def markdown(bench: Bench) -> str:
    """The report."""
    flags = bench.flags
    parts = [
        f"# Scoring, {flags.model}, {flags.device}",
        report.machine_line(bench.machine),
        *bench.remarks,
        f"Command: `{bench.command}`",
        "Rates are pairs a second: median and range of the rounds. Ratios are medians of ratios within a round. "
        "GFLOP/s count what the logits need (absorbed decoder, no padding) and, after that, the same pairs by "
        "transformers' own decoder; in brackets the share of the measured peak of that precision.",
    ]
    if bench.peaks:
        lines = [
            [name, *(report.number(rates.get(key, 0.0) / 1e9) for key in ("float32", "bfloat16"))]
            for name, rates in bench.peaks.items()
        ]
        parts.append("## Matrix products, GFLOP/s\n\n" + report.table(["", "float32", "bfloat16"], lines))
    header = [
        "contender", "pairs/s", "range", "beside PyTorch float32, sorted", "max difference", "useful tokens",
        "peak MiB", "needed GFLOP/s", "plain GFLOP/s",
    ]  # fmt: skip
    for name, rows in bench.sections.items():
        base = next((row for row in rows if (row.name, row.mode) == ("PyTorch float32", "sorted")), None)
        cells = [row_cells(bench, row, base) for row in rows]
        parts.append(f"## {name}: {rows[0].workload.described}\n\n" + report.table(header, cells))
        parts += report.failures(rows)
    found = [goal for goals_of_one in bench.goals.values() for goal in goals_of_one]
    if found:
        parts.append("## Goals\n\n" + report.goals_table(found))
    for kind, columns in bench.sweeps.items():
        labels = list(dict.fromkeys(f"{row.name}, {row.mode}" for rows in columns.values() for row in rows))
        by_label = [{f"{row.name}, {row.mode}": row for row in rows} for rows in columns.values()]
        lines = [[label, *(sweep_cell(column.get(label)) for column in by_label)] for label in labels]
        parts.append(f"## By {kind}, pairs/s\n\n" + report.table(["contender", *columns], lines))
        parts += report.failures([row for rows in columns.values() for row in rows])
    return "\n\n".join(parts)


def sweep_cell(row: Row | None) -> str:
    """A rate, or why there is none."""
    if row is None:
        return "-"
    return "failed" if row.error else report.number(row.rate) if row.rate else "not yet"


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    settings.add_common(parser, "scoring", rounds=4)
    parser.add_argument(
        "--workloads", type=settings.commas, default=["fixed-256", *workloads.COLLECTIONS],
        help="fixed-LENGTH, scifact, trec-dl-2019-pool, cranfield, synthetic-mix",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=16384, help="of each workload: as many pairs as have them"
    )
    parser.add_argument("--pairs", type=int, help="of each workload, in place of --tokens")
    parser.add_argument("--padded_pairs", type=int, default=16, help="pairs of modes that pad to 512")
    parser.add_argument(
        "--sweep", type=settings.commas, default=[], help="in place of the main table: length, tokens, cores"
    )
    parser.add_argument("--sweep_pairs", type=int, default=32, help="pairs of each setting of a sweep")
    flags = parser.parse_args()
    for kind in flags.sweep:
        if kind not in SWEEPS:
            parser.error(f"no sweep {kind!r}; expected {', '.join(SWEEPS)}")
    return flags


def main() -> int:
    """Measures, saves and prints; the status is 1 when a contender gave other scores."""
    flags = parse_flags()
    environment = settings.environment(flags)
    with settings.run_folder(flags) as folder:
        bench = Bench(flags, folder, flags.work_dir / flags.model, environment)
        bench.machine = report.machine(flags.cores, environment)
        known = make_models(bench)
        if flags.sweep:
            for kind in flags.sweep:
                run_sweep(bench, kind, known)
        else:
            run_main_table(bench, known)
        print(bench.save())
    measured = [*bench.sections.values(), *(r for columns in bench.sweeps.values() for r in columns.values())]
    return int(any((row.error or "").startswith("other values") for rows in measured for row in rows))


if __name__ == "__main__":
    sys.exit(main())
