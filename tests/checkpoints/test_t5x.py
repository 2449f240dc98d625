"""Reading T5X checkpoints: files made by msgpack and TensorStore directly, and by Orbax, in every layout."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest

from inranker_jax.checkpoints import load_model, t5x_arrays, t5x_folders
from inranker_jax.errors import InputError
from inranker_jax.models import trees
from tests.checkpoints import t5x_files

CONFIG = t5x_files.VARIANTS["v1.1"]
PARAMS = t5x_files.random_params(CONFIG)
TABLE = "relpos_bias/rel_embedding"


def assert_equal_trees(found: Any, expected: Any) -> None:
    found, expected = trees.flatten(found), trees.flatten(expected)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == np.float32, path
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def rounded(params: Any) -> Any:
    """What remains of parameters that were stored in bfloat16."""
    flat = trees.flatten(params)
    return trees.unflatten({p: v.astype(jnp.bfloat16).astype(np.float32) for p, v in flat.items()})


@pytest.mark.parametrize("variant", t5x_files.VARIANTS)
@pytest.mark.parametrize("layout", ["unscanned", "scanned"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inlined": True},
        {"optimizer": True, "compressor": {"id": "zstd"}},
        {"dtype": "bfloat16", "compressor": {"id": "blosc", "cname": "lz4"}},
        {"dtype": "bfloat16", "version": 2},
        {"dtype": "bfloat16", "inlined": True},
        {"path_at_root": True, "driver": "gcs", "version": 2},
    ],
    ids=["zarr", "inline", "optimizer zstd", "bfloat16 blosc", "bfloat16 bits", "bfloat16 inline", "old gcs"],
)
def test_every_layout_gives_the_same_model(variant, layout, options, tmp_path):
    config = t5x_files.VARIANTS[variant]
    params = t5x_files.random_params(config)
    scanned = layout == "scanned"
    arrays = t5x_files.scanned(config, params) if scanned else t5x_files.unscanned(params)
    folder = t5x_files.write(tmp_path, arrays, step=1200, **options)
    model = load_model(folder, on_host=True)
    assert model.config == config
    assert (model.step, model.tokenizer, model.contract) == (1200, None, None)
    assert_equal_trees(model.params, rounded(params) if "dtype" in options else params)


@pytest.mark.parametrize("use_ocdbt", [False, True])
@pytest.mark.parametrize("use_zarr3", [False, True])
def test_orbax_state_is_read(use_ocdbt, use_zarr3, tmp_path):
    arrays = t5x_files.scanned(CONFIG, PARAMS)
    state = {
        "target": trees.unflatten(arrays),
        "state": {
            "step": np.asarray(40, np.int32),
            "param_states": {"token_embedder": {"embedding": {"v": np.ones(3), "m": None, "frozen": {}}}},
        },
    }
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    ocp.Checkpointer(handler).save(tmp_path / "checkpoint_40" / "state", state)
    for path in (tmp_path, tmp_path / "checkpoint_40", tmp_path / "checkpoint_40" / "state"):
        model = load_model(path, on_host=True)
        assert (model.config, model.step) == (CONFIG, 40)
        assert_equal_trees(model.params, PARAMS)


@pytest.mark.parametrize("subfolder", ["state", "."])
def test_first_layout_of_orbax_is_read(subfolder, tmp_path):
    """A msgpack file whose leaves name arrays beside it; small values are in it."""
    folder = tmp_path / "checkpoint_5" / subfolder
    folder.mkdir(parents=True)
    tree = {}
    for path, array in t5x_files.unscanned(PARAMS).items():
        name = f"target.{path.replace('/', '.')}"
        t5x_files.external(folder, name, array)
        tree[path] = f"PLACEHOLDER://{name}"
    contents = {
        "target": trees.unflatten(tree),
        "state": {
            "step": t5x_files.inline(np.int32(5)),
            "param_states": "PLACEHOLDER://state.param_states.x",
        },
        "flax_mutables": None,
    }
    (folder / "checkpoint").write_bytes(msgpack.packb(contents))
    model = load_model(tmp_path, on_host=True)
    assert (model.config, model.step) == (CONFIG, 5)
    assert_equal_trees(model.params, PARAMS)


def test_arrays_that_flax_divided_are_put_together(tmp_path):
    folder = t5x_files.write(tmp_path, t5x_files.unscanned(PARAMS))
    name = "token_embedder/embedding"

    def divide(contents: dict[str, Any]) -> None:
        embedding = PARAMS["token_embedder"]["embedding"]
        contents["optimizer"]["target"]["token_embedder"]["embedding"] = t5x_files.chunked(embedding, 100)

    edit(folder, divide)
    shutil.rmtree(folder / f"target.{name.replace('/', '.')}")
    assert_equal_trees(load_model(folder, on_host=True).params, PARAMS)


def edit(folder: pathlib.Path, change: Any) -> None:
    """Applies `change` to the contents of the msgpack file."""
    contents = msgpack.unpackb((folder / "checkpoint").read_bytes())
    change(contents)
    (folder / "checkpoint").write_bytes(msgpack.packb(contents))


# ---- which path is meant -------------------------------------------------------------------------------------


def test_the_newest_complete_step_is_meant(tmp_path, monkeypatch):
    older = t5x_files.write(tmp_path / "m", t5x_files.unscanned(PARAMS), step=900)
    newer = t5x_files.write(tmp_path / "m", t5x_files.unscanned(rounded(PARAMS)), step=1000)
    (tmp_path / "m" / "checkpoint_1100").mkdir()  # being copied: its file is the last to come
    shutil.copytree(newer, tmp_path / "m" / "checkpoint_1200.tmp-17")
    assert load_model(tmp_path / "m", on_host=True).step == 1000
    assert_equal_trees(load_model(older, on_host=True).params, PARAMS)
    assert load_model(older / "checkpoint", on_host=True).step == 900
    renamed = older.rename(tmp_path / "t5_base")
    assert load_model(renamed, on_host=True).step == 900
    monkeypatch.chdir(tmp_path)
    for path in ("m", "m/", "m/checkpoint_1000", "t5_base", "t5_base/checkpoint"):
        assert load_model(path, on_host=True).step in (900, 1000), path
    monkeypatch.chdir(renamed)
    assert load_model("checkpoint", on_host=True).step == 900
    assert load_model(".", on_host=True).step == 900


def test_a_folder_without_a_complete_step_says_so(tmp_path):
    (tmp_path / "checkpoint_30" / "target.x").mkdir(parents=True)
    with pytest.raises(
        InputError, match=r"checkpoint_30 is not complete\. Expected the file `checkpoint` in it"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        ["checkpoints/7/state/_METADATA", "checkpoints/7/model/metadata", "checkpoints/7/position/metadata"],
        ["config.json", "model.safetensors", "checkpoint"],  # TensorFlow's list of checkpoints
        ["state/metadata.json"],
        [],
    ],
)
def test_other_folders_are_left_to_other_readers(files, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / "checkpoints" / "7", tmp_path / "checkpoints" / "7" / "state"):
        assert t5x_folders.locate(str(path)) is None
    assert t5x_folders.locate("google-t5/t5-small") is None


# ---- memory --------------------------------------------------------------------------------------------------


def test_one_array_is_read_at_a_time(tmp_path, monkeypatch):
    """Layers of a stacked array go to their places before the next array is read; the optimizer's never are."""
    from inranker_jax.checkpoints import t5x

    folder = t5x_files.write(tmp_path, t5x_files.scanned(CONFIG, PARAMS), optimizer=True)
    location = t5x_folders.locate(str(folder))
    assert location is not None
    events: list[str] = []
    opened = t5x_arrays.open_checkpoint(location)

    def noted(name: str, array: t5x_arrays.StoredArray) -> t5x_arrays.StoredArray:
        def read() -> np.ndarray:
            events.append(f"read {name}")
            return array.read()

        return t5x_arrays.StoredArray(array.shape, read)

    arrays = {name: noted(name, array) for name, array in opened.arrays.items()}
    t5x.read_params(
        CONFIG,
        dataclasses.replace(opened, arrays=arrays),
        lambda path, array: events.append(f"place {path}"),
    )
    kernels = [i for i, event in enumerate(events) if event == "read encoder/encoder/mlp/wi_0/kernel"]
    assert events[kernels[0] + 1 : kernels[0] + 4] == [
        "place encoder/layers_0/mlp/wi_0/kernel",
        "place encoder/layers_1/mlp/wi_0/kernel",
        next(event for event in events[kernels[0] + 3 :] if event.startswith("read")),
    ]
    assert len([event for event in events if event.startswith("read")]) == len(arrays)
    assert not any("param_states" in event for event in events)


