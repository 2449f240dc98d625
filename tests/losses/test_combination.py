"""Sums of losses, and how the contract reads a loss's signature."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from inranker_jax import losses
from inranker_jax.errors import InputError
from inranker_jax.losses import contract

STUDENT = np.float32([[[-1, 2], [1, -2]]])
TEACHER = np.float32([[[-7, -1], [4, 4]]])
RELEVANCE = np.float32([[1, -1]])


def per_list_gap(logits, *, teacher_logits, where=None, weights=None, reduce_fn=jnp.mean):
    """A listwise loss: one value per list."""
    mask = contract.document_mask(logits, where)
    gap = contract.per_label("logits", logits, mask) - contract.per_label("t", teacher_logits, mask)
    return contract.reduce(jnp.sum(jnp.abs(gap), axis=(-1, -2)), jnp.any(mask, axis=-1), weights, reduce_fn)


def test_weighted_sum_adds_the_reduced_parts():
    both = losses.weighted_sum((losses.true_logit_mse, losses.hard_cross_entropy), (0.5, 3.0))
    expected = 0.5 * losses.true_logit_mse(STUDENT, teacher_logits=TEACHER) + 3.0 * losses.hard_cross_entropy(
        STUDENT, relevance=RELEVANCE
    )
    assert both(STUDENT, teacher_logits=TEACHER, relevance=RELEVANCE) == pytest.approx(float(expected))


def test_weighted_sum_of_weighted_sums_is_flat():
    inner = losses.weighted_sum((losses.true_logit_mse, losses.kl_divergence), (1.0, 4.0))
    outer = losses.weighted_sum([inner, losses.hard_cross_entropy], [0.5, 1.0])
    assert losses.parts_of(outer) == (
        (0.5, losses.true_logit_mse),
        (2.0, losses.kl_divergence),
        (1.0, losses.hard_cross_entropy),
    )
    assert losses.targets_of(outer) == ("teacher_logits", "relevance")
    assert losses.name_of(outer) == "0.5 * true_logit_mse + 2 * kl_divergence + 1 * hard_cross_entropy"


@pytest.mark.parametrize(
    ("parts", "coefficients", "message"),
    [
        ((), (), "0 losses and 0 coefficients"),
        ((losses.kl_divergence,), (1.0, 2.0), "1 losses and 2 coefficients"),
        ((losses.kl_divergence,), (float("nan"),), "coefficient nan. Expected a finite number"),
    ],
)
def test_weighted_sum_rejects_bad_parts(parts, coefficients, message):
    with pytest.raises(InputError, match=message):
        losses.weighted_sum(parts, coefficients)


def test_weighted_sum_names_missing_and_unknown_targets():
    both = losses.weighted_sum((losses.true_logit_mse, losses.hard_cross_entropy), (1.0, 1.0))
    with pytest.raises(InputError, match="missing target relevance"):
        both(STUDENT, teacher_logits=TEACHER)
    with pytest.raises(InputError, match=r"unknown target 'relevanse'. Did you mean 'relevance'\?"):
        both(STUDENT, teacher_logits=TEACHER, relevanse=RELEVANCE)


def test_weighted_sum_mixes_documents_and_lists_once_reduced():
    both = losses.weighted_sum((losses.true_logit_mse, per_list_gap), (1.0, 0.1))
    # true_logit_mse: (1 + 4) / 2; the gaps: 6 + 3 + 3 + 6 in one list.
    assert both(STUDENT, teacher_logits=TEACHER) == pytest.approx(2.5 + 1.8)
    with pytest.raises(InputError, match=r"'true_logit_mse': \(1, 2\), 'per_list_gap': \(1,\)"):
        both(STUDENT, teacher_logits=TEACHER, reduce_fn=None)


def test_valid_counts_follow_each_term():
    loss = losses.weighted_sum(
        (losses.true_logit_mse, losses.hard_cross_entropy, per_list_gap), (1.0, 1.0, 1.0)
    )
    batch = {"teacher_logits": np.zeros((2, 3, 2)), "relevance": np.float32([[1, -1, 0], [0, 0, 0]])}
    where = np.array([[True, True, True], [False, False, False]])
    assert [float(n) for n in losses.valid_counts(loss, batch, where=where)] == [3.0, 2.0, 1.0]


def test_mean_over_rejects_the_counts_of_another_loss():
    counts = (jnp.float32(1.0), jnp.float32(1.0))
    with pytest.raises(InputError, match="2 counts for the 1 terms of kl_divergence"):
        losses.mean_over(counts, losses.kl_divergence, STUDENT, {"teacher_logits": TEACHER})


def test_targets_are_the_required_keyword_arguments():
    assert losses.targets_of(losses.kl_divergence) == ("teacher_logits",)
    warm = functools.partial(losses.kl_divergence, temperature=2.0)
    assert losses.targets_of(warm) == ("teacher_logits",)
    assert losses.name_of(warm) == "kl_divergence"

    @functools.wraps(losses.hard_cross_entropy)  # as gin wraps what it configures
    def wrapped(*args, **kwargs):
        return losses.hard_cross_entropy(*args, **kwargs)

    assert losses.targets_of(wrapped) == ("relevance",)


def test_a_function_without_the_contract_is_named():
    def squared(logits, *, teacher_logits, where=None):
        return logits - teacher_logits

    with pytest.raises(InputError, match="loss squared: no argument weights, reduce_fn"):
        losses.targets_of(squared)
    with pytest.raises(InputError, match="signature"):
        losses.targets_of(3)
