"""Labels (query, document) pairs with teachers: from queries, a corpus and candidates to a label folder.

    python -m inranker_jax.label --queries=queries.jsonl --corpus=DIR --candidates=run.trec \\
        --teacher=unicamp-dl/InRanker-3B --output_dir=LABELS
    python -m inranker_jax.label --import_tsv=FILE --queries=... --corpus=... --teacher_name=NAME --output_dir=LABELS
    python -m inranker_jax.label --export_tsv=FILE --output_dir=LABELS

Per query one positive and `--negatives` documents sampled from its first `--depth` candidates are scored by
each `--teacher`. The folder gets `lists.parquet`, `labels.json` and the label store (see
`corpora.label_folder` and `corpora.label_store`). Run the same command again to go on after any interruption.
Several processes or hosts share the work, through a folder that all of them see. On Cloud TPU, Slurm, Open MPI 4 and
GKE the same command on every host is enough; elsewhere add `--coordinator_address=HOST:PORT`, `--process_count` and
`--process_index`. With the last two alone, processes are independent of each other: each does its share whenever it
runs. Labels do not depend on the number of processes, which may change when the command is run again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from inranker_jax import distributed, flags, watchdog
from inranker_jax.errors import InputError
from inranker_jax.interruption import Interruption
from inranker_jax.labeling import import_export
from inranker_jax.labeling.job import ENSEMBLE, LabelJob, Settings
from inranker_jax.labeling.processes import PeerStopped, Processes
from inranker_jax.labeling.sampling import Sampling
from inranker_jax.labeling.teachers import (
    GRAMMAR,
    check_model,
    check_path,
    open_teacher,
    parse_spec,
    parse_weights,
)
from inranker_jax.progress import announce, clock

_MODES = ("import_tsv", "import_jsonl", "export_tsv", "export_jsonl")


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
      InputError: an unknown flag, a bad value, or flags that do not go together.
    """
    parser = flags.Parser("label", "Score sampled lists of candidates with teachers, into a label folder.")
    add = parser.add_argument
    add("--output_dir", required=True, help="the label folder; run again to go on after an interruption")
    add("--queries", help="queries in any format; InPars files know their positives")
    add(
        "--queries_format",
        default="auto",
        help="beir, tsv, jsonl, parquet, inpars, ... (default: by the name)",
    )
    add("--qrels", help="judgments; one document of grade 1 or more is each query's positive")
    add("--corpus", help="documents in any format")
    add("--corpus_format", default="auto", help="beir, tsv, jsonl, parquet, ... (default: by the name)")
    add(
        "--text_only",
        action="store_true",
        help="leave documents' titles out of the pairs, as where they are the queries",
    )
    add("--candidates", help="TREC run, as `python -m inranker_jax.retrieve` writes it")
    add("--teacher", action="append", default=[], help=f"{GRAMMAR}; may be given several times")
    add("--ensemble", metavar="W1,W2", help="also a weighted sum of the teachers' centred logits")
    add("--store", help="a label store shared with other folders (default: OUTPUT_DIR/store)")
    add("--negatives", type=flags.positive, default=9, help="negatives of a query (default 9)")
    add(
        "--depth",
        type=flags.positive,
        default=1000,
        help="sampled from its first DEPTH candidates (default 1000)",
    )
    add("--seed", type=int, default=0, help="of the sampling (default 0)")
    distributed.add_flags(parser)
    watchdog.add_flags(parser)
    add("--chunk_size", type=flags.positive, default=4096, help="pairs between two savings (default 4096)")
    add(
        "--skip_malformed",
        action="store_true",
        help="leave bad rows and unknown candidates out, and count them",
    )
    add("--usd_per_hour", type=float, help="price of this machine, for the cost so far")
    add(
        "--import_tsv", metavar="FILE", help="make the folder from InRanker's TSV (needs --queries, --corpus)"
    )
    add("--import_jsonl", metavar="FILE", help="make the folder from InRanker's BEIR JSONL")
    add("--export_tsv", metavar="FILE", help="write the folder's labels as InRanker's TSV")
    add("--export_jsonl", metavar="FILE", help="write the folder's labels as InRanker's BEIR JSONL")
    add("--teacher_name", help="imports: what the teacher is called; exports: which teacher")
    parsed = parser.parse(argv)
    _check(parsed)
    return parsed


def _check(given: argparse.Namespace) -> None:
    modes = [f"--{name}" for name in _MODES if getattr(given, name)]
    if len(modes) > 1:
        raise InputError(f"{' and '.join(modes)}: expected one of them. Run the command once for each.")
    if modes:
        if given.teacher:
            raise InputError(f"--teacher with {modes[0]}: nothing is scored there. Give --teacher_name=NAME.")
        needed = ["queries", "corpus"] if given.import_tsv else []
        needed += ["teacher_name"] if given.import_tsv or given.import_jsonl else []
    else:
        if given.teacher_name:
            raise InputError(
                "--teacher_name is for imports and exports. Name a teacher with --teacher=NAME=SPEC."
            )
        needed = ["queries", "corpus", "candidates", "teacher"]
    missing = [f"--{name}" for name in needed if not getattr(given, name)]
    if missing:
        raise InputError(f"{', '.join(missing)} missing{f' with {modes[0]}' if modes else ''}. See --help.")