# ---- what cannot be read -------------------------------------------------------------------------------------


def failing(folder: pathlib.Path) -> str:
    with pytest.raises(InputError) as error:
        load_model(folder, on_host=True)
    return str(error.value)


def test_missing_arrays_and_chunks_are_named(tmp_path):
    folder = t5x_files.write(tmp_path, t5x_files.unscanned(PARAMS))
    shutil.rmtree(folder / "target.encoder.encoder_norm.scale")
    embedding = folder / "target.token_embedder.embedding"
    shutil.rmtree(embedding)
    t5x_files.external(folder, embedding.name, PARAMS["token_embedder"]["embedding"], chunks=[31, 16])
    (embedding / "1.0").unlink()
    message = failing(folder)
    assert f"{folder}: 2 of 66 arrays cannot be read" in message
    assert "target/encoder/encoder_norm/scale: " in message
    assert "target/token_embedder/embedding: 1 of its 2 chunks are missing" in message
    assert message.endswith("Copy the whole folder of the step again.")


def test_zeros_are_no_missing_chunk(tmp_path):
    arrays = {path: np.zeros_like(array) for path, array in t5x_files.unscanned(PARAMS).items()}
    model = load_model(t5x_files.write(tmp_path, arrays), on_host=True)
    assert not any(np.any(value) for value in trees.flatten(model.params).values())


