"""Who takes part: flags, environment, launchers, and what is told when peers are missing."""

from __future__ import annotations

import glob
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from jax._src import cloud_tpu_init

from benchmarks.process_group import Group, free_port
from inranker_jax import distributed
from inranker_jax.errors import InputError, PeersError
from inranker_jax.interruption import Interruption

POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
ORTE = "1531576320.0;tcp://10.96.0.1:34911"
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
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None),  # Open MPI 5, which JAX cannot ask
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": ORTE}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_hnp_uri": ORTE}, None),
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


def test_a_device_handed_to_virtual_machines_is_no_tpu(monkeypatch):
    """`/dev/vfio` is where TPUs are too; only their PCI ids tell."""
    monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/vfio/0"] if "vfio" in pattern else [])
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.managed_by({}) is None
    assert distributed.join() == (0, 1)
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    assert distributed.managed_by({}) == distributed.managed_by({"JAX_PLATFORMS": ""}) == "Cloud TPU"
    assert distributed.managed_by({"JAX_PLATFORMS": "cpu"}) is None
    assert distributed.managed_by({"TPU_SKIP_MDS_QUERY": "1"}) is None


@pytest.mark.parametrize(
    ("variable", "value", "more"),
    [
        ("SLURM_STEP_NUM_TASKS", "", {"SLURM_PROCID": "0"}),
        ("OMPI_COMM_WORLD_SIZE", "two", {}),
        ("OMPI_COMM_WORLD_SIZE", "²", {"OMPI_MCA_orte_hnp_uri": ORTE}),
        ("OMPI_COMM_WORLD_RANK", "-1", {"OMPI_COMM_WORLD_SIZE": "2"}),
    ],
)
def test_a_launchers_variable_that_is_no_number_is_named(monkeypatch, variable, value, more):
    for name, text in (more | {variable: value}).items():
        monkeypatch.setenv(name, text)
    with pytest.raises(
        InputError, match=f"^{variable} is '{value}'; expected a whole number.*unset {variable}"
    ):
        distributed.join()


def test_open_mpi_5_needs_an_address_and_nothing_else(monkeypatch):
    """Its mpirun says who a process is, but not where process 0 is. All shown by `mpirun -n 3 env`."""
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *told, **more: joined.append((told, more)))
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    for name, value in (("SIZE", "3"), ("RANK", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    with pytest.raises(InputError, match=r"process 2 of 3 of Open MPI .*Add --coordinator_address=HOST:PORT"):
        distributed.join()
    distributed.join("10.0.0.2:8476")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.3:8476")
    distributed.join()
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")
    distributed.join()
    distributed.join("10.0.0.4:8476", 6, 5)
    assert [(*told, more["local_device_ids"]) for told, more in joined] == [
        ("10.0.0.2:8476", 3, 2, [1]),
        ("10.0.0.3:8476", 3, 2, [1]),
        ("10.0.0.3:8476", 3, 2, None),
        ("10.0.0.4:8476", 6, 5, None),
    ]


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


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("localhost:1234", "2", "many"), "JAX_PROCESS_ID\\) is 'many'; expected a whole number"),
        (
            ("localhost:1234", "²", "0"),
            "JAX_NUM_PROCESSES\\) is '²'; expected a whole number, such as 2. Without",
        ),
        (("localhost:1234", "2", ""), "JAX_PROCESS_ID\\) is ''; expected a whole number"),
        (("localhost:¹", "2", "0"), "coordinator address 'localhost:¹': expected HOST:PORT"),
    ],
)
def test_the_environment_says_the_same_as_flags(monkeypatch, values, words):
    for name, value in zip(ALL, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
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
