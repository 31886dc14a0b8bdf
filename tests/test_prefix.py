"""Shared-prefix rows against separate forwards."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralForSequenceClassification

from starling_lib import prefix
from starling_lib.models import autocast, reward_head
from starling_lib.prefix import (
    SHARED_PREFIX,
    RankingScorer,
    pack_ranking,
    segment_mask,
    stack_rankings,
)
from tests.conftest import mistral

pytestmark = pytest.mark.usefixtures("fp32")

ATTENTION = [SHARED_PREFIX, "sdpa", "eager"]

# (prompt, responses): unequal prompts, lengths and numbers of responses
RANKINGS = [
    ([5, 6, 7], [[8, 9], [10, 11, 12, 13], [14], [15, 16]]),
    ([20] * 9, [[30] * 6, [31]]),
    ([40], [[41, 42, 43], [44], [45, 46]]),
]


def pack_all(rankings=RANKINGS, pad_id=0):
    rows = [pack_ranking(*ranking) for ranking in rankings]
    return stack_rankings(rows, pad_id)


def scorer_with(model, attention) -> RankingScorer:
    scorer = RankingScorer(model)
    model.set_attn_implementation(attention)
    return scorer


def separate_scores(model, rankings=RANKINGS) -> torch.Tensor:
    """(B, K) scores of one unpadded forward for each prompt and response."""
    out = torch.full((len(rankings), max(len(r) for _, r in rankings)), torch.nan)
    for i, (prompt, responses) in enumerate(rankings):
        for k, response in enumerate(responses):
            ids = torch.tensor([prompt + response])
            hidden = model.base_model(ids, use_cache=False).last_hidden_state
            out[i, k] = reward_head(model, hidden[0, -1])
    return out


# --- layout


def test_pack_ranking_by_hand():
    assert pack_ranking([5, 6], [[7], [8, 9, 10]]) == {
        "input_ids": [5, 6, 7, 8, 9, 10],
        "position_ids": [0, 1, 2, 2, 3, 4],
        "segment_ids": [0, 0, 1, 2, 2, 2],
        "ends": [2, 5],
    }


@pytest.mark.parametrize(("prompt", "responses"), [([], [[1]]), ([1], [[2], []])])
def test_pack_ranking_wants_tokens_everywhere(prompt, responses):
    with pytest.raises(ValueError, match="prompt and every response need a token"):
        pack_ranking(prompt, responses)


def test_stack_rankings_marks_padding_and_missing_responses():
    rows = [pack_ranking([5], [[6]]), pack_ranking([5], [[6], [7, 8]])]
    batch = stack_rankings(rows, pad_id=99)
    assert batch["input_ids"].tolist() == [[5, 6, 99, 99], [5, 6, 7, 8]]
    assert batch["segment_ids"].tolist() == [[0, 1, -1, -1], [0, 1, 2, 2]]
    assert batch["ends"].tolist() == [[1, -1], [1, 3]]


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data()
)
def test_segment_mask_says_who_sees_whom(prompt, lengths, data):
    padding = data.draw(st.integers(0, 3))
    segments = [0] * prompt + [k for k, n in enumerate(lengths, 1) for _ in range(n)]
    segments += [-1] * padding
    mask = segment_mask(torch.tensor([segments]))[0, 0]
    for q, mine in enumerate(segments):
        for k, other in enumerate(segments):
            related = other == mine or (other == 0 and mine > 0)
            assert mask[q, k].item() == (k <= q and related)
    assert mask.any(1).all()  # an empty row of a softmax would be NaN


# --- equality with separate forwards


@pytest.mark.parametrize("attention", ATTENTION)
def test_packed_scores_are_those_of_separate_forwards(reward_model, attention):
    expected = separate_scores(reward_model)
    scores = scorer_with(reward_model, attention)(**pack_all())
    assert reward_model.config._attn_implementation == attention
    assert torch.equal(scores.isnan(), expected.isnan())
    assert expected[0].std() > 0.01  # responses do differ
    assert torch.allclose(scores, expected, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("attention", ATTENTION)
def test_packed_gradients_are_those_of_separate_forwards(reward_model, attention):
    apart = copy.deepcopy(reward_model)
    weights = torch.arange(12.0).view(3, 4)
    separate = torch.nan_to_num(separate_scores(apart))
    (weights * separate).sum().backward()
    scores = scorer_with(reward_model, attention)(**pack_all())
    (weights * torch.nan_to_num(scores)).sum().backward()
    for (name, p), q in zip(
        reward_model.named_parameters(), apart.parameters(), strict=True
    ):
        assert torch.allclose(p.grad, q.grad, atol=1e-4), name


@pytest.mark.parametrize("attention", ATTENTION)
def test_scores_do_not_depend_on_the_batch(reward_model, attention):
    scorer = scorer_with(reward_model, attention)
    together = scorer(**pack_all())
    for i, ranking in enumerate(RANKINGS):
        alone = scorer(**pack_all([ranking], pad_id=7))
        width = alone.shape[1]
        assert torch.allclose(together[i, :width], alone[0], atol=1e-5)


def test_padding_is_not_computed(reward_model):
    """Rows of 11, 16 and 7 tokens pass as one row of 34 instead of three of 16."""
    scorer, shapes = RankingScorer(reward_model), []
    reward_model.model.layers[0].register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape[:2]))
    )
    scorer(**pack_all())
    assert shapes == [(1, 12 + 16 + 7)]


def test_order_of_responses_does_not_matter(reward_model):
    prompt, responses = RANKINGS[0]
    scorer = RankingScorer(reward_model)
    forward = scorer(**pack_all([(prompt, responses)]))
    backward = scorer(**pack_all([(prompt, responses[::-1])]))
    assert torch.allclose(forward, backward.flip(1), atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 40, 100])  # one run a part, then a few
def test_parts_change_neither_scores_nor_gradients(reward_model, monkeypatch, at_once):
    def learn():
        scorer = RankingScorer(copy.deepcopy(reward_model))
        scores = scorer(**pack_all())
        scores.nan_to_num().square().sum().backward()
        return scores.detach(), [p.grad for p in scorer.parameters()]

    scores, gradients = learn()
    monkeypatch.setattr(prefix, "AT_ONCE", at_once)
    found, slopes = learn()
    assert torch.allclose(found, scores, atol=1e-6, equal_nan=True)
    for one, other in zip(slopes, gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1))
def test_runs_are_put_together_in_order_while_they_fit(runs):
    own, seen = (
        torch.arange(9) < torch.tensor(x)[:, None] for x in zip(*runs, strict=True)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "AT_ONCE", 100)
        found = prefix._together(own, seen)

    def weights(rows):
        n, p = (max(x) for x in zip(*runs[rows], strict=True))
        return len(runs[rows]) * n * (n + p)

    assert [i for rows in found for i in range(rows.start, rows.stop)] == [
        *range(len(runs))
    ]
    for rows in found:
        assert rows.stop == rows.start + 1 or weights(rows) <= 100
        if rows.stop < len(runs):
            assert weights(slice(rows.start, rows.stop + 1)) > 100, "one more would fit"


def test_bf16_scores_are_close_and_in_float32(reward_model, monkeypatch):
    expected = RankingScorer(reward_model)(**pack_all())
    monkeypatch.setenv("STARLING_PRECISION", "bf16")
    for attention in ATTENTION:
        with autocast("cpu"):
            scores = scorer_with(reward_model, attention)(**pack_all())
        assert scores.dtype == torch.float32
        assert torch.allclose(scores, expected, atol=0.05, equal_nan=True)
        assert not torch.equal(scores.nan_to_num(), expected.nan_to_num())


def test_bf16_scores_are_the_same_with_and_without_gradients(reward_model, monkeypatch):
    monkeypatch.setenv("STARLING_PRECISION", "bf16")
    scorer = RankingScorer(reward_model)
    with autocast("cpu"):
        learning = scorer(**pack_all())
        with torch.no_grad():
            reading = scorer(**pack_all())
    assert learning.requires_grad
    assert torch.equal(learning.nan_to_num(), reading.nan_to_num())


def test_gradient_checkpointing_changes_nothing(reward_model):
    scorer = RankingScorer(reward_model).train()
    torch.nan_to_num(scorer(**pack_all())).sum().backward()
    gradients = [p.grad.clone() for p in scorer.parameters()]
    scorer.zero_grad()
    with pytest.warns(FutureWarning):  # transformers renames it in version 6
        scorer.gradient_checkpointing_enable()
    torch.nan_to_num(scorer(**pack_all())).sum().backward()
    for before, p in zip(gradients, scorer.parameters(), strict=True):
        assert torch.allclose(before, p.grad, atol=1e-6)


def test_a_scorer_leaves_its_model_as_good_for_other_uses(reward_model):
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    before = reward_model(ids, attention_mask=mask).logits
    RankingScorer(reward_model)
    after = reward_model(ids, attention_mask=mask).logits
    assert torch.allclose(before, after, atol=1e-6)
    alone = reward_model(ids[:1, 2:]).logits
    assert torch.allclose(after[:1], alone, atol=1e-5)


def test_a_trained_model_is_saved_with_ordinary_attention(reward_model, tmp_path):
    RankingScorer(reward_model)
    reward_model.save_pretrained(tmp_path)
    again = type(reward_model).from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


def test_other_attention_is_refused(reward_model):
    scorer = RankingScorer(reward_model)
    reward_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' cannot take.*'eager'"):
        scorer(**pack_all())


def test_a_response_out_of_sight_of_its_prompt_is_refused():
    """A packed row may be longer than the window; a prompt with one response may not."""
    model = mistral(MistralForSequenceClassification, sliding_window=8, num_labels=1)
    scorer = RankingScorer(model)
    near = [([5, 6, 7], [[8, 9], [10, 11, 12, 13], [14] * 5])]  # 8 of 14 tokens
    scores = scorer(**pack_all(near))
    assert torch.allclose(scores, separate_scores(model, near), atol=1e-4)
    with pytest.raises(ValueError, match="9 tokens, .* sliding window of 8"):
        scorer(**pack_all([*near, ([5, 6], [[8] * 7, [9]])]))
