"""Parquet corpora and queries."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import pytest

from inranker_jax.corpora import open_corpus, open_queries_any
from inranker_jax.errors import InputError
from inranker_jax.records import Document, Query

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path: pathlib.Path, **columns: Any) -> pathlib.Path:
    pq.write_table(pa.table(columns), path, row_group_size=1000)
    return path


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_a_corpus(tmp_path: pathlib.Path, kind: str) -> None:
    texts = pa.array([f"texto {row}" for row in range(2500)])
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(getattr(pa, kind)())
    path = write(
        tmp_path / "c.parquet", _id=range(2500), title=["T", *[None] * 2499], text=texts, vector=range(2500)
    )
    corpus = open_corpus(path)
    documents = list(corpus.documents())
    assert corpus.format == "parquet"
    assert documents[:2] == [Document("0", "texto 0", "T"), Document("1", "texto 1")]
    assert len(documents) == 2500
    assert corpus.texts()["2499"] == "texto 2499"


def test_a_folder_of_parts_and_queries(tmp_path: pathlib.Path) -> None:
    for part in (10, 2):
        write(tmp_path / f"part-{part}.parquet", id=[f"q{part}"], query=[f" onde {part}?"], text=["no"])
    assert list(open_queries_any(tmp_path).queries()) == [Query("q2", "onde 2?"), Query("q10", "onde 10?")]


@pytest.mark.parametrize(
    ("columns", "kind", "message"),
    [
        ({"id": ["a", None, "b"], "text": ["x", "y", "z"]}, "bad_id", r":2: 'id' is None"),
        ({"id": ["a", "b", "b"], "text": ["x", None, "z"]}, "missing_field", r":2: 'text' is null"),
        (
            {"id": ["a", "a", "b"], "text": ["x", "y", "z"]},
            "duplicate_id",
            r":2: id 'a' occurs twice.* line 1",
        ),
        (
            {"id": ["a", "b", "c"], "text": [b"x", b"\xff", b"z"]},
            "encoding",
            r":2: column 'text' is not UTF-8",
        ),
        ({"id": ["a", "b", "c"], "text": [["x"], ["y"], ["z"]]}, "bad_field", r":1: 'text' is \['x'\]"),
    ],
)
def test_bad_rows_are_named(tmp_path: pathlib.Path, columns: Any, kind: str, message: str) -> None:
    if isinstance(columns["text"][0], bytes):
        raw = pa.array(columns["text"], pa.binary())
        columns = {**columns, "text": pa.Array.from_buffers(pa.string(), 3, raw.buffers())}
    path = write(tmp_path / "c.parquet", **columns)
    with pytest.raises(InputError, match="c.parquet" + message):
        list(open_corpus(path).documents())
    corpus = open_corpus(path, on_malformed="skip")
    if kind != "bad_field":
        assert len(list(corpus.documents())) == 2
        assert corpus.report.counts == {kind: 1}


def test_files_that_cannot_be_read(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "c.parquet", id=["a"], text=["x"]).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-10])
    for name in ("cut.parquet", "empty.parquet"):
        (tmp_path / "empty.parquet").write_bytes(b"")
        with pytest.raises(InputError, match=f"{name}: not a whole Parquet file"):
            list(open_corpus(tmp_path / name, on_malformed="skip").documents())
    write(tmp_path / "other.parquet", chave=["a"], texto=["x"])
    with pytest.raises(
        InputError, match=r"no column of a known name among \['chave', 'texto'\]. Expected an id"
    ):
        list(open_corpus(tmp_path / "other.parquet").documents())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"'pyarrow' package.*pip install 'inranker_jax\[label\]'"):
        list(open_corpus(tmp_path / "c.parquet").documents())
