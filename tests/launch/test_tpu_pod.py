"""`launch/tpu_pod.sh` against a stand-in for gcloud: what it asks for, and the loop that survives preemption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.launch.conftest import LAUNCH, Machine
from tests.launch.test_common import AWKWARD

PLACE = ("--name=pod", "--zone=z", "--project=p")
KIND = "--accelerator_type=v5litepod-16"
PACKAGE = "--package=git+https://example.org/inranker_jax@v1"
QUICK = ("--poll_seconds=0",)
COMMAND = ("--", "python", "train.py")
RESUME = ("resume", *PLACE, KIND, PACKAGE, *QUICK)
SSH = "gcloud compute tpus tpu-vm ssh pod"
WAIT = f"{SSH} bash inranker_jax/worker.sh wait"
DESCRIBE = "gcloud compute tpus queued-resources describe"


def cloud(*lives: list[str], now: list[str] | None = None, **more: Any) -> dict[str, Any]:
    return {"cloud": {"lives": list(lives), "now": now}, **more}


def statuses(*codes: object) -> dict[str, Any]:
    return {"out": "".join(f"launch-status: host{i} {code}\n" for i, code in enumerate(codes))}


def verbs(machine: Machine) -> list[str]:
    """The calls in short: create, delete, and the remote commands; not the looks at the state."""
    found = []
    for argv in machine.calls("gcloud"):
        if "queued-resources" in argv:
            found.append(argv[argv.index("queued-resources") + 1])
        elif "ssh" in argv:
            words = argv[-1].removeprefix("--command=").split()
            found.append(words[2] if words[0] == "bash" else words[0])
        else:
            found.append(argv[argv.index("tpu-vm") + 1])
    return [verb for verb in found if verb not in ("describe", "log")]


ONE_ROUND = ["mkdir", "scp", "install", "start", "wait"]


# ---- create and delete --------------------------------------------------------------------------------------


def test_create_asks_once_and_knows_what_is_there(machine: Machine) -> None:
    machine.answers(**cloud(["WAITING_FOR_RESOURCES", "ACTIVE"]))
    for expected in (
        "requested pod: 1 x v5litepod-16",
        "exists already and is WAITING",
        "exists already and is ACTIVE",
    ):
        done = machine.launch("tpu_pod.sh", "create", *PLACE, KIND, "--spot", "--valid_until=6h")
        assert done.returncode == 0
        assert expected in done.stderr
    assert [argv for argv in machine.calls() if "create" in argv] == [
        [
            "compute", "tpus", "queued-resources", "create", "pod", "--project=p", "--zone=z",
            "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=pod", "--spot",
            "--valid-until-duration=6h", "--quiet",
        ]
    ]  # fmt: skip


def test_create_asks_for_several_slices_or_a_reservation(machine: Machine) -> None:
    machine.answers(**cloud(["ACTIVE"]))
    machine.launch(
        "tpu_pod.sh", "create", *PLACE, "--accelerator_type=v4-128", "--slices=2", "--reservation=r",
        "--create_arg=--network=a b",
    )  # fmt: skip
    argv = machine.calls()[-1]
    assert argv[:5] == ["alpha", "compute", "tpus", "queued-resources", "create"]
    assert {"--node-count=2", "--node-prefix=pod", "--reservation=r", "--network=a b"} <= set(argv)
    assert "--node-id=pod" not in argv


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("v5litepod-17", "1, 4, 8, 16, 32, 64, 128, 256"),
        ("v6e-512", "1, 4, 8, 16, 32, 64, 128, 256"),
        ("v4-100", "8, 16, 32, 64, and multiples of 128"),
        ("v5litepod-16", None),
        ("v6e-256", None),
        ("v4-32", None),
        ("v5p-384", None),
        ("v3-32", None),
    ],
)
def test_a_size_that_is_not_known_is_only_warned_of(kind: str, known: str | None, machine: Machine) -> None:
    done = machine.launch("tpu_pod.sh", "create", *PLACE, f"--accelerator_type={kind}", "--dry_run")
    assert done.returncode == 0
    assert f"--accelerator-type={kind}" in done.stdout + done.stderr
    warning = (
        f"warning: --accelerator_type={kind}: no size of {kind.split('-')[0]} that is known here: {known}."
    )
    assert (warning in done.stderr) == (known is not None)
    assert ("warning" in done.stderr) == (known is not None)


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "DELETING"])
def test_create_does_not_touch_what_has_ended(state: str, machine: Machine) -> None:
    machine.answers(**cloud(now=[state]))
    done = machine.launch("tpu_pod.sh", "create", *PLACE, KIND)
    assert (done.returncode, verbs(machine)) == (2, [])
    assert f"exists and is {state}. Delete it, or let resume" in done.stderr


def test_a_race_with_another_creation_is_no_error(machine: Machine) -> None:
    machine.answers(
        **{DESCRIBE: [{"error": "NOT_FOUND", "status": 1}]},
        **{"gcloud compute tpus queued-resources create": [{"error": "ALREADY_EXISTS", "status": 1}]},
    )
    assert machine.launch("tpu_pod.sh", "create", *PLACE, KIND).returncode == 0


def test_a_refused_creation_shows_gclouds_words(machine: Machine) -> None:
    refusal = {"error": "ERROR: quota\nexceeded", "status": 1}
    machine.answers(**cloud(), **{"gcloud compute tpus queued-resources create": [refusal]})
    done = machine.launch("tpu_pod.sh", "create", *PLACE, KIND)
    assert done.returncode == 2
    assert done.stderr == "tpu_pod.sh: error: gcloud could not create pod: ERROR: quota exceeded\n"


@pytest.mark.parametrize(
    "subcommand", [("create", KIND), ("delete",), ("status",), ("resume", KIND, PACKAGE, *COMMAND)]
)
def test_nothing_is_done_on_a_guess(subcommand: tuple[str, ...], machine: Machine) -> None:
    """When gcloud cannot say whether the resource is there, nothing is created or deleted."""
    machine.answers(**{DESCRIBE: [{"error": "ERROR: PERMISSION_DENIED", "status": 1}]})
    done = machine.launch("tpu_pod.sh", subcommand[0], *PLACE, *QUICK, *subcommand[1:])
    assert (done.returncode, verbs(machine)) == (2, [])
    assert "could not describe pod in z: ERROR: PERMISSION_DENIED" in done.stderr


def test_a_state_is_found_among_gclouds_notices(machine: Machine) -> None:
    machine.answers(**{DESCRIBE: [{"out": "ACTIVE\n", "error": "Updates are available for gcloud.\n"}]})
    done = machine.launch("tpu_pod.sh", "create", *PLACE, *QUICK, KIND)
    assert (done.returncode, verbs(machine)) == (0, [])
    assert "exists already and is ACTIVE" in done.stderr


def test_a_passing_fault_of_the_look_is_tried_again(machine: Machine) -> None:
    machine.answers(**{DESCRIBE: [{"error": "UNAVAILABLE", "status": 1}, {"out": "ACTIVE\n"}]})
    done = machine.launch("tpu_pod.sh", "create", *PLACE, *QUICK, KIND)
    assert (done.returncode, verbs(machine)) == (0, [])


def test_delete_is_exact_and_repeatable(machine: Machine) -> None:
    machine.answers(**cloud(now=["ACTIVE"]))
    for _ in range(2):
        done = machine.launch("tpu_pod.sh", "delete", *PLACE)
        assert done.returncode == 0
    assert "nothing to delete" in done.stderr
    deletions = [argv for argv in machine.calls() if "delete" in argv]
    assert deletions == [
        [
            "compute",
            "tpus",
            "queued-resources",
            "delete",
            "pod",
            "--project=p",
            "--zone=z",
            "--force",
            "--quiet",
        ]
    ]


# ---- on the hosts: the recorded commands really run, in a home folder for each host ----------------------------

INTERPRETER = """#!/bin/sh
# A stand-in for Python on a host: makes "virtual environments" and notes what pip was told.
case "$*" in
  -c*) exit 0 ;;
  "-m venv"*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip install"*) echo "$*" >> "$HOME/pip" ;;
