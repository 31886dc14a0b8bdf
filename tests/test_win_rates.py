"""Games by hand and by brute force, planted strengths and biases, AlpacaEval's rules."""

import gzip
import itertools
import json
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from scipy.special import expit

from starling_lib import win_rates
from starling_lib.win_rates import (
    alpaca_eval_table,
    bradley_terry,
    games_from_judgments,
    instruction_difficulty,
    length_controlled_win_rate,
    pairwise_table,
    position_bias_test,
    read_annotations,
    resolve_swaps,
    sort_sides,
    swap_consistency,
    win_probabilities,
    win_rate_of_annotations,
)

# A resample of few questions may hold one verdict only: the solver still converges.
pytestmark = pytest.mark.filterwarnings("error")
WINNERS = ["model_a", "model_b", "tie", "error"]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(win_rates, "RESAMPLES", 40)
    monkeypatch.setattr(win_rates, "REFITS", 20)


def games(*rows):
    """(question, winner in order 0, winner in order 1) between a and b."""
    columns = ["question_id", "model_a", "model_b", "winner", "order"]
    both = [(q, "a", "b", w, o) for q, *pair in rows for o, w in enumerate(pair)]
    return pd.DataFrame(both, columns=columns)


def named(first, second, winners, questions=None):
    """Games in one order; `winners` are names of models, or None for a tie."""
    sides = {first: "model_a", second: "model_b", None: "tie"}
    return pd.DataFrame(
        {
            "question_id": questions or range(len(winners)),
            "model_a": first,
            "model_b": second,
            "winner": [sides[w] for w in winners],
            "order": 0,
        }
    )


def turned(frame):
    """The same games with the two models named the other way round."""
    other = {"model_a": "model_b", "model_b": "model_a"}
    frame = frame.rename(columns=other)
    return frame.assign(winner=frame.winner.replace(other), order=1 - frame.order)


many_games = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.sampled_from(list(itertools.combinations("abc", 2))),
        st.sampled_from(WINNERS),
        st.sampled_from([*WINNERS, None]),  # None: judged in one order only
    ),
    min_size=1,
    max_size=15,
    unique_by=lambda game: game[:2],
)


def long(drawn):
    rows = [
        (question, *models, winner, order)
        for question, models, *winners in drawn
        for order, winner in enumerate(winners)
        if winner is not None
    ]
    columns = ["question_id", "model_a", "model_b", "winner", "order"]
    return pd.DataFrame(rows, columns=columns)


# --- games


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("model_a", "model_a", "model_a"),
        ("model_b", "model_b", "model_b"),
        ("tie", "tie", "tie"),
        ("model_a", "model_b", "tie"),
        ("model_a", "tie", "tie"),
        ("tie", "model_b", "tie"),
        ("error", "model_a", "error"),
        ("tie", "error", "error"),
        ("error", "error", "error"),
    ],
)
def test_both_orders_decide_together(first, second, verdict):
    (row,) = resolve_swaps(games((1, first, second))).to_dict("records")
    assert row == {
        "question_id": 1,
        "model_a": "a",
        "model_b": "b",
        "winner": verdict,
        "orders": 2,
    }


def test_names_may_stand_either_way_round():
    """Order 1 of (a, b) is the game that shows b first, so order 0 of (b, a)."""
    rows = [
        {"question_id": 1, "model_a": "a", "model_b": "b", "winner": "model_a"},
        {"question_id": 1, "model_a": "b", "model_b": "a", "winner": "model_b"},
    ]
    frame = pd.DataFrame(rows).assign(order=0)
    assert sort_sides(frame).order.tolist() == [0, 1]
    assert resolve_swaps(frame).winner.tolist() == ["model_a"]
    assert swap_consistency(frame).share["consistent"] == 1


def test_one_order_only_keeps_its_verdict():
    resolved = resolve_swaps(games((1, "model_a", "model_b"), (2, "model_b")))
    assert resolved.winner.tolist() == ["tie", "model_b"]
    assert resolved.orders.tolist() == [2, 1]


