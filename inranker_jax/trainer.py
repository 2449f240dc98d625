"""The training and validation steps: pure functions of a state and a batch, jitted with shardings.

A padded batch is a dictionary of global arrays, lists first (see `architecture.md`):

- `tokens` int32 `[batch, list, length]`, 0 is padding;
- `numbers` int32 `[batch, list]`, of the documents within the step, for dropout;
- `list_mask` bool `[batch, list]`, True for real documents;
- `teacher_logits` float32 `[batch, list, 2]`, raw, in the order [false, true];
- `relevance` float32 `[batch, list]`, 1, 0, or -1 where unknown.

A packed batch comes in micro-batches, of which `micro_batches` are in use (int32 `[ways]`: as many as each device's
process needs, so that the processes need not ask each other):

- `tokens`, `segment_ids` int32 `[micro, rows, length]`: several documents a row, see `packing.Packed`. Each device's
  rows are filled from the first on, see `packing.deal`;
- `numbers` int32 `[micro, rows, slots]`, of the documents within the step, for dropout;
- `places` int32 `[micro, lists, list]`: where a document's logits are, row x slots + slot;
- `list_mask`, `teacher_logits`, `relevance` as above, with `[micro, lists, list]` in front.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from inranker_jax import losses, packing, partitioning, train_state
from inranker_jax.errors import InputError
from inranker_jax.models import Compute, T5Config, t5
from inranker_jax.partitioning import BATCH_AXES, batch_sharding, batch_ways, replicated
from inranker_jax.train_state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """What a training step computes.

    Attributes:
      config: the student's architecture.
      compute: activations' dtype and rematerialisation.
      label_ids: vocabulary ids of the label pieces, (false, true), or a single one (RankT5).
      loss: a function under the contract of `inranker_jax.losses`.
      optimizer: the optax optimiser, clipping included.
      accumulation: number of micro-batches into which a padded batch is split; packed ones are already.
      slots: most documents a row of packed batches; None for padded ones.
    """

    config: T5Config
    compute: Compute
    label_ids: tuple[int, ...]
    loss: Callable[..., jax.Array]
    optimizer: optax.GradientTransformation
    accumulation: int = 1
    slots: int | None = None


def false_true(logits: jax.Array) -> jax.Array:
    """Brings label logits `[..., K]` to `[..., 2]` in the order [false, true].

    A single relevance logit s (RankT5) becomes the centred pair [-s/2, s/2], whose difference is s.
    """
    if logits.shape[-1] == 2:
        return logits
    return jnp.concatenate([-logits / 2, logits / 2], axis=-1)


def forward(spec: StepSpec, params: Any, part: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
    """The student's [false, true] logits of a padded batch, or of a micro-batch.

    Args:
      spec: the step's definition.
      params: the parameters.
      part: `tokens` int32 `[batch, list, length]`, `numbers` int32 `[batch, list]`.
      dropout_key: a key for dropout, or None for none.

    Returns:
      float32 `[batch, list, 2]`.
    """
    batch, list_size, length = part["tokens"].shape
    label_ids = jnp.asarray(spec.label_ids, jnp.int32)
    logits = t5.apply(
        spec.config,
        params,
        part["tokens"].reshape(batch * list_size, length),
        label_ids,
        compute=spec.compute,
        dropout_key=dropout_key,
        numbers=part["numbers"].reshape(batch * list_size),
    )
    return false_true(logits).reshape(batch, list_size, 2)


def forward_packed(
    spec: StepSpec, params: Any, part: Batch, dropout_key: jax.Array | None = None
) -> jax.Array:
    """The student's [false, true] logits of one packed micro-batch.

    Args:
      spec: the step's definition, with `slots`.
      params: the parameters.
      part: `tokens` and `segment_ids` int32 `[rows, length]`, `numbers` int32 `[rows, slots]`, `places` int32
        `[lists, list]`.
      dropout_key: a key for dropout, or None for none.

    Returns:
      float32 `[lists, list, 2]`; masked documents have some other document's.
    """
    label_ids = jnp.asarray(spec.label_ids, jnp.int32)
    logits = t5.apply(
        spec.config,
        params,
        part["tokens"],
        label_ids,
        segment_ids=part["segment_ids"],
        slots=spec.slots,
        compute=spec.compute,
        dropout_key=dropout_key,
        numbers=part["numbers"],
    )
    return jnp.take(false_true(logits).reshape(-1, 2), part["places"], axis=0)


def _loss_share(
    spec: StepSpec, counts: tuple[jax.Array, ...], params: Any, part: Batch, key: jax.Array | None
) -> jax.Array:
    """What a batch, or a part of one, adds to the mean loss of the whole."""
    if spec.slots is None:
        logits = forward(spec, params, part, key)
    else:
        logits = forward_packed(spec, params, part, key)
    return losses.mean_over(counts, spec.loss, logits, part, where=part["list_mask"])


def _valid_counts(spec: StepSpec, batch: Batch) -> tuple[jax.Array, ...]:
    """Counted over the whole batch, so that the shares of its micro-batches add up exactly."""
    if spec.slots is not None:
        names = ("list_mask", *losses.targets_of(spec.loss))
        batch = {name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in names if name in batch}
    return losses.valid_counts(spec.loss, batch, where=batch["list_mask"])


def _over_micro_batches(batch: Batch, slots: int, function: Callable[[Batch], Any]) -> Any:
    """Adds up `function(part)` over the micro-batches in use of a packed batch.

    Their number is a value, not a shape, and one that is half empty leaves that half out: a step costs about what
    it holds, and nothing is compiled anew.
    """
    parts = {name: value for name, value in batch.items() if name != "micro_batches"}
    used = jnp.max(batch["micro_batches"])
    sizes, ways = _row_sizes(batch)

    def at(index: jax.Array) -> Any:
        part = {name: value[index] for name, value in parts.items()}
        if len(sizes) == 1:
            return function(part)
        branches = (
            lambda: function(_first_rows(part, sizes[0], ways, slots)),
            lambda: function(part),
        )
        return jax.lax.cond(_half_is_enough(part["segment_ids"], sizes[0], ways), *branches)

    first = jnp.zeros((), jnp.int32)
    if batch["tokens"].shape[0] == 1:
        return at(first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(at, first))
    return jax.lax.fori_loop(0, used, lambda index, total: jax.tree.map(jnp.add, total, at(index)), zeros)


def _row_sizes(batch: Batch) -> tuple[tuple[int, ...], int]:
    """Of how many rows a micro-batch may be computed, and over how many devices they are divided."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = math.prod(mesh.shape[name] for name in BATCH_AXES if name in mesh.axis_names)
    return packing.row_sizes(batch["tokens"].shape[1], ways), ways


