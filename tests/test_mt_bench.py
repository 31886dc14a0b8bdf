"""MT-Bench: FastChat's files and rules, judges that lie, servers that misbehave."""

import hashlib
import json
import math
import os
import random
import re
import signal
import string
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starling_lib import bench_files, evaluation
from starling_lib.agreement import agreement_table, votes_from_scores
from starling_lib.bench_files import judgment_frame
from starling_lib.judges import JudgeError, OpenAIJudge, RecordedJudge, Reply
from starling_lib.mt_bench import (
    JudgmentParseError,
    answer_questions,
    answer_row,
    compare_scores,
    judge_answers,
    judge_pairs,
    parse_rating,
    parse_verdict,
    read_answers,
    read_judge_prompts,
    read_judgments,
    read_questions,
    read_references,
    run_to_run,
    score_answers,
    score_intervals,
    score_table,
    write_answers,
    write_judgments,
)
from starling_lib.rankings import data_path
from starling_lib.responders import Responder
from starling_lib.win_rates import games_from_judgments, pairwise_table, resolve_swaps

ROOT = Path(__file__).resolve().parents[1]
FAILED = pytest.mark.filterwarnings("ignore:.*judgments failed")


# --- hand-made questions, answers, judgments


def question(question_id, category="writing", turns=2, reference=None):
    row = {"question_id": question_id, "category": category}
    row |= {"turns": [f"q{question_id} turn {i + 1}?" for i in range(turns)]}
    return row | ({"reference": reference} if reference else {})


def answers_of(model, questions):
    return {
        one["question_id"]: answer_row(
            one["question_id"],
            model,
            [f"{model} on {turn}" for turn in one["turns"]],
        )
        for one in questions
    }


def single(question_id, model, turn, score, **extra):
    return {
        "question_id": question_id,
        "model": model,
        "judge": ["gpt-4", "single-v1"],
        "user_prompt": "…",
        "judgment": f"Rating: [[{score}]]",
        "score": score,
        "turn": turn,
        "tstamp": 1.5,
    } | extra


def pair(question_id, model_1, model_2, first, second, turn=1, **extra):
    return {
        "question_id": question_id,
        "model_1": model_1,
        "model_2": model_2,
        "g1_winner": first,
        "g2_winner": second,
        "judge": ["gpt-4", "pair-v2"],
        "g1_user_prompt": "…",
        "g1_judgment": "…",
        "g2_user_prompt": "…",
        "g2_judgment": "…",
        "turn": turn,
        "tstamp": 1.5,
    } | extra


def singles(*rows, questions=()):
    return judgment_frame(list(rows), "single", questions)


def pairs(*rows):
    return judgment_frame(list(rows), "pair", ())


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Scripted:
    """A judge whose reply is a function of the user's prompt and the draw."""

    model, settings, concurrency = "scripted", {"temperature": 0.0}, 2

    def __init__(self, say):
        self.say, self.asked = say, []

    def ask(self, messages, draw=0):
        self.asked.append((messages, draw))
        said = self.say(messages[-1]["content"], draw)
        if isinstance(said, Exception):
            raise said
        return said if isinstance(said, Reply) else Reply(said)


