"""Responses from a generation server, behind the interface of `rollouts.sample`.

Knows: what is asked of a server, which of its replies are responses that the policy could
have given token by token, how the policy's weights reach a server. Does not know: rewards,
what is trained.

A server gives text, no tokens. The text is tokenised again here, and a reply is kept only
if that loses nothing (`fault`); the others are counted and asked for again.
"""

import contextlib
import json
import shutil
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from starling_lib.generation import plain_generation
from starling_lib.judges import JudgeError, OpenAIJudge, Reply, ask_all
from starling_lib.models import quiet
from starling_lib.rollouts import Messages, Rollout, encode_prompt, given_responses

SERVERS = ("transformers", "vllm")
# What decoders write for bytes that are no UTF-8: which bytes those were is lost.
REPLACEMENT = "\ufffd"
# Above this share of dropped replies the responses are no longer quite the policy's.
MANY_DROPPED = 0.1
# So many replies at once and none that can be kept: asking on would be in vain.
HOPELESS = 32


@dataclass
class ServedSampler:
    """Samples like `rollouts.sample`, but an OpenAI-compatible server does the work.

    Called with the same arguments, it returns the same `Rollout`; `APATrainer(…,
    sampler=ServedSampler(…))` trains on it. Log-probabilities are not the server's: the
    trainer computes them with the policy in its own memory, as for its own samples.

        transformers serve --port 8000 --model-timeout 60
        ServedSampler("http://127.0.0.1:8000/v1", weights_dir="weights")

    Args:
        base_url: the server, such as "http://127.0.0.1:8000/v1".
        model: the policy's name on the server; not with `weights_dir`.
        server: "transformers" (`transformers serve`) or "vllm", which take sampling
            settings in different fields. vLLM's fields are those that TRL's client
            sends; we have not run vLLM. Start it with `--generation-config vllm`, or it
            also ends at tokens that the model's `generation_config.json` names.
        weights_dir: a folder that the server can read under the same path. Each call
            saves the policy there and names the new folder in its requests;
            transformers' server then loads it. The folder is deleted after the call; the
            server keeps the weights until its `--model-timeout`, so make that short.
        concurrency: requests in flight at once.
        attempts: how often a response is asked for until it can be kept; fewer where a
            server gives nothing that can be.
        timeout: seconds to wait for one reply.
        max_retries: more attempts of one request after 429, 5xx, a timeout or a broken
            connection.
        api_key_env: environment variable that holds the key; it may be unset.

    `figures` says of the last call which share of replies was dropped, and how many for
    which reason (see `fault`; "failed": no reply); `APATrainer` logs them. Dropping is not
    neutral: what stays is the policy restricted to texts in their usual tokenisation, and
    the longer a response, the rarer it is that all of it is so. Of SmolLM2-135M's own
    samples, 8 of 64 with at most 32 tokens and 15 of 64 with at most 96 would go. Above a
    tenth there is a warning, once a sampler.

    Not offered: the same responses again for the same `seed` (nor, so, after resuming),
    which is not sent, since a server may apply it to all requests alike; other ways to
    renew a server's weights (`trl vllm-serve` needs CUDA and NCCL), saving
    adapters or from several processes. Without `weights_dir` the server's weights stay
    what they were: the data is then off-policy, ever more so, in evaluation too, and
    nothing logged shows it, for `log_ratio` compares the local policy with itself. APA
    with `anchor="initial"` fits any sampler's data; PPO's ratio is then wrong.
    """

    base_url: str
    model: str | None = None
    server: str = "transformers"
    weights_dir: str | Path | None = None
    concurrency: int = 8
    attempts: int = 16
    timeout: float = 600.0
    max_retries: int = 3
    api_key_env: str = "OPENAI_API_KEY"
    figures: dict[str, float] = field(init=False, repr=False, default_factory=dict)
    _warned: bool = field(init=False, repr=False, default=False)

    def __post_init__(self):
        if self.server not in SERVERS:
            raise ValueError(f"server={self.server!r}: choose from {SERVERS}")
        if (self.model is None) == (self.weights_dir is None):
            raise ValueError(
                "give either `model`, a name on the server, or `weights_dir`, through "
                "which the server gets the policy's weights"
            )
        if self.weights_dir is not None and self.server != "transformers":
            raise ValueError(
                f"weights_dir: a {self.server} server loads no model by a request"
            )
        if self.attempts < 1:
            raise ValueError(f"attempts={self.attempts}: must be at least 1")

    def __call__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Messages],
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        batch_size: int = 64,
        seed: int = 0,
        samples: int = 1,
        max_prompt_length: int | None = None,
        progress: bool = False,
    ) -> Rollout:
        """`samples` responses to each prompt (consecutive rows), in the order given.

        As `rollouts.sample`, except that `batch_size` and `seed` do nothing: the server
        batches and draws. `policy` is looked at only with `weights_dir`. Raises
        ValueError for a prompt above `max_prompt_length`, or one that the server reads
        as another number of tokens; JudgeError when the server refuses, or a response
        is still missing after `attempts`.
        """
        prompts = [messages for messages in prompts for _ in range(samples)]
        lengths = _prompt_lengths(tokenizer, prompts, max_prompt_length)
        settings = sampling_fields(self.server, tokenizer, max_new_tokens, temperature)
        with self._model_name(policy, tokenizer) as model:
            server = OpenAIJudge(
                model,
                self.base_url,
                temperature=None,  # all settings are in `extra`
                max_tokens=None,
                extra=settings,
                concurrency=self.concurrency,
                timeout=self.timeout,
                max_retries=self.max_retries,
                api_key_env=self.api_key_env,
            )
            texts = self._ask(
                server, tokenizer, prompts, lengths, max_new_tokens, progress
            )
        # Adds EOS to all and cuts at the limit: just where `fault` let a response be cut.
        return given_responses(tokenizer, prompts, texts, max_new_tokens)

    def _model_name(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> contextlib.AbstractContextManager[str]:
        if self.weights_dir is None:
            return contextlib.nullcontext(self.model)
        return saved_weights(policy, tokenizer, self.weights_dir)

    def _ask(
        self,
        server: OpenAIJudge,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Messages],
        lengths: Sequence[int],
        max_new_tokens: int,
        progress: bool,
    ) -> list[str]:
        """One text a prompt that can be kept; sets `figures`."""
        texts: dict[int, str] = {}
        dropped, last_error = Counter(), "no error"
        for attempt in range(self.attempts):
            rows = [i for i in range(len(prompts)) if i not in texts]
            requests = [(prompts[i], attempt) for i in rows]
            replies = ask_all(server, requests, "sampling" if progress else None)
            with contextlib.closing(replies):
                for place, reply in replies:
                    row = rows[place]
                    if isinstance(reply, JudgeError):
                        dropped["failed"] += 1
                        last_error = f"row {row}: {reply}"
                        continue
                    _check_prompt(row, reply, lengths[row])
                    if reason := fault(tokenizer, reply, max_new_tokens):
                        dropped[reason] += 1
                    else:
                        texts[row] = reply.text
            none_kept = len(prompts) - len(texts) == len(rows)
            if len(texts) == len(prompts) or (none_kept and len(rows) >= HOPELESS):
                break
        self._count(dropped, len(texts))
        if missing := [i for i in range(len(prompts)) if i not in texts]:
            raise JudgeError(
                f"{len(missing)} of {len(prompts)} responses are missing after "
                f"{attempt + 1} attempts (first: row {missing[0]}). Dropped: "
                f"{dict(dropped)}; last failure: {last_error}. Does the server run this "
                "policy, with its tokenizer? Raise `attempts` if only few are missing"
            )
        return [texts[i] for i in range(len(prompts))]

    def _count(self, dropped: Counter[str], kept: int) -> None:
        """Set `figures`; warn when much was dropped."""
        total = dropped.total() + kept
        share = dropped.total() / total if total else 0.0
        counts = {f"dropped_{reason}": float(dropped[reason]) for reason in REASONS}
        self.figures = {"dropped_share": share, **counts}
        if share > MANY_DROPPED and not self._warned:
            self._warned = True
            warnings.warn(
                f"{dropped.total()} of {total} replies of {self.server} were dropped "
                f"({dict(dropped)}): the others are no fair sample of the policy",
                stacklevel=4,
            )


