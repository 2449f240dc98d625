"""Retrieval as a job: a corpus and queries in, a TREC run out, restartable; or somebody's run made fit for use."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from inranker_jax import paths, records
from inranker_jax.corpora import Corpus, QuerySet
from inranker_jax.errors import InputError
from inranker_jax.flags import Stopped
from inranker_jax.progress import announce, clock
from inranker_jax.records import PathType
from inranker_jax.retrieval import index_files, outputs, runs
from inranker_jax.retrieval.bm25 import BM25Index
from inranker_jax.retrieval.outputs import Output, RunSummary
from inranker_jax.retrieval.words import STOP_WORDS, check_language

_SECONDS_BETWEEN_LINES = 10.0
_LARGEST = float(np.finfo(np.float32).max)

# Returns whether the job should end now; what it has is kept.
Stop = Callable[[], bool]


def available_threads() -> int:
    """How many threads this process may run at once."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def retrieve(
    corpus: Corpus,
    queries: QuerySet,
    output: PathType,
    *,
    depth: int = 1000,
    language: str = "english",
    k1: float = 0.9,
    b: float = 0.4,
    tag: str = "bm25",
    index: PathType | None = None,
    threads: int | None = None,
    stop: Stop = lambda: False,
) -> RunSummary:
    """Writes the best BM25 candidates of every query as a TREC run, queries in their order.

    Finished queries are kept in `OUTPUT.parts/`, a part at a time, until the run is whole; the same call after
    an interruption goes on there. `OUTPUT.json` beside the run tells what it was made of; with it, the same call
    on a finished run does nothing.

    Args:
      corpus: the documents.
      queries: the queries.
      output: a file, here or remote; compressed when it ends with `.gz`.
      depth: how many candidates a query gets at most.
      language: one of `retrieval.LANGUAGES`.
      k1: term frequency saturation.
      b: length normalisation.
      tag: the last column of the run.
      index: folder to keep the index in, here or remote, opened if it is there, built otherwise; None builds it in
        memory.
      threads: how many queries are searched at a time, all processors by default. The run does not depend on it.
      stop: asked between steps.

    Returns:
      What the run holds.

    Raises:
      Stopped: `stop` said so.
      InputError: bad input, an `output` or `index` that was made of something else, or another process that is
        making the same one.
    """
    check_language(language)
    _check_token("--tag", tag)
    if threads is None:
        threads = available_threads()
    identity = {
        **queries.identity(),
        "depth": depth,
        "tag": tag,
        **index_files.identity_of(corpus.identity(), language, k1, b),
    }
    place = Output(output, identity)
    finished = place.finished()
    if finished is not None:
        announce(f"{place.path} is whole already, and was made of the same.")
        return finished
    with place.alone():
        place.start()
        seconds = {}
        try:
            count = sum(1 for _ in queries.queries())
            if place.parts_done() < outputs.parts_of(count):
                if language not in STOP_WORDS and language != "none":
                    announce(f"No list of stop words is known for {language!r}: every word counts.")
                started = time.perf_counter()
                searcher = open_index(corpus, index, language, k1, b, stop)
                seconds["index"] = time.perf_counter() - started
                started = time.perf_counter()
                _search(searcher, queries, count, place, depth, tag, threads, stop)
                seconds["search"] = time.perf_counter() - started
            return place.join(count, seconds)
        except InputError:
            if not place.parts_done():
                place.discard()
            raise


