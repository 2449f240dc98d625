"""The table of docs/pods.md: what each size of student needs on each slice of TPUs, by the real TPU compiler.

    pip install -e '.[train,tpu-compiler]'
    python benchmarks/aot_table.py                            # everything; hours, and 10 GiB for the 3B steps
    python benchmarks/aot_table.py --sizes=60m --slices=v5e-4 --steps=score
    python benchmarks/aot_table.py --report_only              # docs/pods.md anew from what is there

Each cell is `python -m inranker_jax.compile` in a process of its own, whose report is kept in `--cache`; a cell that is
there, made by the same command with the same compiler and sources, is not made again. So this may be stopped at any
time. A training step that does not fit as its recipe says is tried again with more rematerialisation.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "pods.md"
BEGIN, END = "<!-- aot_table begin -->", "<!-- aot_table end -->"

SIZES = ("60m", "220m", "740m", "3b")
SLICES = ("v5e-4", "v5e-16", "v5e-256", "v4-128")
STEPS = ("train", "label", "score")
CHIPS = {"v5e-4": 4, "v5e-16": 16, "v5e-256": 256, "v4-128": 64}
# The recipes' batch, and as many steps of it as the recipes have; a larger one takes fewer.
BATCH, STEPS_OF_RUN = 32, 329_000
REMATS = ("none", "dots", "full")
MISSING = "not made yet"
SOURCES = (
    *(f"inranker_jax/{room}/*.py" for room in ("aot", "losses", "models", "prompts")),
    *(f"inranker_jax/{name}.py" for name in ("hardware", "optimizers", "packing", "partitioning", "scorer")),
    *(f"inranker_jax/{name}.py" for name in ("data/micro_batches", "train_state", "trainer")),
    "gin/**/*.gin",
)


def batch_size(slice_name: str) -> int:
    """Pairs a step: the recipes' 32, but two for each chip, since every host needs some.

    >>> batch_size("v5e-4"), batch_size("v5e-256")
    (32, 512)
    """
    return max(BATCH, 2 * CHIPS[slice_name])


def arguments(size: str, slice_name: str, step: str, remat: str | None) -> list[str]:
    """Flags of `inranker_jax.compile` for a cell."""
    batch = batch_size(slice_name)
    flags = [f"--gin_file=gin/runs/inranker_{size}_phase2.gin"]
    if size in ("740m", "3b") and CHIPS[slice_name] > 64:  # as many as must share the parameters, not all
        flags += ["--gin_file=gin/meshes/data_fsdp.gin", "--gin.FSDP=16"]
    flags += [
        f"--topology={slice_name}",
        f"--step={step}",
        f"--gin.BATCH_SIZE={batch}",
        f"--gin.TRAIN_STEPS={STEPS_OF_RUN * BATCH // batch}",
        '--gin.DTYPE="bfloat16"',
    ]
    return flags + ([f'--gin.REMAT="{remat}"'] if remat else [])


def meaning(path: pathlib.Path) -> str:
    """A source without comments and docstrings, which decide nothing."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".gin":
        lines = (line.partition("#")[0].rstrip() for line in text.splitlines())
        return "\n".join(line for line in lines if line)
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


