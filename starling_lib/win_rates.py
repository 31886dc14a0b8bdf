"""Who wins, how surely, and is it the position or the length that won?

Games are pairwise verdicts, one row each: `question_id, model_a, model_b, winner`
("model_a", "model_b", "tie" or "error") and `order` (0: model_a stood first, 1: model_b
did). Columns `turn`, `judge` and `pass`, where there are any, tell the games of one
question apart. Annotations are those of AlpacaEval.

Knows verdicts, preferences and lengths as numbers. Does not know how a judge is asked.
The independent observation is the question (the instruction): every interval is at
95 % and resamples whole questions.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse, stats
from scipy.sparse.csgraph import connected_components
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from starling_lib.statistics import Interval, bootstrap_interval

Table = pd.DataFrame | Iterable[Mapping[str, Any]]
RESAMPLES = 1000
REFITS = 500  # resamples that each take a fit
EXTRA = ("turn", "judge", "pass")  # what else may tell two games apart
OTHER_SIDE = {"model_a": "model_b", "model_b": "model_a"}
NO_INTERVAL = Interval(np.nan, np.nan, np.nan)


# --- games


def sort_sides(verdicts: Table) -> pd.DataFrame:
    """The same verdicts with model_a < model_b by name; `winner`, `order` turned along.

    Whoever wrote a row may have named the two models either way round.

    Raises:
        ValueError: naming the missing column, or the first row with an unknown winner or
            a model that plays itself.
    """
    frame = pd.DataFrame(verdicts).reset_index(drop=True)
    needed = ["question_id", "model_a", "model_b", "winner"]
    if missing := [name for name in needed if name not in frame]:
        raise ValueError(f"verdicts without the column {missing[0]!r}")
    unknown = ~frame["winner"].isin([*OTHER_SIDE, "tie", "error"])
    if unknown.any():
        row = int(unknown.idxmax())
        raise ValueError(
            f"row {row}: winner {frame['winner'][row]!r} is none of model_a, model_b, "
            "tie, error"
        )
    if (same := frame["model_a"] == frame["model_b"]).any():
        row = int(same.idxmax())
        raise ValueError(f"row {row}: {frame['model_a'][row]!r} plays itself")
    turned = frame["model_a"] > frame["model_b"]
    names = frame.loc[turned, ["model_b", "model_a"]].to_numpy()
    frame.loc[turned, ["model_a", "model_b"]] = names
    frame.loc[turned, "winner"] = frame.loc[turned, "winner"].replace(OTHER_SIDE)
    if "order" in frame:
        frame.loc[turned, "order"] = 1 - frame.loc[turned, "order"]
    return frame


def _games(games: Table) -> tuple[pd.DataFrame, list[str]]:
    """Sorted games and the columns that name a pair of answers.

    Raises ValueError where `order` is not 0 or 1, or one order was judged twice.
    """
    frame = sort_sides(games)
    if "order" not in frame or not frame["order"].isin([0, 1]).all():
        raise ValueError("games need a column 'order' of 0 (model_a first) and 1")
    extra = [name for name in EXTRA if name in frame]
    keys = ["question_id", *extra, "model_a", "model_b"]
    repeated = frame.duplicated([*keys, "order"])
    if repeated.any():
        row = frame.loc[repeated, [*keys, "order"]].iloc[0].to_dict()
        raise ValueError(
            f"judged twice: {row}; number repeated judgments in a column 'pass'"
        )
    return frame, keys


def games_from_judgments(judgments: Table) -> pd.DataFrame:
    """Two games a row of FastChat's pairwise judgments: model_1 first, then model_2.

    Args:
        judgments: rows of `question_id, model_1, model_2, g1_winner, g2_winner`
            ("model_1", "model_2", "tie", "error") and perhaps `turn`, `judge`, `pass`.

    Raises:
        ValueError: naming a missing column, or a winner of another name.
    """
    frame = pd.DataFrame(judgments)
    for name in ("model_1", "model_2", "g1_winner", "g2_winner"):
        if name not in frame:
            raise ValueError(f"pairwise judgments without the column {name!r}")
    names = {"model_1": "model_a", "model_2": "model_b"}
    games = []
    for order, column in enumerate(("g1_winner", "g2_winner")):
        winner = frame[column].replace(names)
        games.append(frame.rename(columns=names).assign(winner=winner, order=order))
    columns = ["question_id", *EXTRA, "model_a", "model_b", "winner", "order"]
    both = pd.concat(games, ignore_index=True)
    return sort_sides(both[[name for name in columns if name in both]])


def resolve_swaps(games: Table) -> pd.DataFrame:
    """One verdict for each pair of answers, from the games in both orders.

    Both orders agree: that; they conflict: a tie; either failed: an error (FastChat's
    rule). A pair judged in one order only keeps its verdict.

    Returns:
        The columns that name the pair (model_a < model_b), `winner`, and `orders`: how
        many it was judged in.

    Raises:
        ValueError: on a bad game, or two games of one pair in one order.
    """
    frame, keys = _games(games)
    winners = frame.groupby(keys, dropna=False)["winner"]
    resolved = winners.agg(_one_verdict).reset_index()
    return resolved.assign(orders=winners.size().to_numpy())


def _one_verdict(winners: pd.Series) -> str:
    verdicts = set(winners)
    if "error" in verdicts:
        return "error"
    return verdicts.pop() if len(verdicts) == 1 else "tie"


def _sides(resolved: pd.DataFrame) -> pd.DataFrame:
    """Two rows a verdict: `model`, its `other`, `points` (1, ½, 0; NaN for an error)."""
    halves = []
    for side, other in OTHER_SIDE.items():
        points = resolved["winner"].map({side: 1.0, "tie": 0.5, other: 0.0})
        columns = {"model": resolved[side], "other": resolved[other], "points": points}
        halves.append(pd.DataFrame({"question_id": resolved["question_id"], **columns}))
    return pd.concat(halves, ignore_index=True)


def pairwise_table(games: Table, baseline: str | None = None) -> pd.DataFrame:
    """Wins, ties and losses of every model, best first, swaps resolved.

    Args:
        games: in one order or both (`resolve_swaps`).
        baseline: count only games against this model, and leave it out.

    Returns:
        Index `model`; `n` (verdicts), `win, tie, loss`, `error` (left out of `n`),
        `win_rate` = win / n, `loss_rate` = loss / n and `adjusted_win_rate` = (win +
        tie/2) / n as in FastChat's `show_result`, each with `_low` and `_high` over
        questions (NaN for one).

    Raises:
        ValueError: without games, on a bad game, games of several judges, or a baseline
            that played no game.
    """
    games = pd.DataFrame(games)
    if games.empty:
        raise ValueError("no games: they take two models judged on the same question")
    if "judge" in games and games["judge"].nunique() > 1:
        names = ", ".join(sorted(games["judge"].unique()))
        raise ValueError(f"games of several judges ({names}): choose those of one")
    sides = _sides(resolve_swaps(games))
    if baseline is not None:
        if baseline not in set(sides["model"]):
            names = ", ".join(sorted(sides["model"].unique()))
            raise ValueError(f"baseline {baseline!r} played no game; models: {names}")
        sides = sides[sides["other"] == baseline]
    rows = {model: _record(part) for model, part in sides.groupby("model")}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    return table.sort_values("adjusted_win_rate", ascending=False, kind="stable")


def _record(side: pd.DataFrame) -> dict[str, float]:
    """One line of `pairwise_table`."""
    judged = side.dropna(subset="points")
    points = judged["points"]
    record = {"n": len(judged)}
    for name, value in (("win", 1), ("tie", 0.5), ("loss", 0)):
        record[name] = int((points == value).sum())
    record["error"] = len(side) - len(judged)
    rates = {"win": points == 1, "loss": points == 0, "adjusted_win": points}
    for rate, values in rates.items():
        name = f"{rate}_rate"
        estimate, low, high = _mean(values, judged["question_id"])
        record |= {name: estimate, f"{name}_low": low, f"{name}_high": high}
    return record


def _mean(values: pd.Series, questions: pd.Series) -> Interval:
    """Mean with its interval over questions; all NaN when there is nothing."""
    if values.empty:
        return NO_INTERVAL
    groups = pd.factorize(questions, sort=True)[0]
    return bootstrap_interval(values, groups=groups, resamples=RESAMPLES)


# --- position


class PositionBias(NamedTuple):
    """Questions that leaned to the first and to the second place, and the p-value."""

    first: int
    second: int
    p_value: float


def _leans(games: Table) -> pd.DataFrame:
    """Each pair judged in both orders: `question_id` and `lean`, NaN for an error.

    A game won by the answer shown first counts +1, by the second −1, a tie 0. Verdicts
    that do not depend on the order add up to 0.
    """
    frame, keys = _games(games)
    first = np.where(frame["order"] == 0, "model_a", "model_b")
    lean = np.where(frame["winner"] == first, 1.0, -1.0)
    lean[frame["winner"] == "tie"] = 0
    lean[frame["winner"] == "error"] = np.nan
    groups = frame.assign(lean=lean).groupby(keys, dropna=False)["lean"]
    pairs = groups.agg(["sum", "size", "count"]).reset_index()
    pairs = pairs[pairs["size"] == 2]
    if pairs.empty:
        raise ValueError("no pair of answers was judged in both orders")
    lean = pairs["sum"].where(pairs["count"] == 2)
    return pd.DataFrame({"question_id": pairs["question_id"], "lean": lean})


def swap_consistency(games: Table) -> pd.DataFrame:
    """What swapping the two answers does to a judge's verdict.

    As in Zheng et al. 2023 (arXiv 2306.05685, "position bias"): of the pairs judged in
    both orders, the share with the same verdict (`consistent`), with verdicts that
    favour whatever stands `first` or `second`, and with a failed judgment (`error`). A
    win in one order and a tie in the other favours the place that won.

    Returns:
        Index `outcome` (those four), columns `n, share, low, high`; the intervals are
        over questions (NaN for a single one).

    Raises:
        ValueError: on a bad game, or when no pair was judged in both orders.
    """
    pairs = _leans(games)
    outcomes = {
        "consistent": pairs["lean"] == 0,
        "first": pairs["lean"] > 0,
        "second": pairs["lean"] < 0,
        "error": pairs["lean"].isna(),
    }
    rows = {}
    for name, hit in outcomes.items():
        share, low, high = _mean(hit, pairs["question_id"])
        rows[name] = {"n": int(hit.sum()), "share": share, "low": low, "high": high}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("outcome")


def position_bias_test(games: Table, alternative: str = "greater") -> PositionBias:
    """Exact sign test that a judge favours the first place no more than the second.

    Consistent pairs say nothing about it. A question counts once, by the sum over its
    pairs and turns, since these are not independent.

    Args:
        alternative: "greater" (is the first place favoured?), "less" or "two-sided".

    Raises:
        ValueError: on a bad game, or when no pair was judged in both orders.
    """
    leans = _leans(games).dropna().groupby("question_id")["lean"].sum()
    first, second = int((leans > 0).sum()), int((leans < 0).sum())
    if first + second == 0:
        return PositionBias(0, 0, 1.0)
    test = stats.binomtest(first, first + second, alternative=alternative)
    return PositionBias(first, second, float(test.pvalue))


# --- ratings


def bradley_terry(games: Table, virtual_ties: float = 0.0) -> pd.DataFrame:
    """Bradley-Terry ratings of many models, best first, with intervals over questions.

    P(i beats j) = σ(strength_i − strength_j), by maximum likelihood: a logistic
    regression (Bradley & Terry 1952). A tie is half a win for each; failed games are
    left out. Pass both orders as they are: a conflict then counts as a tie.

    Args:
        virtual_ties: ties added to each pair of models that met. Above 0 it keeps the
            strength of a model finite that never lost.

    Returns:
        `model, games, strength, strength_low, strength_high` (log odds, mean 0), and
        the same on Elo's scale, `rating, rating_low, rating_high` = 1000 + 400/ln 10 ·
        strength. An end is infinite where too many resamples have no finite fit, and
        NaN for a single question.

    Raises:
        ValueError: naming the models that no chain of games links to the others, or
            those that never lost (won) against the others, without virtual ties.
    """
    sides = _sides(sort_sides(games)).dropna(subset="points")
    if sides.empty:
        raise ValueError("no game with a verdict")
    names, codes = np.unique(
        sides[["model", "other"]].to_numpy(str), return_inverse=True
    )
    codes, count = codes.reshape(-1, 2), len(names)
    question = pd.factorize(sides["question_id"], sort=True)[0]
    # One row a question, so that a resample's table of wins is a weighted sum of rows.
    points = sides["points"].to_numpy(), (question, codes @ [count, 1])
    wins = sparse.coo_array(points, (question.max() + 1, count**2)).tocsr()
    total = wins.sum(axis=0).reshape(count, count)
    _check_comparable(total, names, virtual_ties)
    strength = _strengths(total, virtual_ties)
    low, high = _strength_ends(wins, count, virtual_ties)
    frame = pd.DataFrame({"model": names, "games": np.bincount(codes[:, 0])})
    for name, values in (("", strength), ("_low", low), ("_high", high)):
        frame[f"strength{name}"] = values
    for name in ("", "_low", "_high"):
        frame[f"rating{name}"] = 1000 + 400 / np.log(10) * frame[f"strength{name}"]
    return frame.sort_values(["strength", "model"], ascending=False, ignore_index=True)


def win_probabilities(ratings: pd.DataFrame) -> pd.DataFrame:
    """P(the row's model beats the column's) by the strengths of `bradley_terry`."""
    strength = ratings["strength"].to_numpy()
    names = ratings["model"].tolist()
    table = pd.DataFrame(expit(strength[:, None] - strength), names, names)
    return table.rename_axis(index="model", columns="other")


def _check_comparable(wins: np.ndarray, names: np.ndarray, virtual_ties: float) -> None:
    """Raise ValueError when the ratings are not determined, or not finite."""
    groups, label = connected_components(wins, connection="weak")
    if groups > 1:
        parts = [", ".join(names[label == group]) for group in range(groups)]
        raise ValueError(f"never compared, not even in a chain: {' | '.join(parts)}")
    unbeaten = names[_limits(wins) == np.inf]
    if len(unbeaten) and virtual_ties <= 0:
        raise ValueError(
            f"{', '.join(unbeaten)} never lost against the other models, so no finite "
            "strength fits; pass virtual_ties=1, say"
        )


def _limits(wins: np.ndarray) -> np.ndarray:
    """(M,) 0 where a finite strength fits, else ∞, −∞, or NaN for not determined.

    Finite strengths fit where every model has beaten every other, if only in a chain.
    Else there are groups between which all games went one way, or none was played.
    """
    groups, label = connected_components(wins, connection="strong")
    if groups == 1:
        return np.zeros(len(wins))
    member = np.eye(groups)[label]
    between = member.T @ wins @ member * (1 - np.eye(groups))
    won, lost = between.any(axis=1), between.any(axis=0)
    return np.select([won & ~lost, lost & ~won], [np.inf, -np.inf], np.nan)[label]


def _strengths(wins: np.ndarray, virtual_ties: float) -> np.ndarray:
    """(M,) strengths, mean 0, from wins (M, M) of row over column; or their `_limits`."""
    met = (wins + wins.T) > 0
    wins = wins + virtual_ties / 2 * met
    if (limits := _limits(wins)).any():
        return limits
    i, j = np.nonzero(np.triu(met))
    players = np.eye(len(wins))
    # Differences alone are determined: the first model stands at 0 until the end.
    design = (players[i] - players[j])[:, 1:]
    played = wins[i, j] + wins[j, i]
    strength = np.append(0, _logistic(design, wins[i, j] / played, played, penalty=0))
    return strength - strength.mean()


def _strength_ends(
    wins: sparse.csr_array, count: int, virtual_ties: float
) -> tuple[np.ndarray, np.ndarray]:
    """Ends (M,) of the percentile intervals from resampled questions."""
    questions = wins.shape[0]
    if questions < 2:
        return np.full(count, np.nan), np.full(count, np.nan)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(questions, np.full(questions, 1 / questions), REFITS)
    tables = (drawn @ wins).reshape(REFITS, count, count)
    fits = np.array([_strengths(table, virtual_ties) for table in tables])
    # Where a resample determines nothing, the worst is assumed at either end. And no
    # interpolation: between a finite fit and ∞ it would give ∞ or nothing.
    low = np.where(np.isnan(fits), -np.inf, fits)
    high = np.where(np.isnan(fits), np.inf, fits)
    return (
        np.quantile(low, 0.025, axis=0, method="lower"),
        np.quantile(high, 0.975, axis=0, method="higher"),
    )


def _logistic(
    design: np.ndarray | sparse.sparray,
    share: np.ndarray,
    weight: np.ndarray,
    penalty: float,
) -> np.ndarray:
    """(F,) coefficients of a logistic regression on shares in [0, 1], no intercept.

    A share y is a row of label 1 and weight y, and one of label 0 and weight 1 − y.
    Minimises Σ weight · NLL + penalty/2 · |coefficients|².
    """
    stack = sparse.vstack if sparse.issparse(design) else np.vstack
    model = LogisticRegression(
        C=1 / penalty if penalty else np.inf,
        fit_intercept=False,
        # Exact in a few steps where the Hessian is small and dense.
        solver="lbfgs" if sparse.issparse(design) else "newton-cholesky",
        tol=1e-8,
        max_iter=1000,
    )
    label = np.repeat([1, 0], len(share))
    weights = np.append(weight * share, weight * (1 - share))
    return model.fit(stack([design, design]), label, weights).coef_[0]


# --- AlpacaEval


@dataclasses.dataclass(frozen=True)
class AlpacaEvalResult:
    """A model against a baseline; rates and their ends in per cent.

    `length_effect`: log odds that a much longer output gains (the coefficient of tanh of
    the standardised difference in characters, model − baseline). `length`,
    `baseline_length`: mean characters. `n`: instructions judged, `failed`: without a
    preference. `note` says what the length-controlled figure is not.
    """

    model: str
    baseline: str
    win_rate: float
    standard_error: float
    win_rate_low: float
    win_rate_high: float
    length_controlled_win_rate: float
    length_controlled_low: float
    length_controlled_high: float
    length_effect: float
    length: float
    baseline_length: float
    n: int
    failed: int
    note: str


class WinRate(NamedTuple):
    """AlpacaEval's win rate in per cent, ties half, with what it was counted from."""

    win_rate: float
    standard_error: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    n: int
    failed: int


