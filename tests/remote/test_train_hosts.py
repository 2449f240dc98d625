"""Training in a bucket by several processes: killed while a checkpoint is completed, continued to the same bytes."""

from __future__ import annotations

import pathlib

import pytest

from benchmarks.process_group import Ended, Group
from tests import tiny_run
from tests.remote.conftest import environment
from tests.remote.object_store import ObjectStore

RUN = "gs://bkt/runs/hosts"
FSDP = (
    "--gin.train.mesh=@partitioning.make_mesh()",
    "--gin.partitioning.make_mesh.data=1",
    "--gin.partitioning.make_mesh.fsdp=-1",
)


def start(setting: pathlib.Path, output: str, store: ObjectStore, machines: pathlib.Path) -> Group:
    """Starts two processes of one device each, on machines with caches of their own."""
    told = {**tiny_run.environment(setting.parent), **environment(store.url, str(machines))}
    return Group(tiny_run.command(setting, output, *FSDP), 2, 1, told)


def finish(group: Group) -> list[Ended]:
    with group:
        ended = group.end()
    assert [each.status for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    return ended


@pytest.mark.slow
def test_hosts_that_die_while_a_checkpoint_is_completed_go_on_from_the_one_before(
    store: ObjectStore, tmp_path: pathlib.Path
) -> None:
    setting = tiny_run.write_setting(tmp_path)
    finish(start(setting, str(tmp_path / "disk"), store, tmp_path / "machines 0"))

    with start(setting, RUN, store, tmp_path / "machines 1") as group:
        store.when_uploaded("runs/hosts/checkpoints/6/commit_success.txt", lambda: group.kill(0, 1))
        ended = group.end()
        store.fault = lambda method, name: None
    assert [each.status for each in ended] == [-9, -9], ended[0].stderr + ended[1].stderr
    there = store.names("bkt", "runs/hosts/checkpoints/6/")
    assert any(name.startswith("runs/hosts/checkpoints/6/state/") for name in there)
    assert "runs/hosts/checkpoints/6/commit_success.txt" not in there

    ended = finish(start(setting, RUN, store, tmp_path / "machines 2"))
    assert f"resuming {RUN} at step 4" in ended[0].stderr
    tiny_run.assert_same_bytes(tiny_run.final_state(RUN), tiny_run.final_state(tmp_path / "disk"))