@functools.cache
def versions() -> dict[str, str]:
    """What decides a cell beside its command: the compiler, the recipes, and our own code."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(meaning(path).encode())
    found = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return {**found, "sources": digest.hexdigest()[:12]}


def make_cell(
    cache: pathlib.Path, size: str, slice_name: str, step: str, remat: str | None, minutes: float
) -> dict[str, Any]:
    """The report of a cell, from the cache or, with any `minutes`, made now; `problem` says why there is none."""
    path = cache / f"{size}_{slice_name}_{step}{'_' + remat if remat else ''}.json"
    flags = arguments(size, slice_name, step, remat)
    made = {"command": flags, "versions": versions()}
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {name: kept.get(name) for name in made} == made and not (minutes and "problem" in kept):
            return kept
    if not minutes:
        return made | {"problem": MISSING}
    print(f"{time.strftime('%H:%M:%S')} {path.stem} ...", flush=True)
    started, output = time.perf_counter(), path.with_suffix(".new")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "inranker_jax.compile", *flags, f"--output={output}"]
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return _keep(path, made | {"problem": f"not compiled within {minutes:g} minutes"})
        except BaseException:
            process.kill()
            raise
    if process.returncode not in (0, 3):
        lines = [line for line in errors.splitlines() if line.strip()]
        return _keep(path, made | {"problem": lines[-1] if lines else f"status {process.returncode}"})
    report = made | json.loads(output.read_text(encoding="utf-8"))
    output.unlink()
    _keep(path, report)
    print(
        f"{time.strftime('%H:%M:%S')} {path.stem} {time.perf_counter() - started:.0f}s: {words(report)}",
        flush=True,
    )
    return report


def _keep(path: pathlib.Path, report: dict[str, Any]) -> dict[str, Any]:
    """Keeps a report, or why there is none; the next run tries those again."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return report


def cell(cache: pathlib.Path, size: str, slice_name: str, step: str, minutes: float) -> dict[str, Any]:
    """A cell, with the least rematerialisation that fits; the recipe of 3B has "full" already."""
    own = "full" if size == "3b" else "none"
    if step != "train":
        return make_cell(cache, size, slice_name, step, None, minutes)
    report: dict[str, Any] = {}
    for remat in REMATS[REMATS.index(own) :]:
        report = make_cell(cache, size, slice_name, step, remat if remat != own else None, minutes) | {
            "remat": remat
        }
        if report.get("fits") or "problem" in report:
            break
    return report


def words(report: dict[str, Any]) -> str:
    """A report in a line."""
    if "problem" in report:
        return report["problem"]
    if not report["fits"]:
        return "does not fit"
    return f"{report['needed_bytes'] / 2**30:.2f} GiB, {1e3 * report['seconds']['estimate']:.3g} ms"


HEADER = (
    "model", "slice", "step", "data x fsdp x model", "pairs a step", "remat", "GiB a chip", "of", "fits",
    "GFLOP a chip", "GB moved", "MiB sent", "estimate", "compiler's", "pairs/s", "MFU at most", "a run",
)  # fmt: skip
LIMITS = {"v5e": 15.75, "v4": 30.75}


def milliseconds(seconds: float) -> str:
    """A time in a cell of the table.

    >>> milliseconds(0.0123456), milliseconds(1.7)
    ('12.3 ms', '1,700 ms')
    """
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{1e3 * seconds:,.0f} ms"


def row(size: str, slice_name: str, step: str, report: dict[str, Any]) -> list[str]:
    """Cells of the Markdown table."""
    lead = [size.upper(), slice_name, step]
    if "problem" in report:
        return [*lead, *[""] * (len(HEADER) - 4), report["problem"]]
    mesh = " x ".join(map(str, report["mesh"].values()))
    mesh += f", {report['copies']} times" if report["copies"] > 1 else ""
    needed = report["needed_bytes"]
    lead += [mesh, f"{report['pairs']}", report.get("remat", "")]
    lead += ["?" if needed is None else f"{needed / 2**30:.2f}", f"{LIMITS[slice_name.split('-')[0]]}"]
    if not report["fits"]:
        return [*lead, "**no**", *[""] * (len(HEADER) - 9)]
    seconds = report["seconds"]["estimate"]
    sent = sum(item["wire_bytes"] for item in report["collectives"])
    if step == "train":
        run = f"{report['days']:.2f} days, {report['chip_hours']:,.0f} chip-hours"
    else:
        hours = 1e6 / report["pairs_per_second"] / 3600
        run = f"1M pairs: {60 * hours:.2g} min, {hours * CHIPS[slice_name]:.2g} chip-hours"
    return [
        *lead, "yes", f"{report['flops_per_chip'] / 1e9:,.0f}", f"{report['bytes_per_chip'] / 1e9:,.1f}",
        f"{sent / 2**20:,.0f}", milliseconds(seconds), milliseconds(report["seconds"]["by_compiler"]),
        f"{report['pairs_per_second']:,.0f}", f"{report['mfu']:.0%}",
        run,
    ]  # fmt: skip


