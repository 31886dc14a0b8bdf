"""Two processes against one with twice the batch: DDP, FSDP2, one killed; the configs.

Tolerances: float32, sums in another order. A gradient differs by 1e-6 of the largest
entry; Adam divides by |g|, so a step may differ by more where a gradient is near 0.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from test_checkpoints import equal, finished_weights, names, run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from starling_lib.actor_critic import ActorCritic
from starling_lib.apa import APAConfig, APATrainer
from starling_lib.commands import COMMANDS, bundled_recipes
from starling_lib.models import (
    load_policy,
    load_reward_model,
    load_tokenizer,
    tiny_model,
)
from starling_lib.recipe_files import RECIPES
from starling_lib.reward import KwiseRewardConfig, KwiseRewardTrainer
from starling_lib.sharding import check_tied_head
from starling_lib.trunk import freeze_below
from tests.conftest import toy_rows

# Two iterations of four updates; the record stands for responses sampled elsewhere.
APA = ("--trainer", "apa", "--recorded", "--steps", 8, "--first-gradient")
REWARD = ("--steps", 6, "--first-gradient", "--clip", 1)
CONFIGS = {path.stem: path for path in sorted((RECIPES / "accelerate").glob("*"))}
STEP = 1e-3  # the learning rate: what Adam moves a weight by, at most


def facts(folder: Path) -> dict:
    return json.loads((folder / "facts.json").read_text())


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in facts(folder)["log"] if "loss" in row]


def rollout_figures(folder: Path) -> list[float]:
    """What is logged of the responses themselves, iteration by iteration."""
    names = ("reward", "reward_std", "kl", "kl_exact", "entropy", "length", "eos_rate")
    names += ("explained_variance", "rewards/0_reward", "policy_loss", "value_loss")
    log = [row for row in facts(folder)["log"] if "reward" in row]
    return [row[name] for row in log for name in names]


def largest_gap(a, b) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def assert_same_training(one: Path, two: Path) -> None:
    """Every loss, and the first gradient of every parameter, agree."""
    assert len(set(losses(one))) == len(losses(one)) > 5
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    alone, together = (load_file(f / "gradient.safetensors") for f in (one, two))
    largest = max(gradient.abs().max().item() for gradient in alone.values())
    assert largest > 0.1 and largest_gap(alone, together) < 1e-6 * largest


def value_head(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "value_head.safetensors")


# --- DDP


@pytest.fixture(scope="module", params=["last layer", "all layers"])
def one_apa(request, tmp_path_factory):
    """APA on the record in one process: its options, folder and weights.

    The embeddings, tied to the head, get a row more: 260 are shared evenly.
    """
    folder = tmp_path_factory.mktemp("apa")
    model = load_policy("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the new row
        model.resize_token_embeddings(260, mean_resizing=False)
    model.save_pretrained(folder / "start")
    options = (*APA, "--model", folder / "start")
    if request.param == "all layers":
        options += ("--all-layers",)
    one = folder / "one"
    return options, one, finished_weights(one, *options, "--batch", 4)


@pytest.mark.slow
def test_apa_by_ddp_killed_and_resumed_is_apa_in_one_process(one_apa, tmp_path):
    """And plain transformers read what it saved. One of the two processes is killed."""
    options, folder, one = one_apa
    options = (*options, "--batch", 2, "--save-steps", 3)
    two = finished_weights(tmp_path / "two", *options, processes=2)
    assert_same_training(folder, tmp_path / "two")
    together, alone = rollout_figures(tmp_path / "two"), rollout_figures(folder)
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-4)
    assert largest_gap(one, two) < 0.1 * STEP
    assert largest_gap(one, load_file(folder.parent / "start/model.safetensors")) > STEP
    heads = value_head(folder), value_head(tmp_path / "two")
    assert largest_gap(*heads) < 0.1 * STEP

    broken = tmp_path / "broken"
    killed = run(broken, *options, "--die-in", "step", "--at", 5, processes=2)
    assert killed.returncode == 1 and "exitcode  : -9" in killed.stderr
    assert names(broken) >= {"checkpoint-3"} and "checkpoint-6" not in names(broken)
    assert equal(finished_weights(broken, *options, processes=2), two)
    assert losses(broken) == losses(tmp_path / "two")
    read = AutoModelForCausalLM.from_pretrained(broken).state_dict()
    assert all(torch.equal(read[name], two[name]) for name in two)


# --- DDP on a stream


def nectar_rows() -> list[dict]:
    """The toy rows in the schema of Nectar's files."""
    return [
        {
            "prompt": f"\n\nHuman: {row['prompt'][0]['content']}\n\nAssistant: ",
            "answers": [
                {"answer": text, "model": "m", "rank": rank, "finished": finished}
                for rank, (text, finished) in enumerate(
                    zip(row["responses"], row["finished"], strict=True), start=1
                )
            ],
        }
        for row in toy_rows()
    ]


