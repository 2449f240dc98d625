"""Which files a path means: names, globs, lists, folders."""

from __future__ import annotations

import hashlib
import pathlib

import pytest

from inranker_jax.corpora import files, open_corpus, open_queries_any
from inranker_jax.errors import InputError
from inranker_jax.records import atomic_text, numbered_lines


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
        ("part_1.tvs", r"part_1.tvs: no such file or folder. Did you mean 'part_1.tsv'\? Check the path"),
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
