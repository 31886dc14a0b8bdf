"""Plans against real models: parameters on the meta device, what autograd keeps, peaks.

Run as a program, `python test_planner.py reward FOLDER` trains and prints its peak.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
)

from starling_lib import generation, planner, plots, rollouts, vocabulary
from starling_lib.__main__ import main
from starling_lib.actor_critic import ActorCritic
from starling_lib.command_recipes import (
    APARecipe,
    BenchJudgeRecipe,
    LabelRecipe,
    PlanRecipe,
    RewardRecipe,
)
from starling_lib.models import ValueHead, tiny_model
from starling_lib.planner import (
    GIB,
    Load,
    Shape,
    activation_bytes,
    apa_memory,
    beside_policy,
    fits,
    generation_flops,
    hours,
    judging_cost,
    layer_bytes,
    sampling_memory,
    training_flops,
    training_memory,
)
from starling_lib.prefix import RankingScorer, pack_ranking, stack_rankings
from starling_lib.recipe_files import RecipeError
from starling_lib.run_plans import (
    KNOWN_SHAPES,
    Machine,
    Texts,
    bundled_plans,
    count_prompts,
    plan_policy,
    plan_recipe,
    plan_text,
    read_plan,
)
from starling_lib.trunk import freeze_below

CONFIGS = {
    "Llama-2-7B": LlamaConfig(),  # its sizes are the class's defaults
    "OpenChat 3.5": MistralConfig(vocab_size=32002),
    "SmolLM2-135M": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
}
SMALL = Shape.of(CONFIGS["SmolLM2-135M"])


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model(name):
    config = CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        reward = AutoModelForSequenceClassification.from_config(config)
    shape = Shape.of(config)
    assert shape.parameters == count(model.parameters())
    assert shape.trunk_parameters == count(reward.base_model.parameters())
    freeze_below(model, 4)
    last = [p for p in model.parameters() if p.requires_grad]
    assert shape.trained(4, head=True) == count(last)
    head = dataclasses.replace(shape, hidden=8).value_head_parameters
    assert head == count(ValueHead(8).parameters())
    assert shape.trained(None, head=True) == shape.parameters
    assert shape.trained(None, head=False) == shape.trunk_parameters


def test_training_all_of_a_policy_takes_sixteen_bytes_a_parameter_and_the_copies():
    memory = training_memory(SMALL, Load(tokens=0))
    assert memory["weights"] == memory["gradients"] == 4 * SMALL.parameters
    assert memory["optimiser"] == 8 * SMALL.parameters
    copied = 30 * SMALL.layer_parameters + SMALL.embedding_parameters
    assert memory["working copies"] == 2 * copied
    assert memory["activations"] == memory["logits"] == 0
    plain = training_memory(SMALL, Load(tokens=0, bytes_compute=4))
    assert sum(plain.values()) == 16 * SMALL.parameters


@pytest.mark.parametrize("number_format", [2, 4])
def test_on_a_cpu_a_copy_of_the_weights_samples(number_format):
    """A bf16 copy and that arranged (`arranged`), or float32 weights arranged.

    A GPU needs none of them.
    """
    load = Load(tokens=0, bytes_compute=number_format, on_cpu=True)
    memory = sampling_memory(SMALL, SMALL, load, rows=8, prompt=10, response=30)
    assert memory["working copies"] == 4 * SMALL.parameters
    gpu = dataclasses.replace(load, on_cpu=False)
    there = sampling_memory(SMALL, SMALL, gpu, rows=8, prompt=10, response=30)
    assert there["working copies"] != memory["working copies"]


@pytest.mark.parametrize(
    ("sharding", "bytes_a_parameter"),
    [
        ("none", 4 + 2 * 4 + 8),  # DDP's buckets are gradients once more
        ("zero1", 2 + 2 + 12 / 8),
        ("zero2", 2 + 2 / 8 + 12 / 8),
        ("zero3", 16 / 8),
        ("fsdp2", 16 / 8),
    ],
)
def test_sharding_splits_its_own_parts_over_the_devices(sharding, bytes_a_parameter):
    """ZeRO's paper, §3: 16 bytes a parameter, of which each stage splits more."""
    memory = training_memory(SMALL, Load(tokens=0, sharding=sharding, devices=8))
    state = sum(memory[name] for name in ("weights", "gradients", "optimiser"))
    assert state == bytes_a_parameter * SMALL.parameters
    gathered = memory["working copies"] - (
        0 if sharding.startswith("zero") else 2 * SMALL.parameters
    )
    whole = sharding in ("zero3", "fsdp2")
    assert (gathered > SMALL.layer_parameters) == whole


