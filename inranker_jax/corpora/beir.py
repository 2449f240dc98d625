"""The BEIR folder format: `corpus.jsonl`, `queries.jsonl`, `qrels/<split>.tsv` (Thakur et al., 2021).

A line of the corpus is `{"_id", "title", "text"}` (the title may be missing), a line of the queries
`{"_id", "text"}`; other keys are ignored. Either file may be compressed (`.gz`, `.zst`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from inranker_jax import records
from inranker_jax.corpora import files
from inranker_jax.errors import InputError, did_you_mean, json_problem
from inranker_jax.records import Document, PathType, Qrels, Query


@dataclass(frozen=True)
class BeirCollection:
    """A collection held in memory.

    Attributes:
      name: what reports call it; by default the folder's name.
      documents: document id -> document, in the order of the file.
      queries: query id -> query, every query of the file, judged or not.
      qrels: the judgments; only queries that occur here are evaluated.
      split: which judgments these are, for example "test".
    """

    name: str
    documents: dict[str, Document]
    queries: dict[str, Query]
    qrels: Qrels
    split: str = "test"
    source: str = field(default="", compare=False)

    @property
    def judged_queries(self) -> dict[str, Query]:
        """The queries to run: judged ones whose text is known, in the order of the queries file."""
        return {key: query for key, query in self.queries.items() if key in self.qrels}

    @property
    def judged_without_text(self) -> list[str]:
        """Ids of judged queries that the queries file lacks: they score 0 and count in every mean."""
        return [key for key in self.qrels if key not in self.queries]

    @classmethod
    def load(
        cls,
        folder: PathType,
        split: str = "test",
        *,
        name: str | None = None,
        qrels_file: PathType | None = None,
    ) -> BeirCollection:
        """Reads a collection.

        Args:
          folder: folder with `corpus.jsonl`, `queries.jsonl` and `qrels/`.
          split: which file of `qrels/` holds the judgments.
          name: what reports call it; default: the folder's name.
          qrels_file: another judgment file (BEIR or TREC form) in place of `qrels/<split>.tsv`.

        Returns:
          The collection.

        Raises:
          InputError: a file is missing or malformed (with its line), an id occurs twice, the collection holds
            no document, or no judged query occurs in the queries file.
        """
        qrels = read_qrels(folder, split) if qrels_file is None else records.read_qrels(qrels_file)
        queries = {query.id: query for query in read_queries(folder)}
        if not any(key in queries for key in qrels):
            place = qrels_file if qrels_file is not None else files.as_path(folder) / "qrels" / f"{split}.tsv"
            raise InputError.at(
                place,
                None,
                f"none of its queries (such as {next(iter(qrels))!r}) is in {folder}/queries.jsonl",
                "judgments of this collection's queries",
                "Check that --qrels or --split belongs to this dataset",
            )
        documents = {document.id: document for document in read_corpus(folder)}
        if not documents:
            raise InputError.at(files.as_path(folder) / "corpus.jsonl", None, "the corpus is empty")
        return cls(
            name=name or files.as_path(folder).name,
            documents=documents,
            queries=queries,
            qrels=qrels,
            split=split,
            source=os.fspath(folder),
        )


def read_corpus(folder: PathType) -> Iterator[Document]:
    """Yields the documents of `folder/corpus.jsonl` in the order of the file.

    Raises:
      InputError: naming file and line, for malformed JSON, a missing or bad field, an id that occurs twice.
    """
    for path, number, row in _rows(folder, "corpus.jsonl"):
        yield Document(
            id=row["_id"],
            text=_text(row, "text", path, number, required=True),
            title=_text(row, "title", path, number, required=False),
        )


def read_queries(folder: PathType) -> Iterator[Query]:
    """Yields the queries of `folder/queries.jsonl` in the order of the file; errors as in `read_corpus`."""
    for path, number, row in _rows(folder, "queries.jsonl"):
        yield Query(id=row["_id"], text=_text(row, "text", path, number, required=True))


def read_qrels(folder: PathType, split: str = "test") -> Qrels:
    """Reads `folder/qrels/<split>.tsv`.

    Raises:
      InputError: the folder or the split does not exist (the message lists those that do), or a line is
        malformed.
    """
    _check_folder(folder)
    path = files.as_path(folder) / "qrels" / f"{split}.tsv"
    compressed = files.in_folder(folder, f"qrels/{split}.tsv")
    if compressed is not None:
        path = files.as_path(compressed)
    else:
        splits = sorted(other.stem for other in path.parent.glob("*.tsv")) if path.parent.is_dir() else []
        have = f"this dataset has {', '.join(splits)}" if splits else "there are no qrels/*.tsv at all"
        raise InputError.at(
            path,
            None,
            f"no judgments for split {split!r}; {have}.{did_you_mean(split, splits)}".rstrip("."),
            "a tab-separated file with the header 'query-id corpus-id score'",
            "Choose another --split, or name a judgment file with --qrels",
        )
    return records.read_qrels(path)


def _check_folder(folder: PathType) -> None:
    path = files.as_path(folder)
    if path.is_dir():
        return
    local = not records.is_remote(folder) and path.parent.is_dir()  # a remote parent may hold millions
    siblings = [other.name for other in path.parent.iterdir()] if local else []
    raise InputError.at(
        path,
        None,
        f"no such folder.{did_you_mean(path.name, siblings)}".rstrip("."),
        "a BEIR folder with corpus.jsonl, queries.jsonl and qrels/",
    )


def _rows(folder: PathType, name: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    _check_folder(folder)
    path = files.in_folder(folder, name) or os.fspath(files.as_path(folder) / name)
    seen: dict[str, int] = {}
    for number, line in records.numbered_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError.at(path, number, json_problem(error), "one JSON object per line") from error
        if not isinstance(row, dict):
            raise InputError.at(
                path, number, f"a JSON {type(row).__name__}", "a JSON object with '_id' and 'text'"
            )
        key = row.get("_id")
        if isinstance(key, int) and not isinstance(key, bool):
            key = row["_id"] = str(key)
        if not isinstance(key, str) or not key or re.search(r"\s", key):
            raise InputError.at(
                path,
                number,
                f"'_id' is {key!r}",
                "a string without blanks: ids are columns of TREC run files",
            )
        if key in seen:
            raise InputError.at(
                path, number, f"id {key!r} occurs twice, first on line {seen[key]}", "unique ids"
            )
        seen[key] = number
        yield path, number, row


def _text(row: dict[str, Any], key: str, path: str, number: int, *, required: bool) -> str:
    value = row.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        problem = f"{key!r} of {row['_id']!r} is {value!r}" if key in row else f"no {key!r}{_near(key, row)}"
        raise InputError.at(path, number, problem, "a string")
    return value


def _near(key: str, row: dict[str, Any]) -> str:
    return did_you_mean(key, row).replace(" Did you mean", "; did you mean")
