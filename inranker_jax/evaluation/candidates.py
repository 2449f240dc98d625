"""The candidates of a dataset: BM25's, or those of a run file."""

from __future__ import annotations

from inranker_jax import records
from inranker_jax.corpora.beir import BeirCollection
from inranker_jax.errors import InputError
from inranker_jax.evaluation.reranking import check_candidates
from inranker_jax.evaluation.settings import Settings
from inranker_jax.records import PathType, Run


def find_candidates(
    collection: BeirCollection, settings: Settings, run_file: PathType | None
) -> tuple[str, Run]:
    """The documents to rerank, from a run file or by BM25: `(name of the system, run)`.

    Raises:
      InputError: the run file does not belong to the collection.
    """
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
        return "candidates", without_identical(run) if settings.drop_identical_ids else run
    from inranker_jax.retrieval import BM25Index

    index = BM25Index.build(collection.documents.values(), settings.language, settings.k1, settings.b)
    count = max(settings.candidates, settings.depth)
    among = collection.qrels if settings.judged_only else None
    # One more than needed, because a query may find itself and that is dropped.
    run = index.search(collection.judged_queries.values(), count + 1, among)
    if settings.drop_identical_ids:
        run = without_identical(run)
    return "bm25", {query: dict(list(scores.items())[:count]) for query, scores in run.items()}


def without_identical(run: Run) -> Run:
    """A run without the documents whose id is their query's, as BEIR measures."""
    return {
        query: {document: score for document, score in scores.items() if document != query}
        for query, scores in run.items()
    }
