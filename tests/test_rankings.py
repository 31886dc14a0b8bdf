import gzip
import json
import warnings
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from starling_lib import rankings
from starling_lib.chat import messages_to_transcript
from starling_lib.rankings import (
    RankingError,
    data_path,
    load_rankings,
    split_by_prompt,
    to_preference_pairs,
)

# Copies of answers are the subject of a few tests and noise in all others.
pytestmark = pytest.mark.filterwarnings("ignore:.*identical answers")


def _row(answers="abc", prompt="\n\nHuman: Hi\n\nAssistant: ", **fields):
    """A good row; the answers are listed worst first, so that sorting shows."""
    ranked = [
        {"answer": text, "model": f"m{rank}", "rank": float(rank)}
        for rank, text in enumerate(answers, start=1)
    ]
    row = {"prompt": prompt, "answers": ranked[::-1], "turns": 1, "num_responses": 3}
    return row | {"source": ["made"], "good_natured": True} | fields


def _write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- the bundled set


def test_bundled_set():
    train, test = load_rankings(), load_rankings(split="test")
    assert (len(train), len(test)) == (203, 37)
    assert train.features == rankings.RANKING_FEATURES
    assert all(ranks == [1, 2, 3, 4, 5, 6, 7] for ranks in train["ranks"])
    assert not set(train["id"]) & set(test["id"])
    assert set(test["half"]) == {None}
    cut = np.mean([not flag for row in train["finished"] for flag in row])
    assert cut == pytest.approx(0.52, abs=0.005)


def test_answers_come_best_first_with_their_own_fields():
    raw = [json.loads(line) for line in data_path("nectar_mini/test.jsonl").open()]
    for before, after in zip(raw, load_rankings(split="test"), strict=True):
        best_first = sorted(before["answers"], key=lambda answer: answer["rank"])
        assert after["responses"] == [answer["answer"] for answer in best_first]
        assert after["models"] == [answer["model"] for answer in best_first]
        assert after["finished"] == [answer["finished"] for answer in best_first]
        assert messages_to_transcript(after["prompt"]) == before["prompt"]
        assert after["turns"] == before["turns"]


def test_halves_divide_the_train_split():
    a, b = load_rankings(half="A"), load_rankings(half="B")
    assert (len(a), len(b)) == (103, 100)
    assert set(a["id"]) | set(b["id"]) == set(load_rankings()["id"])
    streamed = [row["id"] for row in load_rankings(half="A", streaming=True)]
    assert streamed == a["id"][:]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:5]", slice(0, 5)),
        ("train[5:8]", slice(5, 8)),
        ("train[-3:]", slice(200, 203)),
    ],
)
def test_slices(split, expected):
    assert load_rankings(split=split)["id"][:] == load_rankings()["id"][expected]


def test_splits_add_up():
    both = load_rankings(split="train+test[:3]")
    assert (
        both["id"][-4:]
        == load_rankings()["id"][-1:] + load_rankings(split="test")["id"][:3]
    )


# --- sources


@pytest.fixture
def three_rows():
    return [_row(prompt=f"\n\nHuman: Q{i}\n\nAssistant: ") for i in range(3)]


def test_files_of_every_kind_give_the_same_rows(tmp_path, three_rows):
    plain = _write(tmp_path / "a.jsonl", *three_rows)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    parquet = tmp_path / "a.parquet"
    Dataset.from_list(three_rows).to_parquet(parquet)
    expected = load_rankings(plain)[:]
    assert expected["responses"] == [["a", "b", "c"]] * 3
    for path in (packed, parquet):
        assert load_rankings(path)[:] == expected
    for path in (plain, packed, parquet):
        stream = load_rankings(path, streaming=True)
        assert list(stream.take(2)) == [load_rankings(plain)[i] for i in range(2)]
        assert load_rankings(path, "train[1:]")["id"][:] == expected["id"][1:]


def test_a_folder_holds_a_file_per_split(tmp_path, three_rows):
    _write(tmp_path / "train.jsonl", *three_rows[:2])
    _write(tmp_path / "test.jsonl", three_rows[2])
    assert len(load_rankings(tmp_path)) == 2
    assert len(load_rankings(str(tmp_path), "test")) == 1


