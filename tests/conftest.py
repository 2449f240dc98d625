"""A strict session for every test: several CPU devices, no silent rank promotion, no hub."""

from __future__ import annotations

import os
import pathlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tests need no accelerator, and the installed libtpu is for compiling only: its profiler is of another version.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Half of the tests' time is compilation: the next run finds the programs of this one.
os.environ.setdefault(
    "INRANKER_JAX_COMPILATION_CACHE", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla")
)

import jax
import pytest

from inranker_jax import compilation_cache

compilation_cache.enable()
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The real test collections beside the checkout; they are never part of the project."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"real collections are not at {folder}")
    return folder
