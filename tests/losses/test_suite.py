"""What every loss must do, whatever it computes. The losses under test are listed in `cases.py`."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inranker_jax import losses
from inranker_jax.errors import InputError
from tests.losses.cases import CASES, Case

LISTS, DOCUMENTS = 3, 5


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def draw(case: Case, shape: tuple[int, ...] = (LISTS, DOCUMENTS), seed: int = 0):
    """Student logits `[*shape, 2]`, targets, and a mask with at least one real document in each list."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, 2.0, (*shape, 2)).astype(np.float32)
    targets = case.targets(rng, shape)
    mask = rng.random(shape) < 0.7
    mask[..., 0], mask[..., -1] = True, False
    return logits, targets, mask


def value_and_grad(case: Case, logits, targets, **kwargs):
    return jax.value_and_grad(lambda x: case.loss(x, **targets, **kwargs))(jnp.asarray(logits))


def spoil(array: np.ndarray, mask: np.ndarray, rubbish: float) -> np.ndarray:
    """`array` with rubbish in all masked documents."""
    shaped = mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
    return np.where(shaped, array, np.float32(rubbish))


def test_every_public_loss_is_in_the_suite():
    def called(loss):
        return loss.func if isinstance(loss, functools.partial) else loss

    public = {getattr(losses, name) for name in losses.__all__}
    functions = {f for f in public if inspect.isfunction(f)}
    found = {f for f in functions if {"logits", "reduce_fn"} <= set(inspect.signature(f).parameters)}
    assert found - {losses.call} == {called(c.loss) for c in CASES} - {
        c.loss for c in CASES if isinstance(c.loss, losses.WeightedSum)
    }


def test_default_reduction_is_the_mean_of_the_valid_values(case: Case):
    logits, targets, mask = draw(case)
    values = np.asarray(case.loss(logits, **targets, where=mask, reduce_fn=None))
    expected = values.mean() if case.per_list else values[mask].mean()
    actual = case.loss(logits, **targets, where=mask)
    assert actual.shape == ()
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    # A loss that ignores its inputs would pass everything else here.
    assert np.unique(values).size > 1


def test_unreduced_shape_and_zeros_where_masked(case: Case):
    logits, targets, mask = draw(case, (2, LISTS, DOCUMENTS))
    values = np.asarray(case.loss(logits, **targets, where=mask, reduce_fn=None))
    assert values.shape == ((2, LISTS) if case.per_list else (2, LISTS, DOCUMENTS))
    if not case.per_list:
        assert np.all(values[~mask] == 0.0)
        np.testing.assert_allclose(
            values[mask], np.asarray(case.loss(logits, **targets, reduce_fn=None))[mask], rtol=1e-6
        )


def test_reduce_fn_receives_values_and_mask_of_one_shape(case: Case):
    logits, targets, mask = draw(case)
    seen = []

    def share_of_ten(values, where):
        seen.append((values.shape, where.shape, where.dtype))
        return jnp.sum(values, where=where) / 10.0

    actual = case.loss(logits, **targets, where=mask, reduce_fn=share_of_ten)
    shape = (LISTS,) if case.per_list else (LISTS, DOCUMENTS)
    assert set(seen) == {(shape, shape, jnp.dtype(bool))}
    entries = LISTS if case.per_list else mask.sum()
    np.testing.assert_allclose(actual, case.loss(logits, **targets, where=mask) * entries / 10.0, rtol=1e-5)


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.per_list], ids=lambda case: case.name
)  # a listwise loss has no document axis left to reduce
def test_mean_along_an_axis_survives_an_empty_list(case: Case):
    logits, targets, mask = draw(case)
    mask[1] = False
    per_row = functools.partial(jnp.mean, axis=-1)
    rows, gradient = jax.vjp(
        lambda x: case.loss(x, **targets, where=mask, reduce_fn=per_row), jnp.asarray(logits)
    )
    for row in (0, 2):
        alone = {name: target[row] for name, target in targets.items()}
        np.testing.assert_allclose(rows[row], case.loss(logits[row], **alone, where=mask[row]), rtol=1e-6)
    assert rows[1] == 0.0
    assert np.all(np.isfinite(gradient(jnp.ones(LISTS))[0]))


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("which", ["student", "targets", "both"])
def test_extreme_logits_stay_finite(case: Case, scale: float, which: str):
    logits, targets, mask = draw(case)
    extreme = np.broadcast_to(np.float32([scale, -scale]), logits.shape)
    if which != "targets":
        logits = extreme
    if which != "student":
        targets = {n: -extreme if t.shape == extreme.shape else t for n, t in targets.items()}
    value, gradient = value_and_grad(case, logits, targets, where=mask)
    assert 0.0 <= value <= case.extreme_limit
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("reduce_fn", [jnp.mean, jnp.sum])
@pytest.mark.parametrize("rubbish", [0.0, np.nan, np.inf])
def test_everything_masked_is_zero_with_zero_gradient(case: Case, reduce_fn, rubbish: float):
    logits, targets, _ = draw(case)
    nothing = np.zeros((LISTS, DOCUMENTS), bool)
    logits = spoil(logits, nothing, rubbish)
    targets = {name: spoil(target, nothing, rubbish) for name, target in targets.items()}
    value, gradient = value_and_grad(case, logits, targets, where=nothing, reduce_fn=reduce_fn)
    assert value == 0.0
    assert np.all(np.asarray(gradient) == 0.0)


