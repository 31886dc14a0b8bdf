import builtins
import json

import numpy as np
import pytest
from scipy import stats

from starling_lib.agreement import agreement_table
from starling_lib.vote_panel import VotePanel, VoteSession
from starling_lib.win_rates import pairwise_table

COUNT = 6
PROMPTS = [f"prompt {i}" for i in range(COUNT)]
# Neither the answers nor their order tell the names.
ANSWERS = {
    "zeta": [f"first answer {i}" for i in range(COUNT)],
    "alpha": [f"second answer {i}" for i in range(COUNT)],
}


def session(path=None, **options) -> VoteSession:
    return VoteSession(PROMPTS, ANSWERS, path=path, **options)


def side_of(model: str, one: VoteSession) -> str:
    return "left" if one.current.left in ANSWERS[model] else "right"


def vote_for(one: VoteSession, models) -> None:
    """Vote for each model of `models` in turn; "tie" and "skip" are themselves."""
    for model in models:
        one.vote(model if model in ("tie", "skip") else side_of(model, one))


# --- the session


def test_votes_and_tally_are_about_models_not_sides():
    one = session(question_ids=[f"q{i}" for i in range(COUNT)])
    vote_for(one, ["zeta", "zeta", "tie", "skip", "alpha", "zeta"])
    assert one.current is None
    assert one.progress == (5, 1, 6)
    votes = one.votes()
    assert votes.question_id.tolist() == ["q0", "q1", "q2", "q4", "q5"]
    winners = [
        row[row.winner] if row.winner != "tie" else "tie" for _, row in votes.iterrows()
    ]
    assert winners == ["zeta", "zeta", "tie", "alpha", "zeta"]
    tally = one.tally()
    assert tally.loc["zeta", ["wins", "losses", "ties"]].tolist() == [3, 1, 1]
    assert tally.loc["alpha", ["wins", "losses", "ties"]].tolist() == [1, 3, 1]
    low, high = stats.binomtest(3, 4).proportion_ci(method="wilson")
    assert tally.loc["zeta", ["preferred", "low", "high"]].tolist() == [0.75, low, high]
    assert tally.loc["alpha", ["low", "high"]].tolist() == pytest.approx(
        [1 - high, 1 - low]
    )


def test_wilson_by_hand_for_a_unanimous_voter():
    one = session()
    vote_for(one, ["alpha"] * 6)
    # (p̂ + z²/2n ± …)/(1 + z²/n) with p̂ = 1 runs from n/(n + z²) to 1
    low, high = one.tally().loc["alpha", ["low", "high"]]
    assert low == pytest.approx(6 / (6 + 1.959964**2), abs=1e-6)
    assert high == pytest.approx(1)
    assert one.tally(level=0.5).loc["alpha", "low"] > low


def test_nothing_is_concluded_without_a_decisive_vote():
    one = session()
    vote_for(one, ["tie"])
    assert one.tally().loc["zeta", ["preferred", "low", "high"]].isna().all()
    assert one.tally().loc["zeta", "ties"] == 1


def test_sides_are_balanced_and_of_the_seed():
    def sides(seed):
        one = session(seed=seed)
        shown = []
        while one.current is not None:
            shown.append(side_of("zeta", one))
            one.vote("skip")
        return shown

    drawn = [sides(seed) for seed in range(20)]
    assert drawn == [sides(seed) for seed in range(20)]
    assert all(one.count("left") == 3 for one in drawn)
    assert len(set(map(tuple, drawn))) > 5
    first = [one[0] for one in drawn]
    assert 4 <= first.count("left") <= 16


def test_a_ballot_names_no_model():
    one = session()
    assert not {"zeta", "alpha"} & set(str(vars(one.current)).replace("'", " ").split())


def test_a_voter_of_one_side_prefers_no_model():
    count = 40
    answers = {"a": ["x"] * count, "b": ["y"] * count}
    one = VoteSession(["?"] * count, answers)
    while one.current is not None:
        one.vote("left")
    assert one.tally().loc["a", "preferred"] == 0.5
    votes = one.votes()
    assert votes["order"].tolist() != sorted(votes["order"])
    assert (votes["winner"] == "model_a").equals(votes["order"] == 0)


