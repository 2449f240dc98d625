"""MS MARCO's queries and collection files."""

from __future__ import annotations

import gzip
import pathlib

import pytest

from inranker_jax.corpora.msmarco import Collection, open_documents, open_queries, read_id_text, read_triples
from inranker_jax.errors import InputError


def write(path: pathlib.Path, text: str | bytes) -> pathlib.Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_id_text(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "q.tsv", "7\twhat is\ta tab \n\nq-8\té\r\n9\t\n")
    assert read_id_text(path) == {"7": "what is\ta tab", "q-8": "é", "9": ""}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1\ta\nno tab\n", ":2: no tab in the line"),
        ("\ttext\n", ":1: the id is empty"),
        ("1\ta\n1\tb\n", ":2: id '1' occurs twice"),
        (b"1\ta\n2\t\xff\n", ":2: .*not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path: pathlib.Path, text: str | bytes, words: str) -> None:
    path = write(tmp_path / "q.tsv", text)
    with pytest.raises(InputError, match=words):
        read_id_text(path)


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_a_collection_by_row_number(tmp_path: pathlib.Path, ending: str) -> None:
    path = write(tmp_path / "collection.tsv", "\ufeff0\tzero\n1\téin\tTab\n\n2\ttwo" + ending)
    collection = Collection(path)
    assert collection._rows is None  # no id table: ids are row numbers
    assert len(collection) == 3
    assert dict(collection) == {"0": "zero", "1": "éin\tTab", "2": "two"}
    for unknown in ("3", "01", "-1", "+1", "x", "", "²"):
        assert unknown not in collection
        with pytest.raises(KeyError):
            collection[unknown]


def test_a_collection_by_name(tmp_path: pathlib.Path) -> None:
    collection = Collection(write(tmp_path / "c.tsv", "0\tzero\n5\tfive\nD1\tdee\n"))
    assert dict(collection) == {"0": "zero", "5": "five", "D1": "dee"}
    assert "1" not in collection


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0\ta\nbad line\n", r"c\.tsv:2: no tab"),
        ("0\ta\n \tb\n", r"c\.tsv:2: the id is empty"),
        ("0\ta\n0\tb\n", r"c\.tsv:2: id '0' occurs twice"),
    ],
)
def test_bad_collections_are_named(tmp_path: pathlib.Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Collection(write(tmp_path / "c.tsv", text))


def test_a_passage_that_is_not_utf8(tmp_path: pathlib.Path) -> None:
    collection = Collection(write(tmp_path / "c.tsv", b"0\tfine\n1\t\xe9\n"))
    assert collection["0"] == "fine"
    with pytest.raises(InputError, match="passage '1' is not UTF-8"):
        collection["1"]


def test_missing_and_empty_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Collection(tmp_path / "none.tsv")
    assert len(Collection(write(tmp_path / "empty.tsv", ""))) == 0


def test_open_texts_of_every_kind(tmp_path: pathlib.Path) -> None:
    plain = write(tmp_path / "c.tsv", "0\tzero\n")
    packed = tmp_path / "c.tsv.gz"
    packed.write_bytes(gzip.compress(b"0\tzero\n"))
    write(tmp_path / "corpus.jsonl", '{"_id": "0", "title": "Nil", "text": "zero "}\n')
    write(tmp_path / "queries.jsonl", '{"_id": "0", "text": "zero"}\n')
    mapping = {"0": "zero"}
    assert open_documents(mapping) is mapping
    assert open_queries(mapping) is mapping
    for source in (plain, packed):
        assert dict(open_documents(source)) == dict(open_queries(source)) == mapping
    assert isinstance(open_documents(plain), Collection)
    assert open_documents(tmp_path) == {"0": "Nil zero"}
    assert open_documents(tmp_path, titles=False) == open_queries(tmp_path) == mapping
    for name in ("corpus.jsonl", "corpus.*l"):
        assert open_documents(tmp_path / name) == {"0": "Nil zero"}
        assert open_documents(tmp_path / name, titles=False) == mapping
    assert open_queries(tmp_path / "queries.jsonl") == mapping


def test_a_header_is_no_passage(tmp_path: pathlib.Path) -> None:
    for name in ("c.tsv", "topics.txt"):
        path = write(tmp_path / name, "id\ttitle\ttext\n0\tNil\tzero\n")
        assert open_documents(path) == {"0": "Nil zero"}
        assert open_queries(path) == {"0": "zero"}


def test_what_is_missing_is_named(tmp_path: pathlib.Path) -> None:
    for opened in (open_documents, open_queries):
        with pytest.raises(InputError, match=r"none.tsv: no such file"):
            opened(tmp_path / "none.tsv")
        with pytest.raises(InputError, match=r"none.jsonl: no such file"):
            opened(tmp_path / "none.jsonl")


def test_triples(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "triples.train.small.tsv", "q\tyes\tno \n\nq\tyes\tnot\r\n")
    assert list(read_triples(path)) == [("q", "yes", "no"), ("q", "yes", "not")]
    for bad, words in (
        ("q\tyes", ":3: 2 columns"),
        ("q\t \tno", ":3: an empty text"),
        ("1\t2\t3\t4", ":3: 4 col"),
    ):
        write(path, f"q\tyes\tno\n\n{bad}\n")
        with pytest.raises(InputError, match=words):
            list(read_triples(path))
