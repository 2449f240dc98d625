"""`launch/local_processes.sh` for real: processes, signals, restarts, logs, and a JAX program of two processes."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.conftest import LAUNCH, Machine

SCRIPT = "local_processes.sh"
# A command that saves and leaves on a signal, as training does.
SAVES = (
    'trap "echo saved >> saved; exit 143" TERM; trap "echo saved >> saved; exit 130" INT; '
    "touch ready.$JAX_PROCESS_ID; while true; do sleep 0.05; done"
)


def shell(text: str) -> tuple[str, ...]:
    return ("--", "bash", "-c", text)


def start(machine: Machine, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(LAUNCH / SCRIPT), *argv],
        cwd=machine.folder,
        env=machine.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(*paths: pathlib.Path) -> None:
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not appear"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
    return "Z" not in stat.rpartition(")")[2].split()[0]


def test_each_process_gets_its_variables_and_a_prefix(machine: Machine) -> None:
    show = (
        'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS; '
        '$JAX_PLATFORMS $JAX_NUM_CPU_DEVICES $A"'
    )
    done = machine.launch(SCRIPT, "3", "--devices=4", "--env=A=x  y", *shell(show))
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    ports = set(re.findall(r"127\.0\.0\.1:(\d+)", done.stdout))
    assert len(ports) == 1
    port = ports.pop()
    assert lines == [f"{i}| {i} of 3 at 127.0.0.1:{port}; cpu 4 x  y" for i in range(3)]


def test_words_of_the_command_arrive_unchanged(machine: Machine) -> None:
    words = ['--gin.X="a b"', "it's", "$HOME", "", "*", "two\nlines"]
    show = "import json, sys; print(json.dumps(sys.argv[1:]))"
    done = machine.launch(SCRIPT, "1", "--", sys.executable, "-c", show, *words)
    assert json.loads(done.stdout.removeprefix("0| ")) == words


def test_gpus_are_divided(machine: Machine) -> None:
    show = shell('echo "$CUDA_VISIBLE_DEVICES local $JAX_LOCAL_DEVICE_IDS"')
    machine.answers(**{"nvidia-smi": [{"out": "GPU 0\nGPU 1\nGPU 2\nGPU 3\n"}]})
    for gpus, expected in (
        ("--gpus=all", ["0| 0,1 local 0,1", "1| 2,3 local 0,1"]),
        ("--gpus=2", ["0| 0 local 0", "1| 1 local 0"]),
        ("--gpus=4,6,5,7", ["0| 4,6 local 0,1", "1| 5,7 local 0,1"]),
    ):
        done = machine.launch(SCRIPT, "2", gpus, *show)
        assert sorted(done.stdout.splitlines()) == expected, done.stderr
    done = machine.launch(SCRIPT, "2", "--gpus=all", *show, CUDA_VISIBLE_DEVICES="3,5")
    assert sorted(done.stdout.splitlines()) == ["0| 3 local 0", "1| 5 local 0"]
    done = machine.launch(SCRIPT, "2", "--gpus=2", *show, CUDA_VISIBLE_DEVICES="7,3,5")
    assert sorted(done.stdout.splitlines()) == ["0| 7 local 0", "1| 3 local 0"]
    done = machine.launch(SCRIPT, "1", "--gpus=all", *show, CUDA_VISIBLE_DEVICES="3")
    assert done.stdout.splitlines() == ["0| 3 local 0"]
    done = machine.launch(SCRIPT, "2", "--gpus=4", *show, CUDA_VISIBLE_DEVICES="3,5")
    assert done.returncode == 2
    assert "CUDA_VISIBLE_DEVICES=3,5 has 2" in done.stderr


@pytest.mark.parametrize(
    ("flag", "variable", "message"),
    [
        ("--gpus=0,0", None, "--gpus=0,0: GPU 0 stands there twice. Name each once."),
        ("--gpus=1,01", None, "GPU 1 stands there twice"),
        ("--gpus=2", "GPU-a1,GPU-a1", "CUDA_VISIBLE_DEVICES=GPU-a1,GPU-a1: GPU GPU-a1 stands there twice"),
        ("--gpus=0,,1", None, "--gpus=0,,1: '' is no GPU. Expected a number of GPUs, a list such as"),
        ("--gpus=al", None, "'al' is no GPU"),
        ("--gpus=99999999999999999999", None, "so many GPUs no machine has"),
        ("--gpus=2", "", "CUDA_VISIBLE_DEVICES='' lets this shell use no GPUs. Unset it, or name them by --gpus=LIST."),
        ("--gpus=all", "", "lets this shell use no GPUs"),
        ("--gpus=2", "-1", "CUDA_VISIBLE_DEVICES='-1' lets this shell use no GPUs"),
        ("--port=0", None, "--port=0: expected a whole number of at least 1 and at most 65535."),
        ("--port=99999", None, "--port=99999: expected a whole number of at least 1 and at most 65535."),
    ],
)  # fmt: skip
def test_gpus_and_ports_that_are_none_are_refused(
    flag: str, variable: str | None, message: str, machine: Machine
) -> None:
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    done = machine.launch(SCRIPT, "2", flag, "--dry_run", *shell("true"), **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
    assert machine.calls() == []


@pytest.mark.parametrize(
    ("flag", "variable", "expected"),
    [
        ("--gpus=08", None, ["0,1,2,3", "4,5,6,7"]),
        ("--gpus=5, 3", None, ["5", "3"]),
        ("--gpus=2", "0, 1", ["0", "1"]),
        ("--gpus=all", "GPU-8932f937,MIG-GPU-8932f937/1/2", ["GPU-8932f937", "MIG-GPU-8932f937/1/2"]),
        ("--gpus=1,2", "", ["1", "2"]),  # a list is taken at its word
    ],
)
def test_gpus_in_their_spellings(
    flag: str, variable: str | None, expected: list[str], machine: Machine
) -> None:
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    done = machine.launch(SCRIPT, "2", flag, "--dry_run", *shell("true"), **environment)
    assert re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", done.stdout) == expected, done.stderr


def test_the_first_failing_status_is_returned_and_the_others_are_stopped(machine: Machine) -> None:
    fails = (
        "echo $$ > pid.$JAX_PROCESS_ID; [ $JAX_PROCESS_ID = 1 ] && "
        "{ until [ -s pid.0 ] && [ -s pid.2 ]; do sleep 0.05; done; exit 7; }; "
        "trap '' TERM; sleep 600 & wait; sleep 600"
    )
    began = time.monotonic()
    done = machine.launch(SCRIPT, "3", "--grace=1", *shell(fails))
    assert done.returncode == 7
    assert time.monotonic() - began < 60
    assert "process 1 of 3 failed first, with status 7" in done.stderr
    pids = [int((machine.folder / f"pid.{index}").read_text()) for index in range(3)]
    assert not any(alive(pid) for pid in pids)  # even those that ignore SIGTERM


def test_a_crash_is_restarted_and_bad_input_is_not(machine: Machine) -> None:
    counted = "[ $JAX_PROCESS_ID = 0 ] && echo $JAX_COORDINATOR_ADDRESS >> tries; "
    third = counted + "[ $(wc -l < tries) -ge 3 ] || exit 9"
    done = machine.launch(SCRIPT, "1", "--restarts=5", "--grace=0", *shell(third))
    tries = (machine.folder / "tries").read_text().split()
    assert (done.returncode, len(tries)) == (0, 3), done.stderr
    assert "restart 2 of 5" in done.stderr
    for status, expected in ((9, 3), (2, 1), (0, 1)):
        (machine.folder / "tries").unlink()
        done = machine.launch(
            SCRIPT, "2", "--restarts=2", "--grace=0", *shell(f"{counted} sleep 2; exit {status}")
        )
        assert done.returncode == status
        assert len((machine.folder / "tries").read_text().split()) == expected


def test_bad_input_of_one_process_is_not_restarted_whoever_fails_first(machine: Machine) -> None:
    text = "echo x >> tries; [ $JAX_PROCESS_ID = 0 ] && exit 134; sleep 0.5; exit 2"
    done = machine.launch(SCRIPT, "2", "--restarts=3", "--grace=60", *shell(text))
    assert done.returncode == 134
    assert (machine.folder / "tries").read_text() == "x\nx\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_goes_to_all_once_and_ends_without_a_restart(
    number: signal.Signals, status: int, machine: Machine
) -> None:
    process = start(machine, "2", "--restarts=5", *shell(SAVES))
    wait_for(machine.folder / "ready.0", machine.folder / "ready.1")
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status
    assert (machine.folder / "saved").read_text() == "saved\nsaved\n"
    assert "restart" not in errors
    assert "all have left after the signal" in errors
    assert "failed" not in errors


def test_ctrl_c_in_a_terminal_reaches_a_process_once(machine: Machine) -> None:
    """A terminal signals the whole group in front; the processes are in groups of their own."""
    counts = (
        "import os, pathlib, signal, sys, time\n"
        "seen = []\n"
        "signal.signal(signal.SIGINT, lambda *_: seen.append(1))\n"
        "pathlib.Path('ready').touch()\n"
        "while not seen: time.sleep(0.01)\n"
        "time.sleep(1)\n"
        "print('signals:', len(seen), flush=True)\n"
        "sys.exit(130)\n"
    )
    process = start(machine, "1", "--", sys.executable, "-c", counts)
    wait_for(machine.folder / "ready")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert (process.returncode, output) == (130, "0| signals: 1\n")


def test_a_second_signal_is_handed_on_too(machine: Machine) -> None:
    stubborn = (
        "n=0; trap 'n=$((n + 1)); touch got.$n; [ $n = 1 ] || exit 143' TERM; touch ready; "
        "while true; do sleep 0.05; done"
    )
    process = start(machine, "1", *shell(stubborn))
    wait_for(machine.folder / "ready")
    process.terminate()
    wait_for(machine.folder / "got.1")
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 143


def test_a_request_for_a_trace_is_handed_on_and_ends_nothing(machine: Machine) -> None:
    traced = (
        'trap "touch traced.$JAX_PROCESS_ID" USR1; touch ready.$JAX_PROCESS_ID; '
        "while [ ! -e enough ]; do sleep 0.05; done"
    )
    process = start(machine, "2", *shell(traced))
    wait_for(*(machine.folder / f"ready.{index}" for index in range(2)))
    process.send_signal(signal.SIGUSR1)
    wait_for(*(machine.folder / f"traced.{index}" for index in range(2)))
    (machine.folder / "enough").touch()
    process.communicate(timeout=120)
    assert process.returncode == 0


def test_the_others_have_time_to_save_when_one_was_stopped(machine: Machine) -> None:
    """One process got SIGTERM and left; the rest save for longer than the grace after a crash."""
    text = "[ $JAX_PROCESS_ID = 0 ] && exit 143; trap 'echo hurried' TERM; sleep 2; echo saved; exit 143"
    done = machine.launch(SCRIPT, "2", "--grace=0", "--save_grace=100", *shell(text))
    assert done.returncode == 143
    assert done.stdout == "1| saved\n"


def test_logs_lie_apart_and_are_continued(machine: Machine) -> None:
    text = "echo out $JAX_PROCESS_ID; echo err >&2; exit $JAX_PROCESS_ID"
    for _ in range(2):
        done = machine.launch(SCRIPT, "2", "--log_dir=a b/logs", "--grace=60", *shell(text))
        assert (done.returncode, done.stdout) == (1, "")
    logs = [machine.folder / "a b" / "logs" / f"process_{index}.log" for index in range(2)]
    assert [log.read_text() for log in logs] == ["out 0\nerr\n" * 2, "out 1\nerr\n" * 2]
    assert "out 1" in done.stderr  # the end of the log of the one that failed


def test_children_left_behind_are_ended(machine: Machine) -> None:
    done = machine.launch(SCRIPT, "1", *shell("sleep 600 & echo $!"))
    assert done.returncode == 0
    pid = int(done.stdout.removeprefix("0| "))
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


@pytest.mark.slow
def test_two_real_processes_are_one_jax_program(machine: Machine) -> None:
    program = machine.folder / "program.py"
    program.write_text(
        "from inranker_jax import distributed\n"
        "index, count = distributed.join()\n"
        "import jax\n"
        "import numpy as np\n"
        "from jax.experimental import multihost_utils\n"
        "everyone = multihost_utils.process_allgather(np.array([index + 1]))\n"
        "print(index, count, jax.local_device_count(), jax.device_count(), everyone.ravel().tolist(), flush=True)\n"
    )
    done = machine.launch(SCRIPT, "2", "--devices=2", "--", sys.executable, str(program))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"0| 0 2 2 4 [1, 2]", "1| 1 2 2 4 [1, 2]"} <= set(done.stdout.splitlines())
