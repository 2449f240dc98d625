"""A uniform sample of a corpus that is read as a stream, without replacement and with a seed."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from inranker_jax.query_generation.templates import words
from inranker_jax.records import Document


@dataclass(frozen=True)
class Sample:
    """The documents that were drawn: those whose draw is at most `threshold`.

    A document's draw depends on its id and the seed alone. So the sample does not depend on the order of the
    corpus, and a larger sample holds every smaller one: what was generated for 1000 documents serves 10,000.

    Attributes:
      seed: of the draw.
      threshold: the largest draw of the sample, 16 bytes (empty: no document was drawn).
      min_words: documents with fewer words are left out.
      documents: size of the corpus.
      long_enough: documents with at least `min_words` words.
      size: documents drawn.
    """

    seed: int
    threshold: bytes
    min_words: int
    documents: int
    long_enough: int
    size: int

    def __contains__(self, document: Document) -> bool:
        drawn = draw(self.seed, document.id) <= self.threshold
        return drawn and has_words(document.contents, self.min_words)


def draw(seed: int, document_id: str) -> bytes:
    """A document's place in the lottery: 16 bytes, uniform over ids, smallest first."""
    return hashlib.blake2b(
        document_id.encode(), digest_size=16, salt=b"inranker", key=str(seed).encode()
    ).digest()


def has_words(text: str, minimum: int) -> bool:
    """Whether a text has at least `minimum` words; usually its beginning tells."""
    return minimum <= 0 or len(words(text[: 64 * minimum])) > minimum or len(words(text)) >= minimum


def choose(
    documents: Iterable[Document],
    number: int | None,
    seed: int,
    min_words: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Sample:
    """Draws `number` documents of a stream, in memory that grows with the sample and not with the corpus.

    Args:
      documents: the corpus; every id once.
      number: how many (all that are long enough when there are fewer, or for None).
      seed: of the draw.
      min_words: documents with fewer words are left out.
      check: called now and then; may raise to stop.

    Returns:
      The sample, which tells in a second pass which documents it holds.
    """
    largest: list[int] = []  # a heap of negated draws, whose root is the largest draw kept
    count = long_enough = 0
    for count, document in enumerate(documents, start=1):
        if count % 1024 == 0:
            check()
        if not has_words(document.contents, min_words):
            continue
        long_enough += 1
        if number is None:
            continue
        value = -int.from_bytes(draw(seed, document.id), "big")
        if len(largest) < number:
            heapq.heappush(largest, value)
        elif value > largest[0]:
            heapq.heapreplace(largest, value)
    if number is None or long_enough <= number:
        return Sample(seed, b"\xff" * 16, min_words, count, long_enough, long_enough)
    threshold = (-largest[0]).to_bytes(16, "big")
    return Sample(seed, threshold, min_words, count, long_enough, len(largest))
