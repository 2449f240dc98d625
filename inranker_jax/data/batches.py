"""Batches of token ids: a pure function of (seed, step), made ahead of time by a background thread."""

from __future__ import annotations

import dataclasses
import queue
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from inranker_jax import packing
from inranker_jax.data import micro_batches
from inranker_jax.data.order import GlobalOrder
from inranker_jax.data.store import Example, ExampleStore
from inranker_jax.errors import InputError
from inranker_jax.packing import Layout
from inranker_jax.prompts import ScoringContract, Tokenizer, pad_batch

DEFAULT_LENGTHS = (128, 256, 384, 512)
# Tokens of a micro-batch on a CPU: twice a call of the scorer, which runs calls side by side.
_CPU_TOKENS = 2048
_SAMPLE_STEPS, _SAMPLE_SEQUENCES = 8, 1024


class Batch(dict[str, np.ndarray]):
    """Arrays by name, and what they were made of.

    Padded or bucketed, with b lists (this process's rows), L documents per list and T tokens:

    - `tokens` int32 `[b, L, T]`, 0 where there is nothing;
    - `numbers` int32 `[b, L]`, of the documents within the batch of all processes;
    - `list_mask` bool `[b, L]`, True for real documents;
    - `teacher_logits` float32 `[b, L, 2]`, raw, [false, true]; absent when the data has none;
    - `relevance` float32 `[b, L]`: 1, 0, or -1 where unknown.

    Lists shorter than L, and the rows of a last batch that is not full, are padded with zero tokens and
    `list_mask` False (`relevance` -1).

    Packed, in M micro-batches of r rows of T tokens and of l lists, all static:

    - `tokens`, `segment_ids` int32 `[M, r, T]`, as in `packing.Packed`, this process's rows;
    - `numbers` int32 `[M, r, slots]`, of the documents within the batch of all processes, whatever the layout;
    - `places` int32 `[M, l, L]`, where a document's logits are in the micro-batch of all processes: row x slots + slot;
    - `list_mask` bool, `relevance` float32 `[M, l, L]`, `teacher_logits` float32 `[M, l, L, 2]` as above;
    - `micro_batches` int32 `[]`, how many of the M this process uses; the others are all padding.

    Where lists need not stay whole, each document is a list of L = 1 there.

    Attributes:
      step: number of the batch in the stream, from 0.
      examples: per row the query's id and its documents' ids; `("", ())` for a padded row.
    """

    def __init__(
        self, arrays: Mapping[str, np.ndarray], step: int, examples: list[tuple[str, tuple[str, ...]]]
    ):
        super().__init__(arrays)
        self.step = step
        self.examples = examples

    def describe(self, limit: int = 4) -> str:
        """Names the batch for an error message: its step and the ids of its first rows."""
        rows = [f"{query} ({', '.join(documents)})" for query, documents in self.examples if documents]
        more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
        return f"step {self.step}: " + "; ".join(rows[:limit]) + more


