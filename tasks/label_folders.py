"""Tasks over label folders, which `python -m inranker_jax.label` writes.

    from inranker_jax.tasks import label_folders
    label_folders.register("my_corpus", "labels/my_corpus")

Save these lines as `my_tasks.py` and train with
`--gin.MIXTURE_OR_TASK_MODULE="'my_tasks.py'" --gin.MIXTURE_OR_TASK_NAME="'my_corpus'"`.

Without a file of your own, two environment variables do it: `LABEL_FOLDER` for the tasks `label_folder`
(pairs) and `label_folder_lists` (ten documents together).

Cross-lingual labels: a folder labelled in English, with texts that have the same ids in another language.
The teacher's logits of the English pair then go with the translated pair. The prompt is the student's
affair: its contract makes token ids of the texts (`prompts.preset("monoptt5")` for Portuguese).

    label_folders.register(
        "pira_pt", "labels/pira_en", queries="pira-pt", documents="pira-pt", list_size=10
    )
"""

from __future__ import annotations

import functools
from typing import Any

import seqio

from inranker_jax.data import add_label_folder_task, rates
from inranker_jax.data.label_folders import LazyPath
from inranker_jax.data.tasks import data_path

LIST_SIZE = 10


def register(
    name: str,
    folder: LazyPath,
    *,
    list_size: int = 1,
    queries: LazyPath | None = None,
    documents: LazyPath | None = None,
    teacher: str | None = None,
    validation_fraction: float = 0.001,
) -> seqio.Task:
    """Registers a task over a label folder.

    Args:
      name: the task's name; letters, digits and `_`.
      folder: the label folder, or a function that returns it.
      list_size: most documents per example: 1 for pairs, 10 for lists of a positive and nine negatives.
      queries: other texts for the same query ids, such as a translation: a path in any format of queries, or
        a function that returns one.
      documents: other texts for the same document ids, in any format of corpora.
      teacher: whose labels, where the folder has those of several.
      validation_fraction: share of the queries, by their text, in split "validation".

    Returns:
      The task.

    Raises:
      InputError: an argument is out of range.
      ValueError: from SeqIO, when the name is taken.
    """
    return add_label_folder_task(
        name,
        folder,
        list_size=list_size,
        validation_fraction=validation_fraction,
        teacher=teacher,
        queries=queries,
        documents=documents,
    )


def register_both(name: str, folder: LazyPath, *, list_size: int = LIST_SIZE, **arguments: Any) -> None:
    """Registers `name`, whose examples are pairs, and `name_lists`; arguments as of `register`."""
    register(name, folder, **arguments)
    register(f"{name}_lists", folder, list_size=list_size, **arguments)


def register_mixture(name: str, members: list[str]) -> None:
    """Registers mixtures `name` and `name_lists` of tasks registered by `register_both`, rates by size."""
    for suffix in ("", "_lists"):
        seqio.MixtureRegistry.add(
            name + suffix, [member + suffix for member in members], default_rate=rates.proportional
        )


def data_folder(*parts: str, hint: str = "") -> LazyPath:
    """A function that returns a label folder below INRANKER_DATA_DIR, and says how to make a missing one."""
    remedy = f"Make it with `python -m inranker_jax.label {hint or '...'} --output_dir={{path}}`"
    return functools.partial(data_path, *parts, remedy=remedy)


def register_data_folder(*parts: str, hint: str = "") -> str:
    """Registers a label folder below INRANKER_DATA_DIR under its path: `a/b-c` gives `a_b_c`."""
    name = "_".join(parts).replace("-", "_")
    register_both(name, data_folder(*parts, hint=hint))
    return name


def _from_environment() -> str:
    return data_path(variable="LABEL_FOLDER", remedy="Make it with `python -m inranker_jax.label`")


register_both("label_folder", _from_environment)
