"""Tries meshes, batch sizes and rematerialisation, and finds what fits and takes least time for an example."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax

from inranker_jax.aot import report
from inranker_jax.aot.programs import Program
from inranker_jax.aot.proof import Proof, prove
from inranker_jax.aot.topologies import Topology
from inranker_jax.errors import InputError
from inranker_jax.progress import announce

REMATS = ("none", "dots", "full")  # from the fastest to the smallest


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One combination.

    Attributes:
      mesh: name of a mesh's gin file.
      batch_size: lists a step.
      remat: of `Compute`.
    """

    mesh: str
    batch_size: int
    remat: str


@dataclasses.dataclass(frozen=True)
class Trial:
    """What came of a candidate: a proof, or why there is none."""

    candidate: Candidate
    proof: Proof | None = None
    problem: str = ""

    @property
    def pairs_per_second(self) -> float:
        """By the estimate; 0 for what does not fit."""
        if self.proof is None or self.proof.fits is False:
            return 0.0
        return self.proof.pairs_per_second or 0.0


def search(
    meshes: Sequence[str],
    batch_sizes: Sequence[int],
    remats: Sequence[str],
    make: Callable[[Candidate], Program],
    topology: Topology,
) -> list[Trial]:
    """Compiles combinations. Of one mesh and batch size only until the first policy fits: the next ones recompute more.

    Args:
      meshes: names of meshes; of two that divide the machine in the same way, the first is tried.
      batch_sizes: lists a step.
      remats: policies, which are tried from the fastest to the smallest.
      make: the program of a candidate; raises `InputError` for one that is not possible.
      topology: the machine.

    Returns:
      What was tried, in that order.
    """
    trials: list[Trial] = []
    seen: dict[tuple[tuple[tuple[str, int], ...], int], str] = {}
    ordered = [remat for remat in REMATS if remat in remats]
    for name, batch_size in itertools.product(meshes, batch_sizes):
        for candidate in (Candidate(name, batch_size, remat) for remat in ordered):
            try:
                program = make(candidate)
            except InputError as error:
                trials.append(Trial(candidate, problem=str(error).split("\n")[0]))
                break
            key = (tuple(program.mesh.shape.items()), batch_size)
            if seen.setdefault(key, name) != name:
                trials.append(Trial(candidate, problem=f"the same here as {seen[key]}"))
                break
            if program.mesh.devices.size < len(topology.devices):
                trials.append(Trial(candidate, problem="leaves devices idle"))
                break
            trials.append(_try(candidate, program, topology))
            announce(" ".join(_row(trials[-1])))
            if trials[-1].proof is not None and trials[-1].proof.fits is not False:
                break
    return trials


def _try(candidate: Candidate, program: Program, topology: Topology) -> Trial:
    try:
        return Trial(candidate, prove(program, topology))
    except jax.errors.JaxRuntimeError as error:  # one that the compiler fails on is not the end of the search
        return Trial(candidate, problem=str(error).split("\n")[0][:200])


def best(trials: Sequence[Trial]) -> Trial | None:
    """The fastest that fits; without published peaks (on CPU) the one that needs least memory."""
    possible = [trial for trial in trials if trial.proof is not None and trial.proof.fits is not False]
    if not possible:
        return None
    return max(possible, key=lambda trial: (trial.pairs_per_second, -_needed(trial)))


def _needed(trial: Trial) -> int:
    return (trial.proof.needed if trial.proof else None) or 0


def table(trials: Sequence[Trial]) -> str:
    """What was tried, as a Markdown table."""
    header = ("mesh", "batch", "remat", "data x fsdp x model", "memory", "fits", "pairs/s", "what came of it")
    return report.table([header, *map(_row, trials)])


def _row(trial: Trial) -> tuple[str, ...]:
    return tuple(_cells(trial))


def _cells(trial: Trial) -> Iterator[str]:
    candidate, proof = trial.candidate, trial.proof
    yield from (candidate.mesh, str(candidate.batch_size), candidate.remat)
    if proof is None:
        yield from ("", "", "", "", trial.problem)
        return
    yield " x ".join(map(str, proof.program.mesh.shape.values()))
    yield "?" if proof.needed is None else f"{proof.needed / 2**30:.2f} GiB"
    yield {True: "yes", False: "no", None: "?"}[proof.fits]
    yield f"{trial.pairs_per_second:,.0f}" if trial.pairs_per_second else ""
    yield f"compiled in {proof.seconds:.0f}s"
