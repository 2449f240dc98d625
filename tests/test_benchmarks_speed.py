"""The speed benchmarks: their arithmetic, their processes, and each command at the smallest size."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks.contenders import cutting, flops, goals, models, report, rounds, settings, workloads
from benchmarks.contenders.processes import ContenderError, Spec, Worker
from benchmarks.contenders.rounds import Row

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOWHERE = "/nowhere"
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
SMALL, BASE = models.SHAPES["t5-small"], models.SHAPES["t5-base"]


def workload_of(lengths, name="fixed-256"):
    return workloads.Workload(name, pathlib.Path(NOWHERE), np.asarray(lengths))


def row_of(name, mode, seconds, values=(0.5,), precision="float32", workload=None):
    work = workload or workload_of([256] * 8)
    pairs = float(len(work.lengths))
    return Row(name, mode, precision, work, list(seconds), [pairs] * len(seconds), list(values))


# ---- arithmetic ----------------------------------------------------------------------------------------------


def test_operations_are_those_of_the_published_table():
    # performance.md: GFLOPs of a pair of 256 tokens, plain and absorbed.
    assert flops.plain(SMALL, 256) / 1e9 == pytest.approx(12.16, abs=0.01)
    assert flops.absorbed(SMALL, 256) / 1e9 == pytest.approx(10.54, abs=0.01)
    assert flops.plain(BASE, 256) / 1e9 == pytest.approx(53.4, abs=0.1)
    assert flops.absorbed(BASE, 256) / 1e9 == pytest.approx(46.2, abs=0.1)
    assert flops.useful(SMALL, [256, 256], training=True) == 6 * flops.absorbed(SMALL, 256)


@pytest.mark.parametrize("mode", ["sorted", "arrival", "padded"])
def test_batches_hold_every_pair_once_and_fit(mode):
    lengths = np.random.default_rng(0).integers(5, 300, 61).tolist()
    cut = list(cutting.batches(lengths, mode, 1024))
    assert sorted(number for chosen, _ in cut for number in chosen) == list(range(61))
    for chosen, length in cut:
        longest = max(lengths[number] for number in chosen)
        assert length == (512 if mode == "padded" else longest)
        assert len(chosen) <= (max(1, 1024 // longest) if mode == "sorted" else 16)
    if mode != "sorted":
        assert [number for chosen, _ in cut for number in chosen] == list(range(61))


def test_a_ratio_is_taken_within_rounds():
    # The machine is half as fast in the second round, for both.
    mine, other = row_of("ours", "packed", [1.0, 2.0, 1.0]), row_of("theirs", "sorted", [3.0, 6.0, 2.0])
    assert rounds.ratio(mine, other) == pytest.approx(3.0)
    assert rounds.ratio(mine, row_of("late", "sorted", [])) is None


def test_other_scores_are_an_error_and_bounds_depend_on_the_precision():
    rows = [
        row_of("PyTorch float32", "sorted", [1.0], [0.1, 0.2, 0.3]),
        row_of("ours float32", "packed", [1.0], [0.1, 0.2, 0.301]),
        row_of("int8", "sorted", [1.0], [0.1, 0.2, 0.35], "int8"),
        row_of("first pairs", "padded", [1.0], [0.1, 0.2]),
        row_of("NaN", "sorted", [1.0], [0.1, math.nan, 0.3]),
    ]
    reference = rounds.compare(rows, {"float32": 1e-4, "int8": 0.3})
    assert reference is rows[0]
    assert [bool(row.error) for row in rows] == [False, True, False, False, True]
    assert rows[2].difference == pytest.approx(0.05)


def test_goals_compare_with_the_fastest_peer_and_say_what_is_missing():
    rows = [
        row_of("PyTorch float32", "sorted", [2.0]),
        row_of("PyTorch float32", "arrival", [1.0]),
        row_of("ours float32", "bucketed", [0.5]),
        row_of("CTranslate2 float32 1x2", "sorted", [0.4]),
        row_of("ONNX Runtime float32", "sorted", [0.6]),
    ]
    found = goals.scoring("fixed-256", rows, "bucketed", packed={}, shape=SMALL)
    assert [goal.reached for goal in found] == [pytest.approx(2.0), pytest.approx(0.8), None]
    assert [goal.cells()[5] for goal in found] == ["yes", "no", "not measured"]
    assert "CTranslate2" in found[1].beside


def test_tables_are_markdown_and_failures_stand_below(tmp_path):
    failed = row_of("ours", "packed", [])
    failed.error = "it is not installed"
    lines = report.table(["a", "b"], [["x", "1"], ["longer", "23"]]).splitlines()
    assert lines == ["| a      |   b |", "| ------ | --: |", "| x      |   1 |", "| longer |  23 |"]
    assert report.failures([failed, row_of("good", "sorted", [1.0])]) == [
        "Failed:\n\n- ours, packed: it is not installed"
    ]
    report.save(tmp_path, "table", {"rows": [failed.as_dict()]}, "# Text")
    assert json.loads((tmp_path / "table.json").read_text())["rows"][0]["error"] == "it is not installed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json", "table.md"]


def test_collections_that_are_not_there_are_replaced(tmp_path):
    names, message = workloads.available(["fixed-64", "scifact", "cranfield"], tmp_path)
    assert names == ["fixed-64", workloads.SYNTHETIC]
    assert message
    assert "scifact, cranfield" in message
    mix = workloads.make(workloads.SYNTHETIC, 50, tmp_path, tmp_path)
    sequences = workloads.sequences_of(workloads.read_arrays(str(mix.path)))
    assert [len(sequence) for sequence in sequences] == mix.lengths.tolist()
    assert len({sequence.tobytes() for sequence in sequences}) == 50
    assert all(sequence[-1] == 1 and sequence[:-1].min() >= 3 for sequence in sequences)
    first = workloads.head(mix, 7, "first")
    assert first.lengths.tolist() == mix.lengths[:7].tolist()
    whole = mix.lengths.tolist()
    few = workloads.within(mix, 1000)
    assert few.path == mix.path
    assert 1000 - 512 < few.lengths.sum() <= 1000
    assert few.lengths.tolist() == whole[: len(few.lengths)]


def test_real_pairs_are_all_different(shared_data, tmp_path):
    sample = workloads.make("cranfield", 40, tmp_path, shared_data)
    sequences = workloads.sequences_of(workloads.read_arrays(str(sample.path)))
    assert len({sequence.tobytes() for sequence in sequences}) == 40
    assert all(len(sequence) <= 512 and sequence[-1] == 1 for sequence in sequences)


def test_contenders_are_chosen_by_name_or_part():
    specs = [
        Spec(name, "m", {}, (), "float32") for name in ("PyTorch float32", "PyTorch float32 compiled", "ours")
    ]
    assert [spec.name for spec in settings.selected(specs, ["PyTorch float32"])] == ["PyTorch float32"]
    assert [spec.name for spec in settings.selected(specs, ["PyTorch", "ours"])] == [
        spec.name for spec in specs
    ]
    with pytest.raises(
        SystemExit, match=r"--contenders: none is 'packed'. Expected parts of PyTorch float32, "
    ):
        settings.selected(specs, ["ours", "packed"])


def test_modes_are_chosen_by_name():
    specs = [
        Spec("PyTorch", "m", {}, ("dynamic", "padded"), "float32"),
        Spec("ours", "m", {}, ("packed", "padded"), "float32"),
    ]
    found = settings.selected(specs, [], ["packed", "padded"])
    assert [(spec.name, spec.modes) for spec in found] == [
        ("PyTorch", ("padded",)),
        ("ours", ("packed", "padded")),
    ]
    assert [spec.name for spec in settings.selected(specs, [], ["dynamic"])] == ["PyTorch"]
    with pytest.raises(
        SystemExit, match=r"--modes: none is 'pakced'. Expected some of dynamic, padded, packed"
    ):
        settings.selected(specs, [], ["pakced"])


# ---- processes -----------------------------------------------------------------------------------------------

SLEEPER = """
import os, time
class Contender:
    def __init__(self, options):
        print("noise on standard output", flush=True)
    def about(self):
        return {"pid": os.getpid(), "cores": len(os.sched_getaffinity(0))}
    def prepare(self, name, arrays, mode):
        raise ValueError("cannot " + mode)
    def run(self, name, mode, number):
        time.sleep(number)
        return [float(number)]
    def peak(self):
        os._exit(3)
