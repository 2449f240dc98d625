"""Layouts give the same logits; windows follow one another without stalls, threads left behind, or growing memory."""

from __future__ import annotations

import dataclasses
import gc
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from inranker_jax import Reranker, scorer, scoring_calls
from inranker_jax.errors import InputError
from inranker_jax.models import T5Config, init_params
from inranker_jax.packing import Layout
from inranker_jax.partitioning import make_mesh
from inranker_jax.prompts import Tokenizer, preset
from inranker_jax.scoring_calls import Call, Window, plan, stream
from tests.batches import TINY
from tests.tiny_vocabulary import write_spiece

CONTRACT = preset("monot5").replace(max_length=96)
LAYOUTS = {
    "padded": Layout("padded", tokens_per_call=384),
    "bucketed": Layout("bucketed", lengths=(32, 64), tokens_per_call=384),
    "packed": Layout("packed", tokens_per_call=384),
    "wide": Layout("packed", row_length=200, slots=3, tokens_per_call=600),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(write_spiece(tmp_path_factory.mktemp("vocabulary")))


@pytest.fixture(scope="module")
def config(tokenizer: Tokenizer) -> T5Config:
    return dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def params(config: T5Config) -> dict:
    return init_params(config, seed=0)


def make_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs from next to nothing to far past the limit of 96 tokens."""
    rng = random.Random(seed)
    words = ["true", "false", "document", "text", "lines", "modelo", "não", "42"]
    return [("what is", " ".join(rng.choices(words, k=rng.randrange(120))) + f" {i}") for i in range(count)]


# --- layouts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [None, (8, 1, 1), (2, 2, 2)], ids=["one-device", "8x1x1", "2x2x2"])
def test_layouts_give_the_same_logits(
    axes: tuple[int, int, int] | None, config: T5Config, params: dict, tokenizer: Tokenizer
) -> None:
    """Random lengths, exactly full rows, one word, `<pad>`, and texts past the limit, beside each pair alone."""
    pairs = [*make_pairs(40), ("what", ""), ("true", "true"), ("<pad>", "a <pad> b <pad>")]
    pairs += [("what", "text " * n) for n in range(60, 90)]
    encoded = CONTRACT.encode(tokenizer, [query for query, _ in pairs], [text for _, text in pairs])
    distinct = {ids.tobytes(): len(ids) for ids in encoded}
    assert {95, 96} <= set(distinct.values())
    alone = Reranker(config, params, tokenizer, CONTRACT, layout=LAYOUTS["padded"])
    expected = np.concatenate([alone.logits(query, [document]) for query, document in pairs])
    mesh = None if axes is None else make_mesh(*axes)
    for name, layout in LAYOUTS.items():
        reranker = Reranker(config, params, tokenizer, CONTRACT, layout=layout, mesh=mesh)
        got = np.concatenate(list(reranker.logits_of_pairs(iter(pairs))))
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=name)
        assert reranker.logits("what", []).shape == (0, 2)
        assert reranker.statistics.useful_tokens == sum(distinct.values())


@pytest.mark.parametrize("name", ["packed", "wide"])
def test_packed_calls_have_one_shape(name: str, config: T5Config, params: dict, tokenizer: Tokenizer) -> None:
    reranker = Reranker(config, params, tokenizer, CONTRACT, layout=LAYOUTS[name])
    reranker.score_pairs(make_pairs(1))
    compiled = reranker.compilations
    for count in (1, 2, 5, 77):
        reranker.score_pairs(make_pairs(count, seed=count))
    assert reranker.compilations == compiled


def test_buckets_compile_no_more_than_their_edges(
    config: T5Config, params: dict, tokenizer: Tokenizer
) -> None:
    layout = Layout("bucketed", lengths=(32, 64), tokens_per_call=1000)  # shapes that no other test has
    reranker = Reranker(config, params, tokenizer, CONTRACT, layout=layout)
    before = reranker.compilations
    for seed in range(4):
        reranker.score_pairs(make_pairs(150, seed=seed))
    assert reranker.compilations - before == 3


def test_packing_computes_little_padding(config: T5Config, params: dict, tokenizer: Tokenizer) -> None:
    shares = {}
    for name, layout in LAYOUTS.items():
        reranker = Reranker(config, params, tokenizer, CONTRACT, layout=layout)
        reranker.score_pairs(make_pairs(400))
        shares[name] = reranker.statistics.useful_share
        most = max(reranker.layout.tokens_per_call, reranker.layout.row_length)
        assert most / 2 < reranker.statistics.tokens / reranker.statistics.calls <= most
    assert shares["padded"] < shares["bucketed"] < shares["packed"]
    assert shares["packed"] > 0.9


def test_a_plan_has_every_sequence_once() -> None:
    rng = np.random.default_rng(0)
    sizes = sorted(rng.integers(1, 97, 200).tolist(), reverse=True)
    sequences = [rng.integers(1, 99, size).astype(np.int32) for size in sizes]
    for layout in LAYOUTS.values():
        resolved = layout.resolve("cpu", 96)
        calls = plan(sequences, resolved, 2, 0)
        assert sorted(np.concatenate([call.sequences for call in calls]).tolist()) == list(range(200))
        assert sum(call.useful_tokens for call in calls) == sum(sizes)
        for call in calls:
            for number, place in zip(call.sequences, call.places, strict=True):
                if call.segment_ids is None:
                    found = call.tokens[place][call.tokens[place] != 0]
                else:
                    row, slot = divmod(int(place), resolved.slots or 0)
                    found = call.tokens[row][call.segment_ids[row] == slot + 1]
                np.testing.assert_array_equal(found, sequences[number])


@pytest.mark.parametrize("name", LAYOUTS)
def test_equal_pairs_and_chunks_are_equal_to_the_bit(
    name: str, config: T5Config, params: dict, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the list takes several windows, whatever its order; and a chunk alone or among others."""
    monkeypatch.setattr(scorer, "_WINDOW", 16)
    reranker = Reranker(config, params, tokenizer, CONTRACT, layout=LAYOUTS[name])
    pairs = make_pairs(50) * 3
    order = list(range(150))
    random.Random(0).shuffle(order)
    scores = reranker.score_pairs(pairs)
    np.testing.assert_array_equal(scores[:50], scores[100:])
    assert len(set(scores.tolist())) == 50
    np.testing.assert_array_equal(reranker.score_pairs([pairs[i] for i in order]), scores[order])
    chunks = [pairs[:20], pairs[20:21], [], pairs[21:60]]
    together = list(reranker.logits_of_chunks(chunks))
    for chunk, part in zip(chunks[::-1], together[::-1], strict=True):
        np.testing.assert_array_equal(next(reranker.logits_of_chunks([chunk])), part)


# --- the stream ------------------------------------------------------------------------------------------------


def window_of(count: int) -> Window:
    layout = Layout("padded", tokens_per_call=8).resolve("cpu", 8)
    sequences = [np.array([number + 1], np.int32) for number in range(count)]
    return Window(sequences, range(count), 1, layout, ways=1, pad_id=0, vocab_size=10**6)


def echo(call: Call) -> np.ndarray:
    return call.tokens[:, :1].astype(np.float32)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("inranker_jax-")]


