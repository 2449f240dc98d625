"""Optimisers and learning-rate schedules: optax, with the published recipes as defaults and bad values named.

Every optimiser is an `optax.GradientTransformation` whose update is added to the parameters. A schedule maps
the number of finished updates (0 for the first) to the learning rate of the next one, as in PyTorch.

| recipe | optimiser | schedule |
|---|---|---|
| InRanker (thesis 4.1) | `adamw` | `warmup_linear_decay(7e-5, 20_000, total)` |
| monoT5 on TPU, and T5 fine-tuning | `adafactor` | `constant(1e-3)` |
| monoT5 in PyTorch | `adafactor(multiply_by_parameter_scale=False, weight_decay=5e-5)` | 3e-4, warm-up 1000 |
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from inranker_jax.errors import InputError, did_you_mean

_DTYPES = ("float32", "bfloat16")

Schedule = Callable[[jax.Array | int], jax.Array]
"""Finished updates (an integer, traced or not) -> learning rate, a float32 scalar."""


def adamw(
    learning_rate: float | Schedule = 7e-5,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mu_dtype: str | None = None,
) -> optax.GradientTransformation:
    """AdamW, equal to `torch.optim.AdamW`. The defaults are those of the InRanker thesis, section 4.1.

    The thesis prints b2 = 0.99; the code published with it leaves PyTorch's 0.999.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay of every parameter, multiplied by the learning rate.
      mu_dtype: in which the first moment is kept, "float32" or "bfloat16"; None for the parameters' own. Half of it is
        a sixth of what training keeps beside activations (parameters and two moments in float32). The second moment
        stays float32: bfloat16 rounds changes of some thousandths away, which are most of those that b2 leaves.

    Returns:
      The optimiser. Its state holds two copies of the parameters.

    Raises:
      InputError: a value is out of range.

    The first update of Adam is close to `-learning_rate * sign(gradient)`:

    >>> optimizer = adamw(0.5)
    >>> updates, _ = optimizer.update(jnp.array([4.0, -4.0]), optimizer.init(jnp.zeros(2)), jnp.zeros(2))
    >>> [round(v, 4) for v in updates.tolist()]
    [-0.5, 0.5]
    """
    _check_learning_rate("adamw", learning_rate)
    _check("adamw", "b1", b1, 0.0, below=1.0)
    _check("adamw", "b2", b2, 0.0, below=1.0)
    _check("adamw", "eps", eps, 0.0, open_start=True)
    _check("adamw", "weight_decay", weight_decay, 0.0)
    _check_dtype("adamw", "mu_dtype", mu_dtype)
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=mu_dtype)


def adafactor(
    learning_rate: float | Schedule = 1e-3,
    multiply_by_parameter_scale: bool = True,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    momentum: float | None = None,
    weight_decay: float = 0.0,
    min_dim_size_to_factor: int = 128,
    eps: float = 1e-30,
    momentum_dtype: str | None = None,
) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018) as T5 and monoT5 are fine-tuned: constant rate 1e-3, no momentum.

    Equal to `transformers.optimization.Adafactor(relative_step=False, warmup_init=False)` for matrices of at
    least `min_dim_size_to_factor`; `scale_parameter` there is `multiply_by_parameter_scale` here.

    Args:
      learning_rate: a number or a schedule.
      multiply_by_parameter_scale: multiplies the update of each parameter by its root mean square (at least
        1e-3), so that the rate is a relative step. True in T5's recipe, False in monoT5's PyTorch one.
      decay_rate: the second moment decays by `1 - t^-decay_rate` at update t.
      clipping_threshold: largest root mean square of a parameter's update before the rate; None for no limit.
      momentum: decay of a first moment, which costs a copy of the parameters; None for none.
      weight_decay: decoupled decay per update, multiplied by the learning rate (not by the parameter scale),
        as in `adamw`.
      min_dim_size_to_factor: a parameter whose two largest dimensions reach this keeps row and column means
        of the second moment instead of all its entries.
      eps: added to squared gradients.
      momentum_dtype: in which the first moment is kept, "float32" (for None too) or "bfloat16".

    Returns:
      The optimiser. Its state is small: about one row and one column per matrix.

    Raises:
      InputError: a value is out of range.

    The first step of a parameter with root mean square 2 is 2 * learning_rate long:

    >>> optimizer = adafactor(0.25)
    >>> params = jnp.array([2.0, -2.0])
    >>> updates, _ = optimizer.update(jnp.array([3.0, -3.0]), optimizer.init(params), params)
    >>> [round(v, 4) for v in updates.tolist()]
    [-0.5, 0.5]
    """
    _check_learning_rate("adafactor", learning_rate)
    _check("adafactor", "decay_rate", decay_rate, 0.0, open_start=True)
    if clipping_threshold is not None:
        _check("adafactor", "clipping_threshold", clipping_threshold, 0.0, open_start=True)
    if momentum is not None:
        _check("adafactor", "momentum", momentum, 0.0, below=1.0)
    _check("adafactor", "weight_decay", weight_decay, 0.0)
    _check_count("adafactor", "min_dim_size_to_factor", min_dim_size_to_factor, 1)
    _check("adafactor", "eps", eps, 0.0, open_start=True)
    _check_dtype("adafactor", "momentum_dtype", momentum_dtype)
    return optax.adafactor(
        learning_rate,
        min_dim_size_to_factor=min_dim_size_to_factor,
        decay_rate=decay_rate,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        clipping_threshold=clipping_threshold,
        momentum=momentum,
        dtype_momentum=jnp.dtype(momentum_dtype or "float32"),
        # optax adds this after the learning rate, which would make it independent of the schedule.
        weight_decay_rate=_scaled(learning_rate, weight_decay) if weight_decay else None,
        eps=eps,
    )


