"""Answers to questions of several turns, from a local model or a server, resumable.

Knows: that a turn sees the ones before, at which temperature MT-Bench asks what, and how
a killed run goes on. Does not know judges. Source: FastChat's `fastchat/llm_judge`
(Zheng et al. 2023, arXiv 2306.05685).
"""

import dataclasses
import functools
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from starling_lib.bench_files import (
    Answers,
    QuestionId,
    answer_row,
    questions_by_id,
    turn_messages,
    write_answers,
)
from starling_lib.chat import Message
from starling_lib.journal import Row, open_journal
from starling_lib.judges import request_hash
from starling_lib.responders import (
    Failure,
    Responder,
    ask_server,
    ready_to_sample,
    sample_in_chunks,
    without_response,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
DEFAULT_TEMPERATURE = 0.7  # of a category that MT-Bench does not have


def answer_questions(
    responder: Responder,
    questions: Iterable[Mapping[str, Any]],
    output: str | os.PathLike,
    *,
    temperatures: Mapping[str, float] | None = TEMPERATURES,
    policy: "PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Answers:
    """Let a model answer every turn of every question; each turn sees the ones before.

    Args:
        responder: a local model, or one behind an OpenAI-compatible server.
        questions: as `read_questions` gives them.
        output: `model_answer/<model>.jsonl`, written when all is answered. Until then
            every turn goes into `<output>.turns`, from which a killed run goes on.
        temperatures: by category, instead of the responder's own (0.7 for others, as
            in MT-Bench); None keeps the responder's.
        policy, tokenizer: what is loaded already, to answer for `responder.model`.
            Other weights need another name there, or an earlier run's answers stand.

    Returns:
        Answers by question. Beside FastChat's fields: `finished`, one flag a turn,
        False where the token limit cut it, and `temperature`.

    Raises:
        ValueError: an output that other questions, settings or another model made.
        JudgeError: a server left turns without an answer; run again to ask for them.
    """
    output, by_id = Path(output), questions_by_id(questions)
    asker = _TurnAsker(responder, temperatures, batch_size, seed, policy, tokenizer)
    total = sum(len(question["turns"]) for question in by_id.values())
    failures: list[Failure] = []
    with open_journal(f"{output}.turns") as journal:
        if output.exists() and not journal.rows:
            raise ValueError(
                f"{output} is there without {output.name}.turns, so that nobody knows "
                "how it was made: name another output"
            )
        known = {(row["question_id"], row["turn"]): row for row in journal.rows}
        _check_answers_fit(known, by_id, asker, output)
        done = sum(question_id in by_id for question_id, _ in known)
        bar = tqdm(total=total, initial=done, desc="answering", disable=not progress)
        with bar:
            for rows in asker.missing_turns(by_id, known, failures):
                journal.append(*rows)
                known |= {(row["question_id"], row["turn"]): row for row in rows}
                bar.update(len(rows))
        if failures:
            raise without_response(failures, "turns have no answer")
        answers = {
            question_id: asker.answer(question, known)
            for question_id, question in by_id.items()
        }
        write_answers(answers, output)
    return answers


@dataclass(frozen=True)
class _TurnAsker:
    """One model that answers turns, and its settings."""

    responder: Responder
    temperatures: Mapping[str, float] | None
    batch_size: int
    seed: int
    policy: "PreTrainedModel | None"
    tokenizer: "PreTrainedTokenizerBase | None"

    @functools.cached_property
    def loaded(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        model = self.responder.model if self.policy is None else self.policy
        return ready_to_sample(model, self.tokenizer)

    def temperature(self, question: Mapping[str, Any]) -> float:
        if self.temperatures is None:
            return self.responder.temperature
        return self.temperatures.get(question["category"], DEFAULT_TEMPERATURE)

    def messages(self, question: Row, turn: int, known: Mapping) -> list[Message]:
        """The conversation up to the user's turn number `turn`."""
        said = [
            known[question["question_id"], earlier]["answer"]
            for earlier in range(1, turn)
        ]
        return turn_messages(question, said)

    def digest(self, question: Row, messages: Sequence[Message]) -> str:
        """What makes an answer this run's: text, model and settings, hashed."""
        settings = {
            "temperature": self.temperature(question),
            "max_new_tokens": self.responder.max_new_tokens,
            "seeds": [self.responder.seed, self.seed],
        }
        asked = self.responder.messages(messages)
        return request_hash(self.responder.model, asked, settings)

    def missing_turns(
        self, by_id: Mapping[QuestionId, Row], known: Mapping, failures: list[Failure]
    ) -> Iterator[list[Row]]:
        """Turns that `known` lacks, in pieces to be written down at once.

        All first turns, then all second ones: a batch holds one turn and temperature.
        """
        for turn in range(
            1, 1 + max((len(q["turns"]) for q in by_id.values()), default=0)
        ):
            groups: dict[float, list[Row]] = defaultdict(list)
            for question_id, question in by_id.items():
                answered = turn == 1 or (question_id, turn - 1) in known
                if turn <= len(question["turns"]) and answered:
                    row = self._row(question, turn, known)
                    groups[self.temperature(question)].append(row)
            for temperature, rows in groups.items():
                yield from self._turns(temperature, turn, rows, known, failures)

    def _row(self, question: Row, turn: int, known: Mapping) -> Row:
        messages = self.messages(question, turn, known)
        return {
            "id": str(question["question_id"]),
            "question": question,
            "messages": messages,
            "prompt": "\n".join(message["content"] for message in messages),
        }

    def _turns(
        self, temperature, turn, rows, known: Mapping, failures: list[Failure]
    ) -> Iterator[list[Row]]:
        """Answers to rows of one turn and temperature, as rows of the journal."""
        by_name = {row["id"]: row for row in rows}
        lacking = {
            name
            for name, row in by_name.items()
            if (row["question"]["question_id"], turn) not in known
        }
        if not lacking:
            return
        responder = dataclasses.replace(self.responder, temperature=temperature)
        if responder.base_url is not None:
            asked = [row for row in rows if row["id"] in lacking]
            found = ask_server(responder, asked, failures)
        else:
            found = sample_in_chunks(
                *self.loaded,
                responder,
                rows,
                lacking,
                self.batch_size,
                2 * self.seed + turn - 1,  # else both turns would draw the same numbers
            )
        for responses in found:
            yield [
                self._answered(by_name[response["id"]], turn, response)
                for response in responses
            ]

    def _answered(self, row: Row, turn: int, response: Row) -> Row:
        return {
            "question_id": row["question"]["question_id"],
            "turn": turn,
            "answer": response["answer"],
            "finished": response["finished"],
            "request_hash": self.digest(row["question"], row["messages"]),
            "tstamp": time.time(),
        }

    def answer(self, question: Row, known: Mapping) -> Row:
        """A whole answer as FastChat stores it."""
        question_id = question["question_id"]
        turns = [known[question_id, turn + 1] for turn in range(len(question["turns"]))]
        return answer_row(
            question_id,
            self.responder.name,
            [turn["answer"] for turn in turns],
            finished=[turn["finished"] for turn in turns],
            temperature=self.temperature(question),
            tstamp=turns[-1]["tstamp"],
        )


def _check_answers_fit(
    known: Mapping, by_id: Mapping[QuestionId, Row], asker: _TurnAsker, output: Path
) -> None:
    """Raise ValueError unless the turns kept by earlier runs are answers to this one's."""
    for (question_id, turn), row in known.items():
        question = by_id.get(question_id)
        if question is None:
            continue
        fits = turn <= len(question["turns"])
        if fits:
            messages = asker.messages(question, turn, known)
            fits = row["request_hash"] == asker.digest(question, messages)
        if not fits:
            raise ValueError(
                f"{output}.turns was made by another run: turn {turn} of question "
                f"{question_id!r} was asked for with another text, model or setting; "
                "name another output"
            )
