"""Intervals, tests and agreement for paired and grouped samples.

Knows numbers only: nothing of prompts, models or files. Every function is a thin layer
over SciPy; what it adds is the resampling of whole groups, because four responses to
one prompt are not four independent observations, and runs crossed with prompts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

# Numbers that SciPy may draw at once (8 MB). By itself it draws all resamples together,
# 6 GB for Nectar's rows; the same numbers come either way.
_DRAWN_AT_ONCE = 2**20


class Interval(NamedTuple):
    """An estimate with the ends of its confidence interval, in the data's own unit."""

    estimate: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """Mean of a − b with its interval and the two-sided p-value of "no difference"."""

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[np.ndarray], float] = np.mean,
    groups: Sequence | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of `statistic(values)` (Efron & Tibshirani, 1993).

    `values` has shape (N,); `groups`, also (N,), names what each value belongs to
    (a prompt, say), and whole groups are resampled together. With a single group
    nothing can be said about the spread: `low` and `high` are NaN.
    Raises ValueError when `values` is empty or `groups` has another length.

    >>> bootstrap_interval([0, 1, 1, 1, 0, 1, 1, 1, 1, 0])
    Interval(estimate=0.7, low=0.4, high=0.9)
    """
    values = _vector(values)
    codes = _group_codes(len(values), groups)
    by_group = values[np.argsort(codes, kind="stable")]
    sizes = np.bincount(codes)
    starts = np.cumsum(sizes) - sizes
    estimate = float(statistic(values))
    if len(sizes) < 2:
        return Interval(estimate, float("nan"), float("nan"))

    def resampled(drawn: np.ndarray) -> float:
        # Positions of all members of the drawn groups: each start, then one up.
        length = sizes[drawn]
        offset = np.repeat(starts[drawn] - np.cumsum(length) + length, length)
        return statistic(by_group[offset + np.arange(len(offset))])

    result = stats.bootstrap(
        (np.arange(len(sizes)),),
        resampled,
        vectorized=False,
        n_resamples=resamples,
        batch=_resamples_at_once(len(sizes)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(estimate, float(result.low), float(result.high))


def wilson_interval(hits: int, count: int, level: float = 0.95) -> Interval:
    """Share of `hits` in `count` independent trials with Wilson's interval (1927).

    Sound for few trials and near 0 and 1 too. All NaN without a trial. Raises ValueError
    when `hits` is not between 0 and `count`.

    >>> interval = wilson_interval(3, 4)
    >>> [round(end, 3) for end in interval]
    [0.75, 0.301, 0.954]
    """
    if count == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    ends = stats.binomtest(int(hits), int(count)).proportion_ci(level, "wilson")
    return Interval(float(hits / count), float(ends.low), float(ends.high))


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    groups: Sequence | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Mean of a − b over pairs, bootstrap interval, and a sign-flip permutation test.

    `a` and `b` have shape (N,), measured on the same items. Under "no difference" the
    sign of each pair's difference is arbitrary, so signs are flipped at random (all
    2^G ways when that is no more than `resamples`); with `groups` the pairs of a group
    keep one common sign. A single group proves nothing: p is 1, the ends are NaN. Where
    a difference is not finite, all four are NaN. Raises ValueError on unequal lengths.

    >>> after, before = [3, 4, 5, 6, 7], [1, 3, 4, 4, 6]
    >>> paired_difference(after, before)
    PairedDifference(difference=1.4, low=1.0, high=1.8, p_value=0.0625)
    """
    a, b = _vector(a), _vector(b)
    if len(a) != len(b):
        raise ValueError(f"paired samples differ in length: {len(a)} and {len(b)}")
    difference = a - b
    if not np.isfinite(difference).all():  # the test would say p = 0
        return PairedDifference(*[float("nan")] * 4)
    interval = bootstrap_interval(difference, np.mean, groups, level, resamples, seed)
    sums = np.bincount(_group_codes(len(a), groups), weights=difference)
    if len(sums) < 2:  # SciPy refuses one group; both its signs are as far from 0
        return PairedDifference(*interval, 1.0)
    test = stats.permutation_test(
        (sums,),
        np.sum,
        permutation_type="samples",
        n_resamples=resamples,
        batch=_resamples_at_once(2 * len(sums)),  # each sum with both signs
        rng=np.random.default_rng(seed),
    )
    return PairedDifference(*interval, float(test.pvalue))


