"""Optimisers and schedules beside PyTorch and transformers."""

from __future__ import annotations

import doctest
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import optimization as hf

from inranker_jax import optimizers
from inranker_jax.errors import InputError

STEPS = 50


def _problem(seed: int = 0) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Parameters of three ranks, and gradients for each step whose size varies by step and by parameter."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (6, 5), "scale": (7,), "bias": ()}
    params = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    gradients = [
        {
            name: (10.0 ** rng.uniform(-3, 1) * rng.normal(0, 1, shape)).astype(np.float32)
            for name, shape in shapes.items()
        }
        for _ in range(STEPS)
    ]
    return params, gradients


def _ours(optimizer, params, gradients) -> dict[str, np.ndarray]:
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


def _torch(make_optimizer, params, gradients, make_schedule=None, max_norm=None) -> dict[str, np.ndarray]:
    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    optimizer = make_optimizer(tensors.values())
    schedule = make_schedule(optimizer) if make_schedule else None
    for gradient in gradients:
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[name])
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(tensors.values(), max_norm)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def _assert_moved_and_equal(actual, expected, start, tolerance=1e-6, least_move=1e-2):
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
        assert np.max(np.abs(value - start[name])) > least_move, f"{name} hardly moved: the test says nothing"


def test_worked_examples_in_docstrings():
    result = doctest.testmod(optimizers)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("b2", [0.99, 0.999])
def test_adamw_equals_torch(weight_decay, b2):
    params, gradients = _problem()
    ours = _ours(optimizers.adamw(3e-3, b2=b2, weight_decay=weight_decay), params, gradients)
    theirs = _torch(
        lambda p: torch.optim.AdamW(p, lr=3e-3, betas=(0.9, b2), eps=1e-8, weight_decay=weight_decay),
        params,
        gradients,
    )
    _assert_moved_and_equal(ours, theirs, params)


def test_adamw_defaults_are_those_of_the_thesis():
    params, gradients = _problem()
    ours = _ours(optimizers.adamw(), params, gradients)
    theirs = _torch(
        lambda p: torch.optim.AdamW(p, lr=7e-5, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0),
        params,
        gradients,
    )
    _assert_moved_and_equal(ours, theirs, params, tolerance=1e-7, least_move=3e-4)


def test_the_first_moment_may_be_kept_in_bfloat16():
    params = {"w": jnp.linspace(-1.0, 1.0, 256).reshape(16, 16)}
    steps = {}
    for dtype in (None, "float32", "bfloat16"):
        optimizer = optimizers.adamw(1e-2, mu_dtype=dtype)
        update, state, current = jax.jit(optimizer.update), optimizer.init(params), params
        for step in range(5):
            gradients = jax.tree.map(lambda p, n=step: jnp.sin(p * (n + 1)), current)
            updates, state = update(gradients, state, current)
            current = optax.apply_updates(current, updates)
        moments = optax.tree_utils.tree_get(state, "mu"), optax.tree_utils.tree_get(state, "nu")
        assert moments[0]["w"].dtype == jnp.dtype(dtype or "float32")
        assert moments[1]["w"].dtype == current["w"].dtype == jnp.float32
        steps[dtype] = np.asarray(current["w"] - params["w"])
    np.testing.assert_array_equal(steps[None], steps["float32"])
    assert 0 < np.abs(steps["bfloat16"] - steps["float32"]).max() < 0.01 * np.abs(steps["float32"]).max()


def test_momentum_of_adafactor_may_be_kept_in_bfloat16():
    params = jnp.ones((4, 4))
    for dtype in (None, "bfloat16"):
        optimizer = optimizers.adafactor(momentum=0.9, momentum_dtype=dtype)
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(optimizer.init(params)) if leaf.shape == (4, 4)}
        assert (jnp.dtype("bfloat16") in dtypes) == (dtype == "bfloat16")