def true_rating(prompt):
    """A rating from 1 to 10 that depends on every character of the prompt."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4]) % 10 + 1


def rate(prompt, draw=0):
    return f"Some thoughts.\nRating: [[{true_rating(prompt)}]]"


def judged(judge, questions, models=("a", "b"), output=None, **options):
    answers = {model: answers_of(model, questions) for model in models}
    options = {"progress": False} | options
    return judge_answers(answers, questions, judge, output, **options)


# --- ratings


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: [[5]]", 5),
        ("Rating: [[5.5]].", 5.5),
        ("[[10]]", 10),
        ("[[1.]]", 1),
        ("Good. [7]", 7),
        ("Cites [1] and [2]. Rating: [[8]]", 8),
        ("Rating: [[6]], that is [[6.0]]", 6),
        ("In the form [[rating]]: [[4]]", 4),
    ],
)
def test_ratings_that_are_clear(reply, rating):
    assert parse_rating(reply) == rating


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("", "no rating"),
        ("Rating: 7", "no rating; the reply ends in 'Rating: 7'"),
        ("Rating: [[7/10]]", "no rating"),
        ("Rating: [[seven]]", "no rating"),
        ("Rating: [[-3]]", "no rating"),
        ("Rating: [[٣]]", "no rating"),
        ("[[0]]", "the rating 0 is not between 1 and 10"),
        ("[[11]]", "not between"),
        ("[[10.5]]", "not between"),
        (f"[[{'9' * 5000}]]", "not between"),
        ("It asks for [[10]]. Rating: [[2]]", "different ratings: 10, 2"),
        ("See [1] and [2].", "different ratings: 1, 2"),
    ],
)
def test_ratings_are_not_guessed(reply, problem):
    with pytest.raises(JudgmentParseError, match=re.escape(problem)):
        parse_rating(reply)


PROSE = st.text(st.characters(blacklist_characters="[]"), max_size=40)


@given(PROSE, st.integers(10, 100), PROSE)
def test_a_rating_between_any_words_is_read(before, tenths, after):
    assert parse_rating(f"{before}[[{tenths / 10:g}]]{after}") == tenths / 10


@given(st.text(st.sampled_from("[]0123456789. ABC\n"), max_size=60))
def test_what_is_read_is_what_fastchat_reads(reply):
    """Its rule: the first match in double brackets, else the first in single ones."""
    first = re.search(r"\[\[(\d+\.?\d*)\]\]", reply) or re.search(
        r"\[(\d+\.?\d*)\]", reply
    )
    try:
        rating = parse_rating(reply)
    except JudgmentParseError:
        return
    assert rating == float(first[1]) and 1 <= rating <= 10


def test_long_replies_are_read_in_linear_time():
    start = time.perf_counter()
    for piece in ("[", "[[1", "[[", "[1.", "1"):
        with pytest.raises(JudgmentParseError):
            parse_rating(piece * 100_000)
        with pytest.raises(JudgmentParseError):
            parse_verdict(piece * 100_000)
    assert time.perf_counter() - start < 5


# --- verdicts


def test_verdicts_that_are_clear():
    replies = ["So: [[A]]", "[[B]] because [[B]]", "A tie. [[C]]"]
    assert [parse_verdict(reply) for reply in replies] == ["A", "B", "tie"]


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("A is better", "no verdict"),
        ("[A]", "no verdict"),
        ("[[a]]", "no verdict"),
        ("[[D]]", "no verdict"),
        ("Not [[A]] but [[B]]", "different verdicts: A, B"),
    ],
)
def test_verdicts_are_not_guessed(reply, problem):
    with pytest.raises(JudgmentParseError, match=problem):
        parse_verdict(reply)


@given(st.lists(st.sampled_from("ABC"), max_size=4), PROSE)
def test_a_verdict_is_read_only_if_all_agree(letters, words):
    reply = words.join(f"[[{letter}]]" for letter in letters)
    if len(set(letters)) != 1:
        with pytest.raises(JudgmentParseError):
            parse_verdict(reply)
    else:
        assert parse_verdict(reply) == {"A": "A", "B": "B", "C": "tie"}[letters[0]]


# --- the judge's prompts

PLACES = {
    "single-v1": {"question", "answer"},
    "single-math-v1": {"question", "answer", "ref_answer_1"},
    "pair-v2": {"question", "answer_a", "answer_b"},
    "pair-math-v1": {"question", "answer_a", "answer_b", "ref_answer_1"},
}
for _name, _sides in [("single", ["answer"]), ("pair", ["answer_a", "answer_b"])]:
    _turned = {f"{part}_{i}" for part in ["question", *_sides] for i in (1, 2)}
    PLACES[f"{_name}-v{1 + (_name == 'pair')}-multi-turn"] = _turned
    PLACES[f"{_name}-math-v1-multi-turn"] = _turned | {"ref_answer_1", "ref_answer_2"}


def places_of(prompts):
    return {
        name: {
            place
            for _, place, _, _ in string.Formatter().parse(prompt.prompt_template)
            if place is not None
        }
        for name, prompt in prompts.items()
    }


def test_bundled_prompts_have_mt_benchs_names_and_places():
    prompts = read_judge_prompts()
    assert places_of(prompts) == PLACES
    for name, prompt in prompts.items():
        is_single = name.startswith("single")
        assert prompt.type == ("single" if is_single else "pairwise")
        assert prompt.output_format == ("[[rating]]" if is_single else "[[A]]")


def test_a_judge_that_echoes_the_bundled_prompt_has_not_rated():
    for prompt in read_judge_prompts().values():
        for parse in (parse_rating, parse_verdict):
            with pytest.raises(JudgmentParseError, match="no "):
                parse(prompt.prompt_template)


def word_runs(text, n=7):
    words = re.findall(r"\w+", re.sub(r"\{\w+\}", " | ", text.lower()))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_fastchats_prompts_load_and_ours_are_other_words(shared_data):
    theirs = read_judge_prompts(shared_data / "mt_bench_judge_prompts.jsonl")
    assert places_of(theirs) == PLACES
    said = {
        run
        for prompt in theirs.values()
        for text in (prompt.system_prompt, prompt.prompt_template)
        for run in word_runs(text)
    }
    for prompt in read_judge_prompts().values():
        assert word_runs(prompt.prompt_template).isdisjoint(said)


PROMPT = {
    "name": "single-v1",
    "type": "single",
    "system_prompt": "",
    "prompt_template": "{question} {answer}",
    "output_format": "[[rating]]",
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"system_prompt": None}, "field 'system_prompt' must be str, not None"),
        ({"type": "triple"}, "field 'type' must be"),
        ({"name": "first"}, "field 'name': 'first' is taken"),
        ({"prompt_template": "{anwser}"}, "nothing fills {anwser}"),
        ({"prompt_template": "{answer.__class__}"}, "nothing fills {answer.__class__}"),
        ({"prompt_template": "{answer!r:>9}"}, "nothing fills {answer!r:>9}"),
        ({"prompt_template": "{} {answer}"}, "nothing fills {}"),
        ({"prompt_template": "{answer"}, "field 'prompt_template': expected '}'"),
    ],
)
def test_bad_prompts_name_line_and_field(tmp_path, change, problem):
    path = lines(tmp_path / "p.jsonl", [PROMPT | {"name": "first"}, PROMPT | change])
    with pytest.raises(
        ValueError, match=re.escape("p.jsonl, line 2: ") + ".*"
    ) as error:
        read_judge_prompts(path)
    assert problem in str(error.value)


def test_answers_full_of_braces_are_shown_as_they_are():
    prompt = read_judge_prompts()["single-v1"]
    shown = prompt.user_prompt({"question": "{x}", "answer": "{{answer}} {0} {"})
    assert "{x}" in shown and "{{answer}} {0} {" in shown
    with pytest.raises(ValueError, match="single-v1.*no text for the place 'answer'"):
        prompt.user_prompt({"question": "x"})


# --- files


TEXT = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["\u2028", "\r\n", '"\\', "[[5]]"]
)
IDS = st.integers(1, 999) | TEXT


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(IDS, st.lists(TEXT, min_size=1, max_size=3), max_size=4))
def test_answers_come_back_as_written(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("model_answer")
    answers = {
        key: answer_row(key, "m", turns, finished=[True] * len(turns))
        for key, turns in texts.items()
    }
    path = write_answers(answers, folder / "sub" / "some.model.jsonl")
    assert read_answers(path) == read_answers(path.parent) == {"some.model": answers}
    assert read_references(path) == texts


SINGLE = st.builds(
    single,
    IDS,
    st.sampled_from(["a", "b"]),
    st.sampled_from([1, 2]),
    st.integers(10, 100).map(lambda n: bench_files.plain_score(n / 10)) | st.just(-1),
    judgment=TEXT,
    user_prompt=TEXT,
    tstamp=st.floats(0, 2e9),
)
PAIR = st.builds(
    pair,
    IDS,
    st.just("a"),
    st.sampled_from(["b", "c"]),
    st.sampled_from(bench_files.WINNERS),
    st.sampled_from(bench_files.WINNERS),
    g1_judgment=TEXT,
    g2_user_prompt=TEXT,
)


@settings(max_examples=15, deadline=None)
@given(st.data(), st.sampled_from(["single", "pair"]))
def test_judgments_come_back_as_written(tmp_path_factory, data, kind):
    rows = data.draw(st.lists(SINGLE if kind == "single" else PAIR, max_size=5))
    for row in rows:
        if row.get("score") == -1 and data.draw(st.booleans()):
            row["error"] = "no rating"
    folder = tmp_path_factory.mktemp("model_judgment")
    read = read_judgments(lines(folder / f"x_{kind}.jsonl", rows), (), kind)
    path = write_judgments(read, folder / f"y_{kind}.jsonl")
    again = read_judgments(path, (), kind)
    pd.testing.assert_frame_equal(again, read)
    written = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    if not read["pass"].gt(1).any() and len(read) == len(rows):
        assert written == rows
        assert [list(row) for row in written] == [list(row) for row in rows]


def test_a_folder_gives_the_judgments_of_its_kind(tmp_path):
    lines(tmp_path / "gpt-4_single.jsonl", [single(81, "a", 1, 7)])
    lines(tmp_path / "gpt-4_pair.jsonl", [pair(81, "a", "b", "tie", "tie")])
    assert list(read_judgments(tmp_path)["score"]) == [7]
    assert list(read_judgments(tmp_path, kind="pair")["g1_winner"]) == ["tie"]
    with pytest.raises(ValueError, match="kind must be"):
        read_judgments(tmp_path, kind="pairs")
    with pytest.raises(
        ValueError, match="pair.jsonl, line 1: field 'model' is missing"
    ):
        read_judgments(tmp_path / "gpt-4_pair.jsonl")
    with pytest.raises(FileNotFoundError, match="_single.jsonl"):
        (tmp_path / "gpt-4_single.jsonl").unlink()
        read_judgments(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        ("single", {"score": "7"}, "field 'score' must be int | float, not '7'"),
        ("single", {"score": True}, "field 'score' must be"),
        ("single", {"score": float("nan")}, "field 'score' must be finite"),
        ("single", {"turn": None}, "field 'turn' must be int"),
        ("single", {"judge": ["gpt-4"]}, "field 'judge' must be [model, name"),
        ("single", {"judge": "gpt-4"}, "field 'judge' must be list"),
        ("single", {"pass": "1"}, "field 'pass' must be int"),
        (
            "pair",
            {"g2_winner": "A"},
            "field 'g2_winner' must be one of model_1, model_2",
        ),
        ("pair", {"model_2": 3}, "field 'model_2' must be str"),
    ],
)
def test_bad_judgments_name_line_and_field(tmp_path, kind, change, problem):
    good = (
        single(81, "a", 1, 7) if kind == "single" else pair(81, "a", "b", "tie", "tie")
    )
    path = lines(tmp_path / "j.jsonl", [good, good | change])
    with pytest.raises(ValueError) as error:
        read_judgments(path, kind=kind)
    assert str(error.value).startswith(f"j.jsonl, line 2: {problem}")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question_id": 1}, "field 'choices' is missing"),
        ({"question_id": None, "choices": []}, "field 'question_id' must be int | str"),
        ({"question_id": 2, "choices": []}, "field 'choices' must begin with"),
        ({"question_id": 2, "choices": [{"turns": "x"}]}, "field 'choices' must begin"),
        ({"question_id": 2, "choices": [{"turns": [1]}]}, "field 'choices' must begin"),
        (answer_row(1, "m", ["again"]), "field 'question_id': 1 is answered in an"),
    ],
)
def test_bad_answers_name_line_and_field(tmp_path, row, problem):
    path = lines(tmp_path / "m.jsonl", [answer_row(1, "m", ["x"]), row])
    with pytest.raises(ValueError, match=re.escape(f"m.jsonl, line 2: {problem}")):
        read_answers(path)


def test_references_of_several_judges_are_not_mixed(tmp_path):
    for judge in ("gpt-4", "other"):
        write_answers({1: answer_row(1, judge, ["x"])}, tmp_path / f"{judge}.jsonl")
    with pytest.raises(ValueError, match="name one of gpt-4.jsonl, other.jsonl"):
        read_references(tmp_path)


def test_a_reference_that_is_no_list_of_texts_is_named(tmp_path):
    path = lines(tmp_path / "q.jsonl", [question(1) | {"reference": "42"}])
    with pytest.raises(ValueError, match="line 1: field 'reference' must be a list"):
        read_questions(path)


def test_categories_are_known_by_mt_benchs_ids_and_the_bundled_ones():
    rows = [single(i, "a", 1, 5) for i in (81, 111, 160, 1021, 7)]
    found = judgment_frame(rows, "single")["category"]
    assert found[:4].tolist() == ["writing", "math", "humanities", "reasoning"]
    assert found.isna().tolist() == [False] * 4 + [True]


def test_mt_benchs_ids_have_mt_benchs_categories(shared_data):
    questions = read_questions(shared_data / "mt_bench_question.jsonl")
    rows = [single(one["question_id"], "a", 1, 5) for one in questions]
    frame = judgment_frame(rows, "single")
    assert list(frame["category"]) == [one["category"] for one in questions]


# --- tables


def test_score_table_by_hand():
    questions = [question(1), question(2, "math"), question(3, "zoology")]
    frame = singles(
        single(1, "a", 1, 8),
        single(1, "a", 2, -1),
        single(2, "a", 1, 4),
        single(2, "a", 2, 3.5),
        single(3, "a", 1, 10),
        single(1, "b", 1, 9),
        single(1, "b", 2, 9),
        single(1, "c", 1, -1),
        questions=questions,
    )
    table = score_table(frame)
    assert list(table.index) == ["b", "a", "c"]
    assert list(table) == [
        *("writing", "math", "zoology"),
        *("turn_1", "turn_2", "overall", "failed"),
    ]
    nan = float("nan")
    expected = {
        "b": [9, nan, nan, 9, 9, 9, 0],
        # The mean of all four judgments is 6.375; that of the turns' means is not.
        "a": [8, 3.75, 10, 22 / 3, 3.5, 6.375, 1],
        "c": [nan, nan, nan, nan, nan, nan, 1],
    }
    for model, row in expected.items():
        np.testing.assert_allclose(table.loc[model], row)
    assert "writing" not in score_table(frame.drop(columns="category"))


def test_a_rating_that_failed_and_a_reward_of_minus_one():
    rows = [
        single(1, "a", 1, -1),
        single(2, "a", 1, -1, error="no rating"),
        single(3, "a", 1, -1, judge=["gpt-4", "reward"]),
        single(4, "a", 1, 5),
    ]
    frame = singles(*rows)
    assert frame["error"].notna().tolist() == [True, True, False, False]
    assert "no reason" in frame["error"][0] and frame["error"][1] == "no rating"
    assert score_table(frame).loc["a", ["overall", "failed"]].tolist() == [2, 2]


@settings(max_examples=20, deadline=None)
@given(st.lists(SINGLE, min_size=1, max_size=12))
def test_score_table_follows_show_results_rules(rows):
    table = score_table(judgment_frame(rows, "single", ()))
    for model in table.index:
        kept = [r for r in rows if r["model"] == model and r["score"] != -1]
        for name, turns in {"turn_1": [1], "turn_2": [2], "overall": [1, 2]}.items():
            scores = [row["score"] for row in kept if row["turn"] in turns]
            mean = sum(scores) / len(scores) if scores else float("nan")
            got = table[name][model] if name in table else float("nan")
            assert got == pytest.approx(mean, nan_ok=True)
    # A failure with a later row about the same was tried again.
    last = {(r["question_id"], r["model"], r["turn"]): r["score"] for r in rows}
    assert table["failed"].sum() == list(last.values()).count(-1)
    overall = table["overall"].dropna().tolist()
    assert overall == sorted(overall, reverse=True)


def test_real_judgments_give_the_published_scores(shared_data):
    frame = read_judgments(shared_data / "mt_bench_judgment_gpt-4_single.jsonl.gz")
    table = score_table(frame).round(2)
    assert list(table.index) == ["llama2_chat_7b", "llama2_7b"]
    assert table[["turn_1", "turn_2"]].to_numpy().tolist() == [
        [6.71, 5.68],
        [4.76, 3.18],
    ]
    assert list(table)[:8] == list(bench_files.CATEGORIES)
    assert evaluation.score_table is score_table
    assert evaluation.read_judgments is read_judgments


def test_judges_are_not_mixed_and_nothing_is_no_table():
    other = single(2, "a", 1, 7, judge=["claude", "single-v1"])
    frame = singles(single(1, "a", 1, 7), other)
    for function in (score_table, score_intervals, run_to_run):
        with pytest.raises(ValueError, match=r"several judges \(claude, gpt-4\)"):
            function(frame)
        with pytest.raises(ValueError, match="no judgments"):
            function(frame[:0])


# --- how sure


def many(shift=0.0, questions=40, passes=1, noise=0.0, seed=0):
    """Two models whose scores differ by `shift` on the same questions."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(questions):
        level = rng.uniform(3, 7)
        for turn, model, number in [
            (t, m, n) for t in (1, 2) for m in "ab" for n in range(1, passes + 1)
        ]:
            score = level + shift * (model == "a") + noise * rng.normal()
            rows.append(single(1001 + i, model, turn, score, **{"pass": number}))
    return judgment_frame(rows, "single")


