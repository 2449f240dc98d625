"""What can be verified: label folders, and the two forms in which InRanker published its logits."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from inranker_jax import paths
from inranker_jax.corpora import inranker, open_corpus, open_queries_any
from inranker_jax.corpora.label_folder import INFO, LISTS, LabelFolder
from inranker_jax.corpora.label_store import pair_key
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.records import LabelledPair, PathType, numbered_lines

FORMATS = ("auto", "label_folder", "msmarco_tsv", "beir_jsonl")
# Kinds of `ReadReport.skipped` and of a folder's own problems, in words.
PROBLEMS = {
    "columns": "lines with another number of columns than four",
    "json": "lines that are no JSON object with the four keys",
    "number": "logits that are no numbers",
    "not_finite": "logits that are not finite",
    "unknown_query": "query ids without a text",
    "unknown_document": "document ids without a text",
    "empty_query": "empty queries",
    "empty_document": "empty documents",
    "encoding": "texts with half a surrogate pair",
    "unlabelled": "pairs of the lists without a label",
    "changed_text": "pairs whose text is no longer the one that was labelled",
}


@dataclass(slots=True)
class Problems:
    """Pairs that could not be read: how many of each kind of `PROBLEMS`, and the first in words."""

    counts: dict[str, int]
    first: str = ""

    def add(self, kind: str, message: str) -> None:
        """Counts one."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first = self.first or message


Labelled = tuple[LabelledPair, bool]


class LabelSource(abc.ABC):
    """Labelled pairs that can be read again and again, and what is known of their ids and texts.

    Attributes:
      path: the file or folder.
      form: one of `FORMATS`, never "auto".
      teacher: the teacher's name in a label folder, else "".
      has_texts: whether texts can be compared, or only ids.
      has_ids: whether ids are the file's own; otherwise they are made from the texts.
    """

    def __init__(self, path: PathType, form: str, teacher: str, has_texts: bool, has_ids: bool) -> None:
        self.path, self.form, self.teacher = os.fspath(path), form, teacher
        self.has_texts, self.has_ids = has_texts, has_ids

    @abc.abstractmethod
    def pairs(self, problems: Problems) -> Iterator[Labelled]:
        """Yields (pair, whether it opens its query's list or is stored as its positive), in order.

        Args:
          problems: filled with what cannot be read.

        Raises:
          InputError: the source as a whole cannot be read.
        """


class _File(LabelSource):
    """InRanker's MS MARCO TSV or BEIR JSONL."""

    def __init__(self, path: PathType, form: str, queries: Any, documents: Any) -> None:
        joined = queries is not None and documents is not None
        super().__init__(path, form, "", form == "beir_jsonl" or joined, form == "msmarco_tsv")
        self._queries: Any = queries if joined else _Ids()
        self._documents: Any = documents if joined else _Ids()

    def _read(self, on_error: inranker.OnError, report: inranker.ReadReport) -> Iterator[LabelledPair]:
        # The orientation is a finding of ours, not an error of the reader's.
        options: dict[str, Any] = {"check_orientation": False, "report": report, "advice": "Correct the line"}
        if self.form == "beir_jsonl":
            return inranker.read_beir_jsonl(self.path, on_error, **options)
        return inranker.read_msmarco_tsv(self.path, self._queries, self._documents, on_error, **options)

    def pairs(self, problems: Problems) -> Iterator[Labelled]:
        report = inranker.ReadReport()
        previous: str | None = None
        for pair in self._read("skip", report):
            yield pair, pair.query_id != previous
            previous = pair.query_id
        for kind, count in report.skipped.items():
            problems.counts[kind] = problems.counts.get(kind, 0) + count
        if report.skipped:
            problems.first = problems.first or self._first_error()

    def _first_error(self) -> str:
        try:
            for _ in self._read("raise", inranker.ReadReport()):
                pass
        except InputError as error:
            return str(error)
        return ""


