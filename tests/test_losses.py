"""Ranking losses against brute force over choices, pairs and orders."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from starling_lib.losses import (
    MAX_TIED,
    best_worst_loss,
    centering_penalty,
    kwise_loss,
    pairwise_loss,
)

RANKING = [kwise_loss, pairwise_loss, best_worst_loss]
EVERY = [*RANKING, centering_penalty]
F64 = torch.float64
quick = settings(deadline=None, max_examples=40)
score_rows = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(2, 6)),
    elements=st.floats(-30, 30),
)
tied_rows = st.integers(2, 5).flatmap(
    lambda k: st.tuples(
        st.lists(st.floats(-9, 9), min_size=k, max_size=k),
        st.lists(st.integers(1, 3), min_size=k, max_size=k),
    )
)


def f64(*rows):
    return torch.tensor(rows, dtype=F64)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator)


def top_2(*args, **kwargs):
    return kwise_loss(*args, top=2, **kwargs)


def bradley_terry(better, worse):
    return np.logaddexp(0, worse - better)


# --- known answers


@pytest.mark.parametrize("k", [2, 3, 5])
def test_plackett_luce_of_all_orders_sums_to_one(k):
    scores = 3 * randn(k, seed=k)
    orders = torch.tensor(list(itertools.permutations(range(k))))
    nll = torch.stack([kwise_loss(scores[order][None]) for order in orders]) * (k - 1)
    assert (-nll).exp().sum() == pytest.approx(1, abs=1e-12)


def choices(row, top=None):
    """Σ over the first `top` choices of ln Σ_rest exp − chosen, by the definition."""
    nll = 0.0
    for j in range(len(row) if top is None else min(top, len(row))):
        highest = max(row[j:])
        nll += math.log(sum(math.exp(s - highest) for s in row[j:])) + highest - row[j]
    return nll


@quick
@given(score_rows, st.sampled_from([None, 1, 2, 3, 9]))
def test_kwise_loss_is_the_product_of_choices(rows, top):
    k = rows.shape[1]
    expected = np.mean([choices(row, top) for row in rows.tolist()])
    expected /= min(top or k, k - 1)
    loss = kwise_loss(torch.tensor(rows), top=top).item()
    assert loss == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_kwise_loss_sums_over_the_worse_responses_not_the_better():
    assert 2 * kwise_loss(f64([2, 0.5, -1])) == pytest.approx(0.443, abs=5e-4)
    assert 2 * kwise_loss(f64([-1, 0.5, 2])) != pytest.approx(1.701, abs=5e-4)


def test_equal_scores_give_the_entropy_of_a_random_order():
    assert kwise_loss(torch.zeros(3, 7, dtype=F64)) == pytest.approx(1.4209, abs=5e-5)
    assert kwise_loss(torch.zeros(1, 7)) == pytest.approx(math.log(5040) / 6)
    assert kwise_loss(torch.zeros(1, 7), top=1) == pytest.approx(math.log(7))
    for loss in (pairwise_loss, best_worst_loss):
        assert loss(torch.zeros(1, 7, dtype=F64)) == pytest.approx(0.6931, abs=5e-5)


def test_the_first_choice_alone_is_cross_entropy():
    scores = randn(5, 7)
    first = torch.zeros(5, dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(scores, first)
    assert kwise_loss(scores, top=1).item() == pytest.approx(expected.item(), abs=1e-12)


@quick
@given(st.floats(-40, 40), st.floats(-40, 40))
def test_two_responses_are_bradley_terry(better, worse):
    expected = bradley_terry(better, worse)
    for loss in (*RANKING, top_2):
        assert loss(f64([better, worse])).item() == pytest.approx(expected, abs=1e-12)


@quick
@given(score_rows)
def test_pairwise_loss_is_the_mean_over_pairs(rows):
    pairs = [itertools.combinations(row, 2) for row in rows.tolist()]
    expected = np.mean([np.mean([bradley_terry(a, b) for a, b in p]) for p in pairs])
    assert pairwise_loss(torch.tensor(rows)) == pytest.approx(expected, abs=1e-9)


def test_best_worst_loss_is_one_pair_a_row():
    scores = f64([3, 9, 1], [0, 5, 2])
    expected = (bradley_terry(3, 1) + bradley_terry(0, 2)) / 2
    assert best_worst_loss(scores).item() == pytest.approx(expected, abs=1e-12)
    scores.requires_grad_()
    best_worst_loss(scores).backward()
    assert (scores.grad[:, 1] == 0).all() and (scores.grad[:, 0] < 0).all()


def test_centering_penalty_and_the_original_zero_sum_penalty():
    scores = f64([1, 2, 6], [1, -1, 0])
    assert centering_penalty(scores).item() == pytest.approx((3**2 + 0) / 2)
    zero_sum = (scores.sum(1) ** 2).mean()
    assert (9 * centering_penalty(scores)).item() == pytest.approx(zero_sum.item())
    shifted = centering_penalty(scores - scores.mean(1, keepdim=True))
    assert shifted.item() == pytest.approx(0, abs=1e-15)


# --- invariances


@pytest.mark.parametrize("loss", [*RANKING, top_2])
@quick
@given(rows=score_rows, shift=st.floats(-100, 100))
def test_a_constant_added_to_a_row_changes_nothing(loss, rows, shift):
    scores = torch.tensor(rows)
    assert loss(scores + shift) == pytest.approx(loss(scores).item(), abs=1e-8)


@pytest.mark.parametrize("loss", [*RANKING, top_2])
@quick
@given(row=tied_rows, data=st.data())
def test_with_ranks_the_columns_may_stand_in_any_order(loss, row, data):
    scores, ranks = (torch.tensor([x], dtype=F64) for x in row)
    order = data.draw(st.permutations(range(scores.shape[1])))
    moved = loss(scores[:, order], ranks=ranks[:, order])
    assert moved.item() == pytest.approx(loss(scores, ranks=ranks).item(), abs=1e-12)


@pytest.mark.parametrize("loss", [*RANKING, top_2])
@quick
@given(score_rows)
def test_ranks_without_ties_are_the_columns_order(loss, rows):
    scores = torch.tensor(rows)
    ranks = torch.arange(1, scores.shape[1] + 1).expand_as(scores)
    plain = loss(scores).item()
    assert loss(scores, ranks=ranks).item() == pytest.approx(plain, abs=1e-12)
    assert loss(scores.flip(1), ranks=ranks.flip(1)).item() == pytest.approx(
        plain, abs=1e-12
    )


def test_the_loss_of_a_batch_is_the_mean_of_its_rows():
    scores = randn(4, 6)
    ranks = torch.tensor(
        [[1, 2, 3, 4, 5, 6], [1, 1, 2, 3, 3, 3], [1] * 6, [6, 1, 2, 2, 4, 5]]
    )
    for loss in (*RANKING, top_2):
        rows = zip(scores, ranks, strict=True)
        apart = [loss(s[None], ranks=r[None]).item() for s, r in rows]
        assert loss(scores, ranks=ranks).item() == pytest.approx(np.mean(apart))


# --- ties


def over_orders(scores, ranks, top=None):
    """Mean loss over all orders that the ranks allow, one permutation at a time."""
    k = len(scores)
    allowed = [
        order
        for order in itertools.permutations(range(k))
        if all(ranks[a] <= ranks[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean([choices([scores[i] for i in o], top) for o in allowed]) / min(
        top or k, k - 1
    )


@quick
@given(tied_rows, st.sampled_from([None, 1, 2, 3]))
def test_tied_kwise_loss_is_the_mean_over_all_consistent_orders(row, top):
    scores, ranks = row
    loss = kwise_loss(f64(scores), ranks=torch.tensor([ranks]), top=top).item()
    assert loss == pytest.approx(over_orders(scores, ranks, top), abs=1e-10)


@pytest.mark.parametrize("top", [None, 1, 3])
def test_seven_responses_all_tied(top):
    """5040 orders: the longest tie that Nectar's seven responses can hold."""
    scores, ranks = randn(7).tolist(), [1] * 7
    loss = kwise_loss(f64(scores), ranks=torch.tensor([ranks]), top=top).item()
    assert loss == pytest.approx(over_orders(scores, ranks, top), abs=1e-10)


