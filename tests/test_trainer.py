"""The training step: equal to PyTorch, on every mesh, and with micro-batches."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from inranker_jax import losses, optimizers, train_state, trainer
from inranker_jax.data import micro_batches
from inranker_jax.errors import InputError
from inranker_jax.models import Compute, t5
from inranker_jax.packing import place
from inranker_jax.partitioning import make_mesh
from inranker_jax.trainer import put_batch
from tests.batches import LABEL_IDS, TINY, attended, random_batch, with_dropout

STEPS = 4
SLOTS = 4
ROW_LENGTH = 24
ALL_LOSSES = losses.weighted_sum(
    (
        losses.normalized_logit_mse,
        losses.true_logit_mse,
        losses.kl_divergence,
        losses.hard_cross_entropy,
        losses.listwise_kl_divergence,
    ),
    (1.0, 0.5, 0.7, 0.3, 0.9),
)


def one_device_mesh():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def spec_of(config=TINY, accumulation=1, optimizer=None, compute=None, loss=losses.normalized_logit_mse):
    return trainer.StepSpec(
        config=config,
        compute=compute or Compute(),
        label_ids=LABEL_IDS,
        loss=loss,
        # A large epsilon: where a gradient is zero but for rounding, Adam would turn its sign into a full step.
        optimizer=optimizer or optimizers.build(optimizers.adamw(1e-3, eps=1e-3), 1.0),
        accumulation=accumulation,
    )


def run(mesh, spec, steps=STEPS, batch=8):
    abstract = train_state.abstract_state(
        t5.abstract_params(spec.config), t5.logical_axes(spec.config), spec.optimizer, mesh
    )
    state = train_state.initialise(lambda: t5.init_params(spec.config, 3), spec.optimizer, 5, abstract)
    train, _ = trainer.compile_steps(spec, abstract, mesh)
    history = []
    for step in range(steps):
        state, metrics = train(state, put_batch(random_batch(step, batch=batch), mesh))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def pack(batch, rows):
    """The packed form of a padded batch, whose masked documents may be anywhere in a list."""
    tokens, mask = batch["tokens"], batch["list_mask"]
    lists, list_size, _ = tokens.shape
    lengths = [np.array([len(ids[attended(ids)]) for ids in tokens[n][mask[n]]]) for n in range(lists)]
    count = -(-lists // (rows // list_size))
    shape = micro_batches.Shape(count, rows, ROW_LENGTH, SLOTS, lists, list_size, (rows,))
    division = micro_batches.divide(lengths, shape)
    sequences = [ids[attended(ids)] for ids in tokens[mask]]
    owner = np.repeat(division.micro_batch, mask.sum(axis=1))
    packed = place(sequences, owner * rows + division.row, division.slot, ROW_LENGTH, count * rows)
    arrays = {"places": np.zeros((count, lists, list_size), np.int32)}
    lists_of, documents = np.nonzero(mask)
    where = (division.micro_batch[lists_of], division.place[lists_of], documents)
    arrays["places"][where] = division.row * SLOTS + division.slot
    for name, fill in (("list_mask", False), ("teacher_logits", np.nan), ("relevance", -1)):
        arrays[name] = np.full((count, lists, *batch[name].shape[1:]), fill, batch[name].dtype)
        arrays[name][where] = batch[name][lists_of, documents]
    arrays["numbers"] = np.zeros((count, rows, SLOTS), np.int32)
    arrays["numbers"][owner, division.row, division.slot] = batch["numbers"][mask]
    arrays["tokens"] = packed.tokens.reshape(count, rows, ROW_LENGTH)
    arrays["segment_ids"] = packed.segment_ids.reshape(count, rows, ROW_LENGTH)
    return {**arrays, "micro_batches": np.asarray(division.used, np.int32)}


# Programs are compiled in seconds; one layer shows what packing does.
SMALL = dataclasses.replace(TINY, num_layers=1, num_decoder_layers=1)


def one_step(spec, batch, mesh):
    """Metrics of a training step, its gradients, and the validation metrics."""
    spec = dataclasses.replace(spec, optimizer=optax.trace(0.0))
    abstract = train_state.abstract_state(
        t5.abstract_params(spec.config), t5.logical_axes(spec.config), spec.optimizer, mesh
    )
    train, validate = trainer.compile_steps(spec, abstract, mesh)
    state = train_state.initialise(lambda: t5.init_params(spec.config, 3), spec.optimizer, 5, abstract)
    arrays = put_batch(batch, mesh)
    validation = {name: float(value) for name, value in validate(state.params, arrays).items()}
    state, metrics = train(state, arrays)
    return {name: float(value) for name, value in metrics.items()}, state.opt_state.trace, validation


@pytest.mark.parametrize(
    ("loss", "list_size", "rows"),
    [(losses.normalized_logit_mse, 1, 2), (ALL_LOSSES, 5, 6), (ALL_LOSSES, 2, 20)],
    ids=["pairs", "lists", "one-micro-batch"],
)
def test_a_packed_step_is_the_padded_step(loss, list_size, rows):
    batch = random_batch(0, batch=9, list_size=list_size)
    mesh, spec = one_device_mesh(), spec_of(config=with_dropout(SMALL), loss=loss)
    packed = pack(batch, rows)
    metrics, gradients, validation = one_step(dataclasses.replace(spec, slots=SLOTS), packed, mesh)
    expected_metrics, expected, expected_validation = one_step(spec, batch, mesh)
    assert validation == pytest.approx(expected_validation, rel=1e-5)
    assert packed["tokens"].shape[0] > 1 or rows == 20
    for name in ("loss", "grad_norm", "documents", "useful_tokens"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-5), name
    assert metrics["tokens"] <= packed["micro_batches"] * rows * ROW_LENGTH
    assert metrics["useful_tokens"] <= metrics["tokens"]
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


def test_a_step_takes_the_place_of_the_state_before_it():
    """Donation: parameters and moments are never in memory twice."""
    mesh, spec = one_device_mesh(), spec_of(config=SMALL)
    abstract = train_state.abstract_state(
        t5.abstract_params(SMALL), t5.logical_axes(SMALL), spec.optimizer, mesh
    )
    train, _ = trainer.compile_steps(spec, abstract, mesh)
    state = train_state.initialise(lambda: t5.init_params(SMALL, 3), spec.optimizer, 5, abstract)
    before = jax.tree.leaves((state.params, state.opt_state))
    state, _ = train(state, put_batch(random_batch(0), mesh))
    assert all(leaf.is_deleted() for leaf in before)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_steps_of_any_fill_are_one_program_and_cost_what_they_hold():
    spec, mesh = spec_of(config=with_dropout(SMALL), loss=ALL_LOSSES), one_device_mesh()
    spec = dataclasses.replace(spec, slots=SLOTS)
    abstract = train_state.abstract_state(
        t5.abstract_params(SMALL), t5.logical_axes(SMALL), spec.optimizer, mesh
    )
    train, validate = trainer.compile_steps(spec, abstract, mesh)
    state = train_state.initialise(lambda: t5.init_params(SMALL, 3), spec.optimizer, 5, abstract)
    computed = {}
    for seed, length in ((0, 12), (1, 12), (2, 3), (3, 7)):
        batch = pack(random_batch(seed, batch=12, list_size=3, length=length), rows=6)
        validate(state.params, put_batch(batch, mesh))
        state, metrics = train(state, put_batch(batch, mesh))
        assert np.isfinite(float(metrics["loss"]))
        computed[length, int(batch["micro_batches"])] = float(metrics["tokens"])
    assert len(set(computed)) >= 3, "the steps must differ in their fill"
    assert min(computed.values()) < max(computed.values())
    assert train.__wrapped__._cache_size() == validate.__wrapped__._cache_size() == 1


def test_the_empty_half_of_a_micro_batch_changes_nothing_and_is_not_computed():
    mesh, spec = one_device_mesh(), dataclasses.replace(spec_of(config=SMALL), slots=SLOTS)
    batch = pack(random_batch(0, batch=4), rows=8)
    assert batch["tokens"].shape[:2] == (1, 8)
    assert not batch["segment_ids"][:, 4:].any()
    metrics, gradients, _ = one_step(spec, batch, mesh)
    assert metrics["tokens"] == 4 * ROW_LENGTH
    odd = {**batch, **{name: batch[name][:, :7] for name in ("tokens", "segment_ids", "numbers")}}
    all_metrics, all_gradients, _ = one_step(spec, odd, mesh)
    assert all_metrics["tokens"] == 7 * ROW_LENGTH
    assert metrics["loss"] == pytest.approx(all_metrics["loss"], rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(all_gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 4, 2)], ids=lambda shape: "x".join(map(str, shape)))
def test_every_mesh_gives_the_same_packed_step(shape):
    spec = dataclasses.replace(spec_of(config=with_dropout(SMALL), loss=ALL_LOSSES), slots=SLOTS)
    batch = pack(random_batch(0, batch=16, list_size=2), rows=8)
    assert batch["micro_batches"] > 1
    metrics, gradients, _ = one_step(spec, batch, make_mesh(*shape))
    expected_metrics, expected, _ = one_step(spec, batch, one_device_mesh())
    for name in ("loss", "grad_norm", "documents", "useful_tokens"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-4), name
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_gradients_may_be_kept_in_bfloat16(packed):
    batch = random_batch(0, batch=8, list_size=2)
    spec = spec_of(config=SMALL, accumulation=1 if packed else 2)
    if packed:
        batch, spec = pack(batch, rows=4), dataclasses.replace(spec, slots=SLOTS)
    small = dataclasses.replace(spec, compute=Compute(gradients="bfloat16"))
    (metrics, ours, _), (exact_metrics, exact, _) = (
        one_step(each, batch, one_device_mesh()) for each in (small, spec)
    )
    assert metrics["loss"] == exact_metrics["loss"]
    assert metrics["grad_norm"] == pytest.approx(exact_metrics["grad_norm"], rel=0.01)
    for rounded, leaf in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(rounded, leaf, atol=0.02 * np.abs(leaf).max() + 1e-8)
    moved = [
        np.abs(np.asarray(a) - b).max()
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True)
    ]
    assert max(moved) > 0, "rounded somewhere"


def test_only_losses_over_lists_need_whole_lists():
    assert trainer.needs_whole_lists(ALL_LOSSES)
    assert trainer.needs_whole_lists(losses.listwise_kl_divergence)
    pointwise = losses.weighted_sum((losses.kl_divergence, losses.hard_cross_entropy), (1.0, 1.0))
    assert not trainer.needs_whole_lists(pointwise)


@pytest.mark.parametrize(
    "shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)], ids=lambda shape: "x".join(map(str, shape))
)
def test_every_mesh_gives_the_same_losses(shape):
    spec = spec_of(config=with_dropout(TINY))
    reference_state, reference = run(one_device_mesh(), spec)
    state, history = run(make_mesh(*shape), spec)
    for ours, theirs in zip(history, reference, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for ours, theirs in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(reference_state.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_parameters_and_moments_are_really_split():
    state, _ = run(make_mesh(1, 4, 2), spec_of(), steps=1)
    kernel = state.params["encoder"]["layers_0"]["mlp"]["wi"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (TINY.d_model // 4, TINY.d_ff // 2)
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "wi" in jax.tree_util.keystr(path) and leaf.shape == kernel.shape
    ]
    assert len(moments) >= 2
    assert all(leaf.sharding.is_equivalent_to(kernel.sharding, 2) for leaf in moments)


@pytest.mark.parametrize("loss", [losses.normalized_logit_mse, losses.hard_cross_entropy])
def test_micro_batches_add_up_to_the_whole_batch(loss):
    config = with_dropout(TINY)
    whole_state, whole = run(one_device_mesh(), spec_of(config=config, loss=loss))
    state, parts = run(one_device_mesh(), spec_of(config=config, accumulation=4, loss=loss))
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole_state.params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_adafactor_trains_on_a_mesh():
    optimizer = optimizers.build(optimizers.adafactor(1e-2), 1.0)
    _, history = run(make_mesh(2, 2, 2), spec_of(optimizer=optimizer), steps=3)
    assert all(np.isfinite(metrics["loss"]) for metrics in history)


def test_dropout_changes_with_the_step_and_repeats_with_the_seed():
    spec = spec_of(config=with_dropout(TINY, 0.3), optimizer=optax.set_to_zero())
    mesh = one_device_mesh()
    abstract = train_state.abstract_state(
        t5.abstract_params(spec.config), t5.logical_axes(spec.config), spec.optimizer, mesh
    )
    train, _ = trainer.compile_steps(spec, abstract, mesh)
    batch = put_batch(random_batch(0), mesh)

    def two_steps():
        state = train_state.initialise(lambda: t5.init_params(spec.config, 3), spec.optimizer, 5, abstract)
        state, first = train(state, batch)
        return float(first["loss"]), float(train(state, batch)[1]["loss"])

    first, second = two_steps()
    assert first != second
    assert two_steps() == (first, second)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_nothing(remat):
    _, plain = run(one_device_mesh(), spec_of(config=with_dropout(TINY)), steps=2)
    _, recomputed = run(
        one_device_mesh(), spec_of(config=with_dropout(TINY), compute=Compute(remat=remat)), steps=2
    )
    for ours, theirs in zip(recomputed, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_validation_reports_the_mean_and_its_count():
    spec, mesh = spec_of(), one_device_mesh()
    abstract = train_state.abstract_state(
        t5.abstract_params(TINY), t5.logical_axes(TINY), spec.optimizer, mesh
    )
    _, validate = trainer.compile_steps(spec, abstract, mesh)
    params, batch = t5.init_params(TINY, 3), random_batch(0)
    metrics = validate(params, put_batch(batch, mesh))
    logits = np.asarray(trainer.forward(spec, params, batch))
    teacher = batch["teacher_logits"] - batch["teacher_logits"].mean(-1, keepdims=True)
    expected = np.square(logits - teacher).mean(-1)[batch["list_mask"]].mean()
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics["count"]) == batch["list_mask"].sum()


def test_a_single_relevance_logit_becomes_a_centred_pair():
    pair = trainer.false_true(np.array([[3.0], [-1.0]], np.float32))
    np.testing.assert_array_equal(pair, [[-1.5, 1.5], [0.5, -0.5]])


def test_an_indivisible_batch_size_names_one_that_fits():
    mesh = make_mesh(2, 2, 2)
    trainer.check_batch_size(32, 2, mesh)
    with pytest.raises(InputError, match="multiple of 8, such as 24"):
        trainer.check_batch_size(30, 2, mesh)
    trainer.check_batch_size(30, 2, mesh, packed=True)
    for batch_size in (0, -4, 8.5):
        with pytest.raises(InputError, match=f"batch size {batch_size}: expected a whole number of lists"):
            trainer.check_batch_size(batch_size, 1, mesh, packed=True)
    for batch_size, accumulation in ((2, 3), (4, 0)):
        with pytest.raises(InputError, match=f"batch size {batch_size} does not split into {accumulation}"):
            trainer.check_batch_size(batch_size, accumulation, mesh, packed=True)


def torch_model():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=TINY.vocab_size,
        d_model=TINY.d_model,
        d_kv=TINY.d_kv,
        d_ff=TINY.d_ff,
        num_layers=TINY.num_layers,
        num_decoder_layers=TINY.num_decoder_layers,
        num_heads=TINY.num_heads,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def torch_training(model, batches, learning_rate):
    """InRanker's loop in PyTorch: plain decoder, full vocabulary head, MSE to centred logits, clip 1, AdamW."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0
    )
    history = []
    for batch in batches:
        mask = torch.from_numpy(batch["list_mask"]).reshape(-1)
        tokens = torch.from_numpy(batch["tokens"]).long().flatten(0, 1)[mask]
        teacher = torch.from_numpy(batch["teacher_logits"]).flatten(0, 1)[mask]
        logits = model(
            input_ids=tokens,
            attention_mask=torch.from_numpy(attended(tokens.numpy())).long(),
            decoder_input_ids=torch.zeros((len(tokens), 1), dtype=torch.long),
        ).logits[:, 0, list(LABEL_IDS)]
        loss = torch.nn.functional.mse_loss(logits, teacher - teacher.mean(-1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append(loss.item())
    return history


def test_twenty_steps_equal_a_pytorch_loop(tmp_path):
    from inranker_jax.checkpoints import huggingface

    model = torch_model()
    model.save_pretrained(tmp_path / "start")
    start = huggingface.load(str(tmp_path / "start"))
    batches = [random_batch(seed) for seed in range(20)]
    learning_rate = 1e-3
    torch_losses = torch_training(model.train(), batches, learning_rate)
    model.save_pretrained(tmp_path / "end")
    expected = huggingface.load(str(tmp_path / "end")).params

    spec = spec_of(config=start.config, optimizer=optimizers.build(optimizers.adamw(learning_rate), 1.0))
    mesh = one_device_mesh()
    abstract = train_state.abstract_state(
        t5.abstract_params(spec.config), t5.logical_axes(spec.config), spec.optimizer, mesh
    )
    state = train_state.from_params(start.params, spec.optimizer, 0, abstract)
    train, _ = trainer.compile_steps(spec, abstract, mesh)
    our_losses = []
    for batch in batches:
        state, metrics = train(state, put_batch(batch, mesh))
        our_losses.append(float(metrics["loss"]))

    assert torch_losses[-1] != pytest.approx(torch_losses[0], rel=0.05), "the loop must have learnt something"
    np.testing.assert_allclose(our_losses, torch_losses, atol=1e-4)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
