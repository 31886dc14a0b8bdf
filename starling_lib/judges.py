"""Asking something for feedback: a server, a local model, a reward model, a log.

Knows how to ask one question (`Judge.ask`), how to ask many at once (`ask_all`), and
how to keep every reply on disk (`ReplyLog`), so that a killed run asks nothing twice
and a report replays without a key. Does not know what is asked: prompts, rankings and
the parsing of replies belong to `labeling`.

A request is the messages, the model's name, the sampling settings and a `draw` index:
the same request has one reply for ever, and the next draw is a new question. Keys come
from the environment only; they reach no hash, log, message or `repr`.
"""

import hashlib
import json
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from filelock import FileLock
from tqdm.auto import tqdm

from starling_lib.chat import Message

if TYPE_CHECKING:
    from openai import APIError, OpenAI
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Request = tuple[list[Message], int]  # messages and draw


@dataclass(frozen=True)
class Reply:
    """What a judge said. `cost` is in US dollars, 0 where no prices are known."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    finish_reason: str = "stop"  # "length": cut off at the token limit
    cached: bool = False  # read from a log: nothing was asked


class JudgeError(RuntimeError):
    """No usable reply; the message names the request, what happened and what to do.

    `fatal` says that no other request can succeed either (a refused key, an unknown
    model, no credit): `ask_all` stops at once. `unreachable`: there was no server that
    would answer; several of these in a row stop it too. `refused`: the server will not
    answer this request, however often it is asked.
    """

    def __init__(
        self,
        message: str,
        fatal: bool = False,
        unreachable: bool = False,
        refused: bool = False,
    ):
        super().__init__(message)
        self.fatal = fatal
        self.unreachable = unreachable
        self.refused = refused


class Judge(Protocol):
    """Anything that answers messages; `model` and `settings` go into every hash."""

    model: str
    concurrency: int  # how many `ask` may run at once

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able sampling settings; never a key, never an endpoint."""

    def ask(self, messages: list[Message], draw: int = 0) -> Reply:
        """One reply; the same messages and draw have the same one. Raises JudgeError."""


