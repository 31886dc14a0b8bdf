"""What the run of a recipe takes: `planner`'s formulas on a recipe's own numbers.

    recipe → what it trains or asks, on which machine → `Plan` → table, JSON, figure

Knows: what the keys of recipes mean for memory, work and cost; shapes of the models that
the recipes name, so that nothing has to be fetched. Does not know how anything is
trained or asked. Nothing heavy is loaded until a recipe's own config is needed.
"""

import dataclasses
import json
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starling_lib.command_recipes import (
    APARecipe,
    BenchJudgeRecipe,
    LabelRecipe,
    PlanRecipe,
    RewardRecipe,
    is_preset,
    preset_recipe,
    read_preset,
)
from starling_lib.planner import (
    GIB,
    SHARDED,
    Load,
    Shape,
    apa_memory,
    critic_parameters,
    fits,
    generation_bytes,
    generation_flops,
    hours,
    judging_cost,
    keeps_states,
    sampling_memory,
    training_flops,
    training_memory,
)
from starling_lib.ranking_prompt import presentation, ranking_messages
from starling_lib.recipe_files import (
    RECIPES,
    RecipeError,
    read_yaml,
    recipe_from,
)

CHARACTERS = 4  # of English text a token, about

_OPENCHAT = Shape(32, 4096, 14336, 32, 4096, 1024, 32002, tied=False, windowed=True)
_LLAMA_2 = Shape(32, 4096, 11008, 32, 4096, 4096, 32000, tied=False)
_SMOLLM2 = Shape(30, 576, 1536, 9, 576, 192, 49152, tied=True)
# From each model's published config.json; the released Starling models are those they
# began as, and Starling-RM's scores come from Llama 2's trunk.
KNOWN_SHAPES = {
    "openchat/openchat_3.5": _OPENCHAT,
    "berkeley-nest/Starling-LM-7B-alpha": _OPENCHAT,
    "mistralai/Mistral-7B-v0.1": dataclasses.replace(_OPENCHAT, vocabulary=32000),
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA_2,
    "berkeley-nest/Starling-RM-7B-alpha": _LLAMA_2,
    "01-ai/Yi-34B-Chat": Shape(60, 7168, 20480, 56, 7168, 1024, 64000, tied=False),
    "smollm2-135m": _SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2,
    "tiny": Shape(2, 64, 128, 4, 64, 32, 259, tied=True),  # models.tiny_model
}
KNOWN_PROMPTS = {"berkeley-nest/Nectar": {"train": 182_954}}  # rows of the card
# Mean tokens of a judge's reply: 21 pairs with reasons; a rating with its grounds (GPT-4
# on MT-Bench in FastChat's published judgments: 193).
RANKING_REPLY, RATING_REPLY = 700, 200
RATING_INSTRUCTIONS = 150  # tokens around an answer that is rated
BENCH_QUESTIONS, BENCH_TURNS = 80, 2


@dataclass(frozen=True)
class Machine:
    """Devices of one kind; the defaults are NVIDIA's A100 with 80 GB, by its data sheet."""

    devices: int = 1
    gib: float = 80.0  # memory of one
    tflops: float = 312.0  # peak of bf16 matrix products
    bandwidth: float = 2039.0  # GB a second between a device and its memory
    utilisation: float = 0.4  # share of both that is reached
    on_cpu: bool = False

    def hours(self, flops: float, read: float = 0.0) -> float:
        """For FLOPs and bytes of one device, whichever takes longer."""
        reading = read / (self.bandwidth * 1e9 * self.utilisation) / 3600
        return max(hours(flops, 1, self.tflops, self.utilisation), reading)


@dataclass(frozen=True)
class Texts:
    """How many texts there are, and how long in the mean, in tokens."""

    prompts: int
    prompt: int = 130
    response: int = 200
    responses: int = 7  # to one prompt