def build(
    optimizer: optax.GradientTransformation, max_grad_norm: float | None = 1.0
) -> optax.GradientTransformation:
    """Puts gradient clipping in front of an optimiser, as `torch.nn.utils.clip_grad_norm_` before `step`.

    Args:
      optimizer: any optimiser, with its learning rate inside.
      max_grad_norm: largest L2 norm of all gradients together; longer ones are scaled down to it. None for no
        clipping.

    Returns:
      The chain that the trainer applies to raw gradients.

    Raises:
      InputError: the norm is not positive.

    >>> clip = build(optax.sgd(1.0), max_grad_norm=1.0)
    >>> updates, _ = clip.update(jnp.array([3.0, 4.0]), clip.init(jnp.zeros(2)))
    >>> [round(v, 4) for v in updates.tolist()]
    [-0.6, -0.8]
    """
    if max_grad_norm is None:
        return optimizer
    _check("build", "max_grad_norm", max_grad_norm, 0.0, open_start=True, hint=" None turns clipping off.")
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)


def constant(value: float) -> Schedule:
    """The same learning rate for every update.

    Raises:
      InputError: the value is not positive.

    >>> round(float(constant(1e-3)(5)), 6)
    0.001
    """
    _check("constant", "value", value, 0.0, open_start=True)

    def schedule(count: jax.Array | int) -> jax.Array:
        return jnp.full(jnp.shape(count), value, jnp.float32)

    return schedule


