"""Policy optimisation side by side: APA (both), PPO, AWR; RLOO, DPO and SFT of TRL.

    python tests/benchmarks/study_apa.py [--seeds 3] [--only apa-paper ppo …]
    python tests/benchmarks/study_apa.py --smoke     every method, random tiny model

Proxy and gold reward model are those of the preset (notebooks 02 and 03): the rankings of
half A and of half B, other seeds. Every method sees half A's prompts; the online ones
sample equally many responses, and all make equally many updates of the last four layers.
A method's learning rate is the best of a grid on 20 prompts of half B, by the proxy (seed
0); that rate then runs with every seed. Measured on the 37 test prompts, four samples
each. Ablations change one setting of `apa-small`.

A run appends a line to `data/studies/policies.jsonl`, so a stopped study goes on;
`--table` prints what is there.
"""

import argparse
import json
import tempfile
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from bench_rollout import reward_function

PRESET, MODEL = "small", "smollm2-135m"
RESULTS = Path(__file__).resolve().parents[2] / "data/studies/policies.jsonl"
LAYERS, SAMPLES, RESPONSES, BATCH = 4, 4, 32, 8
# Sizes that all online methods share: 5 iterations of 32 responses, 8 updates on each.
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
    # The paper's AWR needed λ = 1 where APA took 0.1.
    "awr": ({"base": "paper", "loss_type": "awr", "apa_lambda": 1.0}, (4e-5, 8e-5)),
    "rloo": ({"beta": 0.01}, (4e-5, 8e-5)),
    "dpo": ({"beta": 0.1}, (2e-5, 8e-5)),
    "sft": ({}, (2e-5, 8e-5)),
}
ABLATIONS = {
    "λ = 0.033": {"apa_lambda": 0.033},
    "λ = 3.3": {"apa_lambda": 3.3},
    "anchor rollout": {"anchor": "rollout"},
    "whitened": {"whiten_advantages": True},
    "missing EOS −1": {"missing_eos_penalty": 1.0},
}


# --- reward models


def scorer(folder: Path):
    """(prompts, responses, finished) → (N,) scores of a kept reward model."""
    from starling_lib.models import load_reward_model, load_tokenizer
    from starling_lib.scoring import score_responses

    tokenizer = load_tokenizer(folder)
    return partial(score_responses, load_reward_model(folder, tokenizer), tokenizer)


# --- training, each → the tuned policy and its curve


def ours(settings, learning_rate, seed, policy, tokenizer, prompts, reward, folder):
    from starling_lib.apa import APAConfig, APATrainer

    arguments = {**SHARED, **settings, "learning_rate": learning_rate, "seed": seed}
    arguments |= {"output_dir": folder, "save_strategy": "no", "disable_tqdm": True}
    base = arguments.pop("base")
    args = getattr(APAConfig, base)(**arguments)
    trainer = APATrainer(policy, reward, args, prompts, processing_class=tokenizer)
    trainer.train()
    logged = ("reward", "kl", "length", "eos_rate", "entropy", "explained_variance")
    curve = [
        {name: round(row[name], 4) for name in logged}
        for row in trainer.state.log_history
        if "kl" in row
    ]
    return trainer.inner_model(), curve


def trl_arguments(learning_rate, seed, folder) -> dict:
    """What the three trainers of TRL share, on any machine."""
    from starling_lib.checkpoints import machine_defaults

    arguments = {
        "output_dir": folder,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,  # as APAConfig
        "seed": seed,
        "max_steps": SHARED["max_steps"],
        "per_device_train_batch_size": BATCH,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": BATCH,
        "disable_tqdm": True,
    }
    return machine_defaults(arguments)


def rloo(settings, learning_rate, seed, policy, tokenizer, prompts, reward, folder):
    from trl import RLOOConfig, RLOOTrainer

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
    history = trainer.state.log_history
    return trainer.model, [{"reward": r["reward"]} for r in history if "reward" in r]


def dpo(settings, learning_rate, seed, policy, tokenizer, prompts, reward, folder):
    from trl import DPOConfig, DPOTrainer

    from starling_lib.rankings import to_preference_pairs

    args = DPOConfig(**trl_arguments(learning_rate, seed, folder), **settings)
    pairs = to_preference_pairs(half_a(), pairs=4, seed=seed)
    trainer = DPOTrainer(
        policy, args=args, train_dataset=pairs, processing_class=tokenizer
    )
    trainer.train()
    return trainer.model, []


def sft(settings, learning_rate, seed, policy, tokenizer, prompts, reward, folder):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    best = [
        {
            "prompt": row["prompt"],
            "completion": [{"role": "assistant", "content": row["responses"][0]}],
        }
        for row in half_a()
    ]
    args = SFTConfig(**trl_arguments(learning_rate, seed, folder), **settings)
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


# --- one run


