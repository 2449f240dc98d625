"""What a teacher still has to score for some lists, cut into chunks that any process can do in any order.

The plan is the same for every process and after every restart: it follows from the lists and from the parts
that the store had when the job first began, which the first process to come writes down:

    STORE/teachers/<teacher key>/jobs/<request>-<attempt>.json

A chunk becomes one part of the store, by one rename. So what is done is what is there, and a process that is
killed at any moment loses at most the chunks it was computing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from inranker_jax import paths
from inranker_jax.corpora import label_store
from inranker_jax.corpora.label_folder import Lists
from inranker_jax.corpora.label_store import LabelStore


@dataclass(frozen=True, eq=False)
class Plan:
    """The pairs that a job scores, in the order of the lists.

    Attributes:
      store: where labels go.
      teacher_key: whose labels.
      job: what the job's parts are called by.
      rows: int64 [m], rows of the lists; of equal pairs the first.
      keys: uint8 [m, 16], their keys.
      chunk_size: pairs of a chunk.
      stored: distinct pairs of the lists that the store had before the job.
      snapshot: the parts that the store had before the job.
      earlier: those of them that hold the stored pairs.
    """

    store: LabelStore
    teacher_key: str
    job: str
    rows: np.ndarray
    keys: np.ndarray
    chunk_size: int
    stored: int
    snapshot: tuple[str, ...]
    earlier: tuple[str, ...]

    @property
    def parts(self) -> list[str]:
        """All parts that hold labels of the lists, when all chunks are done."""
        return [*self.earlier, *map(self.part, range(self.num_chunks))]

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        return -(-len(self.rows) // self.chunk_size)

    def part(self, chunk: int) -> str:
        """Name of the part that a chunk becomes."""
        return f"part-{self.job}-{chunk:06d}"

    def slice(self, chunk: int) -> slice:
        """The chunk's places in `rows` and `keys`."""
        return slice(chunk * self.chunk_size, min(len(self.rows), (chunk + 1) * self.chunk_size))

    def size(self, chunk: int) -> int:
        """Number of pairs of a chunk."""
        return min(len(self.rows), (chunk + 1) * self.chunk_size) - chunk * self.chunk_size

    def is_done(self, chunk: int) -> bool:
        """Whether the chunk's part is there, whole; a torn one is done again."""
        return self.store.part_rows(self.teacher_key, self.part(chunk)) == self.size(chunk)

    def unfinished(self, among: Iterable[int] | None = None) -> list[int]:
        """Chunks still to be done, by any process; of all, or of some."""
        there = set(self.store.part_names(self.teacher_key))
        chunks = range(self.num_chunks) if among is None else among
        return [chunk for chunk in chunks if self.part(chunk) not in there or not self.is_done(chunk)]

    def clear_temporaries(self) -> None:
        """Removes what killed processes left in the teacher's folder of the store."""
        folder = self.store.folder(self.teacher_key)
        label_store.clear_temporaries(folder, folder / "jobs")

    def ids(self, lists: Lists, chunk: int) -> Iterator[tuple[str, str]]:
        """(query id, document id) of the chunk's pairs."""
        rows = self.rows[self.slice(chunk)]
        for part in lists.rows(int(rows[0]), int(rows[-1]) + 1):
            first, last = np.searchsorted(rows, [part.start, part.start + len(part)])
            for row in (rows[first:last] - part.start).tolist():
                yield part.query_ids[row], part.document_ids[row]


