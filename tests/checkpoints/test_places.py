"""Folders that are no checkpoint, and models that are looked for before they are needed."""

from __future__ import annotations

import json
import pathlib

import pytest

from inranker_jax.checkpoints import check_model, huggingface, load_model, places, t5x_save
from inranker_jax.errors import InputError
from inranker_jax.models import T5Config, init_params

CONFIG = T5Config(
    vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_heads=2, num_layers=1, num_decoder_layers=1
)  # fmt: skip
KINDS = r"a Hugging Face model folder .*output folder of a training run .*one of its checkpoints.*T5X\. "


def model(folder: pathlib.Path) -> pathlib.Path:
    huggingface.save(folder, CONFIG, init_params(CONFIG, 0), None, None)
    return folder


def run(folder: pathlib.Path, *steps: str) -> pathlib.Path:
    for name in ("checkpoints", *(f"checkpoints/{step}" for step in steps)):
        (folder / name).mkdir(parents=True)
    return folder


@pytest.mark.parametrize("find", [load_model, check_model])
def test_a_folder_of_runs_names_them(find, tmp_path: pathlib.Path) -> None:
    outputs = tmp_path / "outputs"
    for name in ("logs", ".hidden"):
        (outputs / name).mkdir(parents=True)
    with pytest.raises(InputError, match=f"^{outputs}: this folder is no checkpoint.*{KINDS}Check the path"):
        find(outputs)
    run(outputs / "b", "10")
    with pytest.raises(InputError, match=rf"{KINDS}Did you mean '{outputs}/b'\?$"):
        find(outputs)
    model(outputs / "a")
    t5x_save.save(outputs / "c", CONFIG, init_params(CONFIG, 0), 10)
    with pytest.raises(InputError, match=rf"in it: {outputs}/a, {outputs}/b, {outputs}/c\."):
        find(outputs)
    for name in "def":
        run(outputs / name, "1")
    with pytest.raises(InputError, match=rf"{outputs}/e, \.\.\.$"):
        find(outputs)


def test_a_model_folder_without_its_configuration_says_so(tmp_path: pathlib.Path) -> None:
    (model(tmp_path / "model") / "config.json").unlink()
    with pytest.raises(InputError, match=r"model/config\.json: no such file"):
        check_model(tmp_path / "model")


def test_what_can_be_loaded_passes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "read_params", lambda *_: pytest.fail("weights were read"))
    check_model(model(tmp_path / "model"))
    t5x_save.save(tmp_path / "t5x", CONFIG, init_params(CONFIG, 0), 10)
    check_model(tmp_path / "t5x")
    check_model(run(tmp_path / "run", "10"))
    check_model(tmp_path / "run" / "checkpoints" / "10")
    assert all(places.is_checkpoint(tmp_path / name) for name in ("model", "t5x", "run"))


def test_what_cannot_be_loaded_is_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="no complete checkpoint yet"):
        check_model(run(tmp_path / "run"))
    with pytest.raises(InputError, match="is not in the local Hugging Face cache"):
        check_model("ex/nope")
    (model(tmp_path / "model") / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        check_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="model_type is 'bert'"):
        check_model(tmp_path / "model")
    with pytest.raises(InputError, match=r"no such folder.*Did you mean 'model'\?"):
        check_model(tmp_path / "modle")
