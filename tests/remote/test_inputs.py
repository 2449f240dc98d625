"""Corpora, queries, judgments and runs that lie in a bucket."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from inranker_jax import paths
from inranker_jax.corpora import open_corpus, open_queries_any
from inranker_jax.corpora.beir import BeirCollection
from inranker_jax.errors import InputError
from inranker_jax.labeling.teachers import check_model, parse_spec
from inranker_jax.prompts import preset
from inranker_jax.query_generation.templates import tokenizer_cutter
from inranker_jax.records import atomic_text, read_qrels, read_run, write_run
from tests.remote.object_store import ObjectStore
from tests.test_adapt import write_model
from tests.tiny_vocabulary import write_spiece


def _parts(place: str) -> None:
    for number in (0, 1, 2, 10):
        paths.write(f"{place}/part_{number}.tsv", f"d{number}\ttext {number}\n")


def test_a_collection_is_read_from_a_bucket(store: ObjectStore) -> None:
    with atomic_text("gs://bkt/set/corpus.jsonl.gz") as out:
        out.write('{"_id": "d1", "title": "A", "text": "b"}\n')
    paths.write("gs://bkt/set/queries.jsonl", '{"_id": "q1", "text": "c"}\n')
    paths.write("gs://bkt/set/qrels/test.tsv", "q1\td1\t1\n")
    corpus = open_corpus("gs://bkt/set")
    assert (corpus.format, corpus.files) == ("beir", ["gs://bkt/set/corpus.jsonl.gz"])
    assert corpus.texts() == {"d1": "A b"}
    assert [query.text for query in open_queries_any("gs://bkt/set").queries()] == ["c"]
    collection = BeirCollection.load("gs://bkt/set")
    assert (collection.name, collection.qrels) == ("set", {"q1": {"d1": 1}})
    assert list(collection.documents) == ["d1"]
    assert read_qrels("gs://bkt/set/qrels/test.tsv") == {"q1": {"d1": 1}}


def test_globs_and_folders_of_a_bucket(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    _parts("gs://bkt/parts")
    _parts(str(tmp_path))
    corpus = open_corpus("gs://bkt/parts/part_*.tsv")
    assert [document.id for document in corpus.documents()] == ["d0", "d1", "d2", "d10"]
    assert corpus.fingerprint() == open_corpus(tmp_path / "part_*.tsv").fingerprint()
    paths.write("gs://bkt/notes/n 1.md", "note")
    paths.write("gs://bkt/notes/deep/n2.md", "note 2")
    assert open_corpus("gs://bkt/notes").texts() == {"n%201.md": "note", "deep/n2.md": "note 2"}


def test_a_parquet_corpus(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    pyarrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"doc_id": ["x"], "contents": ["y"]}), tmp_path / "c.parquet")
    paths.upload(tmp_path, "gs://bkt/corpus")
    assert open_corpus("gs://bkt/corpus").texts() == {"x": "y"}


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz"])
def test_a_run_goes_to_a_bucket_and_back(store: ObjectStore, name: str) -> None:
    write_run(f"gs://bkt/{name}", {"q": {"d": 1.5}}, "t")
    assert read_run(f"gs://bkt/{name}") == {"q": {"d": 1.5}}


def test_what_is_missing_is_named(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, message in (
        ("gs://bkt/none.tsv", "gs://bkt/none.tsv: no such file"),
        ("gs://bkt/*.tsv", r"gs://bkt/\*.tsv: no file matches"),
    ):
        with pytest.raises(InputError, match=message):
            open_corpus(path)
    with pytest.raises(InputError, match="gs://bkt/none: no such folder"):
        BeirCollection.load("gs://bkt/none")
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    for path in ("gs://bkt/c.tsv", "gs://bkt/*.tsv"):
        with pytest.raises(InputError, match=r"needs? the 'gcsfs' package.*inranker_jax\[gcs\]"):
            open_corpus(path)


def test_the_contract_of_a_teacher_lies_in_a_bucket(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    (tmp_path / "vocabulary").mkdir()
    write_spiece(tmp_path / "vocabulary", size=300)
    teacher = write_model(tmp_path / "teacher", tmp_path / "vocabulary", seed=1)
    paths.write("gs://bkt/contract.json", json.dumps(preset("monot5").to_dict()))
    check_model(parse_spec(f"{teacher}?contract=gs://bkt/contract.json"))
    paths.write("gs://bkt/broken.json", "{")
    with pytest.raises(InputError, match=r"broken\.json"):
        check_model(parse_spec(f"{teacher}?contract=gs://bkt/broken.json"))


def test_a_tokenizer_that_cuts_documents_lies_in_a_bucket(store: ObjectStore) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    paths.write("gs://bkt/vocabulary/tokenizer.json", tokenizer.to_str())
    for source in ("gs://bkt/vocabulary", "gs://bkt/vocabulary/tokenizer.json"):
        assert tokenizer_cutter(source)("one two one two", 2).strip() == "one two"
