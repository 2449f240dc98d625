"""Cross-encoders and bi-encoders beside torch's and sentence-transformers' own computation."""

from __future__ import annotations

import itertools
import json
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest

from inranker_jax.errors import InputError
from inranker_jax.labeling.teachers import open_teacher, torch_calls
from tests.labeling.tiny_teachers import make_pairs, write_bert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
library = pytest.importorskip("sentence_transformers")

PAIRS = make_pairs(40)


def texts() -> list[tuple[str, str]]:
    return [(pair.query, pair.document) for pair in PAIRS]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_bert(tmp_path_factory.mktemp("models") / "single", 1)


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_bert(tmp_path_factory.mktemp("models") / "triple", 3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_bert(tmp_path_factory.mktemp("models") / "encoder", None)


@pytest.fixture(scope="module")
def sentence_model(encoder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    models = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    transformer = models.Transformer(str(encoder))
    modules = [transformer, models.Pooling(32, pooling_mode="mean"), models.Normalize()]
    folder = tmp_path_factory.mktemp("models") / "sentences"
    library.SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder


def directly(folder: pathlib.Path) -> np.ndarray:
    """One pair at a time, no padding: what the model says of a pair and nothing else."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = []
    for query, document in texts():
        inputs = tokenizer(query, document, truncation=True, max_length=48, return_tensors="pt")
        with torch.inference_mode():
            rows.append(model(**inputs).logits[0].numpy())
    return np.stack(rows)


def labels_of(spec: str, *sizes: int) -> list[np.ndarray]:
    """Labels of PAIRS in chunks of these sizes."""
    bounds = np.cumsum([0, *sizes])
    teacher = open_teacher(spec)
    chunks = [PAIRS[start:stop] for start, stop in itertools.pairwise(bounds)]
    found = list(teacher.logits(iter(chunks)))
    teacher.close()
    return found


def test_single_logit_equals_torch(single: pathlib.Path) -> None:
    (labels,) = labels_of(f"cross-encoder:{single}", 40)
    expected = directly(single)[:, 0]
    assert labels.shape == (40, 2)
    assert labels.dtype == np.float32
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(labels[:, 1] - labels[:, 0], expected, atol=2e-5)
    np.testing.assert_allclose(labels.sum(axis=-1), 0, atol=1e-6)


def test_logits_equal_sentence_transformers(single: pathlib.Path) -> None:
    theirs = library.CrossEncoder(str(single), device="cpu").predict(
        texts(), activation_fn=torch.nn.Identity(), show_progress_bar=False
    )
    (labels,) = labels_of(f"cross-encoder:{single}", 40)
    np.testing.assert_allclose(labels[:, 1] - labels[:, 0], theirs, atol=2e-5)


def test_two_of_three_outputs(triple: pathlib.Path) -> None:
    (labels,) = labels_of(f"cross-encoder:{triple}?false=2&true=0", 40)
    np.testing.assert_allclose(labels, directly(triple)[:, [2, 0]], atol=2e-5)
    with pytest.raises(InputError, match=r"3 outputs. Say which two to read: \?false=I&true=J"):
        open_teacher(f"cross-encoder:{triple}")
    with pytest.raises(InputError, match="numbered from 0"):
        open_teacher(f"cross-encoder:{triple}?false=0&true=3")


def test_cross_encoder_values_do_not_depend_on_the_chunk(single: pathlib.Path) -> None:
    (whole,) = labels_of(f"cross-encoder:{single}", 40)
    parts = labels_of(f"cross-encoder:{single}", 7, 0, 1, 32)
    assert [len(part) for part in parts] == [7, 0, 1, 32]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("tokens", [48, 500, 2048])
def test_batches_of_fixed_shapes(single: pathlib.Path, tokens: int) -> None:
    """As on an accelerator: near the single calls, and equal for an equal chunk whatever came before it."""
    spec = f"cross-encoder:{single}?tokens_per_call={tokens}"
    (whole,) = labels_of(spec, 40)
    np.testing.assert_allclose(whole, labels_of(f"cross-encoder:{single}", 40)[0], atol=2e-5)
    teacher = open_teacher(spec)
    again = list(teacher.logits([PAIRS[3:9], PAIRS, PAIRS[30:], PAIRS]))
    np.testing.assert_array_equal(again[1], whole)
    np.testing.assert_array_equal(again[3], whole)


def test_bfloat16_is_near_and_another_teacher(single: pathlib.Path) -> None:
    (exact,) = labels_of(f"cross-encoder:{single}", 40)
    (narrow,) = labels_of(f"cross-encoder:{single}?dtype=bfloat16", 40)
    assert 0 < np.abs(exact - narrow).max() < 0.1 * np.abs(exact).max() + 0.05
    identities = [open_teacher(f"cross-encoder:{single}{o}").identity for o in ("", "?dtype=bfloat16")]
    assert identities[0] != identities[1]


def test_identity_follows_the_files_not_the_place(single: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(single, copy)
    (copy / "README.md").write_text("a card")
    (copy / "training_args.bin").write_bytes(b"pickled")
    shutil.copytree(single, copy / "checkpoint-500")
    identity = open_teacher(f"cross-encoder:{single}").identity
    assert open_teacher(f"cross-encoder:{copy}").identity == identity
    json.dumps(identity)
    other = write_bert(tmp_path / "other", 1, seed=1)
    assert open_teacher(f"cross-encoder:{other}").identity != identity
    assert open_teacher(f"cross-encoder:{single}?max_length=20").identity != identity


def test_bi_encoder_identity(sentence_model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(sentence_model, copy)
    spec = f"bi-encoder:{copy}"
    identity = open_teacher(spec).identity
    assert open_teacher(f"bi-encoder:{sentence_model}").identity == identity
    for option in (
        "scale=3",
        "offset=1",
        "similarity=dot",
        "query_prompt=a",
        "dtype=bfloat16",
        "max_length=9",
    ):
        assert open_teacher(f"{spec}?{option}").identity != identity
    pooling = copy / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text() + "\n")
    assert open_teacher(spec).identity != identity


def test_a_hub_id_offline() -> None:
    with pytest.raises(
        InputError, match=r"nobody/nothing: no folder of that name is here.*hub was not reached"
    ):
        open_teacher("cross-encoder:nobody/nothing")


def test_an_encoder_without_a_head_is_refused(encoder: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"lack classifier\.bias.*random numbers"):
        open_teacher(f"cross-encoder:{encoder}")


def test_folders_that_hold_no_teacher(tmp_path: pathlib.Path, encoder: pathlib.Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_teacher(f"cross-encoder:{tmp_path}/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"cannot load it as a sequence-classification"):
        open_teacher(f"cross-encoder:{tmp_path}/empty")
    with pytest.raises(InputError, match=r"no modules\.json"):
        open_teacher(f"bi-encoder:{encoder}")


def test_a_limit_beyond_the_model(single: pathlib.Path) -> None:
    with pytest.raises(InputError, match="max_length=49, but the model reads 48 tokens"):
        open_teacher(f"cross-encoder:{single}?max_length=49")


def test_a_device_that_is_not_there(single: pathlib.Path) -> None:
    with pytest.raises(InputError, match="device='nodevice' cannot be used"):
        open_teacher(f"cross-encoder:{single}?device=nodevice")


@pytest.mark.parametrize("kind", ["cross-encoder", "bi-encoder"])
def test_a_missing_package_names_the_extra(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install 'inranker_jax\[teachers\]'"):
        open_teacher(f"{kind}:x")


def test_nan_names_the_pair(single: pathlib.Path, tmp_path: pathlib.Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(single, broken)
    weights = load_file(broken / "model.safetensors")
    weights["classifier.bias"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"query 'q0', document 'd0' \(40 of 40 pairs are not finite\)"):
        labels_of(f"cross-encoder:{broken}", 40)


def cosines(folder: pathlib.Path, prompts: tuple[str, str] = ("", "")) -> np.ndarray:
    model = library.SentenceTransformer(str(folder), device="cpu")
    left = model.encode([prompts[0] + query for query, _ in texts()], show_progress_bar=False)
    right = model.encode([prompts[1] + document for _, document in texts()], show_progress_bar=False)
    return (left * right).sum(-1) / np.linalg.norm(left, axis=-1) / np.linalg.norm(right, axis=-1)


def test_bi_encoder_margins_are_scaled_cosines(sentence_model: pathlib.Path) -> None:
    (labels,) = labels_of(f"bi-encoder:{sentence_model}?scale=12&offset=-4.5", 40)
    expected = cosines(sentence_model)
    assert np.std(expected) > 0.02
    np.testing.assert_allclose(labels[:, 1] - labels[:, 0], 12 * expected - 4.5, atol=2e-5)
    (default,) = labels_of(f"bi-encoder:{sentence_model}", 40)
    np.testing.assert_allclose(default[:, 1] - default[:, 0], 20 * expected, atol=2e-5)


def test_bi_encoder_prompts(sentence_model: pathlib.Path) -> None:
    spec = f"bi-encoder:{sentence_model}?query_prompt=wing%20&document_prompt=heat%20&scale=1"
    (labels,) = labels_of(spec, 40)
    expected = cosines(sentence_model, ("wing ", "heat "))
    np.testing.assert_allclose(labels[:, 1] - labels[:, 0], expected, atol=2e-6)
    assert np.abs(expected - cosines(sentence_model)).max() > 1e-3


@pytest.mark.parametrize("cache", [1, 9, 1000])
def test_the_cache_changes_no_value(sentence_model: pathlib.Path, cache: int) -> None:
    spec = f"bi-encoder:{sentence_model}?cache={cache}"
    (whole,) = labels_of(spec, 40)
    np.testing.assert_array_equal(np.concatenate(labels_of(spec, 3, 1, 30, 6)), whole)
    teacher = open_teacher(spec)
    order = [*PAIRS[20:], *PAIRS[:20]]
    chunks = list(teacher.logits([order[:25], order[25:], PAIRS]))
    np.testing.assert_array_equal(np.roll(np.concatenate(chunks[:2]), 20, axis=0), whole)
    np.testing.assert_array_equal(chunks[2], whole)


def test_batches_keep_no_embeddings(sentence_model: pathlib.Path) -> None:
    spec = f"bi-encoder:{sentence_model}?tokens_per_call=200"
    (whole,) = labels_of(spec, 40)
    np.testing.assert_allclose(whole, labels_of(f"bi-encoder:{sentence_model}", 40)[0], atol=2e-5)
    teacher = open_teacher(spec)
    np.testing.assert_array_equal(list(teacher.logits([PAIRS[5:], PAIRS]))[1], whole)


def test_threads_are_given_back(single: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inranker_jax.labeling.teachers.torch_calls import Runner

    monkeypatch.setattr(Runner, "_open", 0)
    torch.set_num_threads(3)
    first, second = open_teacher(f"cross-encoder:{single}"), open_teacher(f"cross-encoder:{single}")
    assert torch.get_num_threads() == 1
    first.close()
    assert torch.get_num_threads() == 1
    second.close()
    second.close()
    assert torch.get_num_threads() == 3


def test_texts_are_encoded_once(sentence_model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inranker_jax.labeling.teachers import bi_encoder

    seen: list[str] = []
    features = bi_encoder._features

    def spy(model: object, prompted: list[str]) -> object:
        seen.extend(prompted)
        return features(model, prompted)

    monkeypatch.setattr(bi_encoder, "_features", spy)
    teacher = open_teacher(f"bi-encoder:{sentence_model}")
    list(teacher.logits([PAIRS + PAIRS, PAIRS]))
    queries, documents = ({text for text in column} for column in zip(*texts(), strict=True))
    assert len(seen) == len(queries) + len(documents)


def test_pooling_for_a_plain_encoder(encoder: pathlib.Path, sentence_model: pathlib.Path) -> None:
    (mean,) = labels_of(f"bi-encoder:{encoder}?pooling=mean", 40)
    (cls,) = labels_of(f"bi-encoder:{encoder}?pooling=cls", 40)
    np.testing.assert_allclose(mean, labels_of(f"bi-encoder:{sentence_model}", 40)[0], atol=2e-5)
    assert np.abs(mean - cls).max() > 1e-2
    with pytest.raises(InputError, match="Leave pooling=mean out"):
        open_teacher(f"bi-encoder:{sentence_model}?pooling=mean")


def test_static_embeddings_are_left_to_the_library(tmp_path: pathlib.Path, encoder: pathlib.Path) -> None:
    """A model without attention masks: chunk by chunk through the library's own encode."""
    models = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder).backend_tokenizer
    weights = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), 8)).astype(np.float32)
    static = library.SentenceTransformer(
        modules=[models.StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu"
    )
    static.save(str(tmp_path / "static"))
    parts = labels_of(f"bi-encoder:{tmp_path / 'static'}?scale=1", 25, 15)
    margins = np.concatenate(parts)[:, 1] * 2
    np.testing.assert_allclose(margins, cosines(tmp_path / "static"), atol=2e-6)


@pytest.mark.parametrize(
    ("environment", "gpus", "expected"),
    [
        ({}, 8, "cuda:0"),
        ({"SLURM_LOCALID": "5"}, 8, "cuda:5"),
        ({"SLURM_LOCALID": "5"}, 1, "cuda:0"),  # Slurm shows each process its own only
        ({"LOCAL_RANK": "3", "SLURM_LOCALID": "0"}, 4, "cuda:3"),
    ],
)
def test_processes_of_one_host_take_different_gpus(
    environment: dict[str, str], gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in torch_calls._LOCAL_INDEX:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cuda = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: gpus)
    torch = types.SimpleNamespace(cuda=cuda, device=str, empty=lambda size, device: None)
    assert torch_calls.pick_device(torch, None, "t") == expected
    assert torch_calls.pick_device(torch, "cuda:1", "t") == "cuda:1"
