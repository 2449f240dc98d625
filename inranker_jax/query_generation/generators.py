"""What writes the queries: the interface, the fallback without a language model, and the choice by name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.query_generation.templates import words
from inranker_jax.records import Document

KINDS = ("openai", "local", "title")
TITLE_NAME = "title (no language model)"
_MAX_TITLE_WORDS = 64
# A sentence ends at its mark, which in scripts with blanks is followed by one ("e.g." and "3.5" do not end one).
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+(?=[^\sa-z])|(?<=[。！？])|\n\s*\n")

# Of Markdown: "## Heading", which may be closed as well, "## Heading ##". "#1" and "#jax" are words.
_HEADING_MARKS = re.compile(r"(?:#+\s+)+")
_CLOSING_MARKS = re.compile(r"\s+#*\s*$")


@dataclass(frozen=True, slots=True)
class Request:
    """A document and its prompt."""

    document: Document
    prompt: str


@dataclass(frozen=True, slots=True)
class Generation:
    """A generator's answer for one document.

    Attributes:
      document_id: of the request.
      query: the first line of the answer, without blanks around it; may be empty.
      log_probs: natural-log probability of each token of the query; None when the generator gives none.
      finish: "stop", or "length" when the answer was cut at the largest number of new tokens.
      prompt_tokens, completion_tokens: as the generator counts them.
      attempts: how often it was asked.
      estimated: whether the token counts are estimates.
      error: why there is no answer, or "".
    """

    document_id: str
    query: str
    log_probs: tuple[float, ...] | None = None
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 1
    estimated: bool = False
    error: str = ""


class Generator(Protocol):
    """Writes queries.

    Attributes:
      name: goes into every row of the output.
      identity: what decides its answers, as JSON; a journal of another identity is not continued.
      prompted: whether it reads the prompt.
    """

    name: str
    identity: dict[str, Any]
    prompted: bool

    def cut(self, text: str, limit: int) -> str:
        """Cuts a document after `limit` tokens."""
        ...

    def generate(self, requests: Iterable[Request], stop: Callable[[], bool]) -> Iterator[list[Generation]]:
        """Yields one answer for each request, in any order, in lists of those that are ready together.

        Once `stop()` is true it takes no further request.
        """
        ...

    def close(self) -> None:
        """Frees what the generator holds."""
        ...


@dataclass
class TitleGenerator:
    """No language model: the title of a document is its query, or else its first sentence.

    Such queries repeat the document's own words, so a student learns less from them than from written ones.
    """

    name: str = TITLE_NAME
    identity: dict[str, Any] = field(default_factory=lambda: {"kind": "title"})
    prompted: bool = False

    def cut(self, text: str, limit: int) -> str:
        """The whole text: there is no prompt."""
        return text

    def generate(self, requests: Iterable[Request], stop: Callable[[], bool]) -> Iterator[list[Generation]]:
        """Yields the answers in the order of the requests."""
        remaining = iter(requests)
        while not stop() and (batch := list(itertools.islice(remaining, 1000))):
            yield [Generation(item.document.id, title_query(item.document), attempts=0) for item in batch]

    def close(self) -> None:
        """Nothing to free."""


def title_query(document: Document) -> str:
    """A document's title, or else its first sentence or Markdown heading, of at most 64 words.

    >>> title_query(Document("1", "BM25 ranks. It is old.")), title_query(Document("1", "Text.", "Its title"))
    ('BM25 ranks.', 'Its title')
    >>> title_query(Document("1", "## 1. Ranking\\nBM25 ranks."))
    '1. Ranking'
    """
    text = document.title.strip() or document.text.strip()
    if marks := _HEADING_MARKS.match(text):
        text = _CLOSING_MARKS.sub("", text[marks.end() :].split("\n", 1)[0])
    elif not document.title.strip():
        text = _SENTENCE_END.split(text, maxsplit=1)[0]
    parts = text.split()
    if len(parts) > _MAX_TITLE_WORDS:
        parts = parts[:_MAX_TITLE_WORDS]
    elif len(parts) == 1 and len(words(text)) > 4 * _MAX_TITLE_WORDS:  # a script without blanks, no full stop
        return text[: 4 * _MAX_TITLE_WORDS]
    return " ".join(parts)


def split_spec(spec: str) -> tuple[str, str]:
    """Splits `--generator`: ("openai", URL), ("local", model) or ("title", "").

    Raises:
      InputError: another kind, or no URL or model.
    """
    kind, _, rest = spec.partition(":")
    if kind in ("http", "https"):
        raise InputError(f"--generator={kind}:...: expected openai:URL. Write --generator=openai:{kind}:...")
    if kind not in KINDS:
        raise InputError(
            f"--generator: no kind {kind!r}.{did_you_mean(kind, KINDS)} Expected openai:URL, local:PATH_OR_HUB_NAME "
            "or title."
        )
    if kind == "title" and rest:
        raise InputError("--generator=title takes nothing after it.")
    if kind != "title" and not rest:
        raise InputError(
            f"--generator={kind}: expected {kind}:{'URL' if kind == 'openai' else 'PATH_OR_HUB_NAME'}."
        )
    return kind, rest


def first_line(text: str) -> str:
    """What a query is: the text up to its first line break, without blanks around it or control characters."""
    line = text.split("\n", 1)[0]
    return " ".join("".join(c if c.isprintable() else " " for c in line).split())
