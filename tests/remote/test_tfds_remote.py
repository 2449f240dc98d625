"""TFDS datasets in a bucket: prepared there, trained on from there, and back to a BEIR folder."""

from __future__ import annotations

import builtins
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from inranker_jax import data, paths, prepare_tfds
from inranker_jax.errors import InputError
from tests.data import label_folders as toy
from tests.remote.object_store import ObjectStore

tfds = pytest.importorskip("tensorflow_datasets", reason="needs the [train] extra")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    tfds.disable_progress_bar()
    yield
    tfds.enable_progress_bar()


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return toy.write_label_folder(tmp_path / "labels")


def stored(task: str, cache: pathlib.Path) -> list[dict[str, Any]]:
    (store,), _ = data.open_stores(task, "train", cache_dir=cache)
    return [dataclasses.asdict(store[number]) for number in range(len(store))]


@pytest.mark.parametrize("root", ["gs://bkt/tfds", "s3://bkt3/tfds"])
def test_labels_are_trained_on_from_a_bucket(
    root: str, folder: pathlib.Path, tmp_path: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("store" if root.startswith("gs:") else "s3")
    flags = [f"--labels={folder}", "--name=toy_labels", "--list_size=4", "--validation_fraction=0.2"]
    assert prepare_tfds.main([*flags, f"--data_dir={root}"]) == 0
    assert "toy_labels/1.0.0/dataset_info.json" in paths.names_below(root)

    name = f"tfds_remote_{root[:2]}"
    data.add_tfds_task(name, "toy_labels", root)
    direct = data.add_label_folder_task(f"{name}_direct", folder, list_size=4, validation_fraction=0.2)
    found, expected = stored(name, tmp_path / "cache"), stored(direct.name, tmp_path / "cache")
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_equal(ours, theirs)


def test_a_dataset_that_is_there_is_not_replaced_unasked(
    store: ObjectStore, folder: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--labels={folder}", "--name=toy_labels", "--data_dir=gs://bkt/tfds"]
    assert prepare_tfds.main(flags) == 0
    first = store.buckets["bkt"]["tfds/toy_labels/1.0.0/dataset_info.json"].generation
    capfd.readouterr()
    assert prepare_tfds.main(flags) == 2
    assert "gs://bkt/tfds/toy_labels/1.0.0: this dataset is there already" in capfd.readouterr().err
    assert prepare_tfds.main([*flags, "--overwrite"]) == 0
    assert store.buckets["bkt"]["tfds/toy_labels/1.0.0/dataset_info.json"].generation != first


def test_a_beir_folder_of_a_bucket_and_back(store: ObjectStore, folder: pathlib.Path) -> None:
    source = folder.with_name("labels_source")
    paths.upload(source, "gs://bkt/in")
    assert prepare_tfds.main(["--beir=gs://bkt/in", "--name=toy_beir", "--data_dir=gs://bkt/tfds"]) == 0
    back = ["--from_tfds=toy_beir", "--data_dir=gs://bkt/tfds", "--output_dir=gs://bkt/back"]
    assert prepare_tfds.main(back) == 0
    assert store.names("bkt", "back/") == ["back/corpus.jsonl", "back/qrels/test.tsv", "back/queries.jsonl"]
    assert store.buckets["bkt"]["back/qrels/test.tsv"].data == (source / "qrels" / "test.tsv").read_bytes()


def test_an_upload_that_breaks_off_leaves_no_dataset(
    store: ObjectStore, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [f"--labels={folder}", "--name=toy_labels", "--data_dir=gs://bkt/tfds"]
    assert prepare_tfds.main(flags) == 0

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("the line is down")

    with monkeypatch.context() as patch:
        patch.setattr(paths, "upload", broken)
        with pytest.raises(OSError, match="the line is down"):
            prepare_tfds.main([*flags, "--overwrite"])
    assert "tfds/toy_labels/1.0.0/dataset_info.json" not in store.names("bkt")
    assert prepare_tfds.main(flags) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--beir=gs://typo/in", "--name=toy", "--data_dir=gs://bkt/tfds"], "there is no bucket 'typo'"),
        (
            ["--from_tfds=toy", "--data_dir=gs://typo/tfds", "--output_dir=gs://bkt/out"],
            "there is no bucket 'typo'",
        ),
        (
            ["--from_tfds=beir/x:1.0.0", "--data_dir=gs://bkt/tfds", "--output_dir=gs://bkt/out"],
            "gs://bkt/tfds/beir/x: no prepared TFDS dataset",
        ),
    ],
)
def test_what_is_not_there_is_told(
    store: ObjectStore, flags: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert prepare_tfds.main(flags) == 2
    assert words in capfd.readouterr().err


def test_a_task_file_of_a_bucket(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    paths.write("gs://bkt/task.py", "import builtins\nbuiltins.the_bucket_was_here = True\n")
    data.import_task_modules(["gs://bkt/task.py"])
    assert builtins.the_bucket_was_here  # type: ignore[attr-defined]
    paths.write("gs://bkt/broken.py", "a = 1\nb = 1 / 0\n")
    with pytest.raises(InputError, match=r"gs://bkt/broken.py:2: ZeroDivisionError.*`python /.*broken.py`"):
        data.import_task_modules(["gs://bkt/broken.py"])
    with pytest.raises(InputError, match="there is no bucket 'typo'"):
        data.import_task_modules(["gs://typo/task.py"])
