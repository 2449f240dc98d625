"""Is one system better than another, or only luckier on these queries? Paired two-sided tests on arrays.

All functions take one value per query (nDCG@10, say) for each of two systems, in the same order of queries,
and return a `Comparison`. The null hypothesis is that the two systems are equally good. `as_in_thesis`
chooses between the t-test and Wilcoxon's as the InRanker thesis does for its table 8.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from inranker_jax.errors import InputError

_NOISE = 1e-12
"""Differences below this share of the values are rounding of equal values, not differences."""
_CHUNK = 2**22
"""Random signs held in memory at a time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """The result of one test.

    Attributes:
      test: its name.
      statistic: t for the t-test, the smaller rank sum W for Wilcoxon's, W for Shapiro and Wilk's, the mean
        difference for the randomisation test.
      p_value: probability of a result at least as extreme if the null hypothesis holds.
      mean_difference: mean of first minus second, in the unit of the measure.
      queries: number of pairs.
    """

    test: str
    statistic: float
    p_value: float
    mean_difference: float
    queries: int


def paired_t_test(first: ArrayLike, second: ArrayLike) -> Comparison:
    """Student's t-test, `t = mean / (standard deviation / sqrt(n))` with n - 1 degrees of freedom.

    Assumes normal differences, which `shapiro_wilk` checks. Equal values give t = 0 and p = 1; other
    differences that are all the same number give an infinite t and p = 0.

    Args:
      first: `[n]` values of one system.
      second: `[n]` values of the other, same queries in the same order.

    Returns:
      The comparison; its statistic has the sign of first minus second.

    Raises:
      InputError: not two finite vectors of one length, or fewer than 2 queries.

    The differences 1, 2 and 3 have mean 2 and standard deviation 1, so t is 2 * sqrt(3):

    >>> result = paired_t_test([2.0, 4.0, 7.0], [1.0, 2.0, 4.0])
    >>> round(result.statistic, 4), round(result.p_value, 4)
    (3.4641, 0.0742)
    """
    differences = _differences(first, second, at_least=2)
    n, mean = differences.size, float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    constant = math.copysign(math.inf, mean) if mean else 0.0
    t = mean / error if error > _NOISE * abs(mean) else constant
    return Comparison("paired t-test", t, 2 * float(stats.t.sf(abs(t), n - 1)), mean, n)


def wilcoxon_signed_rank(first: ArrayLike, second: ArrayLike) -> Comparison:
    """Wilcoxon's signed-rank test, which needs symmetric differences but not normal ones.

    Queries with equal values are dropped, as Wilcoxon proposed. For at most 50 others, no two of whose
    differences have the same size, p is exact; otherwise a normal approximation, poor below ten queries.

    Args:
      first: `[n]` values of one system.
      second: `[n]` values of the other, same queries in the same order.

    Returns:
      The comparison; its statistic is the smaller of the two rank sums. Equal systems give 0 and p = 1.

    Raises:
      InputError: not two finite vectors of one length, or no queries.

    The differences 1, -2, 3, 4 have ranks 1 to 4; the negative ones sum to 2. Of the 16 ways to place the
    signs, 3 give 2 or less (none, {1}, {2}), and as many on the other side:

    >>> result = wilcoxon_signed_rank([2.0, 1.0, 5.0, 6.0], [1.0, 3.0, 2.0, 2.0])
    >>> result.statistic, result.p_value
    (2.0, 0.375)
    """
    differences = _differences(first, second, at_least=1)
    mean = float(differences.mean())
    nonzero = differences[differences != 0]
    if nonzero.size == 0:
        return Comparison("Wilcoxon signed-rank test", 0.0, 1.0, mean, differences.size)
    # Ranks do not see the scale; this ties sizes that differ by rounding alone.
    nonzero = np.sign(nonzero) * np.maximum(np.round(np.abs(nonzero) / np.abs(nonzero).max(), 10), 1e-10)
    untied = np.unique(np.abs(nonzero)).size == nonzero.size
    method = "exact" if untied and nonzero.size <= 50 else "asymptotic"
    result = stats.wilcoxon(nonzero, zero_method="wilcox", method=method)
    return Comparison(
        "Wilcoxon signed-rank test", float(result.statistic), float(result.pvalue), mean, differences.size
    )


