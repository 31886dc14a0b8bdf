"""Being the judge oneself: blind votes on two models' answers, by buttons in a notebook.

`VoteSession` keeps what was asked and what was said and needs no notebook; `VotePanel`
shows it. Votes are rows as `agreement_table` and `pairwise_table` take them, so that a
person is one more rater beside the judges.

Knows: two answers a prompt, which side each stood on, votes and their tally. Does not
know: where the answers came from.
"""

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from starling_lib.chat import Message
from starling_lib.journal import Row, open_journal
from starling_lib.statistics import wilson_interval

CHOICES = ("left", "tie", "right")
FIELDS = ("question_id", "model_a", "model_b", "winner", "order", "rater", "answers")


@dataclass(frozen=True)
class Ballot:
    """What a voter gets to see: a prompt and two answers, and no names."""

    question_id: int | str
    prompt: str
    left: str
    right: str


class VoteSession:
    """One person's votes on two models' answers to the same prompts.

    The prompts come in the order given. On each, a coin with `seed` decides which model
    stands on the left, balanced over the prompts. Nothing names the models before
    `tally` or `votes`.

    Args:
        prompts: a text or a list of messages each.
        answers: for each of two models, by name, its answers in the order of `prompts`.
        path: a JSONL file that keeps the votes; a later session with the same prompts and
            answers goes on where this one stopped. None: they live as long as the session.
        question_ids: names of the prompts, as the judges use them (default 0, 1, …).
        turn: the turn that is judged, where the judges' votes tell turns apart.
        rater: the voter's name.

    Raises:
        ValueError: not two models, lists of different lengths, a question twice, or a
            file of votes on other answers.

    >>> session = VoteSession(["2 + 2?", "Hello"], {"old": ["5", "?"], "new": ["4", "Hi"]})
    >>> while (ballot := session.current) is not None:
    ...     session.vote("left" if ballot.left in ("4", "Hi") else "right")
    >>> session.tally()[["wins", "losses", "ties"]].loc["new"].tolist()
    [2, 0, 0]
    """

    def __init__(
        self,
        prompts: Sequence[str | Sequence[Message]],
        answers: Mapping[str, Sequence[str]],
        *,
        path: str | os.PathLike | None = None,
        question_ids: Sequence[int | str] | None = None,
        turn: int | None = None,
        rater: str = "human",
        seed: int = 0,
    ):
        if len(answers) != 2:
            raise ValueError(f"answers: two models are compared, got {list(answers)}")
        ids = range(len(prompts)) if question_ids is None else question_ids
        self.models = tuple(answers)
        for name, given in {"question_ids": ids, **answers}.items():
            if len(given) != len(prompts):
                raise ValueError(f"{name}: {len(given)} for {len(prompts)} prompts")
        self.path, self.rater, self.turn = path, rater, turn
        self.skipped: list[int | str] = []
        self._rows: list[Row] = []
        # Balanced: a voter who likes one side would otherwise favour a model.
        turned = np.random.default_rng(seed).permutation(np.arange(len(prompts)) % 2)
        self._questions = {
            _plain(ids[i]): (_text(prompt), [given[i] for given in answers.values()], t)
            for i, (prompt, t) in enumerate(zip(prompts, turned.tolist(), strict=True))
        }
        if len(self._questions) < len(prompts):
            raise ValueError("question_ids: a question occurs twice")
        if path is not None:
            with open_journal(path) as journal:
                self._rows = self._own(journal.rows)

    @property
    def current(self) -> Ballot | None:
        """The first question neither voted on nor skipped; None when there is none."""
        passed = {row["question_id"] for row in self._rows} | set(self.skipped)
        for question_id, (prompt, answers, turned) in self._questions.items():
            if question_id not in passed:
                left, right = answers[::-1] if turned else answers
                return Ballot(question_id, prompt, left, right)
        return None

    @property
    def progress(self) -> tuple[int, int, int]:
        """How many questions were voted on, were skipped, and there are."""
        return len(self._rows), len(self.skipped), len(self._questions)

    def vote(self, choice: str) -> None:
        """Note "left", "right" or "tie" for the current question, or "skip" it.

        A skipped question is not written down: a later session asks it again.
        Raises ValueError for another word, where nothing is left to vote on, or where
        another session has voted meanwhile.
        """
        ballot = self.current
        if ballot is None:
            raise ValueError("there is nothing left to vote on")
        if choice == "skip":
            self.skipped.append(ballot.question_id)
            return
        if choice not in CHOICES:
            raise ValueError(f"{choice!r} is none of {', '.join(CHOICES)}, skip")
        row = self._row(ballot.question_id, choice)
        if self.path is not None:
            # Held only for the write: a panel may stay open for days.
            with open_journal(self.path) as journal:
                if any(
                    r["question_id"] == ballot.question_id
                    for r in self._own(journal.rows)
                ):
                    raise ValueError(
                        f"{self.path}: question {ballot.question_id!r} was voted on "
                        "elsewhere meanwhile: make a new session"
                    )
                journal.append(row)
        self._rows.append(row)

    def votes(self) -> pd.DataFrame:
        """The votes: `question_id, model_a, model_b, winner, order, rater`, perhaps `turn`.

        `order` is 0 where model_a stood on the left. `agreement_table(votes, judge's)`
        and `pairwise_table(votes)` take them as they are.
        """
        names = [name for name in FIELDS if name != "answers"]
        frame = pd.DataFrame(self._rows, columns=names)
        return frame if self.turn is None else frame.assign(turn=self.turn)

    def tally(self, level: float = 0.95) -> pd.DataFrame:
        """Who won how often, and how sure that is.

        Returns:
            Index `model`; `wins, losses, ties`, and `preferred`: the share of wins among
            the decisive votes, with Wilson's interval `low, high` (1927), which stays
            honest for few or unanimous votes; NaN without a decisive vote.
        """
        table = {}
        for model in self.models:
            winners = [
                row[row["winner"]] for row in self._rows if row["winner"] != "tie"
            ]
            wins = winners.count(model)
            preferred, low, high = wilson_interval(wins, len(winners), level)
            table[model] = {
                "wins": wins,
                "losses": len(winners) - wins,
                "ties": len(self._rows) - len(winners),
                "preferred": preferred,
                "low": low,
                "high": high,
            }
        return pd.DataFrame.from_dict(table, orient="index").rename_axis("model")

    def _row(self, question_id: int | str, choice: str) -> Row:
        _, answers, turned = self._questions[question_id]
        first, second = ("model_b", "model_a") if turned else ("model_a", "model_b")
        winner = {"left": first, "right": second, "tie": "tie"}[choice]
        values = (question_id, *self.models, winner, turned, self.rater, answers)
        row = dict(zip(FIELDS, values, strict=True))
        return row if self.turn is None else row | {"turn": self.turn}

    def _own(self, rows: Sequence[Row]) -> list[Row]:
        """The rows of this rater on these questions and models, sides as they are here."""
        own = []
        for number, row in enumerate(rows, 1):
            if missing := [name for name in FIELDS if name not in row]:
                raise ValueError(f"{self.path}, line {number}: no field {missing[0]!r}")
            if row["rater"] != self.rater or row.get("turn") != self.turn:
                continue
            if {row["model_a"], row["model_b"]} != set(self.models):
                continue
            said = dict(
                zip((row["model_a"], row["model_b"]), row["answers"], strict=True)
            )
            asked = self._questions.get(row["question_id"])
            if asked is None:
                continue
            if [said[model] for model in self.models] != asked[1]:
                raise ValueError(
                    f"{self.path}, line {number}: question {row['question_id']!r} was "
                    "voted on with other answers: name another file, or another rater"
                )
            own.append(row)
        return own


