"""APA's trainer against loops over plain forwards; experience, resuming, errors."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoModelForCausalLM, TrainerCallback

from starling_lib.apa import (
    ActorCritic,
    APAConfig,
    APATrainer,
    PromptBlocks,
    RewardSum,
    checked_scores,
    drop_samples,
    fitting_prompts,
)
from starling_lib.checkpoints import MARKER, last_complete
from starling_lib.generation import left_pad
from starling_lib.models import ValueHead, tiny_model
from starling_lib.reward import score_responses
from starling_lib.rollouts import given_responses, sample, sequence_logprobs
from starling_lib.served_rollouts import REASONS

pytestmark = pytest.mark.usefixtures("fp32")

PROMPTS = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"{'z' * (i % 3)} go {i}"}],
            "number": i,
        }
        for i in range(12)
    ]
)
TOKENS = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")


def lower_case(prompts, completions, **columns):
    """Share of lower-case letters: easy to learn, far from constant."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c.islower() for c in text) / max(len(text), 1) for text in texts]


def config(folder, base="starling", **changes) -> APAConfig:
    arguments = {
        "output_dir": str(folder),
        "rollout_batch_size": 8,
        "per_device_train_batch_size": 4,
        "max_new_tokens": 6,
        "num_layers_unfrozen": 1,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "value_gate": None,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return getattr(APAConfig, base)(**{**arguments, **changes})


EXTRA = ("value_model", "eval_dataset", "peft_config", "model", "sampler")


def make_trainer(folder, tokenizer, reward=lower_case, prompts=PROMPTS, **changes):
    base = changes.pop("base", "starling")
    extra = {k: changes.pop(k) for k in EXTRA if k in changes}
    return APATrainer(
        extra.pop("model", None) or tiny_model(),
        reward,
        config(folder, base, **changes),
        prompts,
        processing_class=tokenizer,
        **extra,
    )


class OnFirstStep(TrainerCallback):
    """Keep the first gradient, and with it the experience it was made from."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            named = model.named_parameters()
            self.gradient = {n: p.grad.clone() for n, p in named if p.grad is not None}


class RateAt(TrainerCallback):
    """Another learning rate for the update after so many steps."""

    def __init__(self, step, rate):
        self.step, self.rate = step, rate

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        if state.global_step == self.step:
            for group in optimizer.param_groups:
                group["lr"] = self.rate


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


# --- what is optimised, from plain unpadded forwards


def row_outputs(policy, head, experience, row):
    """(T,) log-probabilities and values of one response, from a forward of its own."""
    prompt = experience["prompt_ids"][row][experience["prompt_mask"][row]]
    response = experience["response_ids"][row][experience["response_mask"][row]]
    ids = torch.cat([prompt, response])[None]
    states = policy.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
    logprobs = policy.lm_head(states).log_softmax(-1)
    return logprobs[torch.arange(len(response)), response], head(states)


def apa_gradient_by_hand(ranks, apa_lambda=0.1, rows=4):
    """First gradient of a run at its anchor, from the experience of each process.

    mean over all tokens of (log π − log π₀ − A/λ)² + ½(V − R)², minibatch rows being the
    first of each rank's own order; V starts at 0.
    """
    policy = tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(42)  # TrainingArguments' seed: the critic's first weights
        head = ValueHead(64)
    loss, tokens = 0.0, 0
    for rank, experience in enumerate(ranks):
        key = np.random.SeedSequence((42, 0, rank, 1)).generate_state(1)[0]
        order = torch.randperm(
            len(experience["response_ids"]),
            generator=torch.Generator().manual_seed(int(key)),
        )
        for row in order[:rows].tolist():
            logprobs, values = row_outputs(policy, head, experience, row)
            for t in range(len(logprobs)):
                target = logprobs[t].detach() + experience["advantages"][row, t] / (
                    apa_lambda
                )
                loss = loss + (logprobs[t] - target) ** 2
                loss = loss + 0.5 * (values[t] - experience["returns"][row, t]) ** 2
                tokens += 1
    (loss / tokens).backward()
    trained = ("model.layers.1.", "model.norm.")
    gradient = {
        f"policy.{name}": p.grad
        for name, p in policy.named_parameters()
        if name.startswith(trained)
    }
    gradient |= {f"value_head.{name}": p.grad for name, p in head.named_parameters()}
    return gradient


def test_first_gradient_is_that_of_a_loop_over_the_responses(tokenizer, tmp_path):
    """Masks, token counts, accumulation, GAE and reward scaling, all written out."""
    catch = OnFirstStep()
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        apa_lambda=0.5,
        max_steps=1,
        max_grad_norm=0,
        cliprange_value=None,
        max_new_tokens=100,  # long enough for some of the responses to end
    )
    trainer.add_callback(catch)
    trainer.train()
    experience = trainer.experience
    lengths = experience["response_mask"].sum(1)
    assert lengths.unique().numel() > 1  # else padding is not tested

    texts = [
        tokenizer.decode(ids[mask], skip_special_tokens=True)
        for ids, mask in zip(
            experience["response_ids"], experience["response_mask"], strict=True
        )
    ]
    scores = np.array(lower_case(None, [[{"content": text}] for text in texts]))
    scaled = scores / scores.std(ddof=1)
    for row, length in enumerate(lengths.tolist()):  # V = 0 and KL = 0 at the start
        steps_to_go = length - 1 - np.arange(length)
        expected = scaled[row] * 0.95**steps_to_go
        found = experience["advantages"][row, :length]
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        assert (experience["advantages"][row, length:] == 0).all()
    assert torch.allclose(experience["returns"], experience["advantages"])

    expected = apa_gradient_by_hand([experience], apa_lambda=0.5)
    assert catch.gradient.keys() == expected.keys()
    assert max(g.abs().max() for g in expected.values()) > 0.1
    for name, gradient in expected.items():
        assert torch.allclose(catch.gradient[name], gradient, rtol=1e-3, atol=1e-5)


def test_without_whitening_the_anchor_loss_is_the_mean_squared_target(
    tokenizer, tmp_path
):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, apa_lambda=0.25)
    trainer.train()
    rows = trainer._minibatch_rows(0, 0)
    mask = trainer.experience["response_mask"][rows]
    target = trainer.experience["advantages"][rows][mask] / 0.25
    logged = trainer.state.log_history[0]
    assert logged["policy_loss"] == pytest.approx((target**2).mean().item(), rel=1e-4)
    assert logged["log_ratio"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("unfrozen", [1, 2, None])
@pytest.mark.parametrize("separate", [False, True])
def test_actor_critic_logprobs_are_those_of_the_policy(
    tokenizer, unfrozen, separate, policy
):
    rollout = sample(policy, tokenizer, PROMPTS["prompt"], max_new_tokens=6)
    expected = sequence_logprobs(policy, rollout)
    module = ActorCritic(tiny_model(), ValueHead(64), unfrozen, separate)
    torch.nn.init.normal_(module.value_head.outer.weight)
    tokens = {name: getattr(rollout, name) for name in TOKENS}
    trunk = module.trunk_states(**tokens)
    assert (trunk is not None) == (unfrozen == 1)
    out = module(**tokens, trunk_states=trunk, for_logging=True)
    assert torch.allclose(out["logprobs"], expected, atol=1e-5)
    whole = ActorCritic(tiny_model(), module.value_head)(**tokens, for_logging=True)
    for name in ("logprobs", "values", "entropy"):
        assert torch.allclose(out[name], whole[name], atol=1e-5)
        assert (out[name][~rollout.response_mask] == 0).all()
        assert out[name].dtype == torch.float32


def test_a_separate_critic_does_not_move_the_policy(tokenizer, policy):
    rollout = sample(policy, tokenizer, PROMPTS["prompt"][:3], max_new_tokens=6)
    tokens = {name: getattr(rollout, name) for name in TOKENS}
    for separate in (False, True):
        module = ActorCritic(tiny_model(), None, 1, separate)
        torch.nn.init.normal_(module.value_head.outer.weight)
        out = module(**tokens, trunk_states=module.trunk_states(**tokens))
        out["values"].sum().backward()
        moved = module.policy.model.layers[1].mlp.down_proj.weight.grad
        assert (moved is None) == separate


def test_the_reference_stays_where_it_was(tokenizer, tmp_path):
    for unfrozen in (1, None):
        trainer = make_trainer(tmp_path, tokenizer, num_layers_unfrozen=unfrozen)
        trainer.train()
        tokens = {name: trainer.experience[name] for name in TOKENS}
        found = trainer.reference.logprobs(tokens, trainer.model.trunk_states(**tokens))
        fresh = ActorCritic(tiny_model())(**tokens)["logprobs"]
        moved = trainer.model(**tokens)["logprobs"]
        assert torch.allclose(found, fresh, atol=1e-5)
        assert not torch.allclose(moved, fresh, atol=1e-3)


@pytest.mark.parametrize("loss_type", ["apa", "awr", "ppo"])
@pytest.mark.parametrize("anchor", ["initial", "rollout"])
def test_losses_use_their_own_anchor(tokenizer, tmp_path, loss_type, anchor):
    """Second iteration: π_init and π_rollout differ; AWR and PPO know no anchor."""
    trainer = make_trainer(
        tmp_path, tokenizer, loss_type=loss_type, anchor=anchor, max_steps=5
    )
    trainer.train()
    rows = trainer._minibatch_rows(1, 0)
    old = {k: v[rows] for k, v in trainer.experience.items() if k != "count"}
    gap = (old["logprobs"] - old["ref_logprobs"]).abs().max().item()
    assert gap > 0.05
    with torch.no_grad():
        out = {"logprobs": old["logprobs"] + 0.3, "values": old["values"]}
        policy, _ = trainer._losses(out, {**old, "count": old["response_mask"].sum()})
    mask = old["response_mask"]
    advantages = old["advantages"][mask]
    anchors = {"initial": old["ref_logprobs"], "rollout": old["logprobs"]}
    expected = {
        "apa": (out["logprobs"] - anchors[anchor])[mask].sub(advantages).square(),
        "awr": -advantages.exp().clamp(max=20) * out["logprobs"][mask],
        "ppo": -torch.minimum(math.exp(0.3) * advantages, 1.2 * advantages),
    }[loss_type].mean()
    assert policy.item() == pytest.approx(expected.item(), rel=1e-4)


# --- training


def test_apa_raises_a_simple_reward(tokenizer, tmp_path):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        num_layers_unfrozen=None,
        rollout_batch_size=32,
        per_device_train_batch_size=16,
        max_steps=40,
        learning_rate=4e-3,
        logging_steps=4,
    )
    trainer.train()
    history = [row for row in trainer.state.log_history if "reward" in row]
    first, last = (
        np.mean([row["reward"] for row in part])
        for part in (
            history[:2],
            history[-2:],
        )
    )
    assert first < 0.25 and last > first + 0.3
    assert history[-1]["kl"] > history[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert history[-1]["entropy"] < history[0]["entropy"]
    assert all(math.isfinite(v) for row in history for v in row.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"base": "paper", "num_layers_unfrozen": 1},
        {"base": "paper", "num_layers_unfrozen": None, "loss_type": "awr"},
        {"loss_type": "ppo", "missing_eos_penalty": 1.0},
        {"gradient_checkpointing": True},
        {"scale_reward": "none", "num_layers_unfrozen": 2},
        {"scale_reward": "reference", "reward_shift": 0.2, "kl_target": 0.1},
    ],
    ids=str,
)
def test_variants_train(tokenizer, tmp_path, changes):
    if "gradient_checkpointing" in changes:
        with pytest.warns(FutureWarning):
            trainer = make_trainer(tmp_path, tokenizer, **changes)
            trainer.train()
    else:
        trainer = make_trainer(tmp_path, tokenizer, **changes)
        trainer.train()
    assert trainer.state.global_step == 4
    trained = trainer.inner_model().state_dict()
    start = tiny_model().state_dict()
    changed = [k for k in start if not torch.equal(start[k], trained[k])]
    assert any(k.startswith("model.layers.1") for k in changed)
    assert all(v.isfinite().all() for v in trained.values())


@pytest.mark.parametrize("separate", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tokenizer, policy, separate):
    rollout = sample(policy, tokenizer, PROMPTS["prompt"][:4], max_new_tokens=6)
    tokens = {name: getattr(rollout, name) for name in TOKENS}
    module = ActorCritic(policy, ValueHead(64), 1, separate).train()
    torch.nn.init.ones_(module.value_head.outer.weight)  # at zero nothing goes below
    gradients = []
    for _ in range(2):
        module.zero_grad()
        out = module(**tokens, trunk_states=module.trunk_states(**tokens))
        (out["logprobs"].sum() + out["values"].sum()).backward()
        named = module.named_parameters()
        gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
        with pytest.warns(FutureWarning):
            module.gradient_checkpointing_enable()
    tops = [policy.base_model] + [module.value_trunk] * separate
    assert all(layer.gradient_checkpointing for top in tops for layer in top.layers)
    assert len(gradients[0]) == 10 * len(tops) + 4
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6)


def test_the_gate_trains_the_critic_alone(tokenizer, tmp_path):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        value_gate=0.0,
        separate_value_model=True,
        weight_decay=0.0,
        max_steps=2,
    )
    trainer.train()
    start, after = tiny_model().state_dict(), trainer.inner_model().state_dict()
    assert all(torch.equal(start[k], after[k]) for k in start)
    assert trainer.model.value_head.outer.weight.abs().max() > 0
    assert trainer.state.log_history[0]["gated"] == 1


@pytest.mark.parametrize("layers", [1, None])
def test_lora_trains_adapters_resumes_and_is_read_again(tokenizer, tmp_path, layers):
    tiny_model().save_pretrained(tmp_path / "base")

    def adapted(folder):
        return make_trainer(
            folder,
            tokenizer,
            model=AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
            peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"),
            num_layers_unfrozen=layers,
            max_steps=8,
            save_strategy="steps",
            save_steps=4,
            learning_rate=1e-2,
        )

    whole = adapted(tmp_path / "run")
    shared = {id(p) for p in whole.model.policy.parameters() if not p.requires_grad}
    copied = [p for p in whole.reference.top.parameters() if id(p) not in shared]
    assert len(copied) == sum(p.requires_grad for p in whole.model.policy.parameters())
    whole.train()
    trained = {n for n, p in whole.model.policy.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    assert any("layers.0" in name for name in trained) == (layers is None)
    second = adapted(tmp_path / "again")
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    expected, found = whole.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    whole.save_model(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = whole.model.policy.eval()(ids).logits
        assert torch.allclose(again(ids).logits, logits, atol=1e-5)
        start = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert not torch.allclose(start(ids).logits, logits, atol=1e-4)


def test_a_function_that_asks_is_told_which_responses_were_cut(tokenizer, tmp_path):
    told = []

    def reward(prompts, completions, completion_finished, **columns):
        told.append(completion_finished)
        return [float(ended) for ended in completion_finished]

    trainer = make_trainer(tmp_path, tokenizer, reward, max_new_tokens=6)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["reward"] == pytest.approx(log["eos_rate"])
    assert all(isinstance(ended, bool) for ended in told[0])
    assert len(told[0]) == trainer.args.rollout_batch_size


def test_a_rollout_policy_is_saved_as_a_plain_language_model(tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.train()
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids).logits, trainer.model.policy.eval()(ids).logits)
    assert (tmp_path / "value_head.safetensors").exists()
    rows = [
        json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 4  # num_samples_kept of one iteration
    assert set(rows[0]) == {"iteration", "prompt", "response", "reward", "finished"}


@pytest.mark.parametrize(
    ("stop", "separate"), [(2, False), (4, False), (6, False), (6, True)]
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    tokenizer, tmp_path, stop, separate
):
    """Bit for bit: inside the first iteration, between two, inside the second."""
    arguments = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 2,
        "separate_value_model": separate,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "linear",
    }
    whole = make_trainer(tmp_path / "whole", tokenizer, **arguments)
    assert whole.args.updates_per_iteration == 4
    whole.train()
    first = make_trainer(tmp_path / "parts", tokenizer, **arguments)
    first.add_callback(StopAt(stop))
    first.train()
    torch.manual_seed(99)
    second = make_trainer(tmp_path / "parts", tokenizer, **arguments)
    second.train(resume_from_checkpoint=True)
    expected, found = whole.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert whole.reward_scale.state() == second.reward_scale.state()
    assert second.state.global_step == 8
    assert not all(
        torch.equal(v, first.model.state_dict()[k]) for k, v in expected.items()
    )
    for key, value in whole.experience.items():
        assert torch.equal(value, second.experience[key]), key


def test_samples_of_a_redone_iteration_stand_once(tokenizer, tmp_path):
    arguments = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4}
    first = make_trainer(tmp_path, tokenizer, **arguments)
    first.train()
    path = tmp_path / "samples.jsonl"
    whole = path.read_text()
    torn = '{"iteration": 3, "prompt": "print {x}ü'.encode()[:-1]
    path.write_bytes(whole.encode() + torn)  # cut by a kill, inside a character
    second = make_trainer(tmp_path, tokenizer, **arguments)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert path.read_text() == whole


@pytest.mark.parametrize("torn", ['{"iteration": 0, "prompt": "print {x}', '{"iter'])
def test_only_a_torn_last_sample_is_dropped(tmp_path, torn):
    """Also one that ends as a whole one does; a whole one may lack its newline."""
    path = tmp_path / "samples.jsonl"
    rows = ['{"iteration": 0, "prompt": "a\u2028b"}', '{"iteration": 1}']
    path.write_text("\n".join([*rows, torn]), "utf-8")
    drop_samples(path, 1)
    assert path.read_text("utf-8") == rows[0] + "\n"
    path.write_text(rows[0], "utf-8")
    drop_samples(path, 1)
    assert path.read_text("utf-8") == rows[0] + "\n"


def test_resuming_inside_an_iteration_needs_its_experience(tokenizer, tmp_path):
    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, tokenizer, **arguments)
    trainer.add_callback(StopAt(2))
    trainer.train()
    (tmp_path / "checkpoint-2" / "experience-0.safetensors").unlink()
    with pytest.raises(RuntimeError, match="inside iteration 0, whose experience"):
        make_trainer(tmp_path, tokenizer, **arguments).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_a_checkpoint_between_iterations_holds_no_experience(tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=2)
    trainer.train()
    kept = {p.parent.name for p in tmp_path.glob("*/experience-0.safetensors")}
    assert kept == {"checkpoint-2"}
    experience = load_file(tmp_path / "checkpoint-2" / "experience-0.safetensors")
    assert {"advantages", "returns", "count", "trunk_states"} <= set(experience)


def test_the_trunk_is_not_run_again_where_sampling_has_run_it(
    tokenizer, reward_model, tmp_path, monkeypatch
):
    """The experience is the same, whichever way the trunk's states are come by."""
    passes, trunk_layers = [], ActorCritic.trunk_layers

    def counted(self, *arguments, **tokens):
        passes.append(arguments)
        return trunk_layers(self, *arguments, **tokens)

    def forgetful(*arguments, keep_after=(), **rest):
        return sample(*arguments, **rest)

    monkeypatch.setattr(ActorCritic, "trunk_layers", counted)
    experiences = []
    for sampler in (sample, forgetful):
        trainer = make_trainer(tmp_path, tokenizer, reward_model, max_steps=1)
        assert trainer.rewards.trunk_layers == [1]
        trainer.sampler = sampler
        experiences.append(trainer.collect(trainer.prompts.select(range(8)), 0))
        assert len(passes) == (0 if sampler is sample else 2)
    kept, again = experiences
    assert kept.keys() == again.keys()
    for name, values in kept.items():
        if name == "trunk_states":
            masks = kept["prompt_mask"], kept["response_mask"]
            mask = torch.cat(masks, 1)
            values, again[name] = values[mask], again[name][mask]
        assert torch.allclose(values.double(), again[name].double(), atol=1e-4), name


def test_states_of_another_format_than_trainings_are_not_kept(
    tokenizer, tmp_path, monkeypatch
):
    trainer = make_trainer(tmp_path, tokenizer)
    assert trainer._keeps_states()
    monkeypatch.setenv("STARLING_PRECISION", "bf16")  # of sampling; training's stays
    assert not trainer._keeps_states()
    with pytest.warns(
        UserWarning, match="in torch.float32, sampling .* torch.bfloat16"
    ):
        make_trainer(tmp_path, tokenizer, bf16=False)
    monkeypatch.setenv("STARLING_PRECISION", "fp32")
    trainer.sampler = lambda policy, tokenizer, prompts, **rest: None
    assert not trainer._keeps_states()


@pytest.mark.parametrize("unfrozen", [1, None])
def test_in_bf16_too_an_unchanged_policy_has_not_moved(
    tokenizer, tmp_path, monkeypatch, unfrozen
):
    """Its log-probabilities are rounded alike before training, in it and as reference."""
    monkeypatch.setenv("STARLING_PRECISION", "bf16")
    changes = {"num_layers_unfrozen": unfrozen, "learning_rate": 0.0, "max_steps": 4}
    trainer = make_trainer(tmp_path, tokenizer, **changes)
    trainer.train()
    first = next(log for log in trainer.state.log_history if "log_ratio" in log)
    assert first["log_ratio"] == 0 and first["kl"] == 0


@pytest.mark.parametrize("unfrozen", [1, None])
def test_a_reward_model_on_the_trunk_changes_no_run(
    tokenizer, reward_model, tmp_path, monkeypatch, unfrozen
):
    """Scored in the policy's own pass or read from the texts: the same rewards."""

    def say(policy, tokenizer, prompts, max_new_tokens, **rest):
        texts = [f"{'ab' * (i % 2)} {i}" for i in range(len(prompts))]
        return given_responses(tokenizer, prompts, texts, max_new_tokens)

    def logged(folder):
        trainer = make_trainer(
            tmp_path / folder,
            tokenizer,
            reward_model,
            num_layers_unfrozen=unfrozen,
            max_steps=8,  # two iterations
        )
        trainer.sampler = say
        trainer.train()
        history = trainer.state.log_history
        return trainer, [row["reward"] for row in history if "reward" in row]

    trainer, on_trunk = logged("trunk")
    assert bool(trainer.rewards.on_trunk) == (unfrozen is not None)
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return score_responses(*arguments)

    monkeypatch.setattr("starling_lib.policy_rewards.score_responses", counted)
    logged("again")
    assert len(calls) == (0 if unfrozen else 2)
    monkeypatch.setattr(RewardSum, "share_trunk", lambda self, trunk: None)
    assert on_trunk == pytest.approx(logged("texts")[1], abs=1e-5)


@pytest.mark.parametrize(("at_once", "expected"), [(None, 8), (3, 3)])
def test_responses_are_sampled_as_many_at_once_as_asked(
    tokenizer, tmp_path, at_once, expected
):
    seen = []

    def watched(*args, batch_size, **rest):
        seen.append(batch_size)
        return sample(*args, batch_size=batch_size, **rest)

    trainer = make_trainer(tmp_path, tokenizer, generation_batch_size=at_once)
    trainer.sampler = watched
    trainer.train()
    assert seen == [expected]


def test_prompts_fewer_than_a_batch_are_used_again(tokenizer, tmp_path):
    trainer = make_trainer(
        tmp_path, tokenizer, prompts=PROMPTS.select(range(3)), max_steps=8
    )
    trainer.train()
    assert trainer.state.global_step == 8
    assert trainer.experience["prompt_mask"].sum(1).unique().numel() == 3


def test_epochs_count_prompts(tokenizer, tmp_path):
    """12 prompts in blocks of 8: two iterations cover them, four updates each."""
    trainer = make_trainer(tmp_path, tokenizer, max_steps=-1, num_train_epochs=1)
    assert trainer.args.max_steps == 2 * trainer.args.updates_per_iteration == 8


def test_evaluation_samples_with_a_fixed_seed(tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=PROMPTS.select(range(5)))
    before = torch.get_rng_state()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second
    assert {"eval_reward", "eval_length", "eval_eos_rate"} <= set(first)
    assert torch.equal(torch.get_rng_state(), before)


# --- pieces


def test_a_data_seed_of_zero_is_a_seed(tokenizer, tmp_path):
    """The order of prompts is that of the data seed, where there is none of the seed."""
    orders = [
        make_trainer(tmp_path, tokenizer, **seeds).train_dataset.order
        for seeds in ({"seed": 5, "data_seed": 0}, {"seed": 0}, {"seed": 5})
    ]
    assert orders[0] == orders[1] != orders[2]


def test_resuming_reads_progress_where_an_engine_loads_the_weights(tokenizer, tmp_path):
    """DeepSpeed's resuming goes by `_load_from_checkpoint`, and not by the optimiser's."""
    part = make_trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=2)
    part.add_callback(StopAt(2))
    part.train()
    again = make_trainer(tmp_path, tokenizer)
    again.create_optimizer_and_scheduler(4)
    again._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-2"))
    assert again.reward_scale.state() == part.reward_scale.state()
    assert again.reward_scale.moments.count > 0


