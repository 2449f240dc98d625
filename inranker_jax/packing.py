"""How token sequences of unequal lengths become arrays of few shapes: padded, bucketed or packed rows.

A packed row holds several sequences, one after another, told apart by segment ids (0 is padding). Attention stays
within a segment, and since each is contiguous, the offsets between its tokens are those of a row of its own. So a
sequence gives the values that it gives alone, and little is computed for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from inranker_jax.errors import InputError, did_you_mean

KINDS = ("auto", "padded", "bucketed", "packed")

DEFAULT_LENGTHS = (*range(32, 129, 8), *range(144, 257, 16), *range(288, 513, 32), *range(640, 4097, 256))
"""Row lengths of the bucketed layout where none are given: 29 up to 512 tokens, each compiled when first needed."""

_CPU_TOKENS, _ACCELERATOR_TOKENS = 1024, 16384
_TOKENS_PER_SLOT = 32


@dataclasses.dataclass(frozen=True)
class Layout:
    """How sequences are laid out in rows. None means the default that `resolve` fills in.

    Attributes:
      kind: "padded" gives each sequence a row of the longest length, "bucketed" the shortest of `lengths` that
        holds it, "packed" a part of a row; "auto" is bucketed on CPU and packed elsewhere.
      lengths: bucketed: row lengths; those above the contract's `max_length` are dropped, and `max_length` is
        always the last.
      row_length: packed: tokens a row, at least `max_length`, which is the default; training chooses it for its data.
      slots: packed: most sequences a row; one for each 32 tokens by default.
      tokens_per_call: tokens of a call on each device, padding included; 1024 on CPU (2048 in training) and 16384
        elsewhere by default. A call has at least one row.

    Raises:
      InputError: a value is out of range.
    """

    kind: str = "auto"
    lengths: tuple[int, ...] | None = None
    row_length: int | None = None
    slots: int | None = None
    tokens_per_call: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(
                f"layout {self.kind!r}: no such kind.{did_you_mean(str(self.kind), KINDS)} "
                f"Expected one of {', '.join(KINDS)}."
            )
        if self.lengths is not None:
            listed = isinstance(self.lengths, Sequence) and not isinstance(self.lengths, str)
            if not listed or not all(map(_is_count, self.lengths)):
                raise InputError(
                    f"lengths={self.lengths!r}: expected positive numbers of tokens, such as (64, 128)."
                )
            object.__setattr__(self, "lengths", tuple(self.lengths))
        for name in ("row_length", "slots", "tokens_per_call"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                raise InputError(f"{name} is {value!r}; expected a positive number, or None for the default.")

    @classmethod
    def of(cls, value: Layout | str | None) -> Layout:
        """A layout as it is, one by the name of its kind, or for None the automatic one.

        >>> Layout.of("packed").kind, Layout.of(None).kind
        ('packed', 'auto')
        """
        return value if isinstance(value, Layout) else Layout(value if value is not None else "auto")

    def resolve(self, platform: str, max_length: int) -> Layout:
        """Settles what was left open.

        Args:
          platform: JAX's name of it: "cpu", "gpu", "tpu".
          max_length: most tokens of a sequence.

        Returns:
          A layout whose fields are all set and whose kind is not "auto". Resolving it again changes nothing.

        Raises:
          InputError: `row_length` is below `max_length`.

        >>> Layout("packed", tokens_per_call=4096).resolve("cpu", 512).rows_per_call()
        8
        >>> Layout(lengths=(64, 128, 1024)).resolve("cpu", 512).lengths
        (64, 128, 512)
        """
        kind = self.kind
        if kind == "auto":
            kind = "bucketed" if platform == "cpu" else "packed"
        row_length = self.row_length or max_length
        if row_length < max_length:
            raise InputError(
                f"row_length is {row_length}, but a sequence may have {max_length} tokens (the contract's "
                f"max_length). Expected row_length of at least {max_length}."
            )
        edges = DEFAULT_LENGTHS if self.lengths is None else self.lengths
        shorter = sorted({length for length in edges if length < max_length})
        return Layout(
            kind=kind,
            lengths=(max_length,) if kind == "padded" else (*shorter, max_length),
            row_length=row_length,
            slots=self.slots or default_slots(row_length),
            tokens_per_call=self.tokens_per_call
            or (_CPU_TOKENS if platform == "cpu" else _ACCELERATOR_TOKENS),
        )

    def rows_per_call(self, ways: int = 1) -> int:
        """Packed rows computed at once over `ways` devices, of a resolved layout; at least one a device."""
        if self.tokens_per_call is None or self.row_length is None:
            raise InputError(f"{self} has open settings: resolve it for a platform and a contract first.")
        return max(1, self.tokens_per_call // self.row_length) * ways


@dataclasses.dataclass(frozen=True)
class Packed:
    """Sequences in rows; see `pack`.

    Attributes:
      tokens: int32 `[rows, length]`.
      segment_ids: int32 `[rows, length]`, 0 for padding and slot + 1 for the tokens of a slot's sequence.
      row: int32 `[n]`, the row of each sequence.
      slot: int32 `[n]`, its place in that row, from 0.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    row: np.ndarray
    slot: np.ndarray


