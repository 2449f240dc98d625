"""Which format a path has: the names of the formats, and one predictable rule for "auto".

"auto" decides by the name (compression endings left out), and for `.jsonl` by the keys of the first row:

1. a folder with `corpus.jsonl` or `queries.jsonl` is `beir`; else one with `.parquet` files is `parquet`;
   else one with a folder `corpus` (or `queries`) of `.parquet` files, as on the Hugging Face hub, is that
   folder; else one with `.txt` or `.md` files, in whatever folder below, and no data files is `text`;
2. `.tsv` is `tsv`, `.parquet` is `parquet`;
3. `.jsonl`, `.ndjson` and `.json` are `inpars` when the first row has `doc_id` and `query` (or `question`),
   `flagembedding` when it has `query` and `pos`, else `jsonl`;
4. anything else is an error that lists the formats.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from inranker_jax.corpora import files, inpars, rows, text_files
from inranker_jax.corpora.malformed import BadRow
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.records import PathType

FORMATS = ("beir", "tsv", "jsonl", "parquet", "inpars", "flagembedding", "text")
_ENDINGS = {
    "tsv": (".tsv", ".txt"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "inpars": (".jsonl", ".ndjson", ".json"),
    "flagembedding": (".jsonl", ".ndjson", ".json"),
}
_EXPECTED = f"one of {', '.join(FORMATS)}, or auto"


@dataclass(frozen=True)
class Found:
    """A format and the files that hold the rows, in order; for `text` also the folder of each file."""

    format: str
    files: tuple[str, ...]
    roots: tuple[str, ...] = ()


def find(path: PathType, format: str, role: str) -> Found:
    """Settles the format and the files of a corpus or a set of queries.

    Args:
      path: what the user gave: a file, a folder, a glob or a comma-separated list.
      format: one of `FORMATS`, or "auto".
      role: "corpus" or "queries", the file that is looked for in a BEIR folder.

    Raises:
      InputError: an unknown format, a path that does not exist, or one whose format cannot be told.
    """
    if format != "auto" and format not in FORMATS:
        raise InputError(f"format {format!r}: expected {_EXPECTED}.{did_you_mean(format, FORMATS)}")
    if format == "text" and role == "queries":
        raise InputError(f"{path}: the format 'text' is a folder of documents, not of queries.")
    places = files.find(path)
    parts = [_find_one(place, format, role) for place in places]
    kinds = {part.format: place for place, part in zip(places, parts, strict=True)}
    if len(kinds) > 1:
        described = ", ".join(f"{place} is {name}" for name, place in kinds.items())
        raise InputError(
            f"{path}: the parts of one source have one format, but {described}. Name it: {_EXPECTED}."
        )
    return Found(
        parts[0].format,
        tuple(name for part in parts for name in part.files),
        tuple(root for part in parts for root in part.roots),
    )


def _find_one(place: str, format: str, role: str) -> Found:
    if files.as_path(place).is_dir():
        return _find_in_folder(place, format, role)
    if format == "beir":
        raise InputError.at(
            place, None, "this is a file", f"a BEIR folder with {role}.jsonl",
            "Name the folder, or another format",
        )  # fmt: skip
    if format == "text":
        return Found("text", (place,), (os.path.dirname(place),))
    return Found(_of_file(place) if format == "auto" else format, (place,))


def _find_in_folder(folder: str, format: str, role: str) -> Found:
    if format in ("auto", "beir"):
        name = files.in_folder(folder, f"{role}.jsonl")
        if name is not None:
            return Found("beir", (name,))
        other = "queries" if role == "corpus" else "corpus"
        if format == "beir" or files.in_folder(folder, f"{other}.jsonl"):
            raise InputError.at(
                files.as_path(folder) / f"{role}.jsonl",
                None,
                "no such file",
                f"a BEIR folder with {role}.jsonl",
            )
        if files.list_folder(folder, _ENDINGS["parquet"]):
            format = "parquet"
        elif (below := files.as_path(folder) / role).is_dir() and files.list_folder(below, (".parquet",)):
            folder, format = os.fspath(below), "parquet"
        elif role == "corpus" and text_files.find(
            folder, unless=(".tsv", ".csv", ".parquet", *_ENDINGS["jsonl"])
        ):
            format = "text"
        else:
            raise InputError.at(
                folder, None, "cannot tell the format of this folder",
                f"{role}.jsonl (beir), *.parquet files, or documents as *.txt or *.md (text) in it",
                f"Name the format ({_EXPECTED}): all files of that kind in the folder are read",
            )  # fmt: skip
    if format == "text":
        texts = text_files.find(folder)
        if not texts:
            raise InputError.at(
                folder, None, "no text file in this folder", "names that end with .txt or .md"
            )
        return Found("text", tuple(texts), (folder,) * len(texts))
    names = files.list_folder(folder, _ENDINGS[format])
    if not names:
        raise InputError.at(
            folder,
            None,
            f"no {format} file in this folder",
            f"names that end with {' or '.join(_ENDINGS[format])}",
        )
    return Found(format, tuple(names))


def _of_file(name: str) -> str:
    bare = files.bare_name(name)
    if bare.endswith(".tsv"):
        return "tsv"
    if bare.endswith(".parquet"):
        return "parquet"
    if bare.endswith(_ENDINGS["jsonl"]):
        return _of_json_lines(name)
    raise InputError.at(
        name, None, "cannot tell the format from the name", "a .tsv, .jsonl or .parquet file",
        f"Name the format: {_EXPECTED}",
    )  # fmt: skip


def _of_json_lines(name: str) -> str:
    source = rows.JsonLines(name)
    for _, _, raw in source.rows():
        try:
            row = source.fields(raw)
        except BadRow:
            return "jsonl"  # its reader names the line
        if inpars.looks_like(row):
            return "inpars"
        return "flagembedding" if "query" in row and "pos" in row else "jsonl"
    return "jsonl"
