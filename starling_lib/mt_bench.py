"""MT-Bench: questions of two turns → a model's answers → a judge's ratings or verdicts.

Knows: how answers are put to a judge singly or in pairs, or to a reward model, and how
that goes on after a kill. Does not know where answers come from (`bench_answers`), the
files' formats (`bench_files`), the judge's prompts (`judge_prompts`), what scores add up
to (`bench_scores`) or how a judge is reached (`judges`); the public names of the first
four are here too. Source: Zheng et al. 2023, arXiv 2306.05685, and FastChat's
`fastchat/llm_judge`.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from starling_lib.bench_answers import answer_questions
from starling_lib.bench_files import (
    FAILED,
    MODELS,
    REWARD,
    Answers,
    QuestionId,
    answer_row,
    answer_turns,
    judgment_frame,
    plain_score,
    question_references,
    questions_by_id,
    read_answers,
    read_judgments,
    read_questions,
    read_references,
    turn_messages,
    write_answers,
    write_judgments,
)
from starling_lib.bench_scores import (
    compare_scores,
    run_to_run,
    score_intervals,
    score_table,
)
from starling_lib.chat import Message
from starling_lib.journal import Row, open_journal
from starling_lib.judge_prompts import (
    RATING,
    VERDICT,
    JudgePrompt,
    JudgmentParseError,
    parse_rating,
    parse_verdict,
    read_judge_prompts,
)
from starling_lib.judges import Judge, JudgeError, Reply, ask_all, request_hash

__all__ = [
    "JudgePrompt",
    "JudgmentParseError",
    "answer_questions",
    "answer_row",
    "compare_scores",
    "judge_answers",
    "judge_pairs",
    "parse_rating",
    "parse_verdict",
    "read_answers",
    "read_judge_prompts",
    "read_judgments",
    "read_questions",
    "read_references",
    "run_to_run",
    "score_answers",
    "score_intervals",
    "score_table",
    "write_answers",
    "write_judgments",
]

NEED_REFERENCE = ("math", "reasoning", "coding")
# Draws of pass n are n − 1, n − 1 + 1000, …: passes can be added without asking again.
MAX_PASSES = 1000

# (prompts as messages, responses, whether each ended by itself) → one number each
RewardFunction = Callable[[list[list[Message]], list[str], list[bool]], Sequence[float]]


@dataclass(frozen=True)
class _Task:
    """One judgment: of one model's turn, or of two models' in both orders."""

    kind: str  # of `bench_files.FIELDS`
    question_id: QuestionId
    models: tuple[str, ...]
    turn: int
    number: int  # of the pass
    prompt: JudgePrompt
    user_prompts: tuple[str, ...]  # one, or one for each order
    unread: int = 0  # replies of earlier runs, none of which could be read

    @property
    def key(self) -> tuple:
        return self.question_id, self.models, self.turn, self.number

    @property
    def turned(self) -> "_Task":
        """The same judgment with the models named the other way round."""
        turned = {"models": self.models[::-1], "user_prompts": self.user_prompts[::-1]}
        return dataclasses.replace(self, **turned)

    def request(self, game: int, unread: int) -> tuple[list[Message], int]:
        """What to ask next about a game of which `unread` replies were of no use."""
        draw = self.number - 1 + MAX_PASSES * (self.unread + unread)
        return self.prompt.messages(self.user_prompts[game]), draw

    def digest(self, judge: Judge) -> str:
        """What makes a judgment this run's: both texts, judge, settings and pass."""
        messages = self.prompt.messages(self.user_prompts[0])
        return request_hash(judge.model, messages, judge.settings, self.number - 1)

    def row(self, judge: Judge, games: Sequence["_Game"]) -> Row:
        """The judgment in FastChat's fields, then ours."""
        row = {"question_id": self.question_id}
        row |= dict(zip(MODELS[self.kind], self.models, strict=True))
        named = {"judge": [judge.model, self.prompt.name]}
        row |= (self._rating if self.kind == "single" else self._winners)(named, games)
        row |= {"turn": self.turn, "tstamp": time.time()}
        row |= {"pass": self.number} if self.number > 1 else {}
        row |= {"request_hash": self.digest(judge)}
        errors = [game.error for game in games if game.error]
        if errors:
            unread = max(game.unread for game in games)
            row |= {"error": "; ".join(errors), "unread": unread}
        return row

    def _rating(self, named: Row, games: Sequence["_Game"]) -> Row:
        (game,) = games
        score = FAILED if game.error else plain_score(game.value)
        said = {"user_prompt": self.user_prompts[0], "judgment": game.text}
        return named | said | {"score": score}

    def _winners(self, named: Row, games: Sequence["_Game"]) -> Row:
        winners, said = {}, {}
        for i, (game, letters) in enumerate(zip(games, ("AB", "BA"), strict=True)):
            sides = dict(zip(letters, MODELS["pair"], strict=True)) | {"tie": "tie"}
            winners[f"g{i + 1}_winner"] = "error" if game.error else sides[game.value]
            said[f"g{i + 1}_user_prompt"] = self.user_prompts[i]
            said[f"g{i + 1}_judgment"] = game.text
        return winners | named | said


