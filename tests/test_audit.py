"""The audit against hand-made tables, brute force, planted biases and published figures."""

import gzip
import itertools
import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from starling_lib import audit, rankings
from starling_lib.audit import (
    composition,
    display_orders,
    duplicate_responses,
    length_bias,
    length_by_rank,
    model_ratings,
    near_duplicate_prompts,
    position_bias,
    position_bias_by,
    position_test,
    repeat_agreement,
    split_leaks,
    token_lengths,
    truncation_cost,
    win_matrix,
)
from starling_lib.chat import CHATML_TEMPLATE, render
from starling_lib.rankings import data_path, load_rankings
from starling_lib.statistics import kendall_tau

pytestmark = pytest.mark.filterwarnings("ignore:.*identical answers")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """A tenth of the resamples: few ends of intervals are checked, and roughly."""
    monkeypatch.setattr(audit, "RESAMPLES", 100)


@pytest.fixture(scope="module")
def mini():
    return [*load_rankings(), *load_rankings(split="test")]


@pytest.fixture(scope="module")
def nectar(shared_data):
    return list(load_rankings(shared_data / "nectar_sample.jsonl.gz"))


@pytest.fixture(scope="module")
def alpaca(shared_data):
    return list(load_rankings(shared_data / "alpaca_eval_kwise.jsonl.gz"))


def _lines(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def table_row(name, models, lengths, ranks=None, **fields):
    """A row whose answers have these lengths and texts of their own, best first."""
    texts = [chr(ord("a") + i) * n for i, n in enumerate(lengths)]
    return {
        "id": name,
        "responses": texts,
        "models": list(models),
        "ranks": ranks or list(range(1, len(texts) + 1)),
    } | fields


def made_rankings(strengths, rows, seed, longer=0.0, model_length=0.0):
    """Plackett-Luce rankings (Gumbel noise) of models m0, m1, …, one answer each.

    `longer` is what the judge adds for each doubling of the length; `model_length` how
    much longer (in doublings) an answer is for each unit of its model's strength.
    """
    rng = np.random.default_rng(seed)
    strengths = np.asarray(strengths, dtype=float)
    shape = (rows, len(strengths))
    doublings = 6 + rng.normal(0, 1, shape) + model_length * strengths
    score = strengths + longer * doublings + rng.gumbel(size=shape)
    table = []
    for i, order in enumerate(np.argsort(-score, axis=1)):
        lengths = np.maximum(1, np.round(2 ** doublings[i, order])).astype(int)
        table.append(table_row(f"p{i}", [f"m{j}" for j in order], lengths))
    return table


def uniform_judge(count, k, seed):
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(k), (count, 1)), axis=1).tolist()


# --- position


def test_position_bias_by_hand():
    frame = position_bias([[0, 1, 2], [0, 2, 1], [2, 0, 1], [0, 1, 2]])
    assert list(frame) == [
        *("position", "n", "first_share", "first_low", "first_high"),
        *("mean_rank", "rank_low", "rank_high"),
    ]
    assert frame["position"].tolist() == [0, 1, 2] and set(frame["n"]) == {4}
    assert frame["first_share"].tolist() == [0.75, 0, 0.25]
    assert frame["mean_rank"].tolist() == [1.25, 2.5, 2.25]


def test_wilson_interval_is_the_textbook_one():
    n, p, z = 40, 0.15, 1.959964
    frame = position_bias([[0, 1]] * 6 + [[1, 0]] * 34)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    ends = frame.loc[0, ["first_low", "first_high"]].tolist()
    assert ends == pytest.approx([centre - half, centre + half], abs=1e-6)


PUBLISHED = {  # variant: n, first-place shares and mean ranks by position 0 to 6
    "no_pairwise": (
        195,
        [0.313, 0.308, 0.174, 0.097, 0.046, 0.031, 0.031],
        [3.20, 3.20, 3.65, 4.08, 4.43, 4.61, 4.83],
    ),
    "pairwise_no_given_order": (
        187,
        [0.278, 0.225, 0.107, 0.134, 0.112, 0.086, 0.059],
        [3.68, 3.19, 4.13, 3.82, 4.06, 4.52, 4.59],
    ),
    "tiebreak_order_given": (
        187,
        [0.214, 0.144, 0.102, 0.160, 0.123, 0.144, 0.112],
        [3.73, 3.65, 4.19, 3.89, 3.84, 3.96, 4.74],
    ),
}


def test_gpt4s_position_bias_to_the_printed_digit(shared_data):
    log = _lines(shared_data / "nectar_judge_log.jsonl.gz")
    orders = [row["ranking_order"] for row in log]
    variants = [row["variant"] for row in log]
    table = position_bias_by(orders, variants)
    assert list(table["variant"].unique()) == list(PUBLISHED)
    for variant, (n, shares, ranks) in PUBLISHED.items():
        part = table[table["variant"] == variant]
        assert set(part["n"]) == {n}
        assert part["first_share"].round(3).tolist() == shares
        assert part["mean_rank"].round(2).tolist() == ranks
        own = [o for o, v in zip(orders, variants, strict=True) if v == variant]
        expected = position_bias(own).reset_index(drop=True)
        pd.testing.assert_frame_equal(
            part.drop(columns="variant").reset_index(drop=True), expected
        )
        assert position_test(own).rank_p < 1e-3