def rows_of(folder: Path, process: int = 0) -> list[str]:
    return (folder / f"rows-{process}.txt").read_text().split()


@pytest.mark.slow
def test_a_streamed_file_is_shared_out_and_found_again_after_a_kill(tmp_path):
    """Six steps of two rows, beyond the end of ten: one process has them all."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in nectar_rows()))
    options = (*REWARD, "--stream", file)
    one, two, broken = (tmp_path / name for name in ("one", "two", "broken"))
    finished_weights(one, *options, "--batch", 2)
    options += ("--batch", 1, "--save-steps", 2)
    whole = finished_weights(two, *options, processes=2)
    assert_same_training(one, two)
    pairs = zip(rows_of(two, 0), rows_of(two, 1), strict=True)
    assert rows_of(one) == [row for pair in pairs for row in pair]
    assert sorted(rows_of(one)[:10]) == list("0123456789") != rows_of(one)[:10]

    killed = run(broken, *options, "--die-in", "step", "--at", 5, processes=2)
    assert killed.returncode == 1 and names(broken) >= {"checkpoint-4"}
    seen = len(rows_of(broken))
    assert equal(finished_weights(broken, *options, processes=2), whole)
    assert losses(broken) == losses(two)
    assert rows_of(broken)[seen:] == rows_of(two)[4:]


@pytest.mark.slow
def test_processes_read_row_groups_of_their_own(tmp_path):
    """Three and two of five; who has fewer rows waits for nobody."""
    file = tmp_path / "rows.parquet"
    Dataset.from_list(nectar_rows()).to_parquet(file, batch_size=2)
    options = ("--stream", file, "--batch", 2, "--steps", 3)
    finished_weights(tmp_path / "two", *options, processes=2)
    first, second = (rows_of(tmp_path / "two", process) for process in range(2))
    assert len(set(first)) == 6 and len(second) == 6 and len(set(second)) == 4
    assert set(first) | set(second) == set("0123456789")


# --- FSDP2, by transformers' own mechanism


def assert_sharded_and_saved(folder: Path, one: Path, kind) -> None:
    """Pieces while training; whole and the same as from one process when read again."""
    assert facts(folder)["sharded"]
    start = kind.from_pretrained(one.parent / "start").state_dict()
    expected = kind.from_pretrained(one).state_dict()
    for saved in (folder, folder / f"checkpoint-{facts(folder)['log'][-1]['step']}"):
        model, told = kind.from_pretrained(saved, output_loading_info=True)
        assert not any(told.values()), told
        assert largest_gap(model.state_dict(), expected) < 0.1 * STEP
    assert largest_gap(expected, start) > STEP


def assert_resuming_is_refused(folder: Path) -> None:
    """Ours when training goes on, transformers' when checkpoints would be kept for it."""
    ours, theirs = facts(folder)["refusals"]
    assert "does not resume a model sharded at loading" in ours
    assert theirs.startswith(
        "Resuming is not supported for models sharded at load time"
    )


