"""Rates as functions of size."""

from __future__ import annotations

import pytest

from inranker_jax.data import rates
from inranker_jax.errors import InputError


def test_temperature_flattens_and_the_maximum_caps() -> None:
    assert rates.proportional(7) == 7
    assert rates.temperature(2)(49) == 7
    assert rates.temperature(1, maximum=10)(1000) == 10
    assert rates.temperature(2, maximum=100)(10_000) == 10
    assert rates.temperature(1e9)(10**9) == pytest.approx(1)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_bad_temperatures(value: float) -> None:
    with pytest.raises(InputError, match="temperature="):
        rates.temperature(value)
    with pytest.raises(InputError, match="maximum=0"):
        rates.temperature(1, maximum=0)


def test_known_sizes_hold_within_the_block_only() -> None:
    class Task:
        name = "toy"
        cache_dir = None

        def num_input_examples(self, split: str) -> int:
            return {"train": 5}[split]

    assert rates.proportional(Task()) == 5
    with rates.known_sizes({"toy": 8}):
        assert rates.proportional(Task()) == 8
    assert rates.proportional(Task()) == 5
