"""One training run of the tiny model as a process of its own, for the slow tests.

    python training_process.py OUTPUT_DIR [--die-in STAGE --at STEP]
    torchrun --nproc_per_node 2 training_process.py OUTPUT_DIR --first-gradient …

With a checkpoint in OUTPUT_DIR it resumes. Dying is kill -9, in one of STAGES once the
run has reached STEP; `disk` does not kill but lets no file grow beyond 4 KiB, which is
how a full disk looks to who writes a checkpoint. Of several processes the last one dies,
and the launcher stops the others.
"""

import argparse
import json
import os
import re
import resource
import signal
from pathlib import Path

import torch
from accelerate import state as accelerate_state
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import toy_rows
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
)
from transformers.distributed import DistributedConfig

from starling_lib import generation
from starling_lib.apa import APAConfig, APATrainer
from starling_lib.generation import InverseSampling
from starling_lib.models import load_policy, load_reward_model, load_tokenizer
from starling_lib.rankings import load_rankings
from starling_lib.reward import KwiseRewardConfig, KwiseRewardTrainer
from starling_lib.rollouts import given_responses

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
IS_LAST = int(os.environ.get("RANK", 0)) == WORLD_SIZE - 1
STAGES = ("sampling", "scoring", "update", "step", "saving", "disk")


class Death(TrainerCallback):
    """Kills its process where it was told to; asked at every place that could be it."""

    def __init__(self, stage: str | None, step: int):
        self.stage, self.step, self.reached = stage, step, 0

    def strike(self, stage: str) -> None:
        if IS_LAST and stage == self.stage and self.reached >= self.step:
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
        if state.global_step > 0:
            return
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found = {n: whole(g).clone() for n, g in found.items() if g is not None}
        if state.is_world_process_zero:
            save_file(found, str(Path(args.output_dir) / "gradient.safetensors"))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of_a(prompts, completions, **columns) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [text.count("a") + len(text) / 10 for text in texts]


# --- rollouts that were recorded: the same for any number of processes

RECORD = {
    row["prompt"][0]["content"]: row["responses"][i % 4]
    for i, row in enumerate(toy_rows())
}


def recorded(policy, tokenizer, prompts, *, max_new_tokens, **options):
    """A sampler that reads what it gives; the longest responses are cut."""
    texts = [RECORD[messages[0]["content"]] for messages in prompts]
    return given_responses(tokenizer, prompts, texts, max_new_tokens)


class RecordedAPATrainer(APATrainer):
    """Minibatches in the record's order: those of two processes together are one's."""

    def _minibatch_rows(self, iteration, step):
        parts = 2 // WORLD_SIZE  # of the record: one process has both
        size = self.args.per_device_train_batch_size // parts
        rows = self.args.rollout_batch_size // parts
        start = step % (rows // size) * size
        return torch.cat(
            [torch.arange(start, start + size) + part * rows for part in range(parts)]
        )


def sharded(kind, folder):
    """A saved model, half of each weight in each of two processes."""
    config = DistributedConfig(fsdp_size=2)
    return kind.from_pretrained(folder, distributed_config=config)


def shard_by_accelerate(config: str) -> None:
    """Obey a config of `accelerate launch` that shards, which a CPU would be spared."""
    words = ["--config_file", config, "--mixed_precision", "no"]
    parsed = launch_command_parser().parse_args([*words, "-m", "starling_lib"])
    parsed.main_process_port = 0
    environment = prepare_multi_gpu_env(_validate_launch_command(parsed)[0])
    ours = {
        k: v for k, v in environment.items() if k.startswith(("ACCELERATE_", "FSDP"))
    }
    os.environ.update(ours)
    begin = accelerate_state.AcceleratorState.__init__

    def as_on_gpus(self, *args, **kwargs):
        shared = accelerate_state.PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *args, **kwargs)

    accelerate_state.AcceleratorState.__init__ = as_on_gpus


