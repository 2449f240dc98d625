"""Checkpoints as T5X writes them, made with msgpack and TensorStore alone: no code of the reader or the writer."""

from __future__ import annotations

import pathlib
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore as ts

from inranker_jax.models import T5Config, trees

# A T5 whose sizes all differ, with what T5X's networks fix in code.
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
}
TIED: dict[str, Any] = {
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "scale_decoder_outputs": True,
}
UNTIED: dict[str, Any] = {
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "scale_decoder_outputs": False,
}
VARIANTS = {"v1.0": T5Config(**SIZES, **TIED), "v1.1": T5Config(**SIZES, **UNTIED)}


def random_params(config: T5Config, seed: int = 0) -> dict[str, Any]:
    """Parameters with every value random, norms included."""
    from inranker_jax.models import abstract_params

    rng = np.random.default_rng(seed)
    flat = trees.flatten(abstract_params(config))
    return trees.unflatten({p: rng.normal(size=a.shape).astype(np.float32) for p, a in flat.items()})


def unscanned(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Path -> array as T5X's examples/t5 names them, which are our names."""
    return {path: np.asarray(value) for path, value in trees.flatten(params).items()}


def scanned(config: T5Config, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of examples/scalable_t5: layer axis 1, heads apart, relative positions once a layer."""
    arrays = {"token_embedder/embedding": np.asarray(params["token_embedder"]["embedding"])}
    heads, width = config.num_heads, config.d_kv
    for side, count in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        layers = [trees.flatten(params[side][f"layers_{i}"]) for i in range(count)]
        for rest in layers[0]:
            parts = [np.asarray(layer[rest]) for layer in layers]
            if rest.split("/")[-2] in ("query", "key", "value"):
                parts = [p.reshape(config.d_model, heads, width) for p in parts]
            elif rest.split("/")[-2] == "out":
                parts = [p.reshape(heads, width, config.d_model) for p in parts]
            arrays[f"{side}/{side}/{rest}"] = np.stack(parts, axis=1)
        table = np.asarray(params[side]["relpos_bias"]["rel_embedding"])
        arrays[f"{side}/{side}/relpos_bias/rel_embedding"] = np.stack([table] * count, axis=1)
        arrays[f"{side}/{side}_norm/scale"] = np.asarray(params[side][f"{side}_norm"]["scale"])
    if "logits_dense" in params["decoder"]:
        arrays["decoder/logits_dense/kernel"] = np.asarray(params["decoder"]["logits_dense"]["kernel"])
    return arrays


def inline(array: Any) -> msgpack.ExtType:
    """An array as flax puts it into msgpack: extension 1 of (shape, name of the dtype, bytes)."""
    array = np.asarray(array)
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))


def chunked(array: np.ndarray, size: int) -> dict[str, Any]:
    """An array that is too large for one msgpack value, as flax divides it."""
    flat = array.reshape(-1)
    pieces = [flat[i : i + size] for i in range(0, flat.size, size)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): n for i, n in enumerate(array.shape)},
        "chunks": {str(i): inline(piece) for i, piece in enumerate(pieces)},
    }


def external(
    folder: pathlib.Path,
    name: str,
    array: np.ndarray,
    compressor: dict[str, Any] | None = None,
    path_at_root: bool = False,
    driver: str = "file",
    chunks: list[int] | None = None,
) -> dict[str, Any]:
    """Writes a zarr array and gives the description that T5X leaves in msgpack."""
    metadata = {
        "shape": list(array.shape),
        "chunks": chunks or list(array.shape),
        "compressor": compressor or {"id": "gzip", "level": 1},
    }
    spec = {"driver": "zarr", "dtype": str(array.dtype), "metadata": metadata}
    there = {**spec, "kvstore": {"driver": "file", "path": f"{folder / name}/"}}
    ts.open(there, create=True).result().write(array).result()
    kvstore: dict[str, Any] = {"driver": driver}
    if driver == "gcs":
        kvstore["bucket"] = "t5x-dummy-bucket"
    if path_at_root:
        return {**spec, "kvstore": kvstore, "path": name}
    return {**spec, "kvstore": {**kvstore, "path": f"{name}/"}}


def write(
    folder: pathlib.Path,
    arrays: dict[str, np.ndarray],
    step: int = 7,
    dtype: str = "float32",
    version: int = 3,
    inlined: bool = False,
    optimizer: bool = False,
    **options: Any,
) -> pathlib.Path:
    """Writes `FOLDER/checkpoint_STEP`, norms in the file and the rest beside it; `options` as for `external`."""
    target = folder / f"checkpoint_{step}"
    target.mkdir(parents=True)
    tree: dict[str, Any] = {}
    states: dict[str, Any] = {}
    for path, array in arrays.items():
        stored = array.astype(jnp.bfloat16) if dtype == "bfloat16" else array
        if inlined:
            tree[path] = inline(stored)
        else:
            if version == 2 and dtype == "bfloat16":
                stored = stored.view(np.uint16)
            tree[path] = external(target, f"target.{path.replace('/', '.')}", stored, **options)
        if optimizer:
            # Adafactor's statistics; None where it keeps none.
            rows = external(
                target, f"state.param_states.{path.replace('/', '.')}.v_row", array[..., 0] * 0 + 5
            )
            states[path] = {"v_row": rows, "v": inline(np.zeros(1, np.float32)), "m": None}
    state: dict[str, Any] = {"step": inline(np.asarray(step, np.int32))}
    if optimizer:
        state["param_states"] = _unflatten(states)
    contents = {"version": version, "optimizer": {"target": _unflatten(tree), "state": state}}
    (target / "checkpoint").write_bytes(msgpack.packb(contents))
    return target


def _unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
