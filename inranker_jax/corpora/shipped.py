"""The collections that ship with the package."""

from __future__ import annotations

import pathlib

from inranker_jax import paths
from inranker_jax.errors import InputError, did_you_mean

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "collections"


def find_shipped(name: str) -> str:
    """A path as given where it exists, else below the shipped collections (`python_docs/vocabulary`).

    Of a remote path the copy on this machine.

    Raises:
      InputError: it is in neither place.
    """
    if paths.is_remote(name):
        return str(paths.local_copy(name))
    if pathlib.Path(name).exists():
        return name
    if (FOLDER / name).exists():
        return str(FOLDER / name)
    shipped = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
    raise InputError(
        f"no file or folder {name!r}, nor a shipped collection of that name.{did_you_mean(name, shipped)} "
        f"Shipped: {', '.join(shipped)}."
    )
