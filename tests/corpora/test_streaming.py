"""Memory does not grow with the corpus, except for what tells that ids are unique and where rows start."""

from __future__ import annotations

import functools
import gzip
import pathlib
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from inranker_jax.corpora import corpus as corpus_module
from inranker_jax.corpora import open_corpus, texts
from inranker_jax.corpora.ids import CompactIds
from inranker_jax.corpora.inranker import write_beir_jsonl
from inranker_jax.records import Document, LabelledPair

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


def test_compressed_texts_spill_to_a_file_without_a_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    path = _write(tmp_path / "c.tsv", "names")
    (tmp_path / "c.tsv.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    packed = open_corpus(tmp_path / "c.tsv.gz")
    monkeypatch.setattr(corpus_module, "hold", functools.partial(texts.hold, memory_limit=100_000))
    kept: list[Mapping[str, str]] = []
    peak, _ = _peak(lambda: kept.append(packed.texts()))
    assert peak < 700_000 + 80 * ROWS < SIZE / 4
    assert isinstance(kept[0], texts.OffsetTexts)
    assert list((tmp_path / "tmp").iterdir()) == []
    plain = open_corpus(path).texts()
    assert list(kept[0]) == list(plain)
    assert all(kept[0][f"D{row}"] == plain[f"D{row}"] for row in range(0, ROWS, 7))
    assert "D20000" not in kept[0]


def test_texts_with_line_ends_survive_the_spill() -> None:
    documents = [Document("a", "x\ny\u2028“z”", "T"), Document("b", "\ud7ff\t")]
    for limit in (0, 3, 1000):
        assert texts.hold(iter(documents), memory_limit=limit) == {"a": "T x\ny\u2028“z”", "b": "\ud7ff"}
        assert texts.hold(iter(documents), titles=False, memory_limit=limit)["a"] == "x\ny\u2028“z”"


def test_opening_a_text_corpus_loads_no_optional_package(tmp_path: pathlib.Path) -> None:
    (tmp_path / "c.tsv").write_text("a\tx\n")
    code = (
        "import sys; from inranker_jax.corpora import open_corpus, open_queries_any\n"
        f"list(open_corpus({str(tmp_path / 'c.tsv')!r}).documents())\n"
        "print(*{'pyarrow', 'etils', 'zstandard', 'tensorflow', 'jax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


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
