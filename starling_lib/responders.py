"""Sampling K responses a prompt from several models, resumable.

Knows: models and servers that answer, rows that wait for a ranking. Does not know judges'
verdicts.
"""

import contextlib
import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from starling_lib.chat import (
    Message,
    messages_to_transcript,
    transcript_to_messages,
)
from starling_lib.journal import Row, open_journal
from starling_lib.judges import JudgeError, OpenAIJudge, ask_all, request_hash
from starling_lib.recipe_files import recipe_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Responder:
    """One source of responses: a model with its way of answering."""

    name: str = recipe_key("what the rows call it; each a name of its own")
    model: str = recipe_key("alias, folder or hub id; with base_url its name there")
    system: str | None = recipe_key("a prompt before the conversation", default=None)
    temperature: float = recipe_key("0 is greedy", default=1.0)
    max_new_tokens: int = recipe_key("where a response is cut", default=256)
    seed: int = recipe_key("of a local model's sampling", default=0)
    base_url: str | None = recipe_key(
        "an OpenAI-compatible server to ask instead of loading the model", default=None
    )
    api_key_env: str = recipe_key(
        "variable that holds its key", default="OPENAI_API_KEY"
    )

    def messages(self, prompt: Sequence[Message]) -> list[Message]:
        """The conversation as this responder gets it."""
        if self.system is None:
            return list(prompt)
        own, rest = [self.system], list(prompt)
        if rest and rest[0]["role"] == "system":  # templates take one such message
            own.append(rest.pop(0)["content"])
        return [{"role": "system", "content": "\n\n".join(own)}, *rest]


@dataclass(frozen=True)
class Failure:
    """A request to a server that brought no response."""

    row: str  # its id
    responder: str
    error: JudgeError


def sample_responses(
    prompts: Iterable[Mapping[str, Any]],
    responders: Sequence[Responder],
    output: str | os.PathLike,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> list[Row]:
    """One response of every responder to every prompt, as Nectar rows without ranks.

    Args:
        prompts: rows with an `id` and a `prompt`, messages or a transcript; `source`,
            `half` and `good_natured` are handed on.
        output: JSONL file that gets `{"id", "responder", "answer", "finished",
            "request_hash"}` for each response; a killed run goes on from it. Local
            models sample `batch_size` prompts of like length at once and write them
            down together. A request that a server refused for good, while it answered
            others, has `error` for `answer` and `finished`, and is not made again.

    Returns:
        `id`, `prompt` (transcript), `answers` (`answer`, `model`: the responder's name,
        `finished`) in the order of `responders`, `turns`, `num_responses`. Refused
        answers are missing, and so are rows that have fewer than two left: counted in
        a warning.

    The same prompts, responders and seeds give the same responses of local models, also
    after a kill. Raises ValueError on rows or names that are not distinct, and on an
    `output` that holds a response to another text or of another model (other weights in
    the same folder, too) or setting; JudgeError at the end when a server left some
    prompts without a response.
    """
    names = [responder.name for responder in responders]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"responders need distinct names, got {names}")
    rows = _prompt_rows(prompts)
    known_as = {responder.name: _known_as(responder) for responder in responders}
    digests = {
        (row["id"], one.name): _request_hash(
            one, known_as[one.name], row["messages"], seed
        )
        for row in rows
        for one in responders
    }
    with open_journal(output) as journal:
        known = {(row["id"], row["responder"]): row for row in journal.rows}
        _check_requests(known, digests, output)
        missing = {
            name: [row for row in rows if (row["id"], name) not in known]
            for name in names
        }
        total = len(rows) * len(names)
        done = total - sum(map(len, missing.values()))
        bar = tqdm(total=total, initial=done, desc="sampling", disable=not progress)
        with bar:
            for found in _new_responses(rows, responders, missing, batch_size, seed):
                new = [
                    row | {"request_hash": digests[row["id"], row["responder"]]}
                    for row in found
                ]
                journal.append(*new)
                known |= {(row["id"], row["responder"]): row for row in new}
                bar.update(len(new))
    return _with_responses(rows, names, known)


def _known_as(responder: Responder) -> str:
    """The model's name; that of a folder with a digest of the weights in it."""
    if responder.base_url is not None or not Path(responder.model).is_dir():
        return responder.model
    from starling_lib.models import folder_fingerprint

    return f"{responder.model}@{folder_fingerprint(responder.model)}"