class BatchMaker:
    """Makes the batch of any step: stateless, so that batches can be made in any order, anywhere."""

    def __init__(
        self,
        stores: Sequence[ExampleStore],
        order: GlobalOrder,
        contract: ScoringContract,
        tokenizer: Tokenizer,
        batch_size: int,
        list_size: int | None,
        lengths: Sequence[int],
        process_index: int,
        process_count: int,
        layout: Layout | str = "bucketed",
        platform: str = "cpu",
        ways: int = 1,
        accumulation: int = 1,
        whole_lists: bool = True,
        own_ways: Sequence[int] = (),
    ):
        """See `BatchStream`."""
        longest = max(store.max_list_size for store in stores)
        list_size = longest if list_size is None else list_size
        if list_size < longest:
            name = next(store.name for store in stores if store.max_list_size == longest)
            raise InputError(
                f"{name} has lists of {longest} documents, which list_size={list_size} cannot hold. "
                f"Use list_size={longest}, or a task that groups its pairs into lists of {list_size}."
            )
        if process_count < 1 or not 0 <= process_index < process_count:
            raise InputError(f"process {process_index} of {process_count}: expected 0 <= index < count.")
        if batch_size < 1 or batch_size % process_count:
            raise InputError(f"batch_size={batch_size} does not split over {process_count} processes.")
        layout = Layout.of(layout)
        if layout.lengths is None:
            layout = dataclasses.replace(layout, lengths=tuple(lengths))
        if layout.tokens_per_call is None and platform == "cpu":
            layout = dataclasses.replace(layout, tokens_per_call=_CPU_TOKENS)
        self.layout = layout.resolve(platform, contract.max_length)
        self.stores, self.order, self.contract, self.tokenizer = list(stores), order, contract, tokenizer
        self.batch_size, self.list_size = batch_size, list_size
        self.rows = batch_size // process_count
        self.process_index = process_index
        # Processes see different rows, and must agree on the shape without asking each other.
        self.lengths = (contract.max_length,) if process_count > 1 else self.layout.lengths or ()
        self.has_teacher_logits = all(store.has_teacher_logits for store in stores)
        # Fails now, not in the thread, when the vocabulary lacks a label piece.
        contract.label_ids(tokenizer)
        self.shape: micro_batches.Shape | None = None
        self.whole_lists = whole_lists
        if self.layout.kind == "packed":
            sample = list(self._sample())
            if layout.row_length is None:
                length = micro_batches.choose_row_length(contract.max_length, layout.slots, sample)
                self.layout = dataclasses.replace(layout, row_length=length).resolve(
                    platform, contract.max_length
                )
            # The shape of this process's part, which is every other's too: all look at the same sample.
            lists, together = (self.rows, list_size) if whole_lists else (self.rows * list_size, 1)
            if ways % process_count:
                raise InputError(f"ways={ways} does not split over {process_count} processes.")
            self.ways = ways // process_count
            first = process_index * self.ways
            self.own_ways = np.array(own_ways or range(first, first + self.ways))
            self.shape = micro_batches.choose_shape(
                self.layout, lists, together, sample, ways=self.ways, accumulation=accumulation
            )

    @property
    def num_batches(self) -> int | None:
        """How many batches there are, or None for no end."""
        return None if self.order.total is None else -(-self.order.total // self.batch_size)

    def examples_at(self, step: int) -> list[Example]:
        """This process's examples of a step; fewer than its rows at the end of the data."""
        return self._examples(step, self.process_index * self.rows, self.rows)

    def _examples(self, step: int, first: int, count: int) -> list[Example]:
        start = step * self.batch_size + first
        stop = start + count
        if self.order.total is not None:
            stop = min(stop, self.order.total)
        if stop <= start:
            return []
        sources, numbers = self.order.locate(np.arange(start, stop, dtype=np.int64))
        found: list[Example | None] = [None] * (stop - start)
        for source, store in enumerate(self.stores):
            (rows,) = np.nonzero(sources == source)
            for row, example in zip(rows, store.take(numbers[rows]), strict=True):
                found[row] = example
        return [example for example in found if example is not None]

    def __call__(self, step: int) -> Batch:
        """Makes the batch of a step."""
        examples = self.examples_at(step)
        sequences = self._encode(examples)
        if self.shape is None:
            arrays = self._padded(examples, sequences)
        else:
            arrays = self._packed(examples, sequences, self.shape)
        ids = [(example.query_id, example.document_ids) for example in examples]
        return Batch(arrays, step, ids + [("", ())] * (self.rows - len(examples)))

    def _encode(self, examples: Sequence[Example]) -> list[np.ndarray]:
        queries = [example.query for example in examples for _ in example.documents]
        documents = [document for example in examples for document in example.documents]
        return self.contract.encode(self.tokenizer, queries, documents)

    def _units(self, examples: Sequence[Example]) -> Sequence[Example]:
        """What a packed micro-batch must hold whole: lists or, where the loss allows, single documents."""
        return examples if self.whole_lists else [part for example in examples for part in _singles(example)]

    def _sample(self) -> Iterator[list[np.ndarray]]:
        """Token numbers of the lists of the first steps, the same whatever step the stream starts with."""
        seen = 0
        for step in range(_SAMPLE_STEPS):
            examples = self._examples(step, 0, self.batch_size)
            if not examples or seen >= _SAMPLE_SEQUENCES:
                return
            lengths = _list_lengths(self._units(examples), self._encode(examples))
            seen += sum(map(len, lengths))
            yield lengths

    def _padded(self, examples: Sequence[Example], sequences: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        longest = max((len(sequence) for sequence in sequences), default=1)
        length = next(length for length in self.lengths if length >= longest)
        homes = [(row,) for row in range(len(examples))]
        arrays = self._labels(examples, (self.rows, self.list_size), homes)
        tokens = np.zeros((self.rows, self.list_size, length), np.int32)
        # Boolean indexing walks rows, then documents: the order in which `sequences` was made.
        tokens[arrays["list_mask"]] = pad_batch(sequences, length)
        return {"tokens": tokens, "numbers": self._numbers(), **arrays}

    def _numbers(self) -> np.ndarray:
        """Numbers of this process's documents within the batch of all, int32 [lists, documents]."""
        count = self.rows * self.list_size
        first = self.process_index * count
        return np.arange(first, first + count, dtype=np.int32).reshape(self.rows, self.list_size)

    def _packed(
        self, examples: Sequence[Example], sequences: Sequence[np.ndarray], shape: micro_batches.Shape
    ) -> dict[str, np.ndarray]:
        present = np.arange(self.list_size) < np.array([[len(example)] for example in examples]).reshape(
            -1, 1
        )
        documents = self._numbers()[: len(examples)][present]
        examples = self._units(examples)
        division = micro_batches.divide(_list_lengths(examples, sequences), shape)
        homes = list(zip(division.micro_batch.tolist(), division.place.tolist(), strict=True))
        lead = (shape.count, shape.lists, shape.list_size)
        arrays = self._labels(examples, lead, homes)
        owner = np.repeat(division.micro_batch, [len(example) for example in examples])
        row = packing.deal(division.row, shape.rows, self.ways)
        packed = packing.place(
            sequences,
            owner * shape.rows + row,
            division.slot,
            shape.row_length,
            shape.count * shape.rows,
        )
        numbers = np.zeros((shape.count, shape.rows, shape.slots), np.int32)
        numbers[owner, row, division.slot] = documents
        places = np.zeros(lead, np.int32)
        each = shape.rows // self.ways
        row = self.own_ways[row // each] * each + row % each  # in the micro-batch of all processes
        flat, start = row * shape.slots + division.slot, 0
        for home, example in zip(homes, examples, strict=True):
            places[home][: len(example)] = flat[start : start + len(example)]
            start += len(example)
        whole = (shape.count, shape.rows, shape.row_length)
        return {
            "tokens": packed.tokens.reshape(whole),
            "segment_ids": packed.segment_ids.reshape(whole),
            "numbers": numbers,
            "places": places,
            "micro_batches": np.asarray(division.used, np.int32),
            **arrays,
        }

    def _labels(
        self, examples: Sequence[Example], lead: tuple[int, ...], homes: Sequence[tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        """Mask and targets of shape `lead`, whose last axis is the list's, with each example at its home."""
        list_mask = np.zeros(lead, bool)
        relevance = np.full(lead, -1, np.float32)
        teacher_logits = np.zeros((*lead, 2), np.float32)
        for home, example in zip(homes, examples, strict=True):
            list_mask[home][: len(example)] = True
            relevance[home][: len(example)] = example.relevance
            if self.has_teacher_logits:
                teacher_logits[home][: len(example)] = example.teacher_logits
        arrays = {"list_mask": list_mask, "relevance": relevance}
        return {**arrays, "teacher_logits": teacher_logits} if self.has_teacher_logits else arrays


def _singles(example: Example) -> Iterator[Example]:
    """The documents of a list as lists of one."""
    for number in range(len(example)):
        one = slice(number, number + 1)
        yield dataclasses.replace(
            example,
            document_ids=example.document_ids[one],
            documents=example.documents[one],
            teacher_logits=None if example.teacher_logits is None else example.teacher_logits[one],
            relevance=example.relevance[one],
        )


def _list_lengths(examples: Sequence[Example], sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    return np.split(lengths, np.cumsum([len(example) for example in examples])[:-1]) if examples else []


class BatchStream:
    """Iterator over the batches of a task or mixture, from any step on.

    Batch k depends on the data, the arguments and k alone: a stream opened with `start_step=k` yields exactly
    what an older one would have yielded next, and the rows of all processes, one after another, are the
    rows of a single process. Use as a context manager or call `close`; a stream that is dropped, or alive
    when Python exits, is closed by itself.
    """

    def __init__(
        self,
        stores: ExampleStore | Sequence[ExampleStore],
        contract: ScoringContract,
        tokenizer: Tokenizer,
        batch_size: int,
        list_size: int | None = None,
        lengths: Sequence[int] = DEFAULT_LENGTHS,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
        *,
        rates: Sequence[float] | None = None,
        shuffle: bool = True,
        num_epochs: int | None = None,
        prefetch: int = 2,
        layout: Layout | str = "bucketed",
        platform: str = "cpu",
        ways: int = 1,
        accumulation: int = 1,
        whole_lists: bool = True,
        own_ways: Sequence[int] = (),
    ):
        """Opens a stream.

        Args:
          stores: one store, or those of a mixture.
          contract: how a pair becomes token ids.
          tokenizer: of the student.
          batch_size: lists per batch over all processes.
          list_size: documents per list; default: the data's longest list.
          lengths: bucketed, where the layout names none: token lengths to which batches are padded, the smallest
            that fits; those above the contract's `max_length` are ignored, and `max_length` is always one. With
            several processes, every batch has `max_length`.
          seed: decides the order.
          process_index: which part of every batch to make, from 0; see `partitioning.data_share`.
          process_count: into how many parts batches are cut.
          start_step: number of the first batch.
          rates: rates of the stores; default: their sizes.
          shuffle: see `GlobalOrder`.
          num_epochs: after how many epochs the stream ends, its last batch padded; None for never.
          prefetch: batches made ahead; 0 makes each when it is asked for.
          layout: padded, bucketed or packed, see `Batch`. The length of packed rows that it leaves open is chosen
            for the data.
          platform: JAX's name of the devices' platform, which decides what else the layout leaves open.
          ways: packed: devices over which rows and lists of a micro-batch are divided, a multiple of `process_count`.
          accumulation: packed: no micro-batch has more than `batch_size` / `accumulation` lists.
          whole_lists: packed: whether the documents of a list must be in one micro-batch. If not, each is a list of
            its own, which fills rows better and is the same to a loss that looks at one document at a time.
          own_ways: packed: which of the `ways` are this process's, see `partitioning.own_ways`; by default the
            `process_index`-th run of them.

        Raises:
          InputError: an argument is out of range, or the data's lists are longer than `list_size`.
        """
        stores = [stores] if isinstance(stores, ExampleStore) else list(stores)
        order = GlobalOrder([len(store) for store in stores], rates, seed, shuffle, num_epochs)
        if start_step < 0:
            raise InputError(f"start_step={start_step}: expected 0 or more.")
        self.make_batch = BatchMaker(
            stores,
            order,
            contract,
            tokenizer,
            batch_size,
            list_size,
            lengths,
            process_index,
            process_count,
            layout,
            platform,
            ways,
            accumulation,
            whole_lists,
            own_ways,
        )
        self.fingerprints: dict[str, dict[str, Any]] = {
            store.name: {"examples": len(store), "sha256": store.fingerprint} for store in stores
        }
        self._step = start_step
        self._prefetch = prefetch
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(max(1, prefetch))
        self._stop = threading.Event()
        self._finalizer: weakref.finalize | None = None
        self._failure: BaseException | None = None

    @property
    def step(self) -> int:
        """Number of the batch that comes next: the data position to put into a checkpoint."""
        return self._step

    @property
    def num_batches(self) -> int | None:
        """Batches of the whole stream, counted from step 0; None when it never ends."""
        return self.make_batch.num_batches

    @property
    def list_size(self) -> int:
        """Documents per list."""
        return self.make_batch.list_size

    @property
    def layout(self) -> Layout:
        """The layout of the batches, with nothing left open."""
        return self.make_batch.layout

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Batch:
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set() or (self.num_batches is not None and self._step >= self.num_batches):
            raise StopIteration
        if self._prefetch < 1:
            batch: Batch | BaseException | None = self.make_batch(self._step)
        else:
            if self._finalizer is None:
                self._start()
            batch = self._queue.get()
        if isinstance(batch, BaseException):
            self._failure = batch
            self.close()
            raise batch
        if batch is None:
            raise StopIteration
        self._step += 1
        return batch

    def _start(self) -> None:
        thread = threading.Thread(
            target=_produce,
            args=(self.make_batch, self._step, self._queue, self._stop),
            name="inranker-batches",
            daemon=True,
        )
        # The thread must not know the stream, or the stream would never be dropped. At exit, finalizers run
        # before daemon threads are cut off in the middle of native code.
        self._finalizer = weakref.finalize(self, _shut_down, thread, self._queue, self._stop)
        thread.start()

    def close(self) -> None:
        """Stops the background thread and waits for it; afterwards the stream is at its end."""
        self._stop.set()
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _offer(item: Any, into: queue.Queue[Any], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            return into.put(item, timeout=0.1)
        except queue.Full:
            continue


def _produce(make_batch: BatchMaker, step: int, into: queue.Queue[Any], stop: threading.Event) -> None:
    try:
        while not stop.is_set() and (make_batch.num_batches is None or step < make_batch.num_batches):
            _offer(make_batch(step), into, stop)
            step += 1
    except BaseException as error:
        _offer(error, into, stop)
    else:
        _offer(None, into, stop)


def _shut_down(thread: threading.Thread, items: queue.Queue[Any], stop: threading.Event) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join()
    while not items.empty():
        items.get_nowait()
