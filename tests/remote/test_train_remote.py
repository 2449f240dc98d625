"""A training run whose folder is in a bucket: killed while it uploads a checkpoint, and continued from the bucket."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import pytest

from inranker_jax import paths
from inranker_jax.checkpoints import load_model
from tests import tiny_run
from tests.remote.conftest import environment
from tests.remote.object_store import ObjectStore


def start(
    setting: pathlib.Path, output: str, store: ObjectStore, machine: pathlib.Path
) -> subprocess.Popen[str]:
    """Starts a run on a machine of its own: nothing but the bucket is shared."""
    return subprocess.Popen(
        tiny_run.command(setting, output),
        env={**tiny_run.environment(setting.parent), **environment(store.url, str(machine))},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    return log


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_in_an_upload_and_continues_elsewhere(
    store: ObjectStore, tmp_path: pathlib.Path
) -> None:
    setting = tiny_run.write_setting(tmp_path)
    finish(start(setting, str(tmp_path / "local"), store, tmp_path / "machine 0"))

    process = start(setting, "gs://bkt/runs/tiny", store, tmp_path / "machine 1")
    store.when_uploaded("runs/tiny/checkpoints/6/commit_success.txt", process.kill)
    process.communicate(timeout=300)
    store.fault = lambda method, name: None
    assert process.returncode == -9
    there = store.names("bkt", "runs/tiny/")
    assert any(name.startswith("runs/tiny/checkpoints/6/state/") for name in there)

    log = finish(start(setting, "gs://bkt/runs/tiny", store, tmp_path / "machine 2"))
    assert "resuming gs://bkt/runs/tiny at step 4" in log
    local = tiny_run.final_state(tmp_path / "local")
    tiny_run.assert_same_bytes(tiny_run.final_state("gs://bkt/runs/tiny"), local)

    there = [name.removeprefix("runs/tiny/") for name in store.names("bkt", "runs/tiny/")]
    assert {"manifest.json", "config.gin", "tokenizer/tokenizer.json"} <= set(there)
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in there)
    sessions = json.loads(paths.of("gs://bkt/runs/tiny/manifest.json").read_text())["sessions"]
    assert len(sessions) == 2
    assert load_model("gs://bkt/runs/tiny").config.d_model == 32
    assert not os.path.exists("gs:")