def test_blocks_repeat_their_prompts_at_every_micro_step():
    blocks = PromptBlocks(size=5, block=4, micro_steps=3, iterations=5, seed=0)
    items = [blocks[i] for i in range(len(blocks))]
    assert len(items) == 5 * 3 * 4
    seen = []
    for iteration in range(5):
        mine = [x for x in items if x["iteration"] == iteration]
        steps = [[x["prompt"] for x in mine if x["micro_step"] == s] for s in range(3)]
        assert steps[0] == steps[1] == steps[2] and len(steps[0]) == 4
        seen += steps[0]
    passes = [sorted(seen[i : i + 5]) for i in range(0, 20, 5)]
    assert passes == [[0, 1, 2, 3, 4]] * 4  # every pass shows every prompt once
    assert seen[:5] != seen[5:10]


def test_longer_runs_begin_like_shorter_ones():
    short = PromptBlocks(5, 4, 2, iterations=2, seed=1)
    long = PromptBlocks(5, 4, 2, iterations=9, seed=1)
    assert [short[i] for i in range(len(short))] == [long[i] for i in range(len(short))]


def test_each_process_reads_its_own_half_of_a_block():
    """As accelerate shards batches: the i-th batch goes to process i mod 2."""
    blocks = PromptBlocks(size=20, block=8, micro_steps=2, iterations=3, seed=0)
    batches = BatchSampler(SequentialSampler(blocks), batch_size=4, drop_last=False)
    shares = [
        [[blocks[i] for i in batch] for batch in BatchSamplerShard(batches, 2, rank)]
        for rank in (0, 1)
    ]
    assert len(shares[0]) == len(shares[1]) == 3 * 2
    for step, (one, two) in enumerate(zip(*shares, strict=True)):
        stamps = {(x["iteration"], x["micro_step"]) for x in one + two}
        assert stamps == {divmod(step, 2)}
        prompts = [x["prompt"] for x in one + two]
        assert len(prompts) == 8
        first = [x["prompt"] for share in shares for x in share[step - step % 2]]
        assert prompts == first


