"""Make data/bench_run: answers to the bench questions, rewards, and what judges said.

    python tests/make_bench_run.py answers              base and tuned policy answer
    python tests/make_bench_run.py rewards              proxy and gold reward score them
    python tests/make_bench_run.py requests FILE        what a judge is to be asked
    python tests/make_bench_run.py replies JUDGE FILE…  its replies into the log

`answers` and `rewards` use the artefacts of the preset `small` and go on where they were
stopped. `requests` writes a line a request, `{"number", "messages"}`, in an order drawn
by a fixed seed, so that nobody who reads them can tell the models apart; a line of
`replies` is `{"number", "reply"}`. Requests and replies may go through any hands: the
judge of the bundled log was an AI assistant that read them in batches.
"""

import argparse
import json
import random
import tempfile
import warnings
from functools import partial
from pathlib import Path

from starling_lib import recipes
from starling_lib.judges import JudgeError, LoggedJudge, Reply, ReplyLog
from starling_lib.models import load_policy, load_reward_model, load_tokenizer
from starling_lib.mt_bench import (
    answer_questions,
    judge_answers,
    judge_pairs,
    read_answers,
    read_questions,
    score_answers,
)
from starling_lib.rankings import data_path
from starling_lib.responders import Responder
from starling_lib.scoring import score_responses

PRESET, NEW_TOKENS, SEED = "small", 160, 0
MODELS = ("base", "tuned")


class Listener(LoggedJudge):
    """A judge that only writes down what it is asked."""

    def __init__(self):
        super().__init__("listener", {})
        self.heard = []

    def _reply(self, messages, draw):
        self.heard.append(messages)
        raise JudgeError("nobody answers")


def make_answers(folder: Path) -> None:
    """Let both policies answer, into FastChat's `model_answer/`."""
    settings = recipes.load_settings(PRESET, seed=SEED)
    weights = {"base": settings.model, "tuned": recipes.tuned_policy(settings)}
    for name in MODELS:
        output = folder / "model_answer" / f"{name}.jsonl"
        answer_questions(
            Responder(name, name, max_new_tokens=NEW_TOKENS),
            read_questions(),
            output,
            policy=load_policy(weights[name]),
            tokenizer=load_tokenizer(settings.model),
            seed=SEED,
        )
        for scratch in output.parent.glob(f"{output.name}.*"):
            scratch.unlink()


def make_rewards(folder: Path) -> None:
    """Let the preset's two reward models score the answers, into `model_judgment/`."""
    settings = recipes.load_settings(PRESET, seed=SEED)
    makers = {"proxy reward": recipes.reward_model, "gold reward": recipes.gold_model}
    for name, make in makers.items():
        trained = make(settings)
        tokenizer = load_tokenizer(trained)
        score = partial(
            score_responses, load_reward_model(trained, tokenizer), tokenizer
        )
        output = folder / "model_judgment" / f"{name.replace(' ', '_')}_single.jsonl"
        score_answers(bundled_answers(folder), read_questions(), score, output, name)
        Path(f"{output}.lock").unlink(missing_ok=True)


def bundled_answers(folder: Path) -> dict:
    found = read_answers(folder / "model_answer")
    return {name: found[name] for name in MODELS}


def requests(folder: Path) -> list[list[dict]]:
    """Messages of every rating and of every verdict in both orders, shuffled."""
    judge, material = Listener(), (bundled_answers(folder), read_questions())
    with warnings.catch_warnings(action="ignore"):  # that all judgments failed
        judge_answers(*material, judge, attempts=1, progress=False)
        judge_pairs(*material, judge, attempts=1, progress=False)
    random.Random(SEED).shuffle(judge.heard)
    return judge.heard


def keep_replies(folder: Path, judge: str, files: list[Path]) -> int:
    """Write replies with their requests into the log; how many there are."""
    asked = requests(folder)
    said = {}
    for path in files:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            said[row["number"]] = row["reply"]
    lacking = sorted(set(range(len(asked))) - set(said))
    if lacking:
        raise SystemExit(f"{len(lacking)} requests without a reply: {lacking[:10]} …")
    with tempfile.TemporaryDirectory() as scratch:  # a log leaves a lock beside it
        log = ReplyLog(Path(scratch) / "judge_replies.jsonl")
        for number, messages in enumerate(asked):
            log.add(judge, messages, {}, 0, Reply(said[number]))
        (folder / log.path.name).write_bytes(log.path.read_bytes())
    return len(log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=data_path() / "bench_run")
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("answers")
    parts.add_parser("rewards")
    parts.add_parser("requests").add_argument("file", type=Path)
    replies = parts.add_parser("replies")
    replies.add_argument("judge")
    replies.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    if options.part == "answers":
        make_answers(options.folder)
    elif options.part == "rewards":
        make_rewards(options.folder)
    elif options.part == "requests":
        asked = requests(options.folder)
        lines = [
            json.dumps({"number": number, "messages": messages}, ensure_ascii=False)
            for number, messages in enumerate(asked)
        ]
        options.file.write_text("\n".join(lines) + "\n")
    else:
        print(keep_replies(options.folder, options.judge, options.files), "replies")


if __name__ == "__main__":
    main()