def mini_orders():
    log = _lines(data_path("nectar_mini/judgments.jsonl"))
    return display_orders(
        [line["display"] for line in log], [line["ranking"] for line in log]
    )


def test_position_bias_of_the_bundled_log():
    frame = position_bias(mini_orders())
    expected = [4.22, 4.07, 3.88, 3.90, 3.97, 4.04, 3.92]
    assert frame["mean_rank"].round(2).tolist() == expected
    assert set(frame["n"]) == {480}
    assert position_test(mini_orders()).first_p == pytest.approx(0.157, abs=5e-4)


def test_a_judge_that_likes_what_it_sees_first_is_found():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(300, 5)) + np.array([0.8, 0, 0, 0, 0])
    orders = np.argsort(-scores, axis=1).tolist()
    frame, test = position_bias(orders), position_test(orders)
    assert frame.loc[0, "first_low"] > 0.2 and frame.loc[0, "rank_high"] < 3
    assert test.first_p < 1e-6 and test.rank_p < 1e-6


def test_a_bias_below_the_first_place_shows_in_the_ranks_only():
    """First place is fair; whatever stands at position 0 otherwise comes last."""
    orders = []
    for order in uniform_judge(400, 4, seed=5):
        best, *rest = order
        orders.append([best, *sorted(rest, key=lambda p: p == 0)])
    test = position_test(orders)
    assert test.first_p > 0.05 and test.rank_p < 1e-6


def test_a_fair_judge_is_not_accused():
    orders = uniform_judge(400, 7, seed=0)
    test, frame = position_test(orders), position_bias(orders)
    assert test.first_p > 0.05 and test.rank_p > 0.05
    inside = frame["first_low"].le(1 / 7) & frame["first_high"].ge(1 / 7)
    assert inside.sum() >= 6


def test_p_values_are_small_as_often_as_they_say():
    tests = [position_test(uniform_judge(60, 5, seed)) for seed in range(300)]
    for p in ([t.first_p for t in tests], [t.rank_p for t in tests]):
        assert 0.01 < np.mean(np.array(p) < 0.05) < 0.1


def test_of_two_positions_the_ranks_say_what_the_first_places_do():
    test = position_test([[0, 1]] * 14 + [[1, 0]] * 6)
    assert test.first_chi2 == test.rank_chi2 == pytest.approx(3.2)


@given(st.lists(st.permutations(range(4)), min_size=1, max_size=12), st.randoms())
@settings(max_examples=15, deadline=None)
def test_position_bias_against_counting_in_any_order(orders, random):
    frame = position_bias(orders)
    n = len(orders)
    firsts = [sum(order[0] == p for order in orders) / n for p in range(4)]
    ranks = [sum(order.index(p) + 1 for order in orders) / n for p in range(4)]
    assert frame["first_share"].tolist() == pytest.approx(firsts)
    assert frame["mean_rank"].tolist() == pytest.approx(ranks)
    shuffled = random.sample(orders, n)
    columns = ["first_share", "first_low", "first_high", "mean_rank"]
    assert np.allclose(position_bias(shuffled)[columns], frame[columns])


def test_one_judgment_has_no_spread():
    frame = position_bias([[2, 0, 1]])
    assert frame["mean_rank"].tolist() == [2, 3, 1]
    assert frame[["rank_low", "rank_high"]].isna().all(axis=None)
    assert frame["first_high"].max() <= 1


@given(st.permutations(range(5)), st.permutations(range(5)))
@settings(max_examples=30, deadline=None)
def test_display_orders_point_back_at_the_items(display, ranking):
    (order,) = display_orders([display], [ranking])
    assert [display[position] for position in order] == list(ranking)


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ([], "no judgments"),
        ([[0, 1, 2], [0, 1]], "judgment 1 ranks 2 responses, judgment 0 ranks 3"),
        ([[0, 1], [1, 1]], "judgment 1: .* no order of display positions"),
        ([[1, 2, 3]], "judgment 0: .* use display_orders"),
        ([[0]], "judgment 0: .* two or more"),
    ],
)
def test_bad_judgments_are_named(orders, message):
    for function in (position_bias, position_test):
        with pytest.raises(ValueError, match=message):
            function(orders)


def test_bad_variants_are_named():
    with pytest.raises(ValueError, match="2 judgments and 1 variants"):
        position_bias_by([[0, 1], [1, 0]], ["a"])
    with pytest.raises(ValueError, match="variant 'b': judgment 1 ranks 3"):
        position_bias_by([[0, 1], [0, 1], [0, 1, 2]], ["a", "b", "b"])
    with pytest.raises(ValueError, match="0 judgments"):
        position_bias_by([], [])


# --- repeats


