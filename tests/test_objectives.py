"""Losses and estimators against closed forms, loops and exact expectations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starling_lib.objectives import (
    apa_loss,
    awr_loss,
    gae,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_mean,
    masked_moments,
    masked_whiten,
    ppo_loss,
    response_kl,
    value_loss,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def lengths_mask(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


@pytest.fixture
def batch():
    """Four responses of 5, 1, 3 and 0 tokens; padding holds NaN and must not matter."""
    draw = torch.Generator().manual_seed(3)
    mask = lengths_mask([5, 1, 3, 0], 5)
    x, y, z = torch.randn(3, 4, 5, generator=draw, dtype=torch.float64)
    return [torch.where(mask, t, torch.nan) for t in (x, y, z)] + [mask]


# --- KL estimators: expectations are exact sums over a small vocabulary

P, Q = f64(0.5, 0.3, 0.15, 0.05), f64(0.1, 0.2, 0.3, 0.4)
EXACT_KL = float((P * (P / Q).log()).sum())


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_are_unbiased(estimator):
    assert (P * estimator(P.log(), Q.log())).sum() == pytest.approx(EXACT_KL, 1e-12)


def test_k2_is_biased_but_right_for_close_distributions():
    assert (P * kl_k2(P.log(), Q.log())).sum() != pytest.approx(EXACT_KL, 0.05)
    near = P + 1e-3 * f64(1, -1, 1, -1)
    exact = float((P * (P / near).log()).sum())
    assert (P * kl_k2(P.log(), near.log())).sum() == pytest.approx(exact, 0.01)


def test_k1_may_be_negative_and_the_others_never():
    log_ratio = torch.arange(-20, 21, dtype=torch.float64) / 4
    zero = torch.zeros_like(log_ratio)
    assert kl_k1(log_ratio, zero).min() < 0
    for estimator in (kl_k2, kl_k3):
        assert estimator(log_ratio, zero).min() == 0


def test_the_kl_of_a_response_is_the_sum_over_its_own_tokens():
    logprobs, start = torch.full((2, 3), -1.0), torch.tensor([[-1.0, -2.0, -9.0]] * 2)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = torch.tensor([torch.e**-1, 0.0])
    assert torch.allclose(response_kl(logprobs, start, mask), expected)


def test_k3_keeps_its_digits_near_zero():
    tiny = torch.tensor(1e-4)
    assert kl_k3(tiny, torch.tensor(0.0)).item() == pytest.approx(0.5e-8, rel=1e-3)


# --- masks


def test_masked_mean_ignores_padding(batch):
    x, _, _, mask = batch
    assert masked_mean(x, mask) == pytest.approx(x[mask].mean().item())
    assert masked_mean(x, mask, 18.0) == pytest.approx(x[mask].sum().item() / 18)
    assert masked_mean(x, torch.zeros_like(mask)) == 0


def test_masked_whiten_uses_response_tokens_only(batch):
    x, _, _, mask = batch
    white = masked_whiten(x, mask)
    assert (white[~mask] == 0).all()
    assert white[mask].var(correction=0) == pytest.approx(1, abs=1e-6)
    assert white[mask].mean() == pytest.approx(0, abs=1e-9)
    wider = torch.nn.functional.pad(x, (0, 7), value=99)
    wider = masked_whiten(wider, torch.nn.functional.pad(mask, (0, 7)))
    assert torch.allclose(wider[:, :5], white, rtol=1e-12)


def test_masked_whiten_by_the_moments_of_a_larger_batch(batch):
    x, _, _, mask = batch
    moments = masked_moments(x, mask)
    parts = [
        masked_whiten(x[i : i + 1], mask[i : i + 1], moments=moments)
        for i in range(len(x))
    ]
    assert torch.allclose(torch.cat(parts), masked_whiten(x, mask), rtol=1e-12)


# --- GAE


def slow_gae(rewards, values, length, gamma, lam):
    """Equation 16 of the paper as a double sum: A_t = Σ_l (γλ)^l δ_{t+l}."""
    values = [float(v) for v in values[:length]] + [0.0]
    deltas = [
        float(rewards[t]) + gamma * values[t + 1] - values[t] for t in range(length)
    ]
    return [
        sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, length))
        for t in range(length)
    ]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.integers(0, 10_000),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_gae_is_the_sum_of_the_paper(lengths, seed, gamma, lam):
    draw = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(lengths), 6, generator=draw).double()
    mask = lengths_mask(lengths, 6)
    rewards, values = (torch.where(mask, t, torch.nan) for t in (rewards, values))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        expected = slow_gae(rewards[row], values[row], length, gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-9)
        assert (advantages[row, length:] == 0).all()
        assert (returns[row, length:] == 0).all()
    assert torch.allclose(returns[mask], (advantages + values)[mask])


def test_gae_extremes():
    rewards, values = f64([0, 0, 2]), f64([0.5, 1, -1])
    mask = torch.ones(1, 3, dtype=torch.bool)
    monte_carlo, _ = gae(rewards, values, mask, 1.0, 1.0)
    assert monte_carlo.tolist() == [[1.5, 1, 3]]  # return minus value
    one_step, _ = gae(rewards, values, mask, 1.0, 0.0)
    assert one_step.tolist() == [[0.5, -2, 3]]  # temporal difference


# --- policy losses


def test_apa_loss_is_the_mean_square_over_response_tokens(batch):
    logprobs, anchor, advantages, mask = batch
    tokens = [
        (logprobs[i, t] - anchor[i, t] - advantages[i, t] / 0.3) ** 2
        for i, t in mask.nonzero().tolist()
    ]
    expected = sum(tokens).item() / 9
    assert apa_loss(logprobs, anchor, advantages, mask, 0.3) == pytest.approx(expected)
    half = apa_loss(logprobs, anchor, advantages, mask, 0.3, count=18.0)
    assert half == pytest.approx(expected / 2)


def test_apa_gradient_at_the_anchor_is_the_policy_gradient():
    """∇ = −(2/λ)·A·∇log π, with ∇log softmax = onehot − π written out by hand."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 5, generator=draw, dtype=torch.float64)
    tokens, advantages, lam = torch.tensor([[1, 4, 0]]), f64([0.7, -2, 0]), 0.25
    leaf = logits.clone().requires_grad_()
    logprobs = leaf.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    mask = torch.ones(1, 3, dtype=torch.bool)
    apa_loss(logprobs, logprobs.detach(), advantages, mask, lam).backward()
    score = torch.nn.functional.one_hot(tokens, 5) - logits.softmax(-1)
    expected = -2 / lam * advantages[..., None] * score / 3
    assert torch.allclose(leaf.grad, expected, atol=1e-12)


