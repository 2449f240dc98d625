"""Every shipped mesh with every shipped model: it divides the parameters, or the error says what would."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import jax
import pytest

from inranker_jax import configuration, partitioning
from inranker_jax.aot import topologies
from inranker_jax.configuration import gin
from inranker_jax.errors import InputError
from inranker_jax.models import T5Config, t5
from inranker_jax.partitioning import using_devices
from inranker_jax.train import train
from tests.aot.recipes import needs_libtpu

GIN = pathlib.Path(__file__).parents[2] / "gin"
MODELS = sorted(path.stem for path in (GIN / "models").glob("*.gin"))
MESHES = sorted(path.stem for path in (GIN / "meshes").glob("*.gin"))
# Which do not go together, on 8 devices: all heads of a model over 8 (4) of them.
INDIVISIBLE = {
    "tensor": {"mt5_small": "heads, 6", "t5_1_1_small": "heads, 6", "t5_base": "heads, 12", "mt5_base": "heads, 12",
               "t5_1_1_base": "heads, 12", "tiny": "heads, 2"},
    "fsdp_tensor": {"mt5_small": "heads, 6", "t5_1_1_small": "heads, 6", "tiny": "heads, 2"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _train_is_known() -> Iterator[None]:
    gin.external_configurable(train, "train", module="inranker_jax")
    yield
    gin.clear_config()


def mesh_of(name: str, devices: tuple[jax.Device, ...], *bindings: str) -> jax.sharding.Mesh:
    configuration.parse_gin([f"meshes/{name}.gin"], bindings)
    function = "single_device_mesh" if name == "single" else "make_mesh"
    with using_devices(devices):
        mesh: jax.sharding.Mesh = gin.get_configurable(f"partitioning.{function}")()
    return mesh


def model_of(name: str) -> T5Config:
    configuration.parse_gin([f"models/{name}.gin"])
    config: T5Config = gin.get_configurable("models.T5Config")()
    return config


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_divides_each_model_or_says_what_would(mesh: str) -> None:
    built = mesh_of(mesh, tuple(jax.devices()))
    assert built.devices.size == (1 if mesh == "single" else 8)
    for model in MODELS:
        config = model_of(model)
        names, shapes = t5.logical_axes(config), t5.abstract_params(config)
        problem = INDIVISIBLE.get(mesh, {}).get(model)
        if problem is None:
            partitioning.param_shardings(built, names, shapes)
            continue
        with pytest.raises(InputError) as caught:
            partitioning.param_shardings(built, names, shapes)
        message = str(caught.value)
        assert message.startswith("parameter ")
        assert f"({problem})" in message
        assert f"mesh axis model of size {built.shape['model']}" in message
        assert "Sizes that do: [1, 2" in message


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "slices", "mesh", "bindings", "sizes"),
    [
        ("v5e:4x4", 1, "fsdp", (), (1, 16, 1)),
        ("v5e:16x16", 1, "data_fsdp", ("FSDP=16",), (16, 16, 1)),
        ("v5p:4x4x4", 1, "fsdp_tensor", (), (1, 16, 4)),
        ("v6e:8x8", 1, "fsdp_tensor_2", (), (1, 32, 2)),
        ("v4-128", 1, "data", (), (64, 1, 1)),
        ("v5e:4x4", 2, "slices_fsdp", (), (2, 16, 1)),
        ("v5e:4x4", 4, "slices_fsdp", ("SLICES=4",), (4, 16, 1)),
        ("v4:2x2x2", 2, "slices_data", (), (16, 1, 1)),
    ],
)
def test_meshes_on_slices_of_tpus(
    topology: str, slices: int, mesh: str, bindings: tuple[str, ...], sizes: tuple[int, int, int]
) -> None:
    machine = topologies.describe(topology, slices)
    built = mesh_of(mesh, machine.devices, *bindings)
    assert tuple(built.shape.values()) == sizes
    assert {device.id for device in built.devices.flat} == {device.id for device in machine.devices}
    if slices > 1:  # whatever shares a parameter stays inside a slice
        inside = built.devices.reshape(slices, -1)
        assert [{device.slice_index for device in part} for part in inside] == [{n} for n in range(slices)]


def test_a_wrong_number_of_slices_or_devices_lists_what_is_possible() -> None:
    devices = tuple(jax.devices())
    with pytest.raises(InputError, match=r"slices=3: 8 devices of 1 processes do not divide"):
        mesh_of("slices_data", devices, "SLICES=3")
    with pytest.raises(
        InputError, match=r"mesh data=1 x fsdp=2 x model=3 needs 6 devices, but there are 8.*2x2x2"
    ):
        mesh_of("fsdp_tensor", devices, "TENSOR=3")
    with pytest.raises(InputError, match=r"data=1 x fsdp=5.* Sizes that fit, as data x fsdp x model"):
        mesh_of("data_fsdp", devices, "FSDP=5")
