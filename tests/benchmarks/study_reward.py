"""Reward models side by side on nectar_mini: MLE_K against MLE_2, and how to read endings.

    python tests/benchmarks/study_reward.py losses  [--seeds 5]   MLE_K against MLE_2
    python tests/benchmarks/study_reward.py endings [--seeds 1]   what a cut answer's end is

All runs of a study see the same prompts in the same order from the same start; a seed
changes head, order and, below 100 %, which rows. Every run appends a line to
`data/studies/reward_models.jsonl`, so a stopped study goes on; `--table` prints them.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from starling_lib.journal import open_journal, read_jsonl

RESULTS = Path(__file__).resolve().parents[2] / "data/studies/reward_models.jsonl"
# study → its runs: (share of the rows, loss, reading of endings)
STUDIES = {
    "losses": [
        (f, loss, "eos") for f in (0.25, 0.5, 1.0) for loss in ("kwise", "pairwise")
    ],
    "endings": [(1.0, "kwise", reading) for reading in ("eos", "text", "apart")],
}
KEYS = ("fraction", "loss", "reading", "seed", "layers", "epochs", "learning_rate")
KINDS = ("both_ended", "both_cut", "one_cut")


def read_endings(rows, reading: str):
    """Rankings whose endings the reward model meets in one of three ways.

    `eos`: an answer that ended by itself is read at its EOS, a cut one at its last token
    (the default); `text`: all at their last token of text, without EOS; `apart`: as
    `eos`, but ended and cut answers make two rankings, so that none compares the two.
    """
    from datasets import Dataset

    if reading == "eos":
        return rows
    kept = [
        {**row, "finished": row["finished"] or [True] * len(row["responses"])}
        for row in rows
    ]
    if reading == "text":
        kept = [{**row, "finished": [False] * len(row["finished"])} for row in kept]
    else:
        kept = [part(row, ended) for row in kept for ended in (True, False)]
        kept = [row for row in kept if len(row["responses"]) > 1]
    return Dataset.from_list(kept, features=rows.features)


def part(row: dict, ended: bool) -> dict:
    """The ranking of only the answers that ended, or only those that were cut."""
    chosen = [i for i, finished in enumerate(row["finished"]) if finished == ended]
    names = ("responses", "finished", "models", "ranks")
    return {**row, **{name: [row[name][i] for i in chosen] for name in names}}


def train(options, fraction, loss, reading, seed, cache: Path) -> dict:
    """One reward model and its held-out metrics on the 37 test prompts."""
    from starling_lib.rankings import load_rankings
    from starling_lib.reward import KwiseRewardConfig, KwiseRewardTrainer

    rows, test = load_rankings(split="train"), load_rankings(split="test")
    count = round(fraction * len(rows))
    rows = rows.select(np.random.default_rng(seed).permutation(len(rows))[:count])
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
            "smollm2-135m",
            args,
            read_endings(rows, reading),
            test if reading != "text" else read_endings(test, reading),
        )
        trainer.train()
        scores = trainer.score_rankings().numpy()
    return held_out(scores, test)


def held_out(scores: np.ndarray, test) -> dict[str, float | None]:
    """Metrics of (N, K) scores, best first, and pair accuracy by the endings of a pair.

    None for what is no number, as after a collapse: JSON knows no NaN.
    """
    from starling_lib.metrics import reward_metrics

    kept = ("accuracy", "adjacent_accuracy", "top1", "kendall_tau", "nll", "ece")
    metrics = reward_metrics(scores)
    figures = {name: metrics[name] for name in kept}
    ended = np.array(test["finished"])
    better, worse = np.triu_indices(ended.shape[1], 1)
    wins = (np.sign(scores[:, better] - scores[:, worse]) + 1) / 2
    both = ended[:, better].astype(int) + ended[:, worse]
    for name, number in zip(KINDS, (2, 0, 1), strict=True):
        figures[f"accuracy_{name}"] = float(wins[both == number].mean())
    return {name: x if np.isfinite(x) else None for name, x in figures.items()}


def done() -> list[dict]:
    """The runs on disk; a last line that a kill cut off is left out: it is made again."""
    return list(read_jsonl(RESULTS, KEYS, torn_end=True)) if RESULTS.exists() else []


def compare_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean of each metric by loss and fraction, and the difference seed by seed.

    Its interval is Student's over seeds. A seed counts once both losses have its figures.
    """
    from starling_lib.statistics import student_interval

    metrics, rows = ("accuracy", "top1", "kendall_tau", "nll", "ece"), []
    both = pd.MultiIndex.from_product([metrics, ("kwise", "pairwise")])
    for fraction, group in runs[runs["reading"] == "eos"].groupby("fraction"):
        wide = group.pivot(index="seed", columns="loss").reindex(columns=both).dropna()
        for metric in metrics if len(wide) else ():
            ours, theirs = wide[metric]["kwise"], wide[metric]["pairwise"]
            gap = student_interval(ours - theirs)
            figures = (metric, len(wide), ours.mean(), theirs.mean(), *gap)
            rows.append((fraction, *figures))
    names = ["fraction", "metric", "seeds", "MLE_K", "MLE_2"]
    return pd.DataFrame(rows, columns=[*names, "difference", "low", "high"])


def compare_endings(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy by reading, over all pairs and by the endings of a pair."""
    chosen = runs[(runs["fraction"] == 1.0) & (runs["loss"] == "kwise")]
    names = ["accuracy", *[f"accuracy_{kind}" for kind in KINDS], "nll", "ece"]
    table = chosen.groupby("reading")[names].mean()
    return table.assign(seeds=chosen.groupby("reading").size()).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--seeds", type=int, help="5 for losses, 1 for endings")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=int, help="1 for losses, 2 for endings")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--cache", help="keep the frozen layers' states in this folder")
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    usual = {"losses": (5, 1), "endings": (1, 2)}[options.study]
    options.seeds, options.epochs = (
        options.seeds or usual[0],
        options.epochs or usual[1],
    )
    RESULTS.parent.mkdir(exist_ok=True)
    setting = (options.layers, options.epochs, options.learning_rate)
    runs = [
        (*run, seed) for seed in range(options.seeds) for run in STUDIES[options.study]
    ]
    known = {tuple(run[key] for key in KEYS) for run in done()}
    todo = [run for run in runs if (*run, *setting) not in known and not options.table]
    with tempfile.TemporaryDirectory() as folder:
        for number, run in enumerate(todo, 1):
            figures = train(options, *run, Path(options.cache or folder))
            line = dict(zip(KEYS, (*run, *setting), strict=True)) | figures
            with open_journal(RESULTS, wait=60) as journal:  # others may write, too
                journal.append(line)
            print(f"{number}/{len(todo)}", json.dumps(line), flush=True)
    kept = [run for run in done() if tuple(run[key] for key in KEYS[4:]) == setting]
    if not kept:
        told = ", ".join(map("{} {}".format, KEYS[4:], setting))
        raise SystemExit(
            f"no run with {told} in {RESULTS} yet: leave out --table to make them"
        )
    compare = {"losses": compare_losses, "endings": compare_endings}[options.study]
    print(compare(pd.DataFrame(kept)).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
