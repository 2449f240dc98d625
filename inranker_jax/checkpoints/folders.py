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


def locate_run(path: str) -> tuple[Any, int | None] | None:
    """Resolves a run folder, its `checkpoints` folder or one step, here or remote, to (run folder, step or None)."""
    folder = paths.absolute(path)
    if (folder / STEPS).is_dir() and not (folder / "config.json").exists():
        return folder, None
    if folder.name == STEPS and folder.is_dir():
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

    Args:
      folder: the folder to replace; it need not exist.
      ours: whether a file name is one that an earlier call may have written.

    Yields:
      The folder to write into.

    Raises:
      InputError: for a remote path, and where the folder is a file or holds anything that is not ours.
    """
    if "://" in os.fspath(folder):
        raise InputError(
            f"{os.fspath(folder)}: a remote folder cannot be replaced in one step. Write to a local folder, "
            "then copy it."
        )
    target = pathlib.Path(folder).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise InputError.at(target, None, "it is a file", "a folder to write", "Choose another name")
    foreign = (
        sorted(p.name for p in target.iterdir() if p.is_dir() or not ours(p.name)) if target.exists() else []
    )
    if foreign:
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        problem = f"it holds files that are not an exported model's: {shown}"
        raise InputError.at(
            target, None, problem, "a new folder or an earlier export", "Choose another folder"
        )
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
