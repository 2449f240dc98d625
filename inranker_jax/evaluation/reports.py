"""What an evaluation leaves behind: tables for people, JSON and TSV for programs, TREC runs for everyone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inranker_jax import paths, records
from inranker_jax.evaluation import measures
from inranker_jax.evaluation.measures import PerQuery
from inranker_jax.records import Run

MAIN_MEASURE = "ndcg_cut_10"
CQADUPSTACK = "cqadupstack"
CQADUPSTACK_FORUMS = 12
_FORMAT = 1


@dataclass(frozen=True)
class DatasetSummary:
    """The means of one dataset, as `result.json` holds them.

    Attributes:
      dataset: its name, for example "scifact" or "cqadupstack/android".
      split: which judgments.
      queries: number of judged queries, which is what the means divide by.
      systems: system -> measure -> mean over the queries.
      provenance: what made these numbers: settings, model, versions.
      notes: what the reader of the numbers must know.
    """

    dataset: str
    split: str
    queries: int
    systems: dict[str, dict[str, float]]
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "dataset": self.dataset,
            "split": self.split,
            "queries": self.queries,
            "systems": self.systems,
            "notes": list(self.notes),
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DatasetSummary:
        """The inverse of `to_dict`."""
        return cls(**{**values, "notes": tuple(values["notes"])})

    def table(self, names: Sequence[str] | None = None) -> str:
        """A row for each system, a column for each measure (all of them, or `names`)."""
        names = list(next(iter(self.systems.values()), {})) if names is None else list(names)
        header = [self.dataset, *map(measures.label, names)]
        rows = [[system, *(f"{row[name]:.4f}" for name in names)] for system, row in self.systems.items()]
        return format_table(header, rows)


@dataclass(frozen=True)
class CollectionReport:
    """One dataset evaluated: its summary, and the runs and per-query values behind it."""

    summary: DatasetSummary
    runs: dict[str, Run]
    per_query: dict[str, PerQuery]

    def table(self, names: Sequence[str] | None = None) -> str:
        """See `DatasetSummary.table`."""
        return self.summary.table(names)

    def write(self, folder: records.PathType) -> None:
        """Writes `<system>.trec` of each system, `per_query.tsv`, and last `result.json`, each atomically."""
        target = paths.of(folder)
        (target / "result.json").unlink(missing_ok=True)
        for system, run in self.runs.items():
            records.write_run(target / f"{slug(system)}.trec", run, slug(system))
        with records.atomic_text(target / "per_query.tsv") as out:
            names = list(next(iter(self.summary.systems.values()), {}))
            out.write("\t".join(["query", "system", *names]) + "\n")
            for system, values in self.per_query.items():
                for query, row in values.items():
                    out.write("\t".join([query, system, *(f"{row[name]:.6f}" for name in names)]) + "\n")
        write_json(target / "result.json", self.summary.to_dict())


@dataclass(frozen=True)
class Report:
    """Several datasets side by side. CQADupStack's forums are averaged to one row, as BEIR counts them."""

    datasets: tuple[DatasetSummary, ...]

    def rows(self) -> dict[str, tuple[int, dict[str, dict[str, float]]]]:
        """Row name -> (queries, system -> measure -> value); the forums of CQADupStack are one row."""
        rows: dict[str, tuple[int, dict[str, dict[str, float]]]] = {}
        forums = [summary for summary in self.datasets if summary.dataset.startswith(f"{CQADUPSTACK}/")]
        for summary in self.datasets:
            if summary not in forums:
                rows[summary.dataset] = (summary.queries, summary.systems)
            elif CQADUPSTACK not in rows:
                systems = _in_all([forum.systems for forum in forums])
                means = {s: measures.mean_rows(forum.systems[s] for forum in forums) for s in systems}
                rows[CQADUPSTACK] = (sum(forum.queries for forum in forums), means)
        return rows

    def average(self) -> dict[str, dict[str, float]]:
        """System -> measure -> mean over the rows, all with the same weight; systems of all rows only."""
        rows = [systems for _, systems in self.rows().values()]
        return {system: measures.mean_rows(row[system] for row in rows) for system in _in_all(rows)}

    def table(self, measure: str | None = None) -> str:
        """A row for each dataset and one for the average, a column for each system (nDCG@10 by default)."""
        rows = self.rows()
        systems = list(dict.fromkeys(system for _, row in rows.values() for system in row))
        if measure is None:
            known = [name for _, row in rows.values() for values in row.values() for name in values]
            measure = MAIN_MEASURE if MAIN_MEASURE in known or not known else known[0]
        lines = [
            [
                self._row_label(name),
                str(queries),
                *(_cell(row.get(system, {}).get(measure)) for system in systems),
            ]
            for name, (queries, row) in rows.items()
        ]
        if len(rows) > 1:
            average = self.average()
            cells = (_cell(average.get(system, {}).get(measure)) for system in systems)
            lines.append([f"average of {len(rows)}", "", *cells])
        return format_table([measures.label(measure), "queries", *systems], lines)

    def to_dict(self, **extra: Any) -> dict[str, Any]:
        """Plain values for `results.json`: every dataset, every system, every measure, and the averages."""
        rows = self.rows()
        result: dict[str, Any] = {
            "format": _FORMAT,
            **extra,
            "datasets": {summary.dataset: summary.to_dict() for summary in self.datasets},
            "average": self.average(),
            "average_over": list(rows),
        }
        if CQADUPSTACK in rows:
            result[CQADUPSTACK] = rows[CQADUPSTACK][1]
        return result

    def _row_label(self, name: str) -> str:
        forums = sum(summary.dataset.startswith(f"{name}/") for summary in self.datasets)
        complete = name != CQADUPSTACK or forums in (0, CQADUPSTACK_FORUMS)
        return name if complete else f"{name} ({forums} of {CQADUPSTACK_FORUMS} forums)"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligns a table for a terminal: first column to the left, the others to the right.

    >>> print(format_table(["set", "bm25"], [["scifact", "0.6762"]]))
    set        bm25
    scifact  0.6762
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write_json(path: records.PathType, value: Any) -> None:
    """Writes JSON atomically, keys in their order, text readable."""
    with records.atomic_text(path) as out:
        json.dump(value, out, indent=1, ensure_ascii=False)
        out.write("\n")


def slug(system: str) -> str:
    """A system's name as a file name and run tag: all but letters, digits, `.`, `_`, `-` becomes `_`."""
    return re.sub(r"[^\w.-]+", "_", system).strip("_") or "system"


def _in_all(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    rows = list(rows)
    return [name for name in (rows[0] if rows else ()) if all(name in row for row in rows)]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
