"""How well scores recover rankings.

Knows: scores (rows, K; best first, NaN = missing) as numbers. Does not know: models, texts,
trainers.
"""

import torch
from torch import Tensor

from starling_lib.losses import kwise_loss


def reward_metrics(scores: Tensor, lengths: Tensor | None = None) -> dict[str, float]:
    """How well scores (B, K; best first, NaN = missing) recover the ranking.

    `accuracy`: share of all pairs ordered right (a tie counts ½); `adjacent_accuracy`:
    of neighbouring ranks only (the original's figure); `top1`: the best response scores
    highest (a tie of n counts 1/n); `kendall_tau`: mean over rows; `nll`: K-wise loss.
    With `lengths` (B, K) also `longer_wins`: the accuracy of preferring the longer
    response, the baseline to beat.
    """
    scores = torch.as_tensor(scores).double()
    mask = ~scores.isnan()
    wins, pairs, gap = _pair_wins(scores, mask)
    tau = (2 * wins.sum(1) - pairs.sum(1)) / pairs.sum(1).clamp(min=1)
    known = scores.nan_to_num(-torch.inf)
    best = known == known.amax(1, keepdim=True)
    metrics = {
        "accuracy": wins.sum() / pairs.sum(),
        "adjacent_accuracy": wins[:, gap == 1].sum() / pairs[:, gap == 1].sum(),
        "top1": (best[:, 0] / best.sum(1)).double().mean(),
        "kendall_tau": tau.mean(),
        "nll": kwise_loss(scores.nan_to_num(0), mask),
    }
    if lengths is not None:
        longer, _, _ = _pair_wins(torch.as_tensor(lengths).double(), mask)
        metrics["longer_wins"] = longer.sum() / pairs.sum()
    return {name: float(value) for name, value in metrics.items()}


def _pair_wins(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, pairs) wins of the better-ranked (tie ½), which pairs exist, rank gaps."""
    better, worse = torch.triu_indices(x.shape[1], x.shape[1], 1)
    exists = mask[:, better] & mask[:, worse]
    difference = x[:, better] - x[:, worse]
    wins = (difference > 0).double() + 0.5 * (difference == 0).double()
    return torch.where(exists, wins, 0), exists.double(), worse - better


def accuracy_by_gap(scores: Tensor) -> dict[int, float]:
    """Pair accuracy by rank gap 1 … K−1: far-apart responses are easier to tell."""
    scores = torch.as_tensor(scores).double()
    wins, pairs, gaps = _pair_wins(scores, ~scores.isnan())
    return {
        int(g): float(wins[:, gaps == g].sum() / pairs[:, gaps == g].sum())
        for g in gaps.unique()
    }
