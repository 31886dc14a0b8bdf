"""Scaling, shifting, KL coefficients: against numpy and sums by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2ForSequenceClassification

from starling_lib.actor_critic import ActorCritic
from starling_lib.models import inference
from starling_lib.pessimism import PessimisticReward
from starling_lib.policy_rewards import (
    KLCoefficient,
    RewardScale,
    RewardSum,
    RunningMoments,
    checked_scores,
    retokenised,
    token_rewards,
)
from starling_lib.rollouts import TOKEN_FIELDS, given_responses
from starling_lib.scoring import score_responses
from starling_lib.trunk import shared_layers, tapped


def test_token_rewards_put_the_score_on_the_last_response_token():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logprobs, reference = torch.full((2, 3), -1.0), torch.full((2, 3), -3.0)
    rewards = token_rewards(torch.tensor([5.0, 7.0]), logprobs, reference, mask, 0.5)
    assert rewards.tolist() == [[-1, 4, 0], [-1, -1, 6]]


def test_running_moments_are_numpys():
    batches = [np.array([1.0, 4.0]), np.array([2.0]), np.array([9.0, 3.0, 3.0])]
    moments = RunningMoments()
    for x in batches:
        moments.update(len(x), x.mean(), ((x - x.mean()) ** 2).sum())
    together = np.concatenate(batches)
    assert moments.mean == pytest.approx(together.mean())
    assert moments.std == pytest.approx(together.std(ddof=1))


def test_running_moments_of_one_or_equal_values_scale_by_one():
    moments = RunningMoments()
    assert moments.std == 1
    moments.update(1, 5.0, 0.0)
    assert moments.std == 1
    moments.update(3, 5.0, 0.0)
    assert moments.std == 1


first, second = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 40.0])


def test_running_scale_divides_by_the_spread_of_all_so_far():
    scale = RewardScale("running", limit=100)
    assert torch.allclose(scale(first), first / first.std())
    everything = torch.cat([first, second])
    assert torch.allclose(scale(second), second / everything.std())
    assert scale.std == pytest.approx(everything.std().item())


def test_reference_scale_stays_that_of_the_first_batch():
    scale = RewardScale("reference", limit=100)
    scale(first)
    assert torch.allclose(scale(second), second / first.std())


def test_no_scale_is_the_score_itself_and_clips_nothing():
    scale = RewardScale("none", limit=0.1)
    assert torch.equal(scale(second), second) and scale.std == 1


def test_a_scaled_reward_is_clipped_then_shifted():
    scale = RewardScale("running", limit=0.5, shift=0.3)
    assert scale(second).tolist() == pytest.approx([0.3, 0.8])


def test_the_statistics_are_those_of_all_processes():
    scale = RewardScale("running", limit=100)
    found = scale(first, torch.cat([first, second]))
    assert torch.allclose(found, first / torch.cat([first, second]).std())


def test_a_saved_scale_goes_on_where_it_stopped():
    whole, again = RewardScale("running", 100), RewardScale("running", 100)
    whole(first)
    again.moments = RunningMoments(**whole.state())
    assert torch.equal(whole(second), again(second))


def test_a_fixed_coefficient_stays():
    coefficient = KLCoefficient(0.01)
    coefficient.update(1e6, 64)
    assert coefficient.value == 0.01


def test_a_coefficient_is_steered_to_its_target():
    """KL twice the target: the error is clipped at 0.2; 500 of 10,000 responses."""
    coefficient = KLCoefficient(0.05, target=6, horizon=10_000)
    coefficient.update(12, 500)
    assert coefficient.value == pytest.approx(0.05 * (1 + 0.2 * 0.05))
    coefficient.update(5.4, 500)  # a tenth below
    assert coefficient.value == pytest.approx(0.05 * 1.01 * (1 - 0.1 * 0.05))
    coefficient = KLCoefficient(0.05, target=6, horizon=10)
    coefficient.update(0, 512)  # more responses than the horizon: a fifth, not below 0
    assert coefficient.value == pytest.approx(0.05 * 0.8)


@given(st.floats(0, 1e6), st.integers(1, 5000))
def test_a_coefficient_stays_positive_and_moves_the_right_way(kl, responses):
    coefficient = KLCoefficient(0.1, target=6)
    coefficient.update(kl, responses)
    assert coefficient.value > 0
    assert (coefficient.value > 0.1) == (kl > 6) or math.isclose(coefficient.value, 0.1)


# --- a reward model on the policy's trunk

ASKED = [[{"role": "user", "content": text}] for text in ("go", "one, two", "zzz")]


@pytest.fixture
def rollout(tokenizer):
    """Given texts of several lengths: a random model's bytes are seldom valid text."""
    texts = ["yes", "one and two and three", "no, not at all"]
    return given_responses(tokenizer, ASKED, texts, max_new_tokens=16)


