"""Does labelling survive SIGKILL at any moment? The store after many kills, beside that of one quiet run.

    python benchmarks/kill_labelling.py --kills=20 --processes=1,2

Labels a small generated mixture with a tiny T5 of random weights, `python -m inranker_jax.label` as a user runs it.
Once undisturbed; then, for each number of processes, killing a process at a random moment and starting it again,
until there were `--kills` kills (a round that gets finished is compared, and another begins in an empty folder).
Every round's lists, parts, keys and logits must equal those of the undisturbed run to the bit, and hold every pair
of the lists once. The exit status is 1 when they do not.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import numpy as np

from inranker_jax.checkpoints import huggingface
from inranker_jax.corpora import label_store, shipped
from inranker_jax.corpora.label_folder import LISTS, LabelFolder, Lists, read_labels
from inranker_jax.errors import InputError
from inranker_jax.models import T5Config, init_params
from inranker_jax.prompts import Tokenizer, preset

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = (
    "wing",
    "lift",
    "drag",
    "shock",
    "wave",
    "flow",
    "plate",
    "heat",
    "layer",
    "speed",
    "jet",
    "cone",
    "body",
)


@dataclasses.dataclass
class Outcome:
    """What one number of processes came to.

    Attributes:
      kills: processes killed.
      rounds: times that the labelling was completed.
      moments: what a process had done when it was killed -> number of kills.
      differences: what was not as in the undisturbed run.
    """

    kills: int = 0
    rounds: int = 0
    moments: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    differences: list[str] = dataclasses.field(default_factory=list)


def write_input(folder: pathlib.Path, queries: int, seed: int) -> None:
    """Writes corpus, queries, qrels, BM25-like candidates (random) and a T5 of random weights."""
    rng = random.Random(seed)
    documents = {f"d{i}": " ".join(rng.choices(WORDS, k=rng.randrange(5, 40))) for i in range(2000)}
    (folder / "corpus.tsv").write_text("".join(f"{key}\t{text}\n" for key, text in documents.items()))
    names = [f"q{i}" for i in range(queries)]
    (folder / "queries.tsv").write_text(
        "".join(f"{name}\t{' '.join(rng.choices(WORDS, k=4))}\n" for name in names)
    )
    with open(folder / "run.trec", "w") as run, open(folder / "qrels.txt", "w") as qrels:
        for name in names:
            ranked = rng.sample(sorted(documents), 100)
            run.writelines(
                f"{name} Q0 {doc} {rank} {100 - rank} random\n" for rank, doc in enumerate(ranked, 1)
            )
            qrels.write(f"{name} 0 {ranked[rng.randrange(100)]} 1\n")
    tokenizer = Tokenizer.from_pretrained(shipped.find_shipped("python_docs/vocabulary"))
    config = T5Config(
        vocab_size=tokenizer.vocab_size,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=4,
    )
    contract = preset("monot5").replace(max_length=96)
    huggingface.save(str(folder / "teacher"), config, init_params(config, seed), tokenizer, contract)


def start(
    source: pathlib.Path, output: pathlib.Path, index: int, count: int, chunk: int
) -> subprocess.Popen[bytes]:
    """Starts one labelling process."""
    command = [
        sys.executable, "-m", "inranker_jax.label", f"--queries={source}/queries.tsv", f"--corpus={source}/corpus.tsv",
        f"--candidates={source}/run.trec", f"--qrels={source}/qrels.txt", f"--teacher=t5:{source}/teacher",
        f"--output_dir={output}", f"--chunk_size={chunk}", f"--process_index={index}", f"--process_count={count}",
    ]  # fmt: skip
    with open(output.with_name(f"{output.name}-{index}.log"), "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def moment(output: pathlib.Path, process: int) -> str:
    """When a process (its id) was killed, in words, from what is on disk."""
    if not (output / LISTS).exists():
        return "before the lists"
    parts = len(list(output.glob("store/teachers/*/part-*.parquet")))
    if list(output.glob(f"store/teachers/*/.part-*-{process}.tmp")):
        return "while writing a part"
    if not parts:
        return "before the first part"
    return "with some parts there" if LabelFolder(output).info["pending"] else "with all parts there"


def disturb(
    source: pathlib.Path,
    work: pathlib.Path,
    processes: int,
    kills: int,
    longest: float,
    chunk: int,
    rng: random.Random,
) -> Outcome:
    """Labels with kills, and compares each completed round with `work/quiet`."""
    outcome = Outcome()
    while outcome.kills < kills:
        output = work / f"killed-{processes}-{outcome.rounds}"
        running = {index: start(source, output, index, processes, chunk) for index in range(processes)}
        deadline = time.monotonic() + rng.uniform(0.1, longest)
        while running:
            time.sleep(0.01)
            for index, process in list(running.items()):
                if process.poll() is not None:
                    del running[index]
                    if process.returncode != 0:
                        outcome.differences.append(
                            f"{output.name}: process {index} ended with {process.returncode}"
                        )
            if running and time.monotonic() >= deadline:
                if outcome.kills < kills:
                    index = rng.choice(sorted(running))
                    killed = running[index].pid
                    running[index].kill()
                    running[index].wait()
                    outcome.kills += 1
                    outcome.moments[moment(output, killed)] += 1
                    running[index] = start(source, output, index, processes, chunk)
                deadline = time.monotonic() + rng.uniform(0.1, longest)
        outcome.rounds += 1
        outcome.differences += compare(work / "quiet", output)
    return outcome


def compare(quiet: pathlib.Path, killed: pathlib.Path) -> list[str]:
    """Everything in which two label folders differ, to the bit."""
    found = []
    one, other = LabelFolder(quiet), LabelFolder(killed)
    if (quiet / LISTS).read_bytes() != (killed / LISTS).read_bytes():
        found.append("the lists differ")
    if one.teachers != other.teachers or not other.info["complete"]:
        return [*found, f"teachers {other.info['teachers']}, pending {other.info['pending']}"]
    (key,) = one.teachers.values()
    names = [one.store.parts(key), other.store.parts(key)]
    if names[0] != names[1]:
        found.append(f"parts {sorted(set(names[0]) ^ set(names[1]))} are in one store only")
    keys = [np.zeros((0, label_store.KEY_BYTES), np.uint8)]
    for name in names[1]:
        ours, theirs = other.store.read_part(key, name), one.store.read_part(key, name)
        if not all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            found.append(f"{name} differs")
        keys.append(ours[0])
    stored = label_store.as_strings(np.concatenate(keys))
    wanted = np.unique(label_store.as_strings(Lists(killed).keys()))
    if len(stored) != len(np.unique(stored)):
        found.append(f"{len(stored) - len(np.unique(stored))} pairs are doubled")
    if not np.array_equal(np.unique(stored), wanted):
        found.append(f"{len(np.setdiff1d(wanted, stored))} pairs are lost")
    try:
        if list(read_labels(quiet)) != list(read_labels(killed)):
            found.append("the labelled pairs differ")
    except InputError as error:
        found.append(str(error))
    left = [*killed.glob(".*.tmp"), *(killed / "store").rglob(".*.tmp")]
    found += [f"{path.name} was left behind" for path in left]
    return [f"{killed.name}: {line}" for line in found]


def main() -> int:
    """Runs the benchmark and prints its table. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="kills for each number of processes")
    parser.add_argument("--processes", default="1,2", help="numbers of processes")
    parser.add_argument("--queries", type=int, default=300, help="lists of ten pairs")
    parser.add_argument("--chunk_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        source, work = pathlib.Path(folder, "input"), pathlib.Path(folder, "work")
        source.mkdir()
        work.mkdir()
        write_input(source, given.queries, given.seed)
        began = time.monotonic()
        if start(source, work / "quiet", 0, 1, given.chunk_size).wait():
            print((work / "quiet-0.log").read_text(), file=sys.stderr)
            return 2
        quiet = time.monotonic() - began
        lists = Lists(work / "quiet")
        parts = len(list(work.glob("quiet/store/teachers/*/part-*.parquet")))
        print(
            f"undisturbed: {lists.num_pairs:,} pairs of {lists.num_queries:,} lists, {parts} parts, {quiet:.1f} s",
            flush=True,
        )
        for count in map(int, given.processes.split(",")):
            began = time.monotonic()
            outcome = disturb(source, work, count, given.kills, quiet, given.chunk_size, rng)
            moments = ", ".join(f"{number} {words}" for words, number in sorted(outcome.moments.items()))
            verdict = "equal to the bit" if not outcome.differences else "DIFFERENT"
            print(
                f"{count} process{'es' * (count > 1)}: {outcome.kills} kills ({moments}), {outcome.rounds} completed "
                f"stores, {time.monotonic() - began:.0f} s: {verdict}",
                flush=True,
            )
            for line in outcome.differences:
                print(f"  {line}")
            bad += len(outcome.differences)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
