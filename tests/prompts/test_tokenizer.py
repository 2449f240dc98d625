"""Ids beside transformers' T5Tokenizer, on every kind of text and every layout of a tokenizer folder."""

from __future__ import annotations

import json
import pathlib
import random
import shutil
import time

import numpy as np
import pytest
import sentencepiece

from inranker_jax.errors import InputError
from inranker_jax.prompts import Tokenizer
from tests.prompts.conftest import SENTENCES
from tests.tiny_vocabulary import write_spiece

transformers = pytest.importorskip("transformers")


def reference_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False).input_ids


def assert_same(folder: pathlib.Path, texts: list[str] = SENTENCES) -> Tokenizer:
    reference = transformers.T5Tokenizer.from_pretrained(str(folder))
    ours = Tokenizer.from_pretrained(folder)
    for text, ids, expected in zip(
        texts, ours.encode_batch(texts), reference_ids(reference, texts), strict=True
    ):
        assert ids == expected, text[:80]
    assert ours.vocab_size == len(reference)
    assert (ours.pad_id, ours.eos_id, ours.unk_id) == (
        reference.pad_token_id,
        reference.eos_token_id,
        reference.unk_token_id,
    )
    return ours


def test_ids_equal_transformers(folder: pathlib.Path) -> None:
    assert_same(folder)


def test_ids_equal_transformers_on_random_unicode(folder: pathlib.Path) -> None:
    rng = random.Random(0)
    pools = [
        list(range(0x20, 0x7F)),
        list(range(0xC0, 0x180)),
        [0x20, 0x20, 0x0A, 0x200B, 0x200D, 0xA0, 0x301, 0x2581],
        list(range(0x1F600, 0x1F640)),
        [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF],
    ]
    texts = [
        "".join(chr(rng.choice(rng.choice(pools))) for _ in range(rng.randrange(60))) for _ in range(300)
    ]
    assert_same(folder, texts)


def test_hundred_thousand_characters(folder: pathlib.Path) -> None:
    texts = [
        ("Não há ação sem reação, said the quick fox. " * 3000)[:100_000],
        "abcd" * 25_000,
        "😀é" * 50_000,
        "\u200b" * 100_000,
    ]
    assert all(len(text) == 100_000 for text in texts)
    started = time.perf_counter()
    Tokenizer.from_pretrained(folder).encode_batch(texts)
    # About 0.1 s on a free core; a quadratic tokeniser would need minutes.
    assert time.perf_counter() - started < 20
    assert_same(folder, texts)


def test_ids_equal_sentencepiece_itself(trained_folder: pathlib.Path) -> None:
    """The piece sequence of plain text is SentencePiece's own, so both sides of the other tests are right."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(trained_folder / "spiece.model"))
    ours = Tokenizer.from_pretrained(trained_folder)
    for text in SENTENCES[:4]:
        assert ours.encode_batch([text])[0] == reference.encode(text)


def test_real_vocabulary_has_the_published_ids(t5_folder: pathlib.Path) -> None:
    ours = Tokenizer.from_pretrained(t5_folder)
    expected = {"▁true": 1176, "▁false": 6136, "<extra_id_0>": 32099, "<extra_id_10>": 32089, "</s>": 1}
    assert {piece: ours.piece_to_id(piece) for piece in expected} == expected
    assert ours.vocab_size == 32100
    assert ours.piece_to_id("▁nosuchpiece") is None


def test_user_defined_pieces_of_the_vocabulary(tmp_path: pathlib.Path) -> None:
    """mT5 keeps its sentinels inside the SentencePiece file, with extra_ids = 0."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from", "the quick brown fox"] * 5),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=50,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=["<sep>", "▁<extra_id_1>", "<extra_id_0>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    texts = [*TEXTS, "some<sep>words <sep> to ▁<extra_id_1> x", "<extra_id_1><extra_id_0>"]
    for config in CONFIGS["mt5"], CONFIGS["no_extra_ids"], {"extra_ids": 2}:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert_same(tmp_path, texts)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(
        InputError, match=r"extra_ids is 100, but .* names 2 <extra_id_\*> pieces.*extra_ids 0 or 2"
    ):
        Tokenizer.from_pretrained(tmp_path)


CONFIGS: dict[str, dict] = {
    "extra_ids": {"extra_ids": 7},
    "no_extra_ids": {"extra_ids": 0},
    "mt5": {"extra_ids": 0, "additional_special_tokens": None, "tokenizer_class": "T5Tokenizer"},
    "listed": {"extra_ids": 3, "additional_special_tokens": ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]},
    "own_token": {"additional_special_tokens": ["<doc>"], "model_max_length": 512},
    "own_named_token": {"image_token": "<img>"},
    "named": {"eos_token": "</s>", "pad_token": {"__type": "AddedToken", "content": "<pad>", "lstrip": True}},
    "decoder": {
        "extra_ids": 2,
        "added_tokens_decoder": {
            "0": {
                "content": "<pad>",
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
            },
            "401": {"content": "<doc>", "lstrip": True, "normalized": False, "special": True},
            "402": {"content": "fox", "normalized": True, "special": False},
        },
    },
}
TEXTS = [
    *SENTENCES,
    "a <doc> b<doc>c <img> d",
    "<extra_id_1> x<extra_id_2>y <extra_id_3>",
    "quick fox foxes <pad> !",
]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "special_map",
    [
        None,
        {"additional_special_tokens": ["<doc>", "<extra_id_0>"]},
        {"eos_token": {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": True}},
    ],
)
def test_config_files_are_read_as_transformers_reads_them(
    name: str, special_map: dict | None, tmp_path: pathlib.Path
) -> None:
    write_spiece(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIGS[name]))
    if special_map is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_map))
    assert_same(tmp_path, TEXTS)