def test_missing_fields_that_can_be_filled_are(tmp_path):
    row = _row(prompt="\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: ")
    for field in ("turns", "num_responses", "source", "good_natured"):
        del row[field]
    (read,) = load_rankings(_write(tmp_path / "x.jsonl", row))
    assert read["turns"] == 2 and read["source"] == [] and read["half"] is None
    assert read["finished"] == [True] * 3 and read["good_natured"] is None
    assert len(read["id"]) == 12


def test_ids_depend_on_the_prompt_not_the_place(tmp_path, three_rows):
    path = _write(tmp_path / "x.jsonl", *three_rows)
    ids = load_rankings(path)["id"][:]
    assert len(set(ids)) == 3
    assert load_rankings(path, "train[1:]")["id"][:] == ids[1:]


@pytest.mark.parametrize(
    "name", ["nectar_sample.jsonl.gz", "alpaca_eval_kwise.jsonl.gz"]
)
def test_real_rows(shared_data, tmp_path, name):
    loaded = load_rankings(shared_data / name)
    with gzip.open(shared_data / name) as lines:
        raw = [json.loads(line) for line in lines]
    assert len(loaded) == len(raw) == {"n": 219, "a": 605}[name[0]]
    for before, after in zip(raw, loaded, strict=True):
        text = {answer["rank"]: answer["answer"] for answer in before["answers"]}
        assert after["responses"] == [text[rank] for rank in range(1, 8)]
        assert after["turns"] == before["turns"]
    fields = ["prompt", "answers", "turns", "num_responses", "source", "good_natured"]
    nectar = [{field: row[field] for field in fields} for row in raw]
    Dataset.from_list(nectar).to_parquet(tmp_path / "rlaif.parquet")
    columnar = load_rankings(tmp_path / "rlaif.parquet")
    assert columnar["responses"][:] == loaded["responses"][:]
    assert columnar["prompt"][:] == loaded["prompt"][:]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": "nowhere.jsonl"}, RankingError, "no such file: nowhere.jsonl"),
        (
            {"split": "val"},
            RankingError,
            "no file val.jsonl, val.jsonl.gz, val.parquet",
        ),
        ({"half": "C"}, RankingError, "no row of nectar_mini is in half 'C'"),
        ({"on_error": "ignore"}, ValueError, "expected one of raise, skip"),
        ({"duplicates": "merge"}, ValueError, "expected one of keep, drop, tie"),
        ({"split": "train[:3]", "streaming": True}, RankingError, "plain split"),
    ],
)
def test_bad_requests_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        load_rankings(**arguments)


def test_one_file_is_not_two_splits(tmp_path):
    path = _write(tmp_path / "x.jsonl", _row())
    with pytest.raises(
        RankingError, match="x.jsonl is one file, read as split 'train'"
    ):
        load_rankings(path, "test")


def test_a_hub_id_gets_its_slice_and_stream_from_datasets(monkeypatch):
    def load_dataset(path, split, streaming, **_):
        assert (path, split) == ("berkeley-nest/Nectar", "train[:1]")
        table = Dataset.from_list([_row()])
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(rankings, "load_dataset", load_dataset)
    for streaming in (False, True):
        (row,) = load_rankings("berkeley-nest/Nectar", "train[:1]", streaming=streaming)
        assert row["responses"] == ["a", "b", "c"]


def test_data_path():
    assert data_path("bench_questions.jsonl").is_file()
    with pytest.raises(FileNotFoundError, match="no bundled data at .*nothing"):
        data_path("nothing")


