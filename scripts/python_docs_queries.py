"""Queries, splits and negatives of the embedded collection (used by build_python_docs.py).

Every random choice is drawn from a generator seeded with the collection's seed and the id of the passage or
query it belongs to, so that one changed docstring does not reshuffle the others.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from python_docs_text import Passage, normal, words

HELD_OUT_WORDS = range(4, 21)  # length of a held-out query
TRAIN_WORDS = range(3, 26)
STOPWORDS = frozenset(
    """
    a an and are as at be been but by can do does for from has have if in into is it its may no not of
    on or should such that the their then there these they this to was were when which will with you
    your
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class MadeQuery:
    """A query and the passage it was made from.

    Attributes:
      id: `<passage id>?<kind>`.
      text: the query.
      kind: `summary` (written by people: the docstring's summary line, which the passage does not hold), or
        synthetic: `sentence` (a sentence the passage holds), `keywords` (3 to 6 words of the passage in its
        order) and `name` (the qualified name in words).
      passage_id: the positive.
      split: `train`, `dev` or `test`; dev and test queries are of the kind `summary`.
    """

    id: str
    text: str
    kind: str
    passage_id: str
    split: str


def generator(seed: int, *names: str) -> random.Random:
    """A generator for one decision, independent of every other."""
    return random.Random(":".join((str(seed), *names)))


def hold_out(passages: Sequence[Passage], tests: int, devs: int, seed: int) -> dict[str, str]:
    """Chooses the held-out passages.

    Eligible are docstrings of one passage whose summary line has 4 to 20 words and occurs nowhere else in the
    collection: not as another summary, and not as a sentence of any passage.

    Returns:
      passage id -> `test` or `dev`.
    """
    seen: Counter[str] = Counter()
    for passage in passages:
        seen.update({normal(passage.summary)} if passage.summary else set())
        for sentence in passage.sentences:
            seen.update({normal(sentence), normal(sentence.partition(": ")[2])})
    eligible = [
        passage.id
        for passage in passages
        if passage.single
        and not passage.summary.endswith(":")
        and len(words(passage.summary)) in HELD_OUT_WORDS
        and seen[normal(passage.summary)] == 1
    ]
    chosen = generator(seed, "hold out").sample(sorted(eligible), tests + devs)
    return {identifier: "test" if n < tests else "dev" for n, identifier in enumerate(chosen)}


def _keywords(passage: Passage, seed: int) -> str:
    found = [
        word for word in words(f"{passage.title} {passage.text}") if len(word) > 2 and word not in STOPWORDS
    ]
    distinct = list(dict.fromkeys(found))
    rng = generator(seed, passage.id, "keywords")
    size = min(len(distinct), rng.randint(3, 6))
    return " ".join(distinct[n] for n in sorted(rng.sample(range(len(distinct)), size)))


def _sentence(passage: Passage, seed: int) -> str:
    # A line of a `members` passage is "name: sentence".
    lines = [line.partition(": ")[2] if passage.kind == "members" else line for line in passage.sentences]
    usable = [line for line in lines if 5 <= len(words(line)) <= 20]
    return generator(seed, passage.id, "sentence").choice(usable) if usable else ""


def make_queries(passages: Sequence[Passage], held_out: Mapping[str, str], seed: int) -> list[MadeQuery]:
    """Makes all queries; texts are distinct, and a held-out passage yields its summary line only."""
    made: list[MadeQuery] = []
    taken = {normal(passage.summary) for passage in passages if passage.id in held_out}
    summaries = Counter(normal(passage.summary) for passage in passages)

    def add(passage: Passage, kind: str, text: str) -> None:
        key = normal(text)
        if len(key.split()) in TRAIN_WORDS and key not in taken and not text.endswith(":"):
            taken.add(key)
            made.append(MadeQuery(f"{passage.id}?{kind}", text, kind, passage.id, "train"))

    for passage in passages:
        split = held_out.get(passage.id)
        if split:
            made.append(MadeQuery(f"{passage.id}?summary", passage.summary, "summary", passage.id, split))
        elif summaries[normal(passage.summary)] <= 3:  # "Emit a record." says too little to be a query
            add(passage, "summary", passage.summary)
    trainable = [passage for passage in passages if passage.id not in held_out]
    for kind, text_of in (("sentence", _sentence), ("keywords", _keywords)):
        for passage in trainable:
            add(passage, kind, text_of(passage, seed))
    for passage in trainable:
        if passage.kind == "docstring" and "#" not in passage.id:
            add(passage, "name", passage.title)
    return made


def sample_negatives(
    query: MadeQuery,
    hits: Mapping[str, float],
    passages: Mapping[str, Passage],
    count: int,
    depth: int,
    seed: int,
) -> list[str]:
    """Draws negatives from the BM25 top `depth`, and from the whole collection where BM25 finds too few.

    A passage is drawn with a probability in proportion to 1 / rank, without replacement: about three of nine
    from the top 10, three from ranks 11 to 100, three from below. A student that starts from nothing has to
    learn that words match at all before it can tell near matches apart. Left out are the positive, other
    parts of its docstring, and every passage whose summary line is the query.

    Args:
      query: the query.
      hits: passage id -> BM25 score, best first.
      passages: id -> passage.
      count: negatives a query.
      depth: how far down the BM25 ranking they may come from.
      seed: the collection's seed.
    """
    source, text = passages[query.passage_id].source, normal(query.text)

    def allowed(identifier: str) -> bool:
        passage = passages[identifier]
        return passage.source != source and normal(passage.summary) != text

    pool = [identifier for identifier in list(hits)[:depth] if allowed(identifier)]
    rng = generator(seed, query.id, "negatives")
    # The smallest of exponential variables with rates 1 / rank (Efraimidis and Spirakis, 2006).
    clocks = sorted((-math.log(1.0 - rng.random()) * rank, name) for rank, name in enumerate(pool, start=1))
    chosen = [name for _, name in clocks[:count]]
    everything = sorted(passages)
    while len(chosen) < count:
        identifier = rng.choice(everything)
        if allowed(identifier) and identifier not in chosen:
            chosen.append(identifier)
    return chosen
