"""T5 teachers beside the reranker they are, on one device and divided over several."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from inranker_jax import Reranker
from inranker_jax.checkpoints import huggingface, load_model, t5x_save
from inranker_jax.errors import InputError
from inranker_jax.labeling.teachers import check_model, open_teacher, parse_spec
from inranker_jax.labeling.teachers.t5 import T5Teacher
from inranker_jax.models import T5Config, init_params
from inranker_jax.prompts import Tokenizer, preset
from tests.labeling.tiny_teachers import make_pairs
from tests.tiny_vocabulary import write_spiece

CONTRACT = preset("monot5").replace(max_length=64)
PAIRS = make_pairs(30, longest=20)
TEXTS = [(pair.query, pair.document) for pair in PAIRS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("t5")
    tokenizer = Tokenizer.from_pretrained(write_spiece(root / "vocabulary"))
    config = T5Config(
        vocab_size=512,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    huggingface.save(root / "monot5-tiny", config, init_params(config, seed=0), tokenizer, CONTRACT)
    return root / "monot5-tiny"


@pytest.fixture(scope="module")
def expected(folder: pathlib.Path) -> np.ndarray:
    return np.concatenate(list(Reranker.from_pretrained(folder).logits_of_pairs(TEXTS)))


def labels_of(spec: str) -> list[np.ndarray]:
    return list(open_teacher(spec).logits([PAIRS[:13], PAIRS[13:14], PAIRS[14:]]))


def test_labels_are_the_rerankers_logits(folder: pathlib.Path, expected: np.ndarray) -> None:
    parts = labels_of(f"t5:{folder}")
    assert [part.shape for part in parts] == [(13, 2), (1, 2), (16, 2)]
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-5)
    assert np.std(expected[:, 1] - expected[:, 0]) > 1e-3


def test_a_checkpoint_of_t5x_is_a_teacher(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    loaded = load_model(folder, on_host=True)
    config = dataclasses.replace(loaded.config, scale_decoder_outputs=False)  # as T5X has it
    huggingface.save(tmp_path / "ours", config, loaded.params, loaded.tokenizer, CONTRACT)
    t5x_save.save(tmp_path / "t5x", config, loaded.params, 7, loaded.tokenizer, CONTRACT)
    ours, theirs = (np.concatenate(labels_of(f"t5:{tmp_path}/{name}")) for name in ("ours", "t5x"))
    np.testing.assert_array_equal(theirs, ours)
    assert open_teacher(f"{tmp_path}/t5x").identity == open_teacher(f"{tmp_path}/ours").identity


def test_a_teacher_without_a_contract_is_told_before_its_weights(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"stores no scoring contract.*\?contract=monot5"):
        check_model(parse_spec(f"{tmp_path}/model"))
    check_model(parse_spec(f"{tmp_path}/model?contract=monot5"))
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match=r"model_type is 'bert'.*cross-encoder:"):
        check_model(parse_spec(f"{tmp_path}/model"))


@pytest.mark.parametrize("mesh", ["fsdp=4&model=2", "data=2&fsdp=2&model=2", "model=4"])
def test_divided_over_devices(folder: pathlib.Path, expected: np.ndarray, mesh: str) -> None:
    teacher = open_teacher(f"t5:{folder}?{mesh}&tokens_per_call=256")
    assert isinstance(teacher, T5Teacher)
    np.testing.assert_allclose(
        np.concatenate(list(teacher.logits([PAIRS[:20], PAIRS[20:]]))), expected, atol=2e-5
    )
    kernel = teacher._load()[0]._params["encoder"]["layers_1"]["mlp"]["wi_0"]["kernel"]
    ways = teacher._mesh.shape["fsdp"] * teacher._mesh.shape["model"]
    assert kernel.addressable_shards[0].data.size * ways == kernel.size
    assert teacher.provenance["devices"] == 8
    assert teacher.identity == open_teacher(f"t5:{folder}").identity


def test_no_device_ever_holds_a_divided_parameter_whole(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3B and 11B fit only if parameters go from the file to their shards."""
    put: list[tuple[tuple[int, ...], str]] = []
    device_put = jax.device_put

    def spy(value: np.ndarray, sharding: object) -> object:
        if isinstance(value, np.ndarray):
            put.append((value.shape, str(value.dtype)))
            assert isinstance(sharding, jax.sharding.NamedSharding)
        return device_put(value, sharding)

    monkeypatch.setattr(jax, "device_put", spy)
    open_teacher(f"t5:{folder}?fsdp=8&data=1&dtype=bfloat16").identity  # noqa: B018
    assert ((32, 64), "bfloat16") in put
    assert ((512, 32), "float32") in put  # the embedding is looked up in float32


