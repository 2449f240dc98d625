"""The steps of a run as programs to compile: shapes and shardings of everything, arrays of nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from inranker_jax import optimizers, scorer, train_state, trainer
from inranker_jax.aot.topologies import Topology
from inranker_jax.data import micro_batches
from inranker_jax.errors import InputError
from inranker_jax.models import Compute, T5Config, t5, trees
from inranker_jax.models.flops import TRAINING, forward_flops, recomputed_flops
from inranker_jax.packing import Layout
from inranker_jax.partitioning import (
    batch_sharding,
    batch_ways,
    data_share,
    make_mesh,
    param_shardings,
)
from inranker_jax.prompts import ScoringContract

STEPS = ("train", "label", "score")
# As `data.batches` has it where nobody says.
_CPU_TOKENS = 2048
_SAMPLE_STEPS = 8
# Standard deviation of the logarithm of a document's length: about that of MS MARCO's passages.
_SPREAD = 0.35


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run's gin files say of its steps; fields are arguments of `train.train`."""

    config: T5Config
    contract: ScoringContract
    mesh: Mesh
    total_steps: int
    batch_size: int
    optimizer: Callable[..., Any]
    learning_rate: Any
    loss: Callable[..., jax.Array]
    compute: Compute = dataclasses.field(default_factory=Compute)
    max_grad_norm: float | None = 1.0
    accumulation: int = 1
    list_size: int = 1
    layout: Layout = dataclasses.field(default_factory=Layout)


@dataclasses.dataclass(frozen=True)
class Program:
    """A step that can be compiled.

    Attributes:
      step: of `STEPS`.
      lower: traces it for the mesh.
      mesh: its devices.
      copies: how many of it run side by side on the whole machine.
      lengths: tokens of each sequence of one execution; those that are not padding.
      trips: executions of a loop whose length the compiler does not know: micro-batches in use.
      shape: arrays of an execution in words.
      dtype: of the operands of matrix products.
      useful_flops: of one execution over all devices of the mesh; see `models.flops`.
      recomputed_flops: likewise, what rematerialisation repeats.
      total_steps: executions of a run; None for steps that go on as long as there are pairs.
    """

    step: str
    lower: Callable[[], jax.stages.Lowered]
    mesh: Mesh
    copies: int
    lengths: np.ndarray
    trips: float
    shape: str
    dtype: str
    useful_flops: float
    recomputed_flops: float
    total_steps: int | None


def sample_lengths(count: int, max_length: int, mean: int | None) -> np.ndarray:
    """Tokens of `count` sequences: all `max_length`, or a mix of mean about `mean`.

    The mix is log-normal with a spread of 0.35, cut at `max_length`, the same in every call.

    Raises:
      InputError: the mean is not between 1 and `max_length`.
    """
    if mean is None:
        return np.full(count, max_length, np.int64)
    if not 1 <= mean <= max_length:
        raise InputError(f"mean length {mean}: expected 1 to {max_length} tokens, the contract's max_length.")
    normal = np.random.default_rng(0).standard_normal(count)
    drawn = np.rint(mean * np.exp(_SPREAD * normal - _SPREAD**2 / 2))
    return np.clip(drawn, 1, max_length).astype(np.int64)


def training(recipe: Recipe, topology: Topology, mean_length: int | None = None) -> Program:
    """The training step of `trainer.compile_steps`, with batches as `data.batches` makes them.

    Args:
      recipe: what the run's files say.
      topology: the machine.
      mean_length: of the sequences; None for the worst case, all of `max_length`.

    Returns:
      The program.

    Raises:
      InputError: the recipe does not fit the mesh, or an argument is out of range.
    """
    mesh, config = recipe.mesh, recipe.config
    layout = recipe.layout
    if layout.kind == "auto":
        layout = dataclasses.replace(layout, kind="packed")
    packed = layout.kind == "packed"
    trainer.check_batch_size(recipe.batch_size, recipe.accumulation, mesh, packed=packed)
    if layout.tokens_per_call is None and topology.platform == "cpu":
        layout = dataclasses.replace(layout, tokens_per_call=_CPU_TOKENS)
    shapes = _packed_batch if packed else _padded_batch
    batch, lengths, trips, slots, words = shapes(recipe, layout, topology, mean_length)
    optimizer = optimizers.build(recipe.optimizer(recipe.learning_rate), recipe.max_grad_norm)
    abstract = train_state.abstract_state(
        t5.abstract_params(config), t5.logical_axes(config), optimizer, mesh
    )
    spec = trainer.StepSpec(
        config=config,
        compute=recipe.compute.on(topology.platform),
        label_ids=_label_ids(recipe.contract),
        loss=recipe.loss,
        optimizer=optimizer,
        accumulation=recipe.accumulation,
        slots=slots,
    )
    step, _ = trainer.compile_steps(spec, abstract, mesh)

    def lower() -> jax.stages.Lowered:
        jitted: Any = step.__wrapped__  # type: ignore[attr-defined]
        with jax.set_mesh(mesh):
            return jitted.lower(abstract, batch)

    return Program(
        step="train",
        lower=lower,
        mesh=mesh,
        copies=1,
        lengths=lengths,
        trips=trips,
        shape=words,
        dtype=recipe.compute.dtype,
        useful_flops=TRAINING * forward_flops(config, lengths, len(spec.label_ids)),
        recomputed_flops=recomputed_flops(config, lengths, recipe.compute.remat),
        total_steps=recipe.total_steps,
    )