def test_an_all_tied_row_pulls_the_scores_together():
    ranks = torch.ones(1, 5)
    equal = torch.full((1, 5), 0.7, dtype=F64, requires_grad=True)
    kwise_loss(equal, ranks=ranks).backward()
    assert equal.grad.abs().max() < 1e-12
    apart = f64([2, 0, 0, 0, -2]).requires_grad_()
    kwise_loss(apart, ranks=ranks).backward()
    assert apart.grad[0, 0] > 0 > apart.grad[0, 4]


@quick
@given(tied_rows)
def test_tied_pairs_hold_no_preference(row):
    scores, ranks = row
    pairs = [
        bradley_terry(a, b)
        for (a, i), (b, j) in itertools.permutations(zip(scores, ranks, strict=True), 2)
        if i < j
    ]
    loss = pairwise_loss(f64(scores), ranks=torch.tensor([ranks])).item()
    assert loss == pytest.approx(np.mean(pairs) if pairs else 0, abs=1e-10)


def test_best_worst_loss_averages_over_ties_at_the_ends():
    loss = best_worst_loss(f64([3, 1, 8, 0]), ranks=torch.tensor([[1, 1, 2, 3]]))
    expected = (bradley_terry(3, 0) + bradley_terry(1, 0)) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("loss", [pairwise_loss, best_worst_loss])
