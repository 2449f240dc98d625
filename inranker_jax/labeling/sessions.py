"""Progress of a labelling run: pairs per second, time left and cost so far, on the screen and on disk.

Every process that labels keeps one small file up to date, so that the cost of a killed one is not forgotten:

    DIR/sessions/<start>-p<process index>-<process id>.json
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from inranker_jax import paths
from inranker_jax.corpora.label_store import write_json
from inranker_jax.progress import clock

_SHOW_SECONDS = 10.0


class Session:
    """Counts the work of this process, and shows it now and then."""

    def __init__(
        self,
        folder: Any,
        process: tuple[int, int],
        *,
        usd_per_hour: float | None,
        announce: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the clock.

        Args:
          folder: the label folder.
          process: (index, count) of this process.
          usd_per_hour: price of this process's machine, None when unknown.
          announce: prints a line.
          now: seconds, for tests.
        """
        self._announce, self._now, self._usd = announce, now, usd_per_hour
        self._start = self._shown = self._handed = now()
        self.pairs = 0
        started = datetime.datetime.now(datetime.UTC)
        name = f"{started:%Y%m%dT%H%M%S}-p{process[0]}-{socket.gethostname()}-{os.getpid()}.json"
        self._path = folder / "sessions" / name
        self._earlier = totals(folder)
        self._record: dict[str, Any] = {
            "started": started.isoformat(timespec="seconds"),
            "process_index": process[0],
            "process_count": process[1],
            "host": socket.gethostname(),
            "command": sys.argv,
            "usd_per_hour": usd_per_hour,
        }
        self._teacher = ""
        self._total = self._done = self._own = 0
        self._first: float | None = None
        self._first_pairs = 0

    def begin(self, teacher: str, total: int, done: int) -> None:
        """Starts on a teacher: of `total` pairs of this process, `done` were there already."""
        self._teacher, self._total, self._done = teacher, total, done
        self._own, self._first = 0, None
        self._shown = self._handed = self._now()

    def hand_over(self) -> None:
        """Starts the clock of the rate: the teacher, loaded by now, takes its first pairs."""
        self._handed = self._now()

    def add(self, pairs: int, scored: int) -> None:
        """Counts pairs that are on disk now, and those of them that this process scored.

        Shows and stores the progress every ten seconds; the last line is the caller's to show.
        """
        now = self._now()
        self.pairs += scored
        self._own += pairs
        if self._first is None:
            # The first chunk's time is mostly compilation, which would spoil the rate.
            self._first, self._first_pairs = now, self._own
            self.store()
        if now - self._shown >= _SHOW_SECONDS and self._done + self._own < self._total:
            self._shown = now
            self._announce(self.line())
            self.store()

    def line(self) -> str:
        """Such as `t5: 12,288 of 40,000 pairs  103 pairs/s  4m29s left  5m12s so far  $0.12 so far`."""
        done = self._done + self._own
        parts = [f"{self._teacher}: {done:,} of {self._total:,} pairs"]
        rate = self._rate()
        if rate:
            parts += [f"{rate:,.0f} pairs/s" if rate >= 10 else f"{rate:.2g} pairs/s"]
            parts += [f"{clock((self._total - done) / rate)} left"]
        spent = add_cost(self._earlier, self._cost())
        parts.append(f"{clock(spent['seconds'])} so far")
        if spent["usd"] is not None:
            parts.append(f"${spent['usd']:.2f} so far")
        return "  ".join(parts)

    def _rate(self) -> float:
        now = self._now()
        if self._first is not None and self._own > self._first_pairs and now > self._first:
            return (self._own - self._first_pairs) / (now - self._first)
        elapsed = now - self._handed
        return self._own / elapsed if elapsed > 0 else 0.0

    def _cost(self) -> dict[str, Any]:
        seconds = self._now() - self._start
        usd = None if self._usd is None else seconds / 3600 * self._usd
        return {"seconds": seconds, "pairs_scored": self.pairs, "usd": usd}

    def store(self) -> None:
        """Brings the session's file up to date; one that scored nothing writes none."""
        if self.pairs:
            write_json(self._path, {**self._record, **self._cost()})


def add_cost(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Adds two costs; dollars are unknown when those of either are (of no time at all they are 0)."""
    dollars = [cost["usd"] if cost["seconds"] else 0.0 for cost in (one, other)]
    return {
        "seconds": one["seconds"] + other["seconds"],
        "pairs_scored": one["pairs_scored"] + other["pairs_scored"],
        "usd": None if None in dollars else sum(dollars),
    }


def totals(folder: Any) -> dict[str, Any]:
    """The cost of all sessions of a label folder: seconds (of all processes together), pairs and dollars."""
    total: dict[str, Any] = {"seconds": 0.0, "pairs_scored": 0, "usd": 0.0}
    for path in sorted((folder / "sessions").glob("*.json")):
        total = add_cost(total, json.loads(paths.read(path)))
    return total
