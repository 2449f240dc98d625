"""Trains a student from teacher logits.

    python -m inranker_jax.train --gin_file=gin/small_synth.gin
    python -m inranker_jax.train --gin_file=gin/small_synth.gin --init_checkpoint=google-t5/t5-small
    python -m inranker_jax.train --gin_file=gin/runs/inranker_60m_phase1.gin --output_dir=DIR --gin.BATCH_SIZE=64

Run the same command again to resume. Parameters come from, in this order: the newest complete checkpoint in the
output folder (with optimiser, RNG and data position); else `--init_checkpoint` (parameters only: a folder of
this project or of Hugging Face, or a hub id); else random initialisation of `train.model`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from inranker_jax import (
    compilation_cache,
    configuration,
    distributed,
    locks,
    manifest,
    optimizers,
    paths,
    quiet,
    train_state,
    trainer,
    watchdog,
)
from inranker_jax.checkpoints import native, uploaded
from inranker_jax.configuration import gin
from inranker_jax.errors import InputError
from inranker_jax.flags import Parser
from inranker_jax.interruption import Interruption, SharedInterruption
from inranker_jax.models import Compute, T5Config, flops, t5
from inranker_jax.packing import Layout
from inranker_jax.partitioning import batch_ways, data_share, make_mesh, own_ways
from inranker_jax.progress import announce, cost
from inranker_jax.prompts import ScoringContract
from inranker_jax.students import RANDOM, Student, check_steps, choose_student, resumed_student
from inranker_jax.telemetry import profiling, usage
from inranker_jax.telemetry.monitor import NonFiniteLossError, StepMonitor
from inranker_jax.telemetry.phases import Phases


def train(
    model_dir: str,
    mixture_or_task_name: str,
    total_steps: int,
    batch_size: int,
    optimizer: Callable[..., Any],
    learning_rate: Callable[[int], float] | float,
    loss: Callable[..., jax.Array],
    mixture_or_task_module: str | Sequence[str] = (),
    mixture_rates: Mapping[str, float] | Callable[[int], float] | None = None,
    use_cached: bool = False,
    seqio_cache_dirs: Sequence[str] = (),
    initial_checkpoint: str | None = None,
    first_step: int | None = None,
    model: T5Config | None = None,
    initialiser: Callable[[T5Config, int], Any] = t5.init_params,
    vocabulary: str | None = None,
    contract: ScoringContract | None = None,
    task_feature_lengths: Mapping[str, int] | None = None,
    compute: Compute | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dropout_rate: float | None = None,
    max_grad_norm: float | None = 1.0,
    accumulation: int = 1,
    list_size: int | None = None,
    layout: Layout | str = "auto",
    lengths: Sequence[int] = (128, 256, 384, 512),
    seed: int = 0,
    train_split: str = "train",
    validation_split: str | None = "validation",
    validation_batches: int | None = None,
    validation_period: int = 1000,
    checkpoint_period: int = 1000,
    keep_latest: int = 1,
    keep_best: int = 1,
    log_every: int = 50,
    final_report: Callable[..., None] | None = None,
    profile_steps: Sequence[int] | None = None,
    wandb_project: str | None = None,
    hang_seconds: float = 600.0,
    hang_factor: float = 20.0,
    hang_exit_seconds: float | None = None,
    started: float | None = None,
) -> None:
    """Runs training from start, or from the newest checkpoint in `model_dir`, to `total_steps`.

    Args:
      model_dir: the run's folder: checkpoints, TensorBoard, effective gin config, manifest.
      mixture_or_task_name: a SeqIO task or mixture of labelled lists.
      total_steps: optimiser steps, those of a T5X checkpoint that the run starts from included.
      batch_size: lists a step, over all devices and micro-batches; with `list_size` 1 these are pairs.
      optimizer: `optimizers.adamw` or `optimizers.adafactor`, called with the learning rate.
      learning_rate: a schedule (step -> rate) or a constant.
      loss: a function of `inranker_jax.losses`.
      mixture_or_task_module: module (or its .py file), or several, to import: they register the task.
      mixture_rates: how often each task of a mixture is drawn, by task name, or a function of its number of
        examples such as `rates.temperature`; the mixture's own (proportional to the size) by default.
      use_cached: read what SeqIO's offline caching wrote (T5X's USE_CACHED_TASKS); the examples are the same.
      seqio_cache_dirs: folders in which that lies.
      initial_checkpoint: parameters to start from; see the module's docstring.
      first_step: where counting starts; None for the step of a T5X checkpoint, and 0 with any other.
      model: architecture of a randomly initialised student.
      initialiser: makes its parameters from architecture and seed; T5's own by default.
      vocabulary: folder of its tokenizer files, or one of a shipped collection (`python_docs/vocabulary`).
      contract: how a pair becomes token ids and a score; the checkpoint's own by default.
      task_feature_lengths: T5X's {"inputs": tokens}: the contract's `max_length`; None leaves it.
      compute: activations' dtype and rematerialisation.
      mesh: the device mesh; all devices on `data` by default.
      dropout_rate: overrides the architecture's.
      max_grad_norm: global norm to which gradients are clipped; None for no clipping.
      accumulation: micro-batches a step. Packed batches have as many as their tokens need, and with more than 1
        here none has more than `batch_size` / `accumulation` lists.
      list_size: documents a list; the data's longest list by default.
      layout: how documents become rows of tokens. "auto" is packed; "bucketed" pads a batch to the shortest of
        `lengths` that fits (in several processes to the longest), "padded" to the contract's `max_length`.
      lengths: bucketed: sequence lengths to which a batch may be padded; each is compiled once.
      seed: seed of initialisation, data order and dropout.
      train_split: split to train on.
      validation_split: split whose loss is watched, or None.
      validation_batches: limit of batches a validation; None for all.
      validation_period: steps between validations.
      checkpoint_period: steps between checkpoints.
      keep_latest: newest checkpoints to keep.
      keep_best: checkpoints of lowest validation loss to keep beside them.
      log_every: steps between progress lines.
      final_report: called at the end as `final_report(model_dir, config, contract, tokenizer, untrained_params)`.
      profile_steps: (first, end) of the steps to trace; see `telemetry.profiling`.
      wandb_project: project of Weights & Biases; see `telemetry.writers`.
      hang_seconds: time without a step after which it is told where each process is, 0 for never; see `watchdog`.
      hang_factor: at least so many times a usual step.
      hang_exit_seconds: time without a step after which a process ends itself with status 75; None for never.
      started: `time.time()` at which this session began; now by default.

    Raises:
      InputError: bad configuration or data.
      NonFiniteLossError: the loss or gradient of a batch is not finite.
      SystemExit: SIGTERM or Ctrl-C arrived; everything was saved.
    """
    check_periods(
        validation_period=validation_period, checkpoint_period=checkpoint_period, log_every=log_every
    )
    paths.make_output_folder(model_dir)
    uploaded.check_processes(model_dir)
    phases = Phases(started)
    process = (jax.process_index(), jax.process_count())
    watch = functools.partial(
        watchdog.Watchdog, phases, hang_seconds, hang_factor, process, hang_exit_seconds
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(watch())
        distributed.check_shared(model_dir)
        if process[0] == 0 and not paths.is_remote(model_dir):
            stack.enter_context(locks.held(f"{model_dir}/.lock", "another training"))
        # ---- data registry: TensorFlow and SeqIO are imported here, and nowhere earlier ----------------------
        from inranker_jax import data

        with quiet.native_stderr_held_back():
            import_task_modules = data.import_task_modules
        modules = (
            [mixture_or_task_module] if isinstance(mixture_or_task_module, str) else mixture_or_task_module
        )
        import_task_modules(modules)

        # ---- mesh and model ----------------------------------------------------------------------------------
        mesh = mesh or make_mesh()
        if mesh.devices.size < jax.device_count() and not distributed.alone():
            raise InputError(
                f"mesh {dict(mesh.shape)} has {mesh.devices.size} of the {jax.device_count()} devices of all "
                f"{jax.process_count()} processes. Use one with all of them, such as --gin_file=gin/meshes/data.gin."
            )
        layout = Layout.of(layout)
        if layout.kind == "auto":
            layout = dataclasses.replace(layout, kind="packed")
        trainer.check_batch_size(batch_size, accumulation, mesh, packed=layout.kind == "packed")
        choose = functools.partial(
            choose_student,
            initial_checkpoint,
            model,
            initialiser,
            seed,
            vocabulary,
            contract,
            dropout_rate,
            task_feature_lengths,
        )
        student = resumed_student(model_dir) or choose()
        built_optimizer = optimizers.build(optimizer(learning_rate), max_grad_norm)
        abstract = train_state.abstract_state(
            t5.abstract_params(student.config), t5.logical_axes(student.config), built_optimizer, mesh
        )
        announce(
            f"student: {student.config.num_params / 1e6:.1f}M parameters from {student.source}; "
            f"mesh {dict(mesh.shape)} on {mesh.devices.size} x {mesh.devices.flat[0].device_kind}"
        )

        # ---- data --------------------------------------------------------------------------------------------
        share, shares = data_share(mesh)
        open_batches = functools.partial(
            data.BatchStream,
            contract=student.contract,
            tokenizer=student.tokenizer,
            batch_size=batch_size,
            list_size=list_size,
            lengths=lengths,
            seed=seed,
            process_index=share,
            process_count=shares,
            platform=mesh.devices.flat[0].platform,
            ways=batch_ways(mesh),
            own_ways=own_ways(mesh),
            accumulation=accumulation,
            whole_lists=trainer.needs_whole_lists(loss),
        )
        open_stores = functools.partial(
            data.open_stores, mixture_or_task_name, use_cached=use_cached, seqio_cache_dirs=seqio_cache_dirs
        )
        stores, rates = open_stores(train_split, rates=mixture_rates)
        held_out = open_stores(validation_split)[0] if validation_split else []
        fingerprints = {store.name: store.fingerprint for store in [*stores, *held_out]}

        # ---- restore, else import, else initialise -----------------------------------------------------------
        identity = {
            "data": {"task": mixture_or_task_name, "fingerprints": fingerprints},
            "seed": seed,
            "batch_size": batch_size,
            "list_size": list_size,
            "rates": rates,
            "model": student.config.to_hf_dict(),
            "contract": student.contract.to_dict(),
            "vocabulary": student.tokenizer.fingerprint,
            "gin": configuration.deciding_bindings(),
        }
        manifest.write(model_dir, identity, mesh, configuration.effective_config())
        description = native.ModelDescription(student.config, student.contract)
        checkpoints = native.Checkpointer(model_dir, description, student.tokenizer, keep_latest, keep_best)
        if checkpoints.latest_step is not None:
            tree, position = checkpoints.restore(abstract.as_tree())
            state = train_state.TrainState(**tree)
            announce(f"resuming {model_dir} at step {position['step']}")
        else:
            start = student.first_step if first_step is None else first_step
            try:
                check_steps(total_steps, student, start)
            except InputError:
                checkpoints.close()  # its threads would complain at the end
                raise
            state = initial_state(student, built_optimizer, seed, abstract, start)
            position = stored_position(start, math.inf, start)
            student = dataclasses.replace(student, make_params=lambda: None)  # frees imported parameters
        step, start = position["step"], position.get("first_step", 0)
        best = math.inf if position["best_validation_loss"] is None else position["best_validation_loss"]
        late_loss = checkpoints.validation_loss(step) if position.get("validation_pending") else None
        best = best if late_loss is None else min(best, late_loss)
        pending = bool(position.get("validation_pending")) and late_loss is None

        # ---- batches, and the steps compiled for their layout ------------------------------------------------
        batches = open_batches(stores, layout=layout, rates=rates, start_step=step - start)
        spec = trainer.StepSpec(
            config=student.config,
            compute=(compute or Compute()).on(mesh.devices.flat[0].platform),
            label_ids=student.contract.label_ids(student.tokenizer),
            loss=loss,
            optimizer=built_optimizer,
            accumulation=accumulation,
            slots=batches.layout.slots if batches.layout.kind == "packed" else None,
        )
        step_fn, validate_fn = trainer.compile_steps(spec, abstract, mesh)

        # ---- the loop ----------------------------------------------------------------------------------------
        schedule = learning_rate if callable(learning_rate) else (lambda _: learning_rate)
        monitor = StepMonitor(
            model_dir,
            total_steps,
            step,
            log_every,
            schedule,
            process=process,
            phases=phases,
            training_flops=lambda tokens: (
                flops.TRAINING * flops.forward_flops(spec.config, tokens, len(spec.label_ids))
            ),
            peak_flops=usage.peak_flops(mesh.devices.flat, spec.compute.dtype),
            wandb_project=wandb_project,
            settings=configuration.deciding_bindings(),
        )
        # Left last: a second notice must not end the save of the first.
        interruption = stack.enter_context(Interruption() if distributed.alone() else SharedInterruption())
        stack.callback(monitor.close)
        stack.callback(checkpoints.close)  # waits for a save in flight, whatever ended the loop
        stack.enter_context(batches)
        profiler = profiling.Profiler(model_dir, profile_steps, process, settle=monitor.drain)
        stack.enter_context(profiler)
        stack.enter_context(phases.counting_compilation())

        def validation() -> float | None:
            monitor.drain()
            with monitor.pause("validation"):
                one_pass = open_batches(held_out, layout=batches.layout, shuffle=False, num_epochs=1)
                loss = validate(validate_fn, state.params, one_pass, validation_batches, mesh, interruption)
            if loss is not None:
                monitor.validation(step, loss, is_best=loss <= best)
            return loss

        if pending and (validation_loss := validation()) is not None:
            checkpoints.add_validation_loss(step, validation_loss)
            best, pending = min(best, validation_loss), False
        while step < total_steps and not interruption.requested:
            with profiler.step(step + 1):
                with phases.phase("data"):
                    batch = next(batches)
                state, metrics = step_fn(state, trainer.put_batch(batch, mesh))
            step += 1
            monitor.add(step, metrics, batch)

            last = step == total_steps
            validation_loss = None
            if validation_split and (step % validation_period == 0 or last):
                validation_loss = validation()
                pending = validation_loss is None
                best = best if validation_loss is None else min(best, validation_loss)
            if step % checkpoint_period == 0 or last or validation_loss is not None:
                monitor.drain()
                with monitor.pause("checkpoint"):
                    stored = stored_position(step, best, start, pending)
                    checkpoints.save(step, state.as_tree(), stored, validation_loss)
        monitor.drain()
        if interruption.requested:
            with monitor.pause("checkpoint"):
                checkpoints.save(step, state.as_tree(), stored_position(step, best, start, pending))
        phases.begin("checkpoint")  # what is left is to wait for saves in flight
    if interruption.requested and (step < total_steps or pending):
        announce(f"saved step {step} in {model_dir}; run the same command to resume.")
        raise SystemExit(interruption.exit_status)

    # ---- the end ---------------------------------------------------------------------------------------------
    announce(f"step {step}: done; checkpoints, TensorBoard and manifest are in {model_dir}")
    with watch():
        if final_report and process[0] == 0:
            final_report(
                model_dir, student.config, student.contract, student.tokenizer, choose().make_params()
            )
        distributed.barrier("the end of training")


def check_periods(**periods: int) -> None:
    """Checks parameters that say every how many steps something is done.

    Raises:
      InputError: one is not positive.
    """
    for name, value in periods.items():
        if value < 1:
            raise InputError(
                f"train.{name} = {value}: expected a number of steps, 1 or more. For none on the way take one beyond "
                "the last step; for no validation at all bind train.validation_split = None."
            )


def stored_position(
    step: int, best: float, first_step: int = 0, validation_pending: bool = False
) -> dict[str, Any]:
    """What a checkpoint holds beside the arrays: the data position is `step - first_step` (see `data.order`).

    `validation_pending`: a signal broke off the step's validation, which the next session makes up for.
    """
    return {
        "step": step,
        "first_step": first_step,
        "best_validation_loss": best if math.isfinite(best) else None,
        "validation_pending": validation_pending,
    }


def initial_state(
    student: Student, optimizer: Any, seed: int, abstract: train_state.TrainState, first_step: int
) -> train_state.TrainState:
    """The first state: imported parameters, or random ones created in their shards."""
    if student.source == RANDOM:
        return train_state.initialise(student.make_params, optimizer, seed, abstract, first_step)
    return train_state.from_params(student.make_params(), optimizer, seed, abstract, first_step)


def validate(
    validate_fn: Callable[..., Any],
    params: Any,
    batches: Any,
    limit: int | None,
    mesh: jax.sharding.Mesh,
    interruption: Interruption,
) -> float | None:
    """Mean validation loss over a stream of batches, or over the first `limit` of them.

    Returns:
      The mean, or None when a signal arrived before the end.

    Raises:
      InputError: the split is empty.
      NonFiniteLossError: the loss of a batch is not finite.
    """
    total = entries = 0.0
    with batches:
        for batch in itertools.islice(batches, limit):
            if interruption.requested:
                return None
            metrics = {
                name: float(value)
                for name, value in validate_fn(params, trainer.put_batch(batch, mesh)).items()
            }
            if not math.isfinite(metrics["loss"]):
                raise NonFiniteLossError(
                    f"validation loss {metrics['loss']} in the batch of {batch.describe()}. Look at these "
                    "examples' texts and teacher logits, lower the learning rate, or compute in float32."
                )
            total += metrics["loss"] * metrics["count"]
            entries += metrics["count"]
    if not entries:
        raise InputError(
            "the validation split holds nothing to validate on. Bind train.validation_split = None."
        )
    return total / entries


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line into flags and gin bindings.

    Raises:
      InputError: an unknown flag, or a value of the wrong type.
    """
    bindings, rest = configuration.split_gin_flags(argv)
    parser = Parser("train", "Distil a student reranker from teacher logits.")
    configuration.add_gin_flags(parser)
    parser.add_argument("--output_dir", help="the run's folder (macro MODEL_DIR); rerun to resume")
    parser.add_argument(
        "--init_checkpoint", help="folder or hub id to start from (macro INITIAL_CHECKPOINT_PATH)"
    )
    distributed.add_flags(parser)
    return parser.parse(rest), bindings


