"""Trains a student for a domain of which there are only documents: queries, candidates, labels, training.

    python -m inranker_jax.adapt --corpus=FOLDER --teacher=CKPT --student=CKPT --output_dir=DIR
    python -m inranker_jax.adapt ... --generator=openai:http://localhost:8000 --queries.model=NAME
    python -m inranker_jax.adapt ... --skip=verify --gin.BATCH_SIZE=8

Every stage is a command of this package, printed before it runs and recorded in `DIR/adapt.json`: run the same
command again to go on where it stopped. `--STAGE.FLAG=VALUE` passes a flag to one stage, `--gin.NAME=VALUE` to
training. Without a generator the title (or first sentence) of a document stands in for an LLM's query, and the
summary says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from inranker_jax import paths
from inranker_jax.corpora.label_folder import LabelFolder
from inranker_jax.data.shares import query_share
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.flags import Parser, commas, positive, run_main
from inranker_jax.interruption import Interruption
from inranker_jax.labeling.teachers import check_model, check_path, parse_spec
from inranker_jax.progress import announce, clock
from inranker_jax.query_generation.secret import check_url
from inranker_jax.records import atomic_text
from inranker_jax.retrieval.words import check_language
from inranker_jax.stages import Outcome, Stage, StageFailed, is_finished, recorded_command, run_stages

STAGES = ("queries", "candidates", "labels", "verify", "train", "export", "evaluate_before", "evaluate")
# How long the thesis warms up: 20,000 of 329,000 steps (section 4.1).
_WARMUP_SHARE = 20_000 / 329_000
_WARMUP = "--gin.WARMUP_STEPS="
RECORD = "adapt.json"
# Flags of `generate_queries` that decide how answers are fetched, and not which.
_ANSWERING = (
    "concurrency", "max_retries", "timeout", "max_failures", "api_key_env", "api_key_header", "batch_size", "device",
    "budget_requests", "budget_tokens", "budget_usd", "usd_per_million_tokens",
)  # fmt: skip

TASK_FILE = '''"""SeqIO tasks over labels, as pairs and as lists. Made by `python -m inranker_jax.adapt`."""

from inranker_jax.tasks.label_folders import register

COMMON = {{"folder": {labels!r}, "teacher": {teacher!r}, "validation_fraction": {held_out!r}}}

register("adapt", **COMMON)
register("adapt_lists", **COMMON, list_size={size!r})
'''


class Pipeline:
    """The stages of one adaptation, with their command lines as the flags settle them."""

    def __init__(self, flags: argparse.Namespace, extra: dict[str, list[str]]) -> None:
        """Settles where everything goes.

        Args:
          flags: the parsed command line.
          extra: further flags by stage; those of "gin" go to training.

        Raises:
          InputError: `--evaluate_on` has no judgments.
        """
        self._flags, self._extra = flags, extra
        self.output = _place(flags.output_dir)
        self.labels, self.student = self.output / "labels", self.output / "student"
        self._queries = paths.of(flags.queries) if flags.queries else self.output / "queries.jsonl"
        self._run = self.output / "candidates.trec"
        self._judged = _judged_folder(flags)
        malformed = ["--skip_malformed"] if flags.skip_malformed else []
        self._corpus = [f"--corpus={flags.corpus}", f"--corpus_format={flags.corpus_format}", *malformed]

    def stages(self) -> list[Stage]:
        """The stages in order, without those for which there is no input (no judgments to evaluate with)."""
        flags = self._flags
        findings = {1: "Look at its findings; --skip=verify trains on these labels all the same."}
        unanswered = {
            3: "Run again to ask for the missing queries; --skip=queries goes on with those that are there."
        }
        verified, exported = self.output / "verification.json", self.output / "export"
        teacher = parse_spec(flags.teacher).path
        student = [flags.student] if flags.student else []
        stages = []
        if not flags.queries:
            stages.append(
                self._stage(
                    "queries", "generate_queries", self._generate, self._queries,
                    about=self._generated, hints=unanswered, usd=self._spent, fixed=True,
                    free=tuple(f"--{flag}" for flag in _ANSWERING),
                )
            )  # fmt: skip
        own_queries = [flags.queries] if flags.queries else []
        stages += [
            self._stage("candidates", "retrieve", self._retrieve, self._run, own_queries, fixed=True),
            self._stage(
                "labels", "label", self._label, self.labels / "labels.json", [*own_queries, teacher],
                about=self._labelled, fixed=True, free=("--usd_per_hour", "--chunk_size"),
            ),
            self._stage("verify", "verify_labels", lambda: self._verify(verified), verified, hints=findings),
            self._stage("train", "train", self._train, self.student / "manifest.json", student),
            self._stage("export", "export", lambda: self._export(exported), exported),
        ]  # fmt: skip
        if self._judged is not None:
            before = [("evaluate_before", flags.student)] if flags.student else []
            stages += [
                self._evaluation(name, checkpoint, self._judged)
                for name, checkpoint in (*before, ("evaluate", self.student))
            ]
        return stages

    def _stage(
        self,
        name: str,
        binary: str,
        arguments: Callable[[], list[str]],
        output: Any,
        inputs: Sequence[str] = (),
        **more: Any,
    ) -> Stage:
        def command() -> list[str]:
            own = self._extra.get(name, [])
            return [sys.executable, "-m", f"inranker_jax.{binary}", *arguments(), *own]

        return Stage(name, command, (output,), (self._flags.corpus, *inputs), **more)

    def _generate(self) -> list[str]:
        flags = self._flags
        number = [f"--num_documents={flags.num_documents}"] if flags.num_documents else []
        own = [f"--generator={flags.generator}", f"--seed={flags.seed}", *number]
        return [*self._corpus, *own, f"--output={self._queries}"]

    def _retrieve(self) -> list[str]:
        flags = self._flags
        own = [f"--language={flags.language}", f"--depth={flags.depth}", f"--index={self.output / 'index'}"]
        return [*self._corpus, f"--queries={self._queries}", *own, f"--output={self._run}"]

    def _label(self) -> list[str]:
        flags = self._flags
        own = [f"--teacher={flags.teacher}", f"--negatives={flags.negatives}", f"--depth={flags.depth}"]
        text_only = ["--text_only"] if _titles_are_queries(flags) else []
        price = [f"--usd_per_hour={flags.usd_per_hour}"] if flags.usd_per_hour is not None else []
        files = [f"--queries={self._queries}", f"--candidates={self._run}", f"--output_dir={self.labels}"]
        return [*self._corpus, *files, *own, f"--seed={flags.seed}", *text_only, *price]

    def _verify(self, report: Any) -> list[str]:
        return [f"--labels={self.labels}", f"--plot={self.output / 'labels.png'}", f"--json={report}"]

    def _train(self) -> list[str]:
        flags = self._flags
        steps = flags.train_steps or epochs_in_steps(self.labels, flags.epochs, flags.batch_size)
        held_out = validation_share(self.labels, flags.validation_fraction)
        if held_out is None:
            announce("a single query: none is held out, so training watches no validation loss")
        task = self.output / "task.py"
        with atomic_text(task) as out:
            out.write(
                TASK_FILE.format(
                    labels=str(self.labels),
                    teacher=parse_spec(flags.teacher).name,
                    size=flags.negatives + 1,
                    held_out=held_out or 0.0,
                )
            )
        # A run goes on with more steps or fewer, not with another warm-up.
        known = [part for part in recorded_command(self.output / RECORD, "train") if _WARMUP in part]
        warmup = (
            known[0].partition("=")[2] if known and self.student.exists() else round(_WARMUP_SHARE * steps)
        )
        bindings = {
            "TRAIN_STEPS": steps,
            "WARMUP_STEPS": max(1, int(warmup)),
            "BATCH_SIZE": flags.batch_size,
            "MIXTURE_OR_TASK_MODULE": json.dumps(str(task)),
        }
        if held_out is None:
            bindings["train.validation_split"] = "None"
        start = [f"--init_checkpoint={flags.student}"] if flags.student else []
        gin = [f"--gin.{name}={value}" for name, value in bindings.items()]
        more = self._extra.get("gin", [])
        return [f"--gin_file={flags.gin_file}", *start, f"--output_dir={self.student}", *gin, *more]

    def _export(self, folder: Any) -> list[str]:
        return [f"--checkpoint={self.student}", f"--output_dir={folder}"]

    def _evaluation(self, name: str, checkpoint: Any, judged: Any) -> Stage:
        flags, folder = self._flags, self.output / name
        language = json.dumps(flags.language)
        arguments = [
            f"--checkpoint={checkpoint}",
            f"--beir_dir={judged.parent}",
            f"--datasets={judged.name}",
            f"--split={flags.split}",
            f"--depth={flags.evaluation_depth}",
            f"--gin.evaluation.Settings.language={language}",
            f"--output_dir={folder}",
        ]
        results = folder / "results.json"
        inputs = [str(judged), str(checkpoint)] if name == "evaluate_before" else [str(judged)]
        return self._stage(
            name, "evaluate", lambda: arguments, results, inputs, about=lambda: _measured(results)
        )

    def _report(self) -> dict[str, Any]:
        name = self._queries.with_name(self._queries.name.removesuffix(".jsonl") + ".report.json")
        report: dict[str, Any] = json.loads(name.read_text(encoding="utf-8"))
        return report

    def _generated(self) -> str:
        report = self._report()
        tokens = report["cost"]["prompt_tokens"] + report["cost"]["completion_tokens"]
        used = f", {tokens:,} tokens" if tokens else ""
        return f"{report['counts']['written']:,} queries by {report['generator']}{used}"

    def _spent(self) -> float:
        return float(self._report()["cost"]["usd"] or 0.0)

    def _labelled(self) -> str:
        counts = _counts(self.labels)
        distinct = counts["distinct_pairs"]
        return f"{counts['pairs']} pairs of {counts['queries']} queries, {distinct} distinct"


def _place(path: str) -> Any:
    """A path as stages are told it, wherever they run: local ones from the root on, without links."""
    return paths.of(path) if paths.is_remote(path) else pathlib.Path(path).resolve()


def _titles_are_queries(flags: argparse.Namespace) -> bool:
    """Whether a document's title became its query: then the pair is judged, and learnt, without the title."""
    return flags.generator == "title" and not flags.queries


