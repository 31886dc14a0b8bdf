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
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

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


def _by_gap(scores: np.ndarray, **options) -> pd.DataFrame:
    """Accuracy and number of pairs (`n`) by gap 1 … K-1 of (N, K) scores."""
    from starling_lib import metrics  # which loads torch; most figures do without

    table = metrics.accuracy_by_gap(scores, **options)
    return table.reindex(range(1, scores.shape[1]))


@styled
def accuracy_by_gap(scores: np.ndarray, lengths: np.ndarray | None = None) -> Figure:
    """Accuracy on pairs 1, 2, … K-1 ranks apart, with the "longer wins" rule beside it.

    Upright lines are the model's 95 % bootstrap intervals over prompts.

    Args:
        scores: (N, K) scores, responses best first, NaN where a row has fewer than K.
        lengths: (N, K) response lengths in any unit; draws the rule when given.
    """
    scores = np.asarray(scores, dtype=float)
    model = _by_gap(scores)
    figure = new_figure()
    ax = figure.subplots()
    ax.plot(model["estimate"], "o-", color=BLUE, label="reward model")
    ax.vlines(model.index, model["low"], model["high"], color=BLUE, linewidth=1.2)
    if lengths is not None:
        lengths = np.where(np.isnan(scores), np.nan, np.asarray(lengths, dtype=float))
        rule = _by_gap(lengths, resamples=2)  # its intervals are not drawn
        ax.plot(rule["estimate"], "s--", color=GREY, label="longer wins")
    ax.axhline(0.5, color=GREY, linestyle=":", linewidth=1.2, label="coin")
    counts = [
        f"{gap}\n{n} pairs" for gap, n in model["n"].fillna(0).astype(int).items()
    ]
    ax.set_xticks(model.index, counts)
    ax.set(xlabel="ranks apart", ylabel="share of pairs ordered right", ylim=(0, 1.03))
    ax.legend(loc="lower left")
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


@styled
def policy_study(runs: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Several methods: reward against KL while training, and what is left held out.

    Args:
        runs: one row a run: `method`, `curve` (its log entries with `kl` and `reward`,
            empty where a trainer logs no KL). Lines are means over a method's runs,
            bands reach from its lowest run to its highest.
        table: `studies.summary` of them: gains with intervals, proxy beside gold.
    """
    figure = new_figure(7.5, 3.6)
    path, held_out = figure.subplots(1, 2)
    colours = (*CYCLE, "black", "tab:brown", "tab:purple")  # grey: both judges
    methods = [method for method in table.index if method != "start"]
    for i, method in enumerate(methods):
        own = runs[runs["method"] == method]["curve"]
        colour = colours[i % len(colours)]
        with_kl = [curve for curve in own.dropna() if curve and "kl" in curve[0]]
        _draw_paths(path, with_kl, colour)
        _draw_gains(held_out, table.loc[method], colour, method)
    path.set(title="While training", ylabel="mean proxy reward")
    held_out.set(title="Held-out prompts", ylabel="gain over the start")
    for ax in (path, held_out):
        ax.set_xlabel("KL to the start (nats per response)")
    held_out.plot([], [], "o", c=GREY, label="proxy")
    held_out.plot([], [], "s", c=GREY, mfc="white", label="gold")
    figure.legend(
        *held_out.get_legend_handles_labels(), loc="outside upper center", ncols=5
    )
    return figure


def _draw_paths(ax: Axes, curves: Sequence[Sequence[Mapping]], colour: str) -> None:
    if not curves:
        return
    points = [[(entry["kl"], entry["reward"]) for entry in curve] for curve in curves]
    kl, reward = np.moveaxis(np.array(points, dtype=float), -1, 0)  # (runs, entries)
    ax.plot(kl.mean(0), reward.mean(0), ".-", c=colour)
    ends = reward.min(0), reward.max(0)
    ax.fill_between(kl.mean(0), *ends, color=colour, alpha=0.15, linewidth=0)


def _draw_gains(ax: Axes, row: pd.Series, colour: str, label: str) -> None:
    styles = {
        "proxy": {"fmt": "o", "label": label},
        "gold": {"fmt": "s", "mfc": "white"},
    }
    for measure, style in styles.items():
        middle, low, high = row[measure][["estimate", "low", "high"]]
        ends = [[middle - low], [high - middle]]
        aside = 1.0 if measure == "proxy" else 1.03  # so that bars do not hide bars
        ax.errorbar(
            row["", "kl"] * aside, middle, ends, c=colour, elinewidth=1, **style
        )


# --- evaluation


def _prompt_means(frame: pd.DataFrame, column: str = "reward") -> pd.Series:
    """The mean over a prompt's samples, indexed by prompt."""
    return frame.groupby("prompt_index")[column].mean()


def _two_histograms(ax: Axes, old: pd.Series, new: pd.Series, bins: int) -> None:
    """Before as a grey area, after as a blue outline, a vertical line at each mean."""
    edges = np.histogram_bin_edges(pd.concat([old, new]).dropna(), bins=bins)
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
    numbers: Sequence[int],
    half_widths: Sequence[float],
    difference: float,
    unit: str = "prompts",
    scale: str = "reward",
) -> Figure:
    """Half the interval's width against the number of prompts, and the gain to detect.

    Args:
        numbers: of prompts, or of another `unit`.
        half_widths: measured, in units of `scale`.
        difference: the one observed. The dotted line is the 1/√n law through the last
            point.
    """
    figure = new_figure()
    ax = figure.subplots()
    n, widths = np.asarray(numbers, dtype=float), np.asarray(half_widths, dtype=float)
    law = widths[-1] * np.sqrt(n[-1] / n)
    ax.plot(n, widths, "o-", color=BLUE, label="half-width measured")
    ax.plot(n, law, ":", color=GREY, label="1/√n through the last point")
    ax.axhline(difference, color=ORANGE, linestyle="--", label="difference observed")
    ax.set(xlabel=unit, ylabel=scale, ylim=(0, None), xticks=n)
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


