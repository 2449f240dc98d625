"""The teacher of the embedded collection: all-MiniLM-L6-v2 mixed with BM25 (used by build_python_docs.py)."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

COSINE_SCALE = 12.0  # as in other distillations from this bi-encoder: cosines of -0.2..1 become -2..12
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def check_weights(model_dir: pathlib.Path) -> str:
    """Returns the SHA-256 of the weights.

    Raises:
      SystemExit: they are not the published all-MiniLM-L6-v2.
    """
    found = hashlib.sha256((model_dir / "model.safetensors").read_bytes()).hexdigest()
    if found != WEIGHTS_SHA256:
        raise SystemExit(f"{model_dir}/model.safetensors has SHA-256 {found}, expected {WEIGHTS_SHA256}.")
    return found


def embed(model_dir: pathlib.Path, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Sentence embeddings: mean over tokens of the last hidden state, L2-normalised, at most 256 tokens.

    Args:
      model_dir: folder of the Hugging Face model.
      texts: any number of texts.
      batch_size: texts a forward pass; texts of like length go together.

    Returns:
      float32 [texts, 384].
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModel.from_pretrained(model_dir).eval()
    order = sorted(range(len(texts)), key=lambda n: (len(texts[n]), n))
    result = np.zeros((len(texts), model.config.hidden_size), np.float32)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [texts[n] for n in chosen], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).float()
            mean = (hidden * mask).sum(1) / mask.sum(1)
            result[chosen] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    return result


def mixing_weights(cosines: np.ndarray, bm25: np.ndarray) -> tuple[float, float, float]:
    """Weights (a, b, c) of `margin = a * cosine + b * bm25 - c`, from the training pairs alone.

    a is fixed; b gives both parts the same standard deviation over the training pairs, so that the mix is the
    sum of z-scores up to a factor; c makes the mean margin 0. No relevance judgment is looked at.

    Args:
      cosines: float [pairs].
      bm25: float [pairs].
    """
    a = COSINE_SCALE
    b = round(float(a * cosines.std() / bm25.std()), 3)
    c = round(float((a * cosines + b * bm25).mean()), 2)
    return a, b, c
