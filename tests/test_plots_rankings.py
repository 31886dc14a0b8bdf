import numpy as np
import pandas as pd
import pytest

from starling_lib import plots


def test_error_by_judgments_has_a_line_per_k():
    errors = pd.DataFrame({2: [0.4, 0.2], 7: [0.1, 0.05]}, index=[10, 40])
    (ax,) = plots.error_by_judgments(errors).axes
    assert [line.get_label() for line in ax.lines] == ["K = 2", "K = 7"]
    assert ax.lines[1].get_ydata().tolist() == [0.1, 0.05]
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_mean_rank_by_model_puts_the_best_on_top():
    frame = pd.DataFrame(
        {"estimate": [1.5, 3.0, 2.0], "low": [1.4, 2.5, 1.0], "high": [1.8, 3.1, 2.2]},
        index=["b", "c", "a"],
    )
    (ax,) = plots.mean_rank_by_model(frame).axes
    assert ax.lines[0].get_xdata().tolist() == [3.0, 2.0, 1.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["c", "a", "b"]
    bars = [segment[:, 0].tolist() for segment in ax.collections[0].get_segments()]
    assert bars == [[2.5, 3.1], [1.0, 2.2], [1.4, 1.8]]


def test_position_bias_draws_both_measures_and_what_is_fair():
    frame = pd.DataFrame(
        {"first_share": [0.7, 0.3], "mean_rank": [1.3, 1.7]}, index=[1, 2]
    )
    for column in ("first_share", "mean_rank"):
        frame[f"{column}_low"] = frame[column] - 0.1
        frame[f"{column}_high"] = frame[column] + 0.2
    share, rank = plots.position_bias(frame, {"other": frame}).axes
    lows = [segment[0, 1] for segment in share.collections[0].get_segments()]
    assert lows == pytest.approx([0.6, 0.2])
    for ax, fair in ((share, 0.5), (rank, 1.5)):
        labels = {line.get_label(): line.get_ydata() for line in ax.lines}
        assert set(labels["no bias"]) == {fair}
        assert "other" in labels


def test_rank_change_by_move():
    moves = pd.DataFrame(
        {"estimate": [-1.0, 2.0], "low": [-2.0, 1.0], "high": [0.0, 3.0]}, index=[-1, 1]
    )
    (ax,) = plots.rank_change_by_move(moves, 1.5).axes
    (line,) = (line for line in ax.lines if "slope +1.500" in line.get_label())
    assert line.get_ydata().tolist() == [-1.5, 1.5]


def test_repeat_agreement():
    by_gap = pd.Series([0.8, 1.0], index=[1, 2])
    left, right = plots.repeat_agreement([1.0, 0.9, -0.2], by_gap).axes
    assert sum(patch.get_height() for patch in left.patches) == 3
    assert left.get_xlim()[0] <= -0.2
    assert right.lines[0].get_ydata().tolist() == [0.8, 1.0]


def test_length_by_rank_has_a_panel_per_set():
    left, right = plots.length_by_rank({"ours": [3.0, 5.0], "Nectar": [9.0, 4.0]}).axes
    assert [patch.get_height() for patch in left.patches] == [3.0, 5.0]
    assert right.get_title(loc="left") == "Nectar"
    assert np.allclose(
        [bar.get_x() + bar.get_width() / 2 for bar in right.patches], [1, 2]
    )
