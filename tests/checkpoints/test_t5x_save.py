"""Writing T5X checkpoints: read back here, and directly by msgpack and TensorStore."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import tensorstore as ts

from inranker_jax.checkpoints import huggingface, load_model, t5x_save, t5x_settings
from inranker_jax.errors import InputError
from inranker_jax.models import T5Config, apply, trees
from inranker_jax.prompts import Tokenizer, preset
from tests.checkpoints import t5x_files
from tests.models.reference import ragged_tokens
from tests.tiny_vocabulary import write_spiece

CONFIG = t5x_files.VARIANTS["v1.1"]
PARAMS = t5x_files.random_params(CONFIG)


def assert_equal_trees(found: Any, expected: Any) -> None:
    found, expected = trees.flatten(found), trees.flatten(expected)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def read_directly(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The contents of the msgpack file, and the arrays that it names, as T5X takes them from disk."""

    def extension(code: int, data: bytes) -> np.ndarray:
        assert code == 1
        shape, dtype, values = msgpack.unpackb(data)
        return np.frombuffer(values, np.dtype(dtype)).reshape(shape)

    contents = msgpack.unpackb((folder / "checkpoint").read_bytes(), ext_hook=extension)
    arrays: dict[str, np.ndarray] = {}

    def visit(node: dict[str, Any], path: str) -> None:
        if node.keys() >= {"driver", "kvstore", "metadata"}:
            # T5X deletes these two before it opens the array, and so fails where they are not.
            assert node["metadata"].keys() >= {"chunks", "compressor"}
            assert ts.Spec(node).to_json()["metadata"]["shape"] == node["metadata"]["shape"]
            node["kvstore"]["path"] = f"{folder}/{node['kvstore']['path']}"
            arrays[path] = ts.open(node, open=True).result().read().result()
            return
        for name, child in node.items():
            visit(child, f"{path}/{name}" if path else name)

    visit(contents["optimizer"]["target"], "")
    return contents, arrays


@pytest.mark.parametrize("variant", t5x_files.VARIANTS)
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_are_those_of_t5x(variant, scan_layers, dtype, tmp_path):
    config = t5x_files.VARIANTS[variant]
    params = t5x_files.random_params(config)
    written = t5x_save.save(tmp_path, config, params, 31, dtype=dtype, scan_layers=scan_layers)
    assert written == tmp_path / "checkpoint_31"
    contents, arrays = read_directly(written)
    assert contents.keys() == {"version", "optimizer"}
    assert contents["version"] == 3
    assert contents["optimizer"].keys() == {"target", "state"}
    assert contents["optimizer"]["state"].keys() == {"step"}
    step = contents["optimizer"]["state"]["step"]
    assert (step.shape, step.dtype, int(step)) == ((), np.int32, 31)
    expected = t5x_files.scanned(config, params) if scan_layers else t5x_files.unscanned(params)
    assert arrays.keys() == expected.keys()
    for path, value in expected.items():
        assert arrays[path].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(arrays[path], value.astype(dtype), err_msg=path)
    names = {f"target.{path.replace('/', '.')}" for path in expected}
    assert {p.name for p in written.iterdir()} == {"checkpoint", *names}


@pytest.mark.parametrize("variant", t5x_files.VARIANTS)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_round_trip_from_hugging_face_keeps_every_bit_and_logit(variant, scan_layers, tmp_path):
    config = t5x_files.VARIANTS[variant]
    huggingface.save(tmp_path / "hf", config, t5x_files.random_params(config), None, None)
    first = load_model(tmp_path / "hf", on_host=True)
    t5x_save.save(tmp_path / "t5x", first.config, first.params, 0, scan_layers=scan_layers)
    second = load_model(tmp_path / "t5x")
    assert (second.config, second.step) == (config, 0)
    assert {type(leaf) for leaf in jax.tree.leaves(second.params)} == {type(jnp.ones(1))}
    assert_equal_trees(second.params, first.params)
    huggingface.save(tmp_path / "again", second.config, second.params, None, None)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    tokens = ragged_tokens(3, 9, config.vocab_size)
    logits = jax.jit(functools.partial(apply, config))
    labels = np.array([7, 3], np.int32)
    np.testing.assert_array_equal(logits(first.params, tokens, labels), logits(second.params, tokens, labels))


def test_settings_tokenizer_and_contract_go_beside_it(tmp_path):
    write_spiece(tmp_path / "vocabulary")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "vocabulary")
    contract = preset("inranker")
    config = dataclasses.replace(
        CONFIG, vocab_size=tokenizer.vocab_size, feed_forward_proj="gated-silu", dropout_rate=0.0
    )
    params = t5x_files.random_params(config)
    t5x_save.save(tmp_path / "out", config, params, 5, tokenizer, contract)
    model = load_model(tmp_path / "out", on_host=True)
    assert (model.config, model.contract) == (config, contract)
    assert model.tokenizer is not None
    assert model.tokenizer.fingerprint == tokenizer.fingerprint

    # T5X's own names for the architecture: gin's syntax, and read back by the reader of its config.gin.
    text = (tmp_path / "out" / "model.gin").read_text()
    bindings = dict(line.split(" = ") for line in text.splitlines() if line.startswith("network."))
    assert "from t5x.examples.t5 import network" in text.splitlines()
    assert "from t5x.examples.scalable_t5 import network" in t5x_save.model_gin(config, scan_layers=True)
    assert "dropout_rate" not in text  # T5X's DROPOUT_RATE keeps its meaning
    assert ast.literal_eval(bindings["network.T5Config.mlp_activations"]) == ("silu", "linear")
    assert ast.literal_eval(bindings["network.T5Config.head_dim"]) == 6
    (tmp_path / "out" / "config.json").unlink()
    expected = dataclasses.replace(config, dropout_rate=0.1)
    assert load_model(tmp_path / "out", on_host=True).config == expected
    assert t5x_settings.read_gin(text)["num_encoder_layers"] == 2


