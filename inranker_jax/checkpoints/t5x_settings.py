"""What lies beside a T5X checkpoint: a `config.json`, T5X's `config.gin`, tokenizer files, a scoring contract.

Shapes show most of an architecture. These files are a check of that, and the source of the rest.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from inranker_jax.checkpoints.t5x_folders import Files, Location, open_folder
from inranker_jax.errors import InputError
from inranker_jax.models import T5Config

if TYPE_CHECKING:
    from inranker_jax.prompts import ScoringContract, Tokenizer

CONFIG = "config.json"
CONTRACT = "inranker_contract.json"
# T5X writes the first of them into MODEL_DIR; the second is a model's own file.
GIN_FILES = ("config.gin", "model.gin")
_VOCABULARIES = ("tokenizer.json", "spiece.model")
TOKENIZER_FILES = (
    *_VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

# Our field -> T5X's.
GIN_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "emb_dim",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
    "num_layers": "num_encoder_layers",
    "num_decoder_layers": "num_decoder_layers",
    "num_heads": "num_heads",
    "tie_word_embeddings": "logits_via_embedding",
    "dropout_rate": "dropout_rate",
}
# Activations of ours -> of flax.linen, whose gelu is the tanh form.
GIN_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "silu": "silu", "swish": "swish"}
# What shapes show, apart from what transformers 5 writes of every T5 whatever its weights.
_VISIBLE = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "gated",
)
_BINDING = re.compile(r"(?:[\w./]*T5Config\.|\s+)(\w+)\s*=\s*(.+)")
_MACRO = re.compile(r"([A-Z_]\w*)\s*=\s*(.+)")


def complete(
    config: T5Config, location: Location, source: str
) -> tuple[T5Config, Tokenizer | None, ScoringContract | None]:
    """Adds to an architecture what its shapes do not show, and finds tokenizer and contract.

    Args:
      config: as the shapes show it.
      location: of the checkpoint.
      source: the path as the user gave it, whose name may say which contract applies.

    Raises:
      InputError: a configuration that contradicts the shapes, with both values of each field.
    """
    from inranker_jax.prompts import ScoringContract, preset_for_model

    config = _with_settings(config, location)
    contract = preset_for_model(source)
    tokenizer = None
    for folder in reversed(location.near):  # the nearest wins
        files = open_folder(folder)
        stored = files.read(CONTRACT)
        if stored is not None:
            contract = ScoringContract.from_dict(_parse_json(f"{folder}/{CONTRACT}", stored))
        tokenizer = _read_tokenizer(files) or tokenizer
    return config, tokenizer, contract


def _read_tokenizer(files: Files) -> Tokenizer | None:
    from inranker_jax.prompts import Tokenizer

    if not any(files.has(name) for name in _VOCABULARIES):
        return None
    with tempfile.TemporaryDirectory() as copy:  # the files may be in an object store
        for name in TOKENIZER_FILES:
            contents = files.read(name)
            if contents is not None:
                (pathlib.Path(copy) / name).write_bytes(contents)
        return Tokenizer.from_pretrained(copy)


def _with_settings(config: T5Config, location: Location) -> T5Config:
    for folder in location.near:
        files = open_folder(folder)
        text = files.read(CONFIG)
        if text is not None:
            place = f"{folder}/{CONFIG}"
            try:
                stated = T5Config.from_hf_dict(_parse_json(place, text))
            except InputError as error:
                raise InputError(f"{place}: {error}") from error
            _check(place, config, {name: getattr(stated, name) for name in _VISIBLE})
            # T5X ties the output's scale to the head, and the weights show the head.
            tied = config.tie_word_embeddings
            return dataclasses.replace(stated, tie_word_embeddings=tied, scale_decoder_outputs=tied)
        for name in GIN_FILES:
            text = files.read(name)
            if text is not None and (settings := read_gin(text.decode(errors="replace"))):
                return _with_gin(f"{folder}/{name}", config, settings)
    return config


def _with_gin(place: str, config: T5Config, settings: Mapping[str, Any]) -> T5Config:
    stated = {ours: settings[theirs] for ours, theirs in GIN_FIELDS.items() if theirs in settings}
    dropout = stated.pop("dropout_rate", config.dropout_rate)
    projection = config.feed_forward_proj
    activations = settings.get("mlp_activations")
    if activations:
        known = {theirs: ours for ours, theirs in GIN_ACTIVATIONS.items()}
        stated["gated"] = len(activations) == 2
        if activations[0] not in known or activations[1:] not in ((), ("linear",)):
            raise InputError(
                f"{place}: mlp_activations = {activations!r}. Expected one of {', '.join(known)}, alone or followed by "
                "'linear'; other MLPs cannot be read."
            )
        projection = "gated-" * stated["gated"] + known[activations[0]]
        projection = "gated-gelu" if projection == "gated-gelu_new" else projection
    _check(place, config, stated)
    return dataclasses.replace(config, feed_forward_proj=projection, dropout_rate=float(dropout))


def _check(place: str, config: T5Config, stated: Mapping[str, Any]) -> None:
    wrong = [
        f"{name} is {value} there and {getattr(config, name)} in the checkpoint"
        for name, value in stated.items()
        if value != getattr(config, name)
    ]
    if wrong:
        raise InputError(
            f"{place}: it describes another model: {'; '.join(wrong)}. Expected the configuration of the checkpoint "
            "beside it, or none: the shapes show the architecture. Move the file away, or take the right one."
        )


def read_gin(text: str) -> dict[str, Any]:
    """The arguments of `T5Config` in a gin file of T5X, by T5X's names; macros are followed, the rest is left.

    >>> read_gin("HEADS = 12\\nnetwork.T5Config:\\n  emb_dim = 768  # base\\n  num_heads = %HEADS\\n")
    {'emb_dim': 768, 'num_heads': 12}
    """
    macros: dict[str, str] = {}
    found: dict[str, str] = {}
    for name, value, is_macro in _gin_lines(text):
        (macros if is_macro else found)[name] = value
    settings = {}
    for name, value in found.items():
        try:
            settings[name] = ast.literal_eval(macros.get(value.removeprefix("%"), value))
        except (ValueError, SyntaxError):
            continue  # a reference to a function or a macro of another file: nothing to compare
    return {
        name: value for name, value in settings.items() if name in (*GIN_FIELDS.values(), "mlp_activations")
    }


def _gin_lines(text: str) -> Iterator[tuple[str, str, bool]]:
    """(name, value, whether it is a macro) of macros and of bindings of T5Config."""
    inside = False
    for line in text.splitlines():
        line = line.partition("#")[0].rstrip()
        if not line:
            continue
        if not line[0].isspace():
            inside = line.endswith("T5Config:")
        if (binding := _BINDING.fullmatch(line)) and (inside or not line[0].isspace()):
            yield binding[1], binding[2].strip(), False
        elif macro := _MACRO.fullmatch(line):
            yield macro[1], macro[2].strip(), True


def _parse_json(place: str, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError.at(place, getattr(error, "lineno", None), f"not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError.at(place, None, f"it holds a {type(value).__name__}", "a JSON object")
    return value