@dataclass
class Usage:
    """Running totals of one judge or one run; safe to count in from many threads.

    Tokens and cost are of what was asked, not of what came from a log.
    """

    asked: int = 0
    cached: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def __post_init__(self):
        self._lock = threading.Lock()  # no field: `asdict` could not copy it

    def count(self, outcome: Reply | JudgeError) -> None:
        """Add one outcome to the totals."""
        with self._lock:
            if isinstance(outcome, JudgeError):
                self.failed += 1
            elif outcome.cached:
                self.cached += 1
            else:
                self.asked += 1
                self.prompt_tokens += outcome.prompt_tokens
                self.completion_tokens += outcome.completion_tokens
                self.cost += outcome.cost

    def __str__(self) -> str:
        parts = [f"{self.asked:,} asked"]
        parts += [f"{self.cached:,} from the log"] * bool(self.cached)
        parts += [f"{self.failed:,} failed"] * bool(self.failed)
        parts += [f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens"]
        parts += [f"${self.cost:,.4f}"] * bool(self.cost)
        return ", ".join(parts)


# --- requests


def request_hash(
    model: str,
    messages: Sequence[Message],
    settings: Mapping[str, Any],
    draw: int = 0,
) -> str:
    """SHA-256 (hex) of a request as canonical JSON: sorted keys, compact, UTF-8.

    Raises ValueError or TypeError on settings that JSON cannot hold.
    """
    request = {"model": model, "messages": list(messages)}
    text = _canonical(request | {"settings": dict(settings), "draw": int(draw)})
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(
        value,
        sort_keys=True,
        ensure_ascii=False,
        separators=(",", ":"),
        allow_nan=False,
    )


def _checked(messages: Sequence[Message]) -> list[Message]:
    """The messages as a list of plain dicts. Raises JudgeError on anything else."""
    if isinstance(messages, str | Mapping) or not messages:
        raise JudgeError(
            "messages must be a non-empty list of {'role': ..., 'content': ...}, "
            f"not {type(messages).__name__} {str(messages)[:40]!r}"
        )
    for i, message in enumerate(messages):
        if problem := _problem_of(message):
            raise JudgeError(f"message {i}: {problem}")
    return [dict(message) for message in messages]


def _problem_of(message: Any) -> str | None:
    """What makes a message unfit to send; None for a good one."""
    if not isinstance(message, Mapping):
        return f"needs 'role' and 'content', is {type(message).__name__}"
    if set(message) != {"role", "content"}:
        return f"needs just 'role' and 'content', has {sorted(map(str, message))}"
    for name, value in message.items():
        if not isinstance(value, str):
            return f"{name!r} must be text, not {type(value).__name__}"
        if (place := _lone_surrogate(value)) is not None:
            return (
                f"{name!r} has half a surrogate pair at character {place}, which UTF-8 "
                "cannot hold: remove or replace it"
            )
    return None


def _lone_surrogate(text: str) -> int | None:
    """Position of the first character that UTF-8 cannot hold; None if all is well."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


# --- the log of replies

_RECORD_FIELDS = {
    "hash": str,
    "model": str,
    "draw": int,
    "settings": dict,
    "request": list,
    "reply": str,
}


class ReplyLog:
    """Every request and its reply, one JSON object a line, in a file that only grows.

    Threads and processes may share the file, and a kill at any moment costs at most the
    reply being written: a line is one `os.write` at the end of the file under a lock,
    a torn last line is passed over, and the next line starts afresh. A damaged line is
    left out with a warning that names it. The first record of a request counts.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.sources: dict[str, tuple[str, dict]] = {}  # (model, settings) by JSON
        self._replies: dict[str, Reply] = {}
        self._lock = threading.Lock()
        self._end = self._lines = 0  # bytes and lines read so far, whole lines only
        with self._lock:
            self._catch_up()

    def __len__(self) -> int:
        return len(self._replies)

    def __repr__(self) -> str:
        return f"ReplyLog({str(self.path)!r}, {len(self):,} replies)"

    def usage(self) -> Usage:
        """What all its replies took together, whichever run asked for them."""
        total = Usage()
        with self._lock:
            for reply in self._replies.values():
                total.count(reply)
        return total

    def get(self, digest: str) -> Reply | None:
        """The reply to the request with this hash, `cached=True`; None if unknown."""
        with self._lock:
            if digest not in self._replies:
                self._catch_up()  # another process may have asked meanwhile
            reply = self._replies.get(digest)
        return reply and replace(reply, cached=True)

    def add(
        self,
        model: str,
        messages: Sequence[Message],
        settings: Mapping[str, Any],
        draw: int,
        reply: Reply,
        reconstructed: bool = False,
    ) -> Reply:
        """Record a reply and return what the log now holds for this request.

        That is an earlier reply where there was one: then nothing is written.
        `reconstructed` marks a reply that nobody gave in these words. Raises ValueError
        on text that UTF-8 cannot hold, OSError when the disk does not take the line.
        """
        digest = request_hash(model, messages, settings, draw)
        record = {"hash": digest, "model": model, "draw": int(draw)}
        record |= {"settings": dict(settings), "request": list(messages)}
        counted = asdict(reply)
        record |= {"reply": counted.pop("text")} | counted
        del record["cached"]
        record |= {"reconstructed": True} if reconstructed else {}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, FileLock(f"{self.path}.lock"):
            self._catch_up()
            if digest not in self._replies:
                _append_line(self.path, line)
            return self._replies.setdefault(digest, reply)

    def _catch_up(self) -> None:
        """Read the lines that were appended since the last reading."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._end:  # deleted, or another file put in its place
            self._end = self._lines = 0
        if size == self._end:
            return
        damaged = []
        with self.path.open("rb") as file:
            file.seek(self._end)
            for line in file:
                problem = self._take(line)
                if not line.endswith(b"\n"):
                    break  # torn, or still being written: look again later
                self._lines += 1
                self._end += len(line)
                if problem:
                    damaged.append(f"line {self._lines} ({problem})")
        if damaged:
            warnings.warn(
                f"{self.path}: {'; '.join(damaged[:5])}"
                f"{' …' if len(damaged) > 5 else ''}: {len(damaged)} of {self._lines} "
                "lines hold no reply (a run that was killed leaves one) and are left "
                "out; their requests will be asked again",
                stacklevel=4,
            )

    def _take(self, line: bytes) -> str | None:
        """Keep the reply that a line holds; return what is wrong with the line."""
        if not line.strip():
            return None
        try:
            record = _read_record(line)
            source = record["model"], record["settings"]
            name, reply = _canonical(source), _recorded_reply(record)
        except (ValueError, OverflowError, RecursionError) as error:
            return str(error)
        self.sources.setdefault(name, source)
        self._replies.setdefault(record["hash"], reply)
        return None


def _recorded_reply(record: Mapping[str, Any]) -> Reply:
    cost = record.get("cost")
    return Reply(
        text=record["reply"],
        prompt_tokens=_count(record.get("prompt_tokens")),
        completion_tokens=_count(record.get("completion_tokens")),
        cost=float(cost) if isinstance(cost, int | float) else 0.0,
        finish_reason=str(record.get("finish_reason", "stop")),
    )


def _read_record(line: bytes) -> dict[str, Any]:
    """The object on a line of a log. Raises ValueError that says what is wrong."""
    record = json.loads(line.rstrip(b"\r\n").decode())
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    for name, kind in _RECORD_FIELDS.items():
        if not isinstance(record.get(name), kind):
            raise ValueError(f"field {name!r} is missing or not a {kind.__name__}")
    return record


def _append_line(path: Path, line: bytes) -> None:
    """Write a line at the end of a file at one go, on a line of its own."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o644)
    try:
        if os.lseek(descriptor, 0, os.SEEK_END) > 0:
            os.lseek(descriptor, -1, os.SEEK_END)
            if os.read(descriptor, 1) != b"\n":
                line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(f"{path}: the disk took only part of a line; is it full?")
    finally:
        os.close(descriptor)


def _count(value: Any) -> int:
    """A number of tokens as some servers give it, and 0 as others do not."""
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0


# --- judges


class LoggedJudge:
    """A judge that looks into its log before asking and writes the reply down after.

    Subclasses say how to ask: `_reply(messages, draw)`. `usage` sums up what was asked.
    """

    def __init__(
        self,
        model: str,
        settings: Mapping[str, Any],
        log: "str | os.PathLike | ReplyLog | None" = None,
        concurrency: int = 1,
    ):
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency}: must be at least 1")
        _canonical(dict(settings))  # raises here rather than at the first request
        self.model = model
        self.concurrency = concurrency
        self.log = log if isinstance(log, ReplyLog | None) else ReplyLog(log)
        self.usage = Usage()
        self._settings = dict(settings)

    @property
    def settings(self) -> dict[str, Any]:
        """A copy of the sampling settings, as they go into every hash."""
        return dict(self._settings)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self.model!r}, settings={self.settings})"

    def ask(self, messages: list[Message], draw: int = 0) -> Reply:
        """The reply in the log, or a new one, which is then in the log.

        Raises JudgeError; its message starts with the first letters of the hash.
        """
        messages = _checked(messages)
        digest = request_hash(self.model, messages, self.settings, draw)
        known = self.log.get(digest) if self.log is not None else None
        if known is not None:
            self.usage.count(known)
            return known
        try:
            reply = self._reply(messages, draw)
        except JudgeError as error:
            self.usage.count(error)
            message = f"request {digest[:8]} to {self.model}: {error}"
            kinds = error.fatal, error.unreachable, error.refused
            raise JudgeError(message, *kinds) from None
        self.usage.count(reply)
        if self.log is None:
            return reply
        return self.log.add(self.model, messages, self.settings, draw, reply)

    def _reply(self, messages: list[Message], draw: int) -> Reply:
        raise NotImplementedError


