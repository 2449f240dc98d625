"""Programs to compile are those that training and scoring run."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

import inranker_jax
from inranker_jax import losses, optimizers, train_state, trainer
from inranker_jax.aot import programs, topologies
from inranker_jax.data.batches import BatchStream
from inranker_jax.data.store import Example, ExampleStore
from inranker_jax.errors import InputError
from inranker_jax.models import init_params, t5
from inranker_jax.models.flops import forward_flops
from inranker_jax.packing import Layout
from inranker_jax.partitioning import make_mesh
from inranker_jax.prompts import ScoringContract, Tokenizer
from inranker_jax.scorer import Reranker
from tests.aot.recipes import recipe

VOCABULARY = pathlib.Path(inranker_jax.__file__).parent / "collections" / "python_docs" / "vocabulary"
CONTRACT = ScoringContract(
    name="own",
    template="Query: {query} Document: {document} Relevant:",
    label_pieces=("\u2581false", "\u2581true"),
    max_length=32,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(VOCABULARY)


def long_lists(count: int, documents: int) -> ExampleStore:
    """Every pair is cut to `max_length`, which is the worst case that `programs` takes."""
    examples = [
        Example(
            f"q{n}",
            f"question {n}",
            tuple(f"d{n}.{i}" for i in range(documents)),
            tuple(f"document {i} " + "word " * 60 for i in range(documents)),
            np.zeros((documents, 2), np.float32),
            np.eye(1, documents, dtype=np.float32)[0],
        )
        for n in range(count)
    ]
    return ExampleStore.from_examples(examples, "long:train")


def without_names(text: str) -> str:
    """Label ids are constants of the program, and what they are is unknown without a vocabulary."""
    return "\n".join(line for line in text.splitlines() if "module @" not in line)


@pytest.mark.parametrize(
    ("layout", "list_size", "loss", "accumulation"),
    [
        (Layout("packed"), 1, losses.normalized_logit_mse, 1),
        (Layout("packed", tokens_per_call=64), 4, losses.listwise_kl_divergence, 2),
        (Layout("packed", row_length=64, slots=2), 4, losses.normalized_logit_mse, 1),
        (Layout("bucketed", lengths=(16, 32)), 2, losses.normalized_logit_mse, 2),
    ],
    ids=["pairs", "lists", "documents", "bucketed"],
)
def test_the_training_step_is_the_one_that_training_runs(
    tokenizer: Tokenizer, layout: Layout, list_size: int, loss: losses.Loss, accumulation: int
) -> None:
    mesh, machine = make_mesh(4, 2, 1), topologies.describe("cpu:8")
    given = recipe(
        mesh,
        contract=CONTRACT,
        config=dataclasses.replace(recipe(mesh).config, vocab_size=4224),
        layout=layout,
        list_size=list_size,
        loss=loss,
        accumulation=accumulation,
    )
    program = programs.training(given, machine)
    with BatchStream(
        long_lists(20, list_size),
        CONTRACT,
        tokenizer,
        given.batch_size,
        layout=layout,
        platform="cpu",
        ways=8,
        accumulation=accumulation,
        whole_lists=trainer.needs_whole_lists(loss),
    ) as batches:
        batch = next(batches)
        slots = batches.layout.slots if layout.kind == "packed" else None
    optimizer = optimizers.build(given.optimizer(given.learning_rate), given.max_grad_norm)
    abstract = train_state.abstract_state(
        t5.abstract_params(given.config), t5.logical_axes(given.config), optimizer, mesh
    )
    spec = trainer.StepSpec(
        given.config, given.compute, programs._label_ids(CONTRACT), loss, optimizer, accumulation, slots
    )
    step, _ = trainer.compile_steps(spec, abstract, mesh)
    with jax.set_mesh(mesh):
        expected = step.__wrapped__.lower(abstract, trainer.put_batch(batch, mesh))  # type: ignore[attr-defined]
    assert without_names(program.lower().as_text()) == without_names(expected.as_text())
    assert program.trips == (batch["micro_batches"] if slots else accumulation)
    assert len(program.lengths) == given.batch_size * list_size
    assert program.useful_flops == 3 * forward_flops(given.config, np.full(given.batch_size * list_size, 32))


def test_the_forward_pass_is_the_one_that_a_reranker_runs(tokenizer: Tokenizer) -> None:
    mesh, machine = make_mesh(2, 2, 2), topologies.describe("cpu:8")
    layout = Layout("packed", tokens_per_call=128)
    given = recipe(mesh, contract=CONTRACT, config=dataclasses.replace(recipe(mesh).config, vocab_size=4224))
    program = programs.forward(given, machine, "score", layout=layout)
    reranker = Reranker(
        given.config,
        init_params(given.config, 0),
        tokenizer,
        CONTRACT,
        dtype="bfloat16",
        layout=layout,
        mesh=mesh,
    )
    window = reranker._prepare(([(f"question {n}", "word " * 60) for n in range(64)], range(64)))
    call = window.calls[0]
    sharding = programs.batch_sharding(mesh)
    arguments = [jax.device_put(array, sharding) for array in (call.tokens, call.segment_ids)]
    ids = programs._label_ids(CONTRACT)
    reranker._forward = programs.scorer._compiled(
        given.config, reranker._compute, ids, reranker.layout.slots, mesh
    )
    with jax.set_mesh(mesh):
        expected = reranker._forward.lower(reranker._params, *arguments)
    assert without_names(program.lower().as_text()) == without_names(expected.as_text())
    assert len(program.lengths) == len(call.sequences)
    assert (program.copies, program.mesh) == (1, mesh)


def test_each_host_labels_with_its_own_devices() -> None:
    machine = topologies.describe("cpu:8")
    given = recipe(make_mesh(1, 8, 1))
    label = programs.forward(given, machine, "label", sizes=(1, 2, 4))
    assert dict(label.mesh.shape) == {"data": 1, "fsdp": 2, "model": 4}
    assert programs.forward(given, machine, "label").mesh.shape["data"] == 8
    with pytest.raises(InputError, match="needs 3 devices, but there are 8"):
        programs.forward(given, machine, "label", sizes=(3, 1, 1))


def test_lengths_are_all_the_longest_or_a_mix_of_the_mean() -> None:
    assert set(programs.sample_lengths(10, 512, None).tolist()) == {512}
    mixed = programs.sample_lengths(4096, 512, 140)
    assert mixed.mean() == pytest.approx(140, rel=0.02)
    assert mixed.max() <= 512
    assert mixed.min() >= 1
    np.testing.assert_array_equal(mixed, programs.sample_lengths(4096, 512, 140))
    with pytest.raises(InputError, match="expected 1 to 512 tokens"):
        programs.sample_lengths(1, 512, 513)


def test_a_mix_of_lengths_needs_fewer_micro_batches() -> None:
    machine, mesh = topologies.describe("cpu:8"), make_mesh(8, 1, 1)
    given = recipe(mesh, batch_size=128, layout=Layout("packed", row_length=32, slots=4, tokens_per_call=64))
    worst, mixed = programs.training(given, machine), programs.training(given, machine, 12)
    assert worst.trips > 1.5 * mixed.trips
    assert mixed.useful_flops < worst.useful_flops / 2


def test_a_batch_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(InputError, match="does not split into 3 micro-batches over 8 devices"):
        programs.training(
            recipe(make_mesh(8, 1, 1), layout=Layout("padded"), accumulation=3), topologies.describe("cpu:8")
        )
