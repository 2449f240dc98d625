"""The monitor of steps: late reading, the stop on bad losses, rates, the progress line, one writer of several."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

from inranker_jax.models import flops
from inranker_jax.telemetry import monitor as monitors
from inranker_jax.telemetry.monitor import NonFiniteLossError, StepMonitor, progress_line
from inranker_jax.telemetry.phases import Phases
from tests.batches import TINY
from tests.telemetry.test_phases import Clock
from tests.telemetry.test_writers import scalars


class FakeBatch(dict):
    """Two documents of 3 and 5 tokens."""

    def __init__(self):
        tokens = np.zeros((1, 2, 6), np.int32)
        tokens[0, 0, :3] = tokens[0, 1, :5] = 9
        super().__init__(tokens=tokens)
        self.examples = [("q1", ("d1", "d2"))]


class Value:
    """A device scalar: reading it takes until `clock` says so."""

    def __init__(self, value, clock=None, seconds=0.0, read=None):
        self.value, self.clock, self.seconds, self.read = value, clock, seconds, read

    def __float__(self):
        if self.clock:
            self.clock.time += self.seconds
        if self.read is not None:
            self.read.append(self.value)
        return float(self.value)


def metrics(loss=0.5, **more):
    return {"loss": loss, "grad_norm": 1.5, "documents": 2, "useful_tokens": 8, "tokens": 12, **more}


def test_metrics_are_read_some_steps_late(tmp_path):
    read = []
    monitor = StepMonitor(str(tmp_path), 10, 0, 50, lag=2)
    for step in range(1, 6):
        monitor.add(step, metrics(Value(step, read=read)), FakeBatch())
        assert read == list(range(1, step - 1))
    assert monitor.last_step == 3
    monitor.drain()
    assert read == [1, 2, 3, 4, 5]
    monitor.close()


def test_the_learning_rate_is_read_late_too(tmp_path):
    read = []
    schedule = lambda step: Value(step, read=read)  # noqa: E731
    monitor = StepMonitor(str(tmp_path), 9, 3, 2, schedule, lag=2)
    for step in range(4, 10):
        monitor.add(step, metrics(), FakeBatch())
        assert all(asked < step - 2 for asked in read)
    monitor.close()
    assert read == [3, 5]  # of steps 4, the first, and 6; 8 and 9 are still in flight


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"loss": float("inf")}, {"grad_norm": float("nan")}])
@pytest.mark.parametrize("process", [(0, 1), (1, 2)])
def test_every_process_stops_at_a_bad_loss_and_names_its_examples(tmp_path, bad, process):
    monitor = StepMonitor(str(tmp_path), 10, 0, 50, process=process)
    monitor.add(1, metrics(), FakeBatch())
    monitor.add(2, {**metrics(), **bad}, FakeBatch())
    with pytest.raises(NonFiniteLossError, match=r"step 2: loss .*d1") as caught:
        monitor.drain()
    monitor.close()
    (path,) = tmp_path.glob("nonfinite_step_2*.json")
    assert str(path) in str(caught.value)
    assert path.name == ("nonfinite_step_2.json" if process == (0, 1) else "nonfinite_step_2_process_1.json")
    assert json.loads(path.read_text())["examples"] == [{"query_id": "q1", "document_ids": ["d1", "d2"]}]
    assert monitor.last_step == 1


def train(folder, steps, clock, process=(0, 1), **more):
    """Steps of 10 s: 1 for data, 2 for the host, 7 for the device; the first compiles for a minute."""
    phases = Phases(now=clock)
    monitor = StepMonitor(
        str(folder), 5, 0, 2, lambda step: step / 100, process=process, phases=phases, **more
    )
    for step in range(1, steps + 1):
        with phases.phase("data"):
            clock.time += 1
        clock.time += 2
        if step == 1:
            with phases.phase("compile"):
                clock.time += 60
        monitor.add(step, metrics(Value(step / 10, clock, 7.0), update_norm=0.125), FakeBatch())
        if step == 4:
            monitor.drain()
            with monitor.pause("validation"):
                clock.time += 100
            monitor.validation(4, 0.75, is_best=True)
            with monitor.pause("checkpoint"):
                clock.time += 30
    monitor.drain()
    monitor.close()


def test_scalars_of_windows(tmp_path, capsys):
    work = lambda lengths: flops.TRAINING * flops.forward_flops(TINY, lengths)  # noqa: E731
    train(tmp_path, 5, Clock(), training_flops=work, peak_flops=1e6)
    found = scalars(tmp_path / "tensorboard")
    assert dict(found["train/loss"]) == pytest.approx({1: 0.1, 2: 0.2, 4: 0.35, 5: 0.5})
    assert [step for step, _ in found["speed/mfu"]] == [2, 4, 5]
    last = {tag: dict(values).get(4) for tag, values in found.items()}
    # Steps 3 and 4 are read after step 4 is dispatched, and so is step 2.
    seconds = {name: last[f"time/{name}_seconds"] for name in ("data", "host", "device")}
    assert sum(seconds.values()) / 2 == pytest.approx(last["time/step_seconds"])
    for name, value in seconds.items():
        assert last[f"time/{name}_share"] == pytest.approx(value / sum(seconds.values()))
    # All but the first step's: its window is compilation.
    assert sum(value for _, value in found["time/device_seconds"]) == 4 * 7
    assert last["train/grad_norm"] == 1.5
    assert last["train/update_norm"] == 0.125
    assert last["train/useful_token_share"] == pytest.approx(8 / 12)
    assert last["train/learning_rate"] == pytest.approx(0.03)
    assert last["speed/examples_per_second"] == pytest.approx(4 / sum(seconds.values()))
    assert last["speed/useful_tokens_per_second"] == pytest.approx(16 / sum(seconds.values()))
    done = 2 * flops.TRAINING * flops.forward_flops(TINY, np.array([3, 5]))
    assert last["speed/mfu"] == pytest.approx(done / sum(seconds.values()) / 1e6)
    assert last["speed/useful_tflops_per_second"] == pytest.approx(last["speed/mfu"] * 1e-6)
    assert found["validation/loss"] == [(4, 0.75)]
    assert dict(found["time/compile_seconds"]) == {1: 60, 2: 0, 4: 0, 5: 0}
    assert dict(found["time/validation_seconds"])[5] == 100
    assert dict(found["time/checkpoint_seconds"])[5] == 30
    assert dict(found["goodput/share"])[5] == pytest.approx(50 / 240, abs=1e-3)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    assert "MFU" in out
    assert "goodput 21% of 4m00s in 1 session: steps 50s, compilation 1m00s, validation 1m40s" in err


def test_there_is_no_mfu_without_a_peak(tmp_path, capsys):
    train(tmp_path, 5, Clock(), training_flops=lambda lengths: 1.0)
    assert not {tag for tag in scalars(tmp_path / "tensorboard") if "mfu" in tag or "flops" in tag}
    assert "MFU" not in capsys.readouterr().out


def test_other_processes_are_silent_and_write_nothing(tmp_path, capsys):
    train(tmp_path, 5, Clock(), process=(1, 2))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_file_of_goodput_follows_checkpoints(tmp_path):
    train(tmp_path, 4, Clock())
    content = json.loads((tmp_path / "goodput.json").read_text())
    assert content["steps_seconds_at_checkpoint"] == {"4": 40}
    assert not content["finished"]


def scalars_of_line(scale, mfu):
    found = {"train/loss": 0.123456, "train/learning_rate": 1e-3, "train/useful_token_share": 0.97}
    found |= {
        "speed/examples_per_second": 9.87 * scale,
        "speed/useful_tokens_per_second": 987.6 * scale,
        "time/data_share": 1.0,
        "time/host_share": 1.0,
        "time/device_share": 1.0,
    }
    return found | ({"speed/mfu": 0.41} if mfu else {})


@pytest.mark.parametrize("mfu", [True, False])
@pytest.mark.parametrize("scale", [1, 100, 10_000])
@pytest.mark.parametrize("step", [7, 12_345, 1_234_567])
def test_the_line_stays_readable(step, scale, mfu):
    line = progress_line(step, 10 * step, scalars_of_line(scale, mfu), "5h02m left")
    assert len(line) <= monitors.COLUMNS
    for part in (
        f"step {step}/{10 * step}",
        "loss 0.1235",
        "examples/s",
        "97% useful",
        "data 100% device 100%",
        "left",
    ):
        assert part in line
    assert ("MFU 41%" in line) == mfu


def test_the_peak_of_device_memory_is_shown_where_there_is_one(tmp_path, monkeypatch):
    import jax

    device = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**30})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    train(tmp_path, 2, Clock())
    found = scalars(tmp_path / "tensorboard")
    assert found["memory/device_peak_gib"][-1] == (2, 3.0)
    assert found["memory/host_peak_gib"][-1][1] > 0.01