def test_intervals_hold_the_table_and_treat_turns_of_a_question_as_one():
    frame = many(noise=0.5)
    intervals = score_intervals(frame, resamples=100)
    table = score_table(frame)
    for model, part in intervals.index:
        row = intervals.loc[(model, part)]
        assert row["score"] == pytest.approx(table.loc[model, part])
        assert row["low"] < row["score"] < row["high"]
    assert intervals.loc[("a", "overall"), "questions"] == 40
    assert intervals.loc[("a", "writing"), "questions"] == 10
    # Equal turns: two judgments of a question say no more than one.
    equal = many()
    both = score_intervals(equal, resamples=100)
    one = score_intervals(equal[equal["turn"] == 1], resamples=100)
    width = [frame.loc[("a", "overall")] for frame in (both, one)]
    assert width[0]["high"] - width[0]["low"] == pytest.approx(
        width[1]["high"] - width[1]["low"]
    )


def test_intervals_without_a_single_score():
    with pytest.raises(ValueError, match="every judgment failed"):
        score_intervals(singles(single(1, "a", 1, -1)))


def test_a_paired_difference_is_seen_where_unpaired_intervals_overlap():
    frame = many(shift=0.3, noise=0.3)
    paired = compare_scores(frame, "a", "b", resamples=100).loc["overall"]
    intervals = score_intervals(frame, resamples=100)
    assert (
        intervals.loc[("a", "overall"), "low"] < intervals.loc[("b", "overall"), "high"]
    )
    assert paired["low"] > 0 and paired["p_value"] < 0.05
    assert paired["difference"] == pytest.approx(paired["a"] - paired["b"])
    assert paired["questions"] == 40
    turned = compare_scores(frame, "b", "a", resamples=100).loc["overall"]
    assert turned["difference"] == pytest.approx(-paired["difference"])