@pytest.mark.slow
def test_apa_by_fsdp2_is_apa_in_one_process(one_apa, tmp_path):
    """Its reference, the value head's gradients and what is saved among it."""
    options, folder, _ = one_apa
    options = (*options, "--batch", 2, "--save-steps", 4, "--save-only-model")
    out = tmp_path / "two"
    finished_weights(out, *options, "--sharded", processes=2)
    assert_same_training(folder, out)
    exact = [row["kl_exact"] for row in facts(out)["log"] if "kl_exact" in row]
    assert exact[0] == pytest.approx(0, abs=1e-5) and exact[-1] > 1e-4
    gradient = load_file(out / "gradient.safetensors")
    heads = {name: g for name, g in gradient.items() if name.startswith("value_head.")}
    assert len(heads) == 4 and heads["value_head.outer.weight"].abs().max() > 0.1
    assert largest_gap(value_head(out), value_head(folder)) < 0.1 * STEP
    assert_sharded_and_saved(out, folder, AutoModelForCausalLM)
    assert_resuming_is_refused(out)


@pytest.mark.slow
def test_reward_by_fsdp2_is_reward_in_one_process(tmp_path):
    """With clipped gradients, whose norm is that of all pieces, and recomputed layers."""
    model = load_reward_model("tiny", load_tokenizer("tiny"))
    model.save_pretrained(tmp_path / "start")
    options = (*REWARD, "--recompute", "--model", tmp_path / "start")
    finished_weights(tmp_path / "one", *options, "--batch", 2)
    options += ("--batch", 1, "--save-steps", 3, "--save-only-model")
    out = tmp_path / "two"
    finished_weights(out, *options, "--sharded", processes=2)
    assert_same_training(tmp_path / "one", out)
    norms = [
        [row["grad_norm"] for row in facts(folder)["log"] if "grad_norm" in row]
        for folder in (tmp_path / "one", out)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and max(norms[0]) > 1
    assert_sharded_and_saved(out, tmp_path / "one", AutoModelForSequenceClassification)
    assert_resuming_is_refused(out)


# --- FSDP2, by the shipped config


@pytest.mark.slow
def test_reward_by_the_fsdp2_config_is_reward_in_one_process(tmp_path):
    """Killed and resumed, too. Accelerate has to take two CPUs for GPUs for this."""
    one, two, broken = (tmp_path / name for name in ("one", "two", "broken"))
    finished_weights(one, *REWARD, "--batch", 2)
    options = (*REWARD, "--batch", 1, "--save-steps", 2)
    options += ("--accelerate", CONFIGS["fsdp2"])
    final = finished_weights(two, *options, processes=2)
    assert facts(two)["sharded"]
    assert_same_training(one, two)
    kind = AutoModelForSequenceClassification
    weights = [kind.from_pretrained(folder).state_dict() for folder in (one, two)]
    assert largest_gap(*weights) < 0.1 * STEP

    killed = run(broken, *options, "--die-in", "step", "--at", 5, processes=2)
    assert killed.returncode == 1 and "exitcode  : -9" in killed.stderr
    assert names(broken) >= {"checkpoint-4"} and "checkpoint-6" not in names(broken)
    assert equal(finished_weights(broken, *options, processes=2), final)


# --- what a sharded model cannot do


def test_a_tied_head_that_does_not_divide_evenly_is_refused_if_trained():
    """FSDP2 would train the embeddings and not the head; 259 rows, 7 × 37."""
    model = tiny_model()
    with pytest.raises(ValueError, match="have 259 rows, which 2 processes"):
        check_tied_head(model, 2)
    check_tied_head(model, 7)
    freeze_below(model, 1)
    check_tied_head(model, 2)
    untied = load_reward_model("tiny", load_tokenizer("tiny"))
    check_tied_head(untied, 2)


def say_it_is_sharded(model):
    """What our code asks of a model before it copies or samples it."""
    model._is_distributed_loading_by_transformers = True
    return model


def test_layers_of_a_sharded_policy_are_not_copied():
    with pytest.raises(ValueError, match="separate_value_model=True copies layers"):
        ActorCritic(say_it_is_sharded(tiny_model()), separate=True)


def apa_trainer(folder, **arguments) -> APATrainer:
    return APATrainer(
        tiny_model(),
        lambda prompts, completions: [0.0] * len(prompts),
        APAConfig.starling(output_dir=str(folder), num_layers_unfrozen=1, max_steps=1),
        Dataset.from_list(toy_rows()).select_columns("prompt"),
        processing_class=load_tokenizer("tiny"),
        **arguments,
    )


@pytest.mark.parametrize("engine", ["transformers", "accelerate", "deepspeed"])
def test_a_sharded_policy_is_not_sampled(engine, fp32, tmp_path, monkeypatch):
    """Its processes would wait for each other; responses from elsewhere are welcome."""
    trainer = apa_trainer(tmp_path)
    trainer._check_sampler()
    if engine == "transformers":
        say_it_is_sharded(trainer.inner_model())
    elif engine == "accelerate":
        trainer.is_fsdp_enabled = True
    else:
        monkeypatch.setattr("starling_lib.apa.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="is not sampled here: train with DDP"):
        trainer._check_sampler()
    trainer.sampler = len
    trainer._check_sampler()


# --- weights that an engine has gathered (accelerate's FSDP, DeepSpeed)


def gathered(trainer) -> dict[str, torch.Tensor]:
    """A state dict of the trainer's module in which nothing is what the module holds."""
    state = trainer.model.state_dict()
    return {
        name: torch.full_like(x, i + 1.0) for i, (name, x) in enumerate(state.items())
    }


def test_gathered_weights_are_saved_and_not_the_pieces(fp32, tmp_path):
    trainer = apa_trainer(tmp_path)
    whole = gathered(trainer)
    whole["policy.lm_head.weight"] = whole["policy.model.embed_tokens.weight"].clone()
    trainer._save(str(tmp_path), state_dict=whole)
    read = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert largest_gap(read, trainer._part(whole, trainer.inner_model())) == 0
    head = trainer._part(whole, trainer.model.value_head)
    assert len(head) == 4 and largest_gap(value_head(tmp_path), head) == 0


def test_gathered_adapters_are_saved(fp32, tokenizer, toy_rankings, tmp_path):
    trainer = KwiseRewardTrainer(
        load_reward_model("tiny", tokenizer),
        KwiseRewardConfig.for_this_machine(output_dir=str(tmp_path)),
        toy_rankings,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, task_type="SEQ_CLS"),
    )
    whole = gathered(trainer)
    trainer._save(str(tmp_path), state_dict=whole)
    read = load_file(tmp_path / "adapter_model.safetensors")
    assert len(read) > 8
    for name, values in read.items():
        (mine,) = [
            x
            for key, x in whole.items()
            if key.replace(".default", "").replace(".modules_to_save", "")
            == name.replace("base_model.model.", "reward_model.", 1)
        ]
        assert torch.equal(values, mine), name


# --- the configs for `accelerate launch`

# https://www.deepspeed.ai/docs/config-json: what accelerate writes, and all it may write
# from our keys. Nested: the keys of zero_optimization, and of its two offload parts.
DEEPSPEED = {
    "": {"train_batch_size", "train_micro_batch_size_per_gpu", "steps_per_print"}
    | {"gradient_accumulation_steps", "gradient_clipping", "zero_optimization"},
    "zero_optimization": {"stage", "offload_optimizer", "offload_param"}
    | {"stage3_gather_16bit_weights_on_model_save"},
    "offload": {"device", "nvme_path"},
}


def launch_arguments(name: str):
    """What `accelerate launch` makes of a config, without launching."""
    words = ["--config_file", str(CONFIGS[name]), "--main_process_port", "0"]
    parsed = launch_command_parser().parse_args([*words, "-m", "starling_lib"])
    return _validate_launch_command(parsed)[0]


def test_there_is_a_config_for_each_engine_and_none_is_a_recipe():
    assert set(CONFIGS) == {"ddp", "fsdp2", "zero3"}
    for command in (command.name for command in COMMANDS if command.trainer):
        assert not any("accelerate" in name for name in bundled_recipes(command))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_a_config_is_known_and_explained(name):
    """`load_config_from_file` checks the outer keys; inner ones it would just ignore."""
    config = load_config_from_file(str(CONFIGS[name]))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
    options = {action.dest: action for action in launch_command_parser()._actions}
    for key, value in {**config.fsdp_config, **config.deepspeed_config}.items():
        assert key in options, key
        if options[key].choices:
            assert str(value) in options[key].choices, key
    text = CONFIGS[name].read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(" # " in line or line.endswith("_config:") for line in lines)
    head = text.partition("compute_environment")[0]
    assert "not run by us" in head.lower()
    assert f"--config_file {name}.yaml -m starling_lib " in head


def test_ddp_is_launched_in_eight_processes():
    arguments = launch_arguments("ddp")
    assert arguments.multi_gpu and not arguments.use_fsdp and not arguments.cpu
    assert prepare_multi_gpu_env(arguments)["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_fsdp2_shards_layers_and_saves_whole_weights(monkeypatch):
    arguments = launch_arguments("fsdp2")
    assert arguments.use_fsdp
    for key, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing


def test_zero3_makes_a_config_of_documented_keys(monkeypatch):
    arguments = launch_arguments("zero3")
    assert arguments.use_deepspeed
    arguments.deepspeed_fields_from_accelerate_config = ""  # set while launching
    for key, value in prepare_deepspeed_cmd_env(arguments)[1].items():
        monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()
    config = plugin.deepspeed_config
    assert set(config) <= DEEPSPEED[""]
    zero = config["zero_optimization"]
    assert set(zero) <= DEEPSPEED["zero_optimization"] and zero["stage"] == 3
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    for part in ("offload_optimizer", "offload_param"):
        assert (
            set(zero[part]) <= DEEPSPEED["offload"] and zero[part]["device"] == "none"
        )
    assert config["gradient_accumulation_steps"] == "auto"  # or it contradicts recipes
    assert config["gradient_clipping"] == "auto" and plugin.zero3_init_flag is False


def launch(folder: Path, *words) -> None:
    """`accelerate launch` by the shipped DDP config, in two processes."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "STARLING_PRECISION": "fp32",
        "PYTHONPATH": str(RECIPES.parents[1]),
    }
    options = ["--config_file", str(CONFIGS["ddp"]), "--num_processes", "2"]
    options += ["--main_process_port", "0", "--mixed_precision", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options]
    command += ["-m", "starling_lib", *map(str, words)]
    result = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_the_shipped_ddp_config_trains_what_one_process_trains(tmp_path):
    """Reward, then APA, by `accelerate launch`; gradient checkpointing as at full size."""
    one, two, policy = (tmp_path / name for name in ("one", "two", "policy"))
    again = "trainer.gradient_checkpointing=true"
    launch(tmp_path, "reward", "tiny", again, f"output_dir={two}")
    command = [sys.executable, "-m", "starling_lib", "reward", "tiny", again]
    command += ["trainer.gradient_accumulation_steps=4", f"output_dir={one}"]
    subprocess.run(
        command, env={**os.environ, "STARLING_PRECISION": "fp32"}, check=True
    )
    logs = [json.loads((f / "log_history.json").read_text()) for f in (one, two)]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    kind = AutoModelForSequenceClassification
    weights = [kind.from_pretrained(folder).state_dict() for folder in (one, two)]
    assert largest_gap(*weights) < 0.1 * STEP
    launch(
        tmp_path, "apa", "tiny", again, f"output_dir={policy}", f"reward_model={two}"
    )
    AutoModelForCausalLM.from_pretrained(policy)