def test_minibatches_cover_the_rollout_once_a_pass(tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer, per_device_train_batch_size=2)
    steps = [trainer._minibatch_rows(3, s).tolist() for s in range(8)]
    passes = [sum(steps[:4], []), sum(steps[4:], [])]
    assert [sorted(rows) for rows in passes] == [list(range(8))] * 2
    assert (
        passes[0]
        != passes[1]
        != sum((trainer._minibatch_rows(4, s).tolist() for s in range(4)), [])
    )


def test_cut_responses_pay_the_penalty(tokenizer, tmp_path):
    """Reward scaling first, then the penalty, on the last token of unfinished rows."""
    trainer = make_trainer(
        tmp_path, tokenizer, scale_reward="none", missing_eos_penalty=2.0, kl_coef=0.0
    )
    ids, mask = left_pad([[70, 71], [70]], 0)
    tokens = {"prompt_ids": torch.full((2, 1), 5), "prompt_mask": mask[:, :1] | True}
    tokens |= {"response_ids": ids.flip(1), "response_mask": mask.flip(1)}
    old, _ = trainer._forward_in_parts(tokens)
    experience = trainer._with_advantages(
        tokens, old, torch.tensor([1.0, 1.0]), torch.tensor([False, True])
    )
    assert experience["returns"][0].tolist() == pytest.approx([-0.95, -1])
    assert experience["returns"][1].tolist() == pytest.approx([1, 0])


