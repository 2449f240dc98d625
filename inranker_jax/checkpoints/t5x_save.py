"""Writes checkpoints that T5X reads: msgpack of version 3 with zarr arrays beside it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from inranker_jax import paths
from inranker_jax.checkpoints import huggingface, t5x_folders, t5x_settings
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

    The step appears complete or not at all: a remote one has no index until the rest is there. It takes the place of
    an earlier export of the step, of a checkpoint of T5X, or of what an export that broke off left. It has no optimizer
    state, like T5X's own checkpoints of an `InferenceState`; T5X fine-tunes from it with
    `utils.RestoreCheckpointConfig.fallback_to_scratch = True`.

    Args:
      folder: T5X's MODEL_DIR, local or remote; it may hold other steps of the same model. A remote step is first
        written to this machine's folder for temporary files (`TMPDIR`), which needs room for it.
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
      InputError: another dtype, a model that T5X's networks do not have, a folder with another model in it or with
        something else in the step's place, or a bucket that does not exist or may not be read. Nothing was written.
      OSError: the disk or the store did not take all of it. The step is the earlier one or is not complete; others are
        as they were.
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
    remote = paths.is_remote(folder)
    root = paths.of(folder) if remote else pathlib.Path(folder).expanduser().absolute()
    target = root / f"checkpoint_{step}"
    with paths.failures_told(root):
        _check_place(root, target)
        _check_description(root, config, dtype, scan_layers)
    with (_uploaded if remote else _swapped)(root, target) as (new, beside):
        _write_step(new, config, params, step, dtype, scan_layers)
        _write_settings(beside, config, tokenizer, contract, dtype, scan_layers)
    return target


@contextlib.contextmanager
def _swapped(root: pathlib.Path, target: pathlib.Path) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Gives a folder for the step, which takes the place of `target` at the end, and one for what is beside it."""
    root.mkdir(parents=True, exist_ok=True)
    new = pathlib.Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=root))
    try:
        new.chmod(0o777 & ~_umask())
        yield new, root
        if target.exists():
            old = target.with_name(f"{new.name}.old")
            target.rename(old)
            new.rename(target)
            shutil.rmtree(old)
        else:
            new.rename(target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


@contextlib.contextmanager
def _uploaded(root: Any, target: Any) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """`_swapped` for a remote folder: both folders are on this machine, and are uploaded at the end.

    The order leaves, wherever it breaks off, nothing that is taken for something else. The old index goes before the
    old arrays, which are nothing without it. What describes the steps comes after the arrays, `config.json` last, so
    that a new folder is not bound to a model that it does not have. The index comes after all of it: without the
    description a complete step might be read as another architecture.
    """
    with tempfile.TemporaryDirectory(prefix="inranker_jax.") as name:
        here = pathlib.Path(name)
        new, beside = here / "step", here / "beside"
        new.mkdir()
        beside.mkdir()
        yield new, beside
        (new / INDEX).rename(here / INDEX)
        with paths.failures_told(target):
            paths.remove(target / INDEX)
            paths.remove(target)
            paths.upload(new, target)
            paths.upload(beside, root, marker=t5x_settings.CONFIG)
            paths.upload(here / INDEX, target / INDEX)


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
    """Writes `config.json` last: without it the rest describes nothing, should this break off."""
    if tokenizer is not None:
        tokenizer.save(root)
    if contract is not None:
        huggingface.write_json(root / t5x_settings.CONTRACT, contract.to_dict())
    (root / GIN).write_text(model_gin(config, scan_layers), encoding="utf-8")
    huggingface.write_json(root / t5x_settings.CONFIG, config.to_hf_dict() | {"dtype": dtype})


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


def _check_place(root: Any, target: Any) -> None:
    """Raises InputError where there is no folder, here or remote, to put the step in, or something else is there."""
    paths.check_reachable(root)
    for folder in (root, target):
        if not paths.is_remote(folder) and folder.exists() and not folder.is_dir():
            raise InputError.at(folder, None, "it is a file", "a folder to write", "Choose another name")
    if not t5x_folders.is_replaceable(paths.names_below(target)):
        raise InputError.at(
            target,
            None,
            f"it is no checkpoint of T5X (with the file {INDEX!r}), nor what is left of one",
            "a name to write",
            "Move it away",
        )


def _check_description(root: Any, config: T5Config, dtype: str, scan_layers: bool) -> None:
    """Raises InputError where the folder describes other steps than this one: it describes all of them once."""
    path = root / t5x_settings.CONFIG
    if not paths.is_file(path):
        return
    stored = huggingface.read_json(path)
    same: Mapping[str, Any] = {name: stored.get(name) for name in config.to_hf_dict()}
    if same != config.to_hf_dict():
        fields = sorted(name for name, value in config.to_hf_dict().items() if same[name] != value)
        if not _is_left_over(root):
            raise InputError.at(
                path,
                None,
                f"it describes another model ({', '.join(fields)} differ)",
                "a new folder or one with other steps of this model",
                "Choose another folder",
            )
    elif paths.is_file(root / GIN):
        gin = paths.read(root / GIN).decode(errors="replace")
        other = stored.get("dtype") != dtype or gin != model_gin(config, scan_layers)
        if other and not _is_left_over(root):
            raise InputError.at(
                root,
                None,
                f"its steps are of dtype {stored.get('dtype')}, or their layers are stacked otherwise (see {GIN})",
                "a new folder, or one with steps of the same --dtype and --scan_layers",
                "Choose another folder",
            )


def _is_left_over(root: Any) -> bool:
    """Whether all that is in the folder is left of exports that broke off, so that what it describes is not there."""
    names = paths.names_below(root)
    ours = {t5x_settings.CONFIG, GIN, t5x_settings.CONTRACT, *t5x_settings.TOKENIZER_FILES}
    return GIN in names and all(name in ours or t5x_folders.is_incomplete(name) for name in names)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
