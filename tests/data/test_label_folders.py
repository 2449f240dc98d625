"""Label folders as tasks: whole, in parts, split by query, and with translated texts."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np
import pytest

from inranker_jax import data
from inranker_jax.errors import InputError
from tests.data import label_folders as toy

seqio = pytest.importorskip("seqio", reason="needs the [train] extra")
pytest.importorskip("pyarrow", reason="needs the [label] extra")
NAMES = (f"label_folder_test_{number}" for number in range(1000))


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return toy.write_label_folder(tmp_path / "labels")


def documents(store: data.ExampleStore) -> Iterator[tuple[str, str]]:
    for number in range(len(store)):
        example = store[number]
        yield from ((example.query_id, document) for document in example.document_ids)


def test_pairs_and_lists_hold_the_folder(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    stores = {}
    for size in (1, 4):
        name = next(NAMES)
        data.add_label_folder_task(name, folder, list_size=size, validation_fraction=0)
        (stores[size],), _ = data.open_stores(name, cache_dir=tmp_path)
    assert [len(stores[1]), len(stores[4])] == [120, 30]
    assert list(documents(stores[1])) == list(documents(stores[4]))
    example = stores[4][7]
    assert (example.query_id, example.query) == ("q7", "query number 7")
    assert example.document_ids == ("d7", "d8", "d9", "d10")
    assert example.documents[1] == "document number 8"
    assert example.relevance.tolist() == [1, 0, 0, 0]
    assert example.teacher_logits is not None
    np.testing.assert_array_equal(example.teacher_logits, np.float32([toy.logits(7, n) for n in range(4)]))


def test_ranges_are_whole_queries_and_cover_everything(folder: pathlib.Path) -> None:
    reader = data.LabelFolderReader(folder)
    ranges = reader.ranges()
    assert len(ranges) == 8
    assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
    assert (ranges[0][0], ranges[-1][1]) == (0, 120)
    assert all(start % 4 == 0 for start, _ in ranges)
    whole = list(reader())
    assert [pair for bounds in ranges for pair in reader.read(*bounds)] == whole
    assert list(reader.query_sizes()) == [(toy.texts("query", n), 4) for n in range(30)]


def test_one_query_is_one_range(tmp_path: pathlib.Path) -> None:
    folder = toy.write_label_folder(tmp_path / "one", queries=1)
    assert data.LabelFolderReader(folder).ranges() == [(0, 4)]


def test_shards_join_to_the_split_and_sizes_are_counted(folder: pathlib.Path) -> None:
    for size in (1, 3):
        task = data.add_label_folder_task(next(NAMES), folder, list_size=size, validation_fraction=0.3)
        source = task.source
        total = 0
        for split in ("train", "validation"):
            whole = list(source.examples(split))
            total += len({example["query_id"] for example in whole})
            assert source.num_input_examples(split) == len(whole) > 0
            for shards in (1, 3, len(source.list_shards(split))):
                parts = [list(source.numbered_examples(split, index, shards)) for index in range(shards)]
                joined = sorted(
                    (row for part in parts for row in part), key=lambda row: row["example_number"]
                )
                assert [row["document_ids"] for row in joined] == [row["document_ids"] for row in whole]
                assert len({int(row["example_number"]) for row in joined}) == len(joined)
                if shards > 1:
                    assert sum(bool(part) for part in parts) > 1
        assert total == 30


def test_english_labels_train_a_translation(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    translated = toy.write_beir(tmp_path / "pt", 30, 20, language="em português: ")
    name = next(NAMES)
    data.add_label_folder_task(
        name, folder, list_size=4, queries=lambda: translated, documents=translated, validation_fraction=0
    )
    (store,), _ = data.open_stores(name, cache_dir=tmp_path)
    example = store[3]
    assert example.query == "em português: query number 3"
    assert example.documents[0] == "em português: document number 3"
    assert example.teacher_logits is not None
    np.testing.assert_array_equal(example.teacher_logits, np.float32([toy.logits(3, n) for n in range(4)]))
    # What the student reads decides the examples, so other translations are other data.
    files = data.LabelFolderReader(folder, queries=translated, documents=translated).files()
    assert {str(translated / "corpus.jsonl"), str(translated / "queries.jsonl")} <= set(files)


def test_missing_folders_are_missed_in_words(tmp_path: pathlib.Path, folder: pathlib.Path) -> None:
    name = next(NAMES)
    data.add_label_folder_task(name, tmp_path / "nowhere")
    with pytest.raises(
        InputError, match=r"nowhere: it has no lists\.parquet\. .*inranker_jax\.label .*nowhere"
    ):
        data.open_stores(name, cache_dir=tmp_path)
    other = next(NAMES)
    few = toy.write_beir(tmp_path / "few", 30, 5)
    data.add_label_folder_task(other, folder, documents=few)
    with pytest.raises(InputError, match=r"document 'd5' is not in .*few"):
        data.open_stores(other, cache_dir=tmp_path)
