import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from starling_lib import statistics
from starling_lib.statistics import (
    agreement,
    bootstrap_interval,
    kendall_tau,
    paired_difference,
    student_interval,
    wilson_interval,
)


def test_interval_of_a_mean_matches_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    interval = bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(150):
        sample = rng.exponential(1.0, size=60)
        _, low, high = bootstrap_interval(sample, level=0.8, resamples=200, seed=trial)
        covered += low <= 1.0 <= high
    assert 0.70 < covered / 150 < 0.88


def test_groups_are_resampled_whole():
    prompts = np.repeat(np.arange(30), 8)
    values = np.random.default_rng(2).normal(size=30)[prompts]  # equal within a prompt
    alone = bootstrap_interval(values)
    grouped = bootstrap_interval(values, groups=prompts)
    per_prompt = bootstrap_interval(values[::8])
    width = grouped.high - grouped.low
    assert width == pytest.approx(per_prompt.high - per_prompt.low, rel=0.1)
    assert width > 2 * (alone.high - alone.low)


def test_any_statistic_and_a_fixed_seed():
    values = np.random.default_rng(5).normal(size=50)
    first = bootstrap_interval(values, np.median, seed=7)
    assert first == bootstrap_interval(values, np.median, seed=7)
    assert first != bootstrap_interval(values, np.median, seed=8)
    assert first.estimate == np.median(values)


def test_resamples_are_drawn_in_pieces_that_change_nothing(monkeypatch):
    values = np.random.default_rng(6).normal(0.1, 1, size=2000)

    def results():
        difference = paired_difference(values[:500], np.zeros(500), resamples=300)
        return bootstrap_interval(values, resamples=300), difference

    whole = results()
    monkeypatch.setattr(statistics, "_DRAWN_AT_ONCE", 2**15)
    tracemalloc.start()
    pieces = results()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pieces == whole
    assert peak < 2e6  # all at once: 10 MB


def test_a_single_group_has_no_interval():
    interval = bootstrap_interval([1.0, 3.0], groups=["p", "p"])
    assert interval.estimate == 2.0 and np.isnan([interval.low, interval.high]).all()


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (3, 4), (6, 6), (6, 40), (1, 1)])
def test_wilson_interval_against_its_formula(hits, count):
    """The ends solve (p̂ − p)² = z² p (1 − p) / n."""
    share, z = hits / count, 1.959963984540054
    roots = np.roots([1 + z**2 / count, -2 * share - z**2 / count, share**2])
    expected = [share, *sorted(roots)]
    assert wilson_interval(hits, count) == pytest.approx(expected, abs=1e-9)
    low, high = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson_interval(hits, count)[1:] == (low, high)


def test_wilson_interval_by_level_and_without_trials():
    wide, narrow = (wilson_interval(3, 4, level) for level in (0.99, 0.5))
    assert wide.low < narrow.low < 0.75 < narrow.high < wide.high
    assert np.isnan(wilson_interval(0, 0)).all()
    with pytest.raises(ValueError, match="must not be greater"):
        wilson_interval(5, 4)


def test_students_interval_is_the_one_of_the_t_test():
    values = np.random.default_rng(6).normal(2.0, 1.0, size=5)
    ends = ttest_1samp(values, 0).confidence_interval(0.9)
    assert student_interval(values, 0.9) == pytest.approx((values.mean(), *ends))
    assert student_interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    alone = student_interval([3.0])
    assert alone.estimate == 3.0 and np.isnan(alone[1:]).all()


def test_sign_flip_p_value_against_all_flips():
    a, b = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0], [2.0, 2.5, 1.0, 1.0, 3.0, 2.0]
    difference = np.subtract(a, b)
    flips = np.array(list(itertools.product([1, -1], repeat=6))) @ difference
    expected = np.mean(np.abs(flips) >= abs(difference.sum()) - 1e-12)
    result = paired_difference(a, b)
    assert result.difference == pytest.approx(difference.mean())
    assert result.p_value == pytest.approx(expected)
    assert result.low < result.difference < result.high


def test_difference_changes_sign_with_its_arguments():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=40), rng.normal(0.5, 1, size=40)
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert forth.difference == pytest.approx(-back.difference)
    assert forth.low == pytest.approx(-back.high, abs=0.02)
    assert forth.p_value == pytest.approx(back.p_value, abs=0.01)


def test_repeats_of_one_prompt_are_no_evidence():
    """Six prompts cannot give p < 2/2^6, however many samples each one has."""
    a = np.repeat([1.0, 1.2, 0.9, 1.1, 1.3, 0.8], 10)
    groups = np.repeat(np.arange(6), 10)
    assert paired_difference(a, np.zeros(60)).p_value < 0.002
    grouped = paired_difference(a, np.zeros(60), groups=groups)
    assert grouped.p_value == pytest.approx(2 / 64)


def test_no_difference_is_not_significant():
    same = np.random.default_rng(4).normal(size=30)
    result = paired_difference(same, same)
    assert result.difference == 0 and result.p_value == 1


def test_agreement():
    assert agreement("ABBA", "ABAB") == 0.5
    assert agreement(["x"], ["x"]) == 1.0


def test_kendall_tau_is_on_ranks_by_item():
    assert kendall_tau([1, 2, 3, 4], [1, 2, 3, 4]) == 1.0
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1.0
    assert kendall_tau([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(4 / 6)


def test_kendall_tau_with_ties_is_tau_b():
    """Five pairs agree, the sixth is tied with the first judge: 5/√(5·6).

    τ-a would be 5/6, τ-c 2·5/(4²·2/3) = 15/16.
    """
    assert kendall_tau([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx((5 / 6) ** 0.5)


@given(st.permutations(range(6)), st.permutations(range(6)))
@settings(max_examples=50, deadline=None)
def test_kendall_tau_counts_pairs(a, b):
    concordant = sum(
        np.sign((a[i] - a[j]) * (b[i] - b[j]))
        for i, j in itertools.combinations(range(6), 2)
    )
    assert kendall_tau(a, b) == pytest.approx(concordant / 15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), "non-empty"),
        (lambda: bootstrap_interval([1.0, 2.0], groups=["p"]), "2 values but 1 group"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "differ in length: 2 and 1"),
        (lambda: student_interval([]), "non-empty"),
        (lambda: agreement([], []), "non-empty"),
        (lambda: agreement("AB", "A"), "equally long"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_never_significant(value):
    assert np.isnan(paired_difference([1, value, 2, 5], [2, 2, 2, 2])).all()


def test_one_group_proves_nothing():
    for pairs, groups in [(([3.0], [1.0]), None), (([3, 4], [1, 2]), ["x", "x"])]:
        found = paired_difference(*pairs, groups)
        assert found.difference == 2 and found.p_value == 1
        assert np.isnan([found.low, found.high]).all()
