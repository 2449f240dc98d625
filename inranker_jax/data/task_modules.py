"""Imports of the modules that register tasks: shipped ones, and Python files or modules of the user's."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import pathlib
import sys
import traceback
from collections.abc import Iterator, Sequence

from inranker_jax import paths
from inranker_jax.errors import InputError, did_you_mean

_SHIPPED = "inranker_jax."


def import_task_modules(modules: Sequence[str]) -> None:
    """Imports modules that register tasks: by name (`inranker_jax.tasks.python_docs`) or as a file (`my.py`).

    A file may be in a store; a copy of it is imported.

    Raises:
      InputError: there is no such module or file, or a module of the user's raises an error, whose line is named.
    """
    for name in modules:
        if name.endswith(".py"):
            _import_file(name)
        elif name.startswith(_SHIPPED):
            _import_module(name)
        else:
            with _errors_located(name):
                _import_module(name)


def _import_module(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module is there; something that it imports is not
        shipped = importlib.import_module("inranker_jax.tasks")
        known = [
            f"inranker_jax.tasks.{path.stem}"
            for folder in shipped.__path__
            for path in sorted(pathlib.Path(folder).glob("*.py"))
            if not path.stem.startswith("_")
        ]
        raise _NoModuleError(
            f"no task module {name!r}.{did_you_mean(name, known)} Shipped: {', '.join(known)}. A module "
            "of your own must be importable (run in its folder, or install it), or be given as the path "
            "of its .py file."
        ) from error


class _NoModuleError(InputError):
    """The module is not there, so there is no line of it to name."""


def _import_file(name: str) -> None:
    path = paths.local_copy(name).resolve()
    if not path.is_file():
        raise InputError.at(name, None, "no such task module", "a Python file that registers SeqIO tasks")
    module_name = f"inranker_user_task_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if module_name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        with _errors_located(name):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise


@contextlib.contextmanager
def _errors_located(name: str) -> Iterator[None]:
    """Turns an error inside a task module into an InputError that names the innermost line of that module's file."""
    try:
        yield
    except _NoModuleError:
        raise
    except InputError as error:
        place, _ = _places(name, error)
        raise type(error)(f"{place}: {error}") from error
    except Exception as error:
        place, raised_at = _places(name, error)
        said = f"{error.msg}: {(error.text or '').strip()}" if isinstance(error, SyntaxError) else f"{error}"
        within = f" (raised at {raised_at})" if raised_at else ""
        again = f"python {paths.local_copy(name)}" if name.endswith(".py") else f"python -m {name}"
        raise InputError(
            f"{place}: {type(error).__name__}: {said.rstrip('. ')}{within}. Correct the task module; `{again}` shows "
            "the whole traceback."
        ) from error


def _places(name: str, error: Exception) -> tuple[str, str]:
    """Where the module's own file was, `file:line`, and where the error was raised if that is another file."""
    steps = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, contextlib.__file__, importlib.__file__)
        and not frame.filename.startswith("<frozen importlib")
    ]
    if isinstance(error, SyntaxError) and error.filename:  # a file that cannot be compiled has no frame
        steps.append((error.filename, error.lineno))
    if not steps:
        return name, ""
    own = steps[0][0]
    line = [line for file, line in steps if file == own][-1]
    raised_at = "" if steps[-1][0] == own else f"{steps[-1][0]}:{steps[-1][1]}"
    return f"{name if name.endswith('.py') else own}:{line}", raised_at
