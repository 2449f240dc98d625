"""Paths against a local stand-in of an object store."""

from __future__ import annotations

import gc
import pathlib
import time

import pytest

from inranker_jax import manifest, paths, records
from inranker_jax.errors import InputError
from tests.remote.object_store import ObjectStore, StatusError


def test_a_file_is_written_read_listed_and_removed(store: ObjectStore) -> None:
    paths.write("gs://bkt/run/a.json", "ção")
    paths.write("gs://bkt/run/a.json", "ção 2")
    paths.write("gs://bkt/run/deep/er/b.bin", b"\0\1")
    assert store.names("bkt") == ["run/a.json", "run/deep/er/b.bin"]
    assert paths.of("gs://bkt/run/a.json").read_text() == "ção 2"
    assert paths.names_below("gs://bkt/run") == ["a.json", "deep/er/b.bin"]
    assert paths.of("gs://bkt/run/deep").is_dir()
    paths.remove("gs://bkt/run/deep")
    paths.remove("gs://bkt/run/deep")
    assert paths.names_below("gs://bkt/run/") == ["a.json"]
    assert paths.names_below("gs://bkt/none") == []
    with pytest.raises(ValueError, match="a whole bucket"):
        paths.remove("gs://bkt/")


def test_local_paths_behave_alike(tmp_path: pathlib.Path) -> None:
    paths.write(tmp_path / "run" / "a.json", "one")
    paths.write(tmp_path / "run" / "a.json", "two")
    assert paths.names_below(tmp_path) == ["run/a.json"]
    assert paths.of(tmp_path / "run" / "a.json").read_text() == "two"
    assert paths.local_copy(tmp_path / "run") == tmp_path / "run"
    paths.remove(tmp_path / "run")
    paths.remove(tmp_path / "run")
    assert paths.names_below(tmp_path) == []


def test_another_writer_is_seen(store: ObjectStore) -> None:
    assert not paths.of("gs://bkt/run/a").exists()
    assert paths.names_below("gs://bkt/run") == []
    store.put("bkt", "run/a", b"x", {})  # by somebody else
    assert paths.of("gs://bkt/run/a").exists()
    assert [path.name for path in paths.of("gs://bkt/run").iterdir()] == ["a"]


def test_a_file_that_is_replaced_while_it_is_read_is_the_old_or_the_new_one(store: ObjectStore) -> None:
    old, new = '{"parts": []}', '{"parts": ["a longer list than before"]}'
    paths.write("gs://bkt/labels.json", old)

    def replace_before_the_next_answer(method: str, name: str) -> None:
        store.fault = lambda method, name: store.put("bkt", "labels.json", new.encode(), {}) and None

    store.fault = replace_before_the_next_answer  # the second request for the file would find the new one
    assert paths.read("gs://bkt/labels.json").decode() in (old, new)
    store.fault = lambda method, name: None
    with pytest.raises(FileNotFoundError):
        paths.read("gs://bkt/none.json")