def test_repeat_agreement_by_hand():
    result = repeat_agreement([[0, 1, 2], [5, 6]], [[0, 2, 1], [6, 5]])
    assert result.n == 2
    assert result.rows["tau"].tolist() == pytest.approx([1 / 3, -1])
    assert result.rows["k"].tolist() == [3, 2]
    assert result.rows["same_best"].tolist() == [True, False]
    assert result.tau.estimate == pytest.approx(-1 / 3)
    assert result.top1.estimate == 0.5
    # one apart: (0, 1) kept, (1, 2) and (5, 6) turned; two apart: (0, 2) kept
    assert result.by_gap["gap"].tolist() == [1, 2]
    assert result.by_gap["pairs"].tolist() == [3, 1]
    assert result.by_gap["same"].tolist() == pytest.approx([1 / 3, 1])


@given(
    st.lists(
        st.integers(2, 6).flatmap(
            lambda k: st.tuples(st.permutations(range(k)), st.permutations(range(k)))
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=15, deadline=None)
def test_tau_against_the_library_whatever_the_sizes(pairs):
    a, b = zip(*pairs, strict=True)
    result = repeat_agreement(a, b)
    for tau, one, two in zip(result.rows["tau"], a, b, strict=True):
        ranks = [[order.index(i) for i in range(len(order))] for order in (one, two)]
        assert tau == pytest.approx(kendall_tau(*ranks))
    back = repeat_agreement(b, a)
    assert back.rows["tau"].tolist() == pytest.approx(result.rows["tau"].tolist())
    assert back.top1 == result.top1


def test_the_bundled_judge_repeats_itself():
    log = pd.DataFrame(_lines(data_path("nectar_mini/judgments.jsonl")))
    passes = log.pivot(index="id", columns="pass", values="ranking")
    result = repeat_agreement(passes[1].tolist(), passes[2].tolist())
    assert result.n == 240 and result.rows["same_best"].sum() == 240
    assert round(result.tau.estimate, 2) == 0.92
    assert result.tau.low < result.tau.estimate < result.tau.high
    assert result.top1.estimate == 1 and 0.98 < result.top1.low < 1
    assert result.by_gap["pairs"].tolist() == [1440, 1200, 960, 720, 480, 240]
    assert result.by_gap["same"].round(2).tolist()[:2] == [0.89, 0.97]


def test_a_judge_that_guesses_agrees_by_chance():
    result = repeat_agreement(uniform_judge(300, 7, 1), uniform_judge(300, 7, 2))
    assert result.tau.low < 0 < result.tau.high
    assert result.top1.low < 1 / 7 < result.top1.high


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "non-empty"),
        ([[0, 1]], [], "equally long"),
        ([[0, 1], [0, 1]], [[0, 1], [0, 2]], "row 1: .* same items"),
        ([[0, 1, 2]], [[0, 1]], "row 0"),
        ([[0, 0]], [[0, 0]], "row 0: .* each once"),
        ([[0]], [[0]], "row 0: .* two or more"),
    ],
)
def test_passes_that_do_not_match_are_named(a, b, message):
    with pytest.raises(ValueError, match=message):
        repeat_agreement(a, b)


# --- length


def bias_of(table):
    return length_bias(table).set_index("condition")


def brute_force_longer(table):
    pairs = [
        (a, b)
        for row in table
        for a, b in itertools.combinations(map(len, row["responses"]), 2)
        if a != b
    ]
    return sum(a > b for a, b in pairs), len(pairs)


def test_length_bias_by_hand():
    """Ten pairs, one of equal length; seven of the nine go to the longer one."""
    bias = bias_of([table_row("p", "abcde", [5, 9, 9, 2, 1])])
    assert bias.loc["all pairs", "pairs"] == 9
    assert bias.loc["all pairs", "longer_wins"] == pytest.approx(7 / 9)
    assert np.isnan(bias.loc["all pairs", "low"]), "one prompt shows no spread"
    assert bias.loc["same model", "pairs"] == 0
    assert np.isnan(bias.loc["same model", "longer_wins"])


def test_same_model_and_finished_pairs_by_hand():
    bias = bias_of(
        [
            table_row("p", "aab", [3, 2, 4], finished=[True, False, True]),
            table_row("q", "abb", [1, 2, 3], finished=[True, True, True]),
        ]
    )
    assert bias.loc["same model", ["pairs", "longer_wins"]].tolist() == [2, 0.5]
    # (3, 4) of p and all of q
    assert bias.loc["both finished", ["pairs", "longer_wins"]].tolist() == [4, 0]


def test_bundled_set_has_the_figures_of_its_card(mini):
    bias = bias_of(mini)
    assert bias.loc["all pairs", "pairs"] == 5013
    assert round(bias.loc["all pairs", "longer_wins"], 3) == 0.370
    chars = length_by_rank(mini)
    assert chars["n"].tolist() == [240] * 7
    assert chars["chars"].iloc[0] == pytest.approx(228.67, abs=0.005)
    assert chars["low"].lt(chars["chars"]).all() and chars["high"].gt(chars.chars).all()


def test_longer_wins_628_in_a_thousand_on_alpaca(alpaca):
    bias = bias_of(alpaca)
    assert round(bias.loc["all pairs", "longer_wins"], 3) == 0.628
    assert bias.loc["same model", "pairs"] == 0


