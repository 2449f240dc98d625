"""Training in several real processes: equal to one, preempted together, killed and resumed to the same bytes."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest

from benchmarks.process_group import Group
from tests import tiny_run

MESH = ("--gin.train.mesh=@partitioning.make_mesh()",)
FSDP = (*MESH, "--gin.partitioning.make_mesh.data=1", "--gin.partitioning.make_mesh.fsdp=-1")
STEADY = ("--gin.DROPOUT_RATE=0.0",)  # packed rows, and so the dropout of their tokens, differ between meshes


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return tiny_run.write_setting(tmp_path_factory.mktemp("processes"))


def start(setting, output, count, devices, *more):
    environment = tiny_run.environment(setting.parent)
    return Group(tiny_run.command(setting, output, *more), count, devices, environment)


def run(setting, output, count, devices, *more):
    with start(setting, output, count, devices, *more) as group:
        ended = group.end()
    for process in ended:
        assert process.status == 0, process.stderr
    return ended


def losses(ended):
    return [
        float(line.split("loss ")[1].split()[0]) for line in ended.stdout.splitlines() if line[:5] == "step "
    ]


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, atol=2e-4, err_msg=key)


@pytest.fixture(scope="module")
def two_processes(setting):
    """The reference: two processes of two devices each, parameters divided over all four."""
    output = setting.parent / "two"
    return output, run(setting, output, 2, 2, *FSDP)


@pytest.mark.slow
def test_two_processes_train_as_one_does(setting, two_processes, tmp_path):
    more = (*STEADY, "--gin.TRAIN_STEPS=6")
    both = run(setting, tmp_path / "both", 2, 1, *FSDP, *more)
    alone = run(setting, tmp_path / "alone", 1, 1, *MESH, *more)
    assert losses(both[0]) == pytest.approx(losses(alone[0]), abs=2e-4)  # four digits are shown
    assert_close(tiny_run.final_state(tmp_path / "both", 6), tiny_run.final_state(tmp_path / "alone", 6))
    assert "step " not in both[1].stdout, "one process reports"
    assert "[1/2] on " in both[1].stderr
    assert "2 devices" in both[1].stderr


@pytest.mark.slow
def test_killed_processes_end_with_the_same_bytes(setting, two_processes):
    """One of two, then the other, then both; some kills come while a checkpoint is being written."""
    output = setting.parent / "killed"
    chance = random.Random(5)
    for marker, victims in (("step 2/", (1,)), ("step 5/", (0,)), ("step 8/", (0, 1))):
        with start(setting, output, 2, 2, *FSDP) as group:
            group.wait_for(marker)
            group.pause(chance.uniform(0, 0.1))
            group.kill(*victims)
            for ended in group.end(60):
                assert ended.status != 0
    ended = run(setting, output, 2, 2, *FSDP)
    assert "resuming" in ended[0].stderr
    tiny_run.assert_same_bytes(tiny_run.final_state(output), tiny_run.final_state(two_processes[0]))


@pytest.mark.slow
def test_a_preemption_of_one_process_saves_all_at_the_same_step(setting, two_processes):
    output = setting.parent / "preempted"
    # No checkpoints but the one of the notice.
    seldom = ("--gin.train.checkpoint_period=100", "--gin.train.validation_split=None")
    with start(setting, output, 2, 2, *FSDP, *seldom) as group:
        group.wait_for("step 3/")
        group.processes[1].terminate()
        ended = group.end(60)
    assert [process.status for process in ended] == [143, 143], ended[0].stderr + ended[1].stderr
    lines = [line for process in ended for line in process.stderr.splitlines() if "saved step" in line]
    assert len(lines) == 2
    assert len({line.split("] ", 1)[1] for line in lines}) == 1, "both name the same step"
    run(setting, output, 2, 2, *FSDP, *seldom)
    tiny_run.assert_same_bytes(tiny_run.final_state(output), tiny_run.final_state(two_processes[0]))


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes_and_devices(setting, tmp_path):
    """4 devices in 2 processes, then 2 in 1, then 1: the losses of an undisturbed run."""
    steady = run(setting, tmp_path / "steady", 1, 1, *MESH, *STEADY)
    output = tmp_path / "elastic"
    shown = []
    for steps, count, devices in ((4, 2, 2), (8, 1, 2), (12, 1, 1)):
        more = (*FSDP, *STEADY, f"--gin.TRAIN_STEPS={steps}")
        more += ("--gin.optimizers.warmup_linear_decay.total_steps=12",)
        shown += losses(run(setting, output, count, devices, *more)[0])
    assert shown == pytest.approx(losses(steady[0]), abs=2e-4)
    assert_close(tiny_run.final_state(output), tiny_run.final_state(tmp_path / "steady"))
    shutil.rmtree(output)