def _ends(frame: pd.DataFrame, value: str, low: str, high: str) -> np.ndarray:
    """(2, n) distances from a value down to `low` and up to `high`, for `errorbar`.

    NaN, and so not drawn, where the frame has no interval.
    """
    ends = frame.reindex(columns=[low, high]).sub(frame[value], axis=0)
    return ends.abs().to_numpy(dtype=float).T


@styled
def position_bias(positions: pd.DataFrame) -> Figure:
    """First-place share and mean rank by the position in which a response was shown.

    Args:
        positions: as `audit.position_bias` gives it, or `position_bias_by` with a
            `variant` column: then one colour a variant, set side by side. Published
            figures may come without intervals (`position, first_share, mean_rank`).
    """
    if "variant" not in positions:
        positions = positions.assign(variant="this log")
    variants = list(positions.groupby("variant", sort=False))
    count = positions["position"].max() + 1
    figure = new_figure(height=3.6)
    panels = (
        ("first_share", "first", 1 / count),
        ("mean_rank", "rank", (1 + count) / 2),
    )
    for ax, (value, name, fair) in zip(figure.subplots(1, 2), panels, strict=True):
        for i, (label, part) in enumerate(variants):
            shift = 0.14 * (i - (len(variants) - 1) / 2)
            ends = _ends(part, value, f"{name}_low", f"{name}_high")
            style = {"fmt": "o", "markersize": 5, "capsize": 2, "label": label}
            ax.errorbar(part["position"] + shift, part[value], yerr=ends, **style)
        _reference_line(ax, fair, "no bias")
        ax.set(xlabel="position shown (0 is first)", xticks=range(count))
        ax.grid(axis="x", visible=False)
    left, right = figure.axes
    left.set(ylabel="share ranked first", ylim=(0, None))
    right.set(ylabel="mean rank (1 is best)")
    legend = left.get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=min(4, len(variants) + 1))
    return figure


@styled
def model_ratings(ratings: pd.DataFrame) -> Figure:
    """Each model's mean rank and Plackett-Luce strength with intervals, best on top.

    Args:
        ratings: as `audit.model_ratings` gives it, or the lines of it that are wanted.
            A hollow strength has no interval: the model won or lost everything, or was
            seen on one prompt only.
    """
    ratings = ratings.sort_values("mean_rank", ascending=False)
    figure = new_figure(height=0.9 + 0.3 * len(ratings))
    left, right = figure.subplots(1, 2, sharey=True)
    style = {"fmt": "o", "capsize": 3}
    ends = _ends(ratings, "mean_rank", "rank_low", "rank_high")
    left.errorbar(ratings["mean_rank"], ratings["model"], xerr=ends, **style)
    known = ratings["strength_low"].notna()
    ends = _ends(ratings, "strength", "strength_low", "strength_high")
    right.errorbar(
        ratings["strength"], ratings["model"], xerr=ends, **style, markersize=0
    )
    for part, face in ((ratings[known], BLUE), (ratings[~known], "white")):
        right.plot(part["strength"], part["model"], "o", color=BLUE, mfc=face)
    right.axvline(0, color=GREY, linestyle="--", linewidth=1.2)
    left.set(xlabel="mean rank (1 is best)", ylim=(-0.6, len(ratings) - 0.4))
    right.set(xlabel="strength (log odds; 0: average)")
    if not known.all():
        right.set_title("hollow: no interval to be had", fontsize=9, color=GREY)
    return figure