@pytest.mark.parametrize("rubbish", [np.inf, -np.inf, np.nan, 1e30])
def test_masked_entries_have_no_effect(case: Case, rubbish: float):
    logits, targets, mask = draw(case)
    weights = np.linspace(0.5, 1.5, mask.size, dtype=np.float32).reshape(mask.shape)
    value, gradient = value_and_grad(case, logits, targets, where=mask, weights=weights)
    spoilt_targets = {name: spoil(target, mask, rubbish) for name, target in targets.items()}
    spoilt_value, spoilt_gradient = value_and_grad(
        case,
        spoil(logits, mask, rubbish),
        spoilt_targets,
        where=mask,
        weights=spoil(weights, mask, rubbish),
    )
    assert spoilt_value == value
    np.testing.assert_array_equal(spoilt_gradient, gradient)
    assert np.all(np.asarray(gradient)[~mask] == 0.0)
    assert np.any(np.asarray(gradient)[mask] != 0.0)


def test_padding_a_list_changes_nothing(case: Case):
    logits, targets, mask = draw(case)
    value, gradient = value_and_grad(case, logits, targets, where=mask)

    def pad(array, fill):
        return np.pad(array, [(0, 0), (0, 4)] + [(0, 0)] * (array.ndim - 2), constant_values=np.float32(fill))

    padded_value, padded_gradient = value_and_grad(
        case,
        pad(logits, 3.0),
        {name: pad(target, 1.0) for name, target in targets.items()},
        where=np.pad(mask, [(0, 0), (0, 4)]),
    )
    np.testing.assert_allclose(padded_value, value, rtol=1e-6)
    np.testing.assert_allclose(padded_gradient[:, :DOCUMENTS], gradient, rtol=1e-5, atol=1e-7)
    assert np.all(np.asarray(padded_gradient)[:, DOCUMENTS:] == 0.0)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 3)])
def test_leading_batch_dimensions(case: Case, leading: tuple[int, ...]):
    shape = (*leading, DOCUMENTS)
    logits, targets, mask = draw(case, shape)
    values = np.asarray(case.loss(logits, **targets, where=mask, reduce_fn=None))
    for index in np.ndindex(*leading):
        own = {name: target[index] for name, target in targets.items()}
        alone = case.loss(logits[index], **own, where=mask[index], reduce_fn=None)
        np.testing.assert_allclose(values[index], alone, rtol=1e-6)


def test_order_of_documents_does_not_matter(case: Case):
    logits, targets, mask = draw(case)
    order = np.random.default_rng(7).permutation(DOCUMENTS)
    shuffled = {name: target[:, order] for name, target in targets.items()}
    value, gradient = value_and_grad(case, logits, targets, where=mask)
    other_value, other_gradient = value_and_grad(case, logits[:, order], shuffled, where=mask[:, order])
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    np.testing.assert_allclose(other_gradient, np.asarray(gradient)[:, order], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_inputs_are_computed_in_float32(case: Case, dtype):
    logits, targets, mask = draw(case)
    half, half_targets = jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), (logits, targets))
    value, gradient = value_and_grad(case, half, half_targets, where=mask)
    exact, exact_gradient = value_and_grad(
        case,
        half.astype(jnp.float32),
        jax.tree.map(lambda x: x.astype(jnp.float32), half_targets),
        where=mask,
    )
    assert value.dtype == jnp.float32
    assert value == exact
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, exact_gradient.astype(dtype))


def test_gradient_equals_finite_differences(case: Case):
    with jax.enable_x64(True):
        logits, targets, mask = draw(case)
        logits = logits.astype(np.float64)
        loss = jax.jit(lambda x: case.loss(x, **targets, where=mask))
        gradient = np.asarray(jax.grad(loss)(logits))
        assert gradient.dtype == np.float64
        step = 1e-5
        for index in np.ndindex(*logits.shape):
            shift = np.zeros_like(logits)
            shift[index] = step
            slope = (loss(logits + shift) - loss(logits - shift)) / (2 * step)
            np.testing.assert_allclose(gradient[index], slope, rtol=1e-5, atol=1e-8)


