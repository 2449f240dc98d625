"""The order of examples: permutations, exact rates, constant time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from inranker_jax.data.order import GlobalOrder, block_quotas
from inranker_jax.errors import InputError


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 100, 1023, 4097])
def test_every_epoch_is_a_permutation(size: int) -> None:
    order = GlobalOrder([size], seed=3)
    for epoch in (0, 1, 2, 1000):
        sources, examples = order.locate(np.arange(size) + epoch * size)
        assert not sources.any()
        np.testing.assert_array_equal(np.sort(examples), np.arange(size))


def test_epochs_and_seeds_differ() -> None:
    positions = np.arange(100)
    first = GlobalOrder([100], seed=1).locate(positions)[1]
    second = GlobalOrder([100], seed=1).locate(positions + 100)[1]
    other = GlobalOrder([100], seed=2).locate(positions)[1]
    for a, b in ((first, second), (first, other), (second, other)):
        # A random permutation leaves one place in a hundred as it was.
        assert np.mean(a == b) < 0.1
    np.testing.assert_array_equal(first, GlobalOrder([100], seed=1).locate(positions)[1])


def test_order_is_the_same_on_every_machine() -> None:
    # Golden values: a change here would give resumed runs another data order.
    assert GlobalOrder([10], seed=7).locate(np.arange(10))[1].tolist() == [8, 1, 2, 9, 6, 4, 7, 5, 0, 3]


def test_shuffle_is_close_to_uniform() -> None:
    counts = np.zeros((6, 6))
    for seed in range(1200):
        counts[np.arange(6), GlobalOrder([6], seed=seed).locate(np.arange(6))[1]] += 1
    # 200 expected per cell, standard deviation 13.
    assert np.abs(counts - 200).max() < 65


@pytest.mark.parametrize(
    ("sizes", "rates"),
    [([7, 50], [0.3, 0.7]), ([5, 5, 5], [1, 1, 2]), ([40, 10], None), ([3, 1000], [1 / 3, 2 / 3])],
)
def test_mixture_rates_are_exact_in_every_block(sizes: list[int], rates: list[float] | None) -> None:
    order = GlobalOrder(sizes, rates, seed=5)
    block = sum(order.quotas)
    sources, examples = order.locate(np.arange(20 * block))
    for start in range(0, 20 * block, block):
        counts = np.bincount(sources[start : start + block], minlength=len(sizes))
        np.testing.assert_array_equal(counts, order.quotas)
    shares = np.asarray(rates if rates is not None else sizes, float)
    np.testing.assert_allclose(np.asarray(order.quotas) / block, shares / shares.sum(), rtol=1e-12)
    for source, size in enumerate(sizes):
        # Whole epochs of a source hold each of its examples equally often.
        seen = examples[sources == source]
        whole = len(seen) // size
        counts = np.bincount(seen, minlength=size)
        assert counts.min() >= whole - 1
        assert counts.max() <= whole + 1


def test_quotas_of_awkward_rates() -> None:
    quotas = block_quotas([12_800_000, 809])
    assert min(quotas) >= 1
    assert quotas[1] / sum(quotas) == pytest.approx(809 / 12_800_809, abs=2**-20)
    assert block_quotas([1e-12, 1.0])[0] == 1
    assert sum(block_quotas([np.pi, np.e, 1.0])) == 2**20


def test_a_distant_position_costs_nothing() -> None:
    order = GlobalOrder([12_800_000, 500_000], [2, 1], seed=1)
    order.locate([0])
    start = time.perf_counter()
    order.locate(np.arange(10**9, 10**9 + 32))
    order.locate(np.arange(10**15, 10**15 + 32))
    assert time.perf_counter() - start < 0.5


def test_unshuffled_sources_follow_one_another() -> None:
    order = GlobalOrder([2, 3], [1, 99], shuffle=False, num_epochs=2)
    assert order.total == 10
    once = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert [order[position] for position in range(10)] == once * 2


def test_positions_are_located_one_by_one_or_together() -> None:
    order = GlobalOrder([11, 4], [2, 1], seed=9)
    sources, examples = order.locate(np.arange(60))
    assert [order[position] for position in range(60)] == list(zip(sources, examples, strict=True))


def test_errors() -> None:
    for arguments in (
        {"sizes": []},
        {"sizes": [0]},
        {"sizes": [2], "rates": [0.0]},
        {"sizes": [2, 2], "rates": [1]},
    ):
        with pytest.raises(InputError, match="expected"):
            GlobalOrder(**arguments)
    with pytest.raises(InputError, match="positive number"):
        GlobalOrder([2], [float("nan")])
    with pytest.raises(InputError, match="num_epochs"):
        GlobalOrder([2], num_epochs=0)
    bounded = GlobalOrder([2], num_epochs=1)
    for position in (2, -1):
        with pytest.raises(IndexError):
            bounded[position]
