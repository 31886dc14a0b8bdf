"""What MT-Bench judgments add up to, and how sure we are.

Knows frames of judgments as `bench_files.read_judgments` returns them: tables by the
rules of FastChat's `show_result`, intervals and tests over questions. Does not know who
judged, nor what was said. The unit of every interval is the question: its two turns and
all passes over it stay together. A failed judgment, which is one with an `error`, enters
no mean and no count but `failed`: a score of −1 alone says nothing, since a reward model
may well give it. Wins are counted in `win_rates`, from pairs as from single scores.
"""

import numpy as np
import pandas as pd

from starling_lib.bench_files import CATEGORIES
from starling_lib.statistics import bootstrap_interval, paired_difference

# --- tables


def score_table(judgments: pd.DataFrame) -> pd.DataFrame:
    """Mean scores by FastChat's rules (`show_result --mode single`), best model first.

    Every mean is over judgments: `overall` over those of both turns together, so that
    it is not the mean of `turn_1` and `turn_2` where one of them has more failures.

    Args:
        judgments: single-answer judgments of one judge; without `category` there are
            no columns for it.

    Returns:
        Index `model`; a column for each category, `turn_1`, `turn_2`, `overall`,
        `failed` (judgments with an `error`, in no mean; NaN where no other is left).

    Raises:
        ValueError: judgments of several judges, or none at all.
    """
    check_one_judge(judgments)
    parts = score_parts(judgments)
    scores = judgments["score"].astype(float).where(judgments["error"].isna())
    table = pd.DataFrame(
        {
            name: scores[chosen].groupby(judgments["model"][chosen]).mean()
            for name, chosen in parts.items()
        }
    )
    table["failed"] = scores.isna().groupby(judgments["model"]).sum()
    table.index.name = "model"
    return table.sort_values("overall", ascending=False, kind="stable")


def score_parts(judgments: pd.DataFrame) -> dict[str, pd.Series]:
    """Which judgments belong to each column of `score_table`: boolean masks by name.

    Categories come in MT-Bench's order, others behind them by name.
    """
    parts = {}
    if "category" in judgments:
        present = set(judgments["category"].dropna())
        known = [name for name in CATEGORIES if name in present]
        for name in known + sorted(present - set(CATEGORIES)):
            parts[name] = judgments["category"] == name
    for turn in sorted(judgments["turn"].unique()):
        parts[f"turn_{turn}"] = judgments["turn"] == turn
    return parts | {"overall": pd.Series(True, index=judgments.index)}


def check_one_judge(judgments: pd.DataFrame) -> None:
    """Raise ValueError unless there are judgments, and all of one judge."""
    if judgments.empty:
        raise ValueError("no judgments")
    judges = sorted(judgments["judge"].unique())
    if len(judges) > 1:
        raise ValueError(
            f"judgments of several judges ({', '.join(judges)}) make no common score: "
            "choose those of one"
        )


def _pivoted(judgments: pd.DataFrame, item: list[str]) -> pd.DataFrame:
    """Scores by item (rows) and model (columns, by name); NaN where there is none."""
    keys = judgments[["model", *item]]
    if (twice := keys.duplicated()).any():
        first = keys[twice].iloc[0].to_dict()
        raise ValueError(f"judged twice: {first}; number the passes")
    return judgments.set_index([*item, "model"])["score"].astype(float).unstack("model")


def _with_category(frame: pd.DataFrame, judgments: pd.DataFrame) -> pd.DataFrame:
    """The frame with the categories that the judgments give to its questions."""
    if "category" not in judgments:
        return frame
    known = judgments.drop_duplicates("question_id").set_index("question_id")[
        "category"
    ]
    return frame.assign(category=frame["question_id"].map(known))


# --- how sure