def test_activations_are_a_sum_over_trained_layers_and_tokens():
    load = Load(tokens=100, keys=100)
    norm = 8 * 100 * 576
    one = activation_bytes(SMALL, dataclasses.replace(load, trained_layers=1)) - norm
    assert activation_bytes(SMALL, load) == 30 * one + norm
    twice = dataclasses.replace(load, tokens=200, keys=200)
    assert activation_bytes(SMALL, twice) == 2 * activation_bytes(SMALL, load)
    held = activation_bytes(SMALL, dataclasses.replace(load, checkpointing=True))
    assert held == one + norm + 30 * 100 * 576 * 4


# --- against what autograd keeps


def kept_for_backward(run, module) -> int:
    """Bytes of the distinct storages that `run` keeps, without the module's own."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    del out
    return sum(s.nbytes() for place, s in kept.items() if place not in own)


WAYS = {"fp32": 4, "bf16": 2}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_ranking_keeps_is_what_is_planned(way):
    """Two layers of SmolLM2's shape against one: the layer alone."""
    rows, prompt, response, k = 2, 40, 30, 7
    packed = pack_ranking([1] * prompt, [[1] * response] * k)
    batch = stack_rankings([packed] * rows, 0)
    sizes = []
    for trained in (1, 2):
        model = AutoModelForSequenceClassification.from_config(layers_of_small(3))
        freeze_below(model, trained)
        scorer = RankingScorer(model)

        def run(scorer=scorer):
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
                return scorer(**batch)

        sizes.append(kept_for_backward(run, scorer))
    load = Load.of_rankings(
        *(rows, prompt, response, k), bytes_compute=WAYS[way], on_cpu=True
    )
    planned = layer_bytes(SMALL, load)
    planned += SMALL.layer_parameters * 2 if way == "bf16" else 0  # autocast's copies
    assert sizes[1] - sizes[0] == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_policy_keeps_is_what_is_planned(way, separate, checkpointing):
    rows, prompt, response = 4, 20, 30
    ones = torch.ones(rows, prompt + response, dtype=torch.long)
    mask = ones.bool()
    tokens = {
        "prompt_ids": ones[:, :prompt],
        "prompt_mask": mask[:, :prompt],
        "response_ids": ones[:, prompt:],
        "response_mask": mask[:, prompt:],
    }
    policy = AutoModelForCausalLM.from_config(layers_of_small(3))
    model = ActorCritic(policy, num_layers_unfrozen=2, separate=separate).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    shape = Shape.of(policy.config)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
            return model(**tokens)

    load = Load.of_responses(
        *(rows, prompt, response),
        trained_layers=2,
        bytes_compute=WAYS[way],
        on_cpu=True,
        separate_critic=separate,
        checkpointing=checkpointing,
    )
    memory = training_memory(shape, load)
    # Of what the head needs, autograd keeps the slope of each token.
    planned = memory["activations"] + 4 * rows * response * shape.hidden
    planned += 4 * rows * response * 3 * shape.hidden  # the critic's head: input, inner
    if checkpointing:  # the layer that is whole is so in the backward pass
        planned -= layer_bytes(shape, load)
    else:  # the frozen states, which begin each stack, are no norm's to keep
        states = 4 * rows * (prompt + response) * shape.hidden
        planned += memory["working copies"] - load.tops * states
    assert kept_for_backward(run, model) == pytest.approx(planned, rel=0.02)


