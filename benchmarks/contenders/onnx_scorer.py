"""ONNX Runtime on the exported model, batches sorted by length."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

from . import cutting
from .worker import sequences_of


class Contender:
    """Options: `file`, `tokens` of a batch, `threads`."""

    def __init__(self, options: dict[str, Any]) -> None:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options["threads"]
        settings.inter_op_num_threads = 1
        self._tokens = options["tokens"]
        self._session = onnxruntime.InferenceSession(
            options["file"], settings, providers=["CPUExecutionProvider"]
        )
        self._workloads: dict[str, list[np.ndarray]] = {}

    def about(self) -> dict[str, Any]:
        """Version."""
        return {"onnxruntime": onnxruntime.__version__}

    def prepare(self, name: str, arrays: dict[str, np.ndarray], mode: str) -> dict[str, Any]:
        """One pass, which allocates its arena."""
        self._workloads[name] = sequences_of(arrays)
        return {"values": self.run(name, mode, 0)}

    def run(self, name: str, mode: str, number: int) -> list[float]:
        """Differences of the label logits, in the order of the workload."""
        sequences = self._workloads[name]
        scores = np.zeros(len(sequences), np.float32)
        for chosen, length in cutting.batches([len(s) for s in sequences], mode, self._tokens):
            ids, mask = cutting.padded(sequences, chosen, length)
            (logits,) = self._session.run(["logits"], {"input_ids": ids, "attention_mask": mask})
            scores[chosen] = logits[:, 1] - logits[:, 0]
        return scores.tolist()

    def peak(self) -> dict[str, float]:
        """None: it has no matrix product to call."""
        return {}
