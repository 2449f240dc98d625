"""Tiny random models of transformers, and their outputs, to compare with."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
import transformers

from inranker_jax.checkpoints import name_maps
from inranker_jax.models import T5Config, trees

# Uneven on purpose: num_heads * d_kv differs from d_model, and so does every other pair of sizes.
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "v1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True, "scale_decoder_outputs": True},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "scale_decoder_outputs": False},
    "tied, gated": {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": True,
        "scale_decoder_outputs": True,
    },
    "tied, unscaled": {
        "feed_forward_proj": "gated-silu",
        "tie_word_embeddings": True,
        "scale_decoder_outputs": False,
    },
}


def config_of(variant: str, **changes: Any) -> T5Config:
    return T5Config(**{**SIZES, **VARIANTS[variant], **changes})


def torch_model(config: T5Config, seed: int = 0) -> Any:
    """`T5ForConditionalGeneration` of an architecture, with every weight random, norms included."""
    torch.manual_seed(seed)
    fields = {k: v for k, v in config.to_hf_dict().items() if k not in ("architectures", "model_type")}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**fields))
    assert model.config.scale_decoder_outputs == config.scale_decoder_outputs
    if not config.tie_word_embeddings:
        # transformers 5 builds every T5 tied.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def our_tree(config: T5Config, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Torch tensors by name (weights or gradients) as our tree."""
    flat = {}
    for path, source in name_maps.expand(name_maps.HUGGINGFACE, config).items():
        value = tensors[source.name].detach().numpy()
        flat[path] = jax.numpy.asarray(value.T if source.transpose else value)
    return trees.unflatten(flat)


def torch_logits(model: Any, tokens: np.ndarray, label_ids: np.ndarray) -> torch.Tensor:
    """Logits of the labels at decoder position 0, [n, K], with gradients."""
    ids = torch.from_numpy(np.asarray(tokens)).long()
    start = torch.full((len(ids), 1), model.config.decoder_start_token_id, dtype=torch.long)
    mask = (ids != model.config.pad_token_id).long()
    output = model(input_ids=ids, attention_mask=mask, decoder_input_ids=start)
    return output.logits[:, 0][:, torch.from_numpy(np.asarray(label_ids)).long()]


def ragged_tokens(rows: int, length: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Random tokens int32 [rows, length], each padded on the right from another position on; one is full."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, vocab_size, (rows, length), dtype=np.int32)
    for row in range(1, rows):
        tokens[row, max(1, length - row * length // rows) :] = 0
    return tokens
