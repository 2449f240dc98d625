"""Keeps compiled programs on disk, so that the second process of a kind starts without compiling.

This is JAX's persistent compilation cache, switched on in a folder of this package:

    $INRANKER_JAX_COMPILATION_CACHE    a folder, or "off"
    $JAX_COMPILATION_CACHE_DIR         JAX's own variable (or setting); its folder and limit are left to the user
    $XDG_CACHE_HOME/inranker_jax/xla   by default, $XDG_CACHE_HOME being ~/.cache where it is not set

Below it is a folder for each version of JAX and kind of CPU, since programs for CPUs are machine code. Programs least
recently used go when all of a folder take more than `MAX_BYTES`. Any of it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

from inranker_jax.progress import announce

VARIABLE = "INRANKER_JAX_COMPILATION_CACHE"
MAX_BYTES = 4 << 30

# JAX keeps a program in NAME-cache and the time of its last use, 8 bytes written after it, in NAME-atime.
_PROGRAM, _LAST_USE, _LAST_USE_BYTES = "-cache", "-atime", 8
_LOCK = ".lockfile"
_LOCK_SECONDS = 5.0
# A disk with less room fills up with the next programs, and each would be warned of.
_LEAST_FREE_BYTES = 64 << 20

# Which lines of /proc/cpuinfo decide the code that is made: x86, ARM, others. Clocks and the like do not.
_CPU_LINES = (
    "vendor_id", "cpu family", "model", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features",
    "cpu", "features", "isa",
)  # fmt: skip

_once = threading.Lock()
_stderr = threading.Lock()


def enable() -> str | None:
    """Switches the cache on, once a process; call it before the first compilation. It initialises no device.

    A folder that cannot be used costs one line on standard error, and time, but never the run.

    Returns:
      The folder in use, or None without a cache.
    """
    with _once:
        return _enable()


@functools.cache
def _enable() -> str | None:
    import jax

    settings: Any = jax.config  # its attributes are made when JAX is imported
    chosen = os.environ.get(VARIABLE, "").strip()
    if chosen.lower() in ("off", "0", "false", "no") or not settings.jax_enable_compilation_cache:
        return None
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        # A start-up runs dozens of small programs, each below JAX's limit of a second.
        settings.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    own = settings.jax_compilation_cache_dir
    if own and not chosen:
        _guard_reads(None)
        return str(own)
    try:
        folder = _home(chosen) / f"{jax.__version__}-{cpu_fingerprint()}"
        _prepare(folder)
    except (OSError, RuntimeError) as error:
        problem = getattr(error, "strerror", None) or error
        where = getattr(error, "filename", None) or chosen or "~/.cache/inranker_jax/xla"
        announce(
            f"warning: compiled programs are not kept ({where}: {problem}). "
            f"Set {VARIABLE} to a folder that can be written, or to off."
        )
        return None
    settings.update("jax_compilation_cache_max_size", MAX_BYTES)
    settings.update("jax_compilation_cache_dir", str(folder))
    _guard_reads(folder)
    return str(folder)


def cpu_fingerprint() -> str:
    """Twelve hexadecimal digits that differ between CPUs for which different code is made."""
    facts = [platform.system(), platform.machine()]
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, colon, value = line.partition(":")
            if not colon and len(facts) > 2:
                break  # the first CPU speaks for all
            if name.strip() in _CPU_LINES:
                facts.append(f"{name.strip()}:{' '.join(sorted(value.split()))}")
    except OSError:
        facts.append(_processor_name())
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _processor_name() -> str:
    """What a system without /proc calls its CPU."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            return found.stdout.strip()
    return platform.processor()


def _home(chosen: str) -> pathlib.Path:
    """The folder that holds those of all versions and CPUs; RuntimeError for a user without a home."""
    if chosen:
        return pathlib.Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification has relative paths ignored.
    root = pathlib.Path(cache) if os.path.isabs(cache) else pathlib.Path("~/.cache").expanduser()
    return root / "inranker_jax" / "xla"


def _prepare(folder: pathlib.Path) -> None:
    """Makes the folder, sees that it can be written and locked, and deletes what was cut off while it was written.

    A process that is killed and a disk that is full leave a part of a program, without the time of its last use.
    JAX would neither read nor replace it, and would fail to find the oldest.

    Raises:
      OSError: it cannot be used.
    """
    import filelock

    # Machine code that will be run: nobody else may write it.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / _LOCK, timeout=_LOCK_SECONDS):
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as probe:
                probe.write(bytes(_LAST_USE_BYTES))
            for program in folder.glob(f"*{_PROGRAM}"):
                last_use = _beside(program)
                if not last_use.is_file() or last_use.stat().st_size != _LAST_USE_BYTES:
                    program.unlink(missing_ok=True)
                    last_use.unlink(missing_ok=True)
    except filelock.Timeout:
        raise OSError(None, "another process holds its lock", str(folder / _LOCK)) from None
    free = shutil.disk_usage(folder).free
    if free < _LEAST_FREE_BYTES:
        raise OSError(None, f"only {free >> 20} MiB are free", str(folder))


def _beside(program: pathlib.Path) -> pathlib.Path:
    return program.with_name(program.name.removesuffix(_PROGRAM) + _LAST_USE)


def _guard_reads(folder: pathlib.Path | None) -> None:
    """Has JAX compile anew, without a warning, what cannot be read, and keeps a native note off standard error.

    JAX offers no way to do either from outside. Where a later version keeps its functions elsewhere, damaged files
    are warned of as JAX does, and nothing else changes.

    Args:
      folder: where damaged files are deleted; None to leave them to their owner.
    """
    from jax._src import compilation_cache as private

    original: Callable[..., Any] | None = getattr(private, "get_executable_and_time", None)
    if original is None:
        return

    @functools.wraps(original)
    def read(cache_key: str, *arguments: Any, **named: Any) -> Any:
        try:
            with _without_loader_notes():
                return original(cache_key, *arguments, **named)
        except OSError:
            raise  # of the disk or the lock; JAX warns, and compiles
        except Exception:
            if folder is None:
                raise
            program = folder / f"{cache_key}{_PROGRAM}"
            program.unlink(missing_ok=True)
            _beside(program).unlink(missing_ok=True)
            return None, None  # as where there is no such program: it is compiled, and kept again

    private.get_executable_and_time = read


@contextlib.contextmanager
def _without_loader_notes() -> Iterator[None]:
    """Drops what XLA's loader of CPU programs writes to standard error; other lines follow when the block ends.

    On some CPUs it reports settings of the compiler's ("+prefer-no-gather") as features that the host lacks, for
    programs made on the same host (openxla/xla issue 44565). The folder's name takes care of hosts that differ.
    """
    with _stderr, contextlib.ExitStack() as undo:
        try:
            held = undo.enter_context(tempfile.TemporaryFile())
            kept = os.dup(2)
        except OSError:  # no standard error, or no place for a file: nothing is held back
            yield
            return
        undo.callback(os.close, kept)
        _flush()
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            _flush()
            os.dup2(kept, 2)
            held.seek(0)
            for line in held:
                if b"cpu_aot_loader" not in line and b"XLA:CPU compilation doesn't match" not in line:
                    os.write(2, line)


def _flush() -> None:
    if sys.stderr is not None:  # as in a process without a console
        sys.stderr.flush()
