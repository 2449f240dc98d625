"""Locks of folders: one process at a time, freed by the system."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from inranker_jax import locks
from inranker_jax.errors import InputError

HOLDER = """
import sys, time
from inranker_jax import locks
with locks.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_is_of_one_process_and_freed_when_that_is_killed(tmp_path):
    path = tmp_path / "run" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(
                InputError, match=rf"is at work there \(process {holder.pid} on .*another output folder"
            ),
            locks.held(path, patience=0.3),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        with locks.held(path):
            assert f"process {os.getpid()} " in path.read_text()
    with locks.held(path, patience=0.0):
        pass


def test_without_locks_everybody_is_let_in(tmp_path, monkeypatch):
    import fcntl

    def none_here(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none_here)
    with locks.held(tmp_path / ".lock"), locks.held(tmp_path / ".lock", patience=0.0):
        pass
