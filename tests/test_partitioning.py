"""The mesh and the logical axis rules."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from inranker_jax import partitioning
from inranker_jax.errors import InputError
from inranker_jax.models import T5Config, t5

CONFIG = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=4)


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(partitioning.make_mesh(data=-1, fsdp=2, model=2).shape) == {"data": 2, "fsdp": 2, "model": 2}
    assert dict(partitioning.make_mesh(data=1, fsdp=-1).shape) == {"data": 1, "fsdp": 8, "model": 1}
    assert dict(partitioning.make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "model": 1}


@dataclasses.dataclass(frozen=True)
class Device:
    """What the mesh asks of a device of another machine."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "H100"


def test_nodes_of_gpus_are_slices_only_where_the_mesh_says_so():
    """XLA numbers nodes as slices (by what they share of NVLink, or their boot)."""
    nodes = [Device(id=i, slice_index=i // 8, process_index=i // 8) for i in range(16)]
    whole = partitioning.make_mesh(data=1, fsdp=-1, devices=nodes)
    assert dict(whole.shape) == {"data": 1, "fsdp": 16, "model": 1}
    for slices in (2, -1):
        inside = partitioning.make_mesh(data=2, fsdp=-1, slices=slices, devices=nodes).devices
        assert [{device.slice_index for device in row.flat} for row in inside] == [{0}, {1}]
    with pytest.raises(InputError, match="2 slices do not divide data=1"):
        partitioning.make_mesh(data=1, fsdp=-1, slices=2, devices=nodes)
    pods = [dataclasses.replace(node, platform="tpu", device_kind="TPU v4") for node in nodes]
    with pytest.raises(InputError, match="2 slices do not divide data=1"):
        partitioning.make_mesh(data=1, fsdp=-1, devices=pods)


def test_a_wrong_product_names_the_sizes_that_fit():
    with pytest.raises(InputError, match=r"needs 6 devices, but there are 8 .*2x2x2"):
        partitioning.make_mesh(data=3, fsdp=2)
    with pytest.raises(InputError, match="at most one is -1"):
        partitioning.make_mesh(data=-1, fsdp=-1)
    with pytest.raises(InputError, match="positive"):
        partitioning.make_mesh(data=0)


def test_every_parameter_gets_the_axes_of_its_names():
    mesh = partitioning.make_mesh(2, 2, 2)
    shardings = partitioning.param_shardings(mesh, t5.logical_axes(CONFIG), t5.abstract_params(CONFIG))
    layer = shardings["encoder"]["layers_0"]
    assert shardings["token_embedder"]["embedding"].spec == PartitionSpec("model", "fsdp")
    assert layer["attention"]["query"]["kernel"].spec == PartitionSpec("fsdp", "model")
    assert layer["attention"]["out"]["kernel"].spec == PartitionSpec("model", "fsdp")
    assert layer["mlp"]["wo"]["kernel"].spec == PartitionSpec("model", "fsdp")
    assert layer["pre_mlp_layer_norm"]["scale"].spec == PartitionSpec("fsdp")


def test_an_indivisible_axis_names_parameter_axis_and_choices():
    mesh = partitioning.make_mesh(1, 1, 8)
    with pytest.raises(InputError, match=r"relpos_bias.*axis 0 \(heads, 4\).*model of size 8.*\[1, 2, 4\]"):
        partitioning.param_shardings(mesh, t5.logical_axes(CONFIG), t5.abstract_params(CONFIG))


def test_a_name_without_a_rule_is_an_error():
    with pytest.raises(InputError, match=r"no logical axis rule for 'embd'.*'embed'"):
        partitioning.partition_spec(("embd",))


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = partitioning.make_mesh(2, 2, 2)
    rows = np.arange(8 * 3).reshape(8, 3)
    placed = partitioning.put_batch({"x": rows}, mesh)["x"]
    assert placed.sharding.shard_shape(placed.shape) == (2, 3)
    np.testing.assert_array_equal(placed, rows)
    assert partitioning.batch_ways(mesh) == 4