def read_annotations(source: str | Path | Table) -> pd.DataFrame:
    """AlpacaEval's annotations, checked: a JSON file, a frame, or a list of dicts.

    Each has `instruction, output_1, output_2, generator_1` (the baseline), `generator_2`
    and `preference`: 1 where the first output is better, 2 where the second, anything
    between for a weighted preference, null where the annotator failed. 0 stands for a
    tie in older files and becomes 1.5.

    Raises:
        ValueError: naming the field, or the first annotation that is out of range or has
            a preference without two outputs.
    """
    if isinstance(source, str | Path):
        source = json.loads(Path(source).read_text(encoding="utf-8"))
    frame = pd.DataFrame(source).reset_index(drop=True)
    outputs = ["output_1", "output_2"]
    fields = ["instruction", *outputs, "generator_1", "generator_2", "preference"]
    if missing := [name for name in fields if name not in frame]:
        raise ValueError(f"annotations without the field {missing[0]!r}")
    preference = pd.to_numeric(frame["preference"], errors="coerce").replace(0, 1.5)
    unreadable = preference.isna() & frame["preference"].notna()
    wrong = unreadable | (preference.notna() & ~preference.between(1, 2))
    if wrong.any():
        row = int(wrong.idxmax())
        raise ValueError(
            f"annotation {row}: preference {frame['preference'][row]}, expected 1 (first "
            "better) to 2 (second better) or null"
        )
    texts = frame[outputs].map(lambda text: isinstance(text, str)).all(axis=1)
    if (lacking := preference.notna() & ~texts).any():
        row = int(lacking.idxmax())
        raise ValueError(f"annotation {row}: a preference without two outputs")
    return frame.assign(preference=preference)


