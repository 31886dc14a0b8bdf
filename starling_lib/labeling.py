"""RLAIF: prompts → K responses → a judge's ranking → rows in the Nectar schema.

Knows: how rankings are asked for and taken up again after a kill, how several passes
become one ranking, and how a `LabelRecipe` is carried out. Does not know how a judge is
reached (`judges`), what it is asked (`ranking_prompt`) or what rankings are used for. The
public names of `ranking_prompt`, `responders` and `recipe_files` are here too.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from starling_lib.chat import (
    Message,
    transcript_to_messages,
)
from starling_lib.command_recipes import JudgeRecipe, LabelRecipe
from starling_lib.journal import (
    Row,
    line_of,
    open_journal,
    read_jsonl,
    write_atomically,
)
from starling_lib.judges import (
    Judge,
    JudgeError,
    OpenAIJudge,
    RecordedJudge,
    Reply,
    ask_all,
    request_hash,
)
from starling_lib.ranking_prompt import (
    LETTERS,
    RankingParseError,
    check_display,
    parse_good_natured,
    parse_ranking,
    presentation,
    ranking_messages,
)
from starling_lib.rankings import data_path, read_rows
from starling_lib.recipe_files import (
    RecipeError,
    describe_recipe,
    keep_recipe,
    read_recipe,
)
from starling_lib.responders import Responder, conversation, sample_responses
from starling_lib.statistics import bootstrap_interval, kendall_tau

if TYPE_CHECKING:
    from starling_lib.judges import RewardJudge

__all__ = [
    "LETTERS",
    "JudgeRecipe",
    "LabelRecipe",
    "RankingParseError",
    "RecipeError",
    "Responder",
    "describe_recipe",
    "label",
    "parse_good_natured",
    "parse_ranking",
    "presentation",
    "rank_responses",
    "ranking_agreement",
    "ranking_messages",
    "read_jsonl",
    "read_recipe",
    "read_rows",
    "recorded_displays",
    "sample_responses",
    "to_rankings",
    "write_rankings",
]

Key = tuple[str, int]  # id of the row, pass (from 1)


# --- ranking

# Draws of pass n are n - 1, n - 1 + 1000, …: as many passes can be added to a finished
# run without asking anything again.
MAX_PASSES = 1000
# A log says by which hash a ranking was asked for, not after how many others.
_DRAWS_SEARCHED = 100


@dataclass(frozen=True)
class _Task:
    """One row to be ranked in one pass."""

    row: Row
    number: int
    display: list[int]
    seed: int
    unread: int = 0  # replies of earlier runs, none of which could be read

    @property
    def key(self) -> Key:
        return self.row["id"], self.number

    def messages(self) -> list[Message]:
        answers = self.row["answers"]
        _, pairs = presentation(self.row["id"], len(answers), self.number, self.seed)
        prompt = transcript_to_messages(self.row["prompt"])
        texts = [answer["answer"] for answer in answers]
        return ranking_messages(prompt, texts, self.display, pairs)

    def draw(self, unread: int) -> int:
        """What to ask next after `unread` replies of this run that were of no use."""
        return self.number - 1 + MAX_PASSES * (self.unread + unread)

    def digest(self, judge: Judge, draw: int) -> str:
        return request_hash(judge.model, self.messages(), judge.settings, draw)

    def request(self, judge: "Judge | RewardJudge") -> str:
        """A digest of what is asked, the same at every attempt."""
        if not hasattr(judge, "rank"):
            return self.digest(judge, self.number - 1)
        prompt = transcript_to_messages(self.row["prompt"])
        texts = [answer["answer"] for answer in self.row["answers"]]
        return request_hash(
            judge.model, prompt, {"answers": texts, "finished": self.finished()}
        )

    def finished(self) -> list[bool]:
        return [answer.get("finished") is not False for answer in self.row["answers"]]

    def models(self) -> list[str]:
        return [answer["model"] for answer in self.row["answers"]]

    def judged(self, judge, ranking: Sequence[int], **fields) -> Row:
        row = {"id": self.row["id"], "pass": self.number, "display": self.display}
        row |= {"ranking": [self.display[place] for place in ranking]}
        row |= {"models": self.models()} | fields
        return row | {"judge": judge.model, "request_hash": self.request(judge)}

    def failed(self, judge, error: str, reply: str | None, unread: int) -> Row:
        row = {"id": self.row["id"], "pass": self.number, "display": self.display}
        row |= {"error": error, "reply": reply, "unread": unread}
        return row | {"judge": judge.model, "request_hash": self.request(judge)}


class _Requests(Sequence):
    """What `ask_all` is to ask; made when it is asked, as Nectar's would fill memory."""

    def __init__(self, waiting: Sequence[tuple[_Task, int]]):
        self.waiting = waiting  # tasks, each with its replies that were of no use

    def __len__(self) -> int:
        return len(self.waiting)

    def __getitem__(self, index: int) -> tuple[list[Message], int]:
        task, unread = self.waiting[index]
        return task.messages(), task.draw(unread)


