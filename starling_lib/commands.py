"""The commands: which recipe each reads and which function carries it out.

Knows: names of recipes and presets, what is printed at the end. Does not know how any
command works. Whatever loads a deep-learning library is imported when a command runs, so
that help does not wait for it.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starling_lib.command_recipes import (
    AnswerRecipe,
    APARecipe,
    BenchJudgeRecipe,
    CardRecipe,
    ChatRecipe,
    LabelRecipe,
    PlanRecipe,
    Preset,
    ReportRecipe,
    RewardRecipe,
    decides_weights,
    is_preset,
    preset_recipe,
    read_preset,
)
from starling_lib.journal import write_atomically
from starling_lib.recipe_files import (
    RECIPES,
    RecipeError,
    describe_recipe,
    describe_source,
    read_yaml,
    recipe_differences,
    recipe_from,
)
from starling_lib.run_plans import bundled_plans, plan_recipe, plan_text, read_plan

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Command:
    """One command: its recipe, what help says, and what runs it."""

    name: str
    recipe: type
    summary: str
    run: Callable[[Any], None]
    trainer: tuple[str, str] | None = None  # module and class of `trainer`'s arguments
    resumes: bool = True  # whether there is something to go on with after a stop
    # name, overrides → what `run` takes, where that is not one recipe of its own
    read: Callable[[str | None, Sequence[str]], Any] | None = None

    def keys(self) -> str:
        """Every key of the recipe, explained."""
        text = "Keys of the recipe:\n" + describe_recipe(self.recipe)
        if self.trainer is not None:
            module, config = self.trainer
            source = PACKAGE / f"{module}.py"
            text += "\n" + describe_source(source, config, "trainer.")
        return text


# --- from the command line to a recipe


def bundled_recipes(command: str) -> list[str]:
    """Names of the recipes and presets that come along for a command."""
    if command == "plan":
        return bundled_plans()
    own = [path.stem for path in (RECIPES / command).glob("*.yaml")]
    shared = [
        f"{path.parent.name}/{command}" for path in RECIPES.glob(f"*/{command}.yaml")
    ]
    presets = [path.stem for path in RECIPES.glob("*.yaml")]
    return [
        *sorted(own),
        *sorted(presets if command != "label" else []),
        *sorted(shared),
    ]


def recipe_path(command: str, name: str) -> Path:
    """The file that a name stands for: one that is there, else a bundled one.

    Raises RecipeError where there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if name not in (known := bundled_recipes(command)):
        raise RecipeError(f"no recipe at {name}; bundled are {', '.join(known)}")
    own = RECIPES / command / f"{name}.yaml"
    return own if own.exists() else RECIPES / f"{name}.yaml"


def read_command(command: Command, name: str | None, overrides: Sequence[str]) -> Any:
    """A command's recipe from a file, a bundled recipe or preset, or keys alone.

    Raises RecipeError.
    """
    if command.read is not None:
        return command.read(name, overrides)
    if name is None:
        return recipe_from(command.recipe, {}, overrides)
    path = recipe_path(command.name, name)
    data = read_yaml(path)
    if is_preset(data):
        return _from_preset(command, path, overrides)
    return recipe_from(command.recipe, data, overrides)


def _from_preset(command: Command, path: Path, overrides: Sequence[str]) -> Any:
    """A preset's recipe, with the sizes that fit this machine.

    A folder that was begun keeps its sizes, whatever the machine does meanwhile.
    """

    def recipe(preset: Preset) -> Any:
        fields = preset_recipe(command.name, preset, path.stem)
        return recipe_from(command.recipe, fields, overrides)

    full = read_preset(str(path))
    if not full.slow or command.trainer is None:  # only training has sizes
        return recipe(full)
    sizes = [recipe(full), recipe(read_preset(str(path), **full.slow))]
    for one in sizes:
        kept = Path(one.output_dir) / "recipe.json"
        if kept.exists() and not recipe_differences(one, kept, decides_weights):
            return one
    return sizes[_is_slow(full.slow_below)]


def _is_slow(below: float) -> bool:
    """Whether a probe finds less than so many GFLOP/s; several processes must agree."""
    from starling_lib.models import matmul_gflops

    return int(os.environ.get("WORLD_SIZE", 1)) == 1 and matmul_gflops() < below


# --- the commands


def _label(recipe: LabelRecipe) -> None:
    from starling_lib.labeling import label

    report = label(recipe)
    say(json.dumps(report, indent=1, ensure_ascii=False))
    say(f"written to {recipe.output_dir}")


def _reward(recipe: RewardRecipe) -> None:
    from starling_lib.training_runs import train_reward_model

    folder = _in_group(train_reward_model, recipe)
    report = folder / "reward_report.json"
    if report.exists():
        metrics = json.loads(report.read_text("utf-8"))["metrics"]
        line = metrics["accuracy"]
        say(
            f"held-out pairs ordered right: {line['estimate']:.3f} "
            f"[{line['low']:.3f}, {line['high']:.3f}]"
        )
    say(f"reward model in {folder}")


def _apa(recipe: APARecipe) -> None:
    from starling_lib.training_runs import train_policy

    folder = _in_group(train_policy, recipe)
    say(f"tuned policy in {folder}")


def _in_group(train: Callable[[Any], Path], recipe: Any) -> Path:
    """`train(recipe)`; where several processes did it together, they part again."""
    import torch.distributed as group

    folder = train(recipe)
    if group.is_available() and group.is_initialized():
        group.destroy_process_group()
    return folder


