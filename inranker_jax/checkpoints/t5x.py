"""Checkpoints of T5X: the parameters, and the architecture as their shapes show it.

Our tree has T5X's names. What differs is how T5X may lay a parameter out: attention kernels with the heads joined
(as here) or apart, and the layers one by one (as here) or, in `scalable_t5`, stacked along axis 1 below
`encoder/encoder` and `decoder/decoder`, where every layer has a table of relative positions of its own.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from inranker_jax.checkpoints import LoadedModel
from inranker_jax.checkpoints.t5x_arrays import Checkpoint, StoredArray, open_checkpoint
from inranker_jax.checkpoints.t5x_folders import Location
from inranker_jax.checkpoints.t5x_settings import complete
from inranker_jax.errors import InputError
from inranker_jax.models import Params, T5Config, abstract_params, trees

STACKED = re.compile(r"(encoder|decoder)/\1/")
LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")
_HEADS = re.compile(r"attention/(query|key|value|out)/kernel$")
_TABLE = "relpos_bias/rel_embedding"
_ONLY = "Only T5, T5 v1.1, FLAN-T5, mT5 and ByT5 as T5X's examples/t5 and examples/scalable_t5 save them can be read."


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a parameter of ours lies: the stored array's name, and the layer in it where layers are stacked."""

    name: str
    layer: int | None = None


def load(
    location: Location, source: str, place: Callable[[str, np.ndarray], Any] | None = None
) -> LoadedModel:
    """Reads a checkpoint, one stored array at a time; the optimizer's state stays where it is.

    Args:
      location: see `t5x_folders.locate`.
      source: the path as the user gave it.
      place: see `huggingface.load`.

    Returns:
      The model, with float32 parameters and the checkpoint's step. Activation, dropout and whatever else shapes
      cannot show are those of a `config.json` or `config.gin` beside the checkpoint, else T5's (relu) or, with a
      gated MLP, T5 v1.1's (gelu). It has a tokenizer and a contract only where `export --format=t5x` put them
      beside it.

    Raises:
      InputError: for a damaged checkpoint, one of another architecture, or a configuration beside it that
        contradicts the shapes.
    """
    checkpoint = open_checkpoint(location)
    config = infer_config(checkpoint)
    config, tokenizer, contract = complete(config, location, source)
    params = read_params(config, checkpoint, place)
    return LoadedModel(config, params, tokenizer, contract, source, checkpoint.step)


def infer_config(checkpoint: Checkpoint) -> T5Config:
    """The architecture, as the shapes of the parameters show it.

    `rel_embedding` has a row for each head, a gated MLP has `wi_0`, and a head of its own is `logits_dense`.
    T5X scales the decoder's output exactly when it has no head of its own.

    Raises:
      InputError: naming each array that this needs and that is missing or has another rank.
    """
    shapes = {name: array.shape for name, array in checkpoint.arrays.items()}
    stacked = any(STACKED.match(name) for name in shapes)
    depth = 1 if stacked else 0
    first = "encoder/encoder" if stacked else "encoder/layers_0"
    gated = f"{first}/mlp/wi_0/kernel" in shapes
    wi = f"{first}/mlp/{'wi_0' if gated else 'wi'}/kernel"
    query = f"{first}/attention/query/kernel"
    table = f"{first}/{_TABLE}" if stacked or f"{first}/{_TABLE}" in shapes else f"encoder/{_TABLE}"
    needed = {
        "token_embedder/embedding": ((2,), "(vocabulary, width)"),
        table: ((2 + depth,), "(heads, layers, buckets)" if stacked else "(heads, buckets)"),
        query: ((2 + depth, 3 + depth), "(width, layers, heads x kv)" if stacked else "(width, heads x kv)"),
        wi: ((2 + depth,), "(width, layers, hidden)" if stacked else "(width, hidden)"),
    }
    wrong = [
        f"{name} is {shapes.get(name, 'missing')}, expected {meaning}"
        for name, (ranks, meaning) in needed.items()
        if len(shapes.get(name, ())) not in ranks
    ]
    if wrong:
        raise InputError(
            f"{checkpoint.place}: not an encoder-decoder T5: {'; '.join(wrong)}. It has {_outline(shapes)}. {_ONLY}"
        )
    heads, buckets = shapes[table][0], shapes[table][-1]
    joined = math.prod(shapes[query][1 + depth :])
    if joined % heads:
        raise InputError(
            f"{checkpoint.place}: {query} is {shapes[query]} and {table} {shapes[table]}. Expected a multiple of "
            f"the {heads} heads that have a row in {_TABLE}. {_ONLY}"
        )
    tied = "decoder/logits_dense/kernel" not in shapes
    vocab_size, d_model = shapes["token_embedder/embedding"]
    try:
        return T5Config(
            vocab_size=vocab_size,
            d_model=d_model,
            d_kv=joined // heads,
            d_ff=shapes[wi][-1],
            num_layers=_count_layers(shapes, "encoder", stacked),
            num_decoder_layers=_count_layers(shapes, "decoder", stacked),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=tied,
            scale_decoder_outputs=tied,
        )
    except InputError as error:
        raise InputError(f"{checkpoint.place}: {error} It has {_outline(shapes)}. {_ONLY}") from error


