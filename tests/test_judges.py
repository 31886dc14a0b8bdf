import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
from chat_server import transformers_server
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from starling_lib import judges
from starling_lib.judges import (
    JudgeError,
    LocalJudge,
    OpenAIJudge,
    RecordedJudge,
    Reply,
    ReplyLog,
    RewardJudge,
    Usage,
    ask_all,
    request_hash,
)

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-test-0123456789abcdef-0123456789"
HELLO = [{"role": "user", "content": "Hello?"}]


def ask_for(text):
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": text},
    ]


# --- a server of the test's own


def completion(text="Fine.", reason="stop", usage=(7, 3)):
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    tokens = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=False))
    return {"object": "chat.completion", "choices": [choice], "usage": tokens}


def error(message, **fields):
    return {"error": {"message": message} | fields}


class Server(http.server.ThreadingHTTPServer):
    """Answers `answers[i]` to the i-th request (the last for ever), and takes notes.

    An answer is a body (a dict is sent as JSON, bytes as they are), or a tuple
    (status, body, headers), or a function of the request's body that returns one.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.requests: list[dict] = []
        self.keys: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, address):
        """A client that hung up is what several tests are about."""

    def asked(self):
        return [request["messages"][-1]["content"] for request in self.requests]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append(request)
            server.keys.append(self.headers["Authorization"])
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            answer = server.answers[min(number, len(server.answers) - 1)]
            self.send(answer(request) if callable(answer) else answer)
        finally:
            with server.lock:
                server.in_flight -= 1

    def send(self, answer):
        status, body, headers = (
            answer if isinstance(answer, tuple) else (200, answer, {})
        )
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
        }.items():
            self.send_header(name, headers.get(name, value))
        for name in set(headers) - {"Content-Type", "Content-Length"}:
            self.send_header(name, headers[name])
        self.end_headers()
        self.wfile.write(content)


def echo(request):
    """The question comes back, so that a reply tells which request it belongs to."""
    return completion(f"re: {request['messages'][-1]['content']}")


def slow_echo(request):
    time.sleep(0.03)
    return echo(request)


def stall(request):
    time.sleep(1)
    return completion()


TRUNCATED = (200, b'{"choices": [{"mess', {"Content-Length": "5000"})


@pytest.fixture
def serve():
    started = []

    def start(*answers):
        server = Server(*answers)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A key in the environment, no other settings, and short pauses between retries."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def judge_of(server, log=None, **options):
    return OpenAIJudge("judge-1", base_url=server.url, log=log, **options)


# --- requests


def test_hash_is_that_of_canonical_json():
    # printf '%s' '{"draw":2,"messages":[{"content":"é\u2028","role":"user"}],
    # "model":"m","settings":{"a":[1],"temperature":0.5}}' | sha256sum, in UTF-8
    messages = [{"role": "user", "content": "é\u2028"}]
    settings = {"temperature": 0.5, "a": [1]}
    assert request_hash("m", messages, settings, draw=2) == (
        "608440bc7794593768ec9b60c1bb09ab92f3006785c75af7cb6c3ef7870e422d"
    )


def test_hash_ignores_key_order_and_nothing_else():
    base = ("m", HELLO, {"temperature": 0.0, "max_tokens": 8}, 0)
    turned = [{"content": "Hello?", "role": "user"}]
    same = ("m", turned, {"max_tokens": 8, "temperature": 0.0}, 0)
    assert request_hash(*same) == request_hash(*base)
    others = [
        ("n", *base[1:]),
        ("m", HELLO * 2, *base[2:]),
        ("m", [{"role": "system", "content": "Hello?"}], *base[2:]),
        ("m", HELLO, {"temperature": 0.5, "max_tokens": 8}, 0),
        (*base[:3], 1),
    ]
    assert len({request_hash(*parts) for parts in [base, *others]}) == 6


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "non-empty list"),
        ("Hello?", "non-empty list"),
        ({"role": "user", "content": "x"}, "non-empty list"),
        (["Hello?"], "message 0: needs 'role' and 'content', is str"),
        ([*HELLO, {"role": "user"}], r"message 1: .* has \['role'\]"),
        ([HELLO[0] | {"name": "x"}], r"has \['content', 'name', 'role'\]"),
        ([{"role": "user", "content": None}], "'content' must be text, not NoneType"),
        ([{"role": "user", "content": "a\ud800b"}], "surrogate pair at character 1"),
    ],
)
def test_bad_messages_are_named_and_never_sent(serve, messages, problem):
    server = serve(completion())
    with pytest.raises(JudgeError, match=problem):
        judge_of(server).ask(messages)
    assert server.requests == []


# --- the log


def add(log, text, reply=None, draw=0):
    return log.add("m", ask_for(text), {"t": 0.0}, draw, reply or Reply(f"re: {text}"))


def digest(text, draw=0):
    return request_hash("m", ask_for(text), {"t": 0.0}, draw)


def opened_quietly(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ReplyLog(path)


TEXTS = st.text() | st.sampled_from(
    ["\u2028", "\x85", "\r\n", "\n", '"', "\\", "\0", ""]
)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(TEXTS, TEXTS), max_size=3, unique_by=lambda pair: pair[0]),
    st.integers(0, 10**6),
    st.floats(0, 100),
    TEXTS,
)
def test_any_text_comes_back_from_the_log(
    tmp_path_factory, pairs, tokens, cost, reason
):
    path = tmp_path_factory.mktemp("log") / "replies.jsonl"
    log = ReplyLog(path)
    for asked, said in pairs:
        add(log, asked, Reply(said, tokens, tokens + 1, cost, reason))
    for source in (log, opened_quietly(path)):
        assert len(source) == len(pairs)
        for asked, said in pairs:
            expected = Reply(said, tokens, tokens + 1, cost, reason, cached=True)
            assert source.get(digest(asked)) == expected


def test_record_holds_the_documented_fields(tmp_path):
    log = ReplyLog(tmp_path / "sub" / "replies.jsonl")
    reply = Reply("Fine.", 7, 3, 0.25, "length", cached=True)
    log.add("m", HELLO, {"t": 0.5}, 2, reply, reconstructed=True)
    assert json.loads(log.path.read_text()) == {
        "hash": request_hash("m", HELLO, {"t": 0.5}, 2),
        "model": "m",
        "draw": 2,
        "settings": {"t": 0.5},
        "request": HELLO,
        "reply": "Fine.",
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "cost": 0.25,
        "finish_reason": "length",
        "reconstructed": True,
    }


def test_text_that_utf8_cannot_hold_leaves_the_log_untouched(tmp_path):
    log = ReplyLog(tmp_path / "replies.jsonl")
    add(log, "a")
    before = log.path.read_bytes()
    with pytest.raises(ValueError, match="surrogates"):
        add(log, "b", Reply("\udc00"))
    assert log.path.read_bytes() == before and log.get(digest("b")) is None


def test_first_record_of_a_request_counts(tmp_path):
    log, other = (ReplyLog(tmp_path / "replies.jsonl") for _ in range(2))
    assert add(log, "a", Reply("first")).text == "first"
    assert add(other, "a", Reply("second")).text == "first"
    lines = log.path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1
    log.path.write_bytes(lines[0] + lines[0].replace(b"first", b"third"))
    assert ReplyLog(log.path).get(digest("a")).text == "first"


def test_a_miss_sees_what_another_process_wrote_meanwhile(tmp_path):
    here, there = (ReplyLog(tmp_path / "replies.jsonl") for _ in range(2))
    assert here.get(digest("a")) is None
    add(there, "a")
    assert here.get(digest("a")) == Reply("re: a", cached=True)


def test_a_file_put_in_place_of_the_log_is_read(tmp_path):
    log, other = ReplyLog(tmp_path / "a.jsonl"), ReplyLog(tmp_path / "b.jsonl")
    add(log, "a long first question")
    add(other, "b")
    assert log.get(digest("b")) is None
    os.replace(other.path, log.path)
    assert log.get(digest("b")) is not None
    log.path.unlink()
    assert log.get(digest("c")) is None
    add(log, "c")
    assert ReplyLog(log.path).get(digest("c")) is not None


def test_a_line_torn_at_any_byte_costs_only_itself(tmp_path):
    path = tmp_path / "replies.jsonl"
    for text in "ab":
        add(ReplyLog(path), text, Reply("é\u2028"))
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        log = opened_quietly(path)
        complete = cut == len(whole) - 1  # nothing but the newline is missing
        assert (log.get(digest("b")) is not None) == complete
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            add(log, "c")
            again = ReplyLog(path)
        assert [again.get(digest(t)) is not None for t in "abc"] == [
            True,
            complete,
            True,
        ]
        torn = start < cut < len(whole) - 1
        assert ["line 2" in str(w.message) for w in caught] == [True] * torn


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"hash": "x", "mod', "Unterminated string"),
        (b"\xff\xfe", "can't decode byte"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"hash": "x"}', "field 'model' is missing or not a str"),
        (b"[" * 100_000, "recursion"),
        (b"\0\0\0\0", "Expecting value"),
    ],
)
def test_a_damaged_line_is_named_and_loses_no_other(tmp_path, line, problem):
    path = tmp_path / "replies.jsonl"
    for text in "abc":
        add(ReplyLog(path), text)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    with pytest.warns(UserWarning, match=rf"line 2 \(.*{problem}.*1 of 3 lines"):
        log = ReplyLog(path)
    assert [log.get(digest(t)) is not None for t in "abc"] == [True, False, True]


@pytest.mark.parametrize("field", ["hash", "model", "draw", "settings", "reply"])
def test_a_record_with_a_field_of_another_type_is_left_out(tmp_path, field):
    path = tmp_path / "replies.jsonl"
    add(ReplyLog(path), "a")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {field: None}) + "\n")
    with pytest.warns(UserWarning, match=f"'{field}' is missing"):
        assert len(ReplyLog(path)) == 0


@pytest.mark.parametrize("value", [None, -1, 2.5, "7", [7], 10**400])
def test_rubbish_counts_read_as_zero(value):
    fields = {"prompt_tokens": value, "completion_tokens": value}
    reply = judges._recorded_reply({"reply": "x"} | fields)
    assert (reply.prompt_tokens, reply.completion_tokens) == (0, 0)


def test_a_full_disk_is_an_error_and_the_next_line_starts_afresh(tmp_path, monkeypatch):
    log = ReplyLog(tmp_path / "replies.jsonl")
    add(log, "a")
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
        with pytest.raises(OSError, match="only part of a line"):
            add(log, "b")
    with pytest.warns(UserWarning, match="line 2"):
        add(log, "c")
        again = ReplyLog(log.path)
    assert [again.get(digest(t)) is not None for t in "abc"] == [True, False, True]


def test_threads_and_two_logs_on_one_file_lose_nothing(tmp_path):
    logs = [ReplyLog(tmp_path / "replies.jsonl") for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: add(logs[i % 2], f"{i}", Reply("x" * 9000)), range(60)))
    assert len(opened_quietly(logs[0].path)) == 60
    assert len(logs[0].path.read_bytes().splitlines()) == 60


def test_a_line_is_one_write_under_the_lock_of_the_file(tmp_path, monkeypatch):
    log, written, write = ReplyLog(tmp_path / "replies.jsonl"), [], os.write

    def noted(descriptor, data):
        written.append(bytes(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", noted)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(f"{log.path}.lock"):  # as another process would hold it
            adding = pool.submit(add, log, "a")
            time.sleep(0.1)
            assert not adding.done() and written == []
        adding.result()
    assert written == [log.path.read_bytes()]


# --- a recorded judge


def recorded(tmp_path, *sources):
    path = tmp_path / "replies.jsonl"
    for model, chosen in sources:
        ReplyLog(path).add(model, HELLO, chosen, 0, Reply(f"{model} {chosen}"))
    return path


def test_recorded_judge_replays_and_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    judge = RecordedJudge(recorded(tmp_path, ("m", {"t": 0.0})))
    assert (judge.model, judge.settings) == ("m", {"t": 0.0})
    assert judge.ask(HELLO) == Reply("m {'t': 0.0}", cached=True)
    assert str(judge.usage) == "0 asked, 1 from the log, 0 + 0 tokens"


def test_recorded_judge_says_what_is_missing_and_how_to_record_it(tmp_path):
    path = recorded(tmp_path, ("m", {"t": 0.0}))
    judge = RecordedJudge(path)
    with pytest.raises(JudgeError) as caught:
        judge.ask(HELLO, draw=3)
    missing = request_hash("m", HELLO, {"t": 0.0}, 3)
    for part in (missing, missing[:8], "to m:", "draw 3", f"log={str(path)!r}"):
        assert part in str(caught.value)
    assert not caught.value.fatal


def test_recorded_judge_takes_the_only_source_that_fits(tmp_path):
    path = recorded(tmp_path, ("m", {"t": 0.0}), ("m", {"t": 1.0}), ("n", {"t": 1.0}))
    assert RecordedJudge(path, model="n").settings == {"t": 1.0}
    assert RecordedJudge(path, settings={"t": 0.0}).model == "m"
    for choice in ({}, {"model": "m"}, {"model": "x"}, {"settings": {"t": 1}}):
        with pytest.raises(ValueError, match=r"'m' with .*'n' with \{'t': 1.0\}"):
            RecordedJudge(path, **choice)


def test_recorded_judge_needs_a_log(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no reply log at .*none\.jsonl"):
        RecordedJudge(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="the log is empty"):
        RecordedJudge(tmp_path / "empty.jsonl")


def test_recorded_judge_replays_what_a_server_said(serve, tmp_path):
    path = tmp_path / "replies.jsonl"
    said = judge_of(serve(echo), path, extra={"top_k": 5}).ask(HELLO)
    assert RecordedJudge(path).ask(HELLO).text == said.text == "re: Hello?"


# --- a server: what is sent, what comes back


def test_request_holds_the_settings_and_nothing_else(serve):
    server = serve(completion())
    judge_of(server, temperature=0.7, max_tokens=9).ask(ask_for("Hi"))
    assert server.requests == [
        {
            "model": "judge-1",
            "messages": ask_for("Hi"),
            "temperature": 0.7,
            "max_tokens": 9,
        }
    ]
    assert server.keys == [f"Bearer {KEY}"]


def test_a_whole_number_as_temperature_is_the_same_question(serve, tmp_path):
    server, log = serve(completion()), tmp_path / "replies.jsonl"
    for temperature in (0, 0.0):
        judge_of(server, log, temperature=temperature).ask(HELLO)
    assert len(server.requests) == 1


def test_settings_can_be_left_out_and_fields_added(serve):
    server = serve(completion())
    extra = {"generation_config": '{"do_sample": true}', "max_completion_tokens": 5}
    judge = judge_of(server, temperature=None, max_tokens=None, extra=extra)
    judge.ask(HELLO)
    assert judge.settings == {"extra": extra}
    assert server.requests == [{"model": "judge-1", "messages": HELLO} | extra]


def test_reply_usage_and_cost(serve):
    server = serve(completion("Ünï\u2028", "length", (1000, 200)))
    judge = judge_of(server, prices=(2.5, 10))
    reply = judge.ask(HELLO)
    assert reply == Reply("Ünï\u2028", 1000, 200, reply.cost, "length")
    assert reply.cost == pytest.approx(0.0045)
    judge.ask(HELLO)
    assert str(judge.usage) == "2 asked, 2,000 + 400 tokens, $0.0090"
    assert asdict(judge.usage)["completion_tokens"] == 400


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None}, [], "7"])
def test_a_server_that_counts_no_tokens_is_good_enough(serve, usage):
    reply = judge_of(serve(completion() | {"usage": usage}), prices=(1, 1)).ask(HELLO)
    assert reply == Reply("Fine.")


def test_an_empty_reply_is_a_reply(serve):
    assert judge_of(serve(completion("", usage=()))).ask(HELLO) == Reply("")


def test_half_a_surrogate_pair_in_a_reply_is_replaced(serve, tmp_path):
    body = json.dumps(completion("a\ud800b\U0001f600", "\udc00", usage=())).encode()
    expected = Reply("a?b\U0001f600", finish_reason="?")
    assert judge_of(serve(body), tmp_path / "log").ask(HELLO) == expected


# --- a server: faults


@pytest.mark.parametrize(
    "fault",
    [
        (429, error("slow down"), {"Retry-After": "0.01"}),
        (500, error("oops"), {}),
        (503, b"<html>busy</html>", {"Content-Type": "text/html"}),
        TRUNCATED,
    ],
)
def test_passing_faults_are_tried_again(serve, fault):
    server = serve(fault, fault, completion())
    assert judge_of(server).ask(HELLO).text == "Fine."
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ((500, error("oops"), {}), "HTTP 500: .*oops.*try again later"),
        ((429, error("quota"), {}), "HTTP 429: .*quota.*lower `concurrency`"),
        (TRUNCATED, r"connection to http://127\.0\.0\.1:\d+/v1 failed"),
    ],
)
def test_lasting_faults_end_in_an_error(serve, fault, problem):
    server = serve(fault)
    judge = judge_of(server, max_retries=2)
    with pytest.raises(JudgeError, match=problem) as caught:
        judge.ask(HELLO)
    assert len(server.requests) == 3
    short = request_hash("judge-1", HELLO, judge.settings)[:8]
    assert str(caught.value).startswith(f"request {short} to judge-1: ")
    assert judge.usage == Usage(failed=1) and not caught.value.fatal


def test_retry_after_is_obeyed(serve):
    server = serve((429, error("slow"), {"Retry-After": "0.3"}), completion())
    start = time.perf_counter()
    judge_of(server).ask(HELLO)
    assert time.perf_counter() - start > 0.3


def test_a_server_that_stalls_is_given_up(serve):
    judge = judge_of(serve(stall), timeout=0.1, max_retries=1)
    with pytest.raises(JudgeError, match=r"no reply within 0\.1 s, 2 times"):
        judge.ask(HELLO)


def test_a_server_that_is_not_there(serve):
    server = serve(completion())
    server.shutdown()
    server.server_close()
    url = server.url.replace("//", "//user:secret@") + "?token=secret"
    judge = OpenAIJudge("m", base_url=url, max_retries=0)
    with pytest.raises(JudgeError, match="is the server up") as caught:
        judge.ask(HELLO)
    assert "secret" not in told(caught.value) + repr(judge)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "not JSON"),
        (b"<html>Welcome</html>", "not JSON .* '<html>Welcome"),
        (b'{"choices": [{"message": {"content": "The answ', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"null", "no text"),
        (b"[1, 2]", "no text"),
        (b'"choices"', "no text"),
        (b"{}", "no text"),
        ({"choices": []}, "no text"),
        ({"choices": [{}]}, "no text"),
        ({"choices": [{"message": {}}]}, "no text"),
        ({"choices": {"0": 1}}, "no text"),
        (completion(None), "no text .*must speak chat completions"),
        (completion(["Fine."]), "no text"),
        (completion(None, "length"), "finish_reason 'length'.*raise max_tokens"),
        (
            {"choices": [{"message": {"content": None, "refusal": "I won't"}}]},
            'refusal "I won\'t"',
        ),
    ],
)
def test_rubbish_is_an_error_and_is_not_recorded(serve, tmp_path, body, problem):
    judge = judge_of(serve(body), tmp_path / "log")
    with pytest.raises(JudgeError, match=problem):
        judge.ask(HELLO)
    assert len(judge.log) == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "usage", "0"]), inner
        )
    ),
)


@given(st.text() | JSON.map(json.dumps))
def test_any_body_is_a_reply_or_a_judge_error(body):
    with contextlib.suppress(JudgeError):
        assert isinstance(judges._read_completion(body)["text"], str)


@pytest.mark.parametrize(
    ("status", "body", "parts"),
    [
        (400, error("Unknown field", param="top_k"), ["'top_k'", "Unknown field"]),
        (400, error("Unsupported: 'max_tokens'"), ["'max_tokens'", "max_tokens=None"]),
        (422, {"detail": "Unexpected fields: {'logprobs'}"}, ["logprobs", "`extra`"]),
        (413, b"", ["no explanation", "too long"]),
    ],
)
def test_a_refused_setting_is_named(serve, status, body, parts):
    server = serve((status, body, {}))
    with pytest.raises(JudgeError, match=f"HTTP {status}") as caught:
        judge_of(server).ask(HELLO)
    assert all(part in str(caught.value) for part in parts)
    assert len(server.requests) == 1


# --- the key


def told(failure):
    """All that printing an exception, or looking into it, could show."""
    texts, seen = ["".join(traceback.format_exception(failure))], failure
    while seen is not None:
        texts += [str(seen), repr(seen), repr(vars(seen))]
        seen = seen.__cause__ or seen.__context__
    return "\n".join(texts)


def shows(text, key):
    """True if eight letters of the key in a row stand in the text."""
    return any(key[i : i + 8] in text for i in range(len(key) - 7))


@pytest.mark.parametrize("key", [KEY, "sk-short"])
@pytest.mark.parametrize(
    "answer",
    [
        lambda key: (401, error(f"Incorrect API key provided: {key}"), {}),
        lambda key: (500, error(f"{'x' * 460} Bearer {key}"), {}),  # where it is cut
        lambda key: (400, error("no", param=key), {}),
        lambda key: (400, f"Bearer {key}".encode(), {"Content-Type": "text/plain"}),
        lambda key: (200, f"<html>{key}</html>".encode(), {}),
        lambda key: {"choices": [{"message": {"content": None, "refusal": key}}]},
    ],
)
def test_a_key_echoed_in_an_error_is_not_shown(serve, answer, key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    judge = judge_of(serve(answer(key)), max_retries=0)
    with pytest.raises(JudgeError) as caught:
        judge.ask(HELLO)
    assert not shows(told(caught.value) + repr(judge) + str(judge.usage), key)


@pytest.mark.parametrize("dash", ["-", "\\u002d", "\\u002D"])
def test_a_key_echoed_in_a_reply_is_not_recorded(serve, tmp_path, dash):
    body = json.dumps(completion(f"You sent {KEY}.")).replace("-", dash).encode()
    log = tmp_path / "replies.jsonl"
    reply = judge_of(serve(body), log).ask(HELLO)
    assert reply.text == "You sent [key]."
    assert not shows(log.read_text(), KEY)


def test_a_placeholder_key_is_left_in_replies(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    assert judge_of(serve(completion("EMPTY"))).ask(HELLO).text == "EMPTY"


def test_a_key_from_another_variable_and_none_at_all(serve, monkeypatch):
    server = serve(completion())
    monkeypatch.setenv("OTHER_KEY", f" {KEY[::-1]}\n")
    judge_of(server, api_key_env="OTHER_KEY").ask(HELLO)
    judge_of(server, api_key_env="NO_SUCH_KEY").ask(HELLO)
    assert server.keys == [f"Bearer {KEY[::-1]}", "Bearer none"]


def test_openai_itself_needs_a_key_unless_the_log_answers(tmp_path, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    judge = OpenAIJudge("m", log=tmp_path / "log", api_key_env="MY_KEY")
    with pytest.raises(
        JudgeError, match="set the environment variable MY_KEY"
    ) as caught:
        judge.ask(HELLO)
    assert caught.value.fatal
    judge.log.add("m", HELLO, judge.settings, 0, Reply("known"))
    assert judge.ask(HELLO) == Reply("known", cached=True)


def test_a_key_that_no_header_can_hold_is_not_shown(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\u2028" + KEY)
    with pytest.raises(JudgeError, match="OPENAI_API_KEY holds characters") as caught:
        judge_of(serve(completion())).ask(HELLO)
    assert KEY not in told(caught.value) and caught.value.fatal


def test_a_judge_without_openai_says_what_to_install(monkeypatch, serve):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(JudgeError, match="pip install openai"):
        judge_of(serve(completion())).ask(HELLO)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"base_url": "localhost:8000/v1"}, "http://"),
        ({"concurrency": 0}, "at least 1"),
        ({"extra": {"x": float("nan")}}, "JSON"),
        ({"extra": {"x": {1, 2}}}, "JSON"),
    ],
)
def test_unusable_options_are_refused_at_once(options, problem):
    with pytest.raises((ValueError, TypeError), match=problem):
        OpenAIJudge("m", **options)


# --- many questions


def questions(count, draws=1):
    return [(ask_for(f"{i}"), draw) for i in range(count) for draw in range(draws)]


def test_every_reply_comes_with_the_index_of_its_question(serve):
    def uneven(request):
        time.sleep(0.02 * (int(request["messages"][-1]["content"]) % 3))
        return echo(request)

    replies = list(ask_all(judge_of(serve(uneven)), questions(24)))
    assert sorted(i for i, _ in replies) == list(range(24))
    assert all(reply.text == f"re: {i}" for i, reply in replies)
    assert [i for i, _ in replies] != list(range(24)), "as they come, not in order"


@pytest.mark.parametrize("concurrency", [1, 4])
def test_no_more_than_concurrency_are_in_flight(serve, concurrency):
    server = serve(slow_echo)
    judge = judge_of(server, concurrency=concurrency)
    assert len(list(ask_all(judge, questions(20)))) == 20
    assert server.most_in_flight == concurrency


def test_a_second_run_asks_nothing_and_draws_are_separate(serve, tmp_path):
    server, log = serve(echo), tmp_path / "replies.jsonl"
    first = dict(ask_all(judge_of(server, log), questions(5, draws=3)))
    assert len(server.requests) == len(log.read_text().splitlines()) == 15
    judge = judge_of(server, log)
    second = dict(ask_all(judge, questions(5, draws=3)))
    assert len(server.requests) == 15
    assert {i: r.text for i, r in second.items()} == {
        i: r.text for i, r in first.items()
    }
    assert all(reply.cached for reply in second.values())
    assert judge.usage == Usage(cached=15)


@pytest.mark.parametrize(
    "changed", [{"temperature": 1.0}, {"max_tokens": 7}, {"extra": {"top_k": 1}}]
)
def test_other_settings_are_another_question(serve, tmp_path, changed):
    server, log = serve(completion()), tmp_path / "replies.jsonl"
    judge_of(server, log).ask(HELLO)
    judge_of(server, log, **changed).ask(HELLO)
    assert len(server.requests) == 2


def test_an_abandoned_run_goes_on_where_it_stopped(serve, tmp_path):
    server, log = serve(slow_echo), tmp_path / "replies.jsonl"
    run = ask_all(judge_of(server, log, concurrency=2), questions(30))
    for _ in range(5):
        next(run)
    run.close()
    settle(server)
    assert len(server.requests) < 12, "what had not started is cancelled"
    assert len(list(ask_all(judge_of(server, log), questions(30)))) == 30
    assert sorted(server.asked(), key=int) == [str(i) for i in range(30)]


def settle(server):
    """Wait until a client has nothing in flight for a while."""
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 0.2:
        time.sleep(0.01)
        if server.in_flight:
            quiet_since = time.monotonic()


def test_closing_the_run_cancels_what_waits():
    class Waiting:
        model, settings, concurrency = "m", {}, 2
        started, go_on = [], threading.Event()

        def ask(self, messages, draw=0):
            self.started.append(draw)
            if draw:
                self.go_on.wait(5)
            return Reply("x")

    run = ask_all(Waiting(), [(HELLO, draw) for draw in range(9)])
    assert next(run) == (0, Reply("x"))
    until = time.monotonic() + 5
    while len(Waiting.started) < 3 and time.monotonic() < until:
        time.sleep(0.01)  # the first one's thread takes what is next
    run.close()
    Waiting.go_on.set()
    time.sleep(0.1)
    assert sorted(Waiting.started) == [0, 1, 2]


def test_questions_are_taken_only_as_they_are_asked(serve):
    class Counted(list):
        taken = 0

        def __iter__(self):
            for item in super().__iter__():
                self.taken += 1
                yield item

    many = Counted(questions(1) * 100_000)
    run = ask_all(judge_of(serve(echo), concurrency=2), many)
    next(run)
    run.close()
    assert many.taken <= 8


def test_one_failure_loses_no_other_reply(serve):
    def fails_at_3(request):
        if request["messages"][-1]["content"] == "3":
            return (400, error("no"), {})
        return echo(request)

    judge = judge_of(serve(fails_at_3))
    requests = [*questions(6), ("no messages", 0)]
    replies = dict(ask_all(judge, requests))
    failed = {i for i, reply in replies.items() if isinstance(reply, JudgeError)}
    assert failed == {3, 6} and len(replies) == 7
    assert [replies[i].text for i in (0, 5)] == ["re: 0", "re: 5"]


def after_4(then):
    """Echoes the questions 0 to 3; `then(request)` answers the others."""

    def say(request):
        time.sleep(0.01)
        number = int(request["messages"][-1]["content"])
        return echo(request) if number < 4 else then(request)

    return say


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (401, None, "environment variable OPENAI_API_KEY"),
        (402, None, "no credit left: add some and run again"),
        (404, None, "the model's name"),
        (429, "insufficient_quota", "no credit left: add some and run again"),
    ],
)
def test_a_refusal_that_meets_all_stops_at_once(serve, status, code, advice):
    refusal = (status, error("no such thing", code=code), {})
    server, replies = serve(after_4(lambda request: refusal)), []
    judge = judge_of(server, concurrency=2, max_retries=0)
    with pytest.raises(JudgeError, match=f"HTTP {status}.*{advice}") as caught:
        replies.extend(ask_all(judge, questions(50)))
    assert caught.value.fatal and "in a row" not in str(caught.value)
    assert len(replies) == 4
    settle(server)
    assert len(server.requests) <= 10


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (lambda request: (500, error("oops"), {}), "HTTP 500: .*oops"),
        (lambda request: (429, error("slow down"), {}), "HTTP 429: .*slow down"),
        (lambda request: (403, error("limit exceeded"), {}), "HTTP 403: .*limit"),
        (stall, "no reply within 0.05 s"),
    ],
    ids=["broken", "busy", "closed", "slow"],
)
def test_a_server_that_answers_no_more_stops_the_run(serve, then, said):
    server, found = serve(after_4(then)), {}
    judge = judge_of(server, concurrency=1, max_retries=0, timeout=0.05)
    message = f"3 requests in a row brought no reply; the last .*{said}.*run again"
    with pytest.raises(JudgeError, match=message) as caught:
        for i, outcome in ask_all(judge, questions(50)):
            found[i] = outcome
    assert caught.value.fatal
    assert [isinstance(found[i], Reply) for i in range(6)] == [True] * 4 + [False] * 2


def test_a_prompt_that_is_refused_fails_alone(serve):
    """Some servers flag single prompts with a 403, be they the very first."""

    def flags(request):
        flagged = request["messages"][-1]["content"] in ("0", "3", "4")
        return (403, error("flagged"), {}) if flagged else echo(request)

    judge = judge_of(serve(flags), concurrency=1)
    found = dict(ask_all(judge, questions(8)))
    failed = [i for i, outcome in found.items() if isinstance(outcome, JudgeError)]
    assert failed == [0, 3, 4] and len(found) == 8
    assert all(found[i].refused and not found[i].fatal for i in failed)


def test_a_key_that_may_nothing_stops_the_run(serve):
    server = serve((403, error("not yours"), {}))
    with pytest.raises(JudgeError, match="HTTP 403.*check the key") as caught:
        list(ask_all(judge_of(server, concurrency=1), questions(50)))
    assert caught.value.fatal and "in a row" not in str(caught.value)
    settle(server)
    assert len(server.requests) <= 5


def test_good_replies_are_yielded_before_a_fatal_refusal():
    class Half:
        model, settings, concurrency = "m", {}, 9

        def ask(self, messages, draw=0):
            if draw % 2:
                raise JudgeError("refused", fatal=True)
            return Reply("paid for")

    class Hesitant(list):
        def __iter__(self):
            yield from super().__iter__()
            time.sleep(0.05)  # until all are done, and come back together

    replies = []
    with pytest.raises(JudgeError, match="refused"):
        replies.extend(ask_all(Half(), Hesitant((HELLO, draw) for draw in range(9))))
    assert sorted(i for i, _ in replies) == [0, 2, 4, 6, 8]


class Flaky:
    """Answers the requests named; finds no server for the others."""

    model, settings, concurrency = "flaky", {}, 1

    def __init__(self, up):
        self.up, self.asked = up, []

    def ask(self, messages, draw=0):
        number = int(messages[-1]["content"])
        self.asked.append(number)
        if number not in self.up:
            raise JudgeError(f"request {number}: no connection", unreachable=True)
        return Reply("yes")


def test_a_server_that_is_gone_stops_the_run_and_loses_nothing():
    judge, found = Flaky(up={0, 1, 4}), {}
    with pytest.raises(JudgeError, match="3 requests in a row brought no.*again"):
        for i, outcome in ask_all(judge, questions(50)):
            found[i] = outcome
    assert {i for i, outcome in found.items() if isinstance(outcome, Reply)} == {
        0,
        1,
        4,
    }
    assert len(judge.asked) <= 9  # two lost at 2 and 3 are no reason to stop


def test_a_dead_server_is_told_from_a_bad_reply():
    judge = OpenAIJudge("m", "http://127.0.0.1:9/v1", max_retries=0)
    outcomes = []
    with pytest.raises(
        JudgeError, match="brought no reply.*is the server up"
    ) as caught:
        outcomes.extend(ask_all(judge, questions(100)))
    assert caught.value.fatal and len(outcomes) == judge.concurrency


def test_a_bug_in_a_judge_is_not_taken_for_its_silence():
    class Broken:
        model, settings, concurrency = "m", {}, 2

        def ask(self, messages, draw=0):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(ask_all(Broken(), questions(3)))


def test_the_bar_shows_tokens_and_cost(serve, capsys):
    judge = judge_of(serve(completion(usage=(1000, 500))), prices=(1, 2))
    list(ask_all(judge, questions(4), progress="judging"))
    shown = capsys.readouterr().err
    assert "judging: 100%" in shown
    assert "4 asked, 4,000 + 2,000 tokens, $0.0080" in shown
    list(ask_all(judge, questions(4)))
    assert capsys.readouterr().err == ""


def test_no_questions_no_answers(serve):
    assert list(ask_all(judge_of(serve(echo)), [])) == []


# --- models of this process


def test_local_judge_says_what_sampling_says(policy, tokenizer):
    from starling_lib.rollouts import sample

    judge = LocalJudge(policy, tokenizer, temperature=1.0, max_new_tokens=12)
    draws = [judge.ask(HELLO, draw) for draw in (0, 1, 0)]
    options = {"temperature": 1.0, "max_new_tokens": 12}
    rollout = sample(policy, tokenizer, [HELLO], seed=1, **options)
    assert draws[1].text == rollout.texts[0]
    assert draws[1].prompt_tokens == int(rollout.prompt_mask.sum())
    assert draws[1].completion_tokens == int(rollout.lengths[0])
    assert draws[0] == draws[2] and draws[0].text != draws[1].text
    assert (judge.model, judge.settings) == ("tiny", options)


def test_local_judge_tells_an_ended_reply_from_a_cut_one(policy, tokenizer):
    judge = LocalJudge(policy, tokenizer, temperature=1.0, max_new_tokens=40)
    replies = [judge.ask(HELLO, draw) for draw in range(12)]
    full = [reply.completion_tokens == 40 for reply in replies]
    assert [reply.finish_reason for reply in replies] == [
        "length" if cut else "stop" for cut in full
    ]
    assert 0 < sum(full) < 12


def test_local_judge_resumes_from_its_log(tmp_path, monkeypatch):
    options = {"temperature": 1.0, "max_new_tokens": 4, "log": tmp_path / "log"}
    first = dict(ask_all(LocalJudge("tiny", **options), questions(3, draws=2)))
    monkeypatch.setattr("starling_lib.rollouts.sample", None)  # nothing may be sampled
    judge = LocalJudge("tiny", **options)
    second = dict(ask_all(judge, questions(3, draws=2)))
    assert [second[i].text for i in range(6)] == [first[i].text for i in range(6)]
    assert judge.usage == Usage(cached=6)
    assert RecordedJudge(tmp_path / "log").model == "tiny"


def test_local_judge_refuses_what_does_not_fit(policy, tokenizer):
    judge = LocalJudge(policy, tokenizer, max_new_tokens=2000)
    with pytest.raises(JudgeError, match=r"\d+ tokens and the model room for 2048"):
        judge.ask(ask_for("x" * 100))


def test_models_of_unknown_origin_need_their_tokenizer(policy, reward_model):
    for make, model in ((LocalJudge, policy), (RewardJudge, reward_model)):
        with pytest.raises(ValueError, match="give the tokenizer"):
            make(model)


RESPONSES = ["Fine, thanks.", "No.", "Hello! How are you?", "a" * 30]


def test_reward_judge_ranks_by_score(reward_model, tokenizer):
    from starling_lib.reward import score_responses

    judge = RewardJudge(reward_model, tokenizer, name="rm")
    known = score_responses(reward_model, tokenizer, [HELLO] * 4, RESPONSES)
    assert judge.score([HELLO] * 4, RESPONSES) == known.tolist()
    ranking = judge.rank(HELLO, RESPONSES)
    assert ranking == known.argsort(descending=True).tolist()
    assert judge.model == "rm" and not hasattr(judge, "ask")


def test_reward_judge_follows_the_responses_not_their_places(reward_model, tokenizer):
    judge = RewardJudge(reward_model, tokenizer)
    ranking = judge.rank(HELLO, RESPONSES)
    turned = judge.rank(HELLO, RESPONSES[::-1])
    assert [RESPONSES[i] for i in ranking] == [RESPONSES[::-1][i] for i in turned]
    assert judge.rank(HELLO, ["No."] * 3) == [0, 1, 2], "ties keep their order"


def test_reward_judge_sees_which_responses_were_cut(reward_model, tokenizer):
    judge = RewardJudge(reward_model, tokenizer)
    ended, cut = (judge.score([HELLO], ["No."], [flag]) for flag in (True, False))
    assert ended == judge.score([HELLO], ["No."]) != cut


def test_reward_judge_does_not_rank_nan(reward_model, tokenizer):
    reward_model.score.weight.data.fill_(float("nan"))
    with pytest.raises(JudgeError, match="response 0 scores NaN"):
        RewardJudge(reward_model, tokenizer).rank(HELLO, RESPONSES)


# --- slow: kills, and a server that is not ours

WRITER = """
import sys
from starling_lib.judges import Reply, ReplyLog
log, name = ReplyLog(sys.argv[1]), sys.argv[2]
for i in range(int(sys.argv[3])):
    log.add("m", [{"role": "user", "content": name + str(i)}], {}, 0, Reply("x" * 20_000))
    print(i, flush=True)
