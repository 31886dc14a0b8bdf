"""Advantage-induced policy alignment: the trainer (Zhu et al. 2023, arXiv 2306.02231).

Each iteration samples responses, scores them, and fits the policy to its own experience:

    prompts → sample → reward → KL, values, GAE advantages → updates on (log π − target)²

Knows: the policy, its critic, the reference, rewards as functions. Does not know: how
rewards were trained, how policies are compared.

Where this differs from the released code (starling.md §4): the mask is that of the sampled
response, EOS included; the reward sits on the response's last token; whitening runs over
response tokens of the whole rollout batch; advantages are computed once an iteration.
"""

import copy
import inspect
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from starling_lib import objectives
from starling_lib.checkpoints import (
    WrappedModelTrainer,
    check_arguments,
    machine_defaults,
)
from starling_lib.journal import write_atomically
from starling_lib.models import ValueHead, inference, load_policy, load_tokenizer
from starling_lib.prefix import use_fast_backward
from starling_lib.reward import score_responses
from starling_lib.rollouts import (
    Rollout,
    next_token_logits,
    predicting_states,
    response_inputs,
    sample,
    scatter,
    token_entropy,
    token_logprobs,
)
from starling_lib.trunk import add_adapters, freeze_below, try_split_trunk

if TYPE_CHECKING:
    from peft import PeftConfig

RewardFunction = PreTrainedModel | Callable[..., Sequence[float]]


