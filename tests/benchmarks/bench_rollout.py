"""How fast one iteration of policy optimisation is: APATrainer beside TRL's RLOOTrainer.

    python tests/benchmarks/bench_rollout.py [--repeats 5] [--responses 64] [--only …]

An iteration samples 64 responses of up to 64 tokens, scores them with the same reward
model and makes the same number of updates on them, with a KL term, the same precision and
no gradient checkpointing. Both see every prompt twice, as RLOO's baseline needs it. Beside
it sampling alone, ours and plain `generate`, of the same batch and of as many different
prompts, and for its memory one update of a whole policy, nothing else held. Every
measurement is a process of its own, warmed up by an iteration of 16 responses; the
variants take turns, and another call goes on where this one stopped. Prints a table and
writes `data/studies/speed_rollout_PRECISION.json`; memory is the peak over what the
imports take. `--profile` prints instead where the seconds of our iteration go.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
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

RESULTS = "speed_rollout"  # data/studies/speed_rollout_PRECISION.json
NEW_TOKENS, BATCH, EPOCHS, MODEL = 64, 16, 2, "smollm2-135m"
# name → what it is, trained layers (None: all)
VARIANTS = {
    "ours-4": ("APA, last 4 layers", 4),
    "rloo-4": ("RLOO, last 4 layers", 4),
    "ours-all": ("APA, all layers", None),
    "rloo-all": ("RLOO, all layers", None),
    "sample": ("sampling alone, ours", None),
    "generate": ("sampling alone, plain generate", None),
    "sample-different": ("the same of different prompts, ours", None),
    "generate-different": ("the same of different prompts, plain generate", None),
    "copy": ("an update of the whole policy alone", None),
    "compiled": ("sampling alone, generate compiled, static cache", None),
    "continuous": ("sampling alone, continuous batching (generate_batch)", None),
}
TRIED = ("compiled", "continuous")  # not taken: measured only when asked for


def prompts(count: int, times: int = 1):
    """`count` prompts, the first of nectar_mini, each `times` times in all."""
    from starling_lib.rankings import load_rankings

    rows = load_rankings(split="train").select_columns("prompt")
    different = min(count // times, len(rows))
    return rows.select([i % different for i in range(count)])


def reward_function(score, eos: int):
    """A reward model as TRL's trainer asks for it: told which completions ended."""

    def proxy(prompts, completions, completion_ids, **rest):
        texts = [completion[-1]["content"] for completion in completions]
        finished = [ids[-1] == eos for ids in completion_ids]
        return score(prompts, texts, finished).tolist()

    return proxy


class Clock:
    """Seconds of each iteration, from its first sampling to its last update."""

    def __init__(self, updates: int):
        from transformers import TrainerCallback

        self.marks = [time.perf_counter()]
        clock = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                clock.marks = [time.perf_counter()]

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step % updates == 0:
                    clock.marks.append(time.perf_counter())

        self.callback = Callback()

    @property
    def seconds(self) -> float:
        """Of the last iteration."""
        return self.marks[-1] - self.marks[-2]


def setup(layers: int | None, folder: Path):
    """Policy in a folder (RLOO reads its reference there), tokenizer; reward model, its."""
    from starling_lib.models import load_policy, load_reward_model, load_tokenizer
    from starling_lib.scoring import reward_tokenizer
    from starling_lib.trunk import freeze_below

    tokenizer = load_tokenizer(MODEL)
    load_policy(MODEL).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    policy = load_policy(str(folder))
    freeze_below(policy, layers)
    rewarder = reward_tokenizer(load_tokenizer(MODEL))
    return policy, tokenizer, load_reward_model(MODEL, rewarder), rewarder