def randomisation_test(
    first: ArrayLike, second: ArrayLike, *, seed: int = 0, samples: int = 100_000
) -> Comparison:
    """Fisher's paired randomisation test: how often do random signs give a mean difference this large?

    If the systems are equal, each difference could as well have the other sign. p is the share of sign
    patterns whose mean is at least as far from 0. All patterns are tried if there are no more than `samples`
    of them; otherwise `samples` random ones, and the observed one is counted among them so that p is never 0
    (Phipson and Smyth 2010). Nothing is assumed about the distribution.

    Args:
      first: `[n]` values of one system.
      second: `[n]` values of the other, same queries in the same order.
      seed: of the random signs; the same seed gives the same p.
      samples: number of random patterns; the standard error of p is about `sqrt(p / samples)`.

    Returns:
      The comparison; its statistic is the mean difference.

    Raises:
      InputError: not two finite vectors of one length, no queries, or `samples` is not positive.

    Of the 8 sign patterns of 1, 2, 3, only all plus and all minus reach a mean of 2:

    >>> randomisation_test([2.0, 4.0, 7.0], [1.0, 2.0, 4.0]).p_value
    0.25
    """
    differences = _differences(first, second, at_least=1)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise InputError(f"samples: {samples!r}. Expected a positive integer, such as 100_000.")
    n, observed = differences.size, abs(float(differences.sum()))
    bound = observed - _NOISE * float(np.abs(differences).sum())
    exact = n < 63 and 2**n <= samples
    rng = np.random.default_rng(seed)
    patterns = 2**n if exact else samples
    rows = max(1, _CHUNK // n)
    extreme = 0
    for start in range(0, patterns, rows):
        size = min(rows, patterns - start)
        if exact:
            bits = (np.arange(start, start + size)[:, None] >> np.arange(n)) & 1
        else:
            bits = rng.integers(0, 2, (size, n), dtype=np.int8)
        sums = (2.0 * bits - 1.0) @ differences
        extreme += int(np.count_nonzero(np.abs(sums) >= bound))
    p = extreme / patterns if exact else (extreme + 1) / (patterns + 1)
    mean = float(differences.mean())
    return Comparison("randomisation test", mean, p, mean, n)


def shapiro_wilk(first: ArrayLike, second: ArrayLike) -> Comparison:
    """Shapiro and Wilk's test of the null hypothesis that the differences are normally distributed.

    Args:
      first: `[n]` values of one system.
      second: `[n]` values of the other, same queries in the same order.

    Returns:
      The comparison; a small p speaks against the t-test. Differences that are all equal give W = 1, p = 1.

    Raises:
      InputError: not two finite vectors of one length, or fewer than 3 queries.

    >>> round(shapiro_wilk([1.0, 2.0, 3.0, 4.0, 40.0], [0.0, 0.0, 0.0, 0.0, 0.0]).p_value, 4)
    0.001
    """
    differences = _differences(first, second, at_least=3)
    mean = float(differences.mean())
    if float(np.ptp(differences)) <= _NOISE * abs(mean):
        return Comparison("Shapiro-Wilk test", 1.0, 1.0, mean, differences.size)
    result = stats.shapiro(differences)
    return Comparison(
        "Shapiro-Wilk test", float(result.statistic), float(result.pvalue), mean, differences.size
    )


def as_in_thesis(first: ArrayLike, second: ArrayLike, *, alpha: float = 0.05) -> Comparison:
    """The test of the InRanker thesis, section 4.2 and table 8.

    The paired t-test, unless `shapiro_wilk` rejects normal differences at level `alpha`; then Wilcoxon's.

    Args:
      first: `[n]` values of one system.
      second: `[n]` values of the other, same queries in the same order.
      alpha: level of the normality test.

    Returns:
      The comparison; its `test` says which one was chosen.

    Raises:
      InputError: not two finite vectors of one length, fewer than 3 queries, or `alpha` outside (0, 1).

    >>> as_in_thesis([1.0, 2.0, 3.0, 4.0, 40.0], [0.0, 0.0, 0.0, 0.0, 0.0]).test
    'Wilcoxon signed-rank test'
    """
    if not 0.0 < alpha < 1.0:
        raise InputError(f"alpha: {alpha!r}. Expected a level between 0 and 1, such as 0.05.")
    normal = shapiro_wilk(first, second).p_value >= alpha
    return paired_t_test(first, second) if normal else wilcoxon_signed_rank(first, second)


def _differences(first: ArrayLike, second: ArrayLike, *, at_least: int) -> NDArray[np.float64]:
    """First minus second in float64, with rounding noise between equal values removed."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(
            f"paired values: shapes {a.shape} and {b.shape}. Expected two vectors of one length, with the "
            "same queries in the same order."
        )
    if a.size < at_least:
        raise InputError(f"paired values: {a.size} queries. This test needs at least {at_least}.")
    for name, values in (("first", a), ("second", b)):
        if not np.all(np.isfinite(values)):
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            raise InputError(f"paired values: {name}[{index}] is {values[index]}. Expected finite numbers.")
    differences = a - b
    return np.where(np.abs(differences) <= _NOISE * np.maximum(np.abs(a), np.abs(b)), 0.0, differences)
