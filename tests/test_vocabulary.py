"""The vocabulary in pieces against the table of all logits."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from starling_lib import vocabulary
from starling_lib.rollouts import (
    next_token_logits,
    token_entropy,
    token_logprobs,
    word_logprobs,
)
from starling_lib.vocabulary import ChosenLogprobs, streams, word_sums

TOKENS, HIDDEN, WORDS = 7, 5, 23


@pytest.fixture(params=[4, 23, 100], ids=lambda n: f"{n} words at a time")
def piece(request, monkeypatch):
    """Several pieces, the last of them short; exactly one; more room than words."""
    monkeypatch.setattr(vocabulary, "WORDS", request.param)


def problem(scale: float = 1.0):
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=draw) * scale
    weight = torch.randn(WORDS, HIDDEN, dtype=torch.float64, generator=draw)
    ids = torch.randint(WORDS, (TOKENS,), generator=draw)
    return states.requires_grad_(), weight, ids


@pytest.mark.parametrize("scale", [1.0, 1000.0])  # with 1,000, exp alone would overflow
def test_logprobs_entropies_and_gradients_are_those_of_all_logits(piece, scale):
    states, weight, ids = problem(scale)
    logprobs, entropy = ChosenLogprobs.apply(states, weight, ids, True)
    table = (states @ weight.t()).log_softmax(-1)
    expected = table.gather(1, ids[:, None]).squeeze(1)
    assert torch.allclose(logprobs, expected, rtol=1e-12, atol=1e-9)
    told = -(table.exp() * table.nan_to_num()).sum(-1)
    assert torch.allclose(entropy, told, rtol=1e-9, atol=1e-9 * scale)
    assert not entropy.requires_grad

    upstream = torch.arange(1.0, TOKENS + 1, dtype=torch.float64)
    (found,) = torch.autograd.grad((logprobs * upstream).sum(), states)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), states)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)


def test_the_gradient_is_that_of_finite_differences(piece):
    states, weight, ids = problem()
    assert torch.autograd.gradcheck(
        lambda x: ChosenLogprobs.apply(x, weight, ids, False)[0], (states,)
    )


def test_a_certain_word_pulls_nowhere_under_autocast(piece):
    """Its own word and the mean word are then the same, rounded alike."""
    _, weight, _ = problem()
    weight = weight.float()
    states = (1e3 * weight[:1]).requires_grad_()
    ids = (states @ weight.t()).argmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, _ = ChosenLogprobs.apply(states, weight, ids, False)
    logprobs.sum().backward()
    assert weight[ids].bfloat16().float().ne(weight[ids]).any(), "rounding is seen"
    assert (states.grad == 0).all()


def test_sums_over_the_vocabulary(piece):
    states, weight, ids = problem()
    with torch.no_grad():
        sums = word_sums(states, weight, ids, heat=True, words=True)
        logits = states @ weight.t()
        assert torch.allclose(sums.log_total[:, 0], logits.logsumexp(1))
        assert torch.allclose(sums.chosen, logits.gather(1, ids[:, None]))
        assert torch.allclose(sums.words / sums.total, logits.softmax(1) @ weight)
        mean = (logits.softmax(1) * logits).sum(1, keepdim=True)
        assert torch.allclose(sums.heat / sums.total, mean)
        less = word_sums(states, weight, ids, heat=False, words=False)
        assert less.heat is None and less.words is None


def test_likely_words_are_as_exact_as_from_the_table_in_low_precision(piece):
    """Logits near 30 have steps of 0.125 in bf16: chosen and sum must be rounded alike."""
    states, weight, ids = (x.detach() for x in problem())
    states, weight = 20 * weight[ids].float(), weight.float()
    exact = (states @ weight.t()).double().log_softmax(-1)
    likely = exact.gather(1, ids[:, None]).squeeze(1) > -1e-3
    assert likely.sum() > 3
    with torch.autocast("cpu", torch.bfloat16):
        found, entropy = ChosenLogprobs.apply(states, weight, ids, True)
    assert (states @ weight.t()).max() > 30 and found.dtype == torch.float32
    assert found[likely].abs().max() < 2e-3 and (found <= 0).all()
    assert (entropy[likely] >= -1e-3).all() and entropy[likely].max() < 0.02


def test_half_precision_states_get_float32_logprobs_and_their_own_gradients(piece):
    states, weight, ids = problem()
    half = states.detach().bfloat16().requires_grad_()
    logprobs, _ = ChosenLogprobs.apply(half, weight.bfloat16(), ids, False)
    logprobs.sum().backward()
    assert (logprobs.dtype, half.grad.dtype) == (torch.float32, torch.bfloat16)
    expected = (half.double() @ weight.bfloat16().double().t()).log_softmax(-1)
    assert torch.allclose(
        logprobs.double(), expected.gather(1, ids[:, None]).squeeze(1), atol=0.05
    )


def frozen(head: nn.Module) -> nn.Module:
    return head.requires_grad_(False)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"logit_scale": 0.25},
        {"logits_scaling": 8.0},
        {"final_logit_softcapping": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_every_head_says_what_its_logits_say(settings, bias):
    config = LlamaConfig(**settings)
    head = frozen(nn.Linear(HIDDEN, WORDS, bias=bias).double())
    states, _, ids = problem()
    found = word_logprobs(head, config, states, ids, entropy=True)
    logits = next_token_logits(head, config, states)
    for value, expected in zip(
        found, (token_logprobs(logits, ids), token_entropy(logits)), strict=True
    ):
        assert torch.allclose(value.float(), expected, atol=1e-5)
    assert word_logprobs(head, config, states, ids)[1] is None
    assert streams(head, config) == (not bias and "final" not in str(settings))


def test_a_head_that_learns_gets_its_gradient():
    head = nn.Linear(HIDDEN, WORDS, bias=False)
    states, _, ids = problem()
    assert not streams(head, LlamaConfig())
    word_logprobs(head, LlamaConfig(), states.float(), ids)[0].sum().backward()
    assert head.weight.grad.abs().sum() > 0


def test_weights_that_are_elsewhere_are_left_to_the_head():
    """As ZeRO-3 and FSDP leave them between forwards: empty, or a flat shard."""
    head = frozen(nn.Linear(HIDDEN, WORDS, bias=False))
    assert streams(head, LlamaConfig())
    for shard in (torch.empty(0), torch.zeros(HIDDEN * WORDS // 2)):
        gone = copy.deepcopy(head)
        gone.weight.data = shard
        assert not streams(gone, LlamaConfig())
    gathering, moved = copy.deepcopy(head), copy.deepcopy(head)
    gathering.weight.ds_id = 0  # DeepSpeed's: of full shape before it is all there
    moved._hf_hook = object()  # accelerate's: weights come with the call
    assert not streams(gathering, LlamaConfig()) and not streams(moved, LlamaConfig())
