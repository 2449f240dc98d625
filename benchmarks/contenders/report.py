"""Tables of what was measured, and files that are complete after every round."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import rounds
from .rounds import Row

PACKAGES = ("jax", "torch", "transformers", "ctranslate2", "onnxruntime", "numpy")


@dataclasses.dataclass(frozen=True)
class Goal:
    """A line of the project's goals beside what was measured.

    Attributes:
      workload: where it was measured.
      what: of which work.
      beside: what ours is compared with.
      wanted: the goal, at least.
      reached: what was measured, None where there was nothing to compare.
      note: for instance what no engine can pass.
      unit: "x" for ratios, "%" for shares (as fractions).
    """

    workload: str
    what: str
    beside: str
    wanted: float
    reached: float | None
    note: str = ""
    unit: str = "x"

    def shown(self, value: float) -> str:
        """A value in the goal's unit."""
        return f"{value:.1%}" if self.unit == "%" else f"{value:.2f}x"

    def cells(self) -> list[str]:
        """Of its row of the table."""
        if self.reached is None:
            verdict, reached = "not measured", "-"
        else:
            verdict = "yes" if self.reached >= self.wanted else "no"
            reached = self.shown(self.reached)
        return [self.workload, self.what, self.beside, self.shown(self.wanted), reached, verdict, self.note]


def goal(
    workload: str,
    what: str,
    beside: str,
    wanted: float,
    row: Row | None,
    peers: Iterable[Row | None],
    note: str = "",
) -> Goal:
    """A goal against the fastest of some peers; those without measurements do not count."""
    if row is None or not row.seconds or row.error:
        return Goal(workload, what, beside, wanted, None, note)
    running = [peer for peer in peers if peer is not None and peer.seconds and not peer.error]
    if not running:
        return Goal(workload, what, beside, wanted, None, note)
    fastest = max(running, key=lambda peer: peer.rate or 0.0)
    named = beside if len(running) == 1 else f"{beside} ({fastest.name}, {fastest.mode})"
    return Goal(workload, what, named, wanted, rounds.ratio(row, fastest), note)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too; all but the first are right-aligned."""
    cells = [list(header), *map(list, lines)]
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(header))]

    def row(line: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([row(cells[0]), row(rule), *map(row, cells[1:])])


def goals_table(goals: Sequence[Goal]) -> str:
    """Goals beside what was reached."""
    header = ["workload", "ours", "beside", "goal", "reached", "?", "note"]
    return table(header, [goal.cells() for goal in goals])


def failures(rows: Iterable[Row]) -> list[str]:
    """Why rows of a table have no figures: one paragraph, or none where all have."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.error:
            reasons.setdefault(row.error, []).append(f"{row.name}, {row.mode}")
    lines = [f"- {'; '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
    return ["Failed:\n\n" + "\n".join(lines)] if lines else []


def spread(values: Sequence[float]) -> str:
    """Smallest and largest, such as "12.1..12.9"."""
    return f"{number(min(values))}..{number(max(values))}" if values else "-"


def number(value: float) -> str:
    """Three significant digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def machine(cores: Sequence[int], environment: Mapping[str, str]) -> dict[str, Any]:
    """What figures depend on besides the code."""
    model = platform.processor()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags: set[str] = set()
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": model,
        "instructions": [name for name in wanted if name in flags],
        "cores": list(cores),
        "python": platform.python_version(),
        "packages": versions,
        "environment": dict(environment),
        "load_before": os.getloadavg()[0],
    }


def machine_line(found: Mapping[str, Any]) -> str:
    """`machine` in a sentence; says when the machine was busy before we came."""
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    busy = f" **The machine was not quiet: load {found['load_before']:.1f} before the start.**"
    return (
        f"{found['processor']} ({', '.join(found['instructions']) or 'no vector extensions known'}), "
        f"{len(found['cores'])} cores; Python {found['python']}, {versions}."
        + (busy if found["load_before"] > 0.5 else "")
    )


def save(folder: pathlib.Path, name: str, data: Mapping[str, Any], markdown: str) -> None:
    """Writes NAME.json and NAME.md; readers see the old files or the new ones."""
    for suffix, text in ((".json", json.dumps(data, indent=1, default=str)), (".md", markdown)):
        partial = folder / f"{name}{suffix}.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(folder / f"{name}{suffix}")
