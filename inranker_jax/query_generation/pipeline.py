"""From a corpus to a file of synthetic queries: sample, ask, journal, filter, write."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from inranker_jax import records
from inranker_jax.corpora import Corpus
from inranker_jax.corpora.inpars import query_id
from inranker_jax.errors import InputError
from inranker_jax.paths import absolute, check_reachable, of
from inranker_jax.progress import announce, clock
from inranker_jax.query_generation import filters, sampling
from inranker_jax.query_generation.budget import Budget
from inranker_jax.query_generation.filters import Candidate, FilterSettings
from inranker_jax.query_generation.generators import Generation, Generator, Request
from inranker_jax.query_generation.journal import Journal, Spent, prompt_key
from inranker_jax.query_generation.templates import Template
from inranker_jax.records import Document

REPORT_FORMAT = 1
_PROGRESS_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to generate.

    Attributes:
      num_documents: how many documents get a query; None for all.
      seed: of the sample.
      min_document_words: documents with fewer words get none.
      document_tokens: where a document is cut for the prompt.
      filters: which queries are written.
      max_failures: documents without an answer before the run gives up.
    """

    num_documents: int | None = 100_000
    seed: int = 0
    min_document_words: int = 3
    document_tokens: int = 256
    filters: FilterSettings = dataclasses.field(default_factory=FilterSettings)
    max_failures: int = 10


@dataclasses.dataclass(frozen=True)
class Paths:
    """The files of a run.

    Attributes:
      output: the queries, InPars-compatible JSONL (`.jsonl` or `.jsonl.gz`).
      journal: every answer, before filters.
      report: counts and cost.
    """

    output: Any
    journal: Any
    report: Any

    @classmethod
    def beside(cls, output: str, journal: str | None = None) -> Paths:
        """`queries.jsonl`, `queries.generated.jsonl`, `queries.report.json`.

        Raises:
          InputError: the output is not named `.jsonl` or `.jsonl.gz`, or its bucket cannot be reached.
        """
        check_reachable(output)
        stem = output.removesuffix(".gz")
        if not stem.endswith(".jsonl"):
            raise InputError(f"--output={output}: expected a name that ends with .jsonl or .jsonl.gz.")
        stem = stem.removesuffix(".jsonl")
        own = of(journal or f"{stem}.generated.jsonl")
        if absolute(own) == absolute(output):
            raise InputError(f"--journal={journal} is the file of --output; expected two files.")
        return cls(of(output), own, of(f"{stem}.report.json"))


@dataclasses.dataclass
class Outcome:
    """What a run did.

    Attributes:
      complete: every document of the sample has an answer; otherwise the output lacks some queries.
      written: queries in the output.
      counts: of documents and queries, by what became of them.
      spent: over all sessions of the journal.
      stopped: why the run ended before its end, or "".
    """

    complete: bool
    written: int
    counts: dict[str, Any]
    spent: Spent
    stopped: str = ""


def run(
    corpus: Corpus,
    template: Template,
    open_generator: Callable[[Budget], Generator],
    paths: Paths,
    settings: Settings,
    budget: Budget,
    stop: Callable[[], bool] = lambda: False,
    interrupt: type[Exception] = InterruptedError,
) -> Outcome:
    """Generates what the journal lacks, then filters and writes everything.

    The queries are written in the order of the corpus, whatever the order in which they were answered.

    Args:
      corpus: streamed four times (to sample, to ask, to filter, to write), and its bytes once for the fingerprint;
        never held in memory.
      template: the prompt.
      open_generator: called with the budget, before the corpus is read.
      paths: where things go.
      settings: see there.
      budget: what may be spent over all sessions.
      stop: whether a signal arrived; looked at all the time.
      interrupt: raised when `stop()` said so. What was answered is in the journal by then.

    Raises:
      InputError: bad input, or a generator that refuses or fails too often.
    """
    started = time.monotonic()

    def check() -> None:
        if stop():
            raise interrupt

    # First what fails soonest: a corpus can take minutes to read.
    if settings.filters.teacher_scores is not None:
        filters.check_output(settings.filters.teacher_scores, paths.output)
    generator = open_generator(budget)
    try:
        sample = _choose(corpus, settings, check)
        identity = dict(generator.identity)
        if generator.prompted:
            identity["prompt"] = os.path.basename(template.name)
            identity["prompt_fingerprint"] = template.fingerprint
            identity["document_tokens"] = settings.document_tokens
        with Journal.open(paths.journal, identity) as journal:
            if journal.dropped_bytes:
                announce(f"{paths.journal}: dropped a torn last line ({journal.dropped_bytes} bytes)")
            budget.spent = journal.spent
            work = _Work(corpus, template, generator, journal, settings, budget, sample)
            stopped = work.generate(stop)
            check()
            outcome = work.write(paths.output, stopped, check)
            report = work.report(outcome, identity, time.monotonic() - started)
    finally:
        generator.close()
    with records.atomic_text(paths.report) as file:
        json.dump(report, file, indent=1, ensure_ascii=False)
        file.write("\n")
    return outcome


