"""Agreement against FastChat's counting and by hand; the attack on planted judges."""

import gzip
import itertools
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starling_lib import agreement
from starling_lib.agreement import (
    LEAD_IN,
    agreement_table,
    repeat_list,
    verbosity_attack,
    votes_from_scores,
)
from starling_lib.bench_files import judgment_frame
from starling_lib.win_rates import pairwise_table

WINNERS = ["model_a", "model_b", "tie", "error"]


pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(agreement, "RESAMPLES", 40)
    monkeypatch.setattr(agreement, "KAPPA_RESAMPLES", 4)


def votes(winners, **columns):
    """One vote a question between a and b."""
    frame = {"question_id": range(len(winners)), "model_a": "a", "model_b": "b"}
    return pd.DataFrame({**frame, "winner": winners, **columns})


def turned(frame):
    """The same votes with the two models named the other way round."""
    other = {"model_a": "model_b", "model_b": "model_a"}
    frame = frame.rename(columns=other)
    return frame.assign(winner=frame.winner.replace(other))


def rows(table, turn=1):
    """The lines with and without ties of one turn."""
    part = table[table.turn == turn].set_index("ties")
    return part.loc["with"], part.loc["without"]


# --- agreement


def test_by_hand():
    judge = votes(["model_a", "model_a", "model_b", "tie", "tie", "model_a", "error"])
    human = votes(["model_a", "model_b", "model_b", "tie", "model_a", "tie", "tie"])
    both, decisive = rows(agreement_table(judge, human))
    assert (both.n, both.questions, both.agreement) == (6, 6, 0.5)
    assert (decisive.n, decisive.agreement) == (3, pytest.approx(2 / 3))
    assert (both.random, decisive.random) == (1 / 3, 0.5)
    assert both.low <= 0.5 <= both.high
    # with ties: both raters' shares are a ½, b ⅙, tie ⅓ (judge) and ⅓, ⅓, ⅓ (human)
    assert both.kappa == pytest.approx((1 / 2 - 1 / 3) / (1 - 1 / 3))
    # decisive: judge a a b, human a b b
    assert decisive.kappa == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))


def test_an_inconsistent_verdict_is_a_tie():
    judge = votes(["tie (inconsistent)", "inconsistent", "tie"])
    both, decisive = rows(agreement_table(judge, votes(["tie", "tie", "model_a"])))
    assert both.agreement == pytest.approx(2 / 3)
    assert decisive.n == 0 and np.isnan([decisive.agreement, decisive.kappa]).all()


def test_opposite_and_identical_raters():
    one = votes(["model_a", "model_b"] * 5)
    other = one.assign(winner=["model_b", "model_a"] * 5)
    both, _ = rows(agreement_table(one, one))
    assert (both.agreement, both.kappa, both.low, both.high) == (1, 1, 1, 1)
    both, _ = rows(agreement_table(one, other))
    assert (both.agreement, both.kappa) == (0, -1)


def test_kappa_of_one_verdict_only_is_unknown():
    both, _ = rows(agreement_table(votes(["tie"] * 4), votes(["tie"] * 4)))
    assert both.agreement == 1 and np.isnan(both.kappa)
    # Some resamples miss the one other verdict: the interval stays one of numbers.
    nearly = votes(["model_a"] * 6 + ["tie"])
    both, _ = rows(agreement_table(nearly, nearly))
    assert both.kappa == both.kappa_high == 1 and 0 <= both.kappa_low < 1


def test_failures_on_either_side_leave_nothing():
    table = agreement_table(votes(["error", "tie"]), votes(["tie", "error"]))
    assert table.n.tolist() == [0, 0] and table.agreement.isna().all()


def fastchat_counts(judge, humans, ban):
    """(agreeing, all) pairs by nested loops over dicts of votes."""
    agree = total = 0
    for key, vote in judge.items():
        for other in humans.get(key, []):
            if vote not in ban and other not in ban:
                total += 1
                agree += vote == other
    return agree, total


keyed_votes = st.dictionaries(
    st.tuples(
        st.integers(0, 4),
        st.sampled_from(list(itertools.combinations("abc", 2))),
        st.sampled_from([1, 2]),
    ),
    st.lists(st.sampled_from(WINNERS), min_size=2, max_size=4),
    min_size=1,
    max_size=10,
)


