"""The largest rate of matrix products that this machine gives, which no model can pass: the roof of the roofline.

Weights of T5-small's MLP and of a square, multiplied by as many tokens as a call has; larger ones on a GPU. The best of
several repetitions counts, since a roof is not an average.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

SHAPES = ((2048, 512, 2048), (2048, 2048, 512), (2048, 768, 3072), (2048, 2048, 2048))
GPU_SHAPES = ((16384, 768, 3072), (16384, 3072, 768), (8192, 8192, 8192))
_SECONDS = 0.25


def best_rate(operations: float, product: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """FLOP/s of the fastest repetition of `product` within a quarter of a second, at least five of them."""
    wait(product())
    fastest, end, count = float("inf"), time.perf_counter() + _SECONDS, 0
    while count < 5 or time.perf_counter() < end:
        started = time.perf_counter()
        wait(product())
        fastest = min(fastest, time.perf_counter() - started)
        count += 1
    return operations / fastest


def of_torch(device: str) -> dict[str, float]:
    """FLOP/s by precision in PyTorch."""
    import torch

    rates: dict[str, float] = {}
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    for precision in ("float32", "bfloat16"):
        for m, k, n in GPU_SHAPES if device == "cuda" else SHAPES:
            left, right = (
                torch.randn(shape, dtype=getattr(torch, precision), device=device)
                for shape in ((m, k), (k, n))
            )
            rate = best_rate(2.0 * m * k * n, functools.partial(torch.matmul, left, right), lambda _: wait())
            rates[precision] = max(rates.get(precision, 0.0), rate)
    return rates


def of_jax() -> dict[str, float]:
    """FLOP/s by precision in JAX; bfloat16 operands with float32 sums, as our model multiplies."""
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    rates: dict[str, float] = {}
    for precision in ("float32", "bfloat16"):
        for m, k, n in SHAPES if jax.default_backend() == "cpu" else GPU_SHAPES:
            keys = jax.random.split(jax.random.key(0))
            left, right = (
                jax.random.normal(key, shape, jnp.float32).astype(precision)
                for key, shape in zip(keys, ((m, k), (k, n)), strict=True)
            )
            rate = best_rate(2.0 * m * k * n, functools.partial(multiply, left, right), jax.block_until_ready)
            rates[precision] = max(rates.get(precision, 0.0), rate)
    return rates
