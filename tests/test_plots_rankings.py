"""Figures of rankings are checked by what they draw: points, ends, bars, labels."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from starling_lib import plots
from starling_lib.audit import (
    composition,
    length_bias,
    length_by_rank,
    model_ratings,
    position_bias,
    position_bias_by,
    repeat_agreement,
    win_matrix,
)


@pytest.fixture(autouse=True)
def no_open_figures():
    before = dict(matplotlib.rcParams)
    yield
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before, "somebody's rcParams were changed"


def segments(collection, axis):
    """The ends of each error bar, along x (0) or y (1)."""
    return [segment[:, axis].tolist() for segment in collection.get_segments()]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def table_row(name, models, lengths, **fields):
    texts = [chr(ord("a") + i) * n for i, n in enumerate(lengths)]
    ranks = list(range(1, len(texts) + 1))
    row = {"id": name, "responses": texts, "models": list(models), "ranks": ranks}
    return row | fields


ROWS = [
    table_row("p", "abc", [5, 2, 9], source=["x"], turns=1, good_natured=True),
    table_row("q", "acb", [4, 2, 1], source=["x", "y"], turns=2, good_natured=True),
    table_row("r", "bca", [3, 4, 8], source=["x"], turns=1, good_natured=False),
]


def test_error_by_judgments_has_a_line_per_k():
    errors = pd.DataFrame({2: [0.4, 0.2], 7: [0.1, 0.05]}, index=[10, 40])
    (ax,) = plots.error_by_judgments(errors).axes
    assert [line.get_label() for line in ax.lines] == ["K = 2", "K = 7"]
    assert ax.lines[1].get_ydata().tolist() == [0.1, 0.05]
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_position_bias_draws_both_measures_and_what_is_fair():
    frame = position_bias([[0, 1], [0, 1], [1, 0], [0, 1]])
    share, rank = plots.position_bias(frame).axes
    expected = frame[["first_low", "first_high"]].to_numpy()
    assert np.allclose(segments(share.collections[0], 1), expected)
    expected = frame[["rank_low", "rank_high"]].to_numpy()
    assert np.allclose(segments(rank.collections[0], 1), expected)
    for ax, fair, values in ((share, 0.5, [0.75, 0.25]), (rank, 1.5, [1.25, 1.75])):
        assert ax.containers[0].lines[0].get_ydata().tolist() == values
        lines = {line.get_label(): line.get_ydata() for line in ax.lines}
        assert set(lines["no bias"]) == {fair}


def test_variants_stand_side_by_side_and_published_ones_need_no_interval():
    log = position_bias_by([[0, 1], [1, 0], [1, 0]], ["one", "two", "two"])
    paper = pd.DataFrame({"position": [0, 1], "first_share": [0.6, 0.4]})
    paper = paper.assign(mean_rank=[1.4, 1.6], variant="paper")
    figure = plots.position_bias(pd.concat([log, paper]))
    for ax in figure.axes:
        names = [container.get_label() for container in ax.containers]
        assert names == ["one", "two", "paper"]
        at_zero = [c.lines[0].get_xdata()[0] for c in ax.containers]
        assert at_zero == sorted(set(at_zero)), "no two variants at one place"
        bars = [container.lines[2][0].get_segments() for container in ax.containers]
        assert not any(bar.size for bar in bars[2])
        assert all(bar.size for bar in bars[1])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(texts) == ["no bias", "one", "paper", "two"]


def test_model_ratings_put_the_best_on_top_and_hollow_what_is_unknown():
    ratings = model_ratings([*ROWS, table_row("s", "dc", [1, 2])])
    left, right = plots.model_ratings(ratings).axes
    best_last = ratings[::-1]
    assert labels(left.yaxis) == best_last["model"].tolist()
    points = left.containers[0].lines[0]
    assert points.get_xdata().tolist() == best_last["mean_rank"].tolist()
    drawn = {
        line.get_markerfacecolor(): sorted(line.get_xdata())
        for line in right.lines
        if line.get_marker() == "o" and line.get_markersize() > 0
    }
    known = ratings["strength_low"].notna()
    assert drawn[plots.BLUE] == sorted(ratings["strength"][known])
    assert drawn["white"] == sorted(ratings["strength"][~known]) and not known.all()
    assert "hollow" in right.get_title("left")
    _, right = plots.model_ratings(ratings[known]).axes
    assert right.get_title("left") == ""


def test_win_matrix_writes_every_share_and_count():
    share, pairs = win_matrix(ROWS)
    (ax,) = plots.win_matrix(share, pairs).axes
    texts = {
        (round(t.get_position()[1]), t.get_position()[0], t.get_fontsize() > 8): t
        for t in ax.texts
    }
    assert len(texts) == 12, "share and count, and nothing on the diagonal"
    for i, j in np.ndindex(3, 3):
        if i != j:
            assert texts[i, j, True].get_text() == f"{share.iloc[i, j]:.0%}"
            assert texts[i, j, False].get_text() == str(pairs.iloc[i, j])
    assert labels(ax.yaxis) == labels(ax.xaxis) == list(share.index)
    (ax,) = plots.win_matrix(share).axes
    assert len(ax.texts) == 6


def test_rank_change_by_move():
    moves = pd.DataFrame(
        {"estimate": [-1.0, 2.0], "low": [-2.0, 1.0], "high": [0.0, 3.0]}, index=[-1, 1]
    )
    (ax,) = plots.rank_change_by_move(moves, 1.5).axes
    (line,) = (line for line in ax.lines if "slope +1.500" in line.get_label())
    assert line.get_ydata().tolist() == [-1.5, 1.5]


def test_repeat_agreement_shows_every_ranking_and_gap():
    result = repeat_agreement(
        [[0, 1, 2], [0, 1, 2], [0, 1, 2]], [[0, 1, 2], [2, 1, 0], [0, 2, 1]]
    )
    left, right = plots.repeat_agreement(result.rows["tau"], result.by_gap).axes
    assert sum(patch.get_height() for patch in left.patches) == 3
    assert left.get_xlim()[0] <= -1
    assert right.lines[0].get_xdata().tolist() == [1, 2]
    assert right.lines[0].get_ydata().tolist() == pytest.approx([0.5, 2 / 3])
    assert right.get_ylim()[0] <= result.by_gap["low"].min()


def test_length_by_rank_has_a_panel_per_set():
    published = pd.DataFrame({"rank": [1, 2], "chars": [9.0, 4.0]})
    figure = plots.length_by_rank({"ours": length_by_rank(ROWS), "Nectar": published})
    left, right = figure.axes
    assert [patch.get_height() for patch in left.patches] == [
        4,
        pytest.approx(8 / 3),
        6,
    ]
    assert [patch.get_height() for patch in right.patches] == [9, 4]
    assert right.get_title(loc="left") == "Nectar"
    centres = [bar.get_x() + bar.get_width() / 2 for bar in right.patches]
    assert centres == pytest.approx([1, 2])


def test_length_bias_leaves_out_conditions_without_pairs():
    bias = length_bias(ROWS)
    (ax,) = plots.length_bias(bias).axes
    assert labels(ax.yaxis) == [
        "twice as long, equal models (9 pairs)",
        "both finished (9 pairs)",
        "all pairs (9 pairs)",
    ]
    drawn = ax.containers[0].lines[0].get_xdata()
    assert drawn[-1] == bias["longer_wins"][0]
    assert [0.5, 0.5] in [list(line.get_xdata()) for line in ax.lines]


def test_composition_has_a_bar_per_value_and_a_heading_per_field():
    counts = composition(ROWS)
    (ax,) = plots.composition(counts).axes
    assert [bar.get_width() for bar in ax.patches] == counts["share"].tolist()
    assert labels(ax.yaxis) == ["x", "y", "1", "2", "False", "True", "3"]
    texts = [text.get_text() for text in ax.texts]
    assert {"source", "turns", "good natured", "responses"} <= set(texts)
    assert " 1 (33%)" in texts
    places = [bar.get_y() for bar in ax.patches]
    assert places == sorted(set(places)), "no bar upon another"
    headings = [t.get_position()[1] for t in ax.texts if t.get_fontweight() == "bold"]
    assert headings == [0, 3, 6, 9]


def test_token_lengths_count_every_prompt_once_and_name_what_is_cut():
    lengths = pd.DataFrame(
        {
            "row": [0, 0, 1],
            "prompt_tokens": [10, 10, 40],
            "total_tokens": [30, 100, 300],
        }
    )
    (ax,) = plots.token_lengths(lengths, [64, 128]).axes
    prompts, total = (patch.get_data().values for patch in ax.patches)
    assert sorted(prompts[prompts > 0]) == [0.5, 0.5]
    assert total.sum() == pytest.approx(1) and prompts.sum() == pytest.approx(1)
    assert [line.get_xdata()[0] for line in ax.lines] == [64, 128]
    (top,) = ax.child_axes
    assert labels(top.xaxis)[:2] == ["64\n66.7% cut", "128\n33.3% cut"]
    (bare,) = plots.token_lengths(lengths).axes
    assert not bare.child_axes and not bare.lines
