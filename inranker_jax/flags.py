"""What the binaries share: a flag parser whose errors are `InputError`s, and one way to end a process."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

from inranker_jax import quiet
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.interruption import Interruption
from inranker_jax.progress import announce, cost


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations that raises `InputError`, with a suggestion for a misspelt flag."""

    def __init__(self, binary: str, description: str) -> None:
        super().__init__(prog=f"python -m inranker_jax.{binary}", description=description, allow_abbrev=False)

    def error(self, message: str) -> Any:
        raise InputError(f"{message}. See --help.")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parses a command line (`sys.argv[1:]` for None).

        Raises:
          InputError: an unknown flag, a missing one, or a value of the wrong type.
        """
        flags, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            raise InputError(
                f"unknown flag {name}.{did_you_mean(name, self._option_string_actions)} See --help."
            )
        return flags


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def commas(text: str) -> list[str]:
    """An argparse type: comma-separated names."""
    return [part.strip() for part in text.split(",") if part.strip()]


class Stopped(Exception):
    """A long job noticed a signal, and stopped after writing what it had. `run_main` turns it into a status."""


def run_main(work: Callable[[Interruption], int | None]) -> int:
    """Runs the work of a binary and returns its exit status.

    A first SIGTERM or Ctrl-C sets `interruption.requested`; the work looks at it between steps, and raises
    `Stopped`. A Ctrl-C after it kills.

    Args:
      work: called with the `Interruption`; returns an exit status, or None for 0.

    Returns:
      What `work` returned; 2 for an `InputError`, 130 or 143 after a signal.
    """
    started = time.perf_counter()
    quiet.without_a_tpu()
    with Interruption() as interruption:
        try:
            status = work(interruption)
        except InputError as error:
            announce(f"error: {error}")
            return error.exit_status
        except (Stopped, KeyboardInterrupt):
            announce("interrupted: what was finished is kept; run the same command to go on.")
            return interruption.exit_status if interruption.requested else 130
    announce(f"took {cost(time.perf_counter() - started)}")
    return status or 0
