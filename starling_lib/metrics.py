"""How well scores recover rankings, how sure they are, and how much they like length.

Scores are (N, K): N prompts of K responses, tensors or arrays; NaN means "no such
response". Without `ranks` the columns stand best first; with them (N, K; 1 is best, NaN
missing) in any order, and equal ranks hold no preference. A pair is two responses to one
prompt that the judge tells apart; equal scores get it half right. Every interval is a
bootstrap over prompts, because the pairs of a prompt are not independent.

Knows: scores, ranks and lengths as numbers. Does not know: models, texts, trainers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy.special import expit
from scipy.stats import rankdata
from torch import Tensor

from starling_lib.losses import MAX_TIED, kwise_loss
from starling_lib.statistics import Interval, bootstrap_interval

Matrix = Tensor | ArrayLike
COLUMNS = ["estimate", "low", "high", "n", "prompts"]


def reward_metrics(
    scores: Matrix, lengths: Matrix | None = None, ranks: Matrix | None = None
) -> dict[str, float]:
    """How well scores (N, K) recover the ranking, in single figures.

    `accuracy`: share of all pairs ordered right; `adjacent_accuracy`: of neighbouring
    ranks only (the original's figure); `top1`: the best response scores highest (one of
    n that share the highest score: 1/n); `kendall_tau`: mean over prompts of (right −
    wrong) / pairs; `ndcg`: mean over prompts, the gain of a response being the number
    that rank below it; `nll`: K-wise loss (NaN with ties among more than 12 columns,
    whose orders are too many to count); `ece`: `expected_calibration_error`.
    With `lengths` (N, K) also `longer_wins`, the accuracy of preferring the longer
    response: the baseline to beat; and `shorter_better_accuracy`, that of the scores on
    pairs whose better response is the shorter. NaN where there is nothing to count.

    >>> metrics = reward_metrics([[3.0, 1.0, 2.0], [0.5, 0.4, 0.1]])
    >>> round(metrics["accuracy"], 3), metrics["top1"]
    (0.833, 1.0)
    """
    scores, ranks = _matrices(scores, ranks)
    observed = _observations(scores, ranks, lengths)
    metrics = {name: _mean(values) for name, (values, _) in observed.items()}
    metrics["nll"] = _nll(scores, ranks)
    metrics["ece"] = _ece(_pairs(scores, ranks), bins=10)
    return metrics


def metric_intervals(
    scores: Matrix,
    lengths: Matrix | None = None,
    ranks: Matrix | None = None,
    resamples: int = 2000,
) -> pd.DataFrame:
    """The shares and means of `reward_metrics` (not `nll`, `ece`) with intervals.

    Index `metric`; columns `estimate, low, high, n, prompts` (n: pairs, or prompts).
    """
    observed = _observations(*_matrices(scores, ranks), lengths)
    table = {name: _summary(*each, resamples) for name, each in observed.items()}
    return _table(table, "metric")


def accuracy_by_gap(
    scores: Matrix, ranks: Matrix | None = None, resamples: int = 2000
) -> pd.DataFrame:
    """Pair accuracy by rank gap 1 … K−1: far-apart responses are easier to tell.

    Index `gap`; columns `estimate, low, high, n, prompts` (n: pairs).
    """
    pairs = _pairs(*_matrices(scores, ranks))
    table = {}
    for gap in np.unique(pairs.gap):
        chosen = pairs.gap == gap
        table[int(gap)] = _summary(pairs.wins[chosen], pairs.row[chosen], resamples)
    return _table(table, "gap")


def accuracy_by(
    scores: Matrix,
    groups: Sequence[str | Sequence[str]],
    ranks: Matrix | None = None,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Pair accuracy by a label of the prompt, such as its source, with intervals.

    `groups` (N): a label a row, or a list of labels (Nectar's `source`), under each of
    which the row then counts. Index `group`, sorted; columns `estimate, low, high, n,
    prompts` (n: pairs). Raises ValueError on another number of labels than rows.
    """
    scores, ranks = _matrices(scores, ranks)
    if len(groups) != len(scores):
        raise ValueError(f"{len(scores)} rows of scores but {len(groups)} group labels")
    labels = [{g} if isinstance(g, str) else set(g) for g in groups]
    pairs = _pairs(scores, ranks)
    table = {}
    for label in sorted(set().union(*labels)):
        chosen = np.array([label in row for row in labels])[pairs.row]
        table[label] = _summary(pairs.wins[chosen], pairs.row[chosen], resamples)
    return _table(table, "group")


