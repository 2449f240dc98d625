"""One dataset from candidates to report: `evaluate_systems` in memory, `evaluate_dataset` from a folder."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from inranker_jax import paths, records
from inranker_jax.corpora.beir import BeirCollection
from inranker_jax.evaluation import measures as measuring
from inranker_jax.evaluation.candidates import without_identical
from inranker_jax.evaluation.reports import CollectionReport, DatasetSummary
from inranker_jax.evaluation.reranking import (
    Collection,
    Progress,
    ScoreGroups,
    ScorePairs,
    one_by_one,
    rerank,
)
from inranker_jax.evaluation.settings import Settings
from inranker_jax.evaluation.shared_work import RESULT, UNFINISHED, SharedWork
from inranker_jax.labeling.processes import ALONE, Processes
from inranker_jax.manifest import versions
from inranker_jax.records import PathType, Run

Announce = Callable[[str], None]
MODEL = "model"


@dataclass(frozen=True)
class Model:
    """A scorer, and what decides its scores (for provenance, and to know when a result still holds).

    Attributes:
      score_pairs: scores of a list of pairs.
      identity: what decides them; its "fingerprint", if it has one, stands for the rest.
      score_groups: the same for a stream of lists, for devices that should not wait for text between two of them.
    """

    score_pairs: ScorePairs
    identity: dict[str, Any] = field(default_factory=dict)
    score_groups: ScoreGroups | None = None

    @property
    def groups(self) -> ScoreGroups:
        """`score_groups`, or `score_pairs` of one list after another."""
        return self.score_groups or one_by_one(self.score_pairs)


def evaluate_systems(
    collection: Collection,
    candidates: Run,
    systems: Mapping[str, Run | ScorePairs],
    depth: int = 1000,
    measures: Sequence[str] = measuring.DEFAULT_MEASURES,
    *,
    gain: str = "linear",
    drop_identical_ids: bool = True,
    split: str = "test",
    announce: Announce | None = None,
    pairs_per_call: int = 2048,
) -> CollectionReport:
    """Measures systems on one collection.

    Args:
      collection: texts and judgments.
      candidates: the run that scorers rerank.
      systems: name -> a run, measured as it is; or a function from (query, document) texts to scores, which
        reranks the first `depth` candidates. Give `candidates` here too if it is to appear in the report.
      depth: how many candidates of each query are reranked.
      measures: trec_eval's names.
      gain: "linear" or "exponential", for the nDCG measures.
      drop_identical_ids: drop documents whose id is their query's id, as BEIR does.
      split: named in the report.
      announce: prints progress lines of scorers; None is silent.
      pairs_per_call: how many pairs a scorer gets at once.

    Returns:
      The report, systems in the order given; `.table()` prints it.

    Raises:
      InputError: an unknown measure, a run that names unknown documents, scores that are not finite.
    """
    if drop_identical_ids:
        candidates = without_identical(candidates)
    runs: dict[str, Run] = {}
    for name, system in systems.items():
        if callable(system):
            progress = Progress(f"{collection.name} {name}", announce) if announce else None
            runs[name] = rerank(
                candidates, collection, system, depth, pairs_per_call=pairs_per_call, progress=progress
            )
        else:
            judged = {query: dict(scores) for query, scores in system.items() if query in collection.qrels}
            runs[name] = without_identical(judged) if drop_identical_ids else judged
    per_query = {
        name: measuring.evaluate(
            run, collection.qrels, measures, gain, drop_identical_ids=drop_identical_ids
        )
        for name, run in runs.items()
    }  # fmt: skip
    summary = DatasetSummary(
        dataset=collection.name,
        split=split,
        queries=len(collection.qrels),
        systems={name: measuring.aggregate(values) for name, values in per_query.items()},
    )
    return CollectionReport(summary, runs, per_query)


def evaluate_dataset(
    name: str,
    folder: PathType,
    output_dir: PathType,
    settings: Settings,
    model: Model | None = None,
    *,
    run_file: PathType | None = None,
    qrels_file: PathType | None = None,
    announce: Announce = print,
    check: Callable[[], None] = lambda: None,
    processes: Processes = ALONE,
) -> DatasetSummary | None:
    """Evaluates candidates, and a model on them, on one BEIR folder, and writes the result to `output_dir`.

    A dataset that is finished there with the same settings, data and model is read back, not computed again. Several
    processes score groups of its queries, each its own; process 0 waits for the others and writes the result, which
    does not depend on how many there are.

    Args:
      name: the dataset's name in reports and overrides.
      folder: its BEIR folder.
      output_dir: the dataset's own folder, shared by the processes: `<system>.trec`, `per_query.tsv`, `result.json`.
      settings: the command's settings; the dataset's overrides are applied here.
      model: the reranker, or None for the candidates alone.
      run_file: a TREC run with the candidates, in place of BM25.
      qrels_file: judgments in place of `qrels/<split>.tsv`.
      announce: prints a line.
      check: called now and then, at least after each group of queries; raises to stop.
      processes: this process among those that share the work.

    Returns:
      The summary; None in other processes than process 0, when their share is done. Its systems are "bm25" (or
      "candidates", from a run file) and "model".

    Raises:
      InputError: bad settings, files or scores; nothing that was finished before is lost.
      PeerStopped: another process of the JAX program has stopped.
    """
    settings = settings.for_dataset(name)
    measuring.evaluate({}, {}, settings.measures, settings.gain)  # a misspelt measure costs no hour
    target = paths.of(output_dir)
    work = SharedWork(
        target, _fingerprint(folder, settings, model, run_file, qrels_file), announce, check, processes
    )
    finished = work.finished()
    if finished is not None:
        announce(f"{name}: finished in {target}, not computed again")
        return finished if processes.is_first else None
    if processes.is_first:
        _clear(name, target, announce)
    collection = BeirCollection.load(folder, settings.split, name=name, qrels_file=qrels_file)
    first, candidates = work.candidates(collection, settings, run_file)
    reranked = None if model is None else work.rerank(collection, candidates, settings, model.groups)
    if not processes.is_first:
        return None
    notes = _notes(collection, candidates, settings)
    for note in notes:
        announce(f"{name}: {note}")
    report = evaluate_systems(
        collection,
        candidates,
        {first: candidates} | ({MODEL: reranked} if reranked is not None else {}),
        settings.depth,
        settings.measures,
        gain=settings.gain,
        drop_identical_ids=settings.drop_identical_ids,
        split=settings.split,
    )
    provenance = {
        "fingerprint": work.fingerprint,
        "candidates": str(run_file) if run_file is not None else "bm25s lucene",
        "qrels": str(qrels_file) if qrels_file is not None else f"qrels/{settings.split}.tsv",
        "documents": len(collection.documents),
        **_provenance(settings, model),
    }
    summary = dataclasses.replace(report.summary, provenance=provenance, notes=notes)
    dataclasses.replace(report, summary=summary).write(target)
    work.remove()
    return summary


# ---------------------------------------------------------------------------------------------- parts


def _clear(name: str, target: Any, announce: Announce) -> None:
    """Removes a result of other settings; what processes have written since stays."""
    if (target / RESULT).is_file():
        announce(f"{name}: {target} holds a result with other settings, which this one replaces")
        (target / RESULT).unlink()
        for stale in target.glob("*.trec"):
            if not stale.name.startswith(UNFINISHED):
                stale.unlink()


def _provenance(settings: Settings, model: Model | None) -> dict[str, Any]:
    values = {**dataclasses.asdict(settings), "measures": list(settings.measures)}
    del values["overrides"]  # applied, and empty by now
    return {
        "settings": values,
        "model": model.identity if model is not None else None,
        "versions": versions(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _notes(collection: BeirCollection, candidates: Run, settings: Settings) -> tuple[str, ...]:
    notes = []
    without_text = collection.judged_without_text
    if without_text:
        notes.append(
            f"{len(without_text)} judged queries (such as {without_text[0]!r}) are not in queries.jsonl; "
            "they score 0 and count"
        )
    missing = sum(not candidates.get(query) for query in collection.judged_queries)
    if missing:
        notes.append(f"{missing} judged queries have no candidates; they score 0 and count")
    if settings.drop_identical_ids:
        own = sum(collection.qrels[query].get(query, 0) > 0 for query in collection.judged_queries)
        if own:
            notes.append(
                f"{own} queries share their id with a document that is judged relevant to them and is "
                "dropped (BEIR drops such documents). If queries and documents are numbered apart in this "
                "dataset, set drop_identical_ids to False for it"
            )
    return tuple(notes)


def _fingerprint(
    folder: PathType,
    settings: Settings,
    model: Model | None,
    run_file: PathType | None,
    qrels_file: PathType | None,
) -> str:
    """Everything that decides the result, hashed: contents of files, not their places or dates."""
    root = paths.of(folder)
    files = [*sorted(root.glob("corpus.jsonl*")), *sorted(root.glob("queries.jsonl*"))]
    files.append(paths.of(qrels_file) if qrels_file is not None else root / "qrels" / f"{settings.split}.tsv")
    files += [paths.of(run_file)] if run_file is not None else []
    digests = []
    for path in files:
        if path.is_file():
            with records.open_raw(path) as contents:
                digests.append(hashlib.file_digest(cast(Any, contents), "sha256").hexdigest())
    decides = {
        "settings": dataclasses.asdict(settings),
        "files": digests,
        "candidates": "run" if run_file is not None else "bm25",
        "model": model.identity.get("fingerprint", model.identity) if model is not None else None,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
