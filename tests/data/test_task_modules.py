"""Errors in a task module of the user's are told with their line in that module."""

from __future__ import annotations

import itertools
import pathlib
import sys
from collections.abc import Iterator

import pytest

from inranker_jax import data
from inranker_jax.errors import InputError

NAMES = (f"broken_corpus_{number}" for number in itertools.count())


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """A folder of the user's, in which the command is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if "broken_" in name:
            del sys.modules[name]


def refused(name: str) -> str:
    with pytest.raises(InputError) as caught:
        data.import_task_modules([name])
    assert caught.value.exit_status == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import os\n\nfoo\n", "3: NameError: name 'foo' is not defined. Correct"),
        ("import os\n\ndef broken(:\n    pass\n", "3: SyntaxError: invalid syntax: def broken(:. Correct"),
        (
            "if True:\npass\n",
            "2: IndentationError: expected an indented block after 'if' statement on line 1: ",
        ),
        (
            "import a_package_not_there\n",
            "1: ModuleNotFoundError: No module named 'a_package_not_there'. Corr",
        ),
        ("def f():\n    return {}['k']\n\n\nf()\n", "2: KeyError: 'k'. Correct"),
    ],
)
def test_an_error_is_told_with_its_line(folder: pathlib.Path, text: str, expected: str) -> None:
    stem = next(NAMES)
    (folder / f"{stem}.py").write_text(text)
    for _ in range(2):
        message = refused(f"{stem}.py")
        assert message.startswith(f"{stem}.py:{expected}")
        assert message.endswith(f"Correct the task module; `python {stem}.py` shows the whole traceback.")
    message = refused(stem)
    assert message.startswith(f"{folder}/{stem}.py:{expected}")
    assert message.endswith(f"`python -m {stem}` shows the whole traceback.")


@pytest.mark.parametrize(
    ("text", "error"), [("\n\nfoo\n", "NameError: name 'foo' is not defined"), ("\n\n)\n", "SyntaxError: ")]
)
def test_an_error_in_a_module_that_it_imports_is_told_with_the_line_of_the_import(
    folder: pathlib.Path, text: str, error: str
) -> None:
    helper, stem = next(NAMES), next(NAMES)
    (folder / f"{helper}.py").write_text(text)
    (folder / f"{stem}.py").write_text(f"import os\n\n\ndef load():\n    import {helper}\n\n\nload()\n")
    for name, shown in ((f"{stem}.py", f"{stem}.py"), (stem, f"{folder}/{stem}.py")):
        message = refused(name)
        assert message.startswith(f"{shown}:5: {error}")
        assert f"(raised at {folder}/{helper}.py:3)" in message


def test_bad_input_in_a_task_module_keeps_its_message(folder: pathlib.Path) -> None:
    stem = next(NAMES)
    call = f"data.add_labelled_task({stem!r}, list, list_size=0)"
    (folder / f"{stem}.py").write_text(f"from inranker_jax import data\n\n{call}\n")
    message = refused(f"{stem}.py")
    assert message.startswith(f"{stem}.py:3: ")
    assert "list_size" in message
    assert "Correct the task module" not in message


def test_a_module_that_is_not_there_has_no_line() -> None:
    assert refused("broken_nowhere").startswith("no task module 'broken_nowhere'.")
    assert refused("nowhere.py").startswith("nowhere.py: no such task module.")
