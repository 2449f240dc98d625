"""How "auto" tells the format of a path, and what it says when it cannot."""

from __future__ import annotations

import pathlib

import pytest

from inranker_jax.corpora import open_corpus, open_queries_any
from inranker_jax.corpora.formats import FORMATS, find
from inranker_jax.errors import InputError
from inranker_jax.records import Document
from tests.corpora.test_corpus import write


@pytest.mark.parametrize(
    ("name", "first", "format"),
    [
        ("c.tsv", "a\tx\n", "tsv"),
        ("c.TSV.gz", "a\tx\n", "tsv"),
        ("c.jsonl", '{"_id": "a", "text": "x"}\n', "jsonl"),
        ("c.ndjson.zst", '\n{"id": "a", "contents": "x"}\n', "jsonl"),
        ("c.json", "not json\n", "jsonl"),
        ("c.jsonl", "", "jsonl"),
        ("c.jsonl", '{"doc_id": "a", "text": "x"}\n', "jsonl"),
        ("c.jsonl", '{"doc_id": "a", "text": "x", "query": "q"}\n', "inpars"),
        ("c.jsonl.gz", '{"doc_id": "a", "doc_text": "x", "question": "q"}\n', "inpars"),
        ("c.jsonl", '{"query": "q", "pos": ["x"]}\n', "flagembedding"),
        ("c.parquet", b"whatever", "parquet"),
    ],
)
def test_auto(tmp_path: pathlib.Path, name: str, first: str | bytes, format: str) -> None:
    path = write(tmp_path / name, first)
    assert open_corpus(path).format == open_queries_any(path).format == format


def test_auto_on_folders(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "beir" / "corpus.jsonl.gz", "")
    assert open_corpus(tmp_path / "beir").format == "beir"
    with pytest.raises(
        InputError, match=r"queries.jsonl: no such file. Expected a BEIR folder with queries.jsonl"
    ):
        open_queries_any(tmp_path / "beir")
    write(tmp_path / "parquet" / "part-0.parquet", b"")
    write(tmp_path / "parquet" / "_SUCCESS.parquet", b"")
    write(tmp_path / "parquet" / "readme.md", b"about the files")
    assert find(tmp_path / "parquet", "auto", "corpus").files == (
        str(tmp_path / "parquet" / "part-0.parquet"),
    )
    write(tmp_path / "hub" / "corpus" / "corpus-00000.parquet", b"")
    write(tmp_path / "hub" / "queries" / "queries-00000.parquet", b"")
    for role in ("corpus", "queries"):
        found = find(tmp_path / "hub", "auto", role)
        assert found.format == "parquet"
        assert found.files == (str(tmp_path / "hub" / role / f"{role}-00000.parquet"),)
    write(tmp_path / "quati" / "README.md", "about the passages")
    write(tmp_path / "quati" / "parts" / "quati_1M.tsv.gz", "1\tx\n")
    with pytest.raises(InputError, match="quati: cannot tell the format of this folder"):
        open_corpus(tmp_path / "quati")
    write(tmp_path / "tsv" / "p2.tsv", "")
    write(tmp_path / "tsv" / "p10.tsv.gz", "")
    assert [pathlib.Path(name).name for name in find(tmp_path / "tsv", "tsv", "corpus").files] == [
        "p2.tsv",
        "p10.tsv.gz",
    ]


def test_what_cannot_be_told_lists_the_formats(tmp_path: pathlib.Path) -> None:
    listed = f"Name the format.*one of {', '.join(FORMATS)}, or auto"
    with pytest.raises(
        InputError, match=rf"c.dat: cannot tell the format from the name. Expected a .tsv.*{listed}"
    ):
        open_corpus(write(tmp_path / "c.dat", ""))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=rf"empty: cannot tell the format of this folder.*{listed}"):
        open_corpus(tmp_path / "empty")
    with pytest.raises(
        InputError, match=r"empty: no tsv file in this folder. Expected names that end with .tsv or"
    ):
        open_corpus(tmp_path / "empty", "tsv")
    with pytest.raises(InputError, match=r"c.dat: this is a file. Expected a BEIR folder with corpus.jsonl"):
        open_corpus(tmp_path / "c.dat", "beir")
    write(tmp_path / "a.tsv", "x\ty\n")
    write(tmp_path / "b.jsonl", '{"id": "a", "text": "t"}\n')
    with pytest.raises(InputError, match=r"one format, but .*a.tsv is tsv, .*b.jsonl is jsonl. Name it"):
        open_corpus(f"{tmp_path}/a.tsv,{tmp_path}/b.jsonl")
    assert open_corpus(tmp_path / "c.dat", "tsv").format == "tsv"


def test_a_folder_of_text_files(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "docs" / "b" / "10 dez.txt", "\ufeffum\ndois\n")
    write(tmp_path / "docs" / "b" / "9.md.gz", "nove")
    write(tmp_path / "docs" / "100%.txt", "cem")
    write(tmp_path / "docs" / ".git" / "hidden.txt", "no")
    write(tmp_path / "docs" / "b" / "image.png", b"\x89")
    corpus = open_corpus(tmp_path / "docs")
    assert corpus.format == "text"
    assert list(corpus.documents()) == [
        Document("100%25.txt", "cem"),
        Document("b/9.md.gz", "nove"),
        Document("b/10%20dez.txt", "um\ndois"),
    ]
    assert corpus.texts()["b/10%20dez.txt"] == "um\ndois"
    assert open_corpus(tmp_path / "docs" / "100%.txt", "text").texts() == {"100%25.txt": "cem"}
    write(tmp_path / "docs" / "c.txt", b"caf\xe9")
    with pytest.raises(InputError, match=r"c.txt:1: byte 4 of the line, 0xe9, is not UTF-8"):
        list(open_corpus(tmp_path / "docs").documents())
    with pytest.raises(InputError, match="'text' is a folder of documents, not of queries"):
        open_queries_any(tmp_path / "docs", "text")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no text file in this folder"):
        open_corpus(tmp_path / "none", "text")
