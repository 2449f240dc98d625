"""Lets contenders take turns on a workload, and keeps every measurement."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .processes import ContenderError, Spec, Worker
from .workloads import Workload


@dataclasses.dataclass
class Row:
    """One contender in one mode on one workload.

    Attributes:
      name: the contender's.
      mode: how it was run.
      precision: of its products.
      workload: what it computed; modes that pad every pair alike get fewer pairs.
      seconds: of each round.
      amounts: of work done in each round: pairs, or useful tokens in training.
      values: of the first round: scores, or losses of the first steps.
      peak_bytes: largest memory of the process while it ran.
      difference: largest distance of `values` from the reference's.
      notes: what the contender said about itself, such as `useful_share`.
      error: why there is nothing to show.
    """

    name: str
    mode: str
    precision: str
    workload: Workload
    seconds: list[float] = dataclasses.field(default_factory=list)
    amounts: list[float] = dataclasses.field(default_factory=list)
    values: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    difference: float | None = None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None

    @property
    def rates(self) -> list[float]:
        """Work a second in each round."""
        return [amount / seconds for amount, seconds in zip(self.amounts, self.seconds, strict=True)]

    @property
    def rate(self) -> float | None:
        """Median of `rates`."""
        return statistics.median(self.rates) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a report's JSON."""
        kept = {name: value for name, value in vars(self).items() if name not in ("workload", "values")}
        return {**kept, "pairs": len(self.workload.lengths), "median_rate": self.rate}


def ratio(row: Row, other: Row) -> float | None:
    """How many times faster `row` is than `other`: the median over rounds of the ratio within a round.

    Both of a round were measured within a minute or so, so a machine that slows down for a while cancels out.
    """
    pairs = list(zip(row.rates, other.rates, strict=False))
    return statistics.median(mine / theirs for mine, theirs in pairs) if pairs else None


@contextlib.contextmanager
def started(
    specs: Sequence[Spec],
    cores: list[int],
    log: pathlib.Path,
    environment: Mapping[str, str],
    timeout: float,
    say: Callable[[str], None],
    known: Mapping[str, str] | None = None,
) -> Iterator[tuple[dict[str, Worker], dict[str, str]]]:
    """Starts all contenders, one after another, and kills them at the end, whatever ends it.

    Args:
      specs: the contenders.
      cores: the cores of each.
      log: where their standard error goes.
      environment: variables beside the parent's own.
      timeout: seconds after which a command counts as failed.
      say: told what is going on.
      known: why contenders of a module need not be tried.

    Yields:
      Workers by the name of their spec, and why others did not start.
    """
    workers: dict[str, Worker] = {}
    errors: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for spec in specs:
            if known and spec.module in known:
                errors[spec.name] = known[spec.module]
                continue
            say(f"loading {spec.name}")
            try:
                worker = stack.enter_context(Worker(spec, cores, log, environment, timeout))
            except ContenderError as error:
                errors[spec.name] = str(error)
            else:
                workers[spec.name] = worker
        yield workers, errors


def prepare(
    specs: Sequence[Spec],
    workers: Mapping[str, Worker],
    errors: Mapping[str, str],
    choose: Callable[[Spec, str], Workload | None],
    say: Callable[[str], None],
    checks: int = 0,
) -> list[Row]:
    """Makes a row of every contender and mode, warmed up and with values to compare.

    Args:
      specs: all contenders.
      workers: those that run.
      errors: why others do not.
      choose: the workload of a contender in a mode; None leaves the row out.
      say: told what is going on.
      checks: how many runs give values, beside those of a contender's own preparation.
    """
    rows = []
    for spec in specs:
        for mode in spec.modes:
            workload = choose(spec, mode)
            if workload is None:
                continue
            row = Row(spec.name, mode, spec.precision, workload, error=errors.get(spec.name))
            rows.append(row)
            if row.error:
                continue
            say(f"{workload.name}: warming up {spec.name}, {mode}")
            ask = workers[spec.name].ask
            try:
                row.notes = ask(do="prepare", workload=workload.name, file=str(workload.path), mode=mode)
                row.values = row.notes.pop("values", [])
                for number in range(checks):
                    row.values += ask(do="run", workload=workload.name, mode=mode, round=number)["values"]
            except ContenderError as error:
                row.error = str(error)
    return rows


def compare(
    rows: Sequence[Row],
    bounds: Mapping[str, float],
    relative: bool = False,
    expected: Sequence[float] | None = None,
) -> Row | None:
    """Sets the `difference` of each row from a reference, and an error where it is beyond its bound.

    Args:
      rows: of one workload; a row that has fewer pairs has the first ones.
      bounds: largest difference by precision.
      relative: whether differences are divided by the reference's values.
      expected: values of the reference; by default those of the first float32 row that works, else of the first.

    Returns:
      That row.
    """
    working = [row for row in rows if not row.error]
    first = next((row for row in working if row.precision == "float32"), working[0] if working else None)
    for row in working:
        reference = np.array(first.values if expected is None and first else expected)
        count = min(len(row.values), len(reference))
        differences = np.abs(np.array(row.values[:count]) - reference[:count])
        if relative:
            differences /= np.maximum(np.abs(reference[:count]), 1e-9)
        row.difference = float(differences.max())
        if not row.difference <= bounds[row.precision]:
            row.error = f"other values: they differ by {row.difference:.2g} (bound {bounds[row.precision]:g})"
    return first


def take_turns(
    rows: Sequence[Row],
    workers: Mapping[str, Worker],
    rounds: int,
    after_round: Callable[[int], None],
    first: int = 0,
    amount: Callable[[Row, int], float] = lambda row, _: len(row.workload.lengths),
) -> None:
    """Times every row once a round, in an order that is shuffled anew each time, one at a time.

    Args:
      rows: those with an error are left out, and so is one that fails on the way.
      workers: by name.
      rounds: how many.
      after_round: called with the number of rounds done, to save what there is.
      first: number of the first round, which training takes for its batch.
      amount: work of a row in a round, pairs by default.
    """
    shuffle = random.Random(0)
    for number in range(rounds):
        order = [row for row in rows if not row.error]
        shuffle.shuffle(order)
        for row in order:
            command = {"workload": row.workload.name, "mode": row.mode, "round": first + number}
            try:
                reply = workers[row.name].ask(do="run", **command)
            except ContenderError as error:
                row.error = str(error)
                continue
            row.seconds.append(reply["seconds"])
            row.amounts.append(amount(row, first + number))
            row.peak_bytes = max(row.peak_bytes, reply["peak_bytes"])
        after_round(number + 1)


def measure_peaks(workers: Mapping[str, Worker], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Rates of matrix products, FLOP/s, by contender and precision."""
    found = {}
    for name in names:
        if name in workers:
            with contextlib.suppress(ContenderError):
                found[name] = workers[name].ask(do="peak")["peak"]
    return found


def say(message: str) -> None:
    """Prints a line of progress to standard error."""
    print(message, file=sys.stderr, flush=True)