def test_the_index_and_the_arrays_must_agree(tmp_path):
    folder = t5x_files.write(tmp_path, t5x_files.unscanned(PARAMS))
    shutil.rmtree(folder / "target.encoder.encoder_norm.scale")
    t5x_files.external(folder, "target.encoder.encoder_norm.scale", np.ones(9, np.float32))
    assert "target/encoder/encoder_norm/scale: shape (9,), where the index says (16,)" in failing(folder)


def test_missing_unexpected_and_misshaped_parameters_are_one_error(tmp_path):
    arrays = t5x_files.unscanned(PARAMS)
    del arrays["encoder/encoder_norm/scale"]
    arrays["decoder/decoder_norm/scale"] = np.ones(7, np.float32)
    arrays["encoder/layers_1/adapter/kernel"] = np.ones((2, 5), np.float32)
    folder = t5x_files.write(tmp_path, arrays)
    lines = failing(folder).splitlines()
    assert lines[0] == (f"{folder}/checkpoint: the arrays are not those of a T5. Expected (-) and found (+):")
    assert [line for line in lines if line[0] in "+-"] == [
        "- decoder/decoder_norm/scale (16,)",
        "+ decoder/decoder_norm/scale (7,)",
        "- encoder/encoder_norm/scale (16,)",
        "+ encoder/layers_1/adapter/kernel (2, 5)",
    ]
    assert lines[-1].startswith("Only T5, T5 v1.1, FLAN-T5, mT5")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # A language model: no encoder.
        (
            lambda arrays: {n: a for n, a in arrays.items() if not n.startswith("encoder/")},
            r"not an encoder-decoder T5: encoder/relpos_bias/rel_embedding is missing, expected \(heads, buckets\); "
            r".*encoder/layers_0/mlp/wi/kernel is missing, expected \(width, hidden\)\. It has decoder/decoder_norm",
        ),
        # An encoder: no decoder.
        (
            lambda arrays: {n: a for n, a in arrays.items() if not n.startswith("decoder/")},
            r"T5Config.num_decoder_layers is 0. Expected an integer of at least 1. It has encoder/encoder_norm",
        ),
        # Other names, as of a port to another framework.
        (
            lambda arrays: {n.replace("layers_", "block_"): a for n, a in arrays.items()},
            r"encoder/layers_0/attention/query/kernel is missing, expected \(width, heads x kv\)",
        ),
        (
            lambda arrays: {**arrays, f"encoder/{TABLE}": np.ones((5, 32), np.float32)},
            r"query/kernel is \(16, 24\) and .*rel_embedding \(5, 32\)\. Expected a multiple of the 5 heads",
        ),
        (
            lambda arrays: {**arrays, "token_embedder/embedding": np.ones((61, 16), np.int32)},
            r"token_embedder/embedding holds int32. Expected floating-point",
        ),
        (lambda arrays: {}, r"token_embedder/embedding is missing.*It has no arrays\. Only T5"),
    ],
    ids=["decoder only", "encoder only", "other names", "heads", "integers", "empty"],
)
def test_foreign_trees_say_what_was_expected(change, expected, tmp_path):
    folder = t5x_files.write(tmp_path, change(t5x_files.unscanned(PARAMS)))
    with pytest.raises(InputError, match=expected):
        load_model(folder, on_host=True)


def test_layers_with_tables_of_their_own_are_refused(tmp_path):
    """umT5, and what T5X's scalable_t5 trained: `T5Config` has one table for all layers."""
    arrays = t5x_files.scanned(CONFIG, PARAMS)
    arrays[f"encoder/encoder/{TABLE}"] = arrays[f"encoder/encoder/{TABLE}"].copy()
    arrays[f"encoder/encoder/{TABLE}"][0, 1, 3] += 1
    message = failing(t5x_files.write(tmp_path / "scanned", arrays))
    assert f"encoder/encoder/{TABLE} differs between layers (4, 2, 32). Expected one table" in message

    arrays = t5x_files.unscanned(PARAMS)
    for side, layers in (("encoder", 2), ("decoder", 3)):
        table = arrays.pop(f"{side}/{TABLE}")
        arrays.update({f"{side}/layers_{i}/{TABLE}": table for i in range(layers)})
    same = load_model(t5x_files.write(tmp_path / "same", arrays), on_host=True)
    assert same.config == CONFIG
    assert_equal_trees(same.params, PARAMS)
    arrays[f"decoder/layers_2/{TABLE}"] = table + 1
    assert f"decoder/layers_2/{TABLE} differs" in failing(t5x_files.write(tmp_path / "differs", arrays))