def read_params(
    config: T5Config, checkpoint: Checkpoint, place: Callable[[str, np.ndarray], Any] | None = None
) -> Params:
    """Builds our tree from the stored arrays.

    Args:
      config: the architecture, see `infer_config`.
      checkpoint: all arrays.
      place: see `huggingface.load`.

    Raises:
      InputError: arrays that are missing, unexpected or of another shape, all in one message; or layers whose
        tables of relative positions differ.
    """
    wanted = {path: tuple(leaf.shape) for path, leaf in trees.flatten(abstract_params(config)).items()}
    sources = _sources(wanted, checkpoint.arrays)
    found = {name: array.shape for name, array in checkpoint.arrays.items()}
    expected = _expected_shapes(config, wanted, sources, found)
    if difference := trees.mismatch(expected, found):
        raise InputError(
            f"{checkpoint.place}: the arrays are not those of a T5. Expected (-) and found (+):\n{difference}\n{_ONLY}"
        )
    paths: dict[str, list[str]] = {}
    for path, source in sources.items():
        paths.setdefault(source.name, []).append(path)
    flat = {}
    tables: dict[str, np.ndarray] = {}
    for name in expected:
        array = checkpoint.arrays[name].read()
        if array.dtype != np.float32:
            raise InputError(
                f"{checkpoint.place}: {name} holds {array.dtype}. Expected floating-point numbers."
            )
        if name.endswith(_TABLE):
            _check_same_table(name, array, tables, checkpoint.place)
        for path in paths.get(name, ()):
            layer = sources[path].layer
            value = (array if layer is None else array.take(layer, axis=1)).reshape(wanted[path])
            flat[path] = jax.device_put(value) if place is None else place(path, np.ascontiguousarray(value))
    return trees.unflatten(flat)


def _outline(shapes: Mapping[str, Any]) -> str:
    """The top of the tree that was found, for messages."""
    heads = sorted({"/".join(name.split("/")[:2]) for name in shapes})
    return (
        ", ".join(heads[:8]) + (f" and {len(heads) - 8} more" if len(heads) > 8 else "")
        if heads
        else "no arrays"
    )


def _count_layers(shapes: Mapping[str, tuple[int, ...]], side: str, stacked: bool) -> int:
    if stacked:
        norm = shapes.get(f"{side}/{side}/pre_mlp_layer_norm/scale", ())
        return norm[1] if len(norm) == 2 else 0
    return len({match[2] for name in shapes if (match := LAYER.match(name)) and match[1] == side})


def _sources(wanted: Mapping[str, Any], arrays: Mapping[str, StoredArray]) -> dict[str, _Source]:
    """Our path -> where it is stored."""
    stacked = any(STACKED.match(name) for name in arrays)
    sources = {}
    for path in wanted:
        layer = LAYER.match(path)
        side, _, rest = path.partition("/")
        if layer and stacked:
            sources[path] = _Source(f"{layer[1]}/{layer[1]}/{layer[3]}", int(layer[2]))
        elif rest == _TABLE and stacked:
            sources[path] = _Source(f"{side}/{side}/{_TABLE}", 0)
        elif rest == _TABLE and path not in arrays and f"{side}/layers_0/{_TABLE}" in arrays:
            sources[path] = _Source(f"{side}/layers_0/{_TABLE}")
        else:
            sources[path] = _Source(path)
    return sources


def _expected_shapes(
    config: T5Config,
    wanted: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, _Source],
    found: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    """Stored name -> the shape that it must have, with the heads apart where they were stored so."""
    layers = {"encoder": config.num_layers, "decoder": config.num_decoder_layers}
    expected = {}
    for path, source in sources.items():
        side = path.partition("/")[0]
        shape = wanted[path]
        depth = 0 if source.layer is None else 1
        if (head := _HEADS.search(path)) and len(found.get(source.name, ())) == 3 + depth:
            apart = (config.num_heads, config.d_kv)
            shape = (*apart, shape[-1]) if head[1] == "out" else (shape[0], *apart)
        if depth:
            shape = (shape[0], layers[side], *shape[1:])
        expected[source.name] = shape
        if source.name == f"{side}/layers_0/{_TABLE}":
            expected.update({f"{side}/layers_{i}/{_TABLE}": shape for i in range(layers[side])})
    return expected


def _check_same_table(name: str, array: np.ndarray, tables: dict[str, np.ndarray], place: str) -> None:
    """Raises InputError where layers of one side do not share their relative positions, as `T5Config` says."""
    side = name.partition("/")[0]
    layers = [array] if array.ndim == 2 else [array[:, i] for i in range(array.shape[1])]
    first = tables.setdefault(side, layers[0])
    if any(not np.array_equal(first, layer) for layer in layers):
        raise InputError(
            f"{place}: {name} differs between layers {array.shape}. Expected one table of relative positions for all "
            f"layers of the {side}, as in every T5, T5 v1.1, FLAN-T5 and mT5; umT5 and models trained with "
            "T5X's scalable_t5 have one a layer, and another architecture."
        )
