"""K responses behind one shared prompt in one forward.

    [ prompt | response 1 | response 2 | … | response K ]

Positions restart after the prompt for each response, and a token sees the prompt and its
own response only, so every response gets the hidden states of a forward of its own while
the prompt is computed once instead of K times.

Knows: token rows, masks, attention. Does not know: losses, text. The names of `trunk`
are here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from starling_lib.models import reward_head
from starling_lib.trunk import TrunkCache, freeze_below, split_trunk, try_split_trunk

__all__ = [
    "PrefixLayout",
    "RankingScorer",
    "TrunkCache",
    "attend",
    "attention_mask_for",
    "forward_packed",
    "freeze_below",
    "longest_span",
    "pack_ranking",
    "packs",
    "prefix_layout",
    "segment_mask",
    "shared_prefix_attention",
    "split_trunk",
    "stack_rankings",
    "try_split_trunk",
    "use_fast_backward",
]

PROMPT, PADDING = 0, -1  # segment ids; responses are 1 … K
SHARED_PREFIX = "shared_prefix"  # name under which transformers finds our attention


def pack_ranking(
    prompt_ids: Sequence[int], response_ids: Sequence[Sequence[int]]
) -> dict[str, list[int]]:
    """Lay one prompt and its K responses out in one row of T tokens.

    Returns lists `input_ids`, `position_ids`, `segment_ids` (0 prompt, k response k) of
    length T, and `ends` (K): the index of each response's last token. Raises ValueError
    on an empty prompt or response.

    >>> packed = pack_ranking([11, 12], [[21, 22], [31]])
    >>> packed["input_ids"], packed["position_ids"], packed["ends"]
    ([11, 12, 21, 22, 31], [0, 1, 2, 3, 2], [3, 4])
    """
    if not prompt_ids or not all(response_ids):
        raise ValueError("pack_ranking: the prompt and every response need a token")
    row = {
        "input_ids": list(prompt_ids),
        "position_ids": list(range(len(prompt_ids))),
        "segment_ids": [PROMPT] * len(prompt_ids),
        "ends": [],
    }
    for k, ids in enumerate(response_ids, start=1):
        row["input_ids"] += ids
        row["position_ids"] += range(len(prompt_ids), len(prompt_ids) + len(ids))
        row["segment_ids"] += [k] * len(ids)
        row["ends"].append(len(row["input_ids"]) - 1)
    return row


def stack_rankings(rows: Sequence[dict], pad_id: int) -> dict[str, Tensor]:
    """Right-pad packed rows to (B, T) tensors; missing responses have `ends` = −1."""
    fill = {"input_ids": pad_id, "position_ids": 0, "segment_ids": PADDING, "ends": -1}
    return {
        key: nn.utils.rnn.pad_sequence(
            [torch.tensor(row[key]) for row in rows], True, padding_value=value
        )
        for key, value in fill.items()
    }


def segment_mask(segment_ids: Tensor) -> Tensor:
    """Who may look at whom: (B, T) segments → (B, 1, T, T) bool, True = may attend.

    A token sees itself and earlier tokens of the prompt and of its own segment. Padding
    sees only padding, so that no row of the softmax is empty (that would be NaN).
    """
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    steps = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    causal = steps[None, :] <= steps[:, None]
    return (causal & ((key == query) | ((key == PROMPT) & (query > 0))))[:, None]


def longest_span(segment_ids: Tensor) -> int:
    """Tokens of the longest prompt with one of its responses: how far attention reaches."""
    segments = torch.arange(1, max(int(segment_ids.max()), 1) + 1)
    segments = segments.to(segment_ids.device)[:, None, None]
    longest = (segment_ids == segments).sum(-1).amax(0)  # (B,)
    return int(((segment_ids == PROMPT).sum(-1) + longest).max())


def attention_mask_for(model: PreTrainedModel, segment_ids: Tensor) -> Tensor:
    """`segment_mask` in the form that the model's attention implementation reads.

    sdpa takes the bool mask; eager adds a mask to the logits, so it gets 0 and the most
    negative number. Raises ValueError for any other implementation and for rows longer
    than a sliding window (a 4-D mask would silently switch the window off).
    """
    config = model.config
    window = getattr(config, "sliding_window", None)
    if window is not None and (span := longest_span(segment_ids)) > window:
        raise ValueError(
            f"a prompt and one response have {span} tokens, more than the model's "
            f"sliding window of {window}: shorten them (max_length)"
        )
    if config._attn_implementation == SHARED_PREFIX:
        # Four dimensions tell transformers to build no mask; the layout says it all.
        return segment_ids.new_ones(1, 1, 1, 1, dtype=torch.bool)
    mask = segment_mask(segment_ids)
    if config._attn_implementation == "sdpa":
        return mask
    if config._attn_implementation == "eager":
        dtype = next(model.parameters()).dtype
        return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
    raise ValueError(
        f"attention {config._attn_implementation!r} cannot take a per-response mask: "
        "load the model with attn_implementation='sdpa' or 'eager'"
    )


class LayoutLost(ValueError):
    """A decoder keeps from its attention what it does not know (Nemotron, StableLM)."""


@dataclass(frozen=True)
class Part:
    """m runs of tokens, prompts or responses, of which attention is computed at once.

    Positions past an end point at the first token: causality keeps real tokens from
    seeing them, and nothing reads their output.
    """

    tokens: Tensor  # (m, n) token of each position
    owner: Tensor | None  # (m,) the prompt that each response sees; of a prompt None
    reach: int  # positions of that prompt, p
    bias: Tensor  # (m, 1, n, p + n): 0 where a token may look, else −inf


@dataclass(frozen=True)
class PrefixLayout:
    """Where B prompts and M responses lie among the T real tokens of packed rows.

    Made once a forward, used by every layer. P is the longest prompt.
    """

    prompts: Tensor  # (B, P) token of each prompt position
    parts: list[Part]  # the prompts, then the responses
    restore: Tensor  # (T,) place of each token among those of the parts, end to end
    ends: Tensor  # (M,) last token of each response


# Attention weights a head that a CPU computes at once: in its cache, with little padding.
AT_ONCE = 2**18


def prefix_layout(segment_ids: Tensor, ends: Tensor) -> PrefixLayout:
    """Layout of packed rows (B, T) with response `ends` (B, K; −1 = missing)."""
    real, prompt = segment_ids != PADDING, (segment_ids == PROMPT).sum(1)
    start = real.sum(1).cumsum(0) - real.sum(1)  # each row's first real token
    first = torch.cat([prompt[:, None], ends[:, :-1] + 1], 1)
    exists = ends >= 0
    owner = exists.nonzero()[:, 0]
    prompts = _spans(start, prompt)
    responses = _spans((start[:, None] + first)[exists], (ends - first + 1)[exists])
    pieces = [_part(rows, *prompts) for rows in _together(prompts[1])]
    for rows in _together(responses[1], prompts[1][owner]):
        pieces.append(_part(rows, *responses, owner, prompts[1]))
    tokens = torch.cat([part.tokens[inside] for part, inside in pieces])
    places = torch.cat([inside.flatten() for _, inside in pieces]).nonzero()[:, 0]
    restore = torch.empty_like(tokens).scatter_(0, tokens, places)
    last = (start[:, None] + ends)[exists]
    return PrefixLayout(prompts[0], [part for part, _ in pieces], restore, last)


def _together(inside: Tensor, seen: Tensor | None = None) -> list[slice]:
    """Runs (rows of `inside`) to compute at once, with the prompts that they see."""
    if inside.device.type != "cpu":
        return [slice(0, len(inside))]  # kernels like few large calls
    lengths = inside.sum(1).tolist()
    prompts = seen.sum(1).tolist() if seen is not None else [0] * len(lengths)
    found, start = [], 0
    for end in range(1, len(lengths) + 1):
        n, p = max(lengths[start : end + 1]), max(prompts[start : end + 1])
        if end == len(lengths) or (end + 1 - start) * n * (n + p) > AT_ONCE:
            found.append(slice(start, end))
            start = end
    return found


def _part(
    rows: slice,
    tokens: Tensor,
    inside: Tensor,
    owner: Tensor | None = None,
    in_prompt: Tensor | None = None,
) -> tuple[Part, Tensor]:
    """Some runs as a part, and which of its positions are in them (m, n)."""
    inside = inside[rows]
    width = int(inside.sum(1).max())
    inside, reach = inside[:, :width], 0
    visible = _causal(width, inside.device).expand(len(inside), -1, -1)
    if owner is not None:
        owner = owner[rows]
        shared = in_prompt[owner]
        reach = int(shared.sum(1).max())
        shared = shared[:, None, :reach].expand(-1, width, -1)
        visible = torch.cat([shared, visible], -1)
    bias = _bias(visible)[:, None]
    return Part(tokens[rows, :width], owner, reach, bias), inside


def _causal(width: int, device: torch.device) -> Tensor:
    return torch.ones(width, width, dtype=torch.bool, device=device).tril()


def _bias(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape, device=visible.device).masked_fill(
        ~visible, -torch.inf
    )


def _spans(first: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Token runs as a table (rows, longest) and which of its places are in the run."""
    steps = torch.arange(int(length.max()), device=first.device)
    inside = steps < length[:, None]
    return torch.where(inside, first[:, None] + steps, first[:, None]), inside


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: PrefixLayout | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of packed rows, segment by segment; without a layout, that of sdpa.

    The rows come as one row (1, H, T, D) of their real tokens. Prompts attend to
    themselves once, responses to their prompt and themselves. Work grows with
    K·N·(P + N) and not with (P + K·N)².
    """
    packed = attention_mask is not None and attention_mask.shape == (1, 1, 1, 1)
    if layout is None and packed and key.shape[2] > 1:
        raise LayoutLost(
            "this architecture does not tell its attention how rows are packed: load the "
            "model with attn_implementation='eager'"
        )
    if layout is None and (attention_mask is None or not _slow_backward(query)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
    rest = (kwargs.get("scaling"), kwargs.get("dropout") or 0.0)
    if layout is None:
        bias = attention_mask
        if bias.dtype == torch.bool:
            # Not −inf: a padded query may see nothing at all.
            lowest = torch.finfo(query.dtype).min
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, lowest)
        return attend(query, key, value, bias, *rest).transpose(1, 2).contiguous(), None
    tokens = [x[0].transpose(0, 1) for x in (query, key, value)]  # (T, heads, D)
    prompts = [x[layout.prompts].transpose(1, 2) for x in tokens[1:]]
    parts = []
    for part in layout.parts:
        rows, *own = (x[part.tokens].transpose(1, 2) for x in tokens)
        if part.owner is not None:
            own = [
                torch.cat([shared[part.owner, :, : part.reach], mine], 2)
                for shared, mine in zip(prompts, own, strict=True)
            ]
        parts.append(attend(rows, *own, part.bias, *rest).transpose(1, 2))
    flat = torch.cat([part.flatten(0, 1) for part in parts])
    return flat[layout.restore][None], None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale · QKᵀ + bias)V: (…, H, N, D) queries, H/g heads of keys → (…, H, N, D).

    For rows of this size torch's CPU kernel has a far slower backward than the lines
    below; everywhere else its kernels win. But they round otherwise, in bf16 by a
    fortieth of a nat a token, so that there a policy's log-probabilities would change
    by being trained: under autocast the lines serve without gradients too. The g queries
    of a key head are taken as more rows of one product, so that no key is copied.
    """
    scale = scale or query.shape[-1] ** -0.5
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    bias = bias.to(query.dtype)
    rounds = query.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not (rounds or _slow_backward(query)):
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale
        )
    rows = (query * scale).reshape(batch, key.shape[1], groups * length, -1)
    scores = (rows @ key.transpose(-1, -2)).unflatten(2, (groups, length))
    weights = (scores + bias.unsqueeze(-3)).softmax(-1, dtype=torch.float32)
    weights = F.dropout(weights.to(value.dtype), dropout, training=dropout > 0)
    return (weights.flatten(2, 3) @ value).view(query.shape)


