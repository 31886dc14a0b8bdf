"""One function a figure: arrays, frames or logs in, a matplotlib `Figure` out.

Knows how the cookbook's figures look: calm, readable at notebook width, on a white
face so that a dark page shows them too, in colours people with colour-blindness can
tell apart (Okabe and Ito, 2008). Does not know models, data sets or training, and
never calls `show`: a figure that ends a notebook cell shows itself, once, because it
is made outside pyplot's list of open figures.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, YELLOW, GREY, PALE = "#56B4E9", "#E69F00", "#666666", "#E8E8E8"
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW)
BEFORE, AFTER = GREY, BLUE

STYLE = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.dpi": 100,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": plt.cycler(color=CYCLE),
    "grid.color": PALE,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}

# Decorates every figure function, so that nobody's own rcParams are touched.
styled = plt.rc_context(STYLE)


class NotebookFigure(Figure):
    """A `Figure` that shows itself at a cell's end under any matplotlib backend."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """PNG at twice the shown size, so that it is sharp on dense screens."""
        image = io.BytesIO()
        self.savefig(image, format="png", dpi=2 * self.dpi)
        width, height = self.get_size_inches() * self.dpi
        return image.getvalue(), {"width": int(width), "height": int(height)}


def new_figure(width: float = 7.5, height: float = 3.2) -> Figure:
    """An empty figure, size in inches; 7.5 is the width of a notebook's text."""
    return NotebookFigure(figsize=(width, height), layout="constrained")


def _reference_line(ax: Axes, y: float, label: str) -> None:
    """A dashed grey horizontal at `y`: a baseline, named in the legend."""
    ax.axhline(y, color=GREY, linestyle="--", linewidth=1.2, label=label)


# --- reward


