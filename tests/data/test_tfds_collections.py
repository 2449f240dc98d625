"""TensorFlow Datasets: prepared folders are read by TFDS itself, by SeqIO, and in training batches."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from inranker_jax import data
from inranker_jax.errors import InputError
from inranker_jax.prompts import ScoringContract, Tokenizer
from tests.data import label_folders as toy

seqio = pytest.importorskip("seqio", reason="needs the [train] extra")
tfds = pytest.importorskip("tensorflow_datasets", reason="needs the [train] extra")
pytest.importorskip("pyarrow", reason="needs the [label] extra")
collections = pytest.importorskip("inranker_jax.data.tfds_collections")
tfds_tasks = pytest.importorskip("inranker_jax.data.tfds_tasks")
NAMES = (f"tfds_test_{number}" for number in itertools.count())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    tfds.disable_progress_bar()
    yield
    tfds.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return toy.write_label_folder(tmp_path_factory.mktemp("tfds") / "labels")


@pytest.fixture
def task(folder: pathlib.Path) -> Any:
    return data.add_label_folder_task(next(NAMES), folder, list_size=4, validation_fraction=0.2)


def test_a_label_folder_trains_through_tfds(
    folder: pathlib.Path, task: Any, tmp_path: pathlib.Path, contract: ScoringContract, tokenizer: Tokenizer
) -> None:
    written = collections.prepare_labels("toy_labels", tmp_path, task.source, num_shards=3)
    assert written == tmp_path / "toy_labels" / "1.0.0"
    # TFDS knows nothing of this package's code from here on.
    loaded = list(tfds.as_numpy(tfds.load("toy_labels", data_dir=str(tmp_path), split="train")))
    assert [row["query_id"].decode() for row in loaded] == [
        example["query_id"] for example in task.source.examples("train")
    ]
    assert tfds.builder_from_directory(str(written)).info.splits["train"].num_shards == 3

    name = next(NAMES)
    through = data.add_tfds_task(name, "toy_labels", lambda: tmp_path)
    assert isinstance(through.source, seqio.TfdsDataSource)
    assert len(through.source.list_shards("train")) == 3
    for split in ("train", "validation"):
        (store,), _ = data.open_stores(name, split, cache_dir=tmp_path / "cache")
        (direct,), _ = data.open_stores(task.name, split, cache_dir=tmp_path / "cache")
        assert store.fingerprint == direct.fingerprint
        assert through.source.num_input_examples(split) == len(direct)
    arguments: dict[str, Any] = {"contract": contract, "tokenizer": tokenizer, "batch_size": 4}
    with (
        data.open_stream(name, cache_dir=tmp_path / "cache", **arguments) as stream,
        data.open_stream(task.name, cache_dir=tmp_path / "cache", **arguments) as other,
    ):
        for batch, expected in itertools.islice(zip(stream, other, strict=True), 9):
            assert batch["tokens"].shape[:2] == (4, 4)
            for key in expected:
                np.testing.assert_array_equal(batch[key], expected[key])


def test_a_beir_folder_and_back(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    source = folder.with_name("labels_source")
    collections.prepare_beir("toy_beir", tmp_path, source)
    splits = tfds.load("toy_beir", data_dir=str(tmp_path))
    assert set(splits) == {"query", "passage", "test"}
    first = next(iter(tfds.as_numpy(splits["test"])))
    assert (first["query_id"], first["passage_id"], first["score"]) == (b"q0", b"d0", 1)
    assert first["passage"] == b"document number 0"
    back = collections.write_beir_folder("toy_beir", tmp_path / "back", tmp_path)
    for name in ("corpus.jsonl", "queries.jsonl"):
        rows = [
            [json.loads(line) for line in (base / name).read_text().splitlines()] for base in (source, back)
        ]
        assert rows[0] == rows[1]
    assert (back / "qrels" / "test.tsv").read_text() == (source / "qrels" / "test.tsv").read_text()


def test_what_is_there_is_not_taken_for_what_is_asked(task: Any, tmp_path: pathlib.Path) -> None:
    def size(name: str) -> int:
        return int(tfds.builder_from_directory(str(tmp_path / name / "1.0.0")).info.splits.total_num_examples)

    collections.prepare_labels("again", tmp_path, task.source)
    with pytest.raises(InputError, match=r"again/1\.0\.0: this dataset is there already.*--overwrite"):
        collections.prepare_labels("again", tmp_path, task.source)
    few = data.LabelledPairs(lambda: itertools.islice(task.source._read_pairs(), 2))
    collections.prepare_labels("again", tmp_path, few, overwrite=True)
    assert size("again") == 2
    assert not list(tmp_path.glob(".again*"))

    def broken() -> Iterator[Any]:
        yield from itertools.islice(task.source._read_pairs(), 3)
        assert size("again") == 2, "the old dataset stays until the new one is whole"
        raise InputError("bad line")

    with pytest.raises(InputError, match="bad line"):
        collections.prepare_labels("again", tmp_path, data.LabelledPairs(broken), overwrite=True)
    assert size("again") == 2
    assert not list(tmp_path.glob(".again*"))


def test_an_error_of_tfds_without_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError

    monkeypatch.setattr(collections.tfds, "builder", fail)
    with pytest.raises(InputError, match=r"no TFDS dataset 'some' .*\(ValueError\)"):
        collections.open_builder("some")


def test_a_mixture_of_tfds_and_a_label_folder_shares_no_query(
    folder: pathlib.Path, task: Any, tmp_path: pathlib.Path
) -> None:
    """TFDS's splits are not made by the text of the queries: its training queries may be held out elsewhere."""
    collections.prepare_beir("judged", tmp_path, folder.with_name("labels_source"))
    (held_out,), _ = data.open_stores(task.name, "validation", cache_dir=tmp_path / "cache")
    judged, mixture = next(NAMES), next(NAMES)
    tfds_tasks.add_judged_task(judged, "judged", tmp_path, splits={"train": "test"})
    seqio.MixtureRegistry.add(mixture, [task.name, judged], default_rate=1)
    with pytest.raises(
        InputError, match=f"{held_out[0].query!r} is in .* of {task.name} .*'train' of {judged}"
    ):
        data.open_stores(mixture, "validation", cache_dir=tmp_path / "cache")