"""


@pytest.fixture
def sleeper(tmp_path, monkeypatch):
    (tmp_path / "sleeping_contender.py").write_text(SLEEPER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Spec("sleeper", "sleeping_contender", {}, ("sorted",), "float32")


def state_of(pid):
    with contextlib.suppress(FileNotFoundError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return None


needs_proc = pytest.mark.skipif(not pathlib.Path("/proc/self/stat").is_file(), reason="needs Linux")


@needs_proc
def test_a_worker_stops_between_commands_survives_errors_and_leaves_nothing(sleeper, tmp_path):
    np.savez(tmp_path / "w.npz", ids=np.ones(1, np.int32), lengths=np.ones(1, np.int64))
    core = sorted(os.sched_getaffinity(0))[:1]
    with Worker(sleeper, core, tmp_path / "log", ENVIRONMENT, timeout=60) as worker:
        pid = worker.about["pid"]
        assert worker.about["cores"] == 1
        for _ in range(100):
            if state_of(pid) == "T":
                break
            time.sleep(0.02)
        assert state_of(pid) == "T", "a worker that does not have the turn must not run"
        with pytest.raises(ContenderError, match="ValueError: cannot sorted"):
            worker.ask(do="prepare", workload="w", file=str(tmp_path / "w.npz"), mode="sorted")
        reply = worker.ask(do="run", workload="w", mode="sorted", round=0)
        assert reply["values"] == [0.0]
        assert reply["peak_bytes"] > 2**20
        with pytest.raises(ContenderError, match="status 3"):
            worker.ask(do="peak")
        with pytest.raises(ContenderError, match="ended with status 3"):
            worker.ask(do="run", workload="w", mode="sorted", round=0)
    assert state_of(pid) is None
    assert "noise on standard output" in (tmp_path / "log").read_text()


@needs_proc
def test_a_worker_that_does_not_answer_is_killed(sleeper, tmp_path):
    with Worker(sleeper, [], tmp_path / "log", ENVIRONMENT, timeout=30) as worker:
        worker._timeout = 0.2
        with pytest.raises(ContenderError, match="no answer in"):
            worker.ask(do="run", workload="w", mode="sorted", round=60)
        assert state_of(worker.about["pid"]) is None


def test_a_contender_without_its_library_becomes_a_row_with_the_reason(sleeper, tmp_path):
    missing = Spec("missing", "no_such_module", {}, ("sorted",), "float32")
    known = Spec("known", "broken", {}, ("sorted",), "float32")
    log = tmp_path / "log"
    with rounds.started(
        [missing, known, sleeper], [], log, ENVIRONMENT, 60, lambda _: None, {"broken": "no model"}
    ) as (workers, errors):
        assert list(workers) == ["sleeper"]
        rows = rounds.prepare([missing, known], workers, errors, lambda *_: workload_of([1]), lambda _: None)
    assert [row.error for row in rows] == ["no_such_module is not installed", "no model"]


def test_rounds_save_after_each_and_go_on_without_one_that_fails(sleeper, tmp_path):
    rows = [row_of("sleeper", "sorted", []), row_of("gone", "sorted", [])]
    rows[1].error = "did not start"
    seen = []
    with rounds.started([sleeper], [], tmp_path / "log", ENVIRONMENT, 60, lambda _: None) as (workers, _):
        rounds.take_turns(
            rows, workers, 2, lambda done: seen.append((done, len(rows[0].seconds))), amount=lambda *_: 6.0
        )
        assert rows[0].amounts == [6.0, 6.0]
        rows[0].amounts, rows[0].seconds = [], []
        workers["sleeper"].close()
        rounds.take_turns(rows, workers, 1, lambda _: None)
    assert seen == [(1, 1), (2, 2)]
    assert rows[0].error
    assert "ended with status" in rows[0].error


# ---- the commands --------------------------------------------------------------------------------------------


def command(script, tmp_path, *flags):
    arguments = [f"--output_dir={tmp_path / 'out'}", f"--work_dir={tmp_path / 'work'}", f"--shared={NOWHERE}"]
    return [sys.executable, f"benchmarks/{script}.py", *arguments, *flags]


def run(script, tmp_path, *flags):
    done = subprocess.run(
        command(script, tmp_path, *flags),
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    markdown = (tmp_path / "out" / f"{script}.md").read_text()
    assert markdown.strip() == done.stdout.strip()
    return markdown, json.loads((tmp_path / "out" / f"{script}.json").read_text())


@pytest.mark.slow
def test_scoring(tmp_path):
    markdown, data = run(
        "scoring",
        tmp_path,
        "--model=micro",
        "--rounds=2",
        "--pairs=6",
        "--padded_pairs=3",
        "--workloads=fixed-32,cranfield",
        "--contenders=PyTorch float32,ours float32,ours bfloat16,CTranslate2 float32,ONNX Runtime int8",
    )
    assert list(data["workloads"]) == ["fixed-32", workloads.SYNTHETIC]
    installed = {"PyTorch", "ours"}
    installed |= {"CTranslate2"} if importlib.util.find_spec("ctranslate2") else set()
    installed |= {"ONNX"} if all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))) else set()
    for rows in data["workloads"].values():
        for row in rows:
            if row["name"].split()[0] not in installed:
                assert row["error"]
                continue
            assert row["error"] is None, row
            assert len(row["seconds"]) == 2
            assert row["pairs"] == (3 if row["mode"] == "padded" else 6)
            assert row["difference"] <= {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.3}[row["precision"]]
    assert data["peak_flops"]["ours float32"]["float32"] > 1e9
    assert "useful tokens of 4,096 pairs" in markdown
    assert "takes their place" in markdown


@pytest.mark.slow
def test_training(tmp_path):
    _, data = run(
        "training",
        tmp_path,
        "--model=micro",
        "--rounds=1",
        "--workloads=synthetic-mix",
        "--batch_size=4",
        "--micro_batches=whole",
        "--precisions=float32",
    )
    (rows,) = data["workloads"].values()
    assert [(row["name"], row["mode"], row["error"]) for row in rows] == [
        ("PyTorch float32", "dynamic", None),
        ("PyTorch float32", "padded", None),
        ("ours float32", "packed", None),
        ("ours float32", "bucketed", None),
        ("ours float32", "padded", None),
    ]
    assert all(row["difference"] < 1e-4 and row["median_rate"] > 0 for row in rows)
    assert set(rows[0]["notes"]["tried"]) == {"4"}


@pytest.mark.slow
def test_startup_and_memory(tmp_path):
    _, data = run("startup", tmp_path, "--model=micro", "--rounds=1")
    assert [row["error"] for row in data["rows"]] == [None] * 4
    assert all(len(row["seconds"]) == 1 for row in data["rows"])
    _, data = run(
        "memory",
        tmp_path,
        "--model=micro",
        "--pairs=300",
        "--batch_size=2",
        "--steps=1",
        "--precisions=float32",
    )
    scoring, training = data["rows"]
    assert scoring["found"]["pairs"] == 300
    assert 2**26 < scoring["found"]["peak"] < 2**30
    assert training["found"]["peak"] > 2**26


@pytest.mark.slow
@needs_proc
def test_ctrl_c_ends_all_workers_and_keeps_what_was_measured(tmp_path):
    process = subprocess.Popen(
        command("scoring", tmp_path, "--model=micro", "--pairs=4", "--rounds=100000", "--workloads=fixed-16",
                "--contenders=PyTorch float32"),
        cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "round 2 of" in line:
            break
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode not in (0, None)
    assert "what was measured is in" in errors
    assert state_of(children[0]) is None
    data = json.loads((tmp_path / "out" / "scoring.json").read_text())
    assert len(data["workloads"]["fixed-16"][0]["seconds"]) >= 2
