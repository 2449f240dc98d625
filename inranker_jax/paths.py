"""Paths on this machine and in object stores (`gs://`, `s3://`): opening, replacing, copying.

Remote paths go through `etils.epath` and its fsspec backends, gcsfs and s3fs; arrays go through Orbax and TensorStore
(`checkpoints.native`). An object store has no folders, no rename and no append. What is kept whole there is one
object, which appears when its upload ends, or a folder whose last object, the marker, says that the rest is there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fnmatch
import hashlib
import importlib.util
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, cast

from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.progress import announce

PathType = str | os.PathLike[str]

# Scheme -> the package that opens it, and the extra of setup.py that installs it.
BACKENDS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# Files of a folder that are on their way at a time. fsspec's own number is an eighth of the files that this process may
# open, 131072 on some machines; gcsfs holds up to 50 MiB of each of them.
TRANSFERS = 16
CACHE_VARIABLE = "INRANKER_JAX_REMOTE_CACHE"

# epath prefers TensorFlow's file system where TensorFlow is installed, which has no s3:// and other credentials than
# gcsfs. It looks once, when the first path is opened: this module is imported before that.
os.environ.setdefault("EPATH_USE_TF", "0")


def is_remote(path: PathType) -> bool:
    """Whether a path names an object in a store (`gs://...`, `s3://...`) and not a file of this machine."""
    return "://" in os.fspath(path)


def of(path: PathType) -> Any:
    """A `pathlib`-like object: `pathlib.Path` for a local path, `epath.Path` for a remote one.

    Raises:
      InputError: the scheme is unknown, or the package that opens it is not installed.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    _check_backend(os.fspath(path))
    from etils import epath

    return epath.Path(os.fspath(path))


def absolute(path: PathType) -> Any:
    """`of(path)`, and a local path with its folders from the root on."""
    return of(path) if is_remote(path) else pathlib.Path(path).absolute()


def _check_backend(path: str) -> None:
    scheme = path.partition("://")[0]
    if scheme not in BACKENDS:
        raise InputError(
            f"{path}: no paths of the kind {scheme}:// are known.{did_you_mean(scheme, BACKENDS)} Expected a local "
            f"path or one of {', '.join(f'{known}://' for known in BACKENDS)}."
        )
    package, extra = BACKENDS[scheme]
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"{path}: {scheme}:// paths need the '{package}' package, which is not installed. "
            f"Run `pip install 'inranker_jax[{extra}]'`."
        )
    import fsspec

    # Listings that are kept would hide what another process has written since.
    for protocol in {scheme, "gcs" if scheme == "gs" else scheme}:
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def _file_system(path: PathType) -> tuple[Any, str]:
    """The fsspec file system of a remote path, and the path in its terms."""
    _check_backend(os.fspath(path))
    import fsspec

    return cast("tuple[Any, str]", fsspec.core.url_to_fs(os.fspath(path)))


def make_output_folder(folder: PathType) -> None:
    """Makes a folder that results go to, so that one which cannot be made is told before any work; a bucket has none.

    Raises:
      InputError: it cannot be made or written to.
    """
    check_reachable(folder)
    if is_remote(folder):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError.at(
            folder, None, f"this cannot be an output folder ({error.strerror})", "a folder, new or there already",
            "Choose one that you may write to",
        ) from error  # fmt: skip


def check_reachable(path: PathType) -> None:
    """Asks a store for a remote path once, so that a wrong bucket or missing rights are told before any work.

    Raises:
      InputError: the bucket does not exist or may not be read, or there are no credentials.
    """
    if not is_remote(path):
        return
    files, inside = _file_system(path)
    bucket = inside.split("/")[0]
    try:
        # Not `find`, which lists all below the path even where it gives one level of it.
        with contextlib.suppress(FileNotFoundError):
            files.ls(inside, detail=False)
        if not files.exists(bucket):
            raise FileNotFoundError(bucket)
    except FileNotFoundError as error:
        raise InputError(
            f"{os.fspath(path)}: there is no bucket {bucket!r}. Check its name, or create it."
        ) from error
    except Exception as error:
        # The libraries' errors of rights and credentials have no common class; those of the network are not ours.
        words = (
            "credential",
            "forbidden",
            "access denied",
            "permission",
            "unauthor",
            "anonymous",
            "401",
            "403",
        )
        if isinstance(error, PermissionError) or any(
            word in f"{type(error).__name__} {error}".lower() for word in words
        ):
            raise InputError(
                f"{os.fspath(path)}: bucket {bucket!r} may not be read ({error}). See docs/remote.md for credentials."
            ) from error
        if isinstance(error, OSError):  # aiohttp's errors of connections among them
            raise InputError(f"{os.fspath(path)}: the store could not be reached ({error}).") from error
        raise


