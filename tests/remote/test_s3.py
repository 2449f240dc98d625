"""`s3://` paths against moto's S3, which is not of our making; checkpoints there, which Orbax cannot write itself."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import pytest

from inranker_jax import paths
from inranker_jax.checkpoints import native, uploaded
from inranker_jax.corpora import open_corpus
from inranker_jax.errors import InputError
from inranker_jax.records import read_run, write_run
from tests.remote.test_checkpoints import abstract, open_run, same, state, tokenizer

__all__ = ["tokenizer"]
RUN = "s3://bkt3/runs/one"


def keys(client: Any, prefix: str) -> list[str]:
    return [
        found["Key"] for found in client.list_objects_v2(Bucket="bkt3", Prefix=prefix).get("Contents", [])
    ]


def test_files_of_a_bucket(s3: Any, tmp_path: pathlib.Path) -> None:
    paths.write("s3://bkt3/run/a.json", "one")
    paths.write("s3://bkt3/run/a.json", "two")
    paths.write("s3://bkt3/run2/b", "x")
    assert paths.of("s3://bkt3/run/a.json").read_text() == "two"
    assert paths.names_below("s3://bkt3/run") == ["a.json"]
    assert paths.size("s3://bkt3/run/a.json") == 3
    s3.put_object(Bucket="bkt3", Key="run/c", Body=b"x")  # by somebody else
    assert paths.names_below("s3://bkt3/run") == ["a.json", "c"]
    assert not paths.create("s3://bkt3/run/c", "y")
    assert paths.create("s3://bkt3/run/d", "y")
    copy = paths.local_copy("s3://bkt3/run")
    assert paths.names_below(copy) == ["a.json", "c", "d"]
    paths.remove("s3://bkt3/run")
    assert keys(s3, "") == ["run2/b"]
    data = bytes(range(256)) * 4096 * 12  # 12 MiB: several parts of an upload
    (tmp_path / "big").write_bytes(data)
    paths.upload(tmp_path / "big", "s3://bkt3/big")
    assert paths.local_copy("s3://bkt3/big").read_bytes() == data
    paths.check_reachable("s3://bkt3/run")
    with pytest.raises(InputError, match="there is no bucket 'nobody'"):
        paths.check_reachable("s3://nobody/run")


def test_inputs_and_runs(s3: Any) -> None:
    paths.write("s3://bkt3/in/corpus.tsv", "d1\ttext 1\nd2\ttext 2\n")
    assert open_corpus("s3://bkt3/in/*.tsv").texts() == {"d1": "text 1", "d2": "text 2"}
    write_run("s3://bkt3/run.trec.gz", {"q": {"d": 1.5}}, "t")
    assert read_run("s3://bkt3/run.trec.gz") == {"q": {"d": 1.5}}


def test_steps_are_uploaded_and_a_run_goes_on_from_them(
    s3: Any, tokenizer: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / "machine 1"))
    assert native.describe(RUN) is None
    run = open_run(tokenizer, RUN)
    for step, loss in ((1, 0.5), (2, 0.7), (3, 0.6)):
        run.save(step, state(step), {"step": step}, loss)
        run.wait()
        assert uploaded.complete_steps(paths.of(RUN) / "checkpoints")[-1] == step
    run.close()
    assert uploaded.complete_steps(paths.of(RUN) / "checkpoints") == [1, 3]  # the best and the newest
    assert not [key for key in keys(s3, "runs/one/checkpoints/") if key.split("/")[3] == "2"]
    assert not list((tmp_path / "machine 1" / "runs").iterdir())

    monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / "machine 2"))
    described = native.describe(RUN)
    assert described is not None
    assert described[1].fingerprint == tokenizer.fingerprint
    again = open_run(tokenizer, RUN)
    assert again.latest_step == 3
    tree, position = again.restore(abstract(state(0)))
    assert position == {"step": 3}
    same(tree, state(3))
    again.save(4, state(4), {"step": 4}, 0.9)
    again.close()
    assert uploaded.complete_steps(paths.of(RUN) / "checkpoints") == [1, 4]
    best = native.load(RUN)
    assert best.source == f"{RUN}/checkpoints/1"
    same(best.params, state(1)["params"])
    paths.write(f"{RUN}/checkpoints/3/state", "torn")
    with pytest.raises(InputError, match="has no complete step 3"):
        native.load(f"{RUN}/checkpoints/3")


def test_a_torn_upload_is_removed_and_never_restored(s3: Any, tokenizer: Any) -> None:
    run = open_run(tokenizer, RUN, keep=2)
    for step in (1, 2):
        run.save(step, state(step), {"step": step})
    run.close()
    paths.remove(f"{RUN}/checkpoints/2/commit_success.txt")
    assert native.load(RUN).source == f"{RUN}/checkpoints/1"
    again = open_run(tokenizer, RUN, keep=2)
    assert again.latest_step == 1
    assert not [key for key in keys(s3, "runs/one/checkpoints/2")]
    again.close()


def test_a_step_that_orbax_removes_leaves_the_folder_at_once_and_whole(
    s3: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it deleted file by file, an upload that begins meanwhile could take half of it for all."""
    monkeypatch.setattr(uploaded, "_SECONDS", 600)
    run = open_run(tokenizer, RUN)
    run.save(1, state(1), {"step": 1}, 0.5)
    run._manager.wait_until_finished()
    steps = pathlib.Path(run._steps)
    files = paths.names_below(steps / "1")
    run.save(2, state(2), {"step": 2}, 0.4)
    run._manager.wait_until_finished()
    assert not (steps / "1").exists()
    assert paths.names_below(steps / uploaded.REMOVED / "1") == files
    run.wait()
    assert not list((steps / uploaded.REMOVED).iterdir())
    assert uploaded.complete_steps(paths.of(RUN) / "checkpoints") == [2]
    run.close()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"several processes .*gs://"):
        uploaded.UploadedSteps(paths.of(RUN) / "checkpoints")
