"""Native checkpoints: one Orbax step holds the train state, the data position and the model's description.

Layout of a run's folder:

    OUTPUT_DIR/tokenizer/            tokenizer files, written once
    OUTPUT_DIR/checkpoints/STEP/     state (Orbax), position (JSON), model (JSON: T5 config and scoring contract)

A step is written to a temporary folder and renamed when it is complete, so a torn one is never restored. In an object
store, which has no rename, a step is complete when its `commit_success.txt` is there, which is written last (see
`uploaded` for stores that Orbax cannot write to).
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from inranker_jax import distributed, paths, quiet
from inranker_jax.checkpoints import uploaded
from inranker_jax.checkpoints.folders import STEPS, TOKENIZER, locate_run
from inranker_jax.errors import InputError
from inranker_jax.models import T5Config, t5
from inranker_jax.prompts import ScoringContract, Tokenizer
from inranker_jax.prompts.tokenizer import CONFIG_FILE

METRIC = "validation_loss"


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """What a checkpoint needs besides its arrays to score a pair."""

    config: T5Config
    contract: ScoringContract

    def to_json(self) -> dict[str, Any]:
        return {"config": self.config.to_hf_dict(), "contract": self.contract.to_dict()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> ModelDescription:
        return cls(T5Config.from_hf_dict(stored["config"]), ScoringContract.from_dict(stored["contract"]))


def _options(
    keep_latest: int, keep_best: int, read_only: bool, removed: str | None = None
) -> ocp.CheckpointManagerOptions:
    latest = checkpoint_managers.LatestN(keep_latest)
    best = checkpoint_managers.BestN(
        get_metric_fn=lambda metrics: -metrics[METRIC], n=keep_best, keep_checkpoints_without_metrics=False
    )
    return ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy([latest, best]),
        best_fn=lambda metrics: -metrics[METRIC],
        read_only=read_only,
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        todelete_subdir=removed,
        enable_async_checkpointing=not read_only,
        multiprocessing_options=_alone() if read_only else ocp.options.MultiprocessingOptions(),
    )


class _Manager(ocp.CheckpointManager):
    """Waits for its clean-up at the end, and leaves notices of preemption to `interruption`.

    `interruption` asks JAX for them with numbers of its own, and JAX settles the step at which all processes stop by
    the numbers that it is asked with. Were Orbax to ask with its steps in between, a notice that comes during a save
    would be settled on a number that never comes.
    """

    def reached_preemption(self, step: int) -> bool:
        return False

    def close(self) -> None:
        self._maybe_await_cleanup_tmp_directory()  # else only a save waits for it
        super().close()


def _alone() -> Any:
    """A process that only reads waits for no other: the others may be doing something else."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"reader{index}"
    )


def _manager(
    folder: Any,
    keep_latest: int = 1,
    keep_best: int = 1,
    read_only: bool = False,
    removed: str | None = None,
) -> Any:
    with quiet.absl_warnings():
        return _open(folder, _options(keep_latest, keep_best, read_only, removed))


def _open(folder: Any, options: ocp.CheckpointManagerOptions) -> Any:
    return _Manager(
        folder,
        options=options,
        item_names=("state", "position", "model"),
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(),
            "position": ocp.JsonCheckpointHandler(),
            "model": ocp.JsonCheckpointHandler(),
        },
    )


