"""Closed forms worked by hand, and parity with PyTorch, for the pointwise losses."""

from __future__ import annotations

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from inranker_jax import losses
from inranker_jax.errors import InputError
from inranker_jax.losses import combination, contract, pointwise

LOG3 = math.log(3.0)
SOFT = {
    "normalized_logit_mse": losses.normalized_logit_mse,
    "true_logit_mse": losses.true_logit_mse,
    "kl_divergence": losses.kl_divergence,
}

# Teacher pairs [false, true] with means -4, 4 and 0; centred: [-3, 3], [0, 0], [2, -2].
TEACHER = np.float32([[-7, -1], [4, 4], [2, -2]])
CENTRED = np.float32([[-3, 3], [0, 0], [2, -2]])
STUDENT = np.float32([[-1, 2], [1, -2], [2, -2]])
MARGIN = np.float32([[2, -1], [1, -2], [0, 0]])  # STUDENT - CENTRED


@pytest.mark.parametrize("module", [contract, pointwise, combination], ids=lambda m: m.__name__)
def test_worked_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_centre_is_equation_10():
    np.testing.assert_array_equal(losses.centre(TEACHER), CENTRED)


def test_centre_twice_is_centre_once_exactly():
    raw = np.random.default_rng(0).normal(-5.0, 4.0, (1000, 2)).astype(np.float32)
    once = losses.centre(raw)
    np.testing.assert_array_equal(losses.centre(once), once)
    np.testing.assert_array_equal(once[:, 0], -once[:, 1])


def test_centre_rejects_other_label_counts():
    with pytest.raises(InputError, match=r"teacher_logits: shape \(4, 3\). Expected \[..., 2\]"):
        losses.centre(np.zeros((4, 3)))


def test_normalized_logit_mse_is_the_mean_over_the_two_logits():
    values = losses.normalized_logit_mse(STUDENT, teacher_logits=TEACHER, reduce_fn=None)
    np.testing.assert_array_equal(values, [(4 + 1) / 2, (1 + 4) / 2, 0])
    assert losses.normalized_logit_mse(STUDENT, teacher_logits=TEACHER) == pytest.approx(5 / 3)


def test_normalized_logit_mse_sum_is_equation_11_as_printed():
    values = losses.normalized_logit_mse(
        STUDENT, teacher_logits=TEACHER, label_reduction="sum", reduce_fn=None
    )
    np.testing.assert_array_equal(values, [4 + 1, 1 + 4, 0])


def test_normalized_logit_mse_gradient_by_hand():
    gradient = jax.grad(lambda x: losses.normalized_logit_mse(x, teacher_logits=TEACHER))(STUDENT)
    # d/dx of mean over 3 documents and 2 logits of (x - c)^2 is 2 (x - c) / 6.
    np.testing.assert_allclose(gradient, MARGIN / 3, rtol=1e-6)


def test_unknown_label_reduction_is_named():
    with pytest.raises(InputError, match=r"label_reduction: 'means'. .*Did you mean 'mean'\?"):
        losses.normalized_logit_mse(STUDENT, teacher_logits=TEACHER, label_reduction="means")


def test_true_logit_mse_by_hand():
    values = losses.true_logit_mse(STUDENT, teacher_logits=TEACHER, reduce_fn=None)
    np.testing.assert_array_equal(values, [1, 4, 0])
    gradient = jax.grad(lambda x: losses.true_logit_mse(x, teacher_logits=TEACHER))(STUDENT)
    np.testing.assert_allclose(gradient, [[0, -2 / 3], [0, -4 / 3], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize("loss", SOFT.values(), ids=SOFT)
def test_raw_and_centred_teacher_logits_give_the_same_loss(loss):
    raw = loss(STUDENT, teacher_logits=TEACHER, reduce_fn=None)
    centred = loss(STUDENT, teacher_logits=CENTRED, reduce_fn=None)
    np.testing.assert_allclose(raw, centred, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", SOFT.values(), ids=SOFT)
def test_a_perfect_student_has_no_loss_and_no_gradient(loss):
    value, gradient = jax.value_and_grad(lambda x: loss(x, teacher_logits=TEACHER))(CENTRED)
    assert value == pytest.approx(0.0, abs=1e-7)
    np.testing.assert_allclose(gradient, np.zeros((3, 2)), atol=1e-7)


def test_kl_divergence_by_hand():
    teacher = np.float32([[0, LOG3], [LOG3, 0], [8, 8]])  # p(true) = 3/4, 1/4, 1/2
    student = np.float32([[5, 5], [0, LOG3], [1, 1]])  # q(true) = 1/2, 3/4, 1/2
    values = losses.kl_divergence(student, teacher_logits=teacher, reduce_fn=None)
    expected = [
        0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25),
        0.0,
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7)


def test_kl_divergence_is_not_symmetric_and_starts_from_the_teacher():
    certain, unsure = np.float32([[-50, 50]]), np.float32([[0, 0]])
    assert losses.kl_divergence(unsure, teacher_logits=certain) == pytest.approx(math.log(2.0))
    # 1/2 log(1/2 / 1) + 1/2 log(1/2 / e^-100)
    assert losses.kl_divergence(certain, teacher_logits=unsure) == pytest.approx(50 - math.log(2.0), rel=1e-5)


def test_kl_divergence_temperature_by_hand():
    teacher = np.float32([[0, 2 * LOG3]])  # at temperature 2, p(true) = 3/4
    value = losses.kl_divergence(np.zeros((1, 2), np.float32), teacher_logits=teacher, temperature=2.0)
    assert value == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan, True])