@given(keyed_votes, st.randoms())
@settings(max_examples=5, deadline=None)
def test_counts_against_loops_in_any_order_and_naming(drawn, shuffle):
    judge = {key: found[0] for key, found in drawn.items()}
    humans = {key: found[1:] for key, found in drawn.items()}
    columns = ["question_id", "model_a", "model_b", "turn", "rater", "winner"]
    long = [
        [
            (question, *models, turn, f"r{i}", winner)
            for (question, models, turn), found in source.items()
            for i, winner in enumerate(found)
        ]
        for source in ({key: [vote] for key, vote in judge.items()}, humans)
    ]
    one, two = (pd.DataFrame(part, columns=columns) for part in long)
    order = list(two.index)
    shuffle.shuffle(order)
    half = len(order) // 2
    mixed = pd.concat([two.loc[order[:half]], turned(two.loc[order[half:]])])
    table = agreement_table(one, mixed)
    pd.testing.assert_frame_equal(table, agreement_table(turned(one), two))
    for turn in set(table.turn):
        chosen = {key: v for key, v in judge.items() if turn in ("all", key[2])}
        for line, ban in zip(
            rows(table, turn), ({"error"}, {"error", "tie"}), strict=True
        ):
            agree, total = fastchat_counts(chosen, humans, ban)
            assert line.n == total
            if total:
                assert line.agreement == pytest.approx(agree / total)


def test_raters_of_one_frame_meet_each_other_once():
    frame = pd.concat(
        [
            votes(["model_a", "tie"], rater="x"),
            votes(["model_a", "model_b"], rater="y"),
            votes(["model_b", "model_b"], rater="z"),
        ]
    )
    both, decisive = rows(agreement_table(frame))
    assert (both.n, both.agreement) == (6, pytest.approx(2 / 6))
    assert (decisive.n, decisive.agreement) == (4, 0.5)
    with pytest.raises(ValueError, match="share no question"):
        agreement_table(frame[frame.rater == "x"])


def test_votes_on_one_question_are_one_observation():
    rng = np.random.default_rng(0)
    one = votes(rng.choice(["model_a", "model_b"], 30))
    other = votes(rng.choice(["model_a", "model_b"], 30))
    many = pd.concat([other.assign(rater=f"r{i}") for i in range(9)])
    alone, copied = agreement_table(one, other), agreement_table(one, many)
    assert copied.n.tolist() == [270, 270] and copied.questions.tolist() == [30, 30]
    columns = ["agreement", "low", "high", "kappa"]
    assert np.allclose(copied[columns], alone[columns])


def test_turns_stand_apart_and_together():
    one = pd.concat([votes(["model_a"] * 3, turn=1), votes(["model_b"] * 3, turn=2)])
    table = agreement_table(one, one.assign(winner="model_a"))
    assert table.turn.tolist() == [1, 1, 2, 2, "all", "all"]
    assert table.agreement.tolist() == [1, 1, 0, 0, 0.5, 0.5]


def test_bad_votes_are_named():
    with pytest.raises(ValueError, match="row 1: winner 'A'"):
        agreement_table(votes(["tie", "A"]), votes(["tie", "tie"]))
    with pytest.raises(ValueError, match="share no question"):
        agreement_table(votes(["tie"]), votes(["tie"]).assign(model_b="c"))
    with pytest.raises(ValueError, match="column 'turn', the other's have none"):
        agreement_table(votes(["tie"]), votes(["tie"], turn=1))
    with pytest.raises(ValueError, match="without the column 'winner'"):
        agreement_table(votes(["tie"]).drop(columns="winner"))


# --- votes from scores


def scored(**models):
    return pd.DataFrame(
        [
            (question, model, score)
            for model, scores in models.items()
            for question, score in enumerate(scores)
        ],
        columns=["question_id", "model", "score"],
    )


def test_scores_become_votes():
    made = votes_from_scores(scored(b=[7, 7, 7, None, 7], a=[8, 7.1, 6.8, 5, 7]))
    assert set(made.model_a) == {"a"} and set(made.model_b) == {"b"}
    expected = ["model_a", "tie", "model_b", "error", "tie"]
    assert made.sort_values("question_id").winner.tolist() == expected
    assert votes_from_scores(scored(a=[1], b=[2]), tie_delta=1).winner.item() == "tie"


def judged(model, scores, number=1, **changes):
    """Single judgments as FastChat has them, one a question."""
    row = {"model": model, "judge": ["gpt-4", "single-v1"], "turn": 1, "pass": number}
    row |= {"user_prompt": "", "judgment": "", "tstamp": 0.0} | changes
    return [row | {"question_id": i, "score": s} for i, s in enumerate(scores, 1)]


def test_single_judgments_become_pairs_by_fastchats_rule():
    """Question 4 failed for b, and 5 has one answer only."""
    rows = judged("b", [5, 6, 7.0, -1, 3]) + judged("a", [6, 5, 7.05, 9])
    made = votes_from_scores(judgment_frame(rows, "single", ()))
    assert set(made.model_a) == {"a"} and set(made.model_b) == {"b"}
    assert set(made.rater) == {"gpt-4"} and set(made["pass"]) == {1}
    assert made.winner.tolist() == ["model_a", "model_b", "tie", "error"]
    wins = pairwise_table(made.assign(order=0)).loc["a"]
    assert wins[["win", "loss", "tie", "error"]].tolist() == [1, 1, 1, 1]
    finer = votes_from_scores(judgment_frame(rows, "single", ()), tie_delta=0.01)
    assert finer.winner.tolist() == ["model_a", "model_b", "model_a", "error"]