class RecordedJudge(LoggedJudge):
    """Replays a reply log and asks nobody: no key, no network, no model.

    `model` and `settings` default to those of the log if it was recorded with just one
    combination. Raises FileNotFoundError without a log, ValueError (listing what the
    log holds) when the choice is open; a request that was not recorded is a JudgeError.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        model: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no reply log at {path}")
        log = ReplyLog(path)
        if model is None or settings is None:
            model, settings = _only_source(log, model, settings)
        super().__init__(model, settings, log)

    def _reply(self, messages: list[Message], draw: int) -> Reply:
        raise JudgeError(
            f"{self.log.path} holds no reply to this request (draw {draw}, hash "
            f"{request_hash(self.model, messages, self.settings, draw)}); record it by "
            f"one run with OpenAIJudge({self.model!r}, log={str(self.log.path)!r}) at "
            f"settings {self.settings}"
        )


def _only_source(
    log: ReplyLog, model: str | None, settings: Mapping[str, Any] | None
) -> tuple[str, dict]:
    """The one (model, settings) of a log that fits what the caller already chose."""
    fitting = [
        (name, chosen)
        for name, chosen in log.sources.values()
        if model in (None, name)
        and (settings is None or _canonical(settings) == _canonical(chosen))
    ]
    if len(fitting) != 1:
        held = "; ".join(f"{n!r} with {s}" for n, s in log.sources.values())
        raise ValueError(
            f"{log.path}: {len(fitting)} recorded judges fit model={model!r}, "
            f"settings={settings}; choose one of: {held or 'nothing (the log is empty)'}"
        )
    return fitting[0]


# Shorter keys are placeholders of local servers ("EMPTY"); such a word may well stand
# in a reply, and is blotted out of errors only.
_SECRET_LENGTH = 12
_NO_KEY = "none"
_ADVICE = {
    400: "if it names a setting, change it: temperature=None and max_tokens=None are "
    "not sent at all, `extra` adds fields",
    401: "check the key in the environment variable {key_name}",
    402: "the account has no credit left: add some and run again; what was answered is "
    "in the log, if there is one",
    403: "check the key in the environment variable {key_name} and what it may use; some "
    "servers refuse a prompt so",
    404: "check the model's name and base_url (it usually ends in /v1)",
    413: "the request is too long for this server",
    429: "lower `concurrency`, or wait: what was answered is in the log, if there is one",
}
_ADVICE[422] = _ADVICE[400]
_FATAL = {401, 402, 404}
_REFUSED = {400, 403, 413, 422}
_CLOSED = {403, 408, 429}  # and 5xx
# A 403 is about the key or, from some servers, about one prompt: which, the first reply
# shows. Before it, so many failures are taken for prompts.
_DOUBTFUL = 2


class OpenAIJudge(LoggedJudge):
    """A model behind any server that speaks OpenAI's chat completions.

    Args:
        model: its name on the server.
        base_url: the server, such as "http://127.0.0.1:8000/v1"; None is OpenAI.
        log: file that keeps every reply; a killed run goes on from it.
        temperature, max_tokens: sent as they are; None leaves the field out.
        concurrency: requests in flight at once under `ask_all`.
        timeout: seconds to wait for one reply.
        max_retries: more attempts after 429, 5xx, a timeout or a broken connection,
            with the client's growing pauses or the server's Retry-After.
        prices: US dollars for a million (prompt, completion) tokens.
        extra: more fields of the request's body (openai's `extra_body`); part of the
            settings, so it is logged. transformers' own server takes sampling settings
            only in {"generation_config": "<JSON text>"}.
        api_key_env: environment variable that holds the key. It is sent to `base_url`
            too; a server that wants none may go without.

    The key is looked up at the first request that the log does not answer. Asking
    raises JudgeError, also for a reply without text; an empty or a cut reply
    (`finish_reason="length"`) is returned as it is.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        log: "str | os.PathLike | ReplyLog | None" = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = 2048,
        concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 5,
        prices: tuple[float, float] | None = None,
        extra: Mapping[str, Any] | None = None,
        api_key_env: str = "OPENAI_API_KEY",
    ):
        settings: dict[str, Any] = {}
        if temperature is not None:
            settings["temperature"] = float(temperature)  # 0 and 0.0 hash the same
        if max_tokens is not None:
            settings["max_tokens"] = int(max_tokens)
        if base_url and not base_url.startswith(("http://", "https://")):
            raise ValueError("base_url must begin with http:// or https://")
        self._sampling = dict(settings)
        self._extra = dict(extra or {})
        settings |= {"extra": self._extra} if self._extra else {}
        super().__init__(model, settings, log, concurrency)
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        self.timeout, self.max_retries = timeout, max_retries
        self.prices = prices or (0.0, 0.0)
        self.api_key_env = api_key_env
        self._client: OpenAI | None = None
        self._connecting = threading.Lock()

    def _reply(self, messages: list[Message], draw: int) -> Reply:
        body, key = self._post(messages), self._secret()
        if len(key) >= _SECRET_LENGTH:
            body = _without_key(body, key)
        try:
            reply = Reply(**_read_completion(body))
        except JudgeError as error:
            problem = _without_key(str(error), key)
        else:
            tokens = reply.prompt_tokens, reply.completion_tokens
            cost = sum(n * price for n, price in zip(tokens, self.prices, strict=True))
            return replace(reply, cost=cost / 1e6)
        # Not within the `except`: no exception on the way may hold the key either.
        raise JudgeError(problem)

    def _post(self, messages: list[Message]) -> str:
        """The body of the server's answer, whatever it holds."""
        client = self._connect()
        from openai import APIError

        try:
            # The raw body: the client's own parser passes rubbish through unchecked.
            return client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=messages,
                extra_body=self._extra or None,
                **self._sampling,
            ).http_response.text
        except APIError as error:
            failure = self._explain(error)
        # Not within the `except`: the client's exception holds the request's headers.
        raise failure

    def _connect(self) -> "OpenAI":
        with self._connecting:
            if self._client is None:
                try:
                    from openai import OpenAI
                except ImportError:
                    raise JudgeError(
                        "asking a server needs the package openai: pip install openai",
                        fatal=True,
                    ) from None
                self._client = OpenAI(
                    api_key=self._key(),
                    base_url=self.base_url,
                    timeout=self.timeout,
                    max_retries=self.max_retries,
                )
            return self._client

    def _secret(self) -> str:
        """What no text may show: the key that is sent, as long as it is one."""
        key = self._client.api_key
        return "" if key == _NO_KEY else key

    def _key(self) -> str:
        """The key in the environment, or what stands for none. Raises JudgeError."""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and not self.base_url:
            raise JudgeError(
                f"no key: set the environment variable {self.api_key_env}, or give the "
                "base_url of a server that needs none",
                fatal=True,
            )
        if not (key.isascii() and key.isprintable()):
            raise JudgeError(
                f"the key in {self.api_key_env} holds characters that no HTTP header "
                "can carry (not shown): copy it again",
                fatal=True,
            )
        return key or _NO_KEY

    def _explain(self, error: "APIError") -> JudgeError:
        """What went wrong in words, without the key."""
        from openai import APIStatusError, APITimeoutError

        if isinstance(error, APITimeoutError):
            return JudgeError(
                f"no reply within {self.timeout:g} s, {self.max_retries + 1} times: "
                "raise `timeout`, or lower `concurrency` or max_tokens",
                unreachable=True,
            )
        if not isinstance(error, APIStatusError):
            where = _shown(self.base_url)
            message = f"the connection to {where} failed: is the server up?"
            return JudgeError(message, unreachable=True)
        status = error.status_code
        spent = error.code == "insufficient_quota"  # as some servers say 402
        busy = "try again later: the server could not answer"
        advice = _ADVICE.get(402 if spent else status, busy)
        said = error.response.text.strip() or "no explanation"
        if error.param:
            said = f"parameter {error.param!r}: {said}"
        said = _without_key(said, self._secret())[:500]  # in this order
        return JudgeError(
            f"HTTP {status}: {said} [{advice.format(key_name=self.api_key_env)}]",
            fatal=spent or status in _FATAL or (status == 403 and self._is_closed()),
            unreachable=status in _CLOSED or status >= 500,
            refused=status in _REFUSED,
        )

    def _is_closed(self) -> bool:
        """Whether nothing was answered, and that not by chance."""
        return not self.usage.asked and self.usage.failed >= _DOUBTFUL


