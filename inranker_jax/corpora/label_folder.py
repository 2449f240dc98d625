"""A label folder: the lists of a training set, and where their texts and teacher labels are.

    DIR/lists.parquet   query_id, document_id, relevance, key: one row a pair; a query's rows stand together,
                        its positive (relevance 1) first; `key` is `label_store.pair_key` of the texts
    DIR/labels.json     provenance: queries, corpus, candidates, sampling, counts, teachers, store, versions, cost
    DIR/store/          the label store, unless labels.json names another

Texts are not copied: they are read from the queries and the corpus that labels.json names, and each pair's
key says whether they are still the texts that the teacher saw. Labels can be read with other texts instead,
those of a translation with the same ids: the logits are then found by the stored key (cross-lingual labels).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from inranker_jax import paths
from inranker_jax.corpora import label_store
from inranker_jax.corpora.label_store import KEY_BYTES, LabelStore, LabelTable
from inranker_jax.corpora.malformed import MalformedReport
from inranker_jax.errors import InputError
from inranker_jax.records import LabelledPair, PathType

LISTS, INFO = "lists.parquet", "labels.json"
FORMAT = 1
# Rows of a row group: what a reader holds at a time. A query's rows are never divided between two.
_GROUP_ROWS = 16384


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of the lists.

    Attributes:
      start: number of the first row.
      query_ids: [n] ids.
      document_ids: [n] ids.
      relevance: int8 [n], 1 for the positive, 0 for a sampled negative.
      keys: uint8 [n, 16].
    """

    start: int
    query_ids: list[str]
    document_ids: list[str]
    relevance: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.query_ids)


class ListsWriter:
    """Context manager that streams lists to `lists.parquet`, which appears whole or not at all."""

    def __init__(self, folder: PathType, settings: Mapping[str, Any]) -> None:
        """Prepares a file.

        Args:
          folder: the label folder, made if missing.
          settings: what decides the lists (JSON); kept in the file, so that it says whose lists they are.

        Set `counts` before the end to keep more counts with the file.
        """
        self.counts: dict[str, Any] = {}
        self.queries = self.pairs = 0
        self._path = paths.of(folder) / LISTS
        self._settings = label_store.canonical_json(settings)
        self._atomic = label_store.atomic_path(self._path)
        self._digest = hashlib.sha256()
        self._rows: list[tuple[str, str, int]] = []
        self._keys: list[bytes] = []

    def __enter__(self) -> ListsWriter:
        parquet, arrow = label_store.import_parquet()
        fields = [
            ("query_id", arrow.string()),
            ("document_id", arrow.string()),
            ("relevance", arrow.int8()),
            ("key", arrow.binary(KEY_BYTES)),
        ]
        schema = arrow.schema([arrow.field(name, kind, nullable=False) for name, kind in fields])
        self._schema = schema.with_metadata({"format": str(FORMAT), "settings": self._settings})
        temporary = self._atomic.__enter__()
        self._file = parquet.ParquetWriter(
            temporary, self._schema, compression="zstd", write_page_checksum=True
        )
        return self

    def add(self, query_id: str, documents: Sequence[tuple[str, int, bytes]]) -> None:
        """Adds the list of one query: (document id, relevance, key of the pair), the positive first."""
        self._rows.extend((query_id, document, relevance) for document, relevance, _ in documents)
        self._keys.extend(key for _, _, key in documents)
        self.queries += 1
        self.pairs += len(documents)
        if len(self._rows) >= _GROUP_ROWS:
            self._flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._flush()
                own = {"queries": self.queries, "pairs": self.pairs, "fingerprint": self._digest.hexdigest()}
                counts = {**self.counts, **own}
                self._file.add_key_value_metadata({"counts": json.dumps(counts)})
            self._file.close()
        except BaseException as failure:
            self._atomic.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._atomic.__exit__(kind, error, trace)

    def _flush(self) -> None:
        _, arrow = label_store.import_parquet()
        if not self._rows:
            return
        queries, documents, relevance = zip(*self._rows, strict=True)
        joined = b"".join(self._keys)
        self._digest.update(joined)
        keys = np.frombuffer(joined, np.uint8).reshape(-1, KEY_BYTES)
        columns = [arrow.array(queries), arrow.array(documents), arrow.array(relevance, arrow.int8())]
        table = arrow.Table.from_arrays([*columns, label_store.as_arrow(keys)], schema=self._schema)
        self._file.write_table(table, row_group_size=len(self._rows))
        self._rows, self._keys = [], []