def test_the_next_window_is_prepared_while_calls_run() -> None:
    """The second window gets ready although no output of the first ever arrives before."""
    prepared = threading.Event()

    class Output:
        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            assert prepared.wait(30), "the first window was waited for before the second was prepared"
            return np.zeros((1, 1), np.float32)

    def prepare(number: int) -> Window:
        if number == 1:
            prepared.set()
        return window_of(3)

    assert len(list(stream([0, 1], prepare, lambda _: Output()))) == 2


def test_few_calls_are_under_way() -> None:
    launched, landed = 0, 0

    class Output:
        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            nonlocal landed
            landed += 1
            return np.zeros((1, 1), np.float32)

    def launch(_: Call) -> Output:
        nonlocal launched
        launched += 1
        assert launched - landed <= scoring_calls._IN_FLIGHT
        return Output()

    assert [len(part) for part in stream([50, 3, 0, 70], window_of, launch)] == [50, 3, 0, 70]
    assert launched == landed == 123


def test_chunks_are_read_one_ahead_in_the_callers_thread() -> None:
    read: list[int] = []

    def chunks() -> Iterator[int]:
        for number in range(6):
            assert threading.current_thread() is threading.main_thread()
            read.append(number)
            yield 20

    for yielded, part in enumerate(stream(chunks(), window_of, echo)):
        assert part[:, 0].tolist() == list(range(1, 21))
        assert len(read) == min(6, yielded + 2)