def test_kl_divergence_rejects_a_bad_temperature(temperature):
    with pytest.raises(InputError, match=r"temperature: .* Expected a positive finite number"):
        losses.kl_divergence(STUDENT, teacher_logits=TEACHER, temperature=temperature)


def test_hard_cross_entropy_is_equation_12():
    student = np.float32([[[0, LOG3], [0, -LOG3]]])  # p(true) = 3/4 and 1/4
    relevance = np.float32([[1, 0]])
    values = losses.hard_cross_entropy(student, relevance=relevance, reduce_fn=None)
    np.testing.assert_allclose(values, [[-math.log(0.75), -math.log(0.75)]], rtol=1e-6)
    # The printed equation sums over the pair of a relevant and a non-relevant document.
    total = losses.hard_cross_entropy(student, relevance=relevance, reduce_fn=jnp.sum)
    assert total == pytest.approx(-math.log(0.75) - math.log(1 - 0.25), rel=1e-6)


def test_hard_cross_entropy_ignores_unknown_documents():
    student = np.float32([[0, LOG3], [7, 9], [LOG3, 0]])
    unknown = np.float32([1, -1, 0])
    value, gradient = jax.value_and_grad(lambda x: losses.hard_cross_entropy(x, relevance=unknown))(student)
    assert value == pytest.approx(-math.log(0.75), rel=1e-6)  # a mean over two documents
    np.testing.assert_allclose(gradient, [[0.125, -0.125], [0, 0], [-0.125, 0.125]], rtol=1e-6)
    assert losses.hard_cross_entropy(student, relevance=np.float32([-1, -1, -1])) == 0.0
    entries = losses.hard_cross_entropy(student, relevance=unknown, reduce_fn=losses.count)
    assert entries == 2.0


def test_hard_cross_entropy_counts_every_positive_grade_as_relevant():
    graded = losses.hard_cross_entropy(STUDENT, relevance=np.int32([3, 0, 1]))
    assert graded == losses.hard_cross_entropy(STUDENT, relevance=np.int32([1, 0, 1]))


def test_hard_cross_entropy_shows_a_nan_judgement():
    relevance = np.float32([1, np.nan, 0])
    assert np.isnan(losses.hard_cross_entropy(STUDENT, relevance=relevance))
    masked = losses.hard_cross_entropy(STUDENT, relevance=relevance, where=np.array([True, False, True]))
    assert np.isfinite(masked)


def _parity(ours, theirs, student: np.ndarray) -> None:
    """Value and gradient of a JAX loss beside those of a PyTorch one."""
    value, gradient = jax.value_and_grad(ours)(jnp.asarray(student))
    tensor = torch.tensor(student, requires_grad=True)
    expected = theirs(tensor)
    expected.backward()
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-5, atol=1e-7)


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Student and teacher logits `[64, 2]`, relevance `[64]`."""
    rng = np.random.default_rng(1)
    student = rng.normal(0, 3, (64, 2)).astype(np.float32)
    teacher = rng.normal(-5, 3, (64, 2)).astype(np.float32)
    return student, teacher, rng.integers(0, 2, 64)


@pytest.mark.parametrize("label_reduction", ["mean", "sum"])
def test_parity_with_torch_mse_loss(batch, label_reduction):
    student, teacher, _ = batch
    centred = torch.tensor(teacher) - torch.tensor(teacher).mean(-1, keepdim=True)
    factor = {"mean": 1.0, "sum": 2.0}[label_reduction]
    _parity(
        lambda x: losses.normalized_logit_mse(x, teacher_logits=teacher, label_reduction=label_reduction),
        lambda x: factor * torch.nn.functional.mse_loss(x, centred),
        student,
    )
    _parity(
        lambda x: losses.true_logit_mse(x, teacher_logits=teacher),
        lambda x: torch.nn.functional.mse_loss(x[:, 1], centred[:, 1]),
        student,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_parity_with_torch_kl_div(batch, temperature):
    student, teacher, _ = batch
    target = torch.softmax(torch.tensor(teacher) / temperature, -1)
    _parity(
        lambda x: losses.kl_divergence(x, teacher_logits=teacher, temperature=temperature),
        lambda x: (
            temperature**2
            * torch.nn.functional.kl_div(
                torch.log_softmax(x / temperature, -1), target, reduction="batchmean"
            )
        ),
        student,
    )


def test_parity_with_torch_cross_entropy(batch):
    student, _, relevance = batch
    relevance = np.where(np.arange(64) % 5 == 0, -1, relevance)
    _parity(
        lambda x: losses.hard_cross_entropy(x, relevance=relevance),
        lambda x: torch.nn.functional.cross_entropy(x, torch.tensor(relevance), ignore_index=-1),
        student,
    )
