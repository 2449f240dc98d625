"""Stages: what runs, what is skipped, what a failure and a signal leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from inranker_jax import stages as stages_module
from inranker_jax.errors import InputError
from inranker_jax.interruption import Interruption
from inranker_jax.stages import Stage, StageFailed, run_stages


def stage(name, folder, text="done", code="", inputs=()):
    """A stage that appends to a file, so that its runs can be counted."""
    output = folder / f"{name}.txt"
    program = f"open({str(output)!r}, 'a').write({text!r})\n{code}"
    command = [sys.executable, "-c", program]
    return Stage(
        name,
        lambda: command,
        (output,),
        inputs,
        about=lambda: f"{output.stat().st_size} bytes",
        usd=lambda: 0.5,
    )


def slow_to_leave(folder, seconds):
    """A program that notes its start, and SIGTERM only after a while."""
    return textwrap.dedent(
        f"""
        import pathlib, signal, sys, time
        folder = pathlib.Path({str(folder)!r})
        def leave(*_):
            time.sleep({seconds})
            (folder / "left").write_text("cleanly")
            sys.exit(143)
        signal.signal(signal.SIGTERM, leave)
        (folder / "started").touch()
        time.sleep(60)
        """
    )


def run(stages, folder, skipped=()):
    return list(run_stages(stages, folder / "record.json", Interruption(), skipped))


def test_a_finished_stage_is_not_run_again(tmp_path):
    stages = [stage("a", tmp_path), stage("b", tmp_path)]
    assert [outcome.status for outcome in run(stages, tmp_path)] == ["ran", "ran"]
    outcomes = run(stages, tmp_path)
    assert [outcome.status for outcome in outcomes] == ["done before", "done before"]
    assert outcomes[0].about == "4 bytes"
    assert (tmp_path / "a.txt").read_text() == "done"


def test_what_follows_a_stage_that_ran_runs_again(tmp_path):
    stages = [stage("a", tmp_path), stage("b", tmp_path), stage("c", tmp_path)]
    run(stages, tmp_path)
    (tmp_path / "b.txt").unlink()
    assert [outcome.status for outcome in run(stages, tmp_path)] == ["done before", "ran", "ran"]
    assert (tmp_path / "c.txt").read_text() == "donedone"


def test_another_command_runs_again(tmp_path):
    run([stage("a", tmp_path)], tmp_path)
    assert run([stage("a", tmp_path, "other")], tmp_path)[0].status == "ran"
    assert (tmp_path / "a.txt").read_text() == "doneother"


def test_a_stage_can_be_left_out(tmp_path):
    outcomes = run([stage("a", tmp_path), stage("b", tmp_path)], tmp_path, skipped=["a"])
    assert [outcome.status for outcome in outcomes] == ["left out", "ran"]
    assert not (tmp_path / "a.txt").exists()


def test_a_failure_stops_and_is_tried_again(tmp_path):
    flaky = f"import os, sys; sys.exit(0 if os.path.exists({str(tmp_path / 'mended')!r}) else 3)"
    stages = [
        stage("a", tmp_path),
        Stage("b", lambda: [sys.executable, "-c", flaky], (tmp_path,), hints={3: "Mend it."}),
        stage("c", tmp_path),
    ]
    with pytest.raises(StageFailed, match=r"stage .b. ended with status 3\. Mend it\.") as failure:
        run(stages, tmp_path)
    assert failure.value.status == 3
    assert not (tmp_path / "c.txt").exists()
    (tmp_path / "mended").touch()
    assert [outcome.status for outcome in run(stages, tmp_path)] == ["done before", "ran", "ran"]
    entry = json.loads((tmp_path / "record.json").read_text())["stages"]["b"]
    assert entry["sessions"] == 2
    assert entry["finished"]


def test_a_torn_record_is_an_error_with_its_place(tmp_path):
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(InputError, match=r"record\.json.*Remove it"):
        run([stage("a", tmp_path)], tmp_path)


def test_a_signal_is_passed_on_and_the_stage_is_waited_for(tmp_path):
    child = slow_to_leave(tmp_path, seconds=0.3)
    interruption = Interruption()
    stages = [
        Stage("long", lambda: [sys.executable, "-c", child], (tmp_path / "left",)),
        stage("c", tmp_path),
    ]

    def terminate():
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    with interruption:
        threading.Thread(target=terminate).start()
        with pytest.raises(StageFailed, match="interrupted during 'long'") as failure:
            list(run_stages(stages, tmp_path / "record.json", interruption))
    assert failure.value.status == 143
    assert (tmp_path / "left").read_text() == "cleanly"
    assert json.loads((tmp_path / "record.json").read_text())["stages"]["long"]["finished"] is None


def test_adapt_names_a_misspelt_stage():
    command = [sys.executable, "-m", "inranker_jax.adapt", "--corpus=.", "--teacher=t", "--output_dir=o"]
    result = subprocess.run([*command, "--skip=verfy"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "Did you mean 'verify'?" in result.stderr
    result = subprocess.run([*command, "--lables.chunk_size=3"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "Did you mean 'labels'?" in result.stderr


def test_a_stage_left_out_meanwhile_runs_again_after_its_source_ran(tmp_path):
    run([stage("a", tmp_path), stage("b", tmp_path)], tmp_path)
    assert [o.status for o in run([stage("a", tmp_path, "new"), stage("b", tmp_path)], tmp_path, ["b"])] == [
        "ran",
        "left out",
    ]
    statuses = [o.status for o in run([stage("a", tmp_path, "new"), stage("b", tmp_path)], tmp_path)]
    assert statuses == ["done before", "ran"]


def test_a_changed_input_runs_again(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("one")
    stages = [stage("a", tmp_path, inputs=(str(corpus), "hub/name")), stage("b", tmp_path)]
    assert [outcome.status for outcome in run(stages, tmp_path)] == ["ran", "ran"]
    assert [outcome.status for outcome in run(stages, tmp_path)] == ["done before", "done before"]
    (corpus / "b.txt").write_text("two")
    assert [outcome.status for outcome in run(stages, tmp_path)] == ["ran", "ran"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent was killed")
def test_a_stage_ends_with_a_killed_parent_and_holds_the_lock_until_then(tmp_path):
    child = slow_to_leave(tmp_path, seconds=5.0)
    parent = textwrap.dedent(
        f"""
        import pathlib, sys
        from inranker_jax.interruption import Interruption
        from inranker_jax.stages import Stage, run_stages
        stage = Stage("long", lambda: [sys.executable, "-c", {child!r}], ())
        list(run_stages([stage], pathlib.Path({str(tmp_path / "record.json")!r}), Interruption()))
        """
    )
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        process.kill()
    assert not (tmp_path / "left").exists()
    assert run([stage("a", tmp_path)], tmp_path)[0].status == "ran"
    assert (tmp_path / "left").read_text() == "cleanly"


def test_two_at_once_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stages_module, "_PATIENCE_SECONDS", 0.3)
    outcomes = run_stages(
        [stage("a", tmp_path), stage("b", tmp_path)], tmp_path / "record.json", Interruption()
    )
    next(outcomes)
    with pytest.raises(InputError, match="is at work there"):
        run([stage("a", tmp_path)], tmp_path)
    assert next(outcomes).usd == 0.5
