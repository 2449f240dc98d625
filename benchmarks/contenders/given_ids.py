"""Token ids in place of texts, through the same doors: what ours is given instead of a tokenizer and a data set."""

from __future__ import annotations

from typing import Any

import numpy as np

from inranker_jax.data.store import Example
from inranker_jax.prompts import ScoringContract

from .models import LABEL_IDS, VOCABULARY


class GivenIds(ScoringContract):
    """A contract for which a query is the number of a sequence whose ids are known already."""

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

    pad_id, eos_id, unk_id, vocab_size = 0, 1, 2, VOCABULARY


class NumberedPairs:
    """Stands where an `ExampleStore` does: pair i is sequence i, with its teacher logits."""

    name, fingerprint, max_list_size, has_teacher_logits = "numbered pairs", "", 1, True

    def __init__(self, teacher: np.ndarray) -> None:
        """`teacher` is float32 [n, 2]."""
        self._teacher = teacher

    def __len__(self) -> int:
        return len(self._teacher)

    def take(self, numbers: np.ndarray) -> list[Example]:
        """The examples of these numbers."""
        unknown = np.full(1, -1, np.float32)
        return [
            Example(str(i), str(i), (str(i),), ("-",), self._teacher[i : i + 1], unknown)
            for i in numbers.tolist()
        ]