def test_a_row_without_any_preference_is_zero_with_zero_gradient(loss):
    scores = f64([1, 2, 3], [1, 2, 3]).requires_grad_()
    ranks = torch.tensor([[1, 1, 1], [1, 2, 3]])
    value = loss(scores, ranks=ranks)
    assert value.item() == pytest.approx(loss(scores[1:]).item() / 2)
    value.backward()
    assert (scores.grad[0] == 0).all() and (scores.grad[1] != 0).any()
    only = loss(scores[:1], ranks=ranks[:1])
    assert only == 0 and torch.autograd.grad(only, scores)[0].isfinite().all()


def test_too_long_a_tie_is_refused_and_a_long_ranking_is_not():
    scores = torch.zeros(1, MAX_TIED + 1)
    ranks = torch.arange(MAX_TIED + 1)[None]
    assert kwise_loss(scores, ranks=ranks).isfinite()
    with pytest.raises(ValueError, match="at most 12 a row, or break the ties"):
        kwise_loss(scores, ranks=ranks.clamp(min=1))


# --- missing responses


@pytest.mark.parametrize("loss", [*EVERY, top_2])
@pytest.mark.parametrize("filler", [0.0, 1e4, math.nan, math.inf, -math.inf])
def test_missing_responses_do_not_count(loss, filler):
    """Also in the middle of a row, with NaN there, and with finite gradients."""
    rows = [[1.0, filler, -0.5, 0.2], [0.3, 2.0, filler, filler], [1, filler] * 2]
    scores = f64(*rows).requires_grad_()
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    value = loss(scores, mask)
    kept = [f64([1.0, -0.5, 0.2]), f64([0.3, 2.0]), f64([1.0])]
    # A single response has nothing to be compared with: zero, but it can be off centre.
    if loss is not centering_penalty:
        assert loss(kept[2]) == 0
    expected = sum(loss(row).item() for row in kept) / 3
    assert value.item() == pytest.approx(expected, abs=1e-12)
    value.backward()
    assert scores.grad.isfinite().all() and (scores.grad[~mask] == 0).all()
    assert (scores.grad[mask] != 0).any()


