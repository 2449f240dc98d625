"""What a labelling job is given."""

from __future__ import annotations

from dataclasses import dataclass, field

from inranker_jax.errors import InputError
from inranker_jax.labeling.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a labelling job is given.

    Attributes:
      output_dir: the label folder, which all processes see: local, mounted, `gs://` or `s3://`.
      queries: path of the queries.
      corpus: path of the corpus.
      candidates: TREC run with each query's candidates.
      qrels: judgments; documents with a grade of at least 1 may be positives. None: the queries file itself
        says which document each query belongs to (InPars).
      queries_format: see `corpora.open_queries_any`.
      corpus_format: see `corpora.open_corpus`.
      store: the label store; None for one inside the folder.
      sampling: how lists are sampled.
      chunk_size: pairs between two savings.
      process_index: number of this process.
      process_count: number of processes that share the work.
      joined: whether they are one JAX program. Its process 0 samples the lists, waits for the others' labels, and
        alone writes labels.json; independent processes do all of that whenever they can.
      titles: whether a document is its title and text, or its text only (where titles serve as queries).
      skip_malformed: leave out rows that cannot be used, and candidates that are not in the corpus.
      usd_per_hour: price of this process's machine.
    """

    output_dir: str
    queries: str
    corpus: str
    candidates: str
    qrels: str | None = None
    queries_format: str = "auto"
    corpus_format: str = "auto"
    store: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    chunk_size: int = 4096
    process_index: int = 0
    process_count: int = 1
    joined: bool = False
    titles: bool = True
    skip_malformed: bool = False
    usd_per_hour: float | None = None

    def check(self) -> None:
        """Checks the values.

        Raises:
          InputError: one is out of range.
        """
        if not 0 <= self.process_index < self.process_count:
            raise InputError(
                f"--process_index={self.process_index} of --process_count={self.process_count}: expected a "
                "number from 0 to one less than the count."
            )
        for name in ("negatives", "depth"):
            value = getattr(self.sampling, name)
            if value < 1:
                raise InputError(f"--{name}={value}: expected at least 1.")
        if self.chunk_size < 1:
            raise InputError(f"--chunk_size={self.chunk_size}: expected at least 1.")
        if self.usd_per_hour is not None and not self.usd_per_hour >= 0:
            raise InputError(f"--usd_per_hour={self.usd_per_hour}: expected a price of at least 0.")
