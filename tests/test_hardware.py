"""Published figures of accelerators."""

from __future__ import annotations

import doctest

import pytest

from inranker_jax import hardware


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_a_device_kind_is_the_chip_that_it_names(device_kind: str, name: str) -> None:
    chip = hardware.chip_of(device_kind)
    assert chip is not None
    assert chip.name == name


@pytest.mark.parametrize(
    "device_kind", ["cpu", "TPU v2", "TPU v4 lite", "TPU7x", "NVIDIA A10G", "NVIDIA L4", ""]
)
def test_what_is_not_in_the_table_is_none(device_kind: str) -> None:
    assert hardware.chip_of(device_kind) is None


def test_figures_have_the_units_they_say() -> None:
    for chip in hardware.CHIPS.values():
        assert 1e14 < chip.peak_flops["float32"] <= chip.peak_flops["bfloat16"] < 2e15, chip.name
        assert 16 * 2**30 <= chip.hbm_bytes < 200 * 2**30, chip.name
        assert 5e11 < chip.hbm_bandwidth < 1e13, chip.name
        assert chip.dcn_bandwidth < chip.ici_bandwidth < chip.hbm_bandwidth, chip.name
    # 16 GiB less what libtpu keeps; a v4-128 is 64 chips.
    assert hardware.CHIPS["v5e"].program_bytes == 15.75 * 2**30
    assert hardware.CHIPS["v4"].cores == 2


def test_examples_of_the_docstrings() -> None:
    results = doctest.testmod(hardware)
    assert (results.failed, results.attempted > 0) == (0, True)