def _request_hash(
    responder: Responder, known_as: str, prompt: Sequence[Message], seed: int
) -> str:
    """What makes a response this run's: text, model and way of sampling, hashed."""
    settings = {
        "temperature": float(responder.temperature),
        "max_new_tokens": responder.max_new_tokens,
        "seeds": [responder.seed, seed],
    }
    return request_hash(known_as, responder.messages(prompt), settings)


def _check_requests(
    known: Mapping[tuple[str, str], Row],
    digests: Mapping[tuple[str, str], str],
    output: str | os.PathLike,
) -> None:
    """Raise ValueError for a kept response to another request than this run's.

    Rows of older versions have no hash to compare.
    """
    for key, digest in digests.items():
        if known.get(key, {}).get("request_hash", digest) != digest:
            raise ValueError(
                f"{output} was made by another run: row {key[0]!r} of {key[1]!r} differs "
                "in request_hash: another text, model, seed or way of sampling; name "
                "another output"
            )


def _prompt_rows(prompts: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows with `messages` and a transcript. Raises ValueError that names the row."""
    rows: dict[str, Row] = {}
    for i, row in enumerate(prompts):
        name, prompt = row.get("id"), row.get("prompt")
        if not isinstance(name, str) or name in rows:
            raise ValueError(
                f"row {i}: id: expected a name of its own, got {name!r:.40}"
            )
        try:
            messages = conversation(prompt)
            transcript = messages_to_transcript(messages)
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {i} (id {name!r}): prompt: {error}") from None
        rows[name] = {**row, "messages": messages, "prompt": transcript}
    return list(rows.values())


def conversation(prompt: Any) -> list[Message]:
    """Messages of a transcript, or messages as they are, that end in a user turn."""
    is_text = isinstance(prompt, str)
    messages = transcript_to_messages(prompt) if is_text else list(prompt or [])
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("expected a conversation that ends in a user turn")
    return messages


def _new_responses(
    rows: Sequence[Row],
    responders: Sequence[Responder],
    missing: Mapping[str, Sequence[Row]],
    batch_size: int,
    seed: int,
) -> Iterator[list[Row]]:
    """What the journal lacks, in pieces to be written down at once."""
    waiting = [responder for responder in responders if missing[responder.name]]
    local = [responder for responder in waiting if responder.base_url is None]
    for model in dict.fromkeys(responder.model for responder in local):
        sharing = [responder for responder in local if responder.model == model]
        yield from _sample_locally(model, sharing, rows, missing, batch_size, seed)
    failures: list[Failure] = []
    for responder in waiting:
        if responder.base_url is not None:
            yield from ask_server(responder, missing[responder.name], failures)
    # A server that refuses every row is asked in a wrong way: no row is at fault.
    failed = Counter(one.responder for one in failures)
    refused = [
        one
        for one in failures
        if one.error.refused and failed[one.responder] < len(rows)
    ]
    yield [
        {"id": one.row, "responder": one.responder, "error": str(one.error)}
        for one in refused
    ]
    if len(refused) < len(failures):
        missing_still = [one for one in failures if one not in refused]
        raise without_response(missing_still, "responses are missing")


def without_response(failures: Sequence[Failure], what: str) -> JudgeError:
    """The error that says what brought no response and what to do; ids of ten rows."""
    text = (
        f"{len(failures)} {what} ({_named(one.row for one in failures)}), the others "
        "are kept: run again to ask for them. The first: row "
        f"{failures[0].row!r}: {failures[0].error}"
    )
    refused = [one.row for one in failures if one.error.refused]
    if refused:
        text += (
            f". The server will refuse {len(refused)} again ({_named(refused)}): leave "
            "them out, or change what it does not take"
        )
    return JudgeError(text)


def _named(ids: Iterable[str]) -> str:
    """At most ten ids, for a message; "q9" before "q10"."""
    distinct = sorted(set(ids), key=lambda one: (len(one), one))
    return f"rows {', '.join(map(repr, distinct[:10]))}" + " …" * (len(distinct) > 10)


def _sample_locally(
    model: str,
    responders: Sequence[Responder],
    rows: Sequence[Row],
    missing: Mapping[str, Sequence[Row]],
    batch_size: int,
    seed: int,
) -> Iterator[list[Row]]:
    """Responses of all responders that share a model, which is loaded once."""
    policy, tokenizer = ready_to_sample(model)
    for responder in responders:
        lacking = {row["id"] for row in missing[responder.name]}
        yield from sample_in_chunks(
            policy, tokenizer, responder, rows, lacking, batch_size, seed
        )


def ready_to_sample(
    model: "str | PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None" = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A policy for `sample_in_chunks` and its tokenizer, from a name or as loaded."""
    from starling_lib.models import (
        default_device,
        inference,
        load_policy,
        load_tokenizer,
    )
    from starling_lib.rollouts import half_precision_copy

    if isinstance(model, str | os.PathLike):
        tokenizer = tokenizer or load_tokenizer(model)
        model = load_policy(model).to(default_device())
    elif tokenizer is None:
        raise ValueError("give the tokenizer that belongs to the model")
    with inference(model):  # once here, else once a chunk
        return half_precision_copy(model), tokenizer


def sample_in_chunks(
    policy: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    responder: Responder,
    rows: Sequence[Row],
    lacking: Container[str],
    batch_size: int,
    seed: int,
) -> Iterator[list[Row]]:
    """Responses to the rows whose id is in `lacking`, chunk by chunk.

    `rows` have an `id`, `messages` and a `prompt`, of which only the length counts.
    """
    from starling_lib.rollouts import sample

    # Chunks are cut from all rows, so that a resumed run samples the same ones.
    order = sorted(rows, key=lambda row: (len(row["prompt"]), row["id"]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        if not any(row["id"] in lacking for row in chunk):
            continue
        rollout = sample(
            policy,
            tokenizer,
            [responder.messages(row["messages"]) for row in chunk],
            max_new_tokens=responder.max_new_tokens,
            temperature=responder.temperature,
            batch_size=batch_size,
            seed=_chunk_seed(seed, responder, start),
        )
        found = zip(chunk, rollout.texts, rollout.finished.tolist(), strict=True)
        yield [
            _response(row, responder, text, ended)
            for row, text, ended in found
            if row["id"] in lacking
        ]


def _chunk_seed(seed: int, responder: Responder, start: int) -> int:
    """A seed of its own for each chunk and responder, also if two are alike in all."""
    text = f"{seed} {responder.seed} {start} {responder.name}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])


def ask_server(
    responder: Responder, rows: Sequence[Row], failures: list[Failure]
) -> Iterator[list[Row]]:
    """Responses of a server, one by one; what fails is added to `failures`."""
    server = OpenAIJudge(
        responder.model,
        responder.base_url,
        temperature=responder.temperature,
        max_tokens=responder.max_new_tokens,
        api_key_env=responder.api_key_env,
    )
    requests = [(responder.messages(row["messages"]), responder.seed) for row in rows]
    with contextlib.closing(ask_all(server, requests)) as replies:
        for index, reply in replies:
            if isinstance(reply, JudgeError):
                failures.append(Failure(rows[index]["id"], responder.name, reply))
                continue
            ended = reply.finish_reason != "length"
            yield [_response(rows[index], responder, reply.text, ended)]


def _response(row: Row, responder: Responder, text: str, finished: bool) -> Row:
    return {
        "id": row["id"],
        "responder": responder.name,
        "answer": text,
        "finished": finished,
    }


def _with_responses(
    rows: Sequence[Row], names: Sequence[str], known: Mapping[tuple[str, str], Row]
) -> list[Row]:
    """Rows with the responses that there are; warns of those that servers refused."""
    found, lacking = [], []
    for row in rows:
        kept = {name: known[row["id"], name] for name in names}
        given = {name: one for name, one in kept.items() if "answer" in one}
        if len(given) < len(names):
            lacking.append(row["id"])
        if len(given) >= min(2, len(names)):
            found.append(_unranked(row, given))
    if lacking:
        warnings.warn(
            f"{len(lacking)} of {len(rows)} rows lack a response that a server refused; "
            f"{len(rows) - len(found)} of them, with fewer than two others, are left "
            f"out: {_named(lacking)}",
            stacklevel=3,
        )
    return found


def _unranked(row: Row, responses: Mapping[str, Row]) -> Row:
    kept = ("source", "good_natured", "half")
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "answers": [
            {"answer": found["answer"], "model": name, "finished": found["finished"]}
            for name, found in responses.items()
        ],
        "turns": sum(message["role"] == "user" for message in row["messages"]),
        "num_responses": len(responses),
    } | {name: row[name] for name in kept if row.get(name) is not None}
