"""Errors that tell the user where, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from os import PathLike


class InputError(ValueError):
    """Bad input from a user: a file, a flag, a name or an array. The message names the place and the remedy.

    Attributes:
      exit_status: of a command that ends with it.
    """

    exit_status = 2

    @classmethod
    def at(
        cls, path: str | PathLike[str], line: int | None, problem: str, expected: str = "", remedy: str = ""
    ) -> InputError:
        """Builds the error for one place in a file.

        Args:
          path: the file.
          line: line number from 1, or None when the whole file is meant.
          problem: what is wrong there.
          expected: what a correct line looks like.
          remedy: what the user can do.

        Returns:
          The error, to be raised by the caller.
        """
        place = f"{path}:{line}" if line is not None else f"{path}"
        parts = [f"{place}: {problem}."]
        if expected:
            parts.append(f"Expected {expected}.")
        if remedy:
            parts.append(remedy if remedy.endswith(".") else f"{remedy}.")
        return cls(" ".join(parts))


class PeersError(InputError):
    """The other processes were not reached in time. Another try may find them, and launchers make one at 75."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Suggests the closest of `options` to a misspelt `name`: `" Did you mean 'x'?"`, or an empty string."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