@quick
@given(row=tied_rows, data=st.data())
def test_missing_responses_do_not_count_among_ties(row, data):
    scores, ranks = row
    there = data.draw(st.lists(st.booleans(), min_size=len(ranks), max_size=len(ranks)))
    assume(sum(there) > 1)
    filled = f64([s if t else math.nan for s, t in zip(scores, there, strict=True)])
    kept = [(s, r) for s, r, t in zip(scores, ranks, there, strict=True) if t]
    expected = over_orders(*zip(*kept, strict=True))
    filled.requires_grad_()
    loss = kwise_loss(filled, torch.tensor([there]), ranks=torch.tensor([ranks]))
    assert loss.item() == pytest.approx(expected, abs=1e-10)
    loss.backward()
    assert filled.grad.isfinite().all()
    assert (filled.grad[~torch.tensor([there])] == 0).all()


@pytest.mark.parametrize("loss", RANKING)
def test_a_response_without_a_rank_is_missing(loss):
    ranks = f64([2, math.nan, 1])
    assert loss(f64([1, 50, 3]), ranks=ranks).item() == loss(f64([3, 1])).item()


def test_top_counts_the_responses_that_are_there():
    mask = torch.tensor([[False, True, True, True]])
    loss = kwise_loss(f64([9, 1, 3, 2]), mask, top=1).item()
    assert loss == pytest.approx(choices([1, 3, 2], 1), abs=1e-12)


# --- weights, gradients, bad input


@pytest.mark.parametrize("loss", [*EVERY, top_2])
def test_weights_make_a_weighted_mean(loss):
    scores = randn(3, 4)
    one, _, three = (loss(row[None]).item() for row in scores)
    weighted = loss(scores, weights=f64(1, 0, 3)).item()
    assert weighted == pytest.approx((one + 3 * three) / 4)
    assert loss(scores, weights=f64(2, 2, 2)).item() == pytest.approx(
        loss(scores).item()
    )


@pytest.mark.parametrize("loss", [*EVERY, top_2])
def test_a_row_of_weight_zero_drops_out_even_with_nan(loss):
    scores = torch.cat([randn(2, 4), torch.full((1, 4), math.nan)]).requires_grad_()
    value = loss(scores, weights=f64(1, 1, 0))
    assert value.item() == pytest.approx(loss(scores[:2]).item())
    value.backward()
    assert scores.grad.isfinite().all() and (scores.grad[2] == 0).all()
    assert loss(scores, weights=torch.zeros(3)) == 0


@pytest.mark.parametrize("loss", [*EVERY, top_2])
@pytest.mark.parametrize("ties", [False, True])
def test_gradients_agree_with_finite_differences(loss, ties):
    scores = randn(2, 5).requires_grad_()
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    options = {"weights": f64(1, 3)}
    if ties and loss is not centering_penalty:
        options["ranks"] = torch.tensor([[3, 1, 1, 2, 1], [2, 9, 1, 1, 9]])
    assert torch.autograd.gradcheck(lambda s: loss(s, mask, **options), scores)


@pytest.mark.parametrize("loss", RANKING)
@pytest.mark.parametrize("ranks", [None, torch.tensor([[1, 2, 2, 4]])])
def test_float32_gradients_stay_finite_at_large_scores(loss, ranks):
    scores = torch.tensor([[-300.0, 0, 300, 0]], requires_grad=True)
    loss(scores, torch.tensor([[True, True, True, False]]), ranks=ranks).backward()
    assert scores.grad.isfinite().all() and scores.grad[0, 0] < 0


def test_float32_ties_agree_with_float64():
    scores, ranks = randn(20, 7), torch.arange(140).reshape(20, 7) % 3
    exact = kwise_loss(scores, ranks=ranks).item()
    assert kwise_loss(scores.float(), ranks=ranks).item() == pytest.approx(exact, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": torch.ones(2, 1)}, r"weights has shape \(2, 1\), expected \(2,\)"),
        ({"mask": torch.ones(2, 2)}, r"mask has shape \(2, 2\), expected \(2, 3\)"),
        ({"ranks": torch.ones(3)}, r"ranks has shape \(3,\), expected \(2, 3\)"),
        ({"top": 0}, "top=0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        kwise_loss(torch.zeros(2, 3), **options)
