"""Halves of a trunk against the whole, adapters, and the cache of hidden states."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel

from starling_lib import trunk
from starling_lib.apa import ActorCritic
from starling_lib.models import tiny_model
from starling_lib.prefix import RankingScorer, pack_ranking, stack_rankings
from starling_lib.trunk import (
    TrunkCache,
    add_adapters,
    freeze_below,
    split_trunk,
    trunk_digest,
    try_split_trunk,
)
from tests.conftest import mistral

pytestmark = pytest.mark.usefixtures("fp32")


# --- freezing


def test_a_model_without_a_list_of_layers_is_trained_whole():
    """GPT-2 calls its layers otherwise; asked for all of them, that does not matter."""
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 9}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    assert freeze_below(model, None) == 0
    assert all(p.requires_grad for p in model.parameters())
    assert try_split_trunk(model, None) is None
    with pytest.warns(UserWarning, match="no frozen-trunk split"):
        assert try_split_trunk(model, 1) is None


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
    half = trunk._half

    def forgetful(*args, **kwargs):
        made = half(*args, **kwargs)
        made.config.sliding_window = None
        return made

    monkeypatch.setattr(trunk, "_half", forgetful)
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


# --- adapters

LORA = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", init_lora_weights=False)


def test_adapters_stand_in_the_last_layers_only(policy):
    ids = torch.tensor([[5, 6, 7]])
    whole = policy(ids).logits
    wrapped = add_adapters(policy, LORA, num_layers_unfrozen=1)
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert trained and all("layers.1." in n and "lora" in n for n in trained)
    assert LORA.layers_to_transform is None  # the caller's config is left alone
    assert not torch.allclose(policy(ids).logits, whole)  # the same object, adapted
    assert torch.equal(policy(ids).logits, wrapped(ids).logits)
    assert try_split_trunk(policy, 1) is not None


def test_adapters_below_the_split_switch_it_off(policy):
    add_adapters(policy, LORA)
    with pytest.warns(UserWarning, match="below the last 1 layers are trained"):
        assert try_split_trunk(policy, 1) is None


@pytest.mark.parametrize("layers", [0, 3, -1])
def test_adapters_check_the_range_of_layers(policy, layers):
    with pytest.raises(ValueError, match=f"={layers}: this model has 2 layers"):
        add_adapters(policy, LORA, layers)


def test_adapters_take_a_reward_models_head_along(reward_model):
    with pytest.raises(ValueError, match="task_type=CAUSAL_LM, .* head is neither"):
        add_adapters(reward_model, LORA)
    bare = LoraConfig(r=2)
    add_adapters(reward_model, bare)
    trained = [n for n, p in reward_model.named_parameters() if p.requires_grad]
    assert [n for n in trained if "lora" not in n] == [
        "score.modules_to_save.default.weight"
    ]
    assert bare.task_type is None  # the caller's config is left alone


# --- the cache

ROWS = [pack_ranking([5, 6, 7], [[8, 9], [10]]), pack_ranking([20], [[30] * 4, [31]])]


@pytest.fixture
def scorer(reward_model):
    freeze_below(reward_model, 1)
    return RankingScorer(reward_model, num_layers_unfrozen=1)


def test_scores_and_gradients_from_trunk_states_are_those_of_the_whole(scorer):
    batch = stack_rankings(ROWS, 0)
    whole = scorer(**batch)
    whole.sum().backward()
    expected = {n: p.grad for n, p in scorer.named_parameters() if p.requires_grad}
    scorer.zero_grad()
    states = scorer.trunk_states(**batch)
    assert states.shape == (6 + 6, scorer.config.hidden_size)
    halves = scorer(**batch, trunk_states=states)
    halves.sum().backward()
    assert torch.allclose(halves, whole, atol=1e-6)
    assert any("layers.1." in name for name in expected)
    for name, parameter in scorer.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


def test_the_cache_gives_back_each_rows_states(scorer, tmp_path):
    cache = TrunkCache(tmp_path, scorer.frozen_half)
    assert cache.get(ROWS[0]) is None
    states = scorer.trunk_states(**stack_rankings(ROWS, 0)).split([6, 6])
    for row, part in zip(ROWS, states, strict=True):
        cache.put(row, part)
    again = TrunkCache(tmp_path, scorer.frozen_half)
    assert torch.equal(again.get(ROWS[1]), states[1])
    assert torch.equal(again.get(ROWS[0]), states[0])
    # the same tokens cut otherwise are another row
    assert again.get(pack_ranking([5, 6], [[7, 8, 9], [10]])) is None


def test_other_weights_or_formats_have_their_own_cache(scorer, tmp_path):
    first = TrunkCache(tmp_path, scorer.frozen_half)
    first.put(ROWS[0], torch.zeros(6, 16))
    half = TrunkCache(tmp_path, scorer.frozen_half, number_format="bf16")
    assert half.get(ROWS[0]) is None
    assert TrunkCache(tmp_path, scorer.frozen_half).get(ROWS[0]) is not None
    with torch.no_grad():
        next(scorer.frozen_half.parameters())[0, 0] += 1
    assert TrunkCache(tmp_path, scorer.frozen_half).get(ROWS[0]) is None


def test_a_cache_above_the_limit_is_refused_with_its_size(scorer, tmp_path):
    cache = TrunkCache(tmp_path, scorer.frozen_half, max_gb=0.001)
    hidden = scorer.config.hidden_size
    tokens = int(0.001e9 / 4 / hidden)
    cache.check_size(tokens)
    with pytest.raises(ValueError, match=r"take 0\.0 GB.*trunk_cache_gb=0\.001"):
        cache.check_size(tokens + 1)


def test_a_kill_while_writing_leaves_no_file(scorer, tmp_path, monkeypatch):
    cache = TrunkCache(tmp_path, scorer.frozen_half)

    def torn(tensors, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(trunk, "save_file", torn)
    with pytest.raises(KeyboardInterrupt):
        cache.put(ROWS[0], torch.zeros(6, 16))
    assert cache.get(ROWS[0]) is None


def test_a_trunks_digest_tells_names_values_and_what_the_layers_do(scorer):
    lower = scorer.frozen_half
    first = trunk_digest(lower)
    assert trunk_digest(copy.deepcopy(lower)) == first
    other = copy.deepcopy(lower)
    next(other.parameters()).data[0, 0] += 1e-6
    assert trunk_digest(other) != first
    other = copy.deepcopy(lower)
    other.config.rms_norm_eps *= 2  # the same weights, other states
    assert trunk_digest(other) != first
    other = copy.deepcopy(lower)
    other.extra = torch.nn.Parameter(torch.zeros(0))
    assert trunk_digest(other) != first
