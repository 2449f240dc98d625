"""Runs the command in this process or in one of its own, on a corpus made here."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from inranker_jax import generate_queries

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def write_corpus(folder: pathlib.Path, number: int = 40) -> pathlib.Path:
    path = folder / "corpus.jsonl"
    rows = [
        {
            "_id": f"d{i}",
            "title": f"Title of number {i}",
            "text": f"This is text number{i}. It goes on about word{i}",
        }
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(corpus: pathlib.Path, output: pathlib.Path, generator: str, *flags: str) -> int:
    own = [f"--corpus={corpus}", "--corpus_format=jsonl", f"--output={output}", f"--generator={generator}"]
    return generate_queries.main([*own, *flags])


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def report(output: pathlib.Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.with_suffix(".report.json").read_text("utf-8"))
    return found


def start(
    corpus: pathlib.Path,
    output: pathlib.Path,
    generator: str,
    flags: Sequence[str] = (),
    key: str | None = None,
) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    own = [f"--corpus={corpus}", "--corpus_format=jsonl", f"--output={output}", f"--generator={generator}"]
    return subprocess.Popen(
        [sys.executable, "-m", "inranker_jax.generate_queries", *own, *flags],
        cwd=REPOSITORY,
        env=environment | ({"OPENAI_API_KEY": key} if key else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
