"""English labels for translated texts: the ids are compared with the original's where it is there."""

from __future__ import annotations

import importlib
import pathlib

import pytest

from inranker_jax import data
from inranker_jax.errors import InputError

pytest.importorskip("seqio", reason="needs the [train] extra")


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """INRANKER_DATA_DIR with labels of three English passages, and mMARCO's Portuguese of them."""
    importlib.import_module("inranker_jax.tasks.mmarco")
    (tmp_path / "mmarco").mkdir()
    (tmp_path / "mmarco" / "portuguese_collection.tsv").write_text("0\tum\n1\tdois\n2\ttrês\n")
    (tmp_path / "mmarco" / "portuguese_queries.train.tsv").write_text("100\to que\n")
    (tmp_path / "InRanker_msmarco.tsv").write_text("1.5\t-2\t100\t1\n-3\t2.5\t100\t0\n")
    monkeypatch.setenv("INRANKER_DATA_DIR", str(tmp_path))
    return tmp_path


def _documents(folder: pathlib.Path, name: str = "mmarco_pt_human_soft") -> list[str]:
    (store,), _ = data.open_stores(name, cache_dir=folder / "cache")
    return [text for number in range(len(store)) for text in store[number].documents]


def test_another_numbering_is_refused(folder: pathlib.Path) -> None:
    original = folder / "collection.tsv"
    original.write_text("0\tone\n1\ttwo\n2\tthree\n3\tfour\n")
    with pytest.raises(InputError, match=r"portuguese_collection.tsv: document 4 is its end where .* id '3'"):
        _documents(folder)
    original.write_text("0\tone\n1\ttwo\n2\tthree\n")
    assert _documents(folder) == ["dois", "um"]


def test_nothing_to_compare_with_is_said_once(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mmarco_pt_human_soft", "mmarco_pt_human_soft_lists"):
        assert _documents(folder, name) == ["dois", "um"]
    assert capsys.readouterr().err.count("are taken for MS MARCO's unchecked") == 1
