"""Several models on the same questions, judged, in one call and one folder.

Knows how to get answers and judgments into a folder in FastChat's formats, so that a
killed or repeated call asks nothing twice. Does not know which figures a report holds
(`bench_tables`) or how it looks (`bench_reports`).
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starling_lib.bench_answers import TEMPERATURES, answer_questions
from starling_lib.bench_files import (
    Answers,
    QuestionId,
    answer_turns,
    questions_by_id,
    read_answers,
    read_questions,
    write_answers,
)
from starling_lib.bench_reports import BenchReport, write_report
from starling_lib.bench_tables import Comparison
from starling_lib.journal import Row, line_of, write_atomically
from starling_lib.judge_prompts import JudgePrompt
from starling_lib.judges import Judge
from starling_lib.mt_bench import (
    RewardFunction,
    judge_answers,
    judge_pairs,
    score_answers,
)
from starling_lib.responders import Responder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Model = Responder | Answers | tuple[PreTrainedModel, PreTrainedTokenizerBase]


def compare(
    models: "Mapping[str, Model]",
    questions: Iterable[Mapping[str, Any]] | None = None,
    judge: Judge | None = None,
    *,
    output: str | os.PathLike,
    baseline: str | None = None,
    reward: RewardFunction | None = None,
    reward_name: str = "reward model",
    reward_tie: float = 0.0,
    pairs: bool = False,
    passes: int = 1,
    prompts: Mapping[str, JudgePrompt] | None = None,
    references: Mapping[QuestionId, Sequence[str]] | None = None,
    temperatures: Mapping[str, float] | None = TEMPERATURES,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    retry_failed: bool = False,
    date: str | None = None,
    resamples: int = 2000,
    progress: bool = True,
) -> BenchReport:
    """Let models answer questions, have the answers judged, and write a report.

    The same call goes on after a kill and gives the same report to the byte. Results of
    a judge and of a reward model stand side by side, and no mean mixes them.

    Args:
        models: by the name that tables give them: a `Responder` (a local model or a
            server), a loaded (policy, tokenizer), or answers that are there already,
            `read_answers(path)[name]`. Without a baseline differences are later −
            earlier, so put "before" before "after". New weights behind a Responder's
            old name are not noticed: give a new name, or another output.
        questions: default the 80 bundled ones.
        judge: rates answers in words, and compares them two by two if `pairs`.
        output: folder that gets `report.json`, `report.md`, `report.html`, and FastChat's
            `question.jsonl`, `model_answer/` and `model_judgment/`.
        baseline: every other model is compared with this one only.
        reward: (prompts, responses, finished) → numbers, see `mt_bench.score_answers`;
            other weights need another `reward_name`. Rewards no further apart than
            `reward_tie` are a tie.
        passes, prompts, references, retry_failed: of `judge_answers`.
        temperatures, batch_size, seed: of `answer_questions`; `max_new_tokens` is for
            loaded policies, a Responder has its own.
        date: printed if given. Nobody looks at the clock, so that a replay is identical.
        resamples: of every bootstrap and permutation test of scores.

    Raises:
        ValueError: nobody to judge, a name that cannot be a file's, an unknown baseline,
            a missing answer, or a folder that holds another run's answers or judgments.
        JudgeError: a server gave no answers, or the judge cannot be asked at all.
    """
    asked = read_questions() if questions is None else questions
    asked = list(questions_by_id(asked).values())
    _check_names(models, judge, reward and reward_name, baseline)
    if not asked or (pairs and judge is None):
        raise ValueError("no questions" if not asked else "pairs need a judge")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "question.jsonl", b"".join(map(line_of, asked)))
    options = {"temperatures": temperatures, "batch_size": batch_size, "seed": seed}
    options["progress"] = progress
    answers = {
        name: _answers(folder, name, model, asked, max_new_tokens, options)
        for name, model in models.items()
    }
    judging = {"prompts": prompts, "references": references, "passes": passes}
    judging |= {"retry_failed": retry_failed, "progress": progress}
    singles, verdicts = {}, None
    if judge is not None:
        path = _judgment_file(folder, judge.model, "single")
        singles[judge.model] = judge_answers(answers, asked, judge, path, **judging)
    if pairs:
        path = _judgment_file(folder, judge.model, "pair")
        verdicts = judge_pairs(answers, asked, judge, path, baseline, **judging)
    if reward is not None:
        path = _judgment_file(folder, reward_name, "single")
        scoring = {"name": reward_name, "progress": progress}
        singles[reward_name] = score_answers(answers, asked, reward, path, **scoring)
    settings = {
        "date": date,
        "questions": len(asked),
        "models": _model_settings(models, temperatures, max_new_tokens),
        "judge": judge and _judge_settings(judge, passes, pairs),
        "reward model": reward and reward_name,
        "baseline": baseline,
        "seed": seed,
        "resamples": resamples,
    }
    found = Comparison(
        *(asked, answers, singles, verdicts, baseline, reward_tie, resamples),
        settings=_without_none(settings),
    )
    return write_report(found, folder)


def _check_names(
    models: "Mapping[str, Model]",
    judge: Judge | None,
    reward_name: str | None,
    baseline: str | None,
) -> None:
    """Raise ValueError unless there are models and judges, each with a fitting name."""
    if judge is None and reward_name is None:
        raise ValueError("nobody judges: give a judge, a reward, or both")
    if judge is not None and judge.model == reward_name:
        raise ValueError(f"judge and reward model are both called {reward_name!r}")
    if not models:
        raise ValueError("no models to compare")
    for name in models:
        if not name or name.startswith(".") or set(name) & set('/\\:*?"<>|\0\n'):
            raise ValueError(f"the model's name {name!r} must do as a file's name")
    if baseline is not None and baseline not in models:
        raise ValueError(f"baseline {baseline!r} is none of {', '.join(models)}")


def _judgment_file(folder: Path, judge: str, kind: str) -> Path:
    """FastChat's name for it; what a file's name cannot hold becomes "_"."""
    safe = re.sub(r"[^\w.-]+", "_", judge)
    return folder / "model_judgment" / f"{safe}_{kind}.jsonl"


# --- answers


def _answers(
    folder: Path,
    name: str,
    model: "Model",
    questions: Sequence[Row],
    max_new_tokens: int,
    options: Mapping[str, Any],
) -> Answers:
    """A model's answers, also in `model_answer/`: given, kept, or asked for now."""
    path = folder / "model_answer" / f"{name}.jsonl"
    if isinstance(model, Mapping):
        return _given(name, model, questions, path)
    if isinstance(model, Responder):
        responder, loaded = dataclasses.replace(model, name=name), {}
    else:
        policy, tokenizer = model
        known_as = f"{name}@{_fingerprint(policy)}"
        responder = Responder(name, known_as, max_new_tokens=max_new_tokens)
        loaded = {"policy": policy, "tokenizer": tokenizer}
    return answer_questions(responder, questions, path, **options, **loaded)


