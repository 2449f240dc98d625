"""A user's own task file, as the README shows it: registered, read, mixed and cached offline."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from inranker_jax import data
from inranker_jax.prompts import Tokenizer, preset

seqio = pytest.importorskip("seqio", reason="needs the [train] extra")

TASK_FILE = pathlib.Path(__file__).with_name("my_corpus.py")
VOCABULARY = pathlib.Path(data.__file__).parents[1] / "collections" / "python_docs" / "vocabulary"


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The user's folder: three files, 60 queries with 12 labelled documents each, and one bad line."""
    labels = [
        f"{1 if place == 0 else -1}\t{-1 if place == 0 else 1}\t{query}\t{(query + place) % 50}\n"
        for query in range(60)
        for place in range(12)
    ]
    (tmp_path / "labels.tsv").write_text("".join([*labels, "1\tnan\t0\t0\n"]))
    (tmp_path / "queries.tsv").write_text("".join(f"{n}\tquery {n}\n" for n in range(60)))
    (tmp_path / "collection.tsv").write_text("".join(f"{n}\tdocument {n}\n" for n in range(50)))
    monkeypatch.chdir(tmp_path)
    data.import_task_modules([str(TASK_FILE)])
    return tmp_path


def stream_arguments(folder: pathlib.Path) -> dict[str, Any]:
    return {
        "contract": preset("inranker"),
        "tokenizer": Tokenizer.from_pretrained(VOCABULARY),
        "cache_dir": folder / "cache",
    }


def test_the_file_is_short() -> None:
    assert len(TASK_FILE.read_text().splitlines()) < 25


def test_batches_of_a_users_task(folder: pathlib.Path) -> None:
    arguments = stream_arguments(folder)
    seen = {}
    for split in ("train", "validation"):
        with data.open_stream("my_corpus", split, batch_size=4, num_epochs=1, **arguments) as stream:
            rows = [row for batch in stream for row in batch.examples if row[0]]
        seen[split] = {query for query, _ in rows}
        # Twelve documents a query, in lists of at most ten.
        assert sorted({len(documents) for _, documents in rows}) == [2, 10]
        assert len(rows) == 2 * len(seen[split])
    assert not seen["train"] & seen["validation"]
    assert len(seen["train"] | seen["validation"]) == 60


@pytest.mark.slow
def test_seqio_caches_it_offline(folder: pathlib.Path) -> None:
    pytest.importorskip("apache_beam", reason="offline caching needs the [beam] extra")
    pytest.importorskip("google_crc32c", reason="offline caching needs the [beam] extra")
    (folder / "my_corpus.py").write_bytes(TASK_FILE.read_bytes())
    command = [sys.executable, "-m", "seqio.scripts.cache_tasks_main", "--module_import=my_corpus"]
    command += ["--tasks=my_corpus", f"--output_cache_dir={folder / 'seqio'}"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    direct, _ = data.open_stores("my_corpus", cache_dir=folder / "cache")
    cached, _ = data.open_stores(
        "my_corpus", use_cached=True, seqio_cache_dirs=[str(folder / "seqio")], cache_dir=folder / "cache"
    )
    # SeqIO spreads a split over files in no order; what is read is the task's own order again.
    assert cached[0].fingerprint == direct[0].fingerprint
    assert len(direct[0]) > 90
