"""Sampling responses from a policy, with explicit masks and log-probabilities.

Knows: prompts as messages, tokens, when a response ended. Does not know: what a reward
means.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from starling_lib.arranged import arranged
from starling_lib.generation import generate_rows, keeps_states, left_pad, right_pad
from starling_lib.models import copy_in, inference, without_wrapper
from starling_lib.prefix import PADDING, PROMPT, LayoutLost, forward_packed, packs
from starling_lib.trunk import tapped
from starling_lib.vocabulary import ChosenLogprobs, streams

Messages = list[dict[str, str]]
# The tensors of a rollout that a model needs, as `response_inputs` takes them.
TOKEN_FIELDS = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")


@dataclass
class Rollout:
    """N sampled responses. P prompt and R response positions.

    `response_mask` is True on every token the policy chose, its EOS included: an EOS that
    is masked out (pad == EOS in the original code) is never learnt. `finished` is False
    where the token limit cut the response.
    """

    prompts: list[Messages]
    prompt_ids: Tensor  # (N, P) left-padded
    prompt_mask: Tensor  # (N, P) bool
    response_ids: Tensor  # (N, R) right-padded
    response_mask: Tensor  # (N, R) bool
    texts: list[str]  # response without its EOS
    finished: Tensor  # (N,) bool
    # after so many of the policy's layers, (N, P+R, H), 0 at padding
    states: dict[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Tensor:
        """(N,) response tokens, EOS included."""
        return self.response_mask.sum(1)

    def select(self, rows: Sequence[int] | Tensor) -> "Rollout":
        """The same rollout of (or in the order of) `rows`: numbers, or a mask (N,)."""
        rows = torch.as_tensor(rows)
        if rows.dtype == torch.bool:
            rows = torch.arange(len(self))[rows.cpu()]
        rows = [int(row) for row in rows]
        chosen = {
            field.name: _take(getattr(self, field.name), rows)
            for field in dataclasses.fields(self)
        }
        return Rollout(**chosen)


def _take(values, rows: list[int]):
    if values is None:
        return None
    if isinstance(values, dict):
        return {name: _take(part, rows) for name, part in values.items()}
    return values[rows] if isinstance(values, Tensor) else [values[r] for r in rows]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    max_length: int | None = None,
) -> list[int]:
    """Token ids of a conversation up to where the assistant's reply begins.

    One tokenisation of the rendered template, so no second BOS; with `max_length` the
    oldest tokens go (left truncation, as Starling did). Raises ValueError on a text.
    """
    if isinstance(messages, str):
        raise ValueError(
            f"a prompt is the text {messages[:60]!r}, expected messages: "
            '[{"role": "user", "content": …}]'
        )
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[-max_length:] if max_length else ids


def sample(
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
    keep_after: Sequence[int] = (),
) -> Rollout:
    """Sample `samples` responses to each prompt (consecutive rows), repeatably.

    The whole distribution is sampled: `generate` alone would keep the 50 likeliest tokens,
    and log-probabilities from the full distribution would no longer be those of the
    sampler. temperature = 0 is greedy. Prompts are batched by length; rows come back in
    the order given. The global random state is left as it was. On a CPU with fast bf16 a
    copy in bf16 samples: the policy's distribution but for rounding. The rollout's
    `states` after so many layers (`keep_after`) are kept where sampling computes them as
    training would: not by a half-precision copy, not in sliding windows. Raises
    ValueError on a negative temperature and on max_new_tokens < 1.
    """
    if temperature < 0 or max_new_tokens < 1:
        raise ValueError(
            f"temperature={temperature}, max_new_tokens={max_new_tokens}: need a "
            "temperature ≥ 0 and at least one token"
        )
    policy = without_wrapper(policy)
    prompts = [messages for messages in prompts for _ in range(samples)]
    encoded = [encode_prompt(tokenizer, m, max_prompt_length) for m in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    responses: list[list[int]] = [[] for _ in prompts]
    states: list[dict[int, Tensor]] = [{} for _ in prompts]
    with contextlib.ExitStack() as inside:
        inside.enter_context(torch.random.fork_rng())
        inside.enter_context(inference(policy))
        torch.manual_seed(seed)
        sampler = half_precision_copy(policy)
        if sampler is not policy or not keeps_states(policy):
            keep_after = ()
        if len(prompts) > 1:  # the time of a single row is that of reading the weights
            inside.enter_context(arranged(sampler))
        for batch in tqdm(batches, "sampling", disable=not progress, leave=False):
            rows, kept = generate_rows(
                sampler,
                [encoded[i] for i in batch],
                tokenizer.eos_token_id,
                tokenizer.pad_token_id,
                max_new_tokens,
                temperature,
                keep_after,
            )
            for i, row, below in zip(batch, rows, kept, strict=True):
                responses[i], states[i] = row, below
    rollout = _rollout(tokenizer, prompts, encoded, responses)
    if keep_after:
        rollout.states = {n: _in_place(rollout, states, n) for n in keep_after}
    return rollout


def _in_place(rollout: Rollout, states: list[dict[int, Tensor]], after: int) -> Tensor:
    """(N, P+R, H): each row's states where its tokens stand."""
    mask = torch.cat([rollout.prompt_mask, rollout.response_mask], 1)
    first = states[0][after]
    wide = first.new_zeros(*mask.shape, first.shape[-1])
    wide[mask.to(first.device)] = torch.cat([row[after] for row in states])
    return wide


