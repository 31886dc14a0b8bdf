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
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from starling_lib import objectives
from starling_lib.actor_critic import ActorCritic, Reference, join_rows
from starling_lib.checkpoints import (
    WrappedModelTrainer,
    check_arguments,
    last_complete,
    machine_defaults,
)
from starling_lib.journal import line_of, read_jsonl, write_atomically
from starling_lib.models import (
    ValueHead,
    autocast,
    format_inside,
    inference,
    load_policy,
    load_tokenizer,
)
from starling_lib.policy_rewards import (
    KLCoefficient,
    RewardFunction,
    RewardScale,
    RewardSum,
    RunningMoments,
    checked_scores,
    token_rewards,
)
from starling_lib.rankings import map_rows
from starling_lib.rollouts import (
    TOKEN_FIELDS,
    Rollout,
    encode_prompt,
    given_responses,
    sample,
    scatter,
    token_logprobs,
)
from starling_lib.sharding import free_whole_weights, is_sharded
from starling_lib.trunk import add_adapters

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = [
    "APAConfig",
    "APATrainer",
    "ActorCritic",
    "Reference",
    "RewardSum",
    "RunningMoments",
    "checked_scores",
    "token_rewards",
]


@dataclass
class APAConfig(TrainingArguments):
    """Arguments of `APATrainer`; the defaults are those of Starling's code.

    One iteration samples `rollout_batch_size` responses a process and makes
    `num_epochs_per_rollout` passes over them in minibatches of
    `per_device_train_batch_size` × `gradient_accumulation_steps`; `max_steps` counts
    those optimiser steps.

    Logged each iteration: averages over its responses or tokens, of all processes. From
    fresh responses, before they are trained on:
      reward            score of the reward functions, before scaling. Should rise.
      rewards/…         each function's own, by its number and name, before its weight.
      reward_std        its spread; near 0 means every response scores alike: no signal.
      kl                Σ over a response of k3(π, π_init), in nats. Grows slowly; a jump
                        means λ is too small or the learning rate too large.
      kl_exact          the same from the whole distributions, with `exact_kl`: k3 is
                        right on average, this for each token.
      kl_coef           weight of the KL in the reward; moves only with a `kl_target`. If
                        it keeps growing, λ or the learning rate pulls harder.
      reward_scale      what rewards are divided by before they become advantages. While
                        it drifts, A/λ changes its meaning.
      entropy           of the next-token distribution, nats a token. Falling to 0 is
                        collapse into one phrase.
      length, eos_rate  tokens a response, share that ended by themselves. Length running
                        to the limit means the reward pays for length.
      explained_variance  1 − Var(R − V)/Var(R): 0 knows nothing, 1 knows all; below 0 the
                        critic misleads.
      dropped_share     of a server's replies (`ServedSampler`), those not kept, and how
                        many for which reason: dropped_failed, dropped_ending,
                        dropped_round_trip, dropped_tokens, dropped_length.
    Means over the micro-steps of its updates:
      value_loss        ½(V − R)². Should fall, then stay.
      policy_loss       the loss of `loss_type`; comparable only within a run.
      log_ratio         |log π − log π_old| a token: how far an iteration moves. Growing,
                        the policy moves beyond its data.
      gated             share of micro-steps on which only the critic was trained. Stuck
                        at 1, the policy learns nothing from its reward.
      ptx_loss          NLL a token of the given completions, with `ptx_coef`. Rising, the
                        policy forgets how to write.
      loss              `vf_coef`·value_loss + policy_loss + `ptx_coef`·ptx_loss, what is
                        minimised; gated micro-steps have the first term alone, so that
                        completions are not learnt from either.
      grad_norm         of an update's gradient before clipping, the last one's. At a
                        spike, see that iteration's responses.
    On `eval_dataset`, from responses with a fixed seed:
      eval_reward, eval_length, eval_eos_rate  as above; comparable between steps. If
                        eval_reward falls while reward rises, prompts are learnt by heart.
    Trainer's own: epoch, step, learning_rate, and at the end train_loss, train_runtime,
    train_samples_per_second, train_steps_per_second, total_flos.

    A loss that is not finite or a log_ratio above `log_ratio_limit` stops the run, and is
    neither saved nor marked COMPLETE: what an update made is measured before it is saved.
    """

    # Where a default comes from. S: Starling's script, trlx/examples/hh/mistral_apa.py; L:
    # Starling's loss, trlx/trlx/models/modeling_ppo.py; "ours": nothing to take it from.
    # Adam's β₁ = 0.9 and ε = 1e-8 are S's and TrainingArguments' alike. max_grad_norm is
    # TrainingArguments' 1.0, for both presets: so does Microsoft's
    # configs/accelerate/zero2-bf16.yaml; S names a file so called that was not released.

    # S: lr=2e-7
    learning_rate: float = field(
        default=2e-7, metadata={"help": "Starling: 2e-7, constant."}
    )
    # S: cosine_annealing from lr to eta_min=2e-7
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Starling's cosine had equal ends."}
    )
    # S: betas=(0.9, 0.95)
    adam_beta2: float = field(default=0.95, metadata={"help": "Starling: 0.95."})
    # S: weight_decay=1e-6
    weight_decay: float = field(default=1e-6, metadata={"help": "Starling: 1e-6."})
    # S: batch_size=4
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Responses in a minibatch."}
    )
    # ours, and the next two
    logging_steps: float = field(
        default=0, metadata={"help": "Steps between logs; 0: once an iteration."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "False: a NaN is shown, not hidden."}
    )
    # --- what is optimised

    # L: the square
    loss_type: str = field(
        default="apa",
        metadata={"help": "'apa', 'awr' or 'ppo' on the same experience."},
    )
    # L: coefficient 1 before the advantage
    apa_lambda: float = field(
        default=1.0, metadata={"help": "λ: target log-ratio is A/λ (also AWR's λ)."}
    )
    # L: the rollout's log-probabilities
    anchor: str = field(
        default="rollout",
        metadata={"help": "log-ratio against 'initial' or 'rollout'."},
    )
    # L: as GAE gives them
    whiten_advantages: bool = field(
        default=False, metadata={"help": "Unit variance over response tokens."}
    )
    # S: gamma=1
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    # S: lam=0.95
    gae_lambda: float = field(default=0.95, metadata={"help": "λ of GAE."})
    # S: cliprange=0.2, which APA's loss does not use
    cliprange: float = field(default=0.2, metadata={"help": "PPO's ratio clip."})
    # --- the reward

    # S: init_kl_coef=0.01
    kl_coef: float = field(
        default=0.01, metadata={"help": "Weight of log π − log π_init in the reward."}
    )
    # S: target=None
    kl_target: float | None = field(
        default=None,
        metadata={"help": "Nats a response that kl_coef is steered to; None: fixed."},
    )
    # S: horizon=10000, of no effect without a target
    kl_horizon: float = field(
        default=10_000,
        metadata={"help": "Responses in which kl_coef moves by a fifth at most."},
    )
    # S: scale_reward="running"
    scale_reward: str = field(
        default="running",
        metadata={
            "help": "Divide by the std of all rewards so far ('running'), of the first "
            "iteration ('reference'), or not ('none')."
        },
    )
    # S: cliprange_reward=10
    cliprange_reward: float = field(
        default=10.0, metadata={"help": "Scaled rewards are clipped to ± this."}
    )
    # S has none; its authors report a shift (COLM 2024), not how large
    reward_shift: float = field(
        default=0.0,
        metadata={
            "help": "Added to the scaled reward; > 0 pays for ending (Starling)."
        },
    )
    # ours
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Subtracted (scaled units) from cut responses."}
    )
    # ours
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight a reward function; default 1 each."}
    )
    # --- the critic

    # S: vf_coef=1
    vf_coef: float = field(default=1.0, metadata={"help": "Weight of the value loss."})
    # S: cliprange_value=0.2
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "Value clip as in PPO2; None: unclipped."}
    )
    # L: only the value loss while it is above 1
    value_gate: float | None = field(
        default=1.0,
        metadata={
            "help": "Policy loss and PTX are off while the value loss exceeds this; None: "
            "never. Trained layers that policy and critic share still move, and the "
            "policy with them."
        },
    )
    # S: a value head on the policy's trunk
    separate_value_model: bool = field(
        default=False, metadata={"help": "A copy of the trained layers for the critic."}
    )
    # S has none; its authors report a pretrained critic (COLM 2024), without code
    critic_warmup_iterations: int = field(
        default=0,
        metadata={
            "help": "First iterations on the value loss alone; layers that it shares "
            "with the policy move, too (see value_gate)."
        },
    )
    # --- staying a language model

    # ours
    ptx_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the NLL of each prompt's `completion` (0: off)."},
    )
    # --- the rollouts

    # S: num_layers_unfrozen=4
    num_layers_unfrozen: int | None = field(
        default=4, metadata={"help": "Train the last N layers; None: all."}
    )
    # S: num_rollouts=64
    rollout_batch_size: int = field(
        default=64, metadata={"help": "Responses a process samples each iteration."}
    )
    # ours; S: chunk_size=4, for memory
    generation_batch_size: int | None = field(
        default=None,
        metadata={"help": "Responses sampled at once; None: all of an iteration's."},
    )
    # S: ppo_epochs=2
    num_epochs_per_rollout: int = field(
        default=2, metadata={"help": "Passes over an iteration's responses."}
    )
    # S: seq_length=2148, less max_new_tokens
    max_prompt_length: int = field(
        default=1124, metadata={"help": "Longer prompts are dropped, with a count."}
    )
    # S: max_new_tokens=1024
    max_new_tokens: int = field(default=1024, metadata={"help": "Response tokens."})
    # ours, and all below
    num_samples_kept: int = field(
        default=4, metadata={"help": "Responses an iteration kept in samples.jsonl."}
    )
    exact_kl: bool = field(
        default=False,
        metadata={"help": "Log `kl_exact` too, over the whole vocabulary."},
    )
    log_ratio_limit: float = field(
        default=10.0,
        metadata={
            "help": "Stop where a minibatch's mean |log π − log π_old| is above."
        },
    )

    def __post_init__(self):
        choices = {
            "loss_type": ("apa", "awr", "ppo"),
            "anchor": ("initial", "rollout"),
            "scale_reward": ("running", "reference", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose from {allowed}"
                )
        for name in ("apa_lambda", "kl_target", "kl_horizon"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value}: must be positive")
        update = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.generation_batch_size is not None and self.generation_batch_size < 1:
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size}: at least 1, or None"
            )
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
        """Starling's fork: the defaults of this class, where the sources are named."""
        return cls(**machine_defaults(overrides))

    @classmethod
    def paper(cls, **overrides) -> "APAConfig":
        """The paper and Microsoft's code for it (microsoft/RLHF-APA), HH with 125M.

        Its examples/sppo_hh.py agrees with Starling's script, and so with the defaults, in
        AdamW (betas, weight decay), the constant rate, gamma=1, lam=0.95, vf_coef=1,
        ppo_epochs=2 and scale_reward="running". Fields that are "ours" there are here.
        """
        # M: examples/sppo_hh.py; L: the loss, trlx/models/modeling_sppo.py; T: the
        # trainer, trlx/trainer/accelerate_sppo_trainer.py.
        settings = {
            "anchor": "initial",  # L: the square pulls towards π_init itself
            "apa_lambda": 0.1,  # M: ADV_COEFF_SQ = 10
            "whiten_advantages": True,  # L; not in the paper's equations
            "kl_coef": 0.0,  # T: the KL term is multiplied by 0
            # T: a network of its own, a whole copy; ours copies the trained layers, since
            # the frozen ones below are the same
            "separate_value_model": True,
            "cliprange_value": None,  # L: ½(V − R)²; M's cliprange_value is not used
            "value_gate": None,  # L has none
            "cliprange_reward": 100.0,  # M: cliprange_reward=100
            "learning_rate": 1e-6,  # M: lr=1e-6, eta_min=1e-6
            "num_layers_unfrozen": 2,  # M: num_layers_unfrozen=2; paper, App. C
            "rollout_batch_size": 128,  # M, 125M: num_rollouts = 128
            "per_device_train_batch_size": 8,  # M, 125M: batch_size = 8
            "max_prompt_length": 872,  # M: seq_length=1000, less max_new_tokens
            "max_new_tokens": 128,  # M: max_new_tokens=128
        }
        return cls(**machine_defaults({**settings, **overrides}))


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
    A reward model whose lower layers are the policy's frozen ones is read on their states.
    `train_dataset`, `eval_dataset`: rows with a conversational `prompt`. `peft_config`:
    train adapters (LoRA), in the last `num_layers_unfrozen` layers or in all. `sampler`:
    gives the responses, called as `rollouts.sample` (with `keep_after` if it knows that
    parameter); a dict `figures` that it may have is logged. Saved and resumed as the
    policy (or its adapters), the critic beside it. Give the *initial* policy as `model`
    also when resuming: it is the reference.
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
        sampler: Callable[..., Rollout] = sample,
    ):
        # A copy: `max_steps` is filled in, by the prompts of this trainer.
        args = copy.copy(args or APAConfig.starling(output_dir="apa"))
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model)
            model = load_policy(model)
        if processing_class is None:
            raise ValueError("give the tokenizer as processing_class")
        fit = {
            "tokenizer": processing_class,
            "limit": _prompt_limit(model.config, args),
        }
        train_dataset = fitting_prompts(train_dataset, **fit)
        eval_dataset = fitting_prompts(eval_dataset, **fit)
        if args.ptx_coef and "completion" not in train_dataset.column_names:
            raise ValueError(
                f"ptx_coef={args.ptx_coef} needs a column 'completion' in train_dataset: "
                'for each prompt [{"role": "assistant", "content": …}]'
            )
        self.rewards = RewardSum(
            reward_funcs, reward_processing_classes, args.reward_weights
        )
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
        self.reward_scale = RewardScale(
            args.scale_reward, args.cliprange_reward, args.reward_shift
        )
        self.kl_coef = KLCoefficient(args.kl_coef, args.kl_target, args.kl_horizon)
        self.prompts, self.sampler = train_dataset, sampler
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
        self._check_sampler()
        self._warn_of_two_precisions()
        self.reference.to(self.accelerator.device)
        self.rewards.to(self.accelerator.device)
        self.rewards.share_trunk(actor_critic.frozen_trunk)

    def _check_sampler(self) -> None:
        """Raise ValueError where processes would wait for each other for ever.

        A sharded policy is put together by all of them for every token, and each samples
        as many tokens as its own responses have.
        """
        sharded = is_sharded(self.inner_model()) or self.is_fsdp_enabled
        if self.sampler is sample and (sharded or is_deepspeed_zero3_enabled()):
            raise ValueError(
                "a policy sharded by FSDP or ZeRO-3 is not sampled here: train with DDP, "
                "the whole policy on each GPU, or give a `sampler`"
            )

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
            args.seed if args.data_seed is None else args.data_seed,
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
            self.experience = None  # its states make room for the next
            self.experience = self.collect(prompts, iteration)
        if self.experience is None:
            raise RuntimeError(
                f"resumed inside iteration {iteration}, whose experience is not in the "
                "checkpoint: resume from a folder with a COMPLETE marker"
            )
        return self._minibatch(iteration, step)

    def _minibatch(self, iteration: int, step: int) -> dict[str, Tensor]:
        """The `step`-th minibatch of the experience, and the tokens its update has."""
        rows = self._minibatch_rows(iteration, step)
        update = step // self.args.gradient_accumulation_steps
        return {
            name: x[update if name.endswith("count") else rows]
            for name, x in self.experience.items()
        }

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
        rollout = self.sampler(
            self.model.policy,
            self.processing_class,
            prompts["prompt"],
            max_new_tokens=args.max_new_tokens,
            batch_size=args.generation_batch_size or args.rollout_batch_size,
            seed=self._seed_of(iteration, 0),
            **({"keep_after": self._trunk_layers()} if self._keeps_states() else {}),
        )
        tokens = {name: getattr(rollout, name).to(device) for name in TOKEN_FIELDS}
        sampled = {n: x.to(device) for n, x in (rollout.states or {}).items()}
        old, on_trunk = self._forward_in_parts(tokens, sampled)
        scores = self.rewards(prompts, rollout, on_trunk)
        experience = self._with_advantages(tokens, old, scores, rollout.finished)
        self._log_rollout(iteration, rollout, scores, experience)
        if args.ptx_coef:
            experience |= self._given_completions(prompts)
        counts = {
            name.replace("response_mask", "count"): self._token_counts(iteration, mask)
            for name, mask in experience.items()
            if name.endswith("response_mask")
        }
        return experience | counts

    def _given_completions(self, prompts: Dataset) -> dict[str, Tensor]:
        """`ptx_…` tokens and trunk states of the prompts' own completions."""
        texts = [messages[-1]["content"] for messages in prompts["completion"]]
        rows = given_responses(
            self.processing_class, prompts["prompt"], texts, self.args.max_new_tokens
        )
        device = self.accelerator.device
        tokens = {name: getattr(rows, name).to(device) for name in TOKEN_FIELDS}
        states = []
        with inference(self.model, self.accelerator.autocast()):
            for some in self._in_parts(tokens):
                states.append(self.model.trunk_states(**some))
        if states[0] is not None:
            tokens["trunk_states"] = torch.cat(states)
        return {f"ptx_{name}": x for name, x in tokens.items()}

    def _in_parts(self, tensors: dict) -> Iterator[dict]:
        """Minibatches of rows, in order; none of no tensors."""
        size = self.args.per_device_train_batch_size
        for i in range(0, len(next(iter(tensors.values()), ())), size):
            yield {name: x[i : i + size] for name, x in tensors.items()}

    def _with_advantages(self, tokens, old, scores, finished) -> dict[str, Tensor]:
        """A rollout's tokens and forward pass, and GAE of its rewards."""
        args, mask = self.args, tokens["response_mask"]
        everyone = self.accelerator.gather(scores.to(mask.device))
        shaped = self.reward_scale(scores, everyone)
        shaped = shaped - args.missing_eos_penalty * (~finished).float()
        rewards = token_rewards(
            shaped.to(mask.device),
            old["logprobs"],
            old["ref_logprobs"],
            mask,
            self.kl_coef.value,
        )
        advantages, returns = objectives.gae(
            rewards, old["values"], mask, args.gamma, args.gae_lambda
        )
        if args.whiten_advantages:
            moments = self._moments(advantages, mask)
            advantages = objectives.masked_whiten(advantages, mask, moments=moments)
        return {**tokens, **old, "advantages": advantages, "returns": returns}

    def _keeps_states(self) -> bool:
        """Can the sampler give the trunk's states (a server cannot), as training's are?"""
        trains, samples = self._formats()
        parameters = inspect.signature(self.sampler).parameters
        return "keep_after" in parameters and trains == samples

    def _formats(self) -> list[torch.dtype | None]:
        """In which training, then sampling and scoring, make their products (None: own)."""
        device = self.accelerator.device
        casts = self.accelerator.autocast(), autocast(device)
        return [format_inside(cast, device) for cast in casts]

    def _warn_of_two_precisions(self) -> None:
        trains, samples = self._formats()
        if trains != samples:
            warnings.warn(
                f"training computes in {trains or torch.float32}, sampling and scoring in "
                f"{samples or torch.float32}: build the config by APAConfig.starling() or "
                ".paper(), which take the machine's format, or set STARLING_PRECISION",
                stacklevel=3,
            )

    def _trunk_layers(self) -> list[int]:
        """After which layers of the frozen trunk its states serve somebody."""
        trunk = self.model.frozen_trunk
        top = [len(trunk.layers)] if trunk else []
        return sorted({*self.rewards.trunk_layers, *top})

    def _forward_in_parts(
        self, tokens, sampled: dict[int, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """One pass of all rows, a minibatch at a time: what `_forward_part` gives.

        The trunk's states, where they were not `sampled` with the responses, are computed
        once. They serve policy, critic, reference and, beside them in the result, by
        number, the reward models that have the same lower layers.
        """
        parts, scores, known = [], [], self._in_parts(sampled or {})
        with inference(self.model, self.accelerator.autocast()):
            for some in self._in_parts(tokens):
                below = next(known, None)
                below = below or self.model.trunk_layers(self._trunk_layers(), **some)
                scores.append(self.rewards.read(below, some))
                parts.append(self._forward_part(some, below.get(max(below, default=0))))
        old = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return old, {i: torch.cat([part[i] for part in scores]) for i in scores[0]}

    def _forward_part(
        self, some: dict[str, Tensor], trunk: Tensor | None
    ) -> dict[str, Tensor]:
        """Policy, critic and reference of a minibatch, without gradients."""
        exact, mask = self.args.exact_kl, some["response_mask"]
        out = self.model(
            **some, trunk_states=trunk, for_logging=True, want_logits=exact
        )
        if trunk is not None:
            out["trunk_states"] = trunk
        if not exact:
            return out | {"ref_logprobs": self.reference.logprobs(some, trunk)}
        both = out.pop("logits"), self.reference.logits(some, trunk)
        chosen = token_logprobs(both[1], some["response_ids"][mask])
        found = {"ref_logprobs": chosen, "kl_exact": objectives.kl_exact(*both)}
        return out | {name: scatter(x, mask) for name, x in found.items()}

    def _moments(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`masked_moments` of all processes' response tokens together."""
        count = self.accelerator.reduce(mask.sum().to(x.dtype), "sum")

        def mean(values: Tensor) -> Tensor:
            return self.accelerator.reduce(torch.where(mask, values, 0).sum()) / count

        center = mean(x)
        return center, mean((x - center) ** 2)

    def _token_counts(self, iteration: int, mask: Tensor) -> Tensor:
        """(updates,) tokens of `mask` each optimiser step averages over, per process.

        Summed over accumulation and processes, then divided by both, because Trainer
        divides the loss by the accumulation steps and DDP averages gradients.
        """
        args = self.args
        lengths = mask.sum(1)
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
        rows = sampled_rows(inputs)
        if self.args.ptx_coef:  # in the same forward: DDP wants one a step
            rows = join_rows(rows, {n: inputs[f"ptx_{n}"] for n in rows})
        out, ptx = self._without_ptx(model(**rows), inputs)
        policy, value = self._losses(out, inputs)
        gated = self._gated(value.detach())
        self._log_update(out, inputs, policy, value, gated)
        if ptx is not None:
            policy = policy + self.args.ptx_coef * ptx
            self._metrics["ptx_loss"].append(ptx.item())
        # 0 × keeps the policy in the graph: DDP waits for every parameter's gradient.
        loss = self.args.vf_coef * value + (0.0 if gated else 1.0) * policy
        return (loss, out) if return_outputs else loss

    def _without_ptx(self, out, inputs) -> tuple[dict[str, Tensor], Tensor | None]:
        """The outputs of the sampled rows, and the NLL a token of given completions."""
        if not self.args.ptx_coef:
            return out, None
        rows, width = inputs["response_mask"].shape
        given = inputs["ptx_response_mask"]
        logprobs = out["logprobs"][rows:, : given.shape[1]]
        sampled = {name: x[:rows, :width] for name, x in out.items()}
        return sampled, -objectives.masked_mean(logprobs, given, inputs["ptx_count"])

    def _gated(self, value: Tensor) -> bool:
        """Is the critic trained alone: at the start, or while its loss is large?"""
        args, gate = self.args, self.args.value_gate
        iteration = self.state.global_step // args.updates_per_iteration
        large = (
            gate is not None and self.accelerator.reduce(value, "mean").item() > gate
        )
        return large or iteration < args.critic_warmup_iterations

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
        mask = experience["response_mask"]
        both = experience["logprobs"], experience["ref_logprobs"]
        kl = objectives.response_kl(*both, mask).mean()
        everyone = self.accelerator.gather(scores.to(mask.device))
        figures = {
            "reward": scores.mean(),
            "reward_std": everyone.std(correction=int(len(everyone) > 1)),
            "kl": kl,
            "kl_coef": self.kl_coef.value,
            "reward_scale": self.reward_scale.std,
            "length": mask.sum(1).float().mean(),
            "eos_rate": rollout.finished.float().mean(),
            **self._token_figures(experience),
            **self.rewards.last_means,
            **getattr(self.sampler, "figures", {}),
        }
        if "kl_exact" in experience:
            figures["kl_exact"] = experience.pop("kl_exact").sum(1).mean()
        for name, value in figures.items():
            self._metrics[name].append(float(value))
        count = len(rollout) * self.accelerator.num_processes
        self.kl_coef.update(self.accelerator.reduce(kl, "mean").item(), count)
        self._keep_samples(iteration, rollout, scores)

    def _token_figures(self, experience: dict[str, Tensor]) -> dict[str, Tensor]:
        """`entropy` and `explained_variance`: all processes' response tokens together."""
        names = ("response_mask", "entropy", "values", "returns")
        mine = torch.stack([experience[name].float() for name in names], -1)
        padded = self.accelerator.pad_across_processes(mine, dim=1)
        mask, entropy, values, returns = self.accelerator.gather(padded).unbind(-1)
        mask = mask.bool()
        correction = int(mask.sum() > 1)  # a single number has a variance of 0, not NaN
        unexplained = (returns - values)[mask].var(correction=correction)
        variance = returns[mask].var(correction=correction)
        return {
            "entropy": objectives.masked_mean(entropy, mask),
            "explained_variance": 1 - unexplained / variance.clamp(min=1e-8),
        }

    def _log_update(self, out, inputs, policy, value, gated: bool) -> None:
        figures = {
            "policy_loss": float(policy.detach()),
            "value_loss": float(value.detach()),
            "log_ratio": float(log_ratio(out, inputs)),
            "gated": float(gated),
        }
        self._check_figures(figures)
        for name, figure in figures.items():
            self._metrics[name].append(figure)

    def _check_figures(self, figures: dict[str, float]) -> None:
        """Raise FloatingPointError for one that is not finite, or too large a ratio."""
        step, limit = self.state.global_step, self.args.log_ratio_limit
        for name, figure in figures.items():
            if not math.isfinite(figure):
                raise FloatingPointError(
                    f"{name} is {figure} at step {step}: the run stopped; "
                    + self._way_out()
                )
        if figures["log_ratio"] > limit:
            raise FloatingPointError(
                f"log_ratio, mean |log π − log π_old|, is {figures['log_ratio']:.1f} at "
                f"step {step}, above log_ratio_limit={limit}: the policy left its "
                f"samples; {self._way_out()}"
            )

    def _way_out(self) -> str:
        found = last_complete(self.args.output_dir)
        left = "there is no good checkpoint yet"
        if found:
            left = f"the newest good checkpoint is {found.name}"
        return f"{left}. Lower the learning rate or raise apa_lambda"

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
        """Add the means of what was gathered since the last log, over processes, too."""
        means = {k: sum(v) / len(v) for k, v in self._metrics.items()}
        self._metrics.clear()
        if means and self.accelerator.num_processes > 1:
            # Each process has as many responses and minibatches as the others.
            mine = torch.tensor(list(means.values()), dtype=torch.float64)
            every = self.accelerator.reduce(mine.to(self.accelerator.device), "mean")
            means = dict(zip(means, every.tolist(), strict=True))
        super().log({**logs, **means}, start_time)

    # --- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Sample the held-out prompts with a fixed seed; log reward, length, EOS rate."""
        prompts = self.eval_dataset if eval_dataset is None else eval_dataset
        policy = self.model.policy
        rollout = self.sampler(
            policy,
            self.processing_class,
            prompts["prompt"],
            max_new_tokens=self.args.max_new_tokens,
            batch_size=self.args.generation_batch_size or 64,
            seed=self.args.seed,
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

    def check_update(self) -> None:
        """Raise FloatingPointError where the last update lost the policy.

        What a forward finds before each update comes too late for what the one before has
        saved, and never after an iteration's last. The same in all processes; the random
        state is left as it was.
        """
        if self.experience is None or self.state.global_step == 0:
            return
        mine = torch.stack([largest_weight(self.model), self._last_log_ratio()])
        worst = self.accelerator.gather(mine[None]).max(0).values  # NaN if one is
        names = ("largest_weight", "log_ratio")
        self._check_figures(dict(zip(names, worst.tolist(), strict=True)))

    def _last_log_ratio(self) -> Tensor:
        """`log_ratio` of the last update's last minibatch, under the weights of now."""
        args = self.args
        iteration, update = divmod(
            self.state.global_step - 1, args.updates_per_iteration
        )
        step = (update + 1) * args.gradient_accumulation_steps - 1
        inputs = self._minibatch(iteration, step)
        with inference(self.model, self.accelerator.autocast()):
            out = self.model(**sampled_rows(inputs))
        if is_sharded(self.inner_model()) or self.is_fsdp_enabled:
            free_whole_weights(self.model)
        return log_ratio(out, inputs)

    def save_progress(self, folder: Path) -> None:
        """Reward statistics, KL coefficient, and the experience still needed."""
        state = {**self.reward_scale.state(), "kl_coef": self.kl_coef.value}
        if self.accelerator.is_main_process:
            (folder / "reward_state.json").write_text(json.dumps(state))
        inside = self.state.global_step % self.args.updates_per_iteration
        if inside and self.experience:
            rank = self.accelerator.process_index
            tensors = {k: v.contiguous() for k, v in self.experience.items()}
            save_file(tensors, str(folder / f"experience-{rank}.safetensors"))

    def _load_optimizer_and_scheduler(self, checkpoint):
        # Here and not in `_load_from_checkpoint`, which DeepSpeed's resuming passes by.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_progress(Path(checkpoint))

    def _load_progress(self, folder: Path) -> None:
        """What `save_progress` wrote."""
        state = json.loads((folder / "reward_state.json").read_text())
        self.kl_coef.value = state.pop("kl_coef")
        self.reward_scale.moments = RunningMoments(**state)
        rank = self.accelerator.process_index
        saved = folder / f"experience-{rank}.safetensors"
        if saved.exists():
            # Not by safetensors: it knows no "cpu:0", as one of several processes has.
            tensors, device = load_file(str(saved)), self.accelerator.device
            self.experience = {name: x.to(device) for name, x in tensors.items()}


def _prompt_limit(config, args: APAConfig) -> int:
    """Tokens that a prompt may have: as asked for, and with a response in the window."""
    window = getattr(config, "max_position_embeddings", None) or math.inf
    return int(min(args.max_prompt_length, window - args.max_new_tokens))


def fitting_prompts(
    dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase, limit: int
) -> Dataset | None:
    """The rows whose prompt has at most `limit` tokens; the others go, with a count.

    Raises ValueError when none is left, TypeError for a stream.
    """
    if dataset is None:
        return None
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            "prompts are read by their number, which a stream does not have: give a table "
            "of them, such as load_rankings(...).select_columns('prompt')"
        )

    def count(row: dict) -> dict:
        return {"tokens": len(encode_prompt(tokenizer, row["prompt"]))}

    lengths = map_rows(dataset, count, desc="measuring prompts")["tokens"]
    kept = [i for i, length in enumerate(lengths) if length <= limit]
    if len(kept) == len(lengths):
        return dataset
    message = (
        f"{len(lengths) - len(kept)} of {len(lengths)} prompts are longer than {limit} "
        "tokens (max_prompt_length, or the model's window less max_new_tokens)"
    )
    if not kept:
        raise ValueError(f"{message}: none is left")
    warnings.warn(f"{message}: left out", stacklevel=3)
    return dataset.select(kept)


def sampled_rows(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a minibatch `ActorCritic` reads: the sampled responses, without PTX's."""
    names = (*TOKEN_FIELDS, "trunk_states")
    return {name: inputs[name] for name in names if name in inputs}


def log_ratio(out: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """Mean |log π − log π_old| over a minibatch's response tokens, without gradient."""
    moved = (out["logprobs"] - inputs["logprobs"]).detach().abs()
    return objectives.masked_mean(moved, inputs["response_mask"])


@torch.no_grad()
def largest_weight(module: nn.Module) -> Tensor:
    """Largest |w| of what is trained, NaN if one is; of this process's pieces."""
    trained = [p for p in module.parameters() if p.requires_grad]
    pieces = [p.to_local() if hasattr(p, "to_local") else p for p in trained]
    norms = [torch.linalg.vector_norm(x, math.inf) for x in pieces if x.numel()]
    return torch.stack([x.float() for x in norms]).max()


def drop_samples(path: Path, iteration: int) -> None:
    """Leave only rows of earlier iterations: a resumed run samples the others anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_jsonl(path, torn_end=True) if path.exists() else []
    kept = [line_of(row) for row in rows if row["iteration"] < iteration]
    write_atomically(path, b"".join(kept))
