"""The arrays of a T5X checkpoint by name, each read when it is asked for.

T5X's own files are msgpack: a tree whose leaves are arrays, or descriptions of TensorStore arrays beside the file.
Orbax keeps all arrays in TensorStore, as one folder each (zarr) or together (OCDBT), and lists them in msgpack
(old) or JSON (`_METADATA`). The optimizer's state is never read.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from inranker_jax.checkpoints.t5x_folders import (
    OCDBT_MANIFEST,
    ORBAX_INDEX,
    STEP_NAME,
    Files,
    Location,
    open_folder,
)
from inranker_jax.errors import InputError

PARAMETERS = "target"
STEP = "state/step"
# Older files are of TensorFlow, or of Flax before T5X had its own.
VERSIONS = (2, 3)
_PLACEHOLDER = "PLACEHOLDER://"
_CHUNKED = "__msgpack_chunked_array__"
_AGAIN = "Copy the whole folder of the step again"
# What msgpack puts before the contents of an extension type: how many bytes, by the first of them.
_EXTENSION_HEADERS = {0xC7: 3, 0xC8: 4, 0xC9: 6}


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One array of a checkpoint, not read yet.

    Attributes:
      shape: its shape, as stored.
      read: returns it in float32.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, apart from the optimizer's state.

    Attributes:
      arrays: the parameters by their paths, such as "encoder/encoder_norm/scale".
      step: the number of optimizer steps behind it, or None where it does not say.
      place: for messages.
    """

    arrays: Mapping[str, StoredArray]
    step: int | None
    place: str


@dataclasses.dataclass(frozen=True)
class _External:
    """An array in TensorStore: its folder's name, its driver and the shape that the index gives, if any."""

    name: str
    driver: str = "zarr"
    shape: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class _Node:
    """A value in a msgpack file: the span of its bytes, and its entries where it is a map."""

    start: int
    end: int
    entries: dict[str, _Node] | None = None


def open_checkpoint(location: Location) -> Checkpoint:
    """Opens every parameter of a checkpoint and reads none.

    Args:
      location: see `t5x_folders.locate`.

    Raises:
      InputError: the index is damaged or of another kind, or arrays that it names are not there.
    """
    files = open_folder(location.folder)
    if location.index == ORBAX_INDEX:
        leaves: dict[str, Any] = _orbax_leaves(files, location.place)
    else:
        leaves = _msgpack_leaves(files, location)
    wanted = {
        name: leaf for name, leaf in leaves.items() if name.startswith(f"{PARAMETERS}/") or name == STEP
    }
    opened = _open_external(
        files, {name: leaf for name, leaf in wanted.items() if isinstance(leaf, _External)}
    )
    arrays = {
        name.removeprefix(f"{PARAMETERS}/"): opened.get(name, leaf)
        for name, leaf in wanted.items()
        if name != STEP and (name in opened or isinstance(leaf, StoredArray))
    }
    return Checkpoint(arrays, _step(opened.get(STEP, wanted.get(STEP)), location), location.place)


def _step(stored: Any, location: Location) -> int | None:
    if isinstance(stored, StoredArray):
        stored = stored.read()
    if stored is not None:
        return int(np.asarray(stored).reshape(()))
    name = STEP_NAME.fullmatch(location.near[0].rpartition("/")[2])
    return int(name[1]) if name else None


# ---- the index -----------------------------------------------------------------------------------------------