def test_comparison_leaves_out_what_failed_for_either():
    frame = singles(
        *(single(i, "a", 1, 5) for i in (1, 2, 3)),
        *(single(i, "b", 1, score) for i, score in enumerate([4, -1, 6, 1], 1)),
    )
    row = compare_scores(frame, "a", "b", resamples=50).loc["overall"]
    assert (row["a"], row["b"], row["questions"]) == (5, 5, 2)
    with pytest.raises(ValueError, match="no judgment has the model 'd'"):
        compare_scores(frame, "a", "d")
    with pytest.raises(ValueError, match="no question was judged of both"):
        compare_scores(singles(single(1, "a", 1, 5), single(2, "b", 1, 5)), "a", "b")


def test_spread_between_passes():
    frame = singles(
        *[single(1, "a", turn, 4 + turn, **{"pass": 1}) for turn in (1, 2)],
        *[single(1, "a", turn, 6 + turn, **{"pass": 2}) for turn in (1, 2)],
        single(2, "a", 1, 9, **{"pass": 1}),  # failed in pass 2: not compared
        single(2, "a", 1, -1, **{"pass": 2}),
    )
    row = run_to_run(frame).loc["a"]
    expected = {"passes": 2, "judgments": 2, "mean": 6.5, "low": 5.5, "high": 7.5}
    expected |= {"sd": math.sqrt(2), "judgment_sd": math.sqrt(2)}
    assert row.to_dict() == pytest.approx(expected)
    with pytest.raises(ValueError, match="asked once"):
        run_to_run(frame[frame["pass"] == 1])


def test_repeated_rows_of_a_file_of_fastchats_are_passes():
    frame = singles(single(1, "a", 1, 4), single(1, "a", 1, 6), single(1, "b", 1, 9))
    assert list(frame["pass"]) == [1, 2, 1]
    assert score_table(frame).loc["a", "overall"] == 5
    assert run_to_run(frame).loc["a", "sd"] == pytest.approx(math.sqrt(2))


# --- judging one by one


QUESTIONS = [
    question(1),
    question(2, "math", reference=["forty-two", "seven"]),
    question(3, "coding"),
    question(4, "extraction", reference=["not", "shown"]),
    question(5, "reasoning", reference=["only one"]),
    question(6, turns=1),
]


def test_prompts_by_category_turn_and_reference():
    judge = Scripted(rate)
    frame = judged(judge, QUESTIONS, ["a"])
    names = frame.set_index(["question_id", "turn"])["prompt"].to_dict()
    turned = {1: "single-v1", 2: "single-v1-multi-turn"}
    expected = {(i, turn): turned[turn] for i in (1, 3, 4) for turn in (1, 2)}
    expected |= {(2, 1): "single-math-v1", (2, 2): "single-math-v1-multi-turn"}
    expected |= {(5, 1): "single-math-v1", (5, 2): "single-v1-multi-turn"}
    assert names == expected | {(6, 1): "single-v1"}
    asked = frame.set_index(["question_id", "turn"])["user_prompt"]
    assert "a on q1 turn 1?" in asked[1, 1] and "turn 2?" not in asked[1, 1]
    assert "forty-two" in asked[2, 1] and "seven" not in asked[2, 1]
    assert "forty-two" in asked[2, 2] and "seven" in asked[2, 2]
    assert "a on q2 turn 1?" in asked[2, 2] and "a on q2 turn 2?" in asked[2, 2]
    assert "shown" not in asked[4, 2]
    assert list(frame["score"]) == [
        true_rating(prompt) for prompt in frame["user_prompt"]
    ]
    assert list(frame["category"])[:3] == ["writing", "math", "coding"]


def test_references_given_replace_the_questions_own():
    frame = judged(Scripted(rate), QUESTIONS[:3], ["a"], references={3: ["x", "y"]})
    with_reference = frame["prompt"].str.contains("math")
    assert set(frame["question_id"][with_reference]) == {3}


def test_real_prompts_are_rebuilt_to_the_letter(shared_data):
    """What GPT-4 was asked, from FastChat's own files of questions and prompts."""
    real = read_judgments(shared_data / "mt_bench_judgment_gpt-4_single.jsonl.gz")
    answers = {model: {} for model in real["model"].unique()}
    for row in real[real["turn"] == 2].itertuples():
        _, first, second = row.user_prompt.split("### Assistant A:\n")
        first = first.partition("\n\n### User:\n")[0]
        second = second.partition("\n\n<|The End of Assistant A's")[0]
        texts = [first, second]
        answers[row.model][row.question_id] = answer_row(
            row.question_id, row.model, texts
        )
    judge = Scripted(rate)
    frame = judge_answers(
        answers,
        read_questions(shared_data / "mt_bench_question.jsonl"),
        judge,
        prompts=read_judge_prompts(shared_data / "mt_bench_judge_prompts.jsonl"),
        references=read_references(shared_data / "mt_bench_reference_gpt-4.jsonl"),
        progress=False,
    )
    key = ["model", "question_id", "turn", "prompt"]
    ours, theirs = (f.set_index(key)["user_prompt"].sort_index() for f in (frame, real))
    assert len(frame) == 320 and ours.index.equals(theirs.index)
    assert ours[ours != theirs].empty
    systems = {messages[0]["content"] for messages, _ in judge.asked}
    assert all(messages[0]["role"] == "system" for messages, _ in judge.asked)
    assert "You are a helpful assistant." in systems


def test_bundled_prompts_are_one_user_message():
    judge = Scripted(rate)
    judged(judge, QUESTIONS[:1], ["a"])
    assert [[m["role"] for m in messages] for messages, _ in judge.asked] == [
        ["user"]
    ] * 2


def test_file_holds_fastchats_fields_and_says_why_it_failed(tmp_path):
    path = tmp_path / "sub" / "scripted_single.jsonl"

    def say(prompt, draw):
        return "I would rather not." if "q2" in prompt else rate(prompt)

    with pytest.warns(
        UserWarning, match=r"1 of 2 judgments failed.*question 2, turn 1"
    ):
        frame = judged(
            Scripted(say), [question(i, turns=1) for i in (1, 2)], ["a"], path
        )
    good, bad = sorted(
        map(json.loads, path.read_text().splitlines()), key=lambda r: r["question_id"]
    )
    fields = list(single(1, "a", 1, 5))
    assert list(good)[: len(fields)] == list(bad)[: len(fields)] == fields
    assert good["judge"] == ["scripted", "single-v1"] and "error" not in good
    assert isinstance(good["score"], int) and good["turn"] == 1
    assert (bad["score"], bad["judgment"]) == (-1, "I would rather not.")
    assert bad["error"].startswith("no rating") and bad["unread"] == 3
    assert list(frame["score"]) == [good["score"], -1]
    assert score_table(frame).loc["a", "failed"] == 1
    read = read_judgments(path).sort_values("question_id", ignore_index=True)
    pd.testing.assert_frame_equal(read, frame.assign(category=None), check_dtype=False)