def test_turns_judges_and_passes_are_kept_apart():
    pair = games((1, "model_a", "model_a"))
    frame = pd.concat([pair.assign(turn=1), pair.assign(turn=2, winner="model_b")])
    assert resolve_swaps(frame).winner.tolist() == ["model_a", "model_b"]
    passes = pd.concat([pair.assign(**{"pass": 0}), pair.assign(**{"pass": 1})])
    assert len(resolve_swaps(passes)) == 2
    with pytest.raises(ValueError, match="judged twice: .*'question_id': 1"):
        resolve_swaps(pd.concat([pair, pair]))


def test_games_of_fastchats_rows():
    row = {"question_id": 81, "model_1": "b", "model_2": "a", "turn": 2}
    rows = [
        row | {"g1_winner": "model_1", "g2_winner": "tie"},
        row | {"g1_winner": "error", "g2_winner": "model_2", "question_id": 82},
    ]
    made = games_from_judgments(rows)
    assert made.model_a.tolist() == ["a"] * 4 and set(made.turn) == {2}
    # b stood first in game 1: now it is model_b, and the order says so.
    assert made.winner.tolist() == ["model_b", "error", "tie", "model_a"]
    assert made.order.tolist() == [1, 1, 0, 0]
    assert resolve_swaps(made).winner.tolist() == ["tie", "error"]
    with pytest.raises(ValueError, match="without the column 'g2_winner'"):
        games_from_judgments([{"model_1": "a", "model_2": "b", "g1_winner": "tie"}])


def test_table_by_hand():
    table = pairwise_table(
        games(
            (1, "model_a", "model_a"),
            (2, "model_a", "model_a"),
            (3, "model_b", "model_b"),
            (4, "model_a", "model_b"),
            (5, "model_a", "error"),
        )
    )
    assert table.index.tolist() == ["a", "b"]
    counts = ["n", "win", "tie", "loss", "error"]
    assert table.loc["a", counts].tolist() == [4, 2, 1, 1, 1]
    assert table.loc["b", counts].tolist() == [4, 1, 1, 2, 1]
    assert table.win_rate.tolist() == [0.5, 0.25]
    assert table.adjusted_win_rate.tolist() == [0.625, 0.375]
    a = table.loc["a"]
    assert a.adjusted_win_rate_low < 0.625 < a.adjusted_win_rate_high


@given(many_games, st.sampled_from([None, "a"]), st.randoms())
@settings(max_examples=10, deadline=None)
def test_table_against_counting(drawn, baseline, shuffle):
    frame = long(drawn)
    if baseline and not {"a"} & set(frame[["model_a", "model_b"]].to_numpy().ravel()):
        return
    counts = {}
    for _, (one, two), first, second in drawn:
        if baseline not in (None, one, two):
            continue
        for model in {one, two} - {baseline}:
            side = "model_a" if model == one else "model_b"
            verdicts = {first, second if second is not None else first}
            key = "tie" if len(verdicts) > 1 or verdicts == {"tie"} else "loss"
            key = "win" if verdicts == {side} else key
            key = "error" if "error" in verdicts else key
            counts.setdefault(model, dict.fromkeys(["win", "tie", "loss", "error"], 0))
            counts[model][key] += 1
    table = pairwise_table(frame, baseline)
    assert table[["win", "tie", "loss", "error"]].T.to_dict() == counts
    rows = list(frame.index)
    shuffle.shuffle(rows)
    half = len(rows) // 2
    other = pd.concat([frame.loc[rows[:half]], turned(frame.loc[rows[half:]])])
    pd.testing.assert_frame_equal(
        pairwise_table(other, baseline).sort_index(), table.sort_index()
    )


DUEL = [  # question, the two models, who won each game; as in a file of FastChat's
    (1, "a", "b", "model_1", "model_1"),
    (2, "a", "b", "model_2", "model_2"),
    (3, "a", "b", "model_1", "model_2"),
    (4, "a", "b", "tie", "tie"),
    (5, "a", "b", "model_1", "tie"),
    (6, "a", "b", "error", "model_1"),
    (7, "b", "c", "model_1", "model_1"),
    (8, "a", "c", "model_2", "error"),
]


def pair_file(rows, **columns):
    names = ["question_id", "model_1", "model_2", "g1_winner", "g2_winner"]
    return pd.DataFrame(rows, columns=names).assign(**columns)


