"""Floating-point operations that a T5 reranker needs, counted by hand: a multiplication with an addition is 2.

Norms, activations, softmax and look-ups are left out: they are few. What padding, rematerialisation or a compiler
adds is left out too, which makes this the numerator of model FLOPs utilisation (MFU; Chowdhery et al. 2022, PaLM,
section 4.1).
"""

from __future__ import annotations

import numpy as np

from inranker_jax.models.config import T5Config

TRAINING = 3.0
"""Work of a training step in forward passes: the backward pass has two products for each of the forward pass (Kaplan et
al. 2020, "Scaling laws for neural language models", section 2.1). Recomputation (`Compute.remat`) is not work done."""


def forward_flops(config: T5Config, lengths: np.ndarray | int, labels: int = 2) -> float:
    """Operations of one forward pass over sequences, as `models.t5` computes them, without padding.

    With n tokens, width d, heads h, i = h x d_kv, and f = d_ff, of which a gated MLP has three matrices and another
    two (m): an encoder layer takes 8ndi for its four projections, 4n²i for scores and weighted values, and 2mndf. A
    decoder layer at its one position takes 4di for values and output of the self-attention, 4di for query and output
    of the cross-attention, 4di for the absorbed keys and values, 4nhd for attention over states of width d, and 2mdf.
    The head takes 2d a label.

    Args:
      config: the architecture.
      lengths: tokens of each sequence, whole numbers of any shape.
      labels: rows of the head that are multiplied.

    Returns:
      Their sum over all sequences.

    >>> small = T5Config(32128, 512, 64, 2048, 6, 6, 8)
    >>> round(forward_flops(small, 256) / 1e9, 2)
    10.54
    """
    n = np.asarray(lengths, np.float64)
    width, inner, heads = config.d_model, config.inner_dim, config.num_heads
    mlp = 2.0 * (3 if config.gated else 2) * width * config.d_ff
    encoder = config.num_layers * (n * (8.0 * width * inner + mlp) + 4.0 * n * n * inner)
    decoder = config.num_decoder_layers * (12.0 * width * inner + mlp + 4.0 * n * heads * width)
    return float(np.sum(encoder + decoder + 2.0 * labels * width))


def recomputed_flops(config: T5Config, lengths: np.ndarray | int, remat: str) -> float:
    """Operations that rematerialisation repeats in a backward pass.

    "full" repeats the layers of the forward pass, all but the last product of each (its result is not needed again);
    "dots" keeps the results of weight products and repeats scores, weighted values and the products of two
    activations. The custom backward pass of attention repeats its scores even under "none", which counts here too.

    Args:
      config: the architecture.
      lengths: tokens of each sequence.
      remat: of `Compute`: "none", "dots" or "full".

    Returns:
      Their sum over all sequences.
    """
    n = np.asarray(lengths, np.float64)
    scores = config.num_layers * 2.0 * n * n * config.inner_dim
    if remat == "none":
        return float(np.sum(scores))
    pooled = config.num_decoder_layers * 4.0 * n * config.num_heads * config.d_model
    attention = config.num_layers * 4.0 * n * n * config.inner_dim
    if remat == "dots":
        return float(np.sum(scores + attention + pooled))
    last = 2.0 * config.d_model * config.d_ff
    layers = forward_flops(config, n, labels=0)
    return layers - float(np.sum((config.num_layers * n + config.num_decoder_layers) * last - scores))
