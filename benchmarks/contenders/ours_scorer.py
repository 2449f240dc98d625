"""Ours: `Reranker.score_pairs` itself, given token ids in place of texts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inranker_jax.checkpoints import huggingface
from inranker_jax.models import T5Config
from inranker_jax.prompts import ScoringContract, preset
from inranker_jax.scorer import Reranker

from . import peaks
from .models import LABEL_IDS
from .worker import sequences_of


class GivenIds(ScoringContract):
    """monoT5's contract, except that a query is the number of a sequence whose ids are known already."""

    def use(self, sequences: list[np.ndarray]) -> None:
        """Sets the sequences that the numbers stand for."""
        object.__setattr__(self, "_sequences", sequences)

    def encode(self, tokenizer: Any, queries: Any, documents: Any) -> list[np.ndarray]:
        """The ids of the numbered sequences."""
        return [self._sequences[int(query)] for query in queries]  # type: ignore[attr-defined]

    def label_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """The ids that all contenders read."""
        return LABEL_IDS


class NoTokenizer:
    """Stands where a tokenizer does; nothing is tokenised."""

    pad_id, eos_id, unk_id, vocab_size = 0, 1, 2, 32128


def stored_as_read(params: Any, dtype: str) -> Any:
    """Kernels in the type that products read, once for all modes of this process."""

    def cast(path: Any, leaf: Any) -> Any:
        is_kernel = path[-1] == jax.tree_util.DictKey("kernel")
        return jnp.asarray(leaf, jnp.bfloat16) if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(cast, params) if dtype == "bfloat16" else params


class Contender:
    """Options: `folder`, `dtype`, `tokens` (None for the default of each layout)."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        loaded = huggingface.load(options["folder"])
        self._config: T5Config = loaded.config
        self._params = stored_as_read(loaded.params, options["dtype"])
        self._contract = GivenIds(**dataclasses.asdict(preset("monot5")))
        self._rerankers: dict[str, Reranker] = {}
        self._workloads: dict[str, list[np.ndarray]] = {}

    def about(self) -> dict[str, Any]:
        """Version, backend, and what the automatic layout is on it."""
        from inranker_jax.packing import Layout

        backend = jax.default_backend()
        kind = Layout().resolve(backend, self._contract.max_length).kind
        return {
            "jax": jax.__version__,
            "backend": backend,
            "device": jax.devices()[0].device_kind,
            "auto": kind,
        }

    def prepare(self, name: str, arrays: dict[str, np.ndarray], mode: str) -> dict[str, Any]:
        """Two passes: the first compiles."""
        if mode not in self._rerankers:
            self._rerankers[mode] = Reranker(
                self._config,
                self._params,
                NoTokenizer(),  # type: ignore[arg-type]
                self._contract,
                dtype=self._options["dtype"],
                layout=mode,
                tokens_per_call=self._options["tokens"],
            )
        self._workloads[name] = sequences_of(arrays)
        self.run(name, mode, 0)
        statistics = self._rerankers[mode].statistics
        before = dataclasses.asdict(statistics)
        self.run(name, mode, 0)
        after = dataclasses.asdict(statistics)
        useful, computed = (after[key] - before[key] for key in ("useful_tokens", "tokens"))
        return {"useful_share": useful / computed, "layout": str(self._rerankers[mode].layout)}

    def run(self, name: str, mode: str, number: int) -> list[float]:
        """Differences of the label logits, in the order of the workload."""
        sequences = self._workloads[name]
        self._contract.use(sequences)
        scores: np.ndarray = self._rerankers[mode].score_pairs(
            [(str(index), "-") for index in range(len(sequences))]
        )
        return scores.tolist()

    def peak(self) -> dict[str, float]:
        """Rates of matrix products in JAX."""
        return peaks.of_jax()
