"""Scaling, shifting, KL coefficients: against numpy and sums by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starling_lib.policy_rewards import (
    KLCoefficient,
    RewardScale,
    RunningMoments,
    token_rewards,
)


def test_token_rewards_put_the_score_on_the_last_response_token():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logprobs, reference = torch.full((2, 3), -1.0), torch.full((2, 3), -3.0)
    rewards = token_rewards(torch.tensor([5.0, 7.0]), logprobs, reference, mask, 0.5)
    assert rewards.tolist() == [[-1, 4, 0], [-1, -1, 6]]


def test_running_moments_are_numpys():
    batches = [np.array([1.0, 4.0]), np.array([2.0]), np.array([9.0, 3.0, 3.0])]
    moments = RunningMoments()
    for x in batches:
        moments.update(len(x), x.mean(), ((x - x.mean()) ** 2).sum())
    together = np.concatenate(batches)
    assert moments.mean == pytest.approx(together.mean())
    assert moments.std == pytest.approx(together.std(ddof=1))


def test_running_moments_of_one_or_equal_values_scale_by_one():
    moments = RunningMoments()
    assert moments.std == 1
    moments.update(1, 5.0, 0.0)
    assert moments.std == 1
    moments.update(3, 5.0, 0.0)
    assert moments.std == 1


first, second = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 40.0])


def test_running_scale_divides_by_the_spread_of_all_so_far():
    scale = RewardScale("running", limit=100)
    assert torch.allclose(scale(first), first / first.std())
    everything = torch.cat([first, second])
    assert torch.allclose(scale(second), second / everything.std())
    assert scale.std == pytest.approx(everything.std().item())


def test_reference_scale_stays_that_of_the_first_batch():
    scale = RewardScale("reference", limit=100)
    scale(first)
    assert torch.allclose(scale(second), second / first.std())


def test_no_scale_is_the_score_itself_and_clips_nothing():
    scale = RewardScale("none", limit=0.1)
    assert torch.equal(scale(second), second) and scale.std == 1


def test_a_scaled_reward_is_clipped_then_shifted():
    scale = RewardScale("running", limit=0.5, shift=0.3)
    assert scale(second).tolist() == pytest.approx([0.3, 0.8])


def test_the_statistics_are_those_of_all_processes():
    scale = RewardScale("running", limit=100)
    found = scale(first, torch.cat([first, second]))
    assert torch.allclose(found, first / torch.cat([first, second]).std())


def test_a_saved_scale_goes_on_where_it_stopped():
    whole, again = RewardScale("running", 100), RewardScale("running", 100)
    whole(first)
    again.moments = RunningMoments(**whole.state())
    assert torch.equal(whole(second), again(second))


def test_a_fixed_coefficient_stays():
    coefficient = KLCoefficient(0.01)
    coefficient.update(1e6, 64)
    assert coefficient.value == 0.01


def test_a_coefficient_is_steered_to_its_target():
    """KL twice the target: the error is clipped at 0.2; 500 of 10,000 responses."""
    coefficient = KLCoefficient(0.05, target=6, horizon=10_000)
    coefficient.update(12, 500)
    assert coefficient.value == pytest.approx(0.05 * (1 + 0.2 * 0.05))
    coefficient.update(5.4, 500)  # a tenth below
    assert coefficient.value == pytest.approx(0.05 * 1.01 * (1 - 0.1 * 0.05))


@given(st.floats(0, 1e6), st.integers(1, 5000))
def test_a_coefficient_stays_positive_and_moves_the_right_way(kl, responses):
    coefficient = KLCoefficient(0.1, target=6)
    coefficient.update(kl, responses)
    assert coefficient.value > 0
    assert (coefficient.value > 0.1) == (kl > 6) or math.isclose(coefficient.value, 0.1)