def show_result(rows, baseline=None):
    """FastChat's counting, one row of the file after the other."""
    counts = {}
    for _, one, two, first, second in rows:
        if "error" in (first, second) or baseline not in (None, one, two):
            continue
        for model in (one, two):
            counts.setdefault(model, {"win": 0, "loss": 0, "tie": 0})
        if first == second and first != "tie":
            winner, loser = (one, two) if first == "model_1" else (two, one)
            counts[winner]["win"] += 1
            counts[loser]["loss"] += 1
        else:
            for model in (one, two):
                counts[model]["tie"] += 1
    counts.pop(baseline, None)
    for model, row in counts.items():
        n = sum(row.values())
        rates = row["win"] / n, row["loss"] / n, (row["win"] + row["tie"] / 2) / n
        names = ["win_rate", "loss_rate", "adjusted_win_rate"]
        counts[model] |= dict(zip(names, rates, strict=True))
    return counts


def check_as_show_result(rows, baseline=None):
    table = pairwise_table(games_from_judgments(pair_file(rows)), baseline)
    expected = pd.DataFrame.from_dict(show_result(rows, baseline), orient="index")
    counted = table[table["n"] > 0]
    assert set(counted.index) == set(expected.index)
    for model in counted.index:
        assert counted.loc[model, expected.columns].tolist() == pytest.approx(
            expected.loc[model].tolist()
        )


def test_a_file_of_fastchats_by_hand():
    table = pairwise_table(games_from_judgments(pair_file(DUEL, judge="gpt-4")))
    assert list(table.index) == ["b", "a", "c"]
    columns = ["win", "loss", "tie", "win_rate", "loss_rate", "adjusted_win_rate"]
    np.testing.assert_allclose(
        table[[*columns, "error"]].to_numpy(float),
        [
            [2, 1, 3, 2 / 6, 1 / 6, 3.5 / 6, 1],
            [1, 1, 3, 0.2, 0.2, 0.5, 2],
            [0, 1, 0, 0, 1, 0, 1],
        ],
    )
    against_b = pairwise_table(games_from_judgments(pair_file(DUEL)), "b")
    counts = against_b[["win", "loss", "tie", "error"]]
    assert counts.T.to_dict("list") == {"a": [1, 1, 3, 1], "c": [0, 1, 0, 0]}
    for baseline in (None, "a", "b", "c"):
        check_as_show_result(DUEL, baseline)


names_of_two = st.sampled_from(list(itertools.permutations("abc", 2)))
game = st.sampled_from(["model_1", "model_2", "tie", "error"])


@given(st.lists(st.tuples(names_of_two, game, game), min_size=1, max_size=8))
@settings(max_examples=10, deadline=None)
def test_wins_are_counted_as_show_result_counts_them(drawn):
    rows = [(i, *models, *winners) for i, (models, *winners) in enumerate(drawn)]
    check_as_show_result(rows)
    check_as_show_result(rows, baseline=rows[0][1])


def test_games_of_several_judges_are_not_counted_together():
    both = pd.concat([pair_file(DUEL, judge=judge) for judge in ("gpt-4", "claude")])
    with pytest.raises(ValueError, match=r"several judges \(claude, gpt-4\)"):
        pairwise_table(games_from_judgments(both))


def test_a_model_whose_judgments_all_failed_has_no_rate():
    table = pairwise_table(games((1, "error", "error"), (2, "tie", "error")))
    assert table.n.tolist() == [0, 0] and table.error.tolist() == [2, 2]
    assert table.filter(like="rate").isna().all(axis=None)


def test_turns_of_one_question_are_one_observation():
    rng = np.random.default_rng(0)
    outcome = rng.choice(["model_a", "model_b"], 40)
    one = games(*((q, w, w) for q, w in enumerate(outcome)))
    copies = pd.concat([one.assign(turn=turn) for turn in range(9)])
    alone = pairwise_table(one.assign(turn=0)).loc["a"]
    many = pairwise_table(copies).loc["a"]
    columns = ["adjusted_win_rate", "adjusted_win_rate_low", "adjusted_win_rate_high"]
    assert many[columns].tolist() == pytest.approx(alone[columns].tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"winner": "A"}, "row 0: winner 'A'"),
        ({"model_b": "a"}, "row 0: 'a' plays itself"),
        ({"order": 2}, "column 'order'"),
    ],
)
def test_bad_games_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        pairwise_table(games((1, "tie", "tie")).assign(**change))


