"""Intervals, tests and agreement for paired and grouped samples.

Knows numbers only: nothing of prompts, models or files. Every function is a thin layer
over SciPy; what it adds is the resampling of whole groups, because four responses to
one prompt are not four independent observations.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


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
    keep one common sign. A single group proves nothing: p is 1, the ends are NaN.
    Raises ValueError on unequal lengths.

    >>> after, before = [3, 4, 5, 6, 7], [1, 3, 4, 4, 6]
    >>> paired_difference(after, before)
    PairedDifference(difference=1.4, low=1.0, high=1.8, p_value=0.0625)
    """
    a, b = _vector(a), _vector(b)
    if len(a) != len(b):
        raise ValueError(f"paired samples differ in length: {len(a)} and {len(b)}")
    difference = a - b
    interval = bootstrap_interval(difference, np.mean, groups, level, resamples, seed)
    sums = np.bincount(_group_codes(len(a), groups), weights=difference)
    if len(sums) < 2:  # SciPy refuses one group; both its signs are as far from 0
        return PairedDifference(*interval, 1.0)
    test = stats.permutation_test(
        (sums,),
        np.sum,
        permutation_type="samples",
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    )
    return PairedDifference(*interval, float(test.pvalue))


def crossed_interval(
    a: ArrayLike,
    b: ArrayLike,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Difference of means of two methods, each run with several seeds on the same items.

    `a` is (S, N) and `b` (T, N): one row a run, one column an item (a prompt, say). Items
    are resampled for both together, runs of each by themselves, independently (Owen 2007,
    The pigeonhole bootstrap, Annals of Applied Statistics). With few runs their spread is
    understated, by (S − 1)/S in variance; a single run shows none of it. Raises
    ValueError when the items differ in number.

    >>> crossed_interval([[1, 2, 2, 3]], [[1, 1, 1, 1]])
    Interval(estimate=1.0, low=0.25, high=1.75)
    """
    a, b = (np.atleast_2d(np.asarray(x, dtype=float)) for x in (a, b))
    if a.shape[1] != b.shape[1] or not a.size or not b.size:
        raise ValueError(
            f"runs of shape {a.shape} and {b.shape}: items must be the same"
        )
    rng = np.random.default_rng(seed)
    items = rng.integers(a.shape[1], size=(resamples, 1, a.shape[1]))

    def means(x: np.ndarray) -> np.ndarray:
        runs = rng.integers(len(x), size=(resamples, len(x), 1))
        return x[runs, items].mean((1, 2))

    tail = (1 - level) / 2
    low, high = np.quantile(means(a) - means(b), [tail, 1 - tail])
    return Interval(float(a.mean() - b.mean()), float(low), float(high))


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