# --- configurations


def test_starling_is_the_forks_recipe(tmp_path):
    args = APAConfig.starling(output_dir=str(tmp_path), max_steps=1)
    assert (args.anchor, args.apa_lambda, args.whiten_advantages) == (
        "rollout",
        1,
        False,
    )
    assert (args.kl_coef, args.cliprange_value, args.value_gate) == (0.01, 0.2, 1)
    assert (args.learning_rate, args.adam_beta2, args.weight_decay) == (
        2e-7,
        0.95,
        1e-6,
    )
    assert (args.num_layers_unfrozen, args.separate_value_model) == (4, False)
    assert (args.gamma, args.gae_lambda, args.vf_coef) == (1, 0.95, 1)
    assert (args.rollout_batch_size, args.num_epochs_per_rollout) == (64, 2)
    assert (args.per_device_train_batch_size, args.max_new_tokens) == (4, 1024)
    assert (args.scale_reward, args.cliprange_reward) == ("running", 10)
    assert args.max_prompt_length + args.max_new_tokens == 2148
    assert args.lr_scheduler_type == "constant"
    assert args.micro_steps == args.updates_per_iteration == 32


def test_paper_is_the_papers_recipe(tmp_path):
    args = APAConfig.paper(output_dir=str(tmp_path), max_steps=1)
    assert (args.anchor, args.apa_lambda, args.whiten_advantages) == (
        "initial",
        0.1,
        True,
    )
    assert (args.kl_coef, args.cliprange_value, args.value_gate) == (0, None, None)
    assert (args.learning_rate, args.separate_value_model) == (1e-6, True)
    assert (args.num_layers_unfrozen, args.rollout_batch_size) == (2, 128)
    assert (args.per_device_train_batch_size, args.num_epochs_per_rollout) == (8, 2)
    assert args.max_prompt_length + args.max_new_tokens == 1000
    assert args.cliprange_reward == 100


