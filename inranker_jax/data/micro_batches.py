"""Which lists of a step are computed together: packed micro-batches of one static shape.

A listwise loss needs its list whole, so a list never spans two micro-batches. A step uses as many of them as its
lists need, which costs what it holds; the array that carries them has room for the worst case, so that nothing
is compiled twice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from inranker_jax import packing
from inranker_jax.errors import InputError
from inranker_jax.packing import Layout

_CANDIDATES, _SIMULATED_DOCUMENTS = 12, 2048
_ROW_LENGTHS = (1, 1.25, 1.5, 2, 3, 4)  # times max_length
_LONGEST_ROW = 512  # unless twice max_length is more
_PACKED_ANEW = 3  # micro-batches for a list that fits into none as they are
# Attention's work grows with the row: at about so many tokens it is as much as all the rest of T5-small's layers.
_ATTENTION = 3072
# A micro-batch costs, beside its tokens, the addition of all gradients and the start of every operation: about
# as much as this share of a call of the layout's size, or of one that fills any accelerator.
_OVERHEAD = 1 / 16
_FULL_CALL = 16384


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static shape of a packed step.

    Attributes:
      count: micro-batches that the arrays have room for.
      rows: rows of a micro-batch.
      row_length: tokens of a row.
      slots: most sequences a row.
      lists: most lists a micro-batch.
      list_size: documents a list.
      sizes: numbers of rows of which a micro-batch computes the first that is enough; the last is `rows`.
    """

    count: int
    rows: int
    row_length: int
    slots: int
    lists: int
    list_size: int
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Division:
    """Where the lists and sequences of a step go.

    Attributes:
      used: micro-batches in use.
      rows: rows that are computed in all of them.
      micro_batch: int `[lists]`.
      place: int `[lists]`, from 0 within the micro-batch.
      row: int `[sequences]`, within the micro-batch.
      slot: int `[sequences]`, within the row.
    """

    used: int
    rows: int
    micro_batch: np.ndarray
    place: np.ndarray
    row: np.ndarray
    slot: np.ndarray


def choose_row_length(max_length: int, slots: int | None, sample: Iterable[Sequence[np.ndarray]]) -> int:
    """Chooses the length of packed rows for the data at hand.

    Rows of `max_length` waste much where most sequences are longer than half of it, since two do not fit; longer
    rows cost more attention. The choice weighs one against the other.

    Args:
      max_length: most tokens of a sequence.
      slots: most sequences a row; None for the default of each length.
      sample: steps of lists of token numbers `[documents]`.

    Returns:
      A number of tokens, at least `max_length`.
    """
    lengths = np.concatenate([[], *(length for step in sample for length in step)])
    longest = max(2 * max_length, _LONGEST_ROW)
    candidates = {
        _up(int(max_length * factor), 16) for factor in _ROW_LENGTHS if max_length * factor <= longest
    }
    best = (np.inf, max_length)
    for row_length in sorted({max_length, *candidates}):
        *_, rows = packing.assign(lengths, row_length, slots or packing.default_slots(row_length))
        best = min(best, (rows * row_length * (1 + row_length / _ATTENTION), row_length))
    return best[1]