def assign(
    lengths: Sequence[int] | np.ndarray, row_length: int, slots: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Divides sequences among rows by best-fit decreasing: longest first, each to the fullest row that holds it.

    Where slots do not run out, that needs at most 11/9 of the rows of the optimum, plus 4 (Johnson et al. 1974,
    "Worst-case performance bounds for simple one-dimensional packing algorithms"). The result depends on the
    arguments alone.

    Args:
      lengths: tokens of each of n sequences, from 1 to `row_length`.
      row_length: tokens a row holds.
      slots: sequences a row holds.

    Returns:
      row: int32 `[n]`.
      slot: int32 `[n]`, from 0 without gaps in each row.
      count: how many rows there are.

    Raises:
      InputError: a sequence is empty or longer than a row.

    >>> row, slot, count = assign([3, 7, 5, 4], 10, 4)
    >>> row.tolist(), slot.tolist(), count
    ([0, 0, 1, 1], [1, 0, 0, 1], 2)
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and (sizes.min() < 1 or sizes.max() > row_length):
        worst = int(np.argmax((sizes < 1) | (sizes > row_length)))
        raise InputError(
            f"sequence {worst} has {sizes[worst]} tokens; expected 1 to {row_length}, the length of a packed row."
        )
    row, slot = np.zeros(len(sizes), np.int32), np.zeros(len(sizes), np.int32)
    # Open rows by their free tokens, and as a bit set the free numbers that occur: the tightest is its lowest bit
    # from the wanted length up. A row without a free slot is closed.
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]
    occurring, taken, count = 0, list[int](), 0
    for number in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[number])
        fitting = occurring >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            chosen = open_rows[free].pop()
            if not open_rows[free]:
                occurring &= ~(1 << free)
        else:
            free, chosen = row_length, count
            taken.append(0)
            count += 1
        row[number], slot[number] = chosen, taken[chosen]
        taken[chosen] += 1
        left = free - size
        if left and taken[chosen] < slots:
            open_rows[left].append(chosen)
            occurring |= 1 << left
    return row, slot, count


