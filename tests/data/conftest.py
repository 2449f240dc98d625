"""Small stores and a real vocabulary for the tests of the data room."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

import inranker_jax
from inranker_jax.data.store import Example, ExampleStore
from inranker_jax.prompts import ScoringContract, Tokenizer, preset

VOCABULARY = pathlib.Path(inranker_jax.__file__).parent / "collections" / "python_docs" / "vocabulary"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(VOCABULARY)


@pytest.fixture(scope="session")
def contract() -> ScoringContract:
    return preset("inranker").replace(max_length=64)


def make_example(number: int, documents: int = 3, teacher: bool = True) -> Example:
    """An example whose texts and labels all tell its number."""
    rng = np.random.default_rng(number)
    return Example(
        f"q{number}",
        f"question number {number} — qué é?",
        tuple(f"d{number}.{i}" for i in range(documents)),
        tuple(f"document {i} of {number} " + "word " * int(rng.integers(1, 30)) for i in range(documents)),
        rng.normal(size=(documents, 2)).astype(np.float32) if teacher else None,
        np.eye(1, documents, dtype=np.float32)[0],
    )


@pytest.fixture(scope="session")
def store() -> ExampleStore:
    return ExampleStore.from_examples([make_example(n, 1 + n % 3) for n in range(23)], "toy:train")
