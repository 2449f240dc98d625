"""`launch/gke.sh`: the manifest as Kubernetes reads it, and the calls of kubectl and xpk."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.launch.conftest import Machine
from tests.launch.test_common import AWKWARD

NAME = ("--name=run", "--image=europe-docker.pkg.dev/p/r/i:1")
TPU = ("--tpu=v5e", "--topology=4x4")
GPU = ("--gpu=nvidia-h100-80gb", "--nodes=2", "--gpus_per_node=8")
COMMAND = ("--", "python", "-m", "inranker_jax.train")
XPK = ("--cluster=c", "--zone=z", "--project=p", "--tpu_type=v5litepod-16")


def manifest(machine: Machine, *argv: str) -> dict[str, Any]:
    done = machine.launch("gke.sh", "manifest", *NAME, *argv)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def job_of(jobset: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(jobset: dict[str, Any]) -> dict[str, Any]:
    return job_of(jobset)["template"]["spec"]


def expanded(text: str) -> str:
    """Kubernetes' expansion of a word without references: a doubled dollar is one dollar."""
    assert "$(" not in text.replace("$$", "")
    return text.replace("$$", "$")


def test_a_slice(machine: Machine) -> None:
    jobset = manifest(machine, *TPU, "--max_restarts=7", "--grace=90", *COMMAND)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"] == {
        "name": "run",
        "namespace": "default",
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    assert jobset["spec"]["failurePolicy"] == {
        "maxRestarts": 7,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 1
    job, pod = job_of(jobset), pod_of(jobset)
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    assert job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    (container,) = pod["containers"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2, 130]},
    }
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 90)
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert container["command"] == list(COMMAND[1:])
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert not any(entry["name"].startswith("JAX_") for entry in container["env"])  # GKE tells TPU hosts


@pytest.mark.parametrize(
    ("flags", "accelerator", "hosts", "chips"),
    [
        (("--tpu=v4", "--topology=4x4x4"), "tpu-v4-podslice", 16, 4),
        (("--tpu=v5p", "--topology=2x2x1"), "tpu-v5p-slice", 1, 4),
        (("--tpu=v6e", "--topology=16x16"), "tpu-v6e-slice", 64, 4),
        (("--tpu=v5e", "--topology=2x4", "--chips_per_node=8"), "tpu-v5-lite-podslice", 1, 8),
        (("--tpu=v5e", "--topology=1x1"), "tpu-v5-lite-podslice", 1, 1),
    ],
)
def test_hosts_follow_from_the_topology(
    flags: tuple[str, ...], accelerator: str, hosts: int, chips: int, machine: Machine
) -> None:
    jobset = manifest(machine, *flags, "--slices=3", *COMMAND)
    pod = pod_of(jobset)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert job_of(jobset)["completions"] == hosts
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 3


