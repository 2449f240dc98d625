"""`python -m inranker_jax.train`: runs, resumes to the same bytes, stops on bad losses, starts from checkpoints."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from inranker_jax import locks, train, trainer
from inranker_jax.checkpoints import load_model, native
from inranker_jax.models import initialisers
from tests import tiny_run
from tests.tiny_run import assert_same_bytes, command, environment, final_state, flags, write_task


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return tiny_run.write_setting(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def uninterrupted(setting):
    """The reference: one subprocess from start to end."""
    output = setting.parent / "uninterrupted"
    done = subprocess.run(
        command(setting, output), env=environment(setting.parent), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return output, done


def test_a_run_reports_and_leaves_what_explains_it(uninterrupted):
    output, done = uninterrupted
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert lines[-2].startswith("step 12/12  loss ")
    for part in ("lr ", "examples/s", "data ", "device ", "left"):
        assert part in lines[5]
    assert "validation loss" in lines[-1]
    assert re.search(r"^took \d+(s|m\d\ds), \d+\.\d GiB of memory at the peak$", done.stderr, re.MULTILINE)
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines if "validation" not in line]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["identity"]["seed"] == 42
    assert set(manifest["identity"]["data"]["fingerprints"]) == {"tiny_task:train", "tiny_task:validation"}
    assert manifest["sessions"][0]["versions"]["jax"] == jax.__version__
    assert "TRAIN_STEPS = 12" in (output / "config.gin").read_text()
    assert native.load_parts(str(output))[0].contract.name == "monot5"


@pytest.mark.parametrize("name", ["validation_period", "checkpoint_period", "log_every"])
def test_periods_are_checked_at_once(setting, tmp_path, capsys, name):
    assert train.main(flags(setting, tmp_path / "run", f"--gin.train.{name}=0")) == 2
    assert f"train.{name} = 0: expected a number of steps, 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_is_a_file_is_told_at_once(setting, tmp_path, capsys):
    (tmp_path / "run").write_text("x")
    assert train.main(flags(setting, tmp_path / "run")) == 2
    assert "this cannot be an output folder (File exists)" in capsys.readouterr().err


def test_a_second_training_in_a_folder_is_refused(setting, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.locks, "held", functools.partial(locks.held, patience=0.3))
    with locks.held(tmp_path / "run" / ".lock"):
        assert train.main(flags(setting, tmp_path / "run")) == 2
    assert f"another training is at work there (process {os.getpid()} on " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_tensorboard_holds_the_scalars(uninterrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(uninterrupted[0] / "tensorboard"))
    events.Reload()
    expected = {
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/useful_token_share",
        "speed/examples_per_second",
        "speed/useful_tokens_per_second",
        "validation/loss",
    }
    assert expected <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("validation/loss")] == [4, 8, 12]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))


def test_latest_and_best_are_kept(uninterrupted):
    output, _ = uninterrupted
    kept = {int(path.name) for path in (output / "checkpoints").iterdir()}
    assert 12 in kept
    assert len(kept) <= 2
    source = native.load_parts(str(output))[3]
    assert int(pathlib.Path(source).name) in {4, 8, 12}


def kill_when(process, step, delay):
    """Kills after that step, or the first later one: the kill before may have come late."""
    for line in process.stdout:
        found = re.match(r"step (\d+)/", line)
        if found and int(found[1]) >= step:
            time.sleep(delay)
            process.kill()
            return


@pytest.mark.slow
def test_killed_at_several_points_it_ends_with_the_same_bytes(setting, uninterrupted):
    output = setting.parent / "killed"
    # Asynchronous saves start after steps 2, 4, ...; delays may put kills into them, the next test surely does.
    for step, delay in ((1, 0.0), (4, 0.02), (6, 0.05), (8, 0.0)):
        process = subprocess.Popen(
            command(setting, output),
            env=environment(setting.parent),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        kill_when(process, step, delay)
        assert process.wait() == -signal.SIGKILL
    done = subprocess.run(
        command(setting, output), env=environment(setting.parent), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert_same_bytes(final_state(output), final_state(uninterrupted[0]))


# Python imports it in every process: a local checkpoint is whole with the renaming of its folder.
KILLS_ITSELF = """
import os, pathlib, signal, threading