def rank_responses(
    rows: Iterable[Mapping[str, Any]],
    judge: "Judge | RewardJudge",
    output: str | os.PathLike | None = None,
    passes: int = 1,
    seed: int = 0,
    displays: Mapping[Key, Sequence[int]] | None = None,
    attempts: int = 3,
    progress: bool = True,
    retry_failed: bool = False,
) -> list[Row]:
    """Let a judge rank the answers of every row, `passes` times.

    Args:
        rows: in the Nectar schema, as `read_rows` and `sample_responses` give them: an
            `id`, a `prompt` (transcript) and 2 to 26 `answers` with `answer` and
            `model`. Ranks are not looked at.
        judge: what `ask_all` takes, or a `RewardJudge`, whose `rank` is used directly.
        output: JSONL file that gets every row as it comes. A later run with the same
            arguments goes on where the last one stopped.
        seed: of the orders of display and of pairs (see `presentation`).
        displays: orders of display by (id, pass) where recorded ones are to be used.
        attempts: how often to ask until a reply can be read. A reply that cannot is
            followed by a new draw (a judge at temperature 0 may well say the same);
            where none came, the same is asked for again, unless it was refused.
        retry_failed: try the failures that `output` holds again, with new draws.

    Returns:
        One row a row and pass, pass by pass: `id`, `pass`, `display` and `ranking`
        (indices into the row's answers; best first), `models` (of the answers, as
        stored), `good_natured` (None from a reward model), `judge`, `reply_hash` (the
        key into the judge's log), `request_hash` (of the texts and settings). Where no
        reply could be read instead `error`, the last `reply`, `unread` (how many
        came): counted in a warning, left out by `to_rankings`.

    Raises:
        ValueError: a row that cannot be asked about; an `output` that another judge,
            seed, text or number of passes made.
        JudgeError: nothing can be asked (a refused key, an unknown model).
    """
    if attempts < 1:
        raise ValueError(f"attempts: expected at least 1, got {attempts}")
    tasks = _tasks(rows, passes, seed, displays or {})
    with open_journal(output) as journal:
        known = _take_up(journal.rows, tasks, judge, passes, output)
        pending = _still_to_ask(tasks, known, journal.rows, retry_failed)
        judged = _rank_directly if hasattr(judge, "rank") else _ask_until_read
        for row in judged(pending, judge, attempts, progress):
            journal.append(row)
            known[row["id"], row["pass"]] = row
    found = [known[task.key] for task in tasks]
    _warn_of_failures(found)
    return found


def _tasks(
    rows: Iterable[Mapping[str, Any]], passes: int, seed: int, displays: Mapping
) -> list[_Task]:
    if not 1 <= passes <= MAX_PASSES:
        raise ValueError(f"passes: expected 1 to {MAX_PASSES}, got {passes}")
    checked = _checked_rows(rows)
    tasks = []
    for number in range(1, passes + 1):
        for row in checked:
            name, k = row["id"], len(row["answers"])
            display = displays.get((name, number))
            if display is None:
                display, _ = presentation(name, k, number, seed)
            check_display(display, k, f"display of row {name!r} in pass {number}")
            tasks.append(_Task(row, number, [int(i) for i in display], seed))
    return tasks


