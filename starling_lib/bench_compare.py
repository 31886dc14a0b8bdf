"""Several models on the same questions, judged, in one call and one folder.

Knows how to get answers and judgments into a folder in FastChat's formats, so that a
killed or repeated call asks nothing twice, and how to take them out again: in one call
(`compare`) or step by step (`answer_models`, `judge_models`, `read_comparison`). Does not
know which figures a report holds (`bench_tables`) or how it looks (`bench_reports`).
"""

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from filelock import FileLock

from starling_lib.bench_answers import TEMPERATURES, answer_questions
from starling_lib.bench_files import (
    MODELS,
    Answers,
    QuestionId,
    answer_turns,
    questions_by_id,
    read_answers,
    read_judgments,
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
from starling_lib.responders import Responder, ready_to_sample

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
            earlier, so put "before" before "after". New weights in a Responder's folder
            are noticed, behind a hub id or a server's name they are not: give a new
            name, or another output.
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
    _check_names(models, judge, reward and reward_name, pairs, baseline)
    folder = Path(output)
    answers = answer_models(
        *(models, asked, folder, temperatures, max_new_tokens, batch_size, seed),
        progress,
    )
    judging = {"prompts": prompts, "references": references, "passes": passes}
    judging |= {"retry_failed": retry_failed}
    singles, verdicts = judge_models(
        *(answers, asked, folder, judge, reward, reward_name, pairs, baseline),
        progress=progress,
        **judging,
    )
    settings = {
        "date": date,
        "questions": len(asked),
        "models": model_settings(models, temperatures, max_new_tokens),
        "judge": judge and judge_settings(judge, passes, pairs),
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


def answer_models(
    models: "Mapping[str, Model]",
    questions: Sequence[Row],
    folder: Path,
    temperatures: Mapping[str, float] | None = TEMPERATURES,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Answers]:
    """Let models answer questions, into `question.jsonl` and `model_answer/`.

    Arguments and errors as of `compare`, whose first step this is.
    """
    _check_model_names(models)
    if not questions:
        raise ValueError("no questions")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "question.jsonl", b"".join(map(line_of, questions)))
    options = {"temperatures": temperatures, "batch_size": batch_size, "seed": seed}
    options["progress"] = progress
    return {
        name: _answers(folder, name, model, questions, max_new_tokens, options)
        for name, model in models.items()
    }


def judge_models(
    answers: Mapping[str, Answers],
    questions: Sequence[Row],
    folder: Path,
    judge: Judge | None = None,
    reward: RewardFunction | None = None,
    reward_name: str = "reward model",
    pairs: bool = False,
    baseline: str | None = None,
    progress: bool = True,
    **judging: Any,
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame | None]:
    """Have answers judged into `model_judgment/`: single ones by judge, and pairs.

    `judging`: more arguments of `judge_answers`. Errors as of `compare`, whose second
    step this is.
    """
    _check_judges(judge, reward and reward_name, pairs)
    _check_baseline(baseline, answers)
    singles: dict[str, pd.DataFrame] = {}
    verdicts, judging = None, {**judging, "progress": progress}
    if judge is not None:
        path = _judgment_file(folder, judge.model, "single")
        singles[judge.model] = judge_answers(answers, questions, judge, path, **judging)
    if pairs:
        path = _judgment_file(folder, judge.model, "pair")
        verdicts = judge_pairs(answers, questions, judge, path, baseline, **judging)
    if reward is not None:
        path = _judgment_file(folder, reward_name, "single")
        scoring = {"name": reward_name, "progress": progress}
        singles[reward_name] = score_answers(
            answers, questions, reward, path, **scoring
        )
    return singles, verdicts


# --- a folder that answers and judgments were written into


def read_bench(
    folder: Path, models: Sequence[str] = ()
) -> tuple[list[Row], dict[str, Answers]]:
    """A folder's questions and answers, of `models` or of all, in the order of `answer`.

    Raises ValueError for a folder without them, an unknown model, a missing answer.
    """
    for name in ("question.jsonl", "model_answer"):
        if not (folder / name).exists():
            raise ValueError(f"{folder} holds no {name}: let models answer first")
    asked = read_questions(folder / "question.jsonl")
    found = read_answers(folder / "model_answer")
    known = [name for name in read_settings(folder)["models"] if name in found]
    for name in models:
        if name not in found:
            raise ValueError(
                f"no answers of {name!r} in {folder}; of {', '.join(found)}"
            )
    answers = {name: found[name] for name in models or dict.fromkeys([*known, *found])}
    for name, given in answers.items():
        lacking = [q["question_id"] for q in asked if q["question_id"] not in given]
        if lacking:
            raise ValueError(f"{name} has no answer to question {lacking[0]!r}")
    return asked, answers


def read_comparison(
    folder: Path,
    models: Sequence[str] = (),
    baseline: str | None = None,
    reward_tie: float = 0.0,
    resamples: int = 2000,
    date: str | None = None,
) -> Comparison:
    """What a folder's files say, for `write_report`. FastChat's own will do.

    Raises ValueError as `read_bench`, without any judgment, for an unknown baseline, and
    for pairs by several judges, which a report has no place for. Warns of judgments
    that are missing.
    """
    asked, answers = read_bench(folder, models)
    _check_baseline(baseline, answers)
    singles = {
        str(judge): frame
        for judge, frame in _judgments(folder, asked, answers, "single").groupby(
            "judge", sort=False
        )
    }
    pairs = _judgments(folder, asked, answers, "pair")
    if not singles and pairs.empty:
        raise ValueError(f"{folder} holds no judgments of these models: judge first")
    if (judges := list(pairs["judge"].unique()))[1:]:
        raise ValueError(f"pairs by several judges, {', '.join(judges)}: keep one file")
    _warn_of_missing(singles, asked, answers)
    kept = read_settings(folder)
    given = {"source": "answers given"}
    settings = {
        "date": date,
        "questions": len(asked),
        "models": {name: kept["models"].get(name, given) for name in answers},
        "judges": {j: kept["judges"][j] for j in singles if j in kept["judges"]},
        "baseline": baseline,
        "resamples": resamples,
    }
    return Comparison(
        *(asked, answers, singles, None if pairs.empty else pairs),
        *(baseline, reward_tie, resamples),
        settings=_without_none(settings),
    )


def _judgments(
    folder: Path, asked: Sequence[Row], answers: Mapping[str, Answers], kind: str
) -> pd.DataFrame:
    """Judgments of these models' answers to these questions; an empty frame for none."""
    files = folder / "model_judgment"
    if not [*files.glob(f"*_{kind}.jsonl"), *files.glob(f"*_{kind}.jsonl.gz")]:
        return pd.DataFrame(columns=["judge"])
    found = read_judgments(files, asked, kind)
    ours = found["question_id"].isin([one["question_id"] for one in asked])
    for side in MODELS[kind]:
        ours &= found[side].isin(list(answers))
    return found[ours].reset_index(drop=True)


def _warn_of_missing(
    singles: Mapping[str, pd.DataFrame],
    asked: Sequence[Row],
    answers: Mapping[str, Answers],
) -> None:
    """Warn where a judge has judged fewer turns of a model than there are."""
    turns = len(asked) + sum(len(one["turns"]) == 2 for one in asked)
    for judge, frame in singles.items():
        judged = frame.drop_duplicates(["model", "question_id", "turn"])["model"]
        for model in answers:
            if (count := int((judged == model).sum())) < turns:
                warnings.warn(
                    f"{judge} has judged {count} of {turns} turns of {model}: judge "
                    "again to complete them",
                    stacklevel=3,
                )


def read_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """How answers and judgments were made, by `models` and `judges`, if it was noted."""
    path = folder / "settings.json"
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return {"models": {}, "judges": {}} | kept


def note_settings(
    folder: Path, kind: str, settings: Mapping[str, Mapping[str, Any]]
) -> None:
    """Add to what `read_settings` reads; `kind` is "models" or "judges".

    Several processes may add to one folder at the same time.
    """
    with FileLock(folder / "settings.json.lock"):
        kept = read_settings(folder)
        kept[kind] |= settings
        text = json.dumps(kept, indent=1, ensure_ascii=False)
        write_atomically(folder / "settings.json", text.encode())


# --- names


def _check_names(
    models: "Mapping[str, Model]",
    judge: Judge | None,
    reward_name: str | None,
    pairs: bool,
    baseline: str | None,
) -> None:
    """Raise ValueError unless there are models and judges, each with a fitting name."""
    _check_judges(judge, reward_name, pairs)
    _check_model_names(models)
    _check_baseline(baseline, models)


def _check_judges(judge: Judge | None, reward_name: str | None, pairs: bool) -> None:
    if judge is None and reward_name is None:
        raise ValueError("nobody judges: give a judge, a reward, or both")
    if judge is not None and judge.model == reward_name:
        raise ValueError(f"judge and reward model are both called {reward_name!r}")
    if pairs and judge is None:
        raise ValueError("pairs need a judge")


def _check_model_names(models: Iterable[str]) -> None:
    if not models:
        raise ValueError("no models to compare")
    for name in models:
        if not name or name.startswith(".") or set(name) & set('/\\:*?"<>|\0\n'):
            raise ValueError(f"the model's name {name!r} must do as a file's name")


def _check_baseline(baseline: str | None, models: Iterable[str]) -> None:
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
    if not isinstance(model, Responder):
        policy, tokenizer = model
        responder = Responder(name, name, max_new_tokens=max_new_tokens)
    elif model.base_url is None and Path(model.model).is_dir():
        policy, tokenizer = ready_to_sample(model.model)
        responder = model
    else:
        responder = dataclasses.replace(model, name=name)
        return answer_questions(responder, questions, path, **options)
    from starling_lib.models import fingerprint

    known_as = f"{name}@{fingerprint(policy)}"  # other weights are another model
    responder = dataclasses.replace(responder, name=name, model=known_as)
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


def judge_settings(judge: Judge, passes: int, pairs: bool) -> dict[str, Any]:
    """What a report says about a judge."""
    said = {"model": judge.model, **judge.settings, "passes": passes}
    return said | {"asked": "single answers and pairs" if pairs else "single answers"}


def model_settings(
    models: "Mapping[str, Model]",
    temperatures: Mapping[str, float] | None,
    max_new_tokens: int = 256,
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
