"""Ours: `Reranker.score_pairs` itself, given token ids in place of texts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inranker_jax.checkpoints import huggingface
from inranker_jax.models import T5Config
from inranker_jax.prompts import preset
from inranker_jax.scorer import Reranker

from . import peaks
from .given_ids import GivenIds, NoTokenizer
from .worker import sequences_of


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
        """One pass, which compiles."""
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
        statistics = self._rerankers[mode].statistics
        before = dataclasses.asdict(statistics)
        values = self.run(name, mode, 0)
        after = dataclasses.asdict(statistics)
        useful, computed = (after[key] - before[key] for key in ("useful_tokens", "tokens"))
        layout = str(self._rerankers[mode].layout)
        return {"useful_share": useful / computed, "layout": layout, "values": values}

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
