"""Tiny random models of other people's kinds, written where tests want them: nothing is downloaded."""

from __future__ import annotations

import pathlib
import random
from typing import Any

from inranker_jax.labeling.pairs import PairText

WORDS = [
    "wing",
    "lift",
    "drag",
    "flow",
    "heat",
    "plate",
    "shear",
    "layer",
    "boundary",
    "supersonic",
    "jet",
    "body",
    "of",
    "the",
    "a",
    "in",
    "at",
]


def make_pairs(count: int, seed: int = 0, longest: int = 60) -> list[PairText]:
    """Pairs of very different lengths; some longer than the models read."""
    rng = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randrange(1, most)))

    return [PairText(f"q{i}", f"d{i}", text(9), text(longest)) for i in range(count)]


def write_bert(folder: pathlib.Path, labels: int | None, seed: int = 0) -> pathlib.Path:
    """Writes a two-layer BERT with a WordPiece vocabulary; `labels` outputs, or the encoder alone for None."""
    import tokenizers
    import torch
    import transformers

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    model = tokenizers.models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=48,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
        initializer_range=0.6,
        num_labels=labels or 2,
    )
    torch.manual_seed(seed)
    kind = transformers.BertModel if labels is None else transformers.BertForSequenceClassification
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
