"""Ids of the three truncation profiles beside transformers, label look-up, scores, and the record itself."""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from inranker_jax.errors import InputError
from inranker_jax.prompts import PRESETS, ScoringContract, Tokenizer, pad_batch, preset
from tests.prompts.conftest import SENTENCES

transformers = pytest.importorskip("transformers")

TEMPLATE = "Query: {query} Document: {document} Relevant:"
SAFE = preset("monot5")
LONGEST = preset("inranker_paper_inference")
PAPER = preset("inranker_paper_training")
LONG = "Não há ação without a quick reply; see section 3. "


def pairs() -> tuple[list[str], list[str]]:
    """Short, long and hostile texts against each other."""
    texts = [*SENTENCES, LONG * 100, LONG * 9, "\u0301" + LONG * 60, "{document}", "{query} {d} {{}} {0} %s"]
    queries = [texts[i % len(texts)] for i in range(len(texts) * 2)]
    documents = [texts[(i * 7 + 3) % len(texts)] for i in range(len(texts) * 2)]
    return queries, documents


def literal(query: str, document: str) -> str:
    return "Query: " + query + " Document: " + document + " Relevant:"


@pytest.fixture(scope="module")
def reference(folder: pathlib.Path):
    return transformers.T5Tokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def ours(folder: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


def test_longest_first_equals_transformers(ours: Tokenizer, reference) -> None:
    queries, documents = pairs()
    for max_length in (512, 32, 8):
        texts = [literal(q, d) for q, d in zip(queries, documents, strict=True)]
        expected = reference(texts, truncation="longest_first", max_length=max_length).input_ids
        encoded = LONGEST.replace(max_length=max_length).encode(ours, queries, documents)
        assert [ids.tolist() for ids in encoded] == expected
        assert all(ids.dtype == np.int32 for ids in encoded)


def test_suffix_safe_equals_the_complete_text_when_it_fits(ours: Tokenizer, reference) -> None:
    queries, documents = pairs()
    texts = [literal(q, d) for q, d in zip(queries, documents, strict=True)]
    complete = reference(texts).input_ids
    encoded = SAFE.encode(ours, queries, documents)
    fits = [len(ids) <= 512 for ids in complete]
    assert 4 < sum(fits) < len(fits) - 4
    for ids, expected, fit in zip(encoded, complete, fits, strict=True):
        if fit:
            assert ids.tolist() == expected
        else:
            assert len(ids) == 512


def test_suffix_safe_cuts_only_the_end_of_the_document(ours: Tokenizer, reference) -> None:
    """What remains is a head and a tail of the complete ids."""
    queries = ["qual é a ação?", "\u0301combining", "</s> x"]
    documents = [LONG * 40, "\u0301" + LONG * 40, LONG * 40 + "\u200d"]
    tail = reference(" Relevant:").input_ids
    for max_length in (512, 100, 64):
        encoded = SAFE.replace(max_length=max_length).encode(ours, queries, documents)
        for query, document, ids in zip(queries, documents, encoded, strict=True):
            complete = reference(literal(query, document)).input_ids
            assert len(ids) == max_length
            assert ids.tolist() == complete[: max_length - len(tail)] + tail


def test_exact_limit_is_not_cut(ours: Tokenizer, reference) -> None:
    complete = reference(literal("a question", LONG * 3)).input_ids
    at_limit = SAFE.replace(max_length=len(complete)).encode(ours, ["a question"], [LONG * 3])[0]
    assert at_limit.tolist() == complete
    below = SAFE.replace(max_length=len(complete) - 1).encode(ours, ["a question"], [LONG * 3])[0]
    tail = len(reference(" Relevant:").input_ids)
    assert below.tolist() == complete[: -tail - 1] + complete[-tail:]


def test_suffix_safe_with_a_query_that_is_too_long(ours: Tokenizer, reference) -> None:
    """The document keeps 32 tokens, or all it has, so that documents still differ; the query is cut."""
    tail = reference(" Relevant:").input_ids
    head = reference("Query:", add_special_tokens=False).input_ids
    middle = reference(" Document:", add_special_tokens=False).input_ids
    query_ids = reference(LONG * 80, add_special_tokens=False).input_ids
    documents = [LONG * 80, "uma resposta curta", "other text " * 100, ""]
    encoded = SAFE.encode(ours, [LONG * 80] * 4, documents)
    for document, ids in zip(documents, encoded, strict=True):
        kept = reference(document, add_special_tokens=False).input_ids[:32]
        query_room = 512 - len(head) - len(middle) - len(kept) - len(tail)
        assert ids.tolist() == head + query_ids[:query_room] + middle + kept + tail
    assert len({tuple(ids) for ids in encoded}) == 4


def test_suffix_safe_below_the_template(trained: Tokenizer) -> None:
    template_length = len(SAFE.encode(trained, [""], [""])[0])
    tightest = SAFE.replace(max_length=template_length)
    assert len(tightest.encode(trained, [LONG], [LONG])[0]) == template_length
    with pytest.raises(InputError, match=r"template.*alone takes \d+ tokens.*Raise max_length"):
        SAFE.replace(max_length=template_length - 1).encode(trained, [LONG], [LONG])


def test_template_glued_to_its_texts_and_in_the_other_order(trained: Tokenizer) -> None:
    contract = SAFE.replace(template="[{document}]<-{query}? {{Relevant}}", max_length=40)
    complete = contract.replace(max_length=5000).encode(trained, ["who"], [LONG * 5])[0]
    assert contract.render("who", "{query}") == "[{query}]<-who? {Relevant}"
    text, end = contract.render("who", LONG * 5), trained.encode_batch(["]<-who? {Relevant}"])[0]
    assert complete.tolist() == [*trained.encode_batch([text])[0], trained.eos_id]
    ids = contract.encode(trained, ["who"], [LONG * 5])[0]
    assert len(ids) == 40
    # The last document character is a space, so "]<-who?" starts a word in the complete text as it does
    # alone.
    assert ids.tolist() == [*complete[: 40 - len(end) - 1], *end, trained.eos_id]


def test_paper_training_is_the_original_recipe(ours: Tokenizer, reference) -> None:
    queries, documents = pairs()
    encoded = PAPER.encode(ours, queries, documents)
    over = 0
    for query, document, ids in zip(queries, documents, encoded, strict=True):
        query_ids = reference(f"Query: {query}", add_special_tokens=False).input_ids
        document_ids = reference(f"Document: {document}", add_special_tokens=False).input_ids
        suffix = reference(" Relevant:", add_special_tokens=False).input_ids
        room = max(0, 512 - 10 - len(query_ids))
        over += len(document_ids) > room
        expected = query_ids + document_ids[:room] + suffix
        if len(expected) > 512:
            expected = query_ids[: 512 - len(suffix)] + suffix
        assert ids.tolist() == expected
        assert len(ids) <= 512
    assert over > 5


def test_pairs_do_not_depend_on_each_other(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, documents = pairs()
    for contract in (SAFE, LONGEST, PAPER):
        together = contract.encode(trained, queries, documents)
        alone = [contract.encode(trained, [q], [d])[0] for q, d in zip(queries, documents, strict=True)]
        with monkeypatch.context() as patch:
            patch.setattr("inranker_jax.prompts.contract._CHUNK", 7)
            chunked = contract.encode(trained, queries, documents)
        for first, second, third in zip(together, alone, chunked, strict=True):
            np.testing.assert_array_equal(first, second)
            np.testing.assert_array_equal(first, third)
        assert contract.encode(trained, [], []) == []


def test_braces_in_texts_are_text(trained: Tokenizer) -> None:
    query, document = "{document} {d}", "{query} {} {{x}} {0!r:>10}"
    assert SAFE.render(query, document) == literal(query, document)
    ids = SAFE.encode(trained, [query], [document])[0]
    assert ids.tolist() == [*trained.encode_batch([literal(query, document)])[0], trained.eos_id]


@pytest.mark.parametrize(
    ("queries", "documents", "message"),
    [
        (["a"], ["b", "c"], "1 queries but 2 documents"),
        (["a", None], ["b", "c"], "query 1 is NoneType; expected str"),
        (["a", "b"], ["c", b"d"], r"document 1 is bytes; expected str.*decode"),
        (["a", "\udfff"], ["b", "c"], "query 1 holds the unpaired surrogate"),
        ("ab", ["a", "b"], "sequences of texts"),
    ],
)
def test_bad_pairs(queries: list, documents: list, message: str, trained: Tokenizer) -> None:
    for contract in (SAFE, PAPER):
        with pytest.raises(InputError, match=message):
            contract.encode(trained, queries, documents)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Query: {q} Document: {document}", r"unknown placeholder \{q\}"),
        ("Query: {query} Document: {documnet}", r"Did you mean 'document'"),
        ("Query: {Query} Document: {document}", r"Did you mean 'query'"),
        ("Query: {query}", r"has \{document\} 0 times"),
        ("{query} {query} {document}", r"has \{query\} 2 times"),
        ("{query!r} {document}", r"unknown placeholder"),
        ("{query:>5} {document}", r"unknown placeholder"),
        ("{} {document}", r"unknown placeholder \{\}"),
        ("{query} {document} {", r"write any other brace twice"),
        ("{query} } {document}", r"write any other brace twice"),
        (3, r"template is int"),
    ],
)
def test_bad_templates(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScoringContract(template, ("▁false", "▁true"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truncation": "sufix_safe"}, "Did you mean 'suffix_safe'"),
        ({"score": "probabilty"}, "Did you mean 'probability'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": "512"}, "max_length is '512'"),
        ({"append_eos": "yes"}, "append_eos is 'yes'"),
        ({"label_pieces": ("▁true",)}, "reads 2 label piece"),
        ({"label_pieces": "▁true"}, "expected a tuple"),
        ({"label_pieces": ("▁true", "▁true")}, "the same piece"),
        ({"score": "single_logit"}, "reads 1 label piece"),
        ({"truncation": "paper_training"}, "append_eos=False"),
        (
            {"truncation": "paper_training", "append_eos": False, "template": "{document} {query}"},
            "before {document}",
        ),
        ({"max_lenght": 3}, "Did you mean 'max_length'"),
    ],
)
def test_bad_fields(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SAFE.replace(**changes)


@pytest.mark.parametrize("name", PRESETS)
def test_plain_data_round_trip(name: str) -> None:
    contract = PRESETS[name]
    assert ScoringContract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract
    assert hash(ScoringContract.from_dict(contract.to_dict())) == hash(contract)


def test_plain_data_errors() -> None:
    with pytest.raises(InputError, match=r"no 'templat'\. Did you mean 'template'"):
        ScoringContract.from_dict({**SAFE.to_dict(), "templat": "x"})
    with pytest.raises(InputError, match=r"lacks 'label_pieces'; it has template"):
        ScoringContract.from_dict({"template": TEMPLATE})


def test_label_ids_of_the_real_vocabularies(t5_folder: pathlib.Path) -> None:
    tokenizer = Tokenizer.from_pretrained(t5_folder)
    assert SAFE.label_ids(tokenizer) == (6136, 1176)
    assert preset("rankt5").label_ids(tokenizer) == (32089,)
    with pytest.raises(InputError, match=r"no '▁não', a label piece of the scoring contract 'ptt5_msmarco'"):
        preset("ptt5_msmarco").label_ids(tokenizer)


def test_label_ids(trained: Tokenizer) -> None:
    found = SAFE.label_ids(trained)
    assert [trained.id_to_piece(index) for index in found] == ["▁false", "▁true"]
    with pytest.raises(InputError, match=r"no '▁FALSE'.*It has '▁false'"):
        SAFE.replace(label_pieces=("▁FALSE", "▁true")).label_ids(trained)


@pytest.mark.parametrize("library", [np, jnp])
def test_scores(library) -> None:
    logits = library.asarray([[[1.0, 3.0], [0.0, 0.0]], [[200.0, -200.0], [-200.0, 200.0]]], "float32")
    expected = {
        "logit_difference": [[2.0, 0.0], [-400.0, 400.0]],
        "probability": [[1 / (1 + np.exp(-2.0)), 0.5], [0.0, 1.0]],
        "log_probability": [[-np.log1p(np.exp(-2.0)), -np.log(2.0)], [-400.0, 0.0]],
    }
    for score, values in expected.items():
        result = SAFE.replace(score=score).scores(logits)
        assert result.dtype == np.float32
        assert isinstance(result, np.ndarray) == (library is np)
        np.testing.assert_allclose(result, np.array(values), rtol=1e-6, atol=1e-7)
    single = preset("rankt5").scores(logits[..., :1])
    np.testing.assert_array_equal(single, logits[..., 0])
    with pytest.raises(InputError, match=r"shape \(2, 2, 2\).*needs \[\.\.\., 1\]"):
        preset("rankt5").scores(logits)
    with pytest.raises(InputError, match=r"needs \[\.\.\., 2\]"):
        SAFE.scores(logits[..., :1])


def test_pad_batch() -> None:
    rows = [np.array([5, 6, 7], np.int32), np.array([8], np.int32)]
    batch = pad_batch(rows, 3)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch, [[5, 6, 7], [8, 0, 0]])
    assert pad_batch([], 4).shape == (0, 4)
    with pytest.raises(InputError, match="sequence 0 has 3 tokens; expected at most 2"):
        pad_batch(rows, 2)