def main(argv: Sequence[str] | None = None) -> int:
    """Parses flags and gin, and calls `train`. Returns the exit status: 2 for bad input, 1 for a bad loss."""
    started = time.time()
    quiet.libraries()
    configurable = gin.external_configurable(train, "train", module="inranker_jax")
    try:
        flags, bindings = parse_flags(sys.argv[1:] if argv is None else argv)
        if not flags.gin_file:
            raise InputError("no --gin_file: name one, such as --gin_file=gin/small_synth.gin.")
        macros = {"MODEL_DIR": flags.output_dir, "INITIAL_CHECKPOINT_PATH": flags.init_checkpoint}
        configuration.parse_gin(flags.gin_file, bindings, flags.gin_search_paths, macros)
        distributed.join(flags.coordinator_address, flags.process_count, flags.process_index)
        compilation_cache.enable()
        configurable(started=started)
        announce(f"took {cost(time.time() - started)}")
    except (InputError, NonFiniteLossError) as error:
        announce(f"error: {configuration.message_of(error)}")
        distributed.leave(status := error.exit_status if isinstance(error, InputError) else 1)
        return status
    except KeyboardInterrupt:
        announce("interrupted outside the training loop: nothing was lost; run the same command again.")
        distributed.leave(130)
        return 130
    except Exception:
        if not distributed.alone():
            traceback.print_exc()
            distributed.leave(1)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
