"""`launch/slurm.sh`: the batch script, run for real with a stand-in for srun, and the calls of Slurm's commands."""

from __future__ import annotations

import getpass
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.conftest import Machine
from tests.launch.test_common import AWKWARD

NAME = ("--name=run", "--nodes=2", "--gpus_per_node=4")
COMMAND = ("--", "python", "-m", "inranker_jax.train")


def script(machine: Machine, *argv: str) -> str:
    done = machine.launch("slurm.sh", "script", *NAME, *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def execute(machine: Machine, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the batch script as Slurm would, on the stand-ins."""
    return subprocess.run(
        ["bash", "-c", text],
        cwd=machine.folder,
        env=machine.environment(SLURM_JOB_ID="77", **environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def impatient(machine: Machine) -> Machine:
    """`sleep` ends at once: the script's last wait for Slurm to end it is not ours to wait for."""
    sleep = machine.state.parent / "bin" / "sleep"
    sleep.write_text("#!/bin/sh\nexit 0\n")
    sleep.chmod(0o755)
    return machine


def test_the_directives(machine: Machine) -> None:
    text = script(
        machine, "--time=24:00:00", "--partition=gpu", "--account=a", "--qos=q", "--cpus_per_task=16",
        "--sbatch_arg=--constraint=h100", "--log_dir=my logs", *COMMAND,
    )  # fmt: skip
    assert directives(text) == [
        "--job-name=run", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--time=24:00:00", "--partition=gpu",
        "--account=a", "--qos=q", "--cpus-per-task=16", f'--output="{machine.folder}/my logs/%x_%j.log"',
        "--open-mode=append", "--requeue", "--signal=TERM@120", "--constraint=h100",
    ]  # fmt: skip
    lines = text.splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])  # Slurm stops reading there
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3" in lines


def test_a_percent_sign_of_the_log_folder_is_no_pattern(machine: Machine) -> None:
    """Slurm would write to the folder of the host's name, %N, and logs look in another."""
    text = script(machine, "--log_dir=100%N/%%b", *COMMAND)
    assert f"--output={machine.folder}/100%%N/%%%%b/%x_%j.log" in directives(text)
    folder = machine.folder / "100%N" / "%%b"
    folder.mkdir(parents=True)
    (folder / "run_7.log").write_text("here\n")
    assert machine.launch("slurm.sh", "logs", *NAME, "--log_dir=100%N/%%b").stdout == "here\n"


def test_shellcheck_finds_nothing_in_it(machine: Machine) -> None:
    text = script(machine, "--venv=my venv", "--env=A=it's", "--tasks=gpu", "--", "python", *AWKWARD)
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    # The virtual environment's own script is not there to be followed, and a quoted ~ or $ is meant.
    done = subprocess.run(
        [shellcheck, "--exclude=SC1091,SC2016,SC2088", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_one_task_for_each_gpu(machine: Machine) -> None:
    text = script(machine, "--tasks=gpu", *COMMAND)
    assert "--ntasks-per-node=4" in directives(text)
    assert "JAX_LOCAL_DEVICE_IDS" not in text  # JAX takes the device of the task's local number


def test_srun_gets_the_words_unchanged(machine: Machine) -> None:
    done = execute(machine, script(machine, "--cpus_per_task=3", "--", *AWKWARD))
    assert done.returncode == 0, done.stderr
    assert machine.calls("srun") == [
        ["--kill-on-bad-exit=0", "--wait=600", "--label", "--cpus-per-task=3", *AWKWARD]
    ]
    assert machine.calls("scontrol") == []
    assert list(machine.folder.iterdir()) == []


def test_what_comes_before_the_command(machine: Machine) -> None:
    venv = machine.folder / "my venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "activate").write_text('echo "activated with $A and $LOADED"\n')
    more = (f"--venv={venv.parent}", "--env=A=it's $5", "--prologue=LOADED=cuda")
    done = execute(machine, script(machine, *more, *COMMAND))
    assert done.stdout.splitlines()[0] == "activated with it's $5 and cuda"
    failed = execute(machine, script(machine, "--prologue=false", *COMMAND))
    assert failed.returncode == 1
    assert len(machine.calls("srun")) == 1  # of the first job only


@pytest.mark.parametrize(
    ("status", "restarts", "queued"),
    [(0, 0, False), (2, 0, False), (130, 0, False), (143, 0, True), (134, 4, True), (1, 5, False)],
)
def test_what_is_queued_again(status: int, restarts: int, queued: bool, impatient: Machine) -> None:
    impatient.answers(srun=[{"status": status}])
    text = script(impatient, "--max_restarts=5", *COMMAND)
    done = execute(impatient, text, **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}))
    assert impatient.calls("scontrol") == ([["requeue", "77"]] if queued else [])
    assert done.returncode == (0 if queued else status)  # queued again, Slurm has ended it by then


