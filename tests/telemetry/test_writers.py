"""TensorBoard's files read back; Weights & Biases by a stand-in for its package."""

from __future__ import annotations

import json
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from inranker_jax.errors import InputError
from inranker_jax.telemetry.writers import WANDB_FILE, TensorBoard, open_writers

STAND_IN = """
import json, os
CALLS = []
class Run:
    def define_metric(self, *args, **kwargs): CALLS.append(("define_metric", args, kwargs))
    def log(self, values): CALLS.append(("log", values))
    def finish(self): CALLS.append(("finish",))
def init(**settings):
    CALLS.append(("init", settings))
    if os.environ.get("WANDB_DOWN"):
        raise RuntimeError("the service does not answer")
    return Run()
"""


@pytest.fixture
def wandb(tmp_path_factory, monkeypatch):
    """A package `wandb` that records its calls."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def opened(folder, said, start_step=0, **more):
    return open_writers(str(folder), start_step, said.append, **more)


def close(writers):
    for writer in writers:
        writer.close()


def scalars(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_scalars_are_read_back(tmp_path):
    writer = TensorBoard(str(tmp_path))
    writer.write(1, {"a": 0.5, "b": 2.0})
    writer.write(2, {"a": 0.25})
    writer.close()
    assert scalars(tmp_path) == {"a": [(1, 0.5), (2, 0.25)], "b": [(1, 2.0)]}


def test_steps_that_are_done_again_replace_those_before(tmp_path, monkeypatch):
    first = TensorBoard(str(tmp_path))
    for step in range(1, 8):
        first.write(step, {"a": 1.0})
    first.close()
    now = time.time()
    monkeypatch.setattr(
        time, "time", lambda: now + 5
    )  # files are read in the order of the seconds in their names
    again = TensorBoard(str(tmp_path), start_step=4)
    for step in range(5, 7):
        again.write(step, {"a": 2.0})
    again.close()
    assert scalars(tmp_path)["a"] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]


def test_weights_and_biases_get_the_same_scalars_in_one_run_over_sessions(tmp_path, wandb, monkeypatch):
    said = []
    writers = opened(tmp_path, said, wandb_project="ranking", config={"SEED": "42"})
    assert len(writers) == 2
    writers[1].write(3, {"train/loss": 0.5})
    close(writers)
    settings = wandb.CALLS[0][1]
    assert settings["project"] == "ranking"
    assert settings["resume"] == "allow"
    assert settings["config"] == {"SEED": "42"}
    assert settings["dir"] == str(tmp_path)
    assert ("define_metric", ("*",), {"step_metric": "step"}) in wandb.CALLS
    assert wandb.CALLS[-2:] == [("log", {"step": 3, "train/loss": 0.5}), ("finish",)]
    assert json.loads((tmp_path / WANDB_FILE).read_text()) == {"project": "ranking", "id": settings["id"]}

    monkeypatch.setenv("WANDB_PROJECT", "ranking")
    wandb.CALLS.clear()
    close(opened(tmp_path, said, start_step=3))
    assert wandb.CALLS[0][1]["id"] == settings["id"]
    wandb.CALLS.clear()
    close(opened(tmp_path, said, wandb_project="another"))
    assert wandb.CALLS[0][1]["project"] == "another"
    assert wandb.CALLS[0][1]["id"] != settings["id"]
    assert said == []


def test_a_service_that_does_not_answer_costs_a_line(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_DOWN", "1")
    said = []
    writers = opened(tmp_path, said, wandb_project="ranking")
    close(writers)
    assert len(writers) == 1
    assert len(said) == 1
    assert "the service does not answer" in said[0]


def test_nobody_asked_for_it(tmp_path, wandb):
    writers = opened(tmp_path, [])
    close(writers)
    assert len(writers) == 1
    assert wandb.CALLS == []


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = []
    with pytest.raises(InputError, match="pip install wandb"):
        opened(tmp_path, said, wandb_project="ranking")
    monkeypatch.setenv("WANDB_PROJECT", "ranking")
    writers = opened(tmp_path, said)
    close(writers)
    assert len(writers) == 1
    assert "wandb is not installed" in said[0]