def layers_of_small(layers: int) -> LlamaConfig:
    """SmolLM2's shape with few layers and a small vocabulary."""
    config = CONFIGS["SmolLM2-135M"].to_dict()
    changes = {"num_hidden_layers": layers, "vocab_size": 1000, "num_labels": 1}
    return LlamaConfig(**{**config, **changes, "pad_token_id": 0})


# --- what stands beside


def test_beside_a_policy_stand_reference_critic_reward_model_and_trunk_states():
    state = {"trained_layers": 4, "bytes_compute": 4}
    load = Load.of_responses(8, 100, 50, **state)
    rollout = {"rows": 64, "tokens": 150}
    memory = apa_memory(SMALL, SMALL, load, rollout=rollout)
    four, head = 4 * SMALL.layer_parameters + 576, 2 * 576**2 + 4 * 576 + 1
    assert memory["reference"] == 4 * four
    assert memory["critic"] == 12 * head  # its gradients are with the policy's
    assert memory["gradients"] == 4 * (four + head)
    assert memory["reward model"] == 4 * (SMALL.trunk_parameters + 576)
    assert memory["trunk states"] == (64 + 8) * 150 * 576 * 4
    assert memory["logits"] == 8 * 50 * 4 * (2 * 2048 + 3 * 576)
    whole = apa_memory(SMALL, SMALL, dataclasses.replace(load, trained_layers=None))
    assert whole["logits"] == 8 * 50 * 49152 * 16
    separate = dataclasses.replace(load, separate_critic=True)
    critic = apa_memory(SMALL, SMALL, separate)
    assert critic["critic"] == 12 * (head + four) and "trunk states" not in critic
    assert critic["gradients"] == 4 * (2 * four + head)
    assert critic["activations"] == 2 * memory["activations"]
    assert sampling_memory(SMALL, SMALL, separate, 8, 10, 30)["gradients"] == 0


def test_a_separate_critic_is_cast_and_computed_again_as_the_policy_is():
    load = Load.of_responses(8, 100, 50, trained_layers=4)
    separate = dataclasses.replace(load, separate_critic=True)
    plain, critic = (apa_memory(SMALL, SMALL, x) for x in (load, separate))
    copies = critic["working copies"] - plain["working copies"]
    assert copies == 4 * SMALL.layer_parameters * 2
    again = [dataclasses.replace(x, checkpointing=True) for x in (load, separate)]
    held = [activation_bytes(SMALL, x) for x in again]
    assert held[1] - held[0] == 8 * 150 * 576 * (4 * 4 + 2 * 4)  # inputs and a norm


@pytest.mark.parametrize(
    ("sharding", "bytes_a_parameter"),
    [
        *(("none", 4 + 8), ("zero1", 2 + 12 / 8), ("zero2", 2 + 12 / 8)),
        *(("zero3", 14 / 8), ("fsdp2", 12 / 8)),
    ],
)
def test_a_critic_is_split_as_the_policy_is(sharding, bytes_a_parameter):
    state = {"trained_layers": 4, "separate_critic": True, "devices": 8}
    memory = apa_memory(SMALL, SMALL, Load(tokens=0, sharding=sharding, **state))
    parameters = 2 * 576**2 + 4 * 576 + 1 + 4 * SMALL.layer_parameters + 576
    assert memory["critic"] == bytes_a_parameter * parameters


def test_the_reference_copies_a_head_that_trains():
    shape = Shape.of(CONFIGS["OpenChat 3.5"])
    load = Load.of_responses(1, 10, 10, trained_layers=4)
    beside = beside_policy(shape, shape, load)
    assert beside["reference"] == 4 * shape.trained(4, head=True)


