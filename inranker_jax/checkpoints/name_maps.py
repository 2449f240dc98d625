"""Where each parameter lies in other people's checkpoints, as data.

A name may contain `{i}`, the number of a layer. Kernels of torch are [out, in], ours [in, out]; so nearly
every matrix is transposed, and the embedding, which is a table on both sides, is not.
"""

from __future__ import annotations

import dataclasses

from inranker_jax.models import T5Config


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """One parameter, or one of every layer.

    Attributes:
      ours: path in our tree, with `{i}` for the layer.
      theirs: name in the other checkpoint, with `{i}` for the layer.
      transpose: whether the two are each other's transpose.
      when: "always", "gated", "plain" (not gated) or "untied": the architectures that have it.
    """

    ours: str
    theirs: str
    transpose: bool = True
    when: str = "always"


def _attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    letters = {"query": "q", "key": "k", "value": "v", "out": "o"}
    return tuple(
        Rule(f"{ours}/{name}/kernel", f"{theirs}.{letter}.weight") for name, letter in letters.items()
    )


def _mlp(ours: str, theirs: str) -> tuple[Rule, ...]:
    when = {"wi": "plain", "wi_0": "gated", "wi_1": "gated", "wo": "always"}
    return tuple(Rule(f"{ours}/{n}/kernel", f"{theirs}.{n}.weight", when=w) for n, w in when.items())


def _norm(ours: str, theirs: str) -> Rule:
    return Rule(f"{ours}/scale", f"{theirs}.weight", transpose=False)


_E, _HF_E = "encoder/layers_{i}", "encoder.block.{i}.layer"
_D, _HF_D = "decoder/layers_{i}", "decoder.block.{i}.layer"

HUGGINGFACE: tuple[Rule, ...] = (
    Rule("token_embedder/embedding", "shared.weight", transpose=False),
    Rule(
        "encoder/relpos_bias/rel_embedding",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    _norm(f"{_E}/pre_attention_layer_norm", f"{_HF_E}.0.layer_norm"),
    *_attention(f"{_E}/attention", f"{_HF_E}.0.SelfAttention"),
    _norm(f"{_E}/pre_mlp_layer_norm", f"{_HF_E}.1.layer_norm"),
    *_mlp(f"{_E}/mlp", f"{_HF_E}.1.DenseReluDense"),
    _norm("encoder/encoder_norm", "encoder.final_layer_norm"),
    Rule(
        "decoder/relpos_bias/rel_embedding",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    _norm(f"{_D}/pre_self_attention_layer_norm", f"{_HF_D}.0.layer_norm"),
    *_attention(f"{_D}/self_attention", f"{_HF_D}.0.SelfAttention"),
    _norm(f"{_D}/pre_cross_attention_layer_norm", f"{_HF_D}.1.layer_norm"),
    *_attention(f"{_D}/encoder_decoder_attention", f"{_HF_D}.1.EncDecAttention"),
    _norm(f"{_D}/pre_mlp_layer_norm", f"{_HF_D}.2.layer_norm"),
    *_mlp(f"{_D}/mlp", f"{_HF_D}.2.DenseReluDense"),
    _norm("decoder/decoder_norm", "decoder.final_layer_norm"),
    Rule("decoder/logits_dense/kernel", "lm_head.weight", when="untied"),
)

# Other names under which transformers has stored the embedding; which of them survives in a file has varied.
HUGGINGFACE_EMBEDDING_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
HUGGINGFACE_HEAD = "lm_head.weight"
# An accident of the first T5 port: a table that no release has ever used.
HUGGINGFACE_IGNORED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where one of our parameters comes from: a name, and whether it is transposed there."""

    name: str
    transpose: bool


def expand(rules: tuple[Rule, ...], config: T5Config) -> dict[str, Source]:
    """Writes the rules out for one architecture.

    Args:
      rules: a table of this module.
      config: gives the numbers of layers, and which of the conditional parameters exist.

    Returns:
      Our path -> its source, for every parameter of the model.
    """
    present = {
        "always": True,
        "gated": config.gated,
        "plain": not config.gated,
        "untied": not config.tie_word_embeddings,
    }
    sources: dict[str, Source] = {}
    for rule in rules:
        if not present[rule.when]:
            continue
        layers = config.num_layers if rule.ours.startswith("encoder/") else config.num_decoder_layers
        for i in range(layers if "{i}" in rule.ours else 1):
            place = str(i)
            ours, theirs = (name.replace("{i}", place) for name in (rule.ours, rule.theirs))
            sources[ours] = Source(theirs, rule.transpose)
    return sources