def given_responses(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    texts: Sequence[str],
    max_new_tokens: int,
) -> Rollout:
    """Texts that somebody else wrote, as if they had been sampled: to be learnt from.

    Each ends with EOS; one of more than `max_new_tokens` tokens is cut and has none.
    """
    encoded = [encode_prompt(tokenizer, messages) for messages in prompts]
    responses = [
        [
            *tokenizer(text, add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        for text in texts
    ]
    return _rollout(
        tokenizer, prompts, encoded, [r[:max_new_tokens] for r in responses]
    )


def half_precision_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """On a CPU with fast bf16, a bf16 copy of a float32 policy; else the policy itself.

    Autocast would cast every frozen weight again for every token.
    """
    if policy.device.type != "cpu" or policy.dtype != torch.float32:
        return policy
    if not torch.is_autocast_enabled("cpu"):
        return policy
    return copy_in(policy, torch.get_autocast_dtype("cpu"))


def _rollout(tokenizer, prompts, encoded, responses) -> Rollout:
    """Assemble padded tensors, texts and `finished` from token lists."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    finished = [row[-1] == eos for row in responses]
    texts = tokenizer.batch_decode(
        [
            row[:-1] if ended else row
            for row, ended in zip(responses, finished, strict=True)
        ],
        skip_special_tokens=True,
    )
    prompt_ids, prompt_mask = left_pad(encoded, pad)
    response_ids, response_mask = right_pad(responses, pad)
    return Rollout(
        prompts=list(prompts),
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        texts=texts,
        finished=torch.tensor(finished),
    )


def response_inputs(
    prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor
) -> dict[str, Tensor]:
    """Model inputs (N, P+R) for prompts followed by responses, positions from the mask."""
    mask = torch.cat([prompt_mask, response_mask], 1)
    return {
        "input_ids": torch.cat([prompt_ids, response_ids], 1),
        "attention_mask": mask.long(),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


# Architectures whose attention has turned out not to be told how rows are packed.
_PADDED_ONLY: set[type] = set()


def row_states(
    layers: PreTrainedModel, tokens: dict[str, Tensor], states: Tensor | None = None
) -> Tensor:
    """(N, P+R, H) last hidden states of a trunk, or of the upper part of one.

    `tokens`: the TOKEN_FIELDS of a rollout. With `states` (N, P+R, H) the layers read
    those, else the tokens. What stands at padding has no meaning.
    """
    out, real = _forward_rows(layers, tokens, states)
    hidden = out.last_hidden_state
    return hidden if real is None else _padded(hidden, real)


def layer_states(
    layers: PreTrainedModel, tokens: dict[str, Tensor], after: Sequence[int]
) -> dict[int, Tensor]:
    """The same after so many layers, for each of the numbers: one pass for all of them."""
    with tapped(layers, after) as found:
        _, real = _forward_rows(layers, tokens)
    return {n: x if real is None else _padded(x, real) for n, x in found.items()}


def _forward_rows(layers, tokens, states=None):
    """A trunk's output for (N, P+R) rows; where they were packed, also which are real.

    Where the attention is that of `prefix`, all rows pass as one without their padding,
    which is a third of them where lengths differ as they do in Nectar.
    """
    inputs = response_inputs(**tokens)
    if states is not None:
        del inputs["input_ids"]
        inputs["inputs_embeds"] = states
    if packs(layers.config) and type(layers) not in _PADDED_ONLY:
        real = inputs["attention_mask"].bool()
        flat = {n: x[real][None] for n, x in inputs.items() if n != "attention_mask"}
        segments = torch.where(real, 1, PADDING)
        width = tokens["prompt_ids"].shape[1]
        segments[:, :width].masked_fill_(tokens["prompt_mask"], PROMPT)
        ends = real.sum(1, keepdim=True) - 1  # of the one response a row
        try:
            return forward_packed(layers, flat, segments, ends)[0], real
        except LayoutLost:
            _PADDED_ONLY.add(type(layers))
    return layers(**inputs, use_cache=False), None


def _padded(flat: Tensor, real: Tensor) -> Tensor:
    """(1, tokens, H) → (N, P+R, H) with zeros where nothing is real; keeps gradients."""
    wide = flat.new_zeros(*real.shape, flat.shape[-1])
    return wide.index_put((real,), flat[0])


def states_before(
    layers: PreTrainedModel, tokens: dict[str, Tensor], states: Tensor | None = None
) -> Tensor:
    """(tokens, H) last hidden states before each response token: `row_states`' of those."""
    return predicting_states(
        row_states(layers, tokens, states), tokens["response_mask"]
    )


def predicting_states(hidden: Tensor, response_mask: Tensor) -> Tensor:
    """(N, P+R, H) hidden states → (tokens, H): the state before each response token.

    Response token t is predicted at position P − 1 + t; prompts are left-padded, so that
    P − 1 is every row's last prompt token. Only unmasked tokens are kept.
    """
    width = response_mask.shape[1]
    return hidden[:, -width - 1 : -1][response_mask]


def next_token_logits(head: nn.Module, config, states: Tensor) -> Tensor:
    """(tokens, H) last hidden states → (tokens, V) logits, as the whole model gives them.

    Some architectures scale or cap what the head gives (Cohere, Granite, Gemma 2).
    """
    logits = head(states) * _logit_scale(config)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _logit_scale(config) -> float:
    return getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)


def word_logprobs(
    head: nn.Module, config, states: Tensor, ids: Tensor, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(tokens, H) states, (tokens,) ids → log-probabilities and, if wanted, entropies.

    Through `vocabulary` where the head is frozen, else from the table of all logits.
    """
    if streams(head, config):
        states = states * _logit_scale(config)
        return ChosenLogprobs.apply(states, head.weight, ids, entropy)
    logits = next_token_logits(head, config, states)
    return token_logprobs(logits, ids), token_entropy(logits) if entropy else None


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """(tokens, V) logits and (tokens,) ids → (tokens,) log-probabilities in float32."""
    logits = logits.float()
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


@torch.no_grad()
def token_entropy(logits: Tensor) -> Tensor:
    """(tokens, V) logits → (tokens,) entropy of the next token in nats, for logging."""
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Inverse of x[mask]: (tokens,) → (N, R) with zeros elsewhere; keeps gradients."""
    return torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)


def sequence_logprobs(
    policy: PreTrainedModel,
    rollout: Rollout,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """(N, R) log-probabilities of a rollout's tokens under any policy.

    float32, of logits that are rounded to bf16 where autocast makes products in bf16.
    """
    policy = without_wrapper(policy)
    out = torch.zeros(rollout.response_mask.shape)
    starts = range(0, len(rollout), batch_size)
    with inference(policy):
        for i in tqdm(starts, "log-probs", disable=not progress, leave=False):
            part = rollout.select(range(i, min(i + batch_size, len(rollout))))
            out[i : i + batch_size] = _batch_logprobs(policy, part).cpu()
    return out


def _batch_logprobs(policy: PreTrainedModel, part: Rollout) -> Tensor:
    tensors = {name: getattr(part, name).to(policy.device) for name in TOKEN_FIELDS}
    mask, head = tensors["response_mask"], policy.get_output_embeddings()
    states = states_before(policy.base_model, tensors)
    chosen = word_logprobs(head, policy.config, states, tensors["response_ids"][mask])
    return scatter(chosen[0], mask)
