"""Does training survive SIGKILL at any moment? The last checkpoint after many kills, beside that of a quiet run.

    python benchmarks/kill_training.py --kills=40 --forms=1x4,2x2,2x2-together,4x1,2x2-notice,elastic

Trains the shipped demonstration for a few steps, `python -m inranker_jax.train` as a user runs it, with a checkpoint
every other step. Once undisturbed for each form; then killing at a random moment (start-up, compilation, steps,
asynchronous saves) and starting again until `--kills` were made. A form is PROCESSES x DEVICES each, and further

    -together   all processes are killed at once; else one of them, by chance, and the others must then end too
    -notice     one process gets SIGTERM, by chance, and all must save the same step and leave with status 143
    elastic     every start has another number of processes and devices; the losses are compared, up to rounding

Every array of the last checkpoint, optimiser and RNG included, must equal that of the undisturbed run to the bit; of
elastic runs the losses of all steps up to rounding.
Prints a table of kills by what the run was doing. The exit status is 1 when something differs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.process_group import HEARTBEAT, Ended, Group  # noqa: E402 - a script finds the repository first

SHAPES = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1))
TOLERANCE = 1e-4
# Longer than processes wait for one that was killed before it had joined them: 5 minutes.
_PATIENCE = 400
MOMENTS = ("in start-up", "while a checkpoint was written", "in other steps")


@dataclasses.dataclass(frozen=True)
class Form:
    """How a run is started and disturbed."""

    name: str
    processes: int = 1
    devices: int = 4
    manner: str = "one"

    @classmethod
    def parse(cls, name: str) -> Form:
        """Reads a form's name.

        >>> Form.parse("2x2-notice")
        Form(name='2x2-notice', processes=2, devices=2, manner='notice')
        """
        if name == "elastic":
            return cls(name, manner="elastic")
        shape, _, manner = name.partition("-")
        processes, _, devices = shape.partition("x")
        if not (processes.isdigit() and devices.isdigit()) or manner not in ("", "together", "notice"):
            raise SystemExit(f"error: form {name!r}: expected PxD, PxD-together, PxD-notice or elastic.")
        return cls(name, int(processes), int(devices), manner or "one")


class Soak:
    """Runs the forms and counts."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self._flags = flags
        self._chance = random.Random(flags.seed)
        self._work = pathlib.Path(flags.work_dir or tempfile.mkdtemp(prefix="kill_training-"))
        self.counts: dict[str, collections.Counter[str]] = {}
        self.wrong: list[str] = []
        self.farthest = 0.0  # relative difference of a loss of an elastic run

    def _start(self, form: Form, output: pathlib.Path, shape: tuple[int, int]) -> Group:
        bindings = {
            "train.mesh": "@partitioning.make_mesh()",
            "partitioning.make_mesh.data": 1,
            "partitioning.make_mesh.fsdp": -1,
            "TRAIN_STEPS": self._flags.steps,
            "WARMUP_STEPS": 4,
            "DROPOUT_RATE": 0.1,
            "train.validation_split": None,
            "train.checkpoint_period": 2,
            "train.log_every": 1,
            "train.final_report": None,
        }
        command = [sys.executable, "-m", "inranker_jax.train", "--gin_file=gin/small_synth.gin"]
        command += [f"--output_dir={output}", *(f"--gin.{name}={value}" for name, value in bindings.items())]
        environment = {"JAX_COMPILATION_CACHE_DIR": str(self._work / "compiled"), HEARTBEAT: "20"}
        return Group(command, *shape, environment=environment)

    def _undisturbed(self, form: Form) -> pathlib.Path:
        output = self._work / f"quiet-{form.processes}x{form.devices}-{form.manner == 'elastic'}"
        if not output.exists():
            with self._start(form, output, (form.processes, form.devices)) as group:
                self._expect(group.end(), {0}, f"undisturbed {form.name}")
        return output

    def _expect(self, ended: list[Ended], statuses: set[int], what: str) -> bool:
        found = {process.status for process in ended}
        if found <= statuses:
            return True
        self.wrong.append(f"{what}: exit statuses {sorted(found)}")
        print("".join(process.stderr[-2000:] for process in ended), file=sys.stderr)
        return False

    def _wait(self, group: Group, seconds: float) -> bool:
        """Waits for a moment of chance: one in four by the clock, others soon after one of the session's first steps.

        Args:
          group: the run.
          seconds: that an undisturbed one takes.

        Returns:
          Whether it still runs.
        """
        by_clock = self._chance.random() < 0.25
        steps, delay = (0, seconds) if by_clock else (self._chance.randint(1, 8), 0.5)
        delay *= self._chance.random()
        end = None
        while end is None or time.monotonic() < end:
            if all(process.poll() is not None for process in group.processes):
                return False
            if end is None and len(_steps(group)) >= steps:
                end = time.monotonic() + delay
            time.sleep(0.01)
        return True

    def _disturb(self, form: Form, group: Group, output: pathlib.Path, seconds: float) -> bool:
        """Kills or tells at some moment; returns False where the run ended before."""
        if not self._wait(group, seconds):
            self._expect(group.end(), {0}, form.name)
            return False
        steps = _steps(group)
        count = len(group.processes)
        victim = self._chance.randrange(count)
        moment = _moment(
            output, steps
        )  # before the signal: after a notice they finish what they were writing
        if form.manner == "notice":
            if not steps:
                return True  # a notice during start-up ends the process: nothing is lost, and nothing to agree on
            group.processes[victim].terminate()
            if not self._check_notice(form, self._end(form, group), steps):
                return False
        else:
            group.kill(*(range(count) if form.manner == "together" else [victim]))
            alive = [process for process in self._end(form, group) if process.status == 0]
            if alive and count > 1 and steps and steps[-1] < self._flags.steps - 1:
                self.wrong.append(f"{form.name}: a process ended well although another was killed")
        self.counts[form.name][moment] += 1
        return True

    def _end(self, form: Form, group: Group) -> list[Ended]:
        try:
            return group.end(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"{form.name}: processes still there after {_PATIENCE} s")
            print("".join(line for lines in group.errors for line in lines[-20:]), file=sys.stderr)
            return []

    def _check_notice(self, form: Form, ended: list[Ended], steps: list[int]) -> bool:
        """All must have saved the same step; returns False where the notice came too late and all have finished."""
        statuses = {process.status for process in ended}
        if statuses == {0}:
            return False
        saved = [re.findall(r"saved step (\d+)", process.stderr) for process in ended]
        if statuses != {143} or any(len(numbers) != 1 or numbers != saved[0] for numbers in saved):
            last = f"after step {steps[-1]}"
            self.wrong.append(f"{form.name}: notice {last}: statuses {sorted(statuses)}, saved {saved}")
        return True

    def run(self, form: Form) -> None:
        """Kills `--kills` times and compares every finished run."""
        quiet = self._undisturbed(form)
        counts = self.counts[form.name] = collections.Counter()
        seconds = 0.0
        round_number = 0
        while sum(n for name, n in counts.items() if name != "runs compared") < self._flags.kills:
            round_number += 1
            output = self._work / f"{form.name}-{round_number}"
            shutil.rmtree(output, ignore_errors=True)
            finished = False
            while not finished:
                shape = (form.processes, form.devices)
                if form.manner == "elastic":
                    shape = self._chance.choice(SHAPES)
                began = time.monotonic()
                with self._start(form, output, shape) as group:
                    if seconds and sum(counts.values()) < 2 * self._flags.kills:
                        finished = not self._disturb(form, group, output, seconds)
                    else:
                        finished = self._expect(group.end(), {0}, form.name)
                        seconds = seconds or time.monotonic() - began
            self._compare(form, quiet, output)
            counts["runs compared"] += 1
            shutil.rmtree(output)
            print(f"{form.name}: {dict(counts)}", file=sys.stderr, flush=True)

    def _compare(self, form: Form, quiet: pathlib.Path, output: pathlib.Path) -> None:
        theirs, ours = (_arrays(folder, self._flags.steps) for folder in (quiet, output))
        if theirs.keys() != ours.keys():
            self.wrong.append(f"{form.name}: the trees differ")
        if form.manner == "elastic":
            self._compare_losses(quiet, output)
            return
        for key, value in theirs.items():
            if ours[key].tobytes() != value.tobytes():
                self.wrong.append(f"{form.name}: {key} differs")

    def _compare_losses(self, quiet: pathlib.Path, output: pathlib.Path) -> None:
        """Each step's loss, up to rounding: another example or another mask would change it in the first digits.

        Parameters may differ by more: of a gradient that is rounding noise Adam makes a whole step.
        """
        theirs, ours = _losses(quiet), _losses(output)
        for step in sorted(theirs.keys() & ours.keys()):
            apart = abs(ours[step] / theirs[step] - 1)
            self.farthest = max(self.farthest, apart)
            if apart > TOLERANCE:
                self.wrong.append(f"elastic: the loss of step {step} is {ours[step]}, not {theirs[step]}")
        if len(ours) < self._flags.steps / 2:
            self.wrong.append(f"elastic: losses of {len(ours)} steps alone are in TensorBoard's files")

    def table(self) -> str:
        """Counts of all forms, as markdown."""
        columns = (*MOMENTS, "runs compared")
        lines = ["| form | kills | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
        for name, counts in self.counts.items():
            kills = sum(counts[moment] for moment in MOMENTS)
            lines.append(f"| {name} | {kills} | " + " | ".join(str(counts[key]) for key in columns) + " |")
        return "\n".join(lines)


def _steps(group: Group) -> list[int]:
    """The steps that a run has reported in this session."""
    return [int(line.split()[1].split("/")[0]) for line in group.lines[0] if line.startswith("step ")]


def _moment(output: pathlib.Path, steps: list[int]) -> str:
    """What a run was doing: Orbax names a checkpoint that is being written so until it is whole."""
    if not steps:
        return MOMENTS[0]
    return MOMENTS[1] if any(output.glob("checkpoints/*.orbax-checkpoint-tmp*")) else MOMENTS[2]


def _losses(output: pathlib.Path) -> dict[int, float]:
    """Training losses by step, the last of each step; what a killed session had not written yet is not there."""
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def _arrays(folder: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    path = folder / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        arguments = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata.tree
        )
        tree = reader.restore(path, restore_args=arguments)
    return {
        jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def main() -> int:
    """Runs all forms; returns 1 when something differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of each form (default 20)")
    parser.add_argument("--forms", default="1x4,2x2,2x2-together,2x2-notice,elastic")
    parser.add_argument("--steps", type=int, default=20, help="of a run (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--work_dir", help="where runs and compiled programs go (default: a new temporary folder)"
    )
    soak = Soak(parser.parse_args())
    os.chdir(ROOT)
    for name in soak._flags.forms.split(","):
        soak.run(Form.parse(name))
    print(soak.table())
    if "elastic" in soak.counts:
        print(f"losses of elastic runs differ by {soak.farthest:.0e} of their value at most")
    for line in soak.wrong:
        print(f"WRONG: {line}")
    print("all equal" if not soak.wrong else f"{len(soak.wrong)} differences")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