def response_table(
    scores: Matrix, lengths: Matrix | None = None, ranks: Matrix | None = None
) -> pd.DataFrame:
    """One row a response that has a score, for plots.

    Columns `prompt` (row number), `rank`, `score` less the mean score of its prompt (the
    level of a prompt is arbitrary), and `length` where given.
    """
    scores, ranks = _matrices(scores, ranks)
    row, column = np.nonzero(~np.isnan(scores))
    table = pd.DataFrame({"prompt": row, "rank": ranks[row, column].astype(int)})
    table["score"] = scores[row, column]
    table["score"] -= table.groupby("prompt")["score"].transform("mean")
    if lengths is not None:
        table["length"] = as_array(lengths)[row, column]
    return table


# --- calibration


def calibration(
    scores: Matrix,
    bins: int = 10,
    ranks: Matrix | None = None,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Predicted against observed wins, for a reliability plot.

    Bradley-Terry reads a difference of scores as the probability σ(Δ) that the judge
    prefers the one response. Each pair counts once, seen from the response that the
    scores favour: predicted σ(|Δ|) between ½ and 1, observed 1 where the judge agrees
    (½ where the scores are equal). The other side would mirror it and add nothing.

    `bins` of equal width from ½ to 1, empty ones left out. Columns: `predicted` and
    `observed` (means), `low, high` (interval of `observed`), `n` (pairs), `prompts`.
    """
    pairs = _pairs(*_matrices(scores, ranks))
    predicted, bin_of = _confidence(pairs, bins)
    rows = []
    for b in np.unique(bin_of):
        inside = bin_of == b
        summary = _summary(pairs.wins[inside], pairs.row[inside], resamples)
        rows.append({"predicted": predicted[inside].mean(), **summary})
    table = pd.DataFrame(rows, columns=["predicted", *COLUMNS])
    return table.rename(columns={"estimate": "observed"})


def expected_calibration_error(
    scores: Matrix, bins: int = 10, ranks: Matrix | None = None
) -> float:
    """Mean |predicted − observed| over the bins of `calibration`, by their pairs (ECE).

    0 is calibrated, 1 is certain and wrong on every pair (Guo et al. 2017, arXiv
    1706.04599, eq. 3). NaN without pairs.
    """
    return _ece(_pairs(*_matrices(scores, ranks)), bins)


def _confidence(pairs: "_Pairs", bins: int) -> tuple[np.ndarray, np.ndarray]:
    """(P,) σ(|Δ|) of each pair and the number of its bin, of equal width on [½, 1]."""
    predicted = expit(np.abs(pairs.margin))
    inner = np.linspace(0.5, 1, bins + 1)[1:-1]
    return predicted, np.digitize(predicted, inner)


def _ece(pairs: "_Pairs", bins: int) -> float:
    predicted, bin_of = _confidence(pairs, bins)
    if len(bin_of) == 0:
        return float("nan")
    gaps = np.bincount(bin_of, weights=predicted - pairs.wins)
    return float(np.abs(gaps).sum() / len(bin_of))


# --- length


def length_bias_of_scores(
    scores: Matrix,
    lengths: Matrix,
    ranks: Matrix | None = None,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Do the scores like length more than the judge did?

    Index, columns `estimate, low, high, n, prompts`:
    `correlation`               of score and length, as ranks within the prompt
    `partial_correlation`       the same given the judge's rank: what length adds to the
                                score beyond what the judge saw in it; 0 is no bias
    `longer_better_accuracy`    accuracy where the judge prefers the longer (n: pairs)
    `shorter_better_accuracy`   and where the shorter; with a bias it is the lower one
    Correlations are Pearson's of centred ranks pooled over prompts. NaN where undefined:
    a perfect ranking leaves nothing for length to explain.
    """
    scores, ranks = _matrices(scores, ranks)
    pairs = _pairs(scores, ranks)
    moments = _rank_moments(scores, as_array(lengths), -ranks)
    rows = np.unique(pairs.row)
    table = {}
    for name, measure in _CORRELATIONS.items():
        table[name] = _summary(rows, rows, resamples, partial(measure, moments))
    longer = _length_margins(pairs, lengths)
    for name, chosen in (("longer", longer > 0), ("shorter", longer < 0)):
        summary = _summary(pairs.wins[chosen], pairs.row[chosen], resamples)
        table[f"{name}_better_accuracy"] = summary
    return _table(table, "measure")


def _rank_moments(*variables: np.ndarray) -> np.ndarray:
    """(N, V, V) sums of products of V variables as centred ranks within each row.

    Responses that lack one of the variables are left out of all.
    """
    present = ~np.isnan(np.stack(variables)).any(0)
    count = np.maximum(present.sum(1, keepdims=True), 1)
    columns = []
    for values in variables:
        ranks = rankdata(np.where(present, values, np.inf), axis=1) * present
        centred = ranks - ranks.sum(1, keepdims=True) / count
        columns.append(np.where(present, centred, 0))
    stacked = np.stack(columns)
    return np.einsum("vnk,wnk->nvw", stacked, stacked)


def _correlations(moments: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(V, V) correlations over these rows; NaN where a variable is constant."""
    sums = moments[rows.astype(int)].sum(0)
    spread = np.sqrt(np.diag(sums))
    spread = np.where(spread > 0, spread, np.nan)
    return sums / np.outer(spread, spread)


def _correlation(moments: np.ndarray, rows: np.ndarray) -> float:
    return float(_correlations(moments, rows)[0, 1])


def _partial_correlation(moments: np.ndarray, rows: np.ndarray) -> float:
    """Correlation of the first two variables given the third."""
    r = _correlations(moments, rows)
    left = (1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2)
    if not left > 1e-12:
        return float("nan")
    return float((r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt(left))


_CORRELATIONS = {
    "correlation": _correlation,
    "partial_correlation": _partial_correlation,
}


def _length_margins(pairs: "_Pairs", lengths: Matrix) -> np.ndarray:
    """(P,) how much longer the better response of each pair is; NaN where unknown."""
    lengths = as_array(lengths)
    return lengths[pairs.row, pairs.better] - lengths[pairs.row, pairs.worse]


# --- RewardBench


# Subsets of each section and what each weighs (constants of allenai/reward-bench): its
# number of pairs, but math-prm (447 pairs) as much as the six sets of code together. In
# spring 2024 the leaderboard had the counts of the two xstest sets swapped: Starling's
# 34B reward model then stood at 88.2 in Safety, and at 87.7 since, as these counts give.
REWARDBENCH = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
_SUBSETS = [subset for part in REWARDBENCH.values() for subset in part]


def rewardbench_scores(
    rows: pd.DataFrame | Iterable[Mapping], resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """RewardBench's table from scores of chosen and rejected responses (arXiv 2403.13787).

    `rows`: columns `subset`, `chosen_score`, `rejected_score`, a prompt each; other
    columns are ignored and NaN scores left out. As there, equal scores are wrong, a
    section weighs its subsets by their published counts (those present), and the score
    is the mean of the four sections (prior sets no longer count).

    Index (`section`, `subset`): each subset, each section ("all"), and ("all", "all")
    where no section is missing; columns `estimate, low, high, n`. The bootstrap
    resamples each subset on its own. Raises ValueError on a missing column and on a
    subset that is not RewardBench's.
    """
    frame = _check_rewardbench(rows)
    wins = (frame["chosen_score"] > frame["rejected_score"]).groupby(frame["subset"])
    n, right = wins.size(), wins.mean()
    # Resampling n zeros and ones is drawing from a binomial. Row 0 is the estimate.
    drawn = (
        np.random.default_rng(seed).binomial(n, right, (resamples, len(n))) / n.array
    )
    columns = pd.DataFrame(np.vstack([right, drawn]), columns=n.index)
    table, sections = {}, {}
    for section, weights in REWARDBENCH.items():
        present = [subset for subset in weights if subset in n]
        table |= {(section, s): (columns[s], n[s]) for s in present}
        if present:
            by_count = [weights[subset] for subset in present]
            score = np.average(columns[present], axis=1, weights=by_count)
            sections[section, "all"] = (score, n[present].sum())
            table |= {(section, "all"): sections[section, "all"]}
    if len(sections) == len(REWARDBENCH):
        score = np.mean([scores for scores, _ in sections.values()], axis=0)
        table["all", "all"] = (score, n.sum())
    return _rewardbench_table(table)


def _rewardbench_table(columns: dict[tuple[str, str], tuple]) -> pd.DataFrame:
    """Estimates with intervals from (the estimate and its resamples, n) by row name."""
    rows = []
    for values, n in columns.values():
        low, high = np.percentile(values[1:], [2.5, 97.5])
        rows.append({"estimate": values[0], "low": low, "high": high, "n": int(n)})
    index = pd.MultiIndex.from_tuples(columns, names=["section", "subset"])
    return pd.DataFrame(rows, index=index, columns=["estimate", "low", "high", "n"])


def _check_rewardbench(rows: pd.DataFrame | Iterable[Mapping]) -> pd.DataFrame:
    """The rows with both scores, after checking columns and names of subsets."""
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    columns = ["subset", "chosen_score", "rejected_score"]
    if missing := [name for name in columns if name not in frame]:
        raise ValueError(
            f"no column {missing[0]!r} in the scored rows, which have "
            f"{', '.join(map(str, frame.columns)) or 'none'}; add it"
        )
    check_subsets(frame["subset"])
    return frame[columns].dropna()


def check_subsets(subsets: pd.Series) -> None:
    """Raise ValueError, naming the row, on a subset that is not RewardBench's."""
    for row, subset in subsets[~subsets.isin(_SUBSETS)].items():
        raise ValueError(
            f"row {row!r}: subset {subset!r} is none of RewardBench's "
            f"({', '.join(_SUBSETS)}); leave such rows out"
        )


# --- pairs


class _Pairs(NamedTuple):
    """All pairs that hold a preference, one entry each; arrays of shape (P,)."""

    row: np.ndarray
    better: np.ndarray  # column of the response that the judge prefers
    worse: np.ndarray
    gap: np.ndarray  # ranks apart; responses of equal rank take up one rank
    margin: np.ndarray  # score of the better − score of the worse

    @property
    def wins(self) -> np.ndarray:
        """1 where the better response scores higher, ½ where they score the same.

        Which is also whether the response that the scores favour is the better one.
        """
        return (np.sign(self.margin) + 1) / 2


def _pairs(scores: np.ndarray, ranks: np.ndarray) -> _Pairs:
    row, better, worse = np.nonzero(ranks[:, :, None] < ranks[:, None])
    margin = scores[row, better] - scores[row, worse]
    gap = (ranks[row, worse] - ranks[row, better]).astype(int)
    return _Pairs(row, better, worse, gap, margin)


def _matrices(scores: Matrix, ranks: Matrix | None) -> tuple[np.ndarray, np.ndarray]:
    """Scores and dense ranks (1, 2, … without holes for ties), NaN where either is.

    Raises ValueError on another shape than (N, K).
    """
    scores = as_array(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {scores.shape}, expected (prompts, K)")
    if ranks is None:
        ranks = np.broadcast_to(np.arange(1.0, scores.shape[1] + 1), scores.shape)
    else:
        given = as_array(ranks)
        if given.shape != scores.shape:
            raise ValueError(f"ranks {given.shape} do not fit scores {scores.shape}")
        ranks = rankdata(np.nan_to_num(given, nan=np.inf), method="dense", axis=1)
        ranks = np.where(np.isnan(given), np.nan, ranks)
    missing = np.isnan(scores) | np.isnan(ranks)
    return np.where(missing, np.nan, scores), np.where(missing, np.nan, ranks)


def as_array(values: Matrix) -> np.ndarray:
    """A tensor on any device, an array or nested lists as an array of floats."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=float)


# --- one value a pair or a prompt


def _observations(
    scores: np.ndarray, ranks: np.ndarray, lengths: Matrix | None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What the metrics are means of: name → (values, the row each belongs to)."""
    pairs = _pairs(scores, ranks)
    near = pairs.gap == 1
    rows = np.unique(pairs.row)
    wins = np.bincount(pairs.row, pairs.wins)[rows] / np.bincount(pairs.row)[rows]
    observed = {
        "accuracy": (pairs.wins, pairs.row),
        "adjacent_accuracy": (pairs.wins[near], pairs.row[near]),
        "top1": (_top1(scores[rows], ranks[rows]), rows),
        "kendall_tau": (2 * wins - 1, rows),
        "ndcg": (_ndcg(scores[rows], ranks[rows]), rows),
    }
    if lengths is not None:
        longer = _length_margins(pairs, lengths)
        known, shorter = ~np.isnan(longer), longer < 0
        wins = (np.sign(longer[known]) + 1) / 2
        observed["longer_wins"] = (wins, pairs.row[known])
        wins = pairs.wins[shorter]
        observed["shorter_better_accuracy"] = (wins, pairs.row[shorter])
    return observed


def _top1(scores: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """(N,) share of best-ranked responses among the highest-scored of each row."""
    if len(scores) == 0:
        return np.zeros(0)
    best = ranks == np.nanmin(ranks, axis=1, keepdims=True)
    highest = scores == np.nanmax(scores, axis=1, keepdims=True)
    return (best & highest).sum(1) / highest.sum(1)


def _ndcg(scores: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """(N,) Σ gain·discount in the order of the scores over that in the judge's order.

    The discount of place p is 1/log₂(p + 1) (Järvelin and Kekäläinen 2002); equal scores
    share the mean discount of their places, as in scikit-learn.
    """
    gains = (ranks[:, :, None] < ranks[:, None]).sum(2)
    total = np.append(0, np.cumsum(1 / np.log2(np.arange(scores.shape[1]) + 2)))

    def gain(values: np.ndarray) -> np.ndarray:
        filled = np.where(np.isnan(values), np.inf, -values)
        first, last = (rankdata(filled, m, axis=1).astype(int) for m in ("min", "max"))
        discounts = (total[last] - total[first - 1]) / (last - first + 1)
        return (gains * discounts).sum(1)

    return gain(scores) / gain(-ranks)


def _nll(scores: np.ndarray, ranks: np.ndarray) -> float:
    several = (~np.isnan(scores)).sum(1) > 1  # the others have nothing to rank
    tied = (np.diff(np.sort(ranks)) == 0).any()
    if not several.any() or (tied and scores.shape[1] > MAX_TIED):
        return float("nan")
    scores, ranks = torch.tensor(scores[several]), torch.tensor(ranks[several])
    return float(kwise_loss(scores, ~scores.isnan(), ranks=ranks))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _summary(
    values: np.ndarray,
    rows: np.ndarray,
    resamples: int,
    statistic: Callable[[np.ndarray], float] = np.mean,
) -> dict[str, float]:
    """The statistic of values with its interval over rows (prompts); NaN of none."""
    interval = Interval(*[float("nan")] * 3)
    if len(values) and not np.isnan(statistic(values)):
        interval = bootstrap_interval(values, statistic, rows, resamples=resamples)
    return {**interval._asdict(), "n": len(values), "prompts": len(np.unique(rows))}


def _table(rows: dict, index: str) -> pd.DataFrame:
    table = pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS)
    return table.rename_axis(index)