def _judged_folder(flags: argparse.Namespace) -> Any:
    """The BEIR folder to evaluate on: `--evaluate_on`, else the corpus itself where it has judgments, else None."""
    folder = _place(flags.evaluate_on or flags.corpus)
    judgments = folder / "qrels" / f"{flags.split}.tsv"
    if judgments.exists():
        return folder
    if flags.evaluate_on:
        raise InputError.at(
            judgments, None, "no such file", "a BEIR folder with judgments", "Check --evaluate_on and --split"
        )
    return None


def epochs_in_steps(labels: paths.PathType, epochs: float, batch_size: int) -> int:
    """Steps that read all labelled pairs `epochs` times, `batch_size` pairs a step."""
    return max(1, math.ceil(epochs * _counts(labels)["pairs"] / batch_size))


def validation_share(labels: paths.PathType, fraction: float) -> float | None:
    """The share of queries to hold out, such that there is a query to validate on and one to train on.

    Which side a query falls on is a hash of its text, so a few queries may all fall on one. Then the boundary
    is drawn beside the one that is nearest to it.

    Args:
      labels: the label folder.
      fraction: the share that was asked for.

    Returns:
      A share; None for a single query, which cannot be divided.
    """
    folder = LabelFolder(labels)
    texts = folder.query_texts()
    shares = sorted({query_share(texts[query]) for query, _ in folder.lists.query_sizes()})
    if len(shares) < 2:
        return None
    cut = min(max(1, sum(share < fraction for share in shares)), len(shares) - 1)
    return fraction if shares[cut - 1] < fraction <= shares[cut] else (shares[cut - 1] + shares[cut]) / 2