class Lists:
    """The lists of a folder, whether labelled yet or not.

    Attributes:
      path: the Parquet file.
      settings: what decided the lists.
      num_queries: number of lists.
      num_pairs: number of rows.
      counts: what was counted when they were made.
      fingerprint: SHA-256 of the keys in order: the same for lists with the same pairs of texts.
    """

    def __init__(self, folder: PathType) -> None:
        """Reads the footer of `folder/lists.parquet`.

        Raises:
          InputError: there is no such file, it is torn, or it was not written by this package.
        """
        parquet, arrow = label_store.import_parquet()
        self.path = paths.of(folder) / LISTS
        try:
            if not self.path.is_file():
                raise FileNotFoundError(self.path)
            # It is read in many pieces and several times: a remote one from a copy.
            self._local = paths.local_copy(self.path)
            self._metadata = parquet.read_metadata(self._local)
            extra = {key.decode(): value.decode() for key, value in (self._metadata.metadata or {}).items()}
            self.counts: dict[str, Any] = json.loads(extra["counts"])
            self.settings: dict[str, Any] = json.loads(extra["settings"])
            self.num_queries = int(self.counts["queries"])
            self.num_pairs = int(self.counts["pairs"])
            self.fingerprint = str(self.counts.pop("fingerprint"))
        except FileNotFoundError:
            raise InputError.at(
                folder, None, f"it has no {LISTS}", "a label folder",
                "Make one with `python -m inranker_jax.label`",
            ) from None  # fmt: skip
        except (KeyError, ValueError, OSError, arrow.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's; pyarrow's own, of a footer that is no footer, has no number
            raise InputError.at(
                self.path, None, f"not the lists of a label folder ({error})".replace("\n", " "),
                "a file written by `python -m inranker_jax.label`", "Delete it and run that again",
            ) from error  # fmt: skip

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Rows]:
        """Yields rows `start` to `stop` (exclusive; the end by default), a row group at a time.

        Raises:
          InputError: the file is damaged.
        """
        parquet, arrow = label_store.import_parquet()
        stop = self.num_pairs if stop is None else min(stop, self.num_pairs)
        begin = 0
        with parquet.ParquetFile(self._local, page_checksum_verification=True) as file:
            for group in range(self._metadata.num_row_groups):
                count = self._metadata.row_group(group).num_rows
                first, last = max(start, begin), min(stop, begin + count)
                if first < last:
                    try:
                        table = file.read_row_group(group)
                    except (OSError, arrow.ArrowException) as error:
                        raise InputError.at(
                            self.path, None, f"cannot be read ({error})".replace("\n", " "),
                            remedy="Delete it and run the labelling again: the lists are sampled anew, alike",
                        ) from error  # fmt: skip
                    part = table.slice(first - begin, last - first)
                    yield Rows(
                        first,
                        part["query_id"].to_pylist(),
                        part["document_id"].to_pylist(),
                        part["relevance"].to_numpy().astype(np.int8),
                        label_store.as_keys(part["key"]),
                    )
                begin += count

    def keys(self) -> np.ndarray:
        """uint8 [num_pairs, 16]: the keys of all rows, in order."""
        keys = np.zeros((self.num_pairs, KEY_BYTES), np.uint8)
        parquet, _ = label_store.import_parquet()
        begin = 0
        with parquet.ParquetFile(self._local) as file:
            for batch in file.iter_batches(columns=["key"]):
                part = label_store.as_keys(batch.column(0))
                keys[begin : begin + len(part)] = part
                begin += len(part)
        return keys

    def query_sizes(self) -> Iterator[tuple[str, int]]:
        """Yields (query id, number of its rows) in list order."""
        for rows in self.rows():
            first = 0
            for index in range(1, len(rows) + 1):
                if index == len(rows) or rows.query_ids[index] != rows.query_ids[first]:
                    yield rows.query_ids[first], index - first
                    first = index


