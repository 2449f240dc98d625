"""What every teacher is: pairs in, raw logits out, and an identity by which its labels are stored."""

from __future__ import annotations

import hashlib
import importlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from inranker_jax import hub, paths
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.labeling.pairs import PairText
from inranker_jax.labeling.teachers.spec import TeacherSpec

Chunk = Sequence[PairText]

_DECIDING_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")
# What a trainer leaves beside a model without any influence on its logits.
_NOT_DECIDING = ("README", "training_args", "trainer_state", "optimizer", "scheduler", "rng_state", ".")
_BLOCK = 1 << 20


class Teacher(Protocol):
    """Labels pairs. `open_teacher` makes one.

    Attributes:
      name: how the user calls it.
      identity: JSON-ready; equal identities give equal logits for equal texts. Labels are stored by its hash.
      provenance: JSON-ready; worth knowing, but without influence on the logits: path, device, versions.
    """

    name: str

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def provenance(self) -> dict[str, Any]: ...

    def logits(self, chunks: Iterable[Chunk]) -> Iterator[np.ndarray]:
        """Labels chunks of pairs.

        Args:
          chunks: read one ahead of what is yielded, so that devices do not wait for text.

        Yields:
          For every chunk, in order, float32 [len(chunk), 2]: the raw logits (false, true). They depend on the
          chunk alone.
        """
        ...

    def close(self) -> None:
        """Frees the model's memory."""
        ...


def split_margin(margins: np.ndarray) -> np.ndarray:
    """Turns one logit or score m a pair into the two logits (-m/2, +m/2), whose margin is m.

    >>> split_margin(np.array([3.0])).tolist()
    [[-1.5, 1.5]]
    """
    half = np.asarray(margins, np.float64) / 2
    return np.stack([-half, half], axis=-1).astype(np.float32)


def optional_package(module: str) -> Any:
    """Imports a package of the `teachers` extra.

    Raises:
      InputError: it is not installed; names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"this teacher needs the package {module.replace('_', '-')}, which cannot be imported ({error}). "
            "Run `pip install 'inranker_jax[teachers]'`."
        ) from error


def model_folder(source: str) -> pathlib.Path:
    """The local folder of a Hugging Face model: the folder itself, a copy of a remote one, or the snapshot of a hub id.

    Of a remote one and of the hub's, `hub.NOT_DOWNLOADED` is not fetched.

    Raises:
      InputError: no such folder, or the hub or the bucket has no such model or cannot be read.
      OSError: a store failed on the way.
    """
    if paths.is_remote(source):
        with paths.failures_told(source):
            return paths.local_copy(source, skip=hub.NOT_DOWNLOADED)
    folder = pathlib.Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError.at(source, None, "it is a file", "the folder of a model", "Give the folder")
    if not hub.HUB_ID.fullmatch(source):
        beside = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise InputError(
            f"{source}: no such folder. Expected a model's folder or a Hugging Face hub id."
            f"{did_you_mean(folder.name, beside)}"
        )
    import huggingface_hub

    with hub.errors_told(source):
        return pathlib.Path(
            huggingface_hub.snapshot_download(source, ignore_patterns=list(hub.NOT_DOWNLOADED))
        )


def check_path(spec: TeacherSpec) -> None:
    """Looks whether the path of a teacher is there, where it can only be a local one; reads nothing.

    `NAME/MODEL` may be a model of the hub, so it is left to `check_model`.

    Raises:
      InputError: there is nothing.
    """
    source = spec.path
    path = pathlib.Path(source).expanduser()
    may_be_hub_id = spec.kind != "run" and hub.HUB_ID.fullmatch(source) and not source.startswith((".", "~"))
    if "://" in source or may_be_hub_id or path.exists():
        return
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    raise InputError(
        f"teacher {spec.name!r}: {source}: no such file or folder.{did_you_mean(path.name, beside)} Check the path."
    )


def check_model(spec: TeacherSpec) -> None:
    """Looks whether there is a model of the teacher's kind, without reading weights.

    Of a model on the hub, the file that describes it is fetched, or found in the cache; in a bucket it is looked up.

    Raises:
      InputError: there is nothing, or something else; the hub or the bucket cannot be read.
      OSError: a store failed otherwise.
    """
    if spec.kind == "run":
        return
    if spec.kind == "t5":
        from inranker_jax.labeling.teachers import t5

        t5.check(spec)
        return
    plain = spec.kind == "cross-encoder" or "pooling" in spec.options
    name = "config.json" if plain else "modules.json"
    folder = pathlib.Path(spec.path).expanduser()
    if paths.is_remote(spec.path):
        paths.check_reachable(spec.path)
        with paths.failures_told(spec.path):
            there = paths.is_file(f"{spec.path.rstrip('/')}/{name}")
    elif not folder.exists() and hub.HUB_ID.fullmatch(spec.path):
        import huggingface_hub
        from huggingface_hub import errors

        with hub.errors_told(spec.path):
            try:
                huggingface_hub.hf_hub_download(spec.path, name)
                there = True
            except errors.RemoteEntryNotFoundError:
                there = False
    else:
        there = (model_folder(spec.path) / name).is_file()
    if not there:
        hint = "" if plain else ", or say how the token vectors of a plain encoder are pooled: ?pooling=mean"
        raise InputError.at(spec.path, None, f"it has no {name}", f"a {spec.kind}", f"Check the path{hint}")


def folder_digest(folder: pathlib.Path, subfolders: Iterable[str] = ()) -> str:
    """SHA-256 over the names and bytes of the files that decide a model's outputs: weights, settings, vocabulary.

    Where there are safetensors, pickled weights beside them are left out, as they are not read.

    Args:
      folder: the model's folder; other folders in it, such as a trainer's checkpoints, are not read.
      subfolders: those that are, with everything below them.
    """
    files = [*folder.iterdir(), *(path for name in subfolders for path in (folder / name).rglob("*"))]
    files = sorted(
        path
        for path in set(files)
        if path.suffix in _DECIDING_SUFFIXES and path.is_file() and not path.name.startswith(_NOT_DECIDING)
    )
    safe = {path.parent for path in files if path.suffix == ".safetensors"}
    digest = hashlib.sha256()
    for path in files:
        if path.suffix == ".bin" and path.parent in safe:
            continue
        digest.update(f"{path.relative_to(folder).as_posix()} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, read a MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      InputError: there is no such file, or it is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError.at(path, None, "no such file", "a JSON object", "Check the path") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError.at(
            path, getattr(error, "lineno", None), f"not JSON ({error})", "a JSON object"
        ) from error
    if not isinstance(value, dict):
        raise InputError.at(path, None, f"it holds a {type(value).__name__}", "a JSON object")
    return value


def check_finite(logits: np.ndarray, chunk: Chunk, name: str) -> np.ndarray:
    """Returns `logits`, float [n, 2].

    Raises:
      InputError: some are not finite; names the first such pair.
    """
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=-1))
    if bad.size:
        pair = chunk[int(bad[0])]
        raise InputError(
            f"teacher {name!r} gave the logits {logits[bad[0]].tolist()} for query {pair.query_id!r}, document "
            f"{pair.document_id!r} ({bad.size} of {len(chunk)} pairs are not finite). Check its parameters, or "
            "compute in float32."
        )
    return logits


def strip_pair(pair: PairText) -> tuple[str, str]:
    """The texts as a teacher reads them, which are those that the store's key is made from."""
    return pair.query.strip(), pair.document.strip()