def markdown(cells: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """The table."""
    rows = [HEADER, *(row(*key, report) for key, report in cells.items())]
    lines = ["| " + " | ".join(cells_) + " |" for cells_ in rows]
    made = ", ".join(f"{name} {version}" for name, version in versions().items() if name != "sources")
    return "\n".join(
        [
            lines[0],
            "|" + "---|" * len(HEADER),
            *lines[1:],
            "",
            f"Made by `benchmarks/aot_table.py` with {made}.",
        ]
    )


def write_docs(cache: pathlib.Path, path: pathlib.Path) -> None:
    """Puts the table of all cells between its marks, and their reports beside it as JSON.

    Cells that the cache lacks, as they were made by other sources, stay as the page has them; a line counts them.

    Raises:
      ValueError: the file has no marks.
    """
    reports = path.with_suffix(".json")
    kept = json.loads(reports.read_text(encoding="utf-8")) if reports.is_file() else []
    before_now = {(report["size"], report["slice"], report["step"]): report for report in kept}
    there, older = {}, 0
    for key in itertools.product(SIZES, SLICES, STEPS):
        report = cell(cache, *key, minutes=0.0)
        if report.get("problem") == MISSING and key in before_now:
            report, older = before_now[key], older + 1
        if report.get("problem") != MISSING:
            there[key] = report
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no {BEGIN} ... {END}")
    note = f" {older} of the cells by an earlier state of the sources." if older else ""
    path.write_text(f"{before}{BEGIN}\n{markdown(there)}{note}\n{END}{after}", encoding="utf-8")
    named = [{**report, "size": key[0], "slice": key[1], "step": key[2]} for key, report in there.items()]
    reports.write_text(json.dumps(named, indent=1) + "\n", encoding="utf-8")


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="The table of docs/pods.md.")
    for name, known in (("sizes", SIZES), ("slices", SLICES), ("steps", STEPS)):
        parser.add_argument(
            f"--{name}", default=",".join(known), help=f"comma-separated, of {', '.join(known)}"
        )
    parser.add_argument(
        "--cache", type=pathlib.Path, default=ROOT / "outputs" / "aot", help="folder of the reports"
    )
    parser.add_argument("--minutes", type=float, default=120.0, help="for a cell at most (default 120)")
    parser.add_argument("--report_only", action="store_true", help="compile nothing; table of what there is")
    parser.add_argument(
        "--docs",
        type=lambda text: pathlib.Path(text) if text else None,
        default=DOCS,
        help="the page that gets the table of all cells in the cache, and a .json beside it; empty for none",
    )
    given = parser.parse_args(argv)
    for name, known in (("sizes", SIZES), ("slices", SLICES), ("steps", STEPS)):
        chosen = [part for part in getattr(given, name).split(",") if part]
        unknown = [part for part in chosen if part not in known]
        if unknown or not chosen:
            parser.error(f"--{name}: expected some of {', '.join(known)}")
        setattr(given, name, [part for part in known if part in chosen])
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the cells that are not there yet, the smallest models first, and writes the table after each."""
    given = parse_flags(argv)
    given.cache.mkdir(parents=True, exist_ok=True)
    chosen = list(itertools.product(given.sizes, given.slices, given.steps))
    cells = {}
    for number, key in enumerate(chosen, 1):
        cells[key] = cell(given.cache, *key, minutes=0.0 if given.report_only else given.minutes)
        print(f"{number}/{len(chosen)} {' '.join(key)}: {words(cells[key])}", flush=True)
        if given.docs:
            write_docs(given.cache, given.docs)
    print(markdown(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