def warmup_linear_decay(peak: float, warmup_steps: int, total_steps: int) -> Schedule:
    """From 0 linearly up to `peak`, then linearly down to 0, where it stays: the schedule of InRanker.

    Equal to `transformers.get_linear_schedule_with_warmup`. With a warm-up, the first update has rate 0.

    Args:
      peak: learning rate at update `warmup_steps`.
      warmup_steps: updates of the rise, 0 for none. InRanker: 20,000.
      total_steps: updates until the rate is 0 again.

    Returns:
      The schedule.

    Raises:
      InputError: a value is out of range, or the warm-up is longer than the whole.

    >>> schedule = warmup_linear_decay(peak=1.0, warmup_steps=2, total_steps=6)
    >>> [float(schedule(step)) for step in range(8)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    _check("warmup_linear_decay", "peak", peak, 0.0, open_start=True)
    _check_count("warmup_linear_decay", "warmup_steps", warmup_steps, 0)
    _check_count("warmup_linear_decay", "total_steps", total_steps, 1)
    if warmup_steps > total_steps:
        raise InputError(
            f"warmup_linear_decay: warmup_steps {warmup_steps} is more than total_steps {total_steps}. "
            "Expected a warm-up within the run: shorten it, or train for longer."
        )

    def schedule(count: jax.Array | int) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        rise = step / max(warmup_steps, 1)
        fall = jnp.maximum(total_steps - step, 0.0) / max(total_steps - warmup_steps, 1)
        return jnp.float32(peak) * jnp.where(step < warmup_steps, rise, fall)

    return schedule


def inverse_square_root(peak: float, warmup_steps: int = 10_000, linear_warmup: bool = False) -> Schedule:
    """`peak * sqrt(warmup_steps / count)` after a warm-up: the schedule of T5's pre-training.

    T5's `1 / sqrt(max(count, 10_000))` is `inverse_square_root(0.01)`. With `linear_warmup` it equals
    `transformers.get_inverse_sqrt_schedule(optimizer, warmup_steps)`.

    Args:
      peak: largest learning rate, that of the update `warmup_steps`.
      warmup_steps: where the decay begins, at least 1.
      linear_warmup: rise from 0 during the warm-up, rather than stay at `peak`.

    Returns:
      The schedule.

    Raises:
      InputError: a value is out of range.

    >>> [float(inverse_square_root(8.0, warmup_steps=4)(step)) for step in (0, 4, 16, 64)]
    [8.0, 8.0, 4.0, 2.0]
    >>> [float(inverse_square_root(8.0, warmup_steps=4, linear_warmup=True)(step)) for step in (0, 1, 4, 16)]
    [0.0, 2.0, 8.0, 4.0]
    """
    _check("inverse_square_root", "peak", peak, 0.0, open_start=True)
    _check_count("inverse_square_root", "warmup_steps", warmup_steps, 1)

    def schedule(count: jax.Array | int) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        decay = jnp.sqrt(warmup_steps / jnp.maximum(step, warmup_steps))
        return jnp.float32(peak) * (jnp.minimum(step / warmup_steps, decay) if linear_warmup else decay)

    return schedule


def _scaled(learning_rate: float | Schedule, factor: float) -> float | Schedule:
    if not callable(learning_rate):
        return learning_rate * factor
    return lambda count: learning_rate(count) * factor


def _check(
    function: str,
    name: str,
    value: float,
    start: float,
    *,
    below: float = math.inf,
    open_start: bool = False,
    hint: str = "",
) -> None:
    """Raises unless `value` is a number from `start` (beyond it if `open_start`) to less than `below`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (value > start if open_start else value >= start) and value < below:
        return
    limits = f"{'above' if open_start else 'at least'} {start:g}"
    limits += " and finite" if below == math.inf else f" and below {below:g}"
    raise InputError(f"{function}: {name} is {value!r}. Expected a number {limits}.{hint}")


def _check_count(function: str, name: str, value: int, start: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < start:
        raise InputError(f"{function}: {name} is {value!r}. Expected an integer of at least {start}.")


def _check_dtype(function: str, name: str, value: str | None) -> None:
    if value not in (None, *_DTYPES):
        raise InputError(
            f"{function}: {name} is {value!r}. Expected one of {', '.join(_DTYPES)}, or None."
            f"{did_you_mean(str(value), _DTYPES)}"
        )


def _check_learning_rate(function: str, learning_rate: float | Schedule) -> None:
    if not callable(learning_rate):
        hint = " A schedule, such as warmup_linear_decay(...), is possible too."
        _check(function, "learning_rate", learning_rate, 0.0, open_start=True, hint=hint)