def _checked_rows(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows as a list. Raises ValueError that names row, field and fix."""
    checked: dict[str, Row] = {}
    for i, row in enumerate(rows):
        name = row.get("id")
        if not isinstance(name, str) or not name:
            raise ValueError(f"row {i}: id: expected a name, got {name!r:.40}; add one")
        if name in checked:
            raise ValueError(f"row {i}: id {name!r} is taken by an earlier row")
        try:
            _check_answers(row.get("answers"))
            conversation(transcript_to_messages(row.get("prompt")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {i} (id {name!r}): {error}") from None
        checked[name] = dict(row)
    return list(checked.values())


def _check_answers(answers: Any) -> None:
    if not isinstance(answers, list) or not 2 <= len(answers) <= len(LETTERS):
        raise ValueError(f"answers: expected a list of 2 to {len(LETTERS)} of them")
    for i, answer in enumerate(answers):
        for name in ("answer", "model"):
            if not isinstance(answer, Mapping) or not isinstance(answer.get(name), str):
                raise ValueError(f"answers[{i}].{name}: expected text; add it")


def _take_up(
    rows: Sequence[Row], tasks: Sequence[_Task], judge, passes: int, path
) -> dict[Key, Row]:
    """Rows of earlier runs by key, after checking that they belong to this one.

    The newest row of a key counts: a failure may be followed by a later success.
    """
    by_key = {task.key: task for task in tasks}
    known: dict[Key, Row] = {}
    for i, row in enumerate(rows, 1):
        try:
            key, display, name = (row["id"], row["pass"]), row["display"], row["judge"]
        except KeyError as error:
            raise ValueError(
                f"{path}, line {i}: no field {error}; name another output"
            ) from None
        if name != judge.model:
            problem = f"the judge is {name!r} there and {judge.model!r} here"
        elif key[1] > passes:
            problem = f"it holds a pass {key[1]}, passes={passes} here"
        elif key in by_key and by_key[key].display != display:
            problem = f"row {key[0]!r} is shown in another order: another seed?"
        elif key in by_key and (field := _other_field(row, by_key[key], judge)):
            problem = (
                f"row {key[0]!r}, pass {key[1]}, differs in {field}: another text or "
                "seed, or other settings of the judge"
            )
        else:
            known[key] = row
            continue
        raise ValueError(
            f"{path} was made by another run: {problem}; name another output"
        )
    return known


def _other_field(row: Row, task: _Task, judge) -> str | None:
    """The field by which a kept row shows that it answers another question, if any.

    Rows of older versions have no `request_hash`; their `reply_hash` must then be that of
    one of the draws. A reward model's have neither.
    """
    if row.get("models", task.models()) != task.models():
        return "models"
    if "request_hash" in row:
        return None if row["request_hash"] == task.request(judge) else "request_hash"
    if hasattr(judge, "rank") or "ranking" not in row:
        return None
    draws = map(task.draw, range(_DRAWS_SEARCHED))
    asked = (task.digest(judge, draw) for draw in draws)
    return None if row.get("reply_hash") in asked else "reply_hash"


def _still_to_ask(
    tasks: Sequence[_Task],
    known: Mapping[Key, Row],
    rows: Sequence[Row],
    retry_failed: bool,
) -> list[_Task]:
    unread: Counter[Key] = Counter()  # draws whose replies are known to be useless
    for row in rows:  # older versions counted attempts, and each took a draw
        unread[row["id"], row["pass"]] += row.get("unread", row.get("attempts", 0))
    done = {key for key, row in known.items() if "ranking" in row or not retry_failed}
    return [
        dataclasses.replace(task, unread=unread[task.key])
        for task in tasks
        if task.key not in done
    ]


def _ask_until_read(
    tasks: Sequence[_Task], judge: Judge, attempts: int, progress: bool
) -> Iterator[Row]:
    """Rankings as they come; after the last attempt, failures."""
    waiting = [(task, 0) for task in tasks]
    for attempt in range(attempts):
        again = []
        label = f"judging, attempt {attempt + 1}" if attempt else "judging"
        replies = ask_all(judge, _Requests(waiting), label if progress else None)
        with contextlib.closing(replies):
            for index, reply in replies:
                task, unread = waiting[index]
                text = getattr(reply, "text", None)
                try:
                    ranking = _read_ranking(reply, len(task.display))
                except (JudgeError, RankingParseError) as error:
                    unread += text is not None  # only what came has used up its draw
                    for_good = getattr(error, "refused", False)
                    if attempt + 1 < attempts and not for_good:
                        again.append((task, unread))
                    else:
                        yield task.failed(judge, str(error), text, unread)
                else:
                    good = parse_good_natured(text)
                    digest = task.digest(judge, task.draw(unread))
                    yield task.judged(
                        judge, ranking, good_natured=good, reply_hash=digest
                    )
        waiting = again
        if not waiting:
            return


def _read_ranking(reply: Reply | JudgeError, k: int) -> list[int]:
    if isinstance(reply, JudgeError):
        raise reply
    if reply.finish_reason == "length":
        raise RankingParseError(
            f"cut off after {reply.completion_tokens} tokens: raise the judge's limit"
        )
    return parse_ranking(reply.text, k)


def _rank_directly(
    tasks: Sequence[_Task], judge: "RewardJudge", attempts: int, progress: bool
) -> Iterator[Row]:
    """Rankings by scores. In the order of display, so that equal scores are at random."""
    for task in tqdm(tasks, "scoring", disable=not progress):
        ended = task.finished()
        finished = [ended[i] for i in task.display]
        shown = [task.row["answers"][i]["answer"] for i in task.display]
        prompt = transcript_to_messages(task.row["prompt"])
        try:
            order = judge.rank(prompt, shown, finished)
        except JudgeError as error:
            yield task.failed(judge, str(error), None, 0)
        else:
            yield task.judged(judge, order, good_natured=None, reply_hash=None)


def _warn_of_failures(rows: Sequence[Row]) -> None:
    failures = [row for row in rows if "error" in row]
    if failures:
        first = failures[0]
        warnings.warn(
            f"{len(failures)} of {len(rows)} rankings failed; the first, row "
            f"{first['id']!r} in pass {first['pass']}: {first['error']} "
            "(retry_failed=True tries them again)",
            stacklevel=3,
        )


def recorded_displays(judgments: Iterable[Row]) -> dict[Key, list[int]]:
    """Orders of display by (id, pass) of a judgments log, for `rank_responses`."""
    return {(row["id"], row["pass"]): row["display"] for row in judgments}


# --- from judgments to rankings


def to_rankings(
    rows: Iterable[Mapping[str, Any]],
    judgments: Iterable[Mapping[str, Any]],
    method: str = "borda",
) -> list[Row]:
    """Nectar rows whose ranks join all passes of a judgments log.

    method  "borda": by mean rank over the passes. "plackett_luce": by the worths of the
            Plackett-Luce model, regularised a little so that they stay finite (I-LSR of
            Maystre & Grossglauser 2015, in `choix`). Between equals the first pass
            decides; one pass alone gives its own order under both.

    Answers keep their place and fields and get a `rank` from 1 to K without ties;
    `good_natured` is what more than half of the passes say (None, or what the row says,
    where no pass says anything). Answers without text, which no reader of rankings
    takes, are left out. Rows without a successful judgment, or with fewer than two
    answers left, are left out with a warning that counts them.
    Raises ValueError on judgments that do not fit their rows, or two of one pass.
    """
    merge = _merge_function(method)
    passes = _passes_by_id(judgments)
    found: list[Row] = []
    total = 0
    for row in rows:
        total += 1
        of_row = [passes[row["id"]][n] for n in sorted(passes.get(row["id"], {}))]
        _check_fit(row, of_row)
        ranked = _ranked(row, of_row, merge) if of_row else None
        if ranked is not None and ranked["num_responses"] >= 2:
            found.append(ranked)
    if len(found) < total:
        warnings.warn(
            f"{total - len(found)} of {total} rows left out: no judgment that succeeded, "
            "or fewer than two answers with text",
            stacklevel=2,
        )
    return found


def _passes_by_id(judgments: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, Row]]:
    passes: dict[str, dict[int, Row]] = {}
    for judgment in judgments:
        if "error" in judgment:
            continue
        of_row = passes.setdefault(judgment["id"], {})
        number = judgment["pass"]
        if number in of_row:
            raise ValueError(
                f"row {judgment['id']!r}: two judgments of pass {number}; keep one, or "
                "number the passes anew"
            )
        of_row[number] = dict(judgment)
    return passes


def _check_fit(row: Mapping[str, Any], judgments: Sequence[Row]) -> None:
    models = [answer["model"] for answer in row["answers"]]
    for judgment in judgments:
        complete = sorted(judgment["ranking"]) == list(range(len(models)))
        if not complete or judgment.get("models", models) != models:
            raise ValueError(
                f"row {row['id']!r}, pass {judgment['pass']}: the judgment does not fit "
                "the row's answers; take the rows that were judged, in the same order "
                "of answers"
            )


def _ranked(row: Mapping[str, Any], judgments: Sequence[Row], merge) -> Row:
    orders = [judgment["ranking"] for judgment in judgments]
    first = orders[0]
    # Rounded, because what is equal on paper may differ in the last digit.
    keys = np.round(merge(orders), 6)
    order = sorted(first, key=lambda i: (keys[i], first.index(i)))
    answers = row["answers"]
    with_text = [i for i in order if answers[i]["answer"].strip()]
    rank = {i: float(place) for place, i in enumerate(with_text, 1)}
    messages = transcript_to_messages(row["prompt"])
    return dict(row) | {
        "answers": [answers[i] | {"rank": rank[i]} for i in sorted(rank)],
        "turns": sum(message["role"] == "user" for message in messages),
        "num_responses": len(rank),
        "source": row.get("source") or [],
        "good_natured": _majority(judgments, row.get("good_natured")),
    }


def _mean_ranks(orders: Sequence[Sequence[int]]) -> np.ndarray:
    """(K,) mean rank of each item, over orders that list the items best first."""
    return np.mean([np.argsort(order) for order in orders], axis=0)


def _negative_worths(orders: Sequence[Sequence[int]]) -> np.ndarray:
    """(K,) minus the Plackett-Luce worths, regularised by alpha = 0.01."""
    import choix

    return -choix.ilsr_rankings(len(orders[0]), orders, alpha=1e-2)


def _merge_function(method: str) -> Callable[[Sequence[Sequence[int]]], np.ndarray]:
    """From (passes, K) orders, best first, to a number for each item; low is good."""
    methods = {"borda": _mean_ranks, "plackett_luce": _negative_worths}
    if method not in methods:
        raise ValueError(f"method: no {method!r}; choose from {', '.join(methods)}")
    return methods[method]


def _majority(judgments: Sequence[Row], otherwise: bool | None) -> bool | None:
    said = [judgment.get("good_natured") for judgment in judgments]
    votes = [vote for vote in said if vote is not None]
    return sum(votes) * 2 > len(votes) if votes else otherwise


def write_rankings(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike) -> Path:
    """Write rows as JSONL that `rankings.load_rankings` reads; all of them or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, b"".join(map(line_of, rows)))
    return path