@styled
def win_matrix(share: pd.DataFrame, pairs: pd.DataFrame | None = None) -> Figure:
    """Who beats whom: per cent of pairs that the row's model won against the column's.

    Args:
        share, pairs: the two frames of `audit.win_matrix`. With `pairs`, their number
            stands small below the share.
    """
    count = len(share)
    side = max(4.2, 1.8 + 0.52 * count)
    figure = new_figure(side + 0.8, side)
    ax = figure.subplots()
    values = share.to_numpy(dtype=float)
    # Orange loses, blue wins, white is even: told apart by colour-blind readers too.
    colours = LinearSegmentedColormap.from_list("wins", [ORANGE, "white", BLUE])
    ax.imshow(values, cmap=colours, vmin=0, vmax=1)
    for i, j in np.argwhere(~np.isnan(values)):
        white = abs(values[i, j] - 0.5) > 0.4
        style = {"ha": "center", "color": "white" if white else "black"}
        up = 0 if pairs is None else 0.12
        ax.text(j, i - up, f"{values[i, j]:.0%}", va="center", fontsize=9, **style)
        if pairs is not None:
            ax.text(j, i + 0.27, pairs.iloc[i, j], va="center", fontsize=6.5, **style)
    ax.set_xticks(range(count), share.columns, rotation=40, ha="right")
    ax.set_yticks(range(count), share.index)
    ax.set_facecolor(PALE)  # never met: grey, not the white of an even match
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    below = ", number of pairs below" if pairs is not None else ""
    ax.set_title(f"pairs that the row's model won{below}", fontsize=9, color=GREY)
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
def repeat_agreement(taus: Sequence[float], by_gap: pd.DataFrame) -> Figure:
    """How alike two passes of one judge are, ranking by ranking and pair by pair.

    Args:
        taus: Kendall's τ between the passes, one a ranking.
        by_gap: `gap, same, low, high`: share of pairs in the same order both times by
            their difference in rank in the first pass, as `audit.repeat_agreement` has.
    """
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    left.hist(taus, bins=np.linspace(-1, 1, 43), color=BLUE)
    mean = np.mean(taus)
    left.axvline(mean, color=ORANGE, linestyle="--", label=f"mean {mean:.2f}")
    left.set(xlabel="Kendall's τ between passes", ylabel="rankings")
    left.set(xlim=(min(0, *taus), 1.03))
    left.legend(loc="upper left")
    ends = _ends(by_gap, "same", "low", "high")
    right.errorbar(by_gap["gap"], by_gap["same"], yerr=ends, fmt="o-", capsize=3)
    _reference_line(right, 0.5, "coin")
    right.set(xlabel="difference in rank, first pass", ylabel="pairs in the same order")
    right.set(ylim=(min(0.45, np.nanmin(by_gap["low"]) - 0.05), 1.02))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(loc="center right")
    return figure


@styled
def length_by_rank(lengths: Mapping[str, pd.DataFrame]) -> Figure:
    """Mean length of the response at each rank with its interval, one panel a data set.

    Args:
        lengths: under each set's name a frame of `audit.length_by_rank`; published
            means may come without intervals (`rank, chars`).
    """
    figure = new_figure()
    panels = np.atleast_1d(figure.subplots(1, len(lengths), sharey=True))
    for i, (ax, (name, frame)) in enumerate(zip(panels, lengths.items(), strict=True)):
        ends = _ends(frame, "chars", "low", "high")
        style = {"ecolor": GREY, "capsize": 3, "color": CYCLE[i % len(CYCLE)]}
        ax.bar(frame["rank"], frame["chars"], yerr=ends, **style)
        ax.set(xlabel="rank (1 is best)", title=name, xticks=frame["rank"])
        ax.grid(axis="x", visible=False)
    panels[0].set(ylabel="mean characters")
    return figure


@styled
def length_bias(bias: pd.DataFrame) -> Figure:
    """How often the longer response wins, condition by condition, against one half.

    Args:
        bias: as `audit.length_bias` gives it; conditions without pairs are left out.
    """
    bias = bias[bias["pairs"] > 0][::-1]
    figure = new_figure(height=0.9 + 0.38 * len(bias))
    ax = figure.subplots()
    names = [
        f"{c} ({n:,} pairs)" for c, n in zip(bias.condition, bias.pairs, strict=True)
    ]
    ends = _ends(bias, "longer_wins", "low", "high")
    ax.errorbar(bias["longer_wins"], names, xerr=ends, fmt="o", capsize=3)
    ax.axvline(0.5, color=GREY, linestyle="--", linewidth=1.2)
    ax.set(xlabel="share of pairs won by the longer response (dashed: even)")
    ax.set(ylim=(-0.6, len(bias) - 0.4))
    return figure


