"""Runs torch models in calls whose values depend on as little as possible.

On a CPU every text is a call of its own, without padding, on one thread, and the cores work on different
texts. A text's values are then a function of the text alone, to the last bit; nothing is computed for padding;
and cores do not wait for each other within a matrix product. An accelerator needs many texts at once: there
calls have one of a few lengths and for each length always the same number of rows (a last call is filled with
copies of its first row). Equal chunks then give equal values; what a text's neighbours change is the last bit
at most, because a kernel may add up in another order in another row.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from inranker_jax.errors import InputError
from inranker_jax.labeling.teachers.base import optional_package
from inranker_jax.labeling.teachers.spec import TeacherSpec

LENGTHS = (16, 32, 64, 96, 128, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
_ACCELERATOR_TOKENS = 32768
# Where launchers write the number of a process on its host: torchrun, Slurm, Open MPI.
_LOCAL_INDEX = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")


@dataclasses.dataclass(frozen=True)
class Call:
    """Which sequences are computed together.

    Attributes:
      length: the padded length in tokens.
      rows: indices of sequences; filled up to a constant number for this length.
      count: how many of `rows` are meant; the rest are copies of the first.
    """

    length: int
    rows: list[int]
    count: int


def plan(lengths: Sequence[int], longest: int, tokens_per_call: int | None) -> Iterator[Call]:
    """Cuts sequences into calls, longest first.

    Args:
      lengths: tokens of each sequence, at most `longest`.
      longest: the model's limit.
      tokens_per_call: padded tokens of a call, which has at least one row; None for one sequence a call,
        unpadded.

    Yields:
      The calls; every sequence is in one.

    >>> [(call.length, call.rows, call.count) for call in plan([3, 40, 5], 64, 64)]
    [(64, [1], 1), (16, [2, 0, 2, 2], 2)]
    >>> [(call.length, call.rows, call.count) for call in plan([3, 40], 64, None)]
    [(40, [1], 1), (3, [0], 1)]
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if tokens_per_call is None:
        yield from (Call(lengths[index], [index], 1) for index in order)
        return
    buckets = [*(length for length in LENGTHS if length < longest), longest]
    start = 0
    while start < len(order):
        length = buckets[bisect.bisect_left(buckets, lengths[order[start]])]
        size = max(1, tokens_per_call // length)
        smallest = buckets[buckets.index(length) - 1] if length != buckets[0] else -1
        rows = [index for index in order[start : start + size] if lengths[index] > smallest]
        yield Call(length, rows + rows[:1] * (size - len(rows)), len(rows))
        start += len(rows)


def pick_device(torch: Any, name: str | None, spec: str) -> Any:
    """The torch device of a name, by default a CUDA device (of several processes on a host each its own) or the CPU.

    Raises:
      InputError: there is no such device.
    """
    try:
        device = torch.device(name or (own_cuda(torch) if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"teacher {spec!r}: device={name!r} cannot be used ({first}).") from error
    return device


def own_cuda(torch: Any) -> str:
    """The CUDA device of this process among those that its launcher started on this host."""
    local = next((os.environ[name] for name in _LOCAL_INDEX if os.environ.get(name, "").isdecimal()), "0")
    return f"cuda:{int(local) % torch.cuda.device_count()}"


def default_tokens(device: Any) -> int | None:
    """Tokens a call by default: see the head of this file."""
    return None if device.type == "cpu" else _ACCELERATOR_TOKENS


def load_torch() -> Any:
    """Imports torch, or says how to install it."""
    return optional_package("torch")


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No loading bars and no advice on padding: what is wrong is raised, not printed."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def resize(tensor: Any, length: int, fill: int, side: str) -> Any:
    """Cuts or pads the second axis of a tensor [n, m] to `length`, on the padding side of the tokenizer."""
    torch = load_torch()
    missing = length - tensor.shape[1]
    if missing > 0:
        return torch.nn.functional.pad(tensor, (0, missing) if side == "right" else (missing, 0), value=fill)
    return tensor[:, :length] if side == "right" else tensor[:, -length:]


class Runner:
    """Runs calls: on a CPU one on each core, elsewhere one after another.

    While it is open on a CPU, torch computes with one thread in this process.

    Args:
      device: the torch device.
      tokens_per_call: the teacher's option; given on a CPU, calls run one after another on all threads.
    """

    _open = 0  # runners with a pool, in this process
    _threads = 1  # torch's threads before the first of them

    def __init__(self, device: Any, tokens_per_call: int | None) -> None:
        self._torch = load_torch()
        self._pool: ThreadPoolExecutor | None = None
        if device.type == "cpu" and tokens_per_call is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            if not Runner._open:
                Runner._threads = self._torch.get_num_threads()
            Runner._open += 1
            # OpenMP counts threads for every thread that calls it.
            self._pool = ThreadPoolExecutor(cores, initializer=self._torch.set_num_threads, initargs=(1,))
            self._torch.set_num_threads(1)

    def run(self, compute: Callable[[Call], Any], calls: Iterable[Call]) -> list[tuple[Call, Any]]:
        """Computes each call, without gradients; results in the order of the calls."""

        def one(call: Call) -> tuple[Call, Any]:
            with self._torch.inference_mode():
                return call, compute(call)

        return [one(call) for call in calls] if self._pool is None else list(self._pool.map(one, calls))

    def close(self) -> None:
        """Gives torch its threads back, once no runner uses them."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
            Runner._open -= 1
            if not Runner._open:
                self._torch.set_num_threads(Runner._threads)


class TorchTeacher:
    """What teachers that are torch models have in common; see `base.Teacher` for the public names.

    A subclass sets `_model`, `_identity`, and last, as it takes torch's threads, `_runner`.
    """

    _identity: dict[str, Any]
    _runner: Runner

    def __init__(self, spec: TeacherSpec, torch: Any, library: Any) -> None:
        """Settles name, device and tokens a call.

        Args:
          spec: the teacher's specification.
          torch: the module.
          library: the package that loads the model.

        Raises:
          InputError: there is no such device.
        """
        self.name = spec.name
        self._torch = torch
        self._model: Any = None
        self._device = pick_device(torch, spec.options.get("device"), spec.name)
        self._tokens = spec.options.get("tokens_per_call", default_tokens(self._device))
        self._versions = {"torch": torch.__version__, library.__name__.replace("_", "-"): library.__version__}
        self._path = spec.path

    @property
    def identity(self) -> dict[str, Any]:
        """See `Teacher`."""
        return self._identity

    @property
    def provenance(self) -> dict[str, Any]:
        """See `Teacher`."""
        return {
            "path": self._path,
            "device": str(self._device),
            "tokens_per_call": self._tokens,
            "versions": self._versions,
        }

    def close(self) -> None:
        """See `Teacher`."""
        self._runner.close()
        self._model = None
        if self._device.type == "cuda":
            self._torch.cuda.empty_cache()
