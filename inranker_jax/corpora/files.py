"""Which files a path means: one file, a folder, a glob or a comma-separated list, here or on another machine.

Remote paths (`gs://`, `s3://`; see `inranker_jax.paths`) are read like local files.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Sequence

from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.paths import PathType, is_remote
from inranker_jax.paths import of as as_path
from inranker_jax.records import open_raw

COMPRESSIONS = ("", ".gz", ".zst")
_GLOB = re.compile(r"[*?\[]")
_CHUNK = 1 << 20


def bare_name(path: PathType) -> str:
    """The file's name in lower case without `.gz` or `.zst`."""
    return os.fspath(path).lower().removesuffix(".gz").removesuffix(".zst")


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts `part_2` before `part_10`.

    >>> sorted(["p10", "p2", "p1"], key=natural_key)
    ['p1', 'p2', 'p10']
    """
    return [
        (0, int(part)) if part.isascii() and part.isdigit() else (1, part)
        for part in re.split(r"([0-9]+)", name)
    ]


def find(path: PathType) -> list[str]:
    """The files and folders that a path means, each of which exists.

    A path that exists as it is written wins; then commas separate parts, each of which may be a glob. The
    matches of a glob come in natural order (`part_2` before `part_10`), parts in the order written.

    Raises:
      InputError: a part does not exist or matches nothing (a local one: with a suggestion), or comes twice.
    """
    text = os.fspath(path)
    if not text.strip():
        raise InputError(
            "the path is empty: name a file, a folder, a glob or a comma-separated list of files."
        )
    if not _GLOB.search(text) and "," not in text:
        _check_exists(text)
        return [text]
    if _exists(text):
        return [text]
    found: list[str] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        if _GLOB.search(part) and not _exists(part):
            matches = _matches(part)
            if not matches:
                raise InputError.at(part, None, "no file matches", remedy="Check the path and its wildcards")
            found.extend(matches)
        else:
            _check_exists(part)
            found.append(part)
    for number, name in enumerate(found):
        if name in found[:number]:
            raise InputError.at(name, None, f"listed twice in {text!r}", "every file once")
    return found


def _matches(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return sorted(glob.glob(pattern, recursive=True), key=natural_key)
    # The part before the first wildcard is a folder; the rest is the pattern below it.
    folder = pattern[: _GLOB.search(pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
    below = pattern[len(folder) + 1 :]
    return sorted((os.fspath(path) for path in as_path(folder).glob(below)), key=natural_key)


def _exists(name: str) -> bool:
    return bool(as_path(name).exists())


def _check_exists(name: str) -> None:
    path = as_path(name)
    if _exists(name):
        return
    siblings: list[str] = []
    if not is_remote(name) and path.parent.is_dir():
        siblings = [other.name for other in path.parent.iterdir()]
    raise InputError.at(
        name, None, f"no such file or folder.{did_you_mean(path.name, siblings)}".rstrip("."), "",
        "Check the path",
    )  # fmt: skip


def in_folder(folder: PathType, name: str) -> str | None:
    """The path of `folder/name`, plain or compressed, or None; a plain file wins over a compressed one."""
    for suffix in COMPRESSIONS:
        path = as_path(folder) / (name + suffix)
        if path.is_file():
            return os.fspath(path)
    return None


def list_folder(folder: PathType, endings: tuple[str, ...]) -> list[str]:
    """The files right below a folder whose names, compression left out, end so; in natural order."""
    names = (os.fspath(path) for path in as_path(folder).iterdir())
    kept = [
        name
        for name in names
        if bare_name(name).endswith(endings) and not os.path.basename(name).startswith((".", "_"))
    ]
    return sorted(kept, key=natural_key)


def fingerprint(files: Sequence[str], ids: Sequence[str] | None = None) -> str:
    """SHA-256 (hexadecimal) of the bytes of a file as stored, as `sha256sum` prints it.

    Of several files: the SHA-256 of their SHA-256s, one a line.

    Args:
      files: the files, in order.
      ids: where a file's name is an id and so part of the data: the id of each file, hashed with its SHA-256.
    """
    digests = []
    for name in files:
        digest = hashlib.sha256()
        with open_raw(name) as raw:
            while chunk := raw.read(_CHUNK):
                digest.update(chunk)
        digests.append(digest.hexdigest())
    if ids is not None:
        # Ids hold no blanks (`text_files`), so one line cannot be read as two.
        digests = [f"{digest} {identifier}" for digest, identifier in zip(digests, ids, strict=True)]
    elif len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()
