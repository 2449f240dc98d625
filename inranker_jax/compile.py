"""Compiles a run's steps for a machine that is not there, and says what they need and how long a run takes.

    python -m inranker_jax.compile --gin_file=gin/runs/inranker_3b_phase2.gin --topology=v5e:4x4
    python -m inranker_jax.compile --gin_file=gin/runs/inranker_3b_phase2.gin --topology=v4-128 --step=label
    python -m inranker_jax.compile --gin_file=gin/runs/inranker_740m_phase2.gin --topology=v5e-4 --search
    python -m inranker_jax.compile --gin_file=gin/small_synth.gin --topology=cpu:8

The gin files and `--gin.NAME=VALUE` are those of `train`; what only names data or folders need not be set. With libtpu
(`pip install 'inranker_jax[tpu-compiler]'`) it is the compiler that real TPUs use: what it refuses, they refuse. See
docs/pods.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from inranker_jax import configuration, flags, paths, quiet
from inranker_jax.aot import programs, proof, report, search, topologies
from inranker_jax.aot.programs import STEPS, Program, Recipe
from inranker_jax.aot.topologies import Topology
from inranker_jax.configuration import gin
from inranker_jax.errors import InputError, did_you_mean
from inranker_jax.models import Compute, T5Config
from inranker_jax.packing import Layout
from inranker_jax.partitioning import make_mesh, using_devices
from inranker_jax.progress import announce, clock
from inranker_jax.prompts import ScoringContract, preset
from inranker_jax.students import with_lengths

_SAY_EVERY = 30.0  # seconds

# Flags of label and score, and what says the same to the training step.
_IN_GIN = {
    "mesh": "its mesh is that of the gin files: name one, such as --gin_file=gin/meshes/fsdp.gin",
    "dtype": """its products are as the gin files say, which --gin.DTYPE='"bfloat16"' changes""",
    "tokens_per_call": "its micro-batches are as --gin.packing.Layout.tokens_per_call=1024 says",
}

# Macros that only say where things lie; a compiler needs none of them.
_PLACES = (
    "MODEL_DIR",
    "MIXTURE_OR_TASK_NAME",
    "MIXTURE_OR_TASK_MODULE",
    "INITIAL_CHECKPOINT_PATH",
    "VOCABULARY",
)


def recipe(
    total_steps: int,
    batch_size: int,
    optimizer: Callable[..., Any],
    learning_rate: Callable[[int], float] | float,
    loss: Callable[..., jax.Array],
    model: T5Config | None = None,
    contract: ScoringContract | None = None,
    task_feature_lengths: Mapping[str, int] | None = None,
    compute: Compute | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dropout_rate: float | None = None,
    max_grad_norm: float | None = 1.0,
    accumulation: int = 1,
    list_size: int | None = None,
    layout: Layout | str = "auto",
    lengths: Sequence[int] = (128, 256, 384, 512),
    **_: Any,
) -> Recipe:
    """What the arguments of `train.train` say of its steps: those that decide what is compiled.

    Raises:
      InputError: no model is bound. That of a checkpoint is not looked up.
    """
    if model is None:
        raise InputError(
            "no model: bind train.model, for instance with a second --gin_file=gin/models/t5_base.gin. The model "
            "of a checkpoint is not looked up here."
        )
    layout = Layout.of(layout)
    if layout.lengths is None:
        layout = dataclasses.replace(layout, lengths=tuple(lengths))
    return Recipe(
        config=model if dropout_rate is None else dataclasses.replace(model, dropout_rate=dropout_rate),
        contract=with_lengths(contract or preset("monot5"), task_feature_lengths),
        mesh=mesh or make_mesh(),
        total_steps=total_steps,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=learning_rate,
        loss=loss,
        compute=compute or Compute(),
        max_grad_norm=max_grad_norm,
        accumulation=accumulation,
        list_size=list_size or 1,
        layout=layout,
    )


def read_recipe(given: argparse.Namespace, bindings: Sequence[str], topology: Topology) -> Recipe:
    """Parses the gin files as `train` does, and builds their mesh on the topology's devices.

    Raises:
      InputError: as `configuration.parse_gin`, or a mesh that does not fit.
    """
    configurable = gin.external_configurable(recipe, "train", module="inranker_jax")
    with tempfile.TemporaryDirectory() as folder:
        places = pathlib.Path(folder) / "places.gin"
        places.write_text("".join(f"{name} = None\n" for name in _PLACES), encoding="utf-8")
        configuration.parse_gin([*given.gin_file, str(places)], bindings, given.gin_search_paths)
    with using_devices(topology.devices):
        found: Recipe = configurable()
    if found.mesh.devices.flat[0] not in topology.devices:  # `single_device_mesh` takes one of this process
        found = dataclasses.replace(found, mesh=make_mesh(1, 1, 1, devices=topology.devices[:1]))
    return found


def program_of(given: argparse.Namespace, found: Recipe, topology: Topology) -> Program:
    """The program that flags ask for.

    Raises:
      InputError: it does not fit the mesh.
    """
    if given.step == "train":
        return programs.training(found, topology, given.mean_length)
    layout, dtype = Layout(tokens_per_call=given.tokens_per_call), given.dtype or "bfloat16"
    return programs.forward(
        found, topology, given.step, given.mean_length, dtype=dtype, layout=layout, sizes=given.mesh
    )


def host_of(topology: Topology) -> Topology:
    """The chips of one host of a TPU slice as a machine of their own; other machines as they are.

    The compiler takes programs for all chips of the slice that it was told of, and aborts for some of them.
    """
    if topology.platform != "tpu" or len(topology.hosts) == 1:
        return topology
    version, _, shape = topology.name.partition(":")
    return topologies.describe(f"{version}:{'2x2x1' if shape.count('x') == 2 else '2x2'}")


def prove(given: argparse.Namespace, found: Recipe, topology: Topology) -> proof.Proof:
    """Compiles the program that flags ask for; a label step for one host, of which each other has a copy.

    Raises:
      InputError: it does not fit the mesh.
    """
    if given.step != "label":
        return proof.prove(program_of(given, found, topology), topology)
    host = host_of(topology)
    program = program_of(given, found, host)
    copies = len(topology.devices) // program.mesh.devices.size
    return proof.prove(dataclasses.replace(program, copies=copies), host)


def candidate_program(
    given: argparse.Namespace, bindings: Sequence[str], topology: Topology, candidate: search.Candidate
) -> Program:
    """The training step with another mesh, batch size and rematerialisation.

    Raises:
      InputError: they do not go together.
    """
    changed = argparse.Namespace(**vars(given))
    changed.gin_file = [*given.gin_file, f"meshes/{candidate.mesh}.gin"]
    more = [f"train.batch_size = {candidate.batch_size}", f"models.Compute.remat = {candidate.remat!r}"]
    if not any(line.startswith("train.compute") for line in configuration.effective_config().splitlines()):
        more.append("train.compute = @models.Compute()")
    return program_of(changed, read_recipe(changed, [*bindings, *more], topology), topology)


def _best_lines(trials: Sequence[search.Trial], chosen: search.Trial) -> list[str]:
    """Flags of the best combination, and before it of the best of each other batch size, which is another recipe."""
    sizes = dict.fromkeys(trial.candidate.batch_size for trial in trials)
    of_sizes = [
        search.best([trial for trial in trials if trial.candidate.batch_size == size]) for size in sizes
    ]
    others = [trial for trial in of_sizes if trial is not None and trial is not chosen]
    lines = []
    for trial in [*others, chosen]:
        best = trial.candidate
        what = "best" if trial is chosen else f"best of batch size {best.batch_size}"
        rate = f" ({trial.pairs_per_second:,.0f} pairs/s)" if trial.pairs_per_second else ""
        lines.append(
            f"{what}: --gin_file=gin/meshes/{best.mesh}.gin --gin.train.batch_size={best.batch_size} "
            f"--gin.models.Compute.remat='\"{best.remat}\"'{rate}"
        )
    return lines


def run(given: argparse.Namespace, bindings: Sequence[str]) -> int:
    """Compiles and reports. Returns the exit status: 3 where nothing fits.

    Raises:
      InputError: bad input.
    """
    topology = topologies.describe(given.topology, given.slices)
    announce(f"compiling for {topology}")
    found = read_recipe(given, bindings, topology)
    if given.search:
        trials = search.search(
            given.meshes or shipped_meshes(),
            given.batch_sizes or [found.batch_size, 2 * found.batch_size],
            given.remats or search.REMATS,
            functools.partial(candidate_program, given, bindings, topology),
            topology,
        )
        print(search.table(trials), flush=True)
        chosen = search.best(trials)
        if chosen is None or chosen.proof is None:
            print("nothing that was tried fits")
            return 3
        print("\n" + "\n".join(_best_lines(trials, chosen)) + "\n")
        result = chosen.proof
        written = {"best": report.as_dict(result), "tried": [_trial_dict(trial) for trial in trials]}
    else:
        result = prove(given, found, topology)
        written = report.as_dict(result)
    print(report.text(result), flush=True)
    if given.output:
        paths.of(given.output).parent.mkdir(parents=True, exist_ok=True)
        paths.write(given.output, json.dumps(written, indent=1) + "\n")
    return 3 if result.fits is False else 0


def _trial_dict(trial: search.Trial) -> dict[str, Any]:
    made = {} if trial.proof is None else report.as_dict(trial.proof)
    return {**dataclasses.asdict(trial.candidate), "problem": trial.problem, **made}


def shipped_meshes() -> list[str]:
    """Names of the files in gin/meshes."""
    return sorted(path.stem for path in (configuration.shipped_gin_folder() / "meshes").glob("*.gin"))


def _mesh_sizes(text: str) -> tuple[int, int, int]:
    try:
        data, fsdp, model = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected DATAxFSDPxMODEL, such as 1x4x1") from None
    return data, fsdp, model


def _batch_sizes(text: str) -> list[int]:
    try:
        return [flags.positive(part) for part in flags.commas(text)]
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected positive numbers with commas between, such as 32,64"
        ) from None


def parse_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line into flags and gin bindings.

    Raises:
      InputError: an unknown flag, a bad value, or flags that do not go together.
    """
    bindings, rest = configuration.split_gin_flags(argv)
    parser = flags.Parser("compile", "Compile a run's steps for a machine that is not there.")
    configuration.add_gin_flags(parser)
    add = parser.add_argument
    add("--topology", required=True, help="v5e:4x4, v5e-16, v4-128, v5p:4x4x4, v6e:16x16, ..., or cpu:8")
    add(
        "--slices",
        type=flags.positive,
        default=1,
        help="slices of it, with a slow network between (default 1)",
    )
    add("--step", choices=STEPS, default="train", help="which step (default train)")
    add(
        "--mean_length",
        type=flags.positive,
        help="tokens of a mean pair, for a mix of lengths; without it all pairs have the contract's max_length",
    )
    add("--dtype", choices=("bfloat16", "float32"), help="label, score: of the products (default bfloat16)")
    add("--tokens_per_call", type=flags.positive, help="label, score: tokens of a call on each device")
    add(
        "--mesh",
        type=_mesh_sizes,
        help="label, score: DATAxFSDPxMODEL; by default label takes a host's devices as data, score the gin mesh",
    )
    add("--search", action="store_true", help="train: try meshes, batch sizes and rematerialisation")
    add("--meshes", type=flags.commas, help="of gin/meshes, to search (default: all)")
    add("--batch_sizes", type=_batch_sizes, help="to search (default: the run's own, and twice that)")
    add("--remats", type=flags.commas, help="to search (default none,dots,full)")
    add("--output", help="file for the report as JSON")
    given = parser.parse(rest)
    if not given.gin_file:
        raise InputError("no --gin_file: name one, such as --gin_file=gin/runs/inranker_3b_phase2.gin.")
    _check_together(given)
    for name, known in (("meshes", shipped_meshes()), ("remats", search.REMATS)):
        for value in getattr(given, name) or ():
            if value not in known:
                raise InputError(
                    f"--{name}: no {value!r}.{did_you_mean(value, known)} Known: {', '.join(known)}."
                )
    return given, bindings