def score_intervals(
    judgments: pd.DataFrame, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Every mean of `score_table` with its bootstrap interval over questions.

    Says how far a score could move with other questions of the same kind; nothing about
    another judge, nor (see `run_to_run`) about asking this one again.

    Returns:
        Index (`model`, `part`): parts are the columns of `score_table`; columns
        `score, low, high, questions`. NaN for ends where there is one question only.

    Raises:
        ValueError: judgments of several judges, or none with a score.
    """
    check_one_judge(judgments)
    rows = {}
    for model in score_table(judgments).index:
        valid = (judgments["model"] == model) & judgments["error"].isna()
        for part, chosen in score_parts(judgments).items():
            scored = judgments[chosen & valid]
            if scored.empty:
                continue
            questions = scored["question_id"].astype(str)
            interval = bootstrap_interval(
                scored["score"], np.mean, questions, level, resamples, seed
            )
            rows[model, part] = (*interval, questions.nunique())
    if not rows:
        raise ValueError("every judgment failed: there is no score")
    index = pd.MultiIndex.from_tuples(rows, names=["model", "part"])
    return pd.DataFrame(
        rows.values(), index=index, columns=["score", "low", "high", "questions"]
    )


def compare_scores(
    judgments: pd.DataFrame,
    a: str,
    b: str,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Whether two models' scores differ by more than the choice of questions explains.

    Scores are paired by question and turn, passes averaged first; pairs in which either
    failed are left out, so that both means are over the same questions. Interval and
    p-value come from `statistics.paired_difference` with questions as groups.

    Returns:
        Index `part` as in `score_intervals`; `a` and `b` (the models' means),
        `difference` (a − b), `low, high, p_value, questions`.

    Raises:
        ValueError: several judges, an unknown model, or nothing judged of both.
    """
    check_one_judge(judgments)
    for model in (a, b):
        if model not in set(judgments["model"]):
            raise ValueError(f"no judgment has the model {model!r}")
    scored = judgments[judgments["error"].isna()]
    means = scored.groupby(["question_id", "turn", "model"])["score"].mean()
    pairs = means.unstack("model").reindex(columns=[a, b]).dropna().reset_index()
    if pairs.empty:
        raise ValueError(f"no question was judged of both {a!r} and {b!r}")
    pairs = _with_category(pairs, judgments)
    rows = {}
    for part, chosen in score_parts(pairs).items():
        own, other = pairs.loc[chosen, a], pairs.loc[chosen, b]
        questions = pairs.loc[chosen, "question_id"].astype(str)
        paired = paired_difference(own, other, questions, level, resamples, seed)
        rows[part] = {"a": own.mean(), "b": other.mean(), **paired._asdict()}
        rows[part]["questions"] = questions.nunique()
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("part")


def run_to_run(judgments: pd.DataFrame) -> pd.DataFrame:
    """How much the scores move when the same judge is asked again about the same answers.

    Only answers with a score in every pass count, so that passes differ in nothing else.

    Returns:
        Index `model`; `passes`, `judgments` (a pass), `mean` (of the passes' means),
        `sd` (standard deviation of the passes' means, n − 1), `low`, `high` (the
        lowest and highest of them), `judgment_sd` (of one judgment between passes).

    Raises:
        ValueError: several judges, or fewer than two passes.
    """
    check_one_judge(judgments)
    passes = judgments["pass"].nunique()
    if passes < 2:
        raise ValueError("the judge was asked once: judge again with passes=2 or more")
    valid = judgments[judgments["error"].isna()]
    scores = _pivoted(valid, ["question_id", "turn", "pass"]).unstack("pass")
    rows = {}
    for model in sorted(valid["model"].unique()):
        complete = scores[model].reindex(columns=sorted(judgments["pass"].unique()))
        complete = complete.dropna()
        means = complete.mean()
        rows[model] = {
            "passes": passes,
            "judgments": len(complete),
            "mean": means.mean(),
            "sd": means.std(),
            "low": means.min(),
            "high": means.max(),
            "judgment_sd": np.sqrt(complete.var(axis=1).mean()),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
