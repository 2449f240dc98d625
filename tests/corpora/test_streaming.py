"""Memory does not grow with the corpus, except for what tells that ids are unique and where rows start."""

from __future__ import annotations

import pathlib
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from inranker_jax.corpora import open_corpus
from inranker_jax.corpora.ids import CompactIds
from inranker_jax.corpora.inranker import write_beir_jsonl
from inranker_jax.records import LabelledPair

ROWS = 20_000
TEXT = "palavra " * 60
SIZE = ROWS * len(TEXT)  # 10 MB


def _write(path: pathlib.Path, kind: str) -> pathlib.Path:
    with open(path, "w", encoding="utf-8") as out:
        for row in range(ROWS):
            if kind == "numbers":
                out.write(f"{row}\t{TEXT}\n")
            elif kind == "names":
                out.write(f"D{row}\t{TEXT}\n")
            else:
                out.write(f'{{"_id": "D{row}", "title": "", "text": "{TEXT}"}}\n')
    return path


def _peak(work: Callable[[], Any]) -> tuple[int, int]:
    """Peak of memory during the work, and memory still held by its result, in bytes."""
    tracemalloc.start()
    try:
        result = work()
        held, peak = tracemalloc.get_traced_memory()
        del result
        return peak, held
    finally:
        tracemalloc.stop()


# Bytes a document while streaming and while held for look-ups, above a constant of 400 kB for buffers.
@pytest.mark.parametrize(
    ("kind", "streaming", "held"), [("numbers", 0, 8), ("names", 80, 24), ("jsonl", 80, 24)]
)
def test_a_corpus_in_little_memory(tmp_path: pathlib.Path, kind: str, streaming: int, held: int) -> None:
    path = _write(tmp_path / ("c.jsonl" if kind == "jsonl" else "c.tsv"), kind)
    corpus = open_corpus(path)
    peak, _ = _peak(lambda: sum(1 for _ in corpus.documents()))
    assert peak < 400_000 + streaming * ROWS < SIZE / 4
    _, kept = _peak(corpus.texts)
    assert kept < 400_000 + held * ROWS < SIZE / 4


def test_a_parquet_corpus_in_little_memory(tmp_path: pathlib.Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    with pq.ParquetWriter(
        tmp_path / "c.parquet", pa.schema([("id", pa.string()), ("text", pa.string())]), compression="none",
        use_dictionary=False,
    ) as writer:  # fmt: skip
        for start in range(0, ROWS, 1000):
            ids = [f"D{row}" for row in range(start, start + 1000)]
            writer.write_table(pa.table({"id": ids, "text": [TEXT + name for name in ids]}))
    peaks = []

    def read() -> int:
        count = 0
        for _ in open_corpus(tmp_path / "c.parquet").documents():
            count += 1
            if count % 1000 == 0:
                peaks.append(pa.total_allocated_bytes())
        return count

    peak, _ = _peak(read)
    assert peak + max(peaks) < 400_000 + 80 * ROWS + 2_000_000 < SIZE / 2


def test_writing_streams(tmp_path: pathlib.Path) -> None:
    pairs = (LabelledPair("q", f"d{row}", "query", f"{TEXT}{row}", (0.0, 1.0)) for row in range(ROWS))
    peak, _ = _peak(lambda: write_beir_jsonl(tmp_path / "out.jsonl", pairs))
    assert peak < 400_000
    assert (tmp_path / "out.jsonl").stat().st_size > SIZE


def test_compact_ids() -> None:
    ids = CompactIds()
    assert not any(ids.add(str(row)) for row in range(5000))  # row numbers: nothing is stored
    assert ids._filled == 0
    assert not ids.add("05000")
    assert ids._filled == 5001
    assert all(ids.add(str(row)) for row in range(5000))
    assert not any(ids.add(f"d{row}") for row in range(5000))
    assert all(ids.add(f"d{row}") for row in range(5000))
    assert len(ids) == 10_001
    early = CompactIds()
    known = [early.add(name) for name in ("0", "1", "1", "2", "0", "x", "x")]
    assert known == [False, False, True, False, True, False, True]