def test_missing_columns_and_baselines_are_named():
    pair = games((1, "tie", "tie"))
    with pytest.raises(ValueError, match="no games"):
        pairwise_table(pair[:0])
    with pytest.raises(ValueError, match="without the column 'winner'"):
        pairwise_table(pair.drop(columns="winner"))
    with pytest.raises(ValueError, match="column 'order'"):
        swap_consistency(pair.drop(columns="order"))
    with pytest.raises(ValueError, match="baseline 'c' played no game; models: a, b"):
        pairwise_table(pair, baseline="c")


# --- position


def test_consistency_by_hand():
    table = swap_consistency(
        games(
            (1, "model_a", "model_a"),
            (2, "tie", "tie"),
            (3, "model_a", "model_b"),  # whoever stands first
            (4, "model_a", "tie"),  # first or nobody
            (5, "model_b", "model_a"),  # whoever stands second
            (6, "tie", "model_a"),  # second or nobody
            (7, "tie", "model_b"),  # first or nobody
            (8, "error", "model_b"),
        )
    )
    assert table.n.to_dict() == {"consistent": 2, "first": 3, "second": 2, "error": 1}
    assert table.share.sum() == 1 and table.share["first"] == 3 / 8
    assert (table.low <= table.share).all() and (table.share <= table.high).all()


@given(many_games)
@settings(max_examples=6, deadline=None)
def test_turning_names_keeps_the_bias_and_exchanging_places_turns_it(drawn):
    frame = long(drawn)
    if not frame.duplicated(["question_id", "model_a", "model_b"]).any():
        return
    shares = swap_consistency(frame)
    pd.testing.assert_frame_equal(swap_consistency(turned(frame)), shares)
    exchanged = swap_consistency(frame.assign(order=1 - frame.order)).share
    renamed = shares.share.rename({"first": "second", "second": "first"})
    assert exchanged.to_dict() == pytest.approx(renamed.to_dict())


def test_position_test_is_the_sign_test():
    frame = games(
        *((q, "model_a", "model_b") for q in range(9)),  # first
        *((q, "model_b", "model_a") for q in range(9, 11)),  # second
        *((q, "model_a", "model_a") for q in range(11, 40)),
    )
    tails = [
        np.mean([sum(flips) >= 9 for flips in itertools.product([0, 1], repeat=11)])
    ]
    assert position_bias_test(frame) == (9, 2, pytest.approx(tails[0]))
    both = position_bias_test(frame, "two-sided").p_value
    assert both == pytest.approx(2 * tails[0])
    assert position_bias_test(frame, "less").p_value > 0.99


def test_turns_do_not_add_evidence():
    frame = games(*((q, "model_a", "model_b") for q in range(4)))
    copies = pd.concat([frame.assign(turn=turn) for turn in range(5)])
    assert position_bias_test(copies) == position_bias_test(frame) == (4, 0, 1 / 16)


def test_a_fair_judge_is_not_accused():
    frame = games(*((q, "tie", "tie") for q in range(5)))
    assert position_bias_test(frame) == (0, 0, 1.0)
    with pytest.raises(ValueError, match="judged in both orders"):
        position_bias_test(named("a", "b", ["a", "b"]))


# --- ratings


def test_two_models_in_closed_form():
    frame = named("x", "y", ["x"] * 12 + ["y"] * 3 + [None] * 4)
    ratings = bradley_terry(frame)
    assert ratings.model.tolist() == ["x", "y"] and set(ratings.games) == {19}
    odds = np.log(14 / 5)
    assert ratings.strength.tolist() == pytest.approx([odds / 2, -odds / 2])
    gap = 400 * np.log10(14 / 5)
    assert ratings.rating.tolist() == pytest.approx([1000 + gap / 2, 1000 - gap / 2])
    chance = win_probabilities(ratings)
    assert chance.loc["x", "y"] == pytest.approx(14 / 19)
    assert np.allclose(chance + chance.T, 1)


