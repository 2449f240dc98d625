"""What to do with a row that cannot be used: stop at it, or leave it out, count it and say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from inranker_jax.errors import InputError, sentence
from inranker_jax.records import PathType

OnMalformed = Literal["raise", "skip"]

_REMEDY = 'Correct it, or leave such rows out: --skip_malformed (on_malformed="skip" in Python)'


class BadRow(Exception):
    """A row that cannot be used: its kind for the report, and the words for the error."""

    def __init__(self, kind: str, problem: str, expected: str = "", remedy: str = ""):
        super().__init__(problem)
        self.kind, self.problem, self.expected, self.remedy = kind, problem, expected, remedy


@dataclass
class _Tally:
    """What one pass over one source left out."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class MalformedReport:
    """Rows that readers left out, by source and kind; one report may serve several readers.

    A source that is read several times is counted once: the longest pass over it counts.

    Kinds: `encoding` (not UTF-8, or half a surrogate pair), `json`, `columns`, `missing_field`, `bad_field`
    (a field of another type), `bad_id` (empty, or with a blank in it), `empty_text` (a query without text),
    `duplicate_id`.

    Attributes:
      max_examples: how many places of each kind the summary names.
    """

    max_examples: int = 3
    _sources: dict[str, _Tally] = field(default_factory=dict)

    @property
    def counts(self) -> Counter[str]:
        """Rows left out, by kind, over all sources."""
        return sum((tally.counts for tally in self._sources.values()), Counter())

    @property
    def total(self) -> int:
        """How many rows were left out."""
        return self.counts.total()

    @property
    def examples(self) -> dict[str, list[str]]:
        """The first places of each kind, as `path:line: problem`."""
        found: dict[str, list[str]] = {}
        for tally in self._sources.values():
            for kind, places in tally.first.items():
                kept = found.setdefault(kind, [])
                kept.extend(places[: self.max_examples - len(kept)])
        return found

    def summary(self) -> str:
        """Words for a log: the counts by kind and the first lines of each; one line when nothing was left out.

        >>> MalformedReport().summary()
        'no malformed rows'
        """
        if not self.total:
            return "no malformed rows"
        by_kind = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.counts.items()))
        lines = [f"left out {self.total:,} malformed row{'s' * (self.total != 1)}: {by_kind}"]
        for kind, places in sorted(self.examples.items()):
            lines.extend(f"  {kind}: {place}" for place in places)
        return "\n".join(lines)

    def left_out(self, source: str) -> dict[str, Any]:
        """What was left out of a source so far, for a JSON file beside what was made of the source."""
        tally = self._sources.get(source, _Tally())
        return {"counts": dict(tally.counts), "first": dict(tally.first)}

    def recall(self, source: str, left_out: Mapping[str, Any]) -> None:
        """Takes in what an earlier process left out of a source (`left_out`), which is not read again."""
        self.keep(source, _Tally(Counter(left_out["counts"]), dict(left_out["first"])))

    def keep(self, source: str, tally: _Tally) -> None:
        """Takes in what a pass over `source` has left out so far, unless a longer pass is known."""
        known = self._sources.get(source)
        if known is None or tally.counts.total() >= known.counts.total():
            self._sources[source] = tally


class RowPolicy:
    """The policy for one pass over one source: `bad` either raises or counts."""

    def __init__(self, on_malformed: OnMalformed, report: MalformedReport, source: str):
        self._raises = check_on_malformed(on_malformed) == "raise"
        self._report, self._source, self._tally = report, source, _Tally()

    @property
    def skipped(self) -> int:
        """Rows left out in this pass."""
        return self._tally.counts.total()

    def bad(self, path: PathType, number: int, row: BadRow) -> None:
        """Raises the error for a bad row, or counts it.

        Raises:
          InputError: under "raise", with file and line.
        """
        if self._raises:
            own = f"{sentence(row.remedy)} " if row.remedy else ""
            raise InputError.at(path, number, row.problem, row.expected, own + _REMEDY)
        self._tally.counts[row.kind] += 1
        places = self._tally.first.setdefault(row.kind, [])
        if len(places) < self._report.max_examples:
            places.append(f"{path}:{number}: {row.problem}")
        self._report.keep(self._source, self._tally)


def check_on_malformed(on_malformed: str) -> str:
    """Returns the policy's name.

    Raises:
      InputError: it is neither "raise" nor "skip".
    """
    if on_malformed not in ("raise", "skip"):
        raise InputError(f"on_malformed={on_malformed!r}: expected 'raise' or 'skip'.")
    return on_malformed
