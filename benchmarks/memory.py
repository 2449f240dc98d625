"""Peak memory: scoring any number of pairs from a file, and training at a batch of 32 x 512 tokens.

    python benchmarks/memory.py [--pairs=1000000] [--model=t5-base] [--parts=scoring,training]

Scoring reads pairs from a file of generated text with `Reranker.score_pairs`, by the smallest model, so that a million
end in minutes: what could grow with the number of pairs is the stream, not the model. Training takes optimiser steps of
the model of --model on 32 pairs of 512 tokens. Each part is a process of its own, whose resident memory is sampled; the
status is 1 when a bound is passed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from contenders import report, rounds, settings, text_models, workloads
from contenders.models import SHAPES

PARTS = ("scoring", "training")
GIB = 2**30
SCORING_BOUND, TRAINING_BOUND = 1.0, 24.0
WORDS = (
    "the", "of", "and", "to", "in", "is", "for", "that", "are", "with", "on", "by", "from", "this", "which", "can",
    "not", "have", "one", "all", "new", "time", "people", "water", "city", "music", "year", "world", "school",
    "history", "system", "state", "river", "group", "power", "law", "war", "science", "energy", "light", "plant",
)  # fmt: skip
SETTLED = 50_000  # pairs after which a stream has met everything that it will keep


# ---------------------------------------------------------------------------------------------- measured processes


class Memory:
    """Resident memory of this process, sampled until it is read."""

    def __init__(self) -> None:
        self.peak = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def now() -> int:
        """Bytes."""
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            self.peak = max(self.peak, self.now())

    def close(self) -> int:
        """Ends the sampling; the largest value in bytes."""
        self._end.set()
        self._thread.join()
        return max(self.peak, self.now())


def measure_scoring(model: str, pairs: str) -> dict[str, float]:
    """Scores a file of `query TAB document` lines."""
    memory = Memory()
    from inranker_jax import Reranker

    reranker = Reranker.from_pretrained(model, contract=text_models.CONTRACT)
    settled = 0

    def read() -> Iterator[tuple[str, str]]:
        nonlocal settled
        with open(pairs, encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                query, document = line.rstrip("\n").split("\t")
                if number == SETTLED:
                    settled = memory.peak
                yield query, document

    started = time.perf_counter()
    scores = reranker.score_pairs(read())
    seconds = time.perf_counter() - started
    peak = memory.close()
    result = {"pairs": len(scores), "seconds": seconds, "settled": settled or peak, "peak": peak}
    return {**result, "useful_share": reranker.statistics.useful_share}


def measure_training(model: str, batch: str, dtype: str, mode: str, steps: str) -> dict[str, float]:
    """Takes optimiser steps on one batch, which is made and compiled here too."""
    memory = Memory()
    from contenders.ours_trainer import Contender
    from contenders.worker import read_arrays

    trainer = Contender({"folder": model, "dtype": dtype, "micro_batches": [4]})
    trainer.prepare("batch", read_arrays(batch), mode)
    started = time.perf_counter()
    losses = [trainer.run("batch", mode, 0)[0] for _ in range(int(steps))]
    seconds = (time.perf_counter() - started) / len(losses)
    return {"loss": losses[-1], "seconds": seconds, "peak": memory.close()}


def in_a_process(
    function: Callable[..., Any],
    *arguments: object,
    cores: list[int],
    environment: dict[str, str],
    log: pathlib.Path,
) -> dict[str, Any]:
    """Runs this file again as one measurement; `error` says what happened to one that failed."""
    command = [sys.executable, __file__, "--measure", function.__name__, *map(str, arguments)]
    with log.open("ab") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **environment},
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if hasattr(os, "sched_setaffinity") else None,
        )
        try:
            output, _ = process.communicate()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode:
        killed = " (killed: out of memory?)" if process.returncode == -9 else ""
        return {"error": f"status {process.returncode}{killed}; see {log}"}
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


# ---------------------------------------------------------------------------------------------- parts


def write_pairs(path: pathlib.Path, pairs: int) -> None:
    """Pairs of generated text, 10 to 40 words a document, a hundred documents a query, all different."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        query = ""
        for number in range(pairs):
            if number % 100 == 0:
                query = " ".join(chance.choices(WORDS, k=6))
            document = " ".join(chance.choices(WORDS, k=chance.randint(10, 40)))
            out.write(f"{query}\t{document} {number}\n")


