"""Candidates for queries: BM25 over a corpus of any format, or somebody's run checked and put in one form.

    python -m inranker_jax.retrieve --corpus=scifact/ --queries=scifact/queries.jsonl --output=run.trec
    python -m inranker_jax.retrieve --corpus=collection.tsv --queries=queries.train.tsv --index=index/ \\
        --output=run.trec.gz
    python -m inranker_jax.retrieve --corpus=... --queries=... --run=anserini.trec --output=run.trec

Run the same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from inranker_jax import flags as flag_types
from inranker_jax.corpora import MalformedReport, open_corpus, open_queries_any
from inranker_jax.errors import InputError
from inranker_jax.interruption import Interruption
from inranker_jax.progress import announce
from inranker_jax.retrieval import LANGUAGES, job

_BM25_FLAGS = ("language", "k1", "b", "index", "threads")


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
      InputError: an unknown, missing or contradictory flag.
    """
    parser = flag_types.Parser("retrieve", "BM25 candidates as a TREC run, or an existing run checked.")
    add = parser.add_argument
    add("--corpus", required=True, help="documents: a file, folder, glob or comma-separated parts")
    add("--queries", required=True, help="queries: a file, or a BEIR folder")
    add("--output", required=True, help="the TREC run to write (.gz compresses)")
    add("--corpus_format", default="auto", help="beir, tsv, jsonl, parquet, inpars, flagembedding or auto")
    add("--queries_format", default="auto", help="as --corpus_format")
    add("--depth", type=flag_types.positive, default=1000, help="candidates of a query at most (1000)")
    add("--tag", help="last column of the run (bm25, or the name of --run)")
    add(
        "--skip_malformed",
        action="store_true",
        help="leave out and count bad rows instead of ending at the first",
    )
    add("--language", help=f"of stemmer and stop words (english): {', '.join(LANGUAGES)}")
    add("--k1", type=float, help="BM25's term frequency saturation (0.9)")
    add("--b", type=float, help="BM25's length normalisation (0.4)")
    add("--index", help="folder that keeps the index: opened if it is there, built otherwise")
    add("--threads", type=flag_types.positive, help="queries searched at a time (all processors)")
    add("--run", help="take candidates from this TREC run instead of BM25: check ids, sort, cut at --depth")
    flags = parser.parse(argv)
    given = [name for name in _BM25_FLAGS if getattr(flags, name) is not None]
    if flags.run is not None and given:
        raise InputError(f"--{given[0]} is for BM25 and does nothing with --run: leave one of the two out.")
    return flags


def work(flags: argparse.Namespace, interruption: Interruption) -> None:
    """Retrieves, and prints what the run holds.

    Raises:
      InputError: bad input.
      Stopped: a signal came.
    """
    report = MalformedReport()
    policy = "skip" if flags.skip_malformed else "raise"
    corpus = open_corpus(flags.corpus, flags.corpus_format, on_malformed=policy, report=report)  # type: ignore[arg-type]
    queries = open_queries_any(flags.queries, flags.queries_format, on_malformed=policy, report=report)  # type: ignore[arg-type]

    def stop() -> bool:
        return interruption.requested

    if flags.run is not None:
        summary = job.normalise(
            flags.run, corpus, queries, flags.output, depth=flags.depth, stop=stop,
            tag=flags.tag or os.path.basename(flags.run).split(".")[0] or "run",
            skip_malformed=flags.skip_malformed,
        )  # fmt: skip
    else:
        settings = {name: getattr(flags, name) for name in _BM25_FLAGS if getattr(flags, name) is not None}
        summary = job.retrieve(
            corpus, queries, flags.output, depth=flags.depth, tag=flags.tag or "bm25", stop=stop, **settings
        )
    if report.total:
        announce(report.summary())
    print(summary.text())


def main(argv: Sequence[str] | None = None) -> int:
    """Parses flags and retrieves. Returns the exit status."""
    try:
        flags = parse_flags(argv)
    except InputError as error:
        announce(f"error: {error}")
        return 2
    return flag_types.run_main(lambda interruption: work(flags, interruption))


if __name__ == "__main__":
    sys.exit(main())
