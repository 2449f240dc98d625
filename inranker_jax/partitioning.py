"""The device mesh and the rules that map logical axis names of parameters onto it.

A mesh has three axes, any of which may have size 1:

- `data`: plain data parallelism, the batch is split and parameters are replicated;
- `fsdp`: the batch is split and parameters are split along their embedding axis too;
- `model`: tensor parallelism, parameters are split along heads, feed-forward units and vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from inranker_jax.errors import InputError, did_you_mean

AXES = ("data", "fsdp", "model")

LogicalRules = Sequence[tuple[str, str | tuple[str, ...] | None]]

# The names are T5X's (its `standard_logical_axis_rules`), plus `fsdp` on the embedding axis.
LOGICAL_RULES: LogicalRules = (
    ("batch", ("data", "fsdp")),
    ("vocab", "model"),
    ("embed", "fsdp"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("kv", None),
    ("mlp", "model"),
    ("relpos_buckets", None),
    ("layers", None),
)


def make_mesh(
    data: int = -1, fsdp: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Builds the mesh `data` x `fsdp` x `model` over all devices of all processes.

    Args:
      data: size of the `data` axis. One of the three may be -1: every device that the other two leave.
      fsdp: size of the `fsdp` axis.
      model: size of the `model` axis.
      devices: the devices; all of `jax.devices()` by default.

    Returns:
      A mesh with automatic axes (the compiler places collectives).

    Raises:
      InputError: the sizes do not multiply to the number of devices; the message lists sizes that do.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(
            f"mesh {_product(sizes)}: expected positive sizes, of which at most one is -1 (the rest)."
        )
    if free:
        sizes[free[0]] = max(1, count // -math.prod(sizes.values()))
    if math.prod(sizes.values()) != count:
        raise InputError(
            f"mesh {_product(sizes)} needs {math.prod(sizes.values())} devices, but there are {count} "
            f"({devices[0].platform}). Sizes that fit, as data x fsdp x model: {_fitting(count)}."
        )
    shape = tuple(sizes[axis] for axis in AXES)
    if count == len(jax.devices()) and count > 1 and devices[0].platform != "cpu":
        grid = jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * 3).devices
    else:
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def single_device_mesh() -> Mesh:
    """A mesh of this process's first device alone, however many there are."""
    return make_mesh(1, 1, 1, devices=jax.local_devices()[:1])


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={sizes[axis]}" for axis in AXES)


def _fitting(count: int) -> str:
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    shapes = [(count // (f * m), f, m) for f in divisors for m in divisors if count % (f * m) == 0]
    shown = sorted(shapes, reverse=True)[:12]
    return ", ".join("x".join(map(str, shape)) for shape in shown)


def partition_spec(names: Sequence[str | None], rules: LogicalRules = LOGICAL_RULES) -> PartitionSpec:
    """Maps the logical names of an array's axes to mesh axes.

    Raises:
      InputError: a name has no rule.
    """
    table = dict(rules)
    for name in names:
        if name is not None and name not in table:
            raise InputError(
                f"no logical axis rule for {name!r}.{did_you_mean(name, table)} Rules exist for {sorted(table)}."
            )
    return PartitionSpec(*(None if name is None else table[name] for name in names))


def _is_names(node: Any) -> bool:
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def param_shardings(
    mesh: Mesh, logical_names: Any, abstract: Any, rules: LogicalRules = LOGICAL_RULES
) -> Any:
    """Gives every parameter its `NamedSharding`.

    Args:
      mesh: the device mesh.
      logical_names: tree of tuples, one logical axis name (or None) per array axis.
      abstract: tree of the same structure with anything that has a `shape`.
      rules: pairs of logical name and mesh axis.

    Returns:
      A tree of the same structure with `NamedSharding` leaves.

    Raises:
      InputError: an axis is not divisible by the size of its mesh axis; the message names the parameter, the
        axis, and the mesh sizes that divide it.
    """

    def one(path: Any, names: tuple[str | None, ...], leaf: Any) -> NamedSharding:
        spec = partition_spec(names, rules)
        for axis, (name, mesh_axes, size) in enumerate(zip(names, spec, leaf.shape, strict=True)):
            if mesh_axes is None:
                continue
            group = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
            ways = math.prod(mesh.shape[a] for a in group)
            if size % ways:
                fitting = [d for d in range(1, 257) if size % d == 0]
                raise InputError(
                    f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')} of shape {leaf.shape}: "
                    f"axis {axis} ({name}, {size}) does not divide over mesh axis {'x'.join(group)} of size {ways}. "
                    f"Sizes that do: {fitting}."
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, logical_names, abstract, is_leaf=_is_names)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis is split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh) -> int:
    """Number of parts into which a batch is split; batch sizes must be its multiples."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places this process's rows of a batch on the mesh as global arrays.

    Args:
      batch: arrays of shape `[rows of this process, ...]`; every process gives the same number of rows.
      mesh: the device mesh.

    Returns:
      Global arrays of shape `[rows of all processes, ...]`.
    """
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
