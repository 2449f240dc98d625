"""Machines that are described and not there: TPU slices for which the real compiler compiles, and virtual CPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax

from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.hardware import CHIPS, Chip, chip_of

# Shapes that Google Cloud rents, in chips: cloud.google.com/tpu/docs, "Configurations" of each version.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
    "16x16x16",
)
_SHAPES = {"v4": _CUBIC, "v5e": _FLAT, "v5p": _CUBIC, "v6e": _FLAT}
_OTHER_NAMES = {"v5litepod": "v5e"}
PIP_LINE = "pip install 'inranker_jax[tpu-compiler]' (or: pip install libtpu==0.0.51)"

# libtpu asks for these of a machine with TPUs; without them it complains on standard error.
_DESCRIBED = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine to compile for.

    Attributes:
      name: in one spelling, such as "v5e:4x4" or "cpu:8".
      devices: JAX devices of all slices, to which programs can be compiled.
      slices: TPU slices, or parts of the CPU machine that stand for them.
      chip: published figures of a device; None for a CPU.
      wraps: whether the network is a torus along every axis, so that a ring goes both ways.
    """

    name: str
    devices: tuple[jax.Device, ...]
    slices: int
    chip: Chip | None
    wraps: bool

    @property
    def platform(self) -> str:
        """JAX's name of it: "tpu" or "cpu"."""
        return self.devices[0].platform

    @property
    def hosts(self) -> list[list[jax.Device]]:
        """Devices of each process, in the order of processes."""
        numbers = sorted({device.process_index for device in self.devices})
        return [[device for device in self.devices if device.process_index == n] for n in numbers]

    def __str__(self) -> str:
        each = f"{self.slices} slices of {self.name}" if self.slices > 1 else self.name
        hosts = f"{len(self.hosts)} host{'s' if len(self.hosts) > 1 else ''}"
        return f"{each}: {len(self.devices)} {self.devices[0].device_kind}, {hosts}"


def known_names() -> str:
    """The names that users may give, in words."""
    parts = [f"{version}:{', '.join(shapes)}" for version, shapes in _SHAPES.items()]
    return "; ".join(parts) + "; Google's accelerator types such as v5litepod-16 and v4-128; cpu:N"


def describe(text: str, slices: int = 1) -> Topology:
    """Reads a topology's name and describes the machine to JAX.

    `VERSION:SHAPE` gives the shape of a slice in chips. Google's accelerator types count chips of v5e and v6e, and
    TensorCores, of which a chip has two, of v4 and v5p: v4-128 is 64 chips, 4x4x4. `cpu:N` is N virtual devices
    of this machine, to try a command on.

    Args:
      text: the name.
      slices: how many of them there are, with a slow network between them.

    Returns:
      The machine.

    Raises:
      InputError: no such topology, libtpu is not installed, or JAX has started with fewer CPU devices.
    """
    if slices < 1:
        raise InputError(f"slices={slices}: expected a positive number.")
    mark = "-" if "-" in text else ":"
    version, _, rest = text.strip().lower().partition(mark)
    version = _OTHER_NAMES.get(version, version)
    if version == "cpu" and rest.isdigit() and int(rest) > 0:
        return _cpu(int(rest), slices)
    gpus = [name.split("-")[0].lower() for name in CHIPS if name not in _SHAPES]
    if version in ("gpu", "cuda", *gpus):
        raise InputError(
            f"topology {text!r}: programs for GPUs are compiled by the driver of a GPU that is there. Start the run "
            f"itself for a few steps on it, or describe a TPU: {known_names()}."
        )
    shape = _shape(version, rest) if rest.isdigit() == (mark == "-") else None
    if shape is None:
        options = [f"{v}:{s}" for v, shapes in _SHAPES.items() for s in shapes]
        raise InputError(
            f"no topology {text!r}.{did_you_mean(text.lower().replace('-', ':'), options)} Known: {known_names()}."
        )
    return _tpu(version, shape, slices)


def _shape(version: str, rest: str) -> tuple[int, ...] | None:
    """Chips along each axis, or None where there is no such slice."""
    if version not in _SHAPES:
        return None
    known = {tuple(map(int, shape.split("x"))) for shape in _SHAPES[version]}
    if rest.isdigit():
        chips = int(rest) // CHIPS[version].cores
        return next((shape for shape in known if math.prod(shape) == chips), None)
    if not re.fullmatch(r"\d+(x\d+)+", rest):
        return None
    shape = tuple(map(int, rest.split("x")))
    cubes = len(shape) == 3 and version in ("v4", "v5p") and all(size and size % 4 == 0 for size in shape)
    return shape if tuple(sorted(shape)) in {tuple(sorted(s)) for s in known} or cubes else None


def _cpu(count: int, slices: int) -> Topology:
    total = count * slices
    settings: Any = jax.config
    with contextlib.suppress(RuntimeError):  # JAX has started: its devices are what they are
        jax.config.update("jax_num_cpu_devices", max(total, settings.jax_num_cpu_devices))
    devices = jax.devices("cpu")
    if len(devices) < total:
        raise InputError(f"cpu:{count} x {slices} slices: JAX has started with {len(devices)} CPU devices.")
    return Topology(f"cpu:{count}", tuple(devices[:total]), slices, None, True)


def _tpu(version: str, shape: tuple[int, ...], slices: int) -> Topology:
    if not _has_libtpu():
        raise InputError(f"the TPU compiler is not installed. It needs no TPU: {PIP_LINE}.")
    name = f"{version}:{'x'.join(map(str, shape))}"
    options: dict[str, Any] = {}
    if CHIPS[version].cores > 1:
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device, as on a real one
    if slices > 1:
        options["num_slices"] = slices
    from jax.experimental import topologies

    with _environment():
        try:
            devices: Any = topologies.get_topology_desc(name, "tpu", **options).devices
        except jax.errors.JaxRuntimeError as error:
            raise InputError(f"libtpu refuses {name}: {error}. Known: {known_names()}.") from error
    wraps = all(size == 16 if len(shape) == 2 else size % 4 == 0 for size in shape if size > 1)
    return Topology(name, tuple(devices), slices, chip_of(devices[0].device_kind), wraps)


def _has_libtpu() -> bool:
    try:
        return bool(os.environ.get("TPU_LIBRARY_PATH")) or importlib.util.find_spec("libtpu") is not None
    except ValueError:  # something else keeps it from being imported
        return False


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What libtpu reads when it is loaded; taken back afterwards, since nobody else should think of TPUs."""
    added = [name for name in _DESCRIBED if name not in os.environ]
    os.environ.update({name: _DESCRIBED[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