esac
"""
SHOW = """import json, os, pathlib, sys
with open("seen", "a") as seen:
    print(json.dumps([sys.argv[1:], os.environ.get("A")]), file=seen)
"""


class Pod:
    """A pod whose hosts are folders, set up.

    Attributes:
      place: the flags that name it.
    """

    def __init__(self, machine: Machine, hosts: int, slices: int = 1, **script: Any) -> None:
        self.machine = machine
        self.place = (*PLACE, f"--slices={slices}", *QUICK)
        self.interpreter = machine.state / "python"
        self.interpreter.write_text(INTERPRETER)
        self.interpreter.chmod(0o755)
        self.show = machine.state / "show.py"
        self.show.write_text(SHOW)
        machine.answers(hosts=hosts, **script)
        nodes = ["pod"] if slices == 1 else [f"pod-{i}" for i in range(slices)]
        self.homes = [machine.state / "hosts" / f"{node}-w{i}" for node in nodes for i in range(hosts)]

    def launch(self, subcommand: str, *argv: str) -> subprocess.CompletedProcess[str]:
        return self.machine.launch("tpu_pod.sh", subcommand, *self.place, *argv)

    def setup(self, package: str = PACKAGE, *more: str) -> subprocess.CompletedProcess[str]:
        done = self.launch("setup", package, f"--python={self.interpreter}", *more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def stop(self, subcommand: str = "stop") -> str:
        """Sends the run a signal and returns its status when it has ended."""
        assert self.launch(subcommand).returncode == 0
        self.machine.answers(**{DESCRIBE: [{"out": "ACTIVE\n"}]}, hosts=len(self.homes))
        deadline = time.monotonic() + 120
        while (status := self.launch("status").stdout.split()[-1]) == "running":
            assert time.monotonic() < deadline
        return status

    def seen(self) -> list[list[Any]]:
        """What the command saw on each host: [arguments, variable A] of each of its starts."""
        files = [home / "inranker_jax" / "work" / "seen" for home in self.homes]
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.parametrize(("hosts", "slices"), [(2, 1), (2, 2)])
def test_words_reach_every_host_unchanged(hosts: int, slices: int, machine: Machine) -> None:
    pod = Pod(machine, hosts, slices)
    pod.setup()
    done = pod.launch("run", "--env=A=it's $5", "--", sys.executable, str(pod.show), *AWKWARD)
    assert done.returncode == 0, done.stdout + done.stderr
    assert pod.seen() == [[[AWKWARD, "it's $5"]]] * (hosts * slices)
    assert not list(machine.state.rglob("oops"))
    assert "still costs" in done.stderr


def test_setup_installs_once_for_each_version(machine: Machine) -> None:
    pod = Pod(machine, 2)
    wheel = machine.folder / "a b" / "inranker_jax-1-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_text("one")
    for text, installations in (("one", 1), ("one", 1), ("two", 2)):
        wheel.write_text(text)
        done = pod.setup(f"--package={wheel}", "--copy=a b", "--extras=train,tpu")
        lines = [(home / "pip").read_text().splitlines() for home in pod.homes]
        wanted = [line for line in lines[0] if "--upgrade" not in line]
        assert (
            wanted
            == ["-m pip install --quiet ./inranker_jax/dist/inranker_jax-1-py3-none-any.whl[train,tpu]"]
            * installations
        )
        assert lines[0] == lines[1]
    assert "installed" in done.stdout
    assert (pod.homes[1] / "inranker_jax" / "work" / "a b" / wheel.name).read_text() == "two"


def test_s3_needs_its_extra(machine: Machine) -> None:
    command = ("--", "python", "-m", "inranker_jax.train", "--output_dir=s3://b/run")
    done = machine.launch("tpu_pod.sh", *RESUME, *command)
    assert done.returncode == 2
    assert "add --extras=train,tpu,s3" in done.stderr
    assert not machine.calls("gcloud")


def test_pip_that_fails_counts_as_a_crash(machine: Machine) -> None:
    """Not as hosts that do not answer, which are waited for much longer."""
    install = f"{SSH} bash inranker_jax/worker.sh install"
    machine.answers(**cloud(now=["ACTIVE"]), **{install: [{"status": 3}]})
    done = machine.launch("tpu_pod.sh", *RESUME, "--max_crashes=2", *COMMAND)
    assert done.returncode == 3
    assert "crashed with status 3, in setup: restart 2" in done.stderr


def test_setup_from_git(machine: Machine) -> None:
    pod = Pod(machine, 1)
    pod.setup()
    assert (
        "inranker_jax[train,tpu] @ git+https://example.org/inranker_jax@v1"
        in (pod.homes[0] / "pip").read_text()
    )


def test_a_host_that_fails_fails_the_setup(machine: Machine) -> None:
    pod = Pod(machine, 2, slices=2)
    done = pod.launch("setup", PACKAGE, "--python=/no/such/python")
    assert done.returncode == 2
    assert "/no/such/python is no Python 3.11 to 3.13" in done.stdout


def test_run_before_setup_and_beside_another_run_is_refused(machine: Machine) -> None:
    pod = Pod(machine, 1)
    done = pod.launch("run", *COMMAND)
    assert done.returncode == 2
    assert "Was it set up?" in done.stderr
    pod.setup()
    assert pod.launch("run", "--detach", "--", "sleep", "600").returncode == 0
    again = pod.launch("run", "--detach", "--", "sleep", "600")
    assert (again.returncode, "running already" in again.stdout) == (0, True)
    other = pod.launch("run", "--detach", "--", "sleep", "601")
    assert other.returncode == 2
    assert "another command is running" in other.stdout
    machine.answers(**{DESCRIBE: [{"out": "ACTIVE\n"}]}, hosts=1)
    status = pod.launch("status")
    assert status.stdout.splitlines()[0] == "pod: ACTIVE"
    assert status.stdout.splitlines()[1].endswith(" running")
    assert pod.stop("trace") == "138", "SIGUSR1, for which sleep has no handler"
    assert pod.launch("run", "--detach", "--", "sleep", "600").returncode == 0
    assert pod.stop() == "130"
    assert pod.launch("run", "--", "true").returncode == 0
    assert pod.launch("logs", "--lines=3").stdout.splitlines()[-1].endswith("ended with status 0")


@pytest.mark.parametrize(
    ("program", "status"), [("exit 2", 2), ("exit 134", 134), ("kill -TERM $$", 143), ("kill -KILL $$", 137)]
)
def test_run_returns_the_status_of_the_command(program: str, status: int, machine: Machine) -> None:
    pod = Pod(machine, 2)
    pod.setup()
    done = pod.launch("run", "--", "bash", "-c", f"echo hello from here; {program}")
    assert done.returncode == status
    assert "hello from here" in done.stdout  # the first host's log is followed


def test_leaving_the_terminal_leaves_the_run_alone(machine: Machine) -> None:
    pod = Pod(machine, 1)
    pod.setup()
    process = subprocess.Popen(
        ["bash", LAUNCH / "tpu_pod.sh", "run", *pod.place, "--", "bash", "-c", "echo begun; sleep 600"],
        cwd=machine.folder,
        env=machine.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while "begun" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on, and costs" in errors
    machine.answers(**{DESCRIBE: [{"out": "ACTIVE\n"}]}, hosts=1)
    assert pod.launch("status").stdout.split()[-1] == "running"
    assert pod.stop() == "130"


# ---- resume -------------------------------------------------------------------------------------------------


def test_resume_makes_waits_sets_up_runs_and_starts_again_after_preemption(machine: Machine) -> None:
    gone = {"error": "ssh: gone", "status": 255}
    machine.answers(
        **cloud(
            ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "SUSPENDING", "SUSPENDED"],
            ["ACTIVE", "SUSPENDED"],
            ["CREATING", "ACTIVE"],
        ),
        **{WAIT: [
            statuses("running", "running"), gone, gone,
            statuses("running", 0), statuses(0, 0),
        ]},
    )  # fmt: skip
    done = machine.launch("tpu_pod.sh", *RESUME, *COMMAND)
    assert done.returncode == 0, done.stderr
    assert verbs(machine) == [
        "create", *ONE_ROUND, "wait", "delete",
        "create", *ONE_ROUND, "delete",
        "create", *ONE_ROUND, "wait",
    ]  # fmt: skip
    assert "restart 2 of 50" in done.stderr
    assert "pod still costs: delete it" in done.stderr


def test_resume_goes_on_with_what_is_there(machine: Machine) -> None:
    machine.answers(**cloud(now=["ACTIVE"]), **{WAIT: [statuses(0)]})
    done = machine.launch("tpu_pod.sh", *RESUME, "--delete_when_done", *COMMAND)
    assert (done.returncode, verbs(machine)) == (0, [*ONE_ROUND, "delete"])


def test_restarts_are_bounded(machine: Machine) -> None:
    machine.answers(**cloud(*[["SUSPENDED"]] * 9))
    done = machine.launch("tpu_pod.sh", *RESUME, "--max_restarts=3", *COMMAND)
    assert done.returncode == 75
    assert verbs(machine) == ["create", *["delete", "create"] * 3]
    assert "--max_restarts=3 are used up" in done.stderr


def test_a_failed_request_shows_its_reason_and_is_made_anew(machine: Machine) -> None:
    machine.answers(**cloud(["FAILED"], ["ACTIVE"]), **{WAIT: [statuses(0)]})
    done = machine.launch("tpu_pod.sh", *RESUME, *COMMAND)
    assert done.returncode == 0
    assert verbs(machine)[:3] == ["create", "delete", "create"]
    assert "no more capacity in the zone" in done.stderr


@pytest.mark.parametrize(
    ("codes", "status", "rounds"),
    [((2, 134), 2, 1), ((134, 2), 2, 1), ((130, 130), 130, 1), ((134, 1), 134, 3), ((0, 1), 1, 3)],
)
def test_crashes_are_tried_again_and_bad_input_is_not(
    codes: tuple[int, ...], status: int, rounds: int, machine: Machine
) -> None:
    machine.answers(**cloud(now=["ACTIVE"]), **{WAIT: [statuses(*codes)]})
    done = machine.launch("tpu_pod.sh", *RESUME, "--max_crashes=2", "--delete_when_done", *COMMAND)
    assert done.returncode == status
    assert verbs(machine) == ONE_ROUND * rounds  # and nothing is deleted


@pytest.mark.parametrize("code", ["lost", "143", "none"])
def test_a_restarted_host_or_a_notice_keeps_the_resource(code: str, machine: Machine) -> None:
    machine.answers(**cloud(now=["ACTIVE"]), **{WAIT: [statuses(code, 143), statuses(0, 0)]})
    done = machine.launch("tpu_pod.sh", *RESUME, *COMMAND)
    assert (done.returncode, verbs(machine)) == (0, ONE_ROUND * 2)


def test_a_preempted_node_of_an_active_resource_is_replaced(machine: Machine) -> None:
    machine.answers(
        **cloud(["ACTIVE"], now=["ACTIVE"]),
        **{WAIT: [statuses("lost"), statuses(0)]},
        **{"gcloud compute tpus tpu-vm describe pod": [{"out": "PREEMPTED\n"}, {"out": "READY\n"}]},
    )
    done = machine.launch("tpu_pod.sh", *RESUME, *COMMAND)
    assert (done.returncode, verbs(machine)) == (0, [*ONE_ROUND, "delete", "create", *ONE_ROUND])


def test_hosts_that_do_not_answer_yet_are_asked_again(machine: Machine) -> None:
    install = f"{SSH} bash inranker_jax/worker.sh install"
    refused = {"error": "ssh: connection refused", "status": 255}
    machine.answers(**cloud(now=["ACTIVE"]), **{install: [refused, {}], WAIT: [statuses(0)]})
    done = machine.launch("tpu_pod.sh", *RESUME, *COMMAND)
    assert (done.returncode, verbs(machine)) == (0, ["mkdir", "scp", "install", *ONE_ROUND])


def test_bad_input_in_setup_is_not_tried_again(machine: Machine) -> None:
    install = f"{SSH} bash inranker_jax/worker.sh install"
    machine.answers(**cloud(now=["ACTIVE"]), **{install: [{"status": 2}]})
    done = machine.launch("tpu_pod.sh", *RESUME, *COMMAND)
    assert (done.returncode, verbs(machine)) == (2, ["mkdir", "scp", "install"])


def test_a_failed_look_in_the_middle_deletes_nothing(machine: Machine) -> None:
    machine.answers(
        **{DESCRIBE: [{"out": "ACTIVE\n"}, {"error": "UNAVAILABLE", "status": 1}]},
        **{WAIT: [{"error": "ssh: gone", "status": 255}]},
    )
    done = machine.launch("tpu_pod.sh", *RESUME, *COMMAND)
    assert (done.returncode, verbs(machine)) == (2, ONE_ROUND)


def test_what_somebody_else_deleted_is_not_made_anew(machine: Machine) -> None:
    machine.answers(**cloud(["ACTIVE"], now=["ACTIVE", "NONE"]), **{WAIT: [{"error": "gone", "status": 1}]})
    done = machine.launch("tpu_pod.sh", *RESUME, *COMMAND)
    assert (done.returncode, verbs(machine)) == (2, ONE_ROUND)
    assert "deleted by somebody else" in done.stderr


def test_resume_for_real_on_two_hosts(machine: Machine) -> None:
    """The command leaves with 143 the first time, as training does on a notice, and goes on the second time."""
    pod = Pod(machine, 2, **cloud(now=["ACTIVE"]))
    program = f'"{sys.executable}" "{pod.show}" "$0"; [ $(wc -l < seen) -ge 2 ] || exit 143'
    done = pod.launch(
        "resume", KIND, PACKAGE, f"--python={pod.interpreter}", "--", "bash", "-c", program, "a  b"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert pod.seen() == [[[["a  b"], None]] * 2] * 2
    assert "restart 1 of 50" in done.stderr


@pytest.mark.parametrize(("flags", "node", "worker"), [
    ((), "pod-0", "0"), (("--worker=3", "--slice=1"), "pod-1", "3"), (("--worker=all",), "pod-0", "all"),
])  # fmt: skip
def test_logs_of_the_host_that_was_asked_for(
    flags: tuple[str, ...], node: str, worker: str, machine: Machine
) -> None:
    assert machine.launch("tpu_pod.sh", "logs", *PLACE, "--slices=2", *flags).returncode == 0
    (argv,) = machine.calls("gcloud")
    assert argv[: argv.index("ssh") + 3] == ["compute", "tpus", "tpu-vm", "ssh", node, f"--worker={worker}"]