def test_a_person_is_compared_with_a_judge():
    one = session(turn=1)
    vote_for(one, ["zeta", "alpha", "tie", "zeta", "alpha", "zeta"])
    judge = one.votes().assign(rater="judge")
    # The judge names the pair the other way round and differs on the last question.
    judge["model_a"], judge["model_b"] = (
        judge["model_b"].copy(),
        judge["model_a"].copy(),
    )
    judge["winner"] = judge["winner"].replace(
        {"model_a": "model_b", "model_b": "model_a"}
    )
    judge.loc[5, "winner"] = "tie"
    table = agreement_table(one.votes(), judge).set_index("ties")
    assert table.loc["with", "agreement"] == pytest.approx(5 / 6)
    assert table.loc["without", ["n", "agreement"]].tolist() == [4, 1]
    games = pairwise_table(one.votes())
    assert games.loc["zeta", ["win", "tie", "loss"]].tolist() == [3, 1, 2]


def test_an_empty_session_has_the_columns():
    columns = ["question_id", "model_a", "model_b", "winner", "order", "rater"]
    assert session().votes().columns.tolist() == columns


def test_prompts_may_be_messages():
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    one = VoteSession([talk[:1], talk], {"a": ["x", "y"], "b": ["z", "w"]})
    assert one.current.prompt == "Hi"
    one.vote("skip")
    assert one.current.prompt == "User: Hi\n\nAssistant: Hello\n\nUser: Bye"


@pytest.mark.parametrize(
    ("answers", "options", "message"),
    [
        ({"a": ["x"] * 6}, {}, "two models"),
        ({"a": ["x"] * 6, "b": ["x"] * 5}, {}, "b: 5 for 6 prompts"),
        (ANSWERS, {"question_ids": [1, 2]}, "question_ids: 2 for 6"),
        (ANSWERS, {"question_ids": [1, 1, 2, 3, 4, 5]}, "occurs twice"),
    ],
)
def test_bad_sessions_are_refused(answers, options, message):
    with pytest.raises(ValueError, match=message):
        VoteSession(PROMPTS, answers, **options)


def test_bad_votes_are_refused():
    one = session()
    with pytest.raises(ValueError, match="'zeta' is none of left"):
        one.vote("zeta")
    assert one.progress == (0, 0, 6)
    vote_for(one, ["skip"] * 6)
    with pytest.raises(ValueError, match="nothing left"):
        one.vote("left")


# --- the file


def test_a_later_session_goes_on(tmp_path):
    path = tmp_path / "votes" / "mine.jsonl"
    ids = np.arange(10, 10 + COUNT)
    one = session(path, question_ids=ids)
    vote_for(one, ["zeta", "skip", "alpha"])
    again = session(path, question_ids=ids, seed=1)
    assert again.votes().equals(one.votes())
    assert again.current.question_id == 11  # skipped before, asked again
    vote_for(again, ["zeta"])
    assert again.tally().loc["zeta", "wins"] == 2
    assert again.tally().equals(session(path, question_ids=ids).tally())


def test_a_vote_is_on_disk_at_once_and_survives_a_torn_line(tmp_path):
    path = tmp_path / "votes.jsonl"
    one = session(path)
    vote_for(one, ["zeta"])
    (row,) = map(json.loads, path.read_text().splitlines())
    assert row[row["winner"]] == "zeta"
    with path.open("a") as file:
        file.write('{"question_id": 1, "mod')
    assert session(path).votes().equals(one.votes())