def test_minus_one_is_a_failure_of_a_judge_and_a_score_of_a_reward_model():
    rows = judged("a", [-1, -1]) + judged("b", [-3, 2])
    winners = [
        votes_from_scores(judgment_frame(rows, "single", ())).winner.tolist()
        for rows in (rows, [row | {"judge": ["rm", "reward"]} for row in rows])
    ]
    assert winners == [["error", "error"], ["model_a", "model_b"]]


def test_passes_vote_each_for_itself():
    rows = [
        row
        for number, scores in enumerate([(5, 6), (6, 5)], 1)
        for model, score in zip("ab", scores, strict=True)
        for row in judged(model, [score], number)
    ]
    made = votes_from_scores(judgment_frame(rows, "single", ()))
    assert made[["pass", "winner"]].to_numpy().tolist() == [
        [1, "model_b"],
        [2, "model_a"],
    ]


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), max_size=5))
@settings(max_examples=10, deadline=None)
def test_every_two_models_of_a_question_and_turn_vote(scores):
    frame = pd.DataFrame(
        [
            (question, turn, model, score)
            for question, row in enumerate(scores)
            for turn in (1, 2)
            for model, score in zip("cab", row, strict=True)
        ],
        columns=["question_id", "turn", "model", "score"],
    )
    made = votes_from_scores(frame, tie_delta=0)
    assert len(made) == 6 * len(scores)
    assert {"turn", "winner"} <= set(made)
    for vote in made.itertuples():
        of = dict(zip("cab", scores[vote.question_id], strict=True))
        gap = of[vote.model_a] - of[vote.model_b]
        assert vote.winner == ("model_b", "tie", "model_a")[np.sign(gap) + 1]


def test_bad_scores_are_named():
    frame = scored(a=[1, 2])
    with pytest.raises(ValueError, match="without the column 'model'"):
        votes_from_scores(frame.drop(columns="model"))
    with pytest.raises(ValueError, match="scored twice: .*'question_id': 0"):
        votes_from_scores(pd.concat([frame, frame]))
    for delta in (-1, float("nan")):
        with pytest.raises(ValueError, match="tie_delta"):
            votes_from_scores(frame, tie_delta=delta)


# --- verbosity


LIST = """Three ways:

1. Walk.
2. **Ride**:
   by bus
   or train.

3) Swim.

Any of them works."""


def test_the_list_is_said_twice_and_nothing_else_changes():
    once = LIST.split("\n\nAny")[0].split("Three ways:\n\n")[1]
    expected = f"Three ways:\n\n{once}\n\n{LEAD_IN}\n\n{once}\n\nAny of them works."
    assert repeat_list(LIST) == expected
    assert "Again:" in repeat_list(LIST, "Again:")


@pytest.mark.parametrize("mark", ["{}.", "{})", "-", "*", "•"])
@given(st.integers(3, 8), st.booleans(), st.booleans())
@settings(max_examples=6, deadline=None)
def test_every_item_of_any_list_comes_twice(mark, count, loose, surrounded):
    items = [f"{mark.format(i)} item number {i}!" for i in range(1, count + 1)]
    text = ("\n\n" if loose else "\n").join(items)
    text = f"Before\n\n{text}\n\nAfter" if surrounded else text
    longer = repeat_list(text)
    assert [longer.count(item) for item in items] == [2] * count
    assert longer.count("Before") == longer.count("After") == surrounded
    assert longer.startswith(text.split("\n\nAfter")[0])


def test_the_longest_list_is_taken():
    text = "- a\n- b\n- c\n\nthen\n\n1. one\n2. two\n3. three\n4. four"
    longer = repeat_list(text)
    assert longer.count("- a") == 1 and longer.count("3. three") == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No list here.",
        "1. one\n2. two",
        "1. one\n2. two\n\ntext between\n\n3. three",
        "**bold**\n**bold**\n**bold**",
        "---\n---\n---",
        "3.5 kg\n3.6 kg\n3.7 kg",
    ],
)
def test_an_answer_without_a_list_is_refused(text):
    with pytest.raises(ValueError, match="no list of 3 items"):
        repeat_list(text)


PROMPTS = [f"prompt {i}" for i in range(12)]
ANSWERS = [f"{i} ways:\n- a{i}\n- b\n- c" for i in range(10)] + ["No list.", "None."]


