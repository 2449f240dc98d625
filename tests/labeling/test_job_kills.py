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
    command = [sys.executable, "benchmarks/kill_labelling.py", "--kills=4", "--processes=1,2", "--queries=50"]
    result = subprocess.run(
        [*command, "--chunk_size=25"], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "undisturbed: 500 pairs of 50 lists, 20 parts" in result.stdout
    verdicts = re.findall(r"(\d) process(?:es)?: 4 kills .* (equal to the bit)", result.stdout)
    assert [count for count, _ in verdicts] == ["1", "2"]
