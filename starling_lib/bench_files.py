"""MT-Bench's files, read and written as FastChat has them.

Knows: `question.jsonl`, `model_answer/<model>.jsonl`, `reference_answer/<model>.jsonl`,
`model_judgment/<judge>_single.jsonl` and `<judge>_pair.jsonl`, each plain or gzipped.
Every error names file, line and field. Does not know who answers or judges, nor what
scores add up to. Source: FastChat's `fastchat/llm_judge` (Zheng et al. 2023, arXiv
2306.05685).

An answer's row has `question_id, answer_id, model_id, choices: [{index, turns}], tstamp`;
what we add stands beside these fields, and FastChat passes over it.
"""

import gzip
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

import pandas as pd

from starling_lib.chat import Message
from starling_lib.journal import Row, line_of, write_atomically

QuestionId = int | str
Answers = dict[QuestionId, Row]  # one model's answers

CATEGORIES = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)
_FIRST_ID, _PER_CATEGORY = 81, 10  # of MT-Bench's own questions


# --- lines and fields


def numbered_rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    """("file, line n", object) of a JSONL file, which may be gzipped.

    Raises ValueError that names the line which holds something else.
    """
    path = Path(path)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path.name}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                problem = getattr(error, "msg", error)
                raise ValueError(f"{where}: not JSON ({problem})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object")
            yield where, row


