"""What each command is told: one typed recipe a command, and the presets.

Knows: keys, their defaults and what they mean, and which recipe of a command a preset
stands for. Does not know how anything is done, so that help needs no heavy library.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starling_lib.recipe_files import RECIPES, RecipeError, read_yaml, recipe_from
from starling_lib.recipe_files import recipe_key as _key
from starling_lib.responders import Responder

_TRAINER = (
    "and any argument of transformers' TrainingArguments, report_to among them "
    "(https://huggingface.co/docs/transformers/main_classes/trainer)"
)
_LORA = (
    "arguments of peft's LoraConfig (https://huggingface.co/docs/peft), such as {r: 8, "
    "lora_alpha: 32}: train adapters, merged into the saved model; null: the weights"
)


# --- labelling


@dataclass(frozen=True)
class JudgeRecipe:
    """A model behind an OpenAI-compatible server, as `OpenAIJudge` takes it."""

    model: str = _key("the judge's name on its server")
    base_url: str | None = _key(
        "the server, ending in /v1; null: OPENAI_BASE_URL or OpenAI", default=None
    )
    api_key_env: str = _key("variable that holds the key", default="OPENAI_API_KEY")
    temperature: float | None = _key("null: not sent", default=0.0)
    max_tokens: int | None = _key("for one reply; null: not sent", default=2048)
    concurrency: int = _key("requests in flight at once", default=8)
    timeout: float = _key("seconds to wait for one reply", default=120.0)
    prices: list[float] | None = _key(
        "dollars for a million prompt and completion tokens, for the report",
        default=None,
    )
    extra: dict | None = _key("more fields of the request's body", default=None)


@dataclass(frozen=True)
class LabelRecipe:
    """Rows to be labelled, by whom, how often, and where everything goes."""

    output_dir: str = _key("folder for rankings, judgments, replies and the report")
    judge: JudgeRecipe | None = _key("who ranks; not needed with replies", default=None)
    source: str = _key(
        "nectar_mini, a JSONL or Parquet file, a folder, a hub id",
        default="nectar_mini",
    )
    split: str = _key("with + between several; slices as train[:100]", default="train")
    rows: int | None = _key("only the first rows of each split", default=None)
    responders: list[Responder] = _key(
        "models that answer anew; empty: the source's answers", default_factory=list
    )
    passes: int = _key("rankings of each row, each in another order", default=1)
    seed: int = _key("of display orders, pair orders and sampling", default=0)
    attempts: int = _key("times to ask until a reply can be read", default=3)
    retry_failed: bool = _key("try the failures of earlier runs again", default=False)
    method: str = _key("how passes are joined: borda, plackett_luce", default="borda")
    replies: str | None = _key(
        "a reply log to replay instead of asking; bundled or a path", default=None
    )
    displays: str | None = _key(
        "a judgments log whose orders of display to use; bundled or a path",
        default=None,
    )


# --- training


@dataclass(frozen=True)
class RewardRecipe:
    """A reward model from rankings: `KwiseRewardTrainer`."""

    output_dir: str = _key("folder for checkpoints, the model and its report")
    model: str = _key("smollm2-135m, tiny, a folder or a hub id to start from")
    data: str = _key(
        "rankings: nectar_mini, a JSONL or Parquet file, a folder, a hub id",
        default="nectar_mini",
    )
    split: str = _key("what is learnt from; slices as train[:100]", default="train")
    eval_split: str | None = _key(
        "what is held out for the report; null: no report", default="test"
    )
    half: str | None = _key("A or B: only this half of nectar_mini", default=None)
    rows: int | None = _key("only the first rows of each split", default=None)
    streaming: bool = _key(
        "read and encode rows while training, for data larger than memory; needs "
        "trainer.max_steps and a whole split, from which prompts of eval_split are left "
        "out; shuffled 10,000 rows at a time",
        default=False,
    )
    pad_token: str | None = _key(
        "for a tokenizer without one: a token that no text holds, never EOS",
        default=None,
    )
    seed: int = _key("of the new head, of LoRA and of the order of rows", default=0)
    lora: dict[str, Any] | None = _key(_LORA, default=None)
    trainer: dict[str, Any] = _key(
        f"arguments of KwiseRewardConfig: those below {_TRAINER}", default_factory=dict
    )


@dataclass(frozen=True)
class APARecipe:
    """A policy tuned against a reward model: `APATrainer`."""

    output_dir: str = _key("folder for checkpoints, the policy and samples")
    model: str = _key("smollm2-135m, tiny, a folder or a hub id to start from")
    reward_model: str = _key("folder or hub id of a trained reward model")
    base: str = _key(
        "settings that `trainer` changes: starling (the released code) or paper",
        default="starling",
    )
    data: str = _key(
        "whose prompts are answered: rankings, as of the command reward",
        default="nectar_mini",
    )
    split: str = _key("which prompts; slices as train[:100]", default="train")
    half: str | None = _key("A or B: only this half of nectar_mini", default=None)
    rows: int | None = _key("only the first prompts of the split", default=None)
    pad_token: str | None = _key(
        "for a tokenizer without one: a token that no text holds, never EOS",
        default=None,
    )
    seed: int = _key("of sampling, of the critic and of the order", default=0)
    lora: dict[str, Any] | None = _key(_LORA, default=None)
    trainer: dict[str, Any] = _key(
        f"arguments of APAConfig: those below {_TRAINER}", default_factory=dict
    )


# --- evaluation


@dataclass(frozen=True)
class AnswerRecipe:
    """Models that answer the questions of a bench."""

    folder: str = _key("gets question.jsonl and model_answer/ in FastChat's formats")
    models: list[Responder] = _key("who answers; later − earlier in the report")
    questions: str | None = _key(
        "a file in MT-Bench's format; null: the 80 bundled ones", default=None
    )
    first: int | None = _key("only so many of them", default=None)
    by_category: bool = _key(
        "MT-Bench's temperatures by category instead of the models' own", default=True
    )
    batch_size: int = _key("answers that a local model samples at once", default=64)
    seed: int = _key("of sampling", default=0)


@dataclass(frozen=True)
class BenchJudgeRecipe:
    """Who judges the answers in a folder: a judge, a reward model, or both."""

    folder: str = _key("of `answer`; gets model_judgment/ in FastChat's formats")
    models: list[str] = _key("only these; empty: all in it", default_factory=list)
    judge: JudgeRecipe | None = _key("who rates in words", default=None)
    replies: str | None = _key(
        "a reply log to replay instead of asking a judge; a path", default=None
    )
    reward_model: str | None = _key(
        "folder or hub id of a reward model that scores", default=None
    )
    pairs: bool = _key("the judge also compares answers two by two", default=False)
    baseline: str | None = _key(
        "in pairs, every model against this one; null: all pairs", default=None
    )
    passes: int = _key("how often the judge is asked about each answer", default=1)
    attempts: int = _key("times to ask until a reply can be read", default=3)
    retry_failed: bool = _key("try the failures of earlier runs again", default=False)


@dataclass(frozen=True)
class ReportRecipe:
    """A report on what a folder of answers and judgments says."""

    folder: str = _key("of `answer` and `judge`; gets report.json, .md and .html")
    models: list[str] = _key(
        "which, in the order of tables; empty: all, in the order of `answer`",
        default_factory=list,
    )
    baseline: str | None = _key(
        "every other model is compared with this one; null: later − earlier",
        default=None,
    )
    reward_tie: float = _key("rewards no further apart are a tie", default=0.0)
    resamples: int = _key("of every bootstrap and permutation test", default=2000)
    date: str | None = _key("printed in the report if given", default=None)


# --- use


@dataclass(frozen=True)
class ChatRecipe:
    """Talk to one model, or to two side by side."""

    model: str = _key("alias, folder or hub id")
    base: str | None = _key("a second model, shown on the left", default=None)
    system: str | None = _key("a prompt before the conversation", default=None)
    temperature: float = _key("0 is greedy", default=0.7)
    max_new_tokens: int = _key("where a response is cut", default=256)
    seed: int = _key("of sampling", default=0)


@dataclass(frozen=True)
class CardRecipe:
    """The model card of a folder that `reward` or `apa` made."""

    folder: str = _key("of the trained model; gets README.md")
    license: str | None = _key(
        "of this model; null: that of the model it began as, where it is known",
        default=None,
    )
    data_license: str | None = _key(
        "of the data; null: where it is known (nectar_mini, Nectar)", default=None
    )
    bench: str | None = _key("folder of a `report` whose findings go in", default=None)
    name: str | None = _key("of the model; null: the folder's", default=None)
    load_from: str | None = _key(
        "what the examples load, such as a hub id; null: the name", default=None
    )
    limits: list[str] = _key(
        "more sentences on what it cannot do", default_factory=list
    )


# --- planning


@dataclass(frozen=True)
class PlanRecipe:
    """What a recipe of label, reward, apa or judge is planned for.

    These keys stand beside those of the recipe itself, so none has a name of theirs.
    """

    output: str | None = _key("a file that gets the plan as JSON, too", default=None)
    command: str | None = _key(
        "label, reward, apa or judge: whose recipe it is, or which stage of a preset; "
        "null: told by its keys, and reward and apa of a preset",
        default=None,
    )
    slow_sizes: bool = _key(
        "of a preset, its sizes for machines without fast bf16", default=False
    )
    device: str = _key(
        "gpu; or cpu: this machine's memory and measured speed where none are given, "
        "and attention that keeps its weights",
        default="gpu",
    )
    devices: int = _key("over which a step's rows are spread", default=1)
    sharding: str | None = _key(
        "none (DDP), zero1, zero2, zero3 (DeepSpeed) or fsdp2; null: all", default=None
    )
    gib: float | None = _key("memory of a device; null: 80, an A100's", default=None)
    tflops: float | None = _key(
        "peak of a device's matrix products; null: 312, an A100's in bf16",
        default=None,
    )
    bandwidth: float | None = _key(
        "GB a second between a device and its memory, which sampling waits for; null: "
        "2039, an A100's (a CPU: 20)",
        default=None,
    )
    utilisation: float = _key("share of both that is reached", default=0.4)
    dollars_an_hour: float | None = _key("for one device", default=None)
    prompts: int | None = _key(
        "how many the data hold; null: known of Nectar, counted in local files",
        default=None,
    )
    prompt_tokens: int = _key(
        "of a mean prompt, for hours and cost (memory is for the longest that the "
        "recipe lets through); default: 219 prompts of Nectar, four characters a token",
        default=130,
    )
    response_tokens: int = _key("of a mean response, likewise", default=200)
    responses: int = _key("to one prompt, in rankings", default=7)
    answerers: int = _key(
        "models whose answers are judged, where the recipe names none", default=2
    )
    reply_tokens: int | None = _key(
        "of a judge's mean reply; null: 700 for a ranking, 200 for a rating",
        default=None,
    )
    reward_shape: str | None = _key(
        "a model of the reward model's size; null: that of the recipe, or what it will "
        "be trained from",
        default=None,
    )


# --- presets


@dataclass(frozen=True)
class Preset:
    """One small chain as YAML: what to load, and arguments for each stage."""

    model: str = _key("alias, folder or hub id")
    data: str = _key("rankings")
    reward: dict[str, Any] = _key("arguments of KwiseRewardConfig")
    apa: dict[str, Any] = _key("arguments of APAConfig, and its `base`")
    evaluation: dict[str, Any] = _key("arguments of evaluation.evaluate_policy")
    rows: int | None = _key("only the first rows of a split", default=None)
    half: str | None = _key(
        "A or B: what reward model and policy learn from; the other half is for a gold "
        "model",
        default=None,
    )
    questions: int | None = _key("only the first of the bench", default=None)
    slow_below: float = _key("GFLOP/s below which `slow` holds", default=0.0)
    slow: dict[str, Any] = _key("what then replaces the above", default_factory=dict)


# Arguments of a trainer that change what is seen or kept of a run, not its weights.
_FREE = (
    *("report_to", "run_name", "logging", "log_level", "disable_tqdm", "save", "eval_"),
    *("per_device_eval", "dataloader_num", "dataloader_pin", "hub", "push_to_hub"),
    *("project", "trackio", "num_samples_kept"),
)


def decides_weights(key: str) -> bool:
    """Whether another value of this key of RewardRecipe or APARecipe trains otherwise."""
    part, _, name = key.partition(".")
    return part != "output_dir" and not (part == "trainer" and name.startswith(_FREE))


def is_preset(data: Any) -> bool:
    """Whether the content of a YAML file is a preset, not a command's recipe."""
    return isinstance(data, dict) and {"reward", "apa"} <= set(data)