def _without_key(text: str, key: str) -> str:
    """The text with every copy of the key blotted out, JSON-escaped ones too."""
    if not key:
        return text
    escaped = (rf"(?:\\?{re.escape(c)}|\\u00{ord(c):02x})" for c in key)
    return re.sub("".join(escaped), "[key]", text, flags=re.IGNORECASE)


def _shown(url: str | None) -> str:
    """Where a URL points to, without the user, password or query it may carry."""
    if not url:
        return "the OpenAI server"
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _read_completion(body: str) -> dict[str, Any]:
    """Text, token counts and finish reason of a chat completion, as `Reply` fields.

    Raises JudgeError on a body that is not JSON or holds no text.
    """
    try:
        completion = json.loads(body)
    except (ValueError, RecursionError):
        raise JudgeError(
            "the reply is not JSON (is base_url right, does it end in /v1?); it begins "
            f"{body[:60]!r}"
        ) from None
    choice = _at(completion, "choices", 0)
    text, reason = _at(choice, "message", "content"), _at(choice, "finish_reason")
    if not isinstance(text, str):
        cut = reason == "length"
        raise JudgeError(
            f"the reply holds no text (finish_reason {reason!r}, refusal "
            f"{_at(choice, 'message', 'refusal')!r}): "
            + ("raise max_tokens" if cut else "the server must speak chat completions")
        )
    return {
        "text": _without_surrogates(text),
        "prompt_tokens": _count(_at(completion, "usage", "prompt_tokens")),
        "completion_tokens": _count(_at(completion, "usage", "completion_tokens")),
        "finish_reason": _without_surrogates(str(reason or "stop")),
    }


