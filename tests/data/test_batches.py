"""Batches: a pure function of (seed, step), whatever the processes, the threads and the restarts."""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
from typing import Any

import numpy as np
import pytest

from inranker_jax.data.batches import Batch, BatchMaker, BatchStream
from inranker_jax.data.store import Example, ExampleStore
from inranker_jax.errors import InputError
from inranker_jax.packing import Layout
from inranker_jax.prompts import ScoringContract, Tokenizer
from tests.data.conftest import VOCABULARY, make_example


@pytest.fixture
def open_stream(store: ExampleStore, contract: ScoringContract, tokenizer: Tokenizer) -> Any:
    streams = []

    def build(**arguments: Any) -> BatchStream:
        arguments = {"stores": store, "batch_size": 4, "lengths": (16, 32, 48), "seed": 1, **arguments}
        streams.append(BatchStream(arguments.pop("stores"), contract, tokenizer, **arguments))
        return streams[-1]

    yield build
    for stream in streams:
        stream.close()


def assert_same(a: Batch, b: Batch) -> None:
    assert a.step == b.step
    assert a.examples == b.examples
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].tobytes() == b[name].tobytes(), name
        assert a[name].shape == b[name].shape


def test_arrays_hold_what_the_examples_say(
    open_stream: Any, store: ExampleStore, contract: ScoringContract, tokenizer: Tokenizer
) -> None:
    by_id = {store[number].query_id: store[number] for number in range(len(store))}
    for batch in itertools.islice(open_stream(), 8):
        rows, length = 4, batch["tokens"].shape[-1]
        assert batch["tokens"].shape == (rows, 3, length)
        assert batch["tokens"].dtype == np.int32
        assert batch["list_mask"].dtype == bool
        assert batch["teacher_logits"].shape == (rows, 3, 2)
        assert batch["teacher_logits"].dtype == batch["relevance"].dtype == np.float32
        longest = 0
        for row, (query_id, document_ids) in enumerate(batch.examples):
            example = by_id[query_id]
            count = len(example)
            assert document_ids == example.document_ids
            assert batch["list_mask"][row].tolist() == [True] * count + [False] * (3 - count)
            assert example.teacher_logits is not None
            np.testing.assert_array_equal(batch["teacher_logits"][row, :count], example.teacher_logits)
            np.testing.assert_array_equal(batch["relevance"][row, :count], example.relevance)
            assert (batch["relevance"][row, count:] == -1).all()
            assert not batch["tokens"][row, count:].any()
            for place, document in enumerate(example.documents):
                (ids,) = contract.encode(tokenizer, [example.query], [document])
                longest = max(longest, len(ids))
                expected = np.zeros(length, np.int32)
                expected[: len(ids)] = ids
                np.testing.assert_array_equal(batch["tokens"][row, place], expected)
        assert length == min(limit for limit in (16, 32, 48, 64) if limit >= longest)


@pytest.mark.parametrize("start", [1, 2, 5, 6, 13])
def test_a_restart_continues_byte_for_byte(open_stream: Any, start: int) -> None:
    whole = list(itertools.islice(open_stream(), start + 5))
    resumed = list(itertools.islice(open_stream(start_step=start), 5))
    for a, b in zip(whole[start:], resumed, strict=True):
        assert_same(a, b)


