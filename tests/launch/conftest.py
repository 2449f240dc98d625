"""Stand-ins for cloud commands on the PATH of the launch scripts."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
PROGRAMS = ("gcloud", "kubectl", "xpk", "sbatch", "srun", "squeue", "scancel", "scontrol", "nvidia-smi")


class Machine:
    """A folder with stand-ins, and the launch scripts run beside them.

    Attributes:
      folder: working directory of the scripts; nothing but the scripts writes there.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.folder = root / "work"
        self.state = root / "state"
        self._bin = root / "bin"
        for folder in (self.folder, self.state, self._bin):
            folder.mkdir()
        (self.state / "script.json").write_text("{}")
        source = pathlib.Path(__file__).with_name("stand_in.py")
        for program in PROGRAMS:
            path = self._bin / program
            shutil.copy(source, path)
            path.write_text(f"#!{sys.executable} -S\n" + source.read_text())
            path.chmod(0o755)

    def answers(self, **script: Any) -> None:
        """Sets the answers; see `stand_in`."""
        (self.state / "script.json").write_text(json.dumps(script))

    def environment(self, **more: str) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("INRANKER_", "CLOUDSDK_", "JAX_", "SLURM_", "CUDA_"))
        }
        return {**kept, "PATH": f"{self._bin}:{os.environ['PATH']}", "STAND_IN": str(self.state), **more}

    def launch(self, script: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a launch script to its end."""
        return subprocess.run(
            ["bash", str(LAUNCH / script), *argv],
            cwd=self.folder,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def calls(self, program: str | None = None) -> list[list[str]]:
        """The arguments of all recorded calls so far, in order."""
        path = self.state / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [
            call["argv"] for call in map(json.loads, lines) if program is None or call["program"] == program
        ]

    def stdin_of(self, program: str) -> str:
        """What the last call of a program that was given anything on its standard input was given."""
        calls = map(json.loads, (self.state / "calls.jsonl").read_text().splitlines())
        return [call["stdin"] for call in calls if call["program"] == program and call["stdin"]][-1]


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Machine:
    return Machine(tmp_path)
