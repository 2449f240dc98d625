"""`python -m inranker_jax.compile`: the whole command, in processes of its own, as it settles JAX's devices."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from inranker_jax import compile
from inranker_jax.models.flops import forward_flops
from tests.aot.recipes import needs_libtpu
from tests.batches import TINY

ROOT = pathlib.Path(__file__).resolve().parents[1]
RUN = """
include "runs/phase2_synthetic_soft.gin"
include "meshes/fsdp.gin"
INITIAL_CHECKPOINT_PATH = %gin.REQUIRED
BATCH_SIZE = 16
TRAIN_STEPS = 86400
DTYPE = "bfloat16"
train.contract = @prompts.ScoringContract()
prompts.ScoringContract.name = "short"
prompts.ScoringContract.template = "Query: {query} Document: {document} Relevant:"
prompts.ScoringContract.label_pieces = ("\u2581false", "\u2581true")
prompts.ScoringContract.max_length = 64
train.model = @models.T5Config()
models.T5Config.vocab_size = 96
models.T5Config.d_model = 32
models.T5Config.d_kv = 8
models.T5Config.d_ff = 64
models.T5Config.num_layers = 1
models.T5Config.num_decoder_layers = 1
models.T5Config.num_heads = 4
packing.Layout.row_length = 64
packing.Layout.tokens_per_call = 64
"""


ONE_LAYER = dataclasses.replace(TINY, num_layers=1, num_decoder_layers=1)


@pytest.fixture
def run_file(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "run.gin"
    path.write_text(RUN)
    return str(path)


# A test runner in the background ignores Ctrl-C, and so would its children.
PROGRAM = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("inranker_jax.compile", run_name="__main__", alter_sys=True)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def command(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    with start(*arguments) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_a_run_compiles_for_virtual_cpus(run_file: str, tmp_path: pathlib.Path) -> None:
    """Neither data, nor a vocabulary, nor a checkpoint is there."""
    output = tmp_path / "out" / "report.json"
    done = command(f"--gin_file={run_file}", "--topology=cpu:4", f"--output={output}", "--mean_length=20")
    assert done.returncode == 0, done.stderr
    assert "train step for cpu:4: 4 cpu, 1 host\n" in done.stdout
    assert "mesh data=1 x fsdp=4 x model=1; products in bfloat16" in done.stdout
    found = json.loads(output.read_text())
    assert found["mesh"] == {"data": 1, "fsdp": 4, "model": 1}
    assert (found["pairs"], found["total_steps"]) == (16, 86400)
    assert found["mean_length"] == pytest.approx(20, rel=0.3)
    assert 0 < found["memory"]["arguments"] < found["memory"]["total"] + found["memory"]["aliased"]
    assert found["flops_per_chip"] > 0.5 * found["useful_flops"] / 4
    assert found["collectives"]


@pytest.mark.slow
def test_a_search_prints_what_it_tried_and_the_best(run_file: str, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "report.json"
    done = command(
        f"--gin_file={run_file}",
        "--topology=cpu:2",
        "--search",
        "--meshes=data,fsdp,single,slices_data",
        "--gin.BATCH_SIZE=2",
        "--remats=none",
        "--gin.DROPOUT_RATE=0.0",
        f"--output={output}",
    )
    assert done.returncode == 0, done.stderr
    assert "| data | 2 | none | 2 x 1 x 1 |" in done.stdout
    assert "leaves devices idle" in done.stdout
    assert "the same here as data" in done.stdout
    assert "| data | 4 | none | 2 x 1 x 1 |" in done.stdout
    assert "best: --gin_file=gin/meshes/fsdp.gin --gin.train.batch_size=2" in done.stdout
    assert "best of batch size 4: --gin_file=gin/meshes/fsdp.gin --gin.train.batch_size=4" in done.stdout
    found = json.loads(output.read_text())
    assert [trial["mesh"] if not trial["problem"] else trial["problem"] for trial in found["tried"]] == [
        *[{"data": 2, "fsdp": 1, "model": 1}] * 2,
        *[{"data": 1, "fsdp": 2, "model": 1}] * 2,
        *["leaves devices idle"] * 2,
        *["the same here as data"] * 2,
    ]


@pytest.mark.slow
@needs_libtpu
def test_ctrl_c_does_not_wait_for_the_compiler() -> None:
    """Training 220M keeps the compiler busy for minutes, in which it hears no signal."""
    with start("--gin_file=gin/runs/inranker_220m_phase2.gin", "--topology=v5e-4") as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("compiling for v5e:2x2")
        time.sleep(20)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted"


def test_long_work_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile, "_SAY_EVERY", 0.05)
    assert compile._beside(lambda: time.sleep(0.3) or 3) == 3
    assert "still at it after 0s" in capsys.readouterr().err
    with pytest.raises(TimeoutError, match="its own"):
        compile._beside(lambda: (_ for _ in ()).throw(TimeoutError("its own")))


@needs_libtpu
@pytest.mark.parametrize("step", ["score", "label", pytest.param("train", marks=pytest.mark.slow)])
def test_the_tpu_compiler_compiles_each_step(step: str, run_file: str, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "report.json"
    done = command(f"--gin_file={run_file}", "--topology=v5e-4", f"--step={step}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("still at it after")]
    assert said == ["compiling for v5e:2x2: 4 TPU v5 lite, 1 host"]
    for part in (
        ": fits",
        "MFU at most",
        "pairs/s",
        "of 15.750 GiB",
        "(197 TFLOP/s, memory 819 GB/s, network 200 GB/s",
    ):
        assert part in done.stdout
    found: dict[str, Any] = json.loads(output.read_text())
    assert found["fits"] is True
    seconds = found["seconds"]
    assert 0 < seconds["best"] <= seconds["estimate"]
    assert found["pairs_per_second"] == pytest.approx(found["pairs"] / seconds["estimate"])
    if step == "train":
        assert found["days"] == pytest.approx(86400 * seconds["estimate"] / 86400)
        assert found["chip_hours"] == pytest.approx(found["days"] * 24 * 4)
        assert found["useful_flops"] == pytest.approx(16 * 3 * forward_flops(ONE_LAYER, 64))
    else:
        assert found["mesh"] == (
            {"data": 4, "fsdp": 1, "model": 1} if step == "label" else {"data": 1, "fsdp": 4, "model": 1}
        )


@needs_libtpu
@pytest.mark.parametrize(("slice_name", "host"), [("v5e-16", "v5e:2x2"), ("v4-16", "v4:2x2x1")])
def test_labels_of_a_slice_are_compiled_for_each_of_its_hosts(
    slice_name: str, host: str, run_file: str, tmp_path: pathlib.Path
) -> None:
    output = tmp_path / "report.json"
    done = command(f"--gin_file={run_file}", f"--topology={slice_name}", "--step=label", f"--output={output}")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(output.read_text())
    chips = 16 if slice_name == "v5e-16" else 8
    assert (found["topology"], found["chips"], found["copies"]) == (host, 4, chips // 4)
    assert found["pairs_per_second"] == pytest.approx(found["pairs"] / found["seconds"]["estimate"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e:4x5"], r"error: no topology 'v5e:4x5'. Did you mean"),
        (["--topology=cpu:8", "--gin.TRAIN_STEP=3"], "Did you mean 'TRAIN_STEPS'?"),
        (["--topology=cpu:8", "--step=trian"], "invalid choice: 'trian'"),
        (["--topology=cpu:8", "--search", "--step=label"], "--search with --step=label"),
        (["--topology=cpu:8", "--search", "--meshes=fspd"], "--meshes: no 'fspd'. Did you mean 'fsdp'?"),
        (
            ["--topology=cpu:8", "--mesh=2x2", "--step=score"],
            "argument --mesh: '2x2': expected DATAxFSDPxMODEL, such as 1x4x1",
        ),
        (["--topology=cpu:8", "--mean_length=65"], "mean length 65: expected 1 to 64 tokens"),
        (
            [
                "--topology=cpu:8",
                "--mean_length=49",
                '--gin.TASK_FEATURE_LENGTHS={"inputs": 48, "targets": 2}',
            ],
            "mean length 49: expected 1 to 48 tokens",
        ),
        (["--topology=cpu:8", "--gin.partitioning.make_mesh.fsdp=3"], "needs 3 devices, but there are 8"),
        (
            ["--topology=cpu:8", "--gin.models.T5Config.d_model=36"],
            "does not divide over mesh axis fsdp of size 8",
        ),
        ([], "the following arguments are required: --topology"),
    ],
)
def test_mistakes_are_one_line_and_status_2(run_file: str, arguments: list[str], message: str) -> None:
    done = command(f"--gin_file={run_file}", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh=1x8x1"], r"--mesh is for --step=label and --step=score\. .*--gin_file=gin/meshes/"),
        (["--step=train", "--dtype=bfloat16"], r"--dtype is for --step=label .*--gin\.DTYPE="),
        (["--tokens_per_call=8"], r"--tokens_per_call is for .*--gin\.packing\.Layout\.tokens_per_call="),
        (["--search", "--mesh=1x8x1"], r"--mesh is for --step=label and --step=score"),
        (["--meshes=fsdp"], r"--meshes is what --search tries\. Add --search"),
        (["--batch_sizes=32"], r"--batch_sizes is what --search tries"),
        (["--step=label", "--remats=none"], r"--remats is what --search tries"),
        (["--step=score", "--mesh=axbxc"], r"argument --mesh: 'axbxc': expected DATAxFSDPxMODEL"),
        (["--search", "--batch_sizes=32,many"], r"argument --batch_sizes: '32,many': expected positive"),
        (["--search", "--batch_sizes=0"], r"argument --batch_sizes: '0': expected positive numbers"),
    ],
)
def test_flags_that_would_change_nothing_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compile.main(["--gin_file=gin/small_synth.gin", "--topology=cpu:8", *arguments]) == 2
    shown = capsys.readouterr().err
    assert re.match(f"error: {message}", shown), shown
    assert shown.count("\n") == 1


def test_a_run_without_a_model_says_what_to_bind(tmp_path: pathlib.Path) -> None:
    done = command("--gin_file=gin/runs/adapt.gin", "--topology=cpu:2", "--gin.TRAIN_STEPS=90000")
    assert done.returncode == 2
    assert "no model: bind train.model" in done.stderr
