"""Stores: exact round trips, one-time reading, kills and races."""

from __future__ import annotations

import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import numpy as np
import pytest

from inranker_jax.data.store import Example, ExampleStore, default_cache_dir, example_from_features
from inranker_jax.errors import InputError
from tests.data.conftest import make_example


def same(a: Example, b: Example) -> bool:
    return a.to_bytes() == b.to_bytes()


def test_an_example_survives_its_record_exactly() -> None:
    values = np.asarray([[1 / 3, -1e-30], [3.4e38, 0.1]], np.float32)
    example = Example(
        'q"\n\t', "¿qué?\u200b 🙂", ("a", "b"), ("x\ny", "ü"), values, np.asarray([1, -1], np.float32)
    )
    back = Example.from_bytes(example.to_bytes())
    np.testing.assert_array_equal(back.teacher_logits, values)
    assert back.teacher_logits is not None
    assert back.teacher_logits.dtype == back.relevance.dtype == np.float32
    assert (back.query_id, back.query, back.document_ids, back.documents) == (
        example.query_id,
        example.query,
        example.document_ids,
        example.documents,
    )
    bare = make_example(1, teacher=False)
    assert Example.from_bytes(bare.to_bytes()).teacher_logits is None


@pytest.mark.parametrize("memory_limit", [1 << 30, 1000])
def test_random_access(tmp_path: pathlib.Path, memory_limit: int) -> None:
    examples = [make_example(n, 1 + n % 4) for n in range(200)]
    store = ExampleStore.open(
        "toy:train", iter(examples), identity="a" * 64, cache_dir=tmp_path, memory_limit=memory_limit
    )
    assert (store.path is None) == (memory_limit > 1000)
    assert len(store) == 200
    assert store.max_list_size == 4
    assert store.has_teacher_logits
    order = np.random.default_rng(0).integers(0, 200, 500)
    for found, number in zip(store.take(order), order, strict=True):
        assert same(found, examples[number])
    assert same(store[199], examples[199])
    assert store.take([]) == []
    for number in (200, -1):
        with pytest.raises(IndexError):
            store[number]


def test_fingerprint_is_of_the_content(tmp_path: pathlib.Path) -> None:
    examples = [make_example(n) for n in range(30)]
    digest = hashlib.sha256()
    for example in examples:
        record = example.to_bytes()
        digest.update(len(record).to_bytes(8, "big") + record)
    in_memory = ExampleStore.from_examples(examples)
    on_disk = ExampleStore.open(
        "t:train", iter(examples), identity="b" * 64, cache_dir=tmp_path, memory_limit=10
    )
    assert in_memory.fingerprint == on_disk.fingerprint == digest.hexdigest()
    assert ExampleStore.from_examples(examples[::-1]).fingerprint != in_memory.fingerprint


def untouchable() -> Iterator[Example]:
    raise AssertionError("the examples were read again")
    yield


def test_a_stored_split_is_read_once(tmp_path: pathlib.Path) -> None:
    def open_store(examples: Iterator[Example], identity: str | None) -> ExampleStore:
        return ExampleStore.open("t:train", examples, identity=identity, cache_dir=tmp_path, memory_limit=10)

    first = open_store(iter([make_example(1), make_example(2)]), "c" * 64)
    again = open_store(untouchable(), "c" * 64)
    assert again.fingerprint == first.fingerprint
    assert same(again[1], first[1])
    with pytest.raises(AssertionError, match="read again"):
        open_store(untouchable(), "d" * 64)
    # Without an identity nothing is reused, and nothing stays behind.
    before = sorted(tmp_path.glob("*.array_record"))
    once = open_store(iter([make_example(3)]), None)
    assert same(once[0], make_example(3))
    with pytest.raises(AssertionError, match="read again"):
        open_store(untouchable(), None)
    assert sorted(tmp_path.glob("*.array_record")) == before


def test_a_damaged_file_is_made_again(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = [make_example(n) for n in range(50)]
    first = ExampleStore.open("t:x", iter(examples), identity="e" * 64, cache_dir=tmp_path, memory_limit=10)
    assert first.path is not None
    data = pathlib.Path(first.path).read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"no such format" * 100):
        pathlib.Path(first.path).write_bytes(damaged)
        again = ExampleStore.open(
            "t:x", iter(examples), identity="e" * 64, cache_dir=tmp_path, memory_limit=10
        )
        assert again.fingerprint == first.fingerprint
        assert same(again[49], examples[49])
        assert "cannot be used" in capsys.readouterr().err


