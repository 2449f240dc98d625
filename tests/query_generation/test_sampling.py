"""Uniform, without replacement, the same for the same seed, in memory of the sample's size."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator

from inranker_jax.query_generation import sampling
from inranker_jax.records import Document


def documents(number: int, text: str = "one two three four") -> list[Document]:
    return [Document(f"d{i}", text) for i in range(number)]


def ids(corpus: list[Document], number: int | None, seed: int, min_words: int = 0) -> list[str]:
    sample = sampling.choose(corpus, number, seed, min_words)
    chosen = [document.id for document in corpus if document in sample]
    assert sample.size == len(chosen)
    return chosen


def test_size_and_order() -> None:
    corpus = documents(500)
    chosen = ids(corpus, 100, seed=3)
    assert len(chosen) == len(set(chosen)) == 100
    assert chosen == sorted(chosen, key=lambda name: int(name[1:]))


def test_does_not_depend_on_the_order_of_the_corpus() -> None:
    corpus = documents(300)
    shuffled = random.Random(0).sample(corpus, 300)
    assert set(ids(corpus, 50, 0)) == set(ids(shuffled, 50, 0))
    assert set(ids(corpus, 50, 0)) != set(ids(corpus, 50, 1))


def test_a_larger_sample_holds_a_smaller_one() -> None:
    corpus = documents(300)
    assert set(ids(corpus, 20, 7)) < set(ids(corpus, 100, 7)) < set(ids(corpus, None, 7))


def test_uniform() -> None:
    """Each of 20 documents is drawn in a quarter of 2000 samples of 5; four standard deviations are allowed."""
    corpus = documents(20)
    counts = Counter(name for seed in range(2000) for name in ids(corpus, 5, seed))
    deviation = (2000 * 0.25 * 0.75) ** 0.5
    assert len(counts) == 20
    assert all(abs(count - 500) < 4 * deviation for count in counts.values())


def test_fewer_documents_than_asked_for() -> None:
    corpus = documents(4)
    assert ids(corpus, 10, 0) == ids(corpus, 4, 0) == ids(corpus, None, 0) == ["d0", "d1", "d2", "d3"]
    assert sampling.choose([], 10, 0).size == 0


def test_short_documents_are_left_out() -> None:
    corpus = [
        Document("a", "one two"),
        Document("b", "x", "a title"),
        Document("c", ""),
        Document("d", "東京都"),
    ]
    assert ids(corpus, 10, 0, min_words=3) == ["b", "d"]
    sample = sampling.choose(corpus, 1, 0, 3)
    assert (sample.documents, sample.long_enough, sample.size) == (4, 2, 1)


def test_words_far_into_a_document_count() -> None:
    assert sampling.has_words("-" * 10_000 + " one two three", 3)
    assert not sampling.has_words("-" * 10_000 + " one two", 3)


def test_memory_does_not_grow_with_the_corpus() -> None:
    def stream(number: int) -> Iterator[Document]:
        for index in range(number):
            yield Document(str(index), f"{index} " * 50)

    peaks = []
    for number in (2_000, 40_000):
        tracemalloc.start()
        sampling.choose(stream(number), 500, 0, 3)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000
