"""MLE_K against MLE_2 on the same rows, budget and seeds (nectar_mini, SmolLM2-135M).

    python tests/benchmarks/study_losses.py [--seeds 5] [--layers 8] [--epochs 2]

The two losses see the same prompts in the same order from the same start; seeds change
head, order and, below 100 %, which rows. Every run appends a line to
`results/losses.jsonl`, so a stopped study goes on; `--table` only prints what is there.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

RESULTS = Path(__file__).parent / "results" / "losses.jsonl"
FRACTIONS = (0.25, 0.5, 1.0)
LOSSES = ("kwise", "pairwise")


def train(options, fraction: float, seed: int, loss: str, cache: Path) -> dict:
    """One reward model and its held-out metrics on the 37 test prompts."""
    from starling_lib.rankings import load_rankings
    from starling_lib.reward import KwiseRewardConfig, KwiseRewardTrainer

    rows = load_rankings(split="train")
    count = round(fraction * len(rows))
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    with tempfile.TemporaryDirectory() as folder:
        args = KwiseRewardConfig.for_this_machine(
            output_dir=folder,
            loss_type=loss,
            num_layers_unfrozen=options.layers,
            cache_trunk=True,
            trunk_cache_dir=str(cache),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            learning_rate=options.learning_rate,
            warmup_steps=3,
            max_length=512,
            seed=seed,
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
        )
        trainer = KwiseRewardTrainer(
            "smollm2-135m", args, rows.select(chosen), load_rankings(split="test")
        )
        trainer.train()
        metrics = trainer.evaluate()
    kept = ("accuracy", "adjacent_accuracy", "top1", "kendall_tau", "nll", "ece")
    figures = {name: metrics[f"eval_{name}"] for name in kept}
    setting = {"layers": options.layers, "epochs": options.epochs}
    setting["learning_rate"] = options.learning_rate
    return {"fraction": fraction, "seed": seed, "loss": loss, **setting, **figures}


def done(path: Path = RESULTS) -> list[dict]:
    """The runs on disk; a line that a kill cut off is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def compare(runs: list[dict]) -> pd.DataFrame:
    """Mean of each metric by loss and fraction, and the paired difference over seeds."""
    from starling_lib.statistics import paired_difference

    frame = pd.DataFrame(runs)
    rows = []
    for fraction, part in frame.groupby("fraction"):
        wide = part.pivot(index="seed", columns="loss")
        wide = wide.dropna()
        for metric in ("accuracy", "nll", "ece", "kendall_tau"):
            ours, theirs = wide[metric]["kwise"], wide[metric]["pairwise"]
            gap = paired_difference(ours, theirs)
            figures = (metric, len(wide), ours.mean(), theirs.mean(), *gap[:3])
            rows.append((fraction, *figures))
    names = [
        "fraction",
        "metric",
        "seeds",
        "MLE_K",
        "MLE_2",
        "difference",
        "low",
        "high",
    ]
    return pd.DataFrame(rows, columns=names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    keys = ("fraction", "seed", "loss", "layers", "epochs", "learning_rate")
    known = {tuple(run[key] for key in keys) for run in done()}
    setting = (options.layers, options.epochs, options.learning_rate)
    todo = list(itertools.product(range(options.seeds), FRACTIONS, LOSSES))
    with tempfile.TemporaryDirectory() as cache:
        for number, (seed, fraction, loss) in enumerate(todo, 1):
            if options.table or (fraction, seed, loss, *setting) in known:
                continue
            run = train(options, fraction, seed, loss, Path(cache))
            with RESULTS.open("a") as file:
                file.write(json.dumps(run) + "\n")
            figures = f"accuracy {run['accuracy']:.3f}, NLL {run['nll']:.3f}"
            print(f"{number}/{len(todo)} {loss} {fraction:.0%} seed {seed}: {figures}")
    kept = [run for run in done() if tuple(run[key] for key in keys[3:]) == setting]
    print(compare(kept).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