@contextlib.contextmanager
def failures_told(path: PathType) -> Iterator[None]:
    """Turns what a store's library raises within the block, of whatever class, into an OSError that names the path.

    Raises:
      OSError: the store refused something or did not answer, or there is no room here.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{os.fspath(path)}: could not be read or written ({reason}).") from error


def open_file(path: PathType, mode: str) -> IO[Any]:
    """Opens a local or remote file in "rb" or "wb"; use `write` where a half-written file must not be seen."""
    if is_remote(path):
        return cast("IO[Any]", of(path).open(mode))
    return open(path, mode)


def read(path: PathType) -> bytes:
    """The whole file as one writer left it, though another may be replacing it.

    A remote file is one request: opening it asks for its size first, and then for as many bytes of what may be a newer
    and longer object.

    Raises:
      FileNotFoundError: there is no such file.
    """
    if not is_remote(path):
        return pathlib.Path(path).read_bytes()
    files, inside = _file_system(path)
    return bytes(files.cat_file(inside))


def write(path: PathType, content: str | bytes) -> None:
    """Writes a file that appears whole or not at all, in place of an older one; missing folders are made."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    if is_remote(path):
        files, inside = _file_system(path)
        files.pipe_file(inside, data)
        return
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def create(path: PathType, content: str | bytes) -> bool:
    """Writes a remote file unless there is one, whoever else tries at the same time.

    Returns:
      Whether it was written; if not, another writer was first.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    files, inside = _file_system(path)
    try:
        files.pipe_file(inside, data, mode="create")
    except Exception:
        # The stores' answers to a precondition that does not hold have no common class.
        if not files.exists(inside):
            raise
        # A request that was sent again, after its answer was lost, finds what itself has written.
        return bool(files.cat_file(inside) == data)
    return True


def upload(local: PathType, remote: PathType, marker: str | None = None) -> None:
    """Copies a local file, or all files of a folder, to a remote path, each of them whole.

    Args:
      local: a file or a folder.
      remote: the object, or the folder, to write.
      marker: name of the file that says that the folder is complete; it is uploaded last.
    """
    files, inside = _file_system(remote)
    source = pathlib.Path(local)
    if source.is_file():
        files.put_file(str(source), inside)
        return
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    first = [name for name in names if name != marker]
    if first:
        _transfer(files.put_file, [(str(source / name), f"{inside}/{name}") for name in first])
    if marker in names:
        files.put_file(str(source / marker), f"{inside}/{marker}")


def _transfer(move: Callable[[str, str], object], pairs: list[tuple[str, str]]) -> None:
    """Moves files, `TRANSFERS` at a time, and begins no other when one has failed.

    fsspec's `batch_size` does as much, but where one fails it warns on standard error of each that was not begun.
    """
    with concurrent.futures.ThreadPoolExecutor(TRANSFERS) as pool:
        moves = [pool.submit(move, *pair) for pair in pairs]
        try:
            for done in concurrent.futures.as_completed(moves):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def remove(path: PathType) -> None:
    """Removes a file or a folder with all that is in it; one that is not there is no error."""
    if is_remote(path):
        files, inside = _file_system(path)
        if "/" not in inside.strip("/"):
            raise ValueError(f"{os.fspath(path)} is a whole bucket, which is not this function's to remove.")
        with contextlib.suppress(FileNotFoundError):
            files.rm(inside, recursive=True)
    elif os.path.isdir(path):
        shutil.rmtree(path)
    else:
        pathlib.Path(path).unlink(missing_ok=True)


def names_below(path: PathType) -> list[str]:
    """Names of all files below a folder, with `/` between folders, sorted; none where there is no folder."""
    if is_remote(path):
        files, inside = _file_system(path)
        return sorted(name[len(inside) :].lstrip("/") for name in files.find(inside))
    root = pathlib.Path(path)
    return sorted(found.relative_to(root).as_posix() for found in root.rglob("*") if found.is_file())


def is_file(path: PathType) -> bool:
    """Whether there is a file. epath's and fsspec's `exists` say no where a store fails; this does not.

    Raises:
      Exception: of the store's library, where it did not answer or may not be asked.
    """
    if not is_remote(path):
        return os.path.isfile(path)
    files, inside = _file_system(path)
    try:
        return bool(files.info(inside)["type"] == "file")
    except FileNotFoundError:
        return False


def size(path: PathType) -> int:
    """Bytes of a file.

    Raises:
      FileNotFoundError: there is no such file.
    """
    if not is_remote(path):
        return os.stat(path).st_size
    files, inside = _file_system(path)
    return int(files.info(inside)["size"])


def version(path: PathType) -> str:
    """A text that changes when a file does: the store's number of the write, or a local file's time; "" for none."""
    try:
        if not is_remote(path):
            return str(os.stat(path).st_mtime_ns)
        files, inside = _file_system(path)
        info = files.info(inside)
    except OSError:
        return ""
    return "" if info["type"] == "directory" else _version(info)


# ------------------------------------------------------------------------------------------ copies on this machine


def cache_folder() -> pathlib.Path:
    """Where copies of remote files are kept: $INRANKER_JAX_REMOTE_CACHE, else in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return pathlib.Path(chosen).expanduser().absolute()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(root).expanduser().absolute() / "inranker_jax" / "remote"