class _Ids(Mapping[str, str]):
    """Stands in for texts that were not given: every id is its own text."""

    def __getitem__(self, identifier: str) -> str:
        if not identifier.strip():
            raise KeyError(identifier)
        return identifier

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class _Folder(LabelSource):
    def __init__(self, folder: LabelFolder, teacher: str, queries: Any, documents: Any) -> None:
        super().__init__(folder.path, "label_folder", teacher, True, True)
        self._folder = folder
        self._own = queries is None and documents is None
        self._queries, self._documents = queries, documents

    def pairs(self, problems: Problems) -> Iterator[Labelled]:
        table = self._folder.labels(self.teacher)
        queries = self._folder.query_texts(self._queries)
        documents = self._folder.document_texts(self._documents)
        for rows in self._folder.lists.rows():
            found, logits = table.lookup(rows.keys)
            for index, (query_id, document_id) in enumerate(
                zip(rows.query_ids, rows.document_ids, strict=True)
            ):
                place = f"{self._folder.lists.path}: query {query_id!r}, document {document_id!r}"
                query, document = queries.get(query_id), documents.get(document_id)
                if query is None or document is None:
                    kind = "unknown_query" if query is None else "unknown_document"
                    problems.add(kind, f"{place}: no text for the {kind.removeprefix('unknown_')}")
                    continue
                query, document = query.strip(), document.strip()
                if self._own and pair_key(query, document) != rows.keys[index].tobytes():
                    problems.add("changed_text", f"{place}: the text has changed since it was labelled")
                    continue
                if not found[index]:
                    problems.add("unlabelled", f"{place}: no label in {self._folder.store.path}")
                    continue
                values = logits[index]
                if not np.isfinite(values).all():
                    problems.add("not_finite", f"{place}: the logits are {values.tolist()}")
                    continue
                pair = LabelledPair(
                    query_id, document_id, query, document, (float(values[0]), float(values[1]))
                )
                yield pair, bool(rows.relevance[index])


def open_sources(
    path: PathType,
    form: str = "auto",
    *,
    teacher: str | None = None,
    queries: PathType | None = None,
    documents: PathType | None = None,
    queries_format: str = "auto",
    corpus_format: str = "auto",
    on_malformed: Literal["raise", "skip"] = "raise",
) -> list[LabelSource]:
    """Opens labels of any form.

    Args:
      path: a label folder, an InRanker TSV or an InRanker JSONL.
      form: one of `FORMATS`; "auto" looks.
      teacher: a teacher of a label folder; all of them without.
      queries: where the texts of query ids are: needed to compare texts of a TSV; for a label folder, other
        texts than those that were labelled.
      documents: where the texts of document ids are.
      queries_format: see `corpora.open_queries_any`.
      corpus_format: see `corpora.open_corpus`.
      on_malformed: whether rows of `queries` and `documents` that cannot be used are left out.

    Returns:
      One source; of a label folder, one for each teacher.

    Raises:
      InputError: there is nothing there that could be verified, or an option does not belong to it.
    """
    if form not in FORMATS:
        raise InputError(
            f"format {form!r}.{did_you_mean(form, FORMATS)} Expected one of {', '.join(FORMATS)}."
        )
    form = _form_of(path) if form == "auto" else form
    if form != "label_folder":
        if teacher is not None:
            raise InputError(f"{path}: a teacher is chosen in a label folder; this is a file of one teacher.")
        if form == "beir_jsonl" and (queries is not None or documents is not None):
            raise InputError(f"{path}: this file has its texts in it. Leave queries and corpus out.")
        if (queries is None) != (documents is None):
            raise InputError(f"{path}: give both queries and corpus, or none of them.")
    query_texts: Any = None
    if queries is not None:
        found = open_queries_any(queries, queries_format, on_malformed=on_malformed)
        query_texts = {query.id: query.text for query in found.queries()}
    document_texts: Any = None
    if documents is not None:
        document_texts = open_corpus(documents, corpus_format, on_malformed=on_malformed).texts()
    if form == "label_folder":
        folder = LabelFolder(path)
        if teacher is not None or not folder.teachers:
            folder.teacher_key(teacher)  # raises what is wrong
        names = [teacher] if teacher is not None else list(folder.teachers)
        return [_Folder(folder, name, query_texts, document_texts) for name in names]
    return [_File(path, form, query_texts, document_texts)]


def _form_of(path: PathType) -> str:
    name = os.fspath(path)
    folder = paths.of(name)
    if folder.is_dir():
        if not any((folder / file).exists() for file in (LISTS, INFO)):
            raise InputError.at(
                path,
                None,
                f"a folder without {LISTS} and {INFO}",
                "a label folder, or a file",
                "Make one with `python -m inranker_jax.label`, or name the file itself",
            )
        return "label_folder"
    for _, line in numbered_lines(path):
        if line.strip():
            return "beir_jsonl" if line.lstrip().startswith("{") else "msmarco_tsv"
    return "msmarco_tsv"
