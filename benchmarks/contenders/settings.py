"""Flags, folders and environment that the speed benchmarks share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import signal
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from .models import SHAPES
from .processes import Spec
from .workloads import ROOT, SHARED


def commas(text: str) -> list[str]:
    """An argparse type: comma-separated names."""
    return [part.strip() for part in text.split(",") if part.strip()]


def core_numbers(text: str) -> list[int]:
    """An argparse type: how many cores, of those that this process may use."""
    usable = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    if not 1 <= int(text) <= len(usable):
        raise argparse.ArgumentTypeError(f"{text} cores; this process may use {len(usable)}")
    return usable[: int(text)]


def selected(specs: Sequence[Spec], wanted: Sequence[str], modes: Sequence[str] = ()) -> list[Spec]:
    """The contenders that a user named, by whole names or parts of them, in the modes that they named.

    Args:
      specs: all of them.
      wanted: of `--contenders`; all without a wish.
      modes: of `--modes`; all without a wish. Contenders that have none of them are left out.

    Raises:
      SystemExit: a wish that fits nothing: what is not measured should not go unnoticed.
    """
    names = [spec.name for spec in specs]
    known = list(dict.fromkeys(mode for spec in specs for mode in spec.modes))

    def fits(part: str, name: str) -> bool:
        return part == name or (part in name and part not in names)

    for part in wanted:
        if not any(fits(part, name) for name in names):
            raise SystemExit(f"error: --contenders: none is {part!r}. Expected parts of {', '.join(names)}.")
    for mode in modes:
        if mode not in known:
            raise SystemExit(f"error: --modes: none is {mode!r}. Expected some of {', '.join(known)}.")
    found = []
    for spec in specs:
        kept = tuple(mode for mode in spec.modes if not modes or mode in modes)
        if (kept or not spec.modes) and (not wanted or any(fits(part, spec.name) for part in wanted)):
            found.append(dataclasses.replace(spec, modes=kept))
    return found


def add_common(parser: argparse.ArgumentParser, name: str, rounds: int) -> None:
    """Adds the flags of scoring.py and training.py."""
    add_folders(parser, name)
    parser.add_argument("--model", choices=SHAPES, default="t5-small", help="shape; the weights are random")
    parser.add_argument("--rounds", type=int, default=rounds, help="times that each contender has its turn")
    parser.add_argument(
        "--contenders", type=commas, default=[], help="only those with one of these in the name"
    )
    parser.add_argument(
        "--modes",
        type=commas,
        default=[],
        help="only these, such as sorted, dynamic, padded, bucketed, packed",
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="gpu: PyTorch and ours only")
    add_cores(parser)
    parser.add_argument(
        "--timeout", type=float, default=1200, help="seconds for a single answer of a contender"
    )


def add_cores(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that says how many cores everybody gets."""
    default = str(min(2, os.cpu_count() or 1))
    parser.add_argument("--cores", type=core_numbers, default=default, help=f"how many (default: {default})")


def add_folders(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the flags that say where files are."""
    parser.add_argument("--output_dir", type=pathlib.Path, default=ROOT / "outputs" / name)
    parser.add_argument(
        "--work_dir", type=pathlib.Path, default=ROOT / "outputs" / "benchmark_models",
        help="models and compiled programs, kept for the next run",
    )  # fmt: skip
    parser.add_argument("--shared", type=pathlib.Path, default=SHARED, help="folder of the real collections")


def environment(flags: argparse.Namespace) -> dict[str, str]:
    """Variables of all workers. Compiled programs are kept apart from the user's own."""
    caches = flags.work_dir.resolve()
    found = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "JAX_COMPILATION_CACHE_DIR": str(caches / "xla"),
    }
    return found if flags.device == "gpu" else {**found, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@contextlib.contextmanager
def run_folder(flags: argparse.Namespace) -> Iterator[pathlib.Path]:
    """Makes the folders of a run, and one for its temporary files; SIGTERM ends the run as Ctrl-C does."""
    flags.output_dir = flags.output_dir.resolve()
    flags.work_dir = flags.work_dir.resolve()
    for folder in (flags.output_dir, flags.work_dir):
        folder.mkdir(parents=True, exist_ok=True)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
            yield pathlib.Path(temporary)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; what was measured is in {flags.output_dir}") from None
    finally:
        signal.signal(signal.SIGTERM, previous)
