"""The sentences of errors: how a place, a problem and a remedy are joined."""

from __future__ import annotations

import doctest
import pathlib

import pytest

from inranker_jax import errors
from inranker_jax.corpora import beir, inranker, open_corpus
from inranker_jax.errors import InputError


def test_the_examples_hold() -> None:
    results = doctest.testmod(errors)
    assert results.attempted
    assert not results.failed


@pytest.mark.parametrize(
    ("problem", "remedy", "expected"),
    [
        ("no such file. Did you mean 'a'?", "Check the path", "f: no such file. Did you mean 'a'? Check the path."),
        ("no 'a'", "Did you mean 'b'?", "f: no 'a'. Did you mean 'b'?"),
        ("no 'a'", "Correct it.", "f: no 'a'. Correct it."),
        ("no 'a'", "", "f: no 'a'."),
    ],
)  # fmt: skip
def test_a_question_gets_no_full_stop(problem: str, remedy: str, expected: str) -> None:
    assert str(InputError.at("f", None, problem, remedy=remedy)) == expected


def test_a_line_of_json_that_is_cut_off(tmp_path: pathlib.Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "a b\n')
    for read in (lambda: list(beir.read_corpus(tmp_path)), lambda: list(open_corpus(tmp_path).documents())):
        with pytest.raises(InputError, match=r":1: not JSON \(\w+ string starting at column 22\)\."):
            read()


def test_a_field_of_nearly_that_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / "labels.jsonl").write_text('{"query": "q", "content": "a b"}\n')
    with pytest.raises(InputError, match=r"Did you mean 'content'\?$"):
        list(inranker.read_beir_jsonl(tmp_path / "labels.jsonl"))
