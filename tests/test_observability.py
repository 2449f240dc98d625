"""What a run of `gin/small_synth.gin` leaves behind: every scalar that `docs/observability.md` lists, and goodput."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys

import pytest

from inranker_jax import train
from tests.telemetry.test_writers import scalars

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow

ON_ACCELERATORS = {"speed/mfu", "speed/useful_tflops_per_second", "memory/device_peak_gib"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps, in two sessions, the second with a trace."""
    folder = tmp_path_factory.mktemp("observed")
    flags = ["--gin_file=gin/small_synth.gin", f"--output_dir={folder}"]
    flags += ["--gin.WARMUP_STEPS=1", "--gin.train.validation_batches=1", "--gin.train.log_every=2"]
    flags += [
        "--gin.train.validation_period=2",
        "--gin.train.checkpoint_period=2",
        "--gin.train.final_report=None",
    ]
    assert train.main([*flags, "--gin.TRAIN_STEPS=4"]) == 0
    first = json.loads((folder / "goodput.json").read_text())
    # In a process of its own: libtpu, which other tests load to compile, crashes JAX's profiler.
    command = [sys.executable, "-m", "inranker_jax.train", *flags, "--gin.TRAIN_STEPS=6"]
    done = subprocess.run(
        [*command, "--gin.train.profile_steps=(5, 6)"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, first


def documented():
    """The names in the first column of the tables of docs/observability.md."""
    text = (REPOSITORY / "docs" / "observability.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `([a-z]+/[a-z_]+)` \|", text, re.MULTILINE))


def test_tensorboard_has_every_documented_scalar_and_no_other(run):
    folder, _ = run
    found = scalars(folder / "tensorboard")
    assert set(found) == documented() - ON_ACCELERATORS
    assert [step for step, _ in found["train/loss"]] == [1, 2, 4, 5, 6]
    for step in (2, 4, 6):
        shares = [dict(found[f"time/{name}_share"])[step] for name in ("data", "host", "device")]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        seconds = [dict(found[f"time/{name}_seconds"])[step] for name in ("data", "host", "device")]
        assert min(seconds) >= 0
    assert dict(found["time/compile_seconds"])[1] > 0
    assert dict(found["time/validation_seconds"])[4] > 0
    assert dict(found["train/useful_token_share"])[4] == pytest.approx(0.9, abs=0.1)
    assert 0 < dict(found["goodput/share"])[6] < 1
    assert 0.1 < dict(found["memory/host_peak_gib"])[6] < 64


def test_goodput_goes_on_over_sessions(run):
    folder, first = run
    last = json.loads((folder / "goodput.json").read_text())
    assert (first["sessions"], last["sessions"]) == (1, 2)
    assert first["finished"]
    assert last["first_start"] == first["first_start"]
    assert set(last["steps_seconds_at_checkpoint"]) == {"2", "4", "6"}
    for kind in ("steps", "startup", "validation", "checkpoint"):
        assert last["seconds"][kind] > first["seconds"][kind] > 0
    assert last["seconds"]["redone"] == pytest.approx(0, abs=0.05 * last["seconds"]["steps"])
    assert last["seconds"]["down"] == 0
    assert first["updated"] - first["first_start"] == pytest.approx(sum(first["seconds"].values()), abs=0.5)


def test_the_trace_that_was_asked_for_is_there(run):
    folder, _ = run
    assert len(list((folder / "profile").rglob("*.xplane.pb"))) == 1


def test_settings_of_observation_may_change_between_sessions(run):
    folder, _ = run
    assert len(json.loads((folder / "manifest.json").read_text())["sessions"]) == 2
    assert "train.profile_steps = (5, 6)" in (folder / "config.gin").read_text()  # the second session's


def test_a_bad_setting_is_one_line(run, capsys):
    folder, _ = run
    flags = ["--gin_file=gin/small_synth.gin", f"--output_dir={folder}", "--gin.WARMUP_STEPS=1"]
    flags += ["--gin.TRAIN_STEPS=8", "--gin.train.profile_steps=(6, 5)"]
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert "profile_steps=(6, 5): expected (first, end)" in error
    assert "Traceback" not in error
