"""Label folders and stores in a bucket."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from inranker_jax import paths
from inranker_jax.corpora import label_folder
from inranker_jax.corpora.label_folder import LabelFolder, ListsWriter, read_labels
from inranker_jax.corpora.label_store import LabelStore, pair_key, write_json
from inranker_jax.errors import InputError
from tests.corpora import test_label_folder as small
from tests.remote.object_store import ObjectStore, StatusError

pytest.importorskip("pyarrow")
FOLDER = "gs://bkt/labels"


def upload_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    made = small.make_folder(tmp_path / "labels")
    paths.upload(made, FOLDER)
    return made


def test_a_folder_reads_alike_from_a_bucket(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    made = upload_folder(tmp_path)
    pairs = list(read_labels(FOLDER))
    assert pairs == list(read_labels(made))
    assert len(pairs) == 5
    assert list(label_folder.read_range(FOLDER, 1, 4)) == pairs[1:4]
    assert label_folder.num_pairs(FOLDER) == 5
    found = label_folder.files(FOLDER)
    assert all(name.startswith(f"{FOLDER}/") for name in found)
    assert len(found) == 3


def test_a_folder_in_a_bucket_is_training_data(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    from inranker_jax.data.label_folders import LabelFolderReader

    made = upload_folder(tmp_path)
    reader, local = LabelFolderReader(FOLDER), LabelFolderReader(made)
    assert list(reader()) == list(local())
    assert [list(reader.read(*span)) for span in reader.ranges()] == [
        list(local.read(*span)) for span in local.ranges()
    ]
    assert f"{FOLDER}/texts/corpus.tsv" in reader.files()
    with pytest.raises(InputError, match=r"gs://bkt/none: it has no lists.parquet"):
        list(LabelFolderReader("gs://bkt/none")())


def test_examples_are_made_anew_when_an_object_has_changed(store: ObjectStore) -> None:
    from inranker_jax.data.sources import _stamps

    paths.write("gs://bkt/a.jsonl", "one")
    first = _stamps(["gs://bkt/a.jsonl"])
    assert _stamps(["gs://bkt/a.jsonl"]) == first
    paths.write("gs://bkt/a.jsonl", "two")
    assert _stamps(["gs://bkt/a.jsonl"]) != first
    assert _stamps(["gs://bkt/none"]) == [("gs://bkt/none", -1, -1)]


def test_a_folder_is_written_into_a_bucket(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    keys = [pair_key(small.QUERIES["q1"], small.DOCUMENTS[name]) for name in ("d3", "d1")]
    with ListsWriter(FOLDER, {"seed": 1}) as writer:
        writer.add("q1", [("d3", 1, keys[0]), ("d1", 0, keys[1])])
        assert store.names("bkt") == []  # nothing half-written is seen
    labels = LabelStore(f"{FOLDER}/store")
    key = labels.add_teacher({"name": "t5"}, {})
    assert labels.add_teacher({"name": "t5"}, {"again": True}) == key
    assert labels.teacher_keys() == [key]
    array = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
    logits = np.array([[0.0, 1.0], [0.0, 2.0]], np.float32)
    labels.write_part(key, "part-test-000000", array, logits)

    again = LabelStore(f"{FOLDER}/store")  # another machine's view
    assert again.parts(key) == ["part-test-000000"]
    assert again.part_rows(key, "part-test-000000") == 2
    assert again.part_rows(key, "part-test-000001") is None
    assert again.torn(key) == []
    np.testing.assert_array_equal(again.read_part(key, "part-test-000000")[1], logits)
    texts = {"path": "unused", "format": "tsv"}
    write_json(
        paths.of(FOLDER) / "labels.json",
        {"format": 1, "queries": texts, "corpus": texts, "teachers": {"t5": key}, "store": "store"},
    )
    table = LabelFolder(FOLDER).labels("t5")
    assert table.lookup(array)[1].tolist() == logits.tolist()


def test_a_part_whose_upload_breaks_off_is_not_there(store: ObjectStore) -> None:
    labels = LabelStore(f"{FOLDER}/store")
    key = labels.add_teacher({"name": "t5"}, {})

    def refuse(method: str, name: str) -> None:
        if method == "POST" and "part-" in name:
            raise StatusError(403, "no right to write")

    store.fault = refuse
    keys = np.zeros((1, 16), np.uint8)
    with pytest.raises(OSError, match="no right"):
        labels.write_part(key, "part-test-000000", keys, np.zeros((1, 2)))
    assert labels.part_names(key) == []


def test_of_two_creators_one_wins(store: ObjectStore) -> None:
    assert paths.create("gs://bkt/jobs/a.json", "first")
    assert not paths.create("gs://bkt/jobs/a.json", "second")
    assert paths.of("gs://bkt/jobs/a.json").read_text() == "first"