def test_virtual_ties_in_closed_form_and_for_one_that_never_lost():
    frame = named("x", "y", ["x"] * 9)
    with pytest.raises(ValueError, match="x never lost .* virtual_ties"):
        bradley_terry(frame)
    ratings = bradley_terry(frame, virtual_ties=1)
    assert np.ptp(ratings.strength) == pytest.approx(np.log(9.5 / 0.5))
    assert np.isfinite(ratings.filter(like="rating")).all(axis=None)


def simulated(strengths, questions, seed=0, tie=0.0):
    rng = np.random.default_rng(seed)
    parts = []
    for one, two in itertools.combinations(strengths, 2):
        chance = expit(strengths[one] - strengths[two])
        won = np.where(rng.random(questions) < chance, one, two)
        won = np.where(rng.random(questions) < tie, None, won)
        parts.append(named(one, two, won.tolist()))
    return pd.concat(parts, ignore_index=True)


def test_planted_strengths_are_found():
    planted = {"a": 1.2, "b": 0.3, "c": -0.4, "d": -1.1}
    found = bradley_terry(simulated(planted, 1500)).set_index("model")
    assert found.strength.to_dict() == pytest.approx(planted, abs=0.12)
    inside = found.strength_low < found.strength
    assert (inside & (found.strength < found.strength_high)).all()


def test_intervals_are_as_wide_as_theory_says(monkeypatch):
    """Two models, n games of even strength: sd of the log odds is 2/√n, halved here."""
    monkeypatch.setattr(win_rates, "REFITS", 200)
    ratings = bradley_terry(named("x", "y", ["x", "y"] * 200))
    width = ratings.strength_high - ratings.strength_low
    assert width.tolist() == pytest.approx([2 * 1.96 / np.sqrt(400)] * 2, rel=0.2)


def test_ratings_maximise_the_likelihood():
    frame = simulated({"a": 0.5, "b": 0.0, "c": -0.5}, 40, seed=3, tie=0.3)
    sides = {"model_a": 1.0, "tie": 0.5, "model_b": 0.0}
    points = frame.winner.map(sides).to_numpy()

    def nll(free):
        strength = {"a": 0.0, "b": free[0], "c": free[1]}
        gap = frame.model_a.map(strength) - frame.model_b.map(strength)
        chance = expit(gap.to_numpy())
        return -(points * np.log(chance) + (1 - points) * np.log(1 - chance)).sum()

    best = optimize.minimize(nll, [0.0, 0.0], tol=1e-10).x
    found = bradley_terry(frame).set_index("model").strength
    gaps = [found["b"] - found["a"], found["c"] - found["a"]]
    assert gaps == pytest.approx(best, abs=1e-5)