class LaterLabels:
    """Labels of a plan's pairs that other jobs have added to the store since the job began.

    They are copied into the job's parts, so that these hold the pairs that they hold when no other job is about,
    and no pair is scored twice. The exception: two jobs that score the same pair at the same moment, neither of
    which can know of the other's label yet. Copied labels equal this job's own up to rounding, which depends on
    the pairs that a model scores together.

    Attributes:
      copied: pairs whose labels were taken from other jobs.
    """

    def __init__(self, plan: Plan) -> None:
        """Reads nothing yet; holds up to 33 bytes a pair of the plan once another job has added parts."""
        self.copied = 0
        self._plan = plan
        self._read = set(plan.snapshot)
        self._found = np.zeros(len(plan.keys), bool)
        self._logits = np.zeros((len(plan.keys), 2), np.float32)

    def complete(
        self,
        chunks: Iterable[int],
        score: Callable[[Iterator[tuple[int, np.ndarray]]], Iterator[np.ndarray]],
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Has scored what nobody else has.

        Args:
          chunks: chunks of the plan.
          score: gets (chunk, bool [size of the chunk]: which of its pairs to score) and yields float32 [n, 2]
            for each, in order, with n the pairs to score. Chunks without any are left out.

        Yields:
          For each chunk, in order, its logits, float32 [size of the chunk, 2], and how many of them were scored.

        Raises:
          InputError: a part of the store is damaged.
        """
        waiting: deque[tuple[np.ndarray, np.ndarray]] = deque()

        def missing() -> Iterator[tuple[int, np.ndarray]]:
            for chunk in chunks:
                self._refresh()
                place = self._plan.slice(chunk)
                found = self._found[place].copy()
                waiting.append((found, self._logits[place].copy()))
                self.copied += int(found.sum())
                if not found.all():
                    yield chunk, ~found

        for scored in score(missing()):
            while waiting[0][0].all():
                yield waiting.popleft()[1], 0
            found, logits = waiting.popleft()
            if found.any():
                logits[~found] = np.reshape(scored, (int((~found).sum()), 2))
                yield logits, len(scored)
            else:
                yield scored, len(scored)
        while waiting and waiting[0][0].all():
            yield waiting.popleft()[1], 0

    def _refresh(self) -> None:
        plan, own = self._plan, f"part-{self._plan.job}-"
        for name in plan.store.part_names(plan.teacher_key):
            if name in self._read or name.startswith(own):
                continue
            if plan.store.part_rows(plan.teacher_key, name) is None:
                continue  # torn: its own job does it again
            self._read.add(name)
            keys, logits = plan.store.read_part(plan.teacher_key, name)
            wanted = label_store.as_strings(keys)
            places = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
            hit = self._sorted[places] == wanted
            rows = self._order[places[hit]]
            self._found[rows] = True
            self._logits[rows] = logits[hit]

    @functools.cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(label_store.as_strings(self._plan.keys))

    @functools.cached_property
    def _sorted(self) -> np.ndarray:
        return label_store.as_strings(self._plan.keys)[self._order]


def make_plan(store: LabelStore, teacher_key: str, lists: Lists, chunk_size: int) -> Plan:
    """Plans the labelling of `lists` by a teacher, or finds the plan of a job that has begun.

    Args:
      store: the store; its teacher is known already.
      teacher_key: the teacher.
      lists: the lists.
      chunk_size: pairs of a chunk.

    Returns:
      The plan. Pairs that the store has are not in it.

    Raises:
      InputError: a part of the store is damaged.
    """
    flat = label_store.as_strings(lists.keys())
    distinct, first = np.unique(flat, return_index=True)
    del flat
    job, snapshot = _begin(store, teacher_key, lists.fingerprint, chunk_size)
    has_label = np.zeros(len(distinct), bool)
    earlier = []
    for name in snapshot:
        stored = label_store.as_strings(store.read_part(teacher_key, name)[0])
        places = np.searchsorted(distinct, stored)
        inside = places < len(distinct)
        places = places[inside][distinct[places[inside]] == stored[inside]]
        if not has_label[places].all():
            earlier.append(name)
        has_label[places] = True
    order = np.argsort(first, kind="stable")
    rows, keys = first[order].astype(np.int64), distinct[order]
    keys = np.ascontiguousarray(keys).view(np.uint8).reshape(-1, label_store.KEY_BYTES)
    new = ~has_label[order]
    stored_pairs = int(has_label.sum())
    return Plan(
        store,
        teacher_key,
        job,
        rows[new],
        keys[new],
        chunk_size,
        stored_pairs,
        tuple(snapshot),
        tuple(earlier),
    )


def _begin(store: LabelStore, teacher_key: str, lists: str, chunk_size: int) -> tuple[str, list[str]]:
    """What the job's parts are called by, and the parts that the store had when it began.

    When one of those was lost or torn since, the job begins anew, under another name, with the parts that are
    whole now: among them its own.
    """
    request = _digest({"lists": lists, "chunk_size": chunk_size})
    attempt = 0
    while True:
        path = store.folder(teacher_key) / "jobs" / f"{request}-{attempt}.json"
        if not path.exists():
            snapshot = {"lists": lists, "chunk_size": chunk_size, "snapshot": store.parts(teacher_key)}
            _create(path, snapshot)
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(store.part_rows(teacher_key, name) is not None for name in found["snapshot"]):
            return _digest({**found, "attempt": attempt}), found["snapshot"]
        attempt += 1


def _digest(value: Any) -> str:
    return hashlib.sha256(label_store.canonical_json(value).encode()).hexdigest()[:16]


def _create(path: Any, value: Any) -> None:
    """Writes a file whole, unless another process was first; then that one's counts."""
    if paths.is_remote(path):
        paths.create(path, json.dumps(value))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = label_store.temporary_path(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(value))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, never replaces
        except FileExistsError:
            return
        except OSError:
            # A file system without hard links. Two processes that start within the same instant may then
            # both write; their values differ only if a third job has added a part in between.
            if not path.exists():
                os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    label_store.sync_folder(path.parent)