def _orbax_leaves(files: Files, place: str) -> dict[str, _External]:
    text = files.read(ORBAX_INDEX)
    try:
        index = json.loads(text or b"")
        entries = index["tree_metadata"].values()
        keys = [[str(key["key"]) for key in entry["key_metadata"]] for entry in entries]
        present = [not entry["value_metadata"].get("skip_deserialize", False) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError.at(
            place, None, f"not an index of Orbax ({error!r})", "JSON with tree_metadata", _AGAIN
        ) from error
    driver = "zarr3" if index.get("use_zarr3") else "zarr"
    return {
        "/".join(path): _External(".".join(path), driver)
        for path, there in zip(keys, present, strict=True)
        if there
    }


def _msgpack_leaves(files: Files, location: Location) -> dict[str, Any]:
    """Path -> `_External`, `StoredArray` or a small value, for everything but the optimizer's state."""
    import msgpack

    contents = files.read(location.index) or b"" if "://" in location.folder else None

    def open_index() -> BinaryIO:
        if contents is not None:
            return io.BytesIO(contents)
        return (pathlib.Path(location.folder) / location.index).open("rb")

    with open_index() as file:
        if file.read(21) == b"model_checkpoint_path":
            raise InputError.at(
                location.place,
                None,
                "it belongs to a TensorFlow checkpoint",
                "a checkpoint of T5X",
                "Convert it with T5X's scripts/convert_tf_checkpoint.py, or take the model from the Hugging Face hub",
            )
        file.seek(0)
        try:
            root = _walk(msgpack.Unpacker(file, max_buffer_size=2**32 - 1))
        except (ValueError, msgpack.exceptions.UnpackException, UnicodeDecodeError) as error:
            problem = f"not msgpack, or cut off ({type(error).__name__}: {error})"
            raise InputError.at(
                location.place, None, problem, "a checkpoint of T5X or Flax", _AGAIN
            ) from error
    return _leaves(_state_of(root, open_index, location.place), open_index)


def _walk(unpacker: Any) -> _Node:
    """The spans of a map's values, without decoding them; a ValueError where no map begins."""
    start = unpacker.tell()
    entries: dict[str, _Node] = {}
    for _ in range(unpacker.read_map_header()):
        key = str(unpacker.unpack())
        before = unpacker.tell()
        try:
            entries[key] = _walk(unpacker)
        except ValueError:
            if unpacker.tell() != before:  # the error is of something within
                raise
            unpacker.skip()
            entries[key] = _Node(before, unpacker.tell())
    return _Node(start, unpacker.tell(), entries)


def _decode(node: _Node, open_index: Callable[[], BinaryIO]) -> Any:
    from flax import serialization

    with open_index() as file:
        file.seek(node.start)
        return serialization.msgpack_restore(file.read(node.end - node.start))


def _state_of(root: _Node, open_index: Callable[[], BinaryIO], place: str) -> _Node:
    """The map of `target` and `state`: at the root where Orbax or Flax wrote it, else below `optimizer`."""
    entries = root.entries or {}
    if "version" in entries and (version := _decode(entries["version"], open_index)) not in VERSIONS:
        raise InputError.at(
            place,
            None,
            f"its format has version {version}",
            f"version {' or '.join(map(str, VERSIONS))}",
            "Save it again with a current T5X",
        )
    state = entries.get("optimizer", root)
    if PARAMETERS not in (state.entries or {}):
        found = ", ".join(state.entries or {}) or "nothing"
        raise InputError.at(
            place, None, f"it has no `{PARAMETERS}`, only {found}", "parameters as T5X saves them", _AGAIN
        )
    return state


def _leaves(state: _Node, open_index: Callable[[], BinaryIO]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def visit(node: _Node, path: str) -> None:
        if path.startswith("state/") and path != STEP:
            return
        if node.entries is None or _CHUNKED in node.entries or node.entries.keys() >= {"driver", "kvstore"}:
            leaf = _leaf(node, open_index)
            if leaf is not None:
                found[path] = leaf
            return
        for name, child in node.entries.items():
            visit(child, f"{path}/{name}" if path else name)

    visit(state, "")
    return found


def _leaf(node: _Node, open_index: Callable[[], BinaryIO]) -> Any:
    """An array in the file or beside it, or a small value; None where nothing is stored."""
    entries = node.entries or {}
    if _CHUNKED in entries:
        sizes = _decode(entries["shape"], open_index)
        return StoredArray(tuple(sizes[key] for key in sorted(sizes, key=int)), _inline(node, open_index))
    if entries:
        spec = _decode(node, open_index)
        path = spec["kvstore"].get("path") or spec.get("path") or ""  # at the root before TensorStore 0.1.14
        shape = spec.get("metadata", {}).get("shape")
        name = path.rstrip("/").rpartition("/")[2]
        return _External(name, spec["driver"], None if shape is None else tuple(shape))
    shape = _inline_shape(node, open_index)
    if shape is not None:
        return StoredArray(shape, _inline(node, open_index))
    value = _decode(node, open_index)
    if isinstance(value, str) and value.startswith(_PLACEHOLDER):
        return _External(value.removeprefix(_PLACEHOLDER))
    return value


def _inline_shape(node: _Node, open_index: Callable[[], BinaryIO]) -> tuple[int, ...] | None:
    """The shape of an array in the file from its first bytes, or None where the value is no array.

    Flax stores an array as extension type 1 with the contents (shape, name of the dtype, bytes).
    """
    import msgpack

    with open_index() as file:
        file.seek(node.start)
        head = file.read(min(node.end - node.start, 512))
    first = head[0]
    if first not in _EXTENSION_HEADERS and not 0xD4 <= first <= 0xD8:
        return None
    size = _EXTENSION_HEADERS.get(first, 2)
    if head[size - 1] != 1:
        return None
    unpacker = msgpack.Unpacker()
    unpacker.feed(head[size:])
    unpacker.read_array_header()
    return tuple(unpacker.unpack())


def _inline(node: _Node, open_index: Callable[[], BinaryIO]) -> Callable[[], np.ndarray]:
    return lambda: _float32(np.asarray(_decode(node, open_index)))


# ---- arrays in TensorStore -----------------------------------------------------------------------------------


def _open_external(files: Files, leaves: Mapping[str, _External]) -> dict[str, StoredArray]:
    """Opens arrays, all at once, and makes sure that every one is there in full."""
    if not leaves:
        return {}
    import tensorstore as ts

    together = files.has(OCDBT_MANIFEST)
    pending = {}
    for name, leaf in leaves.items():
        kvstore = files.store(leaf.name)
        if together:
            kvstore = {"driver": "ocdbt", "base": files.store(""), "path": f"{leaf.name}/"}
        pending[name] = ts.open({"driver": leaf.driver, "kvstore": kvstore}, open=True, read=True)
    opened: dict[str, Any] = {}
    problems = []
    for name, future in pending.items():
        try:
            opened[name] = future.result()
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {_first_sentence(error)}")
    listings = {name: store.kvstore.list() for name, store in opened.items() if _counts_chunks(store)}
    for name, store in opened.items():
        shape = leaves[name].shape
        if shape is not None and shape != tuple(store.shape):
            problems.append(f"{name}: shape {tuple(store.shape)}, where the index says {shape}")
        if name in listings:
            problems.extend(_missing_chunks(name, store, listings[name].result()))
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(
            f"{files.folder}: {len(problems)} of {len(leaves)} arrays cannot be read:{shown}{more}\n"
            f"Expected the folder of each array beside the index. {_AGAIN}."
        )
    return {
        name: StoredArray(tuple(store.shape), functools.partial(_read, store))
        for name, store in opened.items()
    }


def _counts_chunks(store: Any) -> bool:
    """Whether the writer stored every chunk, so that one that is not there was lost rather than zero."""
    return store.fill_value is None and store.spec().to_json()["driver"] == "zarr"


def _missing_chunks(name: str, store: Any, keys: list[bytes]) -> list[str]:
    chunks = store.spec().to_json()["metadata"]["chunks"]
    expected = math.prod(math.ceil(size / chunk) for size, chunk in zip(store.shape, chunks, strict=True))
    found = sum(not key.startswith(b".z") for key in keys)
    return [] if found >= expected else [f"{name}: {expected - found} of its {expected} chunks are missing"]


def _read(store: Any) -> np.ndarray:
    return _float32(store.read().result())


def _float32(array: np.ndarray) -> np.ndarray:
    # Version 2 stored the bits of bfloat16 as uint16, which TensorStore had no name for.
    array = array.view(jnp.bfloat16) if array.dtype == np.uint16 else array
    return array if array.dtype.kind in "iu" else array.astype(np.float32, copy=False)


def _first_sentence(error: Exception) -> str:
    return str(error).partition(" [")[0]
