"""Which folders are checkpoints, and what to say of one that is none."""

from __future__ import annotations

import itertools
import os
import pathlib
from typing import Any

from inranker_jax import paths
from inranker_jax.checkpoints import folders, t5x_folders
from inranker_jax.errors import InputError

# Any of these says that a folder was meant to be Hugging Face's.
_HUGGING_FACE = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "tokenizer.json",
    "spiece.model",
)
_KINDS = (
    "a Hugging Face model folder (with config.json), the output folder of a training run "
    f"(with {folders.STEPS}/), one of its checkpoints, or a checkpoint of T5X"
)
_LOOKED_AT, _NAMED = 200, 5


def is_checkpoint(folder: Any) -> bool:
    """Whether a folder, here or remote, is one that `load_model` reads, by the names of its files."""
    if folders.is_native(os.fspath(folder)) or any((folder / name).is_file() for name in _HUGGING_FACE):
        return True
    try:
        return t5x_folders.locate(os.fspath(folder)) is not None
    except InputError:  # one that is not complete
        return True


def check_folder(source: str) -> None:
    """Refuses a folder that is no checkpoint of any kind, and names those right below it.

    Args:
      source: a path, here or remote; anything that is no folder is somebody else's to refuse.

    Raises:
      InputError: it is no checkpoint.
    """
    folder = paths.of(source) if paths.is_remote(source) else pathlib.Path(source).expanduser()
    if not folder.is_dir() or is_checkpoint(folder):
        return
    found = [] if paths.is_remote(source) else _checkpoints_in(folder)
    names = [os.path.join(source, name) for name in found[:_NAMED]]
    remedy = f"Give one of those in it: {', '.join(names)}{', ...' * (len(found) > _NAMED)}"
    if len(found) < 2:
        remedy = f"Did you mean {names[0]!r}?" if found else "Check the path"
    raise InputError.at(source, None, "this folder is no checkpoint", _KINDS, remedy)


def _checkpoints_in(folder: pathlib.Path) -> list[str]:
    children = itertools.islice((child for child in folder.iterdir() if child.is_dir()), _LOOKED_AT)
    return sorted(child.name for child in children if child.name[0] != "." and is_checkpoint(child))


def check_steps(source: str) -> None:
    """Refuses a training run without a checkpoint.

    Raises:
      InputError: there is none yet.
    """
    located = folders.locate_run(source)
    if located is None or located[1] is not None:
        return
    steps = located[0] / folders.STEPS
    if not any(child.name.isdigit() for child in steps.iterdir()):
        raise InputError(f"{steps} has no complete checkpoint yet. Train for longer, or name another run.")
