"""The soak that kills training: how it counts, without a run."""

from __future__ import annotations

import argparse
import collections
import pathlib
import signal

import pytest

from benchmarks import kill_training
from benchmarks.process_group import Ended


class Leaves:
    """Two processes in the middle of a save: told to leave, they complete it; killed, they do not."""

    def __init__(self, output: pathlib.Path) -> None:
        self.writing = output / "checkpoints" / "4.orbax-checkpoint-tmp"
        self.writing.mkdir(parents=True)
        self.lines = [[f"step {step}/20 loss 1" for step in range(1, 10)], []]
        self.status = -signal.SIGKILL
        self.processes = [self, self]

    def poll(self) -> None:
        return None

    def terminate(self) -> None:
        self.writing.rename(self.writing.with_name("4"))
        self.status = 143

    def kill(self, *indices: int) -> None:
        pass

    def end(self, seconds: float) -> list[Ended]:
        return [Ended(self.status, "", "saved step 5")] * 2


@pytest.mark.parametrize("name", ["2x2-notice", "2x2", "2x2-together"])
def test_what_a_run_was_doing_is_seen_before_it_is_disturbed(name: str, tmp_path: pathlib.Path) -> None:
    flags = argparse.Namespace(kills=1, steps=20, seed=0, work_dir=tmp_path)
    soak, form = kill_training.Soak(flags), kill_training.Form.parse(name)
    soak.counts[name] = collections.Counter()
    assert soak._disturb(form, Leaves(tmp_path), tmp_path, 0.0)  # type: ignore[arg-type]
    assert soak.counts[name] == {"while a checkpoint was written": 1}
    assert soak.wrong == []