@pytest.mark.parametrize(
    "options", ["layout=packed", "layout=packed&row_length=100&slots=3", "layout=padded"]
)
def test_layouts(folder: pathlib.Path, expected: np.ndarray, options: str) -> None:
    """Labels up to rounding, the same identity, and chunks that do not see each other."""
    teacher = open_teacher(f"t5:{folder}?{options}&tokens_per_call=300")
    parts = list(teacher.logits([PAIRS[:13], PAIRS[13:14], PAIRS[14:]]))
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-5)
    np.testing.assert_array_equal(next(teacher.logits([PAIRS[14:]])), parts[2])
    assert teacher.identity == open_teacher(f"t5:{folder}").identity
    assert teacher.provenance["layout"] == options.split("&")[0].removeprefix("layout=")


def test_bfloat16(folder: pathlib.Path, expected: np.ndarray) -> None:
    narrow = np.concatenate(labels_of(f"t5:{folder}?dtype=bfloat16"))
    whole = np.concatenate(
        list(
            Reranker.from_pretrained(folder, dtype="bfloat16").logits_of_chunks(
                [TEXTS[:13], TEXTS[13:14], TEXTS[14:]]
            )
        )
    )
    np.testing.assert_array_equal(narrow, whole)
    assert 0 < np.abs(narrow - expected).max() < 0.2


def test_identity(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    teacher = open_teacher(f"t5:{folder}")
    identity = teacher.identity
    json.dumps([identity, teacher.provenance])
    assert identity["kind"] == "t5"
    assert identity["contract"]["name"] == "monot5"
    # Another place and another file layout, the same model.
    loaded = huggingface.load(folder)
    huggingface.save(
        tmp_path / "copy",
        loaded.config,
        loaded.params,
        loaded.tokenizer,
        loaded.contract,
        max_shard_bytes=20000,
    )
    assert open_teacher(f"t5:{tmp_path / 'copy'}").identity == identity
    # One parameter changed in the last bits, another contract, another precision.
    loaded.params["encoder"]["encoder_norm"]["scale"] *= np.float32(1 + 1e-6)
    huggingface.save(tmp_path / "other", loaded.config, loaded.params, loaded.tokenizer, loaded.contract)
    others = [f"t5:{tmp_path / 'other'}", f"t5:{folder}?contract=inranker", f"t5:{folder}?dtype=bfloat16"]
    keys = [json.dumps(open_teacher(spec).identity, sort_keys=True) for spec in others]
    assert len({*keys, json.dumps(identity, sort_keys=True)}) == 4


def test_a_single_logit_becomes_two(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    single = preset("rankt5").replace(max_length=64, label_pieces=("▁true",))
    (tmp_path / "rank.json").write_text(json.dumps(single.to_dict()))
    parts = np.concatenate(labels_of(f"t5:{folder}?contract={tmp_path / 'rank.json'}"))
    logits = np.concatenate(list(Reranker.from_pretrained(folder, contract=single).logits_of_pairs(TEXTS)))
    assert logits.shape == (30, 1)
    np.testing.assert_allclose(parts[:, 1] - parts[:, 0], logits[:, 0], atol=1e-5)
    np.testing.assert_array_equal(parts[:, 1], -parts[:, 0])


def test_a_training_run_is_a_teacher_too(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    from inranker_jax.checkpoints.native import Checkpointer, ModelDescription

    loaded = huggingface.load(folder)
    assert loaded.tokenizer is not None
    checkpointer = Checkpointer(str(tmp_path), ModelDescription(loaded.config, CONTRACT), loaded.tokenizer)
    checkpointer.save(3, {"params": loaded.params}, {})
    checkpointer.close()
    identity = open_teacher(f"t5:{tmp_path}").identity
    assert identity["parameters"] == open_teacher(f"t5:{folder}").identity["parameters"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("contract=monot6", "no scoring preset 'monot6'"),
        ("fsdp=3&model=2", "needs 6 devices"),
        ("layout=packd", "Did you mean 'packed'"),
        ("row_length=0", "row_length='0': expected a number of at least 1"),
    ],
)
def test_bad_options(folder: pathlib.Path, options: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_teacher(f"t5:{folder}?{options}")


def test_another_architecture_is_told_how_to_say_its_kind(tmp_path: pathlib.Path) -> None:
    model = tmp_path / "minilm"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    with pytest.raises(InputError, match="model_type is 'bert'") as raised:
        _ = open_teacher(str(model)).identity
    assert str(raised.value).startswith(f"{model / 'config.json'}: model_type")
    assert f"cross-encoder:{model} or bi-encoder:{model}." in str(raised.value)


def test_no_contract_is_known(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    loaded = huggingface.load(folder)
    huggingface.save(tmp_path / "plain", loaded.config, loaded.params, loaded.tokenizer, None)
    with pytest.raises(InputError, match=r"stores no scoring contract.*\?contract=monot5"):
        open_teacher(f"t5:{tmp_path / 'plain'}").identity  # noqa: B018
    huggingface.save(tmp_path / "mute", loaded.config, loaded.params, None, CONTRACT)
    with pytest.raises(InputError, match="has no tokenizer"):
        open_teacher(f"t5:{tmp_path / 'mute'}").identity  # noqa: B018
