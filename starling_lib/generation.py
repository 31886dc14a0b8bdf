"""Token lists in, sampled token lists out: one batch, as few wasted FLOPs as possible.

`generate` does the steps. Around it, four things that it does not do: prompts are read
in groups of like length, so that short ones are not padded to the longest; equal prompts
are read once, and so is what all begin with (the chat template's system message); rows
that have ended leave the batch; hidden states that training wants are kept as they pass.

Knows: tokens, key-value caches. Does not know: text, rewards.
"""

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer

# A group's shortest prompt has at least this share of its longest one's tokens.
LIKE_LENGTH = 0.8
# Tokens between two looks at which rows have ended: dropping rows copies the cache.
CHUNK = 16


class InverseSampling(LogitsProcessor):
    """Draws from softmax(logits / T) by its inverse distribution function.

    One uniform number a row, then `generate` takes the only token left. Its own sampler
    draws an exponential number for every word of the vocabulary, which on a CPU takes a
    large share of every step.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.temperature != 1:
            scores = scores / self.temperature
        # Sums in float64: in float32 the tail of a large vocabulary would be lost.
        cumulative = scores.float().softmax(-1).cumsum(-1, dtype=torch.float64)
        uniform = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device)
        token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        token = token.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class RoomyLayer(DynamicLayer):
    """Keys and values with room to grow: a token is written, the others not copied."""

    room: tuple[Tensor, Tensor] | None = None  # what `keys` and `values` are views of

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end, new = length + key_states.shape[-2], (key_states, value_states)
        if self.room is None or self.room[0].shape[-2] < end:
            self.room = tuple(
                x.new_empty(*x.shape[:-2], end + CHUNK, x.shape[-1]) for x in new
            )
            if length:
                self.room[0][..., :length, :] = self.keys
                self.room[1][..., :length, :] = self.values
        for buffer, states in zip(self.room, new, strict=True):
            buffer[..., length:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token lists → (N, P) ids and bool mask, padded on the left."""
    return _pad(rows, pad_id, "left")


