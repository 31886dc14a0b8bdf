"""Simulated judges obey the models they are named after; the paper's claim in numbers."""

import itertools
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from starling_lib.losses import kwise_loss, pairwise_loss
from starling_lib.simulation import (
    ESTIMATORS,
    JUDGES,
    careful_at_the_top,
    efficiency,
    elimination,
    fit,
    plackett_luce,
    reward_error,
    simulate,
    thurstone,
)

REWARDS = np.array([1.0, 0.0, -0.5])
DRAWS = 40_000
PAIR = {name: ESTIMATORS[name] for name in ("MLE_K", "MLE_2")}


def shares(judge, rewards=REWARDS, draws=DRAWS):
    """Share of each order among a judge's rankings of the same responses."""
    orders = judge(np.tile(rewards, (draws, 1)), np.random.default_rng(0))
    return {
        order: float((orders == order).all(1).mean())
        for order in itertools.permutations(range(len(rewards)))
    }


def choice_probability(order, rewards):
    worth = np.exp(rewards[list(order)])
    return np.prod([worth[j] / worth[j:].sum() for j in range(len(worth))])


# --- judges


def test_plackett_luce_draws_orders_as_often_as_its_formula_says():
    for order, share in shares(plackett_luce).items():
        assert share == pytest.approx(choice_probability(order, REWARDS), abs=0.01)


def test_elimination_is_plackett_luce_from_below():
    for order, share in shares(elimination).items():
        backwards = choice_probability(order[::-1], -REWARDS)
        assert share == pytest.approx(backwards, abs=0.01)
    assert (
        max(
            abs(choice_probability(o, REWARDS) - choice_probability(o[::-1], -REWARDS))
            for o in itertools.permutations(range(3))
        )
        > 0.03
    ), "the two judges must differ, or the comparison of losses is empty"


@pytest.mark.parametrize("judge", [plackett_luce, elimination])
def test_single_pairs_are_bradley_terry_either_way(judge):
    for i, j in itertools.combinations(range(3), 2):
        wins = sum(
            share
            for order, share in shares(judge).items()
            if order.index(i) < order.index(j)
        )
        expected = 1 / (1 + np.exp(REWARDS[j] - REWARDS[i]))
        assert wins == pytest.approx(expected, abs=0.01)


def test_careful_at_the_top_shuffles_the_rest():
    rewards = np.array([2.0, 1.0, 0.0, -2.0])
    judge = partial(careful_at_the_top, top=1)
    found = shares(judge, rewards)
    assert sum(s for o, s in found.items() if o[0] == 0) == pytest.approx(
        np.exp(2) / np.exp(rewards).sum(), abs=0.01
    )
    tails = [s for order, s in found.items() if order[0] == 0]
    assert np.ptp(tails) < 0.01 and len(tails) == 6


def test_thurstone_noise_is_as_spread_out_as_gumbel_noise():
    wins = shares(thurstone, REWARDS[:2])[(0, 1)]
    spread = np.sqrt(2) * np.pi / np.sqrt(6)
    normal = torch.distributions.Normal(0.0, 1.0)
    assert wins == pytest.approx(normal.cdf(torch.tensor(1 / spread)).item(), abs=0.01)


@pytest.mark.parametrize("name", JUDGES)
def test_every_judge_ranks_every_response_once(name):
    rewards = np.random.default_rng(1).normal(size=(50, 7))
    orders = JUDGES[name](rewards, np.random.default_rng(2))
    assert (np.sort(orders, axis=1) == np.arange(7)).all()


# --- estimates


def rankings(judge, n, theta, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 7, len(theta)))
    order = judge(features @ theta, rng)
    return torch.tensor(np.take_along_axis(features, order[:, :, None], 1))


@pytest.mark.parametrize("loss", [kwise_loss, pairwise_loss])
def test_both_losses_find_the_truth_under_plackett_luce(loss):
    truth = np.array([1.0, -2.0, 0.5])
    theta = fit(rankings(plackett_luce, 5000, truth), loss)
    assert theta == pytest.approx(truth, abs=0.1)


def test_fit_is_where_the_slope_vanishes():
    data = rankings(plackett_luce, 60, np.array([1.0, -1.0]))
    theta = torch.tensor(fit(data, kwise_loss), requires_grad=True)
    kwise_loss(data @ theta).backward()
    assert theta.grad.abs().max() < 1e-5


def test_separable_rankings_stop_at_the_bound():
    data = torch.tensor([[[1.0], [0.0]], [[2.0], [1.0]]], dtype=torch.float64)
    assert fit(data, kwise_loss, bound=4.0) == pytest.approx([4.0])