def _plain(question_id: Any) -> int | str:
    """An id as JSON gives it back."""
    return question_id if isinstance(question_id, str) else int(question_id)


def _text(prompt: str | Sequence[Message]) -> str:
    """A prompt as one text; several messages under their speakers' names."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in prompt)


# --- in a notebook


BOX = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.4"


class VotePanel:
    """Buttons for a `VoteSession`; shown when it is a cell's last line.

    The models are named only in the tally, which ends the voting: figures that grew with
    each vote would tell which side was whose. Run the cell again to go on voting.

    Raises:
        ImportError: without ipywidgets.
    """

    def __init__(self, session: VoteSession):
        try:
            import ipywidgets
        except ImportError:
            raise ImportError(
                "the vote panel needs ipywidgets: "
                "pip install 'starling-cookbook[notebooks]'"
            ) from None
        self.session = session
        self.page = ipywidgets.HTML()
        self.buttons = {
            name: ipywidgets.Button(description=name) for name in (*CHOICES, "skip")
        }
        for name, button in self.buttons.items():
            button.on_click(lambda _, name=name: self._press(name))
        self.buttons["tally"] = ipywidgets.Button(description="end and show tally")
        self.buttons["tally"].on_click(lambda _: self._end())
        row = ipywidgets.HBox(list(self.buttons.values()))
        self.box = ipywidgets.VBox([self.page, row])
        self._show()

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return self.box._repr_mimebundle_(**options)

    def _press(self, choice: str) -> None:
        try:
            self.session.vote(choice)
        except (ValueError, OSError) as problem:
            self.page.value = f"<b>{html.escape(str(problem))}</b>"
            return
        self._show()

    def _show(self) -> None:
        """The current question, or the tally after the last."""
        ballot = self.session.current
        if ballot is None:
            self._end()
            return
        voted, skipped, total = self.session.progress
        self.page.value = (
            f"<p>{voted} of {total} voted, {skipped} skipped</p>"
            f'<div style="{BOX}; font-weight: bold">{html.escape(ballot.prompt)}</div>'
            '<div style="display: flex; gap: 1em; margin: 1em 0">'
            f"{_answer('left', ballot.left)}{_answer('right', ballot.right)}</div>"
        )

    def _end(self) -> None:
        for button in self.buttons.values():
            button.disabled = True
        voted, skipped, total = self.session.progress
        # pandas escapes the models' names.
        table = self.session.tally().to_html(float_format="{:.2f}".format, border=0)
        self.page.value = (
            f"<p>{voted} of {total} voted, {skipped} skipped</p>{table}"
            "<p>preferred: share of the decisive votes, with Wilson's 95 % interval</p>"
        )


def _answer(side: str, text: str) -> str:
    """One answer in a column; what it holds is text, never markup."""
    style = f"{BOX}; flex: 1; border: 1px solid #999; padding: .6em"
    return f'<div style="{style}"><i>{side}</i>\n{html.escape(text)}</div>'
