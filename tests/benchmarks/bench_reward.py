"""How fast reward models train: TRL on pairs against K responses in one row.

    python tests/benchmarks/bench_reward.py [--repeats 5] [--data nectar_mini] [--learn 16]

Every measurement is a process of its own; the variants take turns, so that a slow minute
of the machine hits all of them. Prints a table and writes
`data/studies/speed_reward_DATA_PRECISION.json` after every measurement; stopped, the
same call goes on. `--learn N` adds the held-out accuracy after N prompts, one a step in
all of them (seed 42). TRL's pairs cannot say that a response was cut, so its model is
asked as it was trained: as if all had ended. `--profile` prints where the seconds of a
step go.
"""

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path

from turns import (
    Runs,
    earlier_results,
    markdown,
    peak_gib,
    results_path,
    run_worker,
    take_turns,
    write_results,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
# name → (what it is, trained layers or None, prompts a step)
VARIANTS = {
    "trl-21": ("TRL RewardTrainer, all 21 pairs", None, 1),
    "trl-6": ("TRL RewardTrainer, 6 adjacent pairs", None, 1),
    "padded": ("K padded rows a prompt", None, 4),
    "shared-1": ("shared prefix, one prompt a batch", None, 1),
    "shared-4": ("shared prefix, four prompts a batch", None, 4),
    "shared-4-sdpa": ("the same with torch's dense-mask attention", None, 4),
    "top-8": ("last 8 layers, no cache", 8, 4),
    "top-8-first": ("last 8 layers, cached trunk, first epoch", 8, 4),
    "top-8-later": ("last 8 layers, cached trunk, later epochs", 8, 4),
    "top-4": ("last 4 layers, no cache", 4, 4),
    "top-4-first": ("last 4 layers, cached trunk, first epoch", 4, 4),
    "top-4-later": ("last 4 layers, cached trunk, later epochs", 4, 4),
}
# Those that differ in what they learn; the rest only compute it in another way.
LEARNERS = ("trl-21", "trl-6", "padded", "shared-1", "top-8", "top-4")
MAX_LENGTH = {"nectar_mini": 512, "nectar_sample": 2048}
# Of the real sample's rows, those (two of three) whose 21 pairs fit into 24 GiB, …
CHARACTERS = 2_000
# … so many at a time: the gradients of a step's pairs are added up.
PAIRS_AT_ONCE = {"nectar_mini": 21, "nectar_sample": 7}


# --- one measurement, in a process of its own


def rankings(data: str, split: str, rows: int):
    """The first `rows` rankings of nectar_mini or of the real Nectar sample."""
    from starling_lib.rankings import load_rankings

    if data == "nectar_mini":
        with warnings.catch_warnings(action="ignore"):  # identical answers
            table = load_rankings("nectar_mini", split)
        return table.select(range(min(rows, len(table))))
    with gzip.open(SHARED / "nectar_sample.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file]
    ranked = [r for r in lines if all(a.get("rank") is not None for a in r["answers"])]
    ranked = [r for r in ranked if characters(r) <= CHARACTERS and distinct(r)]
    part = ranked[:-37] if split == "train" else ranked[-37:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part[:rows]))
        return load_rankings(path, on_error="skip").flatten_indices()


def characters(row: dict) -> int:
    """Of a row of Nectar's: its prompt with the longest of its answers."""
    return len(row["prompt"]) + max(len(answer["answer"]) for answer in row["answers"])


def distinct(row: dict) -> bool:
    """Does a row of Nectar's make 21 pairs: are no two answers the same?"""
    return len({answer["answer"] for answer in row["answers"]}) == 7


def padded_scorer(reward_model):
    """A RankingScorer that computes K right-padded rows a prompt."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from starling_lib.models import reward_head
    from starling_lib.prefix import RankingScorer

    class Padded(RankingScorer):
        def forward(self, input_ids, position_ids, segment_ids, ends):
            rows = []
            for ids, segments, last in zip(input_ids, segment_ids, ends, strict=True):
                for k in range(1, int((last >= 0).sum()) + 1):
                    rows.append(ids[(segments == 0) | (segments == k)])
            mask = pad_sequence([torch.ones_like(row) for row in rows], True)
            out = self.reward_model.base_model(
                input_ids=pad_sequence(rows, True),
                attention_mask=mask,
                use_cache=False,
            ).last_hidden_state
            hidden = out[torch.arange(len(rows)), mask.sum(1) - 1]
            scores = reward_head(self.reward_model, hidden)
            empty = torch.full_like(ends, torch.nan, dtype=scores.dtype)
            return empty.masked_scatter(ends >= 0, scores)

    return Padded(reward_model)


def our_trainer(variant: str, data: str, prompts: int, folder: str, **changes):
    from starling_lib.reward import KwiseRewardConfig, KwiseRewardTrainer

    _, layers, batch = VARIANTS[variant]
    arguments = {
        "output_dir": folder,
        "num_layers_unfrozen": layers,
        "cache_trunk": variant.endswith(("first", "later")),
        "per_device_train_batch_size": batch,
        "max_length": MAX_LENGTH[data],
        "learning_rate": 5e-5,
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
    }
    args = KwiseRewardConfig.for_this_machine(**{**arguments, **changes})
    rows = rankings(data, "train", prompts)
    trainer = KwiseRewardTrainer("smollm2-135m", args, rows)
    model = trainer.model.reward_model
    if variant == "padded":
        trainer.model = trainer.model_wrapped = padded_scorer(model)
    if variant.endswith("sdpa"):
        model.set_attn_implementation("sdpa")
    return trainer


def trl_trainer(variant: str, data: str, prompts: int, folder: str, **changes):
    from trl import RewardConfig, RewardTrainer

    from starling_lib.checkpoints import machine_defaults
    from starling_lib.models import load_reward_model, load_tokenizer
    from starling_lib.rankings import to_preference_pairs
    from starling_lib.scoring import reward_tokenizer

    pairs = to_preference_pairs(
        rankings(data, "train", prompts), "all" if variant == "trl-21" else "adjacent"
    )
    step = 21 if variant == "trl-21" else 6
    at_once = min(step, PAIRS_AT_ONCE[data])
    arguments = {
        "output_dir": folder,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": step // at_once,
        "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,  # its sampler reads `length`
        "gradient_checkpointing": False,
        "max_length": None,
        "learning_rate": 5e-5,
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
    }
    tokenizer = reward_tokenizer(load_tokenizer("smollm2-135m"))
    trainer = RewardTrainer(
        model=load_reward_model("smollm2-135m", tokenizer),
        args=RewardConfig(**machine_defaults({**arguments, **changes})),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    # What its sampler groups by, which its own preparation does not leave.
    lengths = [
        max(len(chosen), len(rejected))
        for chosen, rejected in zip(
            trainer.train_dataset["chosen_ids"],
            trainer.train_dataset["rejected_ids"],
            strict=True,
        )
    ]
    trainer.train_dataset = trainer.train_dataset.add_column("length", lengths)
    return trainer


def maker(variant: str):
    """Which of the two makes a variant's trainer."""
    return trl_trainer if variant.startswith("trl") else our_trainer


def tokens_of(trainer) -> int:
    """Real tokens of one pass over the trainer's rows."""
    rows = trainer.train_dataset
    names = [
        n for n in ("input_ids", "chosen_ids", "rejected_ids") if n in rows.features
    ]
    return sum(len(ids) for name in names for ids in rows[name])


def flops_a_token(trainer, variant: str) -> float:
    """Matrix FLOPs a token: 2 a parameter forward, 4 more where it is trained."""
    model = trainer.model
    model = getattr(model, "reward_model", model)
    layers = model.base_model.layers
    size = sum(p.numel() for p in layers[0].parameters())
    trained = VARIANTS[variant][1] or len(layers)
    frozen = 0 if variant.endswith("later") else len(layers) - trained
    return size * (6 * trained + 2 * frozen)


def measure(variant: str, data: str, prompts: int) -> dict[str, float]:
    """Train `prompts` prompts after one warm-up step; what that took."""
    from transformers import TrainerCallback

    from starling_lib.models import matmul_gflops

    peak = matmul_gflops()
    batch = VARIANTS[variant][2]
    epoch = -(-prompts // batch)
    # A first epoch has no step to spare: its warm-up is the model's first scoring.
    warmup = {"first": 0, "later": epoch}.get(variant.rpartition("-")[2], 1)
    ends = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            ends.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    make = maker(variant)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(variant, data, prompts, folder, max_steps=warmup + epoch)
        trainer.add_callback(Clock())
        trainer.train()
    seconds, tokens = ends[-1] - ends[warmup], tokens_of(trainer)
    return {
        "prompts_per_second": prompts / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_gib": peak_gib(),
        "gflops": tokens * flops_a_token(trainer, variant) / seconds / 1e9,
        "matmul_gflops": max(peak, matmul_gflops()),
        "date": date.today().isoformat(),
    }


def learn(variant: str, data: str, prompts: int) -> dict[str, float]:
    """Held-out pair accuracy after one pass over `prompts` prompts, one a step."""
    from starling_lib.metrics import metric_intervals
    from starling_lib.scoring import score_responses

    make = maker(variant)
    ours = make is our_trainer
    changes = {"per_device_train_batch_size": 1} if ours else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(variant, data, prompts, folder, num_train_epochs=1, **changes)
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model)
    test = rankings(data, "test", 37)
    flat = [
        (row["prompt"], response, ended or not ours)
        for row in test
        for response, ended in zip(row["responses"], row["finished"], strict=True)
    ]
    model = getattr(model, "reward_model", model)
    scores = score_responses(model, trainer.processing_class, *zip(*flat, strict=True))
    found = metric_intervals(scores.view(len(test), -1)).loc["accuracy"]
    named = {"accuracy": found["estimate"], "low": found["low"], "high": found["high"]}
    named = {name: float(value) for name, value in named.items()}
    return named | {"learned_from": prompts, "steps": trainer.state.global_step}


def profile(variant: str, data: str, prompts: int) -> str:
    """Operations of one epoch that take most time, as a Markdown table."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with tempfile.TemporaryDirectory() as folder:
        trainer = maker(variant)(variant, data, prompts, folder, num_train_epochs=1)
        with record(activities=[ProfilerActivity.CPU]) as recorded:
            trainer.train()
    spent = sorted(recorded.key_averages(), key=lambda e: -e.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in spent)
    rows = []
    for event in spent[:12]:
        seconds = event.self_cpu_time_total
        rows.append(
            (f"`{event.key}`", f"{seconds / 1e6:.1f}", f"{seconds / whole:.0%}")
        )
    return markdown(["operation", "seconds", "share"], rows)


# --- all of them, in turns


def run(variant: str, options, kind: str) -> dict[str, float]:
    """One measurement in a new process, by `measure` or, of that kind, by `learn`."""
    prompts = options.learn if kind == "learn" else options.prompts
    given = ("--kind", kind, "--data", options.data, "--prompts", prompts)
    return run_worker(__file__, variant, *given)


def summary(runs: Runs, learned: dict[str, dict]) -> list[dict]:
    """Medians a variant; speed as a multiple of TRL's on 21 pairs, and of a matmul's.

    The matmul's is the best that any of these processes saw: a probe of a second may hit
    a slow one, and a share of that would flatter us.
    """
    rows = []
    peak = max(m["matmul_gflops"] for each in runs.values() for m in each)
    for variant, measured in runs.items():
        row = {"variant": variant, "what": VARIANTS[variant][0], "runs": len(measured)}
        for name in measured[0]:
            values = [m[name] for m in measured]
            number = isinstance(values[0], float)
            row[name] = statistics.median(values) if number else values[0]
        row |= {"matmul_gflops": peak, "share_of_peak": row["gflops"] / peak}
        rows.append(row | learned.get(variant, {}))
    speeds = {row["variant"]: row["prompts_per_second"] for row in rows}
    for row in rows if "trl-21" in speeds else []:
        row["times_trl"] = speeds[row["variant"]] / speeds["trl-21"]
    return rows


def table(rows: list[dict]) -> str:
    """The results as a Markdown table."""
    head = [
        "variant",
        "prompts/s",
        "× TRL 21",
        "tokens/s",
        "GiB",
        "of peak",
        "accuracy",
    ]
    lines = []
    for row in rows:
        accuracy = "–"
        if "accuracy" in row:
            accuracy = f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        lines.append(
            [
                row["what"],
                f"{row['prompts_per_second']:.3f}",
                f"{row['times_trl']:.1f}" if "times_trl" in row else "–",
                f"{row['tokens_per_second']:.0f}",
                f"{row['peak_gib']:.1f}",
                f"{row['share_of_peak']:.0%}",
                accuracy,
            ]
        )
    return markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4, help="timed prompts a run")
    parser.add_argument(
        "--fresh", action="store_true", help="measure anew what is there already"
    )
    parser.add_argument(
        "--learn", type=int, default=0, help="prompts to learn from; 0: none"
    )
    parser.add_argument("--data", choices=list(MAX_LENGTH), default="nectar_mini")
    parser.add_argument(
        "--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS)
    )
    parser.add_argument(
        "--profile", action="store_true", help="operations of the first of --only"
    )
    parser.add_argument("--worker", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="speed", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work = learn if options.kind == "learn" else measure
        print(json.dumps(work(options.worker, options.data, options.prompts)))
        return
    if options.data == "nectar_sample" and not SHARED.is_dir():
        print("the Nectar sample is not beside this checkout: left out")
        return
    if options.profile:
        print(profile(options.only[0], options.data, options.prompts))
        return
    runs, learned = measured(options)
    take_turns(
        runs,
        options.only,
        options.repeats,
        measure=lambda variant: run(variant, options, "speed"),
        keep=lambda: write(options, runs, learned),
        figure="{prompts_per_second:.3f} prompts/s",
    )
    for variant in (v for v in options.only if options.learn and v in LEARNERS):
        if variant not in learned:
            learned[variant] = run(variant, options, "learn")
            print(f"{variant} learned: {learned[variant]['accuracy']:.3f}", flush=True)
            write(options, runs, learned)
    path, rows = write(options, runs, learned)
    print(f"\n{table(rows)}\n\n{path}")


def results(options) -> Path:
    """Where the figures of a data set are kept."""
    return results_path(f"speed_reward_{options.data}")


def measured(options) -> tuple[Runs, dict[str, dict]]:
    """What an earlier call measured on this machine, so that this one goes on with it."""
    before = earlier_results(results(options), options.fresh, prompts=options.prompts)
    asked = options.learn or None
    kept = {
        v: r
        for v, r in before.get("learned", {}).items()
        if asked in (None, r["learned_from"])
    }
    return before.get("runs", {}), kept


def write(options, runs: Runs, learned: dict) -> tuple[Path, list]:
    """Keep what was measured so far."""
    path = results(options)
    rows = summary({v: each for v, each in runs.items() if each}, learned)
    command = " ".join(["python tests/benchmarks/bench_reward.py", *sys.argv[1:]])
    sizes = {"prompts": options.prompts}
    write_results(path, command, sizes, rows=rows, runs=runs, learned=learned)
    return path, rows


if __name__ == "__main__":
    main()
