"""Packing: every sequence once, whole, in few rows; and the layouts' settings."""

from __future__ import annotations

import time

import numpy as np
import pytest

from inranker_jax import packing
from inranker_jax.errors import InputError
from inranker_jax.packing import Layout


def log_normal(count, seed=0, longest=512):
    """Lengths like those of a collection's pairs: median about 180 tokens, a long tail cut at `longest`."""
    lengths = np.random.default_rng(seed).lognormal(5.2, 0.6, count)
    return np.clip(lengths, 1, longest).astype(int)


def sequences_of(lengths, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 30_000, length).tolist() for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "row_length", "slots"),
    [
        (log_normal(300), 512, 16),
        (log_normal(40, longest=64), 96, 1),
        ([1] * 50, 8, 3),
        ([16] * 7, 16, 4),
        ([512, 1, 511, 1, 256, 256], 512, 16),
        ([], 32, 4),
    ],
    ids=["many", "one-slot", "one-token", "full-rows", "exact", "none"],
)
def test_every_sequence_lies_whole_in_its_slot_and_nowhere_else(lengths, row_length, slots):
    sequences = sequences_of(lengths)
    packed = packing.pack(sequences, row_length, slots)
    for sequence, row, slot in zip(sequences, packed.row, packed.slot, strict=True):
        (where,) = np.nonzero(packed.segment_ids[row] == slot + 1)
        assert packed.tokens[row][where].tolist() == sequence
        np.testing.assert_array_equal(np.diff(where), 1)
        assert 0 <= slot < slots
    assert np.count_nonzero(packed.segment_ids) == sum(lengths)
    assert not packed.tokens[packed.segment_ids == 0].any()
    assert (
        packed.tokens.dtype == packed.segment_ids.dtype == packed.row.dtype == packed.slot.dtype == np.int32
    )
    # Padding is at the end of a row, and slots have no gaps.
    for row in range(len(packed.tokens)):
        used = np.count_nonzero(packed.segment_ids[row])
        assert packed.segment_ids[row][:used].all()
        assert sorted(packed.slot[packed.row == row]) == list(range((packed.row == row).sum()))


def test_rows_are_nearly_full():
    lengths = log_normal(4096)
    *_, count = packing.assign(lengths, 512, 16)
    assert packing.useful_share(lengths.sum(), count * 512) > 0.99


def test_the_fullest_row_that_fits_is_taken():
    row, slot, count = packing.assign([6, 5, 4, 5], 10, 4)
    assert (row.tolist(), slot.tolist(), count) == ([0, 1, 0, 1], [0, 0, 1, 1], 2)


def test_the_assignment_is_repeatable_and_fast():
    lengths = log_normal(4096, seed=3)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        ours = packing.assign(lengths, 512, 16)
        seconds.append(time.perf_counter() - start)
        again = packing.assign(lengths.tolist(), 512, 16)
        np.testing.assert_array_equal(ours[0], again[0])
        np.testing.assert_array_equal(ours[1], again[1])
    assert min(seconds) < 0.05


def test_empty_rows_fill_up_and_too_few_rows_are_an_error():
    packed = packing.pack([[1, 2], [3]], 4, 2, rows=3, pad_id=9)
    assert packed.tokens.tolist() == [[1, 2, 3, 9], [9] * 4, [9] * 4]
    assert packed.segment_ids.tolist() == [[1, 1, 2, 0], [0] * 4, [0] * 4]
    with pytest.raises(InputError, match=r"3 sequences of 9 tokens need 3 rows .* there are 2"):
        packing.pack([[1] * 3] * 3, 4, 2, rows=2)


@pytest.mark.parametrize("lengths", [[3, 0], [5, 9]])
def test_a_sequence_that_fits_no_row_is_named(lengths):
    with pytest.raises(InputError, match=rf"sequence 1 has {lengths[1]} tokens; expected 1 to 8"):
        packing.assign(lengths, 8, 2)


def test_auto_is_bucketed_on_cpu_and_packed_elsewhere():
    assert Layout().resolve("cpu", 512).kind == "bucketed"
    assert Layout().resolve("gpu", 512).kind == Layout().resolve("tpu", 512).kind == "packed"
    assert Layout("padded").resolve("gpu", 512).kind == "padded"


def test_resolving_sets_every_field_and_is_idempotent():
    for platform in ("cpu", "gpu"):
        for kind in packing.KINDS:
            resolved = Layout(kind).resolve(platform, 320)
            assert None not in vars(resolved).values()
            assert resolved.resolve("tpu", 320) == resolved
    assert Layout("packed").resolve("gpu", 512) == Layout(
        "packed", Layout().resolve("cpu", 512).lengths, row_length=512, slots=16, tokens_per_call=16384
    )
    assert Layout("packed", row_length=640).resolve("cpu", 20).slots == 20
    assert Layout("packed").resolve("cpu", 20).slots == 1


def test_lengths_end_with_the_longest():
    assert Layout("bucketed", lengths=[96, 32, 32, 900]).resolve("cpu", 512).lengths == (32, 96, 512)
    assert Layout("padded").resolve("cpu", 100).lengths == (100,)
    assert Layout("bucketed").resolve("cpu", 64).lengths == (32, 40, 48, 56, 64)
    assert len(Layout("bucketed").resolve("cpu", 512).lengths) == 29
    edges = Layout("bucketed").resolve("cpu", 5000).lengths
    assert list(edges) == sorted(set(edges))
    assert edges[-1] == 5000


def test_a_call_has_a_row_on_every_device():
    layout = Layout("packed", row_length=512, tokens_per_call=1100).resolve("cpu", 512)
    assert (layout.rows_per_call(), layout.rows_per_call(ways=4)) == (2, 8)
    assert Layout("packed", tokens_per_call=10).resolve("cpu", 512).rows_per_call(2) == 2


def test_a_layout_may_be_given_by_name():
    layout = Layout("packed", slots=3)
    assert Layout.of(layout) is layout
    assert Layout.of("padded") == Layout("padded")
    assert Layout.of(None) == Layout()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "packd"}, "Did you mean 'packed'"),
        ({"lengths": (64, 0)}, r"lengths=\(64, 0\): expected positive"),
        ({"lengths": 64}, r"lengths=64: expected positive .* such as \(64, 128\)"),
        ({"lengths": "64"}, "lengths='64': expected positive"),
        ({"row_length": 0}, "row_length is 0; expected a positive number"),
        ({"slots": 1.5}, "slots is 1.5"),
        ({"tokens_per_call": True}, "tokens_per_call is True"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        Layout(**arguments)


def test_a_row_must_hold_the_longest_sequence():
    with pytest.raises(InputError, match="row_length is 256, but a sequence may have 512 tokens"):
        Layout("packed", row_length=256).resolve("cpu", 512)