def _check_together(given: argparse.Namespace) -> None:
    """Refuses flags that would change nothing."""
    if given.search and given.step != "train":
        raise InputError(f"--search with --step={given.step}: it searches for the training step only.")
    for name, instead in _IN_GIN.items():
        if given.step == "train" and getattr(given, name) is not None:
            raise InputError(
                f"--{name} is for --step=label and --step=score. This is --step=train: {instead}."
            )
    for name in ("meshes", "batch_sizes", "remats"):
        if not given.search and getattr(given, name) is not None:
            raise InputError(f"--{name} is what --search tries. Add --search, or leave --{name} out.")


def _beside(work: Callable[[], int]) -> int:
    """Does the work in a thread, and says from time to time that it goes on.

    The compiler hears no signal for minutes: this thread does.
    """
    future: concurrent.futures.Future[int] = concurrent.futures.Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    started = time.monotonic()
    threading.Thread(target=do, daemon=True).start()
    while True:
        try:
            return future.result(timeout=_SAY_EVERY)
        except TimeoutError:
            if future.done():
                raise
            announce(f"still at it after {clock(time.monotonic() - started)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 2 for bad input, 3 for what does not fit."""
    quiet.libraries()
    try:
        given, bindings = parse_flags(sys.argv[1:] if argv is None else argv)
        jax.config.update("jax_platforms", "cpu")  # the machine at hand is not asked what it has
        return _beside(lambda: run(given, bindings))
    except InputError as error:
        announce(f"error: {configuration.message_of(error)}")
        return 2
    except KeyboardInterrupt:
        announce("interrupted")
        return 130


if __name__ == "__main__":
    exit_status = main()
    if exit_status == 130:
        os._exit(exit_status)  # the compiler cannot be stopped otherwise
    sys.exit(exit_status)