def test_overrides_win(tmp_path):
    for make in (APAConfig.paper, APAConfig.starling):
        assert make(output_dir=str(tmp_path), apa_lambda=7.0).apa_lambda == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type='dpo': choose from"),
        ({"anchor": "first"}, "anchor='first': choose from"),
        ({"scale_reward": "ref"}, "scale_reward='ref': choose from"),
        ({"apa_lambda": 0}, "apa_lambda=0: must be positive"),
        ({"rollout_batch_size": 6}, "rollout_batch_size=6 is no multiple of .* = 4"),
        ({"generation_batch_size": 0}, "generation_batch_size=0: at least 1"),
        ({"save_total_limit": 1}, "save_total_limit=1"),
        ({"num_layers_unfrozen": 9}, "num_layers_unfrozen=9: this model has 2 layers"),
    ],
)
def test_settings_that_cannot_work(tokenizer, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, **changes)


# --- rewards


def test_rewards_get_columns_and_are_weighted(tokenizer, tmp_path):
    calls = []

    def by_column(prompts, completions, number, **columns):
        calls.append((prompts, completions, list(number)))
        return [float(n) for n in number]

    trainer = make_trainer(
        tmp_path,
        tokenizer,
        reward=[by_column, lambda prompts, completions, **_: [1.0] * len(prompts)],
        reward_weights=[2.0, -3.0],
    )
    prompts = PROMPTS.select([4, 1])
    rollout = sample(
        trainer.model.policy, tokenizer, prompts["prompt"], max_new_tokens=3
    )
    assert trainer.rewards(prompts, rollout).tolist() == [8 - 3, 2 - 3]
    given, completions, numbers = calls[0]
    assert given == list(prompts["prompt"]) and numbers == [4, 1]
    texts = [[{"role": "assistant", "content": text}] for text in rollout.texts]
    assert completions == texts
    assert trainer.rewards.last_means["rewards/0_by_column"] == 2.5


