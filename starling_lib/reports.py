"""Reports on disk: figures as JSON with a picture of them beside it.

Knows which metrics and plots belong into a report and how to write it so that a killed
run leaves the old one or the new one. Does not know: models, how scores came about.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from starling_lib import metrics, plots
from starling_lib.metrics import Matrix, as_array
from starling_lib.report_files import plain, table_records, write_together


def reward_report(
    scores: Matrix,
    lengths: Matrix | None,
    sources: Sequence[str | Sequence[str]] | None,
    output_dir: str | os.PathLike,
    ranks: Matrix | None = None,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Write `reward_report.json` and `reward_report.png` into a folder; return the JSON.

    Args:
        scores: (N, K), NaN for a missing response; best first unless `ranks` are given.
        lengths: (N, K) in any unit, or None: the parts on length are then left out.
        sources: (N) a name or list of names a row, or None.
        resamples: of the bootstrap over prompts.

    The JSON holds `metrics` (estimate, low, high, n), `nll`, `ece`, and the tables
    `by_gap`, `by_source`, `calibration`, `length_bias`, lists of rows (null: not finite).
    Raises ValueError when no prompt has two scored responses of different rank.
    """
    scores = as_array(scores)
    lengths = None if lengths is None else as_array(lengths)
    figures = metrics.reward_metrics(scores, lengths, ranks)
    if math.isnan(figures["accuracy"]):
        raise ValueError("no prompt has two scored responses of different rank")
    tables = _tables(scores, lengths, sources, ranks, resamples)
    report = {name: table_records(table) for name, table in tables.items()}
    report["metrics"] = {row.pop("metric"): row for row in report["metrics"]}
    report |= {name: plain(figures[name]) for name in ("nll", "ece")}
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    picture = _picture(tables, figures, scores, lengths, ranks)
    writers = {
        "reward_report.png": lambda path: picture.savefig(path, dpi=150),
        "reward_report.json": lambda path: path.write_text(text, "utf-8"),
    }
    write_together(Path(output_dir), writers)
    return report


def _tables(scores, lengths, sources, ranks, resamples: int) -> dict[str, pd.DataFrame]:
    """The tables of a reward report that its inputs allow."""
    options = {"ranks": ranks, "resamples": resamples}
    tables = {
        "metrics": metrics.metric_intervals(scores, lengths, **options),
        "by_gap": metrics.accuracy_by_gap(scores, **options),
        "calibration": metrics.calibration(scores, **options),
    }
    if sources is not None:
        tables["by_source"] = metrics.accuracy_by(scores, sources, **options)
    if lengths is not None:
        bias = metrics.length_bias_of_scores(scores, lengths, **options)
        tables["length_bias"] = bias
    return tables


def _picture(tables, figures, scores, lengths, ranks) -> Figure:
    """The four panels, with the figure that sums each up in its title."""
    rule, bias = None, ""
    if lengths is not None:
        scored = np.where(np.isnan(scores), np.nan, lengths)
        rule = metrics.accuracy_by_gap(scored, ranks, resamples=2)
        partial = tables["length_bias"].loc["partial_correlation", "estimate"]
        bias = "" if math.isnan(partial) else f"partial correlation {partial:+.2f}"
    titles = (
        f"accuracy {figures['accuracy']:.3f}",
        f"calibration error {figures['ece']:.3f}",
        f"Kendall's τ {figures['kendall_tau']:.3f}",
        bias,
    )
    responses = metrics.response_table(scores, lengths, ranks)
    return plots.reward_report(
        tables["by_gap"], tables["calibration"], responses, rule, titles
    )
