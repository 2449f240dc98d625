"""Lengths of sequences in batches, the work of a token, and peaks of devices."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

from inranker_jax import hardware, packing
from inranker_jax.models import flops
from inranker_jax.telemetry import usage
from tests.batches import TINY, attended, random_batch


def test_lengths_of_a_padded_batch():
    batch = random_batch(3)
    expected = sorted(attended(batch["tokens"][batch["list_mask"]]).sum(axis=-1).tolist())
    assert sorted(usage.sequence_lengths(batch).tolist()) == expected
    assert len(expected) < batch["list_mask"].size, "some are masked"


def test_lengths_of_packed_rows_are_those_that_were_packed():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 30)
    sequences = [rng.integers(1, 90, n).astype(np.int32) for n in lengths]
    row, slot, used = np.arange(30) // 4, np.arange(30) % 4, [0] * 4
    packed = packing.place(sequences, row, slot, 160, 12)
    shaped = {name: getattr(packed, name).reshape(2, 6, 160) for name in ("tokens", "segment_ids")}
    assert sorted(usage.sequence_lengths(shaped).tolist()) == sorted(lengths.tolist()), used


def test_nothing_but_padding_has_no_lengths():
    empty = {"tokens": np.zeros((2, 3, 8), np.int32), "segment_ids": np.zeros((2, 3, 8), np.int32)}
    assert usage.sequence_lengths(empty).tolist() == []
    assert usage.sequence_lengths({"tokens": empty["tokens"]}).tolist() == []
    assert usage.flops_per_token(empty, lambda lengths: 1.0) == 0.0


def test_the_work_of_all_tokens_is_that_of_the_sequences():
    batch = random_batch(4)
    lengths = usage.sequence_lengths(batch)
    per_token = usage.flops_per_token(batch, lambda tokens: flops.forward_flops(TINY, tokens))
    # Not that of as many tokens in sequences of the mean length: attention grows with the square.
    alike = flops.forward_flops(TINY, lengths.mean()) * len(lengths)
    assert per_token * lengths.sum() == pytest.approx(flops.forward_flops(TINY, lengths))
    assert per_token * lengths.sum() > alike * (1 + 1e-9)


def device(kind):
    return types.SimpleNamespace(device_kind=kind)


def test_the_peak_is_that_of_all_devices():
    v5e = hardware.CHIPS["v5e"].peak_flops
    assert usage.peak_flops([device("TPU v5 lite")] * 4, "bfloat16") == 4 * v5e["bfloat16"]


def test_there_is_no_peak_of_what_is_not_in_the_table():
    assert usage.peak_flops([device("cpu")], "float32") is None
    assert usage.peak_flops([device("TPU v4"), device("TPU v99")], "bfloat16") is None
    assert usage.peak_flops([device("TPU v4")], "float8") is None
    assert usage.peak_flops([], "bfloat16") is None


def test_the_largest_peak_of_any_device_and_process_counts(monkeypatch):
    import jax

    said = []
    stats = [{"peak_bytes_in_use": 5 << 30, "bytes_in_use": 9}, {"peak_bytes_in_use": 7 << 30}]
    devices = [types.SimpleNamespace(memory_stats=lambda stat=stat: stat) for stat in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(usage, "host_peak_bytes", lambda: 3 << 30)
    monkeypatch.setattr(usage.distributed, "tell", lambda topic, text: said.append(text))
    other = {"memory/host_peak_gib": 4.0, "memory/device_peak_gib": 6.0}
    monkeypatch.setattr(usage.distributed, "told", lambda topic: [*said, json.dumps(other)])
    assert usage.memory_peaks() == {"memory/host_peak_gib": 4.0, "memory/device_peak_gib": 7.0}
    assert json.loads(said[0]) == {"memory/host_peak_gib": 3.0, "memory/device_peak_gib": 7.0}


def test_a_platform_that_says_nothing_of_its_memory_has_no_peak():
    assert list(usage.memory_peaks()) == ["memory/host_peak_gib"]
