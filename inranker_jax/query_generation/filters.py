"""Which generated queries are worth training on. Each filter takes candidates in corpus order and keeps that order."""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from inranker_jax import paths
from inranker_jax.errors import InputError
from inranker_jax.query_generation.templates import words
from inranker_jax.records import PathType

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A generated query.

    Attributes:
      query_id: its id.
      document_id: the document that it was generated for.
      query: its text.
      mean_log_prob: mean natural-log probability of its tokens; None when unknown.
    """

    query_id: str
    document_id: str
    query: str
    mean_log_prob: float | None = None


def mean_log_prob(log_probs: Sequence[float] | None) -> float | None:
    """The mean log-probability of a token, by which InPars v1 ranks queries (Bonifacio et al., 2022, section 3)."""
    return sum(log_probs) / len(log_probs) if log_probs else None


def long_enough(query: str, min_tokens: int) -> bool:
    """Whether a query has at least `min_tokens` words (see `templates.words`)."""
    return len(words(query)) >= max(1, min_tokens)


def is_copied(query: str, document: str, overlap: float = 1.0) -> bool:
    """Whether a query is taken from its document word for word.

    Case, punctuation and blanks do not count. Words that occur apart from each other do not either: a good query
    shares words with its document, but not their sequence.

    Args:
      query: the query.
      document: what it was generated for.
      overlap: share of the query's words that must stand in the document one after another, in (0, 1].

    >>> text = "The Canadian Armed Forces. 1 The first mission started in Egypt."
    >>> is_copied("The first mission", text), is_copied("first Egypt mission", text)
    (True, False)
    >>> is_copied("when the first mission started", text), is_copied("when the first mission started", text, 0.8)
    (False, True)
    """
    wanted = words(query)
    length = max(1, -int(-overlap * len(wanted) // 1))
    if len(wanted) < length:
        return False
    return _contains_run(wanted, words(document), length)


def _contains_run(wanted: Sequence[str], there: Sequence[str], length: int) -> bool:
    """Whether some `length` successive words of one list are successive in the other."""
    runs = {tuple(wanted[i : i + length]) for i in range(len(wanted) - length + 1)}
    return any(tuple(there[i : i + length]) in runs for i in range(len(there) - length + 1))


def prompt_lines(lines: Iterable[str]) -> set[str]:
    """The lines of a prompt in the form in which `is_from_prompt` compares."""
    return {key for line in lines if (key := normalised(line))}


def is_from_prompt(query: str, lines: set[str]) -> bool:
    """Whether a query repeats a line of the prompt, such as the query of an example."""
    return normalised(query) in lines


def normalised(query: str) -> str:
    """The form in which two queries count as the same: their words, lower case."""
    return " ".join(words(query))


def drop_duplicates(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Keeps one candidate of those with the same words: the most probable, or else the first."""
    best: dict[str, tuple[float, int]] = {}
    for index, candidate in enumerate(candidates):
        value = float("-inf") if candidate.mean_log_prob is None else candidate.mean_log_prob
        key = normalised(candidate.query)
        if key not in best or value > best[key][0]:
            best[key] = (value, index)
    return [candidates[index] for index in sorted(index for _, index in best.values())]


def by_log_prob(candidates: Sequence[Candidate], top_k: int) -> list[Candidate]:
    """Keeps the `top_k` candidates of the highest mean log-probability (ties: the earlier in the corpus).

    Raises:
      InputError: a candidate has none.
    """
    unknown = [candidate for candidate in candidates if candidate.mean_log_prob is None]
    if unknown:
        raise InputError(
            f"--top_k={top_k} ranks by mean log-probability, and {len(unknown)} of {len(candidates)} queries have none "
            f"(such as that of document {unknown[0].document_id!r}): this generator gives no log-probabilities. Leave "
            "--top_k out, or rank by a teacher with --teacher_labels and --teacher_top_k."
        )
    return _highest(candidates, [candidate.mean_log_prob or 0.0 for candidate in candidates], top_k)


def by_teacher_score(
    candidates: Sequence[Candidate], scores: Mapping[Pair, float], top_k: int | None
) -> list[Candidate]:
    """Keeps the `top_k` candidates whose own document a teacher scores highest, as InPars v2 does with monoT5-3B.

    Args:
      candidates: in corpus order.
      scores: (query id, document id) -> score; candidates that are not in it are dropped.
      top_k: how many; None keeps all that have a score.

    Raises:
      InputError: not a single candidate has a score.
    """
    scored = [candidate for candidate in candidates if (candidate.query_id, candidate.document_id) in scores]
    if candidates and not scored:
        raise InputError(
            f"the teacher scored none of the {len(candidates)} queries with its own document (such as query "
            f"{candidates[0].query_id!r}). Expected labels, or a run, for the queries of this output."
        )
    values = [scores[candidate.query_id, candidate.document_id] for candidate in scored]
    return scored if top_k is None else _highest(scored, values, top_k)


def _highest(candidates: Sequence[Candidate], values: Sequence[float], top_k: int) -> list[Candidate]:
    chosen = heapq.nsmallest(top_k, range(len(candidates)), key=lambda index: (-values[index], index))
    return [candidates[index] for index in sorted(chosen)]


