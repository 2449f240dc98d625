"""T5X checkpoints in a bucket, read through TensorStore without a copy."""

from __future__ import annotations

import pathlib
import urllib.parse
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from inranker_jax import export, paths
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


def assert_readable(folder: str, step: int) -> None:
    model = load_model(folder, on_host=True)
    assert (model.config, model.step, model.contract) == (CONFIG, step, preset("inranker"))
    for name, value in trees.flatten(PARAMS).items():
        np.testing.assert_array_equal(trees.flatten(model.params)[name], value, err_msg=name)


def refuse(store: ObjectStore, method: str, name: str) -> None:
    """Answers requests of that method for an object with 403."""

    def fault(asked: str, about: str) -> None:
        if (asked, about) == (method, name):
            raise StatusError(403, "not yours")

    store.fault = fault


@pytest.fixture
def save(tmp_path: pathlib.Path) -> Callable[[str | pathlib.Path, int], Any]:
    write_spiece(tmp_path / "vocabulary", size=300)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "vocabulary")
    return lambda folder, step: t5x_save.save(folder, CONFIG, PARAMS, step, tokenizer, preset("inranker"))


def test_an_export_in_a_bucket_is_that_of_a_disk(
    store: ObjectStore, tmp_path: pathlib.Path, save: Any
) -> None:
    for step in (4, 40, 8):
        assert str(save("gs://bkt/out/", step)) == f"gs://bkt/out/checkpoint_{step}"
        save(tmp_path / "here", step)
    store.put("bkt", "out/checkpoint_4/target.old/0", b"of an export with other names", {})
    save("gs://bkt/out", 4)  # again, in place of the first
    names = paths.names_below(tmp_path / "here")
    assert store.names("bkt") == [f"out/{name}" for name in names]
    for name in names:
        assert store.get("bkt", f"out/{name}", {}).data == (tmp_path / "here" / name).read_bytes()
    for step in (4, 8, 40):
        assert_readable(f"gs://bkt/out/checkpoint_{step}", step)


def test_arrays_are_uploaded_before_their_description_and_the_index_last(
    store: ObjectStore, save: Any
) -> None:
    asked: list[tuple[str, str]] = []
    store.fault = lambda method, name: asked.append((method, name))
    save("gs://bkt/out", 4)
    uploaded = [name for method, name in asked if method == "POST"]
    kinds = ["array" if "/target." in name else name for name in uploaded]
    count = kinds.count("array")
    assert count > 20
    assert kinds[:count] == ["array"] * count
    assert kinds[-2:] == ["out/config.json", "out/checkpoint_4/checkpoint"]
    asked.clear()
    save("gs://bkt/out", 4)
    written = [(method, name) for method, name in asked if method in ("DELETE", "POST")]
    assert written[0] == ("DELETE", "out/checkpoint_4/checkpoint")
    assert written[-1] == ("POST", "out/checkpoint_4/checkpoint")


ARRAY = "target.token_embedder.embedding/0.0"


@pytest.mark.parametrize(
    "name", ["checkpoint_9/" + ARRAY, "model.gin", "config.json", "checkpoint_9/checkpoint"]
)
def test_an_upload_that_breaks_off_is_no_step_and_binds_nobody(
    store: ObjectStore, save: Any, name: str
) -> None:
    refuse(store, "POST", f"new/{name}")
    with pytest.raises(OSError, match=r"gs://bkt/new/checkpoint_9: could not be .*Forbidden.*not yours"):
        save("gs://bkt/new", 9)
    assert "new/checkpoint_9/checkpoint" not in store.names("bkt")
    store.fault = lambda method, name: None
    other = t5x_files.VARIANTS["v1.0"]
    t5x_save.save("gs://bkt/new", other, t5x_files.random_params(other), 9, dtype="bfloat16")
    assert load_model("gs://bkt/new", on_host=True).config == other

    save("gs://bkt/old", 8)
    refuse(store, "POST", f"old/{name}")
    with pytest.raises(OSError, match="Forbidden"):
        save("gs://bkt/old", 9)
    assert_readable("gs://bkt/old", 8)
    with pytest.raises(InputError, match=r"^gs://bkt/old/config.json: it describes another model"):
        t5x_save.save("gs://bkt/old", other, t5x_files.random_params(other), 9)


@pytest.mark.parametrize("name", ["checkpoint", ARRAY, "target.decoder.decoder_norm.scale/.zarray"])
def test_a_removal_that_breaks_off_leaves_no_index_without_its_arrays(
    store: ObjectStore, save: Any, name: str
) -> None:
    for step in (8, 9):
        save("gs://bkt/out", step)
    before = store.names("bkt", "out/checkpoint_9/")
    refuse(store, "DELETE", f"out/checkpoint_9/{name}")
    with pytest.raises(OSError, match=r"gs://bkt/out/checkpoint_9: could not be read or written"):
        save("gs://bkt/out", 9)
    left = store.names("bkt", "out/checkpoint_9/")
    assert left == before if name == "checkpoint" else "out/checkpoint_9/checkpoint" not in left
    assert_readable("gs://bkt/out", 9 if name == "checkpoint" else 8)
    store.fault = lambda method, name: None
    save("gs://bkt/out", 9)
    assert_readable("gs://bkt/out", 9)


