"""Whole comparisons: figures by hand, replays to the byte, hostile texts, one judge."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from html.parser import HTMLParser

import pandas as pd
import pytest

from starling_lib import agreement, bench_compare, evaluation, win_rates
from starling_lib.bench_compare import (
    answer_models,
    judge_models,
    note_settings,
    read_comparison,
    read_settings,
)
from starling_lib.bench_files import answer_row, read_answers, read_judgments
from starling_lib.bench_reports import write_report
from starling_lib.bench_tables import comparison_tables
from starling_lib.evaluation import compare
from starling_lib.judges import OpenAIJudge, Reply
from starling_lib.mt_bench import compare_scores, score_table
from starling_lib.responders import Responder

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["q1, first?", "q1, second?"]},
    {"question_id": 2, "category": "math", "turns": ["q2, first?", "q2, second?"]},
    {"question_id": "three", "category": "writing", "turns": ["q3, only?"]},
]
FAILED = pytest.mark.filterwarnings("ignore:.*judgments failed")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(win_rates, "RESAMPLES", 30)
    monkeypatch.setattr(agreement, "RESAMPLES", 30)
    monkeypatch.setattr(agreement, "KAPPA_RESAMPLES", 3)


class Scripted:
    """A judge whose reply is a function of the user's prompt."""

    model, settings, concurrency = "scripted", {"temperature": 0.0}, 2

    def __init__(self, say, model="scripted"):
        self.say, self.model, self.asked = say, model, 0

    def ask(self, messages, draw=0):
        self.asked += 1
        return Reply(self.say(messages[-1]["content"]))


def answers_of(model, text="{model} on {turn}", questions=QUESTIONS, **extra):
    """`text` may speak of {model} and {turn}, the user's."""
    return {
        one["question_id"]: answer_row(
            *(one["question_id"], model),
            [text.replace("{model}", model).replace("{turn}", t) for t in one["turns"]],
            **extra,
        )
        for one in questions
    }


GIVEN = {"old": answers_of("old"), "new": answers_of("new", "{model}er on {turn}")}


def by_name(prompt):
    """Rates "new" 8 and others 5; in pairs, prefers "new" wherever it stands."""
    if "[[letter]]" not in prompt:
        return "[[8]]" if "newer on" in prompt else "[[5]]"
    return "[[A]]" if prompt.find("newer on") < prompt.find("old on") else "[[B]]"


def by_place(prompt):
    """Rates everybody 5; in pairs, prefers whoever stands first."""
    return "[[A]]" if "[[letter]]" in prompt else "[[5]]"


def by_length(prompts, responses, finished):
    return [len(text) / 10 for text in responses]


def compared(folder, models=None, judge=None, **options):
    options = {"questions": QUESTIONS, "resamples": 30, "progress": False} | options
    return compare(models or GIVEN, judge=judge, output=folder, **options)


def files(folder):
    return {
        name: (folder / f"report.{name}").read_bytes()
        for name in ("json", "md", "html")
    }


