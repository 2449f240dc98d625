"""Where the time of scoring or training goes on this machine, by kind of operation: ours alone, under JAX's profiler.

    python benchmarks/profile_steps.py [--step=score] [--model=t5-small] [--rows=4] [--length=256]

Prints, for float32 and bfloat16, milliseconds of one call and shares. `--step=train` takes a loss and its gradients,
without the optimizer's update. Operations are told apart by the equation or
scope that they come from. On a CPU an operation's time is that of its longest thread, and where two run side by side
both count: shares are of the sum. Calls run one at a time here; `Reranker` runs one a core.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import pathlib
import re
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The directory of this script is on the path.
from contenders.models import SHAPES

from inranker_jax import quiet
from inranker_jax.models import Compute, T5Config, apply, init_params

LABELS = np.array([6136, 1176], np.int32)
# The first that occurs in an operation's origin names its kind; the last two of attention are scopes of its code.
KINDS = (
    (("...i,io->...o", "...o,io->...i", "...i,...o->io", "ot,ti->oi"), "products with weights"),
    (
        ("nhqd,nhkd->nhqk", "nhqk,nhkd->nhqd", "nhdq,", "encoder_attention", "relative_bias"),
        "attention of the encoder",
    ),
    (("nsh", "she,", "nse", "nle", "nsk"), "cross-attention and head"),
    (("gather", "take", "scatter"), "embedding"),
)


def kind_of(origin: str) -> str:
    """The kind of operation that an `op_name` of the compiled program belongs to."""
    for marks, kind in KINDS:
        if any(mark in origin for mark in marks):
            return kind
    return "norms, casts, transposes, residuals"


def origins_of(program: str) -> dict[str, str]:
    """Where each operation of a compiled program comes from; its own word for it, and those of its body's lines."""
    origins: dict[str, str] = {}
    bodies: dict[str, str] = {}
    body = ""
    for line in program.splitlines():
        if header := re.match(r"%([\w.\-]+) \(", line):
            body = header[1]
        origin = re.search(r'op_name="([^"]*)"', line)
        said = origin[1] if origin else ""
        bodies[body] = f"{bodies.get(body, '')} {said}"
        if operation := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = ", line):
            called = re.search(r"calls=%([\w.\-]+)", line)
            origins[operation[1]] = f"{said} {bodies.get(called[1], '') if called else ''}"
    return origins


def scoring(function: Any, params: Any, dtype: str) -> tuple[Any, Any]:
    """A program of parameters and tokens, and parameters as `Reranker` keeps them."""
    stored = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(dtype) if path[-1].key == "kernel" else leaf, params
    )
    return jax.jit(lambda params, tokens: function(params, tokens)), stored


def training(function: Any, params: Any, _: str) -> tuple[Any, Any]:
    """The same for a loss and its gradients; parameters stay float32."""
    return jax.jit(jax.value_and_grad(lambda params, tokens: jnp.mean(function(params, tokens) ** 2))), params


STEPS = {"score": scoring, "train": training}


def times(run: Any, params: Any, tokens: np.ndarray, calls: int) -> collections.Counter[str]:
    """Milliseconds of a call by kind of operation."""
    program = run.lower(params, tokens).compile()
    # Library calls carry no origin of their own: their body's last line does.
    origins = origins_of(program.as_text())
    jax.block_until_ready(program(params, tokens))
    found: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(program(params, tokens))
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            for line in plane.lines:
                for event in line.events:
                    operation = dict(event.stats).get("hlo_op")
                    if operation is not None:
                        found[kind_of(origins.get(str(operation), ""))] += event.duration_ns / 1e6 / calls
    return found


def main() -> None:
    """Parses flags, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", choices=("score", "train"), default="score")
    parser.add_argument("--model", choices=SHAPES, default="t5-small")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--calls", type=int, default=10)
    flags = parser.parse_args()
    quiet.without_a_tpu()  # whose profiler is of another version
    config = T5Config(**dataclasses.asdict(SHAPES[flags.model]))
    params = jax.tree.map(jnp.asarray, init_params(config, 0))
    tokens = (
        np.random.default_rng(0).integers(3, config.vocab_size, (flags.rows, flags.length)).astype(np.int32)
    )
    print(
        f"{flags.model}, one call of {flags.rows} x {flags.length} tokens on {jax.devices()[0].device_kind}"
    )
    for dtype in ("float32", "bfloat16"):
        function = functools.partial(apply, config, label_ids=LABELS, compute=Compute(dtype=dtype))
        found = times(*STEPS[flags.step](function, params, dtype), tokens, flags.calls)
        total = sum(found.values())
        print(f"\n{dtype}: {total:.1f} ms")
        for kind, milliseconds in found.most_common():
            print(f"  {milliseconds / total:6.1%}  {milliseconds:7.1f} ms  {kind}")


if __name__ == "__main__":
    main()