class Checkpointer:
    """Saves and restores the steps of one run; saves are asynchronous.

    Args:
      output_dir: the run's folder.
      description: stored in every step.
      tokenizer: its files are written once to `output_dir/tokenizer`.
      keep_latest: how many of the newest steps are kept.
      keep_best: how many of the steps with the lowest validation loss are kept beside them.
    """

    def __init__(
        self,
        output_dir: str,
        description: ModelDescription,
        tokenizer: Tokenizer,
        keep_latest: int = 1,
        keep_best: int = 1,
    ) -> None:
        root = paths.absolute(output_dir)
        self._description = description
        if jax.process_index() == 0:
            _write_tokenizer(root / TOKENIZER, tokenizer)
        steps = root / STEPS
        self._uploaded = uploaded.UploadedSteps(steps) if uploaded.is_needed(steps) else None
        self._steps = self._uploaded.folder if self._uploaded else steps
        removed = uploaded.REMOVED if self._uploaded else None
        self._manager = _manager(self._steps, keep_latest, keep_best, removed=removed)

    @property
    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        position: Mapping[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Starts saving a step; returns once the arrays of `state` may be overwritten.

        Args:
          step: the step's number; saving a step that is already there does nothing.
          state: tree of arrays with string keys at its root, `params` among them.
          position: the data position and whatever else is JSON.
          validation_loss: decides which steps are the best.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(dict(state)),
                position=ocp.args.JsonSave(dict(position)),
                model=ocp.args.JsonSave(self._description.to_json()),
            ),
            metrics=None if validation_loss is None else {METRIC: float(validation_loss)},
            force=True,
        )

    def restore(
        self, abstract: Mapping[str, Any], step: int | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restores a step, the newest by default.

        Args:
          abstract: tree like the saved state, of `jax.ShapeDtypeStruct` leaves that carry shardings; they may
            belong to another mesh than the one that saved.
          step: the step's number.

        Returns:
          The state and the stored data position.
        """
        target = dict(abstract)
        restored = self._manager.restore(
            self.latest_step if step is None else step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
                ),
                position=ocp.args.JsonRestore(),
            ),
        )
        return restored["state"], restored["position"]

    def validation_loss(self, step: int) -> float | None:
        """The validation loss that a stored step has, or None."""
        found = self._manager.metrics(step)
        return None if found is None else found.get(METRIC)

    def add_validation_loss(self, step: int, validation_loss: float) -> None:
        """Gives a stored step the validation loss that it was saved without; all processes call this."""
        if jax.process_index() == 0:
            content = json.dumps({METRIC: float(validation_loss)})
            paths.write(self._steps / str(step) / "metrics" / "metrics", content)
            if self._uploaded:
                self._uploaded.add(step, "metrics/metrics", content)
        distributed.barrier("a late validation loss")
        self._manager.reload()

    def wait(self) -> None:
        """Blocks until every started save is complete."""
        self._manager.wait_until_finished()
        if self._uploaded:
            self._uploaded.flush()

    def close(self) -> None:
        """Waits for saves and releases the manager."""
        self._manager.close()
        if self._uploaded:
            self._uploaded.close()


def _write_tokenizer(folder: Any, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer's files, unless they are all there."""
    if not paths.is_remote(folder):
        if not folder.is_dir():
            unfinished = folder.with_name(f"{TOKENIZER}.unfinished")
            tokenizer.save(str(unfinished))
            unfinished.rename(folder)
    elif not (folder / CONFIG_FILE).exists():
        with tempfile.TemporaryDirectory(prefix="inranker_jax.") as here:
            tokenizer.save(here)
            paths.upload(here, folder, marker=CONFIG_FILE)


def describe(path: str) -> tuple[ModelDescription, Tokenizer] | None:
    """Description and tokenizer of a run's newest step, without its arrays; None where there is no step."""
    root = paths.absolute(path)
    if not (root / STEPS).is_dir() or not (root / TOKENIZER).is_dir():
        return None
    if uploaded.is_needed(root):
        stored = uploaded.newest_description(root / STEPS)
        if stored is None:
            return None
        return ModelDescription.from_json(stored), Tokenizer.from_pretrained(
            paths.local_copy(root / TOKENIZER)
        )
    manager = _manager(root / STEPS, read_only=True)
    try:
        step = manager.latest_step()
        if step is None:
            return None
        stored = manager.restore(step, args=ocp.args.Composite(model=ocp.args.JsonRestore()))
    finally:
        manager.close()
    tokenizer = Tokenizer.from_pretrained(paths.local_copy(root / TOKENIZER))
    return ModelDescription.from_json(stored["model"]), tokenizer


def load_parts(path: str) -> tuple[ModelDescription, Any, Tokenizer, str]:
    """Loads what scoring needs: description, parameters (host arrays), tokenizer, and the step's path.

    A run's folder gives the step with the lowest validation loss (the newest where none was validated); name
    `OUTPUT_DIR/checkpoints/STEP` for another.

    Raises:
      InputError: there is no complete step, or the tokenizer's folder is missing.
    """
    located = locate_run(path)
    if located is None:
        raise InputError(f"{path} is no training run: expected a folder with {STEPS}/STEP in it.")
    root, step = located
    if not (root / TOKENIZER).is_dir():
        raise InputError(
            f"{root / TOKENIZER} is missing. Copy the whole run's folder, not only one step of it."
        )
    steps = root / STEPS
    if uploaded.is_needed(root):
        step = uploaded.best_step(steps, METRIC) if step is None else step
        steps = uploaded.fetch(steps, step)
    manager = _manager(steps, read_only=True)
    try:
        if step is None:
            best = manager.best_step()
            step = best if best is not None else manager.latest_step()
        if step is None:
            raise InputError(
                f"{root / STEPS} has no complete checkpoint yet. Train for longer, or name another run."
            )
        stored = manager.restore(step, args=ocp.args.Composite(model=ocp.args.JsonRestore()))
        description = ModelDescription.from_json(stored["model"])
        params = _restore_params(manager, step, description.config)
    finally:
        manager.close()
    return (
        description,
        params,
        Tokenizer.from_pretrained(paths.local_copy(root / TOKENIZER)),
        str(root / STEPS / str(step)),
    )


def _restore_params(manager: Any, step: int, config: T5Config) -> Any:
    target = {"params": t5.abstract_params(config)}
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        ),
    )
    return restored["state"]["params"]


def load(path: str) -> Any:
    """Loads a native checkpoint as a `LoadedModel`; see `load_parts` for which step."""
    from inranker_jax.checkpoints import LoadedModel

    description, params, tokenizer, source = load_parts(path)
    return LoadedModel(
        config=description.config,
        params=params,
        tokenizer=tokenizer,
        contract=description.contract,
        source=source,
    )