@FAILED
def test_what_is_refused_for_good_is_asked_for_once():
    judge = Scripted(lambda prompt, draw: JudgeError("not this one", refused=True))
    frame = judged(judge, [question(1, turns=1)], ["a"])
    assert list(frame["score"]) == [-1] and len(judge.asked) == 1


@FAILED
def test_replies_cut_off_and_errors_are_failures(tmp_path):
    def say(prompt, draw):
        if "q1" in prompt:
            return Reply("[[9]] and furthermore", 1, 2048, finish_reason="length")
        return JudgeError("the server is asleep")

    frame = judged(Scripted(say), [question(i, turns=1) for i in (1, 2)], ["a"])
    assert set(frame["score"]) == {-1}
    assert "cut off after 2048 tokens" in frame["error"][0]
    assert "asleep" in frame["error"][1] and frame["judgment"][1] == ""


def test_a_reply_that_cannot_be_read_is_asked_for_again():
    judge = Scripted(
        lambda prompt, draw: rate(prompt) if draw >= 2000 else "[[3]] [[4]]"
    )
    frame = judged(judge, QUESTIONS[:1], ["a"])
    assert frame["error"].isna().all()
    assert sorted(draw for _, draw in judge.asked) == [0, 0, 1000, 1000, 2000, 2000]


def test_a_reply_that_never_came_is_asked_for_under_the_same_draw():
    judge = Scripted(
        lambda *_: JudgeError("asleep") if len(judge.asked) < 3 else "[[4]]"
    )
    frame = judged(judge, [question(1, turns=1)], ["a"])
    assert list(frame["score"]) == [4]
    assert [draw for _, draw in judge.asked] == [0, 0, 0]


def test_failures_are_tried_again_only_if_wished(tmp_path):
    path, ill = tmp_path / "j.jsonl", True
    judge = Scripted(
        lambda prompt, draw: "no" if ill and "q1" in prompt else rate(prompt)
    )
    with pytest.warns(UserWarning, match="2 of 4 judgments failed"):
        judged(judge, [question(1), question(2)], ["a"], path, attempts=2)
    ill, asked = False, len(judge.asked)
    with pytest.warns(UserWarning, match="2 of 4 judgments failed"):
        judged(judge, [question(1), question(2)], ["a"], path, attempts=2)
    assert len(judge.asked) == asked
    frame = judged(judge, [question(1), question(2)], ["a"], path, retry_failed=True)
    assert frame["error"].isna().all() and len(judge.asked) == asked + 2
    assert [draw for _, draw in judge.asked[asked:]] == [2000, 2000], "new draws"
    read = read_judgments(path)
    assert len(read) == 4 and set(read["pass"]) == {1} and (read["score"] > 0).all()


@pytest.mark.parametrize("kind", ["single", "pair"])
def test_failures_in_a_file_of_fastchats_are_tried_again(tmp_path, kind):
    path, ill = tmp_path / "j.jsonl", True

    def say(prompt, draw):
        return "no" if ill else rate(prompt) if kind == "single" else "[[A]]"

    def ask(output=None, **options):
        judging = judged if kind == "single" else paired
        return judging(Scripted(say), QUESTIONS[:1], "ab", output, **options)

    with pytest.warns(UserWarning, match="judgments failed"):
        failed = ask()
    write_judgments(failed.assign(error=bench_files.NO_REASON), path)
    assert not any("error" in json.loads(line) for line in path.open())
    ill = False
    assert ask(path, retry_failed=True)["error"].isna().all()
    read = read_judgments(path, kind=kind)
    assert len(read) == len(failed) and set(read["pass"]) == {1}
    assert read["error"].isna().all()


def test_passes_are_draws_and_can_be_added(tmp_path):
    path = tmp_path / "j.jsonl"
    judge = Scripted(lambda prompt, draw: f"[[{draw + 1}]]")
    judged(judge, QUESTIONS[:1], ["a"], path)
    frame = judged(judge, QUESTIONS[:1], ["a"], path, passes=3)
    assert len(judge.asked) == 6
    assert list(frame["score"]) == list(frame["pass"]) == [1, 1, 2, 2, 3, 3]
    assert run_to_run(read_judgments(path)).loc["a", "passes"] == 3
    with pytest.raises(ValueError, match="passes: expected 1 to 1000, got 0"):
        judged(judge, QUESTIONS[:1], ["a"], passes=0)


def test_models_share_a_file_and_nothing_is_asked_twice(tmp_path):
    path, judge = tmp_path / "j.jsonl", Scripted(rate)
    judged(judge, QUESTIONS, ["a"], path)
    both = judged(judge, QUESTIONS, ["b", "a"], path)
    assert len(judge.asked) == len(both) == 22
    assert set(both["model"]) == {"a", "b"}
    assert len(path.read_text().splitlines()) == 22


def test_an_output_of_another_run_is_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    judged(Scripted(rate), QUESTIONS[:1], ["a"], path)
    other = Scripted(rate)
    other.model = "other"
    warm = Scripted(rate)
    warm.settings = {"temperature": 1.0}
    reworded = [QUESTIONS[0] | {"turns": ["q1, turn 1?", "?"]}]
    for judge, questions in [
        (other, QUESTIONS[:1]),
        (warm, QUESTIONS[:1]),
        (Scripted(rate), reworded),
    ]:
        with pytest.raises(ValueError, match="question 1, turn ., of a was judged by"):
            judged(judge, questions, ["a"], path)
    lines(path, [pair(1, "a", "b", "tie", "tie")])
    with pytest.raises(ValueError, match="row 1: field 'model' is missing"):
        judged(Scripted(rate), QUESTIONS[:1], ["a"], path)


def test_a_file_of_fastchats_is_gone_on_with(tmp_path):
    path, judge = tmp_path / "j.jsonl", Scripted(rate)
    frame = judged(judge, QUESTIONS[:1], ["a"])
    write_judgments(frame[:1], path)  # FastChat's fields only
    again = judged(judge, QUESTIONS[:1], ["a"], path)
    assert len(judge.asked) == 3
    assert list(again["score"]) == list(frame["score"])


def test_missing_answers_and_prompts_are_named():
    with pytest.raises(ValueError, match="a has no answer to turn 1 of question 9"):
        judge_answers({"a": {}}, [question(9)], Scripted(rate))
    short = {"a": {9: answer_row(9, "a", ["one"])}}
    with pytest.raises(ValueError, match="a has no answer to turn 2 of question 9"):
        judge_answers(short, [question(9)], Scripted(rate))
    with pytest.raises(ValueError, match="no judge prompt 'single-v1'"):
        judged(Scripted(rate), QUESTIONS[:1], prompts={})
    prompts = read_judge_prompts()
    prompts["single-v1"] = replace(prompts["single-v1"], output_format="[[A]]")
    with pytest.raises(ValueError, match=r"output_format '\[\[A\]\]', only"):
        judged(Scripted(rate), QUESTIONS[:1], prompts=prompts)
    with pytest.raises(ValueError, match="two questions have the id 1"):
        judged(Scripted(rate), [question(1), question(1)])
    with pytest.raises(ValueError, match="attempts: expected at least 1"):
        judged(Scripted(rate), QUESTIONS[:1], attempts=0)


def test_nothing_to_judge():
    assert judged(Scripted(rate), []).empty


# --- a reward model in the judge's place


def by_length(prompts, responses, finished):
    return [float(len(text)) for text in responses]


def rewarded(score, questions, models=("a", "b"), output=None, **options):
    answers = {model: answers_of(model, questions) for model in models}
    return score_answers(answers, questions, score, output, progress=False, **options)


