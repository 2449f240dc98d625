"""Seconds from the start of a process to its first score: ours and transformers with PyTorch, on this machine.

    python benchmarks/startup.py [--model=t5-small] [--rounds=7]

Each measurement is a new process that imports, loads the model and its tokenizer and scores one pair, as a command-line
tool or a function in the cloud does; the clock is the parent's. Ours is measured with a warm cache of compiled programs
(the usual case: the second run of a program on a machine), with an empty one, and with an empty one for pairs of all
lengths of rows, as a first collection has them. They take turns in a new order each round. The goal is the warm one.
All must give the same score.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

from contenders import report, rounds, settings, text_models
from contenders.models import SHAPES

GOAL_SECONDS = 3.0
BOUND = 1e-4
QUERY = "What is a cross-encoder?"
DOCUMENT = "A model that reads a query together with a document, and says how relevant one is to the other."

# Each prints the score, then the seconds at which it had finished importing and loading.
OURS = """
import time; started = time.perf_counter()
import json, sys
from inranker_jax import Reranker
imported = time.perf_counter()
reranker = Reranker.from_pretrained(sys.argv[1], contract="monot5")
loaded = time.perf_counter()
score = float(reranker.scores(sys.argv[2], [sys.argv[3]])[0])
scored = time.perf_counter()
print(json.dumps([score, imported - started, loaded - imported, scored - loaded]), flush=True)
"""
# A first collection: a call of every length that rows may have, each of which is a program to compile.
EVERY_LENGTH = """
import time; started = time.perf_counter()
import json, sys
from inranker_jax import Reranker
imported = time.perf_counter()
reranker = Reranker.from_pretrained(sys.argv[1], contract="monot5")
texts = ["model " * words for words in range(1, 520)]
sizes = [len(ids) for ids in reranker.contract.encode(reranker.tokenizer, [sys.argv[2]] * len(texts), texts)]
wanted = reranker.layout.lengths
chosen = {next(n for n in wanted if n >= size): text for size, text in zip(sizes, texts)}
loaded = time.perf_counter()
for text in chosen.values():
    reranker.scores(sys.argv[2], [text])
score = float(reranker.scores(sys.argv[2], [sys.argv[3]])[0])
scored = time.perf_counter()
assert set(chosen) == set(wanted) and reranker.compilations == len(wanted), (wanted, reranker.compilations)
print(json.dumps([score, imported - started, loaded - imported, scored - loaded]), flush=True)
"""
PYTORCH = """
import time; started = time.perf_counter()
import json, sys
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration
imported = time.perf_counter()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = T5ForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
loaded = time.perf_counter()
with torch.inference_mode():
    given = tokenizer(f"Query: {sys.argv[2]} Document: {sys.argv[3]} Relevant:", return_tensors="pt")
    start = torch.zeros((1, 1), dtype=torch.long)
    labels = tokenizer.convert_tokens_to_ids(["▁false", "▁true"])
    false, true = model(**given, decoder_input_ids=start).logits[0, 0, labels].tolist()
scored = time.perf_counter()
print(json.dumps([true - false, imported - started, loaded - imported, scored - loaded]), flush=True)
"""
CONTENDERS = {
    "ours, warm cache": OURS,
    "ours, empty cache": OURS,
    "ours, empty cache, rows of every length": EVERY_LENGTH,
    "transformers with PyTorch": PYTORCH,
}


@dataclasses.dataclass
class Row:
    """Measurements of a contender: seconds of whole processes and of their parts, and the score."""

    name: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    parts: list[list[float]] = dataclasses.field(default_factory=list)
    score: float | None = None
    error: str | None = None


def measure(
    row: Row, model: pathlib.Path, cores: list[int], environment: dict[str, str], keep: bool = True
) -> None:
    """Starts one process, and waits for its score; `keep` is off for a run that only fills caches."""
    with tempfile.TemporaryDirectory() as empty:
        changed = {"JAX_COMPILATION_CACHE_DIR": empty} if "empty cache" in row.name else {}
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", CONTENDERS[row.name], str(model), QUERY, DOCUMENT],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=settings.ROOT,
            env={**os.environ, **environment, **changed},
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if hasattr(os, "sched_setaffinity") else None,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            seconds = time.perf_counter() - started
            _, errors = process.communicate()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode or not line:
        row.error = (errors.strip().splitlines() or [f"status {process.returncode}"])[-1][:200]
        return
    score, *parts = json.loads(line)
    row.score = score
    if keep:
        row.seconds.append(seconds)
        row.parts.append(parts)


def markdown(flags: argparse.Namespace, machine: dict, vocabulary: str, rows: list[Row]) -> str:
    """The report."""
    lines = []
    for row in rows:
        if row.error or not row.seconds:
            lines.append([row.name, row.error or "not yet", *[""] * 6])
            continue
        parts = [statistics.median(values) for values in zip(*row.parts, strict=True)]
        median = statistics.median(row.seconds)
        goal = f"<= {GOAL_SECONDS:g} s: {'yes' if median <= GOAL_SECONDS else 'no'}"
        cells = [f"{median:.2f}", report.spread(row.seconds), *(f"{part:.2f}" for part in parts)]
        lines.append([row.name, *cells, f"{row.score:.5f}", goal if row.name == "ours, warm cache" else ""])
    header = [
        "process start to first score",
        "seconds",
        "range",
        "imports",
        "load",
        "first score",
        "score",
        "goal",
    ]
    return "\n\n".join(
        [
            f"# Start-up, {flags.model}, {vocabulary}",
            report.machine_line(machine),
            report.table(header, lines),
            "The parts are measured inside the process; what is missing to the whole is Python's own start.",
        ]
    )


def main() -> int:
    """Measures, saves and prints; the status is 1 when the scores differ or ours could not run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    settings.add_folders(parser, "startup")
    parser.add_argument("--model", choices=SHAPES, default="t5-small")
    parser.add_argument("--rounds", type=int, default=7)
    settings.add_cores(parser)
    flags = parser.parse_args()
    flags.device = "cpu"
    environment = settings.environment(flags)
    with settings.run_folder(flags) as folder:
        machine = report.machine(flags.cores, environment)
        source = text_models.random_model(flags.model, flags.work_dir, environment)
        vocabulary = text_models.with_tokenizer(source, folder / "model", flags.shared)
        rows = [Row(name) for name in CONTENDERS]
        for row in rows:
            rounds.say(f"filling caches: {row.name}")
            measure(row, folder / "model", flags.cores, environment, keep=False)
        shuffle = random.Random(0)
        for number in range(flags.rounds):
            for row in shuffle.sample(
                [row for row in rows if not row.error], k=sum(not row.error for row in rows)
            ):
                measure(row, folder / "model", flags.cores, environment)
            rounds.say(f"round {number + 1} of {flags.rounds}")
            text = markdown(flags, machine, vocabulary, rows)
            data = {"model": flags.model, "machine": machine, "rows": [vars(row) for row in rows]}
            report.save(flags.output_dir, "startup", data, text)
        print(text)
    scores = [row.score for row in rows if row.score is not None]
    if max(scores, default=0.0) - min(scores, default=0.0) > BOUND:
        rounds.say(f"error: the scores differ by more than {BOUND:g}: {scores}")
        return 1
    return int(any(row.error for row in rows if row.name.startswith("ours")))


if __name__ == "__main__":
    sys.exit(main())