def open_index(
    corpus: Corpus, folder: PathType | None, language: str, k1: float, b: float, stop: Stop = lambda: False
) -> BM25Index:
    """Opens the index of a corpus in `folder`, or builds it there; None builds it in memory.

    A folder that is not whole (a copy that broke off) is built again. As an index is mapped into memory, a remote one
    is opened from a copy on this machine, and built here before it is uploaded.

    Raises:
      Stopped: `stop` said so while building.
      InputError: the folder holds an index of another corpus or other settings, or something else.
    """
    if folder is not None and paths.is_remote(folder):
        copy = _whole_copy(folder)
        if copy is None:
            with tempfile.TemporaryDirectory(prefix="inranker_jax.") as here:
                local = os.path.join(here, "index")
                made = open_index(corpus, local, language, k1, b, stop)
                paths.upload(local, folder, marker=index_files.STATE)
            return made  # its files stay mapped until it is dropped
        folder = copy
    if folder is not None and index_files.exists(folder):
        try:
            index = BM25Index.load(folder, corpus=corpus, language=language, k1=k1, b=b)
        except index_files.TornIndexError as error:
            announce(f"{error} Doing so now.")
        else:
            announce(f"Opened the index of {len(index.ids):,} documents in {folder}")
            return index
    progress = _Progress("indexed", "documents")

    def on_progress(done: int) -> None:
        if stop():
            raise Stopped
        progress.show(done)

    index = BM25Index.build(
        corpus.documents(), language, k1, b,
        folder=folder, corpus=corpus, on_progress=on_progress,
    )  # fmt: skip
    progress.show(len(index.ids), always=True)
    return index


def _whole_copy(folder: PathType) -> Path | None:
    """A local copy of a remote index; None where there is none, or one that is not whole."""
    if not paths.of(folder).is_dir():
        return None
    copy = paths.local_copy(folder)
    try:
        index_files.read_state(copy)
    except index_files.TornIndexError as error:
        announce(f"{error} Doing so now.")
        return None
    return copy


def _search(
    index: BM25Index,
    queries: QuerySet,
    count: int,
    place: Output,
    depth: int,
    tag: str,
    threads: int,
    stop: Stop,
) -> None:
    done = place.parts_done()
    stream = itertools.islice(queries.queries(), done * outputs.QUERIES_PER_PART, None)
    found = index.stream_search(stream, depth, threads=threads)
    progress = _Progress("searched", "queries", done * outputs.QUERIES_PER_PART, count)
    if done:
        announce(f"Going on after {min(done * outputs.QUERIES_PER_PART, count):,} of {count:,} queries.")
    for number in range(done, outputs.parts_of(count)):
        with records.atomic_text(place.part(number)) as out:
            for query, scores in itertools.islice(found, outputs.QUERIES_PER_PART):
                if stop():
                    raise Stopped
                out.writelines(runs.run_lines(query, scores, tag))
        progress.show(min((number + 1) * outputs.QUERIES_PER_PART, count))
    progress.show(count, always=True)


def normalise(
    run: PathType,
    corpus: Corpus,
    queries: QuerySet,
    output: PathType,
    *,
    depth: int = 1000,
    tag: str = "run",
    skip_malformed: bool = False,
    stop: Stop = lambda: False,
) -> RunSummary:
    """Checks a run that Anserini, Pyserini, Elasticsearch or anything else made, and writes it in one form.

    Ranks are made anew from the scores as trec_eval does, candidates below `depth` are dropped, queries come in
    the order of `queries`. Needs the memory of the document ids.

    Args:
      run: a TREC run, the lines of one query together; `.gz` and `.zst` are decompressed.
      corpus: the documents that it may name.
      queries: the queries that it may name.
      output: a file, here or remote; compressed when it ends with `.gz`.
      depth: how many candidates are kept of each query.
      tag: the last column of the new run.
      skip_malformed: leave out bad lines and unknown ids, and say how many, instead of ending at the first.
      stop: asked between queries.

    Returns:
      What the run holds.

    Raises:
      Stopped: `stop` said so.
      InputError: naming file and line, for what `runs.stream_run` refuses, and for ids that are unknown.
    """
    _check_token("--tag", tag)
    if _same_file(run, output):
        raise InputError(f"--output={output} is the run that is read: choose another file.")
    identity = {
        "run": os.fspath(run), **queries.identity(), **corpus.identity(), "depth": depth, "tag": tag,
        "skip_malformed": skip_malformed,
    }  # fmt: skip
    place = Output(output, identity, again=True)
    skipped = runs.SkippedLines() if skip_malformed else None
    started = time.perf_counter()
    with place.alone():
        place.start()
        try:
            order, where, lines = _normalised(run, corpus, queries, place, depth, tag, skipped, stop)
        except BaseException:
            place.discard()  # nothing of it can be used
            raise
        if skipped is not None and skipped.counts:
            announce(skipped.summary())
        seconds = {"run": time.perf_counter() - started}
        summary = RunSummary(os.fspath(output), len(order), len(order) - len(where), lines, seconds)
        place.close(summary)
    return summary


