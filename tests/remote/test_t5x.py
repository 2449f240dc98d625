"""T5X checkpoints in a bucket, read through TensorStore without a copy."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from inranker_jax import paths
from inranker_jax.checkpoints import load_model, t5x_save
from inranker_jax.errors import InputError
from inranker_jax.models import trees
from inranker_jax.prompts import Tokenizer, preset
from tests.checkpoints import t5x_files
from tests.remote.object_store import ObjectStore, StatusError
from tests.tiny_vocabulary import write_spiece

CONFIG = t5x_files.VARIANTS["v1.1"]
PARAMS = t5x_files.random_params(CONFIG)


def upload(store: ObjectStore, folder: pathlib.Path, name: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            store.put("bkt", f"{name}/{path.relative_to(folder)}", path.read_bytes(), {})


def test_a_bucket_is_read_without_the_optimizer(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    t5x_files.write(tmp_path / "m", t5x_files.unscanned(PARAMS), step=10, optimizer=True)
    t5x_files.write(tmp_path / "m", t5x_files.scanned(CONFIG, PARAMS), step=20, optimizer=True, driver="gcs")
    upload(store, tmp_path / "m", "models/t5")
    store.put("bkt", "models/t5/checkpoint_30/target.x/.zarray", b"{}", {})  # being copied
    paths = {"": 20, "/checkpoint_10": 10, "/checkpoint_10/": 10, "/checkpoint_20/checkpoint": 20}
    for path, step in paths.items():
        model = load_model(f"gs://bkt/models/t5{path}", on_host=True)
        assert (model.config, model.step) == (CONFIG, step)
        for name, value in trees.flatten(PARAMS).items():
            np.testing.assert_array_equal(trees.flatten(model.params)[name], value, err_msg=name)
    assert not [path for _, path in store.requests if "alt=media" in path and "param_states" in path]


def test_tokenizer_and_contract_come_with_it(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    write_spiece(tmp_path / "vocabulary", size=300)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "vocabulary")
    t5x_save.save(tmp_path / "m", CONFIG, PARAMS, 4, tokenizer, preset("inranker"))
    upload(store, tmp_path / "m", "mine")
    model = load_model("gs://bkt/mine", on_host=True)
    assert model.contract == preset("inranker")
    assert model.tokenizer is not None
    assert model.tokenizer.fingerprint == tokenizer.fingerprint


def test_an_export_goes_to_a_bucket_index_last(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    write_spiece(tmp_path / "vocabulary", size=300)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "vocabulary")
    for step in (4, 8, 4):  # again, in place of the first
        written = t5x_save.save("gs://bkt/out/", CONFIG, PARAMS, step, tokenizer, preset("inranker"))
        assert str(written) == f"gs://bkt/out/checkpoint_{step}"
    t5x_save.save(tmp_path / "here", CONFIG, PARAMS, 4, tokenizer, preset("inranker"))
    t5x_save.save(tmp_path / "here", CONFIG, PARAMS, 8, tokenizer, preset("inranker"))
    assert store.names("bkt") == [f"out/{name}" for name in paths.names_below(tmp_path / "here")]
    model = load_model("gs://bkt/out/checkpoint_4", on_host=True)
    assert (model.config, model.step, model.contract) == (CONFIG, 4, preset("inranker"))
    for name, value in trees.flatten(PARAMS).items():
        np.testing.assert_array_equal(trees.flatten(model.params)[name], value, err_msg=name)
    arrays = [name for name in store.names("bkt") if name.startswith("out/checkpoint_8/target.")]

    def fault(method: str, name: str) -> None:
        if name == "out/checkpoint_9/checkpoint":
            raise StatusError(403)

    store.fault = fault
    with pytest.raises(OSError, match="Forbidden"):
        t5x_save.save("gs://bkt/out", CONFIG, PARAMS, 9, tokenizer, preset("inranker"))
    assert len(store.names("bkt", "out/checkpoint_9/target.")) == len(arrays)
    assert load_model("gs://bkt/out", on_host=True).step == 8


def test_an_export_is_refused_beside_what_it_does_not_fit(store: ObjectStore) -> None:
    t5x_save.save("gs://bkt/out", CONFIG, PARAMS, 4)
    with pytest.raises(InputError, match=r"its steps are of dtype float32"):
        t5x_save.save("gs://bkt/out", CONFIG, PARAMS, 5, dtype="bfloat16")
    other = t5x_files.VARIANTS["v1.0"]
    with pytest.raises(InputError, match=r"it describes another model"):
        t5x_save.save("gs://bkt/out", other, t5x_files.random_params(other), 5)
    store.put("bkt", "out/checkpoint_6/thesis", b"years of work", {})
    with pytest.raises(InputError, match=r"gs://bkt/out/checkpoint_6: it is no checkpoint of T5X"):
        t5x_save.save("gs://bkt/out", CONFIG, PARAMS, 6)
    assert "out/checkpoint_6/thesis" in store.names("bkt")
    with pytest.raises(InputError, match=r"there is no bucket 'missing'"):
        t5x_save.save("gs://missing/out", CONFIG, PARAMS, 6)


def test_what_is_not_there_is_one_error(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    t5x_files.write(tmp_path / "m", t5x_files.unscanned(PARAMS), step=10)
    upload(store, tmp_path / "m", "torn")
    store.delete("bkt", "torn/checkpoint_10/target.token_embedder.embedding/0.0", {})
    with pytest.raises(InputError, match=r"token_embedder/embedding: 1 of its 1 chunks are missing"):
        load_model("gs://bkt/torn")
    with pytest.raises(InputError, match=r"gs://b/model: cannot be read .*gcloud auth"):
        load_model("gs://b/model")  # no name of a bucket