def test_a_judge_of_length_falls_and_a_judge_of_content_stands():
    fooled = verbosity_attack(PROMPTS, ANSWERS, lambda _, texts: [*map(len, texts)])
    assert fooled.success.estimate == 1 and fooled.success.low > 0.7
    assert (fooled.n, fooled.failed, fooled.skipped) == (10, 0, 2)

    def content(_, texts):
        return [len(set(text.replace(LEAD_IN, "").split())) for text in texts]

    firm = verbosity_attack(PROMPTS, ANSWERS, content)
    assert firm.success.estimate == 0 and firm.success.high < 0.3
    assert (firm.items.margin == 0).all(), "a tie is no success"


def test_share_interval_and_items():
    """The judge likes the longer text of prompts 0 to 3; for prompt 9 it fails."""

    def score(prompts, texts):
        numbers = [int(prompt.split()[1]) for prompt in prompts]
        sign = [1 if n < 4 else np.nan if n == 9 else -1 for n in numbers]
        return np.multiply(sign, [len(text) for text in texts])

    attack = verbosity_attack(PROMPTS, ANSWERS, score)
    assert attack.success.estimate == pytest.approx(4 / 9)
    assert (attack.n, attack.failed) == (9, 1)
    assert attack.items.success.tolist() == [True] * 4 + [False] * 6
    assert attack.items["index"].tolist() == list(range(10))
    assert attack.items.padded[0] == repeat_list(ANSWERS[0])
    # Wilson, 1927: 4 of 9
    ends = [attack.success.low, attack.success.high]
    assert ends == pytest.approx([0.1888, 0.7333], abs=1e-3)


def test_a_pairwise_judge_is_asked_once_about_each_pair():
    seen = []

    def prefers(prompts, originals, padded):
        seen.extend(zip(prompts, originals, padded, strict=True))
        return [1] + [0] * 4 + [-1] * 5

    attack = verbosity_attack(PROMPTS, ANSWERS, prefers=prefers)
    assert attack.success.estimate == 0.1 and attack.n == 10
    assert seen[3] == ("prompt 3", ANSWERS[3], repeat_list(ANSWERS[3]))


def test_a_judge_that_always_fails_has_no_share():
    attack = verbosity_attack(PROMPTS, ANSWERS, lambda _, t: [np.nan] * len(t))
    assert attack.failed == 10 and np.isnan(attack.success).all()


def test_bad_attacks_are_named():
    with pytest.raises(ValueError, match="either score or prefers"):
        verbosity_attack(PROMPTS, ANSWERS)
    with pytest.raises(ValueError, match="12 prompts but 1 answers"):
        verbosity_attack(PROMPTS, ANSWERS[:1], len)
    with pytest.raises(ValueError, match="none of 2 answers has a list"):
        verbosity_attack(PROMPTS[:2], ANSWERS[-2:], len)
    with pytest.raises(ValueError, match="expected 20 figures"):
        verbosity_attack(PROMPTS, ANSWERS, lambda _, texts: [1.0])


# --- real data


@pytest.fixture(scope="module")
def judgments(shared_data):
    path = shared_data / "mt_bench_judgment_gpt-4_single.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        frame = pd.DataFrame(json.loads(line) for line in file)
    return frame.assign(score=frame.score.astype(float).mask(frame.score == -1))


def test_real_scores_as_votes(judgments):
    made = votes_from_scores(judgments[["question_id", "turn", "model", "score"]])
    assert len(made) == 160 and set(made.turn) == {1, 2}
    scores = judgments.pivot(index=["question_id", "turn"], columns="model")["score"]
    one, two = sorted(scores)
    gap = scores[one] - scores[two]
    expected = {
        "model_a": (gap > 0.1).sum(),
        "model_b": (gap < -0.1).sum(),
        "tie": (gap.abs() <= 0.1).sum(),
        "error": gap.isna().sum(),
    }
    counts = made.winner.value_counts().reindex(expected, fill_value=0)
    assert counts.to_dict() == expected


def test_real_scores_against_the_longer_answer(judgments):
    """GPT-4 and "the longer answer wins", on the answers that stand in the prompts."""
    columns = ["question_id", "turn", "model"]
    lengths = judgments.assign(score=judgments.user_prompt.str.len().astype(float))
    judge = votes_from_scores(judgments[[*columns, "score"]])
    longer = votes_from_scores(lengths[[*columns, "score"]], tie_delta=0)
    table = agreement_table(judge, longer)
    assert table.turn.tolist() == [1, 1, 2, 2, "all", "all"]
    assert (table.low <= table.agreement).all() and (
        table.agreement <= table.high
    ).all()
    both = table[table.ties == "with"].n.tolist()
    assert both[0] + both[1] == both[2] == (judge.winner != "error").sum()
