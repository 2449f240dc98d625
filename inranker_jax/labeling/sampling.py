"""Samples the lists of a training set: per query one positive, and negatives from its top candidates.

As in the thesis (section 3.1): k negatives are drawn at random from the first N candidates of BM25 (9 from
1000). A document with the text of the positive, or of another document judged relevant, is no negative, nor is
a document that the list has already, under whatever id.

A list is a function of the query's id, its positives, its candidates, their texts, the seed and the settings,
and of nothing else: not of the other queries, the number of processes, or a library's random numbers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from inranker_jax.corpora.label_store import pair_key
from inranker_jax.errors import InputError

Candidates = Iterable[tuple[str, Sequence[tuple[str, float]]]]
_MAX_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Sampling:
    """How lists are sampled.

    Attributes:
      negatives: negatives of a list, k.
      depth: candidates that they are drawn from, N.
      seed: any whole number.
    """

    negatives: int = 9
    depth: int = 1000
    seed: int = 0

    def to_dict(self) -> dict[str, int]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Positives:
    """The documents that may be a query's positive.

    Attributes:
      of: query id -> document ids, each a candidate for the one positive.
      source: where they come from, for messages.
    """

    of: Mapping[str, Sequence[str]]
    source: str

    @classmethod
    def from_qrels(cls, qrels: Mapping[str, Mapping[str, int]], source: str) -> Positives:
        """Documents with a grade of at least 1."""
        return cls(
            {query: [doc for doc, grade in judged.items() if grade >= 1] for query, judged in qrels.items()},
            source,
        )


@dataclass
class SamplingReport:
    """What sampling met; queries that gave no list are counted, and the first few named.

    Attributes:
      counts: kind -> number. Kinds of queries without a list: `no_positive`, `positive_not_in_corpus`,
        `no_candidates` (not in the run), `no_negatives` (no candidate is left), `no_query_text`. Further:
        `short_lists` (fewer negatives than asked for, kept), `same_text_as_positive` and
        `same_text_in_list`, `empty_documents` (draws rejected), `unknown_documents` (candidates not in the
        corpus, left out).
      examples: kind -> the first few ids.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Counts one."""
        self.counts[kind] += 1
        known = self.examples.setdefault(kind, [])
        if len(known) < _MAX_EXAMPLES:
            known.append(example)

    def to_dict(self) -> dict[str, int]:
        """The counts, sorted by kind."""
        return dict(sorted(self.counts.items()))

    def lines(self) -> list[str]:
        """One line for each kind, for people."""
        return [
            f"{_WORDS[kind]}: {self.counts[kind]:,} (such as {', '.join(self.examples[kind])})"
            for kind in _WORDS
            if self.counts[kind]
        ]


_WORDS = {
    "no_positive": "queries of the run without a positive, left out",
    "no_query_text": "queries of the run without a text, left out",
    "no_candidates": "queries with a positive that the run does not have, left out",
    "positive_not_in_corpus": "queries whose positives are not in the corpus (or empty there), left out",
    "no_negatives": "queries without a candidate that could be a negative, left out",
    "short_lists": "lists with fewer negatives than asked for, kept",
    "same_text_as_positive": "draws rejected for having the text of a relevant document",
    "same_text_in_list": "draws rejected for having the text of a document in the list",
    "unknown_documents": "candidates that are not in the corpus, left out",
    "empty_documents": "draws rejected for having no text",
}


@dataclass(frozen=True, slots=True)
class SampledList:
    """The list of one query: document ids and keys of the pairs, the positive first."""

    query_id: str
    documents: tuple[tuple[str, bytes], ...]

    def rows(self) -> list[tuple[str, int, bytes]]:
        """(document id, relevance, key)."""
        return [(document, int(place == 0), key) for place, (document, key) in enumerate(self.documents)]


class Sampler:
    """Samples lists, and counts in `report` what it could not use."""

    def __init__(
        self,
        queries: Mapping[str, str],
        documents: Mapping[str, str],
        positives: Positives,
        sampling: Sampling,
        *,
        skip_unknown: bool = False,
    ) -> None:
        """Prepares sampling.

        Args:
          queries: query id -> text.
          documents: document id -> contents.
          positives: each query's positives.
          sampling: how.
          skip_unknown: leave candidates that are not in the corpus out, instead of raising.
        """
        self._queries, self._documents, self._positives = queries, documents, positives
        self._sampling, self._skip_unknown = sampling, skip_unknown
        self.report = SamplingReport()

    def lists(self, candidates: Candidates) -> Iterator[SampledList]:
        """Yields the lists in the order of the candidates.

        Args:
          candidates: (query id, [(document id, score), ...] best first), each query once.

        Raises:
          InputError: a candidate is not in the corpus (unless `skip_unknown`), or no list came of it all.
        """
        made, met = 0, set()
        for query_id, ranked in candidates:
            met.add(query_id)
            sampled = self.sample(query_id, [document for document, _ in ranked])
            if sampled is not None:
                made += 1
                yield sampled
        for query_id, own in self._positives.of.items():
            if own and query_id in self._queries and query_id not in met:
                self.report.add("no_candidates", query_id)
        if not made:
            found = "; ".join(self.report.lines()) or "the run is empty"
            raise InputError(
                f"no query has a list ({found}). Expected queries, their positives ({self._positives.source}) and "
                "candidates with the same query ids. Check that they belong together."
            )

    def sample(self, query_id: str, ranked: Sequence[str]) -> SampledList | None:
        """Samples one query's list from its candidates, best first; None when it can have none."""
        own = self._positives.of.get(query_id, ())
        if not own:
            self.report.add("no_positive", query_id)
            return None
        query = self._queries.get(query_id)
        if query is None:
            self.report.add("no_query_text", query_id)
            return None
        stream = _Draws(self._sampling.seed, query_id)
        in_corpus = sorted(
            document
            for document in set(own)
            if document in self._documents and self._documents[document].strip()
        )
        if not in_corpus:
            self.report.add("positive_not_in_corpus", query_id)
            return None
        positive = in_corpus[stream.below(len(in_corpus))]
        relevant = set(own)
        relevant_texts = {self._documents[document].strip() for document in in_corpus}
        pool = [document for document in ranked[: self._sampling.depth] if document not in relevant]
        chosen: list[tuple[str, str]] = []
        texts: set[str] = set()
        # An incremental Fisher-Yates shuffle: only documents that are drawn have their text read.
        for place in range(len(pool)):
            if len(chosen) == self._sampling.negatives:
                break
            other = place + stream.below(len(pool) - place)
            pool[place], pool[other] = pool[other], pool[place]
            text = self._text(query_id, pool[place])
            if text is None:
                continue
            if not text:
                self.report.add("empty_documents", pool[place])
            elif text in relevant_texts:
                self.report.add("same_text_as_positive", pool[place])
            elif text in texts:
                self.report.add("same_text_in_list", pool[place])
            else:
                texts.add(text)
                chosen.append((pool[place], text))
        if not chosen:
            self.report.add("no_negatives", query_id)
            return None
        if len(chosen) < self._sampling.negatives:
            self.report.add("short_lists", query_id)
        members = [(positive, self._documents[positive].strip()), *chosen]
        return SampledList(query_id, tuple((document, pair_key(query, text)) for document, text in members))

    def _text(self, query_id: str, document: str) -> str | None:
        try:
            return self._documents[document].strip()
        except KeyError:
            if not self._skip_unknown:
                raise InputError(
                    f"candidate {document!r} of query {query_id!r} is not in the corpus. Expected candidates of this "
                    "corpus. Check that --candidates and --corpus belong together, or leave such candidates out "
                    "with --skip_malformed."
                ) from None
            self.report.add("unknown_documents", document)
            return None


class _Draws:
    """Random whole numbers of a query: SHA-256 of seed, query id and a counter, the same wherever it runs."""

    def __init__(self, seed: int, query_id: str) -> None:
        self._start = hashlib.sha256(f"{seed}\0{query_id}\0".encode("utf-8", "surrogatepass"))
        self._count = 0

    def below(self, bound: int) -> int:
        """A number from 0 to bound - 1; its bias, below bound / 2**128, is of no matter."""
        digest = self._start.copy()
        digest.update(str(self._count).encode())
        self._count += 1
        return int.from_bytes(digest.digest()[:16], "big") % bound
