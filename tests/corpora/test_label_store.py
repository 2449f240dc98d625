"""The label store: keys, atomic parts, lookups, and files that are torn or damaged."""

from __future__ import annotations

import hashlib
import os
import pathlib
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from inranker_jax.corpora import label_store
from inranker_jax.corpora.label_store import LabelStore, LabelTable, pair_key, resolve_teacher, teacher_key
from inranker_jax.errors import InputError

pq = pytest.importorskip("pyarrow.parquet")

IDENTITY = {"kind": "test", "fingerprint": "abc", "contract": {"template": "Q: {query}"}}


def some_keys(count: int, seed: int = 0) -> np.ndarray:
    keys = np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)
    keys[: count // 4, 12:] = 0  # trailing zero bytes, which NumPy's strings drop when they are printed
    return keys


def some_logits(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 2)).astype(np.float32)


@pytest.fixture
def store(tmp_path: pathlib.Path) -> LabelStore:
    return LabelStore(tmp_path / "store")


def test_pair_key_is_the_published_hash() -> None:
    expected = hashlib.sha256("5:asa é".encode() + b"voo").digest()[:16]
    assert pair_key("asa é", " voo\n") == expected
    assert pair_key("a", "bc") != pair_key("ab", "c")
    assert pair_key("1:a", "b") != pair_key("1", ":ab")


def test_a_text_without_utf8_form() -> None:
    with pytest.raises(InputError, match="surrogate"):
        pair_key("what", "half \ud800")


def test_teacher_key_knows_no_order() -> None:
    assert teacher_key({"a": 1, "b": [1, 2]}) == teacher_key({"b": [1, 2], "a": 1})
    assert teacher_key({"a": 1}) != teacher_key({"a": 1.5})
    with pytest.raises(InputError, match="JSON"):
        teacher_key({"a": object()})


def test_round_trip(store: LabelStore) -> None:
    key = store.add_teacher(IDENTITY, {"date": "today"})
    assert store.add_teacher(IDENTITY, {"date": "tomorrow"}) == key
    assert store.teacher(key)["provenance"] == {"date": "today"}
    keys, logits = some_keys(100), some_logits(100)
    store.write_part(key, "part-job-000000", keys[:60], logits[:60])
    store.write_part(key, "part-job-000001", keys[60:], logits[60:])
    assert store.teacher_keys() == [key]
    assert store.parts(key) == ["part-job-000000", "part-job-000001"]
    table = store.load(key)
    assert len(table) == 100
    order = np.random.default_rng(2).permutation(100)
    found, got = table.lookup(keys[order])
    assert found.all()
    np.testing.assert_array_equal(got, logits[order])
    found, got = table.lookup(np.concatenate([some_keys(3, seed=9), keys[:1]]))
    assert found.tolist() == [False] * 3 + [True]
    assert np.isnan(got[:3]).all()
    assert len(store.load(key, only=np.sort(label_store.as_strings(keys[:7])))) == 7


def test_a_part_says_what_it_is(store: LabelStore) -> None:
    key = store.add_teacher(IDENTITY, {})
    path = store.write_part(key, "part-job-000000", some_keys(4), some_logits(4))
    schema = pq.read_schema(path)
    assert [str(field.type) for field in schema] == ["fixed_size_binary[16]", "float", "float"]
    assert schema.metadata[b"teacher"].decode() == key
    assert "Q: {query}" in schema.metadata[b"identity"].decode()


def test_the_same_part_has_the_same_bytes(store: LabelStore) -> None:
    key = store.add_teacher(IDENTITY, {})
    path = store.write_part(key, "part-job-000000", some_keys(4), some_logits(4))
    before = path.read_bytes()
    store.write_part(key, "part-job-000000", some_keys(4), some_logits(4))
    assert path.read_bytes() == before
    assert [other.name for other in path.parent.iterdir() if other.name.startswith(".")] == []


def test_of_equal_keys_the_first_part_decides(store: LabelStore) -> None:
    key = store.add_teacher(IDENTITY, {})
    keys = some_keys(5)
    store.write_part(key, "part-b-000000", keys, np.full((5, 2), 2, np.float32))
    store.write_part(key, "part-a-000000", keys, np.full((5, 2), 1, np.float32))
    table = store.load(key)
    assert len(table) == 5
    assert (table.logits == 1).all()


def test_a_torn_part_is_no_part(store: LabelStore) -> None:
    key = store.add_teacher(IDENTITY, {})
    path = store.write_part(key, "part-job-000000", some_keys(500), some_logits(500))
    store.write_part(key, "part-job-000001", some_keys(5, 3), some_logits(5))
    path.write_bytes(path.read_bytes()[:-100])
    assert store.parts(key) == ["part-job-000001"]
    assert store.torn(key) == [path]
    assert store.part_rows(key, "part-job-000000") is None
    assert len(store.load(key)) == 5


