"""The part of a dataset's evaluation that processes share: its candidates, and the model's scores of them.

While it is unfinished, the dataset's folder holds

    unfinished-<fingerprint>.trec   BM25's candidates, with several processes: all of them rerank the same
    unfinished*.jsonl               the scores of each process, see `score_memory`

and process 0 removes them when the result is written.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from inranker_jax import paths, records
from inranker_jax.corpora.beir import BeirCollection
from inranker_jax.errors import InputError
from inranker_jax.evaluation.candidates import find_candidates
from inranker_jax.evaluation.reports import DatasetSummary
from inranker_jax.evaluation.reranking import Progress, Reranking, ScoreGroups
from inranker_jax.evaluation.score_memory import ScoreMemory
from inranker_jax.evaluation.settings import Settings
from inranker_jax.labeling.processes import Processes
from inranker_jax.records import PathType, Run

UNFINISHED = "unfinished"
RESULT = "result.json"


@dataclass(frozen=True)
class SharedWork:
    """One dataset's work, in one of the processes that share it.

    Attributes:
      folder: the dataset's output folder, local or remote (`paths.of`).
      fingerprint: whatever decides the result.
      announce: prints a line.
      check: called now and then; raises to stop.
      processes: this process among the others.
    """

    folder: Any
    fingerprint: str
    announce: Callable[[str], None]
    check: Callable[[], None]
    processes: Processes

    def finished(self) -> DatasetSummary | None:
        """The result, when the folder holds one of this fingerprint.

        Raises:
          InputError: result.json is not one of this program.
        """
        path = self.folder / RESULT
        try:
            summary = DatasetSummary.from_dict(json.loads(paths.read(path)))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError.at(
                path, None, f"not a result of this program ({error})", remedy="Delete it"
            ) from error
        return summary if summary.provenance.get("fingerprint") == self.fingerprint else None

    def candidates(
        self, collection: BeirCollection, settings: Settings, run_file: PathType | None
    ) -> tuple[str, Run]:
        """The candidates, the same in all processes: `(name of the system, run)`.

        BM25's index of a large collection takes the memory of several models. So only process 0 of a JAX program
        makes it; of independent processes whichever comes first.

        Raises:
          InputError: the run file does not belong to the collection.
          PeerStopped: another process has stopped.
        """
        if self.processes.count == 1 or run_file is not None:
            return find_candidates(collection, settings, run_file)
        path = self.folder / f"{UNFINISHED}-{self.fingerprint[:16]}.trec"
        what = f"candidates of {collection.name}"
        if self.processes.joined and not self.processes.is_first:
            there = lambda: path.is_file() or self.finished() is not None  # noqa: E731
            self._wait(what, lambda: {} if there() else {0: what})
        elif not path.is_file():
            records.write_run(path, find_candidates(collection, settings, None)[1], "bm25")
        self.processes.tell(what)
        try:
            run = records.read_run(path)
        except InputError:
            if self.finished() is None:
                raise
            run = {}  # process 0 has finished, and removed them: nothing is left to do
        return "bm25", {query: run.get(query, {}) for query in collection.judged_queries}

    def rerank(
        self, collection: BeirCollection, candidates: Run, settings: Settings, score_groups: ScoreGroups
    ) -> Run | None:
        """Scores this process's groups of queries; process 0 waits for the others.

        Returns:
          The model's run; None in other processes than process 0.

        Raises:
          InputError: scores that are not finite, or processes that do not share the folder.
          PeerStopped: another process has stopped.
        """
        name, processes = collection.name, self.processes
        memory = self._memory()
        with contextlib.closing(memory):
            work = Reranking(candidates, collection, settings.depth, settings.pairs_per_call, memory)
            left = work.unfinished()
            if processes.is_first and len(left) < len(work.groups):
                self.announce(f"{name}: going on after {len(memory)} queries")
            # Process 0 writes the result before it removes the scores: where they are gone, the result is there.
            if left and not processes.is_first and self.finished() is not None:
                self.remove()  # candidates that this one has written since
                return None
            with processes.phases.phase("scoring"):
                work.score(
                    score_groups,
                    (processes.index, processes.count),
                    progress=Progress(f"{name} model", self.announce),
                    check=self._check,
                )
            what = f"scores of {name}"
            processes.tell(what)
            if not processes.is_first:
                return None

            def missing() -> dict[int, str]:
                nonlocal left
                left = work.unfinished(left)
                owners = Counter(number % processes.count for number in left)
                return {i: f"{n:,} of {len(work.groups):,} groups of queries" for i, n in owners.items()}

            self._wait(what, missing)
            return work.result()

    def remove(self) -> None:
        """Removes what was kept for going on; the result must have been written."""
        self._memory().remove()
        for path in self.folder.glob(f"{UNFINISHED}-*.trec"):
            path.unlink(missing_ok=True)

    def _memory(self) -> ScoreMemory:
        return ScoreMemory(self.folder / f"{UNFINISHED}.jsonl", self.fingerprint, self.processes.index)

    def _check(self) -> None:
        """After each group of queries."""
        self.processes.phases.step_done()
        self.check()
        self.processes.check()

    def _wait(self, what: str, missing: Callable[[], dict[int, str]]) -> None:
        self.processes.wait(what, missing, self.folder, self.announce, self.check)