def test_a_reward_model_reads_the_conversation_up_to_each_turn():
    seen = []

    def score(prompts, responses, finished):
        seen.extend(zip(prompts, responses, finished, strict=True))
        return [0.5 * i for i in range(len(responses))]

    answers = {"a": answers_of("a", QUESTIONS)}
    answers["a"][1]["finished"] = [True, False]
    frame = score_answers(answers, QUESTIONS, score, name="rm", progress=False)
    assert [prompt[-1]["content"] for prompt, *_ in seen[:2]] == [
        "q1 turn 1?",
        "q2 turn 1?",
    ]
    first = [{"role": "user", "content": "q1 turn 1?"}]
    said = {"role": "assistant", "content": "a on q1 turn 1?"}
    asked = {"role": "user", "content": "q1 turn 2?"}
    assert seen[0] == (first, "a on q1 turn 1?", True)
    assert seen[6] == ([*first, said, asked], "a on q1 turn 2?", False)
    assert list(frame["score"]) == [0.5 * i for i in [*range(6), *range(5)]]
    judged_frame = judged(Scripted(rate), QUESTIONS, ["a"])
    assert list(frame) == list(judged_frame)
    same = ["question_id", "category", "model", "turn", "pass"]
    pd.testing.assert_frame_equal(frame[same], judged_frame[same])
    assert set(frame["judge"]) == {"rm"} and set(frame["prompt"]) == {"reward"}
    assert frame["error"].isna().all()


def test_rewards_of_minus_one_are_kept_and_come_back(tmp_path):
    path = tmp_path / "rm_single.jsonl"
    frame = rewarded(lambda p, r, f: [-1] * len(r), QUESTIONS[:2], output=path)
    assert score_table(frame)["overall"].tolist() == [-1, -1]
    read = read_judgments(path, QUESTIONS)
    pd.testing.assert_frame_equal(read, frame, check_dtype=False)
    write_judgments(frame, path)
    assert read_judgments(path)["error"].isna().all()


def test_rewards_are_asked_for_once(tmp_path):
    path, calls = tmp_path / "rm_single.jsonl", []

    def score(prompts, responses, finished):
        calls.append(len(responses))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return by_length(prompts, responses, finished)

    with pytest.raises(KeyboardInterrupt):
        rewarded(score, QUESTIONS, output=path)
    frame = rewarded(score, QUESTIONS, output=path)
    assert calls == [6, 6, 5, 5, 5], "by model and turn; only what was lost again"
    expected = rewarded(by_length, QUESTIONS)
    assert frame["score"].tolist() == expected["score"].tolist()
    rewarded(score, QUESTIONS, output=path)
    assert len(calls) == 5
    with pytest.raises(ValueError, match="by another judge.*name another output"):
        rewarded(score, QUESTIONS, output=path, name="other")
    reworded = [question(1) | {"turns": ["else?", "?"]}]
    with pytest.raises(ValueError, match="question 1, turn 1, of a was scored with"):
        rewarded(score, reworded, output=path)


@pytest.mark.parametrize(
    ("figures", "problem"),
    [([1.0], "gave 1 scores for 2"), ([1.0, math.nan], "gave nan for a's answer to")],
)
def test_rewards_that_are_none_are_named(figures, problem):
    two = [question(1, turns=1), question(2, turns=1)]
    with pytest.raises(ValueError, match=problem):
        rewarded(lambda *_: figures, two, ["a"])
    with pytest.raises(ValueError, match="a has no answer to turn 1 of question 9"):
        score_answers({"a": {}}, [question(9)], by_length, progress=False)


def test_a_reward_model_and_a_judge_are_compared_by_whom_they_prefer():
    """The judge rates by length too, so the two agree wherever lengths differ."""
    questions = [question(i, turns=1) for i in range(4)]
    answers = {model: answers_of(model, questions) for model in ("a", "bb")}
    answers["a"][3]["choices"][0]["turns"] = ["long " * 9]
    judge = Scripted(
        lambda prompt, draw: "[[9]]" if re.search("bb on|long", prompt) else "[[3]]"
    )
    ratings = judge_answers(answers, questions, judge, progress=False)
    rewards = score_answers(answers, questions, by_length, progress=False)
    table = agreement_table(
        votes_from_scores(ratings), votes_from_scores(rewards, tie_delta=0)
    )
    row = table.set_index("ties").loc["without"]
    assert (row["n"], row["agreement"]) == (3, 1), "both 9 on question 3: a tie"
    with pytest.raises(ValueError, match="several judges"):
        score_table(pd.concat([ratings, rewards]))


def test_a_real_reward_model_scores_as_it_does_alone(reward_model, tokenizer, fp32):
    from starling_lib.scoring import score_responses

    asked = [question(1), question(2, turns=1)]
    score = partial(score_responses, reward_model, tokenizer)
    frame = rewarded(score, asked, ["a"])
    prompt = [{"role": "user", "content": "q2 turn 1?"}]
    alone = score([prompt], ["a on q2 turn 1?"]).item()
    assert frame.set_index("question_id").loc[2, "score"] == pytest.approx(alone, 1e-4)


# --- judging in pairs


def paired(judge, questions, models=("a", "b", "c"), output=None, **options):
    answers = {model: answers_of(model, questions) for model in models}
    return judge_pairs(answers, questions, judge, output, progress=False, **options)


def first_shown(prompt, names="abc"):
    """The name of the model whose answer is shown first."""
    return re.search(rf"\b([{names}]) on q", prompt)[1]


def prefers_a(prompt, draw=0):
    """Says that model "a" is better, wherever it stands; else a tie."""
    if not re.search(r"\ba on q", prompt):
        return "[[C]]"
    return "[[A]]" if first_shown(prompt) == "a" else "[[B]]"


def test_both_orders_name_the_model_not_the_place():
    judge = Scripted(prefers_a)
    frame = paired(judge, QUESTIONS)
    assert len(judge.asked) == 2 * len(frame) == 2 * 3 * 11
    with_a = frame["model_1"] == "a"
    for game in ("g1_winner", "g2_winner"):
        assert set(frame.loc[with_a, game]) == {"model_1"}
        assert set(frame.loc[~with_a, game]) == {"tie"}
    for row in frame.itertuples():
        assert first_shown(row.g1_user_prompt) == row.model_1
        assert first_shown(row.g2_user_prompt) == row.model_2
    assert set(frame["prompt"]) == {
        *("pair-v2", "pair-v2-multi-turn", "pair-math-v1", "pair-math-v1-multi-turn")
    }
    table = pairwise_table(games_from_judgments(frame))
    assert table.loc["a", "win_rate"] == 1 and table.loc["b", "tie"] == 11


def test_pairs_are_the_same_in_whatever_order_the_models_come(tmp_path):
    path, judge = tmp_path / "j_pair.jsonl", Scripted(prefers_a)
    paired(judge, QUESTIONS[:1], "ab", path)
    asked = len(judge.asked)
    frame = paired(judge, QUESTIONS[:1], "ba", path)
    assert len(judge.asked) == asked and set(frame["model_1"]) == {"a"}


def test_a_judge_that_loves_the_first_place_makes_only_ties():
    frame = paired(Scripted(lambda prompt, draw: "[[A]]"), QUESTIONS, "ab")
    assert set(frame["g1_winner"]) == {"model_1"}
    assert set(frame["g2_winner"]) == {"model_2"}
    assert set(resolve_swaps(games_from_judgments(frame))["winner"]) == {"tie"}


