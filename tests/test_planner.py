"""Parameters against real models on the meta device; memory and FLOPs by hand."""

import dataclasses

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
)

from starling_lib.planner import (
    GIB,
    Load,
    Shape,
    activation_bytes,
    apa_memory,
    fits,
    generation_flops,
    hours,
    judging_cost,
    training_flops,
    training_memory,
)

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
    last = [*model.model.layers[-4:].parameters(), *model.model.norm.parameters()]
    assert shape.trained(4, head=True) == count(last)
    assert shape.trained(None, head=True) == shape.parameters
    assert shape.trained(None, head=False) == shape.trunk_parameters


def test_training_all_of_a_policy_takes_sixteen_bytes_a_parameter_and_the_copies():
    memory = training_memory(SMALL, Load(rows=1, tokens=0))
    assert memory["weights"] == memory["gradients"] == 4 * SMALL.parameters
    assert memory["optimiser"] == 8 * SMALL.parameters
    assert memory["autocast copies"] == 2 * SMALL.parameters
    assert memory["activations"] == memory["logits"] == 0
    plain = training_memory(SMALL, Load(rows=1, tokens=0, bytes_compute=4))
    assert sum(plain.values()) == 16 * SMALL.parameters


@pytest.mark.parametrize(
    ("sharding", "whole"),
    [
        ("none", {"weights", "gradients", "optimiser"}),
        ("zero1", {"weights", "gradients"}),
        ("zero2", {"weights"}),
        ("zero3", set()),
    ],
)
def test_sharding_splits_its_own_parts_over_the_devices(sharding, whole):
    alone = training_memory(SMALL, Load(rows=1, tokens=100))
    split = training_memory(SMALL, Load(1, 100, sharding=sharding, devices=8))
    for part, size in alone.items():
        state = part in ("weights", "gradients", "optimiser")
        assert split[part] == (size / 8 if state and part not in whole else size)


def test_activations_are_a_sum_over_trained_layers_and_tokens():
    load = Load(rows=1, tokens=100)
    one = activation_bytes(SMALL, dataclasses.replace(load, trained_layers=1))
    assert activation_bytes(SMALL, load) == 30 * one
    assert activation_bytes(SMALL, dataclasses.replace(load, tokens=200)) == 60 * one
    # Of a layer: 16 bytes · hidden in float32; in bf16 3·576 + 3·576 + 4·192 + 4·1536.
    assert one == 100 * (16 * 576 + 2 * (6 * 576 + 4 * 192 + 4 * 1536))
    held = activation_bytes(SMALL, dataclasses.replace(load, checkpointing=True))
    assert held == one + 30 * 100 * 576 * 2


def test_beside_a_policy_stand_reference_reward_model_and_trunk_states():
    load = Load(rows=8, tokens=1000, trained_layers=4, response_tokens=500)
    rollout = {"rows": 64, "tokens": 120}
    memory = apa_memory(SMALL, SMALL, load, rollout=rollout)
    four = 4 * SMALL.layer_parameters + 576
    assert memory["reference"] == 4 * four
    assert memory["reward model"] == 4 * SMALL.trunk_parameters
    assert memory["trunk states"] == 64 * 120 * 576 * 4
    assert memory["logits"] == 500 * 49152 * 10
    critic = apa_memory(SMALL, SMALL, load, separate_critic=True)
    assert critic["critic"] == 16 * four and "trunk states" not in critic


def test_flops_by_hand():
    layer, load = SMALL.layer_parameters, Load(rows=1, tokens=10)
    assert training_flops(SMALL, load, head=False) == 10 * 30 * 6 * layer
    four = dataclasses.replace(load, trained_layers=4)
    assert training_flops(SMALL, four, head=False) == 10 * layer * (4 * 6 + 26 * 2)
    again = dataclasses.replace(load, checkpointing=True)
    assert training_flops(SMALL, again, head=False) == 10 * 30 * 8 * layer
    logits = dataclasses.replace(load, response_tokens=5)
    extra = training_flops(SMALL, logits) - training_flops(SMALL, load)
    assert extra == 5 * 6 * 49152 * 576
    sampled = generation_flops(SMALL, rows=2, prompt=7, response=3)
    assert sampled == 2 * 2 * (10 * 30 * layer + 3 * 49152 * 576)


def test_hours_and_money():
    assert hours(3600e12, devices=1, tflops=1, utilisation=0.5) == 2
    assert hours(3600e12, devices=8, tflops=1, utilisation=0.5) == 0.25
    # 182,954 rankings by a judge at 30 and 60 dollars a million tokens
    assert judging_cost(1000, 3000, 700, (30, 60)) == pytest.approx(132)


def test_what_fits():
    assert fits({"weights": 40 * GIB}, 80) == 50
    assert fits({"weights": 80 * GIB, "logits": 1}, 80) == 101


def test_sharding_must_be_known():
    with pytest.raises(ValueError, match="choose from none, zero1, zero2, zero3"):
        training_memory(SMALL, Load(1, 1, sharding="zero4"))
