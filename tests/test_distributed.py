"""Who takes part: flags, environment, launchers, and what is told when peers are missing."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from benchmarks.process_group import Group, free_port
from inranker_jax import distributed
from inranker_jax.errors import InputError, PeersError
from inranker_jax.interruption import Interruption

POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
ALL = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture(autouse=True)
def _nobody_said_anything(monkeypatch):
    for name in ALL:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # salloc or sbatch, not srun
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        (POD, "Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({**POD, "TPU_WORKER_HOSTNAMES": "a,b"}, "Cloud TPU"),
        ({**POD, "TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "true"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "Cloud TPU"),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a:1"}, "Cloud TPU, several slices"),
    ],
)
def test_launchers_are_recognised(environment, launcher):
    assert distributed.managed_by({"JAX_PLATFORMS": "cpu", **environment}) == launcher


def test_alone_without_a_word():
    assert distributed.join() == (0, 1)
    assert distributed.alone()
    distributed.tell("greeting", "hello")
    assert distributed.told("greeting") == []


def test_a_pod_that_cannot_ask_for_the_others_is_told_what_to_install(monkeypatch):
    for name, value in POD.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install kubernetes.*JAX_COORDINATOR_ADDRESS"):
        distributed.join()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("localhost:1234", None, None), "--process_count .*JAX_NUM_PROCESSES.*--process_index"),
        ((None, 2, 0), "--coordinator_address"),
        (("localhost:1234", 2, 2), "process 2 of 2: expected 0 <= index < count"),
        (("localhost", 2, 0), "expected HOST:PORT"),
    ],
)
def test_half_of_what_is_needed_is_refused(given, words):
    with pytest.raises(InputError, match=words):
        distributed.join(*given)


def test_the_environment_says_the_same_as_flags(monkeypatch):
    for name, value in zip(ALL, ("localhost:1234", "2", "many"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="JAX_PROCESS_ID\\) is 'many'; expected a whole number"):
        distributed.join()


HELLO = """
from inranker_jax import distributed
import sys
index, count = distributed.join()
distributed.tell("greeting", f"too early from {index}")
distributed.tell("greeting", f"hello from {index}")
distributed.barrier("here")
assert not distributed.alone()
assert sorted(distributed.told("greeting")) == [f"hello from {other}" for other in range(count)]
assert distributed.told("nothing") == []
if index == 1 and "leave" in sys.argv:
    distributed.leave(7)
if "leave" in sys.argv:
    import time
    time.sleep(60)
"""


@pytest.mark.slow
def test_processes_find_each_other():
    with Group([sys.executable, "-c", HELLO], 3) as group:
        ended = group.end(60)
    assert [process.status for process in ended] == [0, 0, 0], ended[0].stderr
    for index, process in enumerate(ended):
        assert f"[{index}/3] on {socket.gethostname()}: 1 of 3 devices" in process.stderr


@pytest.mark.slow
def test_a_process_that_leaves_waits_for_nobody():
    with Group([sys.executable, "-c", HELLO, "leave"], 2) as group:
        began = time.monotonic()
        assert group.processes[1].wait(50) == 7
        assert time.monotonic() - began < 50


def join_in_a_process(address, index):
    code = (
        "import sys, functools, jax\n"
        "jax.distributed.initialize = functools.partial(jax.distributed.initialize, initialization_timeout=2)\n"
        "from inranker_jax import distributed, flags\n"
        f"sys.exit(flags.run_main(lambda _: distributed.join({address!r}, 2, {index})))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.slow
def test_missing_peers_end_a_process_which_has_said_whom_it_waits_for():
    address = f"127.0.0.1:{free_port()}"
    done = join_in_a_process(address, 1)
    assert done.returncode == -signal.SIGABRT, "JAX ends the process; launchers start it again"
    assert f"process 1 of 2 waits for the others at {address}, at most 5 minutes" in done.stderr
    assert "DEADLINE_EXCEEDED" in done.stderr


def test_a_failure_to_join_has_a_status_that_launchers_try_again(monkeypatch):
    """JAX itself may crash where the address is taken; where it raises, the error says what to look at."""

    def refuse(*_, **__):
        raise RuntimeError("address already in use")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(
        PeersError, match=r"could not join the other processes .*address already in use"
    ) as caught:
        distributed.join("127.0.0.1:1234", 2, 0)
    assert caught.value.exit_status == 75
    assert distributed.alone()


def test_a_second_notice_is_the_first():
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested
        assert interruption.exit_status == 143
