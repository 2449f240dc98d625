"""Hugging Face folders: `config.json`, safetensors, tokenizer files and our scoring contract."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from inranker_jax import hub
from inranker_jax.checkpoints import LoadedModel, name_maps, places
from inranker_jax.checkpoints.folders import replaced_folder
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.models import Params, T5Config, abstract_params, check_params, trees

if TYPE_CHECKING:
    from inranker_jax.prompts import ScoringContract, Tokenizer

CONFIG = "config.json"
CONTRACT = "inranker_contract.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

_HUB_FILES = [
    CONFIG,
    CONTRACT,
    "*.safetensors",
    INDEX,
    "spiece.model",
    "tokenizer*.json",
    "special_tokens_map.json",
]
# What a folder that `save` may replace can contain, apart from shards.
_EXPORT_FILES = frozenset(
    (CONFIG, CONTRACT, WEIGHTS, INDEX, *TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json")
)
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def load(
    path_or_hub_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    place: Callable[[str, np.ndarray], Any] | None = None,
) -> LoadedModel:
    """Reads a T5 model in Hugging Face's layout.

    Tensors are read one at a time, so that the host never holds the model twice.

    Args:
      path_or_hub_id: a folder, or the id of a model on the hub.
      revision: branch, tag or commit on the hub.
      cache_dir: where downloads are kept.
      place: puts one parameter where it belongs, from its path in our tree ("encoder/encoder_norm/scale") and
        its float32 values on the host; by default on the default device.

    Returns:
      The model, with float32 parameters. Whether the head is tied is decided by the weights: files written by
      transformers 5 call every T5 tied. A folder without a contract of its own gets the one of its name.

    Raises:
      InputError: for a folder or id that does not exist, another architecture, and weights that do not fit.
    """
    from inranker_jax.prompts import ScoringContract, Tokenizer, preset_for_model

    source = os.fspath(path_or_hub_id)
    folder = _resolve(source, revision, cache_dir)
    config = _read_config(folder / CONFIG)
    with _open_weights(folder) as tensors:
        config = _decide_tying(config, tensors)
        params = read_params(config, tensors, place)
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = Tokenizer.from_pretrained(folder) if has_tokenizer else None
    contract = preset_for_model(source)
    if (folder / CONTRACT).is_file():
        contract = ScoringContract.from_dict(read_json(folder / CONTRACT))
    return LoadedModel(config, params, tokenizer, contract, source)


def check(path_or_hub_id: str) -> None:
    """Looks whether there is a model that `load` could read, without reading or fetching weights.

    Raises:
      InputError: as `load`, for a folder or id that does not exist, another architecture, and missing weights.
    """
    import huggingface_hub

    if not pathlib.Path(path_or_hub_id).expanduser().exists() and hub.HUB_ID.fullmatch(path_or_hub_id):
        with hub.errors_told(path_or_hub_id):
            config = huggingface_hub.hf_hub_download(path_or_hub_id, CONFIG)
        _read_config(pathlib.Path(config))
        return
    folder = _resolve(path_or_hub_id, None, None)
    _read_config(folder / CONFIG)
    if not _has_weights(folder):
        raise _no_weights(folder)


def _read_config(path: pathlib.Path) -> T5Config:
    values = read_json(path)
    try:
        return T5Config.from_hf_dict(values)
    except InputError as error:
        problem = str(error).removeprefix(CONFIG).removeprefix(":").lstrip()
        raise type(error)(f"{path}: {problem}") from None


def save(
    folder: str | os.PathLike[str],
    config: T5Config,
    params: Params,
    tokenizer: Tokenizer | None,
    contract: ScoringContract | None,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes a folder that transformers, and everything built on it, loads as `T5ForConditionalGeneration`.

    The folder appears complete or not at all; an earlier export of that name stays until the new one is on
    disk.

    Args:
      folder: where to write. It may hold an earlier export, which is replaced, but nothing else.
      config: the architecture.
      params: its parameters.
      tokenizer: written too, unless None.
      contract: written as `inranker_contract.json`, unless None.
      dtype: "float32" or "bfloat16", of the stored tensors.
      max_shard_bytes: weights beyond this size are divided over several files with an index. One tensor is
        never divided.

    Raises:
      InputError: for another dtype, parameters of another architecture, or a folder with files in it that are
        not an export's.
    """
    if dtype not in DTYPES:
        raise InputError(
            f"dtype is {dtype!r}. Expected one of {', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}"
        )
    check_params(config, params)
    with replaced_folder(folder, _is_export_file) as new:
        settings = config.to_hf_dict() | {"dtype": dtype, "torch_dtype": dtype}
        write_json(new / CONFIG, settings)
        _write_weights(new, config, params, dtype, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(new)
        if contract is not None:
            write_json(new / CONTRACT, contract.to_dict())


class Tensors:
    """Tensors of one or several safetensors files by name, read when asked for."""

    def __init__(self, files: Mapping[str, Any], place: str) -> None:
        """Takes open files of `safetensors.safe_open`, by the name of each tensor; `place` is for errors."""
        self._files = files
        self.place = place
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32."""
        return self._files[name].get_tensor(name).astype(np.float32, copy=False)


def read_params(
    config: T5Config, tensors: Tensors, place: Callable[[str, np.ndarray], Any] | None = None
) -> Params:
    """Builds our parameter tree from Hugging Face tensors.

    Args:
      config: the architecture, with the right `tie_word_embeddings`.
      tensors: all tensors of the checkpoint.
      place: see `load`.

    Returns:
      The tree of `models.init_params`.

    Raises:
      InputError: for missing, unexpected or mis-shaped tensors, with both lists in the message.
    """
    sources = name_maps.expand(name_maps.HUGGINGFACE, config)
    wanted = trees.flatten(abstract_params(config))
    embedding = _embedding_name(tensors)
    stored = {path: embedding if s.name == "shared.weight" else s.name for path, s in sources.items()}
    expected = {
        stored[path]: tuple(reversed(wanted[path].shape)) if s.transpose else tuple(wanted[path].shape)
        for path, s in sources.items()
    }
    redundant = {"shared.weight", *name_maps.HUGGINGFACE_EMBEDDING_ALIASES, *name_maps.HUGGINGFACE_IGNORED}
    if config.tie_word_embeddings:
        redundant.add(name_maps.HUGGINGFACE_HEAD)
    found = {n: shape for n, shape in tensors.shapes.items() if n in expected or n not in redundant}
    difference = trees.mismatch(expected, found)
    if difference:
        raise InputError(
            f"{tensors.place}: the tensors do not fit config.json. Expected (-) and found (+):\n"
            f"{difference}\nUse the config.json that was saved with these weights. Only T5, T5 v1.1, FLAN-T5 "
            "and mT5 can be read."
        )
    _check_copies(tensors, embedding)
    flat = {}
    for path, source in sources.items():
        value = tensors.read(stored[path])
        value = value.T if source.transpose else value
        # The transfer transposes several times faster than NumPy.
        flat[path] = jax.device_put(value) if place is None else place(path, np.ascontiguousarray(value))
    return trees.unflatten(flat)


def _embedding_name(tensors: Tensors) -> str:
    names = ("shared.weight", *name_maps.HUGGINGFACE_EMBEDDING_ALIASES, name_maps.HUGGINGFACE_HEAD)
    return next((name for name in names if name in tensors), "shared.weight")


def _check_copies(tensors: Tensors, embedding: str) -> None:
    """Raises InputError where encoder and decoder do not share one embedding, which we cannot represent."""
    for name in name_maps.HUGGINGFACE_EMBEDDING_ALIASES:
        if name in tensors and name != embedding and not _equal(tensors, name, embedding):
            raise InputError(
                f"{tensors.place}: {name} differs from {embedding}. Expected one embedding for encoder and "
                "decoder, as in every T5 model."
            )


def _decide_tying(config: T5Config, tensors: Tensors) -> T5Config:
    """Corrects `tie_word_embeddings` from the weights, and leaves the scaling of outputs as configured."""
    head, embedding = name_maps.HUGGINGFACE_HEAD, _embedding_name(tensors)
    if head not in tensors or embedding == head:
        return dataclasses.replace(config, tie_word_embeddings=True)
    if config.tie_word_embeddings and not _equal(tensors, head, embedding):
        return dataclasses.replace(config, tie_word_embeddings=False)
    return config


def _equal(tensors: Tensors, left: str, right: str) -> bool:
    same_shape = tensors.shapes[left] == tensors.shapes[right]
    return same_shape and np.array_equal(tensors.read(left), tensors.read(right))


@contextlib.contextmanager
def _open_weights(folder: pathlib.Path) -> Iterator[Tensors]:
    """Opens the one safetensors file of a folder, or all shards of its index."""
    import safetensors

    weight_map: dict[str, str] | None = None
    place = folder / WEIGHTS
    if not place.is_file():
        place = folder / INDEX
        if not place.is_file():
            raise _no_weights(folder)
        weight_map = read_json(place).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError.at(
                place, None, "it has no weight_map", "tensor names and the file of each", _AGAIN
            )
    with contextlib.ExitStack() as stack:
        opened: dict[str, Any] = {}
        for name in [WEIGHTS] if weight_map is None else sorted(set(weight_map.values())):
            try:
                file = safetensors.safe_open(folder / name, framework="numpy")
                opened[name] = stack.enter_context(file)
            except (OSError, safetensors.SafetensorError) as error:
                expected = "a safetensors file" + (f" named by {INDEX}" if weight_map else "")
                raise InputError.at(
                    folder / name, None, f"cannot read it ({error})", expected, _AGAIN
                ) from error
        inside = {tensor: file for file in opened.values() for tensor in file.keys()}  # noqa: SIM118
        absent = sorted(set(weight_map or ()) - set(inside))
        if absent:
            names = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
            raise InputError.at(
                place, None, f"its files lack the tensors {names}", "all of weight_map", _AGAIN
            )
        yield Tensors(inside, str(place))


_AGAIN = "Download or export the model again"


def _no_weights(folder: pathlib.Path) -> InputError:
    problem = f"it has neither {WEIGHTS} nor {INDEX}"
    torch_only = sorted(p.name for p in folder.glob("pytorch_model*"))
    if not torch_only:
        return InputError.at(folder, None, problem, "a Hugging Face model folder", "Check the path")
    remedy = _convert(str(folder))
    return InputError.at(folder, None, f"{problem}, only {torch_only[0]}", "safetensors", remedy)


def _convert(source: str) -> str:
    return (
        "Pickled weights are not read. Convert them once where torch is installed: "
        "`from transformers import T5ForConditionalGeneration as T5; "
        f"T5.from_pretrained({source!r}).save_pretrained('converted')`, and copy the tokenizer files"
    )


def _resolve(source: str, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """The local folder of a path or hub id, downloaded when needed."""
    folder = pathlib.Path(source).expanduser()
    if folder.is_dir():
        places.check_folder(source)
        return folder
    if folder.exists():
        raise InputError.at(
            source, None, "it is a file", "the folder of a model", "Give the folder that holds it"
        )
    if not hub.HUB_ID.fullmatch(source):
        near = did_you_mean(folder.name, _names_beside(folder))
        raise InputError(
            f"{source}: no such folder. Expected a model's folder or a Hugging Face hub id.{near}"
        )
    return _download(source, revision, cache_dir)


def _names_beside(folder: pathlib.Path) -> list[str]:
    return [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []


def _download(hub_id: str, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    import huggingface_hub

    with hub.errors_told(hub_id, revision):
        path = huggingface_hub.snapshot_download(
            hub_id,
            revision=revision,
            cache_dir=None if cache_dir is None else pathlib.Path(cache_dir),
            allow_patterns=_HUB_FILES,
        )
    folder = pathlib.Path(path)
    if not _has_weights(folder):
        raise InputError(f"{hub_id}: the model on the hub has no safetensors. {_convert(hub_id)}.")
    return folder


def _has_weights(folder: pathlib.Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def _write_weights(
    folder: pathlib.Path, config: T5Config, params: Params, dtype: str, max_shard_bytes: float
) -> None:
    """Writes the tensors, one shard in memory at a time, and the index where there is more than one."""
    import safetensors.numpy

    flat = trees.flatten(params)
    sources = name_maps.expand(name_maps.HUGGINGFACE, config)
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    shards = _shards({path: flat[path].size * itemsize for path in sources}, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, paths in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for path in paths:
            value = np.asarray(flat[path]).astype(DTYPES[dtype])
            value = value.T if sources[path].transpose else value
            tensors[sources[path].name] = np.ascontiguousarray(value)
        # transformers refuses files whose metadata do not name a framework.
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
        # The library keeps other users out; weights get the permissions of the folder's other files.
        (folder / file).chmod(folder.stat().st_mode & 0o666)
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = sum(flat[path].size * itemsize for path in sources)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(sizes: Mapping[str, int], limit: float) -> list[list[str]]:
    """Divides names, in order, into groups of at most `limit` bytes or of one name.

    >>> _shards({"a": 3, "b": 3, "c": 9, "d": 1}, 6)
    [['a', 'b'], ['c'], ['d']]
    """
    groups: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not groups or used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def _is_export_file(name: str) -> bool:
    return name in _EXPORT_FILES or bool(_SHARD.fullmatch(name))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; an InputError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        expected = "a Hugging Face model folder, which has this file"
        raise InputError.at(path, None, "no such file", expected, "Check the path") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        line = getattr(error, "lineno", None)
        raise InputError.at(path, line, f"not valid JSON ({error})", "a JSON object", _AGAIN) from error
    if not isinstance(value, dict):
        raise InputError.at(path, None, f"it holds a {type(value).__name__}", "a JSON object", _AGAIN)
    return value


def write_json(path: pathlib.Path, value: Mapping[str, Any] | Iterable[Any]) -> None:
    """Writes a JSON file as people like to read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