@dataclass(frozen=True)
class _Game:
    """What came of one request: a value that was read, or why there is none."""

    value: Any
    text: str
    error: str | None = None
    unread: int = 0  # replies that could not be read, this one included


def judge_answers(
    answers: Mapping[str, Answers],
    questions: Iterable[Mapping[str, Any]],
    judge: Judge,
    output: str | os.PathLike | None = None,
    prompts: Mapping[str, JudgePrompt] | None = None,
    references: Mapping[QuestionId, Sequence[str]] | None = None,
    passes: int = 1,
    attempts: int = 3,
    retry_failed: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Let a judge rate every answer on its own, turn by turn (single-answer grading).

    Args:
        answers: by model and question, as `read_answers` gives them.
        judge: what `ask_all` takes; `judge.concurrency` requests run at once, and its
            log answers what was asked before.
        output: `model_judgment/<judge>_single.jsonl`, which gets every judgment as it
            comes. The same call goes on after a kill; other models may share the file.
        prompts: from `read_judge_prompts`; default the bundled ones.
        references: by question; default the questions' own. Math, reasoning and coding
            are rated against them where there is one, as everything else without.
        passes: how often to ask about each answer.
        attempts: how often to ask until a reply can be read. A reply that cannot is
            followed by a new draw; where none came, the same is asked for again.
        retry_failed: try the failures that `output` holds again, with new draws.

    Returns:
        The judgments as `read_judgments` gives them, pass by pass. A turn is judged if
        it is the first, or the second of two, as in FastChat. Where no reply could be
        read, `score` is −1 and `error` says why: counted in a warning, in no mean.

    Raises:
        ValueError: an answer is missing; an `output` that another judge, prompt or text
            made; a prompt is missing or of another kind.
        JudgeError: nothing can be asked (a refused key, an unknown model).
    """
    questions = list(questions_by_id(questions).values())
    sides = [(model,) for model in answers]
    material = _Material(answers, questions, prompts, references)
    tasks = material.tasks("single", sides, passes)
    return _judge(tasks, questions, judge, output, attempts, retry_failed, progress)


def judge_pairs(
    answers: Mapping[str, Answers],
    questions: Iterable[Mapping[str, Any]],
    judge: Judge,
    output: str | os.PathLike | None = None,
    baseline: str | None = None,
    prompts: Mapping[str, JudgePrompt] | None = None,
    references: Mapping[QuestionId, Sequence[str]] | None = None,
    passes: int = 1,
    attempts: int = 3,
    retry_failed: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Let a judge compare models' answers two by two, in both orders.

    Game 1 shows `model_1` as assistant A, game 2 as B; `g1_winner` and `g2_winner` name
    the model ("model_1", "model_2", "tie"), or "error" where no reply could be read.

    Args:
        output: `model_judgment/<judge>_pair.jsonl`. A judgment is written when both
            games are played; give the judge a log, or a kill asks single games again.
        baseline: every other model against this one (which is `model_2`); default
            every pair of models, the two in the order of their names. A pair that
            `output` names the other way round is not asked again and keeps its naming.
        others: as of `judge_answers`.

    Returns:
        The judgments as `read_judgments(kind="pair")` gives them, for
        `win_rates.games_from_judgments`.

    Raises:
        ValueError, JudgeError: as `judge_answers`; ValueError for an unknown baseline
            or a single model.
    """
    questions = list(questions_by_id(questions).values())
    sides = list(itertools.combinations(sorted(answers), 2))
    if baseline is not None:
        if baseline not in answers:
            raise ValueError(f"no answers of the baseline {baseline!r}")
        sides = [(model, baseline) for model in answers if model != baseline]
    if not sides:
        raise ValueError("a pair needs the answers of two models")
    material = _Material(answers, questions, prompts, references)
    tasks = material.tasks("pair", sides, passes)
    return _judge(tasks, questions, judge, output, attempts, retry_failed, progress)


class _Material:
    """Questions, answers, references and prompts: what goes into a judge's request."""

    def __init__(self, answers, questions, prompts, references):
        self.answers, self.questions = answers, questions
        self.prompts = read_judge_prompts() if prompts is None else prompts
        own = question_references(questions)
        self.references = own if references is None else references

    def tasks(
        self, kind: str, sides: Sequence[tuple[str, ...]], passes: int
    ) -> list[_Task]:
        """Every judgment, pass by pass and turn by turn. Raises ValueError."""
        if not 1 <= passes <= MAX_PASSES:
            raise ValueError(f"passes: expected 1 to {MAX_PASSES}, got {passes}")
        first = [
            self._task(kind, question, models, turn)
            for turn, models, question in _judged_turns(sides, self.questions)
        ]
        return [
            dataclasses.replace(task, number=number)
            for number in range(1, passes + 1)
            for task in first
        ]

    def _task(
        self, kind: str, question: Row, models: tuple[str, ...], turn: int
    ) -> _Task:
        references = self.references.get(question["question_id"], [])
        checked = question["category"] in NEED_REFERENCE and len(references) >= turn
        prompt = self._prompt(kind, checked, turn)
        fields = _numbered("question", question["turns"], turn)
        if checked:
            fields |= _numbered("ref_answer", references, 2)
        orders = [models] if kind == "single" else [models, models[::-1]]
        names = ["answer"] if kind == "single" else ["answer_a", "answer_b"]
        user_prompts = []
        for order in orders:
            shown = dict(fields)
            for name, model in zip(names, order, strict=True):
                said = _said(self.answers, model, question, turn)
                shown |= _numbered(name, said, turn)
            user_prompts.append(prompt.user_prompt(shown))
        return _Task(
            kind, question["question_id"], models, turn, 1, prompt, tuple(user_prompts)
        )

    def _prompt(self, kind: str, checked: bool, turn: int) -> JudgePrompt:
        """The template by MT-Bench's name for it. Raises ValueError."""
        name = {
            ("single", False): "single-v1",
            ("single", True): "single-math-v1",
            ("pair", False): "pair-v2",
            ("pair", True): "pair-math-v1",
        }[kind, checked] + "-multi-turn" * (turn == 2)
        if name not in self.prompts:
            raise ValueError(f"no judge prompt {name!r}: MT-Bench's eight are needed")
        prompt = self.prompts[name]
        expected = RATING if kind == "single" else VERDICT
        if prompt.output_format != expected:
            raise ValueError(
                f"judge prompt {name!r}: output_format {prompt.output_format!r}, "
                f"only {expected!r} can be read here"
            )
        return prompt


def _judged_turns(
    sides: Sequence[tuple[str, ...]], questions: Sequence[Row]
) -> Iterator[tuple[int, tuple[str, ...], Row]]:
    """(turn, models, question) to be judged: first turns, and second ones of two."""
    for turn in (1, 2):
        for models in sides:
            for question in questions:
                if turn == 1 or len(question["turns"]) == 2:
                    yield turn, models, question


def _said(
    answers: Mapping[str, Answers], model: str, question: Row, turn: int
) -> list[str]:
    """What a model said up to a turn. Raises ValueError where that is not there."""
    answer = answers[model].get(question["question_id"])
    turns = [] if answer is None else answer_turns(answer)
    if len(turns) < turn:
        raise ValueError(
            f"{model} has no answer to turn {turn} of question "
            f"{question['question_id']!r}: answer it, or leave the question out"
        )
    return turns[:turn]


def _numbered(name: str, texts: Sequence[str], turn: int) -> dict[str, str]:
    """Texts under the names of a template's places: `name` and `name_1`, `name_2`."""
    numbered = {f"{name}_{i}": text for i, text in enumerate(texts[:turn], start=1)}
    return {name: texts[0]} | numbered


def _judge(
    tasks: Sequence[_Task],
    questions: Sequence[Row],
    judge: Judge,
    output: str | os.PathLike | None,
    attempts: int,
    retry_failed: bool,
    progress: bool,
) -> pd.DataFrame:
    """Do what the output lacks of the tasks, and return all of them."""
    if attempts < 1:
        raise ValueError(f"attempts: expected at least 1, got {attempts}")
    with open_journal(output) as journal:
        known = _take_up(journal.rows, tasks, judge, output)
        # A pair keeps the naming that the output has for it.
        tasks = [
            task if task.key in known or task.turned.key not in known else task.turned
            for task in tasks
        ]
        pending = _still_to_ask(tasks, known, journal.rows, retry_failed)
        label = "judging" if progress else None
        for task, games in _play(pending, judge, attempts, label):
            row = task.row(judge, games)
            journal.append(row)
            known[task.key] = row
    found = [known[task.key] for task in tasks]
    _warn_of_failures(found, tasks)
    return judgment_frame(found, tasks[0].kind if tasks else "single", questions)


def _key(row: Row, kind: str) -> tuple:
    models = tuple(row[name] for name in MODELS[kind])
    return row["question_id"], models, row["turn"], row.get("pass", 1)


def _take_up(
    rows: Sequence[Row], tasks: Sequence[_Task], judge: Judge, output
) -> dict[tuple, Row]:
    """Judgments of earlier runs by key, after checking that they belong to this one.

    The newest row of a key counts: a failure may be followed by a success. Runs with
    another baseline may have named a pair the other way round. What other runs added
    about other models or questions is passed over.
    """
    by_key = {one.key: one for task in tasks for one in (task, task.turned)}
    known: dict[tuple, Row] = {}
    for number, row in enumerate(rows, start=1):
        try:
            key = _key(row, tasks[0].kind) if tasks else None
            task = by_key.get(key)
            fits = task is None or _is_ours(row, task, judge)
        except KeyError as error:
            raise ValueError(
                f"{output}, row {number}: field {error} is missing; name another output"
            ) from None
        if not fits:
            raise ValueError(
                f"{output}, row {number}: question {key[0]!r}, turn {key[2]}, of "
                f"{' and '.join(key[1])} was judged by {row['judge'][0]!r} with another "
                "prompt, text or setting; name another output"
            )
        if task is not None:
            known[key] = row
    return known


def _is_ours(row: Row, task: _Task, judge: Judge) -> bool:
    """Whether a row answers this task; rows of FastChat's carry no hash to compare."""
    prefix = "" if task.kind == "single" else "g1_"
    return (
        row["judge"] == [judge.model, task.prompt.name]
        and row[f"{prefix}user_prompt"] == task.user_prompts[0]
        and row.get("request_hash") in (None, task.digest(judge))
    )


def _still_to_ask(
    tasks: Sequence[_Task],
    known: Mapping[tuple, Row],
    rows: Sequence[Row],
    retry_failed: bool,
) -> list[_Task]:
    """The tasks without a judgment; failures too, with the replies of no use so far."""
    unread: Counter[tuple] = Counter()
    for row in rows if tasks else ():
        unread[_key(row, tasks[0].kind)] += row.get("unread", 0)
    return [
        dataclasses.replace(task, unread=unread[task.key])
        for task in tasks
        if task.key not in known or (retry_failed and _failed(known[task.key]))
    ]


def _play(
    tasks: Sequence[_Task], judge: Judge, attempts: int, label: str | None
) -> Iterator[tuple[_Task, list[_Game]]]:
    """Tasks with their games, each as soon as the last of its games is decided."""
    decided: dict[tuple, dict[int, _Game]] = defaultdict(dict)
    games = [(task, i) for task in tasks for i in range(len(task.user_prompts))]
    for task, i, game in _ask_until_read(games, judge, attempts, label):
        decided[task.key][i] = game
        if len(decided[task.key]) == len(task.user_prompts):
            found = decided.pop(task.key)
            yield task, [found[i] for i in range(len(found))]


def _ask_until_read(
    games: Sequence[tuple[_Task, int]], judge: Judge, attempts: int, label: str | None
) -> Iterator[tuple[_Task, int, _Game]]:
    """Games as they are decided: read, or refused, or after the last attempt not."""
    waiting = [(task, i, 0) for task, i in games]
    for attempt in range(attempts):
        requests = [task.request(i, unread) for task, i, unread in waiting]
        name = f"{label}, attempt {attempt + 1}" if label and attempt else label
        again = []
        with contextlib.closing(ask_all(judge, requests, name)) as replies:
            for index, reply in replies:
                task, i, unread = waiting[index]
                game = _read(reply, task.kind, unread)
                for_good = getattr(reply, "refused", False)
                if game.error and attempt + 1 < attempts and not for_good:
                    again.append((task, i, game.unread))
                else:
                    yield task, i, game
        waiting = again
        if not waiting:
            return


def _read(reply: Reply | JudgeError, kind: str, unread: int) -> _Game:
    """A game as the reply decides it, after `unread` others that could not be read."""
    if isinstance(reply, JudgeError):
        return _Game(None, "", str(reply), unread)
    if reply.finish_reason == "length":
        count = reply.completion_tokens
        problem = f"cut off after {count} tokens: raise the judge's limit"
        return _Game(None, reply.text, problem, unread + 1)
    try:
        parse = parse_rating if kind == "single" else parse_verdict
        return _Game(parse(reply.text), reply.text)
    except JudgmentParseError as error:
        return _Game(None, reply.text, str(error), unread + 1)


def _failed(row: Row) -> bool:
    winners = row.get("g1_winner"), row.get("g2_winner")
    return row.get("score") == FAILED or "error" in winners


def _warn_of_failures(rows: Sequence[Row], tasks: Sequence[_Task]) -> None:
    failures = [pair for pair in zip(rows, tasks, strict=True) if _failed(pair[0])]
    if failures:
        row, task = failures[0]
        reason = row.get("error", "its file gives no reason")
        warnings.warn(
            f"{len(failures)} of {len(rows)} judgments failed and count in no score; the "
            f"first, question {task.question_id!r}, turn {task.turn}, of "
            f"{' and '.join(task.models)}: {reason} (retry_failed=True tries them again)",
            stacklevel=4,
        )


# --- a reward model in the judge's place


@dataclass(frozen=True)
class _Scored:
    """One turn of one model's answer, as a reward model reads it."""

    model: str
    question: Row
    said: list[str]  # up to the turn that is scored
    finished: bool

    @property
    def key(self) -> tuple:
        return self.question["question_id"], (self.model,), len(self.said), 1

    @property
    def prompt(self) -> list[Message]:
        return turn_messages(self.question, self.said[:-1])

    def digest(self, name: str) -> str:
        """What makes a score this run's: conversation, ending and reward model."""
        read = [*self.prompt, {"role": "assistant", "content": self.said[-1]}]
        return request_hash(name, read, {"finished": self.finished})

    def row(self, name: str, score: float) -> Row:
        """The score in the fields of a judgment, in which nothing was asked or said."""
        return {
            "question_id": self.question["question_id"],
            "model": self.model,
            "judge": [name, REWARD],
            "user_prompt": "",
            "judgment": "",
            "score": score,
            "turn": len(self.said),
            "tstamp": time.time(),
            "request_hash": self.digest(name),
        }


def score_answers(
    answers: Mapping[str, Answers],
    questions: Iterable[Mapping[str, Any]],
    score: RewardFunction,
    output: str | os.PathLike | None = None,
    name: str = "reward model",
    progress: bool = True,
) -> pd.DataFrame:
    """Let a reward model rate every answer that `judge_answers` would have judged.

    A reward has a unit and a zero of its own: compare models by differences, and a
    reward model with a judge by whom they prefer (`agreement.votes_from_scores`), never
    by means.

    Args:
        answers, questions: as of `judge_answers`. Answers say by `finished` which turns
            the token limit cut; without it all count as ended.
        score: (prompts, responses, finished) → one reward each, as from
            `partial(scoring.score_responses, model, tokenizer)` or `RewardJudge.score`.
            The prompt of a second turn holds the first one and its answer.
        output: `model_judgment/<name>_single.jsonl`, which gets the scores of a model's
            turn together; the same call goes on after a kill.
        name: of the judge. Other weights need another name, or old scores stand.

    Returns:
        One row an answer and turn as `judge_answers` gives them, with the reward in
        `score` and "reward" in `prompt`; −1 is a score here, not a failure.

    Raises:
        ValueError: an answer is missing; `score` returns another number of figures, or
            one that is not finite; an `output` that other texts or another judge made.
    """
    questions = list(questions_by_id(questions).values())
    sides = [(model,) for model in answers]
    turns = [
        _scored(answers, model, question, turn)
        for turn, (model,), question in _judged_turns(sides, questions)
    ]
    with open_journal(output) as journal:
        known = {_key(row, "single"): row for row in journal.rows}
        _check_scores_fit(known, turns, name, output)
        lacking = [one for one in turns if one.key not in known]
        done = len(turns) - len(lacking)
        bar = tqdm(total=len(turns), initial=done, desc="scoring", disable=not progress)
        with bar:
            for _, part in itertools.groupby(
                lacking, lambda one: (len(one.said), one.model)
            ):
                rows = _score_rows(list(part), score, name)
                journal.append(*rows)
                known |= {_key(row, "single"): row for row in rows}
                bar.update(len(rows))
    return judgment_frame([known[one.key] for one in turns], "single", questions)


def _scored(
    answers: Mapping[str, Answers], model: str, question: Row, turn: int
) -> _Scored:
    said = _said(answers, model, question, turn)
    finished = answers[model][question["question_id"]].get("finished") or []
    ended = finished[turn - 1] if len(finished) >= turn else True
    return _Scored(model, question, said, bool(ended))


def _check_scores_fit(
    known: Mapping[tuple, Row], turns: Sequence[_Scored], name: str, output
) -> None:
    """Raise ValueError unless the scores kept by earlier runs belong to these texts."""
    for one in turns:
        row = known.get(one.key)
        if row is not None and row.get("request_hash") != one.digest(name):
            raise ValueError(
                f"{output}: question {one.key[0]!r}, turn {len(one.said)}, of "
                f"{one.model} was scored with another text or by another judge "
                f"({row['judge'][0]!r}); name another output"
            )


def _score_rows(
    turns: Sequence[_Scored], score: RewardFunction, name: str
) -> list[Row]:
    """The turns' judgments, all scored in one call. Raises ValueError."""
    figures = score(
        [one.prompt for one in turns],
        [one.said[-1] for one in turns],
        [one.finished for one in turns],
    )
    figures = [float(figure) for figure in figures]
    if len(figures) != len(turns):
        raise ValueError(f"{name} gave {len(figures)} scores for {len(turns)} answers")
    for one, figure in zip(turns, figures, strict=True):
        if not math.isfinite(figure):
            raise ValueError(
                f"{name} gave {figure} for {one.model}'s answer to question "
                f"{one.key[0]!r}, turn {len(one.said)}: is the reward model broken?"
            )
    return [one.row(name, figure) for one, figure in zip(turns, figures, strict=True)]