def _slow_backward(query: Tensor) -> bool:
    return query.device.type == "cpu" and query.requires_grad


def use_fast_backward(model: PreTrainedModel) -> None:
    """Give a model loaded with sdpa this module's attention, which is sdpa elsewhere.

    Rows of such a model may be packed (`packs`).
    """
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(SHARED_PREFIX)


def packs(config) -> bool:
    """May rows pass as one: our attention, in every layer, no window?"""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None
    ours = config._attn_implementation == SHARED_PREFIX
    return ours and kinds == {"full_attention"} and not windowed


def forward_packed(
    trunk: PreTrainedModel, flat: dict[str, Tensor], segment_ids: Tensor, ends: Tensor
) -> tuple[BaseModelOutputWithPast, PrefixLayout]:
    """A trunk's output for the real tokens of packed rows, and how they lie.

    `flat`: its inputs (1, T, …) for the T tokens that are not padding, row after row;
    `segment_ids` (B, width) and `ends` (B, K) as `prefix_layout` takes them.
    """
    layout = prefix_layout(segment_ids, ends)
    mask = attention_mask_for(trunk, segment_ids)
    return trunk(**flat, attention_mask=mask, layout=layout, use_cache=False), layout


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)


class RankingScorer(nn.Module):
    """A reward model read at the end of each packed response.

    Everything trainable happens in `forward`, so DDP and autocast see all of it. A model
    loaded with sdpa attention is switched to `shared_prefix_attention`, which is sdpa for
    every other use of the model, and computes no padding: the real tokens of all rows
    pass as one row. eager keeps padded rows and a dense mask.

    With `num_layers_unfrozen` the frozen layers below may run apart (`trunk_states`), so
    that their result can be kept from one epoch to the next.
    """

    def __init__(
        self, reward_model: PreTrainedModel, num_layers_unfrozen: int | None = None
    ):
        super().__init__()
        use_fast_backward(reward_model)
        self.reward_model = reward_model
        # In a tuple, so that the shared layers are not registered (and saved) twice.
        self._halves = try_split_trunk(reward_model, num_layers_unfrozen)

    @property
    def config(self):
        return self.reward_model.config

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        ends: Tensor,
        trunk_states: Tensor | None = None,
    ) -> Tensor:
        """(B, T) packed rows and (B, K) `ends` → (B, K) scores, NaN where `ends` < 0.

        `trunk_states` (real tokens, H), from the method of that name, stand for the
        frozen layers.
        """
        trunk = self.reward_model.base_model
        start = {"input_ids": input_ids}
        if trunk_states is not None:
            trunk, start = self._halves[1], {"inputs_embeds": trunk_states[None]}
        if self.config._attn_implementation == SHARED_PREFIX:
            states, last = self._flat(trunk, start, position_ids, segment_ids, ends)
            hidden = states[last]
        else:
            mask = attention_mask_for(trunk, segment_ids)
            rest = {"position_ids": position_ids, "use_cache": False}
            states = trunk(**start, attention_mask=mask, **rest).last_hidden_state
            rows = torch.arange(len(ends), device=ends.device)[:, None]
            hidden = states[rows, ends.clamp(min=0)][ends >= 0]
        scores = reward_head(self.reward_model, hidden)
        return torch.full_like(ends, torch.nan, dtype=scores.dtype).masked_scatter(
            ends >= 0, scores
        )

    def _flat(self, trunk, start, position_ids, segment_ids, ends):
        """(real tokens, H) last hidden states, and where the M responses end in them."""
        real = segment_ids != PADDING
        if "input_ids" in start:
            start = {"input_ids": start["input_ids"][real][None]}
        flat = {**start, "position_ids": position_ids[real][None]}
        out, layout = forward_packed(trunk, flat, segment_ids, ends)
        return out.last_hidden_state[0], layout.ends

    @torch.no_grad()
    def trunk_states(
        self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, ends: Tensor
    ) -> Tensor:
        """(real tokens, H) states below the trained layers, rows one after another."""
        rest = (position_ids, segment_ids, ends)
        return self._flat(self.frozen_half, {"input_ids": input_ids}, *rest)[0]

    @property
    def frozen_half(self) -> PreTrainedModel:
        """The layers whose result `trunk_states` gives."""
        return self._halves[0]

    @property
    def can_split(self) -> bool:
        """Whether `trunk_states` may be computed apart and kept."""
        return self._halves is not None and (
            self.config._attn_implementation == SHARED_PREFIX
        )

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        self.reward_model.gradient_checkpointing_enable(**kwargs)
