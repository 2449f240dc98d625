"""Random batches and tiny architectures that several tests share."""

from __future__ import annotations

import dataclasses

import numpy as np

from inranker_jax.models import T5Config

TINY = T5Config(
    vocab_size=96,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    dropout_rate=0.0,
)
LABEL_IDS = (7, 11)


def with_dropout(config: T5Config, rate: float = 0.1) -> T5Config:
    return dataclasses.replace(config, dropout_rate=rate)


def attended(tokens: np.ndarray) -> np.ndarray:
    """Where sequences [..., length] with padding on the right stand, bool: up to the last token that is not 0."""
    return np.flip(np.cumsum(np.flip(tokens != 0, -1), -1), -1) > 0


def random_batch(seed: int, batch: int = 8, list_size: int = 2, length: int = 12) -> dict[str, np.ndarray]:
    """Lists of random lengths, some with `<pad>` inside.

    Some documents are masked, and masked logits are NaN to prove that they are unread.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, TINY.vocab_size, (batch, list_size, length)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.05] = 0  # a text may contain `<pad>`, though not at its ends
    tokens[..., 0] = 3
    lengths = rng.integers(3, length + 1, (batch, list_size, 1))
    np.put_along_axis(tokens, lengths - 1, 1, axis=2)
    tokens = np.where(np.arange(length) < lengths, tokens, 0)
    mask = rng.random((batch, list_size)) < 0.8
    mask[:, 0] = True
    teacher = rng.normal(size=(batch, list_size, 2)).astype(np.float32) * 3
    return {
        "tokens": np.where(mask[..., None], tokens, 0).astype(np.int32),
        "numbers": np.arange(batch * list_size, dtype=np.int32).reshape(batch, list_size),
        "list_mask": mask,
        "teacher_logits": np.where(mask[..., None], teacher, np.nan).astype(np.float32),
        "relevance": np.where(mask, np.arange(list_size) == 0, -1).astype(np.float32),
    }