def test_recipe_of_inranker_equals_torch():
    """AdamW, warm-up and decay, and clipping together, with decay so that the schedule scales it too."""
    params, gradients = _problem(1)
    schedule = optimizers.warmup_linear_decay(5e-3, 10, STEPS)
    ours = _ours(optimizers.build(optimizers.adamw(schedule, weight_decay=0.2)), params, gradients)
    theirs = _torch(
        lambda p: torch.optim.AdamW(p, lr=5e-3, betas=(0.9, 0.99), weight_decay=0.2),
        params,
        gradients,
        make_schedule=lambda o: hf.get_linear_schedule_with_warmup(o, 10, STEPS),
        max_norm=1.0,
    )
    # torch divides by the norm plus 1e-6.
    _assert_moved_and_equal(ours, theirs, params, tolerance=3e-6)


@pytest.mark.parametrize(("scale", "weight_decay"), [(True, 0.0), (False, 0.0), (False, 0.1)])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_adafactor_equals_transformers(scale, weight_decay, momentum):
    params, gradients = _problem(2)
    params["kernel"] *= 3.0
    schedule = optimizers.warmup_linear_decay(2e-2, 5, STEPS)
    ours = _ours(
        optimizers.adafactor(
            schedule,
            multiply_by_parameter_scale=scale,
            weight_decay=weight_decay,
            momentum=momentum,
            min_dim_size_to_factor=2,
        ),
        params,
        gradients,
    )
    theirs = _torch(
        lambda p: hf.Adafactor(
            p,
            lr=2e-2,
            scale_parameter=scale,
            relative_step=False,
            warmup_init=False,
            weight_decay=weight_decay,
            beta1=momentum,
        ),
        params,
        gradients,
        make_schedule=lambda o: hf.get_linear_schedule_with_warmup(o, 5, STEPS),
    )
    _assert_moved_and_equal(ours, theirs, params, tolerance=1e-5)


def test_adafactor_keeps_rows_and_columns_of_large_matrices_only():
    params = {"large": jnp.zeros((200, 300)), "narrow": jnp.zeros((200, 8)), "scale": jnp.zeros(200)}
    entries = sum(x.size for x in jax.tree.leaves(optimizers.adafactor().init(params)))
    assert 200 + 300 + 200 * 8 + 200 <= entries <= 200 + 300 + 200 * 8 + 200 + 20


@pytest.mark.parametrize("size", [1e-3, 0.3, 7.0, 1e4])
@pytest.mark.parametrize("max_norm", [1.0, 0.05])
def test_clipping_equals_torch(size, max_norm):
    params, gradients = _problem(3)
    gradient = {name: np.float32(size) * value for name, value in gradients[0].items()}
    clip = optimizers.build(optax.identity(), max_norm)
    ours, _ = clip.update(gradient, clip.init(params), params)
    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    for name, tensor in tensors.items():
        tensor.grad = torch.tensor(gradient[name])
    before = float(torch.nn.utils.clip_grad_norm_(tensors.values(), max_norm))
    assert (before > max_norm) == (float(optax.tree.norm(ours)) < before * 0.999)
    for name, tensor in tensors.items():
        # torch adds 1e-6 to the norm it divides by.
        np.testing.assert_allclose(ours[name], tensor.grad.numpy(), rtol=2e-6 + 1e-6 / before)


def test_no_clipping_returns_the_optimizer_itself():
    optimizer = optimizers.adamw()
    assert optimizers.build(optimizer, None) is optimizer


def _lambda_rates(make_schedule, peak: float, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = make_schedule(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (1, 1), (7, 30), (30, 30), (0, 1)])
def test_warmup_linear_decay_equals_transformers_step_by_step(warmup, total):
    schedule = jax.jit(optimizers.warmup_linear_decay(7e-5, warmup, total))
    ours = [schedule(step) for step in range(total + 3)]
    assert {(x.shape, x.dtype) for x in ours} == {((), jnp.dtype("float32"))}
    theirs = _lambda_rates(lambda o: hf.get_linear_schedule_with_warmup(o, warmup, total), 7e-5, total + 3)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_warmup_linear_decay_at_the_length_of_the_paper():
    schedule = optimizers.warmup_linear_decay(7e-5, 20_000, 400_000)
    np.testing.assert_allclose(
        [schedule(step) for step in (1, 10_000, 20_000, 210_000, 399_999, 400_000, 10**6)],
        [7e-5 / 20_000, 3.5e-5, 7e-5, 3.5e-5, 7e-5 / 380_000, 0.0, 0.0],
        rtol=1e-6,
    )