def test_the_cache_grows_with_rows_tokens_and_key_heads():
    load = Load.of_responses(1, 10, 10, trained_layers=4, bytes_compute=4)
    memory = sampling_memory(SMALL, SMALL, load, rows=8, prompt=10, response=30)
    assert memory["key-value cache"] == 8 * 40 * 30 * 2 * 192 * 4
    assert memory["gradients"] == 0 and "activations" not in memory
    assert memory["trunk states"] == 3 * 8 * 40 * 576 * 4
    whole = dataclasses.replace(load, trained_layers=None)
    assert "trunk states" not in sampling_memory(SMALL, SMALL, whole, 8, 10, 30)
    windowed = dataclasses.replace(SMALL, windowed=True)
    assert "trunk states" not in sampling_memory(windowed, SMALL, load, 8, 10, 30)
    reading = sampling_memory(SMALL, SMALL, load, rows=8, prompt=50, response=1)
    assert reading["key-value cache"] == 2 * 8 * 50 * 30 * 2 * 192 * 4


@pytest.mark.parametrize(("on_cpu", "key"), [(True, 2), (False, 4)])
def test_keys_are_float32_only_where_autocast_casts(on_cpu, key):
    load = Load.of_responses(1, 10, 10, trained_layers=4, on_cpu=on_cpu)
    memory = sampling_memory(SMALL, SMALL, load, rows=8, prompt=10, response=30)
    assert memory["key-value cache"] == 8 * 40 * 30 * 192 * (key + 2)
    assert ("trunk states" in memory) == (not on_cpu)


def test_the_keys_of_the_copy_that_samples_are_as_it_computes(
    policy, tokenizer, monkeypatch
):
    read, seen = generation.read_prompts, []

    def note(*arguments):
        cache = read(*arguments)
        seen.extend({cache.layers[0].keys.dtype, cache.layers[0].values.dtype})
        return cache

    monkeypatch.setattr(generation, "read_prompts", note)
    for way, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        monkeypatch.setenv("STARLING_PRECISION", way)
        asked = [[{"role": "user", "content": "to be"}]]
        rollouts.sample(policy, tokenizer, asked, max_new_tokens=1)
        assert seen == [dtype]
        seen.clear()


def test_flops_by_hand():
    layer, load = SMALL.layer_parameters, Load(tokens=10)
    assert training_flops(SMALL, load, head=False) == 10 * 30 * 6 * layer
    four = dataclasses.replace(load, trained_layers=4)
    assert training_flops(SMALL, four, head=False) == 10 * layer * (4 * 6 + 26 * 2)
    again = dataclasses.replace(load, checkpointing=True)
    assert training_flops(SMALL, again, head=False) == 10 * 30 * 8 * layer
    logits = dataclasses.replace(load, response_tokens=5)
    extra = training_flops(SMALL, logits) - training_flops(SMALL, load)
    assert extra == 5 * 6 * 49152 * 576
    critic = dataclasses.replace(four, separate_critic=True)
    copied = training_flops(SMALL, critic) - training_flops(SMALL, four)
    assert copied == 10 * 4 * 6 * layer
    sampled = generation_flops(SMALL, rows=2, prompt=7, response=3)
    assert sampled == 2 * 2 * (10 * 30 * layer + 3 * 49152 * 576)


@pytest.mark.parametrize(("trained_layers", "each"), [(None, 6), (2, 4)])
def test_flops_of_the_head_are_those_that_torch_counts(trained_layers, each):
    """Of a frozen one logits and slopes, two products; of one that trains three."""
    tokens, words, hidden = 5, 3000, 16
    head = torch.nn.Linear(hidden, words, bias=False)
    head.requires_grad_(trained_layers is None)
    states = torch.randn(tokens, hidden, requires_grad=True)
    ids = torch.arange(tokens)
    with FlopCounterMode(display=False) as counted:
        chosen, _ = rollouts.word_logprobs(head, LlamaConfig(), states, ids)
        chosen.sum().backward()
    shape = dataclasses.replace(SMALL, vocabulary=words, hidden=hidden)
    load = Load(tokens=0, response_tokens=tokens, trained_layers=trained_layers)
    planned = training_flops(shape, load)
    assert planned == counted.get_total_flops() == tokens * each * words * hidden