def settings_of(given: argparse.Namespace, processes: Processes) -> Settings:
    """The job that flags describe, for one of the processes that share it."""
    return Settings(
        output_dir=given.output_dir,
        queries=given.queries,
        corpus=given.corpus,
        candidates=given.candidates,
        qrels=given.qrels,
        queries_format=given.queries_format,
        corpus_format=given.corpus_format,
        store=given.store,
        sampling=Sampling(given.negatives, given.depth, given.seed),
        chunk_size=given.chunk_size,
        process_index=processes.index,
        process_count=processes.count,
        joined=processes.joined,
        titles=not given.text_only,
        skip_malformed=given.skip_malformed,
        usd_per_hour=given.usd_per_hour,
    )


def label(given: argparse.Namespace, interruption: Interruption) -> None:
    """Samples lists and labels them with every teacher.

    Raises:
      InputError: bad input.
      PeerStopped: another process of the JAX program has stopped.
      Stopped: a signal arrived; what was finished is kept.
    """
    specs = [parse_spec(text) for text in given.teacher]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two teachers are called {name!r}. Name them: --teacher=NAME=SPEC.")
    weights = parse_weights(given.ensemble, len(specs)) if given.ensemble else None
    if weights and ENSEMBLE in names:
        raise InputError(f"a teacher is called {ENSEMBLE!r}, as --ensemble is. Name it: --teacher=NAME=SPEC.")
    for spec in specs:  # sampling may take long: a mistyped path is told before
        check_path(spec)
    if not any(spec.kind == "t5" for spec in specs):
        # Joining starts JAX, which would take most of the memory of a GPU that torch is to use.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    processes = Processes.join(given)
    with (
        processes.watched(given.hang_seconds, "chunk"),
        processes.ending_together(announce, interruption),
    ):
        for spec in specs:
            check_model(spec)
        job = LabelJob(
            settings_of(given, processes),
            announce=announce,
            stopping=lambda: interruption.requested,
            processes=processes,
        )
        job.prepare()
        keys = []
        for spec in specs:  # one after another: two of them may not fit into memory
            teacher = open_teacher(spec)
            try:
                keys.append(job.label(teacher))
            finally:
                teacher.close()
        job.wait()
        if processes.joined and not processes.is_first:
            announce(f"scored {job.scored:,} pairs, the share of this process")
            return
        if weights and job.ensemble(keys, weights) is None:
            announce("the ensemble follows when the other processes have labelled their share")
        _report(job, job.finish(), given.output_dir)


def _report(job: LabelJob, complete: bool, output_dir: str) -> None:
    cost = job.info()["cost"]
    dollars = "" if cost["usd"] is None or not cost["seconds"] else f", ${cost['usd']:.2f}"
    there = ": all labels were there already" if complete and not job.scored else ""
    print(f"scored {job.scored:,} pairs{there}; all sessions so far: {clock(cost['seconds'])}{dollars}")
    if complete:
        print(f"labels of {', '.join(job.info()['teachers'])} are complete in {output_dir}")
    else:
        print("labels are not complete yet: other processes have chunks to do (run them, or this again)")


def _work(given: argparse.Namespace, interruption: Interruption) -> int | None:
    if given.import_tsv:
        import_export.import_tsv(
            given.import_tsv, given.output_dir, given.teacher_name, queries=given.queries, corpus=given.corpus,
            queries_format=given.queries_format, corpus_format=given.corpus_format, titles=not given.text_only,
            store=given.store, skip_malformed=given.skip_malformed, announce=announce,
        )  # fmt: skip
    elif given.import_jsonl:
        import_export.import_jsonl(
            given.import_jsonl, given.output_dir, given.teacher_name, store=given.store,
            skip_malformed=given.skip_malformed, announce=announce,
        )  # fmt: skip
    elif given.export_tsv or given.export_jsonl:
        path = given.export_tsv or given.export_jsonl
        export = import_export.export_tsv if given.export_tsv else import_export.export_jsonl
        count = export(
            path, given.output_dir, given.teacher_name, queries=given.queries, documents=given.corpus
        )
        print(f"wrote {count:,} pairs to {path}")
    else:
        try:
            label(given, interruption)
        except PeerStopped as stopped:
            announce(str(stopped))
            return stopped.status
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return flags.run_main(lambda interruption: _work(parse_flags(argv), interruption))


if __name__ == "__main__":
    sys.exit(main())