def test_an_error_while_reading_leaves_nothing(tmp_path: pathlib.Path) -> None:
    def broken() -> Iterator[Example]:
        yield from (make_example(n) for n in range(50))
        raise InputError("file.tsv:51: bad")

    with pytest.raises(InputError, match=r"file\.tsv:51"):
        ExampleStore.open("t:x", broken(), identity="f" * 64, cache_dir=tmp_path, memory_limit=10)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_errors(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="t:x holds no examples"):
        ExampleStore.open("t:x", iter([]), identity=None, cache_dir=tmp_path)
    with pytest.raises(InputError, match="all or none"):
        ExampleStore.from_examples([make_example(1), make_example(2, teacher=False)])
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="INRANKER_CACHE_DIR"):
        ExampleStore.open(
            "t:x", iter([make_example(1)]), identity="0" * 64, cache_dir=blocked, memory_limit=1
        )


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INRANKER_CACHE_DIR", "/somewhere")
    assert default_cache_dir() == pathlib.Path("/somewhere")
    monkeypatch.delenv("INRANKER_CACHE_DIR")
    assert default_cache_dir() == pathlib.Path.home() / ".cache" / "inranker_jax"


SLOW_READER = """
    import pathlib, sys, time
    from inranker_jax.data.store import ExampleStore
    from tests.data.conftest import make_example

    folder, log, pause = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[3])

    def examples():
        with log.open("a") as out:
            out.write("read\\n")
        for number in range(40):
            time.sleep(pause)
            yield make_example(number)

    store = ExampleStore.open("t:train", examples(), identity="9" * 64, cache_dir=folder, memory_limit=100)
    print(len(store), store.fingerprint)
"""


def start_reader(folder: pathlib.Path, log: pathlib.Path, pause: float) -> subprocess.Popen[str]:
    root = pathlib.Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW_READER), str(folder), str(log), str(pause)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def test_a_killed_reader_leaves_no_trap(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log"
    process = start_reader(tmp_path / "cache", log, 0.5)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*.part")):
        assert time.monotonic() < deadline, "the reader did not start writing"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "cache").glob("*.array_record"))
    examples = [make_example(number) for number in range(40)]
    store = ExampleStore.open(
        "t:train", iter(examples), identity="9" * 64, cache_dir=tmp_path / "cache", memory_limit=100
    )
    assert len(store) == 40
    assert not list((tmp_path / "cache").glob("*.part")), "the killed reader's file was not cleared away"


def test_processes_share_the_work(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log"
    processes = [start_reader(tmp_path / "cache", log, 0.05) for _ in range(2)]
    outputs = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(outputs) == 1
    assert outputs.pop().startswith("40 ")
    assert log.read_text() == "read\n", "both processes read the source"


GOOD = {
    "query_id": b"q",
    "query": b"what",
    "document_ids": np.asarray([b"1", b"2"], object),
    "documents": np.asarray([b"one", b"two"], object),
    "teacher_logits": np.zeros((2, 2), np.float32),
    "relevance": np.asarray([1, 0], np.float32),
}


def test_features_become_an_example() -> None:
    example = example_from_features(GOOD, "t:train, example 0")
    assert example.documents == ("one", "two")
    bare = {name: value for name, value in GOOD.items() if name not in ("teacher_logits", "relevance")}
    example = example_from_features(bare, "x")
    assert example.teacher_logits is None
    assert example.relevance.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": b"  "}, "'query' holds an empty text"),
        ({"documents": np.asarray([b"one", b""], object)}, "'documents' holds an empty text"),
        ({"query": b"\xff"}, "'query' is not UTF-8"),
        ({"document_ids": np.asarray([b"1"], object)}, "2 documents and 1 document_ids"),
        ({"documents": np.asarray([], object), "document_ids": np.asarray([], object)}, "0 documents"),
        ({"teacher_logits": np.zeros((2, 3), np.float32)}, r"shape \(2, 3\); expected \(2, 2\)"),
        ({"teacher_logits": np.asarray([[0, np.nan], [0, 0]])}, "'teacher_logits' holds NaN"),
        ({"relevance": np.asarray([np.inf, 0])}, "'relevance' holds NaN or infinity"),
    ],
)
def test_bad_features_are_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=f"t:train, example 7: .*{words}"):
        example_from_features({**GOOD, **change}, "t:train, example 7")


def test_a_missing_feature_is_named() -> None:
    bad = {name: value for name, value in GOOD.items() if name != "documents"}
    with pytest.raises(InputError, match="no feature 'documents'"):
        example_from_features(bad, "x")