def _counts(labels: paths.PathType) -> dict[str, int]:
    info = json.loads(paths.read(paths.of(labels) / "labels.json"))
    counts: dict[str, int] = info["counts"]
    return counts


def _measured(results: Any) -> str:
    datasets = json.loads(results.read_text(encoding="utf-8"))["datasets"]
    systems = next(iter(datasets.values()))["systems"]
    return "nDCG@10: " + ", ".join(f"{name} {row['ndcg_cut_10']:.4f}" for name, row in systems.items())


def summary(outcomes: Sequence[Outcome], usd_per_hour: float | None) -> str:
    """The closing table: what ran, for how long, at what price, and what came out."""
    width = max(len(outcome.stage) for outcome in outcomes)
    lines = []
    for outcome in outcomes:
        left = f"{outcome.stage:<{width}}  {outcome.status:<11}  {clock(outcome.seconds):>7}"
        lines.append(f"{left}{_price(outcome.seconds, outcome.usd, usd_per_hour)}  {outcome.about}".rstrip())
    seconds, usd = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("seconds", "usd"))
    return "\n".join([*lines, f"{clock(seconds)} in all{_price(seconds, usd, usd_per_hour)}"])


def _price(seconds: float, usd: float, usd_per_hour: float | None) -> str:
    """What the machine and others cost, where that is known: `  $1.20`."""
    if usd_per_hour is None and not usd:
        return ""
    return f"  ${usd + seconds / 3600 * (usd_per_hour or 0.0):.2f}"


