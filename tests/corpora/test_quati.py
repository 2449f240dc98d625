"""Quati's files: passages in one file or in five, topics with a header, judgments with blanks."""

from __future__ import annotations

import pathlib

import pytest

from inranker_jax.corpora import open_corpus, open_queries_any, quati
from inranker_jax.corpora.beir import BeirCollection
from inranker_jax.errors import InputError
from inranker_jax.records import Document, Query, read_qrels
from tests.corpora.test_corpus import write


@pytest.mark.parametrize("header", ["", "passage_id\tpassage\n"])
def test_one_million(tmp_path: pathlib.Path, header: str) -> None:
    write(tmp_path / "quati_1M.tsv", header + "clueweb22-pt0001-14-16263_0\tPraça XV\n")
    write(tmp_path / "topics" / "quati_test_topics.tsv", "query_id\tquery\n1\tOnde fica a Praça XV?\n")
    write(tmp_path / "qrels" / "quati_1M_qrels.txt", "1 0 clueweb22-pt0001-14-16263_0 3\n")
    found = quati.find(tmp_path)
    assert list(open_corpus(found.corpus).documents()) == [
        Document("clueweb22-pt0001-14-16263_0", "Praça XV")
    ]
    assert found.queries is not None
    assert list(open_queries_any(found.queries).queries()) == [Query("1", "Onde fica a Praça XV?")]
    assert found.qrels is not None
    assert read_qrels(found.qrels) == {"1": {"clueweb22-pt0001-14-16263_0": 3}}
    assert quati.find(tmp_path, topics="all").queries is None


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_ten_million_are_one_corpus(tmp_path: pathlib.Path, ending: str) -> None:
    folder = tmp_path / "my [copy]"
    for part in range(5):
        write(folder / f"quati_10M_part_0{part}.tsv{ending}", f"passage_id\tpassage\np{part}\ttexto\n")
    assert [document.id for document in open_corpus(quati.find(folder, "10M").corpus).documents()] == [
        f"p{part}" for part in range(5)
    ]
    write(folder / "quati_10M_part_03.tsv.zst", "p3\ttexto\n")
    (folder / f"quati_10M_part_03.tsv{ending}").unlink()
    assert len(list(open_corpus(quati.find(folder, "10M").corpus, "tsv").documents())) == 5
    (folder / "quati_10M_part_03.tsv.zst").unlink()
    with pytest.raises(InputError, match=r"quati_10M_part_03.tsv missing. Expected the 5 parts"):
        quati.find(folder, "10M")


def test_what_is_missing_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="size '1m': Quati has 1M and 10M"):
        quati.find(tmp_path, "1m")
    with pytest.raises(InputError, match=r"quati_1M.tsv: no such file"):
        quati.find(tmp_path)


def test_real_passages_in_the_published_form(shared_data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    human = BeirCollection.load(shared_data / "beir" / "quati-human-pt")
    lines = [f"{key}\t{document.contents}\n" for key, document in human.documents.items()]
    write(tmp_path / "quati_1M.tsv", "passage_id\tpassage\n" + "".join(lines))
    texts = open_corpus(quati.find(tmp_path).corpus).texts()
    assert dict(texts) == {key: document.contents for key, document in human.documents.items()}