def test_errors_come_in_their_turn() -> None:
    def prepare(number: int) -> Window:
        if number == 3:
            raise InputError("three")
        return window_of(2)

    got = []
    with pytest.raises(InputError, match="three"):
        got.extend(stream([1, 2, 3, 4], prepare, echo))
    assert len(got) == 2

    def chunks() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("the file ends here")

    got = []
    with pytest.raises(OSError, match="ends here"):
        got.extend(stream(chunks(), prepare, echo))
    assert len(got) == 2
    assert threads() == []


@pytest.mark.parametrize("side_by_side", [2, 4, 20])
def test_calls_side_by_side_keep_order_and_limit(side_by_side: int) -> None:
    """Calls of unequal duration; each is in one of the threads, and few are under way."""
    lock, running, most = threading.Lock(), 0, 0

    def launch(call: Call) -> np.ndarray:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(random.random() / 200)
        assert threading.current_thread() is not threading.main_thread()
        with lock:
            running -= 1
        return echo(call)

    parts = list(stream([50, 3, 0, 70], window_of, launch, side_by_side))
    for part, count in zip(parts, [50, 3, 0, 70], strict=True):
        assert part[:, 0].tolist() == list(range(1, count + 1))
    assert 1 < most <= side_by_side
    assert threads() == []


def test_an_error_of_a_call_side_by_side_is_raised() -> None:
    def launch(call: Call) -> np.ndarray:
        if call.tokens[0, 0] == 9:
            raise MemoryError("no room for call 9")
        return echo(call)

    got = []
    with pytest.raises(MemoryError, match="call 9"):
        got.extend(stream([5, 20, 5], window_of, launch, 3))
    assert len(got) == 1
    assert threads() == []


def test_parameters_replaced_in_the_middle_of_a_stream_count_from_the_next(
    config: T5Config, params: dict, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "_WINDOW", 4)
    reranker = Reranker(config, params, tokenizer, CONTRACT, layout=LAYOUTS["bucketed"])
    pairs = [(f"query {number}", "a document") for number in range(16)]
    expected = reranker.logits("query 1", ["a document"])
    before = np.concatenate(list(reranker.logits_of_pairs(pairs)))
    running = reranker.logits_of_pairs(pairs)
    first = next(running)
    reranker.update_params(init_params(config, 5))
    np.testing.assert_array_equal(np.concatenate([first, *running]), before)
    assert np.abs(reranker.logits("query 1", ["a document"]) - expected).max() > 1e-3


def test_an_abandoned_stream_leaves_no_thread() -> None:
    running = stream([5] * 100, window_of, echo)
    next(running)
    assert len(threads()) == 1
    running.close()
    assert threads() == []
    running = stream([5] * 100, window_of, echo)
    next(running)
    del running
    gc.collect()
    assert threads() == []


def test_memory_does_not_grow_with_the_stream(
    config: T5Config, params: dict, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 000 pairs need no more than 8 000 do, but for four bytes each in score_pairs."""
    monkeypatch.setattr(scorer, "_WINDOW", 256)
    short = CONTRACT.replace(max_length=16)
    reranker = Reranker(config, params, tokenizer, short, layout=Layout("packed", tokens_per_call=1024))
    outputs = np.zeros((64, reranker.layout.slots or 0, 2), np.float32)
    monkeypatch.setattr(reranker, "_launch", lambda params, call: outputs)

    def pairs(count: int) -> Iterator[tuple[str, str]]:
        return (("q", f"{number} text") for number in range(count))

    def peak(count: int, whole: bool) -> int:
        tracemalloc.start()
        if whole:
            assert len(reranker.score_pairs(pairs(count))) == count
        else:
            assert sum(map(len, reranker.logits_of_pairs(pairs(count)))) == count
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(1000, False)
    assert peak(40_000, False) < peak(8_000, False) + 100_000
    # Parts and their concatenation are there at once.
    assert peak(40_000, True) < peak(8_000, True) + 2 * 4 * 32_000 + 150_000
