"""From a recipe to a trained folder: `reward` and `apa`, resumable.

Knows: which config, data and trainer a recipe means, when a folder is finished and by
which recipe it was made. Does not know: how anything is trained.
"""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from starling_lib.apa import APAConfig, APATrainer
from starling_lib.checkpoints import MARKER, write_marker
from starling_lib.command_recipes import APARecipe, RewardRecipe, decides_weights
from starling_lib.models import (
    TINY_ALIAS,
    check_turn_end,
    load_reward_model,
    load_tokenizer,
    resolve,
)
from starling_lib.rankings import RankingError, load_rankings, without_prompts
from starling_lib.recipe_files import (
    RecipeError,
    check_arguments,
    check_recipe,
    keep_recipe,
)
from starling_lib.recipes import (
    apa_config,
    first_rankings,
    report_reward_model,
    reward_config,
    save_trained,
)
from starling_lib.reward import KwiseRewardConfig, KwiseRewardTrainer

if TYPE_CHECKING:
    from peft import LoraConfig

RECIPE_FILE = "recipe.json"
SHUFFLE_BUFFER = 10_000  # rows of a stream in memory, about 0.1 GB of Nectar
_OWN_KEYS = ("output_dir", "seed")  # of a recipe, so that nobody sets them twice


def train_reward_model(recipe: RewardRecipe) -> Path:
    """Train, or train on, the reward model of a recipe; return its folder.

    Beside the model: `recipe.json`, `log_history.json` and, with an `eval_split`,
    `reward_report.json` and `.png`. Raises RecipeError for a mistake in the recipe or a
    folder that another recipe made.
    """
    folder, args = Path(recipe.output_dir), reward_arguments(recipe)
    peft_config = lora_config(recipe.lora, "SEQ_CLS")
    if is_finished(recipe, folder):
        return folder
    held_out = _held_out(recipe)
    trainer = KwiseRewardTrainer(
        model=recipe.model,
        args=args,
        train_dataset=training_rankings(recipe, held_out),
        eval_dataset=held_out,
        processing_class=tokenizer_of(recipe.model, recipe.pad_token),
        peft_config=peft_config,
    )
    begin(recipe, folder, trainer)
    trainer.train(resume_from_checkpoint=True)
    if held_out is not None:
        report_reward_model(trainer, held_out, folder)
    finish(trainer, folder)
    return folder


def _held_out(recipe: RewardRecipe) -> Dataset | None:
    """What the reward model is measured on; None without an `eval_split`."""
    if not recipe.eval_split:
        return None
    try:
        return first_rankings(recipe.data, recipe.eval_split, recipe.rows)
    except RankingError as error:
        raise RecipeError(
            f"eval_split: {error}; here null stands for none, 'train[:20]' for rows to be "
            "held out of one file"
        ) from None


def train_policy(recipe: APARecipe) -> Path:
    """Tune, or tune on, the policy of a recipe; return its folder.

    Errors and files as of `train_reward_model`; `samples.jsonl` instead of a report.
    """
    folder, args = Path(recipe.output_dir), policy_arguments(recipe)
    peft_config = lora_config(recipe.lora, "CAUSAL_LM")
    if is_finished(recipe, folder):
        return folder
    reward_model, reward_tokenizer = trained_reward_model(recipe.reward_model)
    trainer = APATrainer(
        model=recipe.model,
        reward_funcs=reward_model,
        args=args,
        train_dataset=first_rankings(
            recipe.data, recipe.split, recipe.rows, recipe.half
        ),
        processing_class=tokenizer_of(recipe.model, recipe.pad_token),
        reward_processing_classes=[reward_tokenizer],
        peft_config=peft_config,
    )
    begin(recipe, folder, trainer)
    trainer.train(resume_from_checkpoint=True)
    finish(trainer, folder)
    return folder


# --- what a recipe means


def reward_arguments(recipe: RewardRecipe) -> KwiseRewardConfig:
    """The trainer's config. Raises RecipeError that names a bad key of the recipe."""
    _check_trainer(KwiseRewardConfig, recipe.trainer)
    if recipe.streaming:
        _check_stream(recipe)
    return reward_config(recipe.output_dir, recipe.seed, recipe.trainer)


def policy_arguments(recipe: APARecipe) -> APAConfig:
    """The same for a policy; also for a `base` that is neither of the two."""
    _check_trainer(APAConfig, recipe.trainer)
    if recipe.base not in ("starling", "paper"):
        raise RecipeError(f"base: no {recipe.base!r}; choose from starling, paper")
    return apa_config(recipe.output_dir, recipe.seed, recipe.base, recipe.trainer)


def _check_stream(recipe: RewardRecipe) -> None:
    if not re.fullmatch(r"\w+", recipe.split):
        raise RecipeError(
            f"split: a stream has no slices, as {recipe.split!r}: name a whole split; "
            "prompts of eval_split are left out of it"
        )
    if recipe.rows is not None:
        raise RecipeError("rows: not of a stream; set trainer.max_steps to read less")
    if recipe.trainer.get("max_steps", 0) <= 0:
        raise RecipeError(
            "trainer.max_steps: a stream does not say how long it is: give the number of "
            "optimiser steps"
        )


