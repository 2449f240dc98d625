"""Keeps other libraries' start-up chatter off the terminal, without hiding an error."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import logging
import os
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


def libraries() -> None:
    """Sets the log levels of chatty libraries to warnings, or errors where their warnings are routine."""
    for name, level in (("absl", logging.ERROR), ("bm25s", logging.WARNING), ("orbax", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    if importlib.util.find_spec("libtpu") and not glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"):
        # The compiler of TPUs without a TPU: JAX would say on every start that it cannot tell which it is.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


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
