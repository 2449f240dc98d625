"""`python -m inranker_jax.export`: the formats, their flags and the step of a T5X checkpoint."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from inranker_jax import export
from inranker_jax.checkpoints import huggingface, load_model, native
from inranker_jax.models import trees
from inranker_jax.prompts import Tokenizer, preset
from tests.checkpoints import t5x_files
from tests.tiny_vocabulary import write_spiece

CONFIG = t5x_files.VARIANTS["v1.0"]
PARAMS = t5x_files.random_params(CONFIG)


@pytest.fixture
def hugging_face(tmp_path):
    huggingface.save(tmp_path / "hf", CONFIG, PARAMS, None, None)
    return tmp_path / "hf"


def assert_same_params(found, expected):
    found, expected = trees.flatten(found), trees.flatten(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_t5x_and_back(hugging_face, tmp_path, capsys):
    export.main([f"--checkpoint={hugging_face}", f"--output_dir={tmp_path / 't5x'}", "--format=t5x"])
    assert f"Wrote {tmp_path / 't5x' / 'checkpoint_0'}: " in capsys.readouterr().out
    export.main([f"--checkpoint={tmp_path / 't5x'}", f"--output_dir={tmp_path / 'back'}"])
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        hugging_face / "model.safetensors"
    ).read_bytes()


def test_the_step_is_kept_and_can_be_given(hugging_face, tmp_path):
    flags = ["--format=t5x", "--scan_layers", "--dtype=bfloat16"]
    export.main([f"--checkpoint={hugging_face}", f"--output_dir={tmp_path / 'a'}", "--step=70", *flags])
    export.main([f"--checkpoint={tmp_path / 'a'}", f"--output_dir={tmp_path / 'b'}", *flags])
    model = load_model(tmp_path / "b", on_host=True)
    assert model.step == 70
    flat = trees.flatten(PARAMS)
    rounded = trees.unflatten({p: np.asarray(v.astype("bfloat16"), np.float32) for p, v in flat.items()})
    assert_same_params(model.params, rounded)


def test_a_training_run_gives_its_step_tokenizer_and_contract(tmp_path):
    write_spiece(tmp_path / "vocabulary")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "vocabulary")
    run = native.Checkpointer(
        str(tmp_path / "run"), native.ModelDescription(CONFIG, preset("inranker")), tokenizer, keep_latest=2
    )
    for step in (8, 9):
        run.save(step, {"params": jax.tree.map(lambda x, step=step: x * step, PARAMS)}, {"step": step})
    run.close()
    assert load_model(tmp_path / "run").step is None
    for path, step in ((tmp_path / "run", 9), (tmp_path / "run" / "checkpoints" / "8", 8)):
        out = tmp_path / f"t5x{step}"
        export.main([f"--checkpoint={path}", f"--output_dir={out}", "--format=t5x"])
        model = load_model(out, on_host=True)
        assert (model.step, model.contract) == (step, preset("inranker"))
        assert model.tokenizer is not None
        assert model.tokenizer.fingerprint == tokenizer.fingerprint
        assert_same_params(model.params, jax.tree.map(lambda x, step=step: x * step, PARAMS))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--step=3"], "--step and --scan_layers are of --format=t5x"),
        (["--scan_layers"], "--step and --scan_layers are of --format=t5x"),
        (["--format=t5x", "--max_shard_gb=2"], "--max_shard_gb is of --format=huggingface"),
        (["--format=t5x", "--step=-3"], "step is -3. Expected 0 or more."),
    ],
)
def test_flags_of_the_other_format_are_refused(flags, expected, hugging_face, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        export.main([f"--checkpoint={hugging_face}", f"--output_dir={tmp_path / 'out'}", *flags])
    assert stop.value.code == 2
    assert f"error: {expected}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