@dataclass(frozen=True)
class Plan:
    """What one command takes. Bytes are those of one device."""

    command: str
    subject: str
    parameters: dict[str, int] = field(default_factory=dict)
    # by kind of sharding: bytes by part at the fullest moment of the longest rows that
    # the recipe lets through; which moment that is; all of them with rows of mean length
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    moments: dict[str, str] = field(default_factory=dict)
    with_mean_rows: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    machine: Machine = Machine()
    notes: tuple[str, ...] = ()

    def fits(self, sharding: str) -> bool:
        """Whether the longest rows fit into a device's memory."""
        return fits(self.memory[sharding], self.machine.gib) <= 100

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON has it, with whether it fits."""
        fitting = {name: self.fits(name) for name in self.memory}
        return {**dataclasses.asdict(self), "fits": fitting}


# --- training


def plan_reward(args: Any, shape: Shape, texts: Texts, machine: Machine) -> Plan:
    """A reward model. `args`: what `KwiseRewardConfig` holds.

    The longest rows are those of `scoring.encode_ranking`: responses of three quarters of
    `max_length`, and a prompt of the rest. Raises ValueError without a `max_length`.
    """
    if args.max_length <= 0:
        raise ValueError("trainer.max_length=0 sets no limit: give one to plan for")
    longest = args.max_length * 3 // 4
    sizes = {
        "longest": (args.max_length - longest, longest),
        "mean": _within(texts, args.max_length - longest, longest),
    }
    rows, state = args.per_device_train_batch_size, _state(args, machine)
    memory = {name: {} for name in sizes}
    for sharding in _shardings(machine):
        for name, size in sizes.items():
            load = Load.of_rankings(
                *(rows, *size, texts.responses), sharding=sharding, **state
            )
            memory[name][sharding] = parts = training_memory(shape, load, head=False)
            if args.cache_trunk:
                parts["trunk states"] = load.tokens * shape.hidden * 4
    load = Load.of_rankings(rows, *sizes["mean"], texts.responses, **state)
    return Plan(
        command="reward",
        subject="a reward model",
        parameters={
            "all": shape.trunk_parameters + shape.hidden,
            "trained": shape.trained(load.trained_layers, head=False) + shape.hidden,
        },
        memory=_present(memory["longest"]),
        moments=dict.fromkeys(memory["longest"], "backward pass"),
        with_mean_rows=_totals(memory["mean"]),
        figures=_reward_figures(args, shape, texts, machine, load),
        machine=machine,
        notes=(
            f"longest rows: {rows} × ({sizes['longest'][0]} + {texts.responses} × "
            f"{longest}) tokens; mean rows: {rows} × ({sizes['mean'][0]} + "
            f"{texts.responses} × {sizes['mean'][1]})",
        ),
    )


def _reward_figures(
    args: Any, shape: Shape, texts: Texts, machine: Machine, load: Load
) -> dict[str, float]:
    """Tokens, FLOPs and hours; after the first epoch a kept trunk is not run again."""
    passes = args.gradient_accumulation_steps * machine.devices
    update = args.per_device_train_batch_size * passes
    steps = args.num_train_epochs * texts.prompts / update
    steps = args.max_steps if args.max_steps > 0 else max(1, round(steps))
    epochs = steps * update / texts.prompts
    flops = training_flops(shape, load, head=False)
    total = steps * passes * flops
    if args.cache_trunk and epochs > 1:
        top = training_flops(_top(shape, load), load, head=False)
        total *= (flops + (epochs - 1) * top) / (epochs * flops)
    return {
        "prompts a step": update,
        "tokens a step": passes * load.tokens,
        "FLOPs a step": passes * flops,
        "steps": steps,
        "hours": machine.hours(total / machine.devices),
    }


def plan_policy(
    args: Any, policy: Shape, reward: Shape, texts: Texts, machine: Machine
) -> Plan:
    """A policy tuned against a reward model. `args`: what `APAConfig` holds.

    The fullest moment is the sampling of an iteration or an update, whichever is more.
    """
    longest = (args.max_prompt_length, args.max_new_tokens)
    sizes = {"longest": longest, "mean": _within(texts, *longest)}
    minibatch = args.per_device_train_batch_size * (2 if args.ptx_coef else 1)
    state = _state(args, machine) | {"separate_critic": args.separate_value_model}
    memory, moments = {name: {} for name in sizes}, {}
    for sharding in _shardings(machine):
        for name, (prompt, response) in sizes.items():
            load = Load.of_responses(
                minibatch, prompt, response, sharding=sharding, **state
            )
            rows = args.rollout_batch_size
            at_once = min(args.generation_batch_size or rows, rows)
            kept = {"rows": rows, "tokens": prompt + response}
            at = {
                "update": apa_memory(policy, reward, load, kept),
                "sampling": sampling_memory(
                    policy, reward, load, at_once, prompt, response
                ),
            }
            fullest = max(at, key=lambda moment: sum(at[moment].values()))
            memory[name][sharding] = at[fullest]
            if name == "longest":
                moments[sharding] = fullest
    load = Load.of_responses(minibatch, *sizes["mean"], **state)
    trained = policy.trained(load.trained_layers, head=True)
    return Plan(
        command="apa",
        subject="a policy",
        parameters={
            "all": policy.parameters,
            "trained": trained,
            "critic": critic_parameters(policy, load),
            "reward model": reward.trunk_parameters + reward.hidden,
        },
        memory=_present(memory["longest"]),
        moments=moments,
        with_mean_rows=_totals(memory["mean"]),
        figures=_policy_figures(args, policy, reward, machine, load, sizes["mean"]),
        machine=machine,
        notes=(
            f"longest rows: {at_once} sampled at once, {minibatch} in an update, of "
            f"{longest[0]} + {longest[1]} tokens; mean rows: {sizes['mean'][0]} + "
            f"{sizes['mean'][1]}",
        ),
    )


def _policy_figures(
    args: Any,
    policy: Shape,
    reward: Shape,
    machine: Machine,
    load: Load,
    mean: tuple[int, int],
) -> dict[str, float]:
    """Tokens, FLOPs and hours of all devices, with what sampling takes of them.

    A token that is sampled waits for the memory: all weights and the cache are read. On a
    GPU weights are kept in float32, and autocast reads, writes and reads them again.
    Beside the updates, every response passes once through the trained layers of policy,
    reference and separate critic, through the reward model, and through the frozen layers
    where sampling has not kept their states.
    """
    rows, (prompt, response) = args.rollout_batch_size, mean
    top = _top(policy, load)
    trunk = rows * (prompt + response) * 2
    sampled = generation_flops(policy, rows, prompt, response)
    read = 4 + 2 * load.bytes_compute if load.autocast and not load.on_cpu else None
    at_once = min(args.generation_batch_size or rows, rows)
    reading = generation_bytes(
        policy, at_once, prompt, response, read or load.bytes_compute
    ) * (rows / at_once)
    below = 0 if keeps_states(policy, load) else policy.layers - top.layers
    layers = below + (1 + load.tops) * top.layers
    scored = trunk * (
        layers * policy.layer_parameters + reward.layers * reward.layer_parameters
    )
    scored += 2 * 2 * rows * response * policy.embedding_parameters
    updated = args.micro_steps * training_flops(top, load)
    updates = args.updates_per_iteration
    steps = args.max_steps
    iterations = steps / updates
    sampling = iterations * machine.hours(sampled, reading)
    return {
        "responses a step": machine.devices * rows / updates,
        "tokens a step": machine.devices * rows * (prompt + response) / updates,
        "FLOPs a step": machine.devices * (sampled + scored + updated) / updates,
        "steps": steps,
        "hours of sampling": sampling,
        "hours": sampling + iterations * machine.hours(scored + updated),
    }


def _state(args: Any, machine: Machine) -> dict[str, Any]:
    """What a trainer's arguments say on how state is held."""
    return {
        "trained_layers": args.num_layers_unfrozen,
        "bytes_compute": 2 if args.bf16 or args.fp16 else 4,
        "checkpointing": args.gradient_checkpointing,
        "on_cpu": machine.on_cpu,
        "accumulates": args.gradient_accumulation_steps > 1 or machine.devices > 1,
        "devices": machine.devices,
    }


