"""A run that grows beside its place: parts of finished queries, and a note of what the run is made of."""

from __future__ import annotations

import contextlib
import itertools
import json
from dataclasses import dataclass
from typing import Any

from inranker_jax import paths, records
from inranker_jax.errors import InputError
from inranker_jax.records import PathType
from inranker_jax.retrieval.locks import alone

QUERIES_PER_PART = 500


@dataclass(frozen=True)
class RunSummary:
    """What a finished run holds.

    Attributes:
      output: the run's file.
      queries: how many queries were asked.
      empty: how many of them have no candidate, and so no line.
      lines: how many candidates there are.
      seconds: time of this process for "index" and "search"; empty when the run was there already.
    """

    output: str
    queries: int
    empty: int
    lines: int
    seconds: dict[str, float]

    def text(self) -> str:
        """One line for people."""
        found = self.queries - self.empty
        line = f"{self.output}: {self.queries:,} queries, {self.lines:,} candidates"
        if found:
            line += f" ({self.lines / found:.1f} a query)"
        if self.empty:
            line += f"; {self.empty:,} {'query has' if self.empty == 1 else 'queries have'} none"
        return line


class Output:
    """A run that grows: its file, the parts beside it, and `OUTPUT.json`, which tells what it is made of.

    Parts are written once, each whole, so that a remote run is continued on any machine. Nothing keeps two machines
    from making the same remote run at a time: they write the same parts.

    Args:
      output: the run's file, here or remote.
      identity: what decides its content.
      again: make it anew even if it was made of the same.

    Raises:
      InputError: the bucket of a remote output does not exist or may not be read.
    """

    def __init__(self, output: PathType, identity: dict[str, Any], again: bool = False) -> None:
        paths.check_reachable(output)
        self.path = paths.of(output)
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._parts = self.path.with_name(self.path.name + ".parts")
        self._state = self.path.with_name(self.path.name + ".json")
        self._again = again

    def part(self, number: int) -> Any:
        """The file of a part."""
        return self._parts / f"part-{number:06d}.trec"

    def parts_done(self) -> int:
        """How many parts are there, from the first on without a gap."""
        there = set(paths.names_below(self._parts))
        return next(number for number in itertools.count() if self.part(number).name not in there)

    def finished(self) -> RunSummary | None:
        """The summary of a run that is whole and made of the same, None when there is work to do.

        Raises:
          InputError: the file holds something else.
        """
        if self._parts.exists() or not self.path.exists():
            return None
        state = _read_json(self._state)
        if not state or state.get("bytes") != paths.size(self.path):
            raise InputError.at(
                self.path, None, "there is a file already, and nothing tells that this command made it",
                remedy="Remove it, or choose another --output",
            )  # fmt: skip
        self._compare(self.path, state["identity"], self._identity)
        if self._again:
            return None
        counts = state["counts"]
        return RunSummary(str(self.path), counts["queries"], counts["empty"], counts["lines"], {})

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes of this machine from writing this run; of a remote one, nobody.

        Raises:
          InputError: on entering: one is doing so.
        """
        if paths.is_remote(self.path):
            return contextlib.nullcontext()
        return alone(self.path, "writing this run")

    def start(self) -> None:
        """Makes the folder of parts, or checks that the one that is there is of the same run.

        Raises:
          InputError: it is of another run, or the file holds something else.
        """
        note = self._parts / "identity.json"
        # Parts of another size would be other queries.
        wanted = {**self._identity, "queries_per_part": QUERIES_PER_PART}
        stored = _read_json(note)
        if stored and self.parts_done() and not self._again:
            self._compare(self._parts, stored, wanted)
            return
        self.discard()
        self.finished()
        with records.atomic_text(note) as out:
            json.dump(wanted, out, indent=1)

    def discard(self) -> None:
        """Removes the parts.

        Raises:
          InputError: somebody else's files are in their folder.
        """
        if not self._parts.exists():
            return
        for name in paths.names_below(self._parts):
            if not name.lstrip(".").startswith(("part-", "identity.json")):
                raise InputError.at(
                    self._parts / name, None, "not a part of an unfinished run",
                    remedy=f"Remove it: {self._parts} is for those, or choose another --output",
                )  # fmt: skip
        paths.remove(self._parts)

    def _compare(self, path: Any, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
        lines = [
            f"- {key}: {stored.get(key)}\n+ {key}: {wanted.get(key)}"
            for key in sorted({*stored, *wanted})
            if stored.get(key) != wanted.get(key)
        ]
        if lines:
            raise InputError(
                f"{path} was made otherwise (- that run, + wanted now):\n" + "\n".join(lines) + "\n"
                "Remove it, or choose another --output."
            )

    def join(self, count: int, seconds: dict[str, float]) -> RunSummary:
        """Puts the parts together."""
        lines, found = 0, 0
        with records.atomic_text(self.path) as out:
            for number in range(parts_of(count)):
                last = ""
                with records.open_text(self.part(number)) as part:
                    for line in part:
                        query = line.split(" ", 1)[0]
                        found += query != last
                        last = query
                        lines += 1
                        out.write(line)
        summary = RunSummary(str(self.path), count, count - found, lines, seconds)
        self.close(summary)
        return summary

    def close(self, summary: RunSummary) -> None:
        """Writes `OUTPUT.json` and removes the parts."""
        state = {
            "format": 1,
            "identity": self._identity,
            "counts": {"queries": summary.queries, "empty": summary.empty, "lines": summary.lines},
            "bytes": paths.size(self.path),
            "seconds_of_the_last_session": {key: round(value, 3) for key, value in summary.seconds.items()},
        }
        with records.atomic_text(self._state) as out:
            json.dump(state, out, indent=1)
        self.discard()


def parts_of(count: int) -> int:
    return -(-count // QUERIES_PER_PART)


def _read_json(path: Any) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError, ValueError):
        value = json.loads(path.read_text("utf-8"))
        return value if isinstance(value, dict) else {}
    return {}
