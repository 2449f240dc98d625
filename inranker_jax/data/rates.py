"""Rates of the tasks of a mixture: how often each is drawn, as a function of its number of examples."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inranker_jax.errors import InputError, did_you_mean

RateOfSize = Callable[[int], float]
Rates = Mapping[str, float] | RateOfSize

# Numbers of examples that are known because the tasks were just read; SeqIO would have to read them again.
_KNOWN_SIZES: contextvars.ContextVar[Mapping[str, int] | None] = contextvars.ContextVar(
    "known_sizes", default=None
)


@contextlib.contextmanager
def known_sizes(sizes: Mapping[str, int]) -> Iterator[None]:
    """Within the block, a `SizeRate` takes these numbers of examples, by task name."""
    token = _KNOWN_SIZES.set(sizes)
    try:
        yield
    finally:
        _KNOWN_SIZES.reset(token)


@dataclass(frozen=True)
class SizeRate:
    """rate = min(examples, maximum) ** (1 / temperature).

    Temperature-scaled mixing as in Raffel et al. 2020 (T5, section 3.5.2), where the maximum is the
    "artificial dataset size limit". Serves both as the rate of a `seqio.Mixture`, called with a task, and as
    `rates=` of `open_stores`, called with a number of examples.
    """

    temperature: float = 1.0
    maximum: int | None = None

    def __call__(self, task_or_size: Any) -> float:
        size = task_or_size if isinstance(task_or_size, int) else _size_of(task_or_size)
        if self.maximum is not None:
            size = min(size, self.maximum)
        return float(size) ** (1.0 / self.temperature)


def _size_of(task: Any) -> int:
    known = _KNOWN_SIZES.get()
    if known is not None and task.name in known:
        return known[task.name]
    if task.cache_dir:
        return int(task.get_cached_stats("train")["examples"])
    size = task.num_input_examples("train")
    if size is None:
        raise InputError(
            f"the number of examples of task {task.name} is not known, so its rate cannot be computed. Use a "
            "source with num_input_examples, cache the task offline, or give its rate as a number."
        )
    return int(size)


def temperature(temperature: float = 1.0, maximum: int | None = None) -> SizeRate:
    """Rates by size, flattened: 1 is proportional; the higher, the closer to equal rates.

    Args:
      temperature: T in size ** (1 / T); positive.
      maximum: number of examples above which a task counts as no larger; None for no limit.

    Returns:
      A function from a number of examples (or a SeqIO task) to its rate.

    Raises:
      InputError: an argument is out of range.

    >>> rate = temperature(2.0, maximum=10_000)
    >>> rate(100), rate(1_000_000)
    (10.0, 100.0)
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature={temperature}: expected a positive number.")
    if maximum is not None and maximum < 1:
        raise InputError(f"maximum={maximum}: expected at least 1 example, or None for no limit.")
    return SizeRate(temperature, maximum)


proportional = SizeRate()
"""The rate of a task is its number of examples: every example of a mixture is drawn equally often."""


def equal(size: int) -> float:
    """The same rate for every task, whatever its number of examples."""
    del size
    return 1.0


def resolve(rates: Rates, sizes: Sequence[tuple[str, int]], members: Sequence[str]) -> list[float]:
    """Rates of the tasks of a mixture from what the user gave.

    Args:
      rates: a mapping from each task's name to its rate, or a function from a number of examples to a rate.
      sizes: (task name, number of examples) of each task that has examples in the split.
      members: names of all tasks of the mixture.

    Returns:
      One rate per task of `sizes`.

    Raises:
      InputError: the mapping names a task that the mixture lacks or lacks one of its tasks, or a rate is not a
        positive finite number.
    """
    if isinstance(rates, Mapping):
        for name in rates:
            if name not in members:
                raise InputError(
                    f"rates: the mixture has no task {name!r}.{did_you_mean(name, members)} "
                    f"It has {', '.join(members)}."
                )
        if missing := [name for name, _ in sizes if name not in rates]:
            raise InputError(f"rates: no rate for {', '.join(missing)}. Expected one for each task.")
        values = [rates[name] for name, _ in sizes]
    else:
        values = [rates(size) for _, size in sizes]
    for (name, _), value in zip(sizes, values, strict=True):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            raise InputError(f"rates: {value!r} for {name}. Expected a positive finite number.")
    return [float(value) for value in values]