def test_weights_scale_each_entry(case: Case):
    logits, targets, mask = draw(case)
    weights = np.random.default_rng(3).uniform(0.5, 2.0, mask.shape).astype(np.float32)
    ones = case.loss(logits, **targets, where=mask, weights=np.ones_like(weights))
    np.testing.assert_allclose(ones, case.loss(logits, **targets, where=mask), rtol=1e-6)
    doubled = case.loss(logits, **targets, where=mask, weights=2 * weights)
    np.testing.assert_allclose(
        doubled, 2 * case.loss(logits, **targets, where=mask, weights=weights), rtol=1e-6
    )
    if not case.per_list:
        plain = np.asarray(case.loss(logits, **targets, where=mask, reduce_fn=None))
        weighted = case.loss(logits, **targets, where=mask, weights=weights, reduce_fn=None)
        np.testing.assert_allclose(weighted, plain * weights, rtol=1e-6)
        mean = case.loss(logits, **targets, where=mask, weights=weights)
        np.testing.assert_allclose(mean, (plain * weights)[mask].sum() / mask.sum(), rtol=1e-6)


def test_zero_weights_remove_the_gradient(case: Case):
    logits, targets, mask = draw(case)
    value, gradient = value_and_grad(case, logits, targets, where=mask, weights=np.zeros(mask.shape))
    assert value == 0.0
    assert np.all(np.asarray(gradient) == 0.0)


def test_jit_and_vmap(case: Case):
    logits, targets, mask = draw(case)
    plain = case.loss(logits, **targets, where=mask)
    jitted = jax.jit(lambda x, t, m: case.loss(x, **t, where=m))(logits, targets, mask)
    np.testing.assert_allclose(jitted, plain, rtol=1e-6)
    per_list = jax.vmap(lambda x, t, m: case.loss(x, **t, where=m))(logits, targets, mask)
    for row in range(LISTS):
        own = {name: target[row] for name, target in targets.items()}
        np.testing.assert_allclose(per_list[row], case.loss(logits[row], **own, where=mask[row]), rtol=1e-6)


def test_call_takes_the_targets_from_the_batch(case: Case):
    logits, targets, mask = draw(case)
    assert set(losses.targets_of(case.loss)) == set(targets)
    batch = targets | {"tokens": np.zeros(3), "list_mask": mask}
    assert losses.call(case.loss, logits, batch, where=mask) == case.loss(logits, **targets, where=mask)
    values = losses.call(
        case.loss, logits, batch, where=mask, reduce_fn=None, weights=2 * np.ones(mask.shape)
    )
    np.testing.assert_allclose(
        values, 2 * case.loss(logits, **targets, where=mask, reduce_fn=None), rtol=1e-6
    )


def test_call_names_a_missing_target(case: Case):
    logits, targets, mask = draw(case)
    for name in targets:
        batch = {n: t for n, t in targets.items() if n != name} | {name[:-1]: 0, "tokens": 0}
        message = rf"batch has no '{name}'. Did you mean '{name[:-1]}'\? It has .*tokens"
        with pytest.raises(InputError, match=message):
            losses.call(case.loss, logits, batch, where=mask)


def test_wrong_shapes_are_named(case: Case):
    logits, targets, mask = draw(case)
    with pytest.raises(InputError, match=r"logits: shape \(3, 5, 3\). Expected \[..., L, 2\]"):
        case.loss(np.zeros((3, 5, 3), np.float32), **targets)
    with pytest.raises(InputError, match=r"logits: shape \(2,\)"):
        case.loss(np.zeros(2, np.float32), **targets)
    with pytest.raises(InputError, match=r"where: shape \(5, 3\). Expected \(3, 5\)"):
        case.loss(logits, **targets, where=mask.T)
    with pytest.raises(InputError, match=r"where: dtype float32. Expected bool"):
        case.loss(logits, **targets, where=mask.astype(np.float32))
    with pytest.raises(InputError, match=r"weights: shape \(\). Expected \(3,"):
        case.loss(logits, **targets, where=mask, weights=np.float32(1.0))
    for name, target in targets.items():
        with pytest.raises(InputError, match=rf"{name}: shape \(2, 5"):
            case.loss(logits, **(targets | {name: target[:2]}))


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_add_up_to_the_whole_batch(case: Case, micro: int):
    logits, targets, mask = draw(case)
    mask[0, 1:] = False  # rows of different lengths, so that a mean of means would be wrong
    logits = jnp.asarray(logits)
    counts = losses.valid_counts(case.loss, targets, where=mask)
    whole, gradient = value_and_grad(case, logits, targets, where=mask)
    total, pieces = 0.0, []
    for rows in np.split(np.arange(LISTS), LISTS // micro):
        own = {name: target[rows] for name, target in targets.items()}

        def share(x, own=own, rows=rows):
            return losses.mean_over(counts, case.loss, x, own, where=mask[rows])

        value, piece = jax.value_and_grad(share)(logits[rows])
        total += value
        pieces.append(piece)
    np.testing.assert_allclose(total, whole, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(pieces), gradient, rtol=1e-5, atol=1e-8)
