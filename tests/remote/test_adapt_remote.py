"""An adaptation whose inputs and output are in a bucket, begun on one machine and finished on another."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from inranker_jax import paths
from inranker_jax.checkpoints import load_model
from tests.remote.conftest import environment
from tests.remote.object_store import ObjectStore
from tests.test_adapt import STAGES, statuses, write_collection, write_model
from tests.tiny_vocabulary import write_spiece

LATER = ("train", "export", "evaluate_before", "evaluate")


def run(store: ObjectStore, machine: pathlib.Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Runs `adapt` in a folder of the machine's own, with a Python that lies there."""
    command = [
        *(python(machine), "-m", "inranker_jax.adapt", "--corpus=gs://bkt/in/corpus", "--output_dir=gs://bkt/out"),
        *("--teacher=gs://bkt/in/teacher", "--student=gs://bkt/in/student", "--negatives=3", "--train_steps=2"),
        *("--batch_size=4", "--evaluation_depth=5", "--gin.train.lengths=(64,)", *more),
    ]  # fmt: skip
    variables = {**os.environ, **environment(store.url, str(machine))}
    return subprocess.run(
        command, cwd=machine, env=variables, capture_output=True, text=True, timeout=500, check=False
    )


def python(machine: pathlib.Path) -> str:
    """The path of an interpreter like this one, in a virtual environment that borrows the packages of this one's."""
    environment, prefix = machine / "venv", pathlib.Path(sys.prefix)
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    (environment / "lib").symlink_to(prefix / "lib")
    if (prefix / "pyvenv.cfg").exists():
        shutil.copy(prefix / "pyvenv.cfg", environment)
    return str(environment / "bin" / "python")


@pytest.mark.slow
def test_another_machine_goes_on_with_what_the_bucket_holds(
    store: ObjectStore, tmp_path: pathlib.Path
) -> None:
    vocabulary = tmp_path / "vocabulary"
    vocabulary.mkdir()
    write_spiece(vocabulary, size=300)
    paths.upload(write_collection(tmp_path / "corpus"), "gs://bkt/in/corpus")
    for seed, name in enumerate(("teacher", "student")):
        paths.upload(write_model(tmp_path / name, vocabulary, seed), f"gs://bkt/in/{name}")

    begun = run(store, tmp_path / "machine 1", f"--skip={','.join(LATER)}")
    assert begun.returncode == 0, begun.stderr
    assert [name for name, status in statuses(begun.stdout).items() if status == "ran"] == STAGES[:4]
    assert store.buckets["bkt"]["out/labels.png"].data.startswith(b"\x89PNG")
    (verified,) = json.loads(store.buckets["bkt"]["out/verification.json"].data)["labels"]
    assert verified["pairs"] == 24 * 4

    ended = run(store, tmp_path / "machine 2")
    assert ended.returncode == 0, ended.stderr
    assert statuses(ended.stdout) == dict.fromkeys(STAGES[:4], "done before") | dict.fromkeys(LATER, "ran")
    before, after, exported = (
        jax.tree.leaves(load_model(f"gs://bkt/{name}").params)
        for name in ("in/student", "out/student", "out/export")
    )
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(before, after, strict=True))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(after, exported, strict=True))
    assert not list(tmp_path.glob("machine */gs:*")), "nothing was written there under the bucket's name"


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_told_before_any_stage(
    store: ObjectStore, tmp_path: pathlib.Path
) -> None:
    told = run(store, tmp_path / "machine", "--output_dir=gs://nobodys/out")
    assert told.returncode == 2
    assert "there is no bucket 'nobodys'" in told.stderr
    assert "[1/8]" not in told.stderr