def test_folder_with_only_tokenizer_json(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    transformers.T5Tokenizer.from_pretrained(str(folder)).save_pretrained(str(tmp_path))
    ours = assert_same(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json"]
    assert_same(tmp_path)
    assert ours.fingerprint == Tokenizer.from_pretrained(folder).fingerprint


def test_old_tokenizer_json_is_rebuilt_as_transformers_does(
    trained_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Files of transformers 4 hold another normaliser and splitter, padding and truncation."""
    transformers.T5Tokenizer.from_pretrained(str(trained_folder)).save_pretrained(str(tmp_path))
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    state["normalizer"] = {"type": "Sequence", "normalizers": [state["normalizer"], strip]}
    state["pre_tokenizer"] = state["pre_tokenizer"]["pretokenizers"][1]
    state["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(state), encoding="utf-8")
    for config in (None, {"extra_ids": 100}):
        (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert_same(tmp_path)


@pytest.mark.parametrize("extra_ids", [0, 5, 100])
def test_saved_folder_reads_back_everywhere(
    extra_ids: int, trained_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    ours = Tokenizer.from_sentencepiece(trained_folder / "spiece.model", extra_ids=extra_ids)
    ours.save(tmp_path)
    assert (tmp_path / "spiece.model").read_bytes() == (trained_folder / "spiece.model").read_bytes()
    again = assert_same(tmp_path, TEXTS)
    assert again.encode_batch(TEXTS) == ours.encode_batch(TEXTS)
    assert again.fingerprint == ours.fingerprint
    auto = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert reference_ids(auto, TEXTS) == ours.encode_batch(TEXTS)
    assert auto("a text").input_ids == [*ours.encode_batch(["a text"])[0], ours.eos_id]
    (tmp_path / "tokenizer.json").unlink()
    assert assert_same(tmp_path, TEXTS).fingerprint == ours.fingerprint


def test_other_tokenizers_are_taken_as_they_are(tmp_path: pathlib.Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "hello": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.encode_batch(["hello there"]) == [[3, 2]]
    ours.save(tmp_path / "again")
    auto = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "again"))
    assert auto("hello there", add_special_tokens=False).input_ids == [3, 2]


def test_fingerprint_tells_vocabularies_apart(trained_folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = trained_folder / "spiece.model"
    prints = {
        Tokenizer.from_sentencepiece(path).fingerprint,
        Tokenizer.from_sentencepiece(path, extra_ids=99).fingerprint,
        Tokenizer.from_pretrained(write_spiece(tmp_path, size=300)).fingerprint,
    }
    assert len(prints) == 3
    assert Tokenizer.from_sentencepiece(path).fingerprint in prints


def test_spans_point_into_the_text(trained: Tokenizer) -> None:
    text = "Documento: ação  relevante"
    ids, spans = trained.encode_with_spans([text])[0]
    assert ids == trained.encode_batch([text])[0]
    words = [text[start:end] for start, end in spans]
    assert "".join(words[-len(words) :]).endswith("relevante")
    assert all(0 <= start < end <= len(text) for start, end in spans)
    assert not any(" " in word for word in words)


def test_strings_of_numpy_are_strings(trained: Tokenizer) -> None:
    assert trained.encode_batch([np.str_("a fox")]) == trained.encode_batch(["a fox"])
    assert trained.encode_batch([]) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("a\ud800b", r"text 1 holds the unpaired surrogate '\\ud800' at character 1.*surrogatepass"),
        (b"bytes", r"text 1 is bytes; expected str.*decode"),
        (None, r"text 1 is NoneType; expected str"),
        (3, r"text 1 is int"),
    ],
)
def test_bad_texts(bad: object, message: str, trained: Tokenizer) -> None:
    with pytest.raises(InputError, match=message):
        trained.encode_batch(["good", bad])  # type: ignore[list-item]


def test_bad_folders(tmp_path: pathlib.Path, trained_folder: pathlib.Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Tokenizer.from_pretrained(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no tokenizer files.*the folder holds config.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(InputError, match=r"spiece.model: not a SentencePiece model"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(InputError, match="a SentencePiece model of 0 pieces"):
        Tokenizer.from_pretrained(tmp_path)
    shutil.copy(trained_folder / "spiece.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 1,\n}')
    with pytest.raises(InputError, match=r"tokenizer_config.json:2: not JSON"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="extra_ids is -1"):
        Tokenizer.from_sentencepiece(tmp_path / "spiece.model", extra_ids=-1)
    with pytest.raises(InputError, match="no such file"):
        Tokenizer.from_sentencepiece(tmp_path / "other.model")


def test_byte_pair_model_is_refused(tmp_path: pathlib.Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to merge", "more words to merge"] * 5),
        model_prefix=str(tmp_path / "bpe"),
        vocab_size=40,
        model_type="bpe",
        minloglevel=2,
    )
    with pytest.raises(InputError, match="a SentencePiece model of type BPE"):
        Tokenizer.from_sentencepiece(tmp_path / "bpe.model")