def test_gpu_nodes_are_told_of_each_other(machine: Machine) -> None:
    jobset = manifest(machine, *GPU, "--spot", "--queue=q", "--service_account=s", *COMMAND)
    pod = pod_of(jobset)
    entries = {
        entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in pod["containers"][0]["env"]
    }
    job = jobset["spec"]["replicatedJobs"][0]["name"]
    assert entries["JAX_COORDINATOR_ADDRESS"] == f"run-{job}-0-0.run:8476"
    assert entries["JAX_NUM_PROCESSES"] == "2"
    assert entries["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3,4,5,6,7"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert entries["JAX_PROCESS_ID"] == {"fieldRef": {"fieldPath": index}}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-h100-80gb",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert "hostNetwork" not in pod
    assert "annotations" not in jobset["metadata"]
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    assert pod["serviceAccountName"] == "s"
    assert {toleration["key"] for toleration in pod["tolerations"]} == {
        "nvidia.com/gpu",
        "cloud.google.com/gke-spot",
    }


def test_a_given_variable_replaces_our_own(machine: Machine) -> None:
    jobset = manifest(machine, *GPU, "--env=LD_LIBRARY_PATH=/mine", "--env=A=b=c", *COMMAND)
    values = [(entry["name"], entry.get("value")) for entry in pod_of(jobset)["containers"][0]["env"]]
    assert ("A", "b=c") in values
    assert [value for name, value in values if name == "LD_LIBRARY_PATH"] == ["/mine"]
    assert pod_of(jobset)["containers"][0]["command"] == list(COMMAND[1:])  # and the image needs no shell


@pytest.mark.parametrize("install", [(), ("--install=it's",)])
@pytest.mark.parametrize(("image", "expected"), [("/cuda/lib:/x y", "/cuda/lib:/x y:"), ("", ""), (None, "")])
def test_the_images_library_path_is_kept(
    install: tuple[str, ...], image: str | None, expected: str, machine: Machine
) -> None:
    """The container's command, run for real with the image's variable."""
    show = "import json, os, sys; print(json.dumps([os.environ['LD_LIBRARY_PATH'], sys.argv[1:]]))"
    jobset = manifest(machine, *GPU, *install, "--", sys.executable, "-c", show, *AWKWARD)
    (container,) = pod_of(jobset)["containers"]
    assert "LD_LIBRARY_PATH" not in {entry["name"] for entry in container["env"]}
    python = machine.folder / "python"  # takes pip's line of --install
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    environment = {"PATH": f"{machine.folder}:/usr/bin:/bin"}
    if image is not None:
        environment["LD_LIBRARY_PATH"] = image
    words = [expanded(word) for word in container["command"]]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [f"{expected}/usr/local/nvidia/lib64", AWKWARD]


def test_words_survive_yaml_and_kubernetes(machine: Machine) -> None:
    jobset = manifest(machine, *TPU, f'--env=A={AWKWARD[3]} \\ "', "--", "python", *AWKWARD)
    (container,) = pod_of(jobset)["containers"]
    assert [expanded(word) for word in container["command"]] == ["python", *AWKWARD]
    assert expanded(container["env"][-1]["value"]) == f'{AWKWARD[3]} \\ "'


@pytest.mark.parametrize("word", ["true", "null", "on", "y"])
def test_a_word_that_yaml_reads_otherwise_stays_a_string(word: str, machine: Machine) -> None:
    flags = (f"--name={word}", f"--namespace={word}", f"--image={word}", f"--queue={word}", f"--env={word}=1")
    jobset = manifest(machine, *GPU, *flags, f"--service_account={word}", f"--gpu={word}", *COMMAND)
    assert jobset["metadata"] == {
        "name": word, "namespace": word, "labels": {"kueue.x-k8s.io/queue-name": word},
    }  # fmt: skip
    pod = pod_of(jobset)
    assert pod["serviceAccountName"] == word
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": word}
    assert pod["containers"][0]["image"] == word
    assert pod["containers"][0]["env"][-1] == {"name": word, "value": "1"}


def test_install_comes_before_the_command(machine: Machine) -> None:
    requirement = "inranker_jax[train,tpu] @ git+https://h/r@v1"
    jobset = manifest(machine, *TPU, f"--install={requirement}", "--", "python", "a b")
    command = [expanded(word) for word in pod_of(jobset)["containers"][0]["command"]]
    assert command[:2] == ["sh", "-c"]
    assert command[3:] == [requirement, "python", "a b"]
    assert command[2] == 'python -m pip install --quiet "$0" && exec "$@"'


def test_a_control_character_is_refused(machine: Machine) -> None:
    done = machine.launch("gke.sh", "manifest", *NAME, *TPU, "--", "python", "a\x07b")
    assert (done.returncode, done.stdout) == (2, "")
    assert "control character" in done.stderr


def test_apply_hands_over_the_manifest_each_time(machine: Machine) -> None:
    text = machine.launch("gke.sh", "manifest", *NAME, *TPU, *COMMAND).stdout
    machine.answers(**{"kubectl apply": [{"out": "jobset.jobset.x-k8s.io/run unchanged\n"}]})
    for _ in range(2):
        done = machine.launch("gke.sh", "apply", *NAME, *TPU, "--context=k", *COMMAND)
        assert done.returncode == 0, done.stderr
        assert machine.stdin_of("kubectl") == text
    assert "run unchanged" in done.stderr
    assert "has ended" not in done.stderr
    asked = [call for call in machine.calls("kubectl") if "apply" in call]
    assert asked == [["--context=k", "--namespace=default", "apply", "-f", "-"]] * 2
    machine.answers(
        **{
            "kubectl apply": [{"out": "jobset.jobset.x-k8s.io/run unchanged\n"}],
            "kubectl get": [{"out": "Failed"}],
        }
    )
    done = machine.launch("gke.sh", "apply", *NAME, *TPU, *COMMAND)
    assert "has ended (Failed), so nothing runs. Delete it" in done.stderr


def test_apply_of_other_settings_tells_the_remedy(machine: Machine) -> None:
    refusal = {"error": 'The JobSet "run" is invalid: field is immutable', "status": 1}
    machine.answers(**{"kubectl apply": [refusal]})
    done = machine.launch("gke.sh", "apply", *NAME, *TPU, *COMMAND)
    assert done.returncode == 2
    assert "Delete it first, or choose another --name" in done.stderr
    machine.answers(**{"kubectl apply": [{"error": "no route\nto host", "status": 1}]})
    done = machine.launch("gke.sh", "apply", *NAME, *TPU, *COMMAND)
    assert done.stderr.splitlines()[-1] == "gke.sh: error: kubectl could not apply it: no route to host"


def test_a_bad_manifest_is_not_applied(machine: Machine) -> None:
    done = machine.launch("gke.sh", "apply", *NAME, "--tpu=v5e", "--topology=4", *COMMAND)
    assert (done.returncode, machine.calls()) == (2, [])


def test_logs_status_and_delete(machine: Machine) -> None:
    machine.launch("gke.sh", "logs", "--name=run", "--follow")
    machine.launch("gke.sh", "logs", "--name=run", "--all", "--lines=5", "--namespace=n")
    machine.launch("gke.sh", "status", "--name=run")
    machine.launch("gke.sh", "delete", "--name=run")
    pods = "--selector=jobset.sigs.k8s.io/jobset-name=run"
    first = f"{pods},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    assert machine.calls("kubectl") == [
        ["--namespace=default", "logs", first, "--tail=100", "--follow"],
        ["--namespace=n", "logs", pods, "--tail=5", "--prefix", "--max-log-requests=1000"],
        ["--namespace=default", "get", "jobset/run"],
        ["--namespace=default", "get", "pods", pods, "--output=wide"],
        ["--namespace=default", "delete", "jobset/run", "--ignore-not-found"],
    ]


