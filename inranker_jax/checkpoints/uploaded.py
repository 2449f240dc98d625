"""Steps of a run in an object store that Orbax cannot write to: kept on this machine and copied from and to there.

Orbax and TensorStore write `gs://` themselves, from all processes at once. Of `s3://` Orbax knows nothing (0.12.8):
there a step is complete in the store when its `commit_success.txt` is, which is uploaded last.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import threading
from typing import Any

import jax

from inranker_jax import paths
from inranker_jax.errors import InputError
from inranker_jax.interruption import is_running
from inranker_jax.progress import announce

MARKER = "commit_success.txt"
REMOVED = "removed"
"""Where Orbax moves steps that it removes, at once: deleted file by file, half of one might be uploaded as a whole."""
_SECONDS = 0.5


def is_needed(folder: paths.PathType) -> bool:
    """Whether steps in that folder go there by upload."""
    return os.fspath(folder).startswith("s3://")


def check_processes(folder: paths.PathType) -> None:
    """Refuses what needs upload where there are several processes, whose parts of a step would need one folder.

    Raises:
      InputError: so it is.
    """
    if is_needed(folder) and jax.process_count() > 1:
        raise InputError(
            f"{folder}: a run of several processes cannot keep its checkpoints in s3://, which Orbax does not write. "
            "Use a gs:// folder, or a shared or mounted file system (such as FSx for Lustre)."
        )


def complete_steps(folder: Any) -> list[int]:
    """The steps of a remote `checkpoints` folder that were uploaded whole, ascending."""
    names = paths.names_below(folder)
    return sorted(int(name.split("/")[0]) for name in names if _is_marker(name))


def _is_marker(name: str) -> bool:
    step, _, below = name.partition("/")
    return step.isdigit() and below == MARKER


def best_step(folder: Any, metric: str) -> int | None:
    """The complete step whose metric is the lowest, else the newest; None where there is none."""
    steps = complete_steps(folder)
    values = {}
    for step in steps:
        stored = folder / str(step) / "metrics" / "metrics"
        if stored.exists() and metric in (found := json.loads(stored.read_text())):
            values[step] = float(found[metric])
    return min(values, key=lambda step: values[step]) if values else max(steps, default=None)


def newest_description(folder: Any) -> dict[str, Any] | None:
    """What the newest complete step says of its model; its arrays stay where they are. None where there is none."""
    step = max(complete_steps(folder), default=None)
    return None if step is None else json.loads((folder / str(step) / "model" / "metadata").read_text())


def fetch(folder: Any, step: int | None) -> pathlib.Path:
    """Copies one complete step to this machine; returns the folder that it is in, under its own name.

    Raises:
      InputError: there is no such step, or it is not complete.
    """
    if step not in complete_steps(folder):
        what = "no complete checkpoint yet" if step is None else f"no complete step {step}"
        raise InputError(f"{folder} has {what}. Train for longer, or name another run.")
    return paths.local_copy(folder / str(step)).parent


class UploadedSteps:
    """A local folder for Orbax whose complete steps follow to an object store, and vanish there as they do here.

    Whatever the machine, a run begins with the complete steps of the store: a step that this machine had finished and
    not uploaded when it died is not used.

    Args:
      remote: the run's `checkpoints` folder in the store.

    Attributes:
      folder: where Orbax writes.

    Raises:
      InputError: there are several processes, whose parts of a step would need one folder.
    """

    def __init__(self, remote: Any) -> None:
        check_processes(remote)
        self._remote = remote
        self.folder = _working_folder(os.fspath(remote))
        self._there = set(complete_steps(remote))
        for name in {name.split("/")[0] for name in paths.names_below(remote)} - set(map(str, self._there)):
            paths.remove(remote / name)  # torn: its marker was never reached
        for step in self._there:
            fetched = fetch(remote, step)
            shutil.copytree(fetched / str(step), self.folder / str(step), copy_function=os.link)
            (self.folder / str(step) / MARKER).unlink()
            shutil.rmtree(fetched)  # it would only fill the disk
        self._ending = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._thread = threading.Thread(target=self._follow, name="upload of checkpoints", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Uploads what is complete here and not there.

        Raises:
          OSError: it could not be uploaded.
        """
        with self._one_at_a_time:
            self._sync()

    def add(self, step: int, name: str, content: str) -> None:
        """Writes one more file of a step that is in the store; one that is not yet will be uploaded with it."""
        with self._one_at_a_time:
            if step in self._there:
                paths.write(self._remote / str(step) / name, content)

    def close(self) -> None:
        """Uploads the rest and removes the local folder.

        Raises:
          OSError: it could not be uploaded; the folder stays.
        """
        self._ending.set()
        self._thread.join()
        self.flush()
        shutil.rmtree(self.folder.parent)

    def _follow(self) -> None:
        while not self._ending.wait(_SECONDS):
            try:
                self.flush()
            except Exception as error:
                announce(f"{self._remote}: a checkpoint was not uploaded ({error}); trying again.")

    def _sync(self) -> None:
        here = {int(path.name) for path in self.folder.iterdir() if path.name.isdigit()}
        for step in sorted(here - self._there):
            self._upload(step)
        for step in sorted(self._there - here):
            # The marker first: what is being removed must not be taken for complete.
            paths.remove(self._remote / str(step) / MARKER)
            paths.remove(self._remote / str(step))
            self._there.discard(step)
        for moved in self.folder.glob(f"{REMOVED}/*"):
            shutil.rmtree(moved)

    def _upload(self, step: int) -> None:
        with tempfile.TemporaryDirectory(prefix=".uploading-", dir=self.folder.parent) as kept:
            try:
                # Links keep the files should Orbax move the step away meanwhile.
                shutil.copytree(self.folder / str(step), pathlib.Path(kept, "step"), copy_function=os.link)
            except (FileNotFoundError, shutil.Error):
                if (self.folder / str(step)).exists():
                    raise
                return  # it is gone already
            paths.upload(pathlib.Path(kept, "step"), self._remote / str(step))
        paths.write(self._remote / str(step) / MARKER, "complete")
        self._there.add(step)


def _working_folder(remote: str) -> pathlib.Path:
    """An empty folder for this process; those of processes that have died are removed."""
    home = paths.cache_folder() / "runs"
    digest = hashlib.sha256(remote.encode()).hexdigest()[:16]
    home.mkdir(parents=True, exist_ok=True)
    for other in home.glob(f"{digest}.*"):
        number = other.name.rpartition(".")[2]
        if number.isdigit() and not is_running(int(number)):
            shutil.rmtree(other, ignore_errors=True)
    made = home / f"{digest}.{os.getpid()}"
    shutil.rmtree(made, ignore_errors=True)
    (made / "steps").mkdir(parents=True)
    return made / "steps"
