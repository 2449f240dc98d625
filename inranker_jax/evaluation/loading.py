"""Loads a reranker for evaluation, with the identity that tells whether a finished result still holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inranker_jax.evaluation.pipeline import Model

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from inranker_jax.packing import Layout
    from inranker_jax.prompts import ScoringContract


def load_reranker(
    checkpoint: str,
    contract: ScoringContract | str | None = None,
    dtype: str = "float32",
    layout: Layout | str | None = None,
    tokens_per_call: int | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Loads a reranker.

    Args:
      checkpoint: a training output folder, a checkpoint, a Hugging Face folder, or a hub id.
      contract: a scoring contract or a preset's name; None for the one stored with the checkpoint.
      dtype: "float32" or "bfloat16", of the computation.
      layout: see `Reranker`; a `packing.Layout` or the kind of one.
      tokens_per_call: see `Reranker`.
      mesh: see `Reranker`; by default all accelerators of this process, or one CPU device.

    Returns:
      The model for `evaluation.pipeline`. Its fingerprint covers the parameters, the architecture, the
      vocabulary, the contract and the dtype; where the checkpoint lies does not matter, nor the layout, which
      changes scores by rounding only.

    Raises:
      InputError: there is no model, it has no tokenizer, or no contract is known for it.
    """
    # Here, so that BM25 alone (and parsing its gin file) loads no model code.
    import jax

    from inranker_jax import compilation_cache
    from inranker_jax.checkpoints import load_model
    from inranker_jax.packing import Layout
    from inranker_jax.partitioning import make_mesh
    from inranker_jax.prompts import preset
    from inranker_jax.scorer import Reranker

    layout = Layout.of(layout)
    compilation_cache.enable()
    if mesh is None and jax.default_backend() != "cpu" and jax.local_device_count() > 1:
        mesh = make_mesh(devices=jax.local_devices())
    chosen = preset(contract) if isinstance(contract, str) else contract
    loaded = load_model(checkpoint, on_host=True)  # no device need hold all of it
    chosen = chosen or loaded.contract
    if loaded.tokenizer is None or chosen is None:
        # Raises the error which says what is missing and what to do.
        reranker = Reranker.from_pretrained(checkpoint, contract=chosen, dtype=dtype, mesh=mesh)
    else:
        reranker = Reranker(
            loaded.config,
            loaded.params,
            loaded.tokenizer,
            chosen,
            dtype=dtype,
            layout=layout,
            tokens_per_call=tokens_per_call,
            mesh=mesh,
        )
    decides: dict[str, Any] = {
        "dtype": dtype,
        "contract": reranker.contract.to_dict(),
        "architecture": reranker.config.to_hf_dict(),
        "vocabulary": reranker.tokenizer.fingerprint,
        "parameters": _digest(loaded.params),
    }
    fingerprint = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def score_groups(groups: Iterable[Sequence[tuple[str, str]]]) -> Generator[np.ndarray, Any, None]:
        # A group is laid out by itself, and tokenised while the one before it is computed.
        for logits in reranker.logits_of_chunks(groups):
            yield reranker.contract.scores(logits)

    identity = {"checkpoint": checkpoint, **decides, "fingerprint": fingerprint}
    return Model(reranker.score_pairs, identity, score_groups)


def _digest(params: Any) -> str:
    import jax

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(np.asarray(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
