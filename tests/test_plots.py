"""Figures are checked by what they draw: line values, bars, labels, titles."""

import io

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from starling_lib import metrics, plots


@pytest.fixture(autouse=True)
def no_open_figures():
    """No function may register a figure with pyplot (it would be shown twice)."""
    before = dict(matplotlib.rcParams)
    yield
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before, "somebody's rcParams were changed"


def line(ax, label):
    """The y-values of the line with this label."""
    (found,) = [item for item in ax.lines if item.get_label() == label]
    return np.asarray(found.get_ydata(), dtype=float)


def evaluation(rewards, tokens, finished):
    """A frame with what the evaluation figures read, two samples a prompt."""
    return pd.DataFrame(
        {
            "prompt_index": np.arange(len(rewards)) // 2,
            "reward": np.asarray(rewards, dtype=float),
            "tokens": tokens,
            "finished": finished,
        }
    )


ENDED = np.array([True, True, True, False, True, True])
BEFORE = evaluation([0, 2, 4, 6, 7, 9], [10, 20, 30, 64, 40, 50], ENDED)
CUT = np.array([False, False, True, True, False, False])
AFTER = evaluation([2, 4, 3, 5, 9, 9], [12, 22, 64, 64, 41, 51], ~CUT)


# --- reward


def test_reward_training_draws_each_series_at_its_steps():
    history = [
        {"step": 1, "loss": 1.42},
        {"step": 2, "loss": 1.3, "grad_norm": 1.0},
        {"step": 2, "eval_loss": 1.35, "eval_accuracy": 0.6},
        {"step": 4, "eval_loss": 1.2, "eval_accuracy": 0.8},
        {"step": 4, "train_runtime": 3.0},
    ]
    left, right = plots.reward_training(history, longer_wins=0.35).axes
    assert line(left, "training").tolist() == [1.42, 1.3]
    assert line(left, "held out").tolist() == [1.35, 1.2]
    assert line(right, "held out").tolist() == [0.6, 0.8]
    assert right.lines[0].get_xdata().tolist() == [2, 4]
    assert set(line(right, "longer wins")) == {0.35}
    assert set(line(right, "coin")) == {0.5}
    assert left.get_xlabel() == "optimiser step" and "nats" in left.get_ylabel()


def test_scores_by_rank_medians_and_levels():
    scores = np.array([[3.0, 1.0, 0.0], [5.0, 2.0, np.nan], [4.0, 3.0, 2.0]])
    (ax,) = plots.scores_by_rank(scores, {"before": 1.5, "after": 2.5}).axes
    medians = [
        item.get_ydata()[0] for item in ax.lines if item.get_color() == plots.ORANGE
    ]
    # The first level shares the medians' colour: medians come first.
    assert medians[:3] == [4, 2, 1]
    assert set(line(ax, "before")) == {1.5} and set(line(ax, "after")) == {2.5}


def test_accuracy_by_gap_counts_ties_and_leaves_out_nan():
    # gap 1: 3>2 right, 2>2 tie, 5>4 right, NaN pair left out; gap 2: 3>2 right
    scores = np.array([[3.0, 2.0, 2.0], [5.0, 4.0, np.nan]])
    lengths = np.array([[1, 2, 3], [1, 2, 9]])
    (ax,) = plots.accuracy_by_gap(scores, lengths).axes
    assert line(ax, "reward model") == pytest.approx([2.5 / 3, 1])
    assert line(ax, "longer wins") == pytest.approx([0, 0])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1\n3 pairs", "2\n1 pairs"]
    table = metrics.accuracy_by_gap(scores)
    drawn = ax.collections[0].get_segments()[0][:, 1]
    assert drawn == pytest.approx(table.loc[1, ["low", "high"]].to_numpy(dtype=float))
    assert table.low[1] < table.estimate[1] < table.high[1]
    (ax,) = plots.accuracy_by_gap([[3.0, 2.0, np.nan]]).axes
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1\n1 pairs", "2\n0 pairs"]