class LabelFolder:
    """A label folder that can be read.

    Attributes:
      path: the folder.
      info: what labels.json says.
      lists: its lists.
    """

    def __init__(self, folder: PathType) -> None:
        """Opens a folder.

        Raises:
          InputError: it is no label folder, or one of another format.
        """
        self.path = paths.of(folder)
        self.lists = Lists(folder)
        place = self.path / INFO
        try:
            self.info: dict[str, Any] = json.loads(paths.read(place))
        except (FileNotFoundError, ValueError) as error:
            problem = "no such file" if isinstance(error, FileNotFoundError) else f"not JSON ({error})"
            raise InputError.at(
                place, None, problem, "the provenance of a label folder",
                "Run the same `python -m inranker_jax.label` again: it writes the file and scores nothing anew",
            ) from None  # fmt: skip
        if self.info.get("format") != FORMAT:
            raise InputError.at(
                place, None, f"format {self.info.get('format')!r}", f"format {FORMAT}", "Update inranker_jax"
            )

    @property
    def teachers(self) -> dict[str, str]:
        """Teachers whose labels are complete: name -> key."""
        return dict(self.info.get("teachers", {}))

    @property
    def store(self) -> LabelStore:
        """The store that holds the labels."""
        return LabelStore(self._resolve(self.info["store"]))

    def teacher_key(self, teacher: str | None = None) -> str:
        """The key of a teacher, named or the only one.

        Raises:
          InputError: no such teacher, its labels are incomplete, or none was named where there are several.
        """
        pending = self.info.get("pending", {})
        place = self.path / INFO
        if teacher is None:
            if len(self.teachers) == 1:
                return next(iter(self.teachers.values()))
            if self.teachers:
                name, names = next(iter(self.teachers)), ", ".join(self.teachers)
                raise InputError.at(
                    place, None, f"labels of {len(self.teachers)} teachers ({names})", "one to be named",
                    f"Give --teacher_name={name} to `label`, --teacher={name} to other commands, or "
                    f"teacher={name!r} in Python, as in label_folders.register(..., teacher={name!r}) for training",
                )  # fmt: skip
        if not self.teachers or teacher in pending:
            names = ", ".join(pending) or "any teacher"
            raise InputError.at(
                place, None, f"the labels of {names} are not complete", "a label for every pair of the lists",
                "Run the same `python -m inranker_jax.label` again: it goes on where it stopped",
            )  # fmt: skip
        assert teacher is not None
        return label_store.resolve_teacher(teacher, self.teachers, place)

    def labels(self, teacher: str | None = None) -> LabelTable:
        """The labels of a teacher for the pairs of this folder, in memory (24 bytes a pair); kept for reuse.

        Raises:
          InputError: see `teacher_key`.
        """
        key = self.teacher_key(teacher)
        parts = tuple(self.parts(key))
        return _load(str(self.store.path), key, parts, str(self.lists.path), self.lists.fingerprint)

    def parts(self, key: str) -> list[str]:
        """The parts of the store that hold this folder's labels by a teacher: not what others add later."""
        store = self.store
        named = self.info.get("parts", {}).get(key)
        if named is None:
            return store.parts(key)
        return [name for name in named if store.part_rows(key, name) is not None]

    def query_texts(self, queries: PathType | Mapping[str, str] | None = None) -> Mapping[str, str]:
        """Query id -> text: of the labelled queries, or of others with the same ids (path or mapping)."""
        if isinstance(queries, Mapping):
            return queries
        from inranker_jax import corpora

        path, options = self._source("queries", queries)
        return {query.id: query.text for query in corpora.open_queries_any(path, **options).queries()}

    def document_texts(self, documents: PathType | Mapping[str, str] | None = None) -> Mapping[str, str]:
        """Document id -> contents: of the labelled corpus, or of another with the same ids."""
        if isinstance(documents, Mapping):
            return documents
        from inranker_jax import corpora

        path, options = self._source("corpus", documents)
        titles = self.info["corpus"].get("titles", True)
        return corpora.open_corpus(path, **options).texts(titles=titles)

    def read(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        teacher: str | None = None,
        queries: PathType | Mapping[str, str] | None = None,
        documents: PathType | Mapping[str, str] | None = None,
    ) -> Iterator[LabelledPair]:
        """Yields pairs `start` to `stop` of the lists, joined with texts and labels; see `read_labels`."""
        table = self.labels(teacher)
        query_texts, document_texts = self.query_texts(queries), self.document_texts(documents)
        own = queries is None and documents is None
        for rows in self.lists.rows(start, stop):
            found, logits = table.lookup(rows.keys)
            if not found.all():
                self._missing(rows, int(np.flatnonzero(~found)[0]), teacher)
            values = logits.tolist()
            for index, (query_id, document_id) in enumerate(
                zip(rows.query_ids, rows.document_ids, strict=True)
            ):
                query = self._text(query_texts, query_id, "query", queries)
                document = self._text(document_texts, document_id, "document", documents)
                if own and label_store.pair_key(query, document) != rows.keys[index].tobytes():
                    raise InputError.at(
                        self.lists.path, None,
                        f"query {query_id!r} or document {document_id!r} has another text than it had when "
                        "the pair was labelled",
                        f"the files that {INFO} names to be unchanged",
                        "Restore them or label again; for texts that differ on purpose, such as a translation, "
                        "say where they are with queries= and documents=",
                    )  # fmt: skip
                false_logit, true_logit = values[index]
                yield LabelledPair(query_id, document_id, query, document, (false_logit, true_logit))

    def _missing(self, rows: Rows, index: int, teacher: str | None) -> None:
        torn = self.store.torn(self.teacher_key(teacher))
        note = f" (torn files in the store: {len(torn)}, such as {torn[0]})" if torn else ""
        raise InputError.at(
            self.lists.path, None,
            f"no label for query {rows.query_ids[index]!r}, document {rows.document_ids[index]!r} in "
            f"{self.store.path}{note}",
            "a label for every pair",
            "Run the same `python -m inranker_jax.label` again: it scores what is missing",
        )  # fmt: skip

    def _source(self, kind: str, override: PathType | None) -> tuple[PathType, dict[str, Any]]:
        if override is not None:
            return override, {}
        source = self.info[kind]
        # The labelling has told which rows it left out: a report that nobody reads keeps them from being logged.
        options = {"on_malformed": source.get("on_malformed", "raise"), "report": MalformedReport()}
        options["format"] = source["format"]
        return self._resolve(source["path"]), options

    def _text(self, texts: Mapping[str, str], identifier: str, kind: str, override: Any) -> str:
        try:
            return texts[identifier].strip()
        except KeyError:
            place = "the given mapping" if isinstance(override, Mapping) else override
            if place is None:
                place = self.info["queries" if kind == "query" else "corpus"]["path"]
            raise InputError(
                f"{self.lists.path}: {kind} {identifier!r} is not in {place}. Expected texts for all ids of the "
                f"lists. Check that the labels and these texts belong together."
            ) from None

    def _resolve(self, path: str) -> str:
        """Paths inside the folder are kept relative to it, so that it can be moved; others are absolute."""
        parts = [part if paths.is_remote(part) else str(self.path / part) for part in path.split(",")]
        return ",".join(parts)