def test_a_big_file_goes_up_in_chunks_and_comes_back(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    data = bytes(range(256)) * 4096 * 60  # 60 MiB: more than one chunk of a resumable upload
    (tmp_path / "big").write_bytes(data)
    paths.upload(tmp_path / "big", "gs://bkt/big")
    assert store.buckets["bkt"]["big"].data == data
    assert paths.local_copy("gs://bkt/big").read_bytes() == data


def test_an_upload_that_breaks_off_is_not_seen(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    paths.write("gs://bkt/out/run.trec", "old")

    def refuse(method: str, name: str) -> None:
        if method == "POST":
            raise StatusError(403, "no right to write")

    store.fault = refuse
    with pytest.raises(OSError, match="no right"), records.atomic_text("gs://bkt/out/run.trec") as out:
        out.write("new")
    with pytest.raises(TypeError), records.atomic_text("gs://bkt/out/run.trec") as out:
        out.writelines(["half of ", None])  # type: ignore[list-item]
    assert paths.of("gs://bkt/out/run.trec").read_text() == "old"


def test_the_marker_of_a_folder_is_uploaded_last(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    for name in ("a", "marker", "z"):
        (tmp_path / name).write_text(name)
    paths.upload(tmp_path, "gs://bkt/folder", marker="marker")
    written = {name: found.generation for name, found in store.buckets["bkt"].items()}
    assert max(written, key=lambda name: written[name]) == "folder/marker"
    assert len(written) == 3


def test_a_copy_is_fetched_once_and_again_when_it_changed(store: ObjectStore) -> None:
    paths.write("gs://bkt/model/config.json", "1")
    paths.write("gs://bkt/model/deep/weights", "2")
    copy = paths.local_copy("gs://bkt/model")
    assert copy.name == "model"
    assert {name: (copy / name).read_text() for name in paths.names_below(copy)} == {
        "config.json": "1",
        "deep/weights": "2",
    }
    store.requests.clear()
    assert paths.local_copy("gs://bkt/model") == copy
    assert not [path for _, path in store.requests if "alt=media" in path]
    paths.write("gs://bkt/model/config.json", "3")
    assert (paths.local_copy("gs://bkt/model") / "config.json").read_text() == "3"
    with pytest.raises(InputError, match="gs://bkt/none: no such file"):
        paths.local_copy("gs://bkt/none")


def test_a_mirror_follows_and_leaves_nothing_behind(store: ObjectStore) -> None:
    mirror = paths.Mirror("gs://bkt/run/tensorboard", seconds=0)
    (mirror.folder / "events").write_text("one")
    mirror.push()
    (mirror.folder / "events").write_text("one two")
    mirror.close()
    assert store.buckets["bkt"]["run/tensorboard/events"].data == b"one two"
    assert not mirror.folder.exists()


def test_a_manifest_is_kept_in_a_bucket(store: ObjectStore) -> None:
    import jax

    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    manifest.write("gs://bkt/run", {"seed": 1}, mesh, "gin")
    manifest.write("gs://bkt/run", {"seed": 1}, mesh, "gin")
    assert paths.of("gs://bkt/run/manifest.json").read_text().count('"started"') == 2
    assert paths.of("gs://bkt/run/config.gin").read_text() == "gin"
    with pytest.raises(InputError, match="seed: 2"):
        manifest.write("gs://bkt/run", {"seed": 2}, mesh, "gin")


def test_mistakes_are_one_line_each(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"ftp://.*no paths of the kind ftp://.*gs://, s3://"):
        paths.of("ftp://host/file")
    with pytest.raises(InputError, match="Did you mean 'gs'"):
        paths.of("gss://bkt/file")
    with pytest.raises(InputError, match="there is no bucket 'nobody'"):
        paths.check_reachable("gs://nobody/run")
    paths.check_reachable("gs://bkt/run")
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'inranker_jax\[s3\]'"):
        paths.of("s3://bkt/file")


def test_a_folder_is_not_its_neighbour_with_a_longer_name(store: ObjectStore) -> None:
    for name in ("run/a", "run2/b", "run.json"):
        paths.write(f"gs://bkt/{name}", "x")
    assert paths.names_below("gs://bkt/run") == ["a"]
    assert paths.names_below(paths.local_copy("gs://bkt/run")) == ["a"]
    paths.remove("gs://bkt/run")
    assert store.names("bkt") == ["run.json", "run2/b"]


def test_few_files_of_a_folder_are_on_their_way_at_a_time(store: ObjectStore, tmp_path: pathlib.Path) -> None:
    for index in range(80):
        paths.write(tmp_path / "folder" / f"{index}.txt", str(index))
    running: list[int] = []
    counts: list[int] = []

    def hold(method: str, name: str) -> None:
        running.append(1)
        counts.append(len(running))
        time.sleep(0.05)
        running.pop()

    store.fault = hold
    paths.upload(tmp_path / "folder", "gs://bkt/folder")
    assert 1 < max(counts) <= paths.TRANSFERS
    counts.clear()
    copy = paths.local_copy("gs://bkt/folder", skip=["1*"])
    assert (
        1 < max(counts) <= 2 * paths.TRANSFERS
    )  # gcsfs asks for the object and for a folder of its name at once
    assert paths.names_below(copy) == sorted(f"{i}.txt" for i in range(80) if not str(i).startswith("1"))


def test_an_upload_that_is_refused_begins_no_other_and_warns_of_none(
    store: ObjectStore, tmp_path: pathlib.Path, recwarn: pytest.WarningsRecorder
) -> None:
    for index in range(80):
        paths.write(tmp_path / "folder" / f"{index}.txt", str(index))

    def refuse(method: str, name: str) -> None:
        raise StatusError(403, "not yours")

    store.fault = refuse
    with pytest.raises(OSError, match="not yours"):
        paths.upload(tmp_path / "folder", "gs://bkt/folder")
    gc.collect()
    assert len(store.requests) < 80
    assert not [str(warning.message) for warning in recwarn]