def win_rate_of_annotations(annotations: str | Path | Table) -> WinRate:
    """Mean of preference − 1 in per cent: how often the second output wins.

    The standard error is that of the mean, as on AlpacaEval's leaderboard; the interval
    resamples instructions. Annotations without a preference are counted in `failed`.

    Raises:
        ValueError: on a bad annotation, or when none has a preference.
    """
    return _win_rate(read_annotations(annotations))


def _win_rate(frame: pd.DataFrame) -> WinRate:
    judged = frame.dropna(subset="preference")
    if judged.empty:
        raise ValueError(f"{len(frame)} annotations, none with a preference")
    share = judged["preference"] - 1
    estimate, low, high = _mean(100 * share, judged["instruction"])
    return WinRate(
        win_rate=estimate,
        standard_error=float(100 * share.sem()),
        low=low,
        high=high,
        wins=int((share > 0.5).sum()),
        ties=int((share == 0.5).sum()),
        losses=int((share < 0.5).sum()),
        n=len(judged),
        failed=len(frame) - len(judged),
    )


def length_controlled_win_rate(
    annotations: str | Path | Table, difficulty: Mapping[str, float] | None = None
) -> AlpacaEvalResult:
    """The win rate that outputs as long as the baseline's would have had.

    AlpacaEval 2's model (Dubois et al. 2024, arXiv 2404.04475): logit P(win) = θ + φ ·
    tanh(Δ/sd(Δ)) + ψ · γ, with Δ the difference in characters and γ the instruction's
    difficulty; then the mean prediction at Δ = 0. Ours differs in three ways: γ is there
    only where `difficulty` gives it, no annotations of a verbose and a terse baseline
    are mixed in, and a slight L2 penalty stands for a cross-validated L1 one.

    Args:
        annotations: of one model against one baseline.
        difficulty: γ by instruction, as from `instruction_difficulty`; taken as known by
            the interval.

    Raises:
        ValueError: on a bad annotation, several models or baselines, an instruction
            without a difficulty, or when none has a preference.
    """
    frame = read_annotations(annotations)
    baseline, model = (_only(frame, f"generator_{side}") for side in (1, 2))
    raw = _win_rate(frame)
    judged = frame.dropna(subset="preference")
    lengths = [judged[f"output_{side}"].str.len().to_numpy(float) for side in (1, 2)]
    delta = lengths[1] - lengths[0]
    columns = [judged["preference"].to_numpy(float) - 1, delta]
    if difficulty is not None:
        columns.append(_difficulties(judged["instruction"], difficulty))
    data = np.column_stack(columns)
    rate, low, high = bootstrap_interval(
        np.arange(len(data)),
        lambda rows: _length_control(data[rows.astype(int)])[0],
        groups=pd.factorize(judged["instruction"], sort=True)[0],
        resamples=REFITS,
    )
    return AlpacaEvalResult(
        model=model,
        baseline=baseline,
        win_rate=raw.win_rate,
        standard_error=raw.standard_error,
        win_rate_low=raw.low,
        win_rate_high=raw.high,
        length_controlled_win_rate=rate,
        length_controlled_low=low,
        length_controlled_high=high,
        length_effect=_length_control(data)[1],
        length=float(lengths[1].mean()),
        baseline_length=float(lengths[0].mean()),
        n=raw.n,
        failed=raw.failed,
        note=_note(delta, difficulty is not None),
    )