def test_damaged_and_old_files_are_refused(tmp_path):
    folder = t5x_files.write(tmp_path, t5x_files.unscanned(PARAMS), inlined=True)
    whole = (folder / "checkpoint").read_bytes()
    (folder / "checkpoint").write_bytes(whole[: len(whole) // 2])
    assert f"{folder}/checkpoint: not msgpack, or cut off" in failing(folder)
    (folder / "checkpoint").write_bytes(b"\x93\x01\x02\x03")
    assert f"{folder}/checkpoint: not msgpack, or cut off" in failing(folder)
    (folder / "checkpoint").write_bytes(b'model_checkpoint_path: "model.ckpt-1000"\n')
    assert "it belongs to a TensorFlow checkpoint" in failing(folder)
    (folder / "checkpoint").write_bytes(whole)
    edit(folder, lambda contents: contents.update(version=1))
    assert "its format has version 1. Expected version 2 or 3" in failing(folder)
    edit(folder, lambda contents: contents.update(version=3, optimizer={"state": {"step": 1}}))
    assert "it has no `target`, only state" in failing(folder)

    orbax = tmp_path / "orbax" / "checkpoint_1" / "state"
    orbax.mkdir(parents=True)
    (orbax / "_METADATA").write_text("{}")
    assert f"{orbax}/_METADATA: not an index of Orbax" in failing(tmp_path / "orbax")


# ---- what lies beside it -------------------------------------------------------------------------------------


def test_config_json_adds_what_shapes_do_not_show_and_is_checked(tmp_path):
    folder = t5x_files.write(tmp_path, t5x_files.unscanned(PARAMS))
    # transformers 5 says of every T5 that it is tied and scaled.
    stated = dataclasses.replace(
        CONFIG,
        feed_forward_proj="gated-silu",
        dropout_rate=0.0,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
    )
    (tmp_path / "config.json").write_text(json.dumps(stated.to_hf_dict()))
    assert load_model(folder, on_host=True).config == dataclasses.replace(stated, tie_word_embeddings=False)
    wrong = dataclasses.replace(CONFIG, num_heads=2, d_kv=12)
    (tmp_path / "config.json").write_text(json.dumps(wrong.to_hf_dict()))
    message = failing(folder)
    assert message.startswith(
        f"{tmp_path}/config.json: it describes another model: d_kv is 12 there and 6 in"
    )
    assert "num_heads is 2 there and 4 in the checkpoint" in message
    (tmp_path / "config.json").write_text('{\n"d_model": }')
    assert f"{tmp_path}/config.json:2: not valid JSON" in failing(folder)


GIN = """
# Macros:
NUM_HEADS = 4
# Parameters for network.T5Config:
network.T5Config.dropout_rate = %DROPOUT_RATE
network.T5Config.num_heads = %NUM_HEADS
network.T5Config.emb_dim = 16
network.T5Config.mlp_activations = ('silu', 'linear')
network.T5Config.logits_via_embedding = False
network.T5Config.dtype = 'bfloat16'
train.total_steps = 1000
"""


def test_config_gin_of_t5x_is_read_and_checked(tmp_path):
    folder = t5x_files.write(tmp_path, t5x_files.unscanned(PARAMS))
    (tmp_path / "config.gin").write_text(GIN)  # DROPOUT_RATE is a macro of another file
    expected = dataclasses.replace(CONFIG, feed_forward_proj="gated-silu")
    assert load_model(folder, on_host=True).config == expected
    (tmp_path / "config.gin").write_text(GIN + "DROPOUT_RATE = 0.05\n")
    assert load_model(tmp_path, on_host=True).config == dataclasses.replace(expected, dropout_rate=0.05)
    (tmp_path / "config.gin").write_text(GIN.replace("emb_dim = 16", "emb_dim = 768"))
    assert "config.gin: it describes another model: d_model is 768 there and 16 in" in failing(folder)
    (tmp_path / "config.gin").write_text(GIN.replace("('silu', 'linear')", "('tanh', 'linear', 'relu')"))
    assert "mlp_activations = ('tanh', 'linear', 'relu')" in failing(folder)
