"""What to ask of rankings before they are trusted: the judge, the answers, the set.

Is the judge fair to every position, does it agree with itself, is it fooled by length?
Which model wins, and how surely? Which answers and prompts occur twice, and what would
a limit of tokens cut off?

Knows tables of rankings (rows with the columns of `rankings.RANKING_FEATURES`, as a
`datasets.Dataset` or a list of dicts) and judgments (lists of positions or items, best
first). Does not know files, models or training. Prompts, not pairs, are the
independent observations: intervals are at 95 % and, unless a docstring says otherwise,
from resampling whole prompts (rows of one `id`).
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from datasketch import MinHash, MinHashLSH
from scipy import optimize, sparse, special, stats
from tqdm.auto import tqdm

from starling_lib.statistics import Interval, bootstrap_interval, wilson_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Table = Iterable[Mapping[str, Any]]
Prompt = str | Sequence[Mapping[str, str]]
RESAMPLES = 1000
_ENDS = ["low", "high"]


# --- intervals over prompts


def _mean(values: Sequence[float], prompts: Sequence[int]) -> Interval:
    """Mean of `values` with its interval over prompts; all NaN when there are none."""
    if len(values) == 0:
        return Interval(np.nan, np.nan, np.nan)
    codes = np.unique(prompts, return_inverse=True)[1]
    sums, sizes = np.bincount(codes, values), np.bincount(codes)

    # The same draws as resampling the values in whole groups, but from sums: 21 pairs
    # of a prompt cost what one value does.
    def ratio(drawn: np.ndarray) -> float:
        drawn = drawn.astype(int)
        return sums[drawn].sum() / sizes[drawn].sum()

    return bootstrap_interval(np.arange(len(sizes)), ratio, resamples=RESAMPLES)


def _means(frame: pd.DataFrame, by: str, value: str) -> pd.DataFrame:
    """`estimate, low, high` of the mean of a column within each group of `by`."""
    groups = frame.groupby(by)
    bar = _progress(groups, f"intervals of {value}", len(frame) < 30_000)
    rows = {name: _mean(part[value], part["prompt"]) for name, part in bar}
    return pd.DataFrame.from_dict(rows, orient="index", columns=Interval._fields)


def _progress(items: Iterable, name: str, quiet: bool, total: int | None = None):
    return tqdm(items, name, total, leave=False, disable=quiet)


def _pseudo_values(
    estimate: np.ndarray, scores: np.ndarray, hessian: np.ndarray
) -> np.ndarray:
    """(G, F) values whose mean over a resample of prompts is that resample's estimate.

    To first order: one Newton step from `estimate` (F,), where `scores` (G, F) are each
    prompt's gradients of the log-likelihood and `hessian` (F, F) the information. It
    spares a fit a resample (Davidson & MacKinnon, 1999).
    """
    influence = np.linalg.solve(hessian, (scores - scores.mean(axis=0)).T).T
    return estimate + len(scores) * influence


# --- the judge: positions


class PositionTest(NamedTuple):
    """χ² statistics and p-values of "the position shown does not matter"."""

    first_chi2: float
    first_p: float
    rank_chi2: float
    rank_p: float


def display_orders(
    displays: Sequence[Sequence[int]], rankings: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Display positions best first, from the items shown and the items ranked.

    `displays[i]` lists the items in the order shown, `rankings[i]` the same items best
    first, as a judge's log holds them. Raises ValueError when they are not the same.
    """
    _check_same_items(displays, rankings)
    pairs = zip(displays, rankings, strict=True)
    return [[list(shown).index(item) for item in ranked] for shown, ranked in pairs]