def _without_surrogates(text: str) -> str:
    """Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes "?"."""
    return text.encode("utf-8", "replace").decode()


def _at(value: Any, *path: str | int) -> Any:
    """`value[a][b]…`, and None where the path leads nowhere."""
    for key in path:
        try:
            value = value[key]
        except (TypeError, KeyError, IndexError):
            return None
    return value


class LocalJudge(LoggedJudge):
    """A causal language model of this process; draw n samples with seed n.

    `model` is a transformers model (then give its `tokenizer`) or a name for
    `load_policy`. `name` goes into hashes and logs: give a new one whenever the weights
    behind a folder change, or the log answers for the old ones. At temperature 0 all
    draws are equal.
    """

    def __init__(
        self,
        model: "PreTrainedModel | str",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        temperature: float = 0.0,
        max_new_tokens: int = 512,
        log: "str | os.PathLike | ReplyLog | None" = None,
        name: str | None = None,
    ):
        from starling_lib.models import inference, load_policy
        from starling_lib.rollouts import half_precision_copy

        policy, self._tokenizer, known_as = _loaded(model, tokenizer, load_policy)
        with inference(policy):  # once here, else once a question
            self._policy = half_precision_copy(policy)
        settings = {
            "temperature": float(temperature),
            "max_new_tokens": int(max_new_tokens),
        }
        super().__init__(name or known_as, settings, log)
        self._sampling = threading.Lock()  # the random state is one for all threads

    def _reply(self, messages: list[Message], draw: int) -> Reply:
        from starling_lib.rollouts import encode_prompt, sample

        length = len(encode_prompt(self._tokenizer, messages))
        room = getattr(self._policy.config, "max_position_embeddings", None)
        if room and length + self.settings["max_new_tokens"] > room:
            raise JudgeError(
                f"the prompt has {length} tokens and the model room for {room}, "
                f"{self.settings['max_new_tokens']} of them for the reply: shorten one"
            )
        with self._sampling:
            rollout = sample(
                self._policy, self._tokenizer, [messages], seed=draw, **self.settings
            )
        return Reply(
            text=rollout.texts[0],
            prompt_tokens=length,
            completion_tokens=int(rollout.lengths[0]),
            finish_reason="stop" if rollout.finished[0] else "length",
        )