def choose_shape(
    layout: Layout,
    batch_size: int,
    list_size: int,
    sample: Iterable[Sequence[np.ndarray]],
    *,
    ways: int = 1,
    accumulation: int = 1,
) -> Shape:
    """Chooses how many rows a micro-batch has: those with which a sample of the data costs least.

    It must hold any single list, and gets no more tokens a device than the layout's `tokens_per_call` except where
    two of the longest possible lists need them.

    Args:
      layout: resolved, packed.
      batch_size: lists a step.
      list_size: most documents a list.
      sample: steps of lists of token numbers `[documents]`.
      ways: devices over which rows are divided.
      accumulation: least number of micro-batches of a full step: none has more than its share of the lists.

    Returns:
      The shape.

    Raises:
      InputError: `accumulation` is not between 1 and the batch size.
    """
    if not 1 <= accumulation <= batch_size:
        raise InputError(
            f"accumulation={accumulation}: expected 1 to {batch_size}, the lists of a step (batch_size)."
        )
    assert layout.row_length is not None
    assert layout.slots is not None
    assert layout.tokens_per_call is not None
    share = -(-batch_size // accumulation)
    low = _up(list_size, ways)
    most = max(layout.rows_per_call(ways), 2 * list_size if list_size > 1 else 1)
    high = max(low, min(most // ways * ways, _up(share * list_size, ways)))
    steps = _resampled([lengths for step in sample for lengths in step], batch_size)
    needed = [packing.assign(np.concatenate(step), layout.row_length, layout.slots)[2] for step in steps]
    wanted = [*np.linspace(low, high, _CANDIDATES)]
    for parts in (1, 2, 3, 4):  # a little more than a step needs, in so many micro-batches
        wanted += [slack * np.mean(needed or [high]) / parts for slack in (1.03, 1.08, 1.15)]
    # Even, so that half of a micro-batch can be left out.
    even = {_up(math.ceil(rows), 2 * ways) for rows in wanted}
    candidates = {rows for rows in even if low <= rows <= high} or {high}
    overhead = min(layout.tokens_per_call, _FULL_CALL) * _OVERHEAD
    costs = []
    for rows in sorted(candidates):
        lists = min(share, rows * layout.slots)
        count = -(-batch_size // min(rows // list_size, lists))
        sizes = packing.row_sizes(rows, ways)
        shape = Shape(count, rows, layout.row_length, layout.slots, lists, list_size, sizes)
        divisions = [divide(step, shape) for step in steps]
        computed = sum(division.rows for division in divisions) * layout.row_length / ways
        calls = sum(division.used for division in divisions)
        costs.append((computed + calls * overhead, shape))
    best = min(costs, key=lambda pair: pair[0])[1] if steps else costs[-1][1]
    return dataclasses.replace(best, lists=_up(best.lists, ways))


def _resampled(lists: Sequence[np.ndarray], batch_size: int) -> list[list[np.ndarray]]:
    """Steps drawn from the sampled lists, some a little larger or smaller: the choice must bear others than these."""
    if not lists:
        return []
    documents = batch_size * np.mean([len(lengths) for lengths in lists])
    enough = float(_SIMULATED_DOCUMENTS / documents)
    # Six of moderate size; the largest vary little, and cost much.
    count = int(min(24.0, max(3.0, enough, min(6.0, 4 * enough))))
    rng = np.random.default_rng(0)
    sizes = np.rint(batch_size * np.linspace(0.94, 1.06, count)).astype(int)
    return [[lists[number] for number in rng.integers(0, len(lists), size)] for size in sizes]


def divide(lengths: Sequence[np.ndarray], shape: Shape) -> Division:
    """Divides the lists of a step among micro-batches.

    Lists go, longest first, into the first micro-batch with room. Pairs are packed all at once, and their rows
    then dealt out.

    Args:
      lengths: per list the token numbers of its documents.
      shape: what a micro-batch holds.

    Returns:
      The division; it uses at most `shape.count` micro-batches where there are no more lists than a step has.
    """
    numbers = np.cumsum([0, *map(len, lengths)])
    if shape.list_size == 1 and shape.lists >= min(len(lengths), shape.rows * shape.slots):
        row, slot, rows = packing.assign(np.concatenate([[], *lengths]), shape.row_length, shape.slots)
        micro_batch, row = row // shape.rows, row % shape.rows
        used = -(-rows // shape.rows)
    else:
        micro_batch = np.zeros(len(lengths), np.int32)
        row, slot = np.zeros(numbers[-1], np.int32), np.zeros(numbers[-1], np.int32)
        groups = _first_fit(lengths, shape)
        used = len(groups)
        for number, group in enumerate(groups):
            micro_batch[group.lists] = number
            sequences = np.concatenate([np.arange(numbers[n], numbers[n + 1]) for n in group.lists])
            row[sequences], slot[sequences] = group.row, group.slot
    place = np.zeros(len(lengths), np.int32)
    for number in range(used):
        (members,) = np.nonzero(micro_batch == number)
        place[members] = np.arange(len(members))
    needed = np.zeros(used, np.int64)
    np.maximum.at(needed, np.repeat(micro_batch, [len(length) for length in lengths]), row + 1)
    computed = np.array(shape.sizes)[np.searchsorted(shape.sizes, needed)]
    return Division(used, int(computed.sum()), micro_batch, place, row, slot)


class _Group:
    """A micro-batch that is being filled: its lists, and where their sequences lie.

    A list is put beside those that are there, each sequence into the fullest row that holds it. Only where that fails
    is everything packed anew, as best-fit decreasing does it: that is the rarer and the dearer of the two.
    """

    def __init__(self, shape: Shape) -> None:
        self.lists: list[int] = []
        self._shape = shape
        self._lengths, self.row, self.slot = (
            np.zeros(0, np.int64),
            np.zeros(0, np.int32),
            np.zeros(0, np.int32),
        )
        self._left, self._taken = [shape.row_length] * shape.rows, [0] * shape.rows

    @property
    def is_full(self) -> bool:
        return len(self.lists) == self._shape.lists

    def put_beside(self, number: int, lengths: np.ndarray) -> bool:
        """Adds a list without moving what is there; False where it does not fit so."""
        left, taken = self._left.copy(), self._taken.copy()
        row, slot = np.zeros(len(lengths), np.int32), np.zeros(len(lengths), np.int32)
        for place in np.argsort(-lengths, kind="stable").tolist():
            size, best = int(lengths[place]), -1
            for candidate, free in enumerate(left):
                fits = free >= size and taken[candidate] < self._shape.slots
                if fits and (best < 0 or free < left[best]):
                    best = candidate
            if best < 0:
                return False
            row[place], slot[place] = best, taken[best]
            left[best] -= size
            taken[best] += 1
        self._take(number, lengths, np.concatenate([self.row, row]), np.concatenate([self.slot, slot]))
        self._left, self._taken = left, taken
        return True

    def pack_anew(self, number: int, lengths: np.ndarray) -> bool:
        """Adds a list by packing all that is there anew; False where that does not help."""
        together = np.concatenate([self._lengths, lengths])
        row, slot, count = packing.assign(together, self._shape.row_length, self._shape.slots)
        if count > self._shape.rows:
            return False
        self._take(number, lengths, row, slot)
        used = np.bincount(row, together, minlength=self._shape.rows).astype(int)
        self._left = (self._shape.row_length - used).tolist()
        self._taken = np.bincount(row, minlength=self._shape.rows).tolist()
        return True

    def _take(self, number: int, lengths: np.ndarray, row: np.ndarray, slot: np.ndarray) -> None:
        self.lists.append(number)
        self._lengths, self.row, self.slot = np.concatenate([self._lengths, lengths]), row, slot


def _first_fit(lengths: Sequence[np.ndarray], shape: Shape) -> list[_Group]:
    """Lists, longest first, each into the first micro-batch that holds it as it is, else one of the emptiest anew."""
    groups: list[_Group] = []
    left = np.zeros(len(lengths), np.int64)  # free tokens of each group; none in one that has its lists
    totals = np.array([length.sum() for length in lengths])
    for number in np.argsort(-totals, kind="stable").tolist():
        possible = np.flatnonzero(left[: len(groups)] >= totals[number]).tolist()
        home = next((n for n in possible if groups[n].put_beside(number, lengths[number])), None)
        if home is None:
            emptiest = sorted(possible, key=lambda n: -left[n])[:_PACKED_ANEW]
            home = next((n for n in emptiest if groups[n].pack_anew(number, lengths[number])), None)
        if home is None:
            home = len(groups)
            groups.append(_Group(shape))
            left[home] = shape.rows * shape.row_length
            groups[home].pack_anew(number, lengths[number])
        left[home] = 0 if groups[home].is_full else left[home] - totals[number]
    return groups


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