def read_teacher_scores(source: PathType, teacher: str | None, wanted: set[Pair]) -> dict[Pair, float]:
    """Reads a teacher's scores of (query, its own document) pairs.

    Args:
      source: a label folder (the score is the margin, logit of true minus logit of false) or a TREC run.
      teacher: which one of a label folder's teachers; None when there is one.
      wanted: the (query id, document id) pairs to keep.

    Raises:
      InputError: neither a label folder nor a run, an unknown teacher, or a malformed file.
    """
    found: dict[Pair, float] = {}
    if paths.of(source).is_dir():
        from inranker_jax.corpora.label_folder import read_labels

        # The texts are in the journal and the corpus: these stand-ins spare reading them again.
        texts = _AnyText()
        for pair in read_labels(source, teacher=teacher, queries=texts, documents=texts):
            if (pair.query_id, pair.document_id) in wanted:
                found[pair.query_id, pair.document_id] = pair.logits[1] - pair.logits[0]
        return found
    if teacher is not None:
        raise InputError(f"--teacher={teacher}: {source} is not a label folder; a TREC run has one teacher.")
    from inranker_jax.retrieval.runs import stream_run

    for query_id, documents in stream_run(source):
        for document_id, score in documents:
            if (query_id, document_id) in wanted:
                found[query_id, document_id] = score
    return found


def check_output(source: PathType, output: PathType) -> None:
    """Refuses to overwrite the queries that a label folder was made for: its labels would be of no file any more.

    Raises:
      InputError: `output` is the queries file of the label folder `source`.
    """
    path = paths.of(source) / "labels.json"
    if not path.is_file():
        return
    labelled = json.loads(paths.read(path)).get("queries", {}).get("path", "")
    named = paths.of(labelled if paths.is_remote(labelled) else os.path.join(source, labelled))
    if labelled and os.path.realpath(named) == os.path.realpath(output):
        raise InputError(
            f"--output={output} holds the queries that {source} labels, and would be overwritten with fewer. Choose "
            "another --output, and name the journal of this one with --journal."
        )


class _AnyText(Mapping[str, str]):
    """A mapping that knows every id, to an empty text."""

    def __getitem__(self, key: str) -> str:
        return ""

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 1

    def __contains__(self, key: object) -> bool:
        return True


@dataclass(frozen=True)
class FilterSettings:
    """Which filters run, in the order of these attributes.

    Attributes:
      min_query_tokens: fewest words of a query.
      copied_overlap: drop a query of which this share stands in its document word for word; None keeps copies.
      deduplicate: keep one of the queries with the same words.
      top_k: how many of the most probable queries to keep; None for all.
      teacher_scores: label folder or TREC run.
      teacher: which of a label folder's teachers.
      teacher_top_k: how many of the queries that the teacher scores highest to keep; None for all with a score.
    """

    min_query_tokens: int = 3
    copied_overlap: float | None = None
    deduplicate: bool = True
    top_k: int | None = None
    teacher_scores: str | None = None
    teacher: str | None = None
    teacher_top_k: int | None = None

    def __post_init__(self) -> None:
        if self.copied_overlap is not None and not 0 < self.copied_overlap <= 1:
            raise InputError(f"--copied_overlap={self.copied_overlap}: expected a share in (0, 1].")
        if self.teacher_scores is None and (self.teacher or self.teacher_top_k):
            raise InputError("--teacher and --teacher_top_k need --teacher_labels=LABEL_FOLDER_OR_RUN.")


def keep_or_reason(query: str, document: str, from_prompt: set[str], settings: FilterSettings) -> str:
    """Why one query is dropped on its own account ("empty", "short", "copied", "from_prompt"), or ""."""
    if not query:
        return "empty"
    if not long_enough(query, settings.min_query_tokens):
        return "short"
    if is_from_prompt(query, from_prompt):
        return "from_prompt"
    if settings.copied_overlap is not None and is_copied(query, document, settings.copied_overlap):
        return "copied"
    return ""


def keep_best(
    candidates: Sequence[Candidate], settings: FilterSettings, count: Callable[[str, int], None]
) -> list[Candidate]:
    """Runs the filters that compare queries with each other.

    Args:
      candidates: in corpus order.
      settings: which filters.
      count: told (reason, number dropped) after each filter.

    Raises:
      InputError: see the filters.
    """
    kept = list(candidates)

    def step(reason: str, remaining: list[Candidate]) -> None:
        nonlocal kept
        count(reason, len(kept) - len(remaining))
        kept = remaining

    if settings.deduplicate:
        step("duplicate", drop_duplicates(kept))
    if settings.top_k is not None:
        step("below_top_k", by_log_prob(kept, settings.top_k))
    if settings.teacher_scores is not None:
        wanted = {(candidate.query_id, candidate.document_id) for candidate in kept}
        scores = read_teacher_scores(settings.teacher_scores, settings.teacher, wanted)
        step("no_teacher_score", by_teacher_score(kept, scores, None))
        if settings.teacher_top_k is not None:
            step("below_teacher_top_k", by_teacher_score(kept, scores, settings.teacher_top_k))
    return kept
