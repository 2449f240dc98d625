"""CTranslate2: one step of greedy decoding with the logits of the whole vocabulary returned."""

from __future__ import annotations

from typing import Any

import ctranslate2
import numpy as np

from .models import LABEL_IDS, Names
from .worker import sequences_of


class Contender:
    """Options: `folder`, `compute_type`, `replicas` (it divides the `threads`), `tokens` of a batch."""

    def __init__(self, options: dict[str, Any]) -> None:
        replicas = options["replicas"]
        if options["threads"] % replicas:
            raise ValueError(f"{options['threads']} threads do not divide among {replicas} replicas")
        self._tokens = options["tokens"]
        self._translator = ctranslate2.Translator(
            options["folder"],
            device="cpu",
            compute_type=options["compute_type"],
            inter_threads=replicas,
            intra_threads=options["threads"] // replicas,
        )
        self._names = Names().names
        self._workloads: dict[str, list[list[str]]] = {}

    def about(self) -> dict[str, Any]:
        """Version and the precision in effect."""
        return {"ctranslate2": ctranslate2.__version__, "compute_type": self._translator.compute_type}

    def prepare(self, name: str, arrays: dict[str, np.ndarray], mode: str) -> dict[str, Any]:
        """It reads names of tokens, not ids: made here, so that this does not count as its time."""
        self._workloads[name] = [
            [self._names[token] for token in sequence] for sequence in sequences_of(arrays)
        ]
        return {"values": self.run(name, mode, 0)}

    def run(self, name: str, mode: str, number: int) -> list[float]:
        """Differences of the label logits; it sorts by length and cuts by tokens itself."""
        found = self._translator.translate_batch(
            self._workloads[name],
            max_batch_size=self._tokens,
            batch_type="tokens",
            beam_size=1,
            max_input_length=0,
            min_decoding_length=1,
            max_decoding_length=1,
            return_logits_vocab=True,
        )
        false, true = LABEL_IDS
        rows = [np.asarray(result.logits[0][0]) for result in found]
        return [float(row[true]) - float(row[false]) for row in rows]

    def peak(self) -> dict[str, float]:
        """None: it has no matrix product to call."""
        return {}
