"""What a comparison of models on MT-Bench's questions found, as tables.

Knows answers and judgments and which tables they make; every mean is of one judge. Does
not know where answers and judgments came from, nor how a report looks. Intervals are at
95 % and resample questions.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import pandas as pd

from starling_lib.agreement import TIE_DELTA, agreement_table, votes_from_scores
from starling_lib.bench_files import REWARD, Answers, answer_turns
from starling_lib.bench_scores import compare_scores, run_to_run, score_intervals
from starling_lib.journal import Row
from starling_lib.win_rates import (
    bradley_terry,
    games_from_judgments,
    pairwise_table,
    position_bias_test,
    swap_consistency,
)

MOST_REASONS = 3  # of failures that a table names

# By judge, or by two judges: what makes a table, or raises ValueError
Makers = dict[Any, Callable[[], pd.DataFrame]]


@dataclass(frozen=True)
class Comparison:
    """Answers of several models and what judges made of them.

    `singles`: judgments of single answers by judge. `pairs`: pairwise judgments, if
    there are any. `settings`: how all this was made, in plain values. `reward_tie`:
    rewards no further apart are a tie.
    """

    questions: list[Row]
    answers: dict[str, Answers]  # by model
    singles: dict[str, pd.DataFrame]
    pairs: pd.DataFrame | None = None
    baseline: str | None = None
    reward_tie: float = 0.0
    resamples: int = 2000
    settings: dict[str, Any] = field(default_factory=dict)

    def model_pairs(self) -> list[tuple[str, str]]:
        """(a, b) of every difference a − b: against the baseline, else later − earlier."""
        if self.baseline is None:
            return [(b, a) for a, b in combinations(self.answers, 2)]
        others = [model for model in self.answers if model != self.baseline]
        return [(model, self.baseline) for model in others]


@dataclass(frozen=True)
class Tables:
    """All figures of a report. By judge where they are dicts; None: nothing to say.

    `wins`: also "<judge>, in pairs". `ratings`: of three and more models compared in
    pairs, with one virtual tie a pair, which keeps them finite. `position`: how often
    the place decided, and the p-value of the sign test that the first is not favoured.
    `left_out`: sentences on tables that the judgments do not suffice for.
    """

    scores: dict[str, pd.DataFrame]
    differences: dict[str, pd.DataFrame]
    spread: dict[str, pd.DataFrame]
    wins: dict[str, pd.DataFrame]
    ratings: pd.DataFrame | None
    swaps: pd.DataFrame | None
    position: dict[str, float] | None
    agreement: pd.DataFrame | None
    lengths: pd.DataFrame
    failures: pd.DataFrame
    left_out: list[str]


def is_reward(judgments: pd.DataFrame) -> bool:
    """Whether the scores are a reward model's, which have no scale from 1 to 10."""
    return bool((judgments["prompt"] == REWARD).all())


def comparison_tables(found: Comparison) -> Tables:
    """Every table of a report on `found`."""
    scored = {
        judge: judgments
        for judge, judgments in found.singles.items()
        if judgments["error"].isna().any()
    }
    several = len(found.answers) > 1
    votes = {judge: _votes(found, judge) for judge in found.singles if several}
    repeated = {j: frame for j, frame in scored.items() if frame["pass"].max() > 1}
    swaps, position = _swaps(found)
    wins, no_wins = _possible("wins by", _wins(found, votes))
    ratings, no_ratings = _possible("ratings by", _ratings(found))
    agreement, no_agreement = _possible("agreement of", _agreement(votes))
    return Tables(
        scores={j: _scores(found, judgments) for j, judgments in scored.items()},
        differences={j: _differences(found, frame) for j, frame in scored.items()},
        spread={judge: run_to_run(frame) for judge, frame in repeated.items()},
        wins=wins,
        ratings=next(iter(ratings.values()), None),
        swaps=swaps,
        position=position,
        agreement=(
            pd.concat(agreement, names=["judge_a", "judge_b"]) if agreement else None
        ),
        lengths=_lengths(found),
        failures=_failures(found),
        left_out=[*no_wins, *no_ratings, *no_agreement],
    )


def _possible(what: str, makers: Makers) -> tuple[dict[Any, pd.DataFrame], list[str]]:
    """The tables that can be made, and a sentence on each of the others.

    A judge may have judged only some models or some pairs of them: what compares the
    others has nothing to go by, which is no reason to withhold the rest.
    """
    made, left_out = {}, []
    for judges, make in makers.items():
        try:
            made[judges] = make()
        except ValueError as error:
            names = judges if isinstance(judges, str) else " and ".join(judges)
            left_out.append(f"Left out: {what} {names} ({error}).")
    return made, left_out


