"""`launch/worker.sh`: what runs on a host of a pod, where only its own files tell what happened before."""

from __future__ import annotations

import pathlib
import subprocess
import time

import pytest

from tests.launch.conftest import LAUNCH


class Host:
    """A host whose package is installed.

    Attributes:
      run: the folder with pid, log and status of the run.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.run = root / "run"
        (root / "venv").mkdir(parents=True)
        (root / "venv" / "installed").write_text("x")

    def worker(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(LAUNCH / "worker.sh"), *argv],
            env={"PATH": "/usr/bin:/bin", "INRANKER_JAX_HOME": str(self.root)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def status(self, seconds: int = 0) -> str:
        return self.worker("wait", str(seconds)).stdout.split()[-1]


@pytest.fixture
def host(tmp_path: pathlib.Path) -> Host:
    return Host(tmp_path / "home folder")


def test_nothing_started(host: Host) -> None:
    assert host.status() == "none"
    assert "nothing is running" in host.worker("signal", "INT").stdout
    assert host.worker("log", "5").returncode == 2


def test_a_reboot_is_noticed_though_the_process_id_lives(host: Host) -> None:
    host.worker("start", "--", "sleep", "600")
    assert host.status() == "running"
    boot = (host.run / "boot").read_text()
    (host.run / "boot").write_text("another boot")
    assert host.status() == "lost"
    (host.run / "boot").write_text(boot)
    host.worker("signal", "INT")
    assert host.status(60) == "130"


def test_a_killed_supervisor_leaves_no_second_run(host: Host) -> None:
    host.worker("start", "--", "sleep", "600")
    subprocess.run(["kill", "-KILL", (host.run / "supervisor").read_text().strip()], check=True)
    assert host.status() == "running"
    assert "running already" in host.worker("start", "--", "sleep", "600").stdout
    subprocess.run(["kill", "-KILL", (host.run / "child").read_text().strip()], check=True)
    assert host.status(60) == "lost"


def test_the_supervisor_notes_the_status_though_all_get_the_signal(host: Host) -> None:
    host.worker("start", "--", "bash", "-c", "trap 'sleep 1; exit 143' TERM; while true; do sleep 0.1; done")
    for name in ("supervisor", "child"):
        subprocess.run(["kill", "-TERM", (host.run / name).read_text().strip()], check=True)
    assert host.status(60) == "143"


def test_a_trace_reaches_the_command_and_spares_the_supervisor(host: Host) -> None:
    program = "trap 'echo traced' USR1; trap 'exit 130' INT; echo ready; while true; do sleep 0.1; done"
    host.worker("start", "--", "bash", "-c", program)
    while "\nready\n" not in host.worker("log", "100").stdout:
        time.sleep(0.1)
    assert "sent SIGUSR1" in host.worker("signal", "USR1").stdout
    # As `pkill -f` with the command's name does, which is in the supervisor's arguments too.
    subprocess.run(["kill", "-USR1", (host.run / "supervisor").read_text().strip()], check=True)
    while "\ntraced\n" not in host.worker("log", "100").stdout:
        time.sleep(0.1)
    assert host.status() == "running"
    host.worker("signal", "INT")
    assert host.status(60) == "130"


def test_a_restart_appends_to_the_log(host: Host) -> None:
    for word in ("first", "second"):
        host.worker("start", "--", "echo", word)
        assert host.status(60) == "0"
    log = host.worker("log", "100").stdout
    assert log.index("\nfirst\n") < log.index("\nsecond\n")
    assert host.worker("log", "100", "follow").stdout == log  # there is nothing to follow


def test_wait_is_bounded(host: Host) -> None:
    host.worker("start", "--", "sleep", "600")
    began = time.monotonic()
    assert host.status(1) == "running"
    assert time.monotonic() - began < 60
    host.worker("signal", "KILL")
    assert host.status(60) == "137"


def test_a_version_is_not_changed_under_a_run(host: Host) -> None:
    host.worker("start", "--", "sleep", "600")
    done = host.worker("install", "auto", "inranker_jax[train,tpu] @ git+https://h/r@v2")
    assert done.returncode == 2
    assert "a run is going on here" in done.stderr
    host.worker("signal", "INT")
    assert host.status(60) == "130"
