"""transformers' T5 trained in PyTorch: the recipe's loop with gradient accumulation, at its best micro-batch."""

from __future__ import annotations

import contextlib
import pathlib
import time
from typing import Any

import numpy as np
import torch
import transformers

from . import cutting, peaks
from .models import LABEL_IDS
from .recipe import BETAS, CLIP, EPSILON, LEARNING_RATE
from .worker import sequences_of


class Contender:
    """Options: `folder`, `dtype` (bfloat16 is autocast), `micro_batches` to try, `device`, `threads`."""

    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        self._options = options
        self._device = "cuda" if options["device"] == "gpu" else "cpu"
        self._workloads: dict[str, dict[str, Any]] = {}
        self._micro_batch: dict[tuple[str, str], int] = {}
        self._fresh()

    def _fresh(self) -> None:
        """The model and the optimiser of step 0."""
        self._model = transformers.T5ForConditionalGeneration.from_pretrained(
            self._options["folder"], dtype=torch.float32
        )
        self._model.train().to(self._device)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=0.0,
            fused=True,
        )

    def about(self) -> dict[str, Any]:
        """Versions."""
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def prepare(self, name: str, arrays: dict[str, np.ndarray], mode: str) -> dict[str, Any]:
        """Tries micro-batches, one step to warm up and one timed each, and starts anew with the fastest."""
        batch_size = int(arrays["batch_size"])
        teacher = torch.from_numpy(arrays["teacher"]).to(self._device)
        self._workloads[name] = {
            "sequences": sequences_of(arrays),
            "batch_size": batch_size,
            "teacher": teacher - teacher.mean(-1, keepdim=True),
        }
        length = cutting.FULL_LENGTH if mode == "padded" else int(arrays["lengths"].max())
        tried: dict[int, float] = {}
        for size in sorted({min(size or batch_size, batch_size) for size in self._options["micro_batches"]}):
            if tried and self._needs(size, length) > available_bytes() / 2:
                continue
            self._micro_batch[name, mode] = size
            self._step(name, mode, 0)
            started = time.perf_counter()
            self._step(name, mode, 0)
            tried[size] = time.perf_counter() - started
        self._micro_batch[name, mode] = min(tried, key=lambda size: tried[size])
        self._fresh()
        return {
            "micro_batch": self._micro_batch[name, mode],
            "tried": {str(size): round(seconds, 3) for size, seconds in tried.items()},
            "useful_share": self._useful_share(name, mode),
        }

    def _needs(self, rows: int, length: int) -> float:
        """About how many bytes of activations a micro-batch keeps, scores and probabilities included."""
        c = self._model.config
        layer = rows * length * (14 * c.d_model + 3 * c.d_ff) + 3 * rows * c.num_heads * length**2
        return 4.0 * c.num_layers * layer

    def _micro_batches(self, name: str, mode: str, number: int) -> list[tuple[np.ndarray, int]]:
        """Numbers of the pairs of each micro-batch of a step, and the length to which they are padded."""
        workload, size = self._workloads[name], self._micro_batch[name, mode]
        first = number * workload["batch_size"]
        cut = []
        for start in range(first, first + workload["batch_size"], size):
            chosen = np.arange(start, min(start + size, first + workload["batch_size"]))
            longest = max(len(workload["sequences"][i]) for i in chosen)
            cut.append((chosen, cutting.FULL_LENGTH if mode == "padded" else longest))
        return cut

    def _useful_share(self, name: str, mode: str) -> float:
        workload = self._workloads[name]
        steps = len(workload["sequences"]) // workload["batch_size"]
        cuts = [cut for step in range(steps) for cut in self._micro_batches(name, mode, step)]
        useful = sum(len(workload["sequences"][i]) for chosen, _ in cuts for i in chosen)
        return useful / sum(len(chosen) * length for chosen, length in cuts)

    def _step(self, name: str, mode: str, number: int) -> float:
        workload = self._workloads[name]
        narrow = self._options["dtype"] == "bfloat16"
        autocast = torch.autocast(self._device, torch.bfloat16) if narrow else contextlib.nullcontext()
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._device)
        for chosen, length in self._micro_batches(name, mode, number):
            ids, mask = (
                torch.from_numpy(array).to(self._device)
                for array in cutting.padded(workload["sequences"], chosen, length)
            )
            with autocast:
                start = torch.zeros((len(chosen), 1), dtype=torch.long, device=self._device)
                found = self._model(
                    input_ids=ids, attention_mask=mask, decoder_input_ids=start, use_cache=False
                )
            logits = found.logits[:, 0, list(LABEL_IDS)].float()
            difference = logits - workload["teacher"][chosen[0] : chosen[-1] + 1]
            loss = difference.square().sum() / (2 * workload["batch_size"])
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)
        self._optimizer.step()
        return total.item()

    def run(self, name: str, mode: str, number: int) -> list[float]:
        """One optimiser step on the batch of that number, and its loss. Modes train one and the same model."""
        return [self._step(name, mode, number)]

    def peak(self) -> dict[str, float]:
        """Rates of matrix products in PyTorch."""
        return peaks.of_torch(self._device)


def available_bytes() -> float:
    """Memory that the machine could give; without limit where it does not say."""
    meminfo = pathlib.Path("/proc/meminfo")
    if not meminfo.is_file():
        return float("inf")
    return int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) * 1024.0
