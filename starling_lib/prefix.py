"""K responses behind one shared prompt in one forward, and the frozen-trunk split.

    [ prompt | response 1 | response 2 | … | response K ]

Positions restart after the prompt for each response, and a token sees the prompt and its
own response only, so every response gets the hidden states of a forward of its own while
the prompt is computed once instead of K times.

Knows: token rows, masks, the layers of a model. Does not know: losses, text.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from starling_lib.models import reward_head

PROMPT, PADDING = 0, -1  # segment ids; responses are 1 … K
SHARED_PREFIX = "shared_prefix"  # name under which transformers finds our attention


def pack_ranking(
    prompt_ids: Sequence[int], response_ids: Sequence[Sequence[int]]
) -> dict[str, list[int]]:
    """Lay one prompt and its K responses out in one row of T tokens.

    Returns lists `input_ids`, `position_ids`, `segment_ids` (0 prompt, k response k) of
    length T, and `ends` (K): the index of each response's last token. Raises ValueError
    on an empty prompt or response.
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


@dataclass(frozen=True)
class PrefixLayout:
    """Where prompts and responses lie in packed rows; made once, used by every layer.

    N is the longest response, P the longest prompt of the batch.
    """

    prompt_length: int  # P
    gather: Tensor  # (B·K·N,) flat token of each response position
    visible: Tensor  # (B, 1, N, P + N) bool: what a response token may attend to
    restore: Tensor  # (B·T,) flat index of each token among prompts, then responses


def prefix_layout(segment_ids: Tensor, ends: Tensor) -> PrefixLayout:
    """Lay packed rows (B, T) with response `ends` (B, K; −1 = missing) out for attention.

    Positions past a response's end point at its row's first token; causality keeps real
    tokens from seeing them, and nothing reads their output.
    """
    (rows, width), device = segment_ids.shape, segment_ids.device
    prompt = (segment_ids == PROMPT).sum(1)  # (B,)
    last = torch.where(ends < 0, -1, ends)
    first = torch.cat([prompt[:, None], last[:, :-1] + 1], 1)
    length = torch.where(ends < 0, 0, last - first + 1)
    longest, longest_prompt = int(length.max()), int(prompt.max())
    steps = torch.arange(longest, device=device)
    inside = steps < length[..., None]  # (B, K, N)
    tokens = torch.where(inside, first[..., None] + steps, 0)
    base = width * torch.arange(rows, device=device)
    own = (steps[None, :] <= steps[:, None]).expand(rows, longest, longest)
    shared = torch.arange(longest_prompt, device=device) < prompt[:, None]
    shared = shared[:, None].expand(rows, longest, longest_prompt)
    gather = (base[:, None, None] + tokens).view(-1)
    start = longest_prompt * torch.arange(rows, device=device)[:, None]
    in_prompt = torch.arange(width, device=device).clamp(max=longest_prompt - 1)
    restore = (start + in_prompt).view(-1)
    slots = rows * longest_prompt + torch.arange(inside.numel(), device=device)
    restore[gather[inside.view(-1)]] = slots[inside.view(-1)]
    visible = torch.cat([shared, own], -1)[:, None]
    return PrefixLayout(longest_prompt, gather, visible, restore)


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

    Prompts attend to themselves once; all responses of a batch attend to their prompt and
    themselves in one call. Work grows with K·N·(P + N) and not with (P + K·N)².
    """
    if layout is None and (attention_mask is None or not _slow_backward(query)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
    dropout = kwargs.get("dropout") or 0.0
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    if layout is None:
        out = attend(query, key, value, attention_mask, scale, dropout)
        return out.transpose(1, 2).contiguous(), None
    p, (rows, _, longest, _) = layout.prompt_length, layout.visible.shape
    prompts = [x[:, :, :p] for x in (query, key, value)]
    causal = torch.ones(p, p, dtype=torch.bool, device=query.device).tril()
    prompt_out = attend(*prompts, causal, scale, dropout)
    own = [_response_tokens(x, layout, rows, longest) for x in (query, key, value)]
    responses = own[0].shape[0] // rows
    keys, values = (
        torch.cat([x.repeat_interleave(responses, 0), mine], 2)
        for x, mine in zip(prompts[1:], own[1:], strict=True)
    )
    visible = layout.visible.repeat_interleave(responses, 0)
    response_out = attend(own[0], keys, values, visible, scale, dropout)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (prompt_out, response_out)]
    out = torch.cat(flat).index_select(0, layout.restore)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale · QKᵀ)V over the keys that are `visible`, (…, N, D).

    For rows of this size torch's CPU kernel has a far slower backward than the lines
    below; everywhere else its kernels win.
    """
    if not _slow_backward(query):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout, scale=scale
        )
    scores = (query * scale) @ key.transpose(-1, -2)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return F.dropout(weights, dropout, training=dropout > 0) @ value


def _slow_backward(query: Tensor) -> bool:
    return query.device.type == "cpu" and query.requires_grad