def test_a_baseline_is_the_second_model():
    frame = paired(Scripted(prefers_a), QUESTIONS[:1], baseline="a")
    assert set(frame["model_2"]) == {"a"} and set(frame["model_1"]) == {"b", "c"}
    assert set(frame["g1_winner"]) == {"model_2"}
    with pytest.raises(ValueError, match="no answers of the baseline 'd'"):
        paired(Scripted(prefers_a), QUESTIONS[:1], baseline="d")
    with pytest.raises(ValueError, match="needs the answers of two models"):
        paired(Scripted(prefers_a), QUESTIONS[:1], "a")


def test_a_pair_named_the_other_way_round_is_gone_on_with(tmp_path):
    path, ill = tmp_path / "j_pair.jsonl", True
    judge = Scripted(lambda prompt, draw: "no" if ill else prefers_a(prompt))
    with pytest.warns(UserWarning, match="2 of 2 judgments failed.*of b and a"):
        paired(judge, QUESTIONS[:1], "ab", path, baseline="a")
    ill = False
    frame = paired(judge, QUESTIONS[:1], "ab", path, retry_failed=True)
    assert set(frame["model_1"]) == {"b"} and set(frame["g1_winner"]) == {"model_2"}
    read = read_judgments(path, kind="pair")
    assert len(read) == 2 and read["error"].isna().all()
    asked = len(judge.asked)
    assert len(paired(judge, QUESTIONS[:1], "ab", path)) == 2
    assert len(judge.asked) == asked
    judge.settings = {"temperature": 1.0}
    with pytest.raises(ValueError, match="row 1: question 1, turn 1, of b and a was"):
        paired(judge, QUESTIONS[:1], "ab", path)


def test_a_pair_in_both_namings_counts_as_two_passes():
    frame = pairs(
        pair(1, "a", "b", "model_1", "model_1"), pair(1, "b", "a", "tie", "tie")
    )
    assert list(frame["pass"]) == [1, 2] and "models" not in frame
    resolved = resolve_swaps(games_from_judgments(frame))
    assert list(resolved["winner"]) == ["model_a", "tie"]


def test_one_game_that_cannot_be_read_is_an_error_of_its_own(tmp_path):
    path, ill = tmp_path / "j_pair.jsonl", True

    def say(prompt, draw):
        spoilt = ill and first_shown(prompt) == "b"
        return "[[A]] or [[B]]" if spoilt else prefers_a(prompt)

    judge = Scripted(say)
    with pytest.warns(UserWarning, match="2 of 2 judgments failed.*of a and b"):
        frame = paired(judge, QUESTIONS[:1], "ab", path)
    assert set(frame["g1_winner"]) == {"model_1"} and set(frame["g2_winner"]) == {
        "error"
    }
    assert list(frame["error"]) == ["different verdicts: A, B"] * 2
    assert len(judge.asked) == 2 * (1 + 3), "only the game that failed is asked again"
    assert set(resolve_swaps(games_from_judgments(frame))["winner"]) == {"error"}
    ill = False
    frame = paired(judge, QUESTIONS[:1], "ab", path, retry_failed=True)
    assert set(frame["g2_winner"]) == {"model_1"}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    fields = list(pair(1, "a", "b", "tie", "tie"))
    assert len(rows) == 4 and all(list(row)[: len(fields)] == fields for row in rows)
    assert len(read_judgments(path, kind="pair")) == 2


# --- a server that stalls, limits, cuts off and lies


def honest(body, count):
    return rate(body["messages"][-1]["content"])


def naughty(body, count):
    """The first reply to a question is spoilt in a way that depends on the question."""
    prompt = body["messages"][-1]["content"]
    if count > 1:
        return rate(prompt)
    kind = true_rating(prompt + "?") % 5
    if kind == 0:
        time.sleep(1.5)  # longer than the client waits
    return [
        rate(prompt),
        (429, b'{"error": {"message": "slow down"}}'),
        b'{"choices": [{"mess',
        "I hesitate between [[2]] and [[9]].",
        (200, b"<html>It works!</html>"),
    ][kind]


def server_judge(server, log=None):
    return OpenAIJudge(
        "m", server.url, log=log, concurrency=4, timeout=0.5, max_retries=2
    )


def server_run(folder, judge):
    """What the killed process does too: see `KILLED`."""
    questions = read_questions(folder / "questions.jsonl")
    answers = read_answers(folder / "model_answer")
    return judge_answers(
        answers, questions, judge, folder / "m_single.jsonl", passes=2, progress=False
    )


def lay_out(folder, count):
    (folder / "model_answer").mkdir(parents=True)
    some = [
        question(i, ["writing", "math"][i % 2], reference=["x", "y"])
        for i in range(count)
    ]
    lines(folder / "questions.jsonl", some)
    for model in "ab":
        path = folder / "model_answer" / f"{model}.jsonl"
        write_answers(answers_of(model, some), path)
    return folder


def check_complete(folder, expected):
    rows = [json.loads(line) for line in (folder / "m_single.jsonl").open()]
    keys = Counter(
        (r["question_id"], r["model"], r["turn"], r.get("pass", 1)) for r in rows
    )
    assert set(keys.values()) == {1}
    item = ["model", "question_id", "turn", "pass"]
    found = read_judgments(folder / "m_single.jsonl").set_index(item)["score"]
    wanted = expected.set_index(item)["score"]
    assert found.sort_index().equals(wanted.sort_index())
    assert (wanted > 0).all()


def test_a_naughty_server_changes_no_score(tmp_path, serve):
    calm, folder = lay_out(tmp_path / "calm", 5), lay_out(tmp_path / "rough", 5)
    expected = server_run(calm, server_judge(serve(honest)))
    server = serve(naughty)
    server_run(folder, server_judge(server, folder / "log.jsonl"))
    check_complete(folder, expected)
    kinds = {
        true_rating(json.loads(key)[-1]["content"] + "?") % 5 for key in server.asked
    }
    assert kinds == set(range(5)), "every kind of mischief was met"
    asked = sum(server.asked.values())
    (folder / "m_single.jsonl").unlink()  # the judge's log alone is enough
    server_run(folder, server_judge(server, folder / "log.jsonl"))
    check_complete(folder, expected)
    assert sum(server.asked.values()) == asked


KILLED = """
import sys
from pathlib import Path
import openai._base_client
openai._base_client.INITIAL_RETRY_DELAY = 0.01
from starling_lib.judges import OpenAIJudge
from starling_lib.mt_bench import judge_answers, read_answers, read_questions
folder, url = Path(sys.argv[1]), sys.argv[2]
judge = OpenAIJudge("m", url, log=folder / "log.jsonl", concurrency=4, timeout=0.5,
                    max_retries=2)
judge_answers(read_answers(folder / "model_answer"),
              read_questions(folder / "questions.jsonl"), judge,
              folder / "m_single.jsonl", passes=2, progress=False)
"""


@pytest.mark.slow
def test_kills_at_random_leave_each_answer_judged_once(tmp_path, serve):
    calm, folder = lay_out(tmp_path / "calm", 20), lay_out(tmp_path / "rough", 20)
    expected = server_run(calm, server_judge(serve(honest)))
    server = serve(naughty)
    command = [sys.executable, "-c", KILLED, str(folder), server.url]
    keyless = os.environ | {"OPENAI_API_KEY": ""}
    rng, seen = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, env=keyless)
        limit, deadline = seen + rng.randint(15, 45), time.monotonic() + 60
        while len(server.bodies) < limit and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it must not have ended by itself"
        seen = len(server.bodies)
    assert 0 < (folder / "m_single.jsonl").read_bytes().count(b"\n") < len(expected)
    subprocess.run(command, cwd=ROOT, env=keyless, check=True)
    check_complete(folder, expected)


