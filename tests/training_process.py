"""One training run of the tiny model as a process of its own, for the slow tests.

    python training_process.py OUTPUT_DIR [--die-at STEP] [--die-while-saving STEP]
    torchrun --nproc_per_node 2 training_process.py OUTPUT_DIR --first-gradient …

With a checkpoint in OUTPUT_DIR it resumes. The two ways of dying are kill -9: at the end
of an optimiser step, or when half of a checkpoint's files are written.
"""

import argparse
import os
import signal
from pathlib import Path

import torch
from conftest import toy_rows
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import TrainerCallback

from starling_lib.apa import APAConfig, APATrainer
from starling_lib.models import load_policy, load_reward_model, load_tokenizer
from starling_lib.reward import KwiseRewardConfig, KwiseRewardTrainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(TrainerCallback):
    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


class SaveFirstGradient(TrainerCallback):
    """What the optimiser is about to use, from the main process."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 0 and state.is_world_process_zero:
            found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            found = {n: g.clone() for n, g in found.items() if g is not None}
            save_file(found, str(Path(args.output_dir) / "gradient.safetensors"))


class DyingRewardTrainer(KwiseRewardTrainer):
    die_while_saving: int | None = None

    def _save_rng_state(self, output_dir):
        if self.state.global_step == self.die_while_saving:
            die()  # weights and optimiser are written, the rest is not
        super()._save_rng_state(output_dir)


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
    trainer = DyingRewardTrainer(
        load_reward_model("tiny", tokenizer),
        args,
        Dataset.from_list(toy_rows()),
        processing_class=tokenizer,
        callbacks=[DieAt(options.die_at)],
        peft_config=lora,
    )
    trainer.die_while_saving = options.die_while_saving
    return trainer


def apa_run(options) -> APATrainer:
    args = APAConfig.paper(
        output_dir=options.output_dir,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=2,
        rollout_batch_size=4 * options.batch,
        num_layers_unfrozen=1,
        separate_value_model=False,
        max_new_tokens=100,
        max_steps=options.steps,
        save_strategy="no",
        max_grad_norm=0,
        disable_tqdm=True,
    )
    return APATrainer(
        load_policy("tiny"),
        share_of_a,
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
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--die-while-saving", type=int)
    parser.add_argument("--first-gradient", action="store_true")
    options = parser.parse_args()
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    trainer = {"reward": reward_run, "apa": apa_run}[options.trainer](options)
    if options.first_gradient:
        trainer.add_callback(SaveFirstGradient())
    trainer.train(resume_from_checkpoint=True)
    if options.trainer == "apa":
        kept = {k: v.contiguous() for k, v in trainer.experience.items()}
        name = f"experience-{trainer.args.process_index}.safetensors"
        save_file(kept, str(Path(options.output_dir) / name))
    trainer.save_model()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
