"""A TREC run as a teacher: margin = scale * score + offset, of the pairs that the run lists."""

from __future__ import annotations

import array
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.labeling.teachers.base import Chunk, check_finite, split_margin
from inranker_jax.labeling.teachers.spec import TeacherSpec
from inranker_jax.records import open_bytes
from inranker_jax.retrieval.runs import stream_run

_BLOCK = 1 << 20


class RunTeacher:
    """Looks labels up in a run file, held in memory as 20 bytes a pair (16 of key, 4 of score).

    Args:
      spec: options `scale` (1) and `offset` (0).

    Raises:
      InputError: there is no such file, or a line of it is not one of a run.
    """

    def __init__(self, spec: TeacherSpec) -> None:
        self.name = spec.name
        self._path = spec.path
        self._scale = spec.options.get("scale", 1.0)
        self._offset = spec.options.get("offset", 0.0)
        digest = hashlib.sha256()
        with open_bytes(spec.path) as file:  # what it says, compressed or not
            while block := file.read(_BLOCK):
                digest.update(block)
        self._identity = {
            "kind": "run",
            "file": digest.hexdigest(),
            "scale": self._scale,
            "offset": self._offset,
        }
        self._table: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._queries: set[str] = set()

    @property
    def identity(self) -> dict[str, Any]:
        """See `Teacher`."""
        return self._identity

    @property
    def provenance(self) -> dict[str, Any]:
        """See `Teacher`."""
        return {"path": self._path}

    def logits(self, chunks: Iterable[Chunk]) -> Iterator[np.ndarray]:
        """See `Teacher`.

        Raises:
          InputError: the run does not list a pair.
        """
        for chunk in chunks:
            scores, found = self._look_up(chunk)
            if not found.all():
                self._raise_missing(chunk, int(np.flatnonzero(~found)[0]), int((~found).sum()))
            yield check_finite(split_margin(self._scale * scores + self._offset), chunk, self.name)

    def num_conflicts(self, chunk: Chunk, logits: np.ndarray) -> int:
        """How many of the stored `logits`, float32 [n, 2], are not those of the run for the pairs' own ids.

        The store knows texts alone, so two pairs with the same texts have one label, whatever their scores.
        """
        scores, found = self._look_up(chunk)
        own = split_margin(self._scale * scores + self._offset)
        return int((~found | (own != logits).any(axis=-1)).sum())

    def _look_up(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        """Scores, float64 [n], and whether the run lists the pair, bool [n].

        Keys are sorted by their first half, and compared whole.
        """
        first, second, scores = self._load()
        keys = _keys(b"".join(_key(pair.query_id, pair.document_id) for pair in chunk))
        places = np.searchsorted(first, keys[:, 0])
        found = np.zeros(len(chunk), bool)
        values = np.zeros(len(chunk))
        # Nearly always one step; more where the first halves of two keys are equal.
        while True:
            inside = np.minimum(places, len(first) - 1)
            candidates = ~found & (places < len(first))
            if len(first):
                candidates &= first[inside] == keys[:, 0]
            if not candidates.any():
                break
            hit = candidates & (second[inside] == keys[:, 1])
            values[hit] = scores[inside[hit]]
            found |= hit
            places += 1
        return values, found

    def _raise_missing(self, chunk: Chunk, index: int, count: int) -> None:
        pair = chunk[index]
        if pair.query_id in self._queries:
            problem = f"does not list document {pair.document_id!r} for query {pair.query_id!r}"
        else:
            hint = did_you_mean(pair.query_id, list(self._queries)[:10000])
            problem = f"has no query {pair.query_id!r}{hint and '.' + hint.rstrip('?') + '?'}"
        raise InputError.at(
            self._path,
            None,
            f"the run {problem} ({count} of {len(chunk)} pairs of this chunk are missing)",
            "a score for every pair that is labelled",
            "Score all candidates and the positives with that system, or sample from this run",
        )

    def _load(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._table is None:
            digests, scores = bytearray(), array.array("f")
            for query, ranked in stream_run(self._path):
                self._queries.add(query)
                for document, score in ranked:
                    digests += _key(query, document)
                    scores.append(score)
            keys = _keys(bytes(digests))
            order = np.argsort(keys[:, 0], kind="stable")
            values = np.frombuffer(scores, np.float32) if scores else np.zeros(0, np.float32)
            self._table = keys[order, 0], keys[order, 1], values[order]
        return self._table

    def close(self) -> None:
        """See `Teacher`."""
        self._table = None


def _key(query: str, document: str) -> bytes:
    return hashlib.blake2b(f"{len(query)}:{query}{document}".encode(), digest_size=16).digest()


def _keys(digests: bytes) -> np.ndarray:
    """uint64 [n, 2] of 16-byte digests."""
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)