def test_batches_are_made_while_the_caller_does_something_else(
    open_stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    third, make = threading.Event(), BatchMaker.__call__

    def noted(self: BatchMaker, step: int) -> Any:
        made.append(step)
        if len(made) == 3:
            third.set()
        return make(self, step)

    monkeypatch.setattr(BatchMaker, "__call__", noted)
    stream = open_stream(prefetch=2)
    assert next(stream).step == 0
    assert third.wait(timeout=60), "the caller has asked for one, and gets two more made meanwhile"
    assert made[:3] == [0, 1, 2]


@pytest.mark.parametrize("layout", ["bucketed", "packed"])
def test_a_restart_reads_as_much_at_any_distance(
    open_stream: Any, store: ExampleStore, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """What a resumed run pays does not grow with the step: it reads nothing of what came before."""
    read: list[int] = []
    take = ExampleStore.take

    def counted(self: ExampleStore, numbers: Any) -> Any:
        read.append(len(numbers))
        return take(self, numbers)

    monkeypatch.setattr(ExampleStore, "take", counted)
    costs = []
    for start in (0, 1000, 10**9):
        read.clear()
        assert next(open_stream(start_step=start, layout=layout, prefetch=0)).step == start
        costs.append(sum(read))
    assert costs[0] >= 4
    assert costs == costs[:1] * 3


@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_rows_are_the_rows_of_one(open_stream: Any, processes: int) -> None:
    single = open_stream(lengths=())  # several processes always use the full length
    shards = [open_stream(process_index=i, process_count=processes) for i in range(processes)]
    for parts in itertools.islice(zip(single, *shards, strict=False), 9):
        whole, *pieces = parts
        for name in whole:
            np.testing.assert_array_equal(whole[name], np.concatenate([piece[name] for piece in pieces]))
        assert whole.examples == [row for piece in pieces for row in piece.examples]


def test_seeds_and_epochs_differ_and_epochs_are_complete(open_stream: Any) -> None:
    def queries(stream: BatchStream, count: int) -> list[str]:
        rows = itertools.chain.from_iterable(batch.examples for batch in itertools.islice(stream, count))
        return [query for query, _ in rows]

    seen = queries(open_stream(), 23)  # 92 rows: four epochs of 23
    epochs = [seen[start : start + 23] for start in range(0, 92, 23)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert queries(open_stream(seed=2), 23) != seen


def test_a_bounded_stream_ends_with_a_padded_batch(open_stream: Any) -> None:
    stream = open_stream(num_epochs=2, batch_size=6)
    batches = list(stream)
    assert len(batches) == stream.num_batches == 8  # 46 rows
    last = batches[-1]
    assert last.examples[4:] == [("", ())] * 2
    assert not last["list_mask"][4:].any()
    assert not last["tokens"][4:].any()
    assert last["list_mask"][:4, 0].all()
    assert next(stream, None) is None
    assert sum(bool(documents) for batch in batches for _, documents in batch.examples) == 46


def test_a_process_without_rows_in_the_last_batch(open_stream: Any) -> None:
    shards = [
        list(open_stream(num_epochs=1, shuffle=False, batch_size=8, process_index=i, process_count=4))
        for i in range(4)
    ]
    assert [len(shard) for shard in shards] == [3] * 4
    last = shards[3][-1]  # rows 22 and 23 of 23
    assert last.examples == [("q22", tuple(f"d22.{i}" for i in range(2))), ("", ())]
    few = list(open_stream(num_epochs=1, batch_size=20, process_index=3, process_count=4))
    assert not few[-1]["list_mask"].any()
    assert few[-1]["tokens"].shape == few[0]["tokens"].shape


def test_validation_is_one_pass_in_order(open_stream: Any) -> None:
    batches = list(open_stream(shuffle=False, num_epochs=1))
    rows = [query for batch in batches for query, documents in batch.examples if documents]
    assert rows == [f"q{number}" for number in range(23)]


def test_a_mixture_follows_its_rates(open_stream: Any, store: ExampleStore) -> None:
    other = ExampleStore.from_examples([make_example(100 + n, 2) for n in range(5)], "other:train")
    stream = open_stream(stores=[store, other], rates=[3, 1], batch_size=8)
    for batch in itertools.islice(stream, 10):
        numbers = [int(query[1:]) for query, _ in batch.examples]
        assert sum(number >= 100 for number in numbers) == 2
    assert stream.fingerprints["other:train"] == {"examples": 5, "sha256": other.fingerprint}


def test_data_without_teacher_has_no_teacher_array(open_stream: Any) -> None:
    bare = ExampleStore.from_examples([make_example(n, 2, teacher=False) for n in range(4)])
    assert set(next(open_stream(stores=bare))) == {"tokens", "numbers", "list_mask", "relevance"}


def test_without_a_thread_the_batches_are_the_same(open_stream: Any) -> None:
    for a, b in itertools.islice(zip(open_stream(), open_stream(prefetch=0), strict=False), 6):
        assert_same(a, b)


def test_describe_names_the_examples(open_stream: Any) -> None:
    batch = next(open_stream(shuffle=False))
    assert batch.describe(limit=2) == "step 0: q0 (d0.0); q1 (d1.0, d1.1) and 2 more"


class Broken(ExampleStore):
    """A store whose file goes bad after some reads."""

    def take(self, indices: Any) -> list[Example]:
        if 17 in list(indices):
            raise OSError("disk on fire")
        return super().take(indices)


def test_errors_of_the_thread_reach_the_consumer(open_stream: Any) -> None:
    broken = Broken.from_examples([make_example(n) for n in range(23)])
    stream = open_stream(stores=broken, shuffle=False)
    assert [next(stream).step for _ in range(4)] == [0, 1, 2, 3]
    for _ in range(2):
        with pytest.raises(OSError, match="disk on fire"):
            next(stream)


def batch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "inranker-batches"]


def test_threads_end_with_their_streams(
    store: ExampleStore, contract: ScoringContract, tokenizer: Tokenizer
) -> None:
    before = len(batch_threads())
    with BatchStream(store, contract, tokenizer, 4) as stream:
        next(stream)
        assert len(batch_threads()) == before + 1
    assert len(batch_threads()) == before
    assert next(stream, None) is None
    stream.close()
    dropped = BatchStream(store, contract, tokenizer, 4)
    next(dropped)
    del dropped
    assert len(batch_threads()) == before


def test_a_program_ends_without_closing_its_stream() -> None:
    script = f"""
        import sys
        from inranker_jax.data.batches import BatchStream
        from inranker_jax.data.store import ExampleStore
        from inranker_jax.prompts import Tokenizer, preset
        from tests.data.conftest import make_example
        store = ExampleStore.from_examples([make_example(n) for n in range(9)])
        stream = BatchStream(store, preset("inranker"), Tokenizer.from_pretrained({str(VOCABULARY)!r}), 4)
        next(stream)
        assert "tensorflow" not in sys.modules
        assert "seqio" not in sys.modules
        print("end of program")
    """
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "end of program\n"
    assert "Traceback" not in done.stderr


def test_bad_arguments(open_stream: Any) -> None:
    for arguments, words in (
        ({"list_size": 2}, "lists of 3 documents, which list_size=2"),
        ({"batch_size": 5, "process_count": 2}, "does not split over 2 processes"),
        ({"batch_size": 0}, "does not split"),
        ({"process_index": 2, "process_count": 2}, "process 2 of 2"),
        ({"start_step": -1}, "start_step"),
        ({"lengths": (0, 8)}, "positive numbers of tokens"),
        ({"rates": [1, 2]}, "one rate per source"),
        ({"layout": "packd"}, "Did you mean 'packed'"),
        ({"layout": Layout("packed", row_length=60)}, "row_length is 60"),
        ({"layout": "packed", "accumulation": 5, "whole_lists": True}, "accumulation=5: expected 1 to 4"),
    ):
        with pytest.raises(InputError, match=words):
            open_stream(**arguments)


def test_a_vocabulary_without_the_label_pieces_fails_at_once(
    store: ExampleStore, contract: ScoringContract, tokenizer: Tokenizer
) -> None:
    with pytest.raises(InputError, match="▁falsch"):
        BatchStream(store, contract.replace(label_pieces=("▁falsch", "▁true")), tokenizer, 4)


@pytest.mark.parametrize("whole_lists", [True, False])
def test_packed_arrays_hold_what_the_examples_say(
    open_stream: Any, store: ExampleStore, contract: ScoringContract, tokenizer: Tokenizer, whole_lists: bool
) -> None:
    layout = Layout("packed", row_length=80, slots=5, tokens_per_call=240)
    stream = open_stream(layout=layout, whole_lists=whole_lists, ways=2, shuffle=False, num_epochs=1)
    by_ids, shapes = {}, set()
    for number in range(len(store)):
        example = store[number]
        assert example.teacher_logits is not None
        ids = contract.encode(tokenizer, [example.query] * len(example), list(example.documents))
        for place, sequence in enumerate(ids):
            key = (tuple(sequence), *example.teacher_logits[place], example.relevance[place])
            by_ids[key] = (example.query_id, example.document_ids[place])
    seen = []
    for batch in stream:
        shapes.add(tuple((name, array.shape, array.dtype.name) for name, array in batch.items()))
        used, tokens = int(batch["micro_batches"]), batch["tokens"]
        assert 1 <= used <= len(tokens)
        for name in ("tokens", "segment_ids", "places", "list_mask"):
            assert not batch[name][used:].any()
        assert np.count_nonzero(batch["segment_ids"]) == np.count_nonzero(tokens)
        rows_of_step = []
        for micro, row in zip(*np.nonzero(batch["list_mask"].any(-1)), strict=True):
            found = []
            for place in np.flatnonzero(batch["list_mask"][micro, row]):
                home, slot = divmod(int(batch["places"][micro, row, place]), 5)
                ids = tokens[micro, home][batch["segment_ids"][micro, home] == slot + 1]
                logits = batch["teacher_logits"][micro, row, place]
                found.append(by_ids[tuple(ids), *logits, batch["relevance"][micro, row, place]])
            rows_of_step.append(found)
        lists = [(query, documents) for query, documents in batch.examples if documents]
        expected = [[(query, document) for document in documents] for query, documents in lists]
        if not whole_lists:
            expected = [[pair] for pairs in expected for pair in pairs]
        assert sorted(rows_of_step) == sorted(expected)
        seen += rows_of_step
    assert sum(map(len, seen)) == len(by_ids)
    assert len(shapes) == 1, "every batch has the same shapes"
    assert stream.layout.kind == "packed"


@pytest.mark.parametrize("whole_lists", [True, False])
def test_packed_parts_of_several_processes_fit_together(open_stream: Any, whole_lists: bool) -> None:
    layout = Layout("packed", row_length=80, slots=5, tokens_per_call=160)
    more = {"layout": layout, "whole_lists": whole_lists, "num_epochs": 1, "ways": 4}
    single = open_stream(**more)
    shards = [open_stream(**more, process_index=i, process_count=2) for i in range(2)]
    for whole, *pieces in zip(single, *shards, strict=True):
        assert [row for piece in pieces for row in piece.examples] == whole.examples
        assert sum(piece["list_mask"].sum() for piece in pieces) == whole["list_mask"].sum()
        tokens = [np.count_nonzero(piece["segment_ids"]) for piece in (whole, *pieces)]
        assert tokens[0] == sum(tokens[1:])
        one, other = ({name: (array.shape, array.dtype) for name, array in piece.items()} for piece in pieces)
        assert one == other, "all processes run one program"
        rows = pieces[0]["tokens"].shape[1]
        assert rows % 2 == 0, "each of a process's two devices gets as many rows"
        for number, piece in enumerate(pieces):
            homes = piece["places"][piece["list_mask"]] // 5
            assert ((homes >= number * rows) & (homes < (number + 1) * rows)).all()


def numbered(batch: Any) -> dict[int, list[int]]:
    """The documents of a batch by their numbers."""
    if "segment_ids" not in batch:
        mask = batch["list_mask"]
        rows = zip(batch["numbers"][mask].tolist(), batch["tokens"][mask], strict=True)
        return {number: ids[ids != 0].tolist() for number, ids in rows}
    found = {}
    for micro, row, slot in np.ndindex(*batch["numbers"].shape):
        ids = batch["tokens"][micro, row][batch["segment_ids"][micro, row] == slot + 1]
        if len(ids):
            found[int(batch["numbers"][micro, row, slot])] = ids.tolist()
    return found


@pytest.mark.parametrize("whole_lists", [True, False])
def test_a_document_has_the_same_number_in_every_layout_and_number_of_processes(
    open_stream: Any, whole_lists: bool
) -> None:
    layout = Layout("packed", row_length=80, slots=5, tokens_per_call=160)
    more = {"layout": layout, "whole_lists": whole_lists, "num_epochs": 1, "ways": 4}
    streams = [open_stream(num_epochs=1), open_stream(**more)]
    shards = [open_stream(**more, process_index=i, process_count=2) for i in range(2)]
    for padded, packed, one, other in zip(*streams, *shards, strict=True):
        expected = numbered(padded)
        assert len(expected) == padded["list_mask"].sum()
        assert numbered(packed) == expected
        assert numbered(one) | numbered(other) == expected
        assert not numbered(one).keys() & numbered(other).keys()


@pytest.mark.parametrize("own_ways", [((0, 1), (2, 3)), ((0, 3), (1, 2)), ((1, 2), (0, 3))])
def test_documents_are_where_the_devices_of_their_process_are(
    open_stream: Any, contract: ScoringContract, tokenizer: Tokenizer, own_ways: Any
) -> None:
    """As on a TPU slice, whose mesh follows the network: a process's rows are not neighbours."""
    slots, more = 5, {"layout": Layout("packed", row_length=80, slots=5, tokens_per_call=160), "ways": 4}
    shards = [
        open_stream(**more, num_epochs=1, process_index=i, process_count=2, own_ways=ways)
        for i, ways in enumerate(own_ways)
    ]
    for pieces in zip(*shards, strict=True):
        count, rows, length = pieces[0]["tokens"].shape
        whole = {
            name: np.zeros((count, 4, rows // 2, length), np.int32) for name in ("tokens", "segment_ids")
        }
        for ways, piece in zip(own_ways, pieces, strict=True):
            for name, array in whole.items():
                array[:, list(ways)] = piece[name].reshape(count, 2, rows // 2, length)
        tokens, segments = (
            whole[name].reshape(count, 2 * rows, length) for name in ("tokens", "segment_ids")
        )
        for stream, piece in zip(shards, pieces, strict=True):
            found = []
            for micro, row, place in zip(*np.nonzero(piece["list_mask"]), strict=True):
                home, slot = divmod(int(piece["places"][micro, row, place]), slots)
                found.append(tuple(tokens[micro, home][segments[micro, home] == slot + 1]))
            examples = stream.make_batch.examples_at(piece.step)
            expected = [
                tuple(ids)
                for example in examples
                for ids in contract.encode(tokenizer, [example.query] * len(example), list(example.documents))
            ]
            assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("start", [1, 4])
def test_a_packed_stream_restarts_byte_for_byte(open_stream: Any, start: int) -> None:
    whole = list(itertools.islice(open_stream(layout="packed"), start + 3))
    resumed = list(itertools.islice(open_stream(layout="packed", start_step=start), 3))
    for a, b in zip(whole[start:], resumed, strict=True):
        assert_same(a, b)


def test_padded_batches_have_the_longest_length(open_stream: Any) -> None:
    stream = open_stream(layout="padded", lengths=(16, 32))
    assert all(batch["tokens"].shape[-1] == 64 for batch in itertools.islice(stream, 4))
    bucketed = open_stream(layout=Layout("bucketed", lengths=(56,)))
    assert bucketed.layout.lengths == (56, 64)
    assert next(open_stream(layout="auto"))["tokens"].ndim == 3


def test_the_length_of_packed_rows_is_chosen_for_the_data(open_stream: Any) -> None:
    chosen = open_stream(layout="packed").layout
    assert chosen.row_length > 64, "short rows of long pairs would be half empty"
    assert open_stream(layout=Layout("packed", row_length=64)).layout.row_length == 64
    assert open_stream(layout=chosen, shuffle=False).layout == chosen


def test_wider_lists_are_padded(open_stream: Any) -> None:
    batch = next(open_stream(list_size=7))
    assert batch["tokens"].shape[:2] == batch["list_mask"].shape == (4, 7)
    assert not batch["list_mask"][:, 3:].any()
