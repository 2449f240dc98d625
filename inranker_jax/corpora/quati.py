"""Quati (Bueno et al., 2024; cc-by-4.0): Portuguese web passages, native topics and graded judgments.

Passages `quati_1M.tsv`, or `quati_10M_part_00.tsv` to `_04.tsv` (`passage_id<tab>passage`); topics
`topics/quati_{test,all}_topics.tsv` (`query_id<tab>query`); judgments `qrels/quati_{1M,10M}_qrels.txt`
(`query 0 passage grade`, blanks, grades 0 to 3), which `records.read_qrels` reads.
"""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass

from inranker_jax.corpora import files
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.records import PathType, is_remote

SIZES = ("1M", "10M")
_PARTS = 5


@dataclass(frozen=True)
class QuatiFiles:
    """Where the parts of one size lie.

    Attributes:
      corpus: path for `open_corpus`; a glob over the five parts for 10M.
      queries: path for `open_queries_any`, or None if the folder has no topics.
      qrels: path for `read_qrels`, or None if the folder has no judgments of this size.
    """

    corpus: str
    queries: str | None
    qrels: str | None


def find(folder: PathType, size: str = "1M", *, topics: str = "test") -> QuatiFiles:
    """Finds Quati's files in a copy of the dataset.

    Args:
      folder: the folder that holds `quati_1M.tsv` or the five parts.
      size: "1M" or "10M".
      topics: "test" (the judged ones) or "all".

    Raises:
      InputError: an unknown size, or passages that are missing (the message names the part).
    """
    if size not in SIZES:
        raise InputError(f"size {size!r}: Quati has 1M and 10M.{did_you_mean(size, SIZES)}")
    if size == "1M":
        corpus = files.in_folder(folder, "quati_1M.tsv")
        if corpus is None:
            raise InputError.at(
                files.as_path(folder) / "quati_1M.tsv", None, "no such file", "Quati's passages"
            )
    else:
        parts = [f"quati_10M_part_{number:02}.tsv" for number in range(_PARTS)]
        found = {part: files.in_folder(folder, part) for part in parts}
        missing = [part for part, path in found.items() if path is None]
        if missing:
            raise InputError.at(
                folder, None, f"{', '.join(missing)} missing", f"the {_PARTS} parts of the 10M passages",
                "Fetch the missing parts: a corpus without them has other candidates",
            )  # fmt: skip
        endings = {str(path)[len(os.fspath(files.as_path(folder) / part)) :] for part, path in found.items()}
        here = os.fspath(files.as_path(folder))
        # A glob keeps the path short; a folder's own brackets are no wildcards.
        escaped = here if is_remote(folder) else glob.escape(here)
        corpus = (
            f"{escaped}/quati_10M_part_0[0-{_PARTS - 1}].tsv{endings.pop()}"
            if len(endings) == 1
            else ",".join(str(path) for path in found.values())
        )
    return QuatiFiles(
        corpus=corpus,
        queries=_first(folder, "topics", f"quati_{topics}_topics.tsv"),
        qrels=_first(folder, "qrels", f"quati_{size}_qrels.txt"),
    )


def _first(folder: PathType, below: str, name: str) -> str | None:
    return files.in_folder(folder, f"{below}/{name}") or files.in_folder(folder, name)
