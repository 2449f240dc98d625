"""The one scoring contract: prompt template, label pieces, truncation, token ids, and their presets."""

from __future__ import annotations

from inranker_jax.prompts.contract import SCORE_KINDS, TRUNCATIONS, ScoringContract, pad_batch
from inranker_jax.prompts.presets import PRESETS, preset, preset_for_model
from inranker_jax.prompts.tokenizer import Tokenizer

__all__ = [
    "PRESETS",
    "SCORE_KINDS",
    "TRUNCATIONS",
    "ScoringContract",
    "Tokenizer",
    "pad_batch",
    "preset",
    "preset_for_model",
]
