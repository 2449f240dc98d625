"""A key that can be sent, and that never shows: not in a message, a file or a traceback; nor in a URL."""

from __future__ import annotations

import os
import re
import urllib.parse

from inranker_jax.errors import InputError

REPLACEMENT = "[key]"
# Servers show parts of a refused key ("sk-ab...yz"); a run of this many of its characters is taken out as well.
_RUN = 6
# What a URL may carry after "?": Azure wants the version of its interface. Any other name could be a key's.
_QUERY = re.compile(r"api-version=[\w.-]{1,32}")
_EXPECTED = "--generator=openai:URL: expected a URL such as openai:http://localhost:8000/v1."


class Secret:
    """Holds an API key. `str` and `repr` show a placeholder; only `reveal` gives the key."""

    def __init__(self, value: str) -> None:
        self._reveal = lambda: value  # a closure, so that no dump of attributes shows it
        runs = {value[i : i + _RUN] for i in range(len(value) - _RUN + 1)} or {value}
        self._run = re.compile("(?=(" + "|".join(map(re.escape, sorted(runs))) + "))", re.IGNORECASE)

    def __repr__(self) -> str:
        return REPLACEMENT

    __str__ = __repr__

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a key is not written to files")

    def reveal(self) -> str:
        """The key itself."""
        return self._reveal()

    def hide(self, text: str) -> str:
        """A text of a server, for a message, without any six successive characters of the key.

        >>> Secret("sk-1234567890").hide("bad key sk-12345*****, see the manual")
        'bad key [key]*****, see the manual'
        """
        covered = bytearray(len(text))
        for match in self._run.finditer(text):
            start, stop = match.span(1)
            covered[start:stop] = b"\x01" * (stop - start)
        pieces = re.split(b"(\x01+)", bytes(covered))
        parts, start = [], 0
        for piece in pieces:
            parts.append(REPLACEMENT if piece.startswith(b"\x01") else text[start : start + len(piece)])
            start += len(piece)
        return "".join(parts)

    def hide_exact(self, text: str) -> str:
        """An answer of a model without the whole key. Placeholders for servers without keys ("EMPTY") may stay."""
        value = self.reveal()
        return text.replace(value, REPLACEMENT) if len(value) >= 8 else text


def read_key(variable: str | None, default: str = "OPENAI_API_KEY") -> Secret | None:
    """Reads the key from an environment variable.

    Args:
      variable: its name; for None, `default` is read where it is set (a server of one's own often needs no key).
      default: see above.

    Raises:
      InputError: the named variable is not set, or holds what is no key. The message shows neither the value nor
        the name, since people paste the key itself where its name belongs.
    """
    if variable is None and not os.environ.get(default, "").strip():
        return None
    value = os.environ.get(default if variable is None else variable, "").strip()
    if not value:
        raise InputError(
            "--api_key_env: no environment variable of that name is set. Expected the name of a variable that holds "
            f"the key, such as {default}, and not the key itself."
        )
    if not value.isascii() or not value.isprintable() or " " in value:
        raise InputError(
            f"the environment variable named by --api_key_env (default {default}) holds blanks, line breaks or "
            "letters that no HTTP header can hold. Expected the key alone."
        )
    return Secret(value)


def check_url(url: str) -> urllib.parse.SplitResult:
    """Splits an endpoint's URL, which goes into messages and files, and so must hold no key.

    Raises:
      InputError: not an http(s) URL, or one with a user name, a password, a fragment, or a query string other than
        `?api-version=...`. The message repeats nothing of the URL.
    """
    try:
        parts = urllib.parse.urlsplit(url.strip())
        _ = parts.port  # parsed here, so that a bad one is refused
    except ValueError:
        raise InputError(_EXPECTED) from None
    if "@" in parts.netloc:
        found = "a user name or password"
    elif parts.fragment or (parts.query and not _QUERY.fullmatch(parts.query)):
        found = "more than a path after the host (only ?api-version=... may follow it)"
    elif parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(_EXPECTED)
    else:
        return parts
    raise InputError(
        f"--generator=openai:URL: the URL holds {found}, which would end up in files. Give the key in an environment "
        "variable, with --api_key_env; --api_key_header names another header than Authorization."
    )
