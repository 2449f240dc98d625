"""Which files a path means: names, globs, lists, folders, here and on another machine."""

from __future__ import annotations

import hashlib
import pathlib

import pytest

from inranker_jax.corpora import files, open_corpus, open_queries_any
from inranker_jax.corpora.beir import BeirCollection
from inranker_jax.errors import InputError
from inranker_jax.records import atomic_text, numbered_lines, read_run, write_run
from tests.corpora import fake_remote


def _parts(folder: pathlib.Path) -> None:
    for number in (0, 1, 2, 10):
        (folder / f"part_{number}.tsv").write_text(f"d{number}\ttext {number}\n")


def test_a_glob_is_in_natural_order_and_a_list_in_the_order_written(tmp_path: pathlib.Path) -> None:
    _parts(tmp_path)
    names = [pathlib.Path(name).name for name in files.find(tmp_path / "part_*.tsv")]
    assert names == ["part_0.tsv", "part_1.tsv", "part_2.tsv", "part_10.tsv"]
    listed = f"{tmp_path}/part_10.tsv, {tmp_path}/part_[01].tsv"
    assert [document.id for document in open_corpus(listed).documents()] == ["d10", "d0", "d1"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: pathlib.Path) -> None:
    _parts(tmp_path)
    for odd in ("a,b.tsv", "part_[0].tsv"):
        (tmp_path / odd).write_text("x\ty\n")
        assert files.find(tmp_path / odd) == [str(tmp_path / odd)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("part_1.tvs", r"part_1.tvs: no such file or folder. Did you mean 'part_1.tsv'\?. Check the path"),
        ("no_*.tsv", r"no_\*.tsv: no file matches"),
        ("part_0.tsv,{}/nope.tsv", r"nope.tsv: no such file"),
        ("part_0.tsv,{}/part_?.tsv", r"part_0.tsv: listed twice in"),
    ],
)
def test_what_is_missing_is_named(tmp_path: pathlib.Path, path: str, message: str) -> None:
    _parts(tmp_path)
    with pytest.raises(InputError, match=message):
        files.find(f"{tmp_path}/{path.format(tmp_path)}")
    with pytest.raises(InputError, match="the path is empty"):
        files.find(" ")


def test_fingerprints_are_of_the_bytes(tmp_path: pathlib.Path) -> None:
    _parts(tmp_path)
    digest = hashlib.sha256((tmp_path / "part_0.tsv").read_bytes()).hexdigest()
    assert open_corpus(tmp_path / "part_0.tsv").fingerprint() == digest
    both = open_corpus(tmp_path / "part_[01].tsv").fingerprint()
    other = open_corpus(f"{tmp_path}/part_1.tsv,{tmp_path}/part_0.tsv").fingerprint()
    (tmp_path / "part_1.tsv").write_text("d1\ttext 2\n")
    assert len({digest, both, other, open_corpus(tmp_path / "part_[01].tsv").fingerprint()}) == 4
    assert open_queries_any(tmp_path / "part_0.tsv").fingerprint() == digest


def test_names_of_text_files_are_ids_and_belong_to_the_fingerprint(tmp_path: pathlib.Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text("heat")
        (tmp_path / folder / "sub" / "b.txt").write_text("wing")
    first = open_corpus(tmp_path / "one").fingerprint()
    assert open_corpus(tmp_path / "two").fingerprint() == first  # wherever the folder is
    single = open_corpus(tmp_path / "one" / "a.txt", "text").fingerprint()
    (tmp_path / "one" / "a.txt").rename(tmp_path / "one" / "A.txt")
    (tmp_path / "two" / "sub").rename(tmp_path / "two" / "tub")
    prints = {first, *(open_corpus(tmp_path / folder).fingerprint() for folder in ("one", "two"))}
    assert len(prints) == 3
    assert open_corpus(tmp_path / "one" / "A.txt", "text").fingerprint() != single


def test_everything_is_read_from_a_remote_path(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_remote.install(monkeypatch, tmp_path)
    (tmp_path / "b" / "set" / "qrels").mkdir(parents=True)
    _parts(tmp_path / "b")
    with atomic_text("gs://b/set/corpus.jsonl.gz") as out:
        out.write('{"_id": "d1", "title": "A", "text": "b"}\n')
    (tmp_path / "b" / "set" / "queries.jsonl").write_text('{"_id": "q1", "text": "c"}\n')
    (tmp_path / "b" / "set" / "qrels" / "test.tsv").write_text("q1\td1\t1\n")
    corpus = open_corpus("gs://b/set")
    assert (corpus.format, corpus.files) == ("beir", ["gs://b/set/corpus.jsonl.gz"])
    assert corpus.texts() == {"d1": "A b"}
    assert [query.text for query in open_queries_any("gs://b/set").queries()] == ["c"]
    collection = BeirCollection.load("gs://b/set")
    assert (collection.name, collection.qrels, list(collection.documents)) == (
        "set",
        {"q1": {"d1": 1}},
        ["d1"],
    )
    parts = open_corpus("gs://b/part_*.tsv")
    assert [document.id for document in parts.documents()] == ["d0", "d1", "d2", "d10"]
    assert parts.fingerprint() == open_corpus(tmp_path / "b" / "part_*.tsv").fingerprint()
    assert all(name.startswith("gs://") for name in fake.opened)
    assert fake.opened
    (tmp_path / "b" / "notes").mkdir()
    (tmp_path / "b" / "notes" / "n 1.md").write_text("note")
    assert open_corpus("gs://b/notes").texts() == {"n%201.md": "note"}


def test_remote_errors_are_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_remote.install(monkeypatch, tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match=r"gs://b/none.tsv: no such file"):
        open_corpus("gs://b/none.tsv")
    with pytest.raises(InputError, match=r"gs://b/\*.tsv: no file matches"):
        open_corpus("gs://b/*.tsv")
    with pytest.raises(InputError, match="gs://b/none: no such folder"):
        BeirCollection.load("gs://b/none")


def test_a_missing_package_for_a_remote_path_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_remote.install(monkeypatch, tmp_path)

    def fail(_: object) -> bool:
        raise ImportError("Install gcsfs to access GCS")

    monkeypatch.setattr(fake, "exists", fail)
    for path in ("gs://b/c.tsv", "gs://b/*.tsv"):
        with pytest.raises(InputError, match=r"tsv: .*cannot be opened here \(Install gcsfs to access GCS\)"):
            open_corpus(path)


def test_a_run_goes_to_a_remote_path_and_back(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_remote.install(monkeypatch, tmp_path)
    (tmp_path / "b").mkdir()
    write_run("gs://b/run.trec.gz", {"q": {"d": 1.5}}, "t")
    assert read_run("gs://b/run.trec.gz") == {"q": {"d": 1.5}}


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_what_is_written_compressed_reads_back(tmp_path: pathlib.Path, name: str) -> None:
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    with atomic_text(tmp_path / name) as out:
        out.writelines(["um\n", "ção\n"])
    assert list(numbered_lines(tmp_path / name)) == [(1, "um"), (2, "ção")]
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ZeroDivisionError), atomic_text(tmp_path / name) as out:
        out.write(f"half {1 / 0}")
    assert (tmp_path / name).read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / name]