@dataclass
class APAConfig(TrainingArguments):
    """Arguments of `APATrainer`; the defaults are those of Starling's code.

    One iteration samples `rollout_batch_size` responses a process and makes
    `num_epochs_per_rollout` passes over them in minibatches of
    `per_device_train_batch_size` × `gradient_accumulation_steps`; `max_steps` counts
    those optimiser steps.

    Logged each iteration (averages over its responses or tokens):
      reward            score of the reward functions, before scaling. Should rise.
      reward_std        its spread; near 0 means every response scores alike: no signal.
      kl                Σ over a response of k3(π, π_init), in nats. Grows slowly; a jump
                        means λ or the learning rate is too large.
      entropy           of the next-token distribution, nats a token. Falling to 0 is
                        collapse into one phrase.
      length, eos_rate  tokens a response, share that ended by themselves. Length running
                        to the limit means the reward pays for length.
      value_loss        ½(V − R)². Should fall, then stay.
      explained_variance  1 − Var(R − V)/Var(R): 0 knows nothing, 1 knows all; below 0 the
                        critic misleads.
      policy_loss       the loss of `loss_type`; comparable only within a run.
      log_ratio         mean |log π − log π_old| after updates: how far an iteration moves.
      gated             share of micro-steps on which only the critic was trained.
    """

    learning_rate: float = field(
        default=2e-7, metadata={"help": "Starling: 2e-7, constant."}
    )
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Starling's cosine had equal ends."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Starling: 0.95."})
    weight_decay: float = field(default=1e-6, metadata={"help": "Starling: 1e-6."})
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Responses in a minibatch."}
    )
    logging_steps: float = field(
        default=0, metadata={"help": "Steps between logs; 0: once an iteration."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "False: a NaN is shown, not hidden."}
    )
    # what is optimised
    loss_type: str = field(
        default="apa",
        metadata={"help": "'apa', 'awr' or 'ppo' on the same experience."},
    )
    apa_lambda: float = field(
        default=1.0, metadata={"help": "λ: target log-ratio is A/λ (also AWR's λ)."}
    )
    anchor: str = field(
        default="rollout",
        metadata={"help": "log-ratio against 'initial' or 'rollout'."},
    )
    whiten_advantages: bool = field(
        default=False, metadata={"help": "Unit variance over response tokens."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    gae_lambda: float = field(default=0.95, metadata={"help": "λ of GAE."})
    cliprange: float = field(default=0.2, metadata={"help": "PPO's ratio clip."})
    # the reward
    kl_coef: float = field(
        default=0.01, metadata={"help": "Weight of log π − log π_init in the reward."}
    )
    scale_reward: str = field(
        default="running", metadata={"help": "'running': over the running std; 'none'."}
    )
    cliprange_reward: float = field(
        default=10.0, metadata={"help": "Scaled rewards are clipped to ± this."}
    )
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Subtracted (scaled units) from cut responses."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight a reward function; default 1 each."}
    )
    # the critic
    vf_coef: float = field(default=1.0, metadata={"help": "Weight of the value loss."})
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "Value clip as in PPO2; None: unclipped."}
    )
    value_gate: float | None = field(
        default=1.0, metadata={"help": "Critic alone while value loss exceeds this."}
    )
    separate_value_model: bool = field(
        default=False, metadata={"help": "A copy of the trained layers for the critic."}
    )
    # the rollouts
    num_layers_unfrozen: int | None = field(
        default=4, metadata={"help": "Train the last N layers; None: all."}
    )
    rollout_batch_size: int = field(
        default=64, metadata={"help": "Responses a process samples each iteration."}
    )
    num_epochs_per_rollout: int = field(
        default=2, metadata={"help": "Passes over an iteration's responses."}
    )
    max_prompt_length: int = field(
        default=1124, metadata={"help": "Prompt tokens; the oldest go."}
    )
    max_new_tokens: int = field(default=1024, metadata={"help": "Response tokens."})
    num_samples_kept: int = field(
        default=4, metadata={"help": "Responses an iteration kept in samples.jsonl."}
    )

    def __post_init__(self):
        choices = {
            "loss_type": ("apa", "awr", "ppo"),
            "anchor": ("initial", "rollout"),
            "scale_reward": ("running", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose from {allowed}"
                )
        if self.apa_lambda <= 0:
            raise ValueError(f"apa_lambda={self.apa_lambda}: must be positive")
        update = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.rollout_batch_size % update:
            raise ValueError(
                f"rollout_batch_size={self.rollout_batch_size} is no multiple of "
                f"per_device_train_batch_size × gradient_accumulation_steps = {update}"
            )
        self.logging_steps = self.logging_steps or self.updates_per_iteration
        super().__post_init__()
        check_arguments(self)

    @property
    def micro_steps(self) -> int:
        """Forward-backward passes an iteration."""
        batches = self.rollout_batch_size // self.per_device_train_batch_size
        return batches * self.num_epochs_per_rollout

    @property
    def updates_per_iteration(self) -> int:
        """Optimiser steps an iteration."""
        return self.micro_steps // self.gradient_accumulation_steps

    @classmethod
    def starling(cls, **overrides) -> "APAConfig":
        """Starling's fork (starling.md §1.5 and §4.3): the defaults of this class."""
        return cls(**machine_defaults(overrides))

    @classmethod
    def paper(cls, **overrides) -> "APAConfig":
        """The paper and Microsoft's code for it (starling.md §4.2), HH with 125M."""
        settings = {
            "anchor": "initial",  # the square pulls towards π_init itself
            "apa_lambda": 0.1,  # adv_coeff_sq = 10
            "whiten_advantages": True,  # undocumented in the equations
            "kl_coef": 0.0,  # the KL term is multiplied by 0
            "separate_value_model": True,  # a full second network
            "cliprange_value": None,
            "value_gate": None,
            "cliprange_reward": 100.0,
            "learning_rate": 1e-6,
            "num_layers_unfrozen": 2,
            "rollout_batch_size": 128,
            "per_device_train_batch_size": 8,
            "max_prompt_length": 872,  # sequence length 1000
            "max_new_tokens": 128,
        }
        return cls(**machine_defaults({**settings, **overrides}))


class ActorCritic(nn.Module):
    """Policy and critic as one module: everything trainable happens in `forward`.

    The critic is a head on the policy's last hidden state or, with `separate`, on its own
    copy of the trained layers. Frozen lower layers run once an iteration
    (`trunk_states`); sampling always uses the whole policy.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        value_head: ValueHead | None = None,
        num_layers_unfrozen: int | None = None,
        separate: bool = False,
        adapted: bool = False,
    ):
        super().__init__()
        if not adapted:  # adapters have frozen what they do not train
            freeze_below(policy, num_layers_unfrozen)
        use_fast_backward(policy)
        self.policy = policy
        self.value_head = value_head or ValueHead(policy.config.hidden_size)
        # In a tuple, so that the shared layers are not registered (and saved) twice.
        self._halves = try_split_trunk(policy, num_layers_unfrozen)
        self.value_trunk = copy.deepcopy(self._top) if separate else None

    @property
    def config(self):
        return self.policy.config

    @property
    def _top(self) -> PreTrainedModel:
        """The layers that are trained: the upper half, or the whole trunk."""
        return self._halves[1] if self._halves else self.policy.base_model

    def frozen_reference(self) -> "Reference":
        """A frozen copy of the policy as it is now, on the same trunk."""
        return Reference(self._top, self.policy.get_output_embeddings())

    @torch.no_grad()
    def trunk_states(self, **tokens: Tensor) -> Tensor | None:
        """(N, P+R, H) states below the trained layers; None where there is no split."""
        if self._halves is None:
            return None
        return self._halves[0](**response_inputs(**tokens)).last_hidden_state

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        self.policy.gradient_checkpointing_enable(**kwargs)

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        trunk_states: Tensor | None = None,
        with_entropy: bool = False,
    ) -> dict[str, Tensor]:
        """`logprobs`, `values` of each response token, (N, R), 0 at padding.

        The value of token t is read where t is predicted: before it is known.
        `with_entropy` adds `entropy`, which costs as much as the log-probabilities.
        """
        inputs = response_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
        if trunk_states is None:
            trunk_states = self.trunk_states(
                prompt_ids=prompt_ids,
                prompt_mask=prompt_mask,
                response_ids=response_ids,
                response_mask=response_mask,
            )
        states = top_states(self._top, inputs, trunk_states)
        states = predicting_states(states, response_mask)
        head = self.policy.get_output_embeddings()
        logits = next_token_logits(head, self.config, states)
        logprobs = token_logprobs(logits, response_ids[response_mask])
        entropy = token_entropy(logits) if with_entropy else None
        if self.value_trunk is not None:
            states = top_states(self.value_trunk, inputs, trunk_states)
            states = predicting_states(states, response_mask)
        out = {"logprobs": logprobs, "values": self.value_head(states)}
        out |= {"entropy": entropy} if with_entropy else {}
        return {name: scatter(x, response_mask) for name, x in out.items()}


class Reference:
    """The initial policy, frozen: only its trained layers are a copy."""

    def __init__(self, top: PreTrainedModel, head: nn.Module):
        self.top = copy.deepcopy(top).requires_grad_(False).eval()
        trained = any(p.requires_grad for p in head.parameters())
        self.head = copy.deepcopy(head).requires_grad_(False) if trained else head

    def to(self, device: torch.device) -> None:
        self.top.to(device)
        self.head.to(device)

    @torch.no_grad()
    def logprobs(
        self, tokens: dict[str, Tensor], trunk_states: Tensor | None
    ) -> Tensor:
        """(N, R) log-probabilities of the response tokens under the initial policy."""
        mask = tokens["response_mask"]
        states = top_states(self.top, response_inputs(**tokens), trunk_states)
        states = predicting_states(states, mask)
        logits = next_token_logits(self.head, self.top.config, states)
        return scatter(token_logprobs(logits, tokens["response_ids"][mask]), mask)


def top_states(
    top: PreTrainedModel, inputs: dict[str, Tensor], trunk_states: Tensor | None
) -> Tensor:
    """Last hidden states (N, P+R, H), from the trunk's states where they are known."""
    start = {"input_ids": inputs["input_ids"]}
    if trunk_states is not None:
        start = {"inputs_embeds": trunk_states}
    rest = {k: inputs[k] for k in ("attention_mask", "position_ids")}
    return top(**start, **rest, use_cache=False).last_hidden_state


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """(N, R) rewards: −β (log π − log π_init) a token, the score on the last token."""
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0)
    last = mask.sum(1) - 1
    rewards[torch.arange(len(mask)), last] += scores
    return rewards