class KeepRows(KwiseRewardTrainer):
    """Writes down which of the toy prompts its process learns from, by number."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        for ids in inputs["input_ids"]:
            text = self.processing_class.decode(ids)
            name = f"rows-{self.args.process_index}.txt"
            with (Path(self.args.output_dir) / name).open("a") as file:
                print(re.search(r"say (\d)", text)[1], file=file)
        return super().compute_loss(model, inputs, *args, **kwargs)


# --- the two trainers


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
        save_only_model=options.save_only_model,
        activation_checkpointing=options.recompute,
        max_grad_norm=options.clip,
        disable_tqdm=True,
    )
    tokenizer = load_tokenizer("tiny")
    if options.sharded:
        model = sharded(AutoModelForSequenceClassification, options.model)
    else:
        model = load_reward_model(options.model, tokenizer)
    if options.stream:
        rows = load_rankings(options.stream, streaming=True)
        rows = rows.shuffle(seed=1, buffer_size=4)
    else:
        rows = Dataset.from_list(toy_rows())
    return (KeepRows if options.stream else KwiseRewardTrainer)(
        model,
        args,
        rows,
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
    as_recorded = (
        {"logging_steps": 1, "learning_rate": 1e-3} if options.recorded else {}
    )
    args = APAConfig.paper(
        output_dir=options.output_dir,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=2,
        rollout_batch_size=4 * options.batch,
        num_layers_unfrozen=None if options.all_layers else 1,
        separate_value_model=False,
        max_new_tokens=6 if options.recorded else 100,
        max_steps=options.steps,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 1,
        save_only_model=options.save_only_model,
        activation_checkpointing=options.recompute,
        max_grad_norm=options.clip,
        exact_kl=options.recorded,
        disable_tqdm=True,
        **as_recorded,
    )
    kind = RecordedAPATrainer if options.recorded else APATrainer
    if options.sharded:
        model = sharded(AutoModelForCausalLM, options.model)
    else:
        model = load_policy(options.model)
    return kind(
        model,
        reward,
        args,
        Dataset.from_list(toy_rows()).select_columns("prompt"),
        processing_class=load_tokenizer("tiny"),
        **({"sampler": recorded} if options.recorded else {}),
    )


def is_sharded_as_said(trainer) -> bool:
    """The model's parameters are pieces, what stands beside it is whole."""
    inner = {id(p) for p in trainer.inner_model().parameters()}
    return all(
        isinstance(p, DTensor) == (id(p) in inner) for p in trainer.model.parameters()
    )


def refusals(options, trainer, make) -> list[str]:
    """What is said to who wants to resume a sharded run, after it or at its start."""
    said = []
    options.save_only_model = False
    for attempt in (lambda: trainer.train(resume_from_checkpoint=True), make):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--trainer", choices=["reward", "apa"], default="reward")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--layers", type=int, help="train the last N on a cached trunk")
    parser.add_argument("--all-layers", action="store_true", help="of the policy")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--stream", help="rankings to read while training")
    parser.add_argument("--save-steps", type=int, default=0)
    parser.add_argument("--die-in", choices=STAGES)
    parser.add_argument("--at", type=int, default=0)
    parser.add_argument("--first-gradient", action="store_true")
    parser.add_argument("--recorded", action="store_true", help="do not sample")
    parser.add_argument(
        "--model", default="tiny", help="the model; a folder if sharded"
    )
    parser.add_argument("--accelerate", help="a config by which accelerate shards")
    parser.add_argument("--sharded", action="store_true", help="by FSDP2")
    parser.add_argument("--save-only-model", action="store_true")
    parser.add_argument("--recompute", action="store_true", help="checkpoint layers")
    parser.add_argument("--clip", type=float, default=0)
    options = parser.parse_args()
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    if options.accelerate:
        shard_by_accelerate(options.accelerate)
    death = Death(options.die_in, options.at)
    is_apa = options.trainer == "apa"

    def make():
        return apa_run(options, death) if is_apa else reward_run(options)

    trainer = dies_while_saving(make(), death)
    if options.first_gradient:
        trainer.add_callback(SaveFirstGradient())
    trainer.train(resume_from_checkpoint=True)
    if is_apa:
        kept = {k: v.contiguous() for k, v in trainer.experience.items()}
        name = f"experience-{trainer.args.process_index}.safetensors"
        save_file(kept, str(Path(options.output_dir) / name))
    trainer.save_model()
    facts = {"log": trainer.state.log_history}
    if options.accelerate:
        pieces = [isinstance(p, DTensor) for p in trainer.model.parameters()]
        facts["sharded"] = len(pieces) > 20 and all(pieces)
    if options.sharded:
        facts["sharded"] = is_sharded_as_said(trainer)
        facts["refusals"] = refusals(options, trainer, make)
    if trainer.is_world_process_zero():
        (Path(options.output_dir) / "facts.json").write_text(json.dumps(facts))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
