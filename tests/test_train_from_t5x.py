"""Training from a T5X checkpoint: T5X's way of counting steps, and its macros."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from inranker_jax import students, train
from inranker_jax.checkpoints import huggingface, load_model, t5x_save
from inranker_jax.models import T5Config, init_params
from inranker_jax.prompts import preset
from tests import tiny_run

CONFIG = T5Config(
    vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_heads=2, num_layers=1, num_decoder_layers=1
)
SAME = ["--gin.train.learning_rate=@optimizers.constant()", "--gin.optimizers.constant.value=1e-3"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("setting")
    params = jax.jit(lambda: init_params(CONFIG, 3))()
    t5x_save.save(folder / "t5x", CONFIG, params, 1000)
    huggingface.save(folder / "hf", CONFIG, params, None, None)
    return folder, tiny_run.write_setting(folder, "tiny_t5x_task")


def run(setting, output, *more):
    return train.main(tiny_run.flags(setting[1], output, *more))


@pytest.mark.slow
def test_steps_count_from_the_checkpoint_and_data_from_its_beginning(setting, tmp_path, capsys):
    folder = setting[0]
    start = f"--init_checkpoint={folder / 't5x'}"
    assert (
        run(setting, tmp_path / "t5x", start, "--gin.TRAIN_STEPS=1002", "--gin.DROPOUT_RATE=0.0", *SAME) == 0
    )
    assert (
        run(setting, tmp_path / "t5x", start, "--gin.TRAIN_STEPS=1004", "--gin.DROPOUT_RATE=0.0", *SAME) == 0
    )
    told = capsys.readouterr().err
    assert "resuming" in told
    assert "step 1004: done" in told
    other = ["--gin.TRAIN_STEPS=4", "--gin.DROPOUT_RATE=0.0", *SAME]
    assert run(setting, tmp_path / "hf", f"--init_checkpoint={folder / 'hf'}", *other) == 0
    assert run(setting, tmp_path / "from0", start, "--gin.train.first_step=0", *other) == 0
    final = tiny_run.final_state(tmp_path / "t5x", 1004)
    for name, step in (("hf", 4), ("from0", 4)):
        theirs = tiny_run.final_state(tmp_path / name, step)
        for key, value in theirs.items():
            if "params" in key or "mu" in key or "nu" in key:
                assert final[key].tobytes() == value.tobytes(), key
    counts = {key: int(value) for key, value in final.items() if value.ndim == 0}
    assert sorted(counts.values()) == [4, 1004, 1004], counts  # Adam's bias correction, schedule, step


@pytest.mark.slow
def test_the_schedule_counts_from_the_checkpoint(setting, tmp_path):
    """Warm-up is over at step 1000, and the decay to step 1004 ends in nothing."""
    assert (
        run(setting, tmp_path / "a", f"--init_checkpoint={setting[0] / 't5x'}", "--gin.TRAIN_STEPS=1004") == 0
    )
    start = load_model(setting[0] / "hf", on_host=True).params
    end = load_model(tmp_path / "a" / "checkpoints" / "1004", on_host=True).params
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start, end)
    # The rates of 4 steps near the end of a decay from 3e-3 over 1002 steps.
    assert 0 < max(jax.tree.leaves(moved)) < 3e-3 * (4 + 3 + 2 + 1) / 1002 * 1.01


def test_too_few_steps_and_lengths_are_explained(setting, tmp_path, capsys):
    start = f"--init_checkpoint={setting[0] / 't5x'}"
    assert run(setting, tmp_path / "a", start) == 2
    told = capsys.readouterr().err
    assert "TRAIN_STEPS is 12, and" in told
    assert "12 more are TRAIN_STEPS = 1012" in told
    assert run(setting, tmp_path / "a", start, "--gin.TASK_FEATURE_LENGTHS={'input': 9}") == 2
    assert "TASK_FEATURE_LENGTHS is {'input': 9}. Expected {'inputs': TOKENS}" in capsys.readouterr().err


def test_feature_lengths_are_the_contracts():
    contract = preset("monot5")
    assert students.with_lengths(contract, None) == contract
    assert students.with_lengths(contract, {"inputs": 40, "targets": 2}) == contract.replace(max_length=40)
