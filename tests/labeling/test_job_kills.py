"""SIGKILL at random moments of `python -m inranker_jax.label`, with a real (tiny) T5; bounded, see the benchmark."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("pyarrow")

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_store_equals_that_of_an_undisturbed_run() -> None:
    command = [sys.executable, "benchmarks/kill_labelling.py", "--kills=2", "--forms=1,2-together-ensemble"]
    result = subprocess.run(
        [*command, "--queries=30", "--chunk_size=15"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "undisturbed: 300 pairs of 30 lists, 20 parts" in result.stdout
    # T5: 7 parts of 100 pairs from before and 14 of 200; the run and the ensemble: 20 each.
    assert "ensemble in a shared store: 300 pairs of 30 lists, 61 parts" in result.stdout
    verdicts = re.findall(r"(.*): (?:[2-9]|\d\d) kills .* equal to the bit", result.stdout)
    assert verdicts == ["1 process", "2 processes, killed together, ensemble in a shared store"]
