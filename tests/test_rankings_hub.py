"""Nectar by its hub id, over HTTP; and streams, which are split without being kept."""

import gzip
import io
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetNotFoundError
from hub_server import serve
from huggingface_hub.errors import HFValidationError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from starling_lib import rankings
from starling_lib.rankings import RankingError, load_rankings, split_by_prompt

# Copies of answers are the subject of one test and noise in all others.
pytestmark = pytest.mark.filterwarnings("ignore:.*identical answers")

ROOT = Path(__file__).resolve().parents[1]
NECTAR = "berkeley-nest/Nectar"
# The columns of data/rlaif.parquet on the hub.
ANSWER = {"answer": pa.string(), "model": pa.string(), "rank": pa.float64()}
SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "answers": pa.list_(pa.struct(list(ANSWER.items()))),
        "turns": pa.int64(),
        "num_responses": pa.int64(),
        "source": pa.list_(pa.string()),
        "good_natured": pa.bool_(),
    }
)


def _row(number, answers="abcdefg", **fields):
    """A row in Nectar's schema, its answers listed worst first."""
    ranked = [
        {"answer": text, "model": f"m{rank}", "rank": float(rank)}
        for rank, text in enumerate(answers, start=1)
    ]
    prompt = f"\n\nHuman: Question {number}\n\nAssistant: "
    row = {"prompt": prompt, "answers": ranked[::-1], "turns": 1, "num_responses": 7}
    return row | {"source": ["made"], "good_natured": True} | fields


def _parquet(rows, **options):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, **options)
    return file.getvalue()


def _best_first(row):
    return [a["answer"] for a in sorted(row["answers"], key=lambda a: a["rank"])]


# --- splitting a stream


def _messages(text):
    return [{"role": "user", "content": text}]


def _ids(part):
    return [row["id"] for row in part]


texts = st.lists(
    st.text("aA ?", max_size=2) | st.integers(0, 30).map(str), min_size=3, max_size=40
)