def _only(frame: pd.DataFrame, column: str) -> str:
    names = sorted(frame[column].unique())
    if len(names) != 1:
        raise ValueError(
            f"{column} has {len(names)} names ({', '.join(map(str, names))}), expected "
            "one model against one baseline; see alpaca_eval_table"
        )
    return names[0]


def _difficulties(
    instructions: pd.Series, difficulty: Mapping[str, float]
) -> np.ndarray:
    values = instructions.map(dict(difficulty))
    if values.isna().any():
        raise ValueError(f"no difficulty for {instructions[values.isna()].iloc[0]!r}")
    return values.to_numpy(float)


def _tanh_lengths(delta: np.ndarray) -> np.ndarray:
    """tanh of the differences over their standard deviation; zeros where all are equal.

    Not centred: 0 must go on meaning "as long as the baseline's".
    """
    spread = delta.std(ddof=1) if len(delta) > 1 else 0
    return np.tanh(delta / spread) if spread > 0 else np.zeros(len(delta))


# Keeps a model's term finite where every preference is 1 or every one 2; of 800
# preferences it moves a win rate by less than a hundredth of a point.
_SLIGHT = 1e-4


def _length_control(data: np.ndarray) -> tuple[float, float]:
    """Length-controlled win rate in per cent and φ, from columns y, Δ and perhaps γ."""
    share, delta, difficulty = data[:, 0], data[:, 1], data[:, 2:]
    ones = np.ones(len(data))
    design = np.column_stack([_tanh_lengths(delta), ones, difficulty])
    coefficients = _logistic(design, share, ones, _SLIGHT)
    at_equal_length = expit(design[:, 1:] @ coefficients[1:])
    return float(100 * at_equal_length.mean()), float(coefficients[0])


