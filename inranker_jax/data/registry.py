"""From the name of a SeqIO task or mixture to its examples and batches."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from inranker_jax import paths
from inranker_jax.data import division, sources
from inranker_jax.data import rates as mixture_rates
from inranker_jax.data.batches import DEFAULT_LENGTHS, BatchStream
from inranker_jax.data.sorting import sort_key, sort_records
from inranker_jax.data.store import (
    EmptySplitError,
    Example,
    ExampleStore,
    default_cache_dir,
    example_from_features,
)
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.prompts import ScoringContract, Tokenizer

# Part of every stored split's fingerprint: raise it when the same files would give other examples.
_READER_VERSION = 2


def find_provider(name: str) -> seqio.Task | seqio.Mixture:
    """Looks a task or mixture up.

    Raises:
      InputError: there is none of that name; suggests the closest and lists all.
    """
    known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    if name not in known:
        raise InputError(
            f"no SeqIO task or mixture {name!r}.{did_you_mean(name, known)} Registered: "
            f"{', '.join(known) or 'none'}. Name the module that registers it among the task modules."
        )
    return seqio.get_mixture_or_task(name)


def read_examples(
    task: seqio.Task,
    split: str,
    use_cached: bool = False,
    *,
    memory_limit: int = 256 << 20,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Iterator[Example]:
    """Reads a split through SeqIO, once, in the task's own order, and checks every example.

    What offline caching wrote is read in the order of the task itself, whichever workers wrote it; of a task
    whose examples bear no number (see `features`), in an order that depends on the examples alone.

    Args:
      task: the task.
      split: its split.
      use_cached: read what SeqIO's offline caching wrote.
      memory_limit: bytes of examples that are kept in memory for sorting.
      cache_dir: where more than that is kept meanwhile; default: `default_cache_dir() / "examples"`.

    Yields:
      The examples.

    Raises:
      InputError: an example is not as described in `features`; or what the task's reader raises, itself.
    """
    name = f"{task.name}:{split}"
    source, number = task.source, 0
    only_source = all(isinstance(step, seqio.CacheDatasetPlaceholder) for step in task.preprocessors)
    if isinstance(source, sources.LabelledPairs) and only_source and not use_cached:
        # The same examples as the dataset below would bring, thirty times faster: no tensors in between.
        for number, features in enumerate(source.examples(split)):
            yield example_from_features(features, f"{name}, example {number}")
        return
    # TensorFlow would otherwise take the memory of every GPU for the sake of a few strings. It refuses when
    # the program has used its devices already: then they are the program's own affair.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    stored = int(task.get_cached_stats(split)["examples"]) if use_cached else None
    if stored == 0:
        return
    found = _through_seqio(task, split, use_cached)
    first = next(found, None)
    found = itertools.chain([] if first is None else [first], found)
    if use_cached or (first is not None and first[0] is not None):
        folder = pathlib.Path(cache_dir) if cache_dir is not None else default_cache_dir() / "examples"
        found = _in_order(found, name, memory_limit, folder)
    count = 0
    for _, example in found:
        yield example
        count += 1
    if stored is not None and count != stored:
        raise InputError(
            f"{name}: the offline cache in {task.cache_dir} holds {count} examples, and its stats file says "
            f"{stored}. Remove that folder and cache the task again."
        )


Numbered = tuple[int | None, Example]


def _through_seqio(task: seqio.Task, split: str, use_cached: bool) -> Iterator[Numbered]:
    """(number or None, example) in the order in which SeqIO brings them."""
    name = f"{task.name}:{split}"
    count = 0
    try:
        dataset = task.get_dataset(
            sequence_length=None,
            split=split,
            use_cached=use_cached,
            shuffle=False,
            num_epochs=1,
            try_in_mem_cache=False,
        )
        for count, features in enumerate(dataset.as_numpy_iterator()):
            number = features.pop(sources.NUMBER, None)
            example = example_from_features(features, f"{name}, example {count}")
            yield (None if number is None else int(number)), example
    except tf.errors.OpError as error:
        original = sources.original_error(error)
        if original is not None:
            raise original from None
        message = str(error).split("\n\n")[0].strip()
        raise InputError(f"{name}: SeqIO failed after {count} examples: {message}") from error


def _in_order(
    found: Iterator[Numbered], name: str, memory_limit: int, folder: pathlib.Path
) -> Iterator[Numbered]:
    """Sorts examples by number; those without one by their content."""

    def keyed() -> Iterator[tuple[bytes, bytes]]:
        for number, example in found:
            record = example.to_bytes()
            yield sort_key(number, record), record
            kinds.add(number is None)

    kinds: set[bool] = set()
    previous = None
    for key, record in sort_records(keyed(), memory_limit, folder):
        if kinds == {False} and key == previous:
            raise InputError(
                f"{name}: two examples have number {int.from_bytes(key)}. Was the offline cache written twice "
                "into one folder? Remove it and cache the task again."
            )
        previous = key
        yield None, Example.from_bytes(record)


def source_identity(task: seqio.Task, split: str, use_cached: bool = False) -> str | None:
    """Fingerprint of what a split's examples come from: code, arguments, and the files' sizes and times.

    Returns:
      SHA-256 as hexadecimal; None when the source does not say what it reads.
    """
    files = _source_files(task, split, use_cached)
    if files is None:
        return None
    source = task.source
    parts = source.identity(split) if isinstance(source, sources.LabelledPairs) else [repr(source)]
    description = [
        _READER_VERSION,
        task.name,
        split,
        use_cached,
        files,
        [_code(part) for part in parts],
        [_code(step) for step in task.preprocessors],
    ]
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=repr).encode()).hexdigest()


def _source_files(task: seqio.Task, split: str, use_cached: bool) -> list[list[Any]] | None:
    if use_cached and not task.get_cached_stats(split)["examples"]:
        return None  # SeqIO cannot open an empty split of its cache
    source = task._get_cached_source(split) if use_cached else task.source
    if isinstance(source, sources.LabelledPairs):
        names = source.source_files(split)
    elif isinstance(source, seqio.FileDataSource):
        names = list(source.list_shards(split))
    elif isinstance(source, seqio.TfdsDataSource):
        # The lazy loader's name and folder need not exist; its builder's files do.
        info = source.tfds_dataset.info
        names = [str(path) for path in info.splits[source.tfds_dataset._map_split(split)].filepaths]
    else:
        return None
    described: list[list[Any]] = []
    for path in names:
        try:
            if paths.is_remote(path) and isinstance(source, sources.LabelledPairs):  # not read by TensorFlow
                described.append([path, paths.size(path), paths.version(path)])
                continue
            status = tf.io.gfile.stat(os.path.abspath(path) if "://" not in path else path)
        except (FileNotFoundError, tf.errors.OpError):
            return None  # reading will say so, with the words of the reader
        described.append([path, status.length, status.mtime_nsec])
    return described or None


def _code(value: Any, depth: int = 7) -> Any:
    """What a function is: where it comes from, the text of its file, and the values it holds."""
    if value is None or isinstance(value, str | bytes | int | float | os.PathLike):
        return repr(value)
    if depth == 0 or inspect.ismodule(value):
        return type(value).__qualname__
    if isinstance(value, functools.partial):
        value = [value.func, value.args, value.keywords]
    if isinstance(value, Mapping):
        return [[str(key), _code(entry, depth - 1)] for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return [_code(entry, depth - 1) for entry in value]
    if not (callable(value) or hasattr(value, "__dict__")):
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    inner = inspect.unwrap(value) if callable(value) else value
    home = inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner)
    code = getattr(inner, "__code__", None)
    # Two lambdas of one file have the same name and file: their place and bytecode tell them apart.
    text = f"{code.co_firstlineno}".encode() + code.co_code if code is not None else b""
    with contextlib.suppress(TypeError, OSError):
        text += pathlib.Path(inspect.getsourcefile(home) or "").read_bytes()
    if home is type(inner):
        held: list[Any] = [getattr(inner, "__dict__", None)]
    else:
        held = [getattr(inner, name, None) for name in ("__self__", "__defaults__", "__kwdefaults__")]
        for cell in getattr(inner, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # a cell that is still empty
                held.append(cell.cell_contents)
    name = f"{home.__module__}.{home.__qualname__}"
    return [name, hashlib.sha256(text).hexdigest(), _code(held, depth - 1)]


def open_stores(
    name: str,
    split: str = "train",
    *,
    rates: mixture_rates.Rates | None = None,
    use_cached: bool = False,
    seqio_cache_dirs: Sequence[str] = (),
    cache_dir: str | os.PathLike[str] | None = None,
    memory_limit: int = 256 << 20,
) -> tuple[list[ExampleStore], list[float] | None]:
    """Makes the examples of a task, or of every task of a mixture, available by number.

    Args:
      name: the task or mixture, registered by now.
      split: its split. Tasks of a mixture without it are left out, and so are those which have no examples in
        it, unless it is "train".
      rates: rates of a mixture's tasks, in place of the mixture's own: by task name, or a function from a
        task's number of examples to its rate, such as `rates.temperature(2.0)`.
      use_cached: read what SeqIO's offline caching wrote.
      seqio_cache_dirs: where that lies.
      cache_dir: see `ExampleStore.open`.
      memory_limit: see `ExampleStore.open`.

    Returns:
      The stores, by task name, and their rates (None for a single task).

    Raises:
      InputError: no such task, mixture or split, bad data, a mixture that would train on what it validates on
        (see `division`), or rates that do not fit or cannot be computed.
    """
    provider = find_provider(name)
    if split not in provider.splits:
        known = sorted(provider.splits)
        raise InputError(
            f"{name} has no split {split!r}.{did_you_mean(split, known)} It has {', '.join(known)}."
        )
    if seqio_cache_dirs:
        missing = [folder for folder in seqio_cache_dirs if folder not in seqio.get_global_cache_dirs()]
        seqio.add_global_cache_dirs(missing)
    tasks = seqio.get_subtasks(provider)
    division.check_fractions(name, tasks)
    if not use_cached:
        division.check_data(name, tasks, split)
    open_one = functools.partial(
        _open_store, use_cached=use_cached, cache_dir=cache_dir, memory_limit=memory_limit
    )
    opened = _open_split(tasks, split, open_one)
    stores = list(opened.values())
    if isinstance(provider, seqio.Task):
        if isinstance(rates, Mapping):
            raise InputError(f"rates: {name} is a single task; rates are for the tasks of a mixture.")
        return stores, None
    if split != "train":
        division.check_no_shared_query(name, split, opened, tasks, lambda task: open_one(task, "train"))
    return stores, _mixture_rates(provider, rates, {name: len(store) for name, store in opened.items()})


def _open_split(
    tasks: Sequence[seqio.Task], split: str, open_one: Callable[[seqio.Task, str], ExampleStore]
) -> dict[str, ExampleStore]:
    """The stores of the tasks that have examples in a split, by task name."""
    opened: dict[str, ExampleStore] = {}
    empty: tuple[seqio.Task, EmptySplitError] | None = None
    for task in tasks:
        if split not in task.splits:
            continue
        try:
            opened[task.name] = open_one(task, split)
        except EmptySplitError as error:
            empty = task, error
    if empty is not None and (split == "train" or not opened):
        raise division.why_empty(empty[0], split, empty[1])
    return opened


def _open_store(
    task: seqio.Task,
    split: str,
    use_cached: bool,
    cache_dir: str | os.PathLike[str] | None,
    memory_limit: int,
) -> ExampleStore:
    """See `open_stores`."""
    if use_cached and not task.cache_dir:
        raise InputError(
            f"use_cached is set, but task {task.name} is not cached in {seqio.get_global_cache_dirs()}. "
            f"Run `python -m seqio.scripts.cache_tasks_main --tasks={task.name} --output_cache_dir=DIR "
            "--module_import=MODULE`, and give DIR in seqio_cache_dirs."
        )
    return ExampleStore.open(
        f"{task.name}:{split}",
        read_examples(task, split, use_cached, memory_limit=memory_limit, cache_dir=cache_dir),
        identity=source_identity(task, split, use_cached),
        cache_dir=cache_dir,
        memory_limit=memory_limit,
    )


def _mixture_rates(
    mixture: seqio.Mixture, rates: mixture_rates.Rates | None, sizes: Mapping[str, int]
) -> list[float]:
    """The rates of the tasks in `sizes` (number of examples by task): the caller's, or the mixture's own."""
    if rates is not None:
        return mixture_rates.resolve(rates, list(sizes.items()), [task.name for task in mixture.tasks])
    try:
        with mixture_rates.known_sizes(sizes):
            return [
                float(mixture.get_rate(task)) for task in seqio.get_subtasks(mixture) if task.name in sizes
            ]
    except (TypeError, ValueError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the rates of mixture {mixture.name} cannot be computed ({error}). Rates that are functions of a "
            "task's size need sources with num_input_examples or SeqIO's offline cache; numbers always work."
        ) from error


def open_stream(
    name: str,
    split: str = "train",
    *,
    contract: ScoringContract,
    tokenizer: Tokenizer,
    batch_size: int,
    list_size: int | None = None,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    seed: int = 0,
    shuffle: bool | None = None,
    num_epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
    prefetch: int = 2,
    **store_options: Any,
) -> BatchStream:
    """Opens the batches of a task or mixture by name.

    Split "train" is shuffled and endless by default; any other is one pass in source order, its last batch
    padded.

    Args:
      name: the task or mixture; `import_task_modules` comes first.
      split: its split.
      contract: how a pair becomes token ids.
      tokenizer: of the student.
      batch_size: lists per batch over all processes.
      list_size: documents per list; default: the data's longest list.
      lengths: see `BatchStream`.
      seed: decides the order.
      shuffle: default: whether the split is "train".
      num_epochs: default: no end for "train", 1 otherwise.
      process_index: this process, from 0.
      process_count: processes that share each batch.
      start_step: number of the first batch.
      prefetch: batches made ahead.
      **store_options: keyword arguments of `open_stores`.

    Returns:
      The stream.

    Raises:
      InputError: see `open_stores` and `BatchStream`.
    """
    stores, rates = open_stores(name, split, **store_options)
    training = split == "train"
    return BatchStream(
        stores,
        contract,
        tokenizer,
        batch_size,
        list_size,
        lengths,
        seed,
        process_index,
        process_count,
        start_step,
        rates=rates,
        shuffle=training if shuffle is None else shuffle,
        num_epochs=num_epochs if training or num_epochs is not None else 1,
        prefetch=prefetch,
    )