def student_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of a few independent values, such as seeds, with Student's t interval (1908).

    `values` has shape (N,), differences of paired runs, say. Below a dozen values a
    bootstrap is too narrow: of five, its 95 % hold the truth in 84 % of cases. The ends
    are NaN with a single value. Raises ValueError when `values` is empty.

    >>> [round(end, 2) for end in student_interval([1, 2, 3, 4, 5])]
    [3.0, 1.04, 4.96]
    """
    values = _vector(values)
    return crossed_interval(values, np.zeros_like(values), level)


def crossed_interval(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Interval:
    """Difference of means of two methods, each run with several seeds on the same items.

    `a` is (S, N) and `b` (T, N): one row a run, one column an item (a prompt, say). The
    interval is difference ± t·√(s²_a/S + s²_b/T + s²_items/N): variances of the runs'
    means, and of the items' differences beyond the noise of runs; t has the degrees of
    freedom of such a sum (Satterthwaite 1946, Biometrics Bulletin 2:110). With one run
    on both sides it is Student's over items. A single run shows nothing of how much
    others would differ; a single item gives NaN ends. Raises ValueError when the items
    differ in number.

    >>> [round(end, 2) for end in crossed_interval([[1, 2, 2, 3]], [[1, 1, 1, 1]])]
    [1.0, -0.3, 2.3]
    """
    a, b = (np.atleast_2d(np.asarray(x, dtype=float)) for x in (a, b))
    if a.shape[1] != b.shape[1] or not a.size or not b.size:
        raise ValueError(
            f"runs of shape {a.shape} and {b.shape}: items must be the same"
        )
    estimate, count = float(a.mean() - b.mean()), a.shape[1]
    if count < 2:
        return Interval(estimate, float("nan"), float("nan"))
    parts = []  # variance and degrees of freedom of each component
    of_items = (a.mean(0) - b.mean(0)).var(ddof=1)
    for runs in (a, b):
        if len(runs) < 2:  # its noise cannot be told from the items', nor counts twice
            continue
        parts.append((runs.mean(1).var(ddof=1) / len(runs), len(runs) - 1))
        # The items' means vary by the runs' noise, too: E = σ²_items + Σ σ²_noise / runs.
        # That share is in the runs' means already; it is the residual mean square / runs.
        residual = (runs - runs.mean(1, keepdims=True)).var(0, ddof=1).sum()
        of_items -= residual / (count - 1) / len(runs)
    parts.append((max(of_items, 0) / count, count - 1))
    half = _t_half_width(*np.array(parts).T, level)
    return Interval(estimate, estimate - half, estimate + half)


def agreement(a: Sequence, b: Sequence) -> float:
    """Share of items on which two judges give the same label (raw agreement, 0 to 1).

    Raises ValueError on unequal lengths or nothing to compare.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"need two equally long, non-empty lists: {len(a)}, {len(b)}")
    return float(np.mean([x == y for x, y in zip(a, b, strict=True)]))


def kendall_tau(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's τ-b between two sets of ranks or scores of the same items (−1 to 1).

    Item i has rank a[i] with one judge and b[i] with the other; these are ranks by
    item, not lists of items in order. NaN when one side ranks all items equal.
    Raises ValueError on unequal lengths.
    """
    return float(stats.kendalltau(_vector(a), _vector(b)).statistic)


def _t_half_width(variances: np.ndarray, degrees: np.ndarray, level: float) -> float:
    """t·√Σv of independent components, with Satterthwaite's degrees of freedom."""
    variance = variances.sum()
    if variance == 0:
        return 0.0
    freedom = variance**2 / (variances**2 / degrees).sum()
    return float(stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(variance))


def _resamples_at_once(numbers: int) -> int:
    """How many resamples of so many numbers each to draw at once."""
    return max(1, _DRAWN_AT_ONCE // numbers)


def _vector(values: ArrayLike) -> np.ndarray:
    vector = np.asarray(values, dtype=float)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"need a non-empty list of numbers, got shape {vector.shape}")
    return vector


def _group_codes(count: int, groups: Sequence | None) -> np.ndarray:
    """The group of each value as a number from 0; without `groups`, one group each."""
    if groups is None:
        return np.arange(count)
    if len(groups) != count:
        raise ValueError(f"{count} values but {len(groups)} group labels")
    return np.unique(np.asarray(groups), return_inverse=True)[1]
