"""What is written down beside labels: versions, dates, paths, and how two descriptions differ."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import sys
from collections.abc import Mapping
from typing import Any

from inranker_jax import manifest

_PACKAGES = ("pyarrow", "torch", "transformers", "sentence-transformers")


def difference(old: Mapping[str, Any], new: Mapping[str, Any], key: str = "") -> list[str]:
    """Lines `- key: old` and `+ key: new` for what differs between two JSON objects."""
    lines: list[str] = []
    for name in sorted({*old, *new}):
        one, other, place = old.get(name), new.get(name), f"{key}.{name}" if key else name
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            lines.extend(difference(one, other, place))
        elif one != other:
            lines.extend([f"- {place}: {one}", f"+ {place}: {other}"])
    return lines


def versions() -> dict[str, str]:
    """Versions of the packages that decide labels."""
    found = manifest.versions()
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def provenance() -> dict[str, Any]:
    """When, by which command and with which versions a teacher labelled first."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"added": now, "command": sys.argv, "versions": versions()}


def absolute(path: str) -> str:
    """A path, or a comma-separated list of paths, from the root; remote ones stay as they are."""
    parts = path.split(",")
    return ",".join(part if "://" in part else os.path.abspath(os.path.expanduser(part)) for part in parts)
