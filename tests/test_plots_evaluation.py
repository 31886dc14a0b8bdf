"""Figures of benchmarks and win rates are checked by what they draw."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from starling_lib import plots


@pytest.fixture(autouse=True)
def no_open_figures():
    """No function may register a figure with pyplot, nor change anybody's rcParams."""
    before = dict(matplotlib.rcParams)
    yield
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def drawn(figure):
    """The figure laid out and rendered: what fails only then fails here."""
    figure.canvas.draw()
    return figure


def texts(labels):
    return [label.get_text() for label in labels]


def intervals(**models):
    """Scores by model and part, each ± 0.5."""
    rows = {
        (m, part): score for m, parts in models.items() for part, score in parts.items()
    }
    index = pd.MultiIndex.from_tuples(rows, names=["model", "part"])
    scores = np.array([*rows.values()], dtype=float)
    columns = {"score": scores, "low": scores - 0.5, "high": scores + 0.5}
    return pd.DataFrame(columns, index=index)


BASE = {"writing": 4, "math": 2, "turn_1": 3, "turn_2": 3, "overall": 3}
TUNED = {"writing": 5, "math": 1, "turn_1": 3.5, "turn_2": 2.5, "overall": 3}


def test_category_bars_stand_by_model_with_their_intervals():
    figure = drawn(plots.category_scores(intervals(base=BASE, tuned=TUNED)))
    (ax,) = figure.axes
    bars, whiskers = ax.containers[1::2], ax.containers[0::2]
    heights = [[bar.get_height() for bar in group] for group in bars]
    assert heights == [[4, 2], [5, 1]], "turns and overall are no categories"
    assert texts(ax.get_xticklabels()) == ["writing", "math"]
    segments = whiskers[0].lines[2][0].get_segments()
    assert [ends[:, 1].tolist() for ends in segments] == [[3.5, 4.5], [1.5, 2.5]]
    left, right = bars[0][0], bars[1][0]
    assert left.get_x() + left.get_width() <= right.get_x()
    assert texts(figure.legends[0].get_texts()) == ["base", "tuned"]


def test_category_bars_of_chosen_parts_and_a_category_one_model_lacks():
    table = intervals(base=BASE, tuned={"writing": 5})
    (ax,) = drawn(plots.category_scores(table, ["turn_1", "writing"])).axes
    heights = [bar.get_height() for bar in ax.containers[3]]
    assert np.isnan(heights[0]) and heights[1] == 5
    assert texts(ax.get_xticklabels()) == ["turn_1", "writing"]


def test_radar_closes_each_polygon():
    scores = pd.DataFrame([BASE, TUNED], index=["base", "tuned"])
    scores = scores.assign(coding=6, failed=0)
    figure = drawn(plots.category_radar(scores))
    (ax,) = figure.axes
    assert ax.lines[0].get_ydata().tolist() == [4, 2, 6, 4]
    assert ax.lines[1].get_ydata().tolist() == [5, 1, 6, 5]
    assert texts(ax.get_xticklabels()) == ["writing", "math", "coding"]
    assert ax.get_ylim() == (0, 10)


def test_differences_stand_by_part_beside_zero():
    parts = pd.DataFrame(
        {"difference": [1, -2], "low": [0, -4], "high": [2, np.nan]},
        index=pd.Index(["writing", "overall"], name="part"),
    )
    tables = {("new", "old"): parts, ("third", "old"): parts[:1] + 5}
    table = pd.concat(tables, names=["a", "b"])
    figure = drawn(plots.score_differences(table, "reward"))
    (ax,) = figure.axes
    assert texts(ax.get_yticklabels()) == ["overall", "writing"]
    assert texts(figure.legends[0].get_texts()) == ["new − old", "third − old"]
    first, second = (container.lines[0] for container in ax.containers)
    assert first.get_xdata().tolist() == [-2, 1]
    assert np.isnan(second.get_xdata()[0]) and second.get_xdata()[1] == 6
    (ends,) = ax.containers[1].lines[2][0].get_segments()[1:]
    assert ends[:, 0].tolist() == [5, 7]
    assert first.get_ydata()[1] > second.get_ydata()[1], "the first stands on top"
    assert ax.get_xlabel() == "difference (reward)"


