"""A tiny random causal language model with a byte-level tokenizer trained here."""

from __future__ import annotations

import pathlib
from typing import Any

CORPUS = [
    "What is the meaning of relevance? A document is relevant to a query when it answers it.",
    "Example 1: Document: text Relevant Query: What is a query?\n\nExample 2:\nDocument: more\n",
    "Pergunta: qual é a relevância? Não há informação suficiente.\n\n",
]


def write_tokenizer(folder: pathlib.Path, size: int = 320) -> pathlib.Path:
    """Writes tokenizer files of `transformers` into `folder`."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(
        CORPUS, vocab_size=size, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return folder


def load_tokenizer(folder: pathlib.Path) -> Any:
    """The tokenizer of that folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def write_model(folder: pathlib.Path, kind: str = "gpt2", positions: int = 1024) -> pathlib.Path:
    """Writes a random GPT-2 or Llama of some thousand parameters, and its tokenizer, into `folder`."""
    import torch
    import transformers

    write_tokenizer(folder)
    size = len(load_tokenizer(folder))
    torch.manual_seed(0)
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    config: Any
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=size,
            n_positions=positions,
            n_embd=32,
            n_layer=2,
            n_head=2,
            initializer_range=0.6,
            **ends,
        )
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=size, max_position_embeddings=positions, hidden_size=32, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=2, initializer_range=0.6, **ends,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    # Line breaks often enough that some answers end with one, and not so often that all do.
    tokenizer = load_tokenizer(folder)
    breaks = [token for token in range(size) if "\n" in tokenizer.decode([token])]
    with torch.no_grad():
        model.lm_head.weight[breaks] *= 1.0 if kind == "gpt2" else 2.5
    # Sampling settings, as many published checkpoints carry them: greedy decoding must not heed them.
    model.generation_config.do_sample = True
    model.generation_config.temperature = 2.0
    model.generation_config.repetition_penalty = 3.0
    model.save_pretrained(folder)
    return folder
