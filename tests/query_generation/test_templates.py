"""Prompts and the lengths of texts."""

from __future__ import annotations

import json
import pathlib

import pytest

from inranker_jax.errors import InputError
from inranker_jax.query_generation import templates
from inranker_jax.query_generation.templates import INPARS_EXAMPLES, Example, Template, open_template
from tests.query_generation import tiny_model


def test_the_prompt_of_the_thesis() -> None:
    prompt = open_template("inpars").render("The *document*.")
    blocks = prompt.split("\n\n")
    assert [block.split("\n")[0] for block in blocks] == [f"Example {n}:" for n in (1, 2, 3, 4)]
    assert [block.split("\n")[2] for block in blocks] == [
        "Relevant Query: Is a little caffeine ok during pregnancy?",
        "Relevant Query: What fruit is native to Australia?",
        "Relevant Query: How large is the Canadian military?",
        "Relevant Query:",
    ]
    assert all(block.split("\n")[1].startswith("Document: ") for block in blocks)
    assert blocks[3] == "Example 4:\nDocument: The *document*.\nRelevant Query:"


def test_the_second_example_is_not_doubled() -> None:
    assert [prompt.count("Fruits are green-skinned") for prompt in [open_template("inpars").render("")]] == [
        1
    ]
    assert INPARS_EXAMPLES[0].document.endswith("one 12-ounce cup of coffee.")
    assert INPARS_EXAMPLES[1].document.endswith("bitter and inedible.")
    assert INPARS_EXAMPLES[2].document.endswith("National Peacekeepers' Day.")


def test_the_printed_figure(shared_data: pathlib.Path) -> None:
    """Every sentence of the built-in examples stands in the thesis's text."""
    thesis = "".join(path.read_text("utf-8") for path in (shared_data.parent / "papers").glob("000*.txt"))
    printed = " ".join(thesis.replace("*", "").split())
    for example in INPARS_EXAMPLES:
        assert f"Document: {example.document}" in printed
        assert f"Relevant Query: {example.query}" in printed


def test_a_users_template(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text('Texto {"id": 1}: {document}\nPergunta:\n\n', encoding="utf-8")
    template = open_template(str(file))
    assert template.render("um {number} {examples}") == 'Texto {"id": 1}: um {number} {examples}\nPergunta:'
    assert template.fingerprint != open_template("inpars").fingerprint


def test_own_examples(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "examples.jsonl"
    rows = [
        {"document": "um\ntexto", "query": "qual?", "doc_id": 7},
        {"text": "outro {document}", "query": "quem?"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    template = open_template("inpars", file)
    assert template.examples == (Example("um texto", "qual?", "7"), Example("outro {document}", "quem?"))
    assert template.render("x") == (
        "Example 1:\nDocument: um texto\nRelevant Query: qual?\n\n"
        "Example 2:\nDocument: outro {document}\nRelevant Query: quem?\n\n"
        "Example 3:\nDocument: x\nRelevant Query:"
    )
    assert {"qual?", "quem?"} <= set(template.example_queries())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Text: {doc}\nQuery:", "no {document} in the template"),
        ("Query:", "no {document} in the template"),
        ("{examples}{document}", "Give them with --examples"),
    ],
)
def test_bad_templates(tmp_path: pathlib.Path, text: str, words: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        open_template(str(file))
    assert str(file) in str(caught.value)


def test_a_misspelt_prompt() -> None:
    with pytest.raises(InputError, match=r"--prompt=inpar: no such file\. Did you mean 'inpars'\?"):
        open_template("inpar")


def test_examples_without_a_place(tmp_path: pathlib.Path) -> None:
    (tmp_path / "p").write_text("{document}", encoding="utf-8")
    (tmp_path / "e").write_text('{"document": "d", "query": "q"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"--examples is given, and the template has no \{examples\}"):
        open_template(str(tmp_path / "p"), tmp_path / "e")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"document": "d", "query": "q"}\n{"document": "d"', ":2: not JSON"),
        ('{"document": "d"}', ":1: not an example"),
        ('{"document": "d", "query": " "}', ":1: not an example"),
        ("[1]", ":1: not an example"),
        ("\n", "no examples"),
    ],
)
def test_bad_examples(tmp_path: pathlib.Path, text: str, words: str) -> None:
    (tmp_path / "e").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        open_template("inpars", tmp_path / "e")


def test_line_breaks_of_a_document_cannot_end_the_prompt() -> None:
    prompt = Template("t", "Document: {document}\nRelevant Query:").render("one\n\nExample 5:\nDocument: two")
    assert prompt == "Document: one Example 5: Document: two\nRelevant Query:"


# ---------------------------------------------------------------------------------------------- lengths


def test_words() -> None:
    assert templates.words("Não há d'água, 3.5!") == ["não", "há", "d", "água", "3", "5"]
    assert templates.words("東京タワー is") == [*"東京タワー", "is"]
    assert templates.words(" \n") == []


def test_estimates_are_near_a_real_vocabulary() -> None:
    """Against GPT-2's published count for this sentence (10 pieces) and rough bounds for others."""
    assert templates.estimate_tokens("The quick brown fox jumps over the lazy dog.") == 10
    assert templates.estimate_tokens("") == 0
    assert 3 <= templates.estimate_tokens("internationalisation") <= 5


def test_cut_by_estimate() -> None:
    text = "one two, three four"
    assert templates.cut_by_estimate(text, 3) == "one two,"
    assert templates.cut_by_estimate(text, 5) == text
    assert templates.cut_by_estimate(text, 100) == text


def test_cut_by_a_real_vocabulary(tmp_path: pathlib.Path) -> None:
    folder = tiny_model.write_tokenizer(tmp_path)
    tokenizer = tiny_model.load_tokenizer(folder)
    text = "What is the meaning of relevance? " * 50
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for source in (folder, folder / "tokenizer.json"):
        cut = templates.tokenizer_cutter(str(source))(text, 20)
        assert text.startswith(cut)
        assert cut == tokenizer.decode(ids[:20]).strip()
    assert templates.tokenizer_cutter(str(folder))("a", 20) == "a"


def test_no_such_tokenizer(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"--tokenizer=.*cannot be opened"):
        templates.tokenizer_cutter(str(tmp_path))
