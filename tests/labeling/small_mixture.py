"""A small mixture on disk, and teachers whose logits are known, for tests of labelling."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from inranker_jax.labeling.job import Settings
from inranker_jax.labeling.pairs import PairText
from inranker_jax.labeling.sampling import Sampling


def write_mixture(folder: pathlib.Path, queries: int = 12, documents: int = 40) -> Settings:
    """Writes corpus, queries, qrels and a run; the first two documents of the run are relevant.

    Returns:
      Settings of a job over them, with chunks of 16 pairs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    corpus = [{"_id": f"d{i}", "title": f"title {i}", "text": f"text number {i}"} for i in range(documents)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    asked = [{"_id": f"q{i}", "text": f"question {i}"} for i in range(queries)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    run, qrels = [], []
    for query in range(queries):
        ranked = [f"d{(7 * query + place) % documents}" for place in range(30)]
        run += [f"q{query} Q0 {document} {rank} {100 - rank} t\n" for rank, document in enumerate(ranked)]
        qrels += [f"q{query} 0 {document} 1\n" for document in ranked[:2]]
    (folder / "run.trec").write_text("".join(run))
    (folder / "qrels.txt").write_text("".join(qrels))
    return Settings(
        output_dir=str(folder / "labels"),
        queries=str(folder),
        corpus=str(folder),
        candidates=str(folder / "run.trec"),
        qrels=str(folder / "qrels.txt"),
        sampling=Sampling(negatives=4, depth=20),
        chunk_size=16,
    )


def text_logits(query: str, document: str) -> list[float]:
    """Logits that depend on the texts alone."""
    digest = hashlib.sha256(f"{query}|{document}".encode()).digest()
    return [digest[0] / 16, digest[1] / 16]


@dataclasses.dataclass
class FakeTeacher:
    """A teacher that remembers what it was given."""

    name: str = "fake"
    sign: float = 1.0
    seen: list[PairText] = dataclasses.field(default_factory=list)
    closed: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "fake", "sign": self.sign}

    @property
    def provenance(self) -> dict[str, Any]:
        return {"where": "a test"}

    def logits(self, chunks: Iterable[Sequence[PairText]]) -> Iterator[np.ndarray]:
        waiting: np.ndarray | None = None
        for chunk in chunks:  # one ahead, as real teachers
            self.seen.extend(chunk)
            rows = [text_logits(pair.query, pair.document) for pair in chunk]
            if waiting is not None:
                yield waiting
            waiting = np.float32(self.sign) * np.array(rows, np.float32)
        if waiting is not None:
            yield waiting

    def close(self) -> None:
        self.closed = True
