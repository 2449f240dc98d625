"""How engines that are given padded batches cut a workload into them: the ways that users of PyTorch do it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

ARRIVAL_ROWS = 16
FULL_LENGTH = 512


def batches(lengths: Sequence[int], mode: str, tokens: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the numbers of the pairs of each batch, and the length to which it is padded.

    Args:
      lengths: tokens of each pair.
      mode: "arrival", 16 in the order given, padded to the longest of them, as the reference clients do;
        "padded", the same padded to 512, as the reference recipe does; "sorted", longest first, as many as make
        `tokens` with their padding.
      tokens: of a sorted batch.
    """
    sizes = np.asarray(lengths)
    if mode == "sorted":
        order = np.argsort(-sizes, kind="stable")
        start = 0
        while start < len(order):
            length = int(sizes[order[start]])
            rows = max(1, tokens // length)
            yield order[start : start + rows], length
            start += rows
        return
    if mode not in ("arrival", "padded"):
        raise ValueError(f"no mode {mode!r}")
    for start in range(0, len(sizes), ARRIVAL_ROWS):
        chosen = np.arange(start, min(start + ARRIVAL_ROWS, len(sizes)))
        yield chosen, FULL_LENGTH if mode == "padded" else int(sizes[chosen].max())


def padded(sequences: Sequence[np.ndarray], chosen: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask, int64 [rows, length]."""
    ids = np.zeros((len(chosen), length), np.int64)
    for row, number in enumerate(chosen):
        ids[row, : len(sequences[number])] = sequences[number]
    return ids, (ids != 0).astype(np.int64)
