"""Writes checkpoints that T5X reads: msgpack of version 3 with zarr arrays beside it."""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from inranker_jax import paths
from inranker_jax.checkpoints import huggingface, t5x_settings
from inranker_jax.checkpoints.t5x import LAYER
from inranker_jax.checkpoints.t5x_folders import INDEX
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.models import Params, T5Config, check_params, trees

if TYPE_CHECKING:
    from inranker_jax.prompts import ScoringContract, Tokenizer

VERSION = 3
GIN = "model.gin"
# T5X's own size: small enough for object stores, large enough not to make too many files.
CHUNK_BYTES = 64 * 2**20
# What T5X's network fixes in code, so that a checkpoint cannot say otherwise.
_FIXED = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}


def save(
    folder: str | os.PathLike[str],
    config: T5Config,
    params: Params,
    step: int,
    tokenizer: Tokenizer | None = None,
    contract: ScoringContract | None = None,
    dtype: str = "float32",
    scan_layers: bool = False,
) -> Any:
    """Writes `FOLDER/checkpoint_STEP`, and beside it what the parameters do not say.

    The step appears complete or not at all: a remote one has no index until the rest is there. It has no optimizer
    state, like T5X's own checkpoints of an `InferenceState`; T5X fine-tunes from it with
    `utils.RestoreCheckpointConfig.fallback_to_scratch = True`.

    Args:
      folder: T5X's MODEL_DIR, local or remote; it may hold other steps of the same model.
      config: the architecture.
      params: its parameters.
      step: T5X goes on counting from here, so its TRAIN_STEPS must be larger.
      tokenizer: its files are written into `folder`, unless None.
      contract: written as `inranker_contract.json`, unless None.
      dtype: "float32" or "bfloat16", of the stored arrays.
      scan_layers: lay the arrays out as T5X's `scalable_t5` does: layers stacked, heads apart.

    Returns:
      The step's folder, as `paths.of` gives it.

    Raises:
      InputError: another dtype, a model that T5X's networks do not have, or a folder with
        another model in it.
    """
    if dtype not in huggingface.DTYPES:
        raise InputError(
            f"dtype is {dtype!r}. Expected one of {', '.join(huggingface.DTYPES)}."
            f"{did_you_mean(dtype, huggingface.DTYPES)}"
        )
    if step < 0:
        raise InputError(f"step is {step}. Expected 0 or more.")
    _check_expressible(config)
    check_params(config, params)
    if paths.is_remote(folder):
        return _save_remote(
            os.fspath(folder).rstrip("/"), config, params, step, tokenizer, contract, dtype, scan_layers
        )
    root = pathlib.Path(folder).expanduser().absolute()
    _check_root(root, config)
    _check_same_kind(root, config, dtype, scan_layers)
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"checkpoint_{step}"
    new = pathlib.Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=root))
    try:
        new.chmod(0o777 & ~_umask())
        _write_step(new, config, params, step, dtype, scan_layers)
        _write_settings(root, config, tokenizer, contract, dtype, scan_layers)
        _swap(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return target


def _save_remote(folder: str, config: T5Config, params: Params, step: int, *rest: Any) -> Any:
    """`save` into a folder of this machine, which knows what describes the remote one, and from there."""
    with tempfile.TemporaryDirectory(prefix="inranker_jax.") as name:
        root = pathlib.Path(name)
        for known in {t5x_settings.CONFIG, GIN} & set(_names(folder)):
            (root / known).write_bytes(paths.read(f"{folder}/{known}"))
        local = save(root, config, params, step, *rest)
        remote = f"{folder}/{local.name}"
        if any(name != INDEX and not name.startswith("target.") for name in paths.names_below(remote)):
            raise InputError.at(remote, None, "it is no checkpoint of T5X", "a name to write", "Move it away")
        for file in root.iterdir():
            if file.is_file():
                paths.upload(file, f"{folder}/{file.name}")
        paths.remove(remote)
        paths.upload(local, remote, marker=INDEX)
    return paths.of(remote)


def _names(folder: str) -> list[str]:
    """Names of the files of a remote folder, not of those below it."""
    paths.check_reachable(folder)
    return [name for name in paths.names_below(folder) if "/" not in name]


def stacked_tree(config: T5Config, params: Params) -> dict[str, Any]:
    """Our parameters as functions that make the arrays of T5X's `scalable_t5`, by their paths.

    Layers are stacked along axis 1, attention kernels have an axis for the heads, and the table of relative
    positions is there once a layer.
    """
    flat = trees.flatten(params)
    groups: dict[str, list[str]] = {}
    for path in flat:
        side, _, rest = path.partition("/")
        layer = LAYER.fullmatch(path)
        if layer:
            groups.setdefault(f"{layer[1]}/{layer[1]}/{layer[3]}", []).append(path)
        elif rest == "relpos_bias/rel_embedding":
            count = config.num_layers if side == "encoder" else config.num_decoder_layers
            groups[f"{side}/{side}/{rest}"] = [path] * count
        else:
            groups[path] = [path]

    def stack(name: str) -> np.ndarray:
        arrays = [np.asarray(flat[path]) for path in groups[name]]
        if groups[name] == [name]:
            return arrays[0]
        heads = (config.num_heads, config.d_kv)
        if "attention/" in name and name.endswith("/kernel"):
            out = name.endswith("/out/kernel")
            arrays = [a.reshape(*heads, -1) if out else a.reshape(len(a), *heads) for a in arrays]
        return np.stack(arrays, axis=1)

    return {name: (lambda name=name: stack(name)) for name in groups}


def _write_step(
    folder: pathlib.Path, config: T5Config, params: Params, step: int, dtype: str, scan_layers: bool
) -> None:
    """Writes one array after the other, and last the index."""
    from flax import serialization

    if scan_layers:
        makers = stacked_tree(config, params)
    else:
        makers = {path: (lambda a=array: np.asarray(a)) for path, array in trees.flatten(params).items()}
    specs = {}
    for path, make in makers.items():
        value = make().astype(huggingface.DTYPES[dtype])
        specs[path] = _write_array(folder, f"target.{path.replace('/', '.')}", value)
    # No `param_states` at all: T5X's loader fails on an empty one.
    state = {"target": trees.unflatten(specs), "state": {"step": np.asarray(step, np.int32)}}
    index = serialization.msgpack_serialize({"version": VERSION, "optimizer": state})
    (folder / INDEX).write_bytes(index)


def _write_array(folder: pathlib.Path, name: str, value: np.ndarray) -> dict[str, Any]:
    import tensorstore as ts

    spec = {
        "driver": "zarr",
        "dtype": str(value.dtype),
        "kvstore": {"driver": "file", "path": f"{name}/"},
        "metadata": {
            "chunks": chunk_shape(value.shape, value.dtype.itemsize),
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(value.shape),
        },
    }
    there = {**spec, "kvstore": {"driver": "file", "path": f"{folder / name}/"}}
    ts.open(there, create=True).result().write(value).result()
    return spec


def chunk_shape(shape: tuple[int, ...], itemsize: int, limit: int = CHUNK_BYTES) -> list[int]:
    """Divides an array evenly into chunks of at most `limit` bytes, along its longest axes.

    >>> chunk_shape((32128, 1024), 4)
    [16064, 1024]
    """
    chunks = list(shape)
    while itemsize * int(np.prod(chunks)) > limit:
        axis = int(np.argmax(chunks))
        factor = next(f for f in range(2, chunks[axis] + 1) if chunks[axis] % f == 0)
        chunks[axis] //= factor
    return chunks


def _write_settings(
    root: pathlib.Path,
    config: T5Config,
    tokenizer: Tokenizer | None,
    contract: ScoringContract | None,
    dtype: str,
    scan_layers: bool,
) -> None:
    huggingface.write_json(root / t5x_settings.CONFIG, config.to_hf_dict() | {"dtype": dtype})
    (root / GIN).write_text(model_gin(config, scan_layers), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(root)
    if contract is not None:
        huggingface.write_json(root / t5x_settings.CONTRACT, contract.to_dict())


def model_gin(config: T5Config, scan_layers: bool = False) -> str:
    """The architecture as a gin file for T5X, to be included after one of its own model files.

    Dropout stays with T5X's macro DROPOUT_RATE.
    """
    activation = t5x_settings.GIN_ACTIVATIONS[config.activation]
    values = {theirs: getattr(config, ours) for ours, theirs in t5x_settings.GIN_FIELDS.items()}
    del values["dropout_rate"]
    values["mlp_activations"] = (activation, "linear") if config.gated else (activation,)
    network = "scalable_t5" if scan_layers else "t5"
    return "\n".join(
        [
            f"# The architecture of this checkpoint: include it after a model file of t5x/examples/{network}.",
            "from __gin__ import dynamic_registration",
            f"from t5x.examples.{network} import network",
            "",
            *(f"network.T5Config.{name} = {value!r}" for name, value in values.items()),
            "",
        ]
    )


def _check_expressible(config: T5Config) -> None:
    """Raises InputError where T5X's networks would compute something else with these parameters."""
    wrong = [
        f"{name} is {getattr(config, name)}, there {value}"
        for name, value in _FIXED.items()
        if getattr(config, name) != value
    ]
    if config.scale_decoder_outputs != config.tie_word_embeddings:
        wrong.append(
            f"scale_decoder_outputs is {config.scale_decoder_outputs} with tie_word_embeddings "
            f"{config.tie_word_embeddings}, there both or neither"
        )
    if config.activation not in t5x_settings.GIN_ACTIVATIONS:
        known = ", ".join(t5x_settings.GIN_ACTIVATIONS)
        wrong.append(f"the activation is {config.activation}, there one of {known}")
    if wrong:
        raise InputError(
            f"T5X's networks cannot run this model: {'; '.join(wrong)}. Export it with --format=huggingface."
        )


def _check_root(root: pathlib.Path, config: T5Config) -> None:
    """Raises InputError where the folder is a file, or describes another model than the one to be written."""
    if root.exists() and not root.is_dir():
        raise InputError.at(root, None, "it is a file", "a folder to write", "Choose another name")
    path = root / t5x_settings.CONFIG
    if not path.exists():
        return
    stored = huggingface.read_json(path)
    same: Mapping[str, Any] = {name: stored.get(name) for name in config.to_hf_dict()}
    if same != config.to_hf_dict():
        fields = sorted(name for name, value in config.to_hf_dict().items() if same[name] != value)
        raise InputError.at(
            path,
            None,
            f"it describes another model ({', '.join(fields)} differ)",
            "a new folder or one with other steps of this model",
            "Choose another folder",
        )


def _check_same_kind(root: pathlib.Path, config: T5Config, dtype: str, scan_layers: bool) -> None:
    """Raises InputError where steps beside this one are stored otherwise: the folder describes all of them once."""
    if not (root / GIN).is_file():
        return
    stored = huggingface.read_json(root / t5x_settings.CONFIG).get("dtype")
    if stored != dtype or (root / GIN).read_text(encoding="utf-8") != model_gin(config, scan_layers):
        raise InputError.at(
            root,
            None,
            f"its steps are of dtype {stored}, or their layers are stacked otherwise (see {GIN})",
            "a new folder, or one with steps of the same --dtype and --scan_layers",
            "Choose another folder",
        )


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _swap(new: pathlib.Path, target: pathlib.Path) -> None:
    """Puts `new` in the place of an earlier export of the same step."""
    if not target.exists():
        new.rename(target)
        return
    if not (target / INDEX).is_file():
        raise InputError.at(target, None, "it is no checkpoint of T5X", "a name to write", "Move it away")
    old = target.with_name(f"{new.name}.old")
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old)
