"""A study's runs summed up: several methods, several seeds, the same prompts.

Knows what a method gains over the start and over another method, and how sure that is.
Does not know how a policy was tuned or sampled. One row of a frame is one run; its figures
are means over prompts, `by_prompt` holds the prompts' own.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from starling_lib.journal import read_jsonl
from starling_lib.statistics import Interval, crossed_interval

RUN_KEYS = ("method", "seed")


def read_runs(path: str | Path) -> pd.DataFrame:
    """Runs of a JSON-lines file, one a row, in the order in which they ended.

    A last line that a kill cut off is left out: that run is made again. Raises ValueError
    that names a line which is no run or lacks a key, or a run that stands twice.
    """
    path = Path(path)
    runs = list(read_jsonl(path, RUN_KEYS, torn_end=True)) if path.exists() else []
    frame = pd.DataFrame(runs, columns=None if runs else list(RUN_KEYS))
    twice = frame[frame.duplicated(list(RUN_KEYS))]
    if len(twice):
        again = ", ".join(f"{key}={twice.iloc[0][key]}" for key in RUN_KEYS)
        raise ValueError(f"{path.name}: the run {again} stands twice; remove one line")
    return frame


def by_prompt(runs: pd.DataFrame, method: str, measure: str) -> np.ndarray:
    """(seeds, prompts) means of a measure; a run that broke off has no row here."""
    own = runs[runs["method"] == method]
    rows = [
        figures[measure] for figures in own["by_prompt"] if isinstance(figures, dict)
    ]
    return np.array(rows, dtype=float)


def gain(
    runs: pd.DataFrame, method: str, measure: str, over: str = "start"
) -> Interval:
    """How much more of a measure than another method, interval over seeds and prompts.

    Prompts are the same in both, so their differences are taken one by one; seeds are
    not, so each method's vary by themselves (`statistics.crossed_interval`). Raises
    ValueError where a method has no finished run.
    """
    ours, theirs = by_prompt(runs, method, measure), by_prompt(runs, over, measure)
    if not len(ours) or not len(theirs):
        raise ValueError(f"no finished run of {method if len(theirs) else over!r}")
    return crossed_interval(ours, theirs)


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a method: learning rate, seeds, gains over the start, mean figures.

    The gains' columns are `estimate`, `low`, `high` under "proxy" and "gold"; the others
    stand under an empty name. Runs that broke off count in `failed` and nowhere else;
    gains are NaN until both the method and the start have a finished run.
    """
    rows = {}
    for method in runs["method"].unique():
        own = runs[runs["method"] == method]
        rate = own["learning_rate"].iloc[0]
        row = {("", "rate"): f"{rate:.0e}", ("", "seeds"): len(own)}
        row["", "failed"] = own["by_prompt"].isna().sum()
        known = all(len(by_prompt(runs, m, "proxy")) for m in (method, "start"))
        for measure in ("proxy", "gold"):
            ends = gain(runs, method, measure) if known else Interval(*[np.nan] * 3)
            row |= {(measure, name): x for name, x in ends._asdict().items()}
        for name in ("kl", "length", "eos_rate", "distinct_2"):
            row["", name] = own[name].mean()
        rows[method] = row
    return pd.DataFrame.from_dict(rows, orient="index")
