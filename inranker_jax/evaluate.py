"""Evaluates a reranker on collections in the BEIR format.

    python -m inranker_jax.evaluate --gin_file=gin/eval_beir.gin --checkpoint=DIR_OR_HUB_ID \\
        --beir_dir=DIR --datasets=scifact,cranfield --output_dir=DIR
    python -m inranker_jax.evaluate --gin_file=gin/eval_beir.gin --bm25_only ...
    python -m inranker_jax.evaluate --gin_file=gin/eval_beir.gin --runs=scifact=FILE.trec ...

The output folder gets `results.json` and a folder for each dataset with TREC runs, per-query values and its
own `result.json`. Run the same command again to go on after an interruption: finished datasets are read back,
and in an unfinished one the queries already scored are kept.

Several processes or hosts share the model's work, through an output folder that all of them see: on Cloud TPU, Slurm,
Open MPI 4 and GKE the same command on every host is enough; elsewhere add `--coordinator_address=HOST:PORT`,
`--process_count` and `--process_index` (the last two alone: independent processes, whenever they run). Process 0
writes the results, which do not depend on the number of processes. The model must fit the devices of one process.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from inranker_jax import configuration, distributed, paths, quiet, watchdog
from inranker_jax.configuration import gin
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.evaluation import pipeline
from inranker_jax.evaluation.reports import CQADUPSTACK, DatasetSummary, Report, write_json
from inranker_jax.flags import Parser, commas
from inranker_jax.interruption import Interruption
from inranker_jax.labeling.processes import ALONE, PeerStopped, Processes
from inranker_jax.manifest import versions
from inranker_jax.paths import PathType
from inranker_jax.progress import announce

# What the gin files of this binary may bind. None of it loads model code, so BM25 alone does not.
CONFIGURABLES = (
    "evaluation.Settings",
    "evaluation.load_reranker",
    "packing.Layout",
    "partitioning.make_mesh",
    "partitioning.single_device_mesh",
    "prompts.ScoringContract",
    "prompts.preset",
)


def evaluate(flags: argparse.Namespace, settings: pipeline.Settings, processes: Processes = ALONE) -> Report:
    """Evaluates the datasets that the flags name; process 0 writes `results.json` after each of them.

    Returns:
      The report; without datasets in other processes than process 0.

    Raises:
      InputError: a bad flag, file or model.
      KeyboardInterrupt: a signal arrived; what was finished is kept. The argument is the exit status.
      PeerStopped: another process of the JAX program has stopped.
    """
    summaries: list[DatasetSummary] = []
    with (
        Interruption() as interruption,
        processes.watched(flags.hang_seconds, "group of queries"),
        processes.ending_together(announce, interruption),
    ):
        # A signal is only noted when it arrives, and looked at between groups of queries: Python drops an exception
        # that a handler raises inside a garbage collection callback, and JAX has one, so a Ctrl-C that raised at once
        # would sometimes do nothing.
        def check() -> None:
            if interruption.requested:
                raise KeyboardInterrupt(interruption.exit_status)

        names = find_datasets(flags.beir_dir, flags.datasets)
        runs = _files_of("--runs", flags.runs, names)
        qrels = _files_of("--qrels", flags.qrels, names)
        if processes.is_first or not flags.bm25_only:
            paths.make_output_folder(flags.output_dir)
        model = None if flags.bm25_only else _load_model(flags.checkpoint, processes)
        if model is None and not processes.is_first:
            announce("without a model, process 0 does all of the work")
            names = []
        for position, name in enumerate(names, start=1):
            check()
            announce(f"[{position}/{len(names)}] {name}")
            summary = pipeline.evaluate_dataset(
                name,
                paths.of(flags.beir_dir) / name,
                paths.of(flags.output_dir) / name,
                settings,
                model,
                run_file=runs.get(name),
                qrels_file=qrels.get(name),
                announce=announce,
                check=check,
                processes=processes,
            )
            if summary is None:
                continue
            summaries.append(summary)
            results = Report(tuple(summaries)).to_dict(
                complete=position == len(names),
                command=sys.argv,
                checkpoint=None if flags.bm25_only else flags.checkpoint,
                versions=versions(),
            )
            write_json(paths.of(flags.output_dir) / "results.json", results)
    return Report(tuple(summaries))


def _load_model(checkpoint: str, processes: Processes) -> pipeline.Model:
    """The model on this process's own devices, a mesh that gin binds included."""
    with contextlib.ExitStack() as stack:
        if processes.joined:
            import jax

            from inranker_jax.partitioning import using_devices

            stack.enter_context(using_devices(jax.local_devices()))
        return gin.get_configurable("evaluation.load_reranker")(checkpoint)


