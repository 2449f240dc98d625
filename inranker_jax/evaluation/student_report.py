"""The table at the end of a training run: BM25, the untrained student, the trained student, the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from inranker_jax import paths
from inranker_jax.checkpoints import native
from inranker_jax.corpora.beir import BeirCollection
from inranker_jax.corpora.shipped import find_shipped
from inranker_jax.evaluation.measures import label
from inranker_jax.evaluation.pipeline import evaluate_systems
from inranker_jax.models import T5Config
from inranker_jax.prompts import ScoringContract, Tokenizer
from inranker_jax.records import Run, read_run
from inranker_jax.retrieval import BM25Index
from inranker_jax.scorer import Reranker

REPORT = "report"
MEASURES = ("ndcg_cut_10", "recip_rank_10", "recall_50")


def report_student(
    model_dir: str,
    config: T5Config,
    contract: ScoringContract,
    tokenizer: Tokenizer,
    untrained_params: Any,
    *,
    collection: str,
    depth: int = 50,
    split: str = "test",
    language: str = "english",
    teacher_run: str | None = None,
    measures: Sequence[str] = MEASURES,
    announce: Callable[[str], None] = print,
) -> None:
    """Measures the best checkpoint of a run beside what it started from, and prints one table.

    Args:
      model_dir: the run's folder; runs, per-query values and `result.json` are written to `report/` in it.
      config: the student's architecture.
      contract: its scoring contract.
      tokenizer: its tokenizer.
      untrained_params: its parameters before the first step.
      collection: BEIR folder, or the name of a shipped collection; its judgments were not trained on.
      depth: BM25 candidates of each query that the models rerank.
      split: which judgments.
      language: of BM25's stemmer and stop words.
      teacher_run: TREC run of the teacher over the same candidates, relative to the collection.
      measures: trec_eval's names.
      announce: prints progress lines.
    """
    folder = find_shipped(collection)
    data = BeirCollection.load(folder, split)
    candidates = BM25Index.build(data.documents.values(), language).search(
        data.judged_queries.values(), depth
    )
    description, best, _, source = native.load_parts(model_dir)
    # On this process's first device: the report is small, and needs no mesh.
    untrained = jax.tree.map(jax.device_get, untrained_params)
    student = Reranker(config, untrained, tokenizer, contract)
    systems: dict[str, Run | Callable[..., Any]] = {"BM25": candidates}

    def score_with(params: Any) -> Callable[..., Any]:
        def score_pairs(pairs: Any) -> Any:
            student.update_params(params)
            return student.score_pairs(pairs)

        return score_pairs

    systems["untrained student"] = score_with(untrained)
    systems["trained student"] = score_with(best)
    if teacher_run:
        systems["teacher"] = read_run(paths.of(folder) / teacher_run)
    report = evaluate_systems(data, candidates, systems, depth, measures, split=split, announce=announce)
    report.write(paths.of(model_dir) / REPORT)
    announce(
        f"\n{report.summary.queries} held-out {split} queries of {data.name}, BM25 top {depth} reranked; "
        f"{label(measures[0])} by trec_eval; student: {description.config.num_params / 1e6:.1f}M parameters, {source}\n"
    )
    announce(report.table())
