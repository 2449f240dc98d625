"""What a run uses: floating-point work against the devices' peak, and memory at its highest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from inranker_jax import distributed, hardware
from inranker_jax.progress import host_peak_bytes

Flops = Callable[[np.ndarray], float]

_GIB = 2**30
_TOPIC = "memory"


def sequence_lengths(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Tokens of every sequence of a padded or packed batch on the host (see `data.Batch`).

    Args:
      batch: `tokens` `[..., length]` with zeros for padding on the right, or `segment_ids` `[..., length]`, whose
        sequences are told apart by ids from 1 on.

    Returns:
      int64 `[sequences]`, in no particular order.

    >>> sequence_lengths({"tokens": np.array([[7, 0, 7, 0], [0, 0, 0, 0]])}).tolist()
    [3]
    >>> sequence_lengths({"tokens": np.ones((1, 4)), "segment_ids": np.array([[1, 1, 2, 0]])}).tolist()
    [2, 1]
    """
    ids = batch.get("segment_ids")
    if ids is None:
        tokens = batch["tokens"]
        lengths = np.max((tokens != 0) * np.arange(1, tokens.shape[-1] + 1), axis=-1, initial=0).ravel()
        return lengths[lengths > 0]
    rows = ids.reshape(-1, ids.shape[-1])
    rows = rows[rows[:, 0] > 0]  # rows are filled from their beginning
    if not rows.size:
        return np.zeros(0, np.int64)
    width = int(rows.max()) + 1
    counts = np.bincount((rows + width * np.arange(len(rows))[:, None]).ravel(), minlength=width * len(rows))
    counts = counts.reshape(len(rows), width)[:, 1:]
    return counts[counts > 0]


def flops_per_token(batch: Mapping[str, np.ndarray], flops: Flops) -> float:
    """Work of a token that is not padding, on average over this process's part of a batch.

    Args:
      batch: as for `sequence_lengths`.
      flops: operations for sequences of these lengths.

    Returns:
      Operations a token; times the useful tokens of all processes, the work of the step. That is exact in one process;
      in several, each takes its own sequences for typical of all.
    """
    lengths = sequence_lengths(batch)
    return flops(lengths) / float(lengths.sum()) if lengths.size else 0.0


def peak_flops(devices: Iterable[Any], dtype: str) -> float | None:
    """FLOP/s of matrix products that all of `devices` can do together, as published; None where one is unknown.

    Args:
      devices: of JAX.
      dtype: of the operands, "float32" or "bfloat16".
    """
    chips = [hardware.chip_of(device.device_kind) for device in devices]
    if not chips or any(chip is None or dtype not in chip.peak_flops for chip in chips):
        return None
    return sum(chip.peak_flops[dtype] for chip in chips if chip is not None)


def memory_peaks() -> dict[str, float]:
    """The scalars `memory/*`: the most memory, GiB, that any process (host) and any device has had so far.

    Every process calls this and tells the others, whom it does not wait for: what it hears of them may be one call
    old. Platforms that say nothing of their devices' memory (CPU) have no `memory/device_peak_gib`.
    """
    import jax

    peaks = {"memory/host_peak_gib": host_peak_bytes() / _GIB}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if of_devices := [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]:
        peaks["memory/device_peak_gib"] = max(of_devices) / _GIB
    everybody = [peaks]
    # Should the others be gone, that is not for a figure of memory to find out.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.tell(_TOPIC, json.dumps(peaks))
        everybody += map(json.loads, distributed.told(_TOPIC))
    return {name: max(found.get(name, 0.0) for found in everybody) for name in peaks}