def _scores(found: Comparison, judgments: pd.DataFrame) -> pd.DataFrame:
    """`score_intervals` with the models in the comparison's order."""
    intervals = score_intervals(judgments, resamples=found.resamples)
    scored = intervals.index.unique("model")
    order = [model for model in found.answers if model in scored]
    return pd.concat([intervals.loc[[model]] for model in order])


def _differences(found: Comparison, judgments: pd.DataFrame) -> pd.DataFrame:
    """`compare_scores` of every pair of models that share a question with a score."""
    valid = judgments[judgments["error"].isna()]
    turns = {
        model: set(zip(part["question_id"], part["turn"], strict=True))
        for model, part in valid.groupby("model")
    }
    tables = {}
    for a, b in found.model_pairs():
        if turns.get(a, set()) & turns.get(b, set()):
            table = compare_scores(judgments, a, b, resamples=found.resamples)
            tables[a, b] = table.rename(columns={"a": "mean_a", "b": "mean_b"})
    return pd.concat(tables, names=["a", "b"]) if tables else pd.DataFrame()


def _votes(found: Comparison, judge: str) -> pd.DataFrame:
    judgments = found.singles[judge]
    tie = found.reward_tie if is_reward(judgments) else TIE_DELTA
    return votes_from_scores(judgments, tie)


def _wins(found: Comparison, votes: dict[str, pd.DataFrame]) -> Makers:
    """Wins by scores, which come in one order, and by pairs in both."""
    games = {judge: vote.assign(order=0) for judge, vote in votes.items()}
    if found.pairs is not None:
        judge = found.pairs["judge"].iloc[0]
        games[f"{judge}, in pairs"] = games_from_judgments(found.pairs)
    return {
        name: partial(pairwise_table, game, found.baseline)
        for name, game in games.items()
    }


def _ratings(found: Comparison) -> Makers:
    """`bradley_terry` of what was judged in pairs; two models have their win rate."""
    if found.pairs is None or len(found.answers) < 3:
        return {}
    games = games_from_judgments(found.pairs)
    judge = found.pairs["judge"].iloc[0]
    return {judge: partial(bradley_terry, games, virtual_ties=1)}


def _swaps(found: Comparison) -> tuple[pd.DataFrame | None, dict[str, float] | None]:
    if found.pairs is None:
        return None, None
    games = games_from_judgments(found.pairs)
    return swap_consistency(games), position_bias_test(games)._asdict()


def _agreement(votes: dict[str, pd.DataFrame]) -> Makers:
    """`agreement_table` of every two judges."""

    def table(a: str, b: str) -> pd.DataFrame:
        return agreement_table(votes[a], votes[b]).set_index(["turn", "ties"])

    return {pair: partial(table, *pair) for pair in combinations(votes, 2)}


def _lengths(found: Comparison) -> pd.DataFrame:
    """Index model; `turns, characters` (mean), `cut` (share of those that say)."""
    rows = {}
    for model, answers in found.answers.items():
        asked = [answers[one["question_id"]] for one in found.questions]
        texts = [text for answer in asked for text in answer_turns(answer)]
        ends = [end for answer in asked for end in answer.get("finished") or []]
        rows[model] = {
            "turns": len(texts),
            "characters": sum(map(len, texts)) / max(len(texts), 1),
            "cut": 1 - sum(ends) / len(ends) if ends else float("nan"),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def _failures(found: Comparison) -> pd.DataFrame:
    """Index judge and kind; `judgments, failed` and the commonest `reasons`."""
    parts = {(judge, "single"): frame for judge, frame in found.singles.items()}
    if found.pairs is not None:
        parts[found.pairs["judge"].iloc[0], "pair"] = found.pairs
    rows = {}
    for key, judgments in parts.items():
        reasons = Counter(judgments["error"].dropna().map(_reason))
        named = [f"{why} ({n} ×)" for why, n in reasons.most_common(MOST_REASONS)]
        more = len(reasons) - len(named)
        named += [f"{more} other reasons"] * bool(more)
        rows[key] = {
            "judgments": len(judgments),
            "failed": reasons.total(),
            "reasons": "; ".join(named),
        }
    index = pd.MultiIndex.from_tuples(rows, names=["judge", "kind"])
    return pd.DataFrame(list(rows.values()), index=index)


def _reason(error: str) -> str:
    """A failure without what differs from request to request, so that it can be counted.

    That is the request's hash in front, and what follows a semicolon: the reply's end.
    """
    return re.sub(r"^request \w+ to ", "", error).partition(";")[0][:120]