def test_ratings_do_not_depend_on_order_or_sides():
    frame = simulated({"a": 0.5, "b": 0.0, "c": -0.5}, 30)
    shuffled = turned(frame.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(bradley_terry(shuffled), bradley_terry(frame))


def test_a_conflict_in_two_orders_is_a_tie():
    conflict = games((1, "model_a", "model_b"), (2, "tie", "tie"), (3, "error", "tie"))
    ratings = bradley_terry(conflict)
    assert ratings.strength.tolist() == pytest.approx([0, 0])
    assert set(ratings.games) == {5}


def test_models_never_compared_are_named():
    apart = pd.concat([named("a", "b", ["a", "b"]), named("c", "d", ["c", "d"])])
    with pytest.raises(ValueError, match=r"never compared.*: a, b \| c, d"):
        bradley_terry(apart)
    linked = pd.concat([apart, named("b", "c", [None, None])])
    assert len(bradley_terry(linked)) == 4


def test_a_group_that_never_lost_is_named():
    frame = pd.concat(
        [
            named("a", "b", ["a", "b"]),
            named("c", "d", ["c", "d"]),
            named("a", "c", ["a", "a"]),
        ]
    )
    with pytest.raises(ValueError, match="^a, b never lost"):
        bradley_terry(frame)


def test_resamples_that_one_model_sweeps_leave_one_end_open():
    ratings = bradley_terry(named("x", "y", ["x"] * 9 + ["y"])).set_index("model")
    assert np.isfinite(ratings.rating).all()
    assert ratings.rating_high["x"] == np.inf and ratings.rating_low["y"] == -np.inf
    assert np.isfinite([ratings.rating_low["x"], ratings.rating_high["y"]]).all()


def test_one_question_has_no_interval_and_no_verdict_no_rating():
    one = bradley_terry(named("x", "y", ["x", "y"], questions=[1, 1]))
    assert one[["rating_low", "rating_high"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="no game with a verdict"):
        bradley_terry(games((1, "error", "error")))


# --- AlpacaEval


def annotated(preferences, lengths_1, lengths_2, model="model"):
    rows = zip(preferences, lengths_1, lengths_2, strict=True)
    return [
        {
            "instruction": f"instruction {i}",
            "output_1": "r" * int(one),
            "output_2": "m" * int(two),
            "generator_1": "baseline",
            "generator_2": model,
            "annotator": "judge",
            "preference": preference,
        }
        for i, (preference, one, two) in enumerate(rows)
    ]


def test_win_rate_by_hand():
    rate = win_rate_of_annotations(annotated([1, 2, 1.5, 1.9, None], [9] * 5, [9] * 5))
    assert rate.win_rate == pytest.approx(60)
    shares = [0, 1, 0.5, 0.9]
    assert rate.standard_error == pytest.approx(100 * stats.sem(shares))
    assert (rate.wins, rate.ties, rate.losses, rate.n, rate.failed) == (2, 1, 1, 4, 1)
    assert rate.low < 60 < rate.high


def test_zero_is_an_old_tie():
    frame = read_annotations(annotated([0, 1.0, 2.0], [5] * 3, [5] * 3))
    assert frame.preference.tolist() == [1.5, 1, 2]


def test_annotations_from_a_file(tmp_path):
    made = annotated([1, 2, None], [3] * 3, [4] * 3)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(made), encoding="utf-8")
    assert win_rate_of_annotations(path) == win_rate_of_annotations(made)
    assert win_rate_of_annotations(str(path)).failed == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference": 2.5}, "annotation 1: preference 2.5, expected 1"),
        ({"preference": -1}, "annotation 1: preference -1"),
        ({"preference": "m"}, "annotation 1: preference m"),
        ({"output_2": None}, "annotation 1: a preference without two outputs"),
        ({"generator_2": "other"}, r"generator_2 has 2 names \(model, other\)"),
    ],
)
def test_bad_annotations_are_named(change, message):
    made = annotated([1.2, 1.3], [3, 4], [4, 5])
    made[1] |= change
    with pytest.raises(ValueError, match=message):
        length_controlled_win_rate(made)


def test_missing_fields_and_all_failed():
    with pytest.raises(ValueError, match="without the field 'output_1'"):
        read_annotations([{"instruction": "x", "preference": 1}])
    with pytest.raises(ValueError, match="2 annotations, none with a preference"):
        win_rate_of_annotations(annotated([None, None], [1, 2], [3, 4]))


def lengths(count, seed, longer=0):
    rng = np.random.default_rng(seed)
    one = rng.integers(200, 1800, count)
    return one, np.maximum(1, one + rng.normal(longer, 500, count).astype(int))


def test_a_judge_of_length_alone_gives_fifty_at_equal_length():
    one, two = lengths(400, seed=0, longer=400)
    share = expit(3 * np.tanh((two - one) / np.std(two - one, ddof=1)))
    result = length_controlled_win_rate(annotated(1 + share, one, two))
    assert result.win_rate > 65
    assert result.length_controlled_win_rate == pytest.approx(50, abs=0.01)
    assert result.length_effect == pytest.approx(3, abs=0.01)
    assert result.length > result.baseline_length


def test_a_judge_of_length_alone_with_binary_verdicts():
    one, two = lengths(800, seed=1, longer=400)
    chance = expit(3 * np.tanh((two - one) / np.std(two - one)))
    verdicts = 1 + (np.random.default_rng(2).random(800) < chance)
    result = length_controlled_win_rate(annotated(verdicts.tolist(), one, two))
    assert result.length_controlled_low < 50 < result.length_controlled_high
    assert result.win_rate_low > 60