def test_errors(task: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="TFDS name 'My-Labels': expected lower-case"):
        collections.prepare_labels("My-Labels", tmp_path, task.source)
    with pytest.raises(InputError, match="hold no examples"):
        collections.prepare_labels("none", tmp_path, data.LabelledPairs(lambda: iter([])))
    name = next(NAMES)
    data.add_tfds_task(name, "not_there", tmp_path)
    with pytest.raises(
        InputError, match=r"not_there/1\.0\.0: no prepared TFDS dataset.*prepare_tfds --labels"
    ):
        data.open_stores(name)
    with pytest.raises(InputError, match="no TFDS dataset 'not_there'"):
        collections.write_beir_folder("not_there", tmp_path / "out", tmp_path)
    collections.prepare_labels("labels", tmp_path, task.source)
    with pytest.raises(InputError, match="Expected the form of TFDS's beir"):
        collections.write_beir_folder("labels", tmp_path / "out", tmp_path)

    def broken() -> Iterator[Any]:
        yield from itertools.islice(task.source._read_pairs(), 2)
        raise InputError.at("labels.tsv", 3, "bad line")

    with pytest.raises(InputError, match=r"labels\.tsv:3: bad line"):
        collections.prepare_labels("broken", tmp_path, data.LabelledPairs(broken))
    assert not (tmp_path / "broken" / "1.0.0").exists()


def test_judged_pairs_of_a_beir_dataset_are_a_task(tmp_path: pathlib.Path) -> None:
    source = toy.write_beir(tmp_path / "beir", 6, 4)
    with open(source / "corpus.jsonl", "a") as out:
        out.write('{"_id": "dx", "title": "A title", "text": "and its text"}\n')
    with open(source / "qrels" / "test.tsv", "a") as out:
        out.write("q5\tdx\t0\n")
    collections.prepare_beir("judged", tmp_path, source)
    name = next(NAMES)
    tfds_tasks.add_judged_task(name, "judged", tmp_path, splits={"train": "test"})
    (store,), _ = data.open_stores(name, cache_dir=tmp_path / "cache")
    examples = [store[number] for number in range(len(store))]
    assert [(e.query_id, e.document_ids) for e in examples][:2] == [("q0", ("d0",)), ("q1", ("d1",))]
    last = examples[-1]
    assert (last.query, last.documents) == ("query number 5", ("A title and its text",))
    assert last.teacher_logits is None
    assert [e.relevance.tolist() for e in examples] == [[1]] * 6 + [[0]]
