"""The device mesh and the rules that map logical axis names of parameters onto it.

A mesh has three axes, any of which may have size 1:

- `data`: plain data parallelism, the batch is split and parameters are replicated;
- `fsdp`: the batch is split and parameters are split along their embedding axis too;
- `model`: tensor parallelism, parameters are split along heads, feed-forward units and vocabulary.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from inranker_jax.errors import InputError, did_you_mean

AXES = ("data", "fsdp", "model")
# The axes over which the rows of a batch are divided, and the one that divides heads, vocabulary and hidden units.
BATCH_AXES, MODEL_AXIS = AXES[:2], AXES[2]

LogicalRules = Sequence[tuple[str, str | tuple[str, ...] | None]]

# The names are T5X's (its `standard_logical_axis_rules`), plus `fsdp` on the embedding axis.
LOGICAL_RULES: LogicalRules = (
    ("batch", BATCH_AXES),
    ("vocab", "model"),
    ("embed", "fsdp"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("kv", None),
    ("mlp", "model"),
    ("relpos_buckets", None),
    ("layers", None),
)


_devices: contextvars.ContextVar[Sequence[jax.Device] | None] = contextvars.ContextVar(
    "devices", default=None
)


@contextlib.contextmanager
def using_devices(devices: Sequence[jax.Device]) -> Iterator[None]:
    """Lets `make_mesh` take these devices inside the block: those of a machine that is described, not there."""
    token = _devices.set(devices)
    try:
        yield
    finally:
        _devices.reset(token)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    model: int = 1,
    slices: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Builds the mesh `data` x `fsdp` x `model` over all devices of all processes.

    Args:
      data: size of the `data` axis. One of the three may be -1: every device that the other two leave.
      fsdp: size of the `fsdp` axis.
      model: size of the `model` axis.
      slices: parts of the machine with a slow network between them: TPU slices, or else groups of processes (nodes
        of GPUs). The `data` axis, which communicates least, is divided over them first, and the rest stays inside
        one. -1: as many as the devices say.
      devices: the devices; all of `jax.devices()` by default.

    Returns:
      A mesh with automatic axes (the compiler places collectives).

    Raises:
      InputError: the sizes do not multiply to the number of devices; the message lists sizes that do.
    """
    devices = list(devices or _devices.get() or jax.devices())
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
    groups = _slices_of(devices, slices)
    if sizes["data"] % len(groups):
        raise InputError(
            f"mesh {_product(sizes)}: {len(groups)} slices do not divide data={sizes['data']}. Each slice holds whole "
            f"replicas: make data a multiple of {len(groups)}, and fsdp x model a divisor of {count // len(groups)}."
        )
    inside = (sizes["data"] // len(groups), sizes["fsdp"], sizes["model"])
    grid = np.concatenate([_grid(inside, group) for group in groups])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def _grid(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices as neighbours in the mesh where they are neighbours in the machine."""
    if len(devices) > 1 and devices[0].platform == "tpu":
        return np.asarray(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True))
    return np.asarray(devices).reshape(shape)


def _slices_of(devices: Sequence[jax.Device], slices: int) -> list[list[jax.Device]]:
    """Divides devices among slices: by their slice, else by process, in equal parts."""
    own = sorted({getattr(device, "slice_index", None) or 0 for device in devices})
    count = len(own) if slices == -1 else slices
    processes = sorted({device.process_index for device in devices})
    # Nodes of GPUs have slice indices too, but only slices of TPUs are always a matter of the mesh.
    if len(own) > 1 and (devices[0].platform == "tpu" or count == len(own)):
        if count not in (1, len(own)):
            raise InputError(f"slices={slices}, but the devices are in {len(own)}. Use that, or -1.")
        count = len(own)
        groups = [[device for device in devices if (device.slice_index or 0) == number] for number in own]
    elif count > 1 and len(processes) % count == 0:
        each = len(processes) // count
        groups = [
            [device for device in devices if processes.index(device.process_index) // each == number]
            for number in range(count)
        ]
    else:
        size = -(-len(devices) // max(count, 1))
        groups = [list(devices[start : start + size]) for start in range(0, len(devices), size)]
    if count < 1 or len(groups) != count or len({len(group) for group in groups}) != 1:
        raise InputError(
            f"slices={slices}: {len(devices)} devices of {len(processes)} processes do not divide into as many equal "
            "parts. Use the number of slices or nodes, or -1 for what the devices say."
        )
    return groups


def single_device_mesh() -> Mesh:
    """A mesh of this process's first device alone, however many there are."""
    return make_mesh(1, 1, 1, devices=list(_devices.get() or jax.local_devices())[:1])


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
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh) -> int:
    """Number of parts into which a batch is split; batch sizes must be its multiples."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _parts(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """By process: which of the `batch_ways` parts of a batch its devices hold."""
    owners: dict[int, set[int]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        owners.setdefault(device.process_index, set()).add(place[0] * mesh.shape["fsdp"] + place[1])
    return {process: tuple(sorted(parts)) for process, parts in owners.items()}


def own_ways(mesh: Mesh) -> tuple[int, ...]:
    """Which of a batch's `batch_ways` parts this process's devices hold, ascending.

    They need not be neighbours: on a TPU slice the mesh follows the network, not the hosts.
    """
    return _parts(mesh).get(jax.process_index(), ())


def data_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of every batch this process reads, of how many.

    Processes whose devices hold the same rows (tensor parallelism over hosts) read the same share.

    Returns:
      (index, count): a batch's lists are cut into `count` equal runs, and this process reads run `index`. Where its
      rows lie in the arrays is another question, see `own_ways`.

    Raises:
      InputError: the mesh gives processes unequal or overlapping parts.
    """
    parts = _parts(mesh)
    shares = sorted(set(parts.values()))
    taken = [part for share in shares for part in share]
    if len({len(share) for share in shares}) != 1 or sorted(taken) != list(range(batch_ways(mesh))):
        raise InputError(
            f"mesh {dict(mesh.shape)}: the {len(parts)} processes would read unequal or overlapping parts of a batch. "
            "Let the model axis either stay within one process or span whole ones."
        )
    return shares.index(own_ways(mesh)) if own_ways(mesh) else 0, len(shares)


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
