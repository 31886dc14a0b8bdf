"""Policy optimisation side by side: APA and PPO (both), AWR; RLOO, DPO and SFT of TRL.

    python tests/benchmarks/study_apa.py [--seeds 3] [--only apa-paper ppo …]
    python tests/benchmarks/study_apa.py --smoke     every method, random tiny model

Proxy and gold reward model are those of the preset (notebooks 02 and 03): the rankings of
half A and of half B, other seeds. Every method sees half A's prompts; the online ones
sample equally many responses, and all make equally many updates of the last four layers.
The offline ones read equally many responses, as often: DPO 40 pairs, SFT the best of 80
rankings, prompt and response together cut at `MAX_LENGTH` tokens. With seed 0 a method
tries two learning rates; the one whose policy does better on 20 prompts of half B, by the
proxy, is kept for all seeds. Measured on the 37 test prompts, four samples each. Ablations
change one setting of `apa-small`, at the learning rate that was kept for it.

A run appends a line to `data/studies/policies.jsonl`, so a stopped study goes on;
`--table` prints what is there. Runs are independent and small, so that several processes
of few threads (`--workers`) do more in an hour than one process with all of them.
"""

import argparse
import math
import multiprocessing
import os
import tempfile
import time
from datetime import date
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from bench_rollout import reward_function
from filelock import FileLock
from turns import machine

from starling_lib.journal import open_journal
from starling_lib.studies import RUN_KEYS, read_runs, summary

PRESET, MODEL = "small", "smollm2-135m"
RESULTS = Path(__file__).resolve().parents[2] / "data/studies/policies.jsonl"
LAYERS, SAMPLES, RESPONSES, BATCH = 4, 4, 16, 4
# Sizes that all online methods share: 5 iterations of 16 responses, 8 updates on each.
SHARED = {
    "max_steps": 40,
    "rollout_batch_size": RESPONSES,
    "per_device_train_batch_size": BATCH,
    "num_epochs_per_rollout": 2,
    "num_layers_unfrozen": LAYERS,
    "max_prompt_length": 256,
    "max_new_tokens": 64,
}
SMALL = {"base": "starling", "anchor": "initial", "apa_lambda": 0.33}
# Tokens of prompt and response that DPO and SFT read: most prompts have 38 to 64.
MAX_LENGTH = 128
# method → (its settings, learning rates); those of our trainer name a base
METHODS = {
    "apa-small": (SMALL, (4e-5, 8e-5)),
    "apa-paper": ({"base": "paper"}, (2e-5, 8e-5)),
    "apa-starling": ({"base": "starling"}, (4e-5, 8e-5)),
    "ppo": (
        {
            "base": "starling",
            "loss_type": "ppo",
            "whiten_advantages": True,  # as trlx does for PPO
            "value_gate": None,
        },
        (4e-5, 8e-5),
    ),
    # Beside `apa-paper`, from which only the loss differs.
    "ppo-paper": ({"base": "paper", "loss_type": "ppo"}, (2e-5, 8e-5)),
    # The paper's AWR needed λ = 1 where APA took 0.1.
    "awr": ({"base": "paper", "loss_type": "awr", "apa_lambda": 1.0}, (4e-5, 8e-5)),
    "rloo": ({"beta": 0.01}, (4e-5, 8e-5)),
    "dpo": ({"beta": 0.1}, (2e-5, 8e-5)),
    "sft": ({}, (2e-5, 8e-5)),
}
ABLATIONS = {
    "λ = 0.0033": {"apa_lambda": 0.0033},
    "λ = 0.033": {"apa_lambda": 0.033},
    "λ = 3.3": {"apa_lambda": 3.3},
    "anchor rollout": {"anchor": "rollout"},
    "whitened": {"whiten_advantages": True},
    "missing EOS −1": {"missing_eos_penalty": 1.0},
}


# --- reward models


def judge(folder: Path):
    """A kept reward model with its tokenizer."""
    from starling_lib.models import load_reward_model, load_tokenizer

    tokenizer = load_tokenizer(folder)
    return load_reward_model(folder, tokenizer), tokenizer


# --- training, each → the tuned policy and its curve


def ours(settings, learning_rate, seed, policy, tokenizer, prompts, proxy, folder):
    from starling_lib.apa import APAConfig, APATrainer

    arguments = {**SHARED, **settings, "learning_rate": learning_rate, "seed": seed}
    arguments |= {"output_dir": folder, "save_strategy": "no", "disable_tqdm": True}
    base = arguments.pop("base")
    args = getattr(APAConfig, base)(**arguments)
    trainer = APATrainer(
        policy,
        proxy[0],
        args,
        prompts,
        processing_class=tokenizer,
        reward_processing_classes=[proxy[1]],
    )
    trainer.train()
    logged = ("reward", "kl", "length", "eos_rate", "entropy", "explained_variance")
    curve = [
        {name: round(row[name], 4) for name in logged}
        for row in trainer.state.log_history
        if "kl" in row
    ]
    return trainer.inner_model(), curve


