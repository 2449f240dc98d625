"""What is written down beside labels: versions, dates, paths, and how two descriptions differ."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from inranker_jax import manifest, paths
from inranker_jax.corpora.label_folder import INFO
from inranker_jax.errors import InputError

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


def described(settings: Mapping[str, Any], places: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of lists as people tell them apart: each input by its path, where that is known, and its contents.

    >>> described({"corpus": {"fingerprint": "0123456789abcdef", "titles": True}}, {"corpus": {"path": "/c.jsonl"}})
    {'corpus': {'input': '/c.jsonl (contents 0123456789ab)', 'titles': True}}

    Args:
      settings: what decides the lists.
      places: name of an input -> {"path": its path}, as in labels.json.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found[name] = value
        if isinstance(value, Mapping) and value.get("fingerprint"):
            place = (places.get(name) or {}).get("path", "unknown path")
            contents = f"{place} (contents {value['fingerprint'][:12]})"
            found[name] = {"input": contents, **{k: v for k, v in value.items() if k != "fingerprint"}}
    return found


def check_same(
    folder: Any,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    new_places: Mapping[str, Any],
    remedy: str,
) -> None:
    """Looks whether a folder's lists were made from what is given now.

    Args:
      folder: the label folder.
      old: what decided its lists.
      new: what decides them now.
      new_places: the paths of today's inputs, as in `described`; those of then are in labels.json, if it is there.
      remedy: what the user can do.

    Raises:
      InputError: they differ; names each input and setting that does.
    """
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if not changed:
        return
    places: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        places = json.loads(paths.read(folder / INFO))
    before, now = described(old, places), described(new, new_places)
    lines = [line for name in changed for line in difference({name: before.get(name)}, {name: now.get(name)})]
    shown = "\n".join(lines)
    raise InputError(
        f"{folder} has lists of something else: {', '.join(changed)} (- there, + now):\n{shown}\n{remedy}"
    )


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