moment = os.environ.get("TEST_KILL_AT_COMMIT")
rename = os.rename

def rename_or_die(source, target, **more):
    folder = pathlib.Path(target)
    dies = (folder.parent.name, folder.name) == ("checkpoints", "6")
    dies = dies and threading.current_thread() is not threading.main_thread()
    if dies and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target, **more)
    if dies and moment == "after":
        os.kill(os.getpid(), signal.SIGKILL)

if moment:
    os.rename = rename_or_die
"""


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "left"), [("before", 4), ("after", 6)])
def test_killed_as_an_asynchronous_save_is_committed_it_ends_with_the_same_bytes(
    setting, uninterrupted, tmp_path, moment, left
):
    (tmp_path / "sitecustomize.py").write_text(KILLS_ITSELF)
    output = tmp_path / "run"
    run = functools.partial(
        subprocess.run, command(setting, output), capture_output=True, text=True, check=False
    )
    ours = environment(setting.parent)
    places = [str(tmp_path), str(pathlib.Path(__file__).parents[1]), ours.get("PYTHONPATH", "")]
    hook = {"PYTHONPATH": os.pathsep.join(places), "TEST_KILL_AT_COMMIT": moment}
    killed = run(env=ours | hook)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = {path.name.partition(".")[0]: path for path in (output / "checkpoints").iterdir()}
    assert ("tmp" in there["6"].name) == (moment == "before"), "all is written; the name alone is missing"
    assert (there["6"] / "state").is_dir()
    done = run(env=ours)
    assert done.returncode == 0, done.stderr
    assert f"resuming {output} at step {left}" in done.stderr
    assert_same_bytes(final_state(output), final_state(uninterrupted[0]))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(setting, uninterrupted, number, status):
    output = setting.parent / f"signal_{number}"
    process = subprocess.Popen(
        command(setting, output),
        env=environment(setting.parent),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    assert "run the same command to resume" in errors
    subprocess.run(command(setting, output), env=environment(setting.parent), capture_output=True, check=True)
    assert_same_bytes(final_state(output), final_state(uninterrupted[0]))


def test_a_second_notice_does_not_end_the_save_of_the_first(setting, monkeypatch, tmp_path):
    """While the last save is waited for, SIGTERM must not be back to what it does by default."""
    missed, save, close = [], native.Checkpointer.save, native.Checkpointer.close

    def noticed_save(*arguments):
        signal.raise_signal(signal.SIGTERM)
        save(*arguments)

    def noticed_close(checkpoints):
        signal.raise_signal(signal.SIGTERM)
        close(checkpoints)

    monkeypatch.setattr(native.Checkpointer, "save", noticed_save)
    monkeypatch.setattr(native.Checkpointer, "close", noticed_close)
    before = signal.signal(signal.SIGTERM, lambda *_: missed.append("it would have killed"))
    try:
        with pytest.raises(SystemExit) as ended:
            train.main(flags(setting, tmp_path / "run"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert not missed
    assert native.load_parts(str(tmp_path / "run"))[3].endswith("/2")


def kept_losses(output):
    """The stored steps, each with the validation loss that it was saved with."""
    files = {path: path / "metrics" / "metrics" for path in (output / "checkpoints").iterdir()}
    return {int(path.name): json.loads(file.read_text()) for path, file in files.items()}


def test_a_validation_that_a_signal_broke_off_is_made_up_for(
    setting, uninterrupted, monkeypatch, tmp_path, capsys
):
    """At steps 4, 8 and 12, the last: the best step and the end are those of a run that was left alone."""
    output, begun, validate = tmp_path / "run", [], train.validate

    def broken_off(*arguments):
        begun.append(None)
        if len(begun) in (1, 3, 5):  # each validation's first attempt
            signal.raise_signal(signal.SIGTERM)
        return validate(*arguments)

    monkeypatch.setattr(train, "validate", broken_off)
    for _ in range(3):
        with pytest.raises(SystemExit) as ended:
            train.main(flags(setting, output))
        assert ended.value.code == 143
    assert train.main(flags(setting, output)) == 0
    assert len(begun) == 6
    assert re.findall(r"step (\d+)/12  validation loss", capsys.readouterr().out) == ["4", "8", "12"]
    assert_same_bytes(final_state(output), final_state(uninterrupted[0]))
    assert kept_losses(output) == kept_losses(uninterrupted[0])
    assert (
        native.load_parts(str(output))[3].split("/")[-1]
        == native.load_parts(str(uninterrupted[0]))[3].split("/")[-1]
    )


def test_a_torn_step_is_never_restored(setting, uninterrupted, tmp_path, capsys):
    """What a kill during a save leaves: the folder under its unfinished name, with a part of its files."""
    output = shutil.copytree(uninterrupted[0], tmp_path / "copy")
    torn = (output / "checkpoints" / "12").rename(output / "checkpoints" / "12.orbax-checkpoint-tmp")
    shutil.rmtree(torn / "position")
    before = max((int(path.name) for path in (output / "checkpoints").iterdir() if path != torn), default=0)
    assert train.main(flags(setting, output)) == 0
    said = capsys.readouterr()
    assert re.findall(r"resuming .* at step (\d+)", said.err) == ([str(before)] if before else [])
    steps = [int(number) for number in re.findall(r"^step (\d+)/12  loss", said.out, re.MULTILINE)]
    assert steps == list(range(before + 1, 13))
    assert_same_bytes(final_state(output), final_state(uninterrupted[0]))
    assert not torn.exists()


def test_a_finished_run_is_left_as_it_is(setting, uninterrupted, tmp_path, capsys):
    output = shutil.copytree(uninterrupted[0], tmp_path / "copy")
    before = final_state(output)
    assert train.main(flags(setting, output)) == 0
    assert "resuming" in capsys.readouterr().err
    assert_same_bytes(final_state(output), before)


def test_other_settings_do_not_continue_a_run(setting, uninterrupted, capsys):
    assert train.main(flags(setting, uninterrupted[0], "--gin.BATCH_SIZE=8", "--gin.LEARNING_RATE=1e-4")) == 2
    message = capsys.readouterr().err
    assert "- batch_size: 4" in message
    assert "+ batch_size: 8" in message
    assert "- gin.LEARNING_RATE: 0.003" in message
    assert "+ gin.LEARNING_RATE: 0.0001" in message
    assert "--output_dir" in message
    assert train.main(flags(setting, uninterrupted[0], "--gin.train.loss=@losses.kl_divergence")) == 2
    assert "+ gin.inranker_jax.train.loss: @losses.kl_divergence" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["bucketed", "packed"])
def test_a_run_continues_on_another_mesh(setting, tmp_path, layout):
    mesh = ["--gin.train.mesh=@partitioning.make_mesh()", "--gin.partitioning.make_mesh.data=2"]
    mesh += ["--gin.partitioning.make_mesh.fsdp=2", "--gin.partitioning.make_mesh.model=2"]
    mesh += ['--gin.REMAT="full"', "--gin.models.Compute.scan=True"]  # as fewer devices may need
    same = [f'--gin.LAYOUT="{layout}"', "--gin.DROPOUT_RATE=0.1"]
    output = tmp_path / "run"
    assert train.main(flags(setting, output, *same, "--gin.TRAIN_STEPS=4")) == 0
    one = shutil.copytree(output, tmp_path / "one")
    longer = ["--gin.TRAIN_STEPS=6"]
    assert train.main(flags(setting, output, *same, *longer, *mesh)) == 0
    assert train.main(flags(setting, one, *same, *longer)) == 0
    sessions = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["sessions"]
    assert sessions[-1]["mesh"] == {"data": 2, "fsdp": 2, "model": 2}
    ours, theirs = final_state(output, 6), final_state(one, 6)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("layout", ["padded", "bucketed"])
def test_other_layouts_read_the_same_examples_and_give_the_same_losses(setting, tmp_path, capsys, layout):
    more = ["--gin.TRAIN_STEPS=2", "--gin.DROPOUT_RATE=0.1", "--gin.train.validation_split=None"]
    lines = {}
    for kind in ("packed", layout):
        assert train.main(flags(setting, tmp_path / kind, *more, f'--gin.LAYOUT="{kind}"')) == 0
        lines[kind] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    found = {
        kind: [float(line.split("loss ")[1].split()[0]) for line in rows] for kind, rows in lines.items()
    }
    assert found["packed"] == pytest.approx(found[layout], abs=2e-4)  # four digits are shown
    share = {kind: int(re.search(r"(\d+)% useful", rows[-1])[1]) for kind, rows in lines.items()}
    assert share["packed"] > share[layout]
    assert share["packed"] >= 60


def test_a_non_finite_loss_stops_the_run_and_names_the_batch(setting, tmp_path, capsys):
    module = write_task(tmp_path, "bad_task", bad_logit=1e30)
    more = ['--gin.MIXTURE_OR_TASK_NAME="bad_task"', f'--gin.MIXTURE_OR_TASK_MODULE="{module}"']
    output = tmp_path / "out"
    assert train.main(flags(setting, output, *more)) == 1
    message = capsys.readouterr().err
    assert "loss inf" in message or "loss nan" in message
    (report,) = output.glob("nonfinite_step_*.json")
    stored = json.loads(report.read_text())
    bad = next(
        (
            i
            for i, line in enumerate((tmp_path / "bad_task.jsonl").open())
            if json.loads(line)["true_logit"] == 1e30
        )
    )
    assert bad == 37
    assert len(stored["examples"]) == 4
    for path in (output / "checkpoints").iterdir():
        assert int(path.name) < stored["step"]


def test_a_student_starts_from_hugging_face_or_native_parameters(setting, uninterrupted, tmp_path, capsys):
    from inranker_jax.checkpoints import huggingface

    source = load_model(str(uninterrupted[0]))
    huggingface.save(str(tmp_path / "hf"), source.config, source.params, source.tokenizer, source.contract)
    frozen = ["--gin.TRAIN_STEPS=1", "--gin.LEARNING_RATE=1e-30", "--gin.WARMUP_STEPS=0"]
    for name, start in (("from_hf", tmp_path / "hf"), ("from_native", uninterrupted[0])):
        assert train.main(flags(setting, tmp_path / name, *frozen, f"--init_checkpoint={start}")) == 0
        reached = load_model(str(tmp_path / name))
        assert reached.contract == source.contract
        for ours, theirs in zip(jax.tree.leaves(reached.params), jax.tree.leaves(source.params), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_mistakes_are_one_line_each(setting, tmp_path, capsys):
    for more, expected in (
        (["--gin.BATCH_SIZE=0"], "batch size 0"),
        (['--gin.MIXTURE_OR_TASK_NAME="tiny_tusk"'], "Did you mean 'tiny_task'"),
        (["--gin.VOCABULARY=None"], "no vocabulary"),
        (['--gin.LAYOUT="pakced"'], "Did you mean 'packed'"),
        (["--gin.packing.Layout.row_length=8"], "row_length is 8"),
        (["--gin.train.accumulation=5"], "batch size 4 does not split into 5"),
        (["--gin.models.T5Config.vocab_size=100"], "vocabulary has"),
        (["--init_checkpoint=/nowhere"], "/nowhere"),
        (["--output_dir=sg://bucket/run"], "sg://"),
    ):
        assert train.main(flags(setting, tmp_path / "out", *more)) == 2
        message = capsys.readouterr().err
        assert expected in message
        assert "Traceback" not in message
    assert train.main([]) == 2
    assert "--gin_file=gin/small_synth.gin" in capsys.readouterr().err


def test_a_non_finite_validation_loss_stops_the_run_and_spares_the_best_checkpoint(
    setting, uninterrupted, tmp_path, capsys, monkeypatch
):
    def poisoned(spec, params, batch):
        metrics = trainer.validation_step(spec, params, batch)
        return {**metrics, "loss": metrics["loss"] * jax.numpy.nan}

    monkeypatch.setattr(trainer, "compile_steps", functools.partial(compile_with, poisoned))
    assert train.main(flags(setting, tmp_path)) == 1
    assert "validation loss nan in the batch of step 0" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def compile_with(validation, spec, abstract, mesh):
    """`trainer.compile_steps` with another validation step."""
    step, _ = COMPILE(spec, abstract, mesh)
    return step, lambda params, batch: validation(spec, params, batch)


COMPILE = trainer.compile_steps


def test_a_student_starts_from_the_bound_initialiser(setting, tmp_path):
    frozen = ["--gin.TRAIN_STEPS=1", "--gin.LEARNING_RATE=1e-30", "--gin.WARMUP_STEPS=0", "--gin.SEED=5"]
    bound = ["--gin.train.initialiser=@initialisers.mimetic"]
    assert train.main(flags(setting, tmp_path, *frozen, *bound)) == 0
    reached = load_model(str(tmp_path))
    expected = initialisers.mimetic(reached.config, 5)
    for ours, theirs in zip(jax.tree.leaves(reached.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.slow
def test_small_synth_distils_a_pretrained_student_with_its_own_vocabulary(
    setting, uninterrupted, tmp_path, capsys
):
    from inranker_jax.checkpoints import huggingface

    source = load_model(str(uninterrupted[0]))
    huggingface.save(str(tmp_path / "hf"), source.config, source.params, source.tokenizer, source.contract)
    quick = [
        "--gin.TRAIN_STEPS=2",
        "--gin.WARMUP_STEPS=1",
        "--gin.BATCH_SIZE=8",
        "--gin.train.validation_batches=1",
    ]
    quick += ["--gin.evaluation.report_student.depth=2", f"--init_checkpoint={tmp_path / 'hf'}"]
    assert train.main(["--gin_file=gin/small_synth.gin", f"--output_dir={tmp_path / 'run'}", *quick]) == 0
    reached = load_model(str(tmp_path / "run"))
    assert reached.config.d_model == source.config.d_model
    assert reached.tokenizer.fingerprint == source.tokenizer.fingerprint
    table = capsys.readouterr().out
    assert re.search(r"^untrained student +0\.\d{4}", table, re.MULTILINE)


def test_rates_of_a_mixture_are_set_in_gin(setting, tmp_path, capfd):
    names = ("rates_a", "rates_b")
    modules = [str(write_task(tmp_path, name)) for name in names]
    mixture = tmp_path / "rates_mixture.py"
    mixture.write_text(
        f"import seqio\nseqio.MixtureRegistry.add('rates_ab', {[(n, 1.0) for n in names]!r})\n"
    )
    shared = [
        '--gin.MIXTURE_OR_TASK_NAME="rates_ab"',
        f"--gin.MIXTURE_OR_TASK_MODULE={[*modules, str(mixture)]!r}",
        "--gin.TRAIN_STEPS=2",
    ]
    given = {"rates_a": 3.0, "rates_b": 1.0}
    assert (
        train.main(flags(setting, tmp_path / "given", *shared, f"--gin.train.mixture_rates={given!r}")) == 0
    )
    rates = json.loads((tmp_path / "given" / "manifest.json").read_text())["identity"]["rates"]
    assert rates == [3.0, 1.0]
    by_size = "--gin.train.mixture_rates=@rates.temperature()"
    root = "--gin.rates.temperature.temperature=2.0"
    assert train.main(flags(setting, tmp_path / "by_size", *shared, by_size, root)) == 0
    rates = json.loads((tmp_path / "by_size" / "manifest.json").read_text())["identity"]["rates"]
    # 30 queries in each, about a fifth of them held out; the square root of their number.
    assert 15 <= round(rates[0] ** 2, 6) <= 29
    assert round(rates[0] ** 2, 6) == round(rates[0] ** 2)
    misspelt = "--gin.train.mixture_rates={'rates_a': 1.0, 'rates_c': 1.0}"
    assert train.main(flags(setting, tmp_path / "misspelt", *shared, misspelt)) == 2
    assert "'rates_c'" in capfd.readouterr().err