def apa_iteration(layers: int | None, responses: int, folder: Path) -> float:
    from starling_lib.apa import APAConfig, APATrainer

    policy, tokenizer, reward_model, rewarder = setup(layers, folder / "start")
    clock = Clock(EPOCHS * responses // BATCH)
    args = APAConfig.starling(
        output_dir=str(folder),
        rollout_batch_size=responses,
        per_device_train_batch_size=BATCH,
        num_epochs_per_rollout=EPOCHS,
        num_layers_unfrozen=layers,
        max_new_tokens=NEW_TOKENS,
        max_prompt_length=256,
        max_steps=EPOCHS * responses // BATCH,
        learning_rate=1e-6,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = APATrainer(
        policy,
        reward_model,
        args,
        prompts(responses, times=2),
        processing_class=tokenizer,
        reward_processing_classes=[rewarder],
    )
    trainer.add_callback(clock.callback)
    trainer.train()
    return clock.seconds


def rloo_iteration(layers: int | None, responses: int, folder: Path) -> float:
    from functools import partial

    from trl import RLOOConfig, RLOOTrainer

    from starling_lib.checkpoints import machine_defaults
    from starling_lib.scoring import score_responses

    policy, tokenizer, *judge = setup(layers, folder / "start")
    reward = reward_function(partial(score_responses, *judge), tokenizer.eos_token_id)
    clock = Clock(EPOCHS * responses // BATCH)
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "steps_per_generation": responses // BATCH,
        "num_iterations": EPOCHS,
        "num_generations": 2,
        "max_completion_length": NEW_TOKENS,
        "max_steps": EPOCHS * responses // BATCH,
        "beta": 0.01,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "learning_rate": 1e-6,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    args = RLOOConfig(**machine_defaults(arguments))
    data = prompts(responses // 2)  # all of them in each iteration, as above
    trainer = RLOOTrainer(
        policy, reward, args, train_dataset=data, processing_class=tokenizer
    )
    trainer.add_callback(clock.callback)
    trainer.train()
    return clock.seconds


def iteration(run, layers: int | None, responses: int) -> float:
    """Seconds of one iteration by `apa_iteration` or `rloo_iteration`."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = run(layers, responses, Path(folder))
    gc.collect()  # trainers hold themselves
    return seconds


def parts() -> list[tuple[object, str, str]]:
    """What `profile` times: the owner of a function, its name, what the table calls it.

    The parts marked "…" lie inside the others and are not counted beside them.
    """
    import torch

    from starling_lib import actor_critic
    from starling_lib.apa import APATrainer
    from starling_lib.policy_rewards import RewardSum

    once = "policy, critic, reference, reward: once"
    return [
        (APATrainer, "_forward_in_parts", once),
        (RewardSum, "each", "rewards read from texts"),
        (APATrainer, "compute_loss", "updates, forward"),
        (torch.Tensor, "backward", "updates, backward"),
        (actor_critic, "states_before", "… of all that: trained layers, forward"),
        (actor_critic, "word_logprobs", "… of all that: the head and its gradient"),
    ]


def profile(responses: int) -> str:
    """Seconds of each of `parts` of our iteration, as a Markdown table."""
    from functools import wraps

    from starling_lib import apa

    spent: dict[str, float] = {}

    def timed(owner, name: str, part: str) -> None:
        function = getattr(owner, name)

        @wraps(function)
        def wrapped(*arguments, **named):
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent[part] = spent.get(part, 0) + time.perf_counter() - start

        setattr(owner, name, wrapped)

    build = apa.APATrainer.__init__

    def sampler_timed(self, *arguments, **named):
        build(self, *arguments, **named)
        timed(self, "sampler", "sampling")

    apa.APATrainer.__init__ = sampler_timed
    for owner, name, part in parts():
        timed(owner, name, part)
    iteration(apa_iteration, 4, BATCH)
    spent.clear()
    whole = iteration(apa_iteration, 4, responses)
    rows = [
        (part, f"{seconds:.1f}", f"{seconds / whole:.0%}")
        for part, seconds in {"the iteration": whole, **spent}.items()
    ]
    return markdown(["part", "seconds", "share"], rows)


def sampling(how: str, responses: int) -> dict[str, float]:
    """One batch by `rollouts.sample`, or by one of transformers' ways.

    Of the prompts of an iteration, each twice, or ("…-different") of as many prompts.
    """
    from starling_lib.models import load_policy, load_tokenizer, matmul_gflops
    from starling_lib.rollouts import encode_prompt, sample

    policy, tokenizer = load_policy(MODEL), load_tokenizer(MODEL)
    how, _, different = how.partition("-")
    asked = prompts(responses, times=1 if different else 2)["prompt"]
    encoded = [encode_prompt(tokenizer, messages) for messages in asked]
    peak = matmul_gflops()
    draw = None if how == "sample" else generator(how, policy, tokenizer, encoded)
    for _ in range(2):  # the first warms up, and compiles
        start = time.perf_counter()
        if draw is None:
            out = sample(policy, tokenizer, asked, max_new_tokens=NEW_TOKENS)
        else:
            out = draw()
        seconds = time.perf_counter() - start
    sampled = int(out.lengths.sum()) if draw is None else tokens(out, tokenizer)
    flops = forward_flops(policy, sum(map(len, encoded)), sampled)
    return {
        "seconds": seconds,
        "gflops": flops / seconds / 1e9,
        "matmul_gflops": peak,
        "tokens_read": sum(map(len, encoded)),
        "tokens_sampled": sampled,
    }


def generator(how: str, policy, tokenizer, encoded: list[list[int]]):
    """() → lists of sampled tokens: plain `generate`, compiled, or `generate_batch`."""
    import torch
    from transformers import GenerationConfig

    from starling_lib.generation import left_pad
    from starling_lib.models import inference
    from starling_lib.rollouts import half_precision_copy

    with inference(policy):  # autocast would cast every weight for every token
        policy = half_precision_copy(policy)
    ids, mask = left_pad(encoded, tokenizer.pad_token_id)
    options = {"max_new_tokens": NEW_TOKENS, "pad_token_id": tokenizer.pad_token_id}
    options |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if how == "compiled":
        policy.forward = torch.compile(policy.forward)
        options["cache_implementation"] = "static"

    def draw():
        torch.manual_seed(0)
        with inference(policy):
            if how == "continuous":
                config = GenerationConfig(
                    eos_token_id=tokenizer.eos_token_id, **options
                )
                found = policy.generate_batch(inputs=encoded, generation_config=config)
                return [each.generated_tokens for each in found.values()]
            out = policy.generate(input_ids=ids, attention_mask=mask.long(), **options)
        return out[:, ids.shape[1] :].tolist()

    return draw


def tokens(rows: list[list[int]], tokenizer) -> int:
    """How many tokens were sampled: of each row up to its first EOS."""
    eos = tokenizer.eos_token_id
    return sum(row.index(eos) + 1 if eos in row else len(row) for row in rows)


def forward_flops(policy, read: int, sampled: int) -> float:
    """Of the matrices: every token passes the layers, a sampled one the head as well."""
    layers = sum(p.numel() for p in policy.base_model.layers.parameters())
    head = policy.get_output_embeddings().weight.numel()
    return 2.0 * (layers * (read + sampled) + head * sampled)


def full_update() -> float:
    """Seconds of the second of two updates of all weights, on a batch of like size."""
    import torch

    from starling_lib.models import autocast, load_policy

    policy = load_policy(MODEL)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    ids = torch.randint(0, policy.config.vocab_size, (BATCH, 2 * NEW_TOKENS))
    for _ in range(2):  # the first makes Adam's moments
        start = time.perf_counter()
        with autocast():
            out = policy(input_ids=ids, logits_to_keep=NEW_TOKENS + 1, use_cache=False)
        logits = out.logits[:, :-1].float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, -NEW_TOKENS:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
    return seconds


def measure(variant: str, responses: int) -> dict[str, float]:
    """One measurement in this process."""
    import trl.trainer.rloo_trainer  # noqa: F401  so that all variants import the same

    import starling_lib.apa  # noqa: F401

    layers, imported = VARIANTS[variant][1], peak_gib()
    if variant == "copy":
        found, responses = {"seconds": full_update()}, BATCH
    elif variant.startswith(("sample", "generate", *TRIED)):
        found = sampling(variant, responses)
    else:
        run = apa_iteration if variant.startswith("ours") else rloo_iteration
        iteration(run, layers, BATCH)  # pays for allocation and page faults
        found = {"seconds": iteration(run, layers, responses)}
    return found | {
        "samples_per_second": responses / found["seconds"],
        "peak_gib": peak_gib() - imported,
    }


def run(variant: str, options) -> dict[str, float]:
    """One measurement in a new process."""
    return run_worker(__file__, variant, "--responses", options.responses)


def summary(runs: Runs) -> list[dict]:
    """Medians a variant; speed as a multiple of its rival, memory of one full copy.

    The peak is the best that any process saw: a probe of a second tells what else the
    machine did.
    """
    rivals = {"ours-4": "rloo-4", "ours-all": "rloo-all"}
    rivals |= {"sample-different": "generate-different"}
    rivals |= dict.fromkeys(("sample", *TRIED), "generate")
    probes = [r.get("matmul_gflops", 0.0) for rows in runs.values() for r in rows]
    middle = {
        variant: {
            name: statistics.median(r[name] for r in measured)
            for name in ("seconds", "samples_per_second", "peak_gib")
        }
        for variant, measured in runs.items()
        if measured
    }
    rows = []
    for variant, row in middle.items():
        row = {"variant": variant, "what": VARIANTS[variant][0], **row}
        row["runs"] = len(runs[variant])
        if "gflops" in runs[variant][0]:
            reached = statistics.median(r["gflops"] for r in runs[variant])
            row["share_of_peak"] = reached / max(probes)
        if rival := middle.get(rivals.get(variant)):
            row["times_rival"] = rival["seconds"] / row["seconds"]
        if copy := middle.get("copy"):
            row["of_a_copy"] = row["peak_gib"] / copy["peak_gib"]
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """The summary as a Markdown table."""
    head = ["variant", "runs", "seconds", "samples/s", "× its rival", "GiB"]
    head += ["of one full copy", "of the matmul peak"]
    lines = []
    for row in rows:
        lines.append(
            [
                row["what"],
                f"{row['runs']}",
                f"{row['seconds']:.0f}",
                f"{row['samples_per_second']:.2f}",
                f"{row['times_rival']:.1f}" if "times_rival" in row else "",
                f"{row['peak_gib']:.1f}",
                f"{row['of_a_copy']:.2f}" if "of_a_copy" in row else "",
                f"{row['share_of_peak']:.0%}" if "share_of_peak" in row else "",
            ]
        )
    return markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[v for v in VARIANTS if v not in TRIED],
        choices=list(VARIANTS),
    )
    parser.add_argument(
        "--fresh", action="store_true", help="measure anew what is there already"
    )
    parser.add_argument(
        "--profile", action="store_true", help="parts of our iteration, last 4 layers"
    )
    parser.add_argument("--worker", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.profile:
        print(profile(options.responses))
        return
    if options.worker:
        print(json.dumps(measure(options.worker, options.responses)))
        return
    runs = {variant: [] for variant in VARIANTS} | measured(options)
    take_turns(
        runs,
        options.only,
        options.repeats,
        measure=lambda variant: run(variant, options),
        keep=lambda: write(options, runs),
        figure="{seconds:.1f} s",
    )
    print(f"\n{table(summary(runs))}")


def measured(options) -> Runs:
    """What an earlier call measured on this machine with as many responses."""
    path = results_path(RESULTS)
    before = earlier_results(path, options.fresh, responses=options.responses)
    return before.get("runs", {})


def write(options, runs: Runs) -> None:
    """Keep what was measured so far."""
    sizes = {"responses": options.responses}
    path = results_path(RESULTS)
    write_results(path, "make bench-rollout", sizes, rows=summary(runs), runs=runs)


if __name__ == "__main__":
    main()
