"""What is said of a compiled program: memory, time from a roofline, and what does not fit."""

from __future__ import annotations

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inranker_jax.aot import programs, proof, report, search, topologies
from inranker_jax.aot.costs import Collective, Costs, Work
from inranker_jax.aot.programs import Program
from inranker_jax.aot.topologies import Topology
from inranker_jax.errors import InputError
from inranker_jax.hardware import CHIPS
from inranker_jax.partitioning import make_mesh
from tests.aot.recipes import needs_libtpu, recipe


@pytest.fixture(scope="module")
def machine() -> Topology:
    return topologies.describe("cpu:8")


@pytest.fixture(scope="module")
def found(machine: Topology) -> proof.Proof:
    return proof.prove(programs.training(recipe(make_mesh(2, 4, 1)), machine), machine)


def test_a_training_step_is_counted_as_by_hand(found: proof.Proof) -> None:
    assert found.costs is not None
    assert found.memory is not None
    devices, program = found.program.mesh.devices.size, found.program
    by_hand = (program.useful_flops + program.recomputed_flops) / devices
    assert found.costs.flops == pytest.approx(by_hand, rel=0.15)
    state = 3 * 4 * program_parameters(program) / 4  # parameters and two moments in float32, over fsdp=4
    assert state < found.memory.arguments < 1.3 * state
    assert found.memory.total < 2**30
    assert found.fits is None
    assert found.roofline is None
    assert {"all-gather", "all-reduce"} & {item.kind for item in found.costs.collectives}


def program_parameters(program: Program) -> int:
    return recipe(program.mesh).config.num_params


def test_the_report_says_it_all_in_text_and_json(found: proof.Proof) -> None:
    text = report.text(found)
    for part in (
        "train step for cpu:8: 8 cpu, 1 host",
        "mesh data=2 x fsdp=4 x model=1",
        "arguments",
        "temporaries",
        "capacity unknown",
        "useful FLOPs, by hand",
        "collectives of each chip",
        "no published peaks",
    ):
        assert part in text
    values = report.as_dict(found)
    assert found.memory is not None
    assert values["memory"]["total"] == found.memory.total
    assert values["mesh"] == {"data": 2, "fsdp": 4, "model": 1}
    assert values["pairs"] == 16


def test_a_roofline_by_hand() -> None:
    chip = dataclasses.replace(
        CHIPS["v5e"],
        peak_flops={"bfloat16": 10.0},
        hbm_bandwidth=5.0,
        ici_bandwidth=4.0,
        dcn_bandwidth=1.0,
        clock=2.0,
    )
    machine = Topology("x", tuple(jax.devices()), 2, chip, False)
    near = Collective(
        "all-gather", 1, 8.0, (0, 1, 2, 3), False, True
    )  # sends 6 at 4 / 2, as there is no torus
    far = Collective("all-reduce", 2, 1.0, (0, 4), False, False)  # sends 2 at 1
    costs = Costs((Work(100.0, 5.0, 200.0), Work(0.0, 20.0, 100.0)), (near, far), 0)
    program = Program(
        "train", lambda: None, make_mesh(8, 1, 1), 1, np.ones(4), 1.0, "", "bfloat16", 1.0, 0.0, 10
    )  # type: ignore[arg-type, return-value]
    line = proof.roofline(costs, machine, chip, program)
    assert (line.compute, line.memory) == (10.0, 5.0)
    assert line.instructions == 10.0 + 4.0
    assert (line.hidden, line.network) == (3.0, 5.0)
    assert line.best == 10.0
    assert line.estimate == 14.0 + 2.0
    assert line.by_compiler == 100.0 + 50.0 + 2.0


def test_the_words_of_the_tpu_compiler() -> None:
    old = "Ran out of memory in memory space hbm. Used 17.20G of 15.75G hbm."
    assert proof._used(old) == int(17.2 * 2**30)
    assert proof._used("something else") is None
    assert doctest.testmod(proof).failed == 0


