"""Where scalars go: TensorBoard's event files always, Weights & Biases where it is wanted."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from inranker_jax import paths
from inranker_jax.errors import InputError

WANDB_FILE = "wandb_run.json"
WANDB_PROJECT = "WANDB_PROJECT"


class Writer(Protocol):
    """Takes scalars by name."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows `scalars` at `step`."""

    def flush(self) -> None:
        """Writes what is kept back."""

    def close(self) -> None:
        """Writes everything and ends."""


class TensorBoard:
    """Writes TensorBoard's event files.

    Args:
      folder: in which they go.
      start_step: the step after which this session writes; what an earlier session wrote beyond it is hidden.
    """

    def __init__(self, folder: str, start_step: int = 0) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._mirror = paths.Mirror(folder)
        self._writer = EventFileWriter(str(self._mirror.folder))
        if start_step:
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            event = event_pb2.Event(wall_time=time.time(), step=start_step + 1, session_log=log)
            self._writer.add_event(event)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one event with all `scalars` at `step`."""
        from tensorboard.compat.proto import event_pb2, summary_pb2

        values = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        summary = summary_pb2.Summary(value=values)
        self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Writes everything to disk; a remote folder follows a little later."""
        self._writer.flush()
        self._mirror.push()

    def close(self) -> None:
        """Writes everything and closes the file."""
        self._writer.close()
        self._mirror.close()


class WeightsAndBiases:
    """Sends scalars to a run of Weights & Biases, the same one in every session.

    Its id is kept in `wandb_run.json` of the run's folder. The package's own variables (WANDB_MODE, WANDB_ENTITY,
    WANDB_API_KEY) mean what they mean elsewhere.

    Args:
      folder: the run's folder.
      project: to which the run belongs.
      config: settings to show beside the run.
    """

    def __init__(self, folder: str, project: str, config: Mapping[str, Any] | None = None) -> None:
        import wandb

        home = paths.of(folder)
        record = home / WANDB_FILE
        stored = json.loads(paths.read(record)) if record.exists() else {}
        if stored.get("project") != project:
            stored = {"project": project, "id": secrets.token_hex(4)}
            paths.write(record, json.dumps(stored))
        local = {} if paths.is_remote(folder) else {"dir": folder}
        self._run = wandb.init(
            project=project,
            id=stored["id"],
            resume="allow",
            name=home.name,
            config=dict(config or {}),
            **local,
        )
        # The service's own counter only grows; steps that are done again after a crash would be dropped.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends `scalars` at `step`."""
        self._run.log({"step": step, **scalars})

    def flush(self) -> None:
        """Nothing to do: a process of the package sends what it has by itself."""

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()


def open_writers(
    folder: str,
    start_step: int,
    announce: Callable[[str], None],
    wandb_project: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Writer]:
    """TensorBoard, and Weights & Biases where `wandb_project` or the variable WANDB_PROJECT names a project.

    Args:
      folder: the run's folder.
      start_step: the step after which this session writes.
      announce: prints a line. What keeps Weights & Biases from starting costs a line, not the run.
      wandb_project: the project; the variable's by default.
      config: settings to show there.

    Raises:
      InputError: `wandb_project` is given and the package is not installed.
    """
    writers: list[Writer] = [TensorBoard(f"{folder}/tensorboard", start_step)]
    project = wandb_project or os.environ.get(WANDB_PROJECT)
    if not project:
        return writers
    if importlib.util.find_spec("wandb") is None:
        if wandb_project:
            raise InputError(
                f"wandb_project={wandb_project!r}, but the package is not installed: `pip install wandb`, or leave "
                "it out (TensorBoard has the same scalars)."
            )
        announce(f"{WANDB_PROJECT} is set, but wandb is not installed: scalars are in TensorBoard alone.")
        return writers
    try:
        writers.append(WeightsAndBiases(folder, project, config))
    except Exception as error:  # of the network, the account, the service
        announce(
            f"Weights & Biases did not start ({type(error).__name__}: {error}): this session's scalars are in "
            "TensorBoard alone."
        )
    return writers
