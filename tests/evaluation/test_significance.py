"""Significance tests beside scipy, hand-counted cases and the figures of thesis table 8."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from inranker_jax.errors import InputError
from inranker_jax.evaluation import significance

TESTS = (
    significance.paired_t_test,
    significance.wilcoxon_signed_rank,
    significance.randomisation_test,
    significance.shapiro_wilk,
    significance.as_in_thesis,
)


@pytest.fixture
def systems() -> tuple[np.ndarray, np.ndarray]:
    """Values of two systems on 50 queries; the first is a little better."""
    rng = np.random.default_rng(0)
    second = rng.uniform(0.2, 0.8, 50)
    return second + rng.normal(0.03, 0.08, 50), second


def _with_t(t: float, n: int) -> np.ndarray:
    """Differences of mean t / sqrt(n) and standard deviation 1, so that their t statistic is `t`."""
    sample = np.random.default_rng(4).normal(size=n)
    return (sample - sample.mean()) / sample.std(ddof=1) + t / math.sqrt(n)


def test_worked_examples_in_docstrings():
    result = doctest.testmod(significance)
    assert result.attempted > 0
    assert result.failed == 0


def test_t_test_equals_scipy(systems):
    result, expected = significance.paired_t_test(*systems), stats.ttest_rel(*systems)
    assert result.statistic == pytest.approx(expected.statistic, rel=1e-10)
    assert result.p_value == pytest.approx(expected.pvalue, rel=1e-10)
    assert result.mean_difference == pytest.approx(np.mean(systems[0]) - np.mean(systems[1]))
    assert result.queries == 50


@pytest.mark.parametrize(("t", "p"), [(2.607, 0.0121), (3.601, 0.0007)])
def test_t_test_gives_the_p_values_of_thesis_table_8(t, p):
    result = significance.paired_t_test(_with_t(t, 50), np.zeros(50))
    assert result.statistic == pytest.approx(t)
    assert round(result.p_value, 4) == p


def test_wilcoxon_gives_the_p_value_of_thesis_table_8():
    # w = 201, p = 0.0001. The thesis does not print how many of the 50 queries had equal values: 3 fits.
    negative = {47, 46, 45, 44, 19}
    ranks = np.array([-r if r in negative else r for r in range(1, 48)] + [0, 0, 0], float)
    result = significance.wilcoxon_signed_rank(ranks, np.zeros(50))
    assert result.statistic == 201
    assert round(result.p_value, 4) == 0.0001


def test_wilcoxon_exact_p_by_counting():
    differences = np.array([0.5, -1.0, 2.0, 3.5, -0.25, 6.0])
    ranks = stats.rankdata(np.abs(differences))
    smaller = min(ranks[differences < 0].sum(), ranks[differences > 0].sum())
    sums = [np.dot(signs, ranks) for signs in itertools.product((0, 1), repeat=6)]
    result = significance.wilcoxon_signed_rank(differences, np.zeros(6))
    assert result.statistic == smaller == 4
    assert result.p_value == pytest.approx(2 * np.mean([s <= smaller for s in sums]))


def test_wilcoxon_with_ties_and_equal_values_is_the_normal_approximation():
    differences = np.array([1, 1, -1, 2, 3, -2, 4, 4, 5, 0, 0, 6], float)
    ranks = stats.rankdata(np.abs(differences[differences != 0]))
    n, ties = 10, (3**3 - 3) + (2**3 - 2) + (2**3 - 2)
    deviation = math.sqrt(n * (n + 1) * (2 * n + 1) / 24 - ties / 48)
    smaller = ranks[[2, 5]].sum()
    result = significance.wilcoxon_signed_rank(differences, np.zeros(12))
    assert result.statistic == smaller == 2 + 4.5
    assert result.p_value == pytest.approx(2 * stats.norm.cdf((smaller - n * (n + 1) / 4) / deviation))
    assert result.queries == 12


def test_rounding_noise_is_not_a_difference():
    first, second = np.array([0.1 + 0.2, 0.5, 0.7, 0.9]), np.array([0.3, 0.4, 0.5, 0.6])
    clean = np.array([0.3, 0.5, 0.7, 0.9])
    for test in (significance.wilcoxon_signed_rank, significance.randomisation_test):
        assert test(first, second).p_value == test(clean, second).p_value
    # 0.3 - 0.1 and 0.4 - 0.2 are tied, whatever their last bit: |ranks| are 1.5, 1.5, 3.
    tied = significance.wilcoxon_signed_rank([0.3, 0.2, 0.9], [0.1, 0.4, 0.1])
    assert tied.statistic == 1.5


def test_randomisation_counts_every_pattern_of_a_small_set():
    differences = np.array([0.4, -0.1, 0.3, 0.2, 0.25, -0.05, 0.1])
    sums = [np.dot(s, differences) for s in itertools.product((-1, 1), repeat=7)]
    expected = np.mean([abs(s) >= differences.sum() - 1e-12 for s in sums])
    result = significance.randomisation_test(differences, np.zeros(7))
    assert result.p_value == expected
    assert result.statistic == pytest.approx(differences.mean())


def test_randomisation_samples_agree_with_all_patterns(monkeypatch):
    differences = np.random.default_rng(5).normal(0.4, 1.0, 14)
    exact = significance.randomisation_test(differences, np.zeros(14), samples=2**14).p_value
    sampled = significance.randomisation_test(differences, np.zeros(14), samples=2**14 - 1, seed=1).p_value
    assert 0.01 < exact < 0.5
    assert sampled != exact
    assert sampled == pytest.approx(exact, abs=5 * math.sqrt(exact / 2**14))
    monkeypatch.setattr(significance, "_CHUNK", 1000)
    assert significance.randomisation_test(differences, np.zeros(14), samples=2**14).p_value == exact


def test_randomisation_repeats_with_its_seed_and_never_gives_zero(systems):
    def p(seed):
        return significance.randomisation_test(*systems, seed=seed, samples=999).p_value

    assert p(3) == p(3)
    assert len({p(seed) for seed in range(8)}) > 1
    far = significance.randomisation_test(np.ones(200), np.zeros(200), samples=999)
    assert far.p_value == 1 / 1000


def test_randomisation_agrees_with_the_t_test_on_normal_differences():
    differences = _with_t(2.0, 60)
    t_test = significance.paired_t_test(differences, np.zeros(60)).p_value
    random = significance.randomisation_test(differences, np.zeros(60)).p_value
    assert random == pytest.approx(t_test, abs=0.005)


def test_thesis_procedure_follows_normality(systems):
    normal = significance.as_in_thesis(*systems)
    assert significance.shapiro_wilk(*systems).p_value > 0.05
    assert normal == significance.paired_t_test(*systems)
    skewed = np.random.default_rng(1).exponential(1.0, 50) ** 2
    other = significance.as_in_thesis(skewed, np.zeros(50))
    assert other == significance.wilcoxon_signed_rank(skewed, np.zeros(50))
    strict = significance.as_in_thesis(skewed, np.zeros(50), alpha=1e-30)
    assert strict == significance.paired_t_test(skewed, np.zeros(50))


@pytest.mark.parametrize("test", TESTS)
def test_equal_systems_have_p_one(test):
    result = test(np.linspace(0, 1, 30), np.linspace(0, 1, 30))
    assert result.p_value == 1.0
    assert result.mean_difference == 0.0


@pytest.mark.parametrize("test", TESTS[:3])
def test_swapping_the_systems_keeps_p(systems, test):
    forward, backward = test(*systems), test(*systems[::-1])
    assert backward.p_value == pytest.approx(forward.p_value, rel=1e-9)
    assert backward.mean_difference == pytest.approx(-forward.mean_difference)


def test_a_constant_difference():
    first, second = np.linspace(0, 1, 20) + 0.1, np.linspace(0, 1, 20)
    result = significance.paired_t_test(first, second)
    assert result.statistic == math.inf
    assert result.p_value == 0.0
    assert significance.paired_t_test(second, first).statistic == -math.inf


@pytest.mark.parametrize("test", TESTS)
def test_bad_input_is_named(test):
    with pytest.raises(InputError, match=r"shapes \(3,\) and \(4,\). Expected two vectors of one length"):
        test(np.zeros(3), np.zeros(4))
    with pytest.raises(InputError, match=r"shapes \(3, 1\)"):
        test(np.zeros((3, 1)), np.zeros((3, 1)))
    with pytest.raises(InputError, match=r"second\[2\] is nan"):
        test(np.zeros(4), np.array([0, 0, np.nan, 0]))
    with pytest.raises(InputError, match=r"0 queries. This test needs at least"):
        test([], [])


def test_bad_options_are_named():
    with pytest.raises(InputError, match="samples: 0"):
        significance.randomisation_test([1.0], [0.0], samples=0)
    with pytest.raises(InputError, match=r"alpha: 5. Expected a level between 0 and 1"):
        significance.as_in_thesis(np.arange(5.0), np.zeros(5), alpha=5)