def position_bias(orders: Sequence[Sequence[int]]) -> pd.DataFrame:
    """First-place share and mean rank by the position in which a response was shown.

    `orders`: one list a judgment, display positions 0 to K−1, best first. Columns
    `position, n, first_share, first_low, first_high, mean_rank, rank_low, rank_high`;
    ranks go from 1 to K; a fair judge gives 1/K and (K+1)/2. Wilson's interval for the
    share, a bootstrap over judgments for the rank (NaN ends for a single judgment).
    Raises ValueError for no judgment, unequal K, or a list that is no order.
    """
    ranks = _position_ranks(orders)
    n, k = ranks.shape
    firsts = (ranks == 1).sum(axis=0)
    share = pd.DataFrame([wilson_interval(hits, n) for hits in firsts])
    rank = pd.DataFrame([bootstrap_interval(r, resamples=RESAMPLES) for r in ranks.T])
    share.columns = ["first_share", "first_low", "first_high"]
    rank.columns = ["mean_rank", "rank_low", "rank_high"]
    positions = pd.DataFrame({"position": range(k), "n": n})
    return pd.concat([positions, share, rank], axis=1)


def position_bias_by(
    orders: Sequence[Sequence[int]], variants: Sequence[str]
) -> pd.DataFrame:
    """`position_bias` of each judging variant, under a column `variant`.

    `variants` names each judgment's variant; they stand in the order of appearance.
    Raises ValueError as `position_bias` does, naming the variant, and on unequal
    lengths.
    """
    if len(orders) != len(variants) or len(orders) == 0:
        raise ValueError(
            f"need a variant for each judgment: got {len(orders)} judgments and "
            f"{len(variants)} variants"
        )
    groups: dict[str, list[Sequence[int]]] = {}
    for order, variant in zip(orders, variants, strict=True):
        groups.setdefault(variant, []).append(order)
    frames = []
    for variant, part in groups.items():
        try:
            frames.append(position_bias(part))
        except ValueError as error:
            raise ValueError(f"variant {variant!r}: {error}") from None
        frames[-1].insert(0, "variant", variant)
    return pd.concat(frames, ignore_index=True)


def position_test(orders: Sequence[Sequence[int]]) -> PositionTest:
    """Test first places against uniform (χ²) and the mean ranks (Friedman, 1937).

    Takes and refuses what `position_bias` does. A small p-value says that the judge
    favours a position, provided that responses were shown in random order.
    """
    ranks = _position_ranks(orders)
    first = stats.chisquare((ranks == 1).sum(axis=0))
    # Of two positions the first places say everything; Friedman's χ² is the same.
    rank = stats.friedmanchisquare(*ranks.T) if ranks.shape[1] > 2 else first
    figures = (first.statistic, first.pvalue, rank.statistic, rank.pvalue)
    return PositionTest(*map(float, figures))


def _position_ranks(orders: Sequence[Sequence[int]]) -> np.ndarray:
    """(judgments, K) rank from 1 of the response shown at each position."""
    if len(orders) == 0:
        raise ValueError("no judgments: need at least one list of display positions")
    k = len(orders[0])
    for i, order in enumerate(orders):
        if len(order) != k:
            raise ValueError(
                f"judgment {i} ranks {len(order)} responses, judgment 0 ranks {k}: "
                "pass judgments of one K at a time"
            )
        if k < 2 or sorted(order) != list(range(k)):
            raise ValueError(
                f"judgment {i}: {list(order)} is no order of display positions 0 to "
                f"K−1, two or more; use display_orders on a log of items"
            )
    return np.argsort(np.asarray(orders), axis=1) + 1


# --- the judge: repeats


class RepeatAgreement(NamedTuple):
    """How alike two passes of a judge are.

    `rows` has one line a ranking (`row, k, tau, same_best`); `by_gap` the share of
    pairs in the same order both times by their difference in rank in the first pass
    (`gap, pairs, same, low, high`).
    """

    n: int
    tau: Interval
    top1: Interval
    rows: pd.DataFrame
    by_gap: pd.DataFrame


