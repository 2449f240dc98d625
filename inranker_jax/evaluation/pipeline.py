"""One dataset from candidates to report: `evaluate_systems` in memory, `evaluate_dataset` from a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inranker_jax import records
from inranker_jax.corpora.beir import BeirCollection
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.evaluation import measures as measuring
from inranker_jax.evaluation.reports import CollectionReport, DatasetSummary
from inranker_jax.evaluation.reranking import (
    Collection,
    Progress,
    ScoreMemory,
    ScorePairs,
    check_candidates,
    rerank,
)
from inranker_jax.manifest import versions
from inranker_jax.records import PathType, Run

Announce = Callable[[str], None]
MODEL = "model"
_UNFINISHED = "unfinished.jsonl"


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


@dataclass(frozen=True)
class Model:
    """A scorer, and what decides its scores (for provenance, and to know when a result still holds)."""

    score_pairs: ScorePairs
    identity: dict[str, Any] = field(default_factory=dict)


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
    memories: Mapping[str, ScoreMemory] | None = None,
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
      memories: system -> where its finished queries are kept.
      pairs_per_call: how many pairs a scorer gets at once.

    Returns:
      The report, systems in the order given; `.table()` prints it.

    Raises:
      InputError: an unknown measure, a run that names unknown documents, scores that are not finite.
    """
    if drop_identical_ids:
        candidates = _without_identical(candidates)
    runs: dict[str, Run] = {}
    for name, system in systems.items():
        if callable(system):
            progress = Progress(f"{collection.name} {name}", announce) if announce else None
            memory = (memories or {}).get(name)
            runs[name] = rerank(
                candidates,
                collection,
                system,
                depth,
                pairs_per_call=pairs_per_call,
                memory=memory,
                progress=progress,
            )
        else:
            judged = {query: dict(scores) for query, scores in system.items() if query in collection.qrels}
            runs[name] = _without_identical(judged) if drop_identical_ids else judged
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
) -> DatasetSummary:
    """Evaluates candidates, and a model on them, on one BEIR folder, and writes the result to `output_dir`.

    A dataset that is finished there with the same settings, data and model is read back, not computed again.

    Args:
      name: the dataset's name in reports and overrides.
      folder: its BEIR folder.
      output_dir: the dataset's own folder: `<system>.trec`, `per_query.tsv`, `result.json`.
      settings: the command's settings; the dataset's overrides are applied here.
      model: the reranker, or None for the candidates alone.
      run_file: a TREC run with the candidates, in place of BM25.
      qrels_file: judgments in place of `qrels/<split>.tsv`.
      announce: prints a line.

    Returns:
      The summary. Its systems are "bm25" (or "candidates", from a run file) and "model".

    Raises:
      InputError: bad settings, files or scores; nothing that was finished before is lost.
    """
    settings = settings.for_dataset(name)
    measuring.evaluate({}, {}, settings.measures, settings.gain)  # a misspelt measure costs no hour
    target = Path(output_dir)
    fingerprint = _fingerprint(folder, settings, model, run_file, qrels_file)
    finished = _finished(target / "result.json", fingerprint)
    if finished is not None:
        announce(f"{name}: finished in {target}, not computed again")
        return finished
    if (target / "result.json").is_file():
        announce(f"{name}: {target} holds a result with other settings, which this one replaces")
        for stale in [*target.glob("*.trec"), target / "result.json"]:
            stale.unlink()
    collection = BeirCollection.load(folder, settings.split, name=name, qrels_file=qrels_file)
    first, candidates = _candidates(collection, settings, run_file)
    notes = _notes(collection, candidates, settings)
    for note in notes:
        announce(f"{name}: {note}")
    report = _run_systems(collection, {first: candidates}, settings, model, target, fingerprint, announce)
    provenance: dict[str, Any] = {
        "fingerprint": fingerprint,
        "settings": {**dataclasses.asdict(settings), "measures": list(settings.measures)},
        "candidates": str(run_file) if run_file is not None else "bm25s lucene",
        "qrels": str(qrels_file) if qrels_file is not None else f"qrels/{settings.split}.tsv",
        "documents": len(collection.documents),
        "model": model.identity if model is not None else None,
        "versions": versions(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    del provenance["settings"]["overrides"]  # applied, and empty by now
    summary = dataclasses.replace(report.summary, provenance=provenance, notes=notes)
    dataclasses.replace(report, summary=summary).write(target)
    (target / _UNFINISHED).unlink(missing_ok=True)
    return summary


# ---------------------------------------------------------------------------------------------- parts


def _candidates(collection: BeirCollection, settings: Settings, run_file: PathType | None) -> tuple[str, Run]:
    if run_file is not None:
        run = records.read_run(run_file)
        check_candidates(run, collection, str(run_file))
        run = {query: scores for query, scores in run.items() if query in collection.qrels}
        if not run:
            raise InputError.at(
                run_file,
                None,
                f"no query of this run is judged in {collection.name!r}",
                "a run over its queries",
            )
        if settings.judged_only:
            run = {q: {d: s for d, s in run[q].items() if d in collection.qrels[q]} for q in run}
        return "candidates", _without_identical(run) if settings.drop_identical_ids else run
    from inranker_jax.retrieval import BM25Index

    index = BM25Index.build(collection.documents.values(), settings.language, settings.k1, settings.b)
    count = max(settings.candidates, settings.depth)
    among = collection.qrels if settings.judged_only else None
    # One more than needed, because a query may find itself and that is dropped.
    run = index.search(collection.judged_queries.values(), count + 1, among)
    if settings.drop_identical_ids:
        run = _without_identical(run)
    return "bm25", {query: dict(list(scores.items())[:count]) for query, scores in run.items()}


def _run_systems(
    collection: BeirCollection,
    candidates: dict[str, Run],
    settings: Settings,
    model: Model | None,
    target: Path,
    fingerprint: str,
    announce: Announce,
) -> CollectionReport:
    systems: dict[str, Run | ScorePairs] = {**candidates}
    with contextlib.ExitStack() as stack:
        memories: dict[str, ScoreMemory] = {}
        if model is not None:
            systems[MODEL] = model.score_pairs
            memory = ScoreMemory(target / _UNFINISHED, fingerprint)
            stack.callback(memory.close)
            memories[MODEL] = memory
            if len(memory):
                announce(f"{collection.name}: going on after {len(memory)} queries")
        return evaluate_systems(
            collection,
            next(iter(candidates.values())),
            systems,
            settings.depth,
            settings.measures,
            gain=settings.gain,
            drop_identical_ids=settings.drop_identical_ids,
            split=settings.split,
            announce=announce,
            memories=memories,
            pairs_per_call=settings.pairs_per_call,
        )


def _without_identical(run: Run) -> Run:
    return {
        query: {document: score for document, score in scores.items() if document != query}
        for query, scores in run.items()
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
    root = Path(folder)
    files = [*sorted(root.glob("corpus.jsonl*")), *sorted(root.glob("queries.jsonl*"))]
    files.append(Path(qrels_file) if qrels_file is not None else root / "qrels" / f"{settings.split}.tsv")
    files += [Path(run_file)] if run_file is not None else []
    digests = []
    for path in files:
        if path.is_file():
            with open(path, "rb") as contents:
                digests.append(hashlib.file_digest(contents, "sha256").hexdigest())
    decides = {
        "settings": dataclasses.asdict(settings),
        "files": digests,
        "candidates": "run" if run_file is not None else "bm25",
        "model": model.identity.get("fingerprint", model.identity) if model is not None else None,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _finished(path: Path, fingerprint: str) -> DatasetSummary | None:
    if not path.is_file():
        return None
    try:
        summary = DatasetSummary.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError.at(
            path, None, f"not a result of this program ({error})", remedy="Delete it"
        ) from error
    return summary if summary.provenance.get("fingerprint") == fingerprint else None
