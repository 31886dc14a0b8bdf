import numpy as np
import pandas as pd
import pytest

from starling_lib import plots


def line(ax, label):
    """The y-values of the line or the error bars with this label."""
    handles, labels = ax.get_legend_handles_labels()
    found = handles[labels.index(label)]
    return np.asarray(getattr(found, "lines", [found])[0].get_ydata(), dtype=float)


def ends(ax, which=0):
    """(low, high) of each error bar in the order drawn."""
    return [segment[:, 1].tolist() for segment in ax.collections[which].get_segments()]


CALIBRATION = pd.DataFrame(
    {
        "predicted": [0.52, 0.9],
        "observed": [0.6, 0.8],
        "low": [0.5, 0.7],
        "high": [0.65, 0.95],
        "n": [10, 40],
    }
)
BY_GAP = pd.DataFrame(
    {"estimate": [0.6, 0.9], "low": [0.5, 0.8], "high": [0.7, 1.0]}, index=[1, 2]
)
RESPONSES = pd.DataFrame(
    {
        "rank": [1, 2, 1, 2, 3],
        "score": [1.0, -1.0, 2.0, 0.0, -2.0],
        "length": [10, 20, 30, 5, 8],
    }
)


def test_reliability_draws_each_bin_and_the_diagonal():
    ax, counts = plots.reliability(CALIBRATION, ece=0.0876).axes
    assert ax.get_title("left") == "calibration error 0.088"
    diagonal, points = ax.lines[0], ax.lines[1]
    assert diagonal.get_xdata().tolist() == diagonal.get_ydata().tolist() == [0.5, 1]
    assert points.get_xdata().tolist() == [0.52, 0.9]
    assert points.get_ydata().tolist() == [0.6, 0.8]
    assert np.ravel(ends(ax)) == pytest.approx([0.5, 0.65, 0.7, 0.95])
    assert [bar.get_height() for bar in counts.patches] == [10, 40]


def test_reliability_shows_a_bin_far_below_chance():
    low = CALIBRATION.assign(observed=[0.1, 0.2], low=[0.05, 0.1])
    assert plots.reliability(low).axes[0].get_ylim()[0] <= 0.05


def test_reward_report_panels():
    rule = BY_GAP.assign(estimate=[0.4, 0.3])
    figure = plots.reward_report(BY_GAP, CALIBRATION, RESPONSES, rule, "abcd")
    gaps, reliability, ranks, lengths = figure.axes[:4]
    assert [ax.get_title("left") for ax in figure.axes[:4]] == list("abcd")
    assert line(gaps, "reward model").tolist() == [0.6, 0.9]
    assert line(gaps, "longer wins").tolist() == [0.4, 0.3]
    assert np.ravel(ends(gaps)) == pytest.approx([0.5, 0.7, 0.8, 1.0])
    assert reliability.lines[1].get_ydata().tolist() == [0.6, 0.8]
    medians = [x.get_ydata()[0] for x in ranks.lines if x.get_color() == plots.ORANGE]
    assert medians == [1.5, -0.5, -2]
    offsets = np.asarray(lengths.collections[0].get_offsets())
    assert offsets.tolist() == RESPONSES[["length", "score"]].to_numpy().tolist()


def test_reward_report_without_lengths():
    figure = plots.reward_report(BY_GAP, CALIBRATION, RESPONSES.drop(columns="length"))
    assert figure.axes[3].texts[0].get_text() == "no lengths given"
    assert "longer wins" not in figure.axes[0].get_legend_handles_labels()[1]


def simulated():
    rows = [
        {
            "judge": judge,
            "estimator": name,
            "n": n,
            "seed": seed,
            "error": n * (seed + k),
        }
        for judge in ("a", "b", "c")
        for k, name in enumerate(("MLE_K", "MLE_2"), start=1)
        for n in (50, 500)
        for seed in range(3)
    ]
    return pd.DataFrame(rows)


def test_recovery_has_a_panel_a_judge_and_means_over_seeds():
    figure = plots.recovery(simulated())
    assert [ax.get_title("left") for ax in figure.axes] == [
        "judge: a",
        "judge: b",
        "judge: c",
    ]
    assert line(figure.axes[1], "MLE_K").tolist() == [100, 1000]
    assert line(figure.axes[1], "MLE_2").tolist() == [150, 1500]
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    assert "(nats)" in figure.get_supylabel()


def test_efficiency_has_bars_a_judge_and_the_line_of_equal_errors():
    table = pd.DataFrame(
        {
            "judge": ["a", "a", "b", "b"],
            "n": [50, 500] * 2,
            "ratio": [1.1, 1.2, 0.9, 0.5],
            "low": [1.0, 1.1, 0.8, 0.4],
            "high": [1.2, 1.3, 1.0, 0.6],
        }
    )
    (ax,) = plots.efficiency(table).axes
    assert line(ax, "a").tolist() == [1.1, 1.2]
    assert line(ax, "b").tolist() == [0.9, 0.5]
    assert np.ravel(ends(ax, 1)) == pytest.approx([0.8, 1.0, 0.4, 0.6])
    assert set(line(ax, "equal errors")) == {1}
    assert ax.get_ylabel() == "error of MLE_2 / error of MLE_K"


def test_loss_study_draws_every_seed_and_the_mean_of_each_loss():
    runs = pd.DataFrame(
        [
            {"loss": loss, "fraction": f, "seed": seed, "nll": f + seed + (loss == "a")}
            for loss in "ab"
            for f in (0.5, 1.0)
            for seed in (0, 1)
        ]
    )
    figure = plots.loss_study(runs, {"nll": "nats"})
    (ax,) = figure.axes
    dots, line = ax.lines[0], ax.lines[1]
    assert sorted(dots.get_ydata()) == [1.5, 2.0, 2.5, 3.0]
    assert line.get_ydata().tolist() == [2.0, 2.5] and line.get_label() == "a"
    assert ax.get_ylabel() == "nats"
    figure.canvas.draw()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["50%", "100%"]


def test_training_speed_draws_rivals_grey_and_names_multiples():
    rows = [
        {"what": "TRL on pairs", "prompts_per_second": 0.05, "times_trl": 1.0},
        {"what": "packed", "prompts_per_second": 0.5, "times_trl": 10.0},
    ]
    (ax,) = plots.training_speed(rows).axes
    assert [bar.get_width() for bar in ax.patches] == [0.5, 0.05]  # first row on top
    assert ax.patches[0].get_facecolor() != ax.patches[1].get_facecolor()
    assert [text.get_text() for text in ax.texts] == ["× 10.0", "× 1.0"]
    assert ax.get_xscale() == "log"
