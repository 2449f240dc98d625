"""Labelling of a mixture: lists are sampled, what the store lacks is scored, provenance is written.

Every step is a function of the input and of what is on disk. So a job goes on after any interruption, and any
number of processes share it by nothing but the file system: chunk i of a teacher's work belongs to process
i mod `process_count`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from inranker_jax import locks, paths, records
from inranker_jax.corpora import MalformedReport, files, label_store, open_corpus, open_queries_any
from inranker_jax.corpora.label_folder import FORMAT, INFO, LISTS, Lists, ListsWriter
from inranker_jax.corpora.label_store import LabelStore, LabelTable
from inranker_jax.errors import InputError
from inranker_jax.flags import Stopped
from inranker_jax.labeling.pairs import PairText
from inranker_jax.labeling.plan import LaterLabels, Plan, make_plan
from inranker_jax.labeling.processes import Processes
from inranker_jax.labeling.provenance import absolute, check_same, provenance, versions
from inranker_jax.labeling.sampling import Positives, Sampler
from inranker_jax.labeling.sessions import Session, totals
from inranker_jax.labeling.settings import Settings
from inranker_jax.labeling.teachers import Teacher, combine, ensemble_identity
from inranker_jax.labeling.teachers.trec_run import RunTeacher
from inranker_jax.retrieval.runs import stream_run

ENSEMBLE = "ensemble"
_SHOW_SECONDS = 10.0


class LabelJob:
    """One labelling job, in this process.

    Attributes:
      folder: the label folder.
      lists: its lists; after `prepare`.
      scored: pairs that this object had scored.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        announce: Callable[[str], None],
        stopping: Callable[[], bool] = lambda: False,
        processes: Processes | None = None,
    ) -> None:
        """Opens the input.

        Args:
          settings: the job.
          announce: prints a line for people.
          stopping: asked after each chunk; when true, `Stopped` is raised.
          processes: this process among those that share the job, if not as the settings say.

        Raises:
          InputError: a setting out of range, or a file that does not exist.
        """
        settings.check()
        paths.check_reachable(settings.output_dir)
        self.folder = paths.of(settings.output_dir)
        self.scored = 0
        self._settings, self._announce, self._stopping = settings, announce, stopping
        on_malformed: Any = "skip" if settings.skip_malformed else "raise"
        self._malformed = MalformedReport()
        options: dict[str, Any] = {"on_malformed": on_malformed, "report": self._malformed}
        self._queries = open_queries_any(settings.queries, settings.queries_format, **options)
        self._corpus = open_corpus(settings.corpus, settings.corpus_format, **options)
        self._on_malformed = on_malformed
        self.lists: Lists
        self._store = LabelStore(settings.store or self.folder / "store")
        self._plans: dict[str, Plan] = {}
        self._conflicts: dict[str, int] = {}
        self._processes = processes or Processes(
            settings.process_index, settings.process_count, settings.joined
        )
        self._runs: list[tuple[RunTeacher, Plan]] = []
        process = (settings.process_index, settings.process_count)
        self._session = Session(self.folder, process, usd_per_hour=settings.usd_per_hour, announce=announce)

    # ------------------------------------------------------------------------------------------ lists

    @functools.cached_property
    def _query_texts(self) -> dict[str, str]:
        return {query.id: query.text.strip() for query in self._queries.queries()}

    @functools.cached_property
    def _document_texts(self) -> Mapping[str, str]:
        return self._corpus.texts(titles=self._settings.titles)

    def prepare(self) -> None:
        """Samples the lists into `lists.parquet`, or finds them there.

        Raises:
          InputError: malformed input, input that does not belong together, or a folder whose lists were
            sampled from something else.
        """
        wanted = self._deciding()
        if not self._processes.is_first and self._processes.joined:
            self._wait("prepared", lambda: {} if (self.folder / LISTS).exists() else {0: LISTS}, self.folder)
        if (self.folder / LISTS).exists():
            self.lists = Lists(self.folder)
            again = f"with --store={self._store.path} nothing that is labelled there is scored again."
            remedy = f"Run it with those again, or choose another --output_dir; {again}"
            check_same(self.folder, self.lists.settings, wanted, self._places(), remedy)
        else:
            self.lists = self._sample(wanted)
        self._processes.tell("prepared")
        self._announce(
            f"{self.lists.num_queries:,} lists, {self.lists.num_pairs:,} pairs in {self.lists.path}"
        )

    def _places(self) -> dict[str, Any]:
        """Where the input is."""
        names = ("queries", "corpus", "candidates", "qrels")
        given = {name: getattr(self._settings, name) for name in names}
        return {name: path and {"path": absolute(path)} for name, path in given.items()}

    def _deciding(self) -> dict[str, Any]:
        """What the lists are a function of; paths may change, bytes may not."""
        settings = self._settings
        return {
            "queries": {"fingerprint": self._queries.fingerprint(), "format": self._queries.format},
            "corpus": {
                "fingerprint": self._corpus.fingerprint(),
                "format": self._corpus.format,
                "titles": settings.titles,
            },
            "candidates": {"fingerprint": files.fingerprint(files.find(settings.candidates))},
            "qrels": {
                "fingerprint": files.fingerprint(files.find(settings.qrels)) if settings.qrels else None
            },
            "sampling": settings.sampling.to_dict(),
            "on_malformed": self._on_malformed,
        }

    def _sample(self, deciding: Mapping[str, Any]) -> Lists:
        settings = self._settings
        positives = self._positives()
        sampler = Sampler(
            self._query_texts, self._document_texts, positives, settings.sampling,
            skip_unknown=settings.skip_malformed,
        )  # fmt: skip
        shown = time.monotonic()
        with ListsWriter(self.folder, deciding) as writer:
            for sampled in sampler.lists(stream_run(settings.candidates)):
                writer.add(sampled.query_id, sampled.rows())
                if writer.queries % 1000 == 0:
                    if self._stopping():
                        raise Stopped
                    if time.monotonic() - shown > _SHOW_SECONDS:
                        shown = time.monotonic()
                        self._announce(f"sampled {writer.queries:,} lists")
            writer.counts = sampler.report.to_dict()
        for line in sampler.report.lines():
            self._announce(line)
        if self._malformed.total:
            self._announce(self._malformed.summary())
        return Lists(self.folder)

    def _positives(self) -> Positives:
        settings = self._settings
        if settings.qrels is not None:
            return Positives.from_qrels(records.read_qrels(settings.qrels), settings.qrels)
        known = self._queries.positives
        if known is None:
            raise InputError(
                f"{settings.queries} ({self._queries.format}) does not say which document each query belongs to. "
                "Expected judgments: name them with --qrels (or queries in the InPars format)."
            )
        return Positives(known, settings.queries)

    # ------------------------------------------------------------------------------------------ labels

    def label(self, teacher: Teacher) -> str:
        """Scores this process's share of what the store lacks, and of what other jobs have not added since.

        Args:
          teacher: the teacher.

        Returns:
          The teacher's key in the store.

        Raises:
          InputError: another teacher has that name in this folder, or the teacher's labels are not usable.
          Stopped: a signal arrived; finished chunks are kept.
        """
        origin = {**teacher.provenance, **provenance()}
        plan = self._plan(teacher.name, teacher.identity, origin)
        later = LaterLabels(plan)

        def logits(chunks: Iterator[int]) -> Iterator[tuple[np.ndarray, int]]:
            return later.complete(
                chunks, lambda missing: teacher.logits(self._texts(plan, *chunk) for chunk in missing)
            )

        share = range(self._settings.process_index, plan.num_chunks, self._settings.process_count)
        self._work(teacher.name, plan, share, logits)
        if later.copied:
            self._announce(f"{teacher.name}: {later.copied:,} pairs were scored by another job meanwhile")
        if isinstance(teacher, RunTeacher):
            if self._processes.joined:
                self._runs.append((teacher, plan))
            elif not plan.unfinished():
                self._count_conflicts(teacher, plan)
        self._write_info()
        return plan.teacher_key

    def wait(self) -> None:
        """Waits until the labels of all processes of the JAX program are there; independent ones do not wait.

        Raises:
          InputError: the processes do not share the folder.
          PeerStopped: another process has stopped.
          Stopped: a signal arrived.
        """
        if not self._processes.joined:
            return
        self._processes.tell("labelled")
        left = {name: plan.unfinished() for name, plan in self._plans.items()}

        def missing() -> dict[int, str]:
            owners: Counter[int] = Counter()
            for name, plan in self._plans.items():
                left[name] = plan.unfinished(left[name])
                owners.update(chunk % self._processes.count for chunk in left[name])
            return {index: f"{count:,} chunks to label" for index, count in owners.items()}

        self._wait("labelled", missing, self._store.path)

    def _wait(self, what: str, missing: Callable[[], Mapping[int, str]], place: Any) -> None:
        def check() -> None:
            if self._stopping():
                raise Stopped

        self._processes.wait(what, missing, place, self._announce, check)

    def _count_conflicts(self, teacher: RunTeacher, plan: Plan) -> None:
        """A run scores ids and the store knows texts: counts pairs that got the score of other ids."""
        table = self._load(plan)
        count = 0
        for rows in self.lists.rows():
            pairs = [PairText(*ids, "", "") for ids in zip(rows.query_ids, rows.document_ids, strict=True)]
            count += teacher.num_conflicts(pairs, table.lookup(rows.keys)[1])
        self._conflicts[teacher.name] = count
        if count:
            self._announce(
                f"{teacher.name}: {count:,} pairs have the texts of another pair and another score, or none; "
                "the first counts"
            )

    def ensemble(self, members: Sequence[str], weights: Sequence[float], name: str = ENSEMBLE) -> str | None:
        """Combines members' labels, once they are complete, into those of a teacher of its own.

        Args:
          members: keys of the members in the store.
          weights: one weight for each.
          name: what the ensemble is called.

        Returns:
          The ensemble's key, or None while a member is not complete.
        """
        if any(self._plan_of(key).unfinished() for key in members):
            return None
        identity = ensemble_identity(members, weights)
        plan = self._plan(name, identity, provenance())
        ordered = sorted(zip(members, weights, strict=True))  # as in the identity: sums in one order
        tables = [self._load(self._plan_of(key)) for key, _ in ordered]

        def logits(chunks: Iterator[int]) -> Iterator[tuple[np.ndarray, int]]:
            for chunk in chunks:
                found = [table.lookup(plan.keys[plan.slice(chunk)]) for table in tables]
                if not all(there.all() for there, _ in found):
                    raise InputError(
                        f"{self._store.path}: labels of the ensemble's members are missing. "
                        "Run the same command again: it scores what is missing."
                    )
                values = combine([values for _, values in found], [weight for _, weight in ordered])
                yield values, len(values)

        # It costs next to nothing, so whichever process sees the members complete does all of it.
        self._work(name, plan, range(plan.num_chunks), logits)
        self._write_info()
        return plan.teacher_key

    def finish(self) -> bool:
        """Writes labels.json; returns whether all labels of all teachers are there."""
        if self._processes.is_first:
            for teacher, plan in self._runs:
                self._count_conflicts(teacher, plan)
        return self._write_info()

    def _plan(self, name: str, identity: Mapping[str, Any], origin: Mapping[str, Any]) -> Plan:
        key = label_store.teacher_key(identity)
        with _locked(self.folder):
            info = self.info()
            for kind in ("teachers", "pending"):
                other = info.get(kind, {}).get(name, key)
                # A teacher that never labelled anything (it could not be opened, say) keeps no name.
                if other != key and self._store.parts(other):
                    raise InputError(
                        f"{self.folder / INFO}: the name {name!r} belongs to teacher {other}, and this one is {key}. "
                        f"Expected a name of its own: --teacher=NAME=SPEC. The identities are in {self._store.path}."
                    )
            self._store.add_teacher(identity, origin)
        self._plans[name] = plan = make_plan(self._store, key, self.lists, self._settings.chunk_size)
        left, total = sum(map(plan.size, plan.unfinished())), len(plan.rows) + plan.stored
        there = f"{left:,} pairs to score, {total - left:,} in the store from before"
        self._announce(
            f"{name} ({key}): {there if left else f'all {total:,} pairs are in the store already'}"
        )
        self._write_info()
        return plan

    def _plan_of(self, key: str) -> Plan:
        return next(plan for plan in self._plans.values() if plan.teacher_key == key)

    def _load(self, plan: Plan) -> LabelTable:
        """The labels of a finished plan, those that the store had before included."""
        distinct = np.unique(label_store.as_strings(self.lists.keys()))
        return self._store.load(plan.teacher_key, only=distinct, parts=plan.parts)

    def _texts(self, plan: Plan, chunk: int, wanted: np.ndarray) -> list[PairText]:
        queries, documents = self._query_texts, self._document_texts
        return [
            PairText(query_id, document_id, queries[query_id], documents[document_id].strip())
            for query_id, document_id in itertools.compress(plan.ids(self.lists, chunk), wanted)
        ]

    def _work(
        self,
        name: str,
        plan: Plan,
        share: Iterable[int],
        logits: Callable[[Iterator[int]], Iterator[tuple[np.ndarray, int]]],
    ) -> None:
        """Writes each unfinished chunk of `share` as a part; `logits` also says how many were scored for it."""
        share = list(share)
        todo = [chunk for chunk in share if not plan.is_done(chunk)]
        total = sum(map(plan.size, share))
        self._session.begin(name, total, total - sum(map(plan.size, todo)))
        if not todo:
            return
        under_way: deque[int] = deque()

        def chunks() -> Iterator[int]:
            self._session.hand_over()
            for chunk in todo:
                under_way.append(chunk)
                yield chunk

        def write(values: np.ndarray, scored: int) -> None:
            chunk = under_way.popleft()
            self._store.write_part(plan.teacher_key, plan.part(chunk), plan.keys[plan.slice(chunk)], values)
            self.scored += scored
            self._session.add(plan.size(chunk), scored)
            self._processes.phases.step_done()

        try:
            with self._processes.phases.phase("scoring"):
                for values, scored in logits(chunks()):
                    write(values, scored)
                    if self._stopping():
                        raise Stopped
                    self._processes.check()
        finally:
            self._session.store()
        if under_way:
            raise RuntimeError(f"teacher {name!r} gave no logits for {len(under_way)} chunks")
        self._announce(self._session.line())

    # ------------------------------------------------------------------------------------------ provenance

    def info(self) -> dict[str, Any]:
        """What labels.json says now; nothing before there is one."""
        try:
            return json.loads(paths.read(self.folder / INFO))
        except FileNotFoundError:
            return {}

    def _write_info(self) -> bool:
        settings = self._settings
        if self._processes.joined and not self._processes.is_first:
            return not any(plan.unfinished() for plan in self._plans.values())
        # Under the lock, the process that looks last sees the parts of all.
        with _locked(self.folder):
            old = self.info()
            teachers, pending = dict(old.get("teachers", {})), dict(old.get("pending", {}))
            parts = dict(old.get("parts", {}))
            unfinished = {name: len(plan.unfinished()) for name, plan in self._plans.items()}
            for name, plan in self._plans.items():
                teachers.pop(name, None)
                pending.pop(name, None)
                (pending if unfinished[name] else teachers)[name] = plan.teacher_key
                if not unfinished[name]:
                    parts[plan.teacher_key] = plan.parts
                plan.clear_temporaries()
            deciding, places = self.lists.settings, self._places()
            distinct = {len(plan.rows) + plan.stored for plan in self._plans.values()}
            counts = {**self.lists.counts, "distinct_pairs": max(distinct, default=None)}
            info = {
                "format": FORMAT,
                "complete": bool(teachers) and not pending,
                **{name: place and {**place, **deciding[name]} for name, place in places.items()},
                "sampling": deciding["sampling"],
                "counts": counts,
                "teachers": teachers,
                "pending": pending,
                "store": "store" if settings.store is None else absolute(settings.store),
                "versions": versions(),
                "cost": totals(self.folder),
                "conflicting_labels": {**old.get("conflicting_labels", {}), **self._conflicts},
                "parts": parts,
            }
            for kind in ("queries", "corpus"):
                info[kind]["on_malformed"] = deciding["on_malformed"]
            label_store.write_json(self.folder / INFO, info)
            label_store.clear_temporaries(self.folder, self.folder / "sessions")
        return not any(unfinished.values())


@contextlib.contextmanager
def _locked(folder: Any) -> Iterator[None]:
    """One process at a time; the system frees the lock of a process that is killed."""
    if paths.is_remote(folder):
        # An object store has no locks. Of a JAX program only process 0 writes labels.json; of independent processes,
        # running any of them again brings it up to date.
        yield
        return
    # Without locks labels.json may be one process late; running any of them again brings it up to date.
    with locks.held(folder / ".lock", patience=math.inf):
        yield
