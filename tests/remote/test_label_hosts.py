"""`label` into a bucket: the folder of a local run, whichever processes write it."""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import pytest

from benchmarks.process_group import Group
from inranker_jax.corpora.label_folder import LabelFolder, read_labels
from inranker_jax.errors import InputError
from inranker_jax.flags import Stopped
from inranker_jax.labeling import import_export
from inranker_jax.labeling.job import LabelJob, Settings
from tests.labeling.small_mixture import FakeTeacher, write_mixture
from tests.remote.object_store import ObjectStore

pytest.importorskip("pyarrow")
FOLDER = "gs://bkt/labels"


@pytest.fixture
def settings(tmp_path: pathlib.Path) -> Settings:
    return write_mixture(tmp_path)


def label(settings: Settings, stop_after: int | None = None) -> FakeTeacher:
    """Runs a job; stops it after some chunks."""
    teacher, chunks = FakeTeacher(), iter(range(100))
    job = LabelJob(
        settings,
        announce=lambda _: None,
        stopping=lambda: stop_after is not None and next(chunks) + 1 >= stop_after,
    )
    job.prepare()
    job.label(teacher)
    job.finish()
    return teacher


def parts(store: ObjectStore) -> dict[str, bytes]:
    names = [name for name in store.names("bkt", "labels/store/teachers/") if name.endswith(".parquet")]
    return {name.removeprefix("labels/"): store.buckets["bkt"][name].data for name in names}


@pytest.mark.parametrize("count", [1, 2])
def test_a_bucket_gets_the_parts_of_a_local_folder(
    store: ObjectStore, settings: Settings, count: int
) -> None:
    label(settings)
    local = pathlib.Path(settings.output_dir)
    remote = dataclasses.replace(settings, output_dir=FOLDER, process_count=count)
    with pytest.raises(Stopped):
        label(remote, stop_after=1)
    kept = parts(store)
    assert len(kept) == 1
    seen = sum(len(label(dataclasses.replace(remote, process_index=index)).seen) for index in range(count))
    assert seen == 60 - 16, "what was finished is kept"
    assert parts(store) == {
        str(path.relative_to(local)): path.read_bytes() for path in local.glob("store/teachers/*/*.parquet")
    }
    assert LabelFolder(FOLDER).info["complete"] is True
    assert list(read_labels(FOLDER)) == list(read_labels(local))


def test_a_bucket_that_is_not_there_is_told_before_any_work(store: ObjectStore, settings: Settings) -> None:
    with pytest.raises(InputError, match="there is no bucket 'bkc'"):
        LabelJob(dataclasses.replace(settings, output_dir="gs://bkc/labels"), announce=print)


def test_an_import_into_a_bucket(store: ObjectStore, settings: Settings, tmp_path: pathlib.Path) -> None:
    label(settings)
    exported = str(tmp_path / "labels.jsonl")
    import_export.export_jsonl(exported, settings.output_dir, "fake")
    for folder in (FOLDER, str(tmp_path / "again")):
        import_export.import_jsonl(exported, folder, "fake", announce=lambda _: None)
    pairs = list(read_labels(FOLDER))
    assert len(pairs) == 60
    assert pairs == list(read_labels(tmp_path / "again"))


def test_processes_of_a_pod_share_nothing_but_the_bucket(store: ObjectStore, settings: Settings) -> None:
    names = ("queries", "corpus", "candidates", "qrels", "chunk_size")
    command = [
        sys.executable, "-m", "inranker_jax.label", f"--output_dir={FOLDER}", "--negatives=4", "--depth=20",
        *[f"--{name}={getattr(settings, name)}" for name in names], f"--teacher=bm25=run:{settings.candidates}",
    ]  # fmt: skip
    with Group(command, 2) as group:
        ended = group.end()
    assert [each.status for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert "labels of bm25 are complete in gs://bkt/labels" in ended[0].stdout
    assert "[1/2] scored 28 pairs, the share of this process" in ended[1].stderr
    assert len(list(read_labels(FOLDER))) == 60
    assert len(store.names("bkt", "labels/sessions/")) == 2