def test_a_refused_requeue_fails_the_job(impatient: Machine) -> None:
    impatient.answers(srun=[{"status": 143}], scontrol=[{"status": 1}])
    assert execute(impatient, script(impatient, *COMMAND)).returncode == 143


def test_a_job_that_slurm_ends_does_not_queue_itself(impatient: Machine) -> None:
    """scancel and preemption signal the batch shell too: then Slurm decides, and cancelled means cancelled."""
    srun = impatient.state.parent / "bin" / "srun"
    srun.write_text(
        "#!/bin/sh\ntouch started\nwhile [ ! -e signalled ]; do /bin/sleep 0.05; done\nexit 143\n"
    )
    process = subprocess.Popen(
        ["bash", "-c", script(impatient, *COMMAND)],
        cwd=impatient.folder,
        env=impatient.environment(SLURM_JOB_ID="77"),
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (impatient.folder / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    (impatient.folder / "signalled").touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Slurm is ending this job" in output
    assert impatient.calls("scontrol") == []


def test_submit_writes_the_script_and_submits_it_once(machine: Machine) -> None:
    machine.answers(squeue=[{}, {"out": "77 PENDING\n"}], sbatch=[{"out": "Submitted batch job 77\n"}])
    done = machine.launch("slurm.sh", "submit", *NAME, "--log_dir=a b", *COMMAND)
    assert done.returncode == 0, done.stderr
    file = machine.folder / "a b" / "run.sbatch"
    assert machine.calls("sbatch") == [[str(file)]]
    assert file.read_text() == script(machine, "--log_dir=a b", *COMMAND)
    again = machine.launch("slurm.sh", "submit", *NAME, *COMMAND)
    assert (again.returncode, len(machine.calls("sbatch"))) == (0, 1)
    assert "is there already: 77 PENDING" in again.stderr


def test_without_the_queue_nothing_is_submitted(machine: Machine) -> None:
    machine.answers(squeue=[{"error": "no slurmctld", "status": 1}])
    done = machine.launch("slurm.sh", "submit", *NAME, *COMMAND)
    assert (done.returncode, machine.calls("sbatch")) == (2, [])


def test_a_refused_submission_is_an_error(machine: Machine) -> None:
    machine.answers(sbatch=[{"error": "sbatch: error: invalid partition\n", "status": 1}])
    done = machine.launch("slurm.sh", "submit", *NAME, *COMMAND)
    assert done.returncode == 1
    assert "invalid partition" in done.stderr


@pytest.mark.parametrize("time", ["90", "90:30", "24:00:00", "2-12", "2-12:30", "2-12:30:00", "UNLIMITED"])
def test_time_limits_of_slurm(time: str, machine: Machine) -> None:
    assert f"--time={time}" in directives(script(machine, f"--time={time}", *COMMAND))


@pytest.mark.parametrize("time", ["24h", "1:2:3:4", "tomorrow", "-5", "2-"])
def test_a_wrong_time_is_named(time: str, machine: Machine) -> None:
    done = machine.launch("slurm.sh", "script", *NAME, f"--time={time}", *COMMAND)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--time={time}: expected Slurm's MINUTES" in done.stderr


def test_a_missing_environment_is_not_submitted(machine: Machine) -> None:
    done = machine.launch("slurm.sh", "submit", *NAME, "--venv=no/such", *COMMAND)
    assert (done.returncode, machine.calls("sbatch")) == (2, [])
    assert "--venv=no/such: no bin/activate in it" in done.stderr
    (machine.folder / "env" / "bin").mkdir(parents=True)
    (machine.folder / "env" / "bin" / "activate").touch()
    assert machine.launch("slurm.sh", "submit", *NAME, "--venv=env", *COMMAND).returncode == 0


def test_status_logs_and_cancel(machine: Machine) -> None:
    user = f"--user={getpass.getuser()}"
    machine.launch("slurm.sh", "status", "--name=run")
    machine.launch("slurm.sh", "cancel", "--name=run")
    assert machine.calls("squeue") == [[user, "--name=run"]]
    assert machine.calls("scancel") == [[user, "--name=run"]]
    missing = machine.launch("slurm.sh", "logs", "--name=run")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    logs = pathlib.Path(machine.folder, "slurm_logs")
    logs.mkdir()
    for age, job in ((100, 9), (50, 10)):
        (logs / f"run_{job}.log").write_text(f"one\nof {job}\n")
        os.utime(logs / f"run_{job}.log", (time.time() - age,) * 2)
    (logs / "run-other_11.log").write_text("another job\n")
    assert machine.launch("slurm.sh", "logs", "--name=run", "--lines=1").stdout == "of 10\n"
