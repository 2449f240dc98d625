"""Does labelling survive SIGKILL at any moment? The store after many kills, beside that of one quiet run.

    python benchmarks/kill_labelling.py --kills=20 --forms=1,2,2-together,2-ensemble

Labels a small generated mixture with a tiny T5 of random weights, `python -m inranker_jax.label` as a user runs it.
Once undisturbed; then, for each form, killing at a random moment and starting again, until there were `--kills`
processes killed (a round that gets finished is compared, and another begins in an empty folder). A form is a number
of processes, of which one is killed at a time, and further

    -together   all of them are killed, and all are dead before one is started again
    -ensemble   two teachers and their ensemble, in a store that another label folder shares: it holds the labels of
                a third of the queries before the job begins

Every round's lists, parts, keys and logits must equal those of the undisturbed run to the bit, and hold every pair
of the lists once. The exit status is 1 when they do not.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from inranker_jax.checkpoints import huggingface
from inranker_jax.corpora import label_store, shipped
from inranker_jax.corpora.label_folder import LISTS, LabelFolder, Lists, read_labels
from inranker_jax.errors import InputError
from inranker_jax.labeling.job import LabelJob, Settings
from inranker_jax.labeling.teachers import open_teacher
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


@dataclasses.dataclass(frozen=True)
class Form:
    """How a job is run and killed.

    Attributes:
      processes: how many share the work.
      together: whether all are killed at once.
      ensemble: whether there are two teachers, their ensemble, and a store that another folder shares.
    """

    processes: int
    together: bool
    ensemble: bool

    @classmethod
    def parse(cls, text: str) -> Form:
        """Such as `2-together-ensemble`."""
        count, *words = text.split("-")
        if not count.isdecimal() or int(count) < 1 or not set(words) <= {"together", "ensemble"}:
            raise argparse.ArgumentTypeError(
                f"form {text!r}: expected a number of processes, then -together, -ensemble, both or neither"
            )
        return cls(int(count), "together" in words, "ensemble" in words)

    def __str__(self) -> str:
        words = [f"{self.processes} process{'es' * (self.processes > 1)}"]
        words += ["killed together"] * self.together + ["ensemble in a shared store"] * self.ensemble
        return ", ".join(words)


@dataclasses.dataclass
class Outcome:
    """What one form came to.

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
    lines = (folder / "run.trec").read_text().splitlines(keepends=True)
    (folder / "third.trec").write_text("".join(lines[: queries // 3 * 100]))
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


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where the input and the label folders are, and how fine the work is cut."""

    source: pathlib.Path
    work: pathlib.Path
    chunk: int

    def start(self, name: str, form: Form, index: int) -> subprocess.Popen[bytes]:
        """Starts process `index` of the job that fills the label folder `name`."""
        source, output = self.source, self.work / name
        command = [
            sys.executable, "-m", "inranker_jax.label", f"--queries={source}/queries.tsv",
            f"--corpus={source}/corpus.tsv", f"--candidates={source}/run.trec", f"--qrels={source}/qrels.txt",
            f"--teacher=t5:{source}/teacher", f"--output_dir={output}", f"--chunk_size={self.chunk}",
            f"--process_index={index}", f"--process_count={form.processes}",
        ]  # fmt: skip
        if form.ensemble:
            command += [f"--teacher=random=run:{source}/run.trec", "--ensemble=0.7,0.3"]
            command += [f"--store={self.store(name, form)}"]
        with open(output.with_name(f"{name}-{index}.log"), "ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def store(self, name: str, form: Form) -> pathlib.Path:
        """The store of a label folder."""
        return self.work / f"{name}-store" if form.ensemble else self.work / name / "store"

    def share_store(self, name: str) -> None:
        """Gives a label folder a store that has labels of another folder."""
        shutil.copytree(self.work / "third-store", self.work / f"{name}-store")

    def label_third(self) -> None:
        """Labels a third of the queries, for a store that is shared; in this process, which is quicker."""
        settings = Settings(
            output_dir=str(self.work / "third"),
            queries=f"{self.source}/queries.tsv",
            corpus=f"{self.source}/corpus.tsv",
            candidates=f"{self.source}/third.trec",
            qrels=f"{self.source}/qrels.txt",
            store=str(self.work / "third-store"),
            chunk_size=self.chunk,
        )
        job = LabelJob(settings, announce=lambda _: None)
        job.prepare()
        job.label(open_teacher(f"t5:{self.source}/teacher"))

    def run_quietly(self, name: str, form: Form) -> None:
        """Fills a label folder, undisturbed, with one process.

        Raises:
          RuntimeError: it failed; what it printed.
        """
        alone = dataclasses.replace(form, processes=1)
        if self.start(name, alone, 0).wait():
            raise RuntimeError((self.work / f"{name}-0.log").read_text())

    def moment(self, name: str, form: Form, process: int) -> str:
        """When a process (its id) was killed, in words, from what is on disk."""
        output, store = self.work / name, self.store(name, form)
        if not (output / LISTS).exists():
            return "before the lists"
        if list(store.glob(f"teachers/*/.part-*-{process}.tmp")):
            return "while writing a part"
        before = len(list(self.work.glob("third-store/teachers/*/part-*.parquet"))) if form.ensemble else 0
        if len(list(store.glob("teachers/*/part-*.parquet"))) == before:
            return "before the first part"
        return "with some parts there" if LabelFolder(output).info["pending"] else "with all parts there"

    def disturb(self, form: Form, kills: int, longest: float, quiet: str, rng: random.Random) -> Outcome:
        """Labels with kills, and compares each completed round with the folder `quiet`."""
        outcome = Outcome()
        while outcome.kills < kills:
            name = f"killed-{form}-{outcome.rounds}".replace(" ", "-").replace(",", "")
            if form.ensemble:
                self.share_store(name)
            running = {index: self.start(name, form, index) for index in range(form.processes)}
            deadline = time.monotonic() + rng.uniform(0.1, longest)
            while running:
                time.sleep(0.01)
                for index, process in list(running.items()):
                    if process.poll() is not None:
                        del running[index]
                        if process.returncode != 0:
                            outcome.differences.append(
                                f"{name}: process {index} ended with {process.returncode}"
                            )
                if running and time.monotonic() >= deadline:
                    if outcome.kills < kills:
                        self._kill(name, form, running, outcome, rng)
                    deadline = time.monotonic() + rng.uniform(0.1, longest)
            outcome.rounds += 1
            outcome.differences += compare(self.work / quiet, self.work / name)
        return outcome

    def _kill(
        self,
        name: str,
        form: Form,
        running: dict[int, subprocess.Popen[bytes]],
        outcome: Outcome,
        rng: random.Random,
    ) -> None:
        """Kills one process or all, and starts them again in `running`."""
        chosen = sorted(running) if form.together else [rng.choice(sorted(running))]
        for index in chosen:
            running[index].kill()
        for index in chosen:
            running[index].wait()
        outcome.kills += len(chosen)
        outcome.moments.update(self.moment(name, form, running[index].pid) for index in chosen)
        for index in chosen:
            running[index] = self.start(name, form, index)


def compare(quiet: pathlib.Path, killed: pathlib.Path) -> list[str]:
    """Everything in which two label folders and their stores differ, to the bit."""
    found = []
    one, other = LabelFolder(quiet), LabelFolder(killed)
    if (quiet / LISTS).read_bytes() != (killed / LISTS).read_bytes():
        found.append("the lists differ")
    if one.teachers != other.teachers or not other.info["complete"]:
        return [f"{killed.name}: teachers {other.info['teachers']}, pending {other.info['pending']}"]
    wanted = np.unique(label_store.as_strings(Lists(killed).keys()))
    for teacher, key in one.teachers.items():
        lines = compare_teacher(one.store, other.store, key, wanted)
        try:
            if list(read_labels(quiet, teacher=teacher)) != list(read_labels(killed, teacher=teacher)):
                lines.append("the labelled pairs differ")
        except InputError as error:
            lines.append(str(error))
        found += [f"{teacher}: {line}" for line in lines]
    left = {*killed.rglob(".*.tmp"), *other.store.path.rglob(".*.tmp")}
    found += [f"{path.name} was left behind" for path in sorted(left)]
    return [f"{killed.name}: {line}" for line in found]


def compare_teacher(
    quiet: label_store.LabelStore, killed: label_store.LabelStore, key: str, wanted: np.ndarray
) -> list[str]:
    """In what two stores differ for a teacher, and from holding each of the sorted keys `wanted` once."""
    found = []
    names = [quiet.parts(key), killed.parts(key)]
    if names[0] != names[1]:
        found.append(f"parts {sorted(set(names[0]) ^ set(names[1]))} are in one store only")
    keys = [np.zeros((0, label_store.KEY_BYTES), np.uint8)]
    for name in names[1]:
        own = killed.read_part(key, name)
        if name in names[0]:
            expected = quiet.read_part(key, name)
            if not all(np.array_equal(a, b) for a, b in zip(own, expected, strict=True)):
                found.append(f"{name} differs")
        keys.append(own[0])
    stored = label_store.as_strings(np.concatenate(keys))
    distinct = np.unique(stored)
    if len(stored) != len(distinct):
        found.append(f"{len(stored) - len(distinct)} pairs are doubled")
    if not np.array_equal(distinct, wanted):
        found.append(f"{len(np.setdiff1d(wanted, distinct))} pairs are lost")
    return found


def run(bench: Bench, forms: list[Form], kills: int, rng: random.Random) -> int:
    """Runs the forms and prints a line for each. Returns the number of differences."""
    bad = 0
    quiet: dict[bool, tuple[str, float]] = {}
    for form in forms:
        if form.ensemble not in quiet:
            name = "quiet-ensemble" if form.ensemble else "quiet"
            if form.ensemble:
                bench.label_third()
                bench.share_store(name)
            began = time.monotonic()
            bench.run_quietly(name, form)
            quiet[form.ensemble] = name, time.monotonic() - began
            lists = Lists(bench.work / name)
            parts = len(list(bench.store(name, form).glob("teachers/*/part-*.parquet")))
            print(
                f"undisturbed{', ensemble in a shared store' * form.ensemble}: {lists.num_pairs:,} pairs of "
                f"{lists.num_queries:,} lists, {parts} parts, {quiet[form.ensemble][1]:.1f} s",
                flush=True,
            )
        name, seconds = quiet[form.ensemble]
        began = time.monotonic()
        outcome = bench.disturb(form, kills, seconds, name, rng)
        moments = ", ".join(f"{number} {words}" for words, number in sorted(outcome.moments.items()))
        verdict = "equal to the bit" if not outcome.differences else "DIFFERENT"
        print(
            f"{form}: {outcome.kills} kills ({moments}), {outcome.rounds} completed stores, "
            f"{time.monotonic() - began:.0f} s: {verdict}",
            flush=True,
        )
        for line in outcome.differences:
            print(f"  {line}")
        bad += len(outcome.differences)
    return bad


def main() -> int:
    """Runs the benchmark and prints its table. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="processes killed in each form")
    parser.add_argument("--forms", default="1,2,2-together,2-ensemble", help="see above")
    parser.add_argument("--queries", type=int, default=300, help="lists of ten pairs")
    parser.add_argument("--chunk_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        forms = [Form.parse(text) for text in given.forms.split(",")]
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(pathlib.Path(folder, "input"), pathlib.Path(folder, "work"), given.chunk_size)
        bench.source.mkdir()
        bench.work.mkdir()
        write_input(bench.source, given.queries, given.seed)
        bad = run(bench, forms, given.kills, random.Random(given.seed))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
