"""Floating-point operations of a T5 reranker, counted by hand: a multiplication with an addition is 2.

Norms, activations, softmax and look-ups are left out: they are few, and no engine can do without them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Shape:
    """An architecture in the field names of transformers' `T5Config`, with a plain (not gated) MLP.

    Not `inranker_jax.models.T5Config`: the processes of other engines read it too, and must not import JAX.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int


def encoder(shape: Shape, length: int) -> float:
    """The encoder over one sequence of `length` tokens.

    Per layer, with n tokens, width d, i = heads x d_kv and f = d_ff: four projections 8ndi, scores and weighted
    values 4n²i, two products of the MLP 4ndf.
    """
    d, i, f, n = shape.d_model, shape.num_heads * shape.d_kv, shape.d_ff, length
    return shape.num_layers * (8.0 * n * d * i + 4.0 * n * n * i + 4.0 * n * d * f)


def plain(shape: Shape, length: int) -> float:
    """A forward pass as transformers runs it: one decoder position, and the logits of the whole vocabulary.

    Per decoder layer: self-attention 8di, query and output of the cross-attention 4di, keys and values of all
    tokens 4ndi, attention to them 4ni, MLP 4df; once the head, 2dv.

    >>> small = Shape(32128, 512, 64, 2048, 6, 6, 8)
    >>> round(plain(small, 256) / 1e9, 2)
    12.16
    """
    d, i, f, n = shape.d_model, shape.num_heads * shape.d_kv, shape.d_ff, length
    layer = 8.0 * d * i + 4.0 * d * i + 4.0 * n * d * i + 4.0 * n * i + 4.0 * d * f
    return encoder(shape, n) + shape.num_decoder_layers * layer + 2.0 * d * shape.vocab_size


def absorbed(shape: Shape, length: int) -> float:
    """The least that is known to give the same logits: no keys and values of the encoder's output.

    With one query, `q (x W_k)ᵀ = (q W_kᵀ) xᵀ` and `p (x W_v) = (p x) W_v` (`performance.md`). Per decoder layer:
    values and output of the self-attention 4di (it has one position), query and output of the cross-attention 4di,
    its two absorbed projections 4di, attention of h heads over rows of width d 4nhd, MLP 4df; once two rows of the
    head, 4d.

    >>> small = Shape(32128, 512, 64, 2048, 6, 6, 8)
    >>> round(absorbed(small, 256) / 1e9, 2)
    10.54
    """
    d, i, f, n = shape.d_model, shape.num_heads * shape.d_kv, shape.d_ff, length
    layer = 12.0 * d * i + 4.0 * n * shape.num_heads * d + 4.0 * d * f
    return encoder(shape, n) + shape.num_decoder_layers * layer + 4.0 * d


def useful(shape: Shape, lengths: Iterable[int], training: bool = False) -> float:
    """What a workload needs: `absorbed` over its sequences without padding; three times that with gradients.

    The backward pass has two products for each of the forward pass (Kaplan et al. 2020, section 2.1).
    """
    return (3.0 if training else 1.0) * sum(absorbed(shape, int(length)) for length in lengths)