def test_hours_and_money():
    assert hours(3600e12, devices=1, tflops=1, utilisation=0.5) == 2
    assert hours(3600e12, devices=8, tflops=1, utilisation=0.5) == 0.25
    # 182,954 rankings by a judge at 30 and 60 dollars a million tokens
    assert judging_cost(1000, 3000, 700, (30, 60)) == pytest.approx(132)


def test_the_pieces_of_the_vocabulary_are_those_that_pass():
    assert planner._WORDS == vocabulary.WORDS


def test_what_fits():
    assert fits({"weights": 40 * GIB}, 80) == 50
    assert fits({"weights": 80 * GIB, "logits": 1}, 80) == 101


def test_sharding_must_be_known():
    with pytest.raises(
        ValueError, match="choose from none, zero1, zero2, zero3, fsdp2"
    ):
        training_memory(SMALL, Load(1, sharding="zero4"))


# --- recipes

# Starling's reward model: ZeRO-1 on 2 × 8 devices. Which devices, and how many the policy
# had, was not reported.
RELEASED = ["devices=16", "gib=80"]
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")


def planned(name, *overrides):
    """The plans of a recipe."""
    wanted, recipes = read_plan(name, overrides)
    return [plan_recipe(recipe, wanted) for recipe in recipes]


def test_the_shapes_that_are_known_are_those_of_the_models():
    for name, known in (
        ("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7B"),
        ("openchat/openchat_3.5", "OpenChat 3.5"),
        ("smollm2-135m", "SmolLM2-135M"),
    ):
        assert KNOWN_SHAPES[name] == Shape.of(CONFIGS[known])
    assert KNOWN_SHAPES["tiny"] == Shape.of(tiny_model().config)
    assert KNOWN_SHAPES["01-ai/Yi-34B-Chat"].parameters == 34_388_917_248


def test_the_reward_model_needed_the_sharding_that_the_original_used():
    (plan,) = planned("starling_7b/reward", *RELEASED)
    assert plan.command == "reward" and plan.parameters["trained"] > 6.6e9
    assert not plan.fits("none") and plan.fits("zero1") and plan.fits("fsdp2")
    assert plan.figures["prompts a step"] == 320
    assert plan.figures["steps"] == pytest.approx(565, abs=1)
    whole = sum(plan.memory["zero1"].values())
    assert whole > sum(plan.memory["zero2"].values()) > plan.with_mean_rows["zero2"]
    (small,) = planned("starling_7b/reward", "devices=16", "gib=24")
    assert not small.fits("zero1")


def test_the_policy_fits_whole_where_few_responses_are_sampled_at_once():
    (plan,) = planned("starling_7b/apa", "devices=8")
    assert plan.subject.endswith("meta-llama/Llama-2-7b-chat-hf") and plan.fits("none")
    more = ["trainer.generation_batch_size=null"]  # all 64
    (whole,) = planned("starling_7b/apa", "devices=8", *more)
    assert whole.moments["none"] == "sampling" and not whole.fits("none")
    assert whole.with_mean_rows["none"] < 80 * GIB
    assert plan.figures["hours of sampling"] > whole.figures["hours of sampling"]
    assert plan.figures["steps"] == 20_000
    assert plan.figures["responses a step"] == 8 * 64 / 32