def check_fields(
    row: Mapping[str, Any], fields: Mapping[str, type | UnionType], where: str
) -> None:
    """Raise ValueError that names the first field missing or of another type."""
    for name, kind in fields.items():
        if name not in row:
            raise ValueError(f"{where}: field {name!r} is missing")
        value = row[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            expected = getattr(kind, "__name__", str(kind))
            raise ValueError(
                f"{where}: field {name!r} must be {expected}, not {value!r:.40}"
            )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _files(path: str | Path, pattern: str) -> list[Path]:
    """The file itself, or a folder's files that fit. Raises FileNotFoundError."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    found = sorted([*path.glob(pattern), *path.glob(f"{pattern}.gz")])
    if not found:
        raise FileNotFoundError(f"no {pattern} in {path}")
    return found


# --- questions


def read_questions(path: str | Path | None = None) -> list[Row]:
    """Questions in MT-Bench's format, one JSON object a line.

    Each has `question_id`, `category`, `turns` (user turns, usually two) and, where an
    answer can be checked, `reference`. FastChat's own `question.jsonl` reads unchanged.

    Args:
        path: a file; default the 80 bundled questions.

    Raises:
        ValueError: naming line, field and problem of the first bad question.
    """
    if path is None:
        from starling_lib.rankings import data_path

        path = data_path("bench_questions.jsonl")
    questions = []
    for where, row in numbered_rows(path):
        _check_question(row, where)
        questions.append(row)
    return questions


def _check_question(question: Row, where: str) -> None:
    fields = {"question_id": QuestionId, "category": str, "turns": object}
    check_fields(question, fields, where)
    turns = question["turns"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: field 'turns' must be a list of user turns")
    if not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(f"{where}: field 'turns' holds an empty or non-text turn")
    if not _are_texts(question.get("reference", [])):
        raise ValueError(f"{where}: field 'reference' must be a list of texts")


def questions_by_id(questions: Iterable[Mapping[str, Any]]) -> dict[QuestionId, Row]:
    """Questions under their ids. Raises ValueError where two share one."""
    found: dict[QuestionId, Row] = {}
    for question in questions:
        if question["question_id"] in found:
            raise ValueError(f"two questions have the id {question['question_id']!r}")
        found[question["question_id"]] = dict(question)
    return found


def turn_messages(question: Mapping[str, Any], said: Sequence[str]) -> list[Message]:
    """The conversation up to the user's turn that follows the answers `said` so far."""
    messages = []
    for asked, answer in zip(question["turns"], said, strict=False):
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": question["turns"][len(said)]}]


# --- answers and references


def answer_row(
    question_id: QuestionId, model: str, turns: Sequence[str], **extra: Any
) -> Row:
    """One answer as FastChat stores it; `extra` fields stand behind its own.

    Args:
        turns: the model's texts, one a user turn.
    """
    identity = json.dumps([question_id, model, list(turns)]).encode()
    return {
        "question_id": question_id,
        "answer_id": hashlib.sha256(identity).hexdigest()[:22],
        "model_id": model,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": time.time(),
    } | extra


def answer_turns(answer: Mapping[str, Any]) -> list[str]:
    """The texts of an answer's first choice, which is the one that is judged."""
    return answer["choices"][0]["turns"]


def read_answers(path: str | Path) -> dict[str, Answers]:
    """Answers by model and question, from one file or all of a folder's.

    The model's name is the file's without `.jsonl`, as with FastChat (`model_id` may
    say something else where a file was renamed).

    Raises:
        ValueError: naming file, line and field of a bad answer, or a question that is
            answered twice in a file.
    """
    return {
        file.name.removesuffix(".gz").removesuffix(".jsonl"): _read_answer_file(file)
        for file in _files(path, "*.jsonl")
    }


def _read_answer_file(path: Path) -> Answers:
    answers: Answers = {}
    for where, row in numbered_rows(path):
        check_fields(row, {"question_id": QuestionId, "choices": list}, where)
        first = row["choices"][0] if row["choices"] else None
        if not isinstance(first, dict) or not _are_texts(first.get("turns")):
            raise ValueError(
                f"{where}: field 'choices' must begin with an object whose 'turns' is "
                "a list of texts"
            )
        if row["question_id"] in answers:
            raise ValueError(
                f"{where}: field 'question_id': {row['question_id']!r} is answered in "
                "an earlier line"
            )
        answers[row["question_id"]] = row
    return answers


def write_answers(answers: Answers, path: str | Path) -> Path:
    """Write one model's answers (or references), so that a kill leaves old or new."""
    return _write_rows(answers.values(), path)


def _write_rows(rows: Iterable[Row], path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, b"".join(map(line_of, rows)))
    return path


def read_references(path: str | Path) -> dict[QuestionId, list[str]]:
    """Reference answers by question, from a file of `reference_answer/`.

    A folder may stand for the only file in it. Raises ValueError as `read_answers`
    does, and for a folder of several files: each judge has its own there.
    """
    files = _files(path, "*.jsonl")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds references of several: name one of {names}")
    answers = _read_answer_file(files[0])
    return {question_id: answer_turns(row) for question_id, row in answers.items()}


def question_references(
    questions: Iterable[Mapping[str, Any]],
) -> dict[QuestionId, list[str]]:
    """References that the questions carry in their own `reference` field."""
    return {
        question["question_id"]: question["reference"]
        for question in questions
        if question.get("reference")
    }


# --- judgments

_SINGLE_FIELDS = {
    "question_id": QuestionId,
    "model": str,
    "judge": list,
    "user_prompt": str,
    "judgment": str,
    "score": int | float,
    "turn": int,
    "tstamp": int | float,
}
_PAIR_FIELDS = {
    "question_id": QuestionId,
    "model_1": str,
    "model_2": str,
    "g1_winner": str,
    "g2_winner": str,
    "judge": list,
    "g1_user_prompt": str,
    "g1_judgment": str,
    "g2_user_prompt": str,
    "g2_judgment": str,
    "turn": int,
    "tstamp": int | float,
}
_OWN_FIELDS = {"pass": int, "error": str}  # behind FastChat's, where they say something
FIELDS = {"single": _SINGLE_FIELDS, "pair": _PAIR_FIELDS}
MODELS = {"single": ["model"], "pair": ["model_1", "model_2"]}
WINNERS = ("model_1", "model_2", "tie", "error")
FAILED = -1  # FastChat's score of a rating that could not be read
REWARD = "reward"  # in the place of the prompt's name: nobody was asked, −1 is a score
NO_REASON = "failed; the file gives no reason"


def read_judgments(
    path: str | Path,
    questions: Iterable[Mapping[str, Any]] | None = None,
    kind: str = "single",
) -> pd.DataFrame:
    """Judgments of a file, or of all `*_<kind>.jsonl` in a folder, one row each.

    Args:
        questions: give `category`; default MT-Bench's own and the bundled ones by their
            ids. It is missing where a question is not among them.
        kind: "single" (ratings) or "pair" (two models in both orders).

    Returns:
        FastChat's fields, except that `judge` is the model alone, beside `prompt` (the
        template's name); and `category`, `pass` (1, 2, … where the judge was asked
        several times), `error` (why a judgment failed; missing elsewhere). `score` is
        what the file says; FastChat's −1 without a reason gets an `error` that says so,
        except where `prompt` is "reward". Nothing is parsed again.

    Raises:
        ValueError: naming file, line and field of a bad judgment.
    """
    if kind not in FIELDS:
        raise ValueError(f"kind must be 'single' or 'pair', not {kind!r}")
    rows = []
    for file in _files(path, f"*_{kind}.jsonl"):
        for where, row in numbered_rows(file):
            _check_judgment(row, kind, where)
            rows.append(row)
    return judgment_frame(rows, kind, questions)


def _check_judgment(row: Row, kind: str, where: str) -> None:
    check_fields(row, FIELDS[kind], where)
    check_fields(row, {k: v for k, v in _OWN_FIELDS.items() if k in row}, where)
    if len(row["judge"]) != 2 or not _are_texts(row["judge"]):
        raise ValueError(f"{where}: field 'judge' must be [model, name of the prompt]")
    if kind == "single" and not math.isfinite(row["score"]):
        raise ValueError(f"{where}: field 'score' must be finite, not {row['score']}")
    for name in ("g1_winner", "g2_winner") if kind == "pair" else ():
        if row[name] not in WINNERS:
            raise ValueError(
                f"{where}: field {name!r} must be one of {', '.join(WINNERS)}, not "
                f"{row[name]!r:.40}"
            )


def judgment_frame(
    rows: Sequence[Row],
    kind: str,
    questions: Iterable[Mapping[str, Any]] | None = None,
) -> pd.DataFrame:
    """Rows of a judgment file as `read_judgments` returns them.

    A failure that was tried again gives way to the later row. Other rows about the same
    thing, a pair named the other way round included, are kept and numbered as passes:
    files of FastChat hold them too.
    """
    categories = _categories(questions)
    plain = [name for name in FIELDS[kind] if name != "judge"]
    frame = pd.DataFrame(
        [{name: row[name] for name in plain} for row in rows], columns=plain
    )
    frame["judge"] = [row["judge"][0] for row in rows]
    frame["prompt"] = [row["judge"][1] for row in rows]
    frame["category"] = [categories(row["question_id"]) for row in rows]
    frame["error"] = [row.get("error") for row in rows]
    frame["pass"] = [row.get("pass", 0) for row in rows]
    frame["error"] = frame["error"].mask(_unexplained(frame, kind), NO_REASON)
    frame["models"] = [
        tuple(sorted(row[name] for name in MODELS[kind])) for row in rows
    ]
    subject = ["judge", "models", "question_id", "turn"]
    repeated = frame.duplicated([*subject, "pass"], keep="last")
    frame = frame[~(repeated & frame["error"].notna())].reset_index(drop=True)
    unnumbered = frame["pass"] == 0
    counted = frame[unnumbered].groupby(subject, sort=False).cumcount() + 1
    frame.loc[unnumbered, "pass"] = counted
    frame = frame.drop(columns="models")
    first = [
        "question_id",
        "category",
        *MODELS[kind],
        "judge",
        "prompt",
        "turn",
        "pass",
    ]
    return frame[first + [name for name in frame if name not in first]]


def _unexplained(frame: pd.DataFrame, kind: str) -> pd.Series:
    """Which judgments are failures that their file gives no reason for."""
    if kind == "pair":
        failed = (frame[["g1_winner", "g2_winner"]] == "error").any(axis=1)
    else:
        failed = (frame["score"] == FAILED) & (frame["prompt"] != REWARD)
    return failed & frame["error"].isna()


def _categories(questions: Iterable[Mapping[str, Any]] | None):
    """A function from a question's id to its category, None where it is not known."""
    if questions is not None:
        return {one["question_id"]: one["category"] for one in questions}.get
    own = dict(
        enumerate((c for c in CATEGORIES for _ in range(_PER_CATEGORY)), _FIRST_ID)
    )
    bundled = {one["question_id"]: one["category"] for one in read_questions()}
    return (own | bundled).get


def plain_score(score: float) -> int | float:
    """7 rather than 7.0, as FastChat writes a rating without a decimal point."""
    return int(score) if float(score).is_integer() else float(score)


def write_judgments(judgments: pd.DataFrame, path: str | Path) -> Path:
    """Write judgments in FastChat's format, so that a kill leaves old or new.

    Args:
        judgments: as `read_judgments` returns them; ones with `model_1` are pairs. The
            `category` is the questions' business and left out; `pass` is written from
            the second on, `error` where there is one.
    """
    kind = "pair" if "model_1" in judgments else "single"
    rows = []
    # Not `to_dict` of the whole: it would turn numbers of mixed columns into floats.
    for record in judgments.astype(object).to_dict("records"):
        record["judge"] = [record["judge"], record["prompt"]]
        if kind == "single":
            record["score"] = plain_score(record["score"])
        row = {name: record[name] for name in FIELDS[kind]}
        row |= {"pass": record["pass"]} if record["pass"] > 1 else {}
        explained = isinstance(record["error"], str) and record["error"] != NO_REASON
        row |= {"error": record["error"]} if explained else {}
        rows.append(row)
    return _write_rows(rows, path)