def find_datasets(beir_dir: PathType, names: Sequence[str]) -> list[str]:
    """Checks dataset names against the folders below `beir_dir`; "cqadupstack" stands for all its forums.

    Raises:
      InputError: the folder or a dataset does not exist; the message lists those that do.
    """
    root = paths.of(beir_dir)
    if not root.is_dir():
        raise InputError(
            f"--beir_dir={beir_dir}: no such folder. Expected one with a BEIR folder for each dataset."
        )
    known = sorted(
        path.parent.relative_to(root).as_posix()
        for pattern in ("*/corpus.jsonl*", "*/*/corpus.jsonl*")
        for path in root.glob(pattern)
    )
    known = list(dict.fromkeys(known))
    found: list[str] = []
    for name in names:
        forums = [other for other in known if other.startswith(f"{CQADUPSTACK}/")]
        if name in known:
            found.append(name)
        elif name == CQADUPSTACK and forums:
            found.extend(forums)
        else:
            have = f"It has {', '.join(known)}" if known else "No folder there has a corpus.jsonl"
            raise InputError(f"no dataset {name!r} in {beir_dir}.{did_you_mean(name, known)} {have}.")
    if not found:
        raise InputError(f"--datasets is empty. {beir_dir} has {', '.join(known) or 'no dataset'}.")
    return list(dict.fromkeys(found))


def _files_of(flag: str, values: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Parses `dataset=FILE`; a single dataset's file may be given without its name."""
    files: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if len(names) == 1 and (not equals or paths.of(value).exists()):
            name, path = names[0], value
        elif not equals:
            raise InputError(f"{flag}={value}: with several datasets, say which: {flag}=DATASET=FILE.")
        elif name not in names:
            raise InputError(
                f"{flag}={value}: {name!r} is not among --datasets ({', '.join(names)})."
                + did_you_mean(name, names)
            )
        if name in files:
            raise InputError(f"{flag}: two files for dataset {name!r}.")
        if not paths.of(path).is_file():
            raise InputError(f"{flag}={value}: no such file {path!r}.")
        files[name] = path
    return files


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line into flags and gin bindings.

    Raises:
      InputError: an unknown flag, or one that is missing.
    """
    bindings, rest = configuration.split_gin_flags(argv)
    parser = Parser(
        "evaluate", "Rerank candidates on BEIR collections and report nDCG@10 and other measures."
    )
    configuration.add_gin_flags(parser)
    add = parser.add_argument
    add("--beir_dir", required=True, help="folder that holds a BEIR folder for each dataset")
    add("--datasets", required=True, type=commas, help="comma-separated; 'cqadupstack' means all its forums")
    add("--output_dir", required=True, help="where runs and results go; rerun to go on after an interruption")
    add("--checkpoint", help="the reranker: training output, checkpoint, Hugging Face folder or hub id")
    add("--bm25_only", action="store_true", help="stop after the candidates (no model)")
    add(
        "--runs",
        type=commas,
        action="extend",
        default=[],
        help="candidates from TREC runs: DATASET=FILE,...",
    )
    add(
        "--qrels",
        type=commas,
        action="extend",
        default=[],
        help="other judgments: FILE, or DATASET=FILE,...",
    )
    add("--split", help="which qrels/SPLIT.tsv (evaluation.Settings.split)")
    add(
        "--depth", type=int, help="candidates of each query that the model scores (evaluation.Settings.depth)"
    )
    distributed.add_flags(parser)
    watchdog.add_flags(parser)
    flags = parser.parse(rest)
    if bool(flags.checkpoint) == flags.bm25_only:
        raise InputError(
            "give a model with --checkpoint, or --bm25_only for the candidates alone"
            + (", not both." if flags.checkpoint else ".")
        )
    for folder in (flags.beir_dir, flags.output_dir):
        paths.of(folder)  # a kind of path that is not known is told before any work
    return flags, bindings


def main(argv: Sequence[str] | None = None) -> int:
    """Parses flags and gin, evaluates, prints the table. Returns the exit status."""
    try:
        quiet.without_a_tpu()
        flags, bindings = parse_flags(sys.argv[1:] if argv is None else argv)
        given = {"split": flags.split, "depth": flags.depth}
        bindings = [f"evaluation.Settings.{k} = {v!r}" for k, v in given.items() if v is not None] + bindings
        configuration.parse_gin(
            flags.gin_file or ["gin/eval_beir.gin"], bindings, flags.gin_search_paths, names=CONFIGURABLES
        )
        settings = gin.get_configurable("evaluation.Settings")()
        processes = Processes.join(flags)
        report = evaluate(flags, settings, processes)
    except InputError as error:
        announce(f"error: {configuration.message_of(error)}")
        return error.exit_status
    except KeyboardInterrupt as interrupt:
        announce("interrupted: what was finished is kept; run the same command to go on.")
        return interrupt.args[0] if interrupt.args else 130
    except PeerStopped as stopped:
        announce(str(stopped))
        return stopped.status
    if processes.is_first:
        print(report.table())
        announce(f"Runs, per-query values and results.json are in {flags.output_dir}")
    else:
        announce("the share of this process is done; process 0 has the results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