def use_fast_backward(model: PreTrainedModel) -> None:
    """Give a model loaded with sdpa this module's attention, which is sdpa elsewhere."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(SHARED_PREFIX)


def _response_tokens(
    x: Tensor, layout: PrefixLayout, rows: int, longest: int
) -> Tensor:
    """(B, H, T, D) → (B·K, H, N, D): every response as a row of its own."""
    tokens = x.transpose(1, 2).flatten(0, 1).index_select(0, layout.gather)
    return tokens.view(-1, longest, *tokens.shape[1:]).transpose(1, 2)


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)


class RankingScorer(nn.Module):
    """A reward model read at the end of each packed response.

    Everything trainable happens in `forward`, so DDP and autocast see all of it. A model
    loaded with sdpa attention is switched to `shared_prefix_attention`, which is sdpa for
    every other use of the model; eager keeps a dense mask.
    """

    def __init__(self, reward_model: PreTrainedModel):
        super().__init__()
        self.reward_model = reward_model
        use_fast_backward(reward_model)

    @property
    def config(self):
        return self.reward_model.config

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        ends: Tensor,
    ) -> Tensor:
        """(B, T) packed rows and (B, K) `ends` → (B, K) scores, NaN where `ends` < 0."""
        trunk, layout = self.reward_model.base_model, {}
        if self.config._attn_implementation == SHARED_PREFIX:
            layout["layout"] = prefix_layout(segment_ids, ends)
        hidden = trunk(
            input_ids=input_ids,
            attention_mask=attention_mask_for(trunk, segment_ids),
            position_ids=position_ids,
            use_cache=False,
            **layout,
        ).last_hidden_state
        rows = torch.arange(len(ends), device=ends.device)[:, None]
        scores = reward_head(self.reward_model, hidden[rows, ends.clamp(min=0)])
        return scores.masked_fill(ends < 0, float("nan"))

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        self.reward_model.gradient_checkpointing_enable(**kwargs)


def freeze_below(model: PreTrainedModel, num_layers_unfrozen: int | None) -> int:
    """Freeze the embeddings and all but the last N layers; return how many are frozen.

    The final norm and a head that is not tied to the embeddings stay trainable. None
    trains everything. Raises ValueError outside 1 … L.
    """
    layers = model.base_model.layers
    if num_layers_unfrozen is None:
        return 0
    if not 1 <= num_layers_unfrozen <= len(layers):
        raise ValueError(
            f"num_layers_unfrozen={num_layers_unfrozen}: this model has {len(layers)} "
            "layers; give 1 to that many, or None for all parameters"
        )
    frozen = len(layers) - num_layers_unfrozen
    for module in (model.get_input_embeddings(), *layers[:frozen]):
        module.requires_grad_(False)
    return frozen


def split_trunk(
    model: PreTrainedModel, num_layers_unfrozen: int
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two halves of a model's trunk: upper(inputs_embeds=lower(ids)) = the whole trunk.

    Both halves share the original's layers (training one trains the other). Keep them out
    of registered submodules, or their parameters would be saved twice. Raises ValueError
    for an architecture whose halves do not reproduce the whole.
    """
    trunk = model.base_model
    cut = len(trunk.layers) - num_layers_unfrozen
    lower = _half(trunk, slice(0, cut), norm=nn.Identity())
    upper = _half(trunk, slice(cut, None), embed_tokens=nn.Identity())
    _verify_split(trunk, lower, upper)
    return lower, upper


def _half(trunk: PreTrainedModel, part: slice, **replaced: nn.Module):
    """A shallow copy of `trunk`: only the layers of `part`, some modules replaced."""
    half = copy.copy(trunk)
    layers = nn.ModuleList(trunk.layers[part])
    # A shallow copy shares this dict: changing it in place would cut the original.
    half._modules = {**trunk._modules, **replaced, "layers": layers}
    half.config = copy.deepcopy(trunk.config)
    half.config.num_hidden_layers = len(half.layers)
    half.config.use_cache = False
    if getattr(trunk.config, "layer_types", None):
        half.config.layer_types = trunk.config.layer_types[part]
    return half


def _verify_split(trunk, lower, upper) -> None:
    """Raise ValueError unless the halves give the hidden states of the whole."""
    models = (trunk, lower, upper)
    was_training = trunk.training
    device = trunk.get_input_embeddings().weight.device
    ids = torch.arange(12, device=device)[None] % trunk.config.vocab_size
    for model in models:
        model.eval()
    with torch.no_grad(), _narrow_windows([model.config for model in models], 8):
        whole = trunk(ids, use_cache=False).last_hidden_state
        middle = lower(ids).last_hidden_state
        halves = upper(inputs_embeds=middle).last_hidden_state
    for model in models:
        model.train(was_training)
    if not torch.allclose(whole, halves, rtol=1e-3, atol=1e-4):
        gap = (whole - halves).abs().max().item()
        raise ValueError(
            f"{type(trunk).__name__} cannot be split into a frozen trunk and a top "
            f"(hidden states differ by {gap:.2g})"
        )


@contextlib.contextmanager
def _narrow_windows(configs: list, width: int) -> Iterator[None]:
    """Make sliding windows so short that a few tokens show how a model treats them."""
    windowed = [c for c in configs if getattr(c, "sliding_window", None)]
    before = [config.sliding_window for config in windowed]
    for config in windowed:
        config.sliding_window = width
    try:
        yield
    finally:
        for config, window in zip(windowed, before, strict=True):
            config.sliding_window = window


def try_split_trunk(model: PreTrainedModel, num_layers_unfrozen: int | None):
    """`split_trunk`, or None with a warning where the architecture does not allow it."""
    if num_layers_unfrozen is None or num_layers_unfrozen >= len(
        model.base_model.layers
    ):
        return None
    try:
        return split_trunk(model, num_layers_unfrozen)
    except (ValueError, AttributeError) as error:
        warnings.warn(f"no frozen-trunk split: {error}", stacklevel=2)
        return None