def _note(delta: np.ndarray, difficulty: bool) -> str:
    source = "estimated here" if difficulty else "left out"
    note = (
        "Not the leaderboard's figure: its difficulties of the instructions are not "
        f"public ({source}), nor are its outputs of gamed baselines used."
    )
    if (delta > 0).all() or (delta < 0).all():
        way = "longer" if delta[0] > 0 else "shorter"
        note += f" All outputs are {way} than the baseline's: equal length is a guess."
    return note


def instruction_difficulty(annotations: str | Path | Table) -> pd.Series:
    """γ by instruction, from the annotations of one model or, better, of many.

    One logistic regression with a term and a length effect for every model and one γ
    for every instruction, which the models share; γ is drawn to 0 as by a normal prior
    of standard deviation 2. Positive: models beat the baseline more often on it. Do not
    judge a model by difficulties that its own annotations went into, unless they are
    few among many: γ would explain what its answer did.

    Raises:
        ValueError: on a bad annotation, or when none has a preference.
    """
    frame = read_annotations(annotations).dropna(subset="preference")
    if frame.empty:
        raise ValueError("no annotation has a preference")
    models = pd.get_dummies(frame["generator_2"], dtype=float)
    lengths = frame["output_2"].str.len() - frame["output_1"].str.len()
    tanh = lengths.astype(float).groupby(frame["generator_2"])
    tanh = tanh.transform(lambda delta: _tanh_lengths(delta.to_numpy()))
    codes, names = pd.factorize(frame["instruction"], sort=True)
    own = np.column_stack([models, models.mul(tanh, axis=0)])
    # The penalty meets a coefficient times its column's scale: 100 all but frees it.
    shared = sparse.eye_array(len(names), format="csr")[codes]
    design = sparse.hstack([sparse.csr_array(100 * own), shared], format="csr")
    share = frame["preference"].to_numpy() - 1
    coefficients = _logistic(design, share, np.ones(len(frame)), penalty=1 / 4)
    return pd.Series(coefficients[own.shape[1] :], names, name="difficulty")


def alpaca_eval_table(annotations: str | Path | Table) -> pd.DataFrame:
    """One line of `length_controlled_win_rate` a model (`generator_2`), best first.

    Where there are several models, each is judged given the difficulties that the
    others met (0 for an instruction that no other answered); a single one without.

    Raises:
        ValueError: as `length_controlled_win_rate` does.
    """
    frame = read_annotations(annotations)
    rows = []
    for model, own in frame.groupby("generator_2"):
        others = frame[frame["generator_2"] != model]
        difficulty = None
        if not others.empty:
            met = instruction_difficulty(others)
            difficulty = met.reindex(
                own["instruction"].unique(), fill_value=0
            ).to_dict()
        rows.append(dataclasses.asdict(length_controlled_win_rate(own, difficulty)))
    table = pd.DataFrame(rows).set_index("model")
    return table.sort_values("length_controlled_win_rate", ascending=False)