def test_nectar_rows_against_brute_force(nectar):
    """The published 69.2 % and lengths by rank are of 396 prompts; here are 219."""
    bias = bias_of(nectar)
    wins, count = brute_force_longer(nectar)
    assert bias.loc["all pairs", "pairs"] == count == 4528
    assert bias.loc["all pairs", "longer_wins"] == wins / count
    assert abs(wins / count - 0.692) < 0.01
    same = [
        len(x) > len(y)
        for row in nectar
        for (x, m), (y, n) in itertools.combinations(
            zip(row["responses"], row["models"], strict=True), 2
        )
        if m == n and len(x) != len(y)
    ]
    assert bias.loc["same model", "pairs"] == len(same)
    assert bias.loc["same model", "longer_wins"] == pytest.approx(np.mean(same))
    assert bias.loc["all pairs", "low"] > bias.loc["same model", "longer_wins"]
    chars = [np.mean([len(row["responses"][i]) for row in nectar]) for i in range(7)]
    assert length_by_rank(nectar)["chars"].tolist() == pytest.approx(chars)


STRENGTHS = [1.5, 0.5, 0.0, -0.5, -1.5]


def test_a_judge_that_likes_length_is_found_between_equal_models():
    bias = bias_of(made_rankings(STRENGTHS, 400, seed=0, longer=0.5))
    line = bias.loc["twice as long, equal models"]
    assert line["low"] < special.expit(0.5) < line["high"]
    assert line["low"] > 0.55


def test_good_models_that_write_long_are_not_taken_for_a_length_bias(monkeypatch):
    monkeypatch.setattr(audit, "RESAMPLES", 1000)
    bias = bias_of(made_rankings(STRENGTHS, 400, seed=1, model_length=1.0))
    assert bias.loc["all pairs", "low"] > 0.6, "the raw share is fooled"
    line = bias.loc["twice as long, equal models"]
    assert line["low"] < 0.5 < line["high"]


def test_length_control_counts_doublings_not_characters():
    table = made_rankings(STRENGTHS, 60, seed=2, longer=0.5)
    twice = [row | {"responses": [t * 2 for t in row["responses"]]} for row in table]
    pd.testing.assert_frame_equal(length_bias(table), length_bias(twice), rtol=1e-4)


def test_length_control_is_the_penalised_regression_it_says():
    table = made_rankings([0.5, 0, -0.5], 30, seed=4, longer=0.3)
    data = []
    for row in table:
        answers = list(zip(row["models"], map(len, row["responses"]), strict=True))
        for (a, x), (b, y) in itertools.combinations(answers, 2):
            if x != y:
                features = [np.log2(x / y), 0, 0, 0]
                features[1 + int(a[1])] += 1
                features[1 + int(b[1])] -= 1
                data.append(features)
    data = np.array(data)
    fit = optimize.minimize(
        lambda w: np.logaddexp(0, -data @ w).sum() + w @ w / 2, np.zeros(4)
    )
    line = bias_of(table).loc["twice as long, equal models"]
    assert line["longer_wins"] == pytest.approx(special.expit(fit.x[0]), abs=1e-4)


def test_no_pair_of_unequal_length_is_an_error():
    with pytest.raises(ValueError, match="no two responses"):
        length_bias([table_row("p", "ab", [3, 3])])


# --- models


def test_ratings_by_hand_with_names_that_repeat():
    table = [
        table_row("p", "aab", [1, 2, 3]),
        table_row("q", "ba", [1, 2]),
        table_row("r", "ca", [1, 2]),
    ]
    ratings = model_ratings(table).set_index("model")
    assert list(ratings) == [
        *("n", "mean_rank", "rank_low", "rank_high"),
        *("win_rate", "win_low", "win_high"),
        *("strength", "strength_low", "strength_high"),
    ]
    assert ratings["n"].to_dict() == {"c": 1, "b": 2, "a": 4}
    assert ratings.loc["a", "mean_rank"] == (1 + 2 + 2 + 2) / 4
    # a against others: two wins over b in p, a loss in q, a loss in r; a-a left out
    assert ratings.loc["a", "win_rate"] == 0.5
    assert ratings.loc["b", "win_rate"] == pytest.approx(1 / 3)
    assert ratings.loc["c", "win_rate"] == 1
    assert ratings.loc["c", ["strength_low", "strength_high"]].isna().all()
    strengths, counts = ratings["strength"], ratings["n"]
    assert (strengths * counts).sum() == pytest.approx(0, abs=1e-9)


def choix_strengths(table):
    """The same estimate by another library: virtual player and all, centred."""
    choix = pytest.importorskip("choix")
    counts = Counter(name for row in table for name in row["models"])
    index = {name: i for i, name in enumerate(counts)}
    data = [[index[name] for name in row["models"]] for row in table]
    player = len(index)
    data += [pair for i in range(player) for pair in ([i, player], [player, i])]
    fit = choix.ilsr_rankings(player + 1, data)[:player]
    centre = np.average(fit, weights=list(counts.values()))
    return dict(zip(counts, fit - centre, strict=True))


