"""Log-probabilities of chosen words without a table of all logits.

A batch's logits, tokens × vocabulary, are by far the largest tensor of a policy update,
and several copies of it are made. Here the vocabulary passes in pieces that stay in the
processor's cache: running maximum and sum (Milakov and Gimelshein 2018, arXiv 1805.02867)
give the normaliser, and the same pass the gradient.

Knows: hidden states, the weight of an output head. Does not know: text, models, losses.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

WORDS = 2048  # of the vocabulary at a time; logits of 1,000 tokens take 8 MB


@dataclass
class WordSums:
    """Running sums over the vocabulary, for T states; all (T, 1) but `words`, (T, H).

    Of float32, or float64 where the states are. Each piece is rescaled to the largest
    logit so far.
    """

    top: Tensor  # the largest logit so far
    total: Tensor  # Σ exp(logit − top)
    chosen: Tensor  # logit of the chosen word
    heat: Tensor | None  # Σ exp(logit − top) · logit
    words: Tensor | None  # Σ exp(logit − top) · word, (T, H)

    @property
    def log_total(self) -> Tensor:
        """(T, 1) log Σ exp(logit)."""
        return self.top + self.total.log()


def word_sums(
    states: Tensor, weight: Tensor, ids: Tensor, heat: bool, words: bool
) -> WordSums:
    """Pass the words (V, H) by the states (T, H); `ids` (T) are the chosen ones.

    The chosen logit is taken from the same product as all others, so that in low precision
    both are rounded alike and a likely word is not made likelier than certain.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    zeros = states.new_zeros(len(states), 1, dtype=dtype)
    sums = WordSums(zeros - torch.inf, zeros, zeros, None, None)
    sums.heat = zeros if heat else None
    sums.words = torch.zeros_like(states, dtype=dtype) if words else None
    for first in range(0, len(weight), WORDS):
        piece = weight[first : first + WORDS]
        logits = (states @ piece.t()).to(dtype)
        place = ids[:, None] - first
        own = logits.gather(1, place.clamp(0, len(piece) - 1))
        inside = (place >= 0) & (place < len(piece))
        sums.chosen = torch.where(inside, own, sums.chosen)
        top = torch.maximum(sums.top, logits.amax(1, keepdim=True))
        shrink, sums.top = (sums.top - top).exp(), top
        masses = (logits - top).exp_()
        sums.total = sums.total * shrink + masses.sum(1, keepdim=True)
        if heat:
            sums.heat = sums.heat * shrink + logits.mul_(masses).sum(1, keepdim=True)
        if words:
            sums.words.mul_(shrink).add_(masses.to(piece.dtype) @ piece)
    return sums


class ChosenLogprobs(torch.autograd.Function):
    """log π(id) of each state, and its entropy; the gradient goes to the states alone.

    ∂ log π(id)/∂ state = word_id − Σ_v π_v word_v needs nothing from what follows, so that
    it is made in the forward pass and no logit is kept or computed twice. The second term
    is attention of the states over the vocabulary.
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, ids: Tensor, entropy: bool):
        learns = ctx.needs_input_grad[0]
        sums = word_sums(states, weight, ids, entropy, learns)
        if learns:
            # As the products saw them: of a certain word nothing may be left.
            own = weight[ids].to(autocast_format(weight.device.type) or weight.dtype)
            slope = own.to(sums.total.dtype) - sums.words / sums.total
            ctx.save_for_backward(slope.to(states.dtype))
        logprobs = (sums.chosen - sums.log_total).squeeze(1)
        if not entropy:
            return logprobs, None
        spread = (sums.log_total - sums.heat / sums.total).squeeze(1)
        ctx.mark_non_differentiable(spread)
        return logprobs, spread

    @staticmethod
    def backward(ctx, gradient: Tensor, _):
        (slope,) = ctx.saved_tensors
        return (gradient[:, None] * slope).to(slope.dtype), None, None, None


def autocast_format(kind: str) -> torch.dtype | None:
    """The format that autocast gives products on this kind of device; None: it is off."""
    on = torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def streams(head: nn.Module, config) -> bool:
    """Can the head's words pass in pieces: a plain, frozen matrix without bias or cap?"""
    capped = getattr(config, "final_logit_softcapping", None) is not None
    plain = is_plain(head) and head.bias is None
    return plain and not (capped or head.weight.requires_grad)


def is_plain(layer: nn.Module) -> bool:
    """Is it a linear layer whose whole weight may be read without calling the layer?

    Not one that somebody moves or gathers when it is called (accelerate's hooks,
    DeepSpeed's ZeRO-3, FSDP), nor one of another kind of tensor (quantised).
    """
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.shape == (layer.out_features, layer.in_features)
        and not hasattr(layer.weight, "ds_id")
        and not hasattr(layer, "_hf_hook")
    )
