"""Runs read query by query: equal to the reader of whole runs, strict about what it cannot stream."""

from __future__ import annotations

import gzip
import tracemalloc

import numpy as np
import pytest

from inranker_jax import records
from inranker_jax.errors import InputError
from inranker_jax.retrieval import runs


def test_equals_the_reader_of_whole_runs(tmp_path):
    path = tmp_path / "a.trec"
    path.write_text(
        "q2 Q0 d1 1 1.5 t\n\nq2\tQ0  d10 2\t2.5 t\nq2 Q0 d9 3 1.5 t\r\nq1 Q0 d1 1 -3e-2 t\n  \n q0 Q0 x 1 7 t",
        "utf-8",
    )
    streamed = list(runs.stream_run(path))
    assert streamed == [
        ("q2", [("d10", 2.5), ("d9", 1.5), ("d1", 1.5)]),
        ("q1", [("d1", -0.03)]),
        ("q0", [("x", 7.0)]),
    ]
    assert {query: dict(documents) for query, documents in streamed} == records.read_run(path)


def test_compressed_and_empty(tmp_path):
    with gzip.open(tmp_path / "a.trec.gz", "wt") as out:
        out.write("q Q0 d 1 2 t\n")
    assert list(runs.stream_run(tmp_path / "a.trec.gz")) == [("q", [("d", 2.0)])]
    (tmp_path / "empty").write_text("")
    assert list(runs.stream_run(tmp_path / "empty")) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q Q0 d 1 2 t\nq Q0 d\n", ":2: 3 columns"),
        ("q Q0 d 1 nan t\n", ":1: score 'nan' is not a finite number"),
        ("q Q0 d 1 1,5 t\n", ":1: score '1,5'"),
        ("q Q0 d 1 2 t\nq Q0 e 1 2 t\nq Q0 d 2 1 t\n", ":3: document 'd' is listed twice .* line 1"),
        ("q Q0 d 1 2 t\np Q0 d 1 2 t\nq Q0 e 2 1 t\n", ":3: query 'q' comes again .* `sort -s -k1,1"),
    ],
)
def test_errors_name_the_line(tmp_path, text, expected):
    path = tmp_path / "bad.trec"
    path.write_text(text)
    with pytest.raises(InputError, match=expected):
        list(runs.stream_run(path))


def test_lenient_reading_counts_what_it_leaves_out(tmp_path):
    path = tmp_path / "bad.trec"
    path.write_text("q Q0 d 1 2 t\nq Q0\nq Q0 d 1 1 t\nq Q0 e 1 inf t\nq Q0 f 9 1 t\n")
    skipped = runs.SkippedLines()
    (query,) = runs.read_queries(path, skipped)
    assert query.documents == {"d": (2.0, 1), "f": (1.0, 5)}
    assert skipped.counts == {"malformed line": 3}
    assert skipped.summary().startswith(
        f"left out 3 lines (3 x malformed line); the first: {path}:2: 2 columns"
    )
    path.write_text("q Q0 d 1 2 t\np Q0 d 1 2 t\nq Q0 e 2 1 t\n")
    with pytest.raises(InputError, match="comes again"):
        list(runs.read_queries(path, runs.SkippedLines()))


def test_memory_is_that_of_one_query(tmp_path):
    path = tmp_path / "large.trec"
    with open(path, "w") as out:
        for query in range(300):
            out.writelines(f"query{query} Q0 document{query}-{i} {i} {1000 - i} tag\n" for i in range(200))
    tracemalloc.start()
    count = sum(len(documents) for _, documents in runs.stream_run(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 60000
    assert peak < 0.5e6 < path.stat().st_size / 4


def test_written_lines_read_back_as_the_same_float32(tmp_path):
    values = np.random.default_rng(0).gamma(2.0, 5.0, 500).astype(np.float32)
    scores = dict(sorted(((f"d{i}", float(v)) for i, v in enumerate(values)), key=lambda item: -item[1]))
    lines = runs.run_lines("q", scores, "tag")
    assert lines[0].split()[::3] == ["q", "1"]
    assert lines[-1].split()[3] == "500"
    path = tmp_path / "a.trec"
    path.write_text("".join(lines))
    ((query, found),) = runs.stream_run(path)
    assert (query, [document for document, _ in found]) == ("q", list(scores))
    assert {document: np.float32(score) for document, score in found} == scores
    assert all(len(line.split()[4]) <= 12 for line in lines)