@pytest.mark.parametrize("name", ["mini", "alpaca", "nectar"])
def test_strengths_against_another_library(name, request):
    """Also where names repeat in a row (nectar), and where one always wins (mini)."""
    table = request.getfixturevalue(name)
    table = table[::2]
    answers = audit._answers(table)
    ours = audit._strengths(answers)["strength"]
    theirs = choix_strengths(table)
    assert ours.to_dict() == pytest.approx(theirs, abs=2e-3)


def test_likelihood_gradient_and_curvature_against_differences():
    choices = np.array([[0, 1, 2, 1], [2, 0, 3, 3], [1, 2, 3, 3], [0, 3, 3, 3]])
    at = np.array([0.3, -0.8, 1.1])

    def nll(x):
        total = 2 * np.logaddexp(x / 2, -x / 2).sum()
        for row in choices:
            scores = [x[m] for m in row if m < 3]
            total += sum(
                special.logsumexp(scores[i:]) - scores[i] for i in range(len(scores))
            )
        return total

    value, gradient, scores, hessian = audit._plackett_luce(at, choices)
    step = 1e-5 * np.eye(3)
    slopes = [(nll(at + d) - nll(at - d)) / 2e-5 for d in step]
    assert value == pytest.approx(nll(at))
    assert gradient == pytest.approx(slopes, abs=1e-6)
    assert gradient == pytest.approx(np.tanh(at / 2) - scores.sum(axis=0))
    bends = [
        (
            audit._plackett_luce(at + d, choices)[1]
            - audit._plackett_luce(at - d, choices)[1]
        )
        / 2e-5
        for d in step
    ]
    assert hessian == pytest.approx(np.array(bends), abs=1e-6)


def test_planted_strengths_are_recovered():
    ratings = model_ratings(made_rankings(STRENGTHS, 800, seed=7)).set_index("model")
    assert list(ratings.index) == [f"m{i}" for i in range(5)]
    for i, true in enumerate(STRENGTHS):
        line = ratings.loc[f"m{i}"]
        assert line["strength"] == pytest.approx(true, abs=0.15)
        assert line["strength_low"] < line["strength"] < line["strength_high"]


@pytest.mark.slow
def test_strength_intervals_cover_the_truth_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(audit, "RESAMPLES", 500)
    covered = []
    for seed in range(60):
        answers = audit._answers(made_rankings(STRENGTHS, 80, seed=seed))
        fit = audit._strengths(answers).sort_index()
        covered.append(
            (fit.strength_low <= STRENGTHS) & (fit.strength_high >= STRENGTHS)
        )
    assert 0.90 < np.mean(covered) < 0.985


@pytest.mark.slow
def test_one_newton_step_gives_the_interval_that_refitting_does(nectar, monkeypatch):
    monkeypatch.setattr(audit, "RESAMPLES", 2)  # refits need no interval of their own
    rng = np.random.default_rng(0)
    refits = []
    for _ in range(200):
        drawn = [nectar[i] for i in rng.integers(0, 219, 219)]
        refits.append(audit._strengths(audit._answers(drawn))["strength"])
    refits = pd.DataFrame(refits)
    monkeypatch.setattr(audit, "RESAMPLES", 1000)
    ours = audit._strengths(audit._answers(nectar))
    for model in ("gpt-4", "gpt-4-0613", "anthropic", "llama-2-7b-chat"):
        low, high = refits[model].quantile([0.025, 0.975])
        width = ours.loc[model, "strength_high"] - ours.loc[model, "strength_low"]
        assert width == pytest.approx(high - low, rel=0.25)


def test_a_model_that_always_wins_is_finite_and_unknown():
    table = [table_row(f"p{i}", "ab", [1, 2]) for i in range(5000)]
    ratings = model_ratings(table)
    assert ratings["win_rate"].tolist() == [1, 0]
    assert np.isfinite(ratings["strength"]).all()
    assert ratings[["strength_low", "strength_high"]].isna().all(axis=None)


def test_a_model_of_one_prompt_has_no_interval():
    table = [table_row(f"p{i}", "ab" if i % 3 else "ba", [1, 2]) for i in range(9)]
    table.append(table_row("last", "acb", [1, 2, 3]))
    line = model_ratings(table).set_index("model").loc["c"]
    assert line["n"] == 1 and line["win_rate"] == 0.5
    ends = [f"{name}_{end}" for name in ("rank", "strength") for end in ("low", "high")]
    assert line[ends].isna().all()


def test_two_rows_of_one_prompt_are_one_observation():
    """Copies of every row hold no news: no interval may shrink with them."""
    table = made_rankings(STRENGTHS, 60, seed=3)
    once, twice = model_ratings(table), model_ratings(table + table)
    widths = [
        (frame["rank_high"] - frame["rank_low"]).mean() for frame in (once, twice)
    ]
    assert widths[0] == pytest.approx(widths[1])
    widths = [
        (frame["strength_high"] - frame["strength_low"]).mean()
        for frame in (once, twice)
    ]
    assert widths[0] == pytest.approx(widths[1], rel=0.15)


