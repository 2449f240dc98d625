"""Folders: where a training run keeps its checkpoints, and writing one that is complete or not there."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from inranker_jax import paths
from inranker_jax.errors import InputError

# What is in the folder of a training run.
STEPS = "checkpoints"
TOKENIZER = "tokenizer"
_LAST = "config.json"


def locate_run(path: str) -> tuple[Any, int | None] | None:
    """Resolves a run folder, its `checkpoints` folder or one step, here or remote, to (run folder, step or None)."""
    folder = paths.absolute(path)
    if (folder / STEPS).is_dir() and not (folder / "config.json").exists():
        return folder, None
    if folder.name == STEPS and folder.is_dir():
        # T5X calls its steps so, and lets its users call their folder what they like.
        if any(child.name.startswith("checkpoint_") for child in folder.iterdir()):
            return None
        return folder.parent, None
    if folder.parent.name == STEPS and folder.name.isdigit() and folder.is_dir():
        return folder.parent.parent, int(folder.name)
    return None


def is_native(path: str) -> bool:
    """Whether `path` is a run's folder, its `checkpoints` folder, or one step in it."""
    return locate_run(path) is not None


@contextlib.contextmanager
def replaced_folder(folder: str | os.PathLike[str], ours: Callable[[str], bool]) -> Iterator[pathlib.Path]:
    """Gives an empty folder to fill, which takes the place of `folder` when the block ends without an error.

    The new folder is written beside the old one and renamed. Should the process die between the two renames,
    the old contents are in `.NAME.old-*` beside it; at any other moment they are where they were.

    A remote folder is filled on this machine and uploaded: its `config.json`, without which it is no model, goes first
    of the old files and comes last of the new ones.

    Args:
      folder: the folder to replace, here or remote; it need not exist.
      ours: whether a file name is one that an earlier call may have written.

    Yields:
      The folder to write into.

    Raises:
      InputError: where the folder is a file or holds anything that is not ours, or its bucket cannot be read.
      OSError: the disk or the store did not take all of it.
    """
    if paths.is_remote(folder):
        with _uploaded_folder(folder, ours) as new:
            yield new
        return
    target = pathlib.Path(folder).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise InputError.at(target, None, "it is a file", "a folder to write", "Choose another name")
    foreign = (
        sorted(p.name for p in target.iterdir() if p.is_dir() or not ours(p.name)) if target.exists() else []
    )
    _check_foreign(target, foreign)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        # mkdtemp keeps other users out; an exported model gets the permissions of any new folder.
        umask = os.umask(0)
        os.umask(umask)
        new.chmod(0o777 & ~umask)
        yield new
        _swap(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _check_foreign(folder: Any, foreign: list[str]) -> None:
    if foreign:
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        problem = f"it holds files that are not an exported model's: {shown}"
        raise InputError.at(
            folder, None, problem, "a new folder or an earlier export", "Choose another folder"
        )


@contextlib.contextmanager
def _uploaded_folder(folder: str | os.PathLike[str], ours: Callable[[str], bool]) -> Iterator[pathlib.Path]:
    paths.check_reachable(folder)
    target = paths.of(folder)
    with paths.failures_told(target):
        old = paths.names_below(target)
    _check_foreign(target, [name for name in old if "/" in name or not ours(name)])
    with tempfile.TemporaryDirectory(prefix="inranker_jax.") as here:
        new = pathlib.Path(here, "new")
        new.mkdir()
        yield new
        with paths.failures_told(target):
            if _LAST in old:
                paths.remove(target / _LAST)
            paths.upload(new, target, marker=_LAST)
            for name in set(old) - set(paths.names_below(new)):
                paths.remove(target / name)


def _swap(new: pathlib.Path, target: pathlib.Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old)  # onto an empty folder, which POSIX allows
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