def test_a_reward_model_scores_finished_and_cut_responses(
    tokenizer, tmp_path, reward_model
):
    """Without a tokenizer of its own: the one that belongs to the model is loaded."""
    trainer = make_trainer(tmp_path, tokenizer, reward=copy.deepcopy(reward_model))
    prompts = PROMPTS.select(range(6))
    rollout = sample(
        trainer.model.policy, tokenizer, prompts["prompt"], max_new_tokens=6
    )
    expected = score_responses(
        reward_model, tokenizer, rollout.prompts, rollout.texts, rollout.finished
    )
    assert torch.allclose(trainer.rewards(prompts, rollout), expected, atol=1e-6)
    model = trainer.rewards.functions[0]
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "judge returned 1 rewards for 3 samples"),
        ([1.0, None, 2.0], "judge returned None for sample 1: prompt 'z go 1'"),
        (
            [1.0, 2.0, math.nan],
            "judge returned nan for sample 2: .*'zz go 2', response",
        ),
        ([math.inf, 2.0, 1.0], "judge returned inf for sample 0"),
    ],
)
def test_bad_rewards_are_named(tokenizer, tmp_path, policy, values, message):
    rollout = sample(policy, tokenizer, PROMPTS["prompt"][:3], max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        checked_scores(values, rollout, "judge")


def test_a_bad_reward_stops_training_with_the_functions_name(tokenizer, tmp_path):
    def broken_judge(prompts, completions, **columns):
        return [None] * len(prompts)

    with pytest.raises(ValueError, match="broken_judge returned None for sample 0"):
        make_trainer(tmp_path, tokenizer, reward=broken_judge).train()


def test_a_reward_function_that_raises_is_named_with_its_sample(tokenizer, tmp_path):
    def fussy_judge(prompts, completions, number, **columns):
        if 7 in number:
            raise KeyError("no such thing")
        return [0.0] * len(prompts)

    with pytest.raises(
        RuntimeError,
        match="(?s)fussy_judge raised KeyError.*alone on sample .*'.*go 7'",
    ):
        make_trainer(tmp_path, tokenizer, reward=fussy_judge, max_steps=8).train()


def test_rewards_weights_and_tokenizers_must_match(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="2 reward functions, 2 tokenizers, 1 weights"):
        make_trainer(tmp_path, tokenizer, reward=[lower_case] * 2, reward_weights=[1.0])


def test_the_callers_list_of_tokenizers_is_left_alone(
    tokenizer, tmp_path, reward_model
):
    tokenizers = [None]
    APATrainer(
        tiny_model(),
        [reward_model],
        config(tmp_path),
        PROMPTS,
        processing_class=tokenizer,
        reward_processing_classes=tokenizers,
    )
    assert tokenizers == [None]


def test_nan_stops_the_run_with_the_metrics_name(tokenizer, tmp_path):
    head = ValueHead(64)
    head.outer.bias.data.fill_(math.nan)
    with pytest.raises(
        FloatingPointError, match="_loss is nan at step 0.*learning rate"
    ):
        make_trainer(tmp_path, tokenizer, value_model=head).train()


def test_an_exploding_ratio_stops_the_run(tokenizer, tmp_path):
    with pytest.raises(FloatingPointError, match="log_ratio.*above log_ratio_limit"):
        make_trainer(
            tmp_path, tokenizer, learning_rate=3.0, log_ratio_limit=0.3, max_steps=8
        ).train()


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (3.0, r"log_ratio, .* at step 3, above log_ratio_limit=0.3.* is checkpoint-2"),
        (math.nan, "largest_weight is nan at step 3: .* is checkpoint-2"),
    ],
)
def test_an_update_that_lost_the_policy_is_not_saved(
    tokenizer, tmp_path, rate, message
):
    """The newest complete checkpoint is that of the update before; it is resumed from."""
    changes = {"save_strategy": "steps", "save_steps": 1, "log_ratio_limit": 0.3}
    trainer = make_trainer(tmp_path, tokenizer, **changes)
    trainer.add_callback(RateAt(2, rate))
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    marked = {p.parent.name for p in tmp_path.glob(f"*/{MARKER}")}
    assert marked == {"checkpoint-1", "checkpoint-2"}
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(x.isfinite().all() for x in saved.values())

    again = make_trainer(tmp_path, tokenizer, **changes)
    again.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", tokenizer)
    whole.train()
    assert again.state.global_step == 4 and weights_equal(again, whole)


def test_a_first_update_that_lost_the_policy_leaves_no_checkpoint(tokenizer, tmp_path):
    """Not even that of an earlier run, whose marker stood in the way."""
    changes = {"save_strategy": "steps", "save_steps": 1, "log_ratio_limit": 0.3}
    make_trainer(tmp_path, tokenizer, **changes, max_steps=1).train()
    trainer = make_trainer(tmp_path, tokenizer, **changes, learning_rate=3.0)
    with pytest.raises(FloatingPointError, match="there is no good checkpoint yet"):
        trainer.train()
    assert last_complete(tmp_path) is None