def flops_of_an_iteration(
    policy=KNOWN_SHAPES["tiny"], on_cpu=False, **trainer
) -> float:
    """Of 8 responses, 10 + 6 tokens, in 2 updates of 4; one of the layers trains."""
    # Not above: `measure` counts what this loads.
    from starling_lib.training_runs import policy_arguments

    trainer |= {"num_layers_unfrozen": 1, "rollout_batch_size": 8, "max_steps": 2}
    trainer |= {"per_device_train_batch_size": 4, "num_epochs_per_rollout": 1}
    args = policy_arguments(APARecipe("o", "tiny", "tiny", trainer=trainer))
    texts, reward = Texts(8, prompt=10, response=6), KNOWN_SHAPES["tiny"]
    plan = plan_policy(args, policy, reward, texts, Machine(on_cpu=on_cpu))
    return 2 * plan.figures["FLOPs a step"]


def test_flops_of_an_iteration_by_hand():
    """Sampling in two layers keeps what the first gave: then only the second runs."""
    tiny = KNOWN_SHAPES["tiny"]
    layer, words, tokens = tiny.layer_parameters, 259 * 64, 8 * 16
    sampled = tokens * 2 * 2 * layer + 8 * 6 * 2 * words
    scored = tokens * 2 * (2 + 2) * layer + 8 * 6 * 2 * 2 * words  # and reward model
    updated = tokens * 6 * layer + 8 * 6 * 4 * words
    by_hand = sampled + scored + updated
    assert flops_of_an_iteration(bf16=True) == by_hand
    assert flops_of_an_iteration(bf16=False, on_cpu=True) == by_hand
    below = tokens * 2 * layer  # once more where its states were not kept
    assert flops_of_an_iteration(bf16=True, on_cpu=True) == by_hand + below
    windowed = dataclasses.replace(tiny, windowed=True)
    assert flops_of_an_iteration(windowed, bf16=True) == by_hand + below
    critic = flops_of_an_iteration(bf16=True, separate_value_model=True)
    assert critic == by_hand + tokens * (2 + 6) * layer


def test_a_plan_of_judging_is_calls_tokens_and_dollars():
    (plan,) = planned("starling_7b/label", "rows=1000", "passes=2")
    assert plan.figures["calls"] == 2000 and plan.figures["reply tokens"] == 1.4e6
    shown = plan.figures["prompt tokens"] / 2000
    assert 1530 + 400 < shown < 1530 + 700
    cost = (2000 * shown * 30 + 1.4e6 * 60) / 1e6
    assert plan.figures["dollars"] == pytest.approx(cost)
    (plan,) = planned("starling_7b/judge")
    assert plan.figures["calls"] == 2 * 80 * 2
    (pairs,) = planned("starling_7b/judge", "pairs=true", "answerers=3")
    assert pairs.figures["calls"] == 3 * 160 + 2 * 3 * 160
    replayed = BenchJudgeRecipe("b", replies="log.jsonl")
    assert plan_recipe(replayed).figures["calls"] == 0


def test_a_preset_is_planned_stage_by_stage():
    reward, policy = planned("tiny", "devices=1")
    assert (reward.command, policy.command) == ("reward", "apa")
    assert list(reward.memory) == ["none"] and reward.fits("none")
    (only,) = planned("tiny", "command=apa", "dollars_an_hour=2")
    assert only.memory == policy.memory
    assert only.figures["dollars"] == 2 * only.figures["hours"]


def test_prompts_are_counted_where_they_can_be():
    recipe = RewardRecipe("o", "tiny", "berkeley-nest/Nectar", split="train[:-2000]")
    assert count_prompts(recipe) == 180_954
    assert count_prompts(dataclasses.replace(recipe, rows=7)) == 7
    assert count_prompts(RewardRecipe("o", "tiny")) == 203
    assert count_prompts(LabelRecipe("o", split="train+test")) == 240
    for recipe, rows in ((RewardRecipe, 10), (APARecipe, 10), (LabelRecipe, 20)):
        names = [] if recipe is LabelRecipe else ["tiny"] * (1 + (recipe is APARecipe))
        assert count_prompts(recipe("o", *names, split="train+test", rows=10)) == rows
    with pytest.raises(RecipeError, match="prompts: how many me/own has in train is"):
        count_prompts(RewardRecipe("o", "tiny", "me/own"))
    with pytest.raises(RecipeError, match="split: cannot read 'train-2024'; write a"):
        count_prompts(RewardRecipe("o", "tiny", split="train+train-2024"))