def test_inverse_square_root_equals_transformers_step_by_step():
    schedule = jax.jit(optimizers.inverse_square_root(0.3, 6, linear_warmup=True))
    theirs = _lambda_rates(lambda o: hf.get_inverse_sqrt_schedule(o, 6), 0.3, 40)
    np.testing.assert_allclose([schedule(step) for step in range(40)], theirs, rtol=1e-6)


def test_inverse_square_root_is_that_of_t5():
    schedule = optimizers.inverse_square_root(0.01)
    for step in (0, 9_999, 10_000, 10_001, 1_000_000):
        np.testing.assert_allclose(schedule(step), 1 / np.sqrt(max(step, 10_000)), rtol=1e-6)


def test_constant_is_constant():
    schedule = jax.jit(optimizers.constant(1e-3))
    assert [float(schedule(step)) for step in (0, 1, 10**6)] == [float(np.float32(1e-3))] * 3


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (optimizers.adamw, {"learning_rate": 0.0}, "adamw: learning_rate is 0.0. Expected a number above 0"),
        (optimizers.adamw, {"learning_rate": float("nan")}, "adamw: learning_rate is nan."),
        (optimizers.adamw, {"learning_rate": "7e-5"}, "adamw: learning_rate is '7e-5'."),
        (optimizers.adamw, {"b1": 1.0}, "adamw: b1 is 1.0. Expected a number at least 0 and below 1."),
        (optimizers.adamw, {"b2": -0.1}, "adamw: b2 is -0.1."),
        (optimizers.adamw, {"eps": 0.0}, "adamw: eps is 0.0."),
        (optimizers.adamw, {"weight_decay": -1.0}, "adamw: weight_decay is -1.0."),
        (
            optimizers.adamw,
            {"mu_dtype": "bfloat"},
            "adamw: mu_dtype is 'bfloat'. Expected one of float32, bfloat16, or None. Did you mean 'bfloat16'?",
        ),
        (optimizers.adafactor, {"momentum_dtype": "float16"}, "adafactor: momentum_dtype is 'float16'."),
        (optimizers.adafactor, {"learning_rate": -1e-3}, "adafactor: learning_rate is -0.001."),
        (optimizers.adafactor, {"decay_rate": 0.0}, "adafactor: decay_rate is 0.0."),
        (optimizers.adafactor, {"clipping_threshold": 0.0}, "adafactor: clipping_threshold is 0.0."),
        (optimizers.adafactor, {"momentum": 1.5}, "adafactor: momentum is 1.5."),
        (optimizers.adafactor, {"min_dim_size_to_factor": 0}, "adafactor: min_dim_size_to_factor is 0."),
        (optimizers.adafactor, {"eps": -1.0}, "adafactor: eps is -1.0."),
        (optimizers.adafactor, {"weight_decay": True}, "adafactor: weight_decay is True."),
        (
            optimizers.constant,
            {"value": float("inf")},
            "constant: value is inf. Expected a number above 0 and",
        ),
        (
            optimizers.warmup_linear_decay,
            {"peak": 1.0, "warmup_steps": 11, "total_steps": 10},
            "warmup_linear_decay: warmup_steps 11 is more than total_steps 10.",
        ),
        (
            optimizers.warmup_linear_decay,
            {"peak": 1.0, "warmup_steps": 0.5, "total_steps": 10},
            "warmup_linear_decay: warmup_steps is 0.5. Expected an integer of at least 0.",
        ),
        (
            optimizers.warmup_linear_decay,
            {"peak": 1.0, "warmup_steps": 0, "total_steps": 0},
            "warmup_linear_decay: total_steps is 0.",
        ),
        (optimizers.inverse_square_root, {"peak": 1.0, "warmup_steps": 0}, "warmup_steps is 0."),
    ],
)
def test_bad_values_are_named(function, arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        function(**arguments)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_bad_norm_names_the_switch(norm):
    with pytest.raises(InputError, match=r"max_grad_norm is .* None turns clipping off"):
        optimizers.build(optimizers.adamw(), norm)
