"""Likelihoods of rankings (Zhu, Jordan and Jiao 2023, arXiv 2301.11270).

Scores are (B, K), best first; False in a `mask` means "no such response". Knows: pure
functions of scores. Does not know: models, texts, trainers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def kwise_loss(
    scores: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Plackett-Luce negative log-likelihood of the ranking, MLE_K (arXiv 2301.11270 §3).

    mean over rows of Σ_j [logsumexp(s_j, …, s_K) − s_j] / (K_i − 1), as Starling
    normalised it: equal scores at K = 7 give ln 7!/6 = 1.4209; K = 2 is Bradley-Terry.
    `weights` (B) makes it a weighted mean. Rows with one response count as zero loss.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    nll = torch.where(mask, _suffix_logsumexp(scores, mask) - scores, 0).sum(1)
    return _mean_rows(nll / (mask.sum(1) - 1).clamp(min=1), weights)


def pairwise_loss(
    scores: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Bradley-Terry loss of all K(K−1)/2 pairs, MLE_2 (Ouyang et al. 2022, eq. 1).

    mean over rows of the mean over pairs of −log σ(s_better − s_worse).
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    both = mask[:, better] & mask[:, worse]
    safe = torch.where(mask, scores, 0)
    losses = torch.where(both, -F.logsigmoid(safe[:, better] - safe[:, worse]), 0)
    return _mean_rows(losses.sum(1) / both.sum(1).clamp(min=1), weights)


def _suffix_logsumexp(scores: Tensor, mask: Tensor) -> Tensor:
    """logsumexp over each response and all that rank below it.

    `logcumsumexp` runs from the left, so flip, run, flip back: without the flips it sums
    over the better responses and the likelihood is wrong.
    """
    lowest = torch.finfo(scores.dtype).min / 4  # −inf − (−inf) is NaN
    filled = torch.where(mask, scores, lowest)
    return filled.flip(-1).logcumsumexp(-1).flip(-1)


def _mean_rows(losses: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return losses.mean()
    return (losses * weights).sum() / weights.sum()