"""


def writer(path, name, count):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_kills_lose_no_reply_that_was_written_down(tmp_path):
    """One process writes on while another is killed, five times, at any moment."""
    path = tmp_path / "replies.jsonl"
    steady = writer(path, "steady", 600)
    acknowledged = []
    for n in range(5):
        victim = writer(path, f"victim{n}-", 10_000)
        lines = [victim.stdout.readline() for _ in range(20 + 7 * n)]
        victim.send_signal(signal.SIGKILL)
        lines += victim.communicate()[0].splitlines()
        acknowledged += [f"victim{n}-{int(line)}" for line in lines if line.strip()]
    acknowledged += [
        f"steady{int(i)}" for i in steady.communicate(timeout=120)[0].split()
    ]
    assert steady.returncode == 0 and len(acknowledged) >= 600 + 5 * 20
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log = ReplyLog(path)
    asked = [[{"role": "user", "content": name}] for name in acknowledged]
    replies = [log.get(request_hash("m", messages, {})) for messages in asked]
    assert all(reply is not None and len(reply.text) == 20_000 for reply in replies)
    assert len(log) <= len(acknowledged) + 5, "at most one more for each kill"
    assert len(caught) <= 1 and path.read_bytes().count(b"\n") <= len(log) + 5


@pytest.fixture(scope="module")
def smollm2_server(tmp_path_factory):
    """URL of `transformers serve` and the folder of the model it is asked for."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package)
    from starling_lib.models import load_policy, load_tokenizer

    folder = tmp_path_factory.mktemp("served") / "smollm2"
    load_policy("smollm2-135m").save_pretrained(folder)
    load_tokenizer("smollm2-135m").save_pretrained(folder)
    with transformers_server(tmp_path_factory.mktemp("log") / "server.log") as url:
        yield url, str(folder)


@pytest.mark.slow
def test_transformers_own_server_answers(smollm2_server, tmp_path):
    url, model = smollm2_server
    settings = {"do_sample": False, "max_new_tokens": 12}
    extra = {"generation_config": json.dumps(settings)}
    options = {"base_url": url, "max_tokens": None, "timeout": 300, "max_retries": 0}
    judge = OpenAIJudge(model, log=tmp_path / "log", extra=extra, **options)
    reply = judge.ask(ask_for("What is the capital of France? One word."))
    assert "Paris" in reply.text
    assert reply.prompt_tokens > 10 and 0 < reply.completion_tokens <= 12
    cut = OpenAIJudge(model, **options | {"max_tokens": 3}).ask(HELLO)
    assert cut.completion_tokens == 3 and cut.finish_reason == "length"
    with pytest.raises(JudgeError, match="HTTP 422.*top_k"):
        OpenAIJudge(model, extra={"top_k": 5}, **options).ask(HELLO)
