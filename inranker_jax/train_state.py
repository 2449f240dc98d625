"""Everything that a step of training changes, as one pytree with a sharding for every leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from inranker_jax.partitioning import LOGICAL_RULES, LogicalRules, param_shardings, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run. Together with the integer data position, it decides all that follows.

    Attributes:
      step: int32 scalar, the number of optimiser steps taken.
      params: nested dict of float32 arrays.
      opt_state: the optax state.
      dropout_key: uint32 key data of the run's dropout key; step `s` folds `s` into it.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    dropout_key: jax.Array

    def as_tree(self) -> dict[str, Any]:
        """The state as a dictionary, which is what a checkpoint holds; `TrainState(**tree)` undoes it."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def create(
    params: Any, optimizer: optax.GradientTransformation, seed: int, first_step: int = 0
) -> TrainState:
    """The state before the first step, from initial or imported parameters.

    Args:
      params: the parameters.
      optimizer: the optax optimiser.
      seed: seed of the dropout key.
      first_step: where counting starts. Schedules count from there; moments and their bias corrections are new.
    """
    return TrainState(
        step=jnp.full((), first_step, jnp.int32),
        params=params,
        opt_state=_schedules_at(optimizer.init(params), first_step),
        dropout_key=jax.random.key_data(jax.random.key(seed)),
    )


def _schedules_at(opt_state: Any, step: int) -> Any:
    """Advances what only counts for a schedule: optax's states that hold a count and nothing else."""

    def only_counts(node: Any) -> bool:
        return getattr(node, "_fields", None) == ("count",)

    return jax.tree.map(
        lambda node: node._replace(count=node.count + step) if only_counts(node) else node,
        opt_state,
        is_leaf=only_counts,
    )


def abstract_state(
    abstract_params: Any,
    logical_names: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: LogicalRules = LOGICAL_RULES,
) -> TrainState:
    """Shapes, dtypes and shardings of the whole state, without allocating anything.

    Optimiser moments that mirror a parameter take its sharding; other leaves (counts, Adafactor's factored row
    and column statistics) are small and are replicated.

    Returns:
      A `TrainState` of `jax.ShapeDtypeStruct` leaves that carry their sharding.
    """
    shardings = param_shardings(mesh, logical_names, abstract_params, rules)
    by_path = {
        _names(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract_params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        names = _names(path)
        sharding = replicated(mesh)
        for start in range(len(names)):
            shape_and_sharding = by_path.get(names[start:])
            if shape_and_sharding and shape_and_sharding[0] == leaf.shape:
                sharding = shape_and_sharding[1]
                break
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.eval_shape(lambda params: create(params, optimizer, 0), abstract_params)
    return jax.tree_util.tree_map_with_path(place, shapes)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def shardings_of(abstract: TrainState) -> TrainState:
    """The tree of shardings of an abstract state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def initialise(
    make_params: Callable[[], Any],
    optimizer: optax.GradientTransformation,
    seed: int,
    abstract: TrainState,
    first_step: int = 0,
) -> TrainState:
    """Creates the first state (see `create`) directly in its shards: no device ever holds all of it.

    Args:
      make_params: traceable function that returns freshly initialised parameters.
      optimizer: the optax optimiser.
      seed: seed of the dropout key.
      abstract: from `abstract_state`.
      first_step: where counting starts.
    """
    shardings = shardings_of(abstract)
    return jax.jit(lambda: create(make_params(), optimizer, seed, first_step), out_shardings=shardings)()


def from_params(
    params: Any,
    optimizer: optax.GradientTransformation,
    seed: int,
    abstract: TrainState,
    first_step: int = 0,
) -> TrainState:
    """Creates the first state (see `create`) from imported parameters, which are sharded one array at a time."""
    shardings = shardings_of(abstract)
    placed = jax.tree.map(_place, params, shardings.params)
    return jax.jit(lambda p: create(p, optimizer, seed, first_step), out_shardings=shardings)(placed)


def _place(value: Any, sharding: NamedSharding) -> jax.Array:
    # Every process has the whole array on its host and gives its own devices their parts.
    host = np.asarray(value, np.float32)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
