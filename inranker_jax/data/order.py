"""The order in which examples are seen: a pure function from a position to an example.

Nothing is shuffled in memory and no iterator state exists: position p of a run is computed in constant time
from (seed, p), so a resumed run needs one integer, at any distance, and every number of processes sees the
same sequence. An epoch's permutation is a Feistel network over the next power of four, walked until it
falls inside the source (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA
2002).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from inranker_jax.errors import InputError

_ROUNDS = 8
_MAX_BLOCK = 1 << 20
_MAX_DENOMINATOR = 1_000_000


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014), elementwise on uint64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _key(seed: int, stream: int, epochs: np.ndarray) -> np.ndarray:
    """One uint64 key per element of `epochs`, independent across seeds and streams."""
    base = _mix(np.full(1, seed % 2**64, np.uint64))
    base = _mix(base ^ np.uint64(stream % 2**64))
    return _mix(base ^ epochs.astype(np.uint64))


def permute(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Permutes 0 ... size - 1, elementwise, by the bijection that each element's key names.

    Args:
      indices: int64 `[n]`, each in [0, size).
      size: size of the domain, at least 1.
      keys: uint64 `[n]`; elements with equal keys go through the same permutation.

    Returns:
      int64 `[n]`, each in [0, size).
    """
    half = np.uint64(max(1, math.ceil(math.log2(max(size, 2)) / 2)))
    mask = np.uint64((1 << int(half)) - 1)
    values = indices.astype(np.uint64)
    todo = np.arange(values.size)
    while todo.size:
        left, right, key = values[todo] >> half, values[todo] & mask, keys[todo]
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key + np.uint64(number))) & mask)
        values[todo] = (left << half) | right
        todo = todo[values[todo] >= np.uint64(size)]
    return values.astype(np.int64)


def block_quotas(rates: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers of examples that each source gives to every block of a mixture.

    Rates that are fractions with a common denominator up to 2**20 are kept exactly: 0.3 and 0.7 give blocks
    of 3 + 7. Others are rounded to multiples of 2**-20, and never to zero.

    >>> block_quotas([1, 1, 2])
    (1, 1, 2)
    >>> block_quotas([0.3, 0.7])
    (3, 7)
    """
    parts = [Fraction(rate).limit_denominator(_MAX_DENOMINATOR) or Fraction(rate) for rate in rates]
    total = sum(parts)
    shares = [part / total for part in parts]
    block = math.lcm(*(share.denominator for share in shares))
    if block <= _MAX_BLOCK:
        return tuple(int(share * block) for share in shares)
    quotas = [max(1, math.floor(share * _MAX_BLOCK)) for share in shares]
    # Largest remainder first, so that quotas are within one of their exact value.
    by_remainder = sorted(range(len(shares)), key=lambda i: quotas[i] - shares[i] * _MAX_BLOCK)
    for i in by_remainder[: max(0, _MAX_BLOCK - sum(quotas))]:
        quotas[i] += 1
    return tuple(quotas)


class GlobalOrder:
    """Position -> (source, example), for one task or a mixture of several.

    Shuffled, position p of a mixture lies in block p // B of a schedule that gives every source its quota
    in every block (`block_quotas`), in an order shuffled per block; the examples a source gives are its own
    endless sequence of epochs, each a fresh permutation. An epoch of a mixture is as many positions as its
    sources have examples together; small sources may be repeated in it, as their rates say. Unshuffled, the
    sources follow one another in their own order, once an epoch, and rates play no part.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        rates: Sequence[float] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        num_epochs: int | None = None,
    ):
        """Describes an order.

        Args:
          sizes: number of examples of each source.
          rates: relative rates of a mixture; default: the sizes, so that every example is as frequent.
          seed: any whole number.
          shuffle: whether to shuffle; see above.
          num_epochs: after how many epochs the order ends; None for never.

        Raises:
          InputError: there is no source, one is empty, or a rate is not a positive finite number.
        """
        rates = list(sizes) if rates is None else list(rates)
        if not sizes or len(rates) != len(sizes):
            raise InputError(f"{len(sizes)} sources and {len(rates)} rates: expected one rate per source.")
        for number, (size, rate) in enumerate(zip(sizes, rates, strict=True)):
            if size < 1:
                raise InputError(f"source {number} has {size} examples: expected at least one.")
            if not (math.isfinite(rate) and rate > 0):
                raise InputError(f"source {number} has rate {rate}: expected a positive number.")
        if num_epochs is not None and num_epochs < 1:
            raise InputError(f"num_epochs={num_epochs}: expected at least 1, or None for no end.")
        self.sizes = tuple(int(size) for size in sizes)
        self.seed, self.shuffle, self.num_epochs = int(seed), shuffle, num_epochs
        self.quotas = block_quotas(rates)
        self._starts = np.cumsum([0, *self.quotas])
        self._offsets = np.cumsum([0, *self.sizes])

    @property
    def epoch_size(self) -> int:
        """Positions in one epoch: the number of examples of all sources."""
        return int(self._offsets[-1])

    @property
    def total(self) -> int | None:
        """Number of positions, or None when the order never ends."""
        return None if self.num_epochs is None else self.num_epochs * self.epoch_size

    def locate(self, positions: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Finds the examples at some positions, in time independent of how far they lie.

        Args:
          positions: int64 `[n]`, each in [0, total).

        Returns:
          (source, example), two int64 arrays `[n]`.

        Raises:
          IndexError: a position lies outside the order.
        """
        positions = np.atleast_1d(np.asarray(positions, np.int64))
        if positions.size and (positions.min() < 0 or (self.total or np.inf) <= positions.max()):
            raise IndexError(
                f"positions {positions.min()} to {positions.max()} are not all in [0, {self.total})"
            )
        if not self.shuffle:
            within = positions % self.epoch_size
            sources = np.searchsorted(self._offsets, within, side="right") - 1
            return sources, within - self._offsets[sources]
        block, slot = np.divmod(positions, self._starts[-1])
        if len(self.sizes) > 1:
            slot = permute(slot, int(self._starts[-1]), _key(self.seed, 0, block))
        sources = np.searchsorted(self._starts, slot, side="right") - 1
        ordinals = block * np.diff(self._starts)[sources] + slot - self._starts[sources]
        examples = np.empty_like(ordinals)
        for number, size in enumerate(self.sizes):
            mine = sources == number
            epochs, within = np.divmod(ordinals[mine], size)
            examples[mine] = permute(within, size, _key(self.seed, number + 1, epochs))
        return sources, examples

    def __getitem__(self, position: int) -> tuple[int, int]:
        """The (source, example) at one position."""
        sources, examples = self.locate([position])
        return int(sources[0]), int(examples[0])
