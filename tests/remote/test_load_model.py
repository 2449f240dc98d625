"""Models of other kinds in a bucket: Hugging Face folders and T5X checkpoints."""

from __future__ import annotations

import pathlib

import pytest

from inranker_jax import paths
from inranker_jax.checkpoints import huggingface, load_model, t5x_save
from inranker_jax.errors import InputError
from inranker_jax.prompts import Tokenizer, preset
from tests.remote.object_store import ObjectStore
from tests.remote.test_checkpoints import CONFIG, same, state, tokenizer

__all__ = ["tokenizer"]


def test_a_model_of_hugging_face(store: ObjectStore, tokenizer: Tokenizer) -> None:
    huggingface.save("gs://bkt/models/one", CONFIG, state(1)["params"], tokenizer, preset("monot5"))
    loaded = load_model("gs://bkt/models/one")
    assert loaded.source == "gs://bkt/models/one"
    same(loaded.params, state(1)["params"])
    with pytest.raises(InputError, match="gs://bkt/none: no such file or folder"):
        load_model("gs://bkt/none")


def test_a_checkpoint_of_t5x(store: ObjectStore, tokenizer: Tokenizer, tmp_path: pathlib.Path) -> None:
    t5x_save.save(tmp_path / "t5x", CONFIG, state(1)["params"], 1000, tokenizer, preset("monot5"))
    paths.upload(tmp_path / "t5x", "gs://bkt/t5x")
    same(load_model("gs://bkt/t5x", on_host=True).params, state(1)["params"])


def test_a_folder_of_t5x_may_be_called_like_one_of_ours(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    t5x_save.save(tmp_path / "checkpoints", CONFIG, state(1)["params"], 1000)
    same(load_model(tmp_path / "checkpoints", on_host=True).params, state(1)["params"])
    paths.upload(tmp_path / "checkpoints", "gs://bkt/checkpoints")
    same(load_model("gs://bkt/checkpoints", on_host=True).params, state(1)["params"])
