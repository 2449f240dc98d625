"""Training in several real processes: equal to one, preempted together, killed and resumed to the same bytes."""

from __future__ import annotations

import random
import re
import shutil
import sys

import numpy as np
import pytest

from benchmarks.process_group import HEARTBEAT, Group
from tests import tiny_run

MESH = ("--gin.train.mesh=@partitioning.make_mesh()",)
FSDP = (*MESH, "--gin.partitioning.make_mesh.data=1", "--gin.partitioning.make_mesh.fsdp=-1")
DROPOUT = (
    "--gin.DROPOUT_RATE=0.1",
)  # packed rows differ between meshes; what is dropped of a document must not


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


def by_step(ended):
    """Losses by what a line says before them: `step 3/12` without the total, and `validation` where it is that."""
    lines = [line.split("loss ") for line in ended.stdout.splitlines() if line[:5] == "step "]
    return {re.sub("/[0-9]+", "", before): float(after.split()[0]) for before, after in lines}


def losses(ended):
    return list(by_step(ended).values())


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
    more = (*DROPOUT, "--gin.TRAIN_STEPS=6")
    both = run(setting, tmp_path / "both", 2, 1, *FSDP, *more)
    alone = run(setting, tmp_path / "alone", 1, 1, *MESH, *more)
    assert losses(both[0]) == pytest.approx(losses(alone[0]), abs=2e-4)  # four digits are shown
    assert_close(tiny_run.final_state(tmp_path / "both", 6), tiny_run.final_state(tmp_path / "alone", 6))
    assert "step " not in both[1].stdout, "one process reports"
    assert "[1/2] on " in both[1].stderr
    assert "2 devices" in both[1].stderr


@pytest.mark.slow
def test_killed_processes_end_with_the_same_bytes(setting, two_processes):
    """One of two, then the other, then both; a kill may come while a checkpoint is being written."""
    output = setting.parent / "killed"
    chance = random.Random(5)
    for marker, victims in (("step 2/", (1,)), ("step 5/", (0,)), ("step 8/", (0, 1))):
        with start(setting, output, 2, 2, *FSDP) as group:
            group.wait_for(marker)
            group.pause(chance.uniform(0, 0.1))
            group.kill(*victims)
            for ended in group.end():
                assert ended.status != 0
    ended = run(setting, output, 2, 2, *FSDP)
    assert "resuming" in ended[0].stderr
    tiny_run.assert_same_bytes(tiny_run.final_state(output), tiny_run.final_state(two_processes[0]))


# JAX looks for notices once a second: faster steps would be over before.
SLOW = """
import time
from inranker_jax import trainer
put = trainer.put_batch
trainer.put_batch = lambda *arguments: (time.sleep(0.5), put(*arguments))[1]
"""


@pytest.mark.slow
def test_a_preemption_of_one_process_saves_all_at_the_same_step(setting, two_processes):
    """Twice, in a new run and in a resumed one, with a save at every step that the notice may fall into."""
    output = setting.parent / "preempted"
    often = ("--gin.train.checkpoint_period=1", "--gin.train.validation_split=None")
    for victim, marker in ((1, "step 3/"), (0, "step 7/")):
        with start_patched(setting, output, SLOW, *FSDP, *often) as group:
            group.wait_for(marker)
            group.processes[victim].terminate()
            ended = group.end()
        assert [process.status for process in ended] == [143, 143], ended[0].stderr + ended[1].stderr
        lines = [line for process in ended for line in process.stderr.splitlines() if "saved step" in line]
        assert len(lines) == 2
        assert len({line.split("] ", 1)[1] for line in lines}) == 1, "both name the same step"
    run(setting, output, 2, 2, *FSDP, *often)
    tiny_run.assert_same_bytes(tiny_run.final_state(output), tiny_run.final_state(two_processes[0]))


# A process that died is missed after so many seconds.
SOON = {HEARTBEAT: "20"}


def start_patched(setting, output, patch, *more, environment=None):
    """Two processes of two devices that run `patch` first."""
    code = f"{patch}\nimport sys\nfrom inranker_jax.train import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *tiny_run.flags(setting, output, *more)]
    return Group(command, 2, 2, tiny_run.environment(setting.parent) | (environment or {}))


OTHER_ORDER = """
import numpy as np
from inranker_jax import partitioning
partitioning._grid = lambda shape, devices: np.asarray([devices[i] for i in (0, 2, 1, 3)]).reshape(shape)
"""


@pytest.mark.slow
def test_a_mesh_that_follows_the_network_trains_the_same(setting, tmp_path):
    """On a TPU slice the devices of a host are not neighbours in the mesh."""
    more = (*MESH, *DROPOUT, "--gin.TRAIN_STEPS=3", "--gin.train.validation_split=None")
    with start_patched(setting, tmp_path / "other", OTHER_ORDER, *more) as group:
        ended = group.end()
    assert [process.status for process in ended] == [0, 0], ended[0].stderr
    alone = run(setting, tmp_path / "alone", 1, 1, *more)
    assert losses(ended[0]) == pytest.approx(losses(alone[0]), abs=2e-4)


APART = """
import os, sys
from inranker_jax import distributed
distributed._SHARED_SECONDS = 2.0
sys.argv.append(sys.argv.pop() + os.environ["JAX_PROCESS_ID"])
"""


def test_hosts_that_do_not_share_the_runs_folder_are_told_at_the_start(setting, tmp_path):
    flags = ["--gin_file=gin/small_synth.gin", f"--output_dir={tmp_path}/run"]
    code = f"{APART}\nfrom inranker_jax.train import main\nsys.exit(main(sys.argv[1:]))"
    environment = tiny_run.environment(setting.parent) | SOON
    with Group([sys.executable, "-c", code, *flags], 2, 1, environment) as group:
        ended = group.end()
    assert ended[1].status == 2
    assert "run1: process 1 does not see there what process 0 wrote" in ended[1].stderr
    assert ended[0].status != 0


FAILS = """
import os
from inranker_jax.data import batches
make = batches.BatchMaker.__call__
def fail(self, step):
    if step == 3 and os.environ["JAX_PROCESS_ID"] == "1":
        raise OSError("the disk is gone")
    return make(self, step)
batches.BatchMaker.__call__ = fail
"""


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(setting, tmp_path):
    more = (*MESH, "--gin.train.validation_split=None")
    with start_patched(setting, tmp_path, FAILS, *more, environment=SOON) as group:
        ended = group.end()
    assert ended[1].status == 1
    assert "OSError: the disk is gone" in ended[1].stderr
    assert ended[0].status != 0


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes_and_devices(setting, tmp_path):
    """8 devices in 2 processes, then 4 in 2, 2 in 1, then 1: the losses of an undisturbed run."""
    steady = run(setting, tmp_path / "steady", 1, 1, *MESH, *DROPOUT)
    output = tmp_path / "elastic"
    shown = {}
    for steps, count, devices in ((4, 2, 4), (6, 2, 2), (8, 1, 2), (12, 1, 1)):
        more = (*FSDP, *DROPOUT, f"--gin.TRAIN_STEPS={steps}")
        more += ("--gin.optimizers.warmup_linear_decay.total_steps=12",)
        shown |= by_step(run(setting, output, count, devices, *more)[0])
    expected = by_step(steady[0])
    assert expected.keys() <= shown.keys()  # a session's last step is validated too
    assert {line: shown[line] for line in expected} == pytest.approx(expected, abs=2e-4)
    assert_close(tiny_run.final_state(output), tiny_run.final_state(tmp_path / "steady"))
    shutil.rmtree(output)