@pytest.mark.parametrize("ptx", [0.0, 1.0])
def test_the_last_update_is_checked_where_nothing_is_saved(tokenizer, tmp_path, ptx):
    """With one update an iteration no forward before an update sees anything move."""
    one_update = {"per_device_train_batch_size": 8, "num_epochs_per_rollout": 1}
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        prompts=WITH_COMPLETIONS,
        log_ratio_limit=0.3,
        ptx_coef=ptx,
        max_steps=2,
        **one_update,
    )
    trainer.add_callback(RateAt(1, 3.0))
    with pytest.raises(FloatingPointError, match="log_ratio.* at step 2, above"):
        trainer.train()


def test_checking_before_a_save_changes_no_run(tokenizer, tmp_path):
    """Nor the random state, which dropout in training would move."""
    states = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append(torch.get_rng_state())

    for folder, strategy in (("a", "no"), ("b", "steps")):
        trainer = make_trainer(
            tmp_path / folder, tokenizer, save_strategy=strategy, save_steps=1
        )
        trainer.add_callback(Watch())
        trainer.train()
        states.append(trainer.inner_model().state_dict()["model.norm.weight"])
    half = len(states) // 2
    assert all(map(torch.equal, states[:half], states[half:]))


@pytest.mark.parametrize("rows", [1, 8])
def test_the_spread_of_one_response_is_nothing(tokenizer, tmp_path, rows):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        rollout_batch_size=rows,
        per_device_train_batch_size=rows,
        max_new_tokens=1 if rows == 1 else 6,
        max_steps=1,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert all(math.isfinite(value) for value in log.values())
    assert (log["reward_std"] == 0) == (rows == 1)


def test_the_gate_opens_half_way(tokenizer, tmp_path, monkeypatch):
    """vf above 1: the value loss alone; at 1 and below: policy + ptx + vf."""
    values = iter([3.0, 2.0, 1.0, 0.5])

    def losses(self, out, inputs):
        zero = out["logprobs"].sum() * 0 + out["values"].sum() * 0
        return zero + 10.0, zero + next(values)

    monkeypatch.setattr(APATrainer, "_losses", losses)
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        prompts=WITH_COMPLETIONS,
        ptx_coef=2.0,
        value_gate=1.0,
        logging_steps=1,
        num_epochs_per_rollout=2,
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "gated" in row]
    assert [row["gated"] for row in logs] == [1, 1, 0, 0]
    ptx = [2 * row["ptx_loss"] for row in logs]
    expected = [3.0, 2.0, 1.0 + 10.0 + ptx[2], 0.5 + 10.0 + ptx[3]]
    assert [row["loss"] for row in logs] == pytest.approx(expected, rel=1e-5)


TRAINERS_OWN = {"epoch", "step", "learning_rate", "train_loss", "train_runtime"}
TRAINERS_OWN |= {"train_samples_per_second", "train_steps_per_second", "total_flos"}


def test_all_that_is_logged_is_explained(tokenizer, tmp_path):
    """In the docstring of `APAConfig`, by its name; a server's figures, too."""

    def served(*arguments, keep_after=(), **rest):
        return sample(*arguments, **rest)

    served.figures = {f"dropped_{name}": 0.0 for name in ("share", *REASONS)}
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        prompts=WITH_COMPLETIONS,
        eval_dataset=PROMPTS.select(range(3)),
        eval_strategy="steps",
        eval_steps=4,
        ptx_coef=1.0,
        exact_kl=True,
    )
    trainer.sampler = served
    trainer.train()
    logged = {key for row in trainer.state.log_history for key in row}
    assert logged >= {"kl_exact", "ptx_loss", "eval_reward", "dropped_share"}
    named = set(re.findall(r"[\w/]+", APAConfig.__doc__))
    groups = {re.sub("^rewards/.*", "rewards/", key) for key in logged}
    assert groups - TRAINERS_OWN <= named and named >= TRAINERS_OWN


def test_the_critic_is_trained_alone_at_first(tokenizer, tmp_path):
    """On layers of its own, or the shared ones would move the policy with it."""
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        critic_warmup_iterations=1,
        separate_value_model=True,
        weight_decay=0.0,
        max_steps=8,
    )
    trainer.add_callback(StopAt(trainer.args.updates_per_iteration))
    start = tiny_model().state_dict()
    head = {k: v.clone() for k, v in trainer.model.value_head.state_dict().items()}
    trainer.train()
    after = trainer.inner_model().state_dict()
    assert all(torch.equal(start[k], after[k]) for k in start)
    moved = trainer.model.value_head.state_dict()
    assert not all(torch.equal(head[k], moved[k]) for k in head)
    assert [row["gated"] for row in trainer.state.log_history if "gated" in row] == [1]


def test_the_kl_coefficient_follows_its_target_and_is_resumed(tokenizer, tmp_path):
    changes = {"kl_target": 1e-4, "kl_horizon": 100, "save_strategy": "steps"}
    changes |= {"save_steps": 6, "max_steps": 12}
    whole = make_trainer(tmp_path / "whole", tokenizer, **changes)
    whole.train()
    values = [r["kl_coef"] for r in whole.state.log_history if "kl_coef" in r]
    # Iteration 1 samples from π_init: KL 0, a fifth below; then far above the target.
    assert values[:3] == pytest.approx([0.01, 0.01 * 0.984, 0.01 * 0.984 * 1.016])
    part = make_trainer(tmp_path / "part", tokenizer, **changes)
    part.add_callback(StopAt(6))
    part.train()
    again = make_trainer(tmp_path / "part", tokenizer, **changes)
    again.train(resume_from_checkpoint=True)
    assert again.kl_coef.value == whole.kl_coef.value
    assert weights_equal(again, whole)


def weights_equal(a, b) -> bool:
    a, b = (trainer.inner_model().state_dict() for trainer in (a, b))
    return all(torch.equal(a[k], b[k]) for k in a)


