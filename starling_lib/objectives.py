"""Losses and estimators of policy optimisation, as pure functions of tensors.

Shapes are (N, R): N responses, R response positions; `mask` is True on response tokens,
the EOS step included. Knows: APA, AWR, PPO, GAE, KL estimators. Does not know: models,
trainers, text.
"""

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Σ x·mask / `count` (default Σ mask): a mean over response tokens, never padding.

    Give `count` where the mean runs over more than this tensor (accumulation, processes).
    """
    total = torch.where(mask, x, 0).sum()
    return total / (mask.sum().clamp(min=1) if count is None else count)


def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (population) variance of the masked entries, two scalars."""
    mean = masked_mean(x, mask)
    return mean, masked_mean((x - mean) ** 2, mask)


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Scale the masked entries to zero mean and unit variance; zero elsewhere.

    `moments` (mean, variance) replaces those of `x` where the batch is larger than this
    tensor: several processes. The original whitened over padding too (starling.md §4.2),
    which made the effective λ depend on how the batch was padded.

    >>> x, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    >>> masked_whiten(x, mask)
    tensor([[-1.,  1.,  0.]])
    """
    mean, variance = moments or masked_moments(x, mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    δ_t = r_t + γ V_{t+1} − V_t,  A_t = δ_t + γλ A_{t+1},  with V = A = 0 after the last
    response token. Returns (advantages, returns = A + V), both (N, R), zero outside `mask`.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    >>> mask = torch.tensor([[True, True]])
    >>> gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))
    """
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages = torch.zeros_like(values)
    after = torch.zeros_like(values[:, 0])  # A_{t+1}
    next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        after = torch.where(mask[:, t], delta + gamma * gae_lambda * after, 0)
        next_value = values[:, t]
        advantages[:, t] = after
    return advantages, torch.where(mask, advantages + values, 0)


def apa_loss(
    logprobs: Tensor,
    anchor_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    apa_lambda: float,
    count: Tensor | float | None = None,
) -> Tensor:
    """Advantage-induced policy alignment (Zhu et al. 2023, arXiv 2306.02231).

    From (N, R) tensors a scalar, the mean over response tokens of
    (log π_θ − log π_anchor − A/λ)². The anchor is the initial policy in the paper, the
    rollout policy in Starling's code. Z(s) is taken as 1.

    >>> mask = torch.tensor([[True]])
    >>> now, anchor, advantage = (torch.tensor([[x]]) for x in (-1.0, -1.5, 0.5))
    >>> apa_loss(now, anchor, advantage, mask, apa_lambda=1.0)  # the target is met
    tensor(0.)
    """
    target = anchor_logprobs + advantages / apa_lambda
    # Masked before the square, whose gradient at a NaN of padding is NaN.
    return masked_mean(torch.where(mask, logprobs - target, 0) ** 2, mask, count)


def awr_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    awr_lambda: float,
    max_weight: float = 20.0,
    count: Tensor | float | None = None,
) -> Tensor:
    """Advantage-weighted regression (Peng et al. 2019, arXiv 1910.00177, eq. 9).

    From (N, R) tensors a scalar: −mean over response tokens of exp(A/λ)·log π_θ, weights
    clipped at `max_weight` as in that paper (§5).
    """
    weights = (
        (torch.where(mask, advantages, 0) / awr_lambda).exp().clamp(max=max_weight)
    )
    return -masked_mean(weights * logprobs, mask, count)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    count: Tensor | float | None = None,
) -> Tensor:
    """Clipped surrogate of PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7), negated.

    From (N, R) tensors a scalar, a mean over response tokens.
    """
    advantages = torch.where(mask, advantages, 0)
    ratio = torch.where(mask, logprobs - old_logprobs, 0).exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    return -masked_mean(gain, mask, count)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange: float | None = None,
    count: Tensor | float | None = None,
) -> Tensor:
    """½ mean (V − R)²; with `cliprange`, the larger of clipped and unclipped (PPO2).

    From (N, R) tensors a scalar, a mean over response tokens.
    """
    error = torch.where(mask, values - returns, 0) ** 2
    if cliprange is not None:
        near = old_values + (values - old_values).clamp(-cliprange, cliprange)
        error = torch.maximum(error, torch.where(mask, near - returns, 0) ** 2)
    return 0.5 * masked_mean(error, mask, count)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(π‖ref) from π's samples: log π − log ref. Unbiased, noisy.

    k1, k2, k3: Schulman 2020, "Approximating KL divergence".
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """½ (log π − log ref)²: low variance, biased, never negative."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ref/π − 1 − log(ref/π): unbiased and never negative.

    >>> kl_k3(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0]))
    tensor([0.0000, 0.3679])
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def response_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """KL of whole responses, (N,) nats: k3 summed over each one's tokens."""
    return torch.where(mask, kl_k3(logprobs, ref_logprobs), 0.0).sum(-1)


def kl_exact(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(π‖ref) of each next-token distribution: (tokens, V) twice → (tokens,) nats."""
    logprobs = logits.float().log_softmax(-1)
    reference = ref_logits.float().log_softmax(-1)
    return (logprobs.exp() * (logprobs - reference)).sum(-1)
