"""Runs and qrels: what is read back is what was written, and a bad line is named."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from inranker_jax import records
from inranker_jax.errors import InputError


def _write(path, text):
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return path


def test_contents_join_title_and_text():
    assert records.Document("1", "text", "A title").contents == "A title text"
    assert records.Document("1", "text").contents == "text"
    assert records.Document("1", "", "A title").contents == "A title"
    assert records.Document("1", "").contents == ""


def test_ranking_breaks_float32_ties_by_descending_id():
    # 0.1 and 0.1 + 1e-9 differ in float64 and are the same float32, so the id decides.
    assert records.ranking({"a": 0.1 + 1e-9, "b": 0.1, "c": -1.0, "d": 0.2}) == ["d", "b", "a", "c"]
    assert records.ranking({}) == []


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz", "new/folder/run.trec"])
def test_run_reads_back_as_written(tmp_path, name):
    values = np.random.default_rng(0).normal(size=200).astype(np.float32)
    run = {"q2": {f"d{i}": float(v) for i, v in enumerate(values)}, "q1": {"ção": 1e-30, "é": -3e30}}
    records.write_run(tmp_path / name, run, "tag")
    assert records.read_run(tmp_path / name).keys() == run.keys()
    back = records.read_run(tmp_path / name)
    for query, scores in run.items():
        assert records.ranking(back[query]) == records.ranking(scores) == list(back[query])
        for document, score in scores.items():
            assert np.float32(back[query][document]) == np.float32(score)


def test_run_file_has_the_trec_columns(tmp_path):
    records.write_run(tmp_path / "r", {"q": {"a": 1, "b": 2.5, "c": 1}}, "bm25")
    assert (tmp_path / "r").read_text() == "q Q0 b 1 2.5 bm25\nq Q0 c 2 1.0 bm25\nq Q0 a 3 1.0 bm25\n"


def test_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = _write(tmp_path / "r", "old")
    with pytest.raises(InputError, match="document id 'a b'"):
        records.write_run(path, {"q": {"a b": 1.0}}, "t")
    with pytest.raises(InputError, match="cannot write score nan"):
        records.write_run(path, {"q": {"a": float("nan")}}, "t")
    with pytest.raises(InputError, match="cannot write score"):
        records.write_run(path, {"q": {"a": 1e39}}, "t")
    with pytest.raises(InputError, match="tag ''"):
        records.write_run(path, {"q": {"a": 1.0}}, "")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_run_accepts_tabs_blank_lines_carriage_returns_and_a_byte_order_mark(tmp_path):
    path = _write(tmp_path / "r", "\ufeffq\tQ0\td\t1\t1.5\tt\r\n\r\n\nq  Q0 e 2 -1e-3 t")
    assert records.read_run(path) == {"q": {"d": 1.5, "e": -0.001}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q Q0 d 1 1.0 t\nq Q0 e 2 1.0\n", r":2: 5 columns"),
        ("q 0 d 1\n", r":1: 4 columns"),
        ("q Q0 d 1 high t\n", r":1: score 'high'"),
        ("q Q0 d 1 nan t\n", r":1: score 'nan'"),
        ("q Q0 d 1 inf t\n", r":1: score 'inf'"),
        ("q Q0 d 1 1 t\nq Q0 e 2 1 t\nq Q0 d 3 1 t\n", r":3: document 'd' is listed twice for query 'q'"),
        (b"q Q0 d 1 1 t\nq Q0 \xe9 2 1 t\n", r":2: byte 6 of the line, 0xe9, is not UTF-8"),
    ],
)
def test_bad_run_line_is_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        records.read_run(_write(tmp_path / "bad.trec", text))


@pytest.mark.parametrize(
    "text",
    [
        "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td 3\t-1\n",
        "q1\td1\t2\nq1\td2\t0\nq1\td2\t0\nq2\td 3\t-1\n",
    ],
)
def test_beir_qrels(tmp_path, text):
    assert records.read_qrels(_write(tmp_path / "q.tsv", text)) == {
        "q1": {"d1": 2, "d2": 0},
        "q2": {"d 3": -1},
    }


def test_trec_qrels(tmp_path):
    path = _write(tmp_path / "q.txt", "1 0 d1 2\n1\tQ0\td2\t0\n\n2 0 d1 1\n")
    assert records.read_qrels(path) == {"1": {"d1": 2, "d2": 0}, "2": {"d1": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query-id\tcorpus-id\tscore\nq\td\thigh\n", r":2: grade 'high'"),
        ("q 0 d 1\nq 0 e 0.5\n", r":2: grade '0.5'"),
        ("q 0 d nan\n", r":1: grade 'nan'"),
        ("q 0 d 1\nq\td\t1\n", r":2: 3 columns"),
        ("q d\n", r":1: 2 columns"),
        ("q 0 d 1\nq 0 d 2\n", r":2: .*graded 1 and 2"),
        ("q\t\t1\n", r":1: an id is empty"),
        ("query-id\tcorpus-id\tscore\n", r"holds no judgments"),
        ("", r"holds no judgments"),
        (b"q 0 \xff 1\n", r":1: .*not UTF-8"),
    ],
)
def test_bad_qrels_line_is_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        records.read_qrels(_write(tmp_path / "bad", text))


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.trec: no such file"):
        records.read_run(tmp_path / "nowhere.trec")
    with pytest.raises(InputError, match=r"this is a folder"):
        records.read_run(tmp_path)
    with pytest.raises(InputError, match=r"not a whole gzip file"):
        records.read_run(_write(tmp_path / "cut.gz", gzip.compress(b"q Q0 d 1 1 t\n")[:-9]))
    with pytest.raises(InputError, match=r"not a whole gzip file"):
        records.read_run(_write(tmp_path / "plain.gz", "q Q0 d 1 1 t\n"))


def test_open_text_reads_plain_and_compressed(tmp_path):
    _write(tmp_path / "a.gz", gzip.compress("linha\u2028um\ndois".encode()))
    with records.open_text(tmp_path / "a.gz") as handle:
        assert list(handle) == ["linha\u2028um\n", "dois"]


def test_zstd_is_read_or_says_what_to_install(tmp_path):
    path = tmp_path / "a.trec.zst"
    try:
        import zstandard
    except ImportError:
        _write(path, b"")
        with pytest.raises(InputError, match="pip install zstandard"):
            records.read_run(path)
    else:
        _write(path, zstandard.ZstdCompressor().compress(b"q Q0 d 1 1 t\n"))
        assert records.read_run(path) == {"q": {"d": 1.0}}
