"""Ours: `BatchStream`'s batches through `trainer.compile_steps`, as `train` runs them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from inranker_jax import compilation_cache, losses, optimizers, partitioning, train_state, trainer
from inranker_jax.checkpoints import huggingface
from inranker_jax.data.batches import BatchStream
from inranker_jax.models import Compute, t5
from inranker_jax.prompts import preset

from . import peaks
from .given_ids import GivenIds, NoTokenizer, NumberedPairs
from .models import LABEL_IDS
from .recipe import BETAS, CLIP, EPSILON, LEARNING_RATE
from .worker import sequences_of


@dataclasses.dataclass
class Program:
    """One compiled training step, and where its batches come from."""

    stream: BatchStream
    step: Callable[..., Any]
    accumulation: int


class Contender:
    """Options: `folder`, `dtype`, `micro_batches` to try where the layout is not packed."""

    def __init__(self, options: dict[str, Any]) -> None:
        compilation_cache.enable()
        self._options = options
        self._mesh = partitioning.single_device_mesh()
        self._optimizer = optimizers.build(
            optimizers.adamw(LEARNING_RATE, b1=BETAS[0], b2=BETAS[1], eps=EPSILON), CLIP
        )
        self._programs: dict[tuple[str, str], Program] = {}
        self._fresh()

    def _fresh(self) -> None:
        """The state of step 0."""
        self._state: Any = None  # makes room for the new one
        loaded = huggingface.load(self._options["folder"], place=lambda _, value: value)
        self._config = loaded.config
        self._abstract = train_state.abstract_state(
            t5.abstract_params(self._config), t5.logical_axes(self._config), self._optimizer, self._mesh
        )
        self._state = train_state.from_params(loaded.params, self._optimizer, 0, self._abstract)

    def about(self) -> dict[str, Any]:
        """Version and device."""
        device = jax.devices()[0]
        return {"jax": jax.__version__, "backend": jax.default_backend(), "device": device.device_kind}

    def _program(self, arrays: dict[str, np.ndarray], mode: str, accumulation: int) -> Program:
        contract = GivenIds(
            **dataclasses.asdict(preset("monot5")) | {"max_length": int(arrays["max_length"])}
        )
        contract.use(sequences_of(arrays))
        stream = BatchStream(
            [NumberedPairs(arrays["teacher"])],  # type: ignore[list-item]
            contract,
            NoTokenizer(),  # type: ignore[arg-type]
            int(arrays["batch_size"]),
            shuffle=False,
            prefetch=0,
            layout=mode,
            platform=jax.default_backend(),
            accumulation=accumulation,
            whole_lists=False,  # the loss looks at one document at a time
        )
        spec = trainer.StepSpec(
            config=self._config,
            compute=Compute(dtype=self._options["dtype"]),
            label_ids=LABEL_IDS,
            loss=losses.normalized_logit_mse,
            optimizer=self._optimizer,
            accumulation=accumulation,
            slots=stream.layout.slots if mode == "packed" else None,
        )
        return Program(stream, trainer.compile_steps(spec, self._abstract, self._mesh)[0], accumulation)

    def prepare(self, name: str, arrays: dict[str, np.ndarray], mode: str) -> dict[str, Any]:
        """Padded and bucketed batches try micro-batches as PyTorch does; packed ones choose theirs themselves."""
        batch_size = int(arrays["batch_size"])
        sizes = {min(size or batch_size, batch_size) for size in self._options["micro_batches"]}
        fitting = {batch_size // size for size in sizes if batch_size % size == 0}
        tried: dict[int, tuple[float, Program]] = {}
        for accumulation in {1} if mode == "packed" else sorted(fitting, reverse=True):
            program = self._program(arrays, mode, accumulation)
            self._programs[name, mode] = program
            self._step(program, 0)
            started = time.perf_counter()
            self._step(program, 0)
            tried[batch_size // accumulation] = (time.perf_counter() - started, program)
        best = min(tried, key=lambda size: tried[size][0])
        program = self._programs[name, mode] = tried[best][1]
        computed = useful = 0.0
        for number in range(len(arrays["lengths"]) // batch_size):
            metrics = self._step(program, number)  # compiles what other lengths need
            computed, useful = computed + metrics["tokens"], useful + metrics["useful_tokens"]
        self._fresh()
        layout = program.stream.layout
        return {
            "micro_batch": "packed" if mode == "packed" else best,
            "tried": {str(size): round(seconds, 3) for size, (seconds, _) in tried.items()},
            "useful_share": useful / computed,
            "layout": f"{layout}, {program.stream.make_batch.shape}" if mode == "packed" else str(layout),
        }

    def _step(self, program: Program, number: int) -> dict[str, float]:
        batch = program.stream.make_batch(number)
        self._state, metrics = program.step(self._state, trainer.put_batch(batch, self._mesh))
        found = {key: float(value) for key, value in metrics.items()}
        jax.block_until_ready(self._state.params)
        return found

    def run(self, name: str, mode: str, number: int) -> list[float]:
        """One optimiser step on the batch of that number, made within it, and its loss."""
        return [self._step(self._programs[name, mode], number)["loss"]]

    def peak(self) -> dict[str, float]:
        """Rates of matrix products in JAX."""
        return peaks.of_jax()
