"""A set of ids that costs 16 to 32 bytes an id, and nothing at all where ids are the row numbers 0, 1, 2, ..."""

from __future__ import annotations

import array

_MASK = (1 << 64) - 1
_SMALLEST = 1 << 10


class CompactIds:
    """Which ids a pass has met, by 64-bit hash: `add` says whether an id *may* have been there before.

    Two ids share a hash with probability 2**-64, so a caller that must be exact confirms a "maybe".
    """

    def __init__(self) -> None:
        self._count = 0
        # While ids are the row numbers, as in MS MARCO, the count alone is the set.
        self._consecutive = True
        self._table = array.array("Q", bytes(8 * _SMALLEST))
        self._filled = 0

    def __len__(self) -> int:
        """How many ids were added, those that `add` called known left out."""
        return self._count

    def add(self, identifier: str) -> bool:
        """Adds an id.

        Returns:
          False if the id is certainly new; True if an id with its hash was there already (nothing is added).
        """
        if self._consecutive:
            if identifier == str(self._count):
                self._count += 1
                return False
            self._consecutive = False
            for row in range(self._count):
                self._insert(hash(str(row)))
        if self._insert(hash(identifier)):
            self._count += 1
            return False
        return True

    def _insert(self, value: int) -> bool:
        if 2 * self._filled >= len(self._table):
            self._grow()
        key = (value & _MASK) or 1  # 0 marks an empty slot
        if _put(self._table, key):
            self._filled += 1
            return True
        return False

    def _grow(self) -> None:
        old = self._table
        self._table = array.array("Q", bytes(16 * len(old)))
        for key in old:
            if key:
                _put(self._table, key)


def _put(table: array.array[int], key: int) -> bool:
    """Open addressing with linear probing; whether the key was new."""
    last = len(table) - 1
    slot = key & last
    while (found := table[slot]) != 0:
        if found == key:
            return False
        slot = (slot + 1) & last
    table[slot] = key
    return True