REASONS = ("failed", "ending", "round_trip", "tokens", "length")


def fault(
    tokenizer: PreTrainedTokenizerBase, reply: Reply, max_new_tokens: int
) -> str | None:
    """Why a reply cannot stand for tokens that the policy chose; None if it can.

    "ending": it neither ended by itself nor at the limit; "round_trip": its tokens do not
    give the text back, or the text holds U+FFFD, for which bytes were lost; "tokens": the
    server counted others (0: it did not count); "length": not as long as its ending says,
    EOS included at most `max_new_tokens`, and just that many where it was cut.
    transformers' server also calls cut what ended on the last token: dropped as well.
    """
    if reply.finish_reason not in ("stop", "length"):
        return "ending"
    ids = tokenizer(reply.text, add_special_tokens=False)["input_ids"]
    again = tokenizer.decode(ids, skip_special_tokens=True)
    if again != reply.text or REPLACEMENT in reply.text:
        return "round_trip"
    finished = reply.finish_reason == "stop"
    length = len(ids) + finished
    if reply.completion_tokens not in (0, length):
        return "tokens"
    fits = length <= max_new_tokens if finished else length == max_new_tokens
    return None if fits else "length"


def sampling_fields(
    server: str,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
) -> dict[str, Any]:
    """The request's fields for a draw from the whole distribution; T = 0 is greedy.

    Everything is said, since a server fills the rest from the model's published settings.
    """
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    if server == "vllm":
        limit = {"max_tokens": max_new_tokens}
        return {"temperature": float(temperature), **neutral, **limit}
    config = {
        "do_sample": temperature > 0,
        "temperature": float(temperature) or 1.0,  # of no effect when greedy
        **neutral,
        "typical_p": 1.0,
        "no_repeat_ngram_size": 0,
        "min_new_tokens": 0,
        "num_beams": 1,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {"generation_config": json.dumps(config)}


@contextlib.contextmanager
def saved_weights(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parent: str | Path,
) -> Iterator[str]:
    """The policy in a new folder of `parent` for the enclosed lines; its absolute path.

    The name is never used again: a server keeps what it once loaded under a name. The
    model's own generation settings are not saved. Raises ValueError where a folder would
    not hold the whole policy, or a server could not be told its name.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError("weights_dir: not offered with several processes")
    if any(name.endswith(".base_layer") for name, _ in policy.named_modules()):
        raise ValueError(
            "weights_dir: not offered for a policy with adapters, whose weights plain "
            "from_pretrained does not read; train layers, or serve a merged copy"
        )
    folder = Path(parent).resolve() / f"weights-{uuid.uuid4().hex}"
    if "@" in str(folder):
        raise ValueError(
            f"weights_dir: {folder} holds '@', which begins a revision for the server"
        )
    try:
        with plain_generation(policy), quiet():
            policy.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prompt_lengths(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    limit: int | None,
) -> list[int]:
    """Tokens of each prompt. Raises ValueError above the limit."""
    lengths = [len(encode_prompt(tokenizer, messages)) for messages in prompts]
    for row, length in enumerate(lengths):
        if limit is not None and length > limit:
            raise ValueError(
                f"row {row}: the prompt has {length} tokens, above max_prompt_length="
                f"{limit}, and a server cuts no prompts: leave it out"
            )
    return lengths


def _check_prompt(row: int, reply: Reply, length: int) -> None:
    """Raise ValueError if the server counted other prompt tokens than we (0: none)."""
    if reply.prompt_tokens not in (0, length):
        raise ValueError(
            f"row {row}: the server reads the prompt as {reply.prompt_tokens} tokens, the "
            f"policy's tokenizer as {length}: their chat templates or tokenizers differ"
        )