def test_the_order_of_rows_and_of_answers_does_not_matter():
    table = made_rankings(STRENGTHS, 40, seed=9, longer=0.3)
    rng = np.random.default_rng(0)
    mixed = []
    for i in rng.permutation(len(table)):
        row = dict(table[i])
        order = rng.permutation(len(row["ranks"]))
        for field in ("responses", "models", "ranks"):
            row[field] = [row[field][j] for j in order]
        mixed.append(row)
    for function in (model_ratings, length_bias, length_by_rank):
        pd.testing.assert_frame_equal(function(table), function(mixed), rtol=1e-5)
    for a, b in zip(win_matrix(table), win_matrix(mixed), strict=True):
        pd.testing.assert_frame_equal(a, b)


def test_mean_ranks_of_the_bundled_card(mini):
    ratings = model_ratings(mini).set_index("model")
    expected = {
        "assistant-written": 1.00,
        "smollm2-135m-greedy": 3.23,
        "smollm2-135m-t0.6": 3.38,
        "smollm2-135m-concise": 3.43,
        "smollm2-135m-t1.0-b": 5.14,
        "smollm2-135m-t1.0": 5.19,
        "smollm2-135m-t1.3": 6.63,
    }
    assert ratings["mean_rank"].round(2).to_dict() == expected
    assert list(ratings.index) == list(expected)
    # Two draws of one sampler: no difference where there is none.
    a, b = ratings.loc["smollm2-135m-t1.0"], ratings.loc["smollm2-135m-t1.0-b"]
    assert a["rank_low"] < b["rank_high"] and a["strength_high"] > b["strength_low"]


def test_more_than_half_of_nectars_rows_repeat_a_name(nectar):
    repeats = np.mean([len(set(row["models"])) < 7 for row in nectar])
    assert 0.5 < repeats < 0.6
    ratings = model_ratings(nectar).set_index("model")
    assert ratings.loc["gpt-4", "n"] == 240 > len(nectar)
    assert ratings.loc["gpt-4-0613", "mean_rank"] == pytest.approx(2.8, abs=0.1)
    assert ratings.loc["anthropic", "mean_rank"] == pytest.approx(6.0, abs=0.1)


def test_win_matrix_by_hand():
    table = [
        table_row("p", "aab", [1, 2, 3]),
        table_row("q", "ba", [1, 2]),
        table_row("r", "ca", [1, 2]),
    ]
    share, pairs = win_matrix(table)
    assert list(share.index) == list(share.columns) == ["c", "a", "b"]
    assert share.loc["a", "b"] == pytest.approx(2 / 3) and pairs.loc["a", "b"] == 3
    assert share.loc["c", "a"] == 1 and share.loc["a", "c"] == 0
    assert np.isnan(share.loc["c", "b"]) and pairs.loc["b", "c"] == 0
    assert np.isnan(np.diag(share)).all()


def test_ties_and_copies_hold_no_preference():
    tied = table_row("p", "abc", [3, 2, 1], ranks=[1, 1, 3])
    copied = table_row("q", "ab", [2, 2])
    copied["responses"] = ["same", " same\n"]
    _, pairs = win_matrix([tied, copied])
    assert pairs.loc["a", "b"] == 0 and pairs.loc["a", "c"] == 1
    assert bias_of([tied, copied]).loc["all pairs", "pairs"] == 2


@pytest.mark.parametrize("name", ["mini", "nectar"])
def test_win_matrix_adds_up(name, request):
    table = request.getfixturevalue(name)
    share, pairs = win_matrix(table)
    assert np.allclose((share + share.T).to_numpy()[pairs.to_numpy() > 0], 1)
    wins = Counter()
    for row in table:
        answers = zip(row["models"], map(str.strip, row["responses"]), strict=True)
        for (a, x), (b, y) in itertools.combinations(answers, 2):
            wins[a, b] += x != y and a != b
    counted = (share * pairs).fillna(0)
    for (a, b), count in wins.items():
        assert counted.loc[a, b] == pytest.approx(count)


# --- copies and leaks


def test_duplicate_responses_by_hand():
    row = table_row("p", "abcd", [1, 1, 1, 1])
    row["responses"] = ["yes", "no", "yes ", "no"]
    unlike = table_row("q", "ab", [1, 2])
    frame = duplicate_responses([unlike, row])
    assert frame["row"].tolist() == [1, 1] and frame["id"].tolist() == ["p", "p"]
    assert frame["ranks"].tolist() == [[1, 3], [2, 4]]
    assert frame["models"].tolist() == [["a", "c"], ["b", "d"]]
    assert duplicate_responses([unlike]).empty


def test_copies_of_the_bundled_set_and_of_nectar(mini, nectar):
    assert duplicate_responses(mini)["row"].nunique() == 4
    copies = duplicate_responses(nectar)
    expected = {
        i
        for i, row in enumerate(nectar)
        if len({text.strip() for text in row["responses"]}) < 7
    }
    assert set(copies["row"]) == expected and len(expected) == 16


QUESTION = "please tell me how a sailing boat can move against the wind at all"


def test_near_duplicates_ignore_case_and_punctuation():
    prompts = [
        "What is the tallest tower in the old town?",
        QUESTION,
        "Something else entirely, which nobody asked before.",
        QUESTION.title() + "?!",
        QUESTION + " today",
    ]
    frame = near_duplicate_prompts(prompts)
    assert frame[["first", "second"]].to_numpy().tolist() == [[1, 3], [1, 4], [3, 4]]
    assert frame["jaccard"].tolist() == pytest.approx([1, 12 / 13, 12 / 13])


