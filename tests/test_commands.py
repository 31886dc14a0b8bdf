"""The commands: a chain on the tiny preset, their help, their errors, their recipes."""

import copy
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_server import transformers_server
from test_bench_compare import GIVEN, QUESTIONS, by_length, by_name

from starling_lib import models, publish
from starling_lib.__main__ import main
from starling_lib.bench_compare import compare, read_bench
from starling_lib.bench_files import (
    answer_turns,
    read_answers,
    read_judgments,
    write_answers,
)
from starling_lib.command_recipes import RewardRecipe, decides_weights
from starling_lib.commands import COMMANDS, bundled_recipes, read_command
from starling_lib.recipe_files import (
    RECIPES,
    RecipeError,
    check_arguments,
    describe_source,
    keep_recipe,
    recipe_differences,
)

ROOT = Path(__file__).resolve().parents[1]
BY_NAME = {command.name: command for command in COMMANDS}
SMALL = ["rows=4", "trainer.max_steps=1", "trainer.disable_tqdm=true"]


@pytest.fixture
def folder(tmp_path, monkeypatch, fp32):
    """An empty working folder, where presets put their runs/."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(capsys, *arguments: str) -> str:
    """What a command that fails says: one line."""
    assert main(arguments) == 1
    said = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert said.startswith("error: ")
    return said


# --- from nothing to a card


def test_the_chain_by_commands_alone(folder, capsys):
    for command in ("reward", "apa", "answer", "judge", "report", "card"):
        assert main([command, "tiny"]) == 0, command
    run, said = folder / "runs" / "tiny", capsys.readouterr().out
    for line in (
        "held-out pairs ordered right: 0.",
        f"tuned policy in {Path('runs/tiny/apa')}",
        "2 models answered 4 questions",
        "gives on average base",
        "written to runs/tiny/apa/README.md",
    ):
        assert line in said
    assert set(read_answers(run / "bench" / "model_answer")) == {"base", "tuned"}
    scores = read_judgments(run / "bench" / "model_judgment")
    assert len(scores) == 2 * 4 * 2 and scores["error"].isna().all()
    report = json.loads((run / "bench" / "report.json").read_text())
    assert report["settings"]["models"]["tuned"]["model"] == "runs/tiny/apa"
    card = (run / "apa" / "README.md").read_text()
    assert report["in_short"][0] in card and "| trainer.apa_lambda" not in card
    assert (
        "| reward |" in card and "| seed | 0 |" in card and "arXiv 2306.02231" in card
    )
    assert main(["card", "tiny", "load_from=runs/tiny/apa"]) == 0
    example = (run / "apa" / "README.md").read_text().split("```python\n")[1]
    exec(example.split("```")[0], {})
    assert main(["card", "folder=runs/tiny/reward", "name=our-rm"]) == 0
    card = (run / "reward" / "README.md").read_text()
    assert "# our-rm" in card and "| accuracy |" in card and "nectar_mini" in card
    # once more: nothing is made anew, and nothing by another recipe
    weights = (run / "apa" / "model.safetensors").stat().st_mtime_ns
    assert main(["apa", "tiny", "trainer.report_to=none"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert (run / "apa" / "model.safetensors").stat().st_mtime_ns == weights
    said = error_of(capsys, "apa", "tiny", "trainer.max_steps=16")
    assert "trainer.max_steps: runs/tiny/apa was made with 8, not with 16" in said
    said = error_of(capsys, "apa", "tiny", "output_dir=runs/tiny/reward")
    assert "runs/tiny/reward was made with 'RewardRecipe', not with 'APARecipe'" in said
    said = error_of(capsys, "apa", "tiny", "output_dir=x", "reward_model=runs/tiny/apa")
    assert "reward_model: runs/tiny/apa is ['LlamaForCausalLM'], which gives no" in said


@pytest.mark.filterwarnings("ignore:some rows hold identical answers")
def test_a_stream_is_learnt_from_without_what_is_held_out(folder):
    from starling_lib.recipes import first_rankings
    from starling_lib.training_runs import training_rankings

    options = ["streaming=true", "rows=null", "eval_split=train[:9]", *SMALL[1:]]
    assert main(["reward", "tiny", *options]) == 0
    run = Path("runs/tiny/reward")
    assert (run / "config.json").exists() and (run / "reward_report.json").exists()

    recipe = read_command(BY_NAME["reward"], "tiny", options)
    held_out = first_rankings(recipe.data, recipe.eval_split)
    read, again = (
        [row["id"] for row in training_rankings(recipe, held_out)] for _ in range(2)
    )
    half = first_rankings(recipe.data, "train", half=recipe.half)["id"][:]
    assert read == again and set(read) == set(half) - set(held_out["id"])
    assert 0 < len(read) < len(half) and read != sorted(read, key=half.index)


def test_a_table_is_learnt_from_without_what_is_held_out(folder, capsys):
    from starling_lib.recipes import first_rankings
    from starling_lib.training_runs import training_rankings

    def rankings(**changes):
        recipe = dataclasses.replace(tiny, **changes)
        held_out = first_rankings(recipe.data, recipe.eval_split)
        return training_rankings(recipe, held_out)["id"], held_out["id"]

    tiny = read_command(BY_NAME["reward"], "tiny", ["rows=null", "half=null"])
    whole = first_rankings(tiny.data, "train")["id"]
    learnt, held_out = rankings(eval_split="train[:9]")
    assert set(learnt) == set(whole) - set(held_out) and len(learnt) == len(whole) - 9
    said = capsys.readouterr().out
    assert f"9 of {len(whole)} rows have a prompt of eval_split: left out" in said
    assert rankings(eval_split="test")[0] == whole and not capsys.readouterr().out
    with pytest.raises(RecipeError, match="eval_split: holds every prompt of split"):
        rankings(eval_split="train")


def test_held_out_rows_of_a_single_file_need_a_key_that_is_named(folder):
    from starling_lib.training_runs import train_reward_model

    own = folder / "own.jsonl"
    own.write_text((ROOT / "data/nectar_mini/test.jsonl").read_text())
    recipe = read_command(BY_NAME["reward"], "tiny", [f"data={own}", "half=null"])
    with pytest.raises(RecipeError, match="^eval_split: own.jsonl is one file.*null"):
        train_reward_model(recipe)


def test_adapters_are_merged_into_the_saved_model(folder):
    from starling_lib.models import load_reward_model

    lora = ["lora.r=2", "output_dir=rm", "eval_split=null"]
    assert main(["reward", "tiny", *SMALL, *lora]) == 0
    assert (folder / "rm" / "adapters" / "adapter_config.json").exists()
    merged = load_reward_model("rm")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert not (folder / "rm" / "adapter_config.json").exists()


def test_new_weights_in_a_folder_are_another_model(folder, policy, tokenizer, capsys):
    def save():
        policy.save_pretrained(folder / "policy")
        tokenizer.save_pretrained(folder / "policy")

    command = ["answer", "folder=bench", "first=1"]
    command += ["models=[{name: a, model: policy, max_new_tokens: 4}]"]
    save()
    assert main(command) == main(command) == 0
    policy.model.norm.weight.data += 1
    save()
    assert "was made by another run" in error_of(capsys, *command)


# --- answers, judgments and reports


def test_servers_answer_and_judge(folder, serve, capsys):
    def say(body, count):
        prompt = body["messages"][-1]["content"]
        return by_name(prompt) if body["model"] == "judge" else f"{body['model']} on it"

    url = serve(say).url
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    parts = ", ".join(f"{{name: {n}, model: {n}, base_url: '{url}'}}" for n in GIVEN)
    asked = ["questions=asked.jsonl", "by_category=false", "folder=b"]
    assert main(["answer", f"models=[{parts}]", *asked]) == 0
    judge = ["judge", "folder=b", "judge.model=judge", f"judge.base_url={url}"]
    assert main([*judge, "pairs=true", "judge.concurrency=2"]) == 0
    assert main(["report", "folder=b", "resamples=30", "date=2026-11-25"]) == 0
    assert "judge gives on average old" in capsys.readouterr().out
    report = json.loads((folder / "b" / "report.json").read_text())
    settings = report["settings"]
    assert settings["models"]["old"]["temperature"] == 1.0
    assert settings["date"] == "2026-11-25"
    assert settings["judges"]["judge"]["asked"] == "single answers and pairs"
    assert report["swaps"] and url not in (folder / "b" / "settings.json").read_text()


def test_a_replayed_judge_needs_no_server(folder, serve, capsys):
    url = serve(lambda body, count: "[[7]]").url
    for name, answers in GIVEN.items():
        write_answers(answers, folder / "b" / "model_answer" / f"{name}.jsonl")
    rows = "\n".join(map(json.dumps, QUESTIONS))
    (folder / "b" / "question.jsonl").write_text(rows)
    judge = ["judge", "folder=b", "judge.model=judge", f"judge.base_url={url}"]
    assert main(judge) == 0
    (folder / "b" / "replies.jsonl").rename(folder / "kept.jsonl")
    for file in (folder / "b" / "model_judgment").iterdir():
        file.unlink()
    assert main(["judge", "folder=b", "replies=kept.jsonl"]) == 0
    assert "judge gives on average new 7.0, old 7.0" in capsys.readouterr().out


def test_step_by_step_says_what_one_call_says(folder):
    """`report` on the files that `compare` left finds its figures again."""
    judge = SimpleNamespace(model="rm", concurrency=1)
    options = {"questions": QUESTIONS, "resamples": 30, "progress": False}
    made = compare(
        GIVEN, reward=by_length, reward_name=judge.model, output="b", **options
    )
    first = dict(made.report)
    assert main(["report", "folder=b", "resamples=30", "models=[old, new]"]) == 0
    again = json.loads((folder / "b" / "report.json").read_text())
    assert first.pop("settings") != again.pop("settings")
    assert again == first


def test_a_folder_that_is_not_ready_says_what_is_missing(folder, capsys):
    said = error_of(capsys, "report", "folder=b")
    assert "b holds no question.jsonl: let models answer first" in said
    compare(GIVEN, QUESTIONS, reward=by_length, output="b", resamples=9, progress=False)
    said = error_of(capsys, "report", "folder=b", "baseline=x")
    assert "baseline 'x' is none of" in said
    said = error_of(capsys, "report", "folder=b", "models=[neu]")
    assert "no answers of 'neu'" in said
    assert "nobody judges" in error_of(capsys, "judge", "folder=b")
    file = folder / "b" / "model_judgment" / "reward_model_single.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join(rows[:-1]))
    with pytest.warns(UserWarning, match="has judged 4 of 5 turns of new"):
        assert main(["report", "folder=b", "resamples=9"]) == 0
    file.unlink()
    assert "holds no judgments of these" in error_of(capsys, "report", "folder=b")


def test_answers_stand_in_the_order_of_answering(folder):
    compare(GIVEN, QUESTIONS, reward=by_length, output="b", resamples=9, progress=False)
    assert list(read_bench(Path("b"))[1]) == ["new", "old"], "FastChat's: by name"
    noted = {"models": {"old": {}, "new": {}}}
    Path("b/settings.json").write_text(json.dumps(noted))
    assert list(read_bench(Path("b"))[1]) == ["old", "new"]
    assert list(read_bench(Path("b"), ["new"])[1]) == ["new"]
    assert answer_turns(read_bench(Path("b"))[1]["old"][1])


# --- chat


class Echo:
    """Stands for a model: says how many messages it was given."""

    def __init__(self, monkeypatch):
        from starling_lib import terminal_chat

        self.seen = []
        monkeypatch.setattr(terminal_chat, "sample", self.sample)
        monkeypatch.setattr(terminal_chat, "encode_prompt", lambda _, m: [0] * len(m))
        self.policy = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=9))

    def sample(self, policy, tokenizer, prompts, **options):
        self.seen.append([one["content"] for one in prompts[0]])
        return SimpleNamespace(texts=[f"{len(prompts[0])}\x1b[2J"], finished=[True])

    def lines(self, *typed, **options):
        from starling_lib.terminal_chat import Speaker, converse

        said = []
        converse([Speaker("m", self.policy, None, **options)], typed, said.append)
        return said


def test_a_conversation_goes_on_until_it_is_reset(monkeypatch):
    echo = Echo(monkeypatch)
    said = echo.lines("a", "", "b", "/reset", "c", "/quit", "d", max_new_tokens=1)
    assert said[1:] == ["[m]\n1�[2J", "[m]\n3�[2J", "(forgotten)", "[m]\n1�[2J"]


def test_the_oldest_turns_are_forgotten_where_room_is_short(monkeypatch):
    echo = Echo(monkeypatch)
    echo.lines("a", "b", "c", system="be brief", max_new_tokens=5)
    assert echo.seen[1][:2] == ["be brief", "a"]
    assert echo.seen[2] == ["be brief", "b", "3\x1b[2J"[:0] + "4\x1b[2J", "c"]


def test_two_replies_stand_side_by_side():
    from starling_lib.terminal_chat import side_by_side

    shown = side_by_side(["base", "tuned"], ["one two three", "x\n\ny"], width=23)
    assert shown.split("\n") == [
        "[base]     │ [tuned]",
        "one two    │ x",
        "three      │",
        "           │ y",
    ]


def test_tabs_of_a_reply_are_shown_as_spaces():
    from starling_lib.terminal_chat import side_by_side

    shown = side_by_side(["m"], ["if x:\n\treturn\ty"], width=40)
    assert shown.split("\n") == ["[m]", "if x:", "    return  y"]


def test_chat_from_a_pipe(tmp_path):
    command = [sys.executable, "-m", "starling_lib", "chat", "model=tiny"]
    done = subprocess.run(
        [*command, "base=tiny", "max_new_tokens=3"],
        input="hello\n/reset\n/quit\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "[tiny]" in done.stdout and " │ " in done.stdout
    assert "(forgotten)" in done.stdout


# --- cards


def run_folder(path, **changes) -> Path:
    """What `apa` leaves, without the weights."""
    run = {"model": "openchat/openchat_3.5", "data": "berkeley-nest/Nectar", "seed": 1}
    run |= {"reward_model": "/srv/me/rm", "trainer": {"loss_type": "ppo"}} | changes
    path.mkdir()
    (path / "recipe.json").write_text(json.dumps(run))
    log = [{"loss": 1}, {"kl": 0.0, "reward": 1.0}, {"kl": 2.0, "reward": 3.0}]
    (path / "log_history.json").write_text(json.dumps(log))
    (path / "COMPLETE").write_text("")
    return path


def test_conditions_of_nectar_and_openchat_go_on(folder):
    run_folder(folder / "tuned")
    assert main(["card", "folder=tuned", "limits=[English only.]"]) == 0
    card = (folder / "tuned" / "README.md").read_text()
    assert card.count("not used to compete with OpenAI") == 3  # matter, data, model
    assert "OpenAI's terms apply" in card and "English only." in card
    assert "| reward | 1.000 | 3.000 |" in card and "| kl | 0.000 | 2.000 |" in card
    assert "PPO" in card and "/srv/me" not in card and "model `rm` by" in card
    assert "base_model: openchat/openchat_3.5" in card


def test_a_card_is_not_guessed(folder, capsys):
    assert "holds no model that" in error_of(capsys, "card", "folder=nothing")
    run_folder(folder / "a", model="me/own")
    said = error_of(capsys, "card", "folder=a")
    assert "license: that of me/own is not known here" in said
    assert main(["card", "folder=a", "license=mit"]) == 0
    run_folder(folder / "b", data="rows.jsonl")
    assert "data_license: that of rows.jsonl" in error_of(capsys, "card", "folder=b")
    assert main(["card", "folder=b", "data_license=CC0", "license=mit"]) == 0
    assert "no report.json in nowhere" in error_of(
        capsys, "card", "folder=a", "license=mit", "bench=nowhere"
    )


@pytest.mark.parametrize(
    ("base", "data", "derived"),
    [
        ("apache-2.0", "Apache-2.0", "apache-2.0"),
        ("apache-2.0", "Apache-2.0 on a condition", "Apache-2.0 on a condition"),
        ("llama2", "CC0: x", "llama2, and for the data: CC0: x"),
    ],
)
def test_a_licence_is_derived_from_model_and_data(base, data, derived):
    data = publish.CardData("d", data)
    assert publish.derived_license(base, data) == derived


def test_a_figure_that_is_no_number_is_refused():
    about = ("n", "tiny", "nectar_mini", "mit", "rm", "APA")
    with pytest.raises(ValueError, match="figure 'kl' is nan"):
        publish.policy_card(*about, {"kl": (0.0, math.nan)})
    card = publish.policy_card(*about, {}, settings={"a": "x | y\nz"})
    assert "| a | x \\| y z |" in card and "None were given" in card


# --- help


def test_help_names_every_key_and_loads_no_deep_learning_library():
    code = (
        "import sys, contextlib\n"
        "from starling_lib.__main__ import main\n"
        f"for name in {list(BY_NAME)}:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main([name, '--help'])\n"
        "print('loaded:', *sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    text, _, loaded = shown.partition("loaded: ")
    heavy = {"torch", "transformers", "trl", "datasets", "pandas", "matplotlib"}
    assert heavy.isdisjoint(loaded.split())
    for command in COMMANDS:
        for one in dataclasses.fields(command.recipe):
            assert f"  {one.name}" in text and one.metadata["help"][:40] in text
    assert "trainer.apa_lambda: float = 1.0\n      λ: target log-ratio is A/λ" in text
    assert "starling_7b/reward" in text and "TrainingArguments" in text


@pytest.mark.parametrize(
    ("module", "name"), [("reward", "KwiseRewardConfig"), ("apa", "APAConfig")]
)
def test_the_source_is_described_as_the_class_is(module, name):
    config = getattr(pytest.importorskip(f"starling_lib.{module}"), name)
    text = describe_source(ROOT / "starling_lib" / f"{module}.py", name, "trainer.")
    own = {f.name: f for f in dataclasses.fields(config) if f.name in vars(config)}
    own = {n: f for n, f in own.items() if n in config.__annotations__}
    said = re.findall(r"^  trainer\.(\w+): .* = (.*)\n      (.*)$", text, re.M)
    assert {n: (eval(d), h) for n, d, h in said} == {
        n: (f.default, f.metadata["help"]) for n, f in own.items()
    }


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["reward", "tiny", "trainer.learnig_rate=1.0e-3"],
            "trainer.learnig_rate: no such key; did you mean 'learning_rate'?",
        ),
        (
            ["reward", "tiny", "trainer.learning_rate=1e-3"],
            "trainer.learning_rate: expected float, got '1e-3' (YAML wants a point",
        ),
        (["apa", "tiny", "trainer.max_steps=many"], "trainer.max_steps: expected int"),
        (["apa", "tiny", "trainer.qqq=1"], "trainer.qqq: no such key; known: see"),
        (["reward", "tiny", "trainer.seed=1"], "trainer.seed: set seed of the recipe"),
        (["reward", "tiny", "trainer.loss_type=kwiss"], "loss_type='kwiss': choose"),
        (
            ["reward", "tiny", "streaming=true"],
            "rows: not of a stream; set trainer.max",
        ),
        (
            ["reward", "tiny", "streaming=true", "rows=null"],
            "trainer.max_steps: a stream does not say how long it is",
        ),
        (
            ["reward", "tiny", "streaming=true", "split=train[:9]"],
            "split: a stream has no slices, as 'train[:9]': name a whole split",
        ),
        (["reward", "tiny", "lora.rang=1"], "lora.rang: no such key; did you mean"),
        (["reward", "tiny", "output=x"], "output: no such key; did you mean 'output_"),
        (["reward", "output_dir=x"], "model: missing, smollm2-135m, tiny, a folder"),
        (["reward", "tini"], "no recipe at tini; bundled are small, tiny, st"),
        (["apa", "tiny", "base=trl"], "base: no 'trl'; choose from starling, paper"),
        (
            ["apa", "tiny"],
            "reward_model: the model in runs/tiny/reward is not there: python -m",
        ),
        (["label", str(RECIPES / "tiny.yaml")], "tiny is a preset, which label has no"),
        (["answer", "tiny"], "models, tuned: the model in runs/tiny/apa is not there"),
        (["chat", "tiny"], "model: the model in runs/tiny/apa is not there"),
        (
            ["answer", "folder=b", "models=[{name: a, model: x}, {name: a, model: y}]"],
            "models: two have the same name",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_made(folder, capsys, arguments, message):
    assert message in error_of(capsys, *arguments)
    assert not any(folder.iterdir())


def test_a_model_that_is_not_finished_is_not_used(folder, capsys):
    (folder / "rm").mkdir()
    (folder / "rm" / "recipe.json").write_text("{}")
    said = error_of(capsys, "apa", "tiny", "reward_model=rm")
    assert "reward_model: the model in rm is not finished: python -m starling" in said


def test_a_pad_token_is_one_of_the_vocabulary(folder, tokenizer):
    from starling_lib.training_runs import tokenizer_of

    tokenizer.save_pretrained("saved")
    assert tokenizer_of("saved", "<|im_start|>").pad_token == "<|im_start|>"
    assert tokenizer_of("saved", None).pad_token == "<|endoftext|>"
    for wrong in ("<pad>", "<|im_end|>"):
        with pytest.raises(RecipeError, match="is EOS or no token of saved"):
            tokenizer_of("saved", wrong)
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<turn>")
    other.save_pretrained("other")
    with pytest.raises(ValueError, match="ends a turn with '<turn>', not with EOS"):
        tokenizer_of("other", "<|im_start|>")


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (KeyboardInterrupt(), 130),
        (FloatingPointError("policy_loss is nan"), 1),
        (models.ModelUnavailable("no\nnetwork"), 1),
    ],
)
def test_how_a_command_ends(monkeypatch, capsys, raised, code):
    def fail(recipe):
        raise raised

    failing = dataclasses.replace(BY_NAME["card"], run=fail)
    monkeypatch.setattr("starling_lib.__main__.COMMANDS", [failing])
    assert main(["card", "folder=x"]) == code
    assert len(capsys.readouterr().err.strip().split("\n")) == 1
    fail_otherwise = dataclasses.replace(failing, run=lambda recipe: 1 / 0)
    monkeypatch.setattr("starling_lib.__main__.COMMANDS", [fail_otherwise])
    with pytest.raises(ZeroDivisionError):
        main(["card", "folder=x"])


@pytest.mark.parametrize("name", ["card", "label"])
def test_only_what_can_go_on_says_so_when_it_is_stopped(monkeypatch, capsys, name):
    def stop(recipe):
        raise KeyboardInterrupt

    stopped = dataclasses.replace(BY_NAME[name], run=stop)
    monkeypatch.setattr("starling_lib.__main__.COMMANDS", [stopped])
    assert main([name, {"card": "folder=x", "label": "output_dir=x"}[name]]) == 130
    said = capsys.readouterr().err
    assert said.startswith("stopped")
    assert ("goes on from here" in said) == (name == "label")


# --- recipes


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_the_recipes_of_starling_7b_make_configs_here():
    from starling_lib.training_runs import policy_arguments, reward_arguments

    here = ["trainer.report_to=tensorboard"]
    reward = read_command(BY_NAME["reward"], "starling_7b/reward", here)
    args = reward_arguments(reward)
    assert (args.learning_rate, args.warmup_steps, args.bf16) == (1e-5, 0.05, True)
    assert args.gradient_accumulation_steps * 16 == 320
    assert args.gradient_checkpointing and args.report_to == ["tensorboard"]
    policy = read_command(BY_NAME["apa"], "starling_7b/apa", [])
    args = policy_arguments(policy)
    assert (args.learning_rate, args.apa_lambda, args.kl_coef) == (2e-7, 1, 0.01)
    assert args.updates_per_iteration == 32 and args.adam_beta2 == 0.95
    assert policy.reward_model == reward.output_dir
    for name in ("label", "judge"):
        recipe = read_command(BY_NAME[name], f"starling_7b/{name}", [])
        assert recipe.judge.model.startswith("gpt-4") and recipe.judge.temperature == 0


@pytest.mark.parametrize("name", ["label", "reward", "apa", "judge"])
def test_the_recipes_of_starling_7b_say_where_each_value_comes_from(name):
    text = (RECIPES / "starling_7b" / f"{name}.yaml").read_text()
    for line in text.splitlines():
        if re.match(r" *\w+: \S", line):
            assert re.search(r"# .*(card|code|loss|ours|FastChat|Nectar)", line), line
    recipe = read_command(BY_NAME[name], f"starling_7b/{name}", [])
    assert all(re.search(rf"^{key}:", text, re.M) for key in vars(recipe))


def test_bundled_recipes_are_found_by_name():
    assert bundled_recipes("label") == ["nectar_mini", "starling_7b/label"]
    assert bundled_recipes("apa") == ["small", "tiny", "starling_7b/apa"]


def test_a_begun_folder_keeps_the_sizes_of_its_preset(folder, monkeypatch):
    """The probe finds a busy machine slow: a run that was killed must not change."""
    speed = iter([1000.0, 1.0])
    monkeypatch.setattr(models, "matmul_gflops", lambda: next(speed))
    read = [BY_NAME["reward"], "small", ["trainer.save_steps=5"]]
    large = read_command(*read)
    assert large.trainer["num_layers_unfrozen"] == 8
    keep_recipe(large, Path(large.output_dir) / "recipe.json", decides_weights)
    again = read_command(*read[:2], [])
    assert again.trainer | {"save_steps": 5} == large.trainer, "without a probe"
    small = read_command(*read[:2], ["output_dir=elsewhere"])
    assert small.trainer["num_layers_unfrozen"] == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    both = read_command(*read[:2], ["output_dir=elsewhere"])
    assert both.trainer["num_layers_unfrozen"] == 8, "processes do not probe"


def test_what_decides_weights_is_what_may_not_change(tmp_path):
    first = RewardRecipe(
        "out", "tiny", trainer={"learning_rate": 1.0, "hub_token": "s"}
    )
    path = tmp_path / "recipe.json"
    keep_recipe(first, path, decides_weights)
    assert "hub_token" not in path.read_text()
    changes = {"report_to": "wandb", "save_steps": 7, "logging_steps": 2}
    free = dataclasses.replace(
        first, output_dir="moved", trainer=first.trainer | changes
    )
    assert recipe_differences(free, path, decides_weights) == []
    fixed = dataclasses.replace(first, trainer={}, lora={"r": 2})
    assert recipe_differences(fixed, path, decides_weights) == [
        ("trainer.learning_rate", 1.0, None),
        ("lora.r", None, 2),
    ]


def test_unions_literals_and_enums_are_checked():
    from transformers import TrainingArguments

    good = {
        "report_to": ["none"],
        "eval_strategy": "steps",
        "debug": "",
        "lr_scheduler_kwargs": {"a": 1},
        "warmup_steps": 5,
    }
    check_arguments(TrainingArguments, good, "trainer")
    for bad, message in [
        ({"report_to": 3}, "trainer.report_to: expected str or list, got 3"),
        ({"bf16": 1}, "trainer.bf16: expected bool, got 1"),
        ({"max_steps": True}, "trainer.max_steps: expected int, got True"),
    ]:
        with pytest.raises(RecipeError, match=re.escape(message)):
            check_arguments(TrainingArguments, bad, "trainer")


# --- processes


def start(folder, *arguments, launcher=("-m", "starling_lib")) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"STARLING_PRECISION": "fp32", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment)


@pytest.mark.slow
def test_apa_goes_on_after_a_kill(folder):
    from safetensors.torch import load_file

    assert main(["reward", "tiny", *SMALL, "eval_split=null"]) == 0
    options = ["trainer.max_steps=24", "trainer.save_steps=3"]
    command = ["apa", "tiny", *options, "output_dir=cut"]
    process, deadline = start(folder, *command), time.monotonic() + 120
    while not (folder / "cut" / "checkpoint-6" / "COMPLETE").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "cut" / "COMPLETE").exists()
    assert start(folder, *command).wait() == 0
    assert start(folder, "apa", "tiny", *options, "output_dir=whole").wait() == 0
    cut, whole = (
        load_file(folder / name / "model.safetensors") for name in ("cut", "whole")
    )
    assert all((cut[name] == whole[name]).all() for name in whole)


@pytest.mark.slow
def test_what_a_command_leaves_is_served_as_any_model_is(folder):
    """The README's request, to transformers' own server."""
    assert main(["reward", "tiny"]) == main(["apa", "tiny"]) == 0
    body = {"model": "runs/tiny/apa", "messages": [{"role": "user", "content": "Hi"}]}
    with transformers_server(folder / "server.log") as url:
        request = urllib.request.Request(
            f"{url}/chat/completions",
            json.dumps({**body, "max_tokens": 8}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            said = json.load(reply)
    assert said["choices"][0]["message"]["role"] == "assistant"
    assert said["usage"]["completion_tokens"] <= 8


@pytest.mark.slow
def test_two_processes_are_launched_as_a_module(folder):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m")
    options = ["rows=8", "trainer.max_steps=2", "trainer.ddp_backend=gloo"]
    process = start(
        folder, "starling_lib", "reward", "tiny", *options, launcher=launcher
    )
    assert process.wait() == 0
    assert (folder / "runs" / "tiny" / "reward" / "COMPLETE").exists()
    report = folder / "runs" / "tiny" / "reward" / "reward_report.json"
    assert json.loads(report.read_text())["metrics"]["accuracy"]["n"] == 8 * 21