def repeat_agreement(
    a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]
) -> RepeatAgreement:
    """Agreement of two passes over the same items, `a[i]` and `b[i]` both best first.

    `tau` is the mean of Kendall's τ over rankings with an interval over them, `top1`
    the share with the same best item and Wilson's interval. Raises ValueError when the
    passes differ in length, are empty, or row i does not rank the same items.
    """
    _check_same_items(a, b)
    pairs = _repeated_pairs(a, b)
    # Without ties, τ is the share of pairs in the same order minus the rest.
    tau = 2 * pairs.groupby("prompt")["same"].mean().to_numpy() - 1
    best = [one[0] == two[0] for one, two in zip(a, b, strict=True)]
    rows = {"row": range(len(a)), "k": [len(one) for one in a]}
    by_gap = _means(pairs, "gap", "same").set_axis(["same", "low", "high"], axis=1)
    by_gap.insert(0, "pairs", pairs["gap"].value_counts())
    return RepeatAgreement(
        n=len(a),
        tau=bootstrap_interval(tau, resamples=RESAMPLES),
        top1=wilson_interval(sum(best), len(best)),
        rows=pd.DataFrame({**rows, "tau": tau, "same_best": best}),
        by_gap=by_gap.rename_axis("gap").reset_index(),
    )


def _check_same_items(a: Sequence[Sequence], b: Sequence[Sequence]) -> None:
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"need two equally long, non-empty lists: {len(a)}, {len(b)}")
    for i, (one, two) in enumerate(zip(a, b, strict=True)):
        same = len(one) == len(two) and set(one) == set(two)
        if not same or len(set(one)) != len(one) or len(one) < 2:
            raise ValueError(
                f"row {i}: {list(one)} and {list(two)} do not order the same items, two "
                "or more, each once; pair the passes by prompt"
            )


def _repeated_pairs(a: Sequence[Sequence], b: Sequence[Sequence]) -> pd.DataFrame:
    """Every pair of each ranking: its `gap` in `a`, and if `b` has the `same` order."""
    places: dict[int, list[list[int]]] = {}
    rows: dict[int, list[int]] = {}
    for i, (one, two) in enumerate(zip(a, b, strict=True)):
        place = {item: j for j, item in enumerate(two)}
        places.setdefault(len(one), []).append([place[item] for item in one])
        rows.setdefault(len(one), []).append(i)
    parts = []
    for k, second in places.items():
        up, down = np.triu_indices(k, 1)
        same = np.asarray(second)[:, up] < np.asarray(second)[:, down]
        line = {"prompt": np.repeat(rows[k], len(up)), "same": same.ravel()}
        parts.append(pd.DataFrame({**line, "gap": np.tile(down - up, len(second))}))
    return pd.concat(parts, ignore_index=True)


# --- the table as one line a response, one line a pair


def _answers(table: Table) -> pd.DataFrame:
    """One line a response, best first in each `row`; `prompt` and `text` as codes."""
    rows = [_check_row(row, i) for i, row in enumerate(table)]
    if not rows:
        raise ValueError("the table of rankings has no rows")
    sizes = [len(row["responses"]) for row in rows]
    ids = np.array([str(row["id"]) for row in rows])
    texts = [text.strip() for row in rows for text in row["responses"]]
    flags = [row.get("finished") or [True] * len(row["responses"]) for row in rows]
    chain = itertools.chain.from_iterable
    frame = {
        "row": np.repeat(np.arange(len(rows)), sizes),
        "id": np.repeat(ids, sizes),
        # Sorted, so that the bootstrap's draws do not depend on the order of the rows.
        "prompt": np.repeat(np.unique(ids, return_inverse=True)[1], sizes),
        "rank": [float(rank) for row in rows for rank in row["ranks"]],
        "model": list(chain(row["models"] for row in rows)),
        "chars": [len(text) for row in rows for text in row["responses"]],
        "finished": list(chain(flags)),
        "text": pd.factorize(np.array(texts, dtype=object))[0],
    }
    frame = pd.DataFrame(frame)
    return frame.sort_values(["row", "rank"], kind="stable", ignore_index=True)