def _packed_batch(
    recipe: Recipe, layout: Layout, topology: Topology, mean_length: int | None
) -> tuple[dict[str, jax.ShapeDtypeStruct], np.ndarray, float, int | None, str]:
    """Arrays of a packed batch as `BatchMaker` and `trainer.put_batch` shape them, and what a mean step has of them."""
    mesh, longest = recipe.mesh, recipe.contract.max_length
    shares = data_share(mesh)[1]  # processes, each of which packs its own part
    whole = trainer.needs_whole_lists(recipe.loss)
    documents = recipe.batch_size * recipe.list_size
    together = recipe.list_size if whole else 1
    drawn = sample_lengths(_SAMPLE_STEPS * documents, longest, mean_length)
    sample = [list(step.reshape(-1, together)) for step in drawn.reshape(_SAMPLE_STEPS, -1)]
    resolved = layout.resolve(topology.platform, longest)
    if layout.row_length is None:
        length = micro_batches.choose_row_length(longest, layout.slots, sample)
        resolved = dataclasses.replace(layout, row_length=length).resolve(topology.platform, longest)
    own = documents // together // shares
    ways = max(1, batch_ways(mesh) // shares)
    shape = micro_batches.choose_shape(
        resolved, own, together, sample, ways=ways, accumulation=recipe.accumulation
    )
    parts = [[step[start : start + own] for start in range(0, len(step), own)] for step in sample]
    used = float(np.mean([max(micro_batches.divide(part, shape).used for part in step) for step in parts]))
    inner = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))
    lead = (shape.count, shape.lists * shares, shape.list_size)
    rows = (shape.count, shape.rows * shares, shape.row_length)
    sizes = {
        "tokens": (rows, jnp.int32),
        "segment_ids": (rows, jnp.int32),
        "numbers": ((*rows[:2], shape.slots), jnp.int32),
        "places": (lead, jnp.int32),
        "list_mask": (lead, jnp.bool_),
        "relevance": (lead, jnp.float32),
        "teacher_logits": ((*lead, 2), jnp.float32),
    }
    batch = {name: jax.ShapeDtypeStruct(*size, sharding=inner) for name, size in sizes.items()}
    batch["micro_batches"] = jax.ShapeDtypeStruct((ways * shares,), jnp.int32, sharding=batch_sharding(mesh))
    words = (
        f"packed: {documents} documents in {used:g} of at most {shape.count} micro-batches of {rows[1]} rows x "
        f"{shape.row_length} tokens, at most {shape.slots} documents a row"
    )
    return batch, drawn[:documents], used, shape.slots, words


def _padded_batch(
    recipe: Recipe, layout: Layout, topology: Topology, mean_length: int | None
) -> tuple[dict[str, jax.ShapeDtypeStruct], np.ndarray, float, int | None, str]:
    """Arrays of a padded batch; bucketed ones take the shortest length that holds the longest document."""
    mesh, longest = recipe.mesh, recipe.contract.max_length
    documents = recipe.batch_size * recipe.list_size
    lengths = sample_lengths(documents, longest, mean_length)
    edges = (layout.resolve(topology.platform, longest).lengths or ()) if len(topology.hosts) == 1 else ()
    length = next((edge for edge in edges if edge >= lengths.max()), longest)
    lead = (recipe.batch_size, recipe.list_size)
    sizes = {
        "tokens": ((*lead, length), jnp.int32),
        "numbers": (lead, jnp.int32),
        "list_mask": (lead, jnp.bool_),
        "relevance": (lead, jnp.float32),
        "teacher_logits": ((*lead, 2), jnp.float32),
    }
    rows = batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(*size, sharding=rows) for name, size in sizes.items()}
    words = f"{layout.kind}: {documents} documents of {length} tokens in {recipe.accumulation} micro-batches"
    return batch, lengths, float(recipe.accumulation), None, words