@styled
def composition(counts: pd.DataFrame) -> Figure:
    """What a set is made of: rows by source, by turns, by good nature and by size.

    Args:
        counts: as `audit.composition` gives it.
    """
    fields = counts.groupby("field", sort=False).ngroup()
    # One free line above each field, for its name.
    lines = np.arange(len(counts)) + fields + 1
    figure = new_figure(height=0.5 + 0.22 * (lines.iloc[-1] + 1))
    ax = figure.subplots()
    bars = ax.barh(lines, counts["share"], color=SKY, height=0.75)
    labels = counts["rows"].map(" {:,}".format) + counts["share"].map(
        " ({:.0%})".format
    )
    ax.bar_label(bars, labels, fontsize=8, color=GREY)
    first = ~counts["field"].duplicated()
    for field, line in zip(counts["field"][first], lines[first] - 1, strict=True):
        ax.text(0, line, field.replace("_", " "), va="center", fontweight="bold")
    ax.set_yticks(lines, counts["value"])
    ax.set(xlabel="share of rows", xlim=(0, 1.15), ylim=(lines.iloc[-1] + 0.6, -0.6))
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.grid(visible=False, axis="y")
    return figure


@styled
def token_lengths(lengths: pd.DataFrame, limits: Sequence[int] = ()) -> Figure:
    """How long prompts, and prompts with a response, are; what each limit would cut.

    Args:
        lengths: as `audit.token_lengths` gives it.
        limits: values of `max_length`, dashed lines with the share that is longer.
    """
    total = lengths["total_tokens"]
    prompts = lengths.drop_duplicates("row")["prompt_tokens"]
    edges = np.geomspace(prompts.min(), max(total.max(), *limits, 2) * 1.02, 41)
    figure = new_figure(height=3.4)
    ax = figure.subplots()
    for values, colour, label in (
        (prompts, GREY, "prompts"),
        (total, BLUE, "prompt + response"),
    ):
        shares = np.histogram(values, edges)[0] / len(values)
        ax.stairs(shares, edges, color=colour, fill=True, alpha=0.35, label=label)
    for limit in limits:
        ax.axvline(limit, color=ORANGE, linestyle="--", linewidth=1.3)
    # Head room for the legend.
    ax.set(
        xscale="log", xlabel="tokens", ylabel="share", ylim=(0, 1.3 * ax.get_ylim()[1])
    )
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    if len(limits):
        top = ax.secondary_xaxis("top")
        names = [f"{limit}\n{(total > limit).mean():.1%} cut" for limit in limits]
        top.set_xticks(limits, names, fontsize=8)
        top.tick_params(which="minor", length=0, labeltop=False)
    ax.legend(loc="upper left")
    return figure


# --- reward models


def _intervals(ax: Axes, x: Sequence, table: pd.DataFrame, value: str, **style) -> None:
    """Points with the interval `low` to `high` of a table drawn as error bars."""
    middle = table[value].to_numpy(dtype=float)
    ends = np.stack([middle - table["low"], table["high"] - middle])
    style = {"fmt": "o-", "capsize": 3, "color": BLUE, **style}
    ax.errorbar(x, middle, yerr=ends, **style)


def _draw_reliability(ax: Axes, table: pd.DataFrame) -> None:
    ax.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", linewidth=1.2)
    _intervals(ax, table["predicted"], table, "observed")
    counts = ax.twinx()
    counts.bar(table["predicted"], table["n"], width=0.03, color=SKY, alpha=0.3)
    counts.set(yticks=[], ylim=(0, 4 * max(table["n"], default=1)))
    counts.spines["left"].set_visible(False)
    lowest = np.nanmin([0.45, *table["observed"], *table["low"]])
    ax.set(xlim=(0.48, 1.02), ylim=(lowest - 0.02, 1.03))
    ax.set(xlabel="predicted: σ(|Δ score|); bars: pairs")
    ax.set(ylabel="judge agrees (share of pairs)")


@styled
def reliability(table: pd.DataFrame, ece: float | None = None) -> Figure:
    """Is a difference in score worth the probability it claims? Dashed: calibrated.

    Args:
        table: as `metrics.calibration` returns it; the bars show how many pairs a bin has.
        ece: expected calibration error, for the title.
    """
    figure = new_figure(4.6, 3.6)
    ax = figure.subplots()
    _draw_reliability(ax, table)
    if ece is not None:
        ax.set_title(f"calibration error {ece:.3f}")
    return figure


