"""The mimetic initialisation: the form of its products, and that it changes nothing else."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from inranker_jax.errors import InputError
from inranker_jax.models import T5Config, initialisers, t5

CONFIG = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=1, num_heads=2)


def test_products_are_multiples_of_the_identity():
    params = initialisers.mimetic(CONFIG, 3, query_key=2.0, value_out=-0.5)
    attention = params["encoder"]["layers_0"]["attention"]
    kernel = {name: np.asarray(attention[name]["kernel"]) for name in attention}
    np.testing.assert_allclose(
        kernel["query"] @ kernel["key"].T, 2.0 * CONFIG.d_kv**-0.5 * np.eye(16), atol=1e-5
    )
    np.testing.assert_allclose(kernel["value"] @ kernel["out"], -0.5 * np.eye(16), atol=1e-5)


def test_everything_else_is_t5s():
    plain, ours = t5.init_params(CONFIG, 3), initialisers.mimetic(CONFIG, 3)
    changed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(ours), strict=True
        )
        if not np.array_equal(a, b)
    ]
    attention = [f"encoder/layers_0/attention/{name}/kernel" for name in ("key", "out", "query", "value")]
    assert changed == [*attention, "encoder/relpos_bias/rel_embedding"]
    difference = (
        ours["encoder"]["relpos_bias"]["rel_embedding"] - plain["encoder"]["relpos_bias"]["rel_embedding"]
    )
    np.testing.assert_allclose(difference[:, 0], -8.0, atol=1e-5)
    np.testing.assert_array_equal(difference[:, 1:], 0.0)


def test_other_shapes_and_traced_seeds():
    wide = dataclasses.replace(CONFIG, d_kv=16, num_heads=4)
    eager = initialisers.mimetic(wide, 5, layers=2)
    traced = jax.jit(lambda seed: initialisers.mimetic(wide, seed, layers=2))(5)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(traced), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    t5.check_params(wide, eager)
    with pytest.raises(InputError, match="layers=3"):
        initialisers.mimetic(CONFIG, 0, layers=3)