class Page(HTMLParser):
    """A page's tags with their attributes, and all its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


# --- figures


def test_a_judge_and_a_reward_model_by_hand(tmp_path):
    judge = Scripted(by_name)
    made = compared(tmp_path, judge=judge, reward=by_length, reward_name="rm")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == made.report and set(made.judgments) == {"scripted", "rm"}
    scores = {(r["model"], r["part"]): r for r in report["scores"]["scripted"]}
    assert [scores[m, "overall"]["score"] for m in ("old", "new")] == [5, 8]
    assert scores["new", "math"]["questions"] == 1
    assert scores["new", "math"]["low"] is None, "one question has no interval"
    assert not report["spread"] and report["swaps"] is None
    differences = {r["part"]: r for r in report["differences"]["rm"]}
    assert differences["overall"]["difference"] == pytest.approx(
        0.2
    )  # two letters more
    assert (differences["overall"]["a"], differences["overall"]["b"]) == ("new", "old")
    wins = {r["model"]: r for r in report["wins"]["scripted"]}
    assert (wins["new"]["win"], wins["new"]["loss"], wins["old"]["loss"]) == (5, 0, 5)
    agreed = [r for r in report["agreement"] if r["turn"] == "all"]
    assert [(r["n"], r["agreement"]) for r in agreed] == [(5, 1), (5, 1)]
    lengths = {r["model"]: r for r in report["lengths"]}
    assert lengths["old"]["characters"] == pytest.approx(
        (2 * len("old on q1, first?") + 2 * len("old on q1, second?") + 16) / 5
    )
    assert lengths["old"]["turns"] == 5 and lengths["old"]["cut"] is None
    assert [r["failed"] for r in report["failures"]] == [0, 0]


def test_figures_are_those_of_the_public_functions(tmp_path):
    def say(prompt):
        return f"[[{hashlib.sha256(prompt.encode()).digest()[0] % 9 + 1}]]"

    made = compared(tmp_path, judge=Scripted(say), passes=2)
    frame = made.judgments["scripted"]
    file = tmp_path / "model_judgment" / "scripted_single.jsonl"
    read = read_judgments(file, QUESTIONS)
    pd.testing.assert_frame_equal(score_table(read), score_table(frame))
    row = next(
        r for r in made.report["differences"]["scripted"] if r["part"] == "overall"
    )
    expected = compare_scores(frame, "new", "old", resamples=30).loc["overall"]
    for name in ("difference", "low", "high", "p_value"):
        assert row[name] == pytest.approx(expected[name])
    assert {r["passes"] for r in made.report["spread"]["scripted"]} == {2}
    assert "could be noise on 3 questions" in (tmp_path / "report.md").read_text()


def test_three_models_get_ratings_and_three_categories_a_profile(tmp_path):
    third = [*QUESTIONS[:2], {**QUESTIONS[2], "category": "stem"}]
    given = {name: answers_of(name, questions=third) for name in ("a", "b", "c")}
    judge = Scripted(
        lambda prompt: (
            "[[A]]"
            if "Assistant A" in prompt or "of assistant A" in prompt
            else "[[5]]"
        )
    )
    made = compare(
        given, third, judge, output=tmp_path, pairs=True, resamples=30, progress=False
    )
    rated = made.report["ratings"]
    # Whoever stands first wins, so that every model wins every second game.
    assert [r["games"] for r in rated] == [20, 20, 20]
    assert [r["rating"] for r in rated] == pytest.approx([1000] * 3)
    page = (tmp_path / "report.html").read_text()
    assert "Ratings from pairs" in page and 'alt="Profile"' in page


def test_pairs_in_both_orders(tmp_path):
    made = compared(tmp_path, judge=Scripted(by_name), pairs=True)
    wins = made.report["wins"]["scripted, in pairs"]
    assert {r["model"]: r["win"] for r in wins} == {"new": 5, "old": 0}
    swaps = {r["outcome"]: r["n"] for r in made.report["swaps"]}
    assert swaps == {"consistent": 5, "first": 0, "second": 0, "error": 0}
    assert made.report["position"] == {"first": 0, "second": 0, "p_value": 1.0}
    page = Page((tmp_path / "report.html").read_text())
    # The two models stand in the order of their names, whoever came first.
    assert "scripted prefers, new shown first: new; old shown first: new" in page.text
    with pytest.raises(ValueError, match="pairs need a judge"):
        compared(tmp_path, reward=by_length, pairs=True)


def test_a_baseline_is_what_the_others_are_compared_with(tmp_path):
    models = {**GIVEN, "third": answers_of("third")}
    options = {"judge": Scripted(by_name), "pairs": True}
    free = compared(tmp_path / "free", models, **options).report["differences"]
    pairs = {(r["a"], r["b"]) for r in free["scripted"]}
    assert pairs == {("new", "old"), ("third", "old"), ("third", "new")}
    made = compared(tmp_path / "to_new", models, baseline="new", **options)
    pairs = {(r["a"], r["b"]) for r in made.report["differences"]["scripted"]}
    assert pairs == {("old", "new"), ("third", "new")}
    assert set(made.pairs["model_2"]) == {"new"}
    for wins in made.report["wins"].values():
        assert {r["model"] for r in wins} == {"old", "third"}
    with pytest.raises(ValueError, match="baseline 'x' is none of old, new"):
        compared(tmp_path, judge=options["judge"], baseline="x")


def test_one_baseline_after_another_leaves_each_pair_judged_once(tmp_path):
    models = {**GIVEN, "third": answers_of("third")}
    answer_models(models, QUESTIONS, tmp_path, progress=False)
    judge, asked = Scripted(by_name), []
    for baseline in ("new", "old", None):
        options = {"pairs": True, "baseline": baseline, "progress": False}
        judge_models(models, QUESTIONS, tmp_path, judge, **options)
        asked.append(judge.asked)
    assert asked == [15 + 20, 15 + 30, 15 + 30], "third with old, then nothing new"
    for baseline, win in [("new", {"old": 0}), ("old", {"new": 5})]:
        found = read_comparison(tmp_path, ["old", "new"], baseline, resamples=9)
        table = comparison_tables(found).wins["scripted, in pairs"]
        assert list(table["n"]) == [5] and table["win"].to_dict() == win


@pytest.mark.parametrize("pairs", [True, False])
def test_an_unknown_baseline_is_named_before_anybody_judges(tmp_path, pairs):
    judge = Scripted(by_name)
    options = {"pairs": pairs, "baseline": "odl", "progress": False}
    with pytest.raises(ValueError, match="baseline 'odl' is none of old, new"):
        judge_models(GIVEN, QUESTIONS, tmp_path, judge, **options)
    assert judge.asked == 0


def judged_in_parts(folder, models, *parts):
    """A folder of answers, and judgments of some models by each of `parts`."""
    given = {name: answers_of(name) for name in models}
    answer_models(given, QUESTIONS, folder, progress=False)
    for names, judging in parts:
        some = {name: given[name] for name in names}
        judge_models(some, QUESTIONS, folder, progress=False, **judging)


NOT_ALL = pytest.mark.filterwarnings("ignore:.*has judged 0 of 5 turns")


@NOT_ALL
def test_a_judge_of_one_model_has_scores_and_is_in_no_comparison(tmp_path):
    judge, reward = {"judge": Scripted(by_place)}, {"reward": by_length}
    judged_in_parts(tmp_path, "ab", ("ab", judge), ("a", reward))
    report = write_report(read_comparison(tmp_path, resamples=9), tmp_path).report
    assert set(report["scores"]) == {"reward model", "scripted"}
    assert set(report["wins"]) == {"scripted"} and report["agreement"] is None
    wins, agreement = report["left_out"]
    assert wins.startswith("Left out: wins by reward model (no games: ")
    named = "Left out: agreement of reward model and scripted (the raters share no "
    assert agreement.startswith(named)
    assert set(report["left_out"]) < set(report["in_short"])
    assert wins[:30] in (tmp_path / "report.md").read_text()


@NOT_ALL
def test_a_baseline_that_a_judge_left_out_has_no_wins_by_it(tmp_path):
    judged_in_parts(tmp_path, "abc", ("bc", {"reward": by_length}))
    tables = comparison_tables(read_comparison(tmp_path, baseline="a", resamples=9))
    assert tables.wins == {} and tables.left_out == [
        "Left out: wins by reward model (baseline 'a' played no game; models: b, c)."
    ]


def test_pairs_that_no_chain_links_have_wins_and_no_ratings(tmp_path):
    judging = {"judge": Scripted(by_place), "pairs": True}
    judged_in_parts(tmp_path, "abcd", ("ab", judging), ("cd", judging))
    tables = comparison_tables(read_comparison(tmp_path, resamples=9))
    assert set(tables.wins["scripted, in pairs"].index) == set("abcd")
    assert tables.ratings is None and tables.left_out == [
        "Left out: ratings by scripted (never compared, not even in a chain: "
        "a, b | c, d)."
    ]


def test_a_single_model_has_scores_and_no_comparison(tmp_path):
    report = compared(tmp_path, {"old": GIVEN["old"]}, reward=by_length).report
    assert report["scores"]["reward model"] and not report["wins"]
    assert report["differences"] == {"reward model": []} and not report["agreement"]


def test_failures_are_counted_and_shown(tmp_path):
    def say(prompt):
        return "I would rather not." if "newer on q2" in prompt else by_name(prompt)

    with pytest.warns(UserWarning, match="2 of 10 judgments failed"):
        made = compared(tmp_path, judge=Scripted(say))
    (row,) = made.report["failures"]
    assert (row["judgments"], row["failed"]) == (10, 2)
    assert row["reasons"] == "no rating (2 ×)"
    line = "2 of 10 judgments (single) by scripted failed and count in no score."
    assert line in made.summary
    assert line in (tmp_path / "report.md").read_text()
    page = Page((tmp_path / "report.html").read_text())
    assert "scripted: failed (no rating; the reply ends in" in page.text


@FAILED
def test_a_judge_that_never_rates_leaves_the_other(tmp_path):
    mute = Scripted(lambda prompt: "…")
    made = compared(tmp_path, judge=mute, reward=by_length, pairs=True)
    assert set(made.report["scores"]) == {"reward model"}
    assert (
        "scripted: every judgment failed, so there is no score."
        in (made.report["in_short"])
    )
    alone = compared(tmp_path / "alone", judge=mute)
    assert alone.report["scores"] == {} and "every judgment failed" in alone.summary


# --- once, and to the byte


def test_a_server_is_asked_once_and_a_replay_is_the_same(tmp_path, serve):
    def say(body, count):
        prompt = body["messages"][-1]["content"]
        return by_name(prompt) if body["model"] == "judge" else f"{body['model']} on it"

    server = serve(say)
    models = {
        name: Responder("anything", name, base_url=server.url)
        for name in ("old", "newer")
    }
    judge = OpenAIJudge("judge", server.url, concurrency=2)
    options = {"reward": by_length, "pairs": True, "date": "some day"}
    made = compared(tmp_path / "one", models, judge, **options)
    asked, first = len(server.bodies), files(tmp_path / "one")
    assert asked == 2 * 5 + 2 * 5 + 2 * 5  # answers, ratings, pairs in both orders
    again = compared(tmp_path / "one", models, judge, **options)
    assert len(server.bodies) == asked and files(tmp_path / "one") == first
    assert again.summary == made.summary
    kept = read_answers(tmp_path / "one" / "model_answer")
    for file in (tmp_path / "one" / "model_judgment").glob("*.jsonl"):
        (tmp_path / "two" / "model_judgment").mkdir(parents=True, exist_ok=True)
        (tmp_path / "two" / "model_judgment" / file.name).write_bytes(file.read_bytes())
    compared(tmp_path / "two", {n: kept[n] for n in models}, judge, **options)
    assert len(server.bodies) == asked, "FastChat's files are all that it takes"
    assert server.url.encode() not in b"".join(first.values())
    settings = made.report["settings"]
    assert settings["date"] == "some day" and settings["models"]["old"] == {
        "source": "server",
        "model": "old",
        "temperature": "by category",
        "max_new_tokens": 256,
        "seed": 0,
    }


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    calls = []

    def say(prompt):
        calls.append(prompt)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return by_name(prompt)

    judge = Scripted(say)
    judge.concurrency = 1
    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path / "cut", judge=judge)
    assert not (tmp_path / "cut" / "report.json").exists()
    compared(tmp_path / "cut", judge=judge)
    assert len(calls) <= 10 + 2, "what was written down is not asked again"
    compared(tmp_path / "whole", judge=Scripted(by_name))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_loaded_policies_answer_and_other_weights_are_noticed(
    tmp_path, policy, tokenizer
):
    models = {"old": (policy, tokenizer)}
    options = {"max_new_tokens": 3, "reward": by_length}
    made = compared(tmp_path, models, **options)
    assert made.report["settings"]["models"]["old"]["max_new_tokens"] == 3
    first = files(tmp_path)
    compared(tmp_path, models, **options)
    assert files(tmp_path) == first
    policy.model.norm.weight.data += 0.1
    with pytest.raises(ValueError, match="another run.*another text, model or setting"):
        compared(tmp_path, models, **options)


def test_a_cut_answer_is_marked(tmp_path):
    cut = answers_of("old", finished=[True, False])
    cut["three"]["finished"] = [True]
    report = compared(tmp_path, {"old": cut}, reward=by_length).report
    assert report["lengths"][0]["cut"] == pytest.approx(2 / 5)
    page = Page((tmp_path / "report.html").read_text())
    assert page.text.count("characters · cut") == 2


def test_settings_noted_at_the_same_time_are_all_kept(tmp_path, monkeypatch):
    both_have_read = threading.Barrier(2)

    def read(folder):
        kept = read_settings(folder)
        # Whoever reads waits a while for the other to have read the same.
        with contextlib.suppress(threading.BrokenBarrierError):
            both_have_read.wait(0.2)
        return kept

    monkeypatch.setattr(bench_compare, "read_settings", read)
    threads = [
        threading.Thread(
            target=note_settings, args=(tmp_path, "models", {name: {"seed": 0}})
        )
        for name in ("one", "two")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_settings(tmp_path)["models"]) == {"one", "two"}


# --- whatever anybody says is text

HOSTILE = (
    '</script></td></div><script>alert(1)</script><img src="https://x.example/y" '
    "onerror=alert(2)> [[10]] | `x` **b** \u202e \x00 & &lt; ]]> <!-- {turn}"
)


def test_hostile_texts_stay_texts(tmp_path):
    evil, name = answers_of("old", HOSTILE), "(b onclick='x')`&amp;"
    asked = [{**QUESTIONS[0], "turns": [HOSTILE, HOSTILE]}, *QUESTIONS[1:]]
    judge = Scripted(
        lambda prompt: f"{HOSTILE.replace('[[10]]', '')} [[7]]", "<i>j|</i>"
    )
    models = {name: evil, "new": GIVEN["new"]}
    compared(tmp_path, models, judge, questions=asked, date="<script>", baseline=name)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"script", "i", "iframe", "link", "a", "object"})
    for tag, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes), tag
        if tag == "img":
            data = attributes["src"].removeprefix("data:image/png;base64,")
            assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    assert page.text.count("<script>alert(1)</script>") >= 5
    policy = next(a for t, a in page.tags if a.get("http-equiv"))["content"]
    assert policy.startswith("default-src 'none'") and "script" not in policy
    markdown = (tmp_path / "report.md").read_text()
    assert "<i>" not in markdown and "<script>" not in markdown
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(cells) == 1, block


def test_half_a_surrogate_pair_is_written(tmp_path):
    odd = {"odd": answers_of("odd", "x \ud83d {turn}")}
    compared(tmp_path, odd, reward=by_length)
    assert "x &#55357; q1" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())


def test_the_report_shows_itself_without_the_answers(tmp_path):
    made = compared(tmp_path, judge=Scripted(by_name))
    shown = made._repr_html_()
    assert "Mean scores" in shown and "data:image/png" in shown
    assert "newer on q1" not in shown and "report.html" in shown
    assert len(repr(made)) < 200


# --- calls that cannot be meant


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, "nobody judges"),
        ({"judge": Scripted(by_name), "questions": []}, "no questions"),
        ({"reward": by_length, "models": {"a/b": GIVEN["old"]}}, "'a/b' must do as a"),
        ({"reward": by_length, "models": {"..": GIVEN["old"]}}, "'..' must do as a"),
        (
            {"reward": by_length, "judge": Scripted(by_name, "reward model")},
            "judge and reward model are both called",
        ),
        (
            {"reward": by_length, "models": {"old": {1: GIVEN["old"][1]}}},
            "old has no answer to question 2",
        ),
        (
            {"reward": by_length, "questions": [QUESTIONS[0]] * 2},
            "two questions have the id 1",
        ),
    ],
)
def test_bad_calls_are_named(tmp_path, change, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        compared(tmp_path, **change)
    assert not (tmp_path / "report.json").exists()


def test_answers_are_not_overwritten_by_others(tmp_path):
    compared(tmp_path, reward=by_length)
    with pytest.raises(
        ValueError, match="old.jsonl holds another answer to question 1"
    ):
        compared(tmp_path, {"old": answers_of("old", "other")}, reward=by_length)
    compared(tmp_path, questions=QUESTIONS[1:], reward=by_length)
    kept = read_answers(tmp_path / "model_answer")["old"]
    assert set(kept) == {1, 2, "three"}, "fewer questions take no answer away"


def test_evaluation_is_the_face_of_all_this():
    for name in (
        *("read_questions", "read_judgments", "score_table", "win_rate", "compare"),
        "length_controlled_win_rate",
    ):
        assert callable(getattr(evaluation, name))