@dataclasses.dataclass
class Row:
    """A measurement beside its bound, in GiB."""

    what: str
    bound: float
    found: dict[str, Any]

    def cells(self) -> list[str]:
        """Of its row of the table."""
        if "error" in self.found:
            return [self.what, f"{self.bound:g}", "failed", "", "no", self.found["error"]]
        peak = self.found["peak"] / GIB
        if "settled" in self.found:
            growth = (self.found["peak"] - self.found["settled"]) / 2**20
            rate = self.found["pairs"] / self.found["seconds"]
            note = f"{growth:,.0f} MiB more than after {SETTLED:,} pairs; {rate:,.0f} pairs/s"
        else:
            note = f"{self.found['seconds']:.1f} s a step"
        return [self.what, f"{self.bound:g}", f"{peak:.2f}", f"{peak / self.bound:.0%}", self.verdict, note]

    @property
    def verdict(self) -> str:
        """Whether it is within the bound."""
        return "yes" if self.found.get("peak", float("inf")) <= self.bound * GIB else "no"


def measure(flags: argparse.Namespace, folder: pathlib.Path, environment: dict[str, str]) -> Iterator[Row]:
    """Yields rows as they are measured."""
    common = {"cores": flags.cores, "environment": environment, "log": flags.output_dir / "log.txt"}
    if "scoring" in flags.parts:
        source = text_models.random_model("micro", flags.work_dir, environment)
        text_models.with_tokenizer(source, folder / "model", flags.shared)
        rounds.say(f"writing {flags.pairs:,} pairs")
        write_pairs(folder / "pairs.tsv", flags.pairs)
        rounds.say("scoring them")
        found = in_a_process(measure_scoring, folder / "model", folder / "pairs.tsv", **common)
        yield Row(f"score {flags.pairs:,} pairs from a file, smallest model", flags.scoring_bound, found)
    if "training" in flags.parts:
        model = text_models.random_model(flags.model, flags.work_dir, environment)
        made = workloads.make("fixed-512", flags.batch_size, folder, flags.shared)
        batch = workloads.labelled(made, "batch", folder, flags.batch_size, 512)
        for dtype in flags.precisions:
            rounds.say(f"training {flags.model}, {dtype}")
            found = in_a_process(
                measure_training, model, batch.path, dtype, flags.layout, flags.steps, **common
            )
            what = f"train {flags.model}, {flags.batch_size} x 512, AdamW, {dtype}, {flags.layout}"
            yield Row(what, flags.training_bound, found)


def main() -> int:
    """Measures, saves and prints."""
    if sys.argv[1:2] == ["--measure"]:
        functions = {function.__name__: function for function in (measure_scoring, measure_training)}
        print(json.dumps(functions[sys.argv[2]](*sys.argv[3:])))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    settings.add_folders(parser, "memory")
    settings.add_cores(parser)
    parser.add_argument("--parts", type=settings.commas, default=list(PARTS), help="scoring,training")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--scoring_bound", type=float, default=SCORING_BOUND, help="GiB")
    parser.add_argument("--model", choices=SHAPES, default="t5-base", help="that is trained")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--layout", default="packed", help="packed, bucketed or padded")
    parser.add_argument("--precisions", type=settings.commas, default=["float32", "bfloat16"])
    parser.add_argument("--training_bound", type=float, default=TRAINING_BOUND, help="GiB")
    flags = parser.parse_args()
    flags.device = "cpu"
    environment = settings.environment(flags)
    rows: list[Row] = []
    with settings.run_folder(flags) as folder:
        machine = report.machine(flags.cores, environment)
        text = ""
        for row in measure(flags, folder, environment):
            rows.append(row)
            header = ["resident memory", "bound, GiB", "peak, GiB", "of the bound", "within", ""]
            table = report.table(header, [done.cells() for done in rows])
            text = f"# Memory\n\n{report.machine_line(machine)}\n\n{table}"
            data = {"machine": machine, "rows": [dataclasses.asdict(done) for done in rows]}
            report.save(flags.output_dir, "memory", data, text)
        print(text)
    return int(any(row.verdict == "no" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
