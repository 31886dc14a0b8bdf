"""Before/after comparison: hand-made frames with known answers, then tiny models."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling_lib.evaluation import (
    compare_policies,
    distinct_n,
    evaluate_policy,
    prompt_metrics,
    read_questions,
    side_by_side,
    win_rate,
)


def frame(rewards, *, samples=1, responses=None, finished=True, tokens=5, kl=0.0):
    """A frame of `evaluate_policy` with the given rewards, prompt by prompt."""
    n = len(rewards)
    index = np.repeat(np.arange(n // samples), samples)
    return pd.DataFrame(
        {
            "prompt_index": index,
            "sample": np.tile(np.arange(samples), n // samples),
            "prompt": [f"question {i}" for i in index],
            "response": responses or [f"answer {i}" for i in range(n)],
            "reward": np.asarray(rewards, dtype=float),
            "tokens": np.broadcast_to(tokens, n),
            "finished": np.broadcast_to(finished, n),
            "kl": np.broadcast_to(kl, n),
        }
    )


# --- distinct-n


def test_distinct_n_by_hand():
    # a b a b → pairs (a b), (b a), (a b): two of three differ
    assert distinct_n(["a b a b"]) == pytest.approx(2 / 3)
    assert distinct_n(["a b", "A B"]) == pytest.approx(1 / 2), "case must not count"
    assert distinct_n(["a b c"], n=1) == 1
    assert np.isnan(distinct_n(["one", "", "two"]))


def test_distinct_n_does_not_join_texts():
    assert distinct_n(["a b", "c d"]) == 1
    assert distinct_n(["a", "b"], n=1) == 1
    assert np.isnan(distinct_n(["a", "b"], n=2)), "no pair may cross two texts"


@given(st.lists(st.text(alphabet="ab ", max_size=12), max_size=6), st.integers(1, 3))
def test_distinct_n_against_brute_force(texts, n):
    grams = [
        tuple(words[i : i + n])
        for words in (text.split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    expected = len(set(grams)) / len(grams) if grams else float("nan")
    assert distinct_n(texts, n) == pytest.approx(expected, nan_ok=True)


# --- win rate and comparison


def test_win_rate_counts_ties_one_half():
    assert win_rate(frame([0, 0, 0, 0]), frame([1, 1, 0, -1])) == pytest.approx(0.625)


def test_win_rate_of_a_policy_against_itself_and_reversed():
    before, after = frame([0.3, 1.0, -2.0]), frame([0.1, 2.0, 0.0])
    assert win_rate(before, before) == 0.5
    assert win_rate(before, after) + win_rate(after, before) == pytest.approx(1)


def test_win_rate_matches_rows_by_prompt_and_sample_not_by_position():
    before = frame([0, 10, 20, 30], samples=2)
    after = frame([1, 11, 21, 31], samples=2).sample(frac=1, random_state=3)
    assert win_rate(before, after) == 1


def test_comparison_known_answers():
    before = frame([0, 2, 1, 3], samples=2, tokens=[4, 6, 8, 10], finished=False)
    after = frame([3, 5, 1, 3], samples=2, tokens=[5, 7, 9, 11], kl=0.5)
    table = compare_policies(before, after)
    metrics = ["reward", "win_rate", "kl", "tokens", "eos_rate", "distinct_2"]
    assert list(table.index) == metrics
    assert list(table) == ["before", "after", "difference", "low", "high", "p_value"]
    # per-prompt gains 3 and 0
    assert table.loc["reward", ["before", "after", "difference"]].tolist() == [
        1.5,
        3,
        1.5,
    ]
    assert table.loc["win_rate", ["before", "after"]].tolist() == [0.5, 0.75]
    assert table.loc["kl", ["before", "after", "difference"]].tolist() == [0, 0.5, 0.5]
    assert table.loc["tokens", ["before", "after"]].tolist() == [7, 8]
    assert table.loc["eos_rate", "difference"] == 1
    assert table.loc["tokens", ["low", "high"]].tolist() == [1, 1], (
        "same gain everywhere"
    )


def test_comparison_of_a_policy_with_itself_finds_nothing():
    same = frame(np.random.default_rng(0).normal(size=20), samples=2)
    table = compare_policies(same, same)
    assert (table["difference"] == 0).all()
    assert (table["p_value"] == 1).all()


def test_comparison_interval_is_over_prompts_not_samples():
    # Copies of one sample hold no news: the interval must not shrink with them.
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=30)
    narrow = compare_policies(frame(np.zeros(30)), frame(rewards)).loc["reward"]
    copies = frame(np.repeat(rewards, 8), samples=8)
    wide = compare_policies(frame(np.zeros(240), samples=8), copies).loc["reward"]
    assert wide.high - wide.low == pytest.approx(narrow.high - narrow.low)


def test_comparison_finds_a_real_gain_and_its_size():
    rng = np.random.default_rng(2)
    ease = np.repeat(rng.normal(scale=3, size=40), 4)
    before = frame(ease + rng.normal(scale=0.5, size=160), samples=4)
    after = frame(ease + 0.6 + rng.normal(scale=0.5, size=160), samples=4)
    row = compare_policies(before, after).loc["reward"]
    assert row.low > 0 and row.p_value < 0.01
    assert row.low < 0.6 < row.high
    assert row.high - row.low < 1, "pairing by prompt must remove the prompts' spread"


def test_comparison_without_a_reference_has_no_kl():
    before, after = frame([0, 1], kl=np.nan), frame([1, 1], kl=0.25)
    row = compare_policies(before, after).loc["kl"]
    assert np.isnan(row[["before", "difference", "low", "high", "p_value"]]).all()
    assert row.after == 0.25


def test_a_comparison_is_over_the_prompts_on_which_both_have_a_figure():
    before = frame([0] * 2, responses=["one", "a b c"])
    after = frame([0] * 2, responses=["x y z", "y y y"])
    row = compare_policies(before, after).loc["distinct_2"]
    assert row[["before", "after", "difference"]].tolist() == [1, 0.5, -0.5]


def test_distinct_2_is_taken_within_a_prompt():
    responses = ["I am sorry", "I am sorry", "one two three", "four five six"]
    metrics = prompt_metrics(frame([0] * 4, samples=2, responses=responses))
    assert metrics["distinct_2"].tolist() == [0.5, 1]


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (frame([0, 1]), "share 2"),
        (frame([0, 1, 2, 3], samples=2), "share 2"),
        (frame([0, 1, 2, 3]).assign(prompt=["x"] * 4), "prompt 0 differs"),
    ],
)
def test_frames_of_different_prompts_are_refused(after, message):
    with pytest.raises(ValueError, match=message):
        compare_policies(frame([0, 0, 0, 0]), after)


# --- side by side


def test_side_by_side_escapes_every_text():
    before = frame([0], responses=["<script>alert('b')</script>"])
    after = frame([1], responses=["a < b & c"]).assign(prompt="<b>hi</b>")
    before["prompt"] = "<b>hi</b>"
    table = side_by_side(before, after).data
    assert "<script>" not in table and "&lt;script&gt;" in table
    assert "a &lt; b &amp; c" in table and "&lt;b&gt;hi&lt;/b&gt;" in table


def test_side_by_side_picks_best_median_worst_in_order():
    gains = [5, -3, 1, 4, 0]
    before, after = frame([0] * 5), frame(gains)
    table = side_by_side(before, after, n=3).data
    places = [table.find(f"question {i}<") for i in (0, 2, 1)]
    assert -1 not in places and places == sorted(places)
    assert "question 3<" not in table and "question 4<" not in table
    assert "3 of 5 prompts" in table
    assert "gain +5.00" in table and "gain -3.00" in table


def test_side_by_side_shows_each_prompt_once():
    before, after = frame([0] * 6, samples=3), frame([9, 8, 7, 1, 2, 3], samples=3)
    assert side_by_side(before, after, n=6).data.count("question 0") == 1


def test_side_by_side_marks_only_cut_responses():
    before, after = frame([0, 0], finished=[True, False]), frame([1, 1])
    assert side_by_side(before, after).data.count("[cut]") == 1


# --- questions


def test_bundled_questions():
    questions = read_questions()
    assert len(questions) == 80
    categories = pd.Series([q["category"] for q in questions]).value_counts()
    assert len(categories) == 8 and (categories == 10).all()
    assert all(len(q["turns"]) == 2 for q in questions)
    assert len({q["question_id"] for q in questions}) == 80


def test_mt_bench_reads_unchanged(shared_data):
    questions = read_questions(shared_data / "mt_bench_question.jsonl")
    assert len(questions) == 80
    assert questions[0]["question_id"] == 81


def test_questions_keep_unicode_line_separators(tmp_path):
    question = {"question_id": 1, "category": "x", "turns": ["one\u2028two"]}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(question, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_questions(path) == [question]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not JSON"),
        ("[1]", "line 2: expected a JSON object"),
        ('{"question_id": 1, "category": "x"}', "line 2: field 'turns' is missing"),
        ('{"category": "x", "turns": ["a"]}', "field 'question_id' is missing"),
        ('{"question_id": 1, "category": "x", "turns": "a"}', "must be a list"),
        ('{"question_id": 1, "category": "x", "turns": [""]}', "empty or non-text"),
        ('{"question_id": 1, "category": "x", "turns": [1]}', "empty or non-text"),
    ],
)
def test_bad_questions_name_line_and_field(tmp_path, line, message):
    good = '{"question_id": 0, "category": "x", "turns": ["hello"]}'
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_questions(path)


# --- tiny models


@pytest.fixture(scope="module")
def tiny():
    """Two tiny policies with different random weights and their tokenizer."""
    import torch

    from starling_lib.models import load_policy, load_tokenizer

    policy, other = load_policy("tiny"), load_policy("tiny")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise)
    return policy, other, load_tokenizer("tiny")


PROMPTS = [[{"role": "user", "content": text}] for text in ("Hello?", "Why is it so?")]


def longer_is_better(prompts, responses, finished):
    """A reward whose value is known from the text alone."""
    return [len(response) for response in responses]


def test_evaluate_policy_rows(tiny):
    policy, other, tokenizer = tiny
    result = evaluate_policy(
        policy,
        tokenizer,
        PROMPTS,
        longer_is_better,
        reference=other,
        samples=3,
        max_new_tokens=8,
    )
    assert result["prompt_index"].tolist() == [0, 0, 0, 1, 1, 1]
    assert result["sample"].tolist() == [0, 1, 2, 0, 1, 2]
    assert result["prompt"].tolist() == ["Hello?"] * 3 + ["Why is it so?"] * 3
    assert result["reward"].tolist() == result["response"].str.len().tolist()
    assert result["tokens"].between(1, 8).all()
    assert (result.loc[~result["finished"], "tokens"] == 8).all()
    assert (result["kl"] >= 0).all() and result["kl"].max() > 0.01


def test_evaluate_policy_kl_to_itself_and_without_reference(tiny):
    policy, other, tokenizer = tiny
    budget = {"samples": 1, "max_new_tokens": 4}
    same = evaluate_policy(
        policy, tokenizer, PROMPTS, longer_is_better, reference=policy, **budget
    )
    assert (same["kl"] == 0).all()
    alone = evaluate_policy(policy, tokenizer, PROMPTS, longer_is_better, **budget)
    assert alone["kl"].isna().all()
    assert alone["response"].tolist() == same["response"].tolist(), "same seed"


def test_kl_of_sampled_responses_estimates_the_true_kl(tiny):
    """One token a response: the mean k3 must meet the exact KL of next-token laws."""
    import torch

    policy, other, tokenizer = tiny
    result = evaluate_policy(
        policy,
        tokenizer,
        PROMPTS[:1],
        longer_is_better,
        reference=other,
        samples=512,
        max_new_tokens=1,
    )
    ids = tokenizer.apply_chat_template(
        PROMPTS[0], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        p = policy(ids).logits[0, -1].float().log_softmax(-1)
        q = other(ids).logits[0, -1].float().log_softmax(-1)
    exact = float((p.exp() * (p - q)).sum())
    k3 = (q - p).expm1() - (q - p)
    spread = float((p.exp() * (k3 - exact) ** 2).sum().sqrt())
    # The other direction, KL(other ‖ policy), is twice as large: far outside.
    assert result["kl"].mean() == pytest.approx(exact, abs=4 * spread / 512**0.5)


def test_a_reward_function_of_the_wrong_size_is_named(tiny):
    policy, _, tokenizer = tiny
    with pytest.raises(ValueError, match="returned 1 rewards for 2 responses"):
        evaluate_policy(
            policy,
            tokenizer,
            PROMPTS,
            lambda *_: [0.0],
            samples=1,
            max_new_tokens=2,
        )