def on_trunk(rewards, actor, rollout) -> dict:
    tokens = {name: getattr(rollout, name) for name in TOKEN_FIELDS}
    with inference(actor):
        return rewards.read(actor.trunk_layers(rewards.trunk_layers, **tokens), tokens)


def test_scores_on_the_trunk_are_those_of_the_whole_reward_model(
    fp32, policy, reward_model, tokenizer, rollout
):
    actor = ActorCritic(policy, num_layers_unfrozen=1)
    rewards = RewardSum([reward_model], [tokenizer])
    rewards.share_trunk(actor.frozen_trunk)
    assert rewards.on_trunk[0].layers == 1
    told = rewards(None, rollout, on_trunk(rewards, actor, rollout))
    expected = score_responses(
        reward_model, tokenizer, rollout.prompts, rollout.texts, rollout.finished
    )
    assert retokenised(rollout, tokenizer) == []
    assert rollout.finished.tolist() == [True, False, True]
    assert expected.std() > 0.01
    assert torch.allclose(told, expected, atol=1e-5)


def test_a_response_that_reads_as_other_tokens_is_scored_from_its_text(
    fp32, policy, reward_model, tokenizer, rollout
):
    """As a policy that spells a word in pieces: here the text is swapped for another."""
    changed = copy.deepcopy(rollout)
    changed.texts[2] = "something else altogether"
    assert retokenised(changed, tokenizer) == [2]
    actor = ActorCritic(policy, num_layers_unfrozen=1)
    rewards = RewardSum([reward_model], [tokenizer])
    rewards.share_trunk(actor.frozen_trunk)
    told = rewards(None, changed, on_trunk(rewards, actor, changed))
    expected = score_responses(
        reward_model, tokenizer, changed.prompts, changed.texts, changed.finished
    )
    assert torch.allclose(told, expected, atol=1e-5)


def test_what_differs_below_is_not_shared(policy, reward_model, tokenizer):
    trunk = ActorCritic(policy, num_layers_unfrozen=1).frozen_trunk
    other_layer, other_config = copy.deepcopy(reward_model), copy.deepcopy(reward_model)
    with torch.no_grad():
        other_layer.base_model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    other_config.base_model.config.rms_norm_eps *= 2
    read_elsewhere = copy.deepcopy(reward_model)
    read_elsewhere.config.starling_score_position = "attention_mask"

    def words(prompts, completions):
        return [0.0 for _ in completions]

    models = [other_layer, other_config, read_elsewhere, words, reward_model]
    rewards = RewardSum(models, [tokenizer] * 5)
    rewards.share_trunk(trunk)
    assert list(rewards.on_trunk) == [4]
    rewards.share_trunk(None)  # a policy without a frozen trunk
    assert list(rewards.on_trunk) == [4]


def test_a_reward_model_without_a_list_of_layers_shares_none(policy, tokenizer):
    trunk = ActorCritic(policy, num_layers_unfrozen=1).frozen_trunk
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 259}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=1))
    rewards = RewardSum([model], [tokenizer])
    rewards.share_trunk(trunk)
    assert rewards.on_trunk == {}


def test_a_reward_model_in_its_wrapper_is_a_reward_model(
    fp32, reward_model, tokenizer, rollout
):
    config = LoraConfig(r=2, task_type="SEQ_CLS", init_lora_weights=False)
    wrapped = get_peft_model(reward_model, config)
    told = RewardSum([wrapped], [tokenizer])(None, rollout)
    texts = rollout.prompts, rollout.texts, rollout.finished
    assert torch.equal(told, score_responses(wrapped, tokenizer, *texts))
    with wrapped.disable_adapter():
        start = score_responses(wrapped, tokenizer, *texts)
    assert not torch.allclose(told, start, atol=1e-3)


def test_a_function_gets_lists_of_the_other_columns(rollout):
    prompts = Dataset.from_dict({"prompt": ASKED, "answer": ["a", "b", "c"]})

    def reward(prompts, completions, answer):
        assert type(answer) is list
        return [0.0] * len(answer + [])

    assert RewardSum(reward)(prompts, rollout).tolist() == [0, 0, 0]


def test_taps_are_taken_off_again(policy):
    trunk = ActorCritic(policy, num_layers_unfrozen=1).frozen_trunk
    ids = torch.arange(6)[None]
    with tapped(trunk, [1]) as states:
        last = trunk(ids).last_hidden_state
    assert torch.equal(states[1], last)
    kept = states[1]
    trunk(ids + 1)
    assert states[1] is kept