def _draw_gaps(ax: Axes, by_gap: pd.DataFrame, rule: pd.DataFrame | None) -> None:
    _intervals(ax, by_gap.index, by_gap, "estimate", label="reward model")
    if rule is not None:
        ax.plot(rule.index, rule["estimate"], "s--", color=GREY, label="longer wins")
    ax.axhline(0.5, color=GREY, linestyle=":", linewidth=1.2, label="coin")
    ax.set(xlabel="ranks apart", ylabel="share of pairs ordered right", ylim=(0, 1.03))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="lower right")


def _draw_ranks(ax: Axes, responses: pd.DataFrame) -> None:
    groups = [part["score"].to_numpy() for _, part in responses.groupby("rank")]
    ax.boxplot(
        groups,
        tick_labels=[f"{rank:g}" for rank in sorted(responses["rank"].unique())],
        widths=0.6,
        patch_artist=True,
        boxprops={"facecolor": SKY, "edgecolor": BLUE, "alpha": 0.6},
        medianprops={"color": ORANGE, "linewidth": 2},
        flierprops={"marker": ".", "markeredgecolor": GREY, "markersize": 3},
    )
    ax.set(xlabel="rank given by the judge (1 = best)", ylabel="score − prompt's mean")


def _draw_lengths(ax: Axes, responses: pd.DataFrame) -> None:
    points = {"s": 8, "alpha": 0.35, "linewidths": 0, "rasterized": True}
    ax.scatter(responses["length"], responses["score"], c=BLUE, **points)
    ax.axhline(0, color=GREY, linewidth=1)
    ax.set(xlabel="length of the response", ylabel="score − prompt's mean")
    if responses["length"].min() > 0:
        ax.set_xscale("log")


@styled
def reward_report(
    by_gap: pd.DataFrame,
    reliability: pd.DataFrame,
    responses: pd.DataFrame,
    longer_wins: pd.DataFrame | None = None,
    titles: Sequence[str] = ("", "", "", ""),
) -> Figure:
    """A reward model on held-out rankings: four panels, two of them with intervals.

    Accuracy by rank gap, reliability, score by rank, score against length.

    Args:
        by_gap: as `metrics.accuracy_by_gap` gives it for the scores, and `longer_wins`
            for the lengths.
        reliability: as `metrics.calibration` gives it.
        responses: one row a response: `rank`, `score` (less its prompt's mean), `length`
            (any unit; without that column the panel says so).
        titles: of the panels.
    """
    figure = new_figure(7.5, 6.2)
    panels = figure.subplots(2, 2).ravel()
    _draw_gaps(panels[0], by_gap, longer_wins)
    _draw_reliability(panels[1], reliability)
    _draw_ranks(panels[2], responses)
    if "length" in responses:
        _draw_lengths(panels[3], responses)
    else:
        panels[3].set_axis_off()
        panels[3].text(0.5, 0.5, "no lengths given", ha="center", color=GREY)
    for ax, title in zip(panels, titles, strict=True):
        ax.set_title(title)
    return figure


@styled
def loss_study(runs: pd.DataFrame, measures: Mapping[str, str]) -> Figure:
    """What each loss reaches from how much of the data: a panel a measure.

    Args:
        runs: one row a trained model: `loss`, `fraction` of the rows, `seed` and the
            measures. Dots are seeds, lines their means.
        measures: column → what its axis says.
    """
    figure = new_figure(7.5, 2.9)
    panels = np.atleast_1d(figure.subplots(1, len(measures)))
    losses = list(runs["loss"].unique())
    for ax, (measure, label) in zip(panels, measures.items(), strict=True):
        for i, loss in enumerate(losses):
            part = runs[runs["loss"] == loss]
            aside = 0.012 * (i - (len(losses) - 1) / 2)  # so that dots do not hide dots
            mean = part.groupby("fraction")[measure].mean()
            ax.plot(part["fraction"] + aside, part[measure], ".", c=CYCLE[i], alpha=0.5)
            ax.plot(mean.index + aside, mean, "o-", c=CYCLE[i], label=loss)
        ax.set(xlabel="share of the rows", ylabel=label)
        ax.set_xticks(sorted(runs["fraction"].unique()))
        ax.xaxis.set_major_formatter(PercentFormatter(1, 0))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4
    )
    return figure


