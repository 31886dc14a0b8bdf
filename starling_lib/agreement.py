"""Do two raters agree, and does either fall for sheer length?

A rater is whatever gives verdicts: a judge, a person, a reward model. Votes are rows of
`question_id, model_a, model_b, winner` ("model_a", "model_b" or "tie") and, where there
are several, `turn` and `rater`. A rater that scores single answers votes by its scores
(`votes_from_scores`), so that all can be compared.

Knows votes, scores and texts. Does not know how they were asked for. Questions are the
independent observations: intervals are at 95 % and resample whole questions.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from starling_lib.statistics import Interval, bootstrap_interval, wilson_interval
from starling_lib.win_rates import NO_INTERVAL, OTHER_SIDE, Table, sort_sides

RESAMPLES = 1000
KAPPA_RESAMPLES = 200  # each takes a table of labels
LABELS = [*OTHER_SIDE, "tie"]
TIE_DELTA = 0.1  # FastChat's: ratings this close are a tie


# --- votes


def votes_from_scores(scores: Table, tie_delta: float = TIE_DELTA) -> pd.DataFrame:
    """Votes between every two models, from scores of their single answers.

    Args:
        scores: rows of `question_id, model, score` and, where there are several, `turn`,
            `pass` and `rater` (or `judge`), such as single judgments as `read_judgments`
            gives them. A score of NaN is a failure, and one with an `error`; −1 alone
            is a number like others, since a reward model may well give it.
        tie_delta: scores no further apart are a tie (FastChat: 0.1 of 10 points). A
            reward model's unit is its own: give what its scores can tell apart.

    Returns:
        Votes with model_a < model_b; `winner` is "error" where a score is missing. With
        `order=0` for the one order there is, `win_rates.pairwise_table` counts them.

    Raises:
        ValueError: on a missing column, two scores of one answer, a negative delta.
    """
    frame = pd.DataFrame(scores).reset_index(drop=True)
    for name in ("question_id", "model", "score"):
        if name not in frame:
            raise ValueError(f"scores without the column {name!r}")
    if not tie_delta >= 0:
        raise ValueError(f"tie_delta={tie_delta}: expected 0 or more")
    if "judge" in frame and "rater" not in frame:
        frame = frame.rename(columns={"judge": "rater"})
    if "error" in frame:
        frame = frame.assign(score=frame["score"].mask(frame["error"].notna()))
    extra = [name for name in ("turn", "pass", "rater") if name in frame]
    keys = ["question_id", *extra]
    if (repeated := frame.duplicated([*keys, "model"])).any():
        row = frame.loc[repeated, [*keys, "model"]].iloc[0].to_dict()
        raise ValueError(f"scored twice: {row}; number them in a column 'pass'")
    frame = frame[[*keys, "model", "score"]]
    pairs = frame.merge(frame, on=keys, suffixes=("_a", "_b"))
    pairs = pairs[pairs["model_a"] < pairs["model_b"]].reset_index(drop=True)
    margin = pairs.pop("score_a").astype(float) - pairs.pop("score_b").astype(float)
    cases = [margin.isna(), margin.abs() <= tie_delta, margin > 0]
    winner = np.select(cases, ["error", "tie", "model_a"], "model_b")
    return pairs.assign(winner=winner)


def _votes(votes: Table) -> pd.DataFrame:
    """Votes with sides sorted by name, one kind of tie, and a column `rater`."""
    frame = pd.DataFrame(votes)
    if "winner" in frame:
        # FastChat writes "tie (inconsistent)" where the two orders conflict.
        said = frame["winner"].replace("inconsistent", "tie")
        tie = said.astype(str).str.startswith("tie")
        frame = frame.assign(winner=said.mask(tie, "tie"))
    frame = sort_sides(frame)
    frame = frame.assign(rater=frame.get("rater", ""))
    names = ["question_id", "turn", "model_a", "model_b", "rater", "winner"]
    return frame[[name for name in names if name in frame]]


def _vote_pairs(votes_a: Table, votes_b: Table | None) -> pd.DataFrame:
    """Every pair of votes on one question, turn and pair of models by two raters."""
    first = _votes(votes_a)
    second = first if votes_b is None else _votes(votes_b)
    if ("turn" in first) != ("turn" in second):
        raise ValueError(
            "one rater's votes have a column 'turn', the other's have none"
        )
    first, second = (
        votes.assign(turn=votes.get("turn", 1)) for votes in (first, second)
    )
    keys = ["question_id", "turn", "model_a", "model_b"]
    pairs = first.merge(second, on=keys, suffixes=("_a", "_b"))
    if votes_b is None:
        pairs = pairs[pairs["rater_a"].astype(str) < pairs["rater_b"].astype(str)]
    if pairs.empty:
        raise ValueError(
            "the raters share no question, turn and pair of models; check that they name "
            "questions and models alike"
        )
    # The draws of the bootstrap must not depend on the order of the rows.
    return pairs.sort_values([*keys, "rater_a", "rater_b"], ignore_index=True)


def agreement_table(votes_a: Table, votes_b: Table | None = None) -> pd.DataFrame:
    """How often two raters give the same verdict, per turn, with and without ties.

    Every vote of `votes_a` meets every vote of `votes_b` on the same question, turn and
    pair of models, whichever way round they name the pair; with `votes_a` alone, every
    two votes of different raters in it meet. With ties all three verdicts count and an
    inconsistent one is a tie; without, only pairs of votes that are both decisive
    (Zheng et al. 2023, arXiv 2306.05685, setups S1 and S2). Failed votes ("error") are
    left out.

    Returns:
        One row a `turn` ("all" too where there are several) and `ties` ("with",
        "without"): `n` (pairs of votes), `questions`, `agreement, low, high`, `random`
        (agreement with a rater who guesses: ⅓ or ½), and Cohen's `kappa, kappa_low,
        kappa_high`, which discounts what the raters' own shares of verdicts make likely;
        NaN where both always give one verdict, and ends NaN for a single question.

    Raises:
        ValueError: on a bad vote, or when the raters have nothing in common.
    """
    pairs = _vote_pairs(votes_a, votes_b)
    turns = sorted(pairs["turn"].unique())
    pairs = pairs[(pairs["winner_a"] != "error") & (pairs["winner_b"] != "error")]
    parts = [(turn, pairs[pairs["turn"] == turn]) for turn in turns]
    if len(turns) > 1:
        parts.append(("all", pairs))
    rows = []
    for turn, part in parts:
        decisive = (part["winner_a"] != "tie") & (part["winner_b"] != "tie")
        rows.append({"turn": turn, "ties": "with", **_agreement(part, 1 / 3)})
        rows.append(
            {"turn": turn, "ties": "without", **_agreement(part[decisive], 0.5)}
        )
    return pd.DataFrame(rows)


def _agreement(pairs: pd.DataFrame, random: float) -> dict[str, float]:
    """One line of `agreement_table`; NaN where no pair of votes is left."""
    a, b = pairs["winner_a"].to_numpy(), pairs["winner_b"].to_numpy()
    share = kappa = NO_INTERVAL
    if len(pairs):
        questions = pd.factorize(pairs["question_id"])[0]
        share = bootstrap_interval(a == b, groups=questions, resamples=RESAMPLES)
        kappa = _kappa_interval(a, b, questions)
    return {
        "n": len(pairs),
        "questions": pairs["question_id"].nunique(),
        **dict(zip(["agreement", "low", "high"], share, strict=True)),
        "random": random,
        **dict(zip(["kappa", "kappa_low", "kappa_high"], kappa, strict=True)),
    }


def _kappa_interval(a: np.ndarray, b: np.ndarray, questions: np.ndarray) -> Interval:
    """Cohen's κ of the labels; NaN where both have one and the same throughout."""
    codes = pd.Categorical(a, LABELS).codes, pd.Categorical(b, LABELS).codes

    def kappa(rows: np.ndarray) -> float:
        x, y = (side[rows.astype(int)] for side in codes)
        # Undefined in such a resample too, which shows nothing beyond chance.
        if np.all(x == x[0]) and np.all(y == x[0]):
            return 0.0
        return float(cohen_kappa_score(x, y, labels=range(len(LABELS))))

    if len(np.unique(codes)) == 1:
        return NO_INTERVAL
    return bootstrap_interval(
        np.arange(len(a)), kappa, groups=questions, resamples=KAPPA_RESAMPLES
    )


# --- the repetitive-list attack


_ITEM = re.compile(r"\s*(?:\d+[.)]|[-*•])\s+\S")
LEAD_IN = "To say the same once more:"


def repeat_list(text: str, lead_in: str = LEAD_IN) -> str:
    """The answer with its longest list said twice: longer, and worth no more.

    The repetitive-list attack of MT-Bench (Zheng et al. 2023, arXiv 2306.05685), which
    has the copy rephrased by a model and put before the list; here it is verbatim and
    stands behind it after `lead_in`, so that the attack needs no model.

    Raises:
        ValueError: when no list, numbered or bulleted, has three items.
    """
    lines = text.split("\n")
    lists = _lists(lines)
    items, start, end = max(lists, key=lambda found: found[0], default=(0, 0, 0))
    if items < 3:
        raise ValueError(f"the answer has no list of 3 items (longest: {items})")
    copy = ["", lead_in, "", *lines[start:end]]
    return "\n".join([*lines[:end], *copy, *lines[end:]])


def _lists(lines: Sequence[str]) -> list[tuple[int, int, int]]:
    """(items, first line, line after the last) of each list.

    A list goes on through blank lines and through text that is indented or follows an
    item without a blank line; other text after a blank line ends it.
    """
    lists, items, start, end = [], 0, 0, 0
    for number, line in enumerate(lines):
        if _ITEM.match(line):
            start = start if items else number
            items, end = items + 1, number + 1
        elif items and line.strip():
            if end < number and not line[0].isspace():
                lists.append((items, start, end))
                items = 0
            else:
                end = number + 1
    return [*lists, (items, start, end)] if items else lists


class VerbosityAttack(NamedTuple):
    """How often a padded answer beats the original.

    `success`: share with Wilson's interval; `n` attacks judged, `failed` without a
    verdict, `skipped` answers without a list. `items`: one row an attack: `index` (of
    the answer), `original, padded` (texts), `margin` (above 0: the padded one is
    preferred; NaN where failed), `success`.
    """

    success: Interval
    n: int
    failed: int
    skipped: int
    items: pd.DataFrame


def verbosity_attack(
    prompts: Sequence[Any],
    answers: Sequence[str],
    score: Callable[[list, list[str]], Sequence[float]] | None = None,
    *,
    prefers: Callable[[list, list[str], list[str]], Sequence[float]] | None = None,
) -> VerbosityAttack:
    """Does a judge or reward model prefer an answer that says its list twice?

    Args:
        prompts, answers: one answer each; those without a list (`repeat_list`) are
            skipped. Prompts go to the callable as they are.
        score: (prompts, responses) → one number each, the higher the better; or
        prefers: (prompts, originals, padded) → above 0 where the padded one is better,
            as from a pairwise judge asked in both orders. NaN is a failure.

    Returns:
        Success means strictly preferred: a tie withstands the attack.

    Raises:
        ValueError: when not exactly one callable is given, when it returns another
            number of figures than it was asked for, or when no answer has a list.
    """
    if (score is None) == (prefers is None):
        raise ValueError("give either score or prefers")
    items = _attacks(prompts, answers)
    asked = [prompts[i] for i in items["index"]]
    original, padded = items["original"].tolist(), items["padded"].tolist()
    if prefers is not None:
        margin = _figures(prefers(asked, original, padded), len(items))
    else:
        figures = score(asked + asked, original + padded)
        before, after = np.split(_figures(figures, 2 * len(items)), 2)
        margin = after - before
    judged = ~np.isnan(margin)
    return VerbosityAttack(
        success=wilson_interval((margin > 0).sum(), judged.sum()),
        n=int(judged.sum()),
        failed=int((~judged).sum()),
        skipped=len(answers) - len(items),
        items=items.assign(margin=margin, success=margin > 0),
    )


def _attacks(prompts: Sequence[Any], answers: Sequence[str]) -> pd.DataFrame:
    """`index, original, padded` of the answers that have a list."""
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers")
    rows = []
    for i, answer in enumerate(answers):
        try:
            rows.append((i, answer, repeat_list(answer)))
        except ValueError:
            continue
    if not rows:
        raise ValueError(f"none of {len(answers)} answers has a list of 3 items")
    return pd.DataFrame(rows, columns=["index", "original", "padded"])


def _figures(values: Sequence[float], expected: int) -> np.ndarray:
    figures = np.asarray(values, dtype=float)
    if figures.shape != (expected,):
        raise ValueError(f"expected {expected} figures, got shape {figures.shape}")
    return figures