def test_packing_mask_shades_every_pair():
    # prompt of two tokens, responses of two and one: causal within a segment, all see
    # the prompt
    segments = [0, 0, 1, 1, 2]
    mask = np.array(
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 0, 0, 1],
        ],
        dtype=bool,
    )
    (ax,) = plots.packing_mask(mask, segments).axes
    shade = np.asarray(ax.collections[0].get_array()).reshape(5, 5)
    assert shade.tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 2, 0, 0],
        [1, 1, 2, 2, 0],
        [1, 1, 0, 0, 2],
    ]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["prompt", "r1", "r2"]
    assert ax.get_xticks().tolist() == [1, 3, 4.5]
    assert ax.yaxis_inverted(), "the first token belongs at the top"


# --- apa


def test_bandit_lines_and_targets():
    (ax,) = plots.bandit({"APA": [0.8, 0.6], "PG": [0.8, 1]}, {"π*": 0.351}).axes
    assert line(ax, "APA").tolist() == [0.8, 0.6]
    assert line(ax, "PG").tolist() == [0.8, 1]
    assert ax.texts[0].get_text() == " π* = 0.351"
    assert ax.texts[0].xy[1] == 0.351


def test_apa_curves_draws_what_was_logged_and_nothing_else():
    history = [
        {"step": 1, "reward": 1.0, "kl": 0.0},
        {"step": 2, "reward": 1.5, "kl": 0.1, "loss": 3.0},
        {"step": 2, "train_runtime": 9.0},
    ]
    axes = plots.apa_curves(history).axes
    assert [ax.get_title("left") for ax in axes] == [
        "reward",
        "KL to the start (nats)",
    ]
    assert axes[0].lines[0].get_ydata().tolist() == [1.0, 1.5]
    assert axes[1].lines[0].get_ydata().tolist() == [0.0, 0.1]
    with pytest.raises(ValueError, match="explained_variance"):
        plots.apa_curves([{"step": 1, "loss": 1.0}])


def test_apa_curves_has_seven_panels_for_a_full_log():
    entry = dict.fromkeys(plots.APA_CURVES, 1.0) | {"step": 1}
    assert len(plots.apa_curves([entry, entry | {"step": 2}]).axes) == 7


def test_reward_against_kl():
    history = [{"kl": 0.0, "reward": 1.0}, {"loss": 2.0}, {"kl": 0.2, "reward": 2.0}]
    (ax,) = plots.reward_against_kl({"λ = 1": history}).axes
    assert ax.lines[0].get_xdata().tolist() == [0.0, 0.2]
    assert line(ax, "λ = 1").tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="'empty'"):
        plots.reward_against_kl({"empty": [{"loss": 1.0}]})


def test_policy_study_draws_bands_over_seeds_and_both_judges_gains():
    def curve(*rewards):
        return [{"kl": float(i), "reward": r} for i, r in enumerate(rewards)]

    runs = pd.DataFrame(
        {
            "method": ["start", "apa", "apa", "apa", "rloo"],
            # A run that broke off has no curve; RLOO's log names no KL.
            "curve": [[], curve(0.0, 1.0), curve(0.0, 3.0), None, [{"reward": 1.0}]],
        }
    )
    ends = ("estimate", "low", "high")
    columns = [(judge, end) for judge in ("proxy", "gold") for end in ends]
    table = pd.DataFrame(
        [[0.0] * 7, [2.0, 1.0, 3.5, 1.0, 0.5, 1.5, 4.0], [0.5] * 7],
        index=["start", "apa", "rloo"],
        columns=pd.MultiIndex.from_tuples([*columns, ("", "kl")]),
    )
    path, held_out = plots.policy_study(runs, table).axes
    assert [line.get_ydata().tolist() for line in path.lines] == [[0.0, 2.0]]
    band = path.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == 3.0 and band[band[:, 0] == 1.0, 1].min() == 1.0
    bars = held_out.containers[:2]  # apa by proxy, by gold
    assert [bar.lines[0].get_ydata().tolist() for bar in bars] == [[2.0], [1.0]]
    assert bars[0].lines[2][0].get_segments()[0][:, 1].tolist() == [1.0, 3.5]
    assert [bar.get_label() for bar in held_out.containers[::2]] == ["apa", "rloo"]


# --- evaluation


