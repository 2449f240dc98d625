"""Sorting examples that come in no order."""

from __future__ import annotations

import pathlib
import random

import pytest

from inranker_jax.data.sorting import sort_key, sort_records
from inranker_jax.errors import InputError


@pytest.mark.parametrize("limit", [0, 2000, 1 << 30])
def test_numbers_are_restored_whatever_the_memory(limit: int, tmp_path: pathlib.Path) -> None:
    numbers = list(range(0, 3000, 7))
    records = [(sort_key(number, b""), b"record %d" % number) for number in numbers]
    shuffled = random.Random(0).sample(records, len(records))
    found = []
    for place, pair in enumerate(sort_records(shuffled, limit, tmp_path / "new")):
        found.append(pair)
        if place == 0:
            (scratch,) = (tmp_path / "new").iterdir()
            assert not list(scratch.iterdir()), "runs are unlinked once they are open"
    assert found == records
    assert not list((tmp_path / "new").iterdir())


def test_without_numbers_the_order_is_that_of_the_content(tmp_path: pathlib.Path) -> None:
    records = [b"b", b"a", b"c", b"a"]
    orders = {
        tuple(
            record for _, record in sort_records(((sort_key(None, r), r) for r in order), 1 << 20, tmp_path)
        )
        for order in (records, records[::-1], sorted(records))
    }
    assert len(orders) == 1
    assert sorted(orders.pop()) == sorted(records)


def test_a_folder_that_cannot_be_made(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="INRANKER_CACHE_DIR"):
        list(sort_records([], 1, tmp_path / "file" / "folder"))