class Lab:
    """What all runs share: the initial policy, prompts, proxy and gold."""

    def __init__(self):
        from starling_lib.models import cache_dir, load_policy, load_tokenizer
        from starling_lib.rankings import load_rankings
        from starling_lib.recipes import gold_model, load_settings, reward_model

        settings = load_settings(PRESET)
        self.tokenizer = load_tokenizer(MODEL)
        self.reference = load_policy(MODEL).eval()
        # RLOO and DPO load their reference from the folder the policy came from.
        self.start = cache_dir() / "studies" / f"{MODEL}-start"
        if not (self.start / "config.json").exists():
            self.reference.save_pretrained(self.start)
            self.tokenizer.save_pretrained(self.start)
        self.proxy = scorer(reward_model(settings))
        self.gold = scorer(gold_model(settings))
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
        reward = reward_function(self.proxy, self.tokenizer.eos_token_id)
        with tempfile.TemporaryDirectory() as folder:
            return make(
                settings,
                learning_rate,
                seed,
                policy,
                self.tokenizer,
                self.train,
                reward,
                folder,
            )

    def sampled(self, policy, prompts, samples: int, reference=None) -> pd.DataFrame:
        from starling_lib.evaluation import evaluate_policy

        return evaluate_policy(
            policy.eval(),
            self.tokenizer,
            prompts,
            self.proxy,
            reference=reference,
            samples=samples,
            max_new_tokens=SHARED["max_new_tokens"],
        )

    def measure(self, policy) -> dict:
        """Held-out figures: means, and the prompts' own means for intervals."""
        from starling_lib.evaluation import distinct_n

        frame = self.sampled(policy, self.test, SAMPLES, self.reference)
        asked = [self.test[i] for i in frame["prompt_index"]]
        told = (frame["response"].tolist(), frame["finished"].tolist())
        frame["gold"] = self.gold(asked, *told).numpy()
        columns = {"reward": "proxy", "gold": "gold", "kl": "kl", "tokens": "length"}
        columns |= {"finished": "eos_rate"}
        by_prompt = frame.groupby("prompt_index")[list(columns)].mean()
        by_prompt = by_prompt.rename(columns=columns)
        figures = by_prompt.mean().round(4).to_dict()
        figures["distinct_2"] = round(distinct_n(frame["response"]), 4)
        prompts = {name: by_prompt[name].round(4).tolist() for name in by_prompt}
        examples = frame[frame["sample"] == 0].iloc[[0, 18, 36]]
        kept = examples[["prompt", "response", "reward", "gold"]].round(3)
        return {**figures, "by_prompt": prompts, "samples": kept.to_dict("records")}


def best_rate(runs: list[dict], method: str) -> float:
    """The learning rate of a method's grid whose run had the best validation proxy."""
    tried = [r for r in runs if r["method"] == method and r["seed"] == 0]
    return max(tried, key=lambda run: run["validation"])["learning_rate"]


def done() -> list[dict]:
    """The runs on disk; a line that a kill cut off is left out."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def plan(methods: list[str], seeds: int):
    """Runs that are still to be made, in the order in which they can be decided."""

    def missing(method, rate, seed):
        known = {(r["method"], r["learning_rate"], r["seed"]) for r in done()}
        return (method, rate, seed) not in known

    if missing("start", 0.0, 0):
        yield "start", {}, 0.0, 0
    for method in [m for m in METHODS if m in methods]:
        settings, rates = METHODS[method]
        for rate in rates:
            if missing(method, rate, 0):
                yield method, settings, rate, 0
    for seed in range(1, seeds):
        for method in [m for m in METHODS if m in methods]:
            rate = best_rate(done(), method)
            if missing(method, rate, seed):
                yield method, METHODS[method][0], rate, seed
    for seed in range(seeds):
        for name, change in ABLATIONS.items():
            if name in methods:
                rate = best_rate(done(), "apa-small")
                if missing(name, rate, seed):
                    yield name, {**SMALL, **change}, rate, seed


def run(lab: Lab, method: str, settings: dict, rate: float, seed: int) -> dict:
    """Tune, measure, and the line to be kept. A collapse is a result, too."""
    from starling_lib.models import precision

    line = {"method": method, "learning_rate": rate, "seed": seed}
    line |= {"date": date.today().isoformat(), "precision": precision()}
    policy, curve = lab.reference, []
    if method != "start":
        try:
            policy, curve = lab.tune(settings, rate, seed, method)
        except FloatingPointError as error:
            return {**line, "validation": -1e9, "failed": str(error)}
    validation = lab.sampled(policy, lab.validation, 2)["reward"].mean()
    figures = {"validation": round(validation, 4), **lab.measure(policy)}
    return {**line, **figures, "curve": curve}


def table(runs: list[dict]) -> pd.DataFrame:
    """Means over seeds of each method at its best rate, and its gain over the start."""
    from starling_lib.statistics import bootstrap_interval

    start = next(r for r in runs if r["method"] == "start")
    rows = []
    for method in dict.fromkeys(r["method"] for r in runs):
        rate = best_rate(runs, method)
        own = [r for r in runs if (r["method"], r["learning_rate"]) == (method, rate)]
        row = {"method": method, "rate": rate, "seeds": len(own)}
        own = [r for r in own if "failed" not in r]
        row["failed"] = row["seeds"] - len(own)
        if not own:
            rows.append(row)
            continue
        for name in ("proxy", "gold"):
            each = np.mean([r["by_prompt"][name] for r in own], axis=0)
            gain = bootstrap_interval(each - np.array(start["by_prompt"][name]))
            row |= {f"{name} gain": gain.estimate, "low": gain.low, "high": gain.high}
            row = {
                f"{name} {k}" if k in ("low", "high") else k: v for k, v in row.items()
            }
        for name in ("kl", "length", "eos_rate", "distinct_2"):
            row[name] = np.mean([r[name] for r in own])
        rows.append(row)
    return pd.DataFrame(rows).set_index("method")


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
    parser.add_argument(
        "--smoke", action="store_true", help="tiny, results thrown away"
    )
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    if options.smoke:
        smoke()
    RESULTS.parent.mkdir(exist_ok=True)
    if not options.table:
        lab = Lab()
        for job in plan(options.only, options.seeds):
            line = run(lab, *job)
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            kept = ("method", "learning_rate", "seed", "proxy", "gold", "kl")
            print({name: line.get(name) for name in kept}, flush=True)
    print(table(done()).round(3).to_string())


if __name__ == "__main__":
    main()
