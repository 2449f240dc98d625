"""Who may import whom: every import of the package and of tasks/, against the table of rooms.

Imports inside functions and under TYPE_CHECKING count like any other: each is an arrow in the picture that a
reader of the code has to hold.
"""

from __future__ import annotations

import ast
import dataclasses
import pathlib
from collections.abc import Iterator

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "inranker_jax"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: its rooms may import from rows above.

    Attributes:
      rooms: modules or packages below `inranker_jax`; the longest name that fits a module is its room.
      mixed: whether rooms of this row may import each other.
      closed_to: rooms above that are forbidden all the same.
    """

    rooms: tuple[str, ...]
    mixed: bool = True
    closed_to: tuple[str, ...] = ()


ROWS = (
    Row(
        (
            "errors",
            "records",
            "prompts",
            "partitioning",
            "interruption",
            "progress",
            "manifest",
            "quiet",
            "flags",
            "stages",
            "locks",
            "hub",
            "packing",
            "compilation_cache",
            "distributed",
            "paths",
            "hardware",
            "telemetry",
            "watchdog",
        )
    ),
    Row(("losses", "models", "evaluation.measures", "evaluation.significance"), mixed=False),
    Row(("corpora", "retrieval", "query_generation", "data", "tasks"), closed_to=("losses", "models")),
    Row(("checkpoints",)),
    Row(("scorer", "scoring_calls", "students", "trainer", "optimizers", "train_state")),
    Row(("labeling", "evaluation", "aot", "benchmarks")),
    Row(("configuration",)),
    Row(
        (
            "train",
            "evaluate",
            "retrieve",
            "generate_queries",
            "label",
            "verify_labels",
            "prepare_tfds",
            "adapt",
            "export",
            "compile",
            "benchmark",
        ),
        mixed=False,
    ),
)
LEVELS = {room: level for level, row in enumerate(ROWS) for room in row.rooms}
BINARIES = ROWS[-1].rooms

# Other people's packages, and the only rooms that may import them.
TEXT_TO_TENSORS = ("data", "tasks")
FOREIGN_MODELS = ("labeling", "query_generation")
RESTRICTED = {
    "tensorflow": TEXT_TO_TENSORS,
    "tensorflow_datasets": TEXT_TO_TENSORS,
    "tensorflow_text": TEXT_TO_TENSORS,
    "seqio": TEXT_TO_TENSORS,
    "gin": ("configuration", *BINARIES),
    # Other people's teachers and local language models only; an optional extra, imported where it is used.
    "torch": FOREIGN_MODELS,
    "transformers": FOREIGN_MODELS,
    "sentence_transformers": FOREIGN_MODELS,
}
# Rooms of arrays touch neither text nor files.
FILES_AND_TEXT = (
    "tokenizers",
    "sentencepiece",
    "pathlib",
    "os",
    "io",
    "gzip",
    "json",
    "csv",
    "shutil",
    "etils",
)
ARRAY_ROOMS = ("losses", "models", "evaluation.measures", "evaluation.significance")


def room_of(module: str) -> str | None:
    """`evaluation.measures` for that module, `evaluation` for the rest of its package, None if unknown."""
    inside = module.removeprefix(PACKAGE + ".").split(".")
    for length in range(len(inside), 0, -1):
        if ".".join(inside[:length]) in LEVELS:
            return ".".join(inside[:length])
    return None


def modules(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Dotted names of all modules; tasks/ lies beside the package and is installed inside it."""
    found = {}
    for folder, prefix in ((root / PACKAGE, PACKAGE), (root / "tasks", f"{PACKAGE}.tasks")):
        for path in sorted(folder.rglob("*.py")):
            parts = (prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports_of(tree: ast.Module, module: str, is_package: bool, known: set[str]) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of everything a module imports, constant dynamic imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -(node.level - is_package) or None]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                # "from inranker_jax import losses" names a module; "from inranker_jax.losses import f" not.
                yield node.lineno, inner if inner in known or base == PACKAGE else base
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            argument = node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value)