def test_reward_error_is_the_spread_of_the_difference_in_rewards():
    theta, truth = np.array([1.0, 2.0]), np.array([0.5, 2.5])
    x = np.random.default_rng(0).normal(size=(200_000, 2, 2))
    pairs = x[:, 0] - x[:, 1]
    error = reward_error(theta, truth)
    assert error["error"] == pytest.approx(np.std(pairs @ (theta - truth)), rel=0.01)
    cosine = np.corrcoef(pairs @ theta, pairs @ truth)[0, 1]
    assert error["cosine"] == pytest.approx(cosine, abs=0.002)
    assert reward_error(3 * theta, theta)["angle"] == pytest.approx(0, abs=1e-5)
    assert np.isnan(reward_error(0 * theta, theta)["cosine"])


# --- the experiment


def test_simulate_is_tidy_paired_and_repeatable():
    options = {"sizes": (20, 40), "seeds": 2, "responses": 4, "dimension": 3}
    judges = {"Plackett-Luce": plackett_luce}
    first = simulate(judges, PAIR, progress=False, **options)
    assert len(first) == 2 * 2 * 2 and first.notna().all(axis=None)
    pd.testing.assert_frame_equal(
        first, simulate(judges, PAIR, progress=False, **options)
    )
    table = efficiency(first)
    assert list(table.columns) == ["judge", "n", "ratio", "low", "high"]
    assert table["n"].tolist() == [20, 40]


def test_efficiency_is_the_geometric_mean_of_paired_ratios():
    rows = [
        {"judge": "a", "estimator": name, "n": 5, "seed": seed, "error": error}
        for seed, errors in enumerate([(1.0, 2.0), (10.0, 5.0), (3.0, 24.0)])
        for name, error in zip(("MLE_K", "MLE_2"), errors, strict=True)
    ]
    row = efficiency(pd.DataFrame(rows)).iloc[0]
    assert row["ratio"] == pytest.approx((2 * 0.5 * 8) ** (1 / 3))
    assert row["low"] < row["ratio"] < row["high"]
    with pytest.raises(KeyError, match="top 9"):
        efficiency(pd.DataFrame(rows), "top 9")


def variance(loss, theta, n=3000):
    """n·E‖θ̂ − θ*‖² as n grows, tr(H⁻¹ G H⁻¹): of any minimum-loss estimate."""
    data = rankings(plackett_luce, n, theta, seed=99)
    at = torch.tensor(theta)
    hessian = torch.autograd.functional.hessian(lambda t: loss(data @ t), at)
    at.requires_grad_()
    slopes = torch.stack([torch.autograd.grad(loss(x[None] @ at), at)[0] for x in data])
    inverse = torch.linalg.inv(hessian)
    return torch.trace(inverse @ (slopes.T @ slopes / n) @ inverse).item()


@pytest.mark.slow
def test_theorem_4_3_mle_k_is_the_more_efficient_under_plackett_luce():
    """And by as much as the asymptotic variances of the two estimates say."""
    theta = np.zeros(8)
    theta[0] = 2.0
    predicted = np.sqrt(variance(pairwise_loss, theta) / variance(kwise_loss, theta))
    assert 1.02 < predicted < 1.2
    results = simulate(
        {"Plackett-Luce": plackett_luce}, PAIR, sizes=(300,), seeds=150, progress=False
    )
    row = efficiency(results).iloc[0]
    assert row["low"] > 1 and row["low"] < predicted < row["high"]


@pytest.mark.slow
def test_elsewhere_the_order_turns_round():
    results = simulate(
        {"elimination": elimination, "careful": careful_at_the_top},
        sizes=(50, 500),
        seeds=20,
        progress=False,
    )
    pairs = efficiency(results).set_index(["judge", "n"])
    assert pairs.loc[("elimination", 500), "high"] < 0.6, (
        "MLE_K is not consistent there"
    )
    assert pairs.loc[("careful", 500), "high"] < 0.95
    top = efficiency(results, "top 3").set_index(["judge", "n"])
    assert top.loc[("careful", 500), "high"] < 0.3, "the top three are Plackett-Luce"
    mean = results.groupby(["judge", "estimator", "n"])["error"].mean()
    decay = mean["elimination", "MLE_2", 50] / mean["elimination", "MLE_2", 500]
    assert decay == pytest.approx(np.sqrt(10), rel=0.25), "consistent: error ~ 1/√n"