def bandit(weights_of, steps=600):
    """π(token 0) where descent on APA ends: π₀ = (.8, .2), rewards (0, 1), λ = ½."""
    start, advantages = f64(0.8, 0.2).log(), f64(-0.2, 0.8)  # reward − 0.2, π₀'s mean
    one = torch.ones(1, 1, dtype=torch.bool)
    logits = start.clone().requires_grad_()
    for _ in range(steps):
        logprobs = logits.log_softmax(0)
        weights = weights_of(logprobs.detach().exp())
        loss = sum(
            weights[a]
            * apa_loss(
                logprobs[a].view(1, 1),
                start[a].view(1, 1),
                advantages[a].view(1, 1),
                one,
                0.5,
            )
            for a in (0, 1)
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 0.1 * gradient).detach().requires_grad_()
    return logits.softmax(0)[0].item()


def test_apa_on_fixed_data_is_a_projection_and_resampled_the_gibbs_policy():
    gibbs = 0.8 / (0.8 + 0.2 * math.exp(2))
    assert gibbs == pytest.approx(0.351, abs=5e-4)
    assert bandit(lambda now: f64(0.8, 0.2)) == pytest.approx(0.468, abs=5e-4)
    assert bandit(lambda now: now) == pytest.approx(gibbs, abs=5e-4)


def test_awr_weights_are_exponential_and_clipped(batch):
    logprobs, _, advantages, mask = batch
    advantages = advantages.clone()
    advantages[0, 0] = 50.0  # e^100 without the clip
    weights = [min(math.exp(a / 0.5), 20) for a in advantages[mask].tolist()]
    pairs = zip(weights, logprobs[mask].tolist(), strict=True)
    expected = -sum(w * x for w, x in pairs) / 9
    assert awr_loss(logprobs, advantages, mask, 0.5) == pytest.approx(expected)
    assert awr_loss(logprobs, advantages, mask, 0.5, count=3.0) == pytest.approx(
        3 * expected
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # gain clipped at 1.2: no push any further
        (0.5, 2.0, -1.0, -1.0),  # the pessimistic side is not clipped
        (0.5, -2.0, 1.6, 0.0),  # loss clipped at 0.8
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_ppo_clips_only_the_side_that_gains(ratio, advantage, loss, slope):
    logprobs = f64([math.log(ratio)]).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    value = ppo_loss(logprobs, f64([0]), f64([advantage]), mask, 0.2)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("value", "clip", "loss"),
    [
        (1.0, None, 0.5 * (1.0 - 2.0) ** 2),
        (1.0, 0.2, 0.5 * (0.2 - 2.0) ** 2),  # moved 1.0 from 0, only 0.2 counts
        (-1.0, 0.2, 0.5 * (-1.0 - 2.0) ** 2),  # moved the wrong way: the larger error
    ],
)
def test_value_loss_takes_the_larger_error(value, clip, loss):
    mask = torch.tensor([[True, False]])
    nan = math.nan
    values = f64([value, nan]), f64([0, nan]), f64([2, nan])
    assert value_loss(*values, mask, clip).item() == pytest.approx(loss)
    assert value_loss(*values, mask, clip, 2.0).item() == pytest.approx(loss / 2)


@pytest.mark.parametrize("padding", [7.0, math.inf, math.nan])
@pytest.mark.parametrize("loss", ["apa", "awr", "ppo", "value"])
def test_gradients_are_finite_and_zero_at_padding(loss, padding, batch):
    *tensors, mask = batch
    x, y, z = (torch.where(mask, t, padding) for t in tensors)
    x.requires_grad_()
    value = {
        "apa": lambda: apa_loss(x, y, z, mask, 0.1),
        "awr": lambda: awr_loss(x, z, mask, 0.1),
        "ppo": lambda: ppo_loss(x, y, z, mask, 0.2),
        "value": lambda: value_loss(x, y, z, mask, 0.2),
    }[loss]()
    value.backward()
    assert (x.grad[~mask] == 0).all() and x.grad.isfinite().all()