def ranking_agreement(
    rows: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """How far two sets of ranks agree on the rows (by id) and answers that both hold.

    A dict: `rows` compared; `kendall_tau`, the mean over rows, with `low` and `high` of
    its bootstrap interval (95 %, over rows); `same_best`, the share of rows with the
    same answer at the top; `undefined`, the number of rows without a τ, all ranks of one
    side being equal. None stands for a mean of no rows and the ends of an interval of
    one. Raises ValueError where a row's answers differ.
    """
    theirs = {row["id"]: row for row in others}
    taus, same = [], []
    for row in rows:
        if row["id"] in theirs:
            a, b = _shared_ranks(row, theirs[row["id"]])
            taus.append(kendall_tau(a, b))
            same.append(np.argmin(a) == np.argmin(b))
    if not taus:
        return {"rows": 0}
    defined = [tau for tau in taus if not math.isnan(tau)]
    tau = low = high = None
    if len(defined) > 1:
        tau, low, high = bootstrap_interval(defined)
    elif defined:
        (tau,) = defined
    return {
        "rows": len(taus),
        "kendall_tau": tau,
        "low": low,
        "high": high,
        "same_best": float(np.mean(same)),
        "undefined": len(taus) - len(defined),
    }


def _shared_ranks(
    row: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[list[float], list[float]]:
    """Ranks of the answers with text, which stand in the same order in both."""
    kept = [
        [answer for answer in one["answers"] if answer["answer"].strip()]
        for one in (row, other)
    ]
    texts = [[answer["answer"] for answer in answers] for answers in kept]
    if texts[0] != texts[1]:
        raise ValueError(f"row {row['id']!r}: the two sets hold different answers")
    first, second = ([answer["rank"] for answer in answers] for answers in kept)
    return first, second


# --- the labelling recipe

# Another value of these makes other rows under the same ids.
_FIXED = ("source", "split", "seed", "responders")


def label(recipe: LabelRecipe, progress: bool = True) -> dict[str, Any]:
    """Run a recipe: (sample,) rank, join the passes, write and report.

    Writes into `output_dir`: `responses.jsonl` where responders answer, `replies.jsonl`
    (all the judge said), `judgments.jsonl`, one `<split>.jsonl` for `load_rankings`,
    `report.json`, whose `usage` is that of all replies in the log. Stopped at any
    moment, the same recipe goes on. Returns the report.
    Raises RecipeError, what `rank_responses` raises, ValueError when no row is labelled.
    """
    _merge_function(recipe.method)  # a misspelt one must not wait for the judge
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    parts = _read_splits(recipe)
    judge = make_judge(recipe.judge, recipe.replies, folder)
    if judge is None:
        raise RecipeError("judge: missing; name a judge, or replies to replay")
    # Only now: the folder must not be bound to a recipe that cannot be run.
    keep_recipe(recipe, folder / "recipe.json", lambda key: key in _FIXED)
    stored = list(itertools.chain(*parts.values()))
    rows = stored
    if recipe.responders:
        where = folder / "responses.jsonl"
        rows = sample_responses(
            stored, recipe.responders, where, seed=recipe.seed, progress=progress
        )
    log = _bundled(recipe.displays)
    judgments = rank_responses(
        rows,
        judge,
        folder / "judgments.jsonl",
        passes=recipe.passes,
        seed=recipe.seed,
        displays=recorded_displays(read_jsonl(log)) if log else None,
        attempts=recipe.attempts,
        progress=progress,
        retry_failed=recipe.retry_failed,
    )
    ranked = to_rankings(rows, judgments, recipe.method)
    if not ranked:
        raise ValueError(
            f"no row was labelled; see the errors in {folder}/judgments.jsonl"
        )
    for name, part in parts.items():
        ids = {row["id"] for row in part}
        chosen = [row for row in ranked if row["id"] in ids]
        write_rankings(chosen, folder / f"{name}.jsonl")
    usage = str(judge.log.usage())  # `judge.usage` holds only what this run asked
    report = {"judge": judge.model, "usage": usage, "rows": len(ranked)}
    report |= _agreement_report(rows, judgments, ranked)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "report.json", text.encode())
    return report


def _read_splits(recipe: LabelRecipe) -> dict[str, list[Row]]:
    """Rows by the name of their split, which becomes that of a file."""
    if recipe.rows is not None and recipe.rows < 1:
        raise RecipeError(f"rows: expected 1 or more, or null for all: {recipe.rows}")
    parts: dict[str, list[Row]] = {}
    for split in recipe.split.split("+"):
        name = re.match(r"\w*", split.strip())[0]
        if name in parts:
            raise RecipeError(f"split: {name!r} is named twice; join the two slices")
        parts[name] = read_rows(recipe.source, split.strip(), recipe.rows)
    return parts


def make_judge(
    judge: JudgeRecipe | None, replies: str | None, folder: Path
) -> OpenAIJudge | RecordedJudge | None:
    """A judge behind a server, which logs into `folder`, or a replay; None for neither.

    Raises RecipeError for prices that are not two.
    """
    if replies is not None:
        return RecordedJudge(_bundled(replies))
    if judge is None:
        return None
    fields = dataclasses.asdict(judge)
    if (prices := fields["prices"]) is not None and len(prices) != 2:
        raise RecipeError(f"judge.prices: expected two numbers, got {prices}")
    return OpenAIJudge(**fields, log=folder / "replies.jsonl")


def _bundled(name: str | None) -> Path | None:
    """A path as it is where there is something, else that of a bundled file."""
    if name is None or Path(name).exists():
        return name and Path(name)
    return data_path(name)


def _agreement_report(
    rows: Sequence[Row], judgments: Sequence[Row], ranked: Sequence[Row]
) -> dict[str, Any]:
    """Failures, and how the ranking agrees with ranks in the rows and with itself."""
    known = [row for row in rows if all("rank" in a for a in row["answers"])]
    report = {
        "passes": max(row["pass"] for row in judgments),
        "failed judgments": sum("error" in row for row in judgments),
        "agreement with the ranks of the source": ranking_agreement(ranked, known),
    }
    if report["passes"] > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rows left out are counted already
            first, second = (
                to_rankings(rows, [row for row in judgments if row["pass"] == number])
                for number in (1, 2)
            )
        report["agreement of passes 1 and 2"] = ranking_agreement(first, second)
    return report
