"""Names of machines."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest

from inranker_jax.aot import topologies
from inranker_jax.errors import InputError
from tests.aot.recipes import needs_libtpu


def test_virtual_cpus_are_devices_of_this_process() -> None:
    assert len(jax.devices()) == 8
    machine = topologies.describe("cpu:4")
    assert machine.devices == tuple(jax.devices()[:4])
    assert (machine.platform, machine.slices, machine.chip) == ("cpu", 1, None)
    assert str(machine) == "cpu:4: 4 cpu, 1 host"
    assert len(topologies.describe("cpu:4", slices=2).devices) == 8
    with pytest.raises(InputError, match=r"started with 8 CPU devices"):
        topologies.describe("cpu:64")


@needs_libtpu
@pytest.mark.parametrize(
    ("text", "name", "chips", "hosts", "wraps"),
    [
        ("v5e:2x2", "v5e:2x2", 4, 1, False),
        ("v5e-16", "v5e:4x4", 16, 4, False),
        ("v5litepod-16", "v5e:4x4", 16, 4, False),
        ("V5E:16x16", "v5e:16x16", 256, 64, True),
        ("v4-128", "v4:4x4x4", 64, 16, True),
        ("v4:2x2x4", "v4:2x2x4", 16, 4, False),
        ("v5p-8", "v5p:2x2x1", 4, 1, False),
        ("v6e-64", "v6e:8x8", 64, 16, False),
    ],
)
def test_names_of_tpu_slices(text: str, name: str, chips: int, hosts: int, wraps: bool) -> None:
    machine = topologies.describe(text)
    assert (machine.name, len(machine.devices), len(machine.hosts), machine.wraps) == (
        name,
        chips,
        hosts,
        wraps,
    )
    assert machine.chip is not None
    assert machine.chip.name == name.split(":")[0]


@needs_libtpu
def test_slices_are_told_apart() -> None:
    machine = topologies.describe("v5e:2x2", slices=2)
    assert len(machine.devices) == 8
    assert [device.slice_index for device in machine.devices] == [0] * 4 + [1] * 4


@needs_libtpu
def test_describing_a_machine_leaves_the_environment_alone() -> None:
    before = dict(os.environ)
    topologies.describe("v5e:2x2")
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e:4x5", r"no topology 'v5e:4x5'. Did you mean 'v5e:4x\d'\? Known: .*v5e:1x1.*cpu:N"),
        ("v5e-17", "no topology 'v5e-17'"),
        ("v4:64", "no topology"),
        ("v5e:2x2x2", "no topology"),
        ("v9:2x2", "no topology"),
        ("cpu:0", "no topology"),
        ("cpu", "no topology"),
        ("", "no topology"),
        ("h100:8", "compiled by the driver of a GPU"),
        ("gpu:8", "compiled by the driver of a GPU"),
    ],
)
def test_other_names_are_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        topologies.describe(text)


def test_without_libtpu_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(InputError, match=r"pip install 'inranker_jax\[tpu-compiler\]'"):
        topologies.describe("v5e:2x2")


@needs_libtpu
def test_libtpu_writes_nothing_of_its_own() -> None:
    code = (
        "import jax; jax.config.update('jax_platforms', 'cpu')\n"
        "from inranker_jax.aot import topologies; print(topologies.describe('v5e:2x2'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stderr == ""
    assert done.stdout == "v5e:2x2: 4 TPU v5 lite, 1 host\n"