@functools.lru_cache(maxsize=2)
def _load(store: str, key: str, parts: tuple[str, ...], lists: str, fingerprint: str) -> LabelTable:
    wanted = np.unique(label_store.as_strings(Lists(paths.of(lists).parent).keys()))
    return LabelStore(store).load(key, only=wanted, parts=parts)


def read_labels(
    folder: PathType,
    *,
    teacher: str | None = None,
    queries: PathType | Mapping[str, str] | None = None,
    documents: PathType | Mapping[str, str] | None = None,
) -> Iterator[LabelledPair]:
    """Streams the labelled pairs of a folder, a query's pairs together, its positive first.

    Args:
      folder: the label folder.
      teacher: a teacher's name in labels.json, its key, or a beginning of that; needless with one teacher.
      queries: other texts for the same query ids: a path in any format of queries, or a mapping.
      documents: other texts for the same document ids: a path in any format of corpora, or a mapping. With a
        translation here, the pair that the teacher read is looked up and the translated pair is yielded.

    Yields:
      The pairs in list order, with raw logits (false, true).

    Raises:
      InputError: no label folder, no such teacher, incomplete labels, an id without text, or a text that is
        not the one that was labelled (when neither `queries` nor `documents` is given).
    """
    yield from LabelFolder(folder).read(teacher=teacher, queries=queries, documents=documents)