def test_texts_messages_and_rows_are_read_alike():
    texts = [QUESTION, QUESTION, "no"]
    messages = [[{"role": "user", "content": text}] for text in texts]
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(messages)]
    frames = [near_duplicate_prompts(each) for each in (texts, messages, rows)]
    frames.append(near_duplicate_prompts(Dataset.from_list(rows)))
    assert all(frame.equals(frames[0]) for frame in frames) and len(frames[0]) == 1


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_near_duplicates_against_brute_force(threshold):
    rng = np.random.default_rng(0)
    prompts = []
    for i in range(40):
        base = [f"w{i}x{j}" for j in range(60)]
        prompts.append(" ".join(base))
        changed = rng.choice(60, size=i % 12, replace=False)
        prompts.append(
            " ".join(w if j not in changed else "z" for j, w in enumerate(base))
        )
    shingles = [{" ".join(p.split()[i : i + 3]) for i in range(58)} for p in prompts]
    truth = {
        (i, j): len(shingles[i] & shingles[j]) / len(shingles[i] | shingles[j])
        for i, j in itertools.combinations(range(len(prompts)), 2)
    }
    truth = {pair: value for pair, value in truth.items() if value >= threshold}
    frame = near_duplicate_prompts(prompts, threshold)
    found = {(a, b): value for a, b, value in frame.itertuples(index=False)}
    assert found.items() <= truth.items(), "every overlap is exact"
    assert len(found) >= 0.97 * len(truth) > 0


def test_short_and_wordless_prompts():
    frame = near_duplicate_prompts(["hi", "Hi!", "🙂🙂", "🙂🙂", "yes"])
    assert frame[["first", "second"]].to_numpy().tolist() == [[0, 1], [2, 3]]


def test_leaks_across_a_split_are_found_and_none_invented():
    train, test = load_rankings(), load_rankings(split="test")
    assert split_leaks(train, test, threshold=0.5).empty
    planted = list(train["prompt"]) + [test[5]["prompt"], test[9]["prompt"]]
    frame = split_leaks(planted, test["prompt"])
    assert frame[["train", "test"]].to_numpy().tolist() == [[203, 5], [204, 9]]
    assert list(frame) == ["train", "test", "jaccard"]


@pytest.mark.parametrize("threshold", [0, 1.5, -1])
def test_a_threshold_is_a_share(threshold):
    with pytest.raises(ValueError, match="more than 0, at most 1"):
        near_duplicate_prompts(["a"], threshold)


# --- composition and tokens


def test_composition_of_the_bundled_set(mini):
    frame = composition(mini)
    counts = frame.groupby("field").apply(
        lambda part: dict(zip(part["value"], part["rows"], strict=True))
    )
    assert counts["source"] == {
        "helpful": 50,
        "instruct": 45,
        "chat": 40,
        "explain": 40,
        "harmless": 30,
        "facts": 20,
        "false_premise": 15,
    }
    assert counts["turns"] == {"1": 210, "2": 30}
    assert counts["good_natured"] == {"False": 24, "True": 216}
    assert counts["responses"] == {"7": 240}
    assert frame["share"].tolist() == (frame["rows"] / 240).tolist()


def test_composition_of_rows_that_say_little():
    rows = [
        table_row("p", "ab", [1, 2], source=["x", "y"], turns=10),
        table_row("q", "abc", [1, 2, 3], source=["x"], turns=2),
        table_row("r", "abc", [1, 2, 3], source=[], turns=2, good_natured=True),
    ]
    lines = composition(rows)[["field", "value", "rows"]].to_numpy().tolist()
    assert lines[:3] == [["source", "x", 2], ["source", "y", 1], ["source", "?", 1]]
    assert lines[3:5] == [["turns", "2", 2], ["turns", "10", 1]], "as numbers"
    assert ["good_natured", "?", 2] in lines
    assert lines[-2:] == [["responses", "2", 1], ["responses", "3", 2]]


class Characters:
    """A tokenizer of one token a character, with ChatML's marks."""

    chat_template = CHATML_TEMPLATE

    def apply_chat_template(self, chats, tokenize, add_generation_prompt):
        assert tokenize is False
        return [render(chat, CHATML_TEMPLATE, add_generation_prompt) for chat in chats]

    def __call__(self, texts, add_special_tokens):
        assert add_special_tokens is False, "the template has them already"
        return {"input_ids": [list(text) for text in texts]}


def with_prompts(table):
    prompt = [{"role": "user", "content": "Hi"}]
    return [row | {"prompt": prompt} for row in table]


def test_token_lengths_by_hand():
    table = with_prompts([table_row("p", "ab", [4, 1]), table_row("q", "a", [2])])
    frame = token_lengths(table, Characters(), batch_size=1)
    cue = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert frame["id"].tolist() == ["p", "p", "q"] and frame["row"].tolist() == [
        0,
        0,
        1,
    ]
    assert set(frame["prompt_tokens"]) == {len(cue)}
    end = len("<|im_end|>")
    assert frame["response_tokens"].tolist() == [4 + end, 1 + end, 2 + end]
    assert (frame.prompt_tokens + frame.response_tokens == frame.total_tokens).all()