def test_a_saved_model_is_as_good_as_a_known_one(tmp_path, policy):
    policy.save_pretrained(tmp_path / "policy")
    name = str(tmp_path / "policy")
    recipe = APARecipe("o", name, name, trainer={"max_steps": 32})
    known = APARecipe("o", "tiny", "tiny", trainer={"max_steps": 32})
    assert plan_recipe(recipe).memory == plan_recipe(known).memory


# --- the command


def test_the_command_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = ["starling_7b/reward", *RELEASED, f"output={file}"]
    assert main(["plan", *arguments, "sharding=zero1"]) == 0
    said = capsys.readouterr().out
    for text in ("in 80 GiB", "fits", "FLOPs a step", "zero1", "optimiser"):
        assert text in said
    assert "zero3" not in said and "nan" not in said
    (kept,) = json.loads(file.read_text())
    assert kept["fits"] == {"zero1": True}
    assert kept["memory"]["zero1"]["weights"] == pytest.approx(2 * 6_607_343_616)


def test_a_file_is_recognised_by_its_keys(tmp_path):
    for text, kind in (
        ("model: tiny\noutput_dir: o", RewardRecipe),
        ("model: tiny\noutput_dir: o\nreward_model: tiny", APARecipe),
        ("output_dir: o\npasses: 2", LabelRecipe),
        ("folder: b\npairs: true", BenchJudgeRecipe),
    ):
        (tmp_path / "one.yaml").write_text(text + "\ndevices: 8")
        wanted, (recipe,) = read_plan(str(tmp_path / "one.yaml"))
        assert isinstance(recipe, kind) and wanted.devices == 8
    _, (recipe,) = read_plan(None, ["folder=b", "judge.model=m"])
    assert recipe.judge.model == "m"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["starling_7b/apa", "devics=8"],
            "devics: no such key; did you mean 'devices'",
        ),
        (["starling_7b/apa", "modell=x"], "modell: no such key; did you mean 'model'"),
        (["starling_7b/apa", "devices=0"], "devices: must be above 0"),
        (["starling_7b/apa", "sharding=zero"], "sharding: no 'zero'; choose from none"),
        (["starling_7b/apa", "device=tpu"], "device: no 'tpu'; choose from gpu, cpu"),
        (["starling_7b/apa", "lora.r=8"], "lora: adapters are not planned"),
        (["starling_7b/apa", "command=ap"], "command: no 'ap'; choose from label"),
        (["starling_7b/ap"], "no recipe at starling_7b/ap; bundled are small, tiny"),
        (["rows=3"], "keys rows are those of no recipe"),
        (["command=reward", "output_dir=o"], "as a recipe of reward: model: missing"),
        (
            ["starling_7b/apa", "reward_model=me"],
            "reward_shape: no reward model in me yet",
        ),
        (["starling_7b/reward", "trainer.max_length=0"], "max_length=0 sets no limit"),
    ],
)
def test_mistakes_are_named(capsys, arguments, message):
    assert main(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_an_unknown_model_offline_says_what_is_known(monkeypatch, capsys):
    def unreachable(name):
        raise OSError("we could not connect")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    assert main(["plan", "starling_7b/reward", "model=me/own"]) == 1
    said = capsys.readouterr().err
    assert "model: the shape of me/own is neither known here (openchat/" in said
    assert "we could not connect" in said


def test_every_bundled_recipe_has_a_plan():
    for name in bundled_plans():
        for plan in planned(name):
            assert plan_text(plan).startswith(f"{plan.command}: ")


# --- the picture


def test_the_picture_stacks_every_part_to_the_total():
    (plan,) = planned("starling_7b/reward", *RELEASED)
    (ax,) = plots.memory_plan(plan.memory, plan.machine.gib).axes
    tops = {}
    for bar in ax.patches:
        place = round(bar.get_y() + bar.get_height() / 2)
        tops[place] = max(tops.get(place, 0), bar.get_x() + bar.get_width())
    totals = [sum(parts.values()) / GIB for parts in plan.memory.values()]
    assert [tops[i] for i in range(len(totals))] == pytest.approx(totals[::-1])
    limit = [line for line in ax.lines if set(line.get_xdata()) == {80}]
    assert len(limit) == 1
    styles = [(b[0].get_facecolor(), b[0].get_hatch()) for b in ax.containers]
    assert len(set(styles)) == len(styles) == len(plan.memory["none"])


# --- against the peak of a process


def recipe_of(kind: str, folder: str) -> RewardRecipe | APARecipe:
    """SmolLM2's last four layers, two steps, so that the optimiser's state is there."""
    trainer = {"num_layers_unfrozen": 4, "max_steps": 2, "save_strategy": "no"}
    if kind == "reward":
        trainer |= {"max_length": 256, "per_device_train_batch_size": 2}
        return RewardRecipe(folder, "smollm2-135m", trainer=trainer)
    trainer |= {"max_prompt_length": 208, "max_new_tokens": 48, "rollout_batch_size": 8}
    trainer |= {"per_device_train_batch_size": 8, "num_epochs_per_rollout": 2}
    return APARecipe(folder, "smollm2-135m", "smollm2-135m", trainer=trainer)


def measure(kind: str, folder: str) -> None:
    """Train on rows as long as the recipe lets through; print bytes above the start."""
    from datasets import Dataset

    from starling_lib.apa import APATrainer
    from starling_lib.models import load_policy, load_reward_model, load_tokenizer
    from starling_lib.reward import KwiseRewardTrainer
    from starling_lib.training_runs import policy_arguments, reward_arguments

    def peak() -> int:
        # Not `ru_maxrss`, which starts at what the process that started this one held.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    start, recipe = peak(), recipe_of(kind, folder)
    tokenizer = load_tokenizer("smollm2-135m")
    scorer = load_reward_model("smollm2-135m", tokenizer)
    if kind == "reward":
        text = "to be or not to be " * 100
        row = {"responses": [f"{j} {text}" for j in range(7)]}
        row["prompt"] = [{"role": "user", "content": text}]
        trainer = KwiseRewardTrainer(
            *(scorer, reward_arguments(recipe), Dataset.from_list([row] * 4)),
            processing_class=tokenizer,
        )
    else:
        own = load_tokenizer("smollm2-135m")
        own.eos_token = "<repo_name>"  # never sampled: responses run to their limit
        words = "to be or not to be " * 29
        prompts = [[{"role": "user", "content": words + "to " * i}] for i in range(4)]
        trainer = APATrainer(
            *(load_policy("smollm2-135m"), scorer, policy_arguments(recipe)),
            Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=own,
            reward_processing_classes=[tokenizer],
        )
    trainer.train()
    print("peak", peak() - start)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's KiB of memory")
@pytest.mark.parametrize("kind", ["reward", "apa"])
def test_the_peak_of_a_process_is_the_planned_one(kind, tmp_path, fp32):
    """Within 15 %; the reward model was measured 4 % below its plan.

    Freed memory goes back to the system at once (MALLOC_MMAP_THRESHOLD_): the C library
    otherwise keeps pieces of it, and the same process showed 16 % above the plan.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1])}
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
    command = [sys.executable, __file__, kind, str(tmp_path)]
    said = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    measured = int(said.split("peak ")[1])
    wanted = PlanRecipe(device="cpu", tflops=0.1, prompts=4)
    (memory,) = plan_recipe(recipe_of(kind, "o"), wanted).memory.values()
    assert sum(memory.values()) == pytest.approx(measured, rel=0.15)


if __name__ == "__main__":
    measure(*sys.argv[1:])
