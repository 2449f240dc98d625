"""Which paths are T5X checkpoints, on a disk or in an object store, and which of several is the newest.

T5X keeps `MODEL_DIR/checkpoint_STEP/` and renames a step into place when it is complete. In it lies either the
file `checkpoint` (msgpack, arrays beside it) or, when Orbax wrote it, the folder `state`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Collection
from typing import Any

from inranker_jax.errors import InputError

INDEX = "checkpoint"
ORBAX_FOLDER = "state"
ORBAX_INDEX = "_METADATA"
OCDBT_MANIFEST = "manifest.ocdbt"
STEP_NAME = re.compile(r"checkpoint_(\d+)")
# Where `t5x_save` writes a step of a disk, until it is complete.
_UNFINISHED = re.compile(rf"{STEP_NAME.pattern}\.tmp-\w+")
# Any of these makes a step readable; they are the last that is written into it.
_SIGNS = (INDEX, f"{ORBAX_FOLDER}/{INDEX}", f"{ORBAX_FOLDER}/{ORBAX_INDEX}")
# A file of an array of T5X's networks: those that T5X and `t5x_save` put beside the index.
_ARRAY_FILE = re.compile(
    r"(target|state\.param_states)\.(token_embedder|encoder|decoder)\.[\w.]+/(\.zarray|\d+(\.\d+)*)"
)
# What else may have `state` or `checkpoint` in it: our own steps, and models of Hugging Face's hub.
_OTHERS = ("model/metadata", "position/metadata", "model.safetensors", "model.safetensors.index.json")


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a checkpoint's arrays are.

    Attributes:
      folder: the folder of the arrays, a path or URL.
      index: the msgpack file or Orbax's JSON file in it that says which arrays there are.
      near: folders, nearest first, in which files about the model may lie.
    """

    folder: str
    index: str
    near: tuple[str, ...]

    @property
    def place(self) -> str:
        return f"{self.folder}/{self.index}"


class Files:
    """The files of one folder, by their paths in it.

    Args:
      folder: a path or an URL such as `gs://BUCKET/MODEL`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder.rstrip("/") or "/"

    def has(self, name: str) -> bool:
        return (pathlib.Path(self.folder) / name).is_file()

    def read(self, name: str) -> bytes | None:
        """The contents of a file, or None where there is none."""
        path = pathlib.Path(self.folder) / name
        return path.read_bytes() if path.is_file() else None

    def steps(self) -> dict[int, str]:
        """Step -> first of `_SIGNS` in its folder, or "" where it has none of them."""
        folder = pathlib.Path(self.folder)
        found = {}
        for child in folder.iterdir() if folder.is_dir() else ():
            if (match := STEP_NAME.fullmatch(child.name)) and child.is_dir():
                found[int(match[1])] = next((sign for sign in _SIGNS if (child / sign).is_file()), "")
        return found

    def store(self, name: str) -> dict[str, Any]:
        """TensorStore's description of a folder in this one."""
        path = (pathlib.Path(self.folder) / name).absolute()
        return {"driver": "file", "path": f"{path}/"}