def test_batches_do_not_change_lengths():
    table = with_prompts(made_rankings([0, 0], 7, seed=0))
    frames = [token_lengths(table, Characters(), batch_size=n) for n in (1, 3, 100)]
    assert frames[0].equals(frames[1]) and frames[0].equals(frames[2])


@pytest.mark.slow
def test_token_lengths_with_a_real_tokenizer(tokenizer, mini):
    frame = token_lengths(mini[:20], tokenizer)
    row = mini[3]
    chat = [*row["prompt"], {"role": "assistant", "content": row["responses"][2]}]
    whole = tokenizer.apply_chat_template(chat, return_dict=False)
    line = frame[(frame["row"] == 3) & (frame["rank"] == 3)].iloc[0]
    assert line["total_tokens"] == len(whole)
    # one token a byte, and the end of the turn
    assert line["response_tokens"] == len(row["responses"][2].encode()) + 1


def test_a_tokenizer_without_a_template_is_named():
    bare = Characters()
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template: set one"):
        token_lengths(with_prompts([table_row("p", "ab", [1, 2])]), bare)


def lengths_frame(rows):
    columns = ["row", "prompt_tokens", "response_tokens"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(total_tokens=frame.prompt_tokens + frame.response_tokens)


def test_truncation_cost_by_hand():
    lengths = lengths_frame([(0, 10, 5), (0, 10, 15), (1, 30, 10)])
    cost = truncation_cost(lengths, [10, 20, 40])
    assert cost["responses_cut"].tolist() == pytest.approx([1, 2 / 3, 0])
    assert cost["prompts_cut"].tolist() == [1, 0.5, 0]
    assert cost["tokens_lost"].tolist() == pytest.approx([50 / 80, 25 / 80, 0])


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 50), st.integers(1, 50)), min_size=1
    )
)
@settings(max_examples=40, deadline=None)
def test_a_larger_limit_never_costs_more(rows):
    cost = truncation_cost(lengths_frame(rows), range(1, 101, 9))
    columns = cost[["responses_cut", "prompts_cut", "tokens_lost"]]
    assert (columns.diff().dropna() <= 1e-12).all(axis=None)
    assert columns.iloc[-1].eq(0).all() and columns.le(1).all(axis=None)


# --- tables of any shape, and bad ones

TABLE_FUNCTIONS = [
    *(length_bias, length_by_rank, model_ratings, win_matrix),
    *(duplicate_responses, composition),
]


def test_rankings_lends_its_name_to_the_audit():
    for name in ("position_bias", "repeat_agreement", "length_bias", "model_ratings"):
        assert getattr(rankings, name) is getattr(audit, name)


@pytest.mark.parametrize("function", TABLE_FUNCTIONS)
def test_lists_and_datasets_give_the_same(function):
    table = load_rankings(split="test[:12]")
    for a, b in zip(function(table), function(list(table)), strict=True):
        assert a.equals(b) if isinstance(a, pd.DataFrame) else a == b


@pytest.mark.parametrize("function", TABLE_FUNCTIONS)
def test_rows_may_differ_in_size_and_number_one(function):
    rows = [table_row("p", "abc", [5, 2, 1]), table_row("q", "ba", [1, 4])]
    for table in (rows, rows[:1]):
        assert function(table) is not None
    assert length_by_rank(rows)["n"].tolist() == [2, 2, 1]


@pytest.mark.parametrize("function", TABLE_FUNCTIONS)
def test_an_empty_table_is_named(function):
    with pytest.raises(ValueError, match="has no rows"):
        function([])
    with pytest.raises(ValueError, match="has no rows"):
        function(load_rankings().select([]))
    with pytest.raises(ValueError, match="no rows"):
        truncation_cost(token_lengths([], Characters()))


@pytest.mark.parametrize("function", TABLE_FUNCTIONS[:5])
def test_rows_that_do_not_fit_are_named(function):
    good = table_row("p", "ab", [1, 2])
    missing = {key: value for key, value in good.items() if key != "ranks"}
    with pytest.raises(
        ValueError, match="row 1: no field 'ranks'; load the table with"
    ):
        function([good, missing])
    short = table_row("q", "abc", [1, 2], ranks=[1, 2])
    with pytest.raises(
        ValueError, match=r"row 1 \(id 'q'\): .*3 models.*give one of each"
    ):
        function([good, short])


@pytest.mark.slow
def test_ten_thousand_rows_of_seven():
    strengths = np.linspace(1.2, -1.2, 7)
    table = made_rankings(strengths, 10_000, seed=0, longer=0.3)
    line = bias_of(table).loc["twice as long, equal models"]
    assert line["longer_wins"] == pytest.approx(special.expit(0.3), abs=0.01)
    assert line["high"] - line["low"] < 0.02
    ratings = model_ratings(made_rankings(strengths, 10_000, seed=1))
    assert ratings["strength"].tolist() == pytest.approx(strengths.tolist(), abs=0.05)
    assert win_matrix(table).pairs.to_numpy().sum() == 10_000 * 42
