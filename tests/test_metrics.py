"""Metrics against loops over pairs, SciPy, scikit-learn and judges whose bias is known."""

import gzip
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import kendalltau, rankdata
from sklearn.metrics import ndcg_score

from starling_lib.losses import kwise_loss
from starling_lib.metrics import (
    REWARDBENCH,
    accuracy_by,
    accuracy_by_gap,
    calibration,
    expected_calibration_error,
    length_bias_of_scores,
    metric_intervals,
    response_table,
    reward_metrics,
    rewardbench_scores,
)

NAN = math.nan
NAMES = ("accuracy", "adjacent_accuracy", "top1", "kendall_tau", "ndcg")
quick = settings(deadline=None, max_examples=40)


def draw(rows=20, k=5, seed=0):
    """Scores with ties (from rounding) and lengths."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, k)).round(1), rng.integers(1, 6, size=(rows, k))


def pair_list(values, ranks=None):
    """(row, i, j) of every pair where i is better than j, by loops."""
    values = np.asarray(values, float)
    ranks = (
        np.tile(np.arange(values.shape[1]), (len(values), 1))
        if ranks is None
        else ranks
    )
    return [
        (row, i, j)
        for row, (v, r) in enumerate(zip(values, np.asarray(ranks, float), strict=True))
        for i, j in itertools.permutations(range(len(v)), 2)
        if r[i] < r[j] and not np.isnan(v[[i, j]]).any()
    ]


def win(values, pair):
    row, i, j = pair
    return float((np.sign(values[row][i] - values[row][j]) + 1) / 2)


# --- reward_metrics


def test_pair_metrics_against_loops():
    scores, lengths = draw()
    pairs = pair_list(scores)
    metrics = reward_metrics(scores, lengths)
    near = [p for p in pairs if p[2] - p[1] == 1]
    shorter = [p for p in pairs if lengths[p[0]][p[1]] < lengths[p[0]][p[2]]]
    assert metrics["accuracy"] == pytest.approx(
        np.mean([win(scores, p) for p in pairs])
    )
    assert metrics["adjacent_accuracy"] == pytest.approx(
        np.mean([win(scores, p) for p in near])
    )
    assert metrics["longer_wins"] == pytest.approx(
        np.mean([win(lengths, p) for p in pairs])
    )
    assert metrics["shorter_better_accuracy"] == pytest.approx(
        np.mean([win(scores, p) for p in shorter])
    )
    assert metrics["nll"] == pytest.approx(kwise_loss(torch.tensor(scores)).item())


def test_kendall_tau_is_scipys():
    scores = np.random.default_rng(1).normal(size=(30, 6))
    expected = np.mean([kendalltau(row, -np.arange(6)).statistic for row in scores])
    assert reward_metrics(scores)["kendall_tau"] == pytest.approx(expected)


@quick
@given(hnp.arrays(float, (3, 5), elements=st.integers(-2, 2)))
def test_ndcg_is_scikit_learns_also_with_equal_scores(scores):
    gains = np.tile([4, 3, 2, 1, 0], (3, 1))
    assert reward_metrics(scores)["ndcg"] == pytest.approx(ndcg_score(gains, scores))


def test_metrics_of_a_perfect_an_inverted_and_an_indifferent_model():
    best_first = torch.arange(4.0, 0, -1).repeat(3, 1)

    def figures(scores):
        return [reward_metrics(scores)[name] for name in NAMES[:4]]

    assert figures(best_first) == [1, 1, 1, 1]
    assert figures(-best_first) == [0, 0, 0, -1]
    assert figures(torch.zeros(3, 4)) == [0.5, 0.5, 0.25, 0]
    assert reward_metrics(best_first)["ndcg"] == 1
    assert reward_metrics(torch.zeros(3, 4))["ece"] == 0


@quick
@given(st.integers(0, 10_000))
def test_scores_turned_round_turn_the_figures_round(seed):
    scores, _ = draw(rows=6, seed=seed)
    one, other = reward_metrics(scores), reward_metrics(-scores)
    for name in ("accuracy", "adjacent_accuracy"):
        assert one[name] + other[name] == pytest.approx(1)
    assert one["kendall_tau"] == pytest.approx(-other["kendall_tau"])


def test_metrics_leave_missing_responses_out():
    ragged = reward_metrics([[2, 1, NAN], [1, 3, 2]], lengths=[[1, 2, 9], [3, 2, 1]])
    assert ragged["accuracy"] == pytest.approx((1 + 1) / 4)
    assert ragged["adjacent_accuracy"] == pytest.approx((1 + 1) / 3)
    assert ragged["top1"] == 0.5
    assert ragged["kendall_tau"] == pytest.approx((1 - 1 / 3) / 2)
    assert ragged["longer_wins"] == pytest.approx(3 / 4)
    assert ragged["shorter_better_accuracy"] == 1  # the pair of the first row alone


def test_a_padded_row_counts_as_the_short_row_does():
    short = reward_metrics([[0.3, 0.1, 0.5]], [[1, 2, 3]])
    padded = reward_metrics([[0.3, 0.1, 0.5, NAN]], [[1, 2, 3, 0]])
    assert padded == pytest.approx(short)


def test_a_lost_response_leaves_the_others_their_ranks():
    table = accuracy_by_gap([[3, NAN, 1]])
    assert list(table.index) == [2], "first and third are two ranks apart"
    assert reward_metrics([[NAN, 2, 1]])["top1"] == 1, "the best of those scored"


def test_rows_without_a_pair_count_nowhere():
    scores = [[2, 1, NAN], [5, NAN, NAN], [NAN, NAN, NAN]]
    metrics = reward_metrics(scores)
    assert [metrics[name] for name in NAMES] == [1, 1, 1, 1, 1]
    empty = reward_metrics(np.full((2, 3), NAN), np.ones((2, 3)))
    assert all(math.isnan(value) for value in empty.values())
    assert metric_intervals(np.full((2, 3), NAN))["estimate"].isna().all()


# --- ranks


def test_ranks_name_the_order_and_ties_are_not_counted():
    # ranks 2, 1, 1, 4: pairs (1>0), (2>0), (1>3), (2>3), (0>3); 1 and 2 are equal
    scores, ranks = [[0.5, 0.9, 0.1, 0.3]], [[2, 1, 1, 4]]
    metrics = reward_metrics(scores, ranks=ranks)
    assert metrics["accuracy"] == pytest.approx((1 + 0 + 1 + 0 + 1) / 5)
    assert metrics["adjacent_accuracy"] == pytest.approx((1 + 0 + 1) / 3)
    assert metrics["top1"] == 1, "either of the best two will do"
    assert metrics["kendall_tau"] == pytest.approx((3 - 2) / 5)
    nll = kwise_loss(torch.tensor(scores), ranks=torch.tensor(ranks))
    assert metrics["nll"] == pytest.approx(nll.item())
    assert metrics["ndcg"] == pytest.approx(ndcg_score([[1, 2, 2, 0]], scores))


def test_rows_with_nothing_to_rank_do_not_dilute_the_likelihood():
    beside = [[2.0, 1.0], [NAN, NAN], [3.0, NAN]]
    expected = reward_metrics([[2.0, 1.0]])["nll"]
    assert reward_metrics(beside)["nll"] == pytest.approx(expected)
    assert math.isnan(reward_metrics([[1.0]])["nll"])


def test_ties_among_many_columns_leave_only_the_likelihood_unknown():
    scores = [[*range(13, 0, -1)]]
    tied = reward_metrics(scores, ranks=[[1, 1, *range(3, 14)]])
    assert math.isnan(tied["nll"]) and tied["accuracy"] == 1
    assert math.isfinite(reward_metrics(scores)["nll"])
    # Of responses that are missing none is tied with another.
    ranks = [[*range(1, 12), NAN, NAN]]
    assert math.isfinite(reward_metrics(scores, ranks=ranks)["nll"])


def test_columns_in_any_order_give_the_same_figures():
    scores, lengths = draw()
    shuffle = np.random.default_rng(2).permuted(np.tile(np.arange(5), (20, 1)), axis=1)
    mixed, mixed_lengths = (
        np.take_along_axis(x, shuffle, 1) for x in (scores, lengths)
    )
    ranks = shuffle + 1
    plain = reward_metrics(scores, lengths)
    assert reward_metrics(mixed, mixed_lengths, ranks) == pytest.approx(plain)
    pd.testing.assert_frame_equal(
        length_bias_of_scores(mixed, mixed_lengths, ranks, resamples=50)[
            ["estimate", "n"]
        ],
        length_bias_of_scores(scores, lengths, resamples=50)[["estimate", "n"]],
    )


def test_gaps_count_the_ranks_that_are_taken():
    table = accuracy_by_gap([[4, 3, 2, 1]], ranks=[[1, 1, 3, 4]], resamples=10)
    assert table["n"].to_dict() == {1: 3, 2: 2}  # 1=2 > 3 > 4: no rank 2 in between


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([1, 2], {}, r"scores have shape \(2,\)"),
        (
            [[1, 2]],
            {"ranks": [[1, 2, 3]]},
            r"ranks \(1, 3\) do not fit scores \(1, 2\)",
        ),
    ],
)
def test_bad_shapes_are_named(scores, options, message):
    with pytest.raises(ValueError, match=message):
        reward_metrics(scores, **options)


# --- tables with intervals


def test_intervals_hold_the_figures_of_reward_metrics():
    scores, lengths = draw(rows=60)
    table = metric_intervals(scores, lengths, resamples=300)
    figures = reward_metrics(scores, lengths)
    assert set(table.index) == set(figures) - {"nll", "ece"}
    for name, row in table.iterrows():
        assert row["estimate"] == pytest.approx(figures[name])
        assert row["low"] < row["estimate"] < row["high"]
        assert row["prompts"] <= 60


def test_intervals_are_over_prompts_not_pairs():
    # Every row a copy of one of two: the 21 pairs of a row say one thing, not 21.
    good, bad = np.arange(7, 0, -1.0), np.arange(7.0)
    rows = np.array([good, bad] * 8)
    row = accuracy_by(rows, ["all"] * 16).loc["all"]
    assert row["estimate"] == 0.5 and row["n"] == 16 * 21 and row["prompts"] == 16
    assert row["high"] - row["low"] > 0.3, "16 coins, not 336"


def test_accuracy_by_gap_against_loops():
    scores, _ = draw()
    pairs = pair_list(scores)
    table = accuracy_by_gap(scores, resamples=20)
    for gap in (1, 2, 3, 4):
        wins = [win(scores, p) for p in pairs if p[2] - p[1] == gap]
        assert table.loc[gap, "estimate"] == pytest.approx(np.mean(wins))
        assert table.loc[gap, "n"] == len(wins)


def test_accuracy_by_source_takes_names_and_lists_of_names():
    scores = [[2, 1], [1, 2], [3, 1], [1, 1]]
    table = accuracy_by(scores, ["a", ["a", "b"], ["b"], []], resamples=20)
    assert table["estimate"].to_dict() == {"a": 0.5, "b": 0.5}
    assert table["n"].to_dict() == {"a": 2, "b": 2}
    with pytest.raises(ValueError, match="4 rows of scores but 1 group labels"):
        accuracy_by(scores, ["a"])


def test_response_table_is_one_centred_row_a_response():
    table = response_table([[4, 1, NAN], [7, 7, 1]], [[5, 6, 0], [1, 2, 3]])
    assert table["rank"].tolist() == [1, 2, 1, 2, 3]
    assert table["score"].tolist() == [1.5, -1.5, 2, 2, -4]
    assert table["length"].tolist() == [5, 6, 1, 2, 3]


# --- calibration


def test_calibration_by_hand():
    # one pair a row; margins ln 3, −ln 3, 0: predicted ¾, ¾, ½; observed 1, 0, ½
    scores = [[math.log(3), 0], [0, math.log(3)], [1, 1]]
    table = calibration(scores, bins=2, resamples=20)
    assert table["predicted"].tolist() == pytest.approx([0.5, 0.75])
    assert table["observed"].tolist() == [0.5, 0.5]
    assert table["n"].tolist() == [1, 2]
    ece = expected_calibration_error(scores, bins=2)
    assert ece == pytest.approx((0 * 1 + 0.25 * 2) / 3)
    assert reward_metrics(scores)["ece"] == pytest.approx(ece)


def test_which_side_a_pair_is_seen_from_does_not_matter():
    """Both directions of each pair, binned from 0 to 1, give the same error."""
    scores, _ = draw(rows=40)
    margins = np.array([scores[r][i] - scores[r][j] for r, i, j in pair_list(scores)])
    margins = margins[margins != 0]  # an even pair would stand on the edge of two bins
    both = np.concatenate([margins, -margins])
    predicted, observed = 1 / (1 + np.exp(-both)), np.repeat([1.0, 0.0], len(margins))
    bins = np.digitize(predicted, np.linspace(0, 1, 21)[1:-1])
    twice = sum(abs((predicted - observed)[bins == b].sum()) for b in range(20)) / len(
        both
    )
    pairs = np.stack([margins, np.zeros_like(margins)], 1)
    assert expected_calibration_error(pairs) == pytest.approx(twice)


def test_scores_of_the_true_model_are_calibrated_and_doubled_ones_are_not():
    rng = np.random.default_rng(0)
    rewards = rng.normal(scale=1.5, size=(3000, 4))
    order = np.argsort(-(rewards + rng.gumbel(size=rewards.shape)), axis=1)
    scores = np.take_along_axis(rewards, order, 1)
    assert expected_calibration_error(scores) < 0.015
    table = calibration(scores, resamples=300)
    inside = table["predicted"].between(table["low"], table["high"])
    assert inside.mean() >= 0.8
    sure = calibration(2 * scores, resamples=50)
    assert expected_calibration_error(2 * scores) > 0.05
    assert (sure["predicted"] > sure["observed"])[2:].all()


def test_calibration_error_at_its_worst():
    assert expected_calibration_error([[0, 800]]) == pytest.approx(1)
    assert math.isnan(expected_calibration_error([[1, NAN]]))


# --- length


def judged(weight, seed=0, rows=400):
    """Scores = quality + weight·length rank; the judge ranks by quality alone."""
    rng = np.random.default_rng(seed)
    quality = -np.sort(-rng.normal(size=(rows, 7)), axis=1)
    lengths = rng.lognormal(5, 1, size=(rows, 7))
    noise = rng.normal(scale=0.7, size=(rows, 7))
    return quality + weight * rankdata(lengths, axis=1) + noise, lengths


@pytest.mark.parametrize("weight", [0.0, 0.3, -0.3])
def test_a_liking_for_length_is_found_and_its_absence_too(weight):
    table = length_bias_of_scores(*judged(weight), resamples=300)
    row = table.loc["partial_correlation"]
    longer, shorter = table.loc[
        ["longer_better_accuracy", "shorter_better_accuracy"], "estimate"
    ]
    if weight == 0:
        assert row["low"] < 0 < row["high"] and abs(longer - shorter) < 0.02
    else:
        assert np.sign(weight) * row["estimate"] > 0.3
        assert not row["low"] < 0 < row["high"]
        assert np.sign(weight) * (longer - shorter) > 0.2


def test_a_judges_own_liking_for_length_is_not_held_against_the_scores():
    rng = np.random.default_rng(3)
    lengths = -np.sort(
        -rng.lognormal(size=(500, 5)), axis=1
    )  # the judge ranks by length
    shuffle = rng.permuted(np.tile(np.arange(5), (500, 1)), axis=1)
    lengths = np.where(
        rng.random((500, 1)) < 0.3, np.take_along_axis(lengths, shuffle, 1), lengths
    )
    scores = -np.arange(5) + rng.normal(
        size=(500, 5)
    )  # and the scores follow the judge
    table = length_bias_of_scores(scores, lengths, resamples=300)
    assert table.loc["correlation", "low"] > 0.2
    assert (
        table.loc["partial_correlation", "low"]
        < 0
        < table.loc["partial_correlation", "high"]
    )


def test_pairs_of_equal_length_are_on_neither_side():
    scores, lengths = draw(rows=50)
    table = length_bias_of_scores(scores, lengths, resamples=20)
    for side, sign in (("longer", 1), ("shorter", -1)):
        pairs = [
            (row, i, j)
            for row, i, j in pair_list(scores)
            if sign * (lengths[row][i] - lengths[row][j]) > 0
        ]
        row = table.loc[f"{side}_better_accuracy"]
        assert row["n"] == len(pairs)
        assert row["estimate"] == pytest.approx(
            np.mean([win(scores, p) for p in pairs])
        )


def test_partial_correlation_is_that_of_the_residuals():
    scores, lengths = draw(rows=50)
    columns = []
    for values in (scores, lengths, np.tile(-np.arange(5.0), (50, 1))):
        ranks = rankdata(values, axis=1)
        columns.append((ranks - ranks.mean(1, keepdims=True)).ravel())
    x, y, z = columns
    left = [v - z * (v @ z) / (z @ z) for v in (x, y)]
    expected = np.corrcoef(*left)[0, 1]
    table = length_bias_of_scores(scores, lengths, resamples=20)
    assert table.loc["partial_correlation", "estimate"] == pytest.approx(expected)
    assert table.loc["correlation", "estimate"] == pytest.approx(
        np.corrcoef(x, y)[0, 1]
    )


def test_length_bias_leaves_missing_responses_out():
    scores, lengths = judged(0.2, rows=40)
    padded = np.hstack([scores, np.full((40, 2), NAN)])
    zeros = np.hstack([lengths, np.zeros((40, 2))])
    pd.testing.assert_frame_equal(
        length_bias_of_scores(padded, zeros, resamples=50),
        length_bias_of_scores(scores, lengths, resamples=50),
    )


@pytest.mark.filterwarnings("error")
def test_a_perfect_ranking_leaves_nothing_for_length_to_explain():
    lengths = np.random.default_rng(0).random((9, 4))
    table = length_bias_of_scores(
        np.tile([4.0, 3, 2, 1], (9, 1)), lengths, resamples=20
    )
    assert math.isnan(table.loc["partial_correlation", "estimate"])
    same = length_bias_of_scores(lengths, np.ones((9, 4)), resamples=20)
    assert same.loc[["correlation", "longer_better_accuracy"], "estimate"].isna().all()


# --- RewardBench


def bench(accuracies, n=1000):
    """Scored pairs whose subsets have exactly these accuracies."""
    return [
        {"subset": subset, "chosen_score": float(i < share * n), "rejected_score": 0.5}
        for subset, share in accuracies.items()
        for i in range(n)
    ]


def test_published_figures_of_starlings_34b_reward_model():
    """Safety 87.7 from its five subsets, and the score from the four sections."""
    safety = [0.840, 0.970, 0.974, 0.936, 0.618]
    table = rewardbench_scores(
        bench(dict(zip(REWARDBENCH["Safety"], safety, strict=True)))
    )
    assert table.loc[("Safety", "all"), "estimate"] == pytest.approx(0.877, abs=5e-4)
    assert ("all", "all") not in table.index, "three sections are missing"
    sections = dict(zip(REWARDBENCH, [0.969, 0.572, 0.877, 0.885], strict=True))
    every = {s: sections[name] for name, part in REWARDBENCH.items() for s in part}
    table = rewardbench_scores(bench(every))
    assert table.loc[("all", "all"), "estimate"] == pytest.approx(0.826, abs=5e-4)
    assert len(table) == 23 + 4 + 1


def test_maths_weighs_as_much_as_all_code():
    code = dict.fromkeys([s for s in REWARDBENCH["Reasoning"] if s != "math-prm"], 1.0)
    table = rewardbench_scores(bench({"math-prm": 0.0, **code}, n=10))
    assert table.loc[("Reasoning", "all"), "estimate"] == 0.5
    assert table.loc[("Reasoning", "math-prm"), "estimate"] == 0


def test_chat_hard_weighs_subsets_by_their_published_counts():
    table = rewardbench_scores(
        bench({"llmbar-natural": 1.0, "llmbar-adver-GPTInst": 0.0}, 10)
    )
    assert table.loc[("Chat Hard", "all"), "estimate"] == pytest.approx(100 / 192)


def test_equal_and_missing_scores():
    rows = [
        {"subset": "math-prm", "chosen_score": 1, "rejected_score": 1},
        {"subset": "math-prm", "chosen_score": 2, "rejected_score": 1},
        {"subset": "math-prm", "chosen_score": NAN, "rejected_score": 1},
    ]
    row = rewardbench_scores(rows).loc[("Reasoning", "math-prm")]
    assert row["estimate"] == 0.5 and row["n"] == 2


def test_bench_intervals_are_those_of_resampled_rows():
    rows = bench({"mt-bench-easy": 0.8}, n=50)
    row = rewardbench_scores(rows, resamples=5000).loc[("Chat", "mt-bench-easy")]
    expected = np.sqrt(0.8 * 0.2 / 50)
    assert (row["high"] - row["low"]) / 3.92 == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"subset": "math-prm", "chosen_score": 1}], "no column 'rejected_score'"),
        (
            bench({"math-prm": 1}, n=2) + bench({"shp": 1}, n=1),
            "row 2: subset 'shp' is none of RewardBench's",
        ),
    ],
)
def test_bad_bench_rows_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        rewardbench_scores(rows)


def test_llmbar_as_it_ships(shared_data):
    with gzip.open(shared_data / "llmbar.jsonl.gz", "rt") as lines:
        rows = pd.DataFrame(map(json.loads, lines))
    for side in ("chosen", "rejected"):
        rows[f"{side}_score"] = rows[side].str.len()
    table = rewardbench_scores(rows)
    counts = table["n"].droplevel("section").to_dict()
    assert counts == {"llmbar-natural": 100, "llmbar-adver-GPTInst": 92, "all": 192}
    longer = table["estimate"].droplevel("section")
    assert longer["llmbar-adver-GPTInst"] < 0.35, "the adversarial set punishes length"


def test_longer_wins_on_alpaca_eval(shared_data):
    with gzip.open(shared_data / "alpaca_eval_kwise.jsonl.gz", "rt") as lines:
        rows = [json.loads(line)["answers"] for line in lines]
    lengths = [[len(answer["answer"]) for answer in row] for row in rows]
    ranks = [[answer["rank"] for answer in row] for row in rows]
    metrics = reward_metrics(lengths, lengths, ranks)
    assert metrics["longer_wins"] == pytest.approx(0.628, abs=5e-4)  # its data card
    assert metrics["accuracy"] == metrics["longer_wins"]
    assert metrics["shorter_better_accuracy"] == 0