def test_exact_kl_is_that_of_the_whole_distributions(tokenizer, tmp_path):
    """From plain forwards of both models; k3 estimates the same thing."""
    trainer = make_trainer(tmp_path, tokenizer, exact_kl=True, max_steps=5)
    trainer.add_callback(StopAt(4))
    trainer.train()
    trainer._metrics.clear()
    experience = trainer.collect(trainer.prompts.select(range(8)), 1)
    policy, start, total = trainer.inner_model(), tiny_model(), 0.0
    for row in range(8):
        prompt = experience["prompt_ids"][row][experience["prompt_mask"][row]]
        response = experience["response_ids"][row][experience["response_mask"][row]]
        ids = torch.cat([prompt, response])[None]
        with torch.no_grad():
            p, q = (m(ids).logits[0, len(prompt) - 1 : -1] for m in (policy, start))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        total += torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    found = trainer._metrics["kl_exact"][0]
    assert found == pytest.approx(total.item() / 8, rel=1e-3) and found > 0.01
    assert "kl_exact" not in experience


WITH_COMPLETIONS = PROMPTS.add_column(
    "completion",
    [[{"role": "assistant", "content": "zq" * (1 + i % 4)}] for i in range(12)],
)


@pytest.mark.parametrize("layers", [1, None])
def test_given_completions_are_learnt_beside_the_reward(tokenizer, tmp_path, layers):
    """The loss is that of separate forwards; after training they are likelier."""
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        prompts=WITH_COMPLETIONS,
        ptx_coef=2.0,
        num_layers_unfrozen=layers,
        max_steps=24,
    )
    trainer.train()
    logged = [row["ptx_loss"] for row in trainer.state.log_history if "ptx_loss" in row]
    assert logged[-1] < logged[0] - 0.1
    inputs = trainer._minibatch(5, 3)
    trainer._metrics.clear()
    with torch.no_grad():
        trainer.compute_loss(trainer.model, inputs)
        given = {k: inputs[f"ptx_{k}"] for k in TOKENS}
        logprobs = trainer.model(**given)["logprobs"]
    expected = -logprobs.sum() / given["response_mask"].sum()
    assert trainer._metrics["ptx_loss"] == pytest.approx([expected.item()], abs=1e-4)
    ends = given["response_mask"].sum(1) - 1
    last = given["response_ids"][torch.arange(len(ends)), ends]
    whole = ends + 1 < trainer.args.max_new_tokens
    assert (last[whole] == tokenizer.eos_token_id).all() and not whole.all()


def test_completions_change_nothing_of_the_policy_loss(tokenizer, tmp_path):
    """The sampled rows keep their log-probabilities when padded beside others."""
    plain = make_trainer(tmp_path / "a", tokenizer, prompts=WITH_COMPLETIONS)
    mixed = make_trainer(
        tmp_path / "b", tokenizer, prompts=WITH_COMPLETIONS, ptx_coef=1e-9
    )
    for trainer in (plain, mixed):
        trainer.train()
    losses = [
        [r["policy_loss"] for r in t.state.log_history if "policy_loss" in r]
        for t in (plain, mixed)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_completions_weigh_by_their_tokens_however_they_are_accumulated(
    tokenizer, tmp_path
):
    """Four micro-batches of one row, of 2 to 5 tokens, are one batch of four."""
    gradients = []
    for size in (1, 4):
        trainer = make_trainer(
            tmp_path / str(size),
            tokenizer,
            prompts=WITH_COMPLETIONS,
            ptx_coef=50.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=1,
        )
        first = OnFirstStep()
        trainer.add_callback(first)
        trainer.train()
        gradients.append(first.gradient)
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(g.abs().max().item() for g in gradients[1].values())
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5 * largest), name


def test_ptx_needs_completions(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="ptx_coef=0.5 needs a column 'completion'"):
        make_trainer(tmp_path, tokenizer, ptx_coef=0.5)


def test_while_sampling_no_earlier_experience_is_held(tokenizer, tmp_path):
    held = []

    def sampler(*arguments, **named):
        held.append(trainer.experience)
        return sample(*arguments, **named)

    trainer = make_trainer(tmp_path, tokenizer, max_steps=8, sampler=sampler)
    trainer.train()
    assert held == [None, None]


def test_exact_kl_runs_the_reference_once_a_minibatch(tokenizer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, exact_kl=True)
    reference, calls = trainer.reference.top, []
    forward = reference.forward
    monkeypatch.setattr(
        reference, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k)
    )
    trainer.collect(trainer.prompts.select(range(8)), 0)
    assert len(calls) == 2


def test_settings_given_to_two_trainers_stay_as_they_were_given(tokenizer, tmp_path):
    """An epoch of 12 prompts is one of 24 no more than the other way round."""
    args = config(tmp_path, max_steps=-1, num_train_epochs=1, rollout_batch_size=4)
    steps = []
    for prompts in (PROMPTS, concatenate_datasets([PROMPTS, PROMPTS])):
        trainer = APATrainer(
            tiny_model(), lower_case, args, prompts, processing_class=tokenizer
        )
        steps.append(trainer.args.max_steps)
    assert args.max_steps == -1
    assert steps[1] == 2 * steps[0] > 0


def test_long_prompts_are_left_out_with_a_count(tokenizer, tmp_path):
    texts = ["a", "b" * 300, "c", "d" * 400]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    with pytest.warns(UserWarning, match="2 of 4 prompts are longer than 100 tokens"):
        trainer = make_trainer(
            tmp_path, tokenizer, prompts=Dataset.from_list(rows), max_prompt_length=100
        )
    kept = [row["prompt"][0]["content"] for row in trainer.prompts]
    assert kept == ["a", "c"]
    trainer.train()
    with pytest.raises(ValueError, match="4 of 4 prompts .* none is left"):
        fitting_prompts(Dataset.from_list(rows), tokenizer, 3)
    with pytest.raises(TypeError, match="a stream does not have"):
        fitting_prompts(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, 3)


def test_a_prompt_must_leave_room_for_a_response(tokenizer, tmp_path):
    """The window of the tiny model is the limit where max_prompt_length is larger."""
    window = tiny_model().config.max_position_embeddings
    rows = [{"prompt": [{"role": "user", "content": "a" * n}]} for n in (1, window)]
    with pytest.warns(UserWarning, match="1 of 2 prompts"):
        make_trainer(
            tmp_path,
            tokenizer,
            prompts=Dataset.from_list(rows),
            max_prompt_length=10**6,
        )


def test_a_tokenizer_is_needed(tmp_path):
    with pytest.raises(ValueError, match="processing_class"):
        make_trainer(tmp_path, None)
