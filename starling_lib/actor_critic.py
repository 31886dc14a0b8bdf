"""Policy, critic and reference on one trunk: what APA, AWR and PPO optimise.

Knows: log-probabilities, values and entropies of sampled responses; which layers are
trained and which run once. Does not know: rewards, losses, trainers.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from starling_lib.models import ValueHead
from starling_lib.prefix import use_fast_backward
from starling_lib.rollouts import (
    layer_states,
    next_token_logits,
    predicting_states,
    response_inputs,
    scatter,
    states_before,
    token_entropy,
    token_logprobs,
    word_logprobs,
)
from starling_lib.sharding import FirstShards, is_sharded
from starling_lib.trunk import freeze_below, try_split_trunk


class ActorCritic(nn.Module):
    """Policy and critic as one module: everything trainable happens in `forward`.

    The critic is a head on the policy's last hidden state or, with `separate`, on its own
    copy of the trained layers. Frozen lower layers run once an iteration
    (`trunk_states`, if sampling has not kept their states), but not of a policy sharded
    at loading; sampling always uses the whole policy. Raises ValueError for a copy of
    what is sharded.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        value_head: ValueHead | None = None,
        num_layers_unfrozen: int | None = None,
        separate: bool = False,
        adapted: bool = False,
    ):
        super().__init__()
        if separate and is_sharded(policy):
            raise ValueError(
                "separate_value_model=True copies layers, which a policy sharded at "
                "loading does not allow: use False"
            )
        if not adapted:  # adapters have frozen what they do not train
            freeze_below(policy, num_layers_unfrozen)
        use_fast_backward(policy)
        self.policy = policy
        self.value_head = value_head or ValueHead(policy.config.hidden_size)
        # In a tuple, so that the shared layers are not registered (and saved) twice.
        split_at = None if is_sharded(policy) else num_layers_unfrozen
        self._halves = try_split_trunk(policy, split_at)
        self.value_trunk = copy.deepcopy(self._top) if separate else None

    @property
    def config(self):
        return self.policy.config

    @property
    def _top(self) -> PreTrainedModel:
        """The layers that are trained: the upper half, or the whole trunk."""
        return self._halves[1] if self._halves else self.policy.base_model

    @property
    def frozen_trunk(self) -> PreTrainedModel | None:
        """The layers below the trained ones, which run once; None without a split."""
        return self._halves[0] if self._halves else None

    def frozen_reference(self) -> "Reference":
        """A frozen copy of the policy as it is now, on the same trunk."""
        if is_sharded(self.policy):
            return ShardedReference(self.policy)
        return Reference(self._top, self.policy.get_output_embeddings())

    @torch.no_grad()
    def trunk_states(self, **tokens: Tensor) -> Tensor | None:
        """(N, P+R, H) states below the trained layers; None where there is no split."""
        found = self.trunk_layers((), **tokens)
        return found[len(self.frozen_trunk.layers)] if found else None

    @torch.no_grad()
    def trunk_layers(self, after: Sequence[int], **tokens: Tensor) -> dict[int, Tensor]:
        """States (N, P+R, H) after so many layers and below the trained ones, by number.

        One pass through the frozen trunk; {} where there is no split.
        """
        if self._halves is None:
            return {}
        last = len(self.frozen_trunk.layers)
        return layer_states(self.frozen_trunk, tokens, sorted({*after, last}))

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        self.policy.gradient_checkpointing_enable(**kwargs)
        if self.value_trunk is not None:
            self.value_trunk.gradient_checkpointing_enable(**kwargs)

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        trunk_states: Tensor | None = None,
        for_logging: bool = False,
        want_logits: bool = False,
    ) -> dict[str, Tensor]:
        """`logprobs`, `values` of each response token, (N, R), 0 at padding.

        The value of token t is read where t is predicted: before it is known.
        `for_logging` adds `entropy`, `want_logits` the `logits` (tokens, V) of the unmasked
        tokens.
        """
        tokens = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "response_ids": response_ids,
            "response_mask": response_mask,
        }
        if trunk_states is None:
            trunk_states = self.trunk_states(**tokens)
        states = states_before(self._top, tokens, trunk_states)
        head, ids = self.policy.get_output_embeddings(), response_ids[response_mask]
        logits = next_token_logits(head, self.config, states) if want_logits else None
        logprobs, entropy = (
            word_logprobs(head, self.config, states, ids, for_logging)
            if logits is None
            else (token_logprobs(logits, ids), token_entropy(logits))
        )
        if self.value_trunk is not None:
            states = states_before(self.value_trunk, tokens, trunk_states)
        out = {"logprobs": logprobs, "values": self.value_head(states)}
        out |= {"entropy": entropy} if for_logging else {}
        out = {name: scatter(x, response_mask) for name, x in out.items()}
        return {**out, "logits": logits} if want_logits else out