def trl_arguments(learning_rate, seed, folder, rows=BATCH) -> dict:
    """What the three trainers of TRL share; `rows` (or pairs) an update."""
    from starling_lib.checkpoints import machine_defaults

    arguments = {
        "output_dir": folder,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,  # as APAConfig
        "seed": seed,
        "max_steps": SHARED["max_steps"],
        "per_device_train_batch_size": rows,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": BATCH,
        "disable_tqdm": True,
    }
    return machine_defaults(arguments)


def rloo(settings, learning_rate, seed, policy, tokenizer, prompts, proxy, folder):
    from trl import RLOOConfig, RLOOTrainer

    from starling_lib.scoring import score_responses

    reward = reward_function(partial(score_responses, *proxy), tokenizer.eos_token_id)

    args = RLOOConfig(
        **trl_arguments(learning_rate, seed, folder),
        **settings,
        num_generations=2,
        steps_per_generation=RESPONSES // BATCH,
        num_iterations=2,
        max_completion_length=SHARED["max_new_tokens"],
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    trainer = RLOOTrainer(
        policy, reward, args, train_dataset=prompts, processing_class=tokenizer
    )
    trainer.train()
    return trainer.model, rloo_curve(trainer.state.log_history)


def rloo_curve(history: list[dict]) -> list[dict]:
    """Reward and KL of each batch of samples, the KL in nats a response, as ours.

    TRL logs Σ log-ratio / Σ tokens; times the tokens a response that is the mean over
    responses. Exact while a log entry covers one batch of samples: steps between logs are
    fewer than updates on a batch. It is k1, which may be negative, and ours k3.
    """
    return [
        {
            "reward": entry["reward"],
            "kl": round(entry["kl"] * entry["completions/mean_length"], 4),
        }
        for entry in history
        if "reward" in entry
    ]


def dpo(settings, learning_rate, seed, policy, tokenizer, prompts, proxy, folder):
    from trl import DPOConfig, DPOTrainer

    from starling_lib.rankings import to_preference_pairs

    arguments = trl_arguments(learning_rate, seed, folder, BATCH // 2)
    args = DPOConfig(**arguments, **settings, max_length=MAX_LENGTH)
    pairs = to_preference_pairs(half_a(), pairs=1, seed=seed)
    pairs = pairs.shuffle(seed).select(range(RESPONSES * 5 // 2))
    trainer = DPOTrainer(
        policy, args=args, train_dataset=pairs, processing_class=tokenizer
    )
    trainer.train()
    return trainer.model, []


def sft(settings, learning_rate, seed, policy, tokenizer, prompts, proxy, folder):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    best = [
        {
            "prompt": row["prompt"],
            "completion": [{"role": "assistant", "content": row["responses"][0]}],
        }
        for row in half_a().shuffle(seed).select(range(RESPONSES * 5))
    ]
    arguments = trl_arguments(learning_rate, seed, folder)
    args = SFTConfig(**arguments, **settings, max_length=MAX_LENGTH)
    trainer = SFTTrainer(
        policy,
        args=args,
        train_dataset=Dataset.from_list(best),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.model, []


def half_a():
    from starling_lib.rankings import load_rankings

    return load_rankings(split="train", half="A")


# --- reading what a policy has sampled


def trunk_layers(actor, rewards) -> list[int]:
    """Where the layers end that policy and start, policy and judges have in common."""
    return sorted({*rewards.trunk_layers, len(actor.frozen_trunk.layers)})


def read(rollout, actor, reference, rewards) -> dict:
    """Proxy, gold and k3-KL of each response, (N,) each, 16 rows at a time."""
    import torch

    from starling_lib.models import inference
    from starling_lib.objectives import response_kl
    from starling_lib.rollouts import TOKEN_FIELDS

    kls, scores = [], []
    with inference(actor):
        for i in range(0, len(rollout), 16):
            rows = rollout.select(range(i, min(i + 16, len(rollout))))
            tokens = {name: getattr(rows, name) for name in TOKEN_FIELDS}
            layers = trunk_layers(actor, rewards)
            below = rows.states or actor.trunk_layers(layers, **tokens)
            scores.append(rewards.read(below, tokens))
            trunk = below[max(below)]
            now = actor(**tokens, trunk_states=trunk)["logprobs"]
            start = reference.logprobs(tokens, trunk)
            kls.append(response_kl(now, start, rows.response_mask))
    known = {i: torch.cat([part[i] for part in scores]) for i in scores[0]}
    proxy, gold = rewards.each(None, rollout, known)
    return {"proxy": proxy, "gold": gold, "kl": torch.cat(kls).float()}


# --- one run


def start_folder(policy, tokenizer) -> Path:
    """The initial policy's folder, from which RLOO and DPO load their reference.

    Several workers ask at once: one makes it, aside, so that none reads half of it.
    """
    from starling_lib.models import cache_dir

    folder = cache_dir() / "studies" / f"{MODEL}-start"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            policy.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            partial.rename(folder)
    return folder


class Lab:
    """What all runs of a process share: the initial policy, prompts, proxy and gold."""

    @staticmethod
    @cache
    def of_process() -> "Lab":
        return Lab()

    def __init__(self):
        from starling_lib.models import load_policy, load_tokenizer
        from starling_lib.rankings import load_rankings
        from starling_lib.recipes import gold_model, load_settings, reward_model

        settings = load_settings(PRESET)
        self.tokenizer = load_tokenizer(MODEL)
        self.reference = load_policy(MODEL).eval()
        self.start = start_folder(self.reference, self.tokenizer)
        self.proxy = judge(reward_model(settings))
        self.gold = judge(gold_model(settings))
        self.train = half_a().select_columns("prompt")
        self.test = load_rankings(split="test")["prompt"]
        self.validation = load_rankings(split="train", half="B")["prompt"][:20]

    def tune(self, settings: dict, learning_rate: float, seed: int, method: str):
        """The policy that a method makes of the initial one, and its curve."""
        from starling_lib.models import load_policy
        from starling_lib.trunk import freeze_below

        policy = load_policy(str(self.start))
        freeze_below(policy, LAYERS)
        make = {"rloo": rloo, "dpo": dpo, "sft": sft}.get(method, ours)
        with tempfile.TemporaryDirectory() as folder:
            return make(
                settings,
                learning_rate,
                seed,
                policy,
                self.tokenizer,
                self.train,
                self.proxy,
                folder,
            )

    def sampled(self, policy, prompts, samples: int) -> pd.DataFrame:
        """Responses to held-out prompts, one a row, with what both judges say and the KL.

        One pass through the layers that policy, start and both reward models share.
        """
        from starling_lib.actor_critic import ActorCritic
        from starling_lib.rollouts import sample

        actor = ActorCritic(policy, num_layers_unfrozen=LAYERS)
        start = ActorCritic(self.reference, num_layers_unfrozen=LAYERS)
        rewards = self.judges()
        rewards.share_trunk(actor.frozen_trunk)
        rollout = sample(
            policy.eval(),
            self.tokenizer,
            prompts,
            max_new_tokens=SHARED["max_new_tokens"],
            samples=samples,
            batch_size=len(prompts) * samples,
            keep_after=trunk_layers(actor, rewards),
        )
        return pd.DataFrame(
            {
                "prompt_index": np.repeat(range(len(prompts)), samples),
                "prompt": [messages[-1]["content"] for messages in rollout.prompts],
                "response": rollout.texts,
                "length": rollout.lengths,
                "eos_rate": rollout.finished.float(),
                **read(rollout, actor, start.frozen_reference(), rewards),
            }
        )

    def judges(self):
        """Proxy and gold, in this order."""
        from starling_lib.policy_rewards import RewardSum

        models, tokenizers = zip(self.proxy, self.gold, strict=True)
        return RewardSum(list(models), tokenizers)

    def measure(self, policy) -> dict:
        """Held-out figures: means, and the prompts' own means for intervals."""
        from starling_lib.evaluation import distinct_n

        frame = self.sampled(policy, self.test, SAMPLES)
        columns = ["proxy", "gold", "kl", "length", "eos_rate"]
        by_prompt = frame.groupby("prompt_index")[columns].mean()
        figures = by_prompt.mean().round(4).to_dict()
        distinct = distinct_n(frame["response"])  # NaN: nobody said two words
        figures["distinct_2"] = None if math.isnan(distinct) else round(distinct, 4)
        prompts = {name: by_prompt[name].round(4).tolist() for name in by_prompt}
        examples = frame.drop_duplicates("prompt_index").iloc[[0, 18, -1]]
        kept = examples[["prompt", "response", "proxy", "gold"]].round(3)
        return {**figures, "by_prompt": prompts, "samples": kept.to_dict("records")}


def check_start(methods: list[str]) -> None:
    """Stop before any run where ablations lack the learning rate of `apa-small`."""
    ablations = [m for m in ABLATIONS if m in methods]
    runs = read_runs(RESULTS)
    known = ((runs["method"] == "apa-small") & (runs["seed"] == 0)).any()
    if ablations and "apa-small" not in methods and not known:
        raise SystemExit(
            f"{', '.join(ablations)}: the learning rate is that of apa-small with seed 0, "
            f"which {RESULTS.name} lacks; run it first, or too: --only apa-small …"
        )


def stages(methods: list[str], seeds: int):
    """Lists of runs still to be made: method, settings, learning rates to try, seed.

    A list is decided when those before it are done.
    """
    ours, ablations = (
        [m for m in kind if m in methods] for kind in (METHODS, ABLATIONS)
    )

    def missing(runs):
        known = set(
            read_runs(RESULTS)[list(RUN_KEYS)].itertuples(index=False, name=None)
        )
        return [run for run in runs if (run[0], run[3]) not in known]

    def chosen(method):
        runs = read_runs(RESULTS).set_index(list(RUN_KEYS))
        return (float(runs.loc[(method, 0), "learning_rate"]),)

    # Gains are over the start. TRL's runs take longest: they come before the others, so
    # that no process waits for one at the end.
    grid = [(m, *METHODS[m], 0) for m in reversed(ours)]
    yield missing([("start", {}, (0.0,), 0), *grid])
    for seed in range(1, seeds):
        yield missing((m, METHODS[m][0], chosen(m), seed) for m in reversed(ours))
    for seed in range(seeds):
        yield missing(
            (m, {**SMALL, **ABLATIONS[m]}, chosen("apa-small"), seed) for m in ablations
        )


def run(job: tuple[str, dict, tuple[float, ...], int]) -> dict:
    """Tune, measure, and the line to be kept. A collapse is a result, too."""
    from starling_lib.models import precision

    lab, started = Lab.of_process(), time.perf_counter()
    method, settings, rates, seed = job
    tried = {rate: tuned(lab, method, settings, rate, seed) for rate in rates}
    grid = {}
    for rate, (policy, _) in tried.items() if len(rates) > 1 else ():
        if policy is not None:
            told = lab.sampled(policy, lab.validation, 2)["proxy"].mean()
            grid[rate] = round(float(told), 4)
    best = max(grid, key=grid.get) if grid else rates[0]
    policy, curve = tried[best]
    line = {"method": method, "seed": seed, "learning_rate": best, "validation": grid}
    line |= {"date": date.today().isoformat(), "precision": precision()}
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    line |= {"machine": machine(), "versions": versions}
    if policy is None:
        return {**line, "failed": curve}
    figures = lab.measure(policy)
    minutes = round((time.perf_counter() - started) / 60, 1)
    return {**line, **figures, "minutes": minutes, "curve": curve}


def tuned(lab: Lab, method: str, settings: dict, rate: float, seed: int):
    """The policy and its curve; None and the reason where training broke off."""
    if method == "start":
        return lab.reference, []
    try:
        return lab.tune(settings, rate, seed, method)
    except FloatingPointError as error:
        return None, str(error)


def smoke() -> None:
    """Small enough that every line runs in a minute; nothing is kept."""
    global PRESET, MODEL, LAYERS, RESULTS
    PRESET, MODEL, LAYERS = "tiny", "tiny", 1
    SHARED.update(max_steps=8, num_layers_unfrozen=1, max_new_tokens=16)
    RESULTS = Path(tempfile.mkdtemp()) / "studies" / "policies.jsonl"


def main() -> None:
    everything = [*METHODS, *ABLATIONS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=everything, choices=everything)
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny, results thrown away"
    )
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    if options.smoke:
        smoke()
    RESULTS.parent.mkdir(exist_ok=True)
    if not options.table:
        make_runs(options)
    runs = read_runs(RESULTS)
    if runs.empty:
        raise SystemExit(f"no run in {RESULTS} yet: leave out --table to make them")
    print(summary(runs).round(3).to_string())


def make_runs(options) -> None:
    """Make what is missing; a line is kept as soon as its run ends, in any order."""
    check_start(options.only)
    cores = len(os.sched_getaffinity(0)) // options.workers
    os.environ["OMP_NUM_THREADS"] = str(max(cores, 1))  # read where torch is imported
    context = multiprocessing.get_context("spawn")
    prepare = smoke if options.smoke else None
    with context.Pool(options.workers, prepare) as pool:
        for jobs in stages(options.only, options.seeds):
            for line in pool.imap_unordered(run, jobs):
                with open_journal(RESULTS, wait=60) as journal:  # others may write, too
                    journal.append(line)
                kept = ("method", "seed", "learning_rate", "proxy", "gold", "kl")
                told = {name: line.get(name) for name in (*kept, "minutes")}
                print(told, flush=True)


if __name__ == "__main__":
    main()