def test_data_path_in_an_installed_package(tmp_path, monkeypatch):
    """Beside the code when installed, even if a stranger's `data` is a level up."""
    package = tmp_path / "site-packages" / "starling_lib"
    for folder in (package / "data", package.parent / "data"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(rankings, "__file__", str(package / "rankings.py"))
    assert data_path() == package / "data"


# --- bad rows


def _with_answer(**changes):
    row = _row()
    row["answers"][1] |= changes  # the middle answer: "b", rank 2
    return row


def _without(field):
    row = _row()
    del row[field]
    return row


BAD_ROWS = [
    (_without("prompt"), r"prompt: expected a transcript \(text\), got nothing"),
    (_without("answers"), "answers: expected a list of at least two, got nothing"),
    (_row(prompt=3), "prompt: expected a transcript .*got int 3"),
    (_row(prompt="Hello"), "prompt: the transcript does not end in an assistant turn"),
    (
        _row(prompt="\n\nHuman: Hi\n\nAssistant:"),
        r"expected '\\n\\nAssistant: ' at the end, .*; append that mark",
    ),
    (
        _row(prompt="\n\nHuman: Hi\n\nAssistant: Well,"),
        "prompt: the assistant turn at its end already has text.*; cut the prompt",
    ),
    (_row(answers="a"), "answers: expected a list of at least two, got 1"),
    (_row() | {"answers": {"answer": "a"}}, "answers: expected a list .*got dict"),
    (_row() | {"answers": ["a", "b"]}, r"answers\[0\]: expected an object, got str"),
    (_with_answer(answer=None), r"answers\[1\].answer: expected text, got nothing"),
    (_with_answer(model=7), r"answers\[1\].model: expected text, got int 7; add it"),
    (_with_answer(answer=" \n"), r"answers\[1\].answer: empty; leave it out"),
    (_with_answer(rank=None), r"answers\[1\].rank: expected a number, got nothing"),
    (_with_answer(rank="2"), r"answers\[1\].rank: expected a number, got str '2'"),
    (_with_answer(rank=True), r"answers\[1\].rank: expected a number, got bool True"),
    (
        _with_answer(rank=3.0),
        r"answers\[1\].rank: 3.0 is tied with answers\[0\]; break the tie",
    ),
    (
        _with_answer(rank=4),
        "answers.rank: got 3.0, 4, 1.0, expected each of 1 to 3 once",
    ),
    (
        _with_answer(rank=2.5),
        "got 3.0, 2.5, 1.0, expected each of 1 to 3 once .*renumber",
    ),
    (_with_answer(rank=float("nan")), "got 3.0, nan, 1.0, expected each of 1 to 3"),
    (_with_answer(finished="no"), "finished: expected bool or nothing, got str 'no'"),
    (_row(good_natured="yes"), "good_natured: expected bool or nothing, got str"),
    (_row(half=1), "half: expected str or nothing, got int 1"),
    (_row(source=[1]), r"source: expected a list of names, got list \[1\]"),
    (["prompt"], "expected a JSON object, got list"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[m for _, m in BAD_ROWS])
def test_a_bad_row_is_named_with_field_problem_and_fix(tmp_path, row, message):
    path = _write(tmp_path / "x.jsonl", _row(), row, _row())
    with pytest.raises(RankingError, match=rf"^line 2: .*{message}"):
        load_rankings(path)
    with pytest.warns(UserWarning, match="set aside 1 of 3 rows; the first: line 2: "):
        assert len(load_rankings(path, on_error="skip")) == 2


@pytest.mark.parametrize(
    "line",
    [b"{", b"\xff\xfe\xfa", b'{"prompt": "\\ud800"}', b"[" * 100_000, b"{'prompt': 1}"],
    ids=["cut", "not text", "half a character", "too deep", "Python"],
)
def test_a_line_that_is_not_json_is_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(_row()).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(
        RankingError, match="^line 3: not JSON .*write one object a line"
    ):
        load_rankings(path)


def test_a_stored_line_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(_row()) + "\n\n{broken\n")
    with pytest.raises(RankingError, match="^line 3: not JSON"):
        rankings.read_rows(path)


@pytest.mark.parametrize("read", [load_rankings, rankings.read_rows])
@pytest.mark.parametrize(
    ("rows", "split"), [([], "train"), ([_row()], "train[5:]")], ids=["file", "slice"]
)
def test_nothing_to_read_is_named(tmp_path, read, rows, split):
    path = _write(tmp_path / "x.jsonl", *rows)
    with pytest.raises(RankingError, match=f"is empty: x.jsonl holds {len(rows)} rows"):
        read(path, split)


def test_the_id_helps_to_find_the_row(tmp_path):
    path = _write(tmp_path / "x.jsonl", _with_answer(answer="") | {"id": "a12"})
    with pytest.raises(
        RankingError, match=r"^line 1 \(id 'a12'\): answers\[1\].answer"
    ):
        load_rankings(path)


def test_bad_parquet_rows_are_named_by_index(tmp_path):
    path = tmp_path / "x.parquet"
    Dataset.from_list([_row(), _with_answer(rank=3.0), _row()]).to_parquet(path)
    with pytest.raises(
        RankingError, match=r"^row 1 of 'train': answers\[1\].rank: 3.0"
    ):
        load_rankings(path)
    with pytest.warns(UserWarning, match="set aside 1 of 3 rows"):
        assert len(load_rankings(path, on_error="skip")) == 2


def test_a_parquet_file_of_something_else(tmp_path):
    path = tmp_path / "x.parquet"
    Dataset.from_list([{"chosen": "a", "rejected": "b"}]).to_parquet(path)
    with pytest.raises(RankingError, match="^row 0 of 'train': prompt: .*got nothing"):
        load_rankings(path)


def test_a_stream_warns_at_each_row_it_sets_aside(tmp_path):
    path = _write(tmp_path / "x.jsonl", _row(answers="a"), _row(), _with_answer(rank=9))
    with pytest.warns(UserWarning) as caught:
        assert len(list(load_rankings(path, on_error="skip", streaming=True))) == 1
    assert [str(w.message)[:16] for w in caught] == [
        "set aside line 1",
        "set aside line 3",
    ]
    with pytest.raises(RankingError, match="line 1: answers"):
        list(load_rankings(path, streaming=True))


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["answer", "model", "rank"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
FIELDS = ["id", "prompt", "answers", "source", "good_natured", "half"]


@given(st.dictionaries(st.sampled_from(FIELDS), json_values), st.binary(max_size=30))
@settings(max_examples=80, deadline=None)
def test_no_row_crashes_the_reader(tmp_path_factory, changes, garbage):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    garbage = b"#" + garbage.replace(b"\n", b"")
    lines = [json.dumps(_row()), json.dumps(_row() | changes)]
    path.write_bytes("\n".join(lines).encode() + b"\n" + garbage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = load_rankings(path, on_error="skip")
    assert 1 <= len(read) <= 2
    assert read[0]["responses"] == ["a", "b", "c"]


@given(st.permutations(range(1, 6)))
@settings(max_examples=30, deadline=None)
def test_any_order_in_the_file_gives_the_same_ranking(order):
    answers = [{"answer": str(r), "model": "m", "rank": r} for r in order]
    read = rankings._to_ranking({**_row(), "answers": answers}, "keep")
    assert read["responses"] == ["1", "2", "3", "4", "5"]


# --- identical answers


@pytest.mark.parametrize(
    ("duplicates", "responses", "ranks"),
    [
        ("keep", "abcbd", [1, 2, 3, 4, 5]),
        ("drop", "abcd", [1, 2, 3, 4]),
        ("tie", "abbcd", [1, 2, 2, 4, 5]),
    ],
)
def test_identical_answers(tmp_path, duplicates, responses, ranks):
    """The copies of "b" at 2 and 4 have mean rank 3, like "c", and a better best."""
    path = _write(tmp_path / "x.jsonl", _row("abcbd"), _row("xyz"))
    message = "1 of 2 rows hold identical answers at different ranks; 1 copies"
    with pytest.warns(UserWarning, match=message):
        read = load_rankings(path, duplicates=duplicates)
    assert read[0]["responses"] == list(responses)
    assert read[0]["ranks"] == ranks
    assert read[1]["ranks"] == [1, 2, 3]
    with pytest.warns(UserWarning, match="identical answers"):
        list(load_rankings(path, duplicates=duplicates, streaming=True))


def test_merged_copies_stand_at_their_mean_rank(tmp_path):
    """Copies at 1 and 5 (mean 3) come after the answer at 2, before the one at 4."""
    path = _write(tmp_path / "x.jsonl", _row("abcda"))
    assert load_rankings(path, duplicates="drop")[0]["responses"] == list("bacd")
    tied = load_rankings(path, duplicates="tie")[0]
    assert tied["responses"] == list("baacd") and tied["ranks"] == [1, 2, 2, 4, 5]
    assert tied["models"] == ["m2", "m1", "m5", "m3", "m4"]


def test_all_answers_identical_is_no_ranking(tmp_path):
    path = _write(tmp_path / "x.jsonl", _row("aaa"))
    assert len(load_rankings(path)) == 1
    for duplicates in ("drop", "tie"):
        with pytest.raises(RankingError, match="answers: all identical"):
            load_rankings(path, duplicates=duplicates)


def test_counts_of_identical_answers_in_the_real_sets(shared_data):
    with pytest.warns(UserWarning, match="4 of 203 rows hold identical"):
        load_rankings()
    with pytest.warns(UserWarning, match="16 of 219 rows hold identical"):
        load_rankings(shared_data / "nectar_sample.jsonl.gz")


# --- splitting


def _prompts(dataset):
    return {messages_to_transcript(messages) for messages in dataset["prompt"]}


@pytest.mark.parametrize("size", [0.2, 40])
def test_split_is_by_prompt_and_complete(size):
    whole = load_rankings()
    parts = split_by_prompt(whole, size, seed=0)
    assert Counter(parts["train"]["id"]) + Counter(parts["test"]["id"]) == Counter(
        whole["id"]
    )
    assert len(parts["test"]) == {0.2: 41, 40: 40}[size]
    assert not _prompts(parts["train"]) & _prompts(parts["test"])


@pytest.mark.parametrize("seed", range(10))
def test_near_duplicate_prompts_stay_together(tmp_path, seed):
    variants = {"What is 2+2?", "what is 2 + 2", "WHAT IS 2+2!!"}
    texts = [*sorted(variants), *(f"Question {i}" for i in range(7))]
    rows = [_row(prompt=f"\n\nHuman: {text}\n\nAssistant: ") for text in texts]
    whole = load_rankings(_write(tmp_path / "x.jsonl", *rows))
    parts = split_by_prompt(whole, 4, seed)
    copies = [
        len(variants & {messages[0]["content"] for messages in part["prompt"]})
        for part in parts.values()
    ]
    assert sorted(copies) == [0, 3]
    assert 4 <= len(parts["test"]) <= 6


def test_split_depends_on_the_seed_only():
    whole = load_rankings()
    first = split_by_prompt(whole, 0.3, seed=1)["test"]["id"][:]
    assert first == split_by_prompt(whole, 0.3, seed=1)["test"]["id"][:]
    assert first != split_by_prompt(whole, 0.3, seed=2)["test"]["id"][:]


def test_prompts_without_letters_are_still_told_apart(tmp_path):
    prompts = [
        f"\n\nHuman: {text}\n\nAssistant: " for text in ("?!", "🙂", "🙃", "...")
    ]
    rows = [_row(prompt=prompt) for prompt in prompts]
    whole = load_rankings(_write(tmp_path / "x.jsonl", *rows))
    parts = split_by_prompt(whole, 2, seed=0)
    assert len(parts["test"]) == 2


@pytest.mark.parametrize("size", [0, 0.0, 203, 1.0])
def test_an_empty_side_is_an_error(size):
    with pytest.raises(ValueError, match="leaves one side of 203 empty"):
        split_by_prompt(load_rankings(), size, seed=0)


# --- pairs


def _texts(pairs):
    return [
        (chosen[0]["content"], rejected[0]["content"])
        for chosen, rejected in zip(pairs["chosen"], pairs["rejected"], strict=True)
    ]


@pytest.fixture
def ranking(tmp_path):
    return load_rankings(_write(tmp_path / "one.jsonl", _row("abcd")))


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ("all", list(combinations("abcd", 2))),
        ("adjacent", [("a", "b"), ("b", "c"), ("c", "d")]),
        ("best_worst", [("a", "d")]),
    ],
)
def test_pairs_of_one_ranking(ranking, pairs, expected):
    made = to_preference_pairs(ranking, pairs)
    assert _texts(made) == expected
    assert made[0] == {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": expected[0][0]}],
        "rejected": [{"role": "assistant", "content": expected[0][1]}],
    }


def test_random_pairs_are_true_distinct_and_even(ranking):
    many = concatenate_datasets([ranking] * 600)
    drawn = _texts(to_preference_pairs(many, 2, seed=3))
    assert len(drawn) == 1200
    assert all(
        first != second for first, second in zip(drawn[::2], drawn[1::2], strict=True)
    )
    counts = Counter(drawn)
    assert set(counts) == set(combinations("abcd", 2))
    assert min(counts.values()) > 150 and max(counts.values()) < 250
    assert drawn == _texts(to_preference_pairs(many, 2, seed=3))
    assert drawn != _texts(to_preference_pairs(many, 2, seed=4))
    assert len(to_preference_pairs(ranking, 99)) == 6


def test_seven_responses_make_21_pairs():
    test = load_rankings(split="test")
    assert len(to_preference_pairs(test)) == 37 * 21
    stream = load_rankings(split="test", streaming=True)
    assert list(to_preference_pairs(stream).take(3)) == [
        to_preference_pairs(test)[i] for i in range(3)
    ]


@pytest.mark.parametrize("duplicates", ["keep", "tie"])
def test_copies_are_not_preferred_to_each_other(tmp_path, duplicates):
    path = _write(tmp_path / "x.jsonl", _row("abbc"))
    texts = _texts(to_preference_pairs(load_rankings(path, duplicates=duplicates)))
    assert len(texts) == 5 and ("b", "b") not in texts


@pytest.mark.slow
def test_pairs_are_in_trls_format(ranking):
    from trl.data_utils import is_conversational, unpair_preference_dataset

    pairs = to_preference_pairs(ranking)
    assert is_conversational(pairs[0])
    unpaired = unpair_preference_dataset(pairs)
    assert len(unpaired) == 12 and sum(unpaired["label"]) == 6


@pytest.mark.parametrize("pairs", ["best", 0, -1])
def test_another_kind_of_pairs_is_an_error(ranking, pairs):
    with pytest.raises(ValueError, match="expected"):
        to_preference_pairs(ranking, pairs)


def test_the_first_rows_as_stored():
    whole = rankings.read_rows(split="test")
    assert len(whole) == 37
    assert rankings.read_rows(split="test", limit=2) == whole[:2]
    assert rankings.read_rows(split="test", limit=99) == whole
    assert rankings.read_rows(split="test", limit=0) == []
    with pytest.raises(ValueError, match="limit=-1: expected 0 or more"):
        rankings.read_rows(split="test", limit=-1)


def test_ids_of_stored_rows_are_those_of_the_table(tmp_path):
    stored = rankings.read_rows(split="test", limit=5)
    lines = [
        *({**stored[i], "id": name} for i, name in enumerate([None, "", 7, "x"])),
        {key: value for key, value in stored[4].items() if key != "id"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids = [row["id"] for row in rankings.read_rows(path)]
    assert ids == load_rankings(path)["id"]
    assert ids[2:4] == ["7", "x"] and all(len(ids[i]) == 12 for i in (0, 1, 4))


def test_ten_thousand_damaged_rows_are_refused_or_ranked_right():
    """One field of a real row replaced at random: an error, or the ranks as given."""
    rng, accepted = np.random.default_rng(0), 0
    rows = rankings.read_rows("nectar_mini")
    junk = [None, "", " ", 0, 1, 2.0, 3.5, -1, True, [], {}, "1", float("nan"), "x\n"]
    for i in range(10_000):
        row = json.loads(json.dumps(rows[i % len(rows)]))
        part = row if rng.random() < 0.3 else row["answers"][rng.integers(7)]
        field = sorted(part)[rng.integers(len(part))]
        part[field] = junk[rng.integers(len(junk))]
        found = rankings._read_row(row, i, "skip", "keep", "train")
        if found["problem"] is None:
            accepted += 1
            in_order = sorted(row["answers"], key=lambda answer: answer["rank"])
            assert found["responses"] == [answer["answer"] for answer in in_order]
            assert found["ranks"] == [1, 2, 3, 4, 5, 6, 7]
        else:
            assert found["problem"].startswith(f"row {i} of 'train'")
    assert 500 < accepted < 9500  # both ends of the test are reached