def _shardings(machine: Machine) -> Sequence[str]:
    return list(SHARDED) if machine.devices > 1 else ["none"]


def _within(texts: Texts, prompt: int, response: int) -> tuple[int, int]:
    return min(texts.prompt, prompt), min(texts.response, response)


def _top(shape: Shape, load: Load) -> Shape:
    """The trained layers alone."""
    return dataclasses.replace(shape, layers=load.layers_of(shape))


def _present(memory: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Without parts that no sharding has."""
    names = dict.fromkeys(name for parts in memory.values() for name in parts)
    names = [n for n in names if any(parts.get(n) for parts in memory.values())]
    return {k: {n: parts.get(n, 0) for n in names} for k, parts in memory.items()}


def _totals(memory: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {sharding: sum(parts.values()) for sharding, parts in memory.items()}


# --- judging


def plan_judging(
    command: str,
    requests: int,
    prompt_tokens: float,
    reply_tokens: float,
    prices: Sequence[float] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Calls of a judge, their tokens and, with dollars a million of each, their cost."""
    figures = {
        "calls": requests,
        "prompt tokens": requests * prompt_tokens,
        "reply tokens": requests * reply_tokens,
    }
    if prices:
        prices = (prices[0], prices[1])
        figures["dollars"] = judging_cost(requests, prompt_tokens, reply_tokens, prices)
    return Plan(command, "a judge's calls", figures=figures, notes=tuple(notes))


def plan_labeling(recipe: LabelRecipe, texts: Texts, reply: int | None) -> Plan:
    """One call a row and pass, with all responses in it."""
    _, pairs = presentation("", texts.responses, 0)
    asked = ranking_messages([], [""] * texts.responses, range(texts.responses), pairs)
    instructions = len(asked[0]["content"]) // CHARACTERS
    shown = instructions + texts.prompt + texts.responses * texts.response
    return plan_judging(
        "label",
        texts.prompts * recipe.passes,
        shown,
        reply or RANKING_REPLY,
        recipe.judge and recipe.judge.prices,
        notes=(
            f"a call: {instructions} tokens of instructions, {texts.prompt} of the "
            f"prompt, {texts.responses} responses of {texts.response}, a reply of "
            f"{reply or RANKING_REPLY}; up to {recipe.attempts} where one is unreadable",
        ),
    )


def plan_ratings(
    recipe: BenchJudgeRecipe, models: int, texts: Texts, reply: int | None
) -> Plan:
    """MT-Bench: a call for each model, question and turn, and two for each pair."""
    models = len(recipe.models) or models
    turns = BENCH_QUESTIONS * BENCH_TURNS
    if recipe.judge is None:  # replies are replayed, or a reward model scores
        return plan_judging("judge", 0, 0, 0, notes=("nobody is asked",))
    games = models - 1 if recipe.baseline else models * (models - 1) // 2
    pairs = 2 * games * turns if recipe.pairs else 0
    singles = models * turns
    # A second turn is shown with the first.
    turn = (1 + BENCH_TURNS) / 2
    single = RATING_INSTRUCTIONS + turn * (texts.prompt + texts.response)
    pair = single + turn * texts.response
    calls = recipe.passes * (singles + pairs)
    shown = (singles * single + pairs * pair) / (singles + pairs)
    return plan_judging(
        "judge",
        calls,
        shown,
        reply or RATING_REPLY,
        recipe.judge.prices,
        notes=(
            f"{models} models, {BENCH_QUESTIONS} questions of {BENCH_TURNS} turns; a "
            f"question of {texts.prompt} tokens, an answer of {texts.response}, a reply "
            f"of {reply or RATING_REPLY}",
        ),
    )


# --- which recipe is meant

PLANNED = {
    "label": LabelRecipe,
    "reward": RewardRecipe,
    "apa": APARecipe,
    "judge": BenchJudgeRecipe,
}
_OWN = {one.name for one in dataclasses.fields(PlanRecipe)}


def read_plan(
    name: str | None, overrides: Sequence[str] = ()
) -> tuple[PlanRecipe, list[Any]]:
    """What is asked for, and the recipes it is about: one, or a preset's stages.

    `name`: a YAML file or a bundled recipe ("starling_7b/apa", a preset); None: keys
    alone. Overrides are keys of `PlanRecipe` or of the recipe. Raises RecipeError.
    """
    data = {} if name is None else read_yaml(_path(name))
    if not isinstance(data, dict):
        raise RecipeError(f"{name}: expected keys and values, got {data!r:.60}")
    heads = {text.partition("=")[0].partition(".")[0] for text in overrides}
    own = [text for text in overrides if text.partition("=")[0] in _OWN]
    wanted = recipe_from(PlanRecipe, {k: v for k, v in data.items() if k in _OWN}, own)
    if wanted.command not in (None, *PLANNED):
        raise RecipeError(
            f"command: no {wanted.command!r}; choose from {', '.join(PLANNED)}"
        )
    if is_preset(data):
        stages = _preset_stages(_path(name), wanted)
    else:
        keys = set(data) | (heads if name is None else set())
        stages = {wanted.command or _command_of(keys - _OWN): data}
    return wanted, [_joint(PLANNED[c], d, overrides, c) for c, d in stages.items()]


def bundled_plans() -> list[str]:
    """Names of the bundled recipes and presets that can be planned."""
    patterns = ["*.yaml", *(f"{command}/*.yaml" for command in PLANNED)]
    patterns += [f"*/{command}.yaml" for command in PLANNED]
    paths = dict.fromkeys(p for one in patterns for p in sorted(RECIPES.glob(one)))
    return [path.relative_to(RECIPES).with_suffix("").as_posix() for path in paths]


def _path(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    if name not in (known := bundled_plans()):
        raise RecipeError(f"no recipe at {name}; bundled are {', '.join(known)}")
    return RECIPES / f"{name}.yaml"


def _preset_stages(path: Path, wanted: PlanRecipe) -> dict[str, dict[str, Any]]:
    """The recipes of a preset: of reward and apa, or of the command that is wanted."""
    preset = read_preset(str(path))
    if wanted.slow_sizes:
        preset = read_preset(str(path), **preset.slow)
    commands = [wanted.command] if wanted.command else ["reward", "apa"]
    return {c: preset_recipe(c, preset, path.stem) for c in commands}


def _command_of(keys: set[str]) -> str:
    """The command whose recipe has these keys: all known to it, none missing.

    Raises RecipeError where that is none or several.
    """
    known = {c: [f.name for f in dataclasses.fields(r)] for c, r in PLANNED.items()}
    fitting = [
        command
        for command, recipe in PLANNED.items()
        if keys <= set(known[command]) and _required(recipe) <= keys
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise RecipeError(
            f"command: this may be a recipe of {' or '.join(fitting)}; say command=…"
        )
    # What it seems to be meant for says best what is wrong with it.
    near = {
        c: len(keys & set(names)) - len(keys - set(names)) for c, names in known.items()
    }
    best = [c for c in near if near[c] == max(near.values()) and keys & set(known[c])]
    if len(best) == 1:
        return best[0]
    raise RecipeError(
        f"command: keys {', '.join(sorted(keys)) or '(none)'} are those of no recipe of "
        f"{', '.join(PLANNED)}; say command=…"
    )


def _required(recipe: type) -> set[str]:
    missing = dataclasses.MISSING
    return {
        one.name
        for one in dataclasses.fields(recipe)
        if one.default is missing and one.default_factory is missing
    }


def _joint(recipe: type, data: Any, overrides: Sequence[str], command: str) -> Any:
    """The recipe, read together with the planner's keys: a misspelt one may be of either.

    Raises RecipeError.
    """
    kinds = {**typing.get_type_hints(PlanRecipe), **typing.get_type_hints(recipe)}
    fields = {
        f.name: f for one in (PlanRecipe, recipe) for f in dataclasses.fields(one)
    }
    both = dataclasses.make_dataclass(
        recipe.__name__,
        [(name, kinds[name], _copy(f)) for name, f in fields.items()],
        kw_only=True,
    )
    try:
        read = recipe_from(both, data, overrides)
    except RecipeError as error:
        raise RecipeError(f"as a recipe of {command}: {error}") from None
    names = [one.name for one in dataclasses.fields(recipe)]
    return recipe(**{name: getattr(read, name) for name in names})


def _copy(one: dataclasses.Field) -> Any:
    """A field anew, which a second class may have."""
    default = {"default": one.default, "default_factory": one.default_factory}
    given = {k: v for k, v in default.items() if v is not dataclasses.MISSING}
    return dataclasses.field(metadata=one.metadata, **given)


# --- from recipes


def plan_recipe(recipe: Any, wanted: PlanRecipe | None = None) -> Plan:
    """The plan of a command's recipe on the machine that `wanted` names.

    Raises RecipeError for what cannot be planned, and what keeps the recipe itself from
    being run.
    """
    wanted = wanted or PlanRecipe()
    if isinstance(recipe, LabelRecipe):
        return plan_labeling(recipe, _texts(recipe, wanted), wanted.reply_tokens)
    if isinstance(recipe, BenchJudgeRecipe):
        texts = Texts(BENCH_QUESTIONS, *_lengths(wanted))
        return plan_ratings(recipe, wanted.answerers, texts, wanted.reply_tokens)
    if recipe.lora is not None:
        raise RecipeError(
            "lora: adapters are not planned; lora=null plans the layers they stand in"
        )
    if wanted.sharding not in (None, *SHARDED):
        raise RecipeError(
            f"sharding: no {wanted.sharding!r}; choose from {', '.join(SHARDED)}"
        )
    machine, texts = _machine(wanted), _texts(recipe, wanted)
    # Only now: the configs are those of a deep-learning library.
    from starling_lib.training_runs import policy_arguments, reward_arguments

    if isinstance(recipe, RewardRecipe):
        shape = shape_of(recipe.model, "model")
        plan = plan_reward(reward_arguments(recipe), shape, texts, machine)
        return _as_wanted(plan, f"{recipe.model} as a reward model", wanted)
    args, policy = policy_arguments(recipe), shape_of(recipe.model, "model")
    if args.max_steps <= 0:
        block = args.rollout_batch_size * machine.devices
        iterations = -(-args.num_train_epochs * texts.prompts // block)
        args.max_steps = int(iterations * args.updates_per_iteration)
    judge = wanted.reward_shape or _reward_base(recipe)
    reward = shape_of(judge, "reward_shape")
    plan = plan_policy(args, policy, reward, texts, machine)
    subject = f"{recipe.model} as a policy, scored by {judge}"
    return _as_wanted(plan, subject, wanted)


def _as_wanted(plan: Plan, subject: str, wanted: PlanRecipe) -> Plan:
    """With its subject, what the hours cost, and one sharding where one is asked for."""
    figures = dict(plan.figures)
    if wanted.dollars_an_hour is not None:
        devices = plan.machine.devices
        figures["dollars"] = figures["hours"] * devices * wanted.dollars_an_hour
    memory = {
        name: parts
        for name, parts in plan.memory.items()
        if len(plan.memory) == 1 or wanted.sharding in (None, name)
    }
    return dataclasses.replace(plan, subject=subject, figures=figures, memory=memory)


def _machine(wanted: PlanRecipe) -> Machine:
    """The machine that is asked about; of a CPU, what is not said is measured here."""
    given = {
        name: getattr(wanted, name)
        for name in ("gib", "tflops", "bandwidth")
        if getattr(wanted, name) is not None
    }
    rest = {"devices": wanted.devices, "utilisation": wanted.utilisation}
    for name, value in {**given, **rest}.items():
        if value <= 0:
            raise RecipeError(f"{name}: must be above 0, got {value}")
    if wanted.device not in ("gpu", "cpu"):
        raise RecipeError(f"device: no {wanted.device!r}; choose from gpu, cpu")
    if wanted.device == "gpu":
        return Machine(**given, **rest)
    here = {"gib": _memory_here() / GIB, "bandwidth": 20.0}  # two channels of DDR4
    if "tflops" not in given:
        from starling_lib.models import matmul_gflops

        here["tflops"] = matmul_gflops() / 1000
    return Machine(**{**here, **given}, **rest, on_cpu=True)


def _memory_here() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        raise RecipeError("gib: this system does not say how much it has") from None


def _lengths(wanted: PlanRecipe) -> tuple[int, int, int]:
    return wanted.prompt_tokens, wanted.response_tokens, wanted.responses


def _texts(recipe: Any, wanted: PlanRecipe) -> Texts:
    """How many prompts the recipe reads, and the lengths that are assumed."""
    return Texts(wanted.prompts or count_prompts(recipe), *_lengths(wanted))


def count_prompts(recipe: LabelRecipe | RewardRecipe | APARecipe) -> int:
    """Rows that a recipe reads: known, or counted where the data are on this machine.

    Raises RecipeError for a split that cannot be read, and for other data, which only a
    download could count.
    """
    labels = isinstance(recipe, LabelRecipe)
    source = recipe.source if labels else recipe.data
    half = getattr(recipe, "half", None)
    counts = [
        _count_part(source, part.strip(), half) for part in recipe.split.split("+")
    ]
    if recipe.rows is None:
        return sum(counts)
    if labels:  # which takes so many of each part
        return sum(min(count, recipe.rows) for count in counts)
    return min(sum(counts), recipe.rows)


def _count_part(source: str, part: str, half: str | None) -> int:
    """Rows of one name of a split, with or without a slice; errors of `count_prompts`."""
    found = re.fullmatch(r"(\w+)(?:\[(.*)\])?", part)
    if found is None:
        raise RecipeError(
            f"split: cannot read {part!r}; write a name (letters, digits, _), or one with "
            "a slice such as train[:100]"
        )
    name, slice_ = found.groups()
    if source in KNOWN_PROMPTS:
        rows = _sliced(KNOWN_PROMPTS[source].get(name), slice_)
    elif source == "nectar_mini" or Path(source).exists():
        from starling_lib.recipes import first_rankings

        rows = len(first_rankings(source, part, half=half))
    else:
        rows = None
    if rows is None:
        raise RecipeError(
            f"prompts: how many {source} has in {part} is not known here; give it"
        )
    return rows


def _sliced(rows: int | None, text: str | None) -> int | None:
    """Rows of a slice such as ":-2000"; None where that cannot be said."""
    if rows is None or text is None:
        return rows
    if not (found := re.fullmatch(r"(-?\d+)?:(-?\d+)?", text)):
        return None
    start, end = (None if x is None else int(x) for x in found.groups())
    return len(range(rows)[start:end])


def shape_of(model: str, key: str) -> Shape:
    """The shape of a model: known here, or from a config, in a folder or of the hub.

    Raises RecipeError, naming the recipe's `key`, where there is none to be had.
    """
    if model in KNOWN_SHAPES:
        return KNOWN_SHAPES[model]
    from transformers import AutoConfig

    try:
        return Shape.of(AutoConfig.from_pretrained(model))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{key}: the shape of {model} is neither known here ("
            f"{', '.join(KNOWN_SHAPES)}) nor to be read from its config: "
            f"{str(error):.200}"
        ) from None


def _reward_base(recipe: APARecipe) -> str:
    """Whose shape the reward model has: its own, or that of what it will be made from.

    Raises RecipeError where it is neither there nor that of a bundled recipe.
    """
    name = recipe.reward_model
    if name in KNOWN_SHAPES or (Path(name) / "config.json").exists():
        return name
    begun = Path(name) / "recipe.json"
    if begun.exists():
        return json.loads(begun.read_text(encoding="utf-8"))["model"]
    for path in sorted(RECIPES.glob("*/reward.yaml")):
        made = recipe_from(RewardRecipe, read_yaml(path))
        if made.output_dir == name:
            return made.model
    if Path(name).parent.parent == Path("runs"):  # of a preset: from the same model
        return recipe.model
    raise RecipeError(
        f"reward_shape: no reward model in {name} yet; name a model of its size"
    )


# --- in words


def plan_text(plan: Plan) -> str:
    """A plan as a table for the terminal."""
    lines = [f"{plan.command}: {plan.subject}"]
    if plan.parameters:
        shown = [f"{name} {count:,}" for name, count in plan.parameters.items()]
        lines.append(f"  parameters: {'; '.join(shown)}")
    if plan.memory:
        lines += ["", *_memory_lines(plan)]
    lines.append("")
    for name, value in plan.figures.items():
        lines.append(f"  {name:<20}{_figure(value):>14}")
    lines += [f"  {note}" for note in plan.notes]
    return "\n".join(lines)


def _memory_lines(plan: Plan) -> list[str]:
    shardings, machine = list(plan.memory), plan.machine
    devices = "one device" if machine.devices == 1 else f"each of {machine.devices}"
    first = plan.memory[shardings[0]]

    def row(name: str, cells: Sequence[Any]) -> str:
        return f"  {name:<20}" + "".join(f"{cell:>14}" for cell in cells)

    def gib(size: float) -> str:
        return f"{size / GIB:.2f}"

    totals = [sum(plan.memory[one].values()) for one in shardings]
    fitting = ["fits" if plan.fits(one) else "does not fit" for one in shardings]
    return [
        f"  GiB on {devices}, longest rows",
        row("sharding", shardings),
        row("fullest moment", [plan.moments[one] for one in shardings]),
        *(row(n, [gib(plan.memory[one][n]) for one in shardings]) for n in first),
        row("all", [gib(total) for total in totals]),
        row(f"in {machine.gib:.4g} GiB", fitting),
        row("all, mean rows", [gib(plan.with_mean_rows[one]) for one in shardings]),
    ]


def _figure(value: float) -> str:
    if value >= 1e12:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"