def _answer(recipe: AnswerRecipe) -> None:
    from starling_lib.bench_answers import TEMPERATURES
    from starling_lib.bench_compare import answer_models, model_settings, note_settings
    from starling_lib.bench_files import read_questions
    from starling_lib.training_runs import check_model

    asked = read_questions(recipe.questions)[: recipe.first]
    models = {one.name: one for one in recipe.models}
    if len(models) < len(recipe.models):
        raise RecipeError("models: two have the same name")
    for one in recipe.models:
        if one.base_url is None:
            check_model(one.model, f"models, {one.name}", "apa")
    folder = Path(recipe.folder)
    temperatures = TEMPERATURES if recipe.by_category else None
    sampling = {"batch_size": recipe.batch_size, "seed": recipe.seed}
    answer_models(models, asked, folder, temperatures, **sampling)
    note_settings(folder, "models", model_settings(models, temperatures))
    say(f"{len(models)} models answered {len(asked)} questions: {folder}/model_answer")


def _judge(recipe: BenchJudgeRecipe) -> None:
    from starling_lib.bench_compare import (
        judge_models,
        judge_settings,
        note_settings,
        read_bench,
    )
    from starling_lib.bench_scores import score_table
    from starling_lib.labeling import make_judge

    folder = Path(recipe.folder)
    judge = make_judge(recipe.judge, recipe.replies, folder)
    if judge is None and recipe.reward_model is None:
        raise RecipeError(
            "judge: nobody judges; name a judge, replies, or reward_model"
        )
    asked, answers = read_bench(folder, recipe.models)
    rewards = {} if recipe.reward_model is None else _reward_judge(recipe.reward_model)
    singles, _ = judge_models(
        *(answers, asked, folder, judge),
        pairs=recipe.pairs,
        baseline=recipe.baseline,
        passes=recipe.passes,
        attempts=recipe.attempts,
        retry_failed=recipe.retry_failed,
        **rewards,
    )
    noted = {}
    if judge is not None:
        noted[judge.model] = judge_settings(judge, recipe.passes, recipe.pairs)
    if rewards:
        noted[rewards["reward_name"]] = {"reward model": recipe.reward_model}
    note_settings(folder, "judges", noted)
    for name, frame in singles.items():
        means = score_table(frame)["overall"].round(3)
        said = ", ".join(f"{model} {means[model]}" for model in answers)
        say(f"{name} gives on average {said}")
    say(f"written to {folder}/model_judgment")


def _reward_judge(name: str) -> dict[str, Any]:
    """A reward model as arguments of `judge_models`; other weights have another name."""
    from starling_lib.judges import RewardJudge
    from starling_lib.models import default_device, fingerprint
    from starling_lib.training_runs import trained_reward_model

    model, tokenizer = trained_reward_model(name)
    known_as = f"{Path(name).name}@{fingerprint(model)[:6]}"
    judge = RewardJudge(model.to(default_device()), tokenizer, known_as)
    return {"reward": judge.score, "reward_name": known_as}


def _report(recipe: ReportRecipe) -> None:
    from starling_lib.bench_compare import read_comparison
    from starling_lib.bench_reports import write_report

    folder = Path(recipe.folder)
    found = read_comparison(
        *(folder, recipe.models, recipe.baseline, recipe.reward_tie),
        *(recipe.resamples, recipe.date),
    )
    made = write_report(found, folder)
    for line in made.report["in_short"]:
        say(line)
    say(f"written to {folder}/report.html, .md and .json")


def _chat(recipe: ChatRecipe) -> None:
    from starling_lib.responders import ready_to_sample
    from starling_lib.terminal_chat import Speaker, converse, typed_lines
    from starling_lib.training_runs import check_model

    names = [name for name in (recipe.base, recipe.model) if name is not None]
    for name in names:
        check_model(name, "model" if name == recipe.model else "base", "apa")
    ways = (recipe.system, recipe.temperature, recipe.max_new_tokens)
    speakers = [Speaker(name, *ready_to_sample(name), *ways) for name in names]
    converse(speakers, typed_lines(), seed=recipe.seed)


def _card(recipe: CardRecipe) -> None:
    from starling_lib.run_cards import write_run_card

    say(f"written to {write_run_card(recipe)}")


def _plan(asked: tuple[PlanRecipe, list[Any]]) -> None:
    wanted, recipes = asked
    plans = [plan_recipe(recipe, wanted) for recipe in recipes]
    say("\n\n".join(map(plan_text, plans)))
    if wanted.output is not None:
        text = json.dumps([plan.as_dict() for plan in plans], indent=1)
        write_atomically(Path(wanted.output), text.encode())
        say(f"written to {wanted.output}")


def say(text: str) -> None:
    """Print, in the main one of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


COMMANDS = [
    Command(
        *("label", LabelRecipe, "let a judge rank responses, into Nectar's rows"),
        _label,
    ),
    Command(
        *("reward", RewardRecipe, "train a reward model on rankings", _reward),
        trainer=("reward", "KwiseRewardConfig"),
    ),
    Command(
        *("apa", APARecipe, "tune a policy against a reward model", _apa),
        trainer=("apa", "APAConfig"),
    ),
    Command("answer", AnswerRecipe, "let models answer MT-Bench's questions", _answer),
    Command("judge", BenchJudgeRecipe, "have the answers judged or scored", _judge),
    Command(
        "report",
        ReportRecipe,
        "say what answers and judgments show",
        _report,
        resumes=False,
    ),
    Command(
        "chat",
        ChatRecipe,
        "talk to one model, or to two side by side",
        _chat,
        resumes=False,
    ),
    Command(
        "card",
        CardRecipe,
        "write the model card of a trained folder",
        _card,
        resumes=False,
    ),
    Command(
        "plan",
        PlanRecipe,
        "say what a recipe of label, reward, apa or judge takes: memory, hours, cost",
        _plan,
        resumes=False,
        read=read_plan,
    ),
]
