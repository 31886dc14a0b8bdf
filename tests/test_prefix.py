"""Shared-prefix rows against separate forwards; halves of a trunk against the whole."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
)

from starling_lib import prefix
from starling_lib.apa import ActorCritic
from starling_lib.models import autocast, reward_head, tiny_model
from starling_lib.prefix import (
    SHARED_PREFIX,
    RankingScorer,
    freeze_below,
    pack_ranking,
    segment_mask,
    split_trunk,
    stack_rankings,
    try_split_trunk,
)

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


def test_order_of_responses_does_not_matter(reward_model):
    prompt, responses = RANKINGS[0]
    scorer = RankingScorer(reward_model)
    forward = scorer(**pack_all([(prompt, responses)]))
    backward = scorer(**pack_all([(prompt, responses[::-1])]))
    assert torch.allclose(forward, backward.flip(1), atol=1e-5)


def test_bf16_scores_are_close_and_in_float32(reward_model, monkeypatch):
    expected = RankingScorer(reward_model)(**pack_all())
    monkeypatch.setenv("STARLING_PRECISION", "bf16")
    for attention in ATTENTION:
        with autocast("cpu"):
            scores = scorer_with(reward_model, attention)(**pack_all())
        assert scores.dtype == torch.float32
        assert torch.allclose(scores, expected, atol=0.05, equal_nan=True)
        assert not torch.equal(scores.nan_to_num(), expected.nan_to_num())


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


def mistral(kind=MistralForCausalLM, sliding_window=None, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 64}
    config = MistralConfig(**sizes, sliding_window=sliding_window, **changes)
    return kind(config).eval()


def test_a_response_out_of_sight_of_its_prompt_is_refused():
    """A packed row may be longer than the window; a prompt with one response may not."""
    model = mistral(MistralForSequenceClassification, sliding_window=8, num_labels=1)
    scorer = RankingScorer(model)
    near = [([5, 6, 7], [[8, 9], [10, 11, 12, 13], [14] * 5])]  # 8 of 14 tokens
    scores = scorer(**pack_all(near))
    assert torch.allclose(scores, separate_scores(model, near), atol=1e-4)
    with pytest.raises(ValueError, match="9 tokens, .* sliding window of 8"):
        scorer(**pack_all([*near, ([5, 6], [[8] * 7, [9]])]))


# --- freezing


def test_freeze_below_leaves_the_top_trainable(policy):
    assert freeze_below(policy, 1) == 1
    trainable = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert all(n.startswith(("model.layers.1.", "model.norm")) for n in trainable)
    assert "model.norm.weight" in trainable and len(trainable) == 10


def test_freeze_below_keeps_an_untied_head_trainable(reward_model):
    freeze_below(reward_model, 2)
    frozen = [n for n, p in reward_model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]


def test_freeze_below_none_trains_everything(policy):
    assert freeze_below(policy, None) == 0
    assert all(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("layers", [0, 3, -1])
def test_freeze_below_checks_its_range(policy, layers):
    with pytest.raises(ValueError, match=f"={layers}: this model has 2 layers"):
        freeze_below(policy, layers)


# --- the split


@pytest.fixture
def padded():
    """Left-padded ids with positions from the mask."""
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) >= torch.tensor([[0], [4], [7]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return ids, mask, {"attention_mask": mask.long(), "position_ids": positions}


@pytest.mark.parametrize("make", [tiny_model, mistral])
def test_the_halves_make_the_whole(make, padded):
    ids, mask, rest = padded
    model = make()
    lower, upper = split_trunk(model, 1)
    whole = model.base_model(ids, **rest).last_hidden_state
    halves = upper(
        inputs_embeds=lower(ids, **rest).last_hidden_state, **rest
    ).last_hidden_state
    assert torch.allclose(whole[mask], halves[mask], atol=1e-5)


def test_a_split_respects_sliding_windows(padded):
    model = mistral(sliding_window=4)
    lower, upper = split_trunk(model, 2)
    ids, rest = padded[0], {}
    whole = model.base_model(ids, **rest).last_hidden_state
    halves = upper(inputs_embeds=lower(ids).last_hidden_state).last_hidden_state
    assert torch.allclose(whole, halves, atol=1e-5)


def test_checking_a_split_is_cheap_and_leaves_the_window_alone():
    model = mistral(sliding_window=4096)
    lengths = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    lower, upper = split_trunk(model, 2)
    assert max(lengths) <= 16
    windows = [m.config.sliding_window for m in (model, lower, upper)]
    assert windows == [4096] * 3


def test_a_half_that_forgets_the_window_is_refused(monkeypatch):
    half = prefix._half

    def forgetful(*args, **kwargs):
        made = half(*args, **kwargs)
        made.config.sliding_window = None
        return made

    monkeypatch.setattr(prefix, "_half", forgetful)
    with pytest.raises(ValueError, match="cannot be split"):
        split_trunk(mistral(sliding_window=4096), 2)


def test_splitting_does_not_cut_the_original(policy):
    keys, config = list(policy.state_dict()), policy.config.to_dict()
    logits = policy(torch.tensor([[5, 6, 7]])).logits
    lower, upper = split_trunk(policy, 1)
    assert len(policy.model.layers) == 2 and len(lower.layers) == len(upper.layers) == 1
    assert list(policy.state_dict()) == keys and policy.config.to_dict() == config
    assert torch.equal(policy(torch.tensor([[5, 6, 7]])).logits, logits)


def test_training_the_top_trains_the_original(policy):
    before = copy.deepcopy(policy.state_dict())
    freeze_below(policy, 1)
    lower, upper = split_trunk(policy, 1)
    states = lower(torch.tensor([[5, 6, 7]])).last_hidden_state
    assert not states.requires_grad
    upper(inputs_embeds=states).last_hidden_state.square().sum().backward()
    trainable = [p for p in policy.parameters() if p.requires_grad]
    torch.optim.SGD(trainable, lr=0.1).step()
    changed = {
        name
        for name, value in policy.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed and all(
        n.startswith(("model.layers.1", "model.norm")) for n in changed
    )


def test_a_module_with_halves_saves_every_parameter_once(policy):
    parameters = set(policy.state_dict())
    module = ActorCritic(policy, num_layers_unfrozen=1)
    module.frozen_reference()
    names = {n.removeprefix("policy.") for n in module.state_dict()}
    assert {n for n in names if not n.startswith("value_head.")} == parameters


def test_no_split_where_all_layers_are_trained(policy):
    assert try_split_trunk(policy, None) is None
    assert try_split_trunk(policy, 2) is None


def test_an_architecture_that_cannot_be_split_falls_back(policy):
    """A trunk that treats `inputs_embeds` otherwise than its own embeddings."""

    class Scaled(type(policy.model)):
        def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
            if inputs_embeds is None:
                inputs_embeds = self.embed_tokens(input_ids)
            return super().forward(inputs_embeds=8 * inputs_embeds, **kwargs)

    policy.model.__class__ = Scaled
    with pytest.raises(ValueError, match="Scaled cannot be split .* differ by"):
        split_trunk(policy, 1)
    with pytest.warns(UserWarning, match="no frozen-trunk split: Scaled"):
        assert try_split_trunk(policy, 1) is None