@needs_libtpu
def test_the_tpu_compiler_says_what_does_not_fit() -> None:
    machine = topologies.describe("v5e:1x1")
    place = jax.sharding.SingleDeviceSharding(machine.devices[0])
    huge = jax.ShapeDtypeStruct((2**33,), jnp.float32, sharding=place)
    mesh = make_mesh(1, 1, 1, devices=machine.devices)
    program = dataclasses.replace(
        programs.forward(recipe(mesh), machine, "score"),
        lower=lambda: jax.jit(lambda x: (x + 1, x * 2)).lower(huge),
    )
    found = proof.prove(program, machine)
    assert found.fits is False
    assert found.needed is not None
    assert found.needed > 64 * 2**30
    text = report.text(found)
    assert "does NOT fit" in text
    assert "of 15.750 GiB" in text
    assert report.as_dict(found)["needed_bytes"] == found.needed


@pytest.mark.slow
@needs_libtpu
def test_gradients_cross_the_network_between_slices() -> None:
    machine = topologies.describe("v5e:2x2", slices=2)
    mesh = make_mesh(2, 4, 1, slices=2, devices=machine.devices)
    config = dataclasses.replace(recipe(mesh).config, num_layers=1, num_decoder_layers=1)
    found = proof.prove(programs.training(recipe(mesh, config=config), machine), machine)
    assert found.costs is not None
    far = [item for item in found.costs.collectives if proof.is_far(item, machine, 8)]
    # At least a chip's share of the gradients, and of arrays as small as these up to all of them.
    assert 4 * config.num_params / 4 < sum(item.wire_bytes for item in far) < 5 * config.num_params
    assert {len(item.group) for item in far} == {2}
    assert "between slices" in report.text(found)


@pytest.mark.slow
@needs_libtpu
def test_a_step_compiled_by_the_tpu_compiler() -> None:
    """The real one, for four chips of a v5e, with tiny arrays: what is counted there agrees with what is by hand."""
    machine = topologies.describe("v5e:2x2")
    mesh = make_mesh(1, 4, 1, devices=machine.devices)
    found = proof.prove(programs.forward(recipe(mesh), machine, "score"), machine)
    assert found.fits is True
    assert found.costs is not None
    assert found.roofline is not None
    # Rows and slots are padded to what fits the chip's units; of products there are as many as by hand.
    assert found.costs.flops * 4 == pytest.approx(found.program.useful_flops, rel=0.5)
    assert {"all-gather"} <= {item.kind for item in found.costs.collectives}
    assert all(len(item.group) in (2, 4) for item in found.costs.collectives)
    assert found.roofline.best <= found.roofline.estimate
    assert "pairs/s" in report.text(found)
    # Of arrays as small as these it is mostly what starting an instruction takes.
    assert found.roofline.by_compiler is not None
    assert "the compiler's own cost model" in report.text(found)


def test_a_search_tries_what_can_be_and_takes_the_smallest_that_fits(machine: Topology) -> None:
    meshes = {"a": (8, 1, 1), "b": (1, 8, 1), "same": (8, 1, 1), "idle": (1, 1, 1)}
    tried: list[search.Candidate] = []

    def make(candidate: search.Candidate) -> Program:
        tried.append(candidate)
        if candidate.batch_size == 7:
            raise InputError("batch size 7 does not split")
        sizes = meshes[candidate.mesh]
        devices = machine.devices[: sizes[0] * sizes[1]]
        return programs.forward(recipe(make_mesh(*sizes, devices=devices)), machine, "score")

    trials = search.search(list(meshes), [16], ["full", "none"], make, machine)
    assert [trial.candidate.remat for trial in trials] == ["none"] * 4  # it fits, so no other is tried
    assert [trial.problem for trial in trials] == ["", "", "the same here as a", "leaves devices idle"]
    chosen = search.best(trials)
    assert chosen is not None
    assert chosen.candidate.mesh == "b"  # on a CPU without peaks: what needs least memory
    table = search.table(trials)
    assert table.count("\n") == 5
    assert "| b | 16 | none | 1 x 8 x 1 |" in table
    assert search.search(["a"], [7], ["none"], make, machine)[0].problem == "batch size 7 does not split"
    assert search.best([]) is None