def outcomes(consistent, first, second, error=0.0, ends=None):
    shares = {
        "consistent": consistent,
        "first": first,
        "second": second,
        "error": error,
    }
    table = pd.DataFrame({"share": shares})
    if ends:
        table.loc["consistent", ["low", "high"]] = ends
    return table


def test_consistency_bars_fill_the_whole():
    judges = {
        "published": outcomes(0.65, 0.3, 0.05),
        "ours": outcomes(0.5, 0.2, 0.2, 0.1, ends=(0.4, 0.6)),
    }
    figure = drawn(plots.swap_consistency(judges))
    (ax,) = figure.axes
    assert texts(ax.get_yticklabels()) == ["ours", "published"], "the first on top"
    pieces = [
        c for c in ax.containers if isinstance(c, matplotlib.container.BarContainer)
    ]
    widths = np.array([[bar.get_width() for bar in piece] for piece in pieces])
    assert np.allclose(widths, [[0.5, 0.65], [0.2, 0.3], [0.2, 0.05], [0.1, 0]])
    starts = np.array([[bar.get_x() for bar in piece] for piece in pieces])
    assert np.allclose(starts[1:], np.cumsum(widths, axis=0)[:-1])
    labels = texts(figure.legends[0].get_texts())
    assert labels == ["consistent", "favours first", "favours second", "error"]
    (whiskers,) = [c for c in ax.containers if c not in pieces]
    ends = whiskers.lines[2][0].get_segments()[0]
    assert ends[:, 0].tolist() == pytest.approx([0.4, 0.6])


def test_consistency_without_errors_names_none():
    figure = drawn(plots.swap_consistency({"judge": outcomes(0.9, 0.1, 0.0)}))
    assert texts(figure.legends[0].get_texts()) == ["consistent", "favours first"]
    assert "0%" not in texts(figure.axes[0].texts)


def ratings(rows):
    return pd.DataFrame(rows, columns=["model", "rating", "rating_low", "rating_high"])


def test_ratings_stand_best_on_top_and_endless_ones_are_hollow():
    rows = [
        ("low", 900, 880, 930),
        ("top", 1200, 1100, np.inf),
        ("new", 1000, None, None),
    ]
    (ax,) = drawn(plots.bradley_terry(ratings(rows).astype({"rating_low": float}))).axes
    assert texts(ax.get_yticklabels()) == ["low", "new", "top"]
    solid, hollow = [line for line in ax.lines if line.get_marker() == "o"]
    assert solid.get_xdata().tolist() == [900]
    assert hollow.get_xdata().tolist() == [1000, 1200]
    assert hollow.get_markerfacecolor() == "white"
    assert "hollow" in ax.get_title("left")
    assert np.isfinite(ax.get_xlim()).all()


def test_known_ratings_have_no_remark():
    (ax,) = drawn(plots.bradley_terry(ratings([("a", 1000, 990.0, 1010.0)]))).axes
    assert ax.get_title("left") == ""
    segments = ax.containers[0].lines[2][0].get_segments()
    assert segments[0][:, 0].tolist() == [990, 1010]


def test_length_control_sets_both_rates_side_by_side():
    table = pd.DataFrame(
        {
            "win_rate": [14.25, 17.19],
            "win_rate_low": [12, 15],
            "win_rate_high": [16, 19],
            "length_controlled_win_rate": [14.69, 28.16],
            "length_controlled_low": [12, 26],
            "length_controlled_high": [17, 31],
        },
        index=["Starling", "Claude 2"],
    )
    (ax,) = drawn(plots.length_control(table)).axes
    assert texts(ax.get_yticklabels()) == ["Starling", "Claude 2"]
    raw, equal = ax.containers
    assert (raw.get_label(), equal.get_label()) == ("raw", "at equal length")
    assert raw.lines[0].get_xdata().tolist() == [14.25, 17.19]
    assert equal.lines[0].get_xdata().tolist() == [14.69, 28.16]
    assert equal.lines[2][0].get_segments()[1][:, 0].tolist() == pytest.approx([26, 31])


def test_length_control_of_published_figures_has_no_intervals():
    columns = ["win_rate", "length_controlled_win_rate"]
    table = pd.DataFrame([[14.25, 14.69]], index=["Starling"], columns=columns)
    (ax,) = drawn(plots.length_control(table)).axes
    assert ax.containers[1].lines[0].get_xdata().tolist() == [14.69]
