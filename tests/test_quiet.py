"""What other libraries say on start: nothing of a TPU where there is none."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from inranker_jax import quiet

DEVICES = "from inranker_jax import quiet; {}quiet.libraries(); import jax; print(jax.devices()[0].platform)"


def clean() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TPU_", "MEGASCALE_", "JAX_PLATFORMS"))
    }


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu has no wheel for this platform"
)
@pytest.mark.parametrize("before", ["", "import jax; "], ids=["before JAX", "after JAX"])
def test_libtpu_without_a_tpu_is_not_started(before: str) -> None:
    if quiet._has_tpu():
        pytest.skip("there is a TPU here")
    done = subprocess.run(
        [sys.executable, "-c", DEVICES.format(before)],
        env=clean(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("cpu\n", "")


@pytest.mark.parametrize(
    "told", [{"TPU_WORKER_ID": "0"}, {"MEGASCALE_NUM_SLICES": "2"}, {"JAX_PLATFORMS": "tpu,cpu"}]
)
def test_what_speaks_of_a_tpu_is_heard(told: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - clean().keys():
        monkeypatch.delenv(name)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None)
    quiet.without_a_tpu()
    assert os.environ.get("JAX_PLATFORMS") == told.get("JAX_PLATFORMS")
