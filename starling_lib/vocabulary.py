"""Log-probabilities of chosen words without a table of all logits.

A batch's logits, tokens × vocabulary, are by far the largest tensor of a policy update,
and several copies of it are made. Here the vocabulary passes in pieces that stay in the
processor's cache: running maximum and sum (Milakov and Gimelshein 2018, arXiv 1805.02867)
give the normaliser, and the same pass the gradient.

Knows: hidden states, the weight of an output head. Does not know: text, models, losses.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

WORDS = 2048  # of the vocabulary at a time; logits of 1,000 tokens take 8 MB


def normaliser(
    states: Tensor, weight: Tensor, want_mean: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(T, H) states s, (V, H) words w → (T,) log Σ_v exp(s · w_v), (T, H) Σ_v π_v w_v.

    The second is the mean word of each next-token distribution π: attention of the states
    over the vocabulary. Both in float32, or float64 where the states are.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    top = states.new_full((len(states), 1), -torch.inf, dtype=dtype)
    total = torch.zeros_like(top)
    mean = torch.zeros_like(states, dtype=dtype) if want_mean else None
    for words in weight.split(WORDS):
        logits = (states @ words.t()).to(dtype)
        higher = torch.maximum(top, logits.amax(1, keepdim=True))
        shrink, top = (top - higher).exp_(), higher
        masses = logits.sub_(top).exp_()
        total = total * shrink + masses.sum(1, keepdim=True)
        if mean is not None:
            mean = mean.mul_(shrink).add_(masses.to(words.dtype) @ words)
    log_total = (top + total.log()).squeeze(1)
    return log_total, None if mean is None else mean / total


class ChosenLogprobs(torch.autograd.Function):
    """log π(id) of each state, and its entropy; the gradient goes to the states alone.

    ∂ log π(id)/∂ state = weight_id − Σ_v π_v weight_v needs nothing from what follows, so
    that it is made in the forward pass and no logit is kept or computed twice.
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, ids: Tensor, entropy: bool):
        wanted = entropy or ctx.needs_input_grad[0]
        log_total, mean = normaliser(states, weight, wanted)
        words = weight[ids].to(log_total.dtype)
        wide = states.to(log_total.dtype)
        logprobs = (wide * words).sum(1) - log_total
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((words - mean).to(states.dtype))
        if not entropy:
            return logprobs, None
        spread = log_total - (wide * mean).sum(1)  # the mean logit is state · mean word
        ctx.mark_non_differentiable(spread)
        return logprobs, spread

    @staticmethod
    def backward(ctx, gradient: Tensor, _):
        (slope,) = ctx.saved_tensors
        return (gradient[:, None] * slope).to(slope.dtype), None, None, None


def streams(head: nn.Module, config) -> bool:
    """Can the head's words pass in pieces: a plain, frozen, whole matrix without a cap?"""
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    weight = head.weight
    whole = weight.shape == (head.out_features, head.in_features)
    sharded = isinstance(weight, DTensor) or not whole
    capped = getattr(config, "final_logit_softcapping", None) is not None
    return not (weight.requires_grad or sharded or capped)