def forward(
    recipe: Recipe,
    topology: Topology,
    step: str,
    mean_length: int | None = None,
    *,
    dtype: str = "bfloat16",
    layout: Layout | None = None,
    sizes: tuple[int, int, int] | None = None,
) -> Program:
    """A call of `Reranker`: "label" on the devices of each host, "score" on the run's mesh.

    Every process of `python -m inranker_jax.label` labels chunks of its own with the devices of its host, by default
    all of them as `data`.

    Args:
      recipe: the model, its contract, and for "score" its mesh.
      topology: the machine.
      step: "label" or "score".
      mean_length: see `training`.
      dtype: of the operands of matrix products.
      layout: of the calls; by default packed, 16384 tokens a device.
      sizes: data, fsdp and model of the mesh, instead of those defaults.

    Returns:
      The program.

    Raises:
      InputError: the mesh does not fit.
    """
    devices = topology.hosts[0] if step == "label" else list(topology.devices)
    if sizes is not None:
        mesh = make_mesh(*sizes, devices=devices)
    else:
        mesh = make_mesh(devices=devices) if step == "label" else recipe.mesh
    longest = recipe.contract.max_length
    resolved = (layout or Layout()).resolve(topology.platform, longest)
    ways, slots = batch_ways(mesh), resolved.slots if resolved.kind == "packed" else None
    length = (resolved.row_length if slots else longest) or longest
    rows = max(1, (resolved.tokens_per_call or 1) // length) * ways
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(mesh))
    params = _forward_params(recipe.config, mesh, dtype)
    labels = _label_ids(recipe.contract)
    # The program that a `Reranker` of this architecture runs.
    jitted = scorer._compiled(recipe.config, Compute(dtype=dtype), labels, slots, mesh)

    def lower() -> jax.stages.Lowered:
        with jax.set_mesh(mesh):
            lowered: jax.stages.Lowered = jitted.lower(params, tokens, tokens if slots else None)
            return lowered

    lengths = _fill(rows, length, slots, sample_lengths(rows * (slots or 1), longest, mean_length))
    return Program(
        step=step,
        lower=lower,
        mesh=mesh,
        copies=len(topology.devices) // mesh.devices.size,
        lengths=lengths,
        trips=1.0,
        shape=f"{resolved.kind}: {rows} rows x {length} tokens, {len(lengths)} documents",
        dtype=dtype,
        useful_flops=forward_flops(recipe.config, lengths, len(labels)),
        recomputed_flops=0.0,
        total_steps=None,
    )


def _fill(rows: int, length: int, slots: int | None, lengths: np.ndarray) -> np.ndarray:
    """The sequences, of those given, that one call holds: rows filled one after another."""
    if slots is None:
        return lengths[:rows]
    taken, room, used, row = 0, length, 0, 0
    for size in lengths.tolist():
        if size > room or used == slots:
            row, room, used = row + 1, length, 0
        if row == rows:
            break
        taken, room, used = taken + 1, room - size, used + 1
    return lengths[:taken]


def _forward_params(config: T5Config, mesh: Mesh, dtype: str) -> Any:
    """Parameters as `Reranker` places them: kernels in the type in which products read them."""
    abstract = t5.abstract_params(config)
    shardings = trees.flatten(param_shardings(mesh, t5.logical_axes(config), abstract))
    compute = Compute(dtype=dtype)

    def place(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        kept = jnp.bfloat16 if compute.rounds(path) else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, kept, sharding=shardings[path])

    return trees.unflatten({path: place(path, leaf) for path, leaf in trees.flatten(abstract).items()})


def _label_ids(contract: ScoringContract) -> tuple[int, ...]:
    """As many ids as the contract has label pieces; which ones changes nothing that is counted here."""
    return tuple(range(1, 1 + len(contract.label_pieces)))
