"""How datasets are evaluated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.evaluation import measures as measuring


@dataclass(frozen=True)
class Settings:
    """How datasets are evaluated.

    Attributes:
      depth: how many candidates of each query the model scores.
      candidates: how many documents BM25 retrieves for each query (at least `depth` are retrieved).
      language: of BM25's stemmer and stop words, one of `retrieval.LANGUAGES`.
      k1: BM25's term frequency saturation.
      b: BM25's length normalisation.
      judged_only: rank the judged documents of each query only, for collections whose pool is reranked.
      split: which judgments, `qrels/<split>.tsv`.
      measures: trec_eval's names; see `evaluation.measures.evaluate`.
      gain: "linear" (trec_eval) or "exponential".
      drop_identical_ids: drop documents whose id is their query's id, as BEIR does.
      pairs_per_call: how many pairs the model gets at once; after each such call the scores are on disk.
      overrides: dataset name -> other values of these settings for it.
    """

    depth: int = 1000
    candidates: int = 1000
    language: str = "english"
    k1: float = 0.9
    b: float = 0.4
    judged_only: bool = False
    split: str = "test"
    measures: Sequence[str] = measuring.DEFAULT_MEASURES
    gain: str = "linear"
    drop_identical_ids: bool = True
    pairs_per_call: int = 2048
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def for_dataset(self, name: str) -> Settings:
        """The settings of one dataset; overrides of "cqadupstack" hold for "cqadupstack/android" too.

        Raises:
          InputError: an override names a setting that does not exist.
        """
        names = [item.name for item in dataclasses.fields(self) if item.name != "overrides"]
        changes: dict[str, Any] = {}
        for key in (name.split("/")[0], name):
            for setting, value in self.overrides.get(key, {}).items():
                if setting not in names:
                    raise InputError(
                        f"settings of dataset {key!r}: there is no setting {setting!r}."
                        f"{did_you_mean(setting, names)} Settings: {', '.join(names)}."
                    )
                changes[setting] = value
        return dataclasses.replace(self, overrides={}, **changes)
