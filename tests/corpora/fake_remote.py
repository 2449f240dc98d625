"""`gs://bucket/...` on this machine: `etils.epath` with a backend that keeps the bucket in a folder."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from etils.epath import backend, gpath


class FolderBackend(backend._OsPathBackend):  # type: ignore[misc]
    """Maps `gs://` to a folder and counts what is opened."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.opened: list[str] = []

    def local(self, path: Any) -> str:
        name = os.fspath(path)
        return str(self.root / name.removeprefix("gs://")) if name.startswith("gs://") else name

    def remote(self, path: str) -> str:
        return "gs://" + os.path.relpath(path, self.root)

    def open(self, path: Any, mode: str) -> Any:
        self.opened.append(os.fspath(path))
        return super().open(self.local(path), mode)

    def exists(self, path: Any) -> bool:
        return super().exists(self.local(path))

    def isdir(self, path: Any) -> bool:
        return super().isdir(self.local(path))

    def listdir(self, path: Any) -> list[str]:
        return super().listdir(self.local(path))

    def glob(self, path: Any) -> list[str]:
        return [self.remote(found) for found in super().glob(self.local(path))]

    def walk(self, top: Any, **keywords: Any) -> Iterator[Any]:
        for folder, folders, names in super().walk(self.local(top), **keywords):
            yield self.remote(folder), folders, names


def install(monkeypatch: pytest.MonkeyPatch, root: pathlib.Path) -> FolderBackend:
    """Serves `gs://` paths from `root` until the test ends."""
    fake = FolderBackend(root)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", fake)
    return fake