def pack(
    sequences: Sequence[Sequence[int] | np.ndarray],
    row_length: int,
    slots: int,
    *,
    rows: int | None = None,
    pad_id: int = 0,
) -> Packed:
    """Packs sequences into rows.

    Args:
      sequences: token ids of each sequence.
      row_length: tokens a row holds.
      slots: sequences a row holds.
      rows: how many rows to return, empty ones last; by default as many as are needed.
      pad_id: the token where there is nothing.

    Returns:
      The rows, and where each sequence went.

    Raises:
      InputError: a sequence is empty or longer than a row, or they need more than `rows`.

    >>> packed = pack([[5, 6], [7, 8, 9]], 6, 2)
    >>> packed.tokens.tolist(), packed.segment_ids.tolist()
    ([[7, 8, 9, 5, 6, 0]], [[1, 1, 1, 2, 2, 0]])
    """
    sizes = np.array([len(sequence) for sequence in sequences], np.int64)
    row, slot, count = assign(sizes, row_length, slots)
    if rows is not None and count > rows:
        raise InputError(
            f"{len(sizes)} sequences of {sizes.sum()} tokens need {count} rows of {row_length} tokens and {slots} "
            f"slots; there are {rows}. Give fewer sequences or more rows."
        )
    return place(sequences, row, slot, row_length, count if rows is None else rows, pad_id=pad_id)


def place(
    sequences: Sequence[Sequence[int] | np.ndarray],
    row: np.ndarray,
    slot: np.ndarray,
    row_length: int,
    rows: int,
    *,
    pad_id: int = 0,
) -> Packed:
    """Lays sequences where `assign` put them.

    Args:
      sequences: token ids of each of n sequences.
      row: int `[n]`, below `rows`.
      slot: int `[n]`; the sequences of a row lie in the order of their slots, without gaps.
      row_length: tokens a row holds.
      rows: number of rows.
      pad_id: the token where there is nothing.

    Returns:
      The rows.
    """
    tokens = np.full(rows * row_length, pad_id, np.int32)
    segment_ids = np.zeros(rows * row_length, np.int32)
    if len(sequences):
        order = np.lexsort((slot, row))
        sizes = np.array([len(sequences[number]) for number in order], np.int64)
        ends = np.cumsum(sizes)
        begins = ends - sizes  # in the concatenation of all sequences
        homes = row[order].astype(np.int64)
        first = np.searchsorted(homes, homes)  # the first sequence of the same row
        shift = homes * row_length - begins[first]  # from the concatenation to the flat rows
        flat = np.arange(ends[-1]) + np.repeat(shift, sizes)
        tokens[flat] = np.concatenate([np.asarray(sequences[number], np.int32) for number in order])
        segment_ids[flat] = np.repeat(slot[order] + 1, sizes)
    shape = (rows, row_length)
    return Packed(
        tokens.reshape(shape), segment_ids.reshape(shape), row.astype(np.int32), slot.astype(np.int32)
    )


def default_slots(row_length: int) -> int:
    """Sequences a packed row holds where nobody says: one for each 32 tokens."""
    return max(1, row_length // _TOKENS_PER_SLOT)


def deal(row: np.ndarray, rows: int, ways: int) -> np.ndarray:
    """Deals rows out to devices, so that each has about as many that are not empty.

    Args:
      row: int `[n]`, numbers from 0 in the order in which rows were filled.
      rows: rows there are, a multiple of `ways`.
      ways: devices, each of which holds `rows / ways` neighbours.

    Returns:
      int `[n]`, the rows' new numbers.

    >>> deal(np.arange(4), 6, 2).tolist()
    [0, 3, 1, 4]
    """
    return row % ways * (rows // ways) + row // ways


def row_sizes(rows: int, ways: int) -> tuple[int, ...]:
    """How many rows of a micro-batch of `rows` may be computed: half where that is enough, else all.

    Args:
      rows: rows of the micro-batch, a multiple of `ways`.
      ways: devices over which they are divided, and the half must be too.

    Returns:
      The numbers, ascending.

    >>> row_sizes(8, 2), row_sizes(8, 8)
    ((4, 8), (8,))
    """
    return (rows,) if rows % (2 * ways) else (rows // 2, rows)


def useful_share(useful_tokens: float, tokens: float) -> float:
    """The share of the computed tokens that is not padding; 1 where nothing was computed.

    >>> useful_share(75, 100)
    0.75
    """
    return useful_tokens / tokens if tokens else 1.0


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 1