@example(["Hi", "hi!"], 1, 0)  # one prompt cannot be on two sides
@given(texts, st.sampled_from([1, 2, 0.2, 0.5]), st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_a_stream_is_split_as_the_same_rows_in_memory(prompts, test_size, seed):
    rows = [{"id": i, "prompt": _messages(text)} for i, text in enumerate(prompts)]
    table = Dataset.from_list(rows)
    stream = table.to_iterable_dataset()
    try:
        parts = split_by_prompt(table, test_size, seed)
    except ValueError:
        with pytest.raises(ValueError, match=f"one side of {len(rows)} empty"):
            split_by_prompt(stream, test_size, seed)
        return
    assert len(parts["train"]) and len(parts["test"])
    streams = split_by_prompt(stream, test_size, seed)
    for side in ("train", "test"):
        assert _ids(streams[side]) == _ids(parts[side])
    assert sorted(_ids(parts["train"]) + _ids(parts["test"])) == list(range(len(rows)))
    known = {rankings._normalised(prompt) for prompt in parts["train"]["prompt"]}
    assert not any(rankings._normalised(p) in known for p in parts["test"]["prompt"])
    wanted = test_size if isinstance(test_size, int) else test_size * len(rows)
    groups = Counter(map(rankings._normalised, parts["test"]["prompt"]))
    assert wanted <= len(parts["test"]) < wanted + max(groups.values())


def test_one_pass_keeps_a_few_bytes_a_row():
    rows, reads = 4000, []

    def generate():
        for i in range(rows):
            reads.append(i)
            yield {"id": i, "prompt": _messages(f"{i} " + 1000 * "x")}

    stream = IterableDataset.from_generator(generate)
    reads.clear()
    tracemalloc.start()
    try:
        split_by_prompt(stream, 0.1, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reads == list(range(rows))
    assert peak < 200 * rows, "the prompts alone are 1,000 bytes a row"


def test_the_order_of_rows_does_not_matter():
    rows = [{"id": i, "prompt": _messages(f"{i % 80}!")} for i in range(100)]
    for seed in range(3):
        first = split_by_prompt(Dataset.from_list(rows), 0.3, seed)["test"]
        moved = Dataset.from_list(random.Random(seed).sample(rows, 100))
        assert sorted(split_by_prompt(moved, 0.3, seed)["test"]["id"]) == first["id"][:]


def test_more_rows_leave_nearly_all_others_on_their_side():
    rows = [{"id": i, "prompt": _messages(str(i))} for i in range(220)]
    for seed in range(3):
        few = split_by_prompt(Dataset.from_list(rows[:200]), 0.2, seed)["test"]["id"]
        many = split_by_prompt(Dataset.from_list(rows), 0.2, seed)["test"]["id"]
        assert len(set(few) ^ {i for i in many if i < 200}) <= 20


def test_every_prompt_is_as_likely_to_be_a_test():
    table = Dataset.from_list([{"prompt": _messages(str(i))} for i in range(40)])
    counts = Counter(
        prompt[0]["content"]
        for seed in range(60)
        for prompt in split_by_prompt(table, 0.25, seed)["test"]["prompt"]
    )
    # 15 expected, standard deviation 3.4
    assert len(counts) == 40 and min(counts.values()) > 2 and max(counts.values()) < 28


@pytest.fixture
def nectar_file(tmp_path):
    """300 rows in three row groups; row 150's prompt is bad, row 250's answers are."""
    rows = [_row(i) for i in range(300)]
    rows[150]["prompt"] = "no transcript"
    rows[250]["answers"][0]["answer"] = ""
    path = tmp_path / "rlaif.parquet"
    path.write_bytes(_parquet(rows, row_group_size=100))
    return path


@pytest.fixture
def quiet():
    """Row 150 and row 250 are set aside with a warning wherever they are read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "set aside")
        yield


@pytest.mark.usefixtures("quiet")
def test_a_parquet_stream_is_split_like_the_table(nectar_file):
    table = load_rankings(nectar_file, on_error="skip")
    stream = load_rankings(nectar_file, on_error="skip", streaming=True)
    parts, streams = split_by_prompt(table, 0.2, 1), split_by_prompt(stream, 0.2, 1)
    assert len(parts["test"]) == 60 and len(parts["train"]) == 238
    # The pass over the prompts counts row 250, whose answers it does not see.
    assert len(set(_ids(parts["test"])) ^ set(_ids(streams["test"]))) <= 1
    both = _ids(streams["train"]) + _ids(streams["test"])
    assert sorted(both) == sorted(table["id"])
    for row in streams["test"].take(3):
        assert row["responses"] == list("abcdefg")


def _spoil(path, column):
    """Overwrite a column's pages in every row group."""
    content = bytearray(path.read_bytes())
    meta = pq.read_metadata(path)
    for group in map(meta.row_group, range(meta.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.startswith(column):
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                size = chunk.total_compressed_size
                content[start : start + size] = bytes([255]) * size
    path.write_bytes(content)


@pytest.mark.usefixtures("quiet")
def test_only_the_prompt_column_is_read(nectar_file):
    """Answers that cannot be read do not stop the split, only the reading."""
    stream = load_rankings(nectar_file, on_error="skip", streaming=True)
    _spoil(nectar_file, "answers")
    parts = split_by_prompt(stream, 0.2, seed=0)
    with pytest.raises(OSError):
        next(iter(parts["test"]))
    _spoil(nectar_file, "prompt")
    with pytest.raises(OSError):
        split_by_prompt(stream, 0.2, seed=0)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "derive",
    [
        lambda stream: stream.take(12),
        lambda stream: stream.skip(10).take(12),
        lambda stream: stream.filter(
            lambda row: row["prompt"][0]["content"][-2:] > "95"
        ),
    ],
    ids=["take", "skip", "filter"],
)
def test_what_is_derived_from_a_stream_is_split_by_its_own_rows(nectar_file, derive):
    stream = derive(load_rankings(nectar_file, on_error="skip", streaming=True))
    parts = split_by_prompt(stream, 4, seed=0)
    assert (len(_ids(parts["train"])), len(_ids(parts["test"]))) == (8, 4)


def test_a_half_of_a_stream_is_split_by_its_own_rows():
    half = split_by_prompt(load_rankings(half="A"), 0.2, seed=0)
    stream = load_rankings(half="A", streaming=True)
    streams = split_by_prompt(stream, 0.2, seed=0)
    for side in ("train", "test"):
        assert _ids(streams[side]) == half[side]["id"][:]


def test_a_stream_is_read_by_row_group(nectar_file):
    """So that a reader who stops has fetched one, and workers can share the rest."""
    assert load_rankings(nectar_file, on_error="skip", streaming=True).num_shards == 3


# --- errors of the hub


@pytest.mark.parametrize(
    "error",
    [
        DatasetNotFoundError("Dataset 'x/y' doesn't exist on the Hub"),
        ConnectionError("Couldn't reach 'x/y'\non the Hub"),
        HFValidationError("Repo id must use alphanumeric chars"),
    ],
    ids=["misspelt", "unreachable", "no id"],
)
def test_a_source_that_the_hub_lacks(monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(rankings, "load_dataset", load_dataset)
    for streaming in (False, True):
        with pytest.raises(RankingError) as caught:
            load_rankings("x/y", streaming=streaming)
        message = str(caught.value)
        assert "'x/y' is no file or folder here" in message
        assert f"{type(error).__name__}: {str(error)[:15]}" in message
        assert "give the path" in message and "'nectar_mini'" in message
        assert "\n" not in message
        # Neither the library's 30 lines nor "During handling of …".
        assert caught.value.__cause__ is None and caught.value.__suppress_context__


# --- the hub itself

BAD = 60  # the first bad row; the other one is twice as far

SCRIPT = """
import json, sys, urllib.request, warnings
from starling_lib.rankings import RankingError, load_rankings, split_by_prompt

NECTAR, ENDPOINT, BAD = sys.argv[1], sys.argv[2], int(sys.argv[3])
facts = {}

def sent():
    return json.load(urllib.request.urlopen(ENDPOINT + "/sent"))

def errors(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except RankingError as error:
        return str(error)

stream = load_rankings(NECTAR, streaming=True)
facts["taken"] = list(stream.take(5))
facts["sent_by_take"] = sent()
parts = split_by_prompt(stream, 0.2, seed=0)
facts["sent_by_split"] = sent() - facts["sent_by_take"]

before = sent()
table = load_rankings(NECTAR, "train[:50]")
facts["sent_by_slice"] = sent() - before
facts["slice"], facts["columns"] = table.to_list(), list(table.features)
facts["bad"] = errors(load_rankings, NECTAR)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")
    stream = load_rankings(NECTAR, on_error="skip", streaming=True)
    facts["skipped"] = [row["id"] for row in stream.take(3 * BAD)]
    facts["warnings"] = [str(warning.message) for warning in caught]
warnings.simplefilter("ignore")
parts = split_by_prompt(stream, 0.2, seed=0)
facts["stream_test"] = [row["id"] for row in parts["test"]]
whole = load_rankings(NECTAR, on_error="skip")
parts = split_by_prompt(whole, 0.2, seed=0)
facts["test"], facts["train"] = parts["test"]["id"][:], parts["train"]["id"][:]
facts["misspelt"] = errors(load_rankings, NECTAR + "s")
facts["stream_misspelt"] = errors(load_rankings, NECTAR + "s", streaming=True)
facts["no_split"] = errors(load_rankings, "nectar_min")
print(json.dumps(facts))
"""

UNREACHABLE = """
import sys, time
time.sleep = lambda seconds: None  # between huggingface_hub's retries
from starling_lib.rankings import load_rankings
load_rankings(sys.argv[1])
"""


def _run(script, *arguments, endpoint, home):
    """A process whose hub is `endpoint`, with nothing cached and nothing counted."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING")) and "proxy" not in name.lower()
    }
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
    }
    environment |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300
    )


def _nectar_rows():
    """2,000 rows: real ones where they are at hand, with a number in each prompt."""
    sample = ROOT.parent / "shared" / "data" / "nectar_sample.jsonl.gz"
    if sample.is_file():
        lines = gzip.decompress(sample.read_bytes()).splitlines()
        rows = [json.loads(line) for line in lines]
    else:
        draw = random.Random(0)
        answers = [[draw.randbytes(300).hex() for _ in range(7)] for _ in range(200)]
        rows = [_row("of many words", texts) for texts in answers]
    made = []
    for number, row in zip(range(2000), itertools.cycle(rows)):
        row = {name: row[name] for name in SCHEMA.names}
        mark, opening = "\n\nHuman: ", row["prompt"].removeprefix("\n\nHuman: ")
        made.append(row | {"prompt": f"{mark}{number}. {opening}"})
    return made


@pytest.fixture(scope="module")
def nectar():
    """Rows as on the hub, with two bad ones and two that hold identical answers."""
    rows = _nectar_rows()
    rows[BAD] = _row(BAD, ["", *"bcdefg"])
    rows[2 * BAD] = _row(2 * BAD, answers="a")
    rows[10], rows[20] = _row(10, answers="abcdefa"), _row(20, answers="abcdefb")
    return rows


@pytest.fixture(scope="module")
def facts(nectar, tmp_path_factory):
    """What a process saw that loads Nectar by its id; rows are in five row groups."""
    content = _parquet(nectar, row_group_size=400)
    files = {"README.md": b"---\nlicense: apache-2.0\n---\n", ".gitattributes": b""}
    home = tmp_path_factory.mktemp("hub")
    with serve(NECTAR, files | {"data/rlaif.parquet": content}) as hub:
        arguments = (NECTAR, hub.endpoint, BAD)
        done = _run(SCRIPT, *arguments, endpoint=hub.endpoint, home=home)
        assert done.returncode == 0, done.stderr
        assert hub.unknown == []
    return json.loads(done.stdout) | {"size": len(content)}


@pytest.mark.slow
def test_a_slice_by_hub_id(facts, nectar):
    assert facts["columns"] == list(rankings.RANKING_FEATURES)
    assert len(facts["slice"]) == 50
    for before, after in zip(nectar, facts["slice"], strict=False):
        assert after["responses"] == _best_first(before)
        assert after["ranks"] == [1, 2, 3, 4, 5, 6, 7]
        assert after["source"] == before["source"]
        assert after["good_natured"] == before["good_natured"]
    assert facts["sent_by_slice"] >= facts["size"], "a slice needs the whole file"


@pytest.mark.slow
def test_a_stream_by_hub_id_fetches_what_is_read(facts):
    assert facts["taken"] == facts["slice"][:5]
    assert facts["sent_by_take"] < 0.4 * facts["size"], "one of five row groups"


@pytest.mark.slow
def test_bad_rows_and_copies_by_hub_id(facts, nectar):
    assert facts["bad"].startswith(f"row {BAD} of 'train': answers[6].answer: empty")
    mine = {rankings._hash(row["prompt"]): i for i, row in enumerate(nectar)}
    left = [i for i in range(3 * BAD + 2) if i not in (BAD, 2 * BAD)]
    assert [mine[name] for name in facts["skipped"]] == left
    copies, first, second = sorted(facts["warnings"], key=len)
    assert copies.startswith("some rows hold identical answers")
    assert {first.split(":")[0], second.split(":")[0]} == {
        f"set aside row {BAD} of 'train'",
        f"set aside row {2 * BAD} of 'train'",
    }


@pytest.mark.slow
def test_a_stream_by_hub_id_is_split_by_its_prompt_column(facts):
    assert facts["sent_by_split"] < 0.4 * facts["size"], "a small part of it is prompts"
    assert len(facts["test"]) == 400 and len(facts["train"]) == 1598
    # The pass over the prompts counts the two rows with bad answers.
    assert len(set(facts["stream_test"]) ^ set(facts["test"])) <= 2


@pytest.mark.slow
def test_a_misspelt_id_is_told_apart_from_a_bad_row(facts):
    for name in ("misspelt", "stream_misspelt", "no_split"):
        assert "DatasetNotFoundError" in facts[name]
        assert "Check the spelling" in facts[name] and "nectar_mini" in facts[name]
    assert f"'{NECTAR}s' is no file" in facts["misspelt"]


@pytest.mark.slow
def test_an_unreachable_hub_is_one_clear_error(tmp_path):
    with socket.socket() as free:  # bound, not listening: connections are refused
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        done = _run(UNREACHABLE, NECTAR, endpoint=endpoint, home=tmp_path)
    assert done.returncode == 1
    trace = done.stderr[done.stderr.index("Traceback") :]
    assert len(trace.splitlines()) < 16 and trace.count("Traceback") == 1
    assert "RankingError: 'berkeley-nest/Nectar' is no file" in trace
    assert "ConnectionError: Couldn't reach" in trace and "'nectar_mini'" in trace