def read_range(
    folder: PathType,
    start: int,
    stop: int,
    *,
    teacher: str | None = None,
    queries: PathType | Mapping[str, str] | None = None,
    documents: PathType | Mapping[str, str] | None = None,
) -> Iterator[LabelledPair]:
    """Streams rows `start` to `stop` (exclusive) of the lists, reading those alone; see `read_labels`."""
    opened = LabelFolder(folder)
    yield from opened.read(start, stop, teacher=teacher, queries=queries, documents=documents)


def num_pairs(folder: PathType) -> int:
    """Number of pairs, from the file's footer."""
    return Lists(folder).num_pairs


def num_queries(folder: PathType) -> int:
    """Number of queries (lists), from the file's footer."""
    return Lists(folder).num_queries


def files(folder: PathType) -> list[str]:
    """The files that decide what `read_labels` yields, apart from the texts: for fingerprints of datasets."""
    opened = LabelFolder(folder)
    store = opened.store
    keys = sorted(set(opened.teachers.values()))
    parts = [str(store.folder(key) / f"{name}.parquet") for key in keys for name in opened.parts(key)]
    return [str(opened.lists.path), str(opened.path / INFO), *parts]


def relevance(folder: PathType) -> Callable[[LabelledPair], float]:
    """A function from a pair of the folder to its relevance: 1.0 for a query's positive, 0.0 for a negative.

    It holds 16 bytes a query. The lists are read when it is first called.
    """

    @functools.cache
    def positives() -> np.ndarray:
        parts = [np.zeros((0, KEY_BYTES), np.uint8)]
        for rows in Lists(folder).rows():
            chosen = np.flatnonzero(rows.relevance > 0)
            named = [_ids_key(rows.query_ids[i], rows.document_ids[i]) for i in chosen]
            parts.append(np.frombuffer(b"".join(named), np.uint8).reshape(-1, KEY_BYTES))
        return np.sort(label_store.as_strings(np.concatenate(parts)))

    def of(pair: LabelledPair) -> float:
        key = np.frombuffer(_ids_key(pair.query_id, pair.document_id), np.uint8).reshape(1, KEY_BYTES)
        return float(label_store.is_among(key, positives())[0])

    return of


def _ids_key(query_id: str, document_id: str) -> bytes:
    return hashlib.sha256(f"{query_id}\0{document_id}".encode()).digest()[:KEY_BYTES]
