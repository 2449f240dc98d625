"""benchmarks/retrieval.py runs, and its estimate is the straight line that it says it is."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "retrieval.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_of_retrieval", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_estimate_is_a_straight_line_through_the_two_largest(benchmark):
    rows = [
        {"passages": n, "build s": 1 + n / 20000, "passages/s": 1.0, "ms/query x1": 2 + n / 1e5, "queries/s x1": 1.0,
         "candidates/query": 7.0}
        for n in (5, 10_000, 1_000_000)
    ]  # fmt: skip
    rows[0]["build s"] = 99.0  # the smallest does not matter
    row = benchmark.extrapolate(rows)
    assert row["passages"] == 8_841_823
    assert row["build s"] == pytest.approx(1 + 8_841_823 / 20000)
    assert row["passages/s"] == pytest.approx(8_841_823 / row["build s"])
    assert row["queries/s x1"] == pytest.approx(1000 / (2 + 88.41823))
    assert row["candidates/query"] == 7.0


def test_generated_words_differ_from_each_other(benchmark):
    words = [benchmark.word(rank) for rank in [*range(20_000), *range(7_990_000, 8_000_000)]]
    # A made-up word may happen to be a function word.
    assert len(set(words)) >= len(words) - len(benchmark.COMMON)
    assert all(len(word) >= 2 for word in words if word != "a")


def test_generated_text_has_the_stated_statistics(benchmark):
    lengths = np.full(5000, 56)
    texts = list(benchmark.texts(lengths, seed=0))
    words = [text.split() for text in texts]
    assert {len(row) for row in words} == {56}
    function_words = sum(word in benchmark.COMMON for row in words for word in row)
    assert function_words / (5000 * 56) == pytest.approx(0.29, abs=0.01)


def test_it_prints_a_table():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--sizes=200,400", "--threads=1", "--queries_per_size=5"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split("  ")[-1] == "MS MARCO (estimate)"
    assert lines[1].split() == ["passages", "200", "400", "8,841,823"]
    assert lines[-1].startswith(
        "The last column is not measured: a straight line through 200 and 400 passages"
    )