def local_copy(path: PathType, skip: Sequence[str] = ()) -> pathlib.Path:
    """A local path as it is; of a remote file or folder a copy on this machine, fetched if it is not there yet.

    A copy is kept under what the store says of its objects (name, size, version), so that a changed object is fetched
    again. Processes may ask for the same copy at the same time.

    Args:
      path: a file or a folder.
      skip: patterns of `fnmatch`; what is below a remote folder and fits one of them is not fetched.

    Raises:
      InputError: there is nothing under a remote path, it changed while it was fetched, or its bucket cannot be read.
      Exception: of the store's library, where the store fails on the way.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    files, inside = _file_system(path)
    try:
        found = _listing(files, inside, skip)
    except Exception:
        check_reachable(path)  # in words, if it is the bucket or the rights
        raise
    if not found:
        raise InputError.at(path, None, "no such file or folder", remedy="Check the path")
    described = [f"{name}\0{size}\0{version}" for name, (size, version) in sorted(found.items())]
    digest = hashlib.sha256("\n".join([os.fspath(path), *described]).encode()).hexdigest()[:32]
    name = inside.rstrip("/").rpartition("/")[2]
    home = cache_folder() / digest
    target = home / name
    if target.exists():
        return target
    home.parent.mkdir(parents=True, exist_ok=True)
    fetching = pathlib.Path(tempfile.mkdtemp(prefix=".fetching-", dir=home.parent))
    try:
        wanted = [
            (f"{inside}/{below}" if below else inside, fetching / name / below) for below in sorted(found)
        ]
        for _, local in wanted:
            local.parent.mkdir(parents=True, exist_ok=True)
        _transfer(files.get_file, [(remote, str(local)) for remote, local in wanted])
        if _listing(files, inside, skip) != found:
            raise InputError.at(path, None, "it changed while it was fetched", remedy="Run the command again")
        with contextlib.suppress(OSError):  # another process was faster: its copy is the same
            fetching.rename(home)
    finally:
        shutil.rmtree(fetching, ignore_errors=True)
    return target


def _listing(files: Any, inside: str, skip: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Size and version of the objects below a path that are not skipped, by the rest of the name; "" is the path."""
    found = files.find(inside, detail=True)
    listing = {
        name[len(inside) :].lstrip("/"): (int(info["size"]), _version(info)) for name, info in found.items()
    }
    return {
        name: info
        for name, info in listing.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)
    }


def _version(info: dict[str, Any]) -> str:
    return str(
        info.get("generation") or info.get("ETag") or info.get("etag") or info.get("LastModified") or ""
    )


class Mirror:
    """A folder to write into that follows to its remote place; a local place is written to directly.

    For files that grow, such as TensorBoard's: what changed is uploaded whole, in a thread, at most once in
    `seconds` and when the mirror is closed.

    Attributes:
      folder: where to write.
    """

    def __init__(self, place: PathType, seconds: float = 60.0) -> None:
        self._place = os.fspath(place)
        self._remote = is_remote(place)
        self.folder = (
            pathlib.Path(tempfile.mkdtemp(prefix="inranker_jax.")) if self._remote else pathlib.Path(place)
        )
        self._seconds = seconds
        self._last = -seconds
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1) if self._remote else None
        self._pending: concurrent.futures.Future[None] | None = None

    def push(self) -> None:
        """Starts uploading what changed, unless it did so within the last `seconds` or still does.

        An upload that failed costs a line: the next one begins where it ended.
        """
        if self._thread is None or time.monotonic() - self._last < self._seconds:
            return
        if self._pending is not None:
            if not self._pending.done():
                return
            if (error := self._pending.exception()) is not None:
                announce(f"{self._place}: not uploaded ({error}); trying again.")
        self._last = time.monotonic()
        self._pending = self._thread.submit(self._upload)

    def close(self) -> None:
        """Uploads what is left, and removes the local folder of a remote place.

        Raises:
          OSError: an upload failed; the local folder stays.
        """
        if self._thread is None:
            return
        self._thread.shutdown(wait=True)
        self._thread = None
        self._upload()
        shutil.rmtree(self.folder)

    def _upload(self) -> None:
        for name in names_below(self.folder):
            state = (self.folder / name).stat()
            seen = (state.st_size, state.st_mtime_ns)
            if self._uploaded.get(name) != seen:
                upload(self.folder / name, f"{self._place.rstrip('/')}/{name}")
                self._uploaded[name] = seen