def test_a_judge_of_quality_alone_is_left_as_it_is():
    one, two = lengths(500, seed=3, longer=300)
    share = np.random.default_rng(4).beta(2, 5, 500)
    result = length_controlled_win_rate(annotated(1 + share, one, two))
    assert result.length_controlled_win_rate == pytest.approx(result.win_rate, abs=1.5)
    assert result.length_effect == pytest.approx(0, abs=0.2)


def test_exchanged_outputs_give_the_rest_of_a_hundred():
    one, two = lengths(120, seed=5, longer=100)
    share = np.random.default_rng(6).random(120)
    result = length_controlled_win_rate(annotated(1 + share, one, two))
    other = length_controlled_win_rate(annotated(2 - share, two, one))
    sums = [
        result.win_rate + other.win_rate,
        result.length_controlled_win_rate + other.length_controlled_win_rate,
        result.length_controlled_low + other.length_controlled_high,
    ]
    assert sums == pytest.approx([100] * 3, abs=1e-3)
    assert result.length_effect == pytest.approx(other.length_effect, abs=1e-4)


def test_equal_outputs_give_fifty():
    result = length_controlled_win_rate(annotated([1.5] * 6, [7] * 6, [7] * 6))
    assert result.win_rate == result.length_controlled_win_rate == 50
    assert result.length_effect == 0
    assert (result.length_controlled_low, result.length_controlled_high) == (50, 50)


def test_a_model_that_always_wins_stays_finite():
    one, two = lengths(30, seed=7)
    result = length_controlled_win_rate(annotated([2] * 30, one, two))
    assert result.win_rate == 100
    assert 99 < result.length_controlled_win_rate <= 100


def test_the_note_says_what_the_figure_is_not():
    one, two = lengths(40, seed=8)
    share = np.random.default_rng(9).random(40)
    note = length_controlled_win_rate(annotated(1 + share, one, two)).note
    assert "Not the leaderboard's figure" in note and "guess" not in note
    note = length_controlled_win_rate(annotated(1 + share, one, one + 300 + two)).note
    assert "All outputs are longer" in note


def test_rows_in_any_order_and_failures_beside():
    one, two = lengths(60, seed=10)
    share = np.random.default_rng(11).random(60)
    made = annotated(1 + share, one, two)
    result = length_controlled_win_rate(made)
    random.Random(0).shuffle(made)
    failed = made[0] | {"preference": None, "output_2": None, "instruction": "new"}
    again = length_controlled_win_rate([*made, failed])
    assert again.failed == 1 and again.n == 60
    for field in ("win_rate", "length_controlled_win_rate", "length_controlled_low"):
        assert getattr(again, field) == pytest.approx(getattr(result, field), abs=1e-3)


def planted_difficulties(models, seed=12, count=300):
    """Models whose chance is σ(θ + γ); hard instructions get longer outputs."""
    rng = np.random.default_rng(seed)
    gamma = rng.normal(0, 2, count)
    made = []
    for model, theta in models.items():
        one = rng.integers(500, 1500, count)
        two = np.maximum(1, one - 100 * gamma + rng.normal(0, 300, count))
        share = expit(theta + gamma)
        made += annotated(1 + share, one, two, model)
    return gamma, made


def test_difficulties_are_shared_by_several_models():
    gamma, made = planted_difficulties({"weak": -1, "even": 0, "strong": 1})
    found = instruction_difficulty(made)
    planted = pd.Series(gamma, [f"instruction {i}" for i in range(len(gamma))])
    assert found.corr(planted[found.index]) > 0.95
    with pytest.raises(ValueError, match="no annotation has a preference"):
        instruction_difficulty(annotated([None], [1], [1]))