class RewardJudge:
    """A reward model of this process. It ranks by score and cannot be asked in words.

    `model` is a sequence-classification model with one label (then give its
    `tokenizer`) or a name for `load_reward_model`. `name` is what logs call it: give a
    new one whenever the weights change. The default holds a digest of them.
    """

    def __init__(
        self,
        model: "PreTrainedModel | str",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        name: str | None = None,
    ):
        from starling_lib.models import fingerprint, load_reward_model

        self._scorer, self._tokenizer, known_as = _loaded(
            model, tokenizer, load_reward_model
        )
        self.model = name or f"{known_as}@{fingerprint(self._scorer)}"

    def __repr__(self) -> str:
        return f"RewardJudge(model={self.model!r})"

    def score(
        self,
        prompts: Sequence[list[Message]],
        responses: Sequence[str],
        finished: Sequence[bool] | None = None,
    ) -> list[float]:
        """One reward for each prompt and response; higher is better.

        `finished` is False where the token limit cut the response; None: nowhere.
        Raises ValueError on unequal lengths, JudgeError on a score that is no number.
        """
        from starling_lib.reward import score_responses

        scores = score_responses(
            self._scorer, self._tokenizer, prompts, responses, finished
        ).tolist()
        for i, score in enumerate(scores):
            if score != score:
                raise JudgeError(f"response {i} scores NaN: is {self.model} broken?")
        return scores

    def rank(
        self,
        messages: list[Message],
        responses: Sequence[str],
        finished: Sequence[bool] | None = None,
    ) -> list[int]:
        """Indices of `responses`, best first; equal scores keep the order given."""
        scores = self.score([messages] * len(responses), responses, finished)
        return sorted(range(len(scores)), key=lambda i: -scores[i])


