"""Errors that tell the user where, what was expected, and what to do."""

from __future__ import annotations

import difflib
import json
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

        >>> print(InputError.at("a.jsonl", 3, "no 'text'; did you mean 'txt'?", "a string"))
        a.jsonl:3: no 'text'; did you mean 'txt'? Expected a string.
        """
        place = f"{path}:{line}" if line is not None else f"{path}"
        parts = [f"{place}: {problem}", f"Expected {expected}" if expected else "", remedy]
        return cls(" ".join(sentence(part) for part in parts if part))


class PeersError(InputError):
    """The other processes were not reached in time. Another try may find them, and launchers make one at 75."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h


def sentence(text: str) -> str:
    """Ends words with a full stop, unless they end as a sentence does.

    >>> sentence("Check the path"), sentence("Did you mean 'run.trec'?")
    ('Check the path.', "Did you mean 'run.trec'?")
    """
    return text if text.endswith((".", "?")) else f"{text}."


def json_problem(error: json.JSONDecodeError) -> str:
    """What is wrong with one line of JSON, and where in it.

    >>> try: json.loads('{"a": "b')
    ... except json.JSONDecodeError as error: print(json_problem(error))
    not JSON (Unterminated string starting at column 7)
    """
    return f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno})"


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Suggests the closest of `options` to a misspelt `name`: `" Did you mean 'x'?"`, or an empty string."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
