"""Packed steps: every list whole in one micro-batch, within one static shape, and little of it padding."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from inranker_jax import packing
from inranker_jax.data import micro_batches
from inranker_jax.data.micro_batches import Shape
from inranker_jax.errors import InputError
from inranker_jax.packing import Layout
from inranker_jax.prompts import Tokenizer, preset


def steps_of(count: int, lists: int, list_size: int, longest: int = 512, seed: int = 0):
    """Steps of lists of token numbers: log-normal like a collection's pairs, lists of 1 to `list_size`."""
    rng = np.random.default_rng(seed)

    def one():
        documents = int(rng.integers(1, list_size + 1)) if rng.random() < 0.2 else list_size
        return np.clip(rng.lognormal(4.9, 0.5, documents), 1, longest).astype(int)

    return [[one() for _ in range(lists)] for _ in range(count)]


def share_of(steps, shape: Shape) -> float:
    useful = sum(int(lengths.sum()) for step in steps for lengths in step)
    rows = sum(micro_batches.divide(step, shape).rows for step in steps)
    return packing.useful_share(useful, rows * shape.row_length)


def choose(steps, lists: int, list_size: int, platform: str = "cpu", layout: Layout | None = None, **more):
    layout = layout or Layout("packed")
    length = micro_batches.choose_row_length(512, None, steps)
    layout = dataclasses.replace(layout, row_length=layout.row_length or length).resolve(platform, 512)
    return micro_batches.choose_shape(layout, lists, list_size, steps, **more)


def check(step, shape: Shape) -> None:
    division = micro_batches.divide(step, shape)
    assert division.used <= shape.count
    owner = np.repeat(division.micro_batch, [len(lengths) for lengths in step])
    assert division.row.max() < shape.rows
    assert division.slot.max() < shape.slots
    filled = np.zeros((division.used, shape.rows, shape.slots), int)
    np.add.at(filled, (owner, division.row, division.slot), 1)
    assert filled.max() == 1, "two documents in one slot"
    tokens = np.zeros((division.used, shape.rows), int)
    np.add.at(tokens, (owner, division.row), np.concatenate(step))
    assert tokens.max() <= shape.row_length
    for number in range(division.used):
        places = division.place[division.micro_batch == number]
        assert sorted(places) == list(range(len(places)))
        assert 1 <= len(places) <= shape.lists


@pytest.mark.parametrize("ways", [1, 4])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("lists", "list_size"), [(1, 1), (32, 1), (8, 10), (5, 3)])
def test_a_division_keeps_lists_whole_and_fits_the_shape(lists, list_size, accumulation, ways):
    accumulation = min(accumulation, lists)
    steps = steps_of(6, lists, list_size)
    shape = choose(steps[:3], lists, list_size, accumulation=accumulation, ways=ways)
    assert shape.rows % ways == shape.lists % ways == 0
    assert shape.rows >= list_size
    assert shape.lists <= -(-lists // accumulation) + ways - 1
    worst = [[np.full(list_size, shape.row_length)] * lists]
    shortest = [[np.full(list_size, 1)] * lists, [np.full(1, 1)]]
    for step in [*steps, *worst, *shortest]:
        check(step, shape)


def test_planning_packs_a_document_a_few_times_and_not_once_for_every_list_and_micro_batch(monkeypatch):
    """The start of a run and each of its steps wait for it, with one core."""
    steps, packed, assign = steps_of(3, 256, 10), [], packing.assign

    def counted(lengths, *shape):
        packed.append(len(lengths))
        return assign(lengths, *shape)

    shape = choose(steps[:2], 256, 10, "gpu")
    monkeypatch.setattr(packing, "assign", counted)
    division = micro_batches.divide(steps[2], shape)
    assert division.used > 20
    assert sum(packed) < 20 * sum(map(len, steps[2]))


def test_a_division_depends_on_its_arguments_alone():
    (step,) = steps_of(1, 16, 4)
    shape = choose([step], 16, 4)
    one, other = (micro_batches.divide([lengths.copy() for lengths in step], shape) for _ in range(2))
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


@pytest.mark.parametrize(
    ("lists", "list_size", "platform", "least"),
    [
        (32, 1, "cpu", 0.88),
        (256, 1, "cpu", 0.96),
        (80, 1, "cpu", 0.93),
        (8, 10, "cpu", 0.8),
        (32, 10, "cpu", 0.9),
        (512, 1, "gpu", 0.93),
    ],
)
def test_little_is_padding(lists, list_size, platform, least):
    steps = steps_of(20, lists, list_size)
    shape = choose(steps[:4], lists, list_size, platform)
    assert share_of(steps[4:], shape) >= least


def test_large_calls_are_nearly_full_too():
    steps = steps_of(20, 64, 10)
    shape = choose(steps[:4], 64, 10, layout=Layout("packed", tokens_per_call=2**18))
    assert share_of(steps[4:], shape) >= 0.88


def test_a_call_has_no_more_tokens_than_the_layout_says():
    steps = steps_of(4, 64, 1)
    for tokens, rows in ((512, 1), (2048, 4), (4096, 8)):
        shape = choose(steps, 64, 1, layout=Layout("packed", row_length=512, tokens_per_call=tokens))
        assert shape.rows <= rows
        shape = choose(steps, 64, 1, layout=Layout("packed", row_length=512, tokens_per_call=tokens), ways=4)
        assert shape.rows <= 4 * rows
        assert shape.rows % 4 == 0


def test_rows_get_longer_where_two_sequences_would_not_fit():
    rng = np.random.default_rng(0)
    long = [[rng.integers(280, 512, 1) for _ in range(128)]]
    short = [[rng.integers(20, 150, 1) for _ in range(128)]]
    assert micro_batches.choose_row_length(512, None, long) > 512
    assert micro_batches.choose_row_length(512, None, short) == 512
    assert micro_batches.choose_row_length(64, None, [[rng.integers(33, 64, 1) for _ in range(99)]]) > 64
    assert micro_batches.choose_row_length(300, None, []) == 300


def test_without_a_sample_the_shape_still_holds_any_step():
    check(steps_of(1, 8, 2)[0], choose([], 8, 2))


@pytest.mark.parametrize("accumulation", [0, 9])
def test_accumulation_must_leave_every_micro_batch_a_list(accumulation):
    with pytest.raises(InputError, match=rf"accumulation={accumulation}: expected 1 to 8"):
        choose(steps_of(1, 8, 2), 8, 2, accumulation=accumulation)


@pytest.mark.parametrize(("name", "least"), [("cranfield", 0.93), ("scifact", 0.88)])
def test_steps_of_real_collections_are_mostly_useful(name, least, shared_data, tmp_path):
    """128 documents a step (pairs, or lists that a pointwise loss lets us take apart), on CPU."""
    shutil.copy(shared_data / "vocab" / "t5_spiece.model", tmp_path / "spiece.model")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    lines = pathlib.Path(shared_data, "beir", name, "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines[:1024]]
    queries = ["how does shear flow change the boundary layer of a plate"] * len(documents)
    sequences = preset("inranker").encode(tokenizer, queries, documents)
    lengths = [np.array([len(sequence)]) for sequence in sequences]
    steps = [lengths[start : start + 128] for start in range(0, 1024, 128)]
    assert share_of(steps, choose(steps[:3], 128, 1)) >= least