def _normalised(
    run: PathType, corpus: Corpus, queries: QuerySet, place: Output, depth: int, tag: str,
    skipped: runs.SkippedLines | None, stop: Stop,
) -> tuple[list[str], dict[str, tuple[int, int]], int]:  # fmt: skip
    """Copies the run in its own order with the place of each query, then in the order of the queries."""
    order = [query.id for query in queries.queries()]
    known_documents = {document.id for document in corpus.documents()}
    known_queries = set(order)
    where: dict[str, tuple[int, int]] = {}
    lines = 0
    progress = _Progress("read", "queries")
    # In a local folder of parts, where a killed process leaves nothing that nobody would clear.
    beside = None if paths.is_remote(place.path) else place.part(0).parent
    with tempfile.TemporaryFile(prefix="part-", dir=beside) as kept:
        for entry in runs.read_queries(run, skipped):
            if stop():
                raise Stopped
            scores = _known(run, entry, known_queries, known_documents, skipped)
            ranked = {document: scores[document] for document in records.ranking(scores)[:depth]}
            if ranked:
                lines += len(ranked)
                text = "".join(runs.run_lines(entry.query_id, ranked, tag)).encode("utf-8")
                where[entry.query_id] = (kept.tell(), len(text))
                kept.write(text)
            progress.show(len(where))
        with records.atomic_text(place.path) as out:
            for query in order:
                if query in where:
                    offset, length = where[query]
                    kept.seek(offset)
                    out.write(kept.read(length).decode("utf-8"))
    return order, where, lines


def _same_file(one: PathType, other: PathType) -> bool:
    if paths.is_remote(one) or paths.is_remote(other):
        return os.fspath(one) == os.fspath(other)
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _known(
    run: PathType,
    entry: runs.RunQuery,
    queries: set[str],
    documents: set[str],
    skipped: runs.SkippedLines | None,
) -> dict[str, float]:
    scores: dict[str, float] = {}
    for document, (score, line) in entry.documents.items():
        if entry.query_id not in queries:
            kind, problem = "unknown query", f"query {entry.query_id!r} is not among the queries"
        elif document not in documents:
            kind, problem = "unknown document", f"document {document!r} is not in the corpus"
        elif abs(score) > _LARGEST:
            kind, problem = "malformed line", f"score {score} does not fit in float32"
        else:
            scores[document] = score
            continue
        error = InputError.at(
            run, line, problem,
            remedy="Give the corpus and queries that the run was made of, or --skip_malformed to leave such lines out",
        )  # fmt: skip
        if skipped is None:
            raise error
        skipped.add(kind, error)
    return scores


class _Progress:
    """A line now and then: how many, how fast, and how long it still takes where the total is known."""

    def __init__(self, verb: str, noun: str, done: int = 0, total: int | None = None) -> None:
        self._verb, self._noun, self._first, self._total = verb, noun, done, total
        self._start = self._last = time.perf_counter()

    def show(self, done: int, always: bool = False) -> None:
        now = time.perf_counter()
        if not always and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        of = f" of {self._total:,}" if self._total is not None else ""
        line = f"{self._verb} {done:,}{of} {self._noun}  {rate:,.0f}/s"
        if self._total is not None and rate and done < self._total:
            line += f"  {clock((self._total - done) / rate)} left"
        announce(line)


def _check_token(flag: str, text: str) -> None:
    if not text or any(blank in text for blank in " \t\r\n"):
        raise InputError(f"{flag}={text!r}: expected a word without blanks.")
