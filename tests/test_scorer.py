"""The reranker beside transformers on a tiny random model, and what users rely on: order, shapes, errors."""

from __future__ import annotations

import pathlib
import random
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from inranker_jax import RankedDocument, Reranker, ScoringContract
from inranker_jax.errors import InputError
from inranker_jax.models import Compute, T5Config, apply, init_params
from inranker_jax.packing import Layout
from inranker_jax.partitioning import make_mesh
from inranker_jax.prompts import Tokenizer, pad_batch, preset
from inranker_jax.scoring_calls import Call
from tests.tiny_vocabulary import write_spiece

# Two lengths, 64 and 96, so that little is compiled.
CONTRACT = preset("monot5").replace(max_length=96)
TWO = Layout("bucketed", lengths=(64,))
FULL = preset("monot5")
WORDS = [
    "what",
    "is",
    "true",
    "this",
    "false",
    "relevant",
    "document",
    "query",
    "text",
    "wrap",
    "lines",
    "method",
    "modelo",
    "ação",
    "não",
    "42",
]


def make_config(vocab_size: int, **changes: object) -> T5Config:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    return T5Config(vocab_size=vocab_size, **{**sizes, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(write_spiece(tmp_path_factory.mktemp("vocabulary")))


@pytest.fixture(scope="module")
def config(tokenizer: Tokenizer) -> T5Config:
    return make_config(tokenizer.vocab_size + 12)


@pytest.fixture(scope="module")
def params(config: T5Config) -> dict:
    return init_params(config, seed=0)


@pytest.fixture(scope="module")
def reranker(config: T5Config, params: dict, tokenizer: Tokenizer) -> Reranker:
    return Reranker(config, params, tokenizer, CONTRACT, layout=TWO)


def make_documents(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    """Texts of very different lengths, some past the limit of 96 tokens."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(longest))) + f" {i}" for i in range(count)]


@pytest.mark.parametrize("variant", ["tied_relu", "untied_gated"])
def test_logits_equal_transformers(variant: str, tmp_path: pathlib.Path) -> None:
    """A folder saved by transformers, text to logits, against its own tokenizer and plain decoder."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    write_spiece(tmp_path)
    reference_tokenizer = transformers.T5Tokenizer.from_pretrained(str(tmp_path))
    gated = variant == "untied_gated"
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=len(reference_tokenizer) + 12,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=not gated,
        )
    ).eval()
    if gated:
        torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    model.save_pretrained(str(tmp_path))
    reference_tokenizer.save_pretrained(str(tmp_path))

    limit = 96 if gated else 512
    marks = ["</s> e 😀", "a <pad> b <pad> true"]  # `<pad>` in a text is a token that is read
    query, documents = "Qual é a ação?", ["", *marks, "true " * 600, *make_documents(6)]
    texts = [f"Query: {query} Document: {text} Relevant:" for text in documents]
    batch = reference_tokenizer(
        texts,
        truncation=True,
        max_length=limit,
        padding=True,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    assert batch.input_ids.shape[1] == limit
    with torch.no_grad():
        start = torch.zeros((len(texts), 1), dtype=torch.long)
        head = model(batch.input_ids, batch.attention_mask, decoder_input_ids=start).logits[:, 0]
    expected = head[:, reference_tokenizer.convert_tokens_to_ids(["▁false", "▁true"])].numpy()

    ours = Reranker.from_pretrained(
        tmp_path, contract=preset("inranker_paper_inference").replace(max_length=limit)
    )
    np.testing.assert_allclose(ours.logits(query, documents), expected, atol=1e-4, rtol=1e-5)
    probability = np.exp(expected[:, 1]) / np.exp(expected).sum(axis=1)
    np.testing.assert_allclose(ours.scores(query, documents), probability, atol=1e-5)
    order = [item.index for item in ours.rank(query, documents)]
    assert np.all(np.diff(probability[order]) <= 1e-6)


def test_results_do_not_depend_on_order(reranker: Reranker) -> None:
    documents = make_documents(120)
    scores = reranker.scores("what is true", documents)
    assert len(np.unique(scores)) == len(documents)
    order = list(range(120))
    random.Random(1).shuffle(order)
    shuffled = reranker.scores("what is true", [documents[i] for i in order])
    np.testing.assert_array_equal(shuffled, scores[order])
    np.testing.assert_array_equal(reranker.scores("what is true", documents), scores)


@pytest.mark.parametrize("tokens_per_call", [1, 300, 4096])
def test_results_do_not_depend_on_batch_size(
    tokens_per_call: int, config: T5Config, params: dict, tokenizer: Tokenizer, reranker: Reranker
) -> None:
    documents = make_documents(40)
    other = Reranker(config, params, tokenizer, CONTRACT, layout=TWO, tokens_per_call=tokens_per_call)
    scores = reranker.scores("what is true", documents)
    np.testing.assert_allclose(other.scores("what is true", documents), scores, atol=1e-5)
    ranking = [item.index for item in reranker.rank("what is true", documents)]
    assert [item.index for item in other.rank("what is true", documents)] == ranking


def test_results_do_not_depend_on_the_other_documents(reranker: Reranker) -> None:
    documents = make_documents(30)
    together = reranker.logits("is this text?", documents)
    alone = np.concatenate([reranker.logits("is this text?", [text]) for text in documents])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_duplicates_get_identical_scores_and_keep_their_order(reranker: Reranker) -> None:
    documents = make_documents(50)
    ranking = reranker.rank("what", documents * 3)
    by_text: dict[str, list[RankedDocument]] = {}
    for item in ranking:
        by_text.setdefault(item.text, []).append(item)
    assert len(by_text) == 50
    for items in by_text.values():
        assert len({item.score for item in items}) == 1
        assert [item.index for item in items] == sorted(item.index for item in items)
    equal = reranker.rank("what", ["same", "same", "same"])
    assert [item.index for item in equal] == [0, 1, 2]


def test_rank(reranker: Reranker) -> None:
    documents = make_documents(25)
    scores = reranker.scores("what", documents)
    ranking = reranker.rank("what", documents)
    assert [item.index for item in ranking] == np.argsort(-scores, kind="stable").tolist()
    assert all(item.text == documents[item.index] and item.score == scores[item.index] for item in ranking)
    assert reranker.rank("what", documents, top_k=3) == ranking[:3]
    assert reranker.rank("what", documents, top_k=1000) == ranking
    assert reranker.rank("what", (text for text in documents)) == ranking


def test_rank_batch_equals_rank(reranker: Reranker) -> None:
    queries = ["what is true", "modelo", "", "false"]
    lists = [make_documents(count, seed=count) for count in (7, 0, 1, 12)]
    batched = reranker.rank_batch(queries, iter(lists), top_k=5)
    assert [len(ranking) for ranking in batched] == [5, 0, 1, 5]
    for query, documents, ranking in zip(queries, lists, batched, strict=True):
        single = reranker.rank(query, documents, top_k=5)
        assert [item.index for item in ranking] == [item.index for item in single]
        np.testing.assert_allclose([r.score for r in ranking], [r.score for r in single], atol=1e-5)
    assert reranker.rank_batch([], []) == []


def test_nothing_to_score(reranker: Reranker) -> None:
    assert reranker.rank("what", []) == []
    assert reranker.scores("what", []).shape == (0,)
    assert reranker.logits("what", []).shape == (0, 2)
    assert reranker.score_pairs(iter(())).shape == (0,)
    assert reranker.scores("what", []).dtype == reranker.scores("what", [""]).dtype == np.float32


def test_hundred_thousand_characters(reranker: Reranker) -> None:
    long = "palavra relevante " * 5600
    assert len(long) > 100_000
    scores = reranker.scores("what", [long, long[:50_000], "short", "a" * 100_000])
    assert np.isfinite(scores).all()
    # Both are the same 512 tokens.
    assert scores[0] == scores[1] != scores[2]


def test_score_pairs_is_a_stream(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs are taken as needed, at most two windows ahead, and any window gives the same scores."""
    pairs = [(random.Random(i).choice(WORDS), text) for i, text in enumerate(make_documents(64, longest=20))]
    expected = reranker.score_pairs(pairs)
    monkeypatch.setattr("inranker_jax.scorer._WINDOW", 10)
    taken = 0

    def source() -> Iterator[tuple[str, str]]:
        nonlocal taken
        for pair in pairs:
            taken += 1
            yield pair

    parts = []
    for part in reranker.logits_of_pairs(source()):
        parts.append(part)
        assert taken <= sum(map(len, parts)) + 10
    assert [len(part) for part in parts] == [10] * 6 + [4]
    np.testing.assert_allclose(CONTRACT.scores(np.concatenate(parts)), expected, atol=1e-5)
    np.testing.assert_allclose(reranker.score_pairs(source()), expected, atol=1e-5)


def test_chunks_do_not_depend_on_each_other(reranker: Reranker) -> None:
    pairs = [(f"query {i % 3}", text) for i, text in enumerate(make_documents(30))]
    chunks = [pairs[:7], pairs[7:8], [], pairs[8:30]]
    taken: list[int] = []

    def source() -> Iterator[list[tuple[str, str]]]:
        for index, chunk in enumerate(chunks):
            taken.append(index)
            yield chunk

    stream = reranker.logits_of_chunks(source())
    parts = [next(stream)]
    assert taken == [0, 1], "one chunk is dispatched ahead, and no more"
    parts.extend(stream)
    assert [part.shape for part in parts] == [(7, 2), (1, 2), (0, 2), (22, 2)]
    for chunk, part in zip(chunks, parts, strict=True):
        np.testing.assert_array_equal(next(reranker.logits_of_chunks([chunk])), part)


def record_shapes(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of the calls that `reranker` makes from now on; nothing is computed."""
    shapes: list[tuple[int, int]] = []

    def launch(params: object, call: Call) -> np.ndarray:
        shapes.append(call.tokens.shape)
        assert (call.tokens[:, 0] != 0).all()
        return np.zeros((len(call.tokens), 2), np.float32)

    monkeypatch.setattr(reranker, "_launch", launch)
    return shapes


def test_buckets_have_one_shape_per_length(
    config: T5Config, params: dict, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout("bucketed", lengths=(64, 96, 128, 256, 384), tokens_per_call=1024)
    reranker = Reranker(config, params, tokenizer, FULL, layout=layout)
    shapes = record_shapes(reranker, monkeypatch)
    for count in (1, 3, 40, 111, 400):
        reranker.scores("what", make_documents(count, seed=count, longest=250))
    assert set(shapes) == {(1024 // length, length) for length in (64, 96, 128, 256, 384, 512)}


def test_few_calls_are_made(
    config: T5Config, params: dict, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short pairs fill the rows that long ones leave: three lengths need one call, not three."""
    layout = Layout("bucketed", lengths=(64, 96, 128), tokens_per_call=1024)
    reranker = Reranker(config, params, tokenizer, FULL, layout=layout)
    shapes = record_shapes(reranker, monkeypatch)
    reranker.scores("what", ["", "true " * 60, "true " * 100])
    assert shapes == [(8, 128)]


def test_new_parameters_do_not_compile_again(
    config: T5Config, params: dict, tokenizer: Tokenizer, reranker: Reranker
) -> None:
    documents = make_documents(5)
    before = reranker.scores("what", documents)
    other = Reranker(config, params, tokenizer, CONTRACT, layout=TWO)
    compiled = other.compilations
    other.update_params(init_params(config, seed=1))
    assert np.abs(other.scores("what", documents) - before).max() > 1e-3
    other.update_params(jax.tree.map(np.asarray, params))
    np.testing.assert_array_equal(other.scores("what", documents), before)
    assert other.compilations == compiled


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2), (1, 1, 4)])
def test_meshes_give_the_same_scores(
    axes: tuple[int, int, int], config: T5Config, params: dict, tokenizer: Tokenizer, reranker: Reranker
) -> None:
    mesh = make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
    even = make_config(config.vocab_size + (-config.vocab_size) % 8)
    params = init_params(even, seed=0)
    documents = make_documents(20, longest=30)
    single = Reranker(even, params, tokenizer, CONTRACT, layout=TWO, tokens_per_call=256)
    spread = Reranker(even, params, tokenizer, CONTRACT, layout=TWO, tokens_per_call=256, mesh=mesh)
    np.testing.assert_allclose(spread.scores("what", documents), single.scores("what", documents), atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_rounds_what_the_products_read_and_nothing_else(tied: bool, tokenizer: Tokenizer) -> None:
    """A head of its own is read in float32, as `apply` reads it."""
    config = make_config(tokenizer.vocab_size, tie_word_embeddings=tied)
    params, contract = init_params(config, seed=0), CONTRACT.replace(max_length=64)
    documents = ["document true " * n for n in range(1, 9)]
    encoded = contract.encode(tokenizer, ["what"] * len(documents), documents)
    labels = np.array(contract.label_ids(tokenizer))
    expected = apply(config, params, pad_batch(encoded, 64), labels, compute=Compute(dtype="bfloat16"))
    layout = Layout("padded", tokens_per_call=64 * len(documents))
    narrow = Reranker(config, params, tokenizer, contract, dtype="bfloat16", layout=layout)
    np.testing.assert_allclose(narrow.logits("what", documents), expected, atol=1e-4)


def test_bfloat16(config: T5Config, params: dict, tokenizer: Tokenizer, reranker: Reranker) -> None:
    documents = make_documents(60)
    narrow = Reranker(config, params, tokenizer, CONTRACT, dtype="bfloat16", layout=TWO)
    exact, rounded = reranker.logits("what", documents), narrow.logits("what", documents)
    assert rounded.dtype == np.float32
    difference = np.abs(exact - rounded).max()
    assert 0 < difference < 0.05 * np.abs(exact).max()


def test_single_logit(config: T5Config, params: dict, tokenizer: Tokenizer) -> None:
    reranker = Reranker(config, params, tokenizer, preset("rankt5"))
    logits = reranker.logits("what", make_documents(4))
    assert logits.shape == (4, 1)
    np.testing.assert_array_equal(reranker.scores("what", make_documents(4)), logits[:, 0])


@pytest.mark.parametrize("kind", ["padded", "bucketed", "packed"])
@pytest.mark.parametrize("max_length", [30, 100, 700])
def test_other_maximum_length(
    kind: str, max_length: int, config: T5Config, params: dict, tokenizer: Tokenizer
) -> None:
    contract = CONTRACT.replace(max_length=max_length)
    reranker = Reranker(config, params, tokenizer, contract, layout=kind)
    assert reranker.layout.lengths is not None
    assert reranker.layout.lengths[-1] == reranker.layout.row_length == max_length
    assert np.isfinite(reranker.scores("what", [*make_documents(4, longest=40), "true " * 900])).all()


@pytest.mark.parametrize(
    ("query", "documents", "message"),
    [
        (None, ["a"], "query is NoneType; expected str"),
        (["what"], ["a"], "query is list; expected str"),
        (b"what", ["a"], "query is bytes; expected str.*decode"),
        ("what", "one text", "documents is one str; expected a list of texts"),
        ("what", {"d1": "a text"}, r"documents is a dict; expected a list of texts, such as its values\(\)"),
        ("what", None, "documents is NoneType; expected a list"),
        ("what", ["a", None], "document 1 is NoneType; expected str"),
        ("what", ["a", 3.5], "document 1 is float"),
        ("what", ["a", "b", "\ud83d"], "document 2 holds the unpaired surrogate"),
    ],
)
def test_bad_texts(query: object, documents: object, message: str, reranker: Reranker) -> None:
    with pytest.raises(InputError, match=message):
        reranker.scores(query, documents)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        reranker.rank(query, documents)  # type: ignore[arg-type]


def test_bad_pairs(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inranker_jax.scorer._WINDOW", 2)
    good = ("a", "b")
    for bad, message in (
        (("a",), r"pair 3 is \('a',\); expected \(query, document\)"),
        ("ab", "pair 3 is 'ab'"),
        (("a", None), "the document of pair 3 is NoneType"),
        ((1, "b"), "the query of pair 3 is int"),
    ):
        with pytest.raises(InputError, match=message):
            reranker.score_pairs(iter([good, good, good, bad]))  # type: ignore[list-item]


def test_bad_options(config: T5Config, params: dict, tokenizer: Tokenizer, reranker: Reranker) -> None:
    with pytest.raises(InputError, match="top_k is 0"):
        reranker.rank("what", ["a"], top_k=0)
    with pytest.raises(InputError, match="2 queries but 1 lists"):
        reranker.rank_batch(["a", "b"], [["c"]])
    with pytest.raises(InputError, match="one list of texts per query"):
        reranker.rank_batch(["a"], "c")
    with pytest.raises(InputError, match="documents of query 0 is one str"):
        reranker.rank_batch(["a"], ["c"])
    with pytest.raises(InputError, match=r"layout 'paked': no such kind\. Did you mean 'packed'"):
        Reranker(config, params, tokenizer, CONTRACT, layout="paked")
    with pytest.raises(InputError, match="row_length is 64, but a sequence may have 96 tokens"):
        Reranker(config, params, tokenizer, CONTRACT, layout=Layout("packed", row_length=64))
    with pytest.raises(InputError, match="tokens_per_call is 0"):
        Reranker(config, params, tokenizer, CONTRACT, tokens_per_call=0)
    with pytest.raises(InputError, match="bfloat16"):
        Reranker(config, params, tokenizer, CONTRACT, dtype="bfloat61")
    with pytest.raises(InputError, match="has no '▁maybe', a label piece"):
        Reranker(config, params, tokenizer, CONTRACT.replace(label_pieces=("▁maybe", "▁true")))
    with pytest.raises(InputError, match=r"(?s)do not belong to this T5Config.*token_embedder"):
        Reranker(make_config(77), params, tokenizer, CONTRACT)


def test_vocabulary_larger_than_the_model(tokenizer: Tokenizer) -> None:
    small = make_config(tokenizer.vocab_size - 50)
    reranker = Reranker(small, init_params(small, seed=0), tokenizer, CONTRACT)
    assert reranker.scores("what", ["plain text"]).shape == (1,)
    message = rf"pair 1 has the token id {tokenizer.vocab_size - 1}.*vocabulary has {small.vocab_size}"
    with pytest.raises(InputError, match=message):
        reranker.scores("what", ["plain text", "<extra_id_0>"])


def test_parameters_that_are_not_finite(config: T5Config, params: dict, tokenizer: Tokenizer) -> None:
    broken = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), params)
    reranker = Reranker(config, broken, tokenizer, CONTRACT)
    with pytest.raises(InputError, match=r"logits \[nan, nan\] for pair 0 \(2 of 2 are not finite\)"):
        reranker.scores("what", ["a", "b"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_device_ever_holds_all_of_a_model_that_a_mesh_divides(
    dtype: str,
    config: T5Config,
    tokenizer: Tokenizer,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from inranker_jax.checkpoints import huggingface

    even = make_config(config.vocab_size + (-config.vocab_size) % 8)
    huggingface.save(tmp_path / "m", even, init_params(even, seed=0), tokenizer, CONTRACT)
    mesh = make_mesh(1, 4, 1, devices=jax.devices()[:4])
    put, seen = jax.device_put, []

    def watched(tree: object, *more: object) -> object:
        seen.extend(jax.tree.leaves(tree))
        return put(tree, *more)

    monkeypatch.setattr(jax, "device_put", watched)
    reranker = Reranker.from_pretrained(tmp_path / "m", dtype=dtype, mesh=mesh)
    monkeypatch.undo()
    assert len(seen) > 20
    assert all(isinstance(leaf, np.ndarray) for leaf in seen), "from the host, so each device gets its part"
    assert {str(leaf.dtype) for leaf in seen} == {"float32", dtype}
    whole = Reranker.from_pretrained(tmp_path / "m", dtype=dtype)
    documents = make_documents(5, longest=30)
    np.testing.assert_allclose(reranker.scores("what", documents), whole.scores("what", documents), atol=1e-5)


def test_from_pretrained(
    config: T5Config, params: dict, tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    """The contract: given, else stored, else the one of the model's name, else an error."""
    from inranker_jax.checkpoints import huggingface

    stored = CONTRACT.replace(max_length=128, name="mine")
    huggingface.save(tmp_path / "plain", config, params, tokenizer, None)
    huggingface.save(tmp_path / "monot5-tiny", config, params, tokenizer, None)
    huggingface.save(tmp_path / "stored", config, params, tokenizer, stored)
    huggingface.save(tmp_path / "textless", config, params, None, stored)
    assert Reranker.from_pretrained(tmp_path / "stored").contract == stored
    assert Reranker.from_pretrained(str(tmp_path / "monot5-tiny")).contract == FULL
    given = ScoringContract("{query} {document}", ("▁true", "▁false"))
    assert Reranker.from_pretrained(tmp_path / "stored", contract=given).contract == given
    documents = make_documents(5, longest=30)
    loaded = Reranker.from_pretrained(tmp_path / "plain", contract="inranker")
    expected = Reranker(config, params, tokenizer, FULL).logits("what", documents)
    np.testing.assert_array_equal(loaded.logits("what", documents), expected)
    with pytest.raises(InputError, match=r"stores no scoring contract.*contract='monot5'"):
        Reranker.from_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="textless has no tokenizer"):
        Reranker.from_pretrained(tmp_path / "textless")
    with pytest.raises(InputError, match="Did you mean 'inranker'"):
        Reranker.from_pretrained(tmp_path / "plain", contract="inrankr")
