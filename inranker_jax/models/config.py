"""Architecture and compute settings of the T5 family.

`T5Config` says what the parameters are; `Compute` says how a program runs them. Only the first is part of a
checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from inranker_jax.errors import InputError, did_you_mean

ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "swish")
_REQUIRED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
# Both spell the same architecture; the other relatives (umt5, longt5, switch) have other parameters.
_MODEL_TYPES = ("t5", "mt5")


class ArchitectureError(InputError):
    """A model of another architecture than T5, where a T5 is read."""


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the model is run; never part of the architecture.

    Attributes:
      dtype: of the operands of matrix products, "float32" or "bfloat16". Products accumulate in float32, and
        norms, softmax and the residual stream stay in float32 either way. float32 products follow
        `jax_default_matmul_precision`, which on GPU and TPU may mean fewer bits than on CPU.
      remat: what the backward pass recomputes in each layer: "none" keeps every activation, "dots" keeps the
        results of the weight products, "full" keeps nothing but the layer's input.
      scan: whether layers are one loop in the program instead of written out one after another. The compiler then
        needs a fraction of the time, for a copy of the layers' parameters. None: in training on TPUs (see `on`).
      gradients: dtype in which training keeps and adds up gradients, "float32" or "bfloat16", which takes half of the
        memory and rounds every sum of micro-batches to 8 bits. The optimiser gets float32 either way.
    """

    dtype: str = "float32"
    remat: str = "none"
    scan: bool | None = None
    gradients: str = "float32"

    def __post_init__(self) -> None:
        _check_choice("Compute.dtype", self.dtype, ("float32", "bfloat16"))
        _check_choice("Compute.gradients", self.gradients, ("float32", "bfloat16"))
        _check_choice("Compute.remat", self.remat, ("none", "full", "dots"))

    def on(self, platform: str) -> Compute:
        """With what is left open chosen for training on JAX's `platform`.

        The TPU compiler takes minutes for 12 layers written out, forward and backward.

        >>> Compute().on("tpu").scan, Compute().on("cpu").scan, Compute(scan=False).on("tpu").scan
        (True, False, False)
        """
        return dataclasses.replace(self, scan=platform == "tpu") if self.scan is None else self

    def rounds(self, path: str) -> bool:
        """Whether a parameter that only scores may be kept in bfloat16: the kernels that products read so.

        Not a head of its own: its few label rows are multiplied in float32.

        >>> compute = Compute("bfloat16")
        >>> compute.rounds("encoder/layers_0/mlp/wi/kernel"), compute.rounds("decoder/logits_dense/kernel")
        (True, False)
        """
        *above, name = path.split("/")
        return self.dtype == "bfloat16" and name == "kernel" and "logits_dense" not in above


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Architecture of a T5, T5 v1.1, FLAN-T5 or mT5 model, in the field names of transformers' `T5Config`.

    Attributes:
      vocab_size: rows of the embedding, padding rows included.
      d_model: width of the residual stream.
      d_kv: width of one attention head; `num_heads * d_kv` need not equal `d_model`.
      d_ff: width of the hidden layer of the MLP.
      num_layers: encoder layers.
      num_decoder_layers: decoder layers.
      num_heads: attention heads.
      relative_attention_num_buckets: rows of the relative-position table.
      relative_attention_max_distance: distance, in tokens, from which all positions share the last bucket.
      dropout_rate: used wherever transformers' T5 drops, when a dropout key is given.
      layer_norm_epsilon: added to the mean square in the norms.
      feed_forward_proj: activation of the MLP, "relu" (v1.0) or "gated-gelu" (v1.1; the tanh form of GELU),
        in general one of `ACTIVATIONS` with or without "gated-".
      tie_word_embeddings: whether the output head is the input embedding.
      scale_decoder_outputs: whether the decoder output is multiplied by `d_model ** -0.5` before the head. It
        goes with tying in the published models, but some re-saved ones have one without the other.
      pad_token_id: id that marks padding in the tokens.
      eos_token_id: id of `</s>`.
      decoder_start_token_id: the token at the single decoder position.
      initializer_factor: multiplies every initial standard deviation.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0
    initializer_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in (*_REQUIRED, "num_decoder_layers", "relative_attention_num_buckets"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"T5Config.{name} is {value!r}. Expected an integer of at least 1.")
        if self.relative_attention_num_buckets % 4:
            raise InputError(
                f"T5Config.relative_attention_num_buckets is {self.relative_attention_num_buckets}. Expected "
                "a multiple of 4: half of the buckets serve each direction, half of those single distances."
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise InputError(
                f"T5Config.relative_attention_max_distance is {self.relative_attention_max_distance}. "
                "Expected more than a quarter of relative_attention_num_buckets "
                f"({self.relative_attention_num_buckets})."
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise InputError(f"T5Config.dropout_rate is {self.dropout_rate}. Expected 0 <= rate < 1.")
        _check_choice("T5Config.feed_forward_proj", self.activation, ACTIVATIONS)
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise InputError(
                    f"T5Config.{name} is {getattr(self, name)}. Expected an id below the vocab_size of "
                    f"{self.vocab_size}."
                )

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies its activation by a second, linear projection."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """Name of the activation; `gated-gelu` has always meant the tanh form, which is called `gelu_new`."""
        return (
            "gelu_new"
            if self.feed_forward_proj == "gated-gelu"
            else self.feed_forward_proj.removeprefix("gated-")
        )

    @property
    def inner_dim(self) -> int:
        """Width of all heads together, `num_heads * d_kv`."""
        return self.num_heads * self.d_kv

    @property
    def num_params(self) -> int:
        """Number of parameters; a tied head counts once."""
        attention = 4 * self.d_model * self.inner_dim
        mlp = (3 if self.gated else 2) * self.d_model * self.d_ff
        encoder = self.num_layers * (attention + mlp + 2 * self.d_model)
        decoder = self.num_decoder_layers * (2 * attention + mlp + 3 * self.d_model)
        heads = self.vocab_size * self.d_model * (1 if self.tie_word_embeddings else 2)
        relative = 2 * self.num_heads * self.relative_attention_num_buckets
        return encoder + decoder + heads + relative + 2 * self.d_model

    @classmethod
    def from_hf_dict(cls, values: Mapping[str, Any]) -> T5Config:
        """Reads the fields of a Hugging Face `config.json`.

        `scale_decoder_outputs` is taken from the field of that name where there is one (transformers 5 writes
        it). Otherwise outputs are scaled exactly when embeddings are tied, as transformers 4 did.

        Args:
          values: the parsed `config.json`; keys that do not describe the architecture are ignored.

        Returns:
          The architecture. Whether the head is really untied is decided by the weights, see
          `checkpoints.huggingface.load`.

        Raises:
          ArchitectureError: for another model type.
          InputError: for a missing field, or a value out of range.
        """
        model_type = values.get("model_type", "t5")
        if model_type not in _MODEL_TYPES:
            raise ArchitectureError(
                f"config.json: model_type is {model_type!r}. Expected one of {', '.join(_MODEL_TYPES)}: only "
                "models of the T5 architecture can be read."
            )
        missing = [name for name in _REQUIRED if values.get(name) is None]
        if missing:
            raise InputError(
                f"config.json has no {', '.join(missing)}. Expected the configuration of a T5 model with the "
                f"fields {', '.join(_REQUIRED)}."
            )
        fields = {f.name: values[f.name] for f in dataclasses.fields(cls) if values.get(f.name) is not None}
        fields.setdefault("num_decoder_layers", values["num_layers"])
        fields.setdefault("decoder_start_token_id", fields.get("pad_token_id", 0))
        if isinstance(fields.get("eos_token_id"), list):
            fields["eos_token_id"] = fields["eos_token_id"][0]
        if model_type == "mt5":
            fields.setdefault("feed_forward_proj", "gated-gelu")
            # transformers 5 calls every mT5 tied whatever its weights, so that says nothing about the scale.
            fields.setdefault("tie_word_embeddings", False)
            fields.setdefault("scale_decoder_outputs", False)
        fields.setdefault("scale_decoder_outputs", fields.get("tie_word_embeddings", True))
        return cls(**fields)

    def to_hf_dict(self) -> dict[str, Any]:
        """The `config.json` from which transformers builds the same `T5ForConditionalGeneration`."""
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            "use_cache": True,
            **dataclasses.asdict(self),
        }


def _check_choice(place: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise InputError(
            f"{place} is {value!r}. Expected one of {', '.join(options)}.{did_you_mean(str(value), options)}"
        )
