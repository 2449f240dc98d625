"""Hugging Face folders: in, out, and in again by transformers."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
import transformers

from inranker_jax import export
from inranker_jax.checkpoints import LoadedModel, huggingface, load_model
from inranker_jax.errors import InputError
from inranker_jax.models import T5Config, apply, init_params, trees
from inranker_jax.prompts import Tokenizer, preset
from tests.models.reference import (
    SIZES,
    VARIANTS,
    config_of,
    our_tree,
    ragged_tokens,
    torch_logits,
    torch_model,
)
from tests.tiny_vocabulary import write_spiece

LABELS = np.array([7, 3], np.int32)


def write_torch(folder, config, **options):
    """A folder written by transformers, and the model in it."""
    model = torch_model(config)
    model.save_pretrained(folder, **options)
    return model


def read_torch(folder):
    model, report = transformers.T5ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    problems = {kind: names for kind, names in report.items() if names}
    assert not problems, problems
    return model.eval()


def assert_equal_trees(found, expected):
    found, expected = trees.flatten(found), trees.flatten(expected)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def rewrite(folder, change, name="model.safetensors"):
    """Loads the tensors of a file, applies `change` to the dictionary, and writes it back."""
    tensors = safetensors.numpy.load_file(folder / name)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_keeps_every_bit_and_every_logit(variant, tmp_path):
    config = config_of(variant)
    model = write_torch(tmp_path / "theirs", config)
    loaded = huggingface.load(tmp_path / "theirs")
    assert loaded.config == config
    assert (loaded.tokenizer, loaded.contract) == (None, None)
    assert_equal_trees(loaded.params, our_tree(config, model.state_dict()))

    huggingface.save(tmp_path / "ours", config, loaded.params, None, None)
    again = read_torch(tmp_path / "ours")
    assert again.config.scale_decoder_outputs == config.scale_decoder_outputs
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    tokens = ragged_tokens(3, 9, config.vocab_size)
    expected = torch_logits(again, tokens, LABELS).detach().numpy()
    found = jax.jit(functools.partial(apply, config))(loaded.params, tokens, LABELS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("variant", ["v1.0", "v1.1"])
def test_bfloat16_export_rounds_and_says_so(variant, tmp_path):
    config = config_of(variant)
    params = init_params(config, 0)
    huggingface.save(tmp_path / "out", config, params, None, None, dtype="bfloat16")
    model = read_torch(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    loaded = huggingface.load(tmp_path / "out")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(loaded.params))
    assert_equal_trees(loaded.params, rounded)
    assert_equal_trees(our_tree(config, {k: v.float() for k, v in model.state_dict().items()}), rounded)


@pytest.mark.parametrize("variant", ["v1.0", "v1.1"])
def test_shards_are_written_and_read(variant, tmp_path):
    config = config_of(variant)
    params = init_params(config, 0)
    huggingface.save(tmp_path / "out", config, params, None, None, max_shard_bytes=5000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * config.num_params
    for file in files:
        shard = safetensors.numpy.load_file(file)
        assert {index["weight_map"][name] for name in shard} == {file.name}
        assert sum(t.nbytes for t in shard.values()) <= 5000
    assert_equal_trees(huggingface.load(tmp_path / "out").params, params)
    state = read_torch(tmp_path / "out").state_dict()
    assert_equal_trees(our_tree(config, state), params)


def test_shards_of_transformers_are_read(tmp_path):
    config = config_of("v1.0")
    model = write_torch(tmp_path / "theirs", config, max_shard_size="5KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    loaded = huggingface.load(tmp_path / "theirs")
    assert_equal_trees(loaded.params, our_tree(config, model.state_dict()))


def test_tying_is_decided_by_the_weights(tmp_path):
    """transformers 5 writes `tie_word_embeddings: true` for every T5."""
    untied = config_of("v1.1")
    write_torch(tmp_path / "untied", untied)
    edit_config(tmp_path / "untied", tie_word_embeddings=True)
    assert huggingface.load(tmp_path / "untied").config == untied
    # A head equal to the embedding under a config that says "tied" is a redundant copy.
    tied = config_of("v1.0")
    write_torch(tmp_path / "tied", tied)

    def copy_embedding(tensors):
        for name in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            tensors[name] = tensors["shared.weight"].copy()

    rewrite(tmp_path / "tied", copy_embedding)
    assert huggingface.load(tmp_path / "tied").config == tied
    # No head at all is tied whatever the config says, and stays unscaled.
    edit_config(tmp_path / "tied", tie_word_embeddings=False, scale_decoder_outputs=None)
    rewrite(tmp_path / "tied", lambda tensors: tensors.pop("lm_head.weight"))
    config = huggingface.load(tmp_path / "tied").config
    assert (config.tie_word_embeddings, config.scale_decoder_outputs) == (True, False)


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "lm_head.weight"])
def test_embedding_is_found_under_its_other_names(name, tmp_path):
    config = config_of("v1.0")
    model = write_torch(tmp_path / "m", config)
    rewrite(tmp_path / "m", lambda tensors: tensors.update({name: tensors.pop("shared.weight")}))
    assert_equal_trees(huggingface.load(tmp_path / "m").params, our_tree(config, model.state_dict()))


def test_table_that_no_release_used_is_ignored(tmp_path):
    config = config_of("v1.0")
    write_torch(tmp_path / "m", config)
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    rewrite(tmp_path / "m", lambda tensors: tensors.update({name: np.ones((8, 4), np.float32)}))
    assert huggingface.load(tmp_path / "m").config == config


def test_float16_weights_become_float32(tmp_path):
    config = config_of("v1.0")
    write_torch(tmp_path / "m", config)

    def halve(tensors):
        tensors.update({name: value.astype(np.float16) for name, value in tensors.items()})

    rewrite(tmp_path / "m", halve)
    assert {leaf.dtype for leaf in jax.tree.leaves(huggingface.load(tmp_path / "m").params)} == {
        jnp.dtype("float32")
    }


def test_missing_unexpected_and_misshaped_tensors_are_one_error(tmp_path):
    config = config_of("v1.0")
    write_torch(tmp_path / "m", config)

    def damage(tensors):
        del tensors["encoder.final_layer_norm.weight"]
        tensors["encoder.adapter.weight"] = np.ones((2, 5), np.float32)
        tensors["decoder.final_layer_norm.weight"] = np.ones(7, np.float32)

    rewrite(tmp_path / "m", damage)
    with pytest.raises(InputError) as error:
        huggingface.load(tmp_path / "m")
    lines = str(error.value).splitlines()
    assert lines[0].startswith(str(tmp_path / "m" / "model.safetensors"))
    assert [line for line in lines if line[0] in "+-"] == [
        "- decoder.final_layer_norm.weight (16,)",
        "+ decoder.final_layer_norm.weight (7,)",
        "+ encoder.adapter.weight (2, 5)",
        "- encoder.final_layer_norm.weight (16,)",
    ]


def test_two_different_embeddings_are_refused(tmp_path):
    write_torch(tmp_path / "m", config_of("v1.0"))
    other = np.zeros((SIZES["vocab_size"], SIZES["d_model"]), np.float32)
    rewrite(tmp_path / "m", lambda tensors: tensors.update({"decoder.embed_tokens.weight": other}))
    with pytest.raises(InputError, match=r"decoder.embed_tokens.weight differs from shared.weight"):
        huggingface.load(tmp_path / "m")


def test_incomplete_folders_say_what_to_do(tmp_path):
    folder = tmp_path / "m"
    config = config_of("v1.0")
    write_torch(folder, config, max_shard_size="5KB")
    index = folder / "model.safetensors.index.json"
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=rf"{shard.name}: cannot read it .*named by model.safetensors.index"):
        huggingface.load(folder)
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name}: cannot read it .*Download or export"):
        huggingface.load(folder)
    shard.write_bytes(whole)
    listed = json.loads(index.read_text())
    listed["weight_map"]["a.b"] = shard.name
    index.write_text(json.dumps(listed))
    with pytest.raises(InputError, match=r"index.json: its files lack the tensors a.b"):
        huggingface.load(folder)
    index.write_text("{}")
    with pytest.raises(InputError, match=r"index.json: it has no weight_map"):
        huggingface.load(folder)
    index.unlink()
    with pytest.raises(InputError, match=r"neither model.safetensors nor"):
        huggingface.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"only pytorch_model.bin.*save_pretrained"):
        huggingface.load(folder)
    (folder / "config.json").write_text('{\n"d_model": }')
    with pytest.raises(InputError, match=r"config.json:2: not valid JSON"):
        huggingface.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config.json: it holds a list"):
        huggingface.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json: no such file"):
        huggingface.load(folder)
    with pytest.raises(InputError, match=r"pytorch_model.bin: it is a file.*the folder that holds it"):
        huggingface.load(folder / "pytorch_model.bin")


def test_paths_and_ids_that_do_not_exist(tmp_path):
    (tmp_path / "student").mkdir()
    with pytest.raises(InputError, match=r"no such folder.*Did you mean 'student'"):
        huggingface.load(tmp_path / "studnet")
    # The session is offline.
    with pytest.raises(InputError, match=r"nobody/nothing: .*was not reached.*hf download nobody/nothing"):
        huggingface.load("nobody/nothing", cache_dir=tmp_path)


def test_hub_ids_are_read_from_the_local_cache(tmp_path):
    config = config_of("v1.0")
    repository = tmp_path / "models--somebody--monot5-tiny"
    write_torch(repository / "snapshots" / "abc", config)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    loaded = huggingface.load("somebody/monot5-tiny", cache_dir=tmp_path)
    assert (loaded.config, loaded.source) == (config, "somebody/monot5-tiny")
    assert loaded.contract == preset("monot5")


def test_place_puts_every_parameter(tmp_path):
    config = config_of("v1.0")
    write_torch(tmp_path / "m", config)
    seen = {}

    def place(path, value):
        seen[path] = value.shape
        return value.astype(jnp.bfloat16)

    params = huggingface.load(tmp_path / "m", place=place).params
    assert seen == {path: leaf.shape for path, leaf in trees.flatten(params).items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def with_tokenizer(folder):
    folder.mkdir()
    tokenizer = Tokenizer.from_pretrained(write_spiece(folder))
    config = T5Config(**{**SIZES, "vocab_size": tokenizer.vocab_size})
    return config, init_params(config, 0), tokenizer


def test_tokenizer_and_contract_travel_with_the_model(tmp_path):
    config, params, tokenizer = with_tokenizer(tmp_path / "vocabulary")
    contract = preset("inranker").replace(max_length=77)
    huggingface.save(tmp_path / "out", config, params, tokenizer, contract)
    loaded = load_model(tmp_path / "out")
    assert isinstance(loaded, LoadedModel)
    assert loaded.contract == contract
    texts = ["Query: a cat Document: dogs Relevant:", "false true"]
    assert loaded.tokenizer is not None
    expected = tokenizer.encode_batch(texts)
    assert loaded.tokenizer.encode_batch(texts) == expected
    for kind in (transformers.AutoTokenizer, transformers.T5Tokenizer):
        theirs = kind.from_pretrained(tmp_path / "out")
        assert theirs(texts, add_special_tokens=False)["input_ids"] == expected


def test_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
    config = config_of("v1.0")
    old, new = init_params(config, 0), init_params(config, 1)
    huggingface.save(tmp_path / "out", config, old, None, None)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", fail)
        with pytest.raises(OSError, match="no space left"):
            huggingface.save(tmp_path / "out", config, new, None, None)
    assert_equal_trees(huggingface.load(tmp_path / "out").params, old)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    huggingface.save(tmp_path / "out", config, new, None, None, max_shard_bytes=5000)
    huggingface.save(tmp_path / "out", config, new, None, None)
    assert_equal_trees(huggingface.load(tmp_path / "out").params, new)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_save_refuses_what_it_must_not_write(tmp_path):
    config = config_of("v1.0")
    params = init_params(config, 0)
    with pytest.raises(InputError, match=r"dtype is 'float16'.*float32, bfloat16"):
        huggingface.save(tmp_path / "out", config, params, None, None, dtype="float16")
    with pytest.raises(InputError, match=r"do not belong to this T5Config"):
        huggingface.save(tmp_path / "out", config_of("v1.1"), params, None, None)
    assert not list(tmp_path.iterdir())
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"not an exported model's: thesis.tex"):
        huggingface.save(tmp_path, config, params, None, None)
    with pytest.raises(InputError, match=r"thesis.tex: it is a file"):
        huggingface.save(tmp_path / "thesis.tex", config, params, None, None)


def test_export_binary_converts_and_reports(tmp_path, capsys):
    config = config_of("v1.1")
    write_torch(tmp_path / "in", config)
    arguments = [f"--checkpoint={tmp_path / 'in'}", f"--output_dir={tmp_path / 'out'}", "--dtype=bfloat16"]
    export.main(arguments)
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert {p.dtype for p in read_torch(tmp_path / "out").parameters()} == {torch.bfloat16}
    with pytest.raises(SystemExit) as stop:
        export.main([f"--checkpoint={tmp_path / 'inn'}", f"--output_dir={tmp_path / 'out'}"])
    assert stop.value.code == 2
    assert "Did you mean 'in'?" in capsys.readouterr().err
