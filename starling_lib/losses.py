"""Likelihoods of rankings, and what stands beside them in a reward model's loss.

Scores are (B, K): B rankings of K responses. Without `ranks` the columns stand best
first; `ranks` (B, K; 1 is best, any numbers do) let them stand in any order, and tie.
False in a `mask` (B, K) or NaN in the ranks means "no such response", in whatever
column: its score may be NaN or infinite and reaches neither value nor gradient.
`weights` (B) turn the mean over rows into a weighted mean; a row of weight 0 drops out
entirely, a row of a single response counts as zero loss.

Ties are averaged over: the K-wise loss of a ranking with ties is its mean over all
orders that the ranks allow, which is what a judge that breaks ties by lot gives in
expectation. (Davidson's way gives ties a probability and a parameter of their own; see
Firth, Kosmidis and Turner 2019, arXiv 1901.07543.) A tied pair holds no preference: the
pairwise losses leave it out, and count a row of nothing else as zero.

Knows: pure functions of scores. Does not know: models, texts, trainers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TIED = 12  # columns of a ranking with ties: the loss sums over their subsets


def kwise_loss(
    scores: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    top: int | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """Plackett-Luce negative log-likelihood, MLE_K (Zhu et al. 2023, arXiv 2301.11270 §4).

    mean over rows of Σ_j [logsumexp(s_j, …, s_K) − s_j] / (K_i − 1), as Starling
    normalised it: equal scores at K = 7 give ln 7!/6 = 1.4209; K = 2 is Bradley-Terry.
    `top` = m counts the first m choices only and divides by min(m, K_i − 1): the order
    of the rest is then no evidence (top-k ListMLE, Xia et al. 2009).
    Raises ValueError on a bad shape, on top < 1, and on ties among more than 12 columns.

    >>> scores = torch.tensor([[2.0, 0.5, -1.0]])  # one ranking, best first
    >>> round(2 * kwise_loss(scores).item(), 3)  # −ln .786 − ln .818
    0.443
    """
    if top is not None and top < 1:
        raise ValueError(f"top={top}: count at least the first choice, or give None")
    mask = _present(scores, mask, weights, ranks)
    choices = (mask.sum(1) - 1).clamp(min=1, max=top)
    if ranks is None:
        return _mean_rows(_ordered_nll(scores, mask, top) / choices, weights)
    order = torch.where(mask, ranks, torch.inf).argsort(dim=1, stable=True)
    scores, mask, ranks = (x.gather(1, order) for x in (scores, mask, ranks))
    nll = _ordered_nll(scores, mask, top)
    tied = ((ranks[:, 1:] == ranks[:, :-1]) & mask[:, 1:]).any(1)
    if tied.any():
        nll = nll.masked_scatter(
            tied, _tied_nll(scores[tied], mask[tied], ranks[tied], top)
        )
    return _mean_rows(nll / choices, weights)


def pairwise_loss(
    scores: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """Bradley-Terry loss of all K(K−1)/2 pairs, MLE_2 (Ouyang et al. 2022, eq. 1).

    mean over rows of the mean over pairs of −log σ(s_better − s_worse).

    >>> round(pairwise_loss(torch.zeros(1, 7)).item(), 4)  # equal scores: ln 2
    0.6931
    """
    mask = _present(scores, mask, weights, ranks)
    ranks = _column_numbers(scores) if ranks is None else ranks
    both = mask[:, :, None] & mask[:, None]
    prefers = both & (ranks[:, :, None] < ranks[:, None])
    return _mean_rows(_mean_pairs(scores, mask, prefers), weights)


def best_worst_loss(
    scores: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """Bradley-Terry loss of one pair a row, the best response against the worst.

    mean over rows of −log σ(s_best − s_worst) (Christiano et al. 2017, arXiv 1706.03741,
    eq. 1, on the clearest pair); several best or worst ones are averaged over.
    """
    mask = _present(scores, mask, weights, ranks)
    ranks = _column_numbers(scores) if ranks is None else ranks
    best = torch.where(mask, ranks, torch.inf).amin(1, keepdim=True)
    worst = torch.where(mask, ranks, -torch.inf).amax(1, keepdim=True)
    ends = (mask & (ranks == best))[:, :, None] & (mask & (ranks == worst))[:, None]
    chosen = ends & (best < worst)[:, :, None]
    return _mean_rows(_mean_pairs(scores, mask, chosen), weights)


def centering_penalty(
    scores: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """mean over rows of (mean_k s_k)²: holds rewards, known up to a constant, near zero.

    Eisenstein et al. 2023, arXiv 2312.09244, eq. 2. The released Starling code adds
    zero_sum_penalty · (Σ_k s_k)², and TRL's center_rewards_coefficient stands before
    (s_1 + s_2)²: their coefficients times K² are the one to use here.
    """
    mask = _present(scores, mask, weights)
    means = torch.where(mask, scores, 0).sum(1) / mask.sum(1).clamp(min=1)
    return _mean_rows(means**2, weights)


# --- one row's loss


def _ordered_nll(scores: Tensor, mask: Tensor, top: int | None) -> Tensor:
    """(B) negative log-likelihoods of the first `top` choices, columns best first.

    `logcumsumexp` runs from the left, so flip, run, flip back: without the flips it sums
    over the better responses and the likelihood is wrong.
    """
    filled = _fill(scores, mask)
    remaining = filled.flip(-1).logcumsumexp(-1).flip(-1)
    counted = mask if top is None else mask & (mask.cumsum(1) <= top)
    return torch.where(counted, remaining - filled, 0).sum(1)


def _tied_nll(scores: Tensor, mask: Tensor, ranks: Tensor, top: int | None) -> Tensor:
    """(B) mean negative log-likelihood over all orders that tied `ranks` allow.

    Summed over sets of responses that may remain at a choice, not over orders: a set S
    with m of the g responses tied for its best rank remains in 1/C(g, m) of the orders,
    if it holds every worse response; each of the m is then equally often the next.
    """
    subsets = _subsets(scores.shape[1], scores.device)
    ranks = torch.where(mask, ranks, torch.inf)[:, None]  # (B, 1, K) against (S, K)
    best = torch.where(subsets, ranks, torch.inf).amin(-1, keepdim=True)  # (B, S, 1)
    group = mask[:, None] & (ranks == best)
    members = group & subsets
    lacks = mask[:, None] & (ranks > best) & ~subsets
    valid = ~(lacks | (subsets & ~mask[:, None])).any(-1)
    if top is not None:
        valid &= mask.sum(1)[:, None] - subsets.sum(-1) < top
    g, m = group.sum(-1), members.sum(-1)
    share = _inverse_binomials(scores)[g, m]
    filled = _fill(scores, mask)[:, None]
    lowest = torch.finfo(scores.dtype).min / 4
    remaining = torch.where(subsets, filled, lowest).logsumexp(-1)
    chosen = torch.where(members, filled, 0).sum(-1) / m.clamp(min=1)
    return torch.where(valid, (remaining - chosen) * share, 0).sum(1)


def _subsets(count: int, device: torch.device) -> Tensor:
    """(2^count − 1, count) bool: all non-empty subsets of the columns."""
    if count > MAX_TIED:
        raise ValueError(
            f"ties in rankings of {count} responses: the mean over orders needs "
            f"2^{count} terms; keep at most {MAX_TIED} a row, or break the ties"
        )
    numbers = torch.arange(1, 2**count, device=device)[:, None]
    return (numbers >> torch.arange(count, device=device)) % 2 == 1


def _inverse_binomials(scores: Tensor) -> Tensor:
    """(13, 13) table of 1/C(g, m), zero where m > g, in the dtype of the scores."""
    sizes = range(MAX_TIED + 1)
    table = [[1 / math.comb(g, m) if m <= g else 0 for m in sizes] for g in sizes]
    return scores.new_tensor(table)


def _mean_pairs(scores: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
    """(B) mean of −log σ(s_i − s_j) over the pairs (i, j) `chosen` (B, K, K)."""
    filled = torch.where(mask, scores, 0)
    losses = -F.logsigmoid(filled[:, :, None] - filled[:, None])
    pairs = chosen.sum((1, 2)).clamp(min=1)
    return torch.where(chosen, losses, 0).sum((1, 2)) / pairs


# --- shapes, masks, means


def _present(
    scores: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    ranks: Tensor | None = None,
) -> Tensor:
    """The mask (B, K) of responses that count, after a check of all shapes."""
    wanted = {"mask": (mask, 2), "weights": (weights, 1), "ranks": (ranks, 2)}
    for name, (tensor, dims) in wanted.items():
        if tensor is not None and tensor.shape != scores.shape[:dims]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(scores.shape[:dims])} for scores {tuple(scores.shape)}"
            )
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    mask = mask if ranks is None else mask & ~ranks.isnan()
    return mask if weights is None else mask & (weights != 0)[:, None]


def _fill(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores with a finite lowest value where missing: −inf − (−inf) is NaN."""
    return torch.where(mask, scores, torch.finfo(scores.dtype).min / 4)


def _column_numbers(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[1], device=scores.device).expand_as(scores)


def _mean_rows(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over rows, weighted where weights are given; 0 where all weights are."""
    if weights is None:
        return losses.mean()
    total = weights.sum()
    return (losses * weights).sum() / torch.where(total > 0, total, 1)
