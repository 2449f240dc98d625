"""Useful operations, counted by hand."""

from __future__ import annotations

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.contenders import flops as contenders
from inranker_jax.models import Compute, T5Config, flops, t5

SIZES = {
    "60M": T5Config(32128, 512, 64, 2048, 6, 6, 8),
    "220M": T5Config(32128, 768, 64, 3072, 12, 12, 12),
    "740M": T5Config(32128, 1024, 64, 4096, 24, 24, 16),
    "3B": T5Config(32128, 1024, 128, 16384, 24, 24, 32),
}


@pytest.mark.parametrize(
    ("size", "gigaflops"), [("60M", 10.54), ("220M", 46.2), ("740M", 162.2), ("3B", 648)]
)
def test_256_tokens_take_what_was_published(size: str, gigaflops: float) -> None:
    """The row "absorbed" of the table of exact savings (docs/performance.md)."""
    assert flops.forward_flops(SIZES[size], 256) / 1e9 == pytest.approx(gigaflops, rel=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_the_benchmarks_count_the_same(size: str) -> None:
    config = SIZES[size]
    names = [field.name for field in dataclasses.fields(contenders.Shape)]
    shape = contenders.Shape(**{name: getattr(config, name) for name in names})
    lengths = np.array([[17, 256], [512, 1]])
    assert flops.forward_flops(config, lengths) == pytest.approx(contenders.useful(shape, lengths.ravel()))
    assert flops.TRAINING * flops.forward_flops(config, lengths) == pytest.approx(
        contenders.useful(shape, lengths.ravel(), training=True)
    )


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_xla_counts_as_many_products(kind: str) -> None:
    """Products dominate at these widths; XLA adds norms, softmax and the like, which are not counted by hand."""
    config = T5Config(64, 256, 32, 1024, 2, 2, 8, feed_forward_proj=kind, dropout_rate=0.0)
    params = t5.abstract_params(config)

    def forward(params, tokens):  # type: ignore[no-untyped-def]
        return t5.apply(config, params, tokens, jnp.array([1, 2]), compute=Compute())

    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    counted = jax.jit(forward).lower(params, tokens).cost_analysis()
    by_hand = flops.forward_flops(config, np.array([128, 128]))
    assert by_hand < counted["flops"] < 1.06 * by_hand


def test_recomputation_grows_with_the_policy() -> None:
    config = SIZES["220M"]
    none, dots, full = (flops.recomputed_flops(config, 256, remat) for remat in ("none", "dots", "full"))
    assert 0 < none < dots < full < flops.forward_flops(config, 256)
    assert full > 0.6 * flops.forward_flops(config, 256)


def test_examples_of_the_docstrings() -> None:
    results = doctest.testmod(flops)
    assert (results.failed, results.attempted > 0) == (0, True)