def _given(
    name: str, answers: Answers, questions: Sequence[Row], path: Path
) -> Answers:
    """The answers to the questions, written down beside those that are there.

    Raises ValueError where one is missing, or the file holds another.
    """
    wanted = [question["question_id"] for question in questions]
    if missing := [one for one in wanted if one not in answers]:
        raise ValueError(f"{name} has no answer to question {missing[0]!r}")
    there = read_answers(path)[name] if path.exists() else {}
    for one in wanted:
        if one in there and answer_turns(there[one]) != answer_turns(answers[one]):
            raise ValueError(
                f"{path} holds another answer to question {one!r}: rename the model, or "
                "name another output"
            )
    chosen = {one: answers[one] for one in wanted}
    write_answers(there | chosen, path)
    return chosen


def _fingerprint(policy: "PreTrainedModel") -> str:
    """A digest that changes when training goes on: the first numbers of every tensor."""
    digest = hashlib.sha256()
    for name, values in policy.state_dict().items():
        some = values.detach().flatten()[:64].float().cpu().numpy()
        digest.update(name.encode() + some.tobytes())
    return digest.hexdigest()[:12]


def _judge_settings(judge: Judge, passes: int, pairs: bool) -> dict[str, Any]:
    said = {"model": judge.model, **judge.settings, "passes": passes}
    return said | {"asked": "single answers and pairs" if pairs else "single answers"}


def _model_settings(
    models: "Mapping[str, Model]",
    temperatures: Mapping[str, float] | None,
    max_new_tokens: int,
) -> dict[str, dict[str, Any]]:
    """What a report says about models; never an address, which may hold a key."""
    loaded = Responder("", "loaded policy", max_new_tokens=max_new_tokens)
    said = {}
    for name, model in models.items():
        if isinstance(model, Mapping):
            said[name] = {"source": "answers given"}
            continue
        responder = model if isinstance(model, Responder) else loaded
        temperature = responder.temperature if temperatures is None else "by category"
        said[name] = _without_none(
            {
                "source": "local" if responder.base_url is None else "server",
                "model": responder.model,
                "system": responder.system,
                "temperature": temperature,
                "max_new_tokens": responder.max_new_tokens,
                "seed": responder.seed,
            }
        )
    return said


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