def right_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token lists → (N, P) ids and bool mask, padded on the right."""
    return _pad(rows, pad_id, "right")


def _pad(rows, pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tensors, True, padding_value=pad_id, padding_side=side)
    ones = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return ids, pad_sequence(ones, True, padding_value=False, padding_side=side)


def generate_rows(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
    temperature: float,
    keep_after: Sequence[int] = (),
) -> tuple[list[list[int]], list[dict[int, Tensor]]]:
    """One response a prompt: token lists, cut after the first EOS or at the limit.

    temperature = 0 is greedy. Random numbers are torch's own: seed them before. Beside
    the responses, for each prompt, the states (tokens, H) after each of `keep_after`
    layers, of prompt and response; only of a policy that `keeps_states`.
    """
    ids, mask = (x.to(policy.device) for x in left_pad(prompts, pad_id))
    width, alive = ids.shape[1], torch.arange(len(prompts))
    rows: list[list[int]] = [[] for _ in prompts]
    kept: list[dict[int, Tensor]] = [{} for _ in prompts]
    with plain_generation(policy), states_in_cache(policy, keep_after):
        cache = read_prompts(policy, prompts, pad_id, len(keep_after))
        for done in range(0, max_new_tokens, CHUNK):
            count = min(CHUNK, max_new_tokens - done)
            out = _continue(
                policy, ids, mask, cache, count, eos_id, pad_id, temperature
            )
            new = out[:, ids.shape[1] :]
            mask = F.pad(mask, (0, new.shape[1]), value=True)
            for i, row in zip(alive.tolist(), new.tolist(), strict=True):
                rows[i] += _until(row, eos_id)
            ends = (new == eos_id).any(1)
            leaves = ends | (done + count == max_new_tokens)
            if keep_after and leaves.any():
                states = kept_states(policy, out, mask, cache, keep_after)
                for place in leaves.nonzero().squeeze(1).tolist():
                    i = int(alive[place])
                    span = slice(width - len(prompts[i]), width + len(rows[i]))
                    kept[i] = {n: x[place, span].clone() for n, x in states.items()}
            going = (~ends).nonzero().squeeze(1)
            if len(going) == 0:
                break
            mask, ids, alive = mask[going], out[going], alive[going.cpu()]
            if len(going) < len(out):
                cache.batch_select_indices(going)
    return rows, kept


def _continue(policy, ids, mask, cache, count, eos_id, pad_id, temperature) -> Tensor:
    """`ids` (N, T) with up to `count` more columns; the cache knows all but the last."""
    draw = [InverseSampling(temperature)] if temperature > 0 else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return policy.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            past_key_values=cache,
            max_new_tokens=count,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            do_sample=False,  # the processor has already drawn
            logits_processor=LogitsProcessorList(draw),
        )


def _until(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def plain_cache(policy: PreTrainedModel) -> bool:
    """Does the policy's cache hold keys and values of every token in every layer?"""
    layers = DynamicCache(config=policy.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def keeps_states(policy: PreTrainedModel) -> bool:
    """Can states be kept in it: do the layers stand and take the cache as in Llama?"""
    layers = getattr(policy.base_model, "layers", ())
    takes = [inspect.signature(type(layer).forward).parameters for layer in layers[:1]]
    return plain_cache(policy) and any("past_key_values" in names for names in takes)


@contextlib.contextmanager
def states_in_cache(policy: PreTrainedModel, after: Sequence[int]) -> Iterator[None]:
    """Inside, caches also take in the states after so many layers, for each number.

    They stand in layers that the cache has beyond the policy's: what is done to rows of
    keys and values (growing, choosing, padding) is then done to them.
    """
    layers = policy.base_model.layers if after else ()

    def keep(place: int):
        def hook(module, args, kwargs, output) -> None:
            states = output[0] if isinstance(output, tuple) else output
            states = states[:, None]  # one head
            cache = kwargs["past_key_values"]
            cache.update(states, states[..., :1], place)

        return hook

    handles = [
        layers[n - 1].register_forward_hook(keep(len(layers) + j), with_kwargs=True)
        for j, n in enumerate(after)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kept_states(
    policy: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    cache: DynamicCache,
    after: Sequence[int],
) -> dict[int, Tensor]:
    """(N, T, H) states of `ids` (N, T), the last of which the policy has yet to read."""
    policy.base_model(
        input_ids=ids[:, -1:],
        attention_mask=mask.long(),
        position_ids=mask.sum(1, keepdim=True) - 1,
        past_key_values=cache,
        use_cache=True,
    )
    extra = cache.layers[-len(after) :]
    states = {n: layer.keys[:, 0] for n, layer in zip(after, extra, strict=True)}
    cache.crop(-1)  # `generate` reads the last token itself
    return states


def read_prompts(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    extra: int = 0,
) -> DynamicCache:
    """The cache of all prompts but their last tokens, rows padded on the left.

    Empty, for `generate` to fill, where layers keep other things than keys and values of
    every token (sliding windows). `extra` layers more for `states_in_cache`.
    """
    cache = DynamicCache(config=policy.config)
    if not plain_cache(policy):
        return cache
    cache.layers = [RoomyLayer() for _ in range(len(cache.layers) + extra)]
    width = max(map(len, prompts)) - 1
    heads = sorted({tuple(row[:-1]) for row in prompts}, key=len)
    if width == 0 or len(heads[0]) == 0:
        return cache
    common = common_beginning(heads)
    begun = _empty_cache(policy, extra)
    if common:
        _read(policy, [common], pad_id, begun)
    rests = like_lengths([head[len(common) :] for head in heads])
    parts = [_read_group(policy, group, pad_id, begun, width) for group in rests]
    place = {head: i for i, head in enumerate(heads)}
    rows = torch.tensor([place[tuple(row[:-1])] for row in prompts]).to(policy.device)
    for layer in range(len(parts[0].layers)):
        keys, values = (
            torch.cat([getattr(part.layers[layer], name) for part in parts])[rows]
            for name in ("keys", "values")
        )
        cache.update(keys, values, layer)
    return cache


def like_lengths(rows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Rows sorted by length, in groups that need little padding."""
    start = 0
    for end in range(1, len(rows) + 1):
        full = end == len(rows) or len(rows[start]) < LIKE_LENGTH * len(rows[end])
        if full:
            yield list(rows[start:end])
            start = end


def common_beginning(rows: Sequence[Sequence[int]]) -> Sequence[int]:
    """What several rows begin with, at least one token of each left behind it."""
    if len(rows) == 1:
        return rows[0][:0]
    first, last = min(rows), max(rows)  # in the order of words in a dictionary
    end = min(map(len, rows)) - 1
    same = (i for i in range(end) if first[i] != last[i])
    return first[: next(same, end)]


def _empty_cache(policy: PreTrainedModel, extra: int) -> DynamicCache:
    cache = DynamicCache(config=policy.config)
    cache.layers += [DynamicLayer() for _ in range(extra)]
    return cache


def _read(policy, rows, pad_id: int, cache: DynamicCache) -> Tensor:
    """One forward of the trunk, behind what the cache holds. (N,) pads after the rows.

    After, so that no pad stands between a row and what the cache holds: some models
    measure distances by place.
    """
    ids, mask = (x.to(policy.device) for x in right_pad(rows, pad_id))
    before, width = cache.get_seq_length(), ids.shape[1]
    places = torch.arange(before, before + width, device=ids.device)
    policy.base_model(
        input_ids=ids,
        attention_mask=F.pad(mask, (before, 0), value=True).long(),
        position_ids=places.expand_as(ids),
        past_key_values=cache,
        use_cache=True,
    )
    return (~mask).sum(1)


def _read_group(policy, rows, pad_id: int, begun: DynamicCache, width: int):
    """The cache of rows that go on from `begun` (one row), left-padded to `width`."""
    cache = copy.deepcopy(begun)
    cache.batch_repeat_interleave(len(rows))
    pads = _read(policy, rows, pad_id, cache)
    places = torch.arange(cache.get_seq_length(), device=pads.device)
    source = (places - pads[:, None]).clamp(min=0)[:, None, :, None]
    for layer in cache.layers:
        layer.keys, layer.values = (
            F.pad(x.gather(2, source.expand_as(x)), (0, 0, width - x.shape[2], 0))
            for x in (layer.keys, layer.values)
        )
    return cache


@contextlib.contextmanager
def plain_generation(policy: PreTrainedModel) -> Iterator[None]:
    """Put the model's own generation settings away for the enclosed lines.

    `generate` adds them to what it is given: a repetition penalty or a minimum length of
    the published model would make the sampler another distribution than the policy.
    """
    published = policy.generation_config
    policy.generation_config = GenerationConfig()
    try:
        yield
    finally:
        policy.generation_config = published