class Reference:
    """The initial policy, frozen: only what is trained (layers, adapters) is a copy."""

    def __init__(self, top: PreTrainedModel, head: nn.Module):
        frozen = {id(p): p for p in top.parameters() if not p.requires_grad}
        self.top = copy.deepcopy(top, frozen).requires_grad_(False).eval()
        trained = any(p.requires_grad for p in head.parameters())
        self.head = copy.deepcopy(head).requires_grad_(False) if trained else head

    def to(self, device: torch.device) -> None:
        self.top.to(device)
        self.head.to(device)

    @torch.no_grad()
    def logits(self, tokens: dict[str, Tensor], trunk_states: Tensor | None) -> Tensor:
        """(tokens, V) logits from which the initial policy draws each response token."""
        states = states_before(self.top, tokens, trunk_states)
        return next_token_logits(self.head, self.top.config, states)

    @torch.no_grad()
    def logprobs(
        self, tokens: dict[str, Tensor], trunk_states: Tensor | None
    ) -> Tensor:
        """(N, R) log-probabilities of the response tokens under the initial policy."""
        mask = tokens["response_mask"]
        states = states_before(self.top, tokens, trunk_states)
        ids = tokens["response_ids"][mask]
        chosen, _ = word_logprobs(self.head, self.top.config, states, ids)
        return scatter(chosen, mask)


class ShardedReference(Reference):
    """The same for a policy sharded at loading: the policy with its first weights."""

    def __init__(self, policy: PreTrainedModel):
        self.policy, self.first_shards = policy, FirstShards(policy)

    def to(self, device: torch.device) -> None:
        """Shards are where they belong."""

    @torch.no_grad()
    def logits(self, tokens: dict[str, Tensor], trunk_states: None) -> Tensor:
        inputs = response_inputs(**tokens)
        with self.first_shards.in_place():
            logits = self.policy(**inputs, use_cache=False).logits
        return predicting_states(logits, tokens["response_mask"])

    def logprobs(self, tokens: dict[str, Tensor], trunk_states: None) -> Tensor:
        mask = tokens["response_mask"]
        logits = self.logits(tokens, trunk_states)
        return scatter(token_logprobs(logits, tokens["response_ids"][mask]), mask)


def join_rows(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two sets of rows as one batch: prompts padded on the left, responses on the right.

    Both hold `prompt_ids, prompt_mask, response_ids, response_mask`, (N, P) and (N, R)
    of their own widths, and may hold `trunk_states` (N, P+R, H).
    """
    widths = [
        (x["prompt_ids"].shape[1], x["response_ids"].shape[1]) for x in (first, second)
    ]
    prompt, response = map(max, zip(*widths, strict=True))
    joined = {}
    for name in first:
        parts = []
        for rows, (p, r) in zip((first, second), widths, strict=True):
            left = 0 if name.startswith("response") else prompt - p
            right = 0 if name.startswith("prompt") else response - r
            inner = (0, 0) * (rows[name].dim() - 2)  # F.pad counts from the last axis
            parts.append(F.pad(rows[name], (*inner, left, right)))
        joined[name] = torch.cat(parts)
    return joined