def _check_row(row: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    for field in ("id", "responses", "models", "ranks"):
        if row.get(field) is None:
            raise ValueError(
                f"row {index}: no field {field!r}; load the table with load_rankings"
            )
    fields = [
        "responses",
        "models",
        "ranks",
        *(["finished"] * bool(row.get("finished"))),
    ]
    sizes = [len(row[field]) for field in fields]
    if len(set(sizes)) != 1 or sizes[0] == 0:
        got = ", ".join(f"{n} {f}" for n, f in zip(sizes, fields, strict=True))
        raise ValueError(
            f"row {index} (id {row['id']!r}): {got}; give one of each for every response"
        )
    return row


def _pairs(answers: pd.DataFrame) -> pd.DataFrame:
    """Every pair that holds a preference, the columns of both as `…_won`, `…_lost`.

    As in `to_preference_pairs`, answers of equal rank or equal text hold none.
    """
    answers = answers.drop(columns="id")
    on, ends = ["row", "prompt"], ("_won", "_lost")
    pairs = answers.merge(answers, on=on, suffixes=ends)
    pairs = pairs[pairs.rank_won < pairs.rank_lost]
    return pairs[pairs.text_won != pairs.text_lost]


# --- the judge: length


def length_bias(table: Table) -> pd.DataFrame:
    """How often the longer of two responses wins, raw and with rivals taken apart.

    One line a `condition` with `pairs, longer_wins, low, high`; lengths in characters,
    pairs of equal length left out; one half means that length does not matter.

    all pairs       the baseline every reward model has to beat
    both finished   neither was cut
    same model      both carry the same model's name (0 pairs where none repeats)
    twice as long, equal models
                    the chance that a response twice as long wins against one of an
                    equally strong model: logistic regression of all pairs on the log
                    of the ratio of lengths and a strength per model (Bradley-Terry
                    with a covariate, ridge penalty 1), one Newton step a resample

    Raises ValueError when no pair differs in length.
    """
    pairs = _pairs(_answers(table))
    pairs = pairs[pairs.chars_won != pairs.chars_lost]
    if pairs.empty:
        raise ValueError("no two responses to a prompt differ in length and rank")
    longer = pairs.chars_won > pairs.chars_lost
    conditions = {
        "all pairs": longer | True,
        "both finished": pairs.finished_won & pairs.finished_lost,
        "same model": pairs.model_won == pairs.model_lost,
    }
    rows = [
        (name, keep.sum(), *_mean(longer[keep], pairs.prompt[keep]))
        for name, keep in conditions.items()
    ]
    rows.append(("twice as long, equal models", len(pairs), *_doubling(pairs)))
    return pd.DataFrame(rows, columns=["condition", "pairs", "longer_wins", *_ENDS])


def _doubling(pairs: pd.DataFrame) -> Interval:
    """Chance that a response twice as long wins, the models' strengths held equal."""
    from sklearn.linear_model import LogisticRegression

    features = _pair_features(pairs)
    # Each pair from both sides at half weight: two classes, and no side preferred.
    both = sparse.vstack([features, -features]).tocsr()
    won = np.repeat([1, 0], len(pairs))
    model = LogisticRegression(fit_intercept=False, solver="newton-cg", tol=1e-6)
    model.fit(both, won, sample_weight=np.full(len(won), 0.5))
    coefficients = model.coef_[0]
    lost = special.expit(-(features @ coefficients))
    information = features.T @ features.multiply((lost * (1 - lost))[:, None])
    _, prompts = np.unique(pairs.prompt, return_inverse=True)
    member = sparse.csr_matrix((lost, (prompts, np.arange(len(lost)))))
    hessian = information.toarray() + np.eye(len(coefficients))
    values = _pseudo_values(coefficients, (member @ features).toarray(), hessian)
    return Interval(
        *special.expit(bootstrap_interval(values[:, 0], resamples=RESAMPLES)).tolist()
    )


def _pair_features(pairs: pd.DataFrame) -> sparse.csr_matrix:
    """(pairs, 1 + models): log₂ of the ratio of lengths, +1 the winner, −1 the loser."""
    # An empty response counts as one character.
    won, lost = (
        np.log2(pairs[f"chars_{end}"].clip(lower=1)) for end in ("won", "lost")
    )
    names = pd.concat([pairs.model_won, pairs.model_lost])
    codes = np.unique(names, return_inverse=True)[1].reshape(2, -1)
    row, one = np.arange(len(pairs)), np.ones(len(pairs))
    shape = (len(pairs), codes.max() + 1)
    winners, losers = (sparse.csr_matrix((one, (row, c)), shape) for c in codes)
    ratio = sparse.csr_matrix((won - lost).to_numpy()[:, None])
    return sparse.hstack([ratio, winners - losers]).tocsr()


def length_by_rank(table: Table) -> pd.DataFrame:
    """Mean characters of the responses at each rank: `rank, n, chars, low, high`."""
    answers = _answers(table)
    frame = _means(answers, "rank", "chars").set_axis(["chars", *_ENDS], axis=1)
    frame.insert(0, "n", answers["rank"].value_counts())
    return frame.rename_axis("rank").reset_index()


# --- the models


class WinMatrix(NamedTuple):
    """Square frames, models best first: `share` of `pairs` that the row's model won."""

    share: pd.DataFrame
    pairs: pd.DataFrame


def model_ratings(table: Table) -> pd.DataFrame:
    """Every model's mean rank, win rate and Plackett-Luce strength, best first.

    Columns `model, n` (responses), `mean_rank, rank_low, rank_high, win_rate, win_low,
    win_high, strength, strength_low, strength_high`. A name may occur several times
    in a row: each response counts for mean rank and strength, and pairs under one name
    are left out of the win rate (NaN when a model never met another).

    Strengths are natural logs of Plackett-Luce weights, 0 for the average response;
    exp(difference) is the odds that one model's response is ranked above the other's.
    Each model has won and lost one virtual comparison with an average player, which
    keeps the strength of one that always wins finite. How strong that one really is
    cannot be said: its interval is NaN, as is that of a model seen on one prompt. (Nor
    can it where one group of models always beats another; no NaN warns of that.) The
    other intervals take one Newton step a resample. Responses of equal rank count in
    the order in which they stand. Raises ValueError for no rows.
    """
    answers = _answers(table)
    games = _games(_pairs(answers))
    rank, win = _means(answers, "model", "rank"), _means(games, "model", "won")
    frame = rank.set_axis(["mean_rank", "rank_low", "rank_high"], axis=1)
    frame.insert(0, "n", answers["model"].value_counts())
    frame[["win_rate", "win_low", "win_high"]] = win.reindex(frame.index)
    frame = frame.join(_strengths(answers))
    # Resamples would all agree there, and give a narrow interval that means nothing.
    unknown = frame["rank_low"].isna() | ~frame["win_rate"].between(0, 1, "neither")
    frame.loc[unknown, ["strength_low", "strength_high"]] = np.nan
    frame = frame.rename_axis("model").reset_index()
    return frame.sort_values(["mean_rank", "model"], ignore_index=True)


def win_matrix(table: Table) -> WinMatrix:
    """Share of pairs in which the row's model beat the column's, and their number.

    Pairs of equal rank, text or model name are left out; a share is NaN where two
    models never met. Models stand in the order of their mean rank.
    """
    answers = _answers(table)
    mean_rank = answers.groupby("model")["rank"].mean()
    order = mean_rank.rename_axis("model").reset_index().sort_values(["rank", "model"])
    pairs = _pairs(answers)
    pairs = pairs[pairs.model_won != pairs.model_lost]
    wins = pd.crosstab(pairs.model_won, pairs.model_lost)
    names = order["model"].tolist()
    wins = wins.reindex(index=names, columns=names, fill_value=0)
    wins = wins.rename_axis(index="model", columns="other")
    played = wins + wins.to_numpy().T
    return WinMatrix(share=wins / played.replace(0, np.nan), pairs=played)


def _games(pairs: pd.DataFrame) -> pd.DataFrame:
    """Two lines a pair of different models: each `model`, and whether it `won`."""
    pairs = pairs[pairs.model_won != pairs.model_lost]
    sides = [
        pd.DataFrame(
            {"model": pairs[f"model_{end}"], "prompt": pairs.prompt, "won": won}
        )
        for end, won in (("won", 1.0), ("lost", 0.0))
    ]
    return pd.concat(sides, ignore_index=True)


def _strengths(answers: pd.DataFrame) -> pd.DataFrame:
    """`strength, strength_low, strength_high` of each model (see `model_ratings`)."""
    names, codes = np.unique(answers["model"].to_numpy(str), return_inverse=True)
    place = answers.groupby("row").cumcount()
    choices = np.full((answers["row"].max() + 1, place.max() + 1), len(names))
    choices[answers["row"], place] = codes
    fit = optimize.minimize(
        lambda x: _plackett_luce(x, choices)[:2],
        np.zeros(len(names)),
        jac=True,
        hess=lambda x: _plackett_luce(x, choices)[3],
        method="trust-exact",
    )
    _, _, scores, hessian = _plackett_luce(fit.x, choices)
    by_prompt = np.zeros((answers["prompt"].max() + 1, len(names)))
    np.add.at(by_prompt, answers.groupby("row")["prompt"].first(), scores)
    values = _pseudo_values(fit.x, by_prompt, hessian)
    weights = np.bincount(codes) / len(codes)
    values -= (values @ weights)[:, None]
    bar = _progress(values.T, "intervals of strength", len(answers) < 30_000)
    intervals = [bootstrap_interval(each, resamples=RESAMPLES) for each in bar]
    columns = ["strength", "strength_low", "strength_high"]
    return pd.DataFrame(intervals, index=names).set_axis(columns, axis=1)


def _plackett_luce(
    strength: np.ndarray, choices: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Plackett-Luce at `strength` (M,): NLL, gradient (M,), scores (N, M), hessian (M, M).

    `choices` (N, K) holds models best first, M where a row has fewer than K. NLL,
    gradient and hessian include the penalty, one win and one loss of each model against
    strength 0; scores are each row's gradient of the log-likelihood.
    """
    m, k = len(strength), np.arange(choices.shape[1])
    real = choices < m
    weight = np.append(np.exp(strength), 0)[choices]
    left = np.cumsum(weight[:, ::-1], axis=1)[:, ::-1]  # of those not yet chosen
    inverse = np.divide(1, left, out=np.zeros_like(left), where=real)
    first, second = np.cumsum(inverse, axis=1), np.cumsum(inverse**2, axis=1)
    nll = np.log(left[real]).sum() - strength[choices[real]].sum()
    scores = np.zeros((len(choices), m + 1))
    rows = np.arange(len(choices))[:, None]
    np.add.at(scores, (rows, choices), real - weight * first)
    among = -weight[:, :, None] * weight[:, None, :]
    among *= second[:, np.minimum.outer(k, k)]
    among[:, k, k] += weight * first
    cells = choices[:, :, None] * (m + 1) + choices[:, None, :]
    hessian = np.bincount(cells.ravel(), among.ravel(), (m + 1) ** 2)
    hessian, scores = hessian.reshape(m + 1, m + 1)[:m, :m], scores[:, :m]
    spread = 2 * special.expit(strength) * special.expit(-strength)
    nll += 2 * np.logaddexp(strength / 2, -strength / 2).sum()
    gradient = np.tanh(strength / 2) - scores.sum(axis=0)
    return nll, gradient, scores, hessian + np.diag(spread)


# --- the set: what occurs twice


def duplicate_responses(table: Table) -> pd.DataFrame:
    """Identical answers (but for outer white space) to one prompt at several ranks.

    One line a group: `row, id, count, ranks` and `models` (lists, best first). A
    preference between a text and itself is noise: see `load_rankings(duplicates=…)`.
    """
    answers = _answers(table)
    copies = answers[answers.duplicated(["row", "text"], keep=False)]
    groups = copies.groupby(["row", "text"], sort=False)
    lines = [
        (
            row,
            part["id"].iloc[0],
            len(part),
            part["rank"].tolist(),
            part["model"].tolist(),
        )
        for (row, _), part in groups
    ]
    return pd.DataFrame(lines, columns=["row", "id", "count", "ranks", "models"])


def near_duplicate_prompts(
    prompts: Iterable[Prompt | Mapping], threshold: float = 0.8, num_perm: int = 128
) -> pd.DataFrame:
    """Pairs of prompts whose sets of three-word shingles overlap by `threshold` or more.

    `prompts`: texts, message lists, or the rows of a table. Columns `first, second`
    (numbers from 0, first < second) and `jaccard`, the exact overlap, largest first.
    Candidates come from MinHash-LSH with `num_perm` permutations, banded to find a
    pair right at the threshold with a chance of 99 % and closer ones more surely.
    Raises ValueError for a threshold outside (0, 1].
    """
    shingles = [_shingles(prompt) for prompt in prompts]
    index = _lsh(threshold, num_perm)
    pairs = []
    for i, sketch in enumerate(_sketches(shingles, num_perm)):
        pairs += [(j, i) for j in index.query(sketch)]
        index.insert(i, sketch)
    return _overlaps(pairs, shingles, shingles, threshold, ["first", "second"])


def split_leaks(
    train: Iterable[Prompt | Mapping],
    test: Iterable[Prompt | Mapping],
    threshold: float = 0.8,
    num_perm: int = 128,
) -> pd.DataFrame:
    """Test prompts that nearly stand in train: `train, test` (numbers), `jaccard`.

    Arguments and search as in `near_duplicate_prompts`.
    """
    index = _lsh(threshold, num_perm)
    sides = [[_shingles(prompt) for prompt in side] for side in (train, test)]
    for i, sketch in enumerate(_sketches(sides[0], num_perm)):
        index.insert(i, sketch)
    sketches = enumerate(_sketches(sides[1], num_perm))
    pairs = [(j, i) for i, sketch in sketches for j in index.query(sketch)]
    return _overlaps(pairs, *sides, threshold, ["train", "test"])


def _shingles(prompt: Prompt | Mapping, words: int = 3) -> frozenset[str]:
    """Runs of `words` words in lower case; the whole text where there are fewer."""
    if isinstance(prompt, Mapping):
        prompt = prompt["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n".join(message["content"] for message in prompt)
    tokens = re.findall(r"\w+", prompt.casefold()) or prompt.split()
    last = max(1, len(tokens) - words + 1)
    return frozenset(" ".join(tokens[i : i + words]) for i in range(last))


def _sketches(shingles: list[frozenset[str]], num_perm: int) -> Iterable[MinHash]:
    encoded = ([s.encode() for s in each] for each in shingles)
    sketches = MinHash.generator(encoded, num_perm=num_perm)
    count = len(shingles)
    return _progress(sketches, "sketching prompts", count < 5000, count)


def _lsh(threshold: float, num_perm: int) -> MinHashLSH:
    """An index that misses one pair in a hundred, or fewer, at the threshold itself.

    The library's own choice balances errors of both kinds and misses six in ten there;
    false candidates are no harm to us, as every one is checked.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: expected more than 0, at most 1")
    sizes = range(1, num_perm // 2 + 1)
    found = [1 - (1 - threshold**size) ** (num_perm // size) for size in sizes]
    size = max([s for s, p in zip(sizes, found, strict=True) if p >= 0.99], default=1)
    return MinHashLSH(num_perm=num_perm, params=(num_perm // size, size))


def _overlaps(
    pairs: list[tuple[int, int]],
    left: list[frozenset[str]],
    right: list[frozenset[str]],
    threshold: float,
    names: list[str],
) -> pd.DataFrame:
    """The candidate pairs whose exact Jaccard overlap reaches the threshold."""
    exact = [
        (i, j, len(left[i] & right[j]) / len(left[i] | right[j])) for i, j in pairs
    ]
    frame = pd.DataFrame(exact, columns=[*names, "jaccard"])
    frame = frame[frame.jaccard >= threshold]
    return frame.sort_values(
        ["jaccard", *names], ascending=[False, True, True], ignore_index=True
    )


# --- the set: what it is made of, and how long


def composition(table: Table) -> pd.DataFrame:
    """Rows by `source`, `turns`, `good_natured` and number of `responses`.

    Columns `field, value` (text), `rows, share`. A row of several sources counts for
    each, so those shares may sum to more than 1; "?" stands for not known.
    """
    rows = list(table)
    if not rows:
        raise ValueError("the table of rankings has no rows")
    columns = {
        "source": [row.get("source") for row in rows],
        "turns": [row.get("turns") for row in rows],
        "good_natured": [row.get("good_natured") for row in rows],
        "responses": [len(row["responses"]) for row in rows],
    }
    lines = []
    for field, values in columns.items():
        counts = pd.Series(values, dtype=object).explode().value_counts(dropna=False)
        if field != "source":
            counts = counts.sort_index()
        names = ["?" if pd.isna(value) else str(value) for value in counts.index]
        lines += [(field, *line) for line in zip(names, counts, strict=True)]
    frame = pd.DataFrame(lines, columns=["field", "value", "rows"])
    return frame.assign(share=frame["rows"] / len(rows))


def token_lengths(
    table: Table, tokenizer: "PreTrainedTokenizerBase", batch_size: int = 256
) -> pd.DataFrame:
    """Tokens of every prompt and response under the tokenizer's chat template.

    One line a response: `row, id, rank, prompt_tokens` (up to where the response
    begins), `response_tokens` (its end token included, whether it was cut or not) and
    `total_tokens`. Raises ValueError when the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: set one of chat.*_TEMPLATE"
        )
    rows, lines = list(table), []
    starts = range(0, len(rows), batch_size)
    for start in _progress(starts, "counting tokens", len(rows) < 1000):
        part = rows[start : start + batch_size]
        prompts = _count_tokens(tokenizer, [row["prompt"] for row in part], True)
        whole = [
            [*row["prompt"], {"role": "assistant", "content": text}]
            for row in part
            for text in row["responses"]
        ]
        totals = iter(_count_tokens(tokenizer, whole, False))
        lines += [
            (start + i, row["id"], rank, prompt, next(totals))
            for i, (row, prompt) in enumerate(zip(part, prompts, strict=True))
            for rank in row["ranks"]
        ]
    columns = ["row", "id", "rank", "prompt_tokens", "total_tokens"]
    frame = pd.DataFrame(lines, columns=columns)
    frame.insert(4, "response_tokens", frame.total_tokens - frame.prompt_tokens)
    return frame


def _count_tokens(tokenizer, conversations: list, prompt: bool) -> list[int]:
    texts = tokenizer.apply_chat_template(
        conversations, tokenize=False, add_generation_prompt=prompt
    )
    # The template has written the special tokens already.
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def truncation_cost(
    lengths: pd.DataFrame, limits: Sequence[int] = (512, 1024, 2048, 4096)
) -> pd.DataFrame:
    """What a `max_length` that cuts prompt plus response at the end would cost.

    `lengths` as `token_lengths` gives it. One line a `limit`: share of responses that
    lose a token (`responses_cut`), share of prompts that leave no room for a response
    at all (`prompts_cut`), share of all tokens, prompts counted with each response,
    that are lost (`tokens_lost`). Raises ValueError for an empty frame.
    """
    if lengths.empty:
        raise ValueError("no lengths: the table of rankings has no rows")
    total = lengths["total_tokens"]
    prompts = lengths.drop_duplicates("row")["prompt_tokens"]
    lines = [
        (
            limit,
            (total > limit).mean(),
            (prompts >= limit).mean(),
            (total - limit).clip(lower=0).sum() / total.sum(),
        )
        for limit in limits
    ]
    columns = ["limit", "responses_cut", "prompts_cut", "tokens_lost"]
    return pd.DataFrame(lines, columns=columns)