def _choose(corpus: Corpus, settings: Settings, check: Callable[[], None]) -> sampling.Sample:
    sample = sampling.choose(
        corpus.documents(), settings.num_documents, settings.seed, settings.min_document_words, check
    )
    if not sample.size:
        raise InputError.at(
            corpus.path, None, f"none of the {sample.documents} documents has {settings.min_document_words} words",
            remedy="Lower --min_document_words",
        )  # fmt: skip
    announce(f"{corpus.path}: {sample.documents} documents, {sample.size} of them get a query")
    return sample


@dataclasses.dataclass
class _Work:
    corpus: Corpus
    template: Template
    generator: Generator
    journal: Journal
    settings: Settings
    budget: Budget
    sample: sampling.Sample

    def _prompt(self, document: Document) -> str:
        if not self.generator.prompted:
            return f"{document.title}\n{document.text}"
        # A megabyte of one document is not tokenised for its first 256 tokens.
        text = " ".join(document.contents[: 64 * self.settings.document_tokens].split())
        return self.template.render(self.generator.cut(text, self.settings.document_tokens))

    def _sampled(self) -> Iterator[tuple[Document, str]]:
        for document in self.corpus.documents():
            if document in self.sample:
                yield document, self._prompt(document)

    def generate(self, stop: Callable[[], bool]) -> str:
        """Asks for what is missing; returns why it ended early, or ""."""
        total = self.sample.size
        keys: dict[str, str] = {}
        progress = _Progress(total, self.budget)

        def missing() -> Iterator[Request]:
            failed_before: list[Request] = []
            for document, prompt in self._sampled():
                if stop():
                    return
                key = prompt_key(prompt)
                if self.journal.has(document.id, key):
                    progress.known += 1
                    continue
                keys[document.id] = key
                if document.id in self.journal.failed:
                    failed_before.append(Request(document, prompt))
                else:
                    yield Request(document, prompt)
            # Last, so that documents which fail again and again keep no other from being asked. They are as few as
            # `max_failures` a session.
            yield from failed_before

        failures = 0
        for answers in self.generator.generate(missing(), stop):
            self.journal.add([(keys.pop(answer.document_id), answer) for answer in answers])
            failed = [answer for answer in answers if answer.error]
            failures += 0 if self.budget.exhausted else len(failed)
            progress.add(len(answers) - len(failed), len(failed))
            if failed and failures > self.settings.max_failures:
                never = "" if self.journal.spent.answers else "None ever got one: check --model and --api. "
                raise InputError(
                    f"{failures} documents got no answer; the last was {failed[-1].document_id!r}: {failed[-1].error}. "
                    f"{never}What was answered is kept. Run the same command again once the generator is well, or "
                    "raise --max_failures to leave such documents out."
                )
        progress.show()
        if self.budget.exhausted:
            text = f"the budget of {self.budget.exhausted} is spent"
            announce(f"{text}: {progress.known + progress.done} of {total} documents have an answer.")
            return text
        return ""

    def write(self, output: Any, stopped: str, check: Callable[[], None]) -> Outcome:
        """Filters what the journal holds for the sample, and writes the queries."""
        counts: Counter[str] = Counter()
        lines = filters.prompt_lines(self.template.example_queries())
        candidates: list[Candidate] = []
        unanswered = 0
        for document, prompt in self._sampled():
            check()
            if not self.journal.has(document.id, prompt_key(prompt)):
                unanswered += 1
                continue
            answer = self.journal.answers[document.id][1]
            counts["cut_at_max_new_tokens"] += answer.finish == "length"
            reason = filters.keep_or_reason(answer.query, document.contents, lines, self.settings.filters)
            if reason:
                counts[f"dropped_{reason}"] += 1
                continue
            mean = filters.mean_log_prob(answer.log_probs)
            candidates.append(Candidate(query_id(document.id, answer.query), document.id, answer.query, mean))

        def count(reason: str, number: int) -> None:
            counts[f"dropped_{reason}"] += number

        answered = self.sample.size - unanswered
        kept = {
            item.document_id: item for item in filters.keep_best(candidates, self.settings.filters, count)
        }
        with records.atomic_text(output) as file:
            for document, prompt in self._sampled():
                check()
                if (item := kept.get(document.id)) is not None:
                    row = self._row(document, prompt, item, self.journal.answers[document.id][1])
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        totals: dict[str, Any] = {
            "documents": self.sample.documents,
            "too_short": self.sample.documents - self.sample.long_enough,
            "sampled": self.sample.size,
            "answered": answered,
            "unanswered": unanswered,
            **dict(sorted(counts.items())),
            "written": len(kept),
        }
        return Outcome(not unanswered, len(kept), totals, self.journal.spent, stopped)

    def _row(self, document: Document, prompt: str, item: Candidate, answer: Generation) -> dict[str, Any]:
        examples = [example.document_id for example in self.template.examples if example.document_id]
        return {
            "doc_id": document.id,
            "text": document.contents,
            "query": item.query,
            "log_probs": list(answer.log_probs or ()),
            "prompt_text": prompt if self.generator.prompted else "",
            "fewshot_examples": examples if self.generator.prompted else [],
            "query_id": item.query_id,
            "generator": self.generator.name,
        }

    def report(self, outcome: Outcome, identity: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The report as JSON. It is made of named settings alone: no command line, no header, no environment."""
        settings = dataclasses.asdict(self.settings)
        chosen = settings.pop("filters")
        spent = outcome.spent
        return {
            "format": REPORT_FORMAT,
            "complete": outcome.complete,
            "stopped": outcome.stopped,
            "generator": self.generator.name,
            "identity": dict(identity),
            "settings": settings,
            "filters": chosen,
            "corpus": {
                "path": self.corpus.path,
                "format": self.corpus.format,
                "fingerprint": self.corpus.fingerprint(),
                "malformed": dict(sorted(self.corpus.report.counts.items())),
            },
            "counts": outcome.counts,
            "failed": dict(sorted(self.journal.failed.items())[:100]),
            "cost": {
                "requests": spent.requests,
                "prompt_tokens": spent.prompt_tokens,
                "completion_tokens": spent.completion_tokens,
                "estimated": spent.estimated,
                "usd": spent.usd(self.budget.prices),
                "seconds_of_this_session": round(seconds, 1),
            },
        }


class _Progress:
    """A line now and then: how many, how fast, how long yet, what it cost."""

    def __init__(self, total: int, budget: Budget) -> None:
        self._total, self._budget = total, budget
        self._started = self._shown = time.monotonic()
        self.known = self.done = self.failed = 0

    def add(self, done: int, failed: int) -> None:
        """Counts answers, and shows a line when the last one is some seconds old."""
        self.done += done
        self.failed += failed
        if time.monotonic() - self._shown >= _PROGRESS_SECONDS:
            self.show()

    def show(self) -> None:
        """Shows the line."""
        now = time.monotonic()
        self._shown = now
        finished = self.known + self.done
        rate = self.done / max(1e-9, now - self._started)
        parts = [f"{finished}/{self._total} documents"]
        if self.known:
            parts.append(f"{self.known} known before")
        if self.done:
            parts += [f"{rate:.1f} queries/s", f"{clock((self._total - finished) / rate)} left"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        spent = self._budget.spent
        if spent.tokens:
            parts.append(f"{spent.tokens} tokens{' (estimated)' if spent.estimated else ''}")
        usd = spent.usd(self._budget.prices)
        if usd is not None:
            parts.append(f"${usd:.2f}")
        announce("  ".join(parts))