def test_a_table_judges_each_model_by_the_difficulties_of_the_others():
    """Length only betrays difficulty here: the better known, the less length does."""
    gamma, made = planted_difficulties({"weak": -1, "strong": 1})
    known = {f"instruction {i}": value for i, value in enumerate(gamma)}
    table = alpaca_eval_table(made)
    assert table.index.tolist() == ["strong", "weak"]
    assert table.note.str.contains("estimated here").all()
    for model in table.index:
        own = [row for row in made if row["generator_2"] == model]
        alone = length_controlled_win_rate(own)
        assert alone.length_effect < -0.5, "length stands for what was left out"
        assert alone.length_effect < table.length_effect[model] - 0.2
        exact = length_controlled_win_rate(own, known)
        assert exact.length_effect == pytest.approx(0, abs=0.01)
        assert exact.length_controlled_win_rate == pytest.approx(
            exact.win_rate, abs=0.1
        )
        others = [row for row in made if row["generator_2"] != model]
        given = length_controlled_win_rate(own, instruction_difficulty(others))
        rate = table.length_controlled_win_rate[model]
        assert rate == pytest.approx(given.length_controlled_win_rate)


def test_instructions_that_no_other_model_answered_are_neutral():
    _, made = planted_difficulties({"weak": -1, "strong": 1}, count=30)
    assert alpaca_eval_table(made[:-3]).n.to_dict() == {"weak": 30, "strong": 27}


def test_an_instruction_without_difficulty_is_named():
    made = annotated([1.2, 1.4], [3, 5], [4, 4])
    with pytest.raises(ValueError, match="no difficulty for 'instruction 1'"):
        length_controlled_win_rate(made, {"instruction 0": 0.0})


def test_one_model_in_a_table_has_no_difficulty():
    one, two = lengths(30, seed=13)
    made = annotated(1 + np.random.default_rng(14).random(30), one, two)
    table = alpaca_eval_table(made)
    single = length_controlled_win_rate(made)
    assert table.loc["model", "length_controlled_win_rate"] == pytest.approx(
        single.length_controlled_win_rate
    )
    assert "left out" in table.loc["model", "note"]


# --- real data


def alpaca_rows(shared_data):
    path = shared_data / "alpaca_eval_kwise.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_real_outputs_of_two_models(shared_data):
    """GPT-4-Turbo's preferences: a verbose and a terse prompt for one model.

    Seven of 21 models stand at each instruction; where both variants do, the preference
    is σ of their difference in log odds against the common reference.
    """
    made, name = [], "gpt-3.5-turbo-1106"
    for row in alpaca_rows(shared_data):
        answers = {answer["model"]: answer for answer in row["answers"]}
        if not {f"{name}_concise", f"{name}_verbose"} <= set(answers):
            continue
        terse, verbose = (
            answers[f"{name}_{style}"] for style in ("concise", "verbose")
        )
        odds = verbose["gpt4_logodds_vs_ref"] - terse["gpt4_logodds_vs_ref"]
        made.append(
            {
                "instruction": row["id"],
                "output_1": terse["answer"],
                "output_2": verbose["answer"],
                "generator_1": "terse",
                "generator_2": "verbose",
                "preference": 1 + expit(odds),
            }
        )
    assert len(made) >= 20
    result = length_controlled_win_rate(made)
    assert result.length > 1.5 * result.baseline_length
    assert result.win_rate_low > 50
    assert (
        result.length_controlled_low < result.win_rate < result.length_controlled_high
    )


def test_real_rankings_as_games_agree_with_the_preferences(shared_data):
    """21 models: Bradley-Terry's order is near that of the mean log odds."""
    rows, odds = [], {}
    for row in alpaca_rows(shared_data):
        for one, two in itertools.combinations(row["answers"], 2):
            odds.setdefault(one["model"], []).append(one["gpt4_logodds_vs_ref"])
            odds.setdefault(two["model"], []).append(two["gpt4_logodds_vs_ref"])
            if one["model"] == two["model"]:
                continue
            gap = one["gpt4_logodds_vs_ref"] - two["gpt4_logodds_vs_ref"]
            winner = "model_a" if gap > 0 else "model_b" if gap < 0 else "tie"
            rows.append((row["id"], one["model"], two["model"], winner))
    columns = ["question_id", "model_a", "model_b", "winner"]
    ratings = bradley_terry(pd.DataFrame(rows, columns=columns)).set_index("model")
    means = pd.Series({model: np.mean(values) for model, values in odds.items()})
    assert ratings.rating.corr(means, method="spearman") > 0.9
    assert np.isfinite(ratings[["rating_low", "rating_high"]]).all(axis=None)
