"""transformers' T5 in PyTorch: one decoder position, the whole vocabulary head, as its users call it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from . import cutting, peaks
from .models import LABEL_IDS
from .worker import sequences_of


class Contender:
    """Options: `folder`, `dtype`, `compiled`, `device` ("cpu" or "gpu"), `tokens` of a sorted batch, `threads`."""

    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        self._tokens = options["tokens"]
        self._device = "cuda" if options["device"] == "gpu" else "cpu"
        model = transformers.T5ForConditionalGeneration.from_pretrained(
            options["folder"], dtype=getattr(torch, options["dtype"])
        )
        self._model = model.eval().to(self._device)
        self._label_ids = torch.tensor(LABEL_IDS, device=self._device)
        # One program for all shapes: the lengths of real pairs would otherwise be compiled one by one.
        self._forward = torch.compile(self._logits, dynamic=True) if options["compiled"] else self._logits
        self._workloads: dict[str, list[np.ndarray]] = {}

    def about(self) -> dict[str, Any]:
        """Versions, and the attention that transformers chose."""
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "attention": self._model.config._attn_implementation,
        }

    def _logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        start = torch.zeros((ids.shape[0], 1), dtype=torch.long, device=ids.device)
        found = self._model(input_ids=ids, attention_mask=mask, decoder_input_ids=start, use_cache=False)
        return found.logits[:, 0, :].index_select(1, self._label_ids).float()

    def prepare(self, name: str, arrays: dict[str, np.ndarray], mode: str) -> dict[str, Any]:
        """One pass, which compiles and fills the caches of kernels."""
        self._workloads[name] = sequences_of(arrays)
        sizes = arrays["lengths"].tolist()
        computed = sum(len(chosen) * length for chosen, length in cutting.batches(sizes, mode, self._tokens))
        return {"useful_share": sum(sizes) / computed, "values": self.run(name, mode, 0)}

    def run(self, name: str, mode: str, number: int) -> list[float]:
        """Differences of the label logits (true - false), in the order of the workload."""
        sequences = self._workloads[name]
        scores = np.zeros(len(sequences), np.float32)
        pending = []
        with torch.inference_mode():
            for chosen, length in cutting.batches([len(s) for s in sequences], mode, self._tokens):
                ids, mask = (
                    torch.from_numpy(array).to(self._device)
                    for array in cutting.padded(sequences, chosen, length)
                )
                pending.append((chosen, self._forward(ids, mask)))
            for chosen, logits in pending:
                values = logits.cpu().numpy()
                scores[chosen] = values[:, 1] - values[:, 0]
        return scores.tolist()

    def peak(self) -> dict[str, float]:
        """Rates of matrix products in PyTorch."""
        return peaks.of_torch(self._device)