@styled
def recovery(results: pd.DataFrame, measure: str = "error") -> Figure:
    """Error of each loss against the number of rankings, one panel a judge.

    Args:
        results: as `simulation.simulate` returns them; lines are means over seeds.
        measure: its column to draw, "error" (nats) or "angle" (degrees).
    """
    judges = list(results["judge"].unique())
    figure = new_figure(7.5, 2.9 * -(-len(judges) // 2))
    panels = figure.subplots(-(-len(judges) // 2), 2, sharex=True, sharey=True).ravel()
    for ax, judge in zip(panels, judges, strict=False):
        part = results[results["judge"] == judge]
        for name, marker in zip(part["estimator"].unique(), "os^vDP", strict=False):
            mean = part[part["estimator"] == name].groupby("n")[measure].mean()
            ax.loglog(mean.index, mean, f"{marker}-", label=name)
        ax.set(title=f"judge: {judge}", xticks=sorted(results["n"].unique()))
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        ax.tick_params(labelbottom=True)
    for ax in panels[len(judges) :]:
        ax.remove()
    units = {
        "error": "error of Δ reward (nats)",
        "angle": "angle to the truth (degrees)",
    }
    figure.supylabel(units.get(measure, measure), fontsize=10)
    figure.supxlabel("rankings", fontsize=10)
    named = panels[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside upper center", ncols=len(named[1]))
    return figure


@styled
def training_speed(rows: Sequence[Mapping]) -> Figure:
    """Prompts a second of every way of training, on a logarithmic axis.

    Args:
        rows: `what`, `prompts_per_second`, `times_trl` (multiple of the first rival's
            speed), as `tests/benchmarks/bench_reward.py` writes them.
    """
    names = [row["what"] for row in rows][::-1]
    speeds = [row["prompts_per_second"] for row in rows][::-1]
    ours = [not name.startswith("TRL") for name in names]
    figure = new_figure(height=0.9 + 0.27 * len(rows))
    ax = figure.subplots()
    bars = ax.barh(names, speeds, 0.7, color=[BLUE if own else GREY for own in ours])
    ax.bar_label(bars, [f"× {row['times_trl']:.1f}" for row in rows][::-1], padding=3)
    ax.set(xscale="log", xlabel="prompts a second (each of seven responses)")
    ax.set_xlim(min(speeds) / 1.5, max(speeds) * 2)
    ax.grid(axis="y", visible=False)
    return figure


@styled
def efficiency(
    table: pd.DataFrame, names: tuple[str, str] = ("MLE_2", "MLE_K")
) -> Figure:
    """Ratio of two losses' errors on the same rankings, with intervals over seeds.

    Args:
        table: as `simulation.efficiency` returns it.
        names: the loss above and the loss below the fraction bar.
    """
    figure = new_figure(height=3.4)
    ax = figure.subplots()
    judges = list(table.groupby("judge", sort=False))
    for i, (judge, part) in enumerate(judges):
        shifted = part["n"] * 1.04 ** (i - (len(judges) - 1) / 2)  # bars side by side
        _intervals(ax, shifted, part, "ratio", color=CYCLE[i % 6], label=judge)
    _reference_line(ax, 1, "equal errors")
    ax.set_xscale("log")
    ax.set_xticks(sorted(table["n"].unique()))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    above, below = names
    ax.set(xlabel="rankings", ylabel=f"error of {above} / error of {below}")
    ax.set(title=f"above 1: {below} is nearer the truth")
    figure.legend(loc="outside right upper", title="judge", alignment="left")
    return figure


# --- benchmarks

THIN = {"elinewidth": 1, "capsize": 2}


def _only_categories(parts: Sequence[str]) -> list[str]:
    """Of the parts of a score, those that are categories of questions."""
    sums = ("turn_", "overall", "failed")
    return [part for part in dict.fromkeys(parts) if not part.startswith(sums)]


@styled
def category_scores(
    intervals: pd.DataFrame, parts: Sequence[str] | None = None, top: float = 10
) -> Figure:
    """Mean score of several models in every category, with intervals.

    Args:
        intervals: index (model, part), columns `score, low, high`, models in the order
            in which they should stand.
        parts: which parts, in what order; default the categories, without turns and
            overall.
        top: the best score there is.
    """
    models = list(intervals.index.unique(0))
    parts = list(parts or _only_categories(intervals.index.unique(1)))
    width = 0.8 / len(models)
    figure = new_figure(height=3.4)
    ax = figure.subplots()
    for i, model in enumerate(models):
        part = intervals.loc[model].reindex(parts)
        middle = np.arange(len(parts)) + width * (i - (len(models) - 1) / 2)
        ends = _ends(part, "score", "low", "high")
        style = {"color": CYCLE[i % len(CYCLE)], "ecolor": "black", "label": model}
        ax.bar(middle, part["score"], 0.92 * width, yerr=ends, **style, error_kw=THIN)
    ax.set_xticks(range(len(parts)), parts, rotation=25, ha="right")
    ax.set(ylabel="mean score", ylim=(0, top))
    ax.grid(axis="x", visible=False)
    figure.legend(loc="outside upper center", ncols=min(3, len(models)))
    return figure


@styled
def category_radar(
    scores: pd.DataFrame, parts: Sequence[str] | None = None, top: float = 10
) -> Figure:
    """One polygon a model over the categories: the usual picture of MT-Bench.

    It shows profiles, not certainty, and its areas say nothing (they depend on the order
    of the categories): see `category_scores` for what can be told apart.

    Args:
        scores: mean scores, one row a model, one column a category.
        parts, top: as in `category_scores`.
    """
    scores = scores[list(parts or _only_categories(scores.columns))]
    angles = np.linspace(0, 2 * np.pi, scores.shape[1], endpoint=False)
    figure = new_figure(5.6, 4.2)
    ax = figure.subplots(subplot_kw={"projection": "polar"})
    ax.set(theta_zero_location="N", theta_direction=-1, ylim=(0, top))
    for i, (model, row) in enumerate(scores.iterrows()):
        style = {"color": CYCLE[i % len(CYCLE)]}
        values = row.to_numpy(dtype=float)
        closed = np.append(angles, angles[0]), np.append(values, values[0])
        ax.plot(*closed, **style, marker=".", label=model)
        ax.fill(*closed, **style, alpha=0.07)
    ax.set_xticks(angles, scores.columns)
    for label, side in zip(ax.get_xticklabels(), np.sin(angles), strict=True):
        label.set_ha("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    ax.tick_params(axis="x", pad=2)
    ax.tick_params(axis="y", labelsize=8)
    ax.set_rlabel_position(180 / scores.shape[1])  # between two spokes
    ax.spines["polar"].set_color(PALE)
    figure.legend(loc="outside lower center", ncols=min(3, len(scores)))
    return figure


@styled
def score_differences(differences: pd.DataFrame, unit: str = "points") -> Figure:
    """Paired differences of scores in every part, with intervals; dashed: none.

    Args:
        differences: index (a, b, part), columns `difference, low, high`.
        unit: of the scores.
    """
    pairs = list(differences.groupby(level=[0, 1], sort=False))
    parts = list(differences.index.unique(2))[::-1]
    figure = new_figure(height=1.1 + 0.22 * len(parts) * (1 + 0.4 * (len(pairs) - 1)))
    ax = figure.subplots()
    for i, ((a, b), part) in enumerate(pairs):
        part = part.droplevel([0, 1]).reindex(parts)
        shift = 0.5 * ((len(pairs) - 1) / 2 - i) / len(pairs)
        ends = _ends(part, "difference", "low", "high")
        style = {"fmt": "o", "capsize": 3, "color": CYCLE[i % len(CYCLE)]}
        places = np.arange(len(parts)) + shift
        ax.errorbar(part["difference"], places, xerr=ends, label=f"{a} − {b}", **style)
    ax.axvline(0, color=GREY, linestyle="--", linewidth=1.2)
    ax.set_yticks(range(len(parts)), parts)
    ax.set(xlabel=f"difference ({unit})", ylim=(-0.6, len(parts) - 0.4))
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=min(3, len(pairs)))
    return figure


OUTCOMES = {"consistent": BLUE, "first": ORANGE, "second": YELLOW, "error": GREY}


@styled
def swap_consistency(judges: Mapping[str, pd.DataFrame]) -> Figure:
    """What swapping two answers does to each judge's verdict, one bar a judge.

    Args:
        judges: name → table of `win_rates.swap_consistency`, whose interval of the
            consistent share is drawn; published shares may come without (index outcome,
            column `share`).
    """
    names = list(judges)[::-1]
    shares = pd.DataFrame({name: judges[name]["share"] for name in names}).fillna(0)
    figure = new_figure(height=1.2 + 0.42 * len(names))
    ax = figure.subplots()
    left = np.zeros(len(names))
    for outcome, colour in OUTCOMES.items():
        if outcome not in shares.index or not shares.loc[outcome].any():
            continue
        values = shares.loc[outcome].to_numpy(dtype=float)
        label = f"favours {outcome}" if outcome in ("first", "second") else outcome
        bars = ax.barh(names, values, 0.7, left, color=colour, label=label)
        # A piece narrower than its figure goes without.
        texts = [f"{value:.0%}" if value >= 0.045 else "" for value in values]
        style = {"color": "black" if colour == YELLOW else "white", "fontsize": 9}
        ax.bar_label(bars, texts, label_type="center", **style)
        left += values
    consistent = pd.DataFrame([judges[name].loc["consistent"] for name in names])
    ends = _ends(consistent, "share", "low", "high")
    style = {"fmt": "none", "ecolor": "black", **THIN}
    ax.errorbar(consistent["share"], np.arange(len(names)) + 0.26, xerr=ends, **style)
    ax.set(xlim=(0, 1), xlabel="share of pairs judged in both orders")
    ax.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=4)
    return figure


@styled
def bradley_terry(ratings: pd.DataFrame) -> Figure:
    """Bradley-Terry ratings on Elo's scale with their intervals, best on top.

    Args:
        ratings: as `win_rates.bradley_terry` gives it. A hollow rating has no interval,
            or an endless one.
    """
    ratings = ratings.sort_values("rating")
    ends = _ends(ratings, "rating", "rating_low", "rating_high")
    known = np.isfinite(ends).all(axis=0)
    figure = new_figure(height=0.9 + 0.3 * len(ratings))
    ax = figure.subplots()
    style = {"fmt": "none", "capsize": 3, "ecolor": BLUE}
    ax.errorbar(
        ratings["rating"], ratings["model"], xerr=np.where(known, ends, 0), **style
    )
    for chosen, face in ((known, BLUE), (~known, "white")):
        part = ratings[chosen]
        ax.plot(part["rating"], part["model"], "o", color=BLUE, mfc=face)
    ax.axvline(1000, color=GREY, linestyle="--", linewidth=1.2)
    ax.set(xlabel="rating (1000: average; +100: 64 % against it)")
    ax.set(ylim=(-0.6, len(ratings) - 0.4))
    if not known.all():
        ax.set_title("hollow: no interval to be had", fontsize=9, color=GREY)
    return figure


@styled
def length_control(table: pd.DataFrame) -> Figure:
    """Each model's win rate against the baseline, raw and at equal length.

    Args:
        table: as `win_rates.alpaca_eval_table` gives it; published figures may come
            without intervals (index model; `win_rate, length_controlled_win_rate`).
    """
    table = table.sort_values("length_controlled_win_rate")
    figure = new_figure(height=1.2 + 0.42 * len(table))
    ax = figure.subplots()
    places = np.arange(len(table))
    kinds = (
        ("win_rate", "win_rate", "raw", GREY, 0.12),
        (
            "length_controlled_win_rate",
            "length_controlled",
            "at equal length",
            BLUE,
            -0.12,
        ),
    )
    for value, ends, label, colour, shift in kinds:
        xerr = _ends(table, value, f"{ends}_low", f"{ends}_high")
        style = {"fmt": "o", "capsize": 3, "color": colour, "label": label}
        ax.errorbar(table[value], places + shift, xerr=xerr, **style)
    ax.axvline(50, color=GREY, linestyle="--", linewidth=1.2)
    ax.set_yticks(places, table.index)
    ax.set(xlabel="win rate against the baseline (%; dashed: even)")
    ax.set(ylim=(-0.6, len(table) - 0.4))
    figure.legend(loc="outside upper center", ncols=2)
    return figure


# --- memory

# Colour and hatch of each part of a plan, the same in every figure.
MEMORY_PARTS = {
    "weights": (BLUE, None),
    "gradients": (ORANGE, None),
    "optimiser": (GREEN, None),
    "working copies": (SKY, None),
    "reference": (BLUE, "//"),
    "critic": (GREEN, "//"),
    "reward model": (PINK, None),
    "activations": (YELLOW, None),
    "trunk states": (YELLOW, "//"),
    "workspace": (GREY, None),
    "logits": (GREY, "//"),
    "key-value cache": (PINK, "//"),
}


@styled
def memory_plan(memory: Mapping[str, Mapping[str, float]], gib: float) -> Figure:
    """What a device's memory holds under each kind of sharding, one bar each.

    Args:
        memory: `run_plans.Plan.memory`: sharding → bytes by part.
        gib: memory of a device, drawn as a line.
    """
    names = list(memory)[::-1]
    figure = new_figure(height=1.5 + 0.42 * len(names))
    ax = figure.subplots()
    left = np.zeros(len(names))
    for part, (colour, hatch) in MEMORY_PARTS.items():
        sizes = np.array([memory[name].get(part, 0) for name in names]) / 2**30
        if not sizes.any():
            continue
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        ax.barh(np.arange(len(names)), sizes, 0.7, left, label=part, **style)
        left += sizes
    ax.axvline(gib, color="black", linestyle="--", linewidth=1.2)
    ax.text(gib, len(names) - 0.5, f" {gib:.4g} GiB", fontsize=9, va="bottom")
    ax.set_yticks(np.arange(len(names)), names)
    ax.set(xlabel="GiB on one device at the fullest moment")
    ax.set(xlim=(0, 1.08 * max(gib, left.max())))
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=4)
    return figure
