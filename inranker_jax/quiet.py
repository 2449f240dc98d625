"""Keeps other libraries' start-up chatter off the terminal, without hiding an error."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def native_stderr_held_back() -> Iterator[None]:
    """Holds back what native code writes to standard error (TensorFlow's notes on import).

    When the block raises, everything held back is written out first, so nothing that explains a failure is lost.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            if failed:
                held.seek(0)
                os.write(2, held.read())


# What JAX itself sets when it is imported beside a libtpu, with a TPU or without.
_OF_JAX = ("TPU_LIBRARY_PATH", "TPU_SKIP_MDS_QUERY")


def libraries() -> None:
    """Sets the log levels of chatty libraries to warnings, or errors where their warnings are routine."""
    for name, level in (("absl", logging.ERROR), ("bm25s", logging.WARNING), ("orbax", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    without_a_tpu()


def without_a_tpu() -> None:
    """Keeps JAX from starting libtpu, the compiler of `compile`, where there is no TPU.

    On every start it would write that it cannot tell which TPU this is, and its profiler may be of another version
    than JAX's, which ends a process that is asked for a trace. Nothing is changed where `JAX_PLATFORMS` is set,
    where a GPU's plugin is installed, or where anything speaks of a TPU.
    """
    installed = importlib.util.find_spec("libtpu") is not None
    others = importlib.util.find_spec("jax_plugins") is not None
    told = any(name.startswith(("TPU_", "MEGASCALE_")) and name not in _OF_JAX for name in os.environ)
    if not installed or others or told or "JAX_PLATFORMS" in os.environ or _has_tpu():
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # it has read the variable already
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def _has_tpu() -> bool:
    """Whether a chip of Google's is on the bus or has a device file."""
    vendors = (pathlib.Path(path) for path in glob.glob("/sys/bus/pci/devices/*/vendor"))
    on_bus = any(vendor.read_text(encoding="utf-8").strip() == "0x1ae0" for vendor in vendors)
    return on_bus or bool(glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"))


@contextlib.contextmanager
def absl_warnings() -> Iterator[None]:
    """Drops absl's warnings inside the block (Orbax warns of every folder that it opens for reading)."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