def test_a_footer_of_garbage_is_no_part(store: LabelStore) -> None:
    key = store.add_teacher(IDENTITY, {})
    path = store.write_part(key, "part-job-000000", some_keys(50), some_logits(50))
    data = path.read_bytes()
    (size,) = struct.unpack("<I", data[-8:-4])
    for garbage in (b"\xff", b"\0"):  # its length and the magic bytes are whole
        path.write_bytes(data[: -8 - size] + garbage * size + data[-8:])
        assert store.parts(key) == []
        assert store.torn(key) == [path]


def test_an_unreadable_part_is_not_called_torn(store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key = store.add_teacher(IDENTITY, {})
    store.write_part(key, "part-job-000000", some_keys(5), some_logits(5))

    def fail(_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pq, "read_metadata", fail)
    with pytest.raises(OSError, match="Input/output"):
        store.parts(key)


def test_temporaries_of_live_processes_stay(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    def temporary(name: str, process: int) -> pathlib.Path:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: process)
            path = label_store.temporary_path(tmp_path / name)
        path.write_bytes(b"half")
        return path

    dead, alive = temporary("a.parquet", ended.pid), temporary("a.parquet", os.getppid())
    with monkeypatch.context() as patch:
        patch.setattr(label_store, "_machine", lambda: "elsewhere-1")
        old, new = temporary("old.json", 3), temporary("new.json", 3)
    half_a_day = time.time() - 13 * 3600
    os.utime(old, (half_a_day, half_a_day))
    os.utime(alive, (half_a_day, half_a_day))  # paused, but there
    others = tmp_path / ".notes.tmp"
    others.touch()
    label_store.clear_temporaries(tmp_path, tmp_path / "no_such_folder")
    assert sorted(tmp_path.iterdir()) == sorted([alive, new, others])
    assert dead != alive


def test_a_flipped_byte_is_noticed(store: LabelStore) -> None:
    key = store.add_teacher(IDENTITY, {})
    path = store.write_part(key, "part-job-000000", some_keys(500), some_logits(500))
    data = bytearray(path.read_bytes())
    data[3000] ^= 255
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"part-job-000000\.parquet: cannot be read .* scored anew"):
        store.load(key)


def test_bad_parts_are_refused(store: LabelStore) -> None:
    key = store.add_teacher(IDENTITY, {})
    logits = some_logits(3)
    logits[1, 0] = np.nan
    with pytest.raises(InputError, match="row 1"):
        store.write_part(key, "part-job-000000", some_keys(3), logits)
    wide = some_logits(3).astype(np.float64)
    wide[2, 1] = 1e300  # finite until it is a float32
    with pytest.raises(InputError, match=r"not finite float32 .* row 2: .*1e\+300"):
        store.write_part(key, "part-job-000000", some_keys(3), wide)
    with pytest.raises(InputError, match=r"\[n, 2\] and \[n, 16\]"):
        store.write_part(key, "part-job-000000", some_keys(3), some_logits(4))
    with pytest.raises(InputError, match="part-<job>-<number>"):
        store.write_part(key, "../part", some_keys(3), some_logits(3))
    with pytest.raises(InputError, match="no such teacher"):
        store.write_part("0" * 16, "part-job-000000", some_keys(3), some_logits(3))
    assert store.parts(key) == []


def test_a_failed_write_leaves_the_old_part(store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key = store.add_teacher(IDENTITY, {})
    path = store.write_part(key, "part-job-000000", some_keys(3), some_logits(3))
    before = path.read_bytes()

    def fail(table: object, where: pathlib.Path, **_: object) -> None:
        where.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="no space"):
        store.write_part(key, "part-job-000000", some_keys(3, 5), some_logits(3))
    assert path.read_bytes() == before
    assert list(path.parent.glob(".*")) == []


def test_names_of_teachers() -> None:
    teachers = {"monot5": "aa" * 8, "colbert": "ab" * 8}
    assert resolve_teacher("colbert", teachers, "labels.json") == "ab" * 8
    assert resolve_teacher("ab", teachers, "labels.json") == "ab" * 8
    with pytest.raises(InputError, match="several"):
        resolve_teacher("a", teachers, "labels.json")
    with pytest.raises(InputError, match="Did you mean 'monot5'"):
        resolve_teacher("mono5", teachers, "labels.json")


def test_an_empty_table() -> None:
    table = LabelTable(np.zeros((0, 16), np.uint8), np.zeros((0, 2), np.float32))
    assert table.lookup(some_keys(2))[0].tolist() == [False, False]
