"""`manifest.json` of a run: what decides its result, and what each session ran on; and `config.gin`."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from typing import Any

import jax

from inranker_jax import paths
from inranker_jax.errors import InputError

_PACKAGES = (
    "inranker_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tokenizers",
    "seqio",
    "tensorflow",
    "bm25s",
    "PyStemmer",
    "pytrec-eval-terrier",
)


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result, Python's included."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(model_dir: str, identity: Mapping[str, Any], mesh: jax.sharding.Mesh, gin_config: str) -> None:
    """Writes `manifest.json` and `config.gin`, or checks the identity of a run that goes on.

    Args:
      model_dir: the run's folder.
      identity: what must not change between sessions of one run: data, seeds, batch, model, contract.
      mesh: the device mesh of this session; it may differ from an earlier session's.
      gin_config: the effective gin configuration.

    Raises:
      InputError: the folder holds a run with another identity; the message shows what differs.
    """
    folder = paths.of(model_dir)
    path = folder / "manifest.json"
    stored = json.loads(paths.read(path)) if path.exists() else None
    canonical = json.loads(json.dumps(identity))
    if stored and stored["identity"] != canonical:
        lines = "\n".join(_difference(stored["identity"], canonical))
        raise InputError(
            f"{model_dir} holds a run with other settings (- that run, + this one):\n{lines}\n"
            "Resume it with its own settings (config.gin beside it), or choose another --output_dir."
        )
    if jax.process_index() != 0:
        return
    session = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": versions(),
        "mesh": dict(mesh.shape),
        "devices": sorted({device.device_kind for device in mesh.devices.flat}),
        "processes": jax.process_count(),
    }
    sessions = [*(stored["sessions"] if stored else []), session]
    paths.write(path, json.dumps({"identity": canonical, "sessions": sessions}, indent=1, ensure_ascii=False))
    paths.write(folder / "config.gin", gin_config)


def _difference(old: Any, new: Any, key: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [
            line for k in keys for line in _difference(old.get(k), new.get(k), f"{key}.{k}" if key else k)
        ]
    return [] if old == new else [f"- {key}: {old}", f"+ {key}: {new}"]