# --- answering


def far(server, **options):
    return Responder("far", "m", base_url=server.url, **options)


def retell(body, count):
    """Says how many messages there were, the temperature, and the last message."""
    messages = body["messages"]
    return f"{len(messages)} at {body['temperature']}: {messages[-1]['content']}"


def test_second_turn_sees_the_first_at_the_categorys_temperature(tmp_path, serve):
    server, path = serve(retell), tmp_path / "model_answer" / "far.jsonl"
    questions = [question(1), question(2, "math"), question(3, "stem", turns=1)]
    questions += [question("four", "zoology", turns=3)]
    answers = answer_questions(far(server), questions, path, progress=False)
    assert [answers[i]["choices"][0]["turns"] for i in (1, 2, 3, "four")] == [
        ["1 at 0.7: q1 turn 1?", "3 at 0.7: q1 turn 2?"],
        ["1 at 0.0: q2 turn 1?", "3 at 0.0: q2 turn 2?"],
        ["1 at 0.1: q3 turn 1?"],
        [f"{2 * i + 1} at 0.7: qfour turn {i + 1}?" for i in range(3)],
    ]
    second = next(
        b for b in server.bodies if b["messages"][-1]["content"] == "q1 turn 2?"
    )
    assert second["messages"][1] == {
        "role": "assistant",
        "content": "1 at 0.7: q1 turn 1?",
    }
    assert read_answers(path) == {"far": answers}
    assert list(answers[1])[:5] == [
        *("question_id", "answer_id", "model_id", "choices", "tstamp")
    ]
    assert answers[1]["model_id"] == "far" and answers[1]["finished"] == [True, True]
    asked = len(server.bodies)
    again = answer_questions(far(server), questions, path, progress=False)
    assert len(server.bodies) == asked
    assert again == answers


def test_the_responders_own_temperature_and_system_prompt(tmp_path, serve):
    server = serve(retell)
    responder = far(server, temperature=0.25, system="Be brief.")
    options = {"temperatures": None, "progress": False}
    answers = answer_questions(
        responder, [question(1)], tmp_path / "a.jsonl", **options
    )
    assert answers[1]["choices"][0]["turns"][1] == "4 at 0.25: q1 turn 2?"


def test_turns_that_a_server_refused_are_asked_for_again(tmp_path, serve):
    def say(body, count):
        if body["messages"][-1]["content"] == "q2 turn 1?" and count == 1:
            return 400, b"no"
        return retell(body, count)

    server, path = serve(say), tmp_path / "far.jsonl"
    questions = [question(1), question(2)]
    with pytest.raises(JudgeError, match="1 turns have no answer.*row '2'"):
        answer_questions(far(server), questions, path, progress=False)
    assert not path.exists()
    answers = answer_questions(far(server), questions, path, progress=False)
    assert set(answers) == {1, 2} and len(server.bodies) == 5


def test_all_questions_that_a_server_refuses_are_named(tmp_path, serve):
    def say(body, count):
        last = body["messages"][-1]["content"]
        return retell(body, count) if last.startswith("q1 ") else (400, b"flagged")

    def failure(questions):
        with pytest.raises(JudgeError, match="turns have no answer") as caught:
            answer_questions(
                far(server), questions, tmp_path / "far.jsonl", progress=False
            )
        return str(caught.value)

    server = serve(say)
    said = failure([question(i, turns=1) for i in (1, 2, 3)])
    assert said.startswith("2 turns") and said.endswith(
        "The server will refuse 2 again (rows '2', '3'): leave them out, or change what "
        "it does not take"
    )
    said = failure([question(i, turns=1) for i in range(1, 14)])
    assert "12 again (rows '2', " in said and "'11' …)" in said and "'12'" not in said


def test_answers_of_another_run_are_refused(tmp_path, serve):
    server, path = serve(retell), tmp_path / "far.jsonl"
    answer_questions(far(server), [question(1)], path, progress=False)
    warmer = far(server, max_new_tokens=7)
    reworded = question(1) | {"turns": ["q1 turn 1?", "other"]}
    for responder, asked, turn in [
        (warmer, question(1), 1),
        (far(server), reworded, 2),
        (far(server), question(1, "math"), 1),
        (far(server), question(1, turns=1), 2),
    ]:
        with pytest.raises(ValueError, match=f"another run: turn {turn} of question 1"):
            answer_questions(responder, [asked], path, progress=False)
    (tmp_path / "far.jsonl.turns").unlink()
    with pytest.raises(ValueError, match="nobody knows how it was made"):
        answer_questions(far(server), [question(1)], path, progress=False)


def local(path, questions, responder=None, **options):
    responder = responder or Responder("tiny", "tiny", max_new_tokens=5)
    options = {"batch_size": 2, "progress": False} | options
    return answer_questions(responder, questions, path, **options)


def test_a_local_model_answers_and_resumes_with_the_same_words(
    tmp_path, policy, tokenizer
):
    """A chunk's samples depend on its seed, so a resumed run must cut the same chunks."""
    questions = [question(i) for i in range(5)] + [question(7, "math")]
    whole = local(tmp_path / "whole.jsonl", questions)
    kept = (tmp_path / "whole.jsonl.turns").read_text().splitlines(keepends=True)
    assert len(kept) == 12
    for count in (1, 4, 9):
        path = tmp_path / f"{count}.jsonl"
        Path(f"{path}.turns").write_text("".join(kept[:count]))
        resumed = local(path, questions)
        texts = [
            {i: a["choices"] for i, a in each.items()} for each in (whole, resumed)
        ]
        assert texts[0] == texts[1]
    loaded = {"policy": policy, "tokenizer": tokenizer}
    handed = local(tmp_path / "handed.jsonl", questions, **loaded)
    assert handed[7]["choices"] == whole[7]["choices"]  # greedy
    assert len(handed[1]["finished"]) == 2
    with pytest.raises(ValueError, match="give the tokenizer"):
        local(tmp_path / "no.jsonl", questions, policy=policy)


def test_an_answer_that_looks_like_a_transcript_is_handed_on(tmp_path, serve):
    """Base models go on with the user's part; no transcript could hold that."""
    server = serve(lambda body, count: "Yes.\n\nHuman: And you?\n\nAssistant: No.")
    answers = answer_questions(
        far(server), [question(1)], tmp_path / "a.jsonl", progress=False
    )
    assert "Human: And you?" in server.bodies[-1]["messages"][1]["content"]
    assert len(answers[1]["choices"][0]["turns"]) == 2


def test_no_warning_when_all_is_well(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judged(Scripted(rate), QUESTIONS)


# --- the bundled run


def test_the_bundled_run_is_whole(tmp_path):
    """Every request has its reply, every answer its rewards, and they belong together."""
    folder, questions = data_path("bench_run"), read_questions()
    answers = read_answers(folder / "model_answer")
    judge = RecordedJudge(folder / "judge_replies.jsonl")
    ratings = judge_answers(answers, questions, judge, progress=False)
    pairs = judge_pairs(answers, questions, judge, progress=False)
    assert len(ratings) == 320 and len(pairs) == 160
    assert ratings["error"].isna().all() and pairs["error"].isna().all()
    assert judge.usage.asked == 0
    for name in ("proxy", "gold"):
        file = tmp_path / f"{name}.jsonl"
        bundled = folder / "model_judgment" / f"{name}_reward_single.jsonl"
        file.write_bytes(bundled.read_bytes())

        def unasked(*args):
            raise AssertionError("a score is missing, or of another text")

        scores = score_answers(
            answers, questions, unasked, file, f"{name} reward", progress=False
        )
        assert len(scores) == 320