def test_raters_pairs_and_turns_share_a_file(tmp_path):
    path = tmp_path / "votes.jsonl"
    vote_for(session(path), ["zeta"])
    vote_for(session(path, rater="bob"), ["alpha", "alpha"])
    vote_for(session(path, turn=2), ["tie"])
    others = {"zeta": ANSWERS["zeta"], "beta": ANSWERS["alpha"]}
    VoteSession(PROMPTS, others, path=path).vote("tie")
    assert session(path).progress[0] == 1
    assert session(path, rater="bob").tally().loc["alpha", "wins"] == 2
    assert session(path, turn=2).votes()["turn"].tolist() == [2]
    turned = dict(reversed(ANSWERS.items()))
    assert VoteSession(PROMPTS, turned, path=path).tally().loc["zeta", "wins"] == 1


def test_votes_on_other_answers_are_not_counted(tmp_path):
    path = tmp_path / "votes.jsonl"
    vote_for(session(path), ["zeta"])
    newer = ANSWERS | {"zeta": ["better"] * COUNT}
    with pytest.raises(ValueError, match="line 1: question 0 was voted on with other"):
        VoteSession(PROMPTS, newer, path=path)
    path.write_text('{"question_id": 0}\n')
    with pytest.raises(ValueError, match="line 1: no field 'model_a'"):
        session(path)


def test_two_sessions_do_not_vote_twice(tmp_path):
    path = tmp_path / "votes.jsonl"
    one, other = session(path), session(path)
    one.vote("left")
    with pytest.raises(ValueError, match="question 0 was voted on elsewhere"):
        other.vote("left")
    assert len(path.read_text().splitlines()) == 1


# --- the buttons


def test_buttons_vote_and_only_the_tally_names_the_models():
    one = session()
    panel = VotePanel(one)
    for number, name in enumerate(["left", "right", "tie", "skip", "left"]):
        page = panel.page.value
        assert f"prompt {number}" in page
        assert f"first answer {number}" in page and f"second answer {number}" in page
        assert page.index(one.current.left) < page.index(one.current.right)
        assert "zeta" not in page and "alpha" not in page
        panel.buttons[name].click()
    assert one.progress == (4, 1, 6)
    assert "4 of 6 voted, 1 skipped" in panel.page.value
    assert "zeta" not in panel.page.value
    panel.buttons["tally"].click()
    assert "zeta" in panel.page.value and "alpha" in panel.page.value
    assert "answer 5" not in panel.page.value
    assert all(button.disabled for button in panel.buttons.values())


def test_the_tally_comes_after_the_last_question_and_at_once_where_none_is_left():
    one = session()
    panel = VotePanel(one)
    for _ in range(COUNT):
        panel.buttons[side_of("alpha", one)].click()
    for shown in (panel, VotePanel(one)):
        assert "6 of 6 voted" in shown.page.value
        assert "<td>1.00</td>" in shown.page.value
        assert shown.buttons["left"].disabled


def test_answers_are_text_and_never_markup():
    evil = "<script>alert(1)</script> <img src=x onerror=y> &amp; \"'"
    one = VoteSession([evil], {f"a{evil}": [evil], "b": ["fine"]})
    panel = VotePanel(one)
    for _ in range(2):
        assert "<script" not in panel.page.value and "<img" not in panel.page.value
        assert "&lt;script&gt;" in panel.page.value
        panel.buttons["tie"].click()  # the tally shows the model's name
    assert (
        "&amp;amp;"
        in VotePanel(VoteSession([evil], {"a": [evil], "b": ["fine"]})).page.value
    )


def test_a_refused_vote_is_told(tmp_path):
    path = tmp_path / "votes.jsonl"
    panel = VotePanel(session(path))
    session(path).vote("left")
    panel.buttons["left"].click()
    assert "was voted on elsewhere" in panel.page.value


def test_the_panel_shows_itself_as_a_cells_last_line():
    from IPython.core.interactiveshell import InteractiveShell

    panel = VotePanel(session())
    data, _ = InteractiveShell.instance().display_formatter.format(panel)
    view = data["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == panel.box.model_id


def test_without_ipywidgets_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "ipywidgets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        ImportError, match=r"pip install 'starling-cookbook\[notebooks\]'"
    ):
        VotePanel(session())