def _logged(history: Sequence[Mapping], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the log entries that hold `key` (a Trainer log is ragged)."""
    entries = [entry for entry in history if key in entry]
    return [e["step"] for e in entries], [e[key] for e in entries]


@styled
def reward_training(
    history: Sequence[Mapping], longer_wins: float | None = None, chance: float = 0.5
) -> Figure:
    """Training loss and held-out pair accuracy against optimiser steps.

    Args:
        history: a Trainer's `state.log_history`; keys `step`, `loss`, `eval_loss`,
            `eval_accuracy`, each where it was logged.
        longer_wins: accuracy of "the longer response wins" on the same pairs.
        chance: accuracy of a coin.
    """
    figure = new_figure()
    left, right = figure.subplots(1, 2, sharex=True)
    left.plot(*_logged(history, "loss"), color=BLUE, label="training")
    left.plot(*_logged(history, "eval_loss"), "o-", color=ORANGE, label="held out")
    left.set(xlabel="optimiser step", ylabel="loss (nats per choice)", title="Loss")
    right.plot(*_logged(history, "eval_accuracy"), "o-", color=ORANGE, label="held out")
    if longer_wins is not None:
        _reference_line(right, longer_wins, "longer wins")
    right.axhline(chance, color=GREY, linestyle=":", linewidth=1.2, label="coin")
    right.set(xlabel="optimiser step", ylabel="share of pairs ordered right")
    right.set(ylim=(0, 1), title="Held-out accuracy")
    left.legend()
    right.legend(loc="lower right")
    return figure


@styled
def scores_by_rank(
    scores: np.ndarray, levels: Mapping[str, float] | None = None
) -> Figure:
    """Box plots of the reward model's scores at each rank, best rank on the left.

    Args:
        scores: (N, K), responses best first; NaN where a row has fewer than K.
        levels: named horizontal lines, such as a policy's mean reward.
    """
    scores = np.asarray(scores, dtype=float)
    columns = [column[~np.isnan(column)] for column in scores.T]
    figure = new_figure()
    ax = figure.subplots()
    ax.boxplot(
        columns,
        widths=0.6,
        patch_artist=True,
        boxprops={"facecolor": SKY, "edgecolor": BLUE, "alpha": 0.6},
        medianprops={"color": ORANGE, "linewidth": 2},
        flierprops={"marker": ".", "markeredgecolor": GREY},
    )
    for (label, value), colour in zip((levels or {}).items(), CYCLE[1:], strict=False):
        ax.axhline(value, color=colour, linestyle="--", linewidth=1.5, label=label)
    if levels:
        ax.legend()
    ax.set(xlabel="rank given by the judge (1 = best)", ylabel="reward model's score")
    return figure


def _accuracy_at_gap(scores: np.ndarray, gap: int) -> tuple[float, int]:
    """Share of pairs `gap` ranks apart whose better response scores higher, and count.

    `scores` is (N, K) best first; an equal pair counts one half, a NaN pair not at all.
    """
    difference = (scores[:, :-gap] - scores[:, gap:]).ravel()
    difference = difference[~np.isnan(difference)]
    return float(np.mean((np.sign(difference) + 1) / 2)), len(difference)


@styled
def accuracy_by_gap(scores: np.ndarray, lengths: np.ndarray | None = None) -> Figure:
    """Accuracy on pairs 1, 2, … K-1 ranks apart, with the "longer wins" rule beside it.

    Args:
        scores: (N, K) scores, responses best first, NaN where a row has fewer than K.
        lengths: (N, K) response lengths in any unit; draws the rule when given.
    """
    scores = np.asarray(scores, dtype=float)
    gaps = range(1, scores.shape[1])
    figure = new_figure()
    ax = figure.subplots()
    model = [_accuracy_at_gap(scores, gap) for gap in gaps]
    ax.plot(gaps, [a for a, _ in model], "o-", color=BLUE, label="reward model")
    if lengths is not None:
        lengths = np.where(np.isnan(scores), np.nan, np.asarray(lengths, dtype=float))
        rule = [_accuracy_at_gap(lengths, gap)[0] for gap in gaps]
        ax.plot(gaps, rule, "s--", color=GREY, label="longer wins")
    ax.axhline(0.5, color=GREY, linestyle=":", linewidth=1.2, label="coin")
    counts = [f"{gap}\n{n} pairs" for gap, (_, n) in enumerate(model, start=1)]
    ax.set_xticks(list(gaps), counts)
    ax.set(xlabel="ranks apart", ylabel="share of pairs ordered right", ylim=(0, 1.03))
    ax.legend(loc="lower right")
    return figure


@styled
def packing_mask(mask: np.ndarray, segment_ids: Sequence[int]) -> Figure:
    """Who sees whom in a packed row [prompt, r1, …, rK]: one square a pair of tokens.

    Args:
        mask: (T, T) bool, True where the row's token (query) sees the column's (key).
        segment_ids: (T,) 0 for the prompt, k for response k.
    """
    segments = np.asarray(segment_ids)
    own = segments[:, None] == segments[None, :]
    # 0 hidden, 1 the prompt seen by anybody, 2 a response seen by its own tokens
    shade = np.where(np.asarray(mask, dtype=bool), 1 + (own & (segments[None] > 0)), 0)
    figure = new_figure(4.6, 4.6)
    ax = figure.subplots()
    colours = ListedColormap(["white", SKY, ORANGE])
    ax.pcolormesh(shade, cmap=colours, vmin=0, vmax=2, edgecolors=PALE, linewidth=0.5)
    starts = np.flatnonzero(np.diff(segments, prepend=-1))
    middles = (starts + np.append(starts[1:], len(segments))) / 2
    names = ["prompt" if segments[s] == 0 else f"r{segments[s]}" for s in starts]
    for start in starts[1:]:
        ax.axhline(start, color=GREY, linewidth=1)
        ax.axvline(start, color=GREY, linewidth=1)
    ax.set_xticks(middles, names)
    ax.set_yticks(middles, names)
    ax.set(xlabel="token that is seen", ylabel="token that looks", aspect="equal")
    ax.grid(False)
    ax.invert_yaxis()
    return figure


# --- apa


@styled
def bandit(
    trajectories: Mapping[str, Sequence[float]],
    targets: Mapping[str, float] | None = None,
    ylabel: str = "probability of the better token",
) -> Figure:
    """A token's probability against updates, one line a method, and where each leads.

    Args:
        trajectories: method → probability after 0, 1, 2, … updates.
        targets: name → probability, drawn as dashed lines and named at the right edge.
    """
    figure = new_figure()
    ax = figure.subplots()
    for label, values in trajectories.items():
        ax.plot(range(len(values)), values, label=label)
    for label, value in (targets or {}).items():
        ax.axhline(value, color=GREY, linestyle="--", linewidth=1.1)
        ax.annotate(
            f" {label} = {value:.3f}",
            xy=(1, value),
            xycoords=ax.get_yaxis_transform(),
            va="center",
            color=GREY,
            fontsize=9,
        )
    ax.set(xlabel="updates", ylabel=ylabel, ylim=(0, 1.02))
    ax.legend()
    return figure


APA_CURVES = {
    "reward": "reward",
    "kl": "KL to the start (nats)",
    "entropy": "entropy (nats per token)",
    "length": "length (tokens)",
    "eos_rate": "share ended by EOS",
    "value_loss": "value loss",
    "explained_variance": "explained variance of returns",
}


@styled
def apa_curves(history: Sequence[Mapping]) -> Figure:
    """Small multiples of what `APATrainer` logs, one panel a figure that was logged.

    Args:
        history: log entries with `step` and any keys of `APA_CURVES`.
    """
    present = {k: v for k, v in APA_CURVES.items() if any(k in e for e in history)}
    if not present:
        raise ValueError(f"no entry of the log holds any of {', '.join(APA_CURVES)}")
    columns = min(4, len(present))
    rows = -(-len(present) // columns)
    figure = new_figure(2.4 * columns, 2.1 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for ax, (key, title) in zip(axes, present.items(), strict=False):
        ax.plot(*_logged(history, key), ".-", color=BLUE)
        ax.set_title(title, fontsize=9)
        ax.tick_params(labelbottom=True)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax in axes[len(present) :]:
        ax.remove()
    figure.supxlabel("optimiser step", fontsize=10)
    return figure


@styled
def reward_against_kl(runs: Mapping[str, Sequence[Mapping]]) -> Figure:
    """What each run's reward cost: one line a run, one point a log entry.

    Args:
        runs: name → log entries that hold `kl` (nats per response) and `reward`.
    """
    figure = new_figure()
    ax = figure.subplots()
    for label, history in runs.items():
        points = [
            (e["kl"], e["reward"]) for e in history if "kl" in e and "reward" in e
        ]
        if not points:
            raise ValueError(f"run {label!r} has no entry with both `kl` and `reward`")
        kl, reward = zip(*points, strict=True)
        line = ax.plot(kl, reward, ".-", label=label)[0]
        ax.plot(kl[-1], reward[-1], "o", color=line.get_color())
    ax.set(xlabel="KL to the start (nats per response)", ylabel="mean reward")
    ax.legend(title="● the end of a run", alignment="left")
    return figure


# --- evaluation


def _prompt_means(frame: pd.DataFrame, column: str = "reward") -> pd.Series:
    """The mean over a prompt's samples, indexed by prompt."""
    return frame.groupby("prompt_index")[column].mean()


def _two_histograms(ax: Axes, old: pd.Series, new: pd.Series, bins: int) -> None:
    """Before as a grey area, after as a blue outline, a vertical line at each mean."""
    edges = np.histogram_bin_edges(pd.concat([old, new]), bins=bins)
    grey, blue = np.histogram(old, edges)[0], np.histogram(new, edges)[0]
    ax.stairs(grey, edges, fill=True, color=BEFORE, alpha=0.4, label="before")
    ax.stairs(blue, edges, color=AFTER, linewidth=1.8, label="after")
    ax.axvline(old.mean(), color=BEFORE, linestyle="--")
    ax.axvline(new.mean(), color=AFTER, linestyle="--")


@styled
def resampled_means(
    means: Sequence[float], interval: tuple[float, float], observed: float
) -> Figure:
    """The means of bootstrap resamples, the interval that holds most of them shaded.

    Args:
        means: one mean a resample.
        interval: (low, high).
        observed: the mean of the data themselves.
    """
    figure = new_figure(height=2.8)
    ax = figure.subplots()
    ax.hist(means, bins=30, color=SKY)
    ax.axvspan(*interval, color=BLUE, alpha=0.12, label="interval")
    ax.axvline(observed, color=ORANGE, label="mean of the data")
    ax.set(xlabel="mean of a resample", ylabel="resamples")
    ax.legend()
    return figure


@styled
def paired_rewards(before: pd.DataFrame, after: pd.DataFrame) -> Figure:
    """Rewards before and after: all samples on the left, prompt by prompt on the right.

    Args:
        before, after: frames of `evaluate_policy` on the same prompts.
    """
    figure = new_figure(height=3.6)
    left, right = figure.subplots(1, 2)
    _two_histograms(left, before.reward, after.reward, bins=25)
    left.set(xlabel="reward of a sample", ylabel="samples", title="All samples")
    left.legend(title="dashed: the mean", alignment="left")
    old, new = _prompt_means(before), _prompt_means(after)
    right.scatter(old, new, s=18, color=AFTER)
    right.axline((old.mean(), old.mean()), slope=1, color=GREY, linestyle="--")
    right.set(xlabel="a prompt's mean reward before", ylabel="and after")
    right.set_title(f"{(new > old).sum()} of {len(old)} prompts above the diagonal")
    return figure


METRIC_LABELS = {
    "reward": "reward",
    "win_rate": "win rate against the start",
    "kl": "KL to the start (nats)",
    "tokens": "tokens per response",
    "eos_rate": "share ended by EOS",
    "distinct_2": "distinct word pairs (share)",
}


@styled
def forest(comparison: pd.DataFrame) -> Figure:
    """Differences with their intervals, one row a metric, each on its own scale.

    Args:
        comparison: index metric, columns `difference`, `low`, `high`, as
            `compare_policies` returns it; rows without a difference are left out.
    """
    rows = comparison.dropna(subset=["difference"])
    figure = new_figure(7.5, 0.75 * len(rows) + 0.5)
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for ax, (metric, row) in zip(axes, rows.iterrows(), strict=True):
        # An interval clear of zero is blue: the eye finds what moved before it reads.
        colour = BLUE if row["low"] > 0 or row["high"] < 0 else GREY
        ax.plot([row["low"], row["high"]], [0, 0], color=colour, linewidth=3)
        ax.plot(row["difference"], 0, "o", color=colour, markersize=8)
        ax.axvline(0, color="black", linewidth=1)
        reach = 1.15 * abs(row[["difference", "low", "high"]]).max() or 1.0
        ax.set(xlim=(-reach, reach), ylim=(-1, 1), yticks=[0])
        ax.set_yticklabels([METRIC_LABELS.get(metric, metric)])
        ax.spines["left"].set_visible(False)
        ax.tick_params(labelsize=8)
    axes[-1].set_xlabel("after − before, with the 95 % interval over prompts")
    return figure


@styled
def length_and_endings(before: pd.DataFrame, after: pd.DataFrame) -> Figure:
    """How long responses are and how many end by themselves, before and after.

    Args:
        before, after: frames of `evaluate_policy` (columns `tokens`, `finished`).
    """
    figure = new_figure()
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    _two_histograms(left, before.tokens, after.tokens, bins=16)
    left.set(xlabel="tokens of a response", ylabel="samples", title="Length")
    left.legend(title="dashed: the mean", alignment="left", loc="upper left")
    shares = [before.finished.mean(), after.finished.mean()]
    bars = right.bar(["before", "after"], shares, color=[BEFORE, AFTER], width=0.6)
    right.bar_label(bars, fmt="{:.2f}")
    right.set(ylim=(0, 1.08), title="Ended by its own EOS", ylabel="share of samples")
    right.grid(visible=False, axis="x")
    return figure


@styled
def reward_against_length(before: pd.DataFrame, after: pd.DataFrame) -> Figure:
    """Is the reward a length meter? One point a sample, cut responses hollow.

    Args:
        before, after: frames of `evaluate_policy`; Spearman's ρ stands in the titles.
    """
    figure = new_figure(height=3.4)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    runs = (("before", before, BEFORE), ("after", after, AFTER))
    for ax, (label, frame, colour) in zip(axes, runs, strict=True):
        whole, cut = frame[frame.finished], frame[~frame.finished]
        points = {"s": 16, "edgecolors": colour}
        ax.scatter(whole.tokens, whole.reward, c=colour, label="ended by EOS", **points)
        ax.scatter(cut.tokens, cut.reward, c="none", label="cut", **points)
        rho = frame.tokens.corr(frame.reward, method="spearman")
        ax.set(xlabel="tokens of a response", title=f"{label}: ρ = {rho:+.2f}")
    axes[0].set_ylabel("reward")
    axes[0].legend()
    return figure


@styled
def interval_width(
    prompts: Sequence[int], half_widths: Sequence[float], difference: float
) -> Figure:
    """Half the interval's width against the number of prompts, and the gain to detect.

    Args:
        prompts: numbers of prompts; half_widths: measured, in units of reward;
        difference: the observed gain. The dotted line is the 1/√n law through the
        last point.
    """
    figure = new_figure()
    ax = figure.subplots()
    n, widths = np.asarray(prompts, dtype=float), np.asarray(half_widths, dtype=float)
    law = widths[-1] * np.sqrt(n[-1] / n)
    ax.plot(n, widths, "o-", color=BLUE, label="half-width measured")
    ax.plot(n, law, ":", color=GREY, label="1/√n through the last point")
    ax.axhline(difference, color=ORANGE, linestyle="--", label="gain observed")
    ax.set(xlabel="prompts", ylabel="reward", ylim=(0, None), xticks=n)
    ax.legend()
    return figure


# --- rankings


@styled
def error_by_judgments(errors: pd.DataFrame) -> Figure:
    """How fast win rates are learnt when one judgment ranks K responses.

    Args:
        errors: root mean squared error of the pairwise win rates; the index counts
            judgments, a column is one K.
    """
    figure = new_figure()
    ax = figure.subplots()
    for k in errors:
        ax.loglog(errors.index, errors[k], "o-", label=f"K = {k}")
    ax.set(xlabel="judgments asked for", ylabel="error of a pair's win rate")
    ax.set_xticks(errors.index)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    ax.legend()
    return figure


@styled
def mean_rank_by_model(intervals: pd.DataFrame, responses: int = 7) -> Figure:
    """Mean rank of each model's responses with its interval, the best on top.

    Args:
        intervals: columns `estimate`, `low`, `high` (ranks from 1); index: the model.
        responses: how many a ranking has; half-way is marked.
    """
    intervals = intervals.sort_values("estimate", ascending=False)
    figure = new_figure(height=0.6 + 0.32 * len(intervals))
    ax = figure.subplots()
    ends = intervals[["low", "high"]].sub(intervals.estimate, axis=0).abs().T
    ax.errorbar(intervals.estimate, intervals.index, xerr=ends, fmt="o", capsize=3)
    ax.axvline((1 + responses) / 2, color=GREY, linestyle="--", linewidth=1.2)
    ax.set(xlabel="mean rank (1 is best; dashed: the middle)")
    return figure


@styled
def position_bias(
    positions: pd.DataFrame, others: Mapping[str, pd.DataFrame] | None = None
) -> Figure:
    """First-place share and mean rank by the position in which a response was shown.

    Args:
        positions: index: position from 1; columns `first_share`, `mean_rank`, each
            with `_low` and `_high` beside it.
        others: frames of other judges to draw as lines, without intervals, by name.
    """
    figure = new_figure(height=3.4)
    count = len(positions)
    panels = {"first_share": 1 / count, "mean_rank": (1 + count) / 2}
    lines = list((others or {}).items())
    for ax, (column, fair) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        value = positions[column]
        ends = [value - positions[f"{column}_low"], positions[f"{column}_high"] - value]
        ax.errorbar(value.index, value, yerr=ends, fmt="o", capsize=3, label="this log")
        for colour, (name, frame) in zip(CYCLE[1:], lines, strict=False):
            ax.plot(frame.index, frame[column], "s--", color=colour, label=name)
        _reference_line(ax, fair, "no bias")
        ax.set(xlabel="position shown", ylabel=column.replace("_", " "))
    named = figure.axes[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside upper center", ncols=3)
    return figure


@styled
def rank_change_by_move(moves: pd.DataFrame, slope: float) -> Figure:
    """What moving a response to another position did to its rank.

    Args:
        moves: index: positions moved down; columns `estimate`, `low`, `high` of the
            change in rank (above 0: judged worse).
        slope: ranks per position, drawn as a line through the origin.
    """
    figure = new_figure()
    ax = figure.subplots()
    ends = [moves.estimate - moves.low, moves.high - moves.estimate]
    ax.errorbar(moves.index, moves.estimate, yerr=ends, fmt="o", capsize=3)
    label = f"slope {slope:+.3f} ranks a position"
    ax.plot(moves.index, slope * moves.index, color=ORANGE, label=label)
    _reference_line(ax, 0, "no bias")
    ax.set(xlabel="positions moved down between the passes", ylabel="change in rank")
    ax.legend()
    return figure


@styled
def repeat_agreement(taus: Sequence[float], by_gap: pd.Series) -> Figure:
    """How alike two passes of one judge are, prompt by prompt and pair by pair.

    Args:
        taus: Kendall's τ between the passes, one a prompt.
        by_gap: share of pairs in the same order both times; index: the difference in
            rank in the first pass.
    """
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    left.hist(taus, bins=np.linspace(-1, 1, 43), color=BLUE)
    left.axvline(np.mean(taus), color=ORANGE, linestyle="--", label="mean")
    left.set(xlabel="Kendall's τ between passes", ylabel="prompts")
    left.set(xlim=(min(0, *taus), 1.03))
    left.legend()
    right.plot(by_gap.index, by_gap, "o-")
    _reference_line(right, 0.5, "coin")
    right.set(xlabel="difference in rank, first pass", ylabel="pairs in the same order")
    right.set(ylim=(0.45, 1.02))
    right.legend()
    return figure


@styled
def length_by_rank(lengths: Mapping[str, Sequence[float]]) -> Figure:
    """Mean length of the response at each rank, one panel a data set.

    Args:
        lengths: mean characters by rank, best first, under each set's name.
    """
    figure = new_figure()
    panels = np.atleast_1d(figure.subplots(1, len(lengths), sharey=True))
    for ax, colour, (name, means) in zip(panels, CYCLE, lengths.items(), strict=False):
        places = range(1, len(means) + 1)
        ax.bar(places, means, color=colour, tick_label=places)
        ax.set(xlabel="rank (1 is best)", title=name)
        ax.grid(axis="x", visible=False)
    panels[0].set(ylabel="mean characters")
    return figure
