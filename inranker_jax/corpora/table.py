"""Items with unique ids, streamed from the rows of one or more files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from inranker_jax.corpora.ids import CompactIds
from inranker_jax.corpora.malformed import BadRow, MalformedReport, OnMalformed, RowPolicy, check_on_malformed
from inranker_jax.corpora.rows import Fields, RowSource
from inranker_jax.errors import InputError

_LOG = logging.getLogger(__name__)


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=_HasId)


class Place(NamedTuple):
    """Where an item stands: number of the file, number of the row, and where the row starts in the file."""

    file: int
    row: int
    offset: int


class Table(Generic[Item]):
    """Reads the items of some files, in order, as often as asked, without holding them.

    Ids are checked with `CompactIds`: 16 to 32 bytes an id during a pass, nothing where ids are row numbers.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        open_source: Callable[[str], RowSource],
        build: Callable[[Fields], Sequence[Item]],
        *,
        kind: str,
        on_malformed: OnMalformed = "raise",
        report: MalformedReport | None = None,
        contents: Callable[[Item], str] | None = None,
    ):
        """Takes the files' names; nothing is opened yet.

        Args:
          name: what messages and the report call the source.
          files: the files, in order.
          open_source: how the rows of a file are read.
          build: the items of a row; raises BadRow.
          kind: "documents" or "queries", for messages.
          on_malformed: "raise" at the first bad row, or "skip" and count it in the report.
          report: where rows left out are counted; without one, they are logged as a warning.
          contents: for formats that state an item once a row: a repeated id with equal contents is the same
            item and is yielded once; without it, every repeated id is an error.
        """
        check_on_malformed(on_malformed)
        self.name, self.files = name, list(files)
        self.report = report if report is not None else MalformedReport()
        self._logs = report is None
        self._open, self._build, self._kind = open_source, build, kind
        self.on_malformed: OnMalformed = on_malformed
        # One path may be the corpus and the queries (a BEIR folder): the report counts their rows apart.
        self.source = f"{kind} of {name}"
        self._contents = contents
        self._first_places: dict[str, Place] | None = None

    def rows(self, policy: RowPolicy | None) -> Iterator[tuple[Place, Item]]:
        """Yields (place, item) of every usable row, repeated ids included; without policy bad rows are passed by."""
        for index, path in enumerate(self.files):
            source = self._open(path)
            for number, offset, raw in source.rows():
                try:
                    items = self._build(source.fields(raw))
                except BadRow as bad:
                    if policy is not None:
                        policy.bad(path, number, bad)
                    continue
                for item in items:
                    yield Place(index, number, offset), item

    def items(self) -> Iterator[tuple[Place, Item]]:
        """Yields (place, item) in the order of the files, every id once.

        Raises:
          InputError: naming file and row, at a bad row or an id that occurs twice (under "raise"); or when
            there is no usable row at all.
        """
        policy = RowPolicy(self.on_malformed, self.report, self.source)
        ids, contents, count = CompactIds(), CompactIds(), 0
        for place, item in self.rows(policy):
            if self._contents is not None and contents.add(f"{item.id}\0{self._contents(item)}"):
                continue
            if ids.add(item.id) and not self._is_first(item.id, place):
                first = self._first_places[item.id] if self._first_places else None
                policy.bad(self.files[place.file], place.row, self._repeat(item.id, place, first))
                continue
            count += 1
            yield place, item
        if not count:
            left_out = f" ({policy.skipped} malformed rows were left out)" if policy.skipped else ""
            raise InputError.at(self.name, None, f"it holds no {self._kind}{left_out}", "at least one")
        if policy.skipped and self._logs:
            _LOG.warning("%s: %s", self.name, self.report.summary())

    def _is_first(self, identifier: str, place: Place) -> bool:
        """Whether an id whose hash was met before really stands here for the first time."""
        if self._first_places is None or identifier not in self._first_places:
            raises = self.on_malformed == "raise"
            suspects = {identifier} if raises else self._suspects()
            self._first_places = {}
            for other, item in self.rows(None):
                if item.id in suspects:
                    self._first_places.setdefault(item.id, other)
                    if raises:
                        break
        return self._first_places.get(identifier, place) == place

    def _suspects(self) -> set[str]:
        ids = CompactIds()
        return {item.id for _, item in self.rows(None) if ids.add(item.id)}

    def _repeat(self, identifier: str, place: Place, first: Place | None) -> BadRow:
        before = "before"
        if first is not None:
            file = "" if first.file == place.file else f"{self.files[first.file]}:"
            before = f"first on line {file}{first.row}" if not file else f"first at {file}{first.row}"
        other = " with another text" if self._contents is not None else ""
        return BadRow("duplicate_id", f"id {identifier!r} occurs twice{other}, {before}", "unique ids")