def _by_device(rows: jax.Array, ways: int) -> jax.Array:
    """`[rows, ...]` as `[ways, rows of a device, ...]`, which moves nothing."""
    return rows.reshape(ways, rows.shape[0] // ways, *rows.shape[1:])


def _half_is_enough(segment_ids: jax.Array, half: int, ways: int) -> jax.Array:
    """Whether every device's rows after its first `half / ways` are empty."""
    return jnp.logical_not(jnp.any(_by_device(segment_ids, ways)[:, half // ways :]))


def _first_rows(part: Batch, rows: int, ways: int, slots: int) -> Batch:
    """The part with the first `rows / ways` rows of every device alone."""
    kept, before = rows // ways, part["tokens"].shape[0] // ways
    row, slot = part["places"] // slots, part["places"] % slots
    cut = {
        name: _by_device(part[name], ways)[:, :kept].reshape(rows, -1)
        for name in ("tokens", "segment_ids", "numbers")
    }
    return {**part, **cut, "places": (row // before * kept + row % before) * slots + slot}


def _gradients(spec: StepSpec, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
    """Loss and gradients of a batch, these in the dtype in which `spec.compute` keeps them."""
    counts = _valid_counts(spec, batch)
    use_dropout = spec.config.dropout_rate > 0
    dtype = jnp.dtype(spec.compute.gradients)

    def loss_fn(params: Any, part: Batch) -> jax.Array:
        return _loss_share(spec, counts, params, part, key if use_dropout else None)

    def of_part(part: Batch) -> tuple[jax.Array, Any]:
        loss, gradients = jax.value_and_grad(loss_fn)(params, part)
        return loss, jax.tree.map(lambda leaf: leaf.astype(dtype), gradients)

    if spec.slots is not None:
        return _over_micro_batches(batch, spec.slots, of_part)
    if spec.accumulation == 1:
        return of_part(batch)

    def split(value: jax.Array) -> jax.Array:
        # Micro-batch i takes rows i, i + A, i + 2A, ...: every device keeps its own rows.
        return value.reshape(-1, spec.accumulation, *value.shape[1:]).swapaxes(0, 1)

    def body(carry: tuple[jax.Array, Any], part: Batch) -> Any:
        return jax.tree.map(jnp.add, carry, of_part(part)), None

    zeros = (jnp.zeros(()), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), params))
    (loss, gradients), _ = jax.lax.scan(body, zeros, jax.tree.map(split, dict(batch)))
    return loss, gradients


def _token_counts(spec: StepSpec, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Tokens that are not padding, and those that are computed."""
    if spec.slots is None:
        return jnp.sum(t5.real_tokens(batch["tokens"], spec.config.pad_token_id)), jnp.asarray(
            batch["tokens"].size
        )
    count, rows, length = batch["tokens"].shape
    sizes, ways = _row_sizes(batch)
    enough = jax.vmap(lambda ids: _half_is_enough(ids, sizes[0], ways))(batch["segment_ids"])
    computed = jnp.where(enough, sizes[0], rows) if len(sizes) > 1 else jnp.full(count, rows)
    in_use = jnp.arange(count) < jnp.max(batch["micro_batches"])
    return jnp.sum(batch["segment_ids"] != 0), jnp.sum(jnp.where(in_use, computed, 0)) * length


def train_step(spec: StepSpec, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One optimiser step.

    Returns:
      The next state, and float32 scalars: `loss` (mean over the batch), `grad_norm` (before clipping),
      `param_norm` (before the step), `update_norm` (of what is added to the parameters),
      `documents`, `useful_tokens` (not padding) and `tokens` (all that were computed).
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.dropout_key), state.step)
    loss, gradients = _gradients(spec, state.params, batch, key)
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)
    updates, opt_state = spec.optimizer.update(gradients, state.opt_state, state.params)
    useful_tokens, tokens = _token_counts(spec, batch)
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(gradients),
        "param_norm": optax.tree.norm(state.params),
        "update_norm": optax.tree.norm(updates),
        "documents": jnp.sum(batch["list_mask"]),
        "useful_tokens": useful_tokens,
        "tokens": tokens,
    }
    new_state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
    )
    return new_state, {name: value.astype(jnp.float32) for name, value in metrics.items()}


def validation_step(spec: StepSpec, params: Any, batch: Batch) -> Metrics:
    """Loss of one validation batch without dropout.

    Returns:
      float32 scalars `loss` (mean over the batch) and `count`, the number of entries that the loss (its first
      term, in a sum) averages over; means over many batches are weighted by it.
    """
    counts = _valid_counts(spec, batch)
    if spec.slots is None:
        loss = _loss_share(spec, counts, params, batch, None)
    else:
        loss = _over_micro_batches(
            batch, spec.slots, lambda part: _loss_share(spec, counts, params, part, None)
        )
    return {"loss": loss, "count": counts[0]}


def compile_steps(
    spec: StepSpec, abstract: TrainState, mesh: Mesh
) -> tuple[Callable[..., tuple[TrainState, Metrics]], Callable[..., Metrics]]:
    """Jits the two steps with the mesh's shardings; the state's buffers are donated.

    Args:
      spec: the step's definition.
      abstract: shapes and shardings from `train_state.abstract_state`.
      mesh: the device mesh.

    Returns:
      `(train, validate)`: `train(state, batch) -> (state, metrics)`, `validate(params, batch) -> metrics`.
    """
    shardings = train_state.shardings_of(abstract)
    # A packed batch is taken as `put_batch` placed it: not all of it is divided in the same way.
    rows, whole = batch_sharding(mesh) if spec.slots is None else None, replicated(mesh)
    train = jax.jit(
        lambda state, batch: train_step(spec, state, batch),
        in_shardings=(shardings, rows),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
    validate = jax.jit(
        lambda params, batch: validation_step(spec, params, batch),
        in_shardings=(shardings.params, rows),
        out_shardings=whole,
    )
    return _in_mesh(train, mesh), _in_mesh(validate, mesh)


def _in_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Traces and runs `function` with `mesh` as the context mesh, on which the model pins its activations."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args)

    return call


def needs_whole_lists(loss: losses.Loss) -> bool:
    """Whether a loss looks at the documents of a list together, rather than at one at a time.

    >>> needs_whole_lists(losses.normalized_logit_mse), needs_whole_lists(losses.listwise_kl_divergence)
    (False, True)
    """
    batch = {"teacher_logits": jnp.zeros((1, 2, 2)), "relevance": jnp.zeros((1, 2))}
    logits, where = jnp.zeros((1, 2, 2)), jnp.ones((1, 2), bool)
    parts = [part for _, part in losses.parts_of(loss)]
    # Unreduced, a loss has one value for each of the documents or one for the list.
    values = [losses.call(part, logits, batch, where=where, reduce_fn=None) for part in parts]
    return any(value.shape != where.shape for value in values)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places a padded or packed batch on the mesh as global arrays.

    Args:
      batch: this process's part, as `data.Batch` describes it.
      mesh: the device mesh. Lists of padded batches, rows and lists of packed micro-batches are divided over its
        batch axes.

    Returns:
      Global arrays, as the steps take them.
    """
    if "segment_ids" not in batch:
        return partitioning.put_batch(batch, mesh)
    rows = batch_sharding(mesh)
    inner = NamedSharding(mesh, PartitionSpec(None, *rows.spec))
    own_ways = batch_ways(mesh) // partitioning.data_share(mesh)[1]
    used = np.full(own_ways, batch["micro_batches"], np.int32)
    return {
        name: jax.make_array_from_process_local_data(inner, value)
        for name, value in batch.items()
        if name != "micro_batches"
    } | {"micro_batches": jax.make_array_from_process_local_data(rows, used)}


def check_batch_size(batch_size: int, accumulation: int, mesh: Mesh, packed: bool = False) -> None:
    """Raises InputError unless `batch_size` splits into `accumulation` micro-batches over the mesh.

    Packed batches divide rows over the mesh, and lists over the processes alone: any multiple of their number with at
    least `accumulation` lists each will do.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch size {batch_size!r}: expected a whole number of lists, 1 or more.")
    shares = partitioning.data_share(mesh)[1]
    if packed and batch_size % shares == 0 and 1 <= accumulation <= batch_size // shares:
        return
    ways = shares if packed else batch_ways(mesh)
    if accumulation < 1 or batch_size % (accumulation * ways):
        step = max(accumulation, 1) * ways
        near = max(step, batch_size // step * step)
        raise InputError(
            f"batch size {batch_size} does not split into {accumulation} micro-batches over {ways} "
            f"{'processes' if packed else 'devices'} (data x fsdp = {mesh.shape['data']} x {mesh.shape['fsdp']}). "
            f"Use a multiple of {step}, such as {near}; a run that has begun keeps its batch size, so give it a mesh "
            f"and a number of micro-batches that divide {batch_size}."
        )