def read_preset(name: str, **changes: Any) -> Preset:
    """A bundled preset or one in a YAML file, with `changes` as `merged` makes them.

    Raises ValueError for an unknown preset, RecipeError for a mistake in it.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise RecipeError(
            f"no preset {name!r}: choose from {known}, or give a YAML file"
        )
    return recipe_from(Preset, merged(read_yaml(path), changes))


def merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`fields` with the keys of `changes`; a stage's keys one by one."""
    result = dict(fields)
    for key, value in changes.items():
        stage = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = {**result[key], **value} if stage else value
    return result


def preset_recipe(command: str, preset: Preset, name: str) -> dict[str, Any]:
    """The keys of a command's recipe in a preset's chain, which lies in runs/<name>.

    Raises RecipeError for a command that is no part of the chain.
    """
    run = Path("runs") / name
    reward, policy, bench = str(run / "reward"), str(run / "apa"), str(run / "bench")
    data = {"model": preset.model, "data": preset.data}
    data |= {"rows": preset.rows, "half": preset.half}
    apa = {key: value for key, value in preset.apa.items() if key != "base"}
    tokens = preset.evaluation.get("max_new_tokens", 64)
    models = [
        {"name": known_as, "model": model, "max_new_tokens": tokens}
        for known_as, model in (("base", preset.model), ("tuned", policy))
    ]
    chain = {
        "reward": {"output_dir": reward, **data, "trainer": preset.reward},
        "apa": {
            "output_dir": policy,
            **data,
            "reward_model": reward,
            "base": preset.apa.get("base", "starling"),
            "trainer": apa,
        },
        "answer": {"folder": bench, "models": models, "first": preset.questions},
        "judge": {"folder": bench, "reward_model": reward},
        "report": {"folder": bench, "baseline": "base"},
        "card": {"folder": policy, "bench": bench},
        "chat": {"model": policy, "base": preset.model, "max_new_tokens": tokens},
    }
    if command not in chain:
        raise RecipeError(f"{name} is a preset, which {command} has no part in")
    return chain[command]