def public_names(root: pathlib.Path) -> dict[str, str]:
    """Where the names of `inranker_jax/__init__.py` come from: importing one is an arrow to its home."""
    tree = ast.parse((root / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    homes = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            homes.update({f"{PACKAGE}.{alias.name}": node.module for alias in node.names})
    return homes


def arrow_error(source: str, target: str) -> str | None:
    """Why `source` may not import `target`, or None when it may."""
    room = room_of(source)
    assert room is not None
    if not target.startswith(PACKAGE + "."):
        top = target.split(".")[0]
        if top in RESTRICTED and room not in RESTRICTED[top]:
            return f"only {', '.join(RESTRICTED[top]) or 'tests'} may import {top}"
        if top in FILES_AND_TEXT and room in ARRAY_ROOMS:
            return "rooms of arrays touch no text and no files"
        return None
    other = room_of(target)
    if other is None:
        return None if target == f"{PACKAGE}.__version__" else "it is in no room"
    if other == room:
        return None
    if other in BINARIES:
        return "binaries are imported by nobody"
    row = ROWS[LEVELS[room]]
    if other in row.closed_to:
        return f"{room} may not import {other}"
    if LEVELS[other] > LEVELS[room] or (LEVELS[other] == LEVELS[room] and not row.mixed):
        return f"{other} is not above {room}"
    return None


def violations(root: pathlib.Path) -> list[str]:
    """Lists every forbidden import below `root` as "file:line: module imports target: reason"."""
    found = modules(root)
    homes = public_names(root)
    problems = []
    for module, path in found.items():
        if module == PACKAGE:
            continue  # The face of the package names what users import, wherever it lives.
        place = path.relative_to(root)
        if room_of(module) is None:
            problems.append(f"{place}:1: {module} is in no room; give it one in tests/test_architecture.py")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, name in imports_of(tree, module, path.name == "__init__.py", set(found)):
            reason = arrow_error(module, homes.get(name, name))
            if reason is not None:
                problems.append(f"{place}:{line}: {module} imports {name}: {reason}")
    return problems


def test_no_forbidden_arrow() -> None:
    assert violations(REPOSITORY) == []


def test_every_file_is_seen() -> None:
    found = modules(REPOSITORY)
    for expected in ("inranker_jax.scorer", "inranker_jax.prompts.contract", "inranker_jax.models.t5"):
        assert expected in found
    assert any(name.startswith("inranker_jax.tasks.") for name in found)


FACE = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from inranker_jax.scorer import Reranker\n"


def write_tree(root: pathlib.Path, files: dict[str, str]) -> None:
    for name, text in {"inranker_jax/__init__.py": FACE, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


LEGAL = {
    "inranker_jax/errors.py": "import difflib\n",
    "inranker_jax/manifest.py": "from inranker_jax import __version__\nimport json\n",
    "inranker_jax/models/t5.py": "import jax\nfrom inranker_jax.errors import InputError\n",
    "inranker_jax/models/__init__.py": "from inranker_jax.models.t5 import apply\nfrom . import t5\n",
    "inranker_jax/data/store.py": "import seqio, tensorflow as tf\nfrom inranker_jax import records\n",
    "inranker_jax/records.py": "import os\n",
    "inranker_jax/scorer.py": "from inranker_jax.models import apply\nfrom inranker_jax import checkpoints\n",
    "inranker_jax/checkpoints/__init__.py": "from inranker_jax.models.t5 import apply\n",
    "inranker_jax/evaluation/__init__.py": "",
    "inranker_jax/evaluation/reports.py": "from inranker_jax import Reranker\nfrom .measures import f\n",
    "inranker_jax/evaluation/measures.py": "import numpy\n",
    "inranker_jax/configuration.py": "import gin\n",
    "inranker_jax/evaluate.py": "import gin\nfrom inranker_jax import configuration, evaluation\n",
    "tasks/mine.py": "import seqio\nfrom inranker_jax.data import store\n",
}


def test_a_legal_tree_passes(tmp_path: pathlib.Path) -> None:
    write_tree(tmp_path, LEGAL)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("inranker_jax/records.py", "from inranker_jax.models import apply", "models is not above records"),
        ("inranker_jax/prompts.py", "from inranker_jax import Reranker", "scorer is not above prompts"),
        ("inranker_jax/losses/mse.py", "import inranker_jax.models.t5", "models is not above losses"),
        ("inranker_jax/losses/mse.py", "import gin", "may import gin"),
        ("inranker_jax/losses/mse.py", "import pathlib", "no files"),
        ("inranker_jax/models/t5.py", "from tensorflow import keras", "may import tensorflow"),
        ("inranker_jax/data/store.py", "from ..models.t5 import apply", "data may not import models"),
        ("inranker_jax/data/__init__.py", "from ..losses import mse", "data may not import losses"),
        ("inranker_jax/corpora.py", "import seqio", "may import seqio"),
        ("inranker_jax/corpora.py", "from inranker_jax import losses", "corpora may not import losses"),
        (
            "inranker_jax/scorer.py",
            "def f():\n    import tensorflow as tf",
            ":2: inranker_jax.scorer imports tensorflow",
        ),
        ("inranker_jax/scorer.py", "import importlib\nimportlib.import_module('seqio')", "may import seqio"),
        (
            "inranker_jax/scorer.py",
            "import transformers",
            "only labeling, query_generation may import transformers",
        ),
        (
            "inranker_jax/trainer.py",
            "import typing as t\nif t.TYPE_CHECKING:\n    from inranker_jax.evaluation.reports import f",
            ":3: inranker_jax.trainer imports inranker_jax.evaluation.reports: evaluation is not above",
        ),
        (
            "inranker_jax/evaluation/measures.py",
            "from . import reports",
            "evaluation is not above evaluation.measures",
        ),
        ("inranker_jax/evaluation/reports.py", "import inranker_jax.evaluate", "imported by nobody"),
        ("inranker_jax/evaluate.py", "from inranker_jax.train import main", "imported by nobody"),
        (
            "inranker_jax/evaluation/reports.py",
            "from inranker_jax import configuration",
            "is not above evaluation",
        ),
        ("inranker_jax/evaluation/reports.py", "import inranker_jax.nowhere", "it is in no room"),
        ("inranker_jax/helpers.py", "", "inranker_jax.helpers is in no room"),
        ("tasks/mine.py", "from inranker_jax.scorer import Reranker", "scorer is not above tasks"),
        ("tasks/mine.py", "import torch", "may import torch"),
    ],
)
def test_a_forbidden_import_is_caught(path: str, text: str, expected: str, tmp_path: pathlib.Path) -> None:
    write_tree(tmp_path, {**LEGAL, path: text})
    problems = violations(tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}:")
    assert expected in problems[0]