def training_rankings(
    recipe: RewardRecipe, held_out: Dataset | None
) -> Dataset | IterableDataset:
    """What a recipe learns from, without held-out prompts: a table or a shuffled stream.

    The stream sets bad rows aside with a warning each: a run should not end at one.
    Raises RecipeError where no row of a table is left.
    """
    if not recipe.streaming:
        rows = first_rankings(recipe.data, recipe.split, recipe.rows, recipe.half)
        return rows if held_out is None else _not_held_out(rows, held_out)
    rows = load_rankings(
        recipe.data, recipe.split, on_error="skip", half=recipe.half, streaming=True
    )
    if held_out is not None:
        rows = without_prompts(rows, held_out)
    # The same seed in all processes: they share the rows of one order.
    return rows.shuffle(seed=recipe.seed, buffer_size=SHUFFLE_BUFFER)


def _not_held_out(rows: Dataset, held_out: Dataset) -> Dataset:
    """The rows of a table whose prompt is not held out; says how many others there were."""
    left = without_prompts(rows, held_out)
    if len(left) == 0:
        raise RecipeError(
            "eval_split: holds every prompt of split, so that none is left to learn from; "
            "name another"
        )
    if dropped := len(rows) - len(left):
        print(f"{dropped} of {len(rows)} rows have a prompt of eval_split: left out")
    return left


def _check_trainer(config: type, trainer: dict[str, Any]) -> None:
    for key in _OWN_KEYS:
        if key in trainer:
            raise RecipeError(f"trainer.{key}: set {key} of the recipe itself")
    check_arguments(config, trainer, "trainer")


def lora_config(lora: dict[str, Any] | None, task: str) -> "LoraConfig | None":
    """peft's config from a recipe's `lora`. Raises RecipeError, also without peft."""
    if lora is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise RecipeError(
            "lora: needs peft: pip install 'starling-cookbook[lora]'"
        ) from None
    check_arguments(LoraConfig, lora, "lora")
    return LoraConfig(**{"task_type": task, **lora})


def tokenizer_of(model: str, pad_token: str | None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding with a token of the recipe's if it names one.

    Raises RecipeError for one that is EOS or not in the vocabulary: a new one would have
    no embedding. Raises ValueError where turns end with another token than EOS.
    """
    if pad_token is None or model == TINY_ALIAS:
        return load_tokenizer(model)
    tokenizer = AutoTokenizer.from_pretrained(resolve(model))
    if pad_token not in tokenizer.get_vocab() or pad_token == tokenizer.eos_token:
        raise RecipeError(f"pad_token: {pad_token!r} is EOS or no token of {model}")
    tokenizer.pad_token = pad_token
    check_turn_end(model, tokenizer)
    return tokenizer


# --- models that other commands made


def trained_reward_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A reward model and its tokenizer, from a finished folder or a hub id.

    Raises RecipeError where there is none, or one that gives no scores: a language model
    would be loaded with a random head.
    """
    check_model(name, "reward_model", "reward")
    try:
        kinds = AutoConfig.from_pretrained(name).architectures or []
    except (OSError, ValueError) as error:
        raise RecipeError(f"reward_model: {name}: {error}") from None
    if not any("SequenceClassification" in kind for kind in kinds):
        raise RecipeError(f"reward_model: {name} is {kinds}, which gives no scores")
    tokenizer = load_tokenizer(name)
    return load_reward_model(name, tokenizer), tokenizer


def check_model(name: str, key: str, command: str) -> None:
    """Raise RecipeError for a folder in which `command` has not finished a model.

    Aliases and what may be a hub id pass.
    """
    folder = Path(name)
    is_path = name.count("/") > 1 or name.startswith((".", "/", "~"))
    if not folder.exists() and not is_path:
        return
    begun = (folder / RECIPE_FILE).exists()
    if not (folder / "config.json").exists() or (
        begun and not (folder / MARKER).exists()
    ):
        state = "is not finished" if begun else "is not there"
        raise RecipeError(
            f"{key}: the model in {name} {state}: python -m starling_lib {command} …"
        )


# --- the life of a folder


def is_finished(recipe: RewardRecipe | APARecipe, folder: Path) -> bool:
    """Whether the folder holds all of this recipe already. Raises RecipeError."""
    check_recipe(recipe, folder / RECIPE_FILE, decides_weights)
    found = (folder / MARKER).exists()
    if found:
        print(f"{folder}: finished before, with the same recipe")
    return found


def begin(recipe: RewardRecipe | APARecipe, folder: Path, trainer) -> None:
    """Write the recipe down before the first checkpoint."""
    if trainer.is_world_process_zero():
        keep_recipe(recipe, folder / RECIPE_FILE, decides_weights)


def finish(trainer, folder: Path) -> None:
    """Save the model and mark the folder as finished; what was cached goes."""
    save_trained(trainer, folder)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(folder / "trunk-cache", ignore_errors=True)
        write_marker(folder)
    trainer.accelerator.wait_for_everyone()
