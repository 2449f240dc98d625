"""Training and scoring see the same token ids for the same pair: one function makes both."""

from __future__ import annotations

import numpy as np
import pytest

from inranker_jax import Reranker
from inranker_jax.data.batches import BatchStream
from inranker_jax.data.store import Example, ExampleStore
from inranker_jax.models import T5Config, t5
from inranker_jax.prompts import PRESETS, Tokenizer, preset
from tests.tiny_vocabulary import write_spiece

QUERY = "what does textwrap do with long lines"
DOCUMENTS = ("wraps a paragraph", "returns a list of wrapped lines " * 40, "  Não há  informação ")


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "bucketed") for name in PRESETS if name != "rankt5"), ("inranker", "packed")],
)
def test_a_training_batch_and_the_reranker_hold_the_same_ids(name, layout, tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_pretrained(write_spiece(tmp_path / "vocabulary"))
    contract = preset(name).replace(max_length=96, label_pieces=("▁false", "▁true"))
    example = Example(
        "q", QUERY, ("1", "2", "3"), DOCUMENTS, np.zeros((3, 2), np.float32), np.zeros(3, np.float32)
    )
    store = ExampleStore.from_examples([example])
    arguments = {"batch_size": 1, "lengths": (32, 64), "prefetch": 0}
    with BatchStream(store, contract, tokenizer, **arguments) as batches:
        tokens = next(batches)["tokens"][0]
    trained = [row[row != 0].tolist() for row in tokens]
    with BatchStream(store, contract, tokenizer, **arguments, layout="packed") as batches:
        batch = next(batches)
    packed = sequences_of(np.concatenate(batch["tokens"]), np.concatenate(batch["segment_ids"]))
    assert sorted(packed) == sorted(trained)

    config = T5Config(
        vocab_size=512, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_decoder_layers=1, num_heads=2
    )
    reranker = Reranker(config, t5.init_params(config, 0), tokenizer, contract, layout=layout)
    seen: list[tuple[int, ...]] = []
    forward = reranker._forward

    def watched(params, tokens, segment_ids):
        seen.extend(map(tuple, sequences_of(np.asarray(tokens), segment_ids)))
        return forward(params, tokens, segment_ids)

    monkeypatch.setattr(reranker, "_forward", watched)
    reranker.scores(QUERY, DOCUMENTS)
    assert set(seen) >= {tuple(row) for row in trained}
    assert len({tuple(row) for row in trained}) == 3


def sequences_of(tokens, segment_ids):
    """The token ids of every sequence in padded rows (0 is padding), or in packed ones."""
    if segment_ids is None:
        return [row[row != 0].tolist() for row in tokens if row.any()]
    return [
        row[segments == number].tolist()
        for row, segments in zip(tokens, np.asarray(segment_ids), strict=True)
        for number in range(1, segments.max() + 1)
    ]
