"""From windows of token sequences to calls of a few static shapes, and back to one row of logits a pair.

`Window` lays out sequences on the host; `stream` keeps the device busy: while calls of one window run, a thread
prepares the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from inranker_jax import packing
from inranker_jax.errors import InputError
from inranker_jax.packing import Layout
from inranker_jax.prompts import pad_batch

# Calls that are on the device or wait for it. Enough that it never idles; few, so that memory stays as it is.
_IN_FLIGHT = 8

Chunk = TypeVar("Chunk")


@dataclasses.dataclass
class Statistics:
    """What was laid out so far: up to a window more than what was computed.

    Attributes:
      calls: executions of a compiled program.
      tokens: tokens computed, padding included.
      useful_tokens: those of the sequences themselves.
    """

    calls: int = 0
    tokens: int = 0
    useful_tokens: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # not a field: `dataclasses.asdict` copies fields

    def add(self, call: Call) -> None:
        """Counts a call."""
        with self._lock:
            self.calls += 1
            self.tokens += call.tokens.size
            self.useful_tokens += call.useful_tokens

    @property
    def useful_share(self) -> float:
        """`useful_tokens / tokens`; 1 before the first call."""
        return packing.useful_share(self.useful_tokens, self.tokens)


@dataclasses.dataclass(frozen=True)
class Call:
    """One execution of a compiled program.

    Attributes:
      sequences: int `[n]`, numbers of the sequences in it.
      places: where their logits are in the program's output, seen as `[rows * slots, K]`.
      tokens: int32 `[rows, length]`.
      segment_ids: int32 `[rows, length]` of packed rows, else None.
      useful_tokens: tokens of the sequences.
    """

    sequences: np.ndarray
    places: np.ndarray
    tokens: np.ndarray
    segment_ids: np.ndarray | None
    useful_tokens: int


def plan(sequences: Sequence[np.ndarray], layout: Layout, ways: int, pad_id: int) -> list[Call]:
    """Divides sequences among calls.

    Args:
      sequences: n arrays int32 of 1 to `max_length` ids; the longest first, unless the layout is packed.
      layout: a resolved layout.
      ways: how many devices divide the rows of a call.
      pad_id: fills rows.

    Returns:
      Calls whose shapes depend on the layout alone; what is in them on the arguments alone.
    """
    if layout.kind == "packed":
        return _plan_packed(sequences, layout, ways, pad_id)
    lengths, tokens_per_call = layout.lengths or (), layout.tokens_per_call or 1
    calls, start = [], 0
    while start < len(sequences):
        length = next(edge for edge in lengths if edge >= len(sequences[start]))
        rows = max(1, tokens_per_call // length) * ways
        taken = sequences[start : start + rows]
        tokens = pad_batch(taken, length, pad_id)
        # A dummy row repeats the first: all rows then hold ordinary values.
        tokens = np.concatenate([tokens, np.repeat(tokens[:1], rows - len(taken), axis=0)])
        members = np.arange(start, start + len(taken))
        calls.append(Call(members, members - start, tokens, None, sum(map(len, taken))))
        start += rows
    return calls


def _plan_packed(sequences: Sequence[np.ndarray], layout: Layout, ways: int, pad_id: int) -> list[Call]:
    length, slots, rows = layout.row_length or 1, layout.slots or 1, layout.rows_per_call(ways)
    row, slot, count = packing.assign([len(ids) for ids in sequences], length, slots)
    calls = []
    for start in range(0, count, rows):
        (members,) = np.nonzero((row >= start) & (row < start + rows))
        homes, places = row[members] - start, slot[members]
        taken = [sequences[number] for number in members.tolist()]
        packed = packing.place(taken, homes, places, length, rows, pad_id=pad_id)
        useful = sum(map(len, taken))
        calls.append(Call(members, homes * slots + places, packed.tokens, packed.segment_ids, useful))
    return calls


class Window:
    """Pairs that are laid out together, and their logits as they arrive.

    Equal sequences are computed once. They are sorted by length and content, so the calls do not depend on the
    order of the pairs.

    Attributes:
      calls: what is to be computed.
    """

    def __init__(
        self,
        encoded: Sequence[np.ndarray],
        numbers: Sequence[int],
        outputs: int,
        layout: Layout,
        *,
        ways: int,
        pad_id: int,
        vocab_size: int,
    ) -> None:
        """Lays out the token sequences of pairs.

        Args:
          encoded: n arrays int32, one a pair.
          numbers: how the user counts the pairs, for messages.
          outputs: K, logits of a pair.
          layout: a resolved layout.
          ways: how many devices divide the rows of a call.
          pad_id: fills rows.
          vocab_size: ids must be below it.

        Raises:
          InputError: an id is outside the model's vocabulary.
        """
        members: dict[bytes, list[int]] = {}
        for index, ids in enumerate(encoded):
            members.setdefault(ids.tobytes(), []).append(index)
        contents = sorted(members, key=lambda content: (-len(content), content))
        sequences = [np.frombuffer(content, np.int32) for content in contents]
        self._sequence_of = np.zeros(len(encoded), np.int64)
        for number, (content, ids) in enumerate(zip(contents, sequences, strict=True)):
            self._sequence_of[members[content]] = number
            if ids.max() >= vocab_size:
                raise InputError(
                    f"pair {numbers[members[content][0]]} has the token id {ids.max()}, but the model's vocabulary "
                    f"has {vocab_size}. Use the tokenizer that belongs to this model."
                )
        self._numbers = numbers
        self._logits = np.zeros((len(sequences), outputs), np.float32)
        self.calls = plan(sequences, layout, ways, pad_id)
        self._left = len(self.calls)

    @property
    def is_complete(self) -> bool:
        """Whether the outputs of all calls were put."""
        return self._left == 0

    def put(self, call: Call, outputs: np.ndarray) -> None:
        """Takes the output of a call, float32 `[rows, K]` or `[rows, slots, K]`."""
        self._logits[call.sequences] = outputs.reshape(-1, outputs.shape[-1])[call.places]
        self._left -= 1

    def logits(self) -> np.ndarray:
        """The logits, float32 `[n, K]`, in the order of the pairs.

        Raises:
          InputError: some are not finite.
        """
        logits = self._logits[self._sequence_of]
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=-1))
        if bad.size:
            raise InputError(
                f"the model gave the logits {logits[bad[0]].tolist()} for pair {self._numbers[bad[0]]} "
                f"({bad.size} of {len(logits)} are not finite). Check the checkpoint's parameters for NaN."
            )
        return logits


def calls_side_by_side(platform: str) -> int:
    """How many calls run at the same time: on a CPU one a core that this process may use, at most 8; else one."""
    if platform != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_IN_FLIGHT, cores)


def stream(
    chunks: Iterable[Chunk],
    prepare: Callable[[Chunk], Window],
    launch: Callable[[Call], Any],
    side_by_side: int = 1,
) -> Iterator[np.ndarray]:
    """Runs windows one after another, the device never waiting for the host.

    A chunk is read when the last but one before it was yielded, and prepared in a thread while its predecessor runs.
    The thread ends with the generator, however that ends. An error in a chunk is raised after the chunks before it
    were yielded.

    Args:
      chunks: read in the caller's thread.
      prepare: makes a chunk's window; called in one other thread, in order.
      launch: starts a call and returns its output, an array that may not be there yet.
      side_by_side: calls that run at the same time, each in a thread of its own; 1 leaves that to the device. On a
        CPU two fill the gaps that one leaves where an operation does not keep all cores busy.

    Yields:
      float32 `[n, K]` for each chunk, in order.
    """
    iterator = iter(chunks)
    limit = max(_IN_FLIGHT, 2 * side_by_side)
    running: deque[tuple[Window, Call, Any]] = deque()

    def land() -> None:
        window, call, output = running.popleft()
        window.put(call, output.result() if isinstance(output, Future) else np.asarray(output))

    def start(window: Window, call: Call) -> None:
        while len(running) >= limit:
            land()
        output = launch(call) if side_by_side == 1 else runners.submit(lambda: np.asarray(launch(call)))
        running.append((window, call, output))

    def finish(window: Window | None) -> Iterator[np.ndarray]:
        if window is not None:
            while not window.is_complete:
                land()
            yield window.logits()

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="inranker_jax-tokens"))
        runners = stack.enter_context(
            ThreadPoolExecutor(side_by_side, thread_name_prefix="inranker_jax-calls")
        )
        # Whoever stops in the middle does not wait for calls that have not begun.
        stack.callback(runners.shutdown, wait=False, cancel_futures=True)

        def read() -> Future[Window] | None:
            try:
                chunk = next(iterator)
            except StopIteration:
                return None
            except Exception as error:  # raised below, in its turn
                failed: Future[Window] = Future()
                failed.set_exception(error)
                return failed
            return pool.submit(prepare, chunk)

        before: Window | None = None
        following = read()
        while following is not None:
            try:
                window = following.result()
            except Exception:
                yield from finish(before)
                raise
            calls = iter(window.calls)
            if before is not None:
                for call in calls:
                    start(window, call)
                    if before.is_complete:
                        break
                yield from finish(before)
                before = None
            following = read()
            for call in calls:
                start(window, call)
            before = window
        yield from finish(before)