class RemoteFiles(Files):
    """The files below an URL that TensorStore understands: `gs://`, `s3://`."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._opened: Any = None

    def _files(self) -> Any:
        if self._opened is None:
            import tensorstore as ts

            self._opened = ts.KvStore.open(f"{self.folder}/").result()
        return self._opened

    def _asking(self, question: Any) -> Any:
        try:
            return question(self._files())
        except (ValueError, OSError) as error:
            raise InputError(
                f"{self.folder}: cannot be read ({error}). Check the address and the credentials of this machine "
                "(Google Cloud: `gcloud auth application-default login`), or copy the folder here."
            ) from error

    def _names(self, first: str, end: str) -> list[str]:
        import tensorstore as ts

        keys = self._asking(lambda files: files.list(ts.KvStore.KeyRange(first, end)).result())
        return [key.decode() for key in keys]

    def has(self, name: str) -> bool:
        return bool(self._names(name, name + "\0"))

    def read(self, name: str) -> bytes | None:
        found = self._asking(lambda files: files.read(name).result())
        return bytes(found.value) if found.state == "value" else None

    def steps(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for name in self._names("checkpoint_", "checkpoint`"):  # "`" follows "_"
            head, _, rest = name.partition("/")
            if rest and (match := STEP_NAME.fullmatch(head)):
                before = found.setdefault(int(match[1]), "")
                found[int(match[1])] = before or (rest if rest in _SIGNS else "")
        return found

    def store(self, name: str) -> dict[str, Any]:
        import tensorstore as ts

        return ts.KvStore.Spec(f"{self.folder}/{name}/".replace("//", "/").replace(":/", "://", 1)).to_json()


def is_replaceable(names: Collection[str]) -> bool:
    """Whether an export may take the place of a step's folder.

    It may if the folder has the index, and so is a checkpoint, or if there is nothing in it but arrays of T5X's
    networks, which is what an upload, copy or removal that broke off leaves.

    Args:
      names: of all files below the step's folder, with `/` between folders.

    >>> is_replaceable([]), is_replaceable(["target.decoder.decoder_norm.scale/0"])
    (True, True)
    >>> is_replaceable(["target.pdf"]), is_replaceable(["target.pdf", "checkpoint"])
    (False, True)
    """
    return INDEX in names or all(_ARRAY_FILE.fullmatch(name) for name in names)


def is_incomplete(name: str) -> bool:
    """Whether a file, by its path in a folder of steps, is of a step that is not complete, unless it has its index."""
    head, _, rest = name.partition("/")
    if _UNFINISHED.fullmatch(head):
        return True
    return STEP_NAME.fullmatch(head) is not None and _ARRAY_FILE.fullmatch(rest) is not None


def open_folder(folder: str) -> Files:
    """The files of a folder, wherever it is."""
    return RemoteFiles(folder) if "://" in folder else Files(folder)


def locate(path: str) -> Location | None:
    """Finds the T5X checkpoint that a path names.

    Args:
      path: a step's folder, the file `checkpoint` in it, the folder `state` in it, or a folder that holds
        several steps, of which the newest complete one is meant.

    Returns:
      Where it is, or None where `path` is something else.

    Raises:
      InputError: a folder of steps none of which is complete, or a remote folder that cannot be listed.
    """
    if "://" not in path:
        path = str(pathlib.Path(path).expanduser())
    path = path.rstrip("/") or "/"
    head, _, name = path.rpartition("/")
    if name == INDEX and open_folder(head or ".").has(name):
        return _in_step(head or ".", INDEX)
    files = open_folder(path)
    if name == ORBAX_FOLDER and (head and not any(open_folder(head).has(other) for other in _OTHERS)):
        for index in (INDEX, ORBAX_INDEX):
            if files.has(index):
                return _in_step(head, f"{ORBAX_FOLDER}/{index}")
    sign = next((sign for sign in _SIGNS if files.has(sign)), None)
    if sign is not None:
        return None if any(files.has(other) for other in _OTHERS) else _in_step(path, sign)
    return _newest(path, files.steps())


def _newest(folder: str, steps: dict[int, str]) -> Location | None:
    complete = {step: sign for step, sign in steps.items() if sign}
    if complete:
        newest = max(complete)
        return _in_step(f"{folder}/checkpoint_{newest}", complete[newest])
    if steps:
        raise InputError(
            f"{folder}: checkpoint_{max(steps)} is not complete. Expected the file `{INDEX}` in it, or the folder "
            f"`{ORBAX_FOLDER}` with `{ORBAX_INDEX}`. Copy the whole folder again, or name another step."
        )
    return None


def _in_step(step_folder: str, sign: str) -> Location:
    subfolder, _, index = sign.rpartition("/")
    parent = step_folder.rpartition("/")[0] if "/" in step_folder else "."
    folder = f"{step_folder}/{subfolder}" if subfolder else step_folder
    return Location(folder, index, (step_folder, parent))
