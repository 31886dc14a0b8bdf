"""One training run of the tiny model as a process of its own, for the slow tests.

    python training_process.py OUTPUT_DIR [--die-in STAGE --at STEP]
    torchrun --nproc_per_node 2 training_process.py OUTPUT_DIR --first-gradient …

With a checkpoint in OUTPUT_DIR it resumes. Dying is kill -9, in one of STAGES once the
run has reached STEP; `disk` does not kill but lets no file grow beyond 4 KiB, which is
how a full disk looks to who writes a checkpoint.
"""

import argparse
import os
import resource
import signal
from pathlib import Path

import torch
from conftest import toy_rows
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import TrainerCallback

from starling_lib import generation
from starling_lib.apa import APAConfig, APATrainer
from starling_lib.generation import InverseSampling
from starling_lib.models import load_policy, load_reward_model, load_tokenizer
from starling_lib.reward import KwiseRewardConfig, KwiseRewardTrainer

STAGES = ("sampling", "scoring", "update", "step", "saving", "disk")


class Death(TrainerCallback):
    """Kills its process where it was told to; asked at every place that could be it."""

    def __init__(self, stage: str | None, step: int):
        self.stage, self.step, self.reached = stage, step, 0

    def strike(self, stage: str) -> None:
        if stage == self.stage and self.reached >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_begin(self, args, state, control, **kwargs):
        self.reached = state.global_step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.strike("update")  # gradients are there, nothing is learnt from them yet

    def on_step_end(self, args, state, control, **kwargs):
        self.reached = state.global_step
        self.strike("step")
        if self.stage == "disk" and self.reached >= self.step:
            # Python ignores the signal, and writing fails as on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def dies_while_saving(trainer, death: Death):
    """The same trainer, which may die when weights and optimiser are written, not more."""
    save_rng_state = trainer._save_rng_state

    def maybe(output_dir):
        death.strike("saving")
        save_rng_state(output_dir)

    trainer._save_rng_state = maybe
    trainer.add_callback(death)
    return trainer


class SaveFirstGradient(TrainerCallback):
    """What the optimiser is about to use, from the main process."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 0 and state.is_world_process_zero:
            found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            found = {n: g.clone() for n, g in found.items() if g is not None}
            save_file(found, str(Path(args.output_dir) / "gradient.safetensors"))


def share_of_a(prompts, completions, **columns) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [text.count("a") + len(text) / 10 for text in texts]


def reward_run(options) -> KwiseRewardTrainer:
    lora = LoraConfig(r=4, target_modules="all-linear") if options.lora else None
    args = KwiseRewardConfig.for_this_machine(
        output_dir=options.output_dir,
        num_layers_unfrozen=options.layers,
        cache_trunk=options.layers is not None,
        center_rewards_coefficient=0.1,
        per_device_train_batch_size=options.batch,
        max_steps=options.steps,
        learning_rate=1e-3,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 1,
        max_grad_norm=0,
        disable_tqdm=True,
    )
    tokenizer = load_tokenizer("tiny")
    return KwiseRewardTrainer(
        load_reward_model("tiny", tokenizer),
        args,
        Dataset.from_list(toy_rows()),
        processing_class=tokenizer,
        peft_config=lora,
    )


def apa_run(options, death: Death) -> APATrainer:
    def reward(prompts, completions, **columns):
        death.strike("scoring")
        return share_of_a(prompts, completions)

    class DyingSampling(InverseSampling):
        tokens = 0

        def __call__(self, input_ids, scores):
            DyingSampling.tokens += 1
            if DyingSampling.tokens % 10 == 0:  # somewhere inside a response
                death.strike("sampling")
            return super().__call__(input_ids, scores)

    generation.InverseSampling = DyingSampling
    args = APAConfig.paper(
        output_dir=options.output_dir,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=2,
        rollout_batch_size=4 * options.batch,
        num_layers_unfrozen=1,
        separate_value_model=False,
        max_new_tokens=100,
        max_steps=options.steps,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 1,
        max_grad_norm=0,
        disable_tqdm=True,
    )
    return APATrainer(
        load_policy("tiny"),
        reward,
        args,
        Dataset.from_list(toy_rows()).select_columns("prompt"),
        processing_class=load_tokenizer("tiny"),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--trainer", choices=["reward", "apa"], default="reward")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--layers", type=int, help="train the last N on a cached trunk")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--save-steps", type=int, default=0)
    parser.add_argument("--die-in", choices=STAGES)
    parser.add_argument("--at", type=int, default=0)
    parser.add_argument("--first-gradient", action="store_true")
    options = parser.parse_args()
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    death = Death(options.die_in, options.at)
    is_apa = options.trainer == "apa"
    trainer = apa_run(options, death) if is_apa else reward_run(options)
    trainer = dies_while_saving(trainer, death)
    if options.first_gradient:
        trainer.add_callback(SaveFirstGradient())
    trainer.train(resume_from_checkpoint=True)
    if is_apa:
        kept = {k: v.contiguous() for k, v in trainer.experience.items()}
        name = f"experience-{trainer.args.process_index}.safetensors"
        save_file(kept, str(Path(options.output_dir) / name))
    trainer.save_model()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