def _loaded(model, tokenizer, load) -> tuple[Any, Any, str]:
    """A model, its tokenizer and its name, from names or from what is loaded."""
    from starling_lib.models import load_tokenizer

    if isinstance(model, str | os.PathLike):
        return load(model), tokenizer or load_tokenizer(model), str(model)
    if tokenizer is None:
        raise ValueError("give the tokenizer that belongs to the model")
    return model, tokenizer, model.config._name_or_path or type(model).__name__


# --- many questions


def ask_all(
    judge: Judge, requests: Sequence[Request], progress: str | None = None
) -> Iterator[tuple[int, Reply | JudgeError]]:
    """Ask every (messages, draw), `judge.concurrency` at once; replies as they come.

    Yields (index into `requests`, reply), or the JudgeError of a request that failed,
    so that one failure loses no other reply. `progress` names a bar with tokens and
    cost so far. Closing the iterator, or an interrupt, cancels what has not started.
    Raises a fatal JudgeError (refused key, unknown model, no credit), which would meet
    all alike, and one after several requests in a row that no server would answer.
    """
    usage, todo = Usage(), iter(enumerate(requests))
    lost = 0  # requests that no server would answer, one after another
    pool = ThreadPoolExecutor(judge.concurrency, thread_name_prefix="judge")
    bar = tqdm(total=len(requests), desc=progress, disable=progress is None)
    pending: dict[Future, int] = {}
    try:
        while True:
            # A short queue: enough that no thread waits, and little to cancel.
            for i, (messages, draw) in islice(
                todo, 2 * judge.concurrency - len(pending)
            ):
                pending[pool.submit(judge.ask, messages, draw)] = i
            if not pending:
                return
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=_is_fatal):  # good replies first
                i, outcome = pending.pop(future), _outcome(future)
                lost = lost + 1 if getattr(outcome, "unreachable", False) else 0
                if lost > max(2, judge.concurrency):
                    raise JudgeError(
                        f"{lost} requests in a row brought no reply; the last {outcome}. "
                        "What was answered is kept: run again to go on",
                        fatal=True,
                    )
                usage.count(outcome)
                bar.set_postfix_str(str(usage), refresh=False)
                bar.update()
                yield i, outcome
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()


def _is_fatal(future: Future) -> bool:
    return getattr(future.exception(), "fatal", False)


def _outcome(future: Future) -> Reply | JudgeError:
    """A finished request's reply or its failure; raises a fatal one."""
    error = future.exception()
    if isinstance(error, JudgeError) and not error.fatal:
        return error
    return future.result()