def test_a_folder_holds_several_steps_of_one_model(tmp_path):
    older = t5x_files.random_params(CONFIG, 1)
    t5x_save.save(tmp_path, CONFIG, older, 1)
    t5x_save.save(tmp_path, CONFIG, older, 2)
    t5x_save.save(tmp_path, CONFIG, PARAMS, 2)
    steps = ["checkpoint_1", "checkpoint_2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*steps, "config.json", "model.gin"]
    assert_equal_trees(load_model(tmp_path, on_host=True).params, PARAMS)
    assert_equal_trees(load_model(tmp_path / "checkpoint_1", on_host=True).params, older)
    other = dataclasses.replace(CONFIG, d_ff=24)
    with pytest.raises(InputError, match=r"config.json: it describes another model \(d_ff differ\)"):
        t5x_save.save(tmp_path, other, t5x_files.random_params(other), 3)
    for stored_otherwise in ({"dtype": "bfloat16"}, {"scan_layers": True}):
        with pytest.raises(InputError, match="steps of the same --dtype and --scan_layers"):
            t5x_save.save(tmp_path, CONFIG, PARAMS, 3, **stored_otherwise)
    assert not (tmp_path / "checkpoint_3").exists()


def test_a_failed_export_leaves_what_was_there(tmp_path, monkeypatch):
    t5x_save.save(tmp_path, CONFIG, PARAMS, 1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(t5x_save, "_write_array", fail)
        with pytest.raises(OSError, match="no space left"):
            t5x_save.save(tmp_path, CONFIG, t5x_files.random_params(CONFIG, 1), 1)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not list(tmp_path.glob("*.tmp-*"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scale_decoder_outputs": True}, r"scale_decoder_outputs is True with tie_word_embeddings False"),
        ({"relative_attention_max_distance": 64}, r"relative_attention_max_distance is 64, there 128"),
        (
            {"feed_forward_proj": "gelu"},
            r"the activation is gelu, there one of relu, gelu_new, silu, swish\. Export it with --format=huggingface",
        ),
        (
            {"layer_norm_epsilon": 1e-5, "decoder_start_token_id": 1},
            r"epsilon is 1e-05, there 1e-06; decoder_start_token_id is 1, there 0",
        ),
    ],
)
def test_models_that_t5x_would_run_otherwise_are_refused(changes, expected, tmp_path):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(InputError, match=expected):
        t5x_save.save(tmp_path / "out", config, t5x_files.random_params(config), 0)
    assert not (tmp_path / "out").exists()


def test_save_refuses_what_it_must_not_write(tmp_path):
    def save(folder: Any, config: T5Config = CONFIG, step: int = 0, **options: Any) -> None:
        t5x_save.save(folder, config, PARAMS, step, **options)

    with pytest.raises(InputError, match=r"dtype is 'bfloat1'.*Did you mean 'bfloat16'"):
        save(tmp_path, dtype="bfloat1")
    with pytest.raises(InputError, match=r"step is -1"):
        save(tmp_path, step=-1)
    with pytest.raises(InputError, match=r"do not belong to this T5Config"):
        save(tmp_path, t5x_files.VARIANTS["v1.0"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "thesis").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis: it is a file"):
        save(tmp_path / "thesis")
    (tmp_path / "m" / "checkpoint_0").mkdir(parents=True)
    (tmp_path / "m" / "checkpoint_0" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"checkpoint_0: it is no checkpoint of T5X"):
        save(tmp_path / "m")
    assert [p.name for p in (tmp_path / "m" / "checkpoint_0").iterdir()] == ["thesis.tex"]


def test_large_arrays_are_divided_evenly():
    for shape, itemsize in (((32128, 1024), 4), ((1024, 24, 16384), 4), ((250112, 4096), 2), ((7919,), 4)):
        chunks = t5x_save.chunk_shape(shape, itemsize)
        assert all(size % chunk == 0 for size, chunk in zip(shape, chunks, strict=True))
        assert itemsize * np.prod(chunks) <= t5x_save.CHUNK_BYTES
    assert t5x_save.chunk_shape((12, 10), 1, limit=30) == [6, 5]
    assert t5x_save.chunk_shape((), 4) == []


def test_json_of_the_export_is_hugging_faces(tmp_path):
    t5x_save.save(tmp_path, CONFIG, PARAMS, 0, dtype="bfloat16")
    stored = json.loads((tmp_path / "config.json").read_text())
    assert T5Config.from_hf_dict(stored) == CONFIG
    assert stored["dtype"] == "bfloat16"
