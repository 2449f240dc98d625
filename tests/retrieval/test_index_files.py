"""Saved indexes: equal to those in memory, opened by bm25s too, refused when torn or made otherwise."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from inranker_jax.corpora import open_corpus
from inranker_jax.errors import InputError
from inranker_jax.records import Document, Query
from inranker_jax.retrieval import BM25Index, index_files

ROOT = pathlib.Path(__file__).resolve().parents[2]
VOCABULARY = [f"word{i}" for i in range(400)]


def _documents(count: int = 500, seed: int = 0) -> list[Document]:
    random = np.random.default_rng(seed)
    return [
        Document(
            f"d{i}", " ".join(VOCABULARY[int(400 * v**3)] for v in random.random(random.integers(0, 40)))
        )
        for i in range(count)
    ]


QUERIES = [Query(f"q{i}", " ".join(VOCABULARY[j] for j in range(i, 400, 37))) for i in range(30)]


def _items(run):
    return [(query, list(documents.items())) for query, documents in run.items()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.tsv"
    path.write_text("".join(f"{document.id}\t{document.text}\n" for document in _documents()))
    return open_corpus(path)


@pytest.fixture
def saved(tmp_path, corpus):
    index = BM25Index.build(_documents())
    index.save(tmp_path / "index", corpus=corpus)
    return tmp_path / "index", index


@pytest.mark.parametrize("mmap", [True, False])
def test_loaded_index_finds_the_same(saved, corpus, mmap):
    folder, index = saved
    loaded = BM25Index.load(folder, mmap, corpus=corpus, language="english", k1=0.9, b=0.4)
    assert _items(loaded.search(QUERIES, 50)) == _items(index.search(QUERIES, 50))
    assert list(loaded.ids) == list(index.ids) == sorted(index.ids, reverse=True)
    assert loaded.ids[-1] == index.ids[-1]
    assert loaded.ids[1:3] == index.ids[1:3]
    with pytest.raises(IndexError):
        loaded.ids[500]


def test_building_into_a_folder_writes_the_same_files_as_saving(saved, corpus, tmp_path):
    folder, _ = saved
    built = BM25Index.build(corpus.documents(), folder=tmp_path / "new" / "built", corpus=corpus)
    assert _items(built.search(QUERIES)) == _items(BM25Index.load(folder).search(QUERIES))
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "new" / "built" / path.name).read_bytes()
    assert os.listdir(tmp_path / "new") == ["built"]


def test_bm25s_opens_the_folder(saved):
    folder, index = saved
    from inranker_jax.retrieval.words import bm25s, words_of

    theirs = bm25s().BM25.load(folder, mmap=True)
    for query in QUERIES[:5]:
        scores = theirs.get_scores(words_of([query.text], "english")[0])
        found = index.search([query], 1000)[query.id]
        assert {index.ids[i]: float(scores[i]) for i in np.flatnonzero(scores)} == found


def test_ids_in_any_script_survive(tmp_path):
    documents = [Document(name, "wave") for name in ("é", "日本", "a/b", "\U0001f600", "z" * 300)]
    BM25Index.build(documents).save(tmp_path / "i")
    loaded = BM25Index.load(tmp_path / "i")
    assert list(loaded.ids) == sorted((d.id for d in documents), reverse=True)
    assert set(loaded.search([Query("q", "wave")])["q"]) == {d.id for d in documents}


def test_index_without_words(tmp_path):
    built = BM25Index.build([Document("a", ""), Document("b", "the")], folder=tmp_path / "i")
    assert built.search([Query("q", "wave")]) == {"q": {}}
    assert BM25Index.load(tmp_path / "i", mmap=False).search([Query("q", "wave")]) == {"q": {}}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"language": "portuguese"}, r"- language: english\n\+ language: portuguese"),
        ({"k1": 1.2, "b": 0.75}, r"- k1: 0.9\n\+ k1: 1.2\n- b: 0.4\n\+ b: 0.75"),
    ],
)
def test_another_index_is_refused(saved, wanted, expected):
    with pytest.raises(InputError, match=expected) as caught:
        BM25Index.load(saved[0], **wanted)
    assert not isinstance(caught.value, index_files.TornIndexError)
    assert "Choose another index folder" in str(caught.value)


def test_index_of_another_corpus_or_of_one_read_otherwise_is_refused(saved, corpus, tmp_path):
    (tmp_path / "other.tsv").write_text("d0\tword1\n")
    for other, expected in (
        (
            open_corpus(tmp_path / "other.tsv"),
            r"- corpus_fingerprint: \w+\n\+ corpus_fingerprint: \w+\nChoose",
        ),
        (
            open_corpus(corpus.path, on_malformed="skip"),
            r"- corpus_on_malformed: raise\n\+ corpus_on_malformed: skip\nC",
        ),
        (open_corpus(corpus.path, "jsonl"), r"- corpus_format: tsv\n\+ corpus_format: jsonl\nChoose"),
    ):
        with pytest.raises(InputError, match=expected):
            BM25Index.load(saved[0], corpus=other)


def test_index_of_another_library_version_is_refused(saved):
    path = saved[0] / "index.json"
    state = json.loads(path.read_text())
    state["identity"]["PyStemmer"] = "1.0"
    path.write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"- PyStemmer: 1.0"):
        BM25Index.load(saved[0])


def test_missing_package_is_named(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        InputError, match=r"needs the package 'bm25s': run `pip install 'inranker_jax\[eval\]'`"
    ):
        index_files.identity_of({}, "english", 0.9, 0.4)


@pytest.mark.parametrize("name", [*index_files._FILES, "index.json"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_torn_index_is_noticed_and_replaced(saved, name, damage):
    folder, index = saved
    path = folder / name
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(index_files.TornIndexError, match=r"not whole.*Build it again"):
        BM25Index.load(folder)
    index.save(folder)
    assert _items(BM25Index.load(folder).search(QUERIES)) == _items(index.search(QUERIES))


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"not an index folder: it holds 'thesis.tex'"):
        BM25Index.build(_documents(5), folder=tmp_path)
    with pytest.raises(InputError, match="not an index folder"):
        BM25Index.load(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(InputError, match="no such index folder"):
        BM25Index.load(tmp_path / "nowhere")


def test_a_failed_build_leaves_nothing(tmp_path):
    def documents():
        yield from _documents(20)
        raise InputError("corpus.tsv:21: bad line")

    with pytest.raises(InputError, match="bad line"):
        BM25Index.build(documents(), folder=tmp_path / "index")
    assert os.listdir(tmp_path) == []


def test_two_builders_do_not_meet(saved):
    folder, index = saved
    with open(folder.with_name(".index.lock"), "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is building"):
            index.save(folder)
    BM25Index.load(folder)


def test_a_killed_build_is_built_again(tmp_path):
    script = f"""
import time
from inranker_jax.records import Document
from inranker_jax.retrieval import BM25Index, index_files
original = index_files._to_disk
def slow(path):
    print("writing", flush=True)
    time.sleep(60)
index_files._to_disk = slow
BM25Index.build([Document("a", "wave")], folder={str(tmp_path / "index")!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = sorted(os.listdir(tmp_path))
    assert left == [".index.lock", ".index.part"]
    assert not index_files.exists(tmp_path / "index")
    started = time.monotonic()
    built = BM25Index.build(_documents(), folder=tmp_path / "index")
    assert time.monotonic() - started < 30
    assert len(built.ids) == 500
    assert os.listdir(tmp_path) == ["index"]