def split_stage_flags(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Separates `--STAGE.FLAG=VALUE` and `--gin.NAME=VALUE` from the rest.

    >>> split_stage_flags(["--labels.chunk_size=8", "--gin.SEED=1", "--seed=2"])
    ({'labels': ['--chunk_size=8'], 'gin': ['--gin.SEED=1']}, ['--seed=2'])

    Raises:
      InputError: there is no such stage.
    """
    extra: dict[str, list[str]] = {}
    rest = []
    for argument in argv:
        name, dot, flag = argument.partition("=")[0].removeprefix("--").partition(".")
        if not (argument.startswith("--") and dot):
            rest.append(argument)
        elif name == "gin":
            extra.setdefault("gin", []).append(argument)
        elif name in STAGES and flag:
            extra.setdefault(name, []).append("--" + argument.removeprefix(f"--{name}."))
        else:
            raise InputError(
                f"{argument}: no stage {name!r}.{did_you_mean(name, STAGES)} Stages: {', '.join(STAGES)}."
            )
    return extra, rest


def parse_flags(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """Parses the command line into flags and the flags of single stages.

    Raises:
      InputError: an unknown flag or stage, a missing flag, or a value out of range.
    """
    extra, rest = split_stage_flags(sys.argv[1:] if argv is None else argv)
    parser = Parser("adapt", "From documents and a teacher to a student for their domain.")
    add = parser.add_argument
    add("--corpus", required=True, help="documents: a BEIR folder, JSONL, TSV or Parquet")
    add("--corpus_format", default="auto", help="see `retrieve --help`")
    add("--teacher", required=True, help="T5 checkpoint, or KIND:PATH for other teachers: see `label --help`")
    add(
        "--student",
        help="checkpoint to start from; without it, the recipe's model from random initialisation",
    )
    add("--output_dir", required=True, help="everything goes there, gs:// and s3:// too; rerun to resume")
    add(
        "--queries",
        help="queries of your own with their documents (InPars JSONL): leaves out stage 'queries'",
    )
    add(
        "--generator",
        default="title",
        help="openai:URL, local:PATH_OR_HUB or title: see `generate_queries --help`",
    )
    add("--num_documents", type=positive, help="documents to write queries for")
    add("--language", default="english", help="of the documents, for BM25")
    add("--depth", type=positive, default=1000, help="BM25 candidates from which negatives are drawn")
    add("--negatives", type=positive, default=9, help="of each query")
    add("--seed", type=int, default=0)
    add("--epochs", type=float, default=10.0, help="passes over the pairs (thesis, sample sets: 10)")
    add("--train_steps", type=positive, help="instead of --epochs")
    add("--batch_size", type=positive, default=32, help="examples a step")
    add("--validation_fraction", type=float, default=0.02, help="share of queries held out of training")
    add("--gin_file", default="gin/runs/adapt.gin", help="the training recipe")
    add("--evaluate_on", help="BEIR folder with judgments; default: the corpus, where it has them")
    add("--split", default="test", help="judgments to evaluate on")
    add("--evaluation_depth", type=positive, default=100, help="BM25 candidates that the student reranks")
    add("--skip", type=commas, default=[], help=f"stages to leave out, of {', '.join(STAGES)}")
    add("--usd_per_hour", type=float, help="price of this machine, for the summary")
    add("--skip_malformed", action="store_true", help="leave bad lines of the corpus out, and count them")
    flags = parser.parse(rest)
    unknown = [name for name in flags.skip if name not in STAGES]
    if unknown:
        raise InputError(
            f"--skip={unknown[0]}: no such stage.{did_you_mean(unknown[0], STAGES)} Stages: {', '.join(STAGES)}."
        )
    if flags.generator.startswith("openai:"):
        # Before the command line of any stage is shown or written down.
        check_url(flags.generator.removeprefix("openai:"))
    _check_inputs(flags)
    if flags.epochs <= 0:
        raise InputError(f"--epochs={flags.epochs}: expected a positive number.")
    if not 0 < flags.validation_fraction < 1:
        raise InputError(f"--validation_fraction={flags.validation_fraction}: expected a share in (0, 1).")
    if not pathlib.Path(flags.corpus).exists() and "://" not in flags.corpus:
        raise InputError(f"--corpus={flags.corpus}: no such file or folder.")
    return flags, extra


def _check_inputs(flags: argparse.Namespace) -> None:
    """What would otherwise be found out after hours of earlier stages."""
    spec = parse_spec(flags.teacher)
    needed = {"cross-encoder": "transformers", "bi-encoder": "sentence_transformers"}.get(spec.kind)
    if needed and importlib.util.find_spec(needed) is None:
        raise InputError(
            f"--teacher={flags.teacher}: needs the package {needed!r}. Run `pip install 'inranker_jax[teachers]'`."
        )
    check_path(spec)
    student = flags.student
    if student and student.startswith(("/", ".", "~")) and not pathlib.Path(student).expanduser().exists():
        raise InputError(f"--student: no such file or folder {student!r}.")
    check_language(flags.language)


def _check_models(flags: argparse.Namespace, record: Any) -> None:
    """Looks for the models of stages that are still to come, before the first stage costs anything.

    Raises:
      InputError: the teacher or the student is no model that could be opened.
    """
    needed = [
        name for name in ("labels", "train") if name not in flags.skip and not is_finished(record, name)
    ]
    if "labels" in needed:
        with _about("--teacher"):
            check_model(parse_spec(flags.teacher))
    if "train" in needed and flags.student:
        from inranker_jax import checkpoints  # and JAX, which the stages import for themselves

        with _about("--student"):
            checkpoints.check_model(flags.student)


@contextlib.contextmanager
def _about(flag: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error


def adapt(flags: argparse.Namespace, extra: dict[str, list[str]], interruption: Interruption) -> int:
    """Runs the stages and prints the summary. Returns the exit status."""
    output = _place(flags.output_dir)
    paths.check_reachable(output)
    _check_models(flags, output / RECORD)
    paths.make_output_folder(output)
    if _titles_are_queries(flags):
        announce("queries: titles (or first sentences) of the documents; no language model writes any.")
    outcomes: list[Outcome] = []
    try:
        for outcome in run_stages(Pipeline(flags, extra).stages(), output / RECORD, interruption, flags.skip):
            outcomes.append(outcome)
    except StageFailed as failure:
        if outcomes:
            print(summary(outcomes, flags.usd_per_hour))
        announce(f"error: {failure} What was finished is kept; run the same command to go on.")
        return failure.status
    print(summary(outcomes, flags.usd_per_hour))
    for name, what in (("student", "the student"), ("export", "for transformers")):
        if (output / name).exists():
            announce(f"{what}: {output / name}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parses flags and runs. Returns the exit status."""

    def work(interruption: Interruption) -> int:
        flags, extra = parse_flags(argv)
        return adapt(flags, extra, interruption)

    return run_main(work)


if __name__ == "__main__":
    sys.exit(main())
