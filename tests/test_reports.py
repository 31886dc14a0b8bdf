"""What a reward report holds, that it is written whole or not at all, and its picture."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from starling_lib import reports
from starling_lib.metrics import (
    accuracy_by,
    expected_calibration_error,
    metric_intervals,
    reward_metrics,
)
from starling_lib.reports import reward_report

RNG = np.random.default_rng(0)
SCORES = -0.5 * np.arange(5) + RNG.normal(size=(30, 5))
SCORES[:4, 3:] = np.nan
LENGTHS = RNG.integers(5, 200, size=(30, 5))
SOURCES = [["lmsys"], ["sharegpt", "lmsys"], ["sharegpt"]] * 10


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    scores = torch.tensor(SCORES, dtype=torch.float64)
    return reward_report(scores, LENGTHS, SOURCES, folder, resamples=100), folder


def test_the_file_holds_what_is_returned_and_nothing_else_is_left(written):
    report, folder = written
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["reward_report.json", "reward_report.png"]
    text = (folder / "reward_report.json").read_text("utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == report


def test_report_repeats_the_metrics(written):
    report, _ = written
    figures = reward_metrics(SCORES, LENGTHS)
    intervals = metric_intervals(SCORES, LENGTHS, resamples=100)
    assert set(report["metrics"]) == set(figures) - {"nll", "ece"}
    for name, row in report["metrics"].items():
        assert row["estimate"] == pytest.approx(figures[name])
        assert row["low"] == pytest.approx(intervals.loc[name, "low"])
    assert report["nll"] == pytest.approx(figures["nll"])
    assert report["ece"] == pytest.approx(expected_calibration_error(SCORES))
    assert [row["gap"] for row in report["by_gap"]] == [1, 2, 3, 4]
    sources = accuracy_by(SCORES, SOURCES, resamples=100)
    assert {row["group"]: row["estimate"] for row in report["by_source"]} == (
        pytest.approx(sources["estimate"].to_dict())
    )
    measures = {row["measure"] for row in report["length_bias"]}
    assert {"partial_correlation", "shorter_better_accuracy"} <= measures


def test_picture_is_an_image_of_some_size(written):
    image = plt.imread(written[1] / "reward_report.png")
    assert image.shape[:2] == (930, 1125) and image.std() > 0.05


def test_parts_without_their_input_are_left_out_and_nan_is_null(tmp_path):
    perfect = np.tile([3.0, 2, 1], (4, 1))
    report = reward_report(perfect, None, None, tmp_path, resamples=20)
    assert not {"by_source", "length_bias"} & set(report)
    one = reward_report([[2.0, 1.0]], [[3, 4]], ["a"], tmp_path, resamples=20)
    assert one["metrics"]["accuracy"]["estimate"] == 1
    assert one["metrics"]["accuracy"]["low"] is None, (
        "one prompt says nothing of spread"
    )
    assert json.loads((tmp_path / "reward_report.json").read_text("utf-8")) == one


def test_ranks_in_any_order_give_the_same_report(tmp_path, written):
    shuffle = RNG.permuted(np.tile(np.arange(5), (30, 1)), axis=1)
    scores, lengths = (np.take_along_axis(x, shuffle, 1) for x in (SCORES, LENGTHS))
    report = reward_report(
        scores, lengths, SOURCES, tmp_path, ranks=shuffle, resamples=50
    )
    for name, row in report["metrics"].items():
        assert row["estimate"] == pytest.approx(written[0]["metrics"][name]["estimate"])


def test_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match="no prompt has two scored responses"):
        reward_report([[1.0, math.nan]], None, None, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_failing_write_leaves_the_old_report(tmp_path, monkeypatch):
    reward_report([[2.0, 1.0]] * 3, None, None, tmp_path, resamples=20)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def torn(self, text, encoding):
        self.write_bytes(text.encode()[:10])
        raise OSError("disk full")

    monkeypatch.setattr(reports.Path, "write_text", torn)
    with pytest.raises(OSError, match="disk full"):
        reward_report(SCORES, None, None, tmp_path, resamples=20)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
