"""mMARCO's layouts, and ids that must be MS MARCO's."""

from __future__ import annotations

import pathlib

import pytest

from inranker_jax.corpora import mmarco, open_corpus
from inranker_jax.corpora.msmarco import open_documents, open_queries
from inranker_jax.errors import InputError
from tests.corpora.test_corpus import write


def _copy(root: pathlib.Path, base: str, text: str, language: str = "portuguese") -> None:
    write(root / base / "collections" / f"{language}_collection.tsv", f"0\t{text} zero\n1\t{text} um\n")
    for split in ("train", "dev", "dev.small"):
        folder = root / base / "queries" / split.split(".")[0]
        write(folder / f"{language}_queries.{split}.tsv", f"7\t{text} {split}\n")


@pytest.mark.parametrize("language", ["pt", "portuguese", "Portuguese"])
def test_both_translations(tmp_path: pathlib.Path, language: str) -> None:
    _copy(tmp_path, "data/helsinki", "helsinki")
    collection, queries = mmarco.find(tmp_path, language)
    assert open_documents(collection)["1"] == "helsinki um"
    _copy(tmp_path, "data/google", "google")
    for translation in (None, "google"):
        collection, queries = mmarco.find(tmp_path, language, translation=translation)
        assert open_documents(collection)["1"] == "google um"
        assert open_queries(queries) == {"7": "google train"}
    collection, queries = mmarco.find(tmp_path, language, translation="helsinki", split="dev.small")
    assert open_documents(collection)["0"] == "helsinki zero"
    assert open_queries(queries) == {"7": "helsinki dev.small"}


@pytest.mark.parametrize("base", ["v1", "v2", "data/v2", "google", "."])
def test_older_names_and_parts_of_a_copy(tmp_path: pathlib.Path, base: str) -> None:
    _copy(tmp_path, base, base, "english")
    collection, _ = mmarco.find(tmp_path, "en")
    assert open_documents(collection)["0"] == f"{base} zero"


def test_two_files_in_one_folder(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "french_collection.tsv.gz", "0\tun\n")
    write(tmp_path / "french_queries.train.tsv", "0\tdeux\n")
    assert mmarco.find(tmp_path, "fr") == (
        str(tmp_path / "french_collection.tsv.gz"),
        str(tmp_path / "french_queries.train.tsv"),
    )


def test_what_is_missing_is_said(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"mMARCO has no language 'portugese'. Did you mean 'portuguese'"):
        mmarco.find(tmp_path, "portugese")
    with pytest.raises(InputError, match=r"translation 'gogle': .* Did you mean 'google'"):
        mmarco.find(tmp_path, "pt", translation="gogle")
    write(tmp_path / "google" / "portuguese_collection.tsv", "0\tx\n")
    with pytest.raises(
        InputError, match=r"no portuguese collection with train queries; google has only .*_collection"
    ):
        mmarco.find(tmp_path, "pt")


def test_the_original_beside_a_translation(tmp_path: pathlib.Path) -> None:
    _copy(tmp_path, "mmarco/google", "pt")
    translated, _ = mmarco.find(tmp_path / "mmarco", "pt")
    assert mmarco.find_original(translated, tmp_path) is None
    _copy(tmp_path, "mmarco/google", "en", "english")
    english = str(tmp_path / "mmarco" / "google" / "collections" / "english_collection.tsv")
    assert mmarco.find_original(translated, tmp_path) == english
    write(tmp_path / "collection.tsv.gz", "0\ta\n")
    assert mmarco.find_original(translated, tmp_path) == str(tmp_path / "collection.tsv.gz")


def test_alignment(tmp_path: pathlib.Path) -> None:
    english = open_corpus(write(tmp_path / "en.tsv", "0\ta\n1\tb\n2\tc\n"))
    assert mmarco.check_aligned(open_corpus(write(tmp_path / "pt.tsv", "0\tx\n1\ty\n2\tz\n")), english) == 3
    with pytest.raises(InputError, match=r"short.tsv: document 3 is its end where .*en.tsv has id '2'"):
        mmarco.check_aligned(open_corpus(write(tmp_path / "short.tsv", "0\tx\n1\ty\n")), english)
    with pytest.raises(InputError, match=r"other.tsv: document 2 is id '2' where .*en.tsv has id '1'"):
        mmarco.check_aligned(open_corpus(write(tmp_path / "other.tsv", "0\tx\n2\ty\n1\tz\n")), english)
    with pytest.raises(InputError, match=r"document 4 is id '3' where .*en.tsv has the end"):
        mmarco.check_aligned(open_corpus(write(tmp_path / "long.tsv", "0\tx\n1\ty\n2\tz\n3\tw\n")), english)


def test_a_real_parallel_collection_is_aligned(shared_data: pathlib.Path) -> None:
    folder = shared_data / "beir"
    assert mmarco.check_aligned(open_corpus(folder / "pira-pt"), open_corpus(folder / "pira-en")) == 309