def test_an_export_is_refused_beside_what_it_does_not_fit(store: ObjectStore) -> None:
    t5x_save.save("gs://bkt/out", CONFIG, PARAMS, 4)
    with pytest.raises(InputError, match=r"^gs://bkt/out: its steps are of dtype float32"):
        t5x_save.save("gs://bkt/out", CONFIG, PARAMS, 5, dtype="bfloat16")
    other = t5x_files.VARIANTS["v1.0"]
    with pytest.raises(InputError, match=r"^gs://bkt/out/config.json: it describes another model"):
        t5x_save.save("gs://bkt/out", other, t5x_files.random_params(other), 5)
    with pytest.raises(InputError, match=r"there is no bucket 'missing'"):
        t5x_save.save("gs://missing/out", CONFIG, PARAMS, 6)
    # A Hugging Face model's folder: its config.json is not ours, whatever else is there.
    store.put("bkt", "hf/config.json", store.get("bkt", "out/config.json", {}).data, {})
    store.put("bkt", "hf/model.gin", b"", {})
    store.put("bkt", "hf/model.safetensors", b"", {})
    with pytest.raises(InputError, match=r"^gs://bkt/hf/config.json: it describes another model"):
        t5x_save.save("gs://bkt/hf", other, t5x_files.random_params(other), 5)


@pytest.mark.parametrize("remote", [True, False])
def test_what_may_be_replaced_is_the_same_everywhere(
    store: ObjectStore, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    root = "gs://bkt/out" if remote else str(tmp_path / "out")

    def put(name: str) -> str:
        paths.write(f"{root}/{name}", b"years of work")
        return f"{root}/{name}"

    def trained(step: int) -> str:
        t5x_files.write(tmp_path / "t5x", t5x_files.unscanned(PARAMS), step, optimizer=True)
        for name in paths.names_below(tmp_path / "t5x" / f"checkpoint_{step}"):
            paths.write(
                f"{root}/checkpoint_{step}/{name}",
                (tmp_path / "t5x" / f"checkpoint_{step}" / name).read_bytes(),
            )
        return f"{root}/checkpoint_{step}"

    whole, torn = trained(1), trained(2)
    paths.remove(f"{torn}/checkpoint")  # as a copy or removal that broke off leaves it
    for step, folder in ((1, whole), (2, torn)):
        assert str(t5x_save.save(root, CONFIG, PARAMS, step)) == folder
        assert not [name for name in paths.names_below(folder) if name.startswith("state.")]
        assert load_model(folder, on_host=True).step == step
    kept = []
    foreign = ("thesis.tex", "target.pdf", "target.old/0", "target.encoder.x/notes.txt", "state/checkpoint")
    monkeypatch.setattr(
        t5x_save, "_write_step", lambda *_: pytest.fail("the model was written before the check")
    )
    for step, name in enumerate(foreign, 3):
        kept.append(put(f"checkpoint_{step}/{name}"))
        with pytest.raises(InputError, match=rf"^{root}/checkpoint_{step}: it is no checkpoint of T5X"):
            t5x_save.save(root, CONFIG, PARAMS, step)
    assert all(paths.read(name) == b"years of work" for name in kept)


@pytest.mark.parametrize("layout", ["t5x", "huggingface"])
def test_a_bucket_that_may_only_be_read_is_one_line_of_the_command(
    store: ObjectStore, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    t5x_files.write(tmp_path / "m", t5x_files.unscanned(PARAMS))

    def fault(method: str, name: str) -> None:
        if method == "POST":
            raise StatusError(403, "not yours")

    store.fault = fault
    with pytest.raises(SystemExit) as ended:
        export.main([f"--checkpoint={tmp_path / 'm'}", "--output_dir=gs://bkt/out", f"--format={layout}"])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the export to gs://bkt/out was not finished: gs://bkt/out")
    assert line.endswith("not yours).")


def test_steps_beside_it_are_not_listed(store: ObjectStore) -> None:
    for step in (4, 8):
        store.requests.clear()
        t5x_save.save("gs://bkt/out", CONFIG, PARAMS, step)
    listed = [
        urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)
        for method, path in store.requests
        if method == "GET" and urllib.parse.urlsplit(path).path.endswith("/o")
    ]
    assert listed
    for query in listed:
        below = query.get("prefix", [""])[0]
        assert "delimiter" in query or below.startswith("out/checkpoint_8"), query


def test_what_is_not_there_is_one_error(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    t5x_files.write(tmp_path / "m", t5x_files.unscanned(PARAMS), step=10)
    upload(store, tmp_path / "m", "torn")
    store.delete("bkt", "torn/checkpoint_10/target.token_embedder.embedding/0.0", {})
    with pytest.raises(InputError, match=r"token_embedder/embedding: 1 of its 1 chunks are missing"):
        load_model("gs://bkt/torn")
    with pytest.raises(InputError, match=r"gs://b/model: cannot be read .*gcloud auth"):
        load_model("gs://b/model")  # no name of a bucket
