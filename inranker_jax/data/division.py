"""What the tasks of a mixture must have, and agree on so that no query is trained on and validated on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import seqio

from inranker_jax.data import sources
from inranker_jax.data.shares import same_query
from inranker_jax.data.store import EmptySplitError, Example, ExampleStore
from inranker_jax.errors import InputError

_AT_ONCE = 1024


def _fraction(task: seqio.Task) -> float:
    """Share of the queries, by their text, in split "validation"; 0 for a task that is divided otherwise."""
    return task.source.validation_fraction if isinstance(task.source, sources.LabelledPairs) else 0.0


def check_data(name: str, tasks: Sequence[seqio.Task], split: str) -> None:
    """Looks whether the data of all tasks of a mixture are there, before those of any are read.

    Raises:
      InputError: those of several are not; names them all. Of one alone, reading will say so.
    """
    missing: list[sources.MissingDataError] = []
    for task in tasks:
        if split not in task.splits or not isinstance(task.source, sources.LabelledPairs):
            continue
        try:
            task.source.source_files(split)
        except sources.MissingDataError as error:
            missing.append(error)
    if len(missing) > 1:
        paths = ", ".join(dict.fromkeys(error.path for error in missing))
        raise InputError(
            f"{name}: {len(missing)} of its {len(tasks)} tasks have no data. Missing: {paths}. "
            f"The first of them: {missing[0]}"
        )


def check_fractions(name: str, tasks: Sequence[seqio.Task]) -> None:
    """Checks that the tasks of a mixture that divide their queries by text do it alike.

    The side of a query depends on its text and the fraction, so equal fractions never disagree.

    Raises:
      InputError: two fractions.
    """
    fractions = {_fraction(task): task.name for task in tasks if _fraction(task)}
    if len(fractions) > 1:
        listed = ", ".join(f"{fraction} in {task}" for fraction, task in sorted(fractions.items()))
        raise InputError(
            f"the tasks of mixture {name} have different validation fractions ({listed}): a query could be "
            "trained on in one and validated on in another. Register them with the same validation_fraction."
        )


def check_no_shared_query(
    name: str,
    split: str,
    held_out: Mapping[str, ExampleStore],
    tasks: Sequence[seqio.Task],
    open_train: Callable[[seqio.Task], ExampleStore],
) -> None:
    """Checks that no query of a split of one task is in split "train" of another, whatever its case and spacing.

    Tasks with the same validation fraction cannot disagree and are not read. The others (those with splits of
    their own, TFDS's, or only a "train") are: once through the queries of their training split.

    Args:
      name: the mixture, for the error.
      split: the split that is held out.
      held_out: its examples by task.
      tasks: all tasks of the mixture.
      open_train: opens split "train" of a task.

    Raises:
      InputError: there is such a query; or as `open_train` does.
    """
    fractions = {task.name: _fraction(task) for task in tasks}
    queries = {
        task: {same_query(example.query) for example in _examples(store)} for task, store in held_out.items()
    }
    for task in tasks:
        own = fractions[task.name]
        others = [other for other in queries if other != task.name and not (own and own == fractions[other])]
        if "train" not in task.splits or not others:
            continue
        try:
            train = open_train(task)
        except EmptySplitError:
            continue
        for example in _examples(train):
            text = same_query(example.query)
            for other in others:
                if text in queries[other]:
                    raise InputError(
                        f"mixture {name}: the query {example.query!r} is in split {split!r} of {other} and in "
                        f"split 'train' of {task.name}: it would be trained on and validated on. Register both "
                        "tasks with the same validation_fraction, leave one of them out of the mixture, or "
                        "train with train.validation_split = None."
                    )


def _examples(store: ExampleStore) -> Iterator[Example]:
    for start in range(0, len(store), _AT_ONCE):
        yield from store.take(range(start, min(start + _AT_ONCE, len(store))))


def why_empty(task: seqio.Task, split: str, error: EmptySplitError) -> EmptySplitError:
    """The error for a split without examples, with the remedy when it is empty by its validation fraction.

    Reads the queries of the task.
    """
    if not _fraction(task):
        return error
    try:
        shares = sorted(task.source.query_shares())
    except InputError:
        return error  # of an offline cache, whose examples do not need the files they came from
    place = f"{task.name}:{split} holds no examples"
    without = "train with validation_fraction=0 and train.validation_split = None."
    if not shares:
        return error
    if len(shares) == 1:
        return EmptySplitError(
            f"{place}: the task has one query, which is on the other side. Label more, or {without}"
        )
    cut = 1 if split == "validation" else len(shares) - 1
    return EmptySplitError(
        f"{place}: by the hash of their texts, all of its {len(shares)} queries are on the other side of "
        f"validation_fraction={_fraction(task)}. Register the task with "
        f"validation_fraction={(shares[cut - 1] + shares[cut]) / 2:.6g} "
        "(`inranker_jax.tasks.label_folders.register(..., validation_fraction=...)` for a label folder), which "
        f"leaves queries on both sides, or {without}"
    )