class RunningMoments:
    """Count, mean and variance of all rewards so far (Chan et al. 1979, parallel form)."""

    def __init__(self, count: float = 0.0, mean: float = 0.0, m2: float = 0.0):
        self.count, self.mean, self.m2 = count, mean, m2

    def update(self, count: float, mean: float, m2: float) -> None:
        """Add a batch given by its size, mean and Σ(x − mean)²."""
        total, delta = self.count + count, mean - self.mean
        self.m2 += m2 + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Sample standard deviation; 1 until there are two different values."""
        variance = self.m2 / (self.count - 1) if self.count > 1 else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0


class PromptBlocks(torch.utils.data.Dataset):
    """Which prompt each process reads at each micro-step.

    A block of prompts is shown once per micro-step of its iteration; every item says its
    iteration and micro-step, so that nothing has to be counted and resuming is exact.
    Each pass over the prompts has its own order; the last block is filled from the next.
    """

    def __init__(
        self, size: int, block: int, micro_steps: int, iterations: int, seed: int
    ):
        self.block, self.micro_steps, self.iterations = block, micro_steps, iterations
        passes = math.ceil(block * iterations / size)
        draw = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(size, generator=draw) for _ in range(passes)]
        self.order = torch.cat(orders).tolist()

    def __len__(self) -> int:
        return self.iterations * self.micro_steps * self.block

    def __getitem__(self, index: int) -> dict[str, int]:
        iteration, rest = divmod(index, self.micro_steps * self.block)
        micro_step, slot = divmod(rest, self.block)
        prompt = self.order[iteration * self.block + slot]
        return {"prompt": prompt, "iteration": iteration, "micro_step": micro_step}


class APATrainer(WrappedModelTrainer):
    """Tune a policy against rewards with APA (or AWR, PPO: `args.loss_type`).

    `model`: a causal LM or a name for `load_policy`. `reward_funcs`: one or several of a
    reward model, or a function as in TRL, `f(prompts, completions, **columns)` → one
    float a completion; one with a parameter `completion_finished` is told which were cut.
    `train_dataset`, `eval_dataset`: rows with a conversational `prompt`. `peft_config`:
    train adapters (LoRA), in the last `num_layers_unfrozen` layers or in all. Saved and
    resumed as the policy (or its adapters), the critic beside it. Give the *initial*
    policy as `model` also when resuming: it is the reference.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: APAConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: list[PreTrainedTokenizerBase | None] | None = None,
        value_model: ValueHead | None = None,
        callbacks=None,
        optimizers=(None, None),
        peft_config: "PeftConfig | None" = None,
    ):
        args = args or APAConfig.starling(output_dir="apa")
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model)
            model = load_policy(model)
        if processing_class is None:
            raise ValueError("give the tokenizer as processing_class")
        self.rewards = RewardSum(reward_funcs, reward_processing_classes, args)
        self.peft_model = None
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)  # the critic's (and adapters') initial weights
            if peft_config is not None:
                self.peft_model = add_adapters(
                    model, peft_config, args.num_layers_unfrozen
                )
            actor_critic = ActorCritic(
                model,
                value_model,
                args.num_layers_unfrozen,
                args.separate_value_model,
                adapted=peft_config is not None,
            )
        self.reference = actor_critic.frozen_reference()
        self.reward_moments = RunningMoments()
        self.prompts = train_dataset
        self.experience: dict[str, Tensor] | None = None
        self._samples_cleared = False
        self._metrics: dict[str, list[float]] = defaultdict(list)
        super().__init__(
            model=actor_critic,
            args=args,
            data_collator=torch.utils.data.default_collate,
            train_dataset=self._blocks(args, train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.loss_is_scaled_for_ga = False
        self.reference.to(self.accelerator.device)
        self.rewards.to(self.accelerator.device)

    # --- data

    @staticmethod
    def _blocks(args: APAConfig, prompts: Dataset | None) -> PromptBlocks | None:
        """Lay out all iterations in advance, so that there is one epoch to resume in."""
        if prompts is None:
            return None
        block = args.rollout_batch_size * args.world_size
        if args.max_steps <= 0:
            iterations = math.ceil(args.num_train_epochs * len(prompts) / block)
            args.max_steps = iterations * args.updates_per_iteration
        iterations = math.ceil(args.max_steps / args.updates_per_iteration)
        return PromptBlocks(
            len(prompts),
            block,
            args.micro_steps,
            iterations,
            args.data_seed or args.seed,
        )

    def get_train_dataloader(self):
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.args.rollout_batch_size,
            sampler_fn=SequentialSampler,
            is_training=True,
        )

    # --- experience

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Collect experience at an iteration's first micro-step; return a minibatch."""
        if "micro_step" not in inputs:
            return super()._prepare_inputs(inputs)
        iteration, step = int(inputs["iteration"][0]), int(inputs["micro_step"][0])
        if step == 0:
            prompts = self.prompts.select(inputs["prompt"].tolist())
            self.experience = self.collect(prompts, iteration)
        if self.experience is None:
            raise RuntimeError(
                f"resumed inside iteration {iteration}, whose experience is not in the "
                "checkpoint: resume from a folder with a COMPLETE marker"
            )
        rows = self._minibatch_rows(iteration, step)
        chosen = {k: v[rows] for k, v in self.experience.items() if k != "counts"}
        update = step // self.args.gradient_accumulation_steps
        return {**chosen, "count": self.experience["counts"][update]}

    def _minibatch_rows(self, iteration: int, step: int) -> Tensor:
        """Rows of the `step`-th minibatch: a fresh order for each pass, by seed."""
        size = self.args.per_device_train_batch_size
        epoch, batch = divmod(step, self.args.rollout_batch_size // size)
        draw = torch.Generator().manual_seed(self._seed_of(iteration, 1 + epoch))
        order = torch.randperm(self.args.rollout_batch_size, generator=draw)
        return order[batch * size : (batch + 1) * size]

    def _seed_of(self, iteration: int, purpose: int) -> int:
        """A seed for (run, iteration, rank, purpose): sampling is 0, minibatches 1 …"""
        rank = self.accelerator.process_index
        key = np.random.SeedSequence((self.args.seed, iteration, rank, purpose))
        return int(key.generate_state(1)[0])

    def collect(self, prompts: Dataset, iteration: int) -> dict[str, Tensor]:
        """Sample, score and value one iteration's responses; log what they say."""
        args, device = self.args, self.accelerator.device
        rollout = sample(
            self.model.policy,
            self.processing_class,
            prompts["prompt"],
            max_new_tokens=args.max_new_tokens,
            batch_size=args.rollout_batch_size,
            seed=self._seed_of(iteration, 0),
            max_prompt_length=args.max_prompt_length,
        )
        scores = self.rewards(prompts, rollout)
        names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
        tokens = {name: getattr(rollout, name).to(device) for name in names}
        experience = self._values_and_advantages(tokens, scores, rollout.finished)
        self._log_rollout(iteration, rollout, scores, experience)
        return {**experience, "counts": self._token_counts(iteration, experience)}

    def _values_and_advantages(self, tokens, scores, finished) -> dict[str, Tensor]:
        """Log-probs, reference, values and GAE for a rollout, in minibatches."""
        args, mask = self.args, tokens["response_mask"]
        old = self._forward_in_parts(tokens)
        shaped = self._scaled(scores) - args.missing_eos_penalty * (~finished).float()
        rewards = token_rewards(
            shaped.to(mask.device),
            old["logprobs"],
            old["ref_logprobs"],
            mask,
            args.kl_coef,
        )
        advantages, returns = objectives.gae(
            rewards, old["values"], mask, args.gamma, args.gae_lambda
        )
        if args.whiten_advantages:
            moments = self._moments(advantages, mask)
            advantages = objectives.masked_whiten(advantages, mask, moments=moments)
        kept = {k: v for k, v in old.items() if v is not None}
        return {**tokens, **kept, "advantages": advantages, "returns": returns}

    def _forward_in_parts(self, tokens) -> dict[str, Tensor | None]:
        """Trunk, policy, critic and reference over all rows, a minibatch at a time."""
        size, parts = self.args.per_device_train_batch_size, []
        with inference(self.model, self.accelerator.autocast()):
            for i in range(0, len(tokens["response_ids"]), size):
                some = {k: v[i : i + size] for k, v in tokens.items()}
                trunk = self.model.trunk_states(**some)
                out = self.model(**some, trunk_states=trunk, with_entropy=True)
                reference = self.reference.logprobs(some, trunk)
                parts.append({**out, "ref_logprobs": reference, "trunk_states": trunk})
        return {
            key: None if parts[0][key] is None else torch.cat([p[key] for p in parts])
            for key in parts[0]
        }

    def _scaled(self, scores: Tensor) -> Tensor:
        """Divide by the running standard deviation over all processes; clip."""
        if self.args.scale_reward == "none":
            return scores
        everyone = self.accelerator.gather(scores.to(self.accelerator.device)).double()
        spread = ((everyone - everyone.mean()) ** 2).sum().item()
        self.reward_moments.update(len(everyone), everyone.mean().item(), spread)
        limit = self.args.cliprange_reward
        return (scores / self.reward_moments.std).clamp(-limit, limit)

    def _moments(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`masked_moments` of all processes' response tokens together."""
        count = self.accelerator.reduce(mask.sum().to(x.dtype), "sum")

        def mean(values: Tensor) -> Tensor:
            return self.accelerator.reduce(torch.where(mask, values, 0).sum()) / count

        center = mean(x)
        return center, mean((x - center) ** 2)

    def _token_counts(self, iteration: int, experience: dict[str, Tensor]) -> Tensor:
        """(updates,) response tokens each optimiser step averages over, per process.

        Summed over accumulation and processes, then divided by both, because Trainer
        divides the loss by the accumulation steps and DDP averages gradients.
        """
        args = self.args
        lengths = experience["response_mask"].sum(1)
        steps = [
            lengths[self._minibatch_rows(iteration, s)].sum()
            for s in range(args.micro_steps)
        ]
        counts = torch.stack(steps).view(-1, args.gradient_accumulation_steps).float()
        return self.accelerator.reduce(counts.mean(1), "mean")

    # --- loss

    def compute_loss(
        self, model, inputs, return_outputs=False, num_items_in_batch=None
    ):
        names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
        out = model(
            **{name: inputs[name] for name in names},
            trunk_states=inputs.get("trunk_states"),
        )
        policy, value = self._losses(out, inputs)
        gate = self.args.value_gate
        total_value = self.accelerator.reduce(value.detach(), "mean")
        gated = gate is not None and total_value.item() > gate
        # 0 × keeps the policy in the graph: DDP waits for every parameter's gradient.
        loss = self.args.vf_coef * value + (0.0 if gated else 1.0) * policy
        self._log_update(out, inputs, policy, value, gated)
        return (loss, out) if return_outputs else loss

    def _losses(self, out, inputs) -> tuple[Tensor, Tensor]:
        """Policy and value loss of a minibatch, by the formulas of `objectives`."""
        args, mask, count = self.args, inputs["response_mask"], inputs["count"]
        logprobs, advantages = out["logprobs"], inputs["advantages"]
        rest = (advantages, mask)
        if args.loss_type == "apa":
            anchors = {"initial": "ref_logprobs", "rollout": "logprobs"}
            anchor = inputs[anchors[args.anchor]]
            policy = objectives.apa_loss(
                logprobs, anchor, *rest, args.apa_lambda, count
            )
        elif args.loss_type == "awr":
            policy = objectives.awr_loss(logprobs, *rest, args.apa_lambda, count=count)
        else:
            old = inputs["logprobs"]
            policy = objectives.ppo_loss(logprobs, old, *rest, args.cliprange, count)
        value = objectives.value_loss(
            out["values"],
            inputs["values"],
            inputs["returns"],
            mask,
            args.cliprange_value,
            count,
        )
        return policy, value

    # --- logging

    def _log_rollout(self, iteration, rollout: Rollout, scores, experience) -> None:
        mask, returns = experience["response_mask"], experience["returns"]
        kl = objectives.kl_k3(experience["logprobs"], experience["ref_logprobs"])
        unexplained = (returns - experience["values"])[mask].var()
        figures = {
            "reward": scores.mean(),
            "reward_std": scores.std(),
            "kl": torch.where(mask, kl, 0).sum(1).mean(),
            "entropy": objectives.masked_mean(experience["entropy"], mask),
            "length": mask.sum(1).float().mean(),
            "eos_rate": rollout.finished.float().mean(),
            "explained_variance": 1 - unexplained / returns[mask].var().clamp(min=1e-8),
            **self.rewards.last_means,
        }
        for name, value in figures.items():
            self._metrics[name].append(float(value))
        self._keep_samples(iteration, rollout, scores)

    def _log_update(self, out, inputs, policy, value, gated: bool) -> None:
        mask = inputs["response_mask"]
        moved = (out["logprobs"] - inputs["logprobs"]).detach().abs()
        figures = {
            "policy_loss": policy.detach(),
            "value_loss": value.detach(),
            "log_ratio": objectives.masked_mean(moved, mask),
            "gated": float(gated),
        }
        for name, figure in figures.items():
            figure = float(figure)
            if not math.isfinite(figure):
                raise FloatingPointError(
                    f"{name} is {figure} at step {self.state.global_step}: the run "
                    "stopped; the last checkpoint is intact. Lower the learning rate or "
                    "raise apa_lambda"
                )
            self._metrics[name].append(figure)

    def _keep_samples(self, iteration: int, rollout: Rollout, scores: Tensor) -> None:
        """Append a few responses to samples.jsonl, for people to read."""
        if not self.accelerator.is_main_process:
            return
        path = Path(self.args.output_dir) / "samples.jsonl"
        if not self._samples_cleared:
            drop_samples(path, iteration)
            self._samples_cleared = True
        with path.open("a", encoding="utf-8") as file:
            for i in range(min(self.args.num_samples_kept, len(rollout))):
                row = {
                    "iteration": iteration,
                    "prompt": rollout.prompts[i][-1]["content"],
                    "response": rollout.texts[i],
                    "reward": round(float(scores[i]), 4),
                    "finished": bool(rollout.finished[i]),
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what was gathered since the last log."""
        means = {k: sum(v) / len(v) for k, v in self._metrics.items()}
        self._metrics.clear()
        super().log({**logs, **means}, start_time)

    # --- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Sample the held-out prompts with a fixed seed; log reward, length, EOS rate."""
        prompts = self.eval_dataset if eval_dataset is None else eval_dataset
        policy = self.model.policy
        rollout = sample(
            policy,
            self.processing_class,
            prompts["prompt"],
            max_new_tokens=self.args.max_new_tokens,
            seed=self.args.seed,
            max_prompt_length=self.args.max_prompt_length,
        )
        scores = self.rewards(prompts, rollout)
        metrics = {
            "reward": scores.mean().item(),
            "length": rollout.lengths.float().mean().item(),
            "eos_rate": rollout.finished.float().mean().item(),
        }
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in metrics.items()}
        super().log(metrics)  # ours would empty what training gathered for its log
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # --- saving

    def inner_model(self) -> PreTrainedModel:
        return self.peft_model or self.accelerator.unwrap_model(self.model).policy

    def extra_state(self) -> dict[str, nn.Module]:
        """The critic, saved beside the policy."""
        module = self.accelerator.unwrap_model(self.model)
        extra = {"value_head": module.value_head}
        if module.value_trunk is not None:
            extra["value_trunk"] = module.value_trunk
        return extra

    def save_progress(self, folder: Path) -> None:
        """Reward statistics, and the experience that this iteration still needs."""
        moments = self.reward_moments
        state = {"count": moments.count, "mean": moments.mean, "m2": moments.m2}
        if self.accelerator.is_main_process:
            (folder / "reward_moments.json").write_text(json.dumps(state))
        inside = self.state.global_step % self.args.updates_per_iteration
        if inside and self.experience:
            rank = self.accelerator.process_index
            tensors = {k: v.contiguous() for k, v in self.experience.items()}
            save_file(tensors, str(folder / f"experience-{rank}.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        state = json.loads((folder / "reward_moments.json").read_text())
        self.reward_moments = RunningMoments(**state)
        rank = self.accelerator.process_index
        saved = folder / f"experience-{rank}.safetensors"
        if saved.exists():
            device = self.accelerator.device
            self.experience = load_file(str(saved), device=str(device))


def drop_samples(path: Path, iteration: int) -> None:
    """Leave only rows of earlier iterations: a resumed run samples the others anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not splitlines: a response may hold other line separators than a newline.
    lines = path.read_text("utf-8").split("\n") if path.exists() else []
    rows = [line for line in lines if line.endswith("}")]  # a kill may cut the last
    kept = [row for row in rows if json.loads(row)["iteration"] < iteration]
    write_atomically(path, "".join(row + "\n" for row in kept).encode())


class RewardSum:
    """Weighted sum of reward functions: rollout → (N,) scores, each mean kept for logs."""

    def __init__(self, functions, tokenizers, args: APAConfig):
        self.functions = functions if isinstance(functions, list) else [functions]
        self.tokenizers = list(tokenizers or [None] * len(self.functions))
        self.weights = args.reward_weights or [1.0] * len(self.functions)
        if not len(self.functions) == len(self.tokenizers) == len(self.weights):
            raise ValueError(
                f"{len(self.functions)} reward functions, {len(self.tokenizers)} "
                f"tokenizers, {len(self.weights)} weights: give one of each per function"
            )
        for i, function in enumerate(self.functions):
            if isinstance(function, PreTrainedModel):
                function.requires_grad_(False).eval()
                name = function.config._name_or_path
                self.tokenizers[i] = self.tokenizers[i] or load_tokenizer(name)
        self.last_means: dict[str, float] = {}

    def to(self, device) -> None:
        for function in self.functions:
            if hasattr(function, "to"):  # a model, or a function that holds one
                function.to(device)

    def __call__(self, prompts: Dataset, rollout: Rollout) -> Tensor:
        total = torch.zeros(len(rollout))
        for i, (function, weight) in enumerate(
            zip(self.functions, self.weights, strict=True)
        ):
            scores = self._call(function, self.tokenizers[i], prompts, rollout)
            name = getattr(function, "__name__", type(function).__name__)
            self.last_means[f"rewards/{i}_{name}"] = scores.mean().item()
            total += weight * scores
        return total

    def _call(self, function, tokenizer, prompts: Dataset, rollout: Rollout) -> Tensor:
        if isinstance(function, PreTrainedModel):
            return score_responses(
                function, tokenizer, rollout.prompts, rollout.texts, rollout.finished
            )
        columns = {c: prompts[c] for c in prompts.column_names if c != "prompt"}
        completions = [
            [{"role": "assistant", "content": text}] for text in rollout.texts
        ]
        known = inspect.signature(function).parameters
        if "completion_finished" in known:
            columns["completion_finished"] = rollout.finished.tolist()
        values = function(prompts=rollout.prompts, completions=completions, **columns)
        return checked_scores(values, rollout, getattr(function, "__name__", "reward"))


def checked_scores(values, rollout: Rollout, name: str) -> Tensor:
    """Reward values as (N,) float32, or a ValueError that shows the offending sample."""
    values = list(values)
    if len(values) != len(rollout):
        raise ValueError(
            f"{name} returned {len(values)} rewards for {len(rollout)} samples"
        )
    for i, value in enumerate(values):
        if value is None or not math.isfinite(float(value)):
            prompt = rollout.prompts[i][-1]["content"]
            raise ValueError(
                f"{name} returned {value} for sample {i}: prompt {prompt[:200]!r}, "
                f"response {rollout.texts[i][:200]!r}"
            )
    return torch.tensor([float(v) for v in values])