def test_layers_that_cannot_be_compared_are_not_shared(policy, reward_model):
    """Other parameters, another type, none at all (as ZeRO-3 leaves them): no error."""
    trunk = ActorCritic(policy, num_layers_unfrozen=1).frozen_trunk
    assert shared_layers(trunk, reward_model.base_model) == 1
    biased = copy.deepcopy(reward_model).base_model
    biased.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(1))
    assert shared_layers(trunk, biased) == 0
    assert shared_layers(trunk, copy.deepcopy(reward_model).base_model.double()) == 0
    for model in (policy.base_model, reward_model.base_model):
        for parameter in model.parameters():
            parameter.data = torch.empty(0)
    assert shared_layers(trunk, reward_model.base_model) == 0


# --- several rewards, and what is none


def shortness(prompts, completions, **columns):
    return [-float(len(completion[0]["content"])) for completion in completions]


def completed(rewards, policy, rollout):
    """Scores of the models whose lower layers are a fresh actor's, by their number."""
    actor = ActorCritic(policy, num_layers_unfrozen=1)
    rewards.share_trunk(actor.frozen_trunk)
    return on_trunk(rewards, actor, rollout)


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_a_function_and_a_lower_bound_are_told_apart_and_summed(
    fp32, policy, reward_model, tokenizer, toy_rankings, rollout, shared
):
    """The model read from texts or on the policy's trunk, the others as ever."""
    other = copy.deepcopy(reward_model)
    other.score.weight.data.mul_(-1)
    bound = PessimisticReward(other, tokenizer, beta=0.3).fit(toy_rankings, False)
    rewards = RewardSum(
        [reward_model, shortness, bound], [tokenizer, None, None], [1.0, 0.5, -2.0]
    )
    known = completed(rewards, policy, rollout) if shared else None
    assert not shared or list(known) == [0]
    asked = rollout.prompts, rollout.texts, rollout.finished
    model = score_responses(reward_model, tokenizer, *asked)
    short = -torch.tensor([float(len(text)) for text in rollout.texts])
    lower = bound.lower_bounds(*asked).float()
    assert rollout.finished.tolist() == [True, False, True]  # all but one told as ended
    assert torch.allclose(
        rewards(None, rollout, known), model + 0.5 * short - 2 * lower, atol=1e-4
    )
    told = {"0_LlamaForSequenceClassification": model, "1_shortness": short}
    told["2_pessimistic_reward"] = lower
    assert rewards.last_means == {
        f"rewards/{name}": pytest.approx(each.mean().item(), abs=1e-4)
        for name, each in told.items()
    }


@pytest.mark.parametrize("shared", [False, True])
def test_a_reward_model_that_says_nan_is_named_at_once(
    policy, reward_model, tokenizer, rollout, shared
):
    """Not when its NaN has come through running statistics to the loss."""
    reward_model.score.weight.data[0, 0] = math.nan
    rewards = RewardSum([shortness, reward_model], [None, tokenizer])
    known = completed(rewards, policy, rollout) if shared else None
    assert not shared or list(known) == [1]
    name = "rewards/1_LlamaForSequenceClassification"
    with pytest.raises(ValueError, match=f"{name} returned nan for sample 0.*weights"):
        rewards(None, rollout, known)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "judge returned None for 3 samples: .* list .*`return` missing"),
        (0.5, r"judge returned 0.5 for 3 samples: .* list of one number for each$"),
        (torch.tensor(0.5), "judge returned 0.5 for 3 samples: .* list"),
        (["1", "a", "b"], "judge returned 'a' for sample 1: prompt 'one, two'.*finite"),
        ([1.0, [2.0], 3.0], r"judge returned \[2.0\] for sample 1"),
        ([1.0, 2.0, 1e39], r"judge returned 1e\+39 for sample 2.*float32"),
        (torch.tensor([1.0, math.nan, 2.0]), "judge returned nan for sample 1"),
        (torch.zeros(3, 2), "judge returned .* for sample 0"),
    ],
    ids=str,
)
def test_what_is_no_reward_is_named_with_the_function(rollout, values, message):
    with pytest.raises(ValueError, match=message):
        checked_scores(values, rollout, "judge")


def test_numbers_of_every_kind_are_rewards(rollout):
    kinds = [[1, True, np.float64(1)], torch.ones(3, 1), np.ones(3, dtype=int)]
    for values in (*kinds, (x for x in (1, 1, 1)), ("1", "1.0", 1.0)):
        found = checked_scores(values, rollout, "judge")
        assert found.tolist() == [1, 1, 1] and found.dtype == torch.float32


def test_any_sequence_of_functions_is_several_rewards(rollout):
    def one(completions, **columns):
        return [1.0] * len(completions)

    assert RewardSum((shortness, one))(None, rollout).tolist() == [
        1.0 - len(text) for text in rollout.texts
    ]


@pytest.mark.parametrize("functions", ["a/folder", ["a/folder"], None, (shortness, 3)])
def test_what_cannot_be_called_is_refused_before_any_sampling(functions):
    with pytest.raises(TypeError, match="reward function [01] is .*load_reward_model"):
        RewardSum(functions)