@pytest.mark.parametrize(
    "flag", ["--name=--all", "--name=x,y!=z", "--name=a b", "--name=A", "--namespace=x/y"]
)
@pytest.mark.parametrize(
    "subcommand", [("manifest", *TPU, *COMMAND), ("apply", *TPU, *COMMAND), ("xpk", *XPK, *COMMAND), ("logs",),
                   ("status",), ("delete",)],
    ids=lambda subcommand: subcommand[0],
)  # fmt: skip
def test_a_name_that_is_none_reaches_nothing(
    subcommand: tuple[str, ...], flag: str, machine: Machine
) -> None:
    """`kubectl delete jobset --all` would end every JobSet, and a comma in a selector chooses other pods."""
    done = machine.launch("gke.sh", subcommand[0], *NAME, flag, *subcommand[1:])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"{flag}: expected small letters, digits and dashes" in done.stderr
    assert machine.calls() == []


def test_xpk_gets_the_whole_command_as_one_line(machine: Machine) -> None:
    words = [word for word in AWKWARD if "\n" not in word]
    done = machine.launch("gke.sh", "xpk", *NAME, *XPK, "--slices=2", "--env=A=b c", "--", "python", *words)
    assert done.returncode == 0, done.stderr
    listing, creation = machine.calls("xpk")
    assert listing[:2] == ["workload", "list"]
    assert creation[:-1] == [
        "workload", "create", "--workload=run", "--cluster=c", "--zone=z", "--project=p", "--tpu-type=v5litepod-16",
        "--num-slices=2", f"--docker-image={NAME[1].partition('=')[2]}", "--priority=medium", "--max-restarts=50",
        "--termination-grace-period-seconds=120", "--env=A=b c",
    ]  # fmt: skip
    line = creation[-1].removeprefix("--command=")
    assert shlex.split(line) == ["exec", "python", *words]


def test_xpk_does_not_create_twice(machine: Machine) -> None:
    table = "Jobset Name   Created Time\nrun-2         now\nrun           now\n"
    machine.answers(**{"xpk workload list": [{"out": table}]})
    done = machine.launch("gke.sh", "xpk", *NAME, *XPK, *COMMAND)
    assert (done.returncode, len(machine.calls("xpk"))) == (0, 1)
    assert "exists already in c" in done.stderr
    machine.answers(**{"xpk workload list": [{"out": table.replace("run  ", "rum  ")}]})
    machine.launch("gke.sh", "xpk", *NAME, *XPK, *COMMAND)
    assert machine.calls("xpk")[-1][1] == "create"
    machine.answers(**{"xpk workload list": [{"error": "no cluster", "status": 1}]})
    assert machine.launch("gke.sh", "xpk", *NAME, *XPK, *COMMAND).returncode == 2


def test_xpk_refuses_what_it_cannot_pass_on(machine: Machine) -> None:
    done = machine.launch("gke.sh", "xpk", *NAME, *XPK, "--", "python", "two\nlines")
    assert (done.returncode, machine.calls()) == (2, [])
    assert "xpk cannot pass on a line break" in done.stderr