def test_resampled_means_counts_every_resample():
    (ax,) = plots.resampled_means([1.0, 1.1, 1.2, 1.9], (1.0, 1.8), 1.3).axes
    assert sum(patch.get_height() for patch in ax.patches[:30]) == 4
    assert set(ax.lines[0].get_xdata()) == {1.3}


def test_paired_rewards_leave_out_what_has_no_reward():
    unknown = AFTER.assign(reward=AFTER.reward.where(AFTER.index > 0))
    left, _ = plots.paired_rewards(BEFORE, unknown).axes
    assert left.patches[1].get_data().values.sum() == len(AFTER) - 1


def test_paired_rewards_places_prompts_and_counts_gains():
    left, right = plots.paired_rewards(BEFORE, AFTER).axes
    offsets = right.collections[0].get_offsets()
    assert np.asarray(offsets).tolist() == [[1, 3], [5, 4], [8, 9]]
    assert right.get_title("left") == "2 of 3 prompts above the diagonal"
    means = [item.get_xdata()[0] for item in left.lines]
    assert means == pytest.approx([28 / 6, 32 / 6])
    counts = [patch.get_data().values.sum() for patch in left.patches]
    assert counts == [6, 6], "every sample of both runs is counted"


def test_forest_one_axis_a_metric_and_colour_by_zero():
    comparison = pd.DataFrame(
        {
            "difference": [1.0, -0.1, np.nan],
            "low": [0.5, -0.3, np.nan],
            "high": [1.5, 0.1, np.nan],
        },
        index=["reward", "tokens", "kl"],
    )
    axes = plots.forest(comparison).axes
    assert len(axes) == 2, "a metric that was not measured has no row"
    assert axes[0].lines[0].get_xdata() == pytest.approx([0.5, 1.5])
    assert axes[0].lines[1].get_xdata() == pytest.approx([1.0])
    assert [ax.lines[0].get_color() for ax in axes] == [plots.BLUE, plots.GREY]
    assert axes[1].get_yticklabels()[0].get_text() == "tokens per response"
    assert axes[0].get_xlim()[0] == -axes[0].get_xlim()[1], "zero stands in the middle"


def test_forest_of_no_change_at_all_keeps_a_readable_scale():
    comparison = pd.DataFrame({"difference": [0.0], "low": [0.0], "high": [0.0]})
    (ax,) = plots.forest(comparison).axes
    assert ax.get_xlim() == (-1, 1)


def test_length_and_endings():
    left, right = plots.length_and_endings(BEFORE, AFTER).axes
    shares = [bar.get_height() for bar in right.patches]
    assert shares == pytest.approx([5 / 6, 4 / 6])
    means = [item.get_xdata()[0] for item in left.lines]
    assert means == pytest.approx([214 / 6, 254 / 6])
    assert left.get_xlabel() == "tokens of a response"


def test_reward_against_length_splits_cut_responses():
    left, right = plots.reward_against_length(BEFORE, AFTER).axes
    assert left.get_title("left") == "before: ρ = +0.83"
    whole, cut = right.collections
    ended = np.asarray(whole.get_offsets()).tolist()
    assert ended == [[12, 2], [22, 4], [41, 9], [51, 9]]
    assert np.asarray(cut.get_offsets()).tolist() == [[64, 3], [64, 5]]


def test_interval_width_follows_the_root_law():
    (ax,) = plots.interval_width([4, 16], [1.1, 0.5], difference=0.7).axes
    assert line(ax, "half-width measured").tolist() == [1.1, 0.5]
    assert line(ax, "1/√n through the last point") == pytest.approx([1.0, 0.5])
    assert set(line(ax, "difference observed")) == {0.7}


def test_a_figure_shows_itself_in_a_notebook_whatever_the_backend():
    """IPython's own formatter asks for the PNG; no pyplot backend is loaded for it."""
    from IPython.core.formatters import PNGFormatter

    figure = plots.bandit({"APA": [0.8, 0.4]})
    data, size = PNGFormatter()(figure)
    image = plt.imread(io.BytesIO(data))
    assert size == {"width": 750, "height": 320}
    assert image.shape[:2] == (640, 1500), "twice the shown size"
    assert image[0, 0].tolist() == [1, 1, 1, 1], "white on a dark page too"
