"""Policy, critic and reference on one trunk: what APA, AWR and PPO optimise.

Knows: log-probabilities, values and entropies of sampled responses; which layers are
trained and which run once. Does not know: rewards, losses, trainers.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from starling_lib.models import ValueHead
from starling_lib.prefix import use_fast_backward
from starling_lib.rollouts import (
    next_token_logits,
    predicting_states,
    response_inputs,
    scatter,
    token_entropy,
    token_logprobs,
)
from starling_lib.sharding import FirstShards, is_sharded
from starling_lib.trunk import freeze_below, try_split_trunk


class ActorCritic(nn.Module):
    """Policy and critic as one module: everything trainable happens in `forward`.

    The critic is a head on the policy's last hidden state or, with `separate`, on its own
    copy of the trained layers. Frozen lower layers run once an iteration
    (`trunk_states`), but not of a policy sharded at loading; sampling always uses the
    whole policy. Raises ValueError for a copy of what is sharded.
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
        if self._halves is None:
            return None
        return self._halves[0](**response_inputs(**tokens)).last_hidden_state

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        self.policy.gradient_checkpointing_enable(**kwargs)

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        trunk_states: Tensor | None = None,
        for_logging: bool = False,
    ) -> dict[str, Tensor]:
        """`logprobs`, `values` of each response token, (N, R), 0 at padding.

        The value of token t is read where t is predicted: before it is known.
        `for_logging` adds `entropy`, which costs as much as the log-probabilities, and
        the `logits` (tokens, V) of the unmasked tokens.
        """
        inputs = response_inputs(prompt_ids, prompt_mask, response_ids, response_mask)
        if trunk_states is None:
            trunk_states = self.trunk_states(
                prompt_ids=prompt_ids,
                prompt_mask=prompt_mask,
                response_ids=response_ids,
                response_mask=response_mask,
            )
        states = top_states(self._top, inputs, trunk_states)
        states = predicting_states(states, response_mask)
        head = self.policy.get_output_embeddings()
        logits = next_token_logits(head, self.config, states)
        logprobs = token_logprobs(logits, response_ids[response_mask])
        entropy = token_entropy(logits) if for_logging else None
        if self.value_trunk is not None:
            states = top_states(self.value_trunk, inputs, trunk_states)
            states = predicting_states(states, response_mask)
        out = {"logprobs": logprobs, "values": self.value_head(states)}
        out |= {"entropy": entropy} if for_logging else {}
        out = {name: scatter(x, response_mask) for name, x in out.items()}
        return {**out, "logits": logits} if for_logging else out


class Reference:
    """The initial policy, frozen: only its trained layers are a copy."""

    def __init__(self, top: PreTrainedModel, head: nn.Module):
        self.top = copy.deepcopy(top).requires_grad_(False).eval()
        trained = any(p.requires_grad for p in head.parameters())
        self.head = copy.deepcopy(head).requires_grad_(False) if trained else head

    def to(self, device: torch.device) -> None:
        self.top.to(device)
        self.head.to(device)

    @torch.no_grad()
    def logits(self, tokens: dict[str, Tensor], trunk_states: Tensor | None) -> Tensor:
        """(tokens, V) logits from which the initial policy draws each response token."""
        states = top_states(self.top, response_inputs(**tokens), trunk_states)
        states = predicting_states(states, tokens["response_mask"])
        return next_token_logits(self.head, self.top.config, states)

    def logprobs(
        self, tokens: dict[str, Tensor], trunk_states: Tensor | None
    ) -> Tensor:
        """(N, R) log-probabilities of the response tokens under the initial policy."""
        mask = tokens["response_mask"]
        logits = self.logits(tokens, trunk_states)
        return scatter(token_logprobs(logits, tokens["response_ids"][mask]), mask)


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


def top_states(
    top: PreTrainedModel, inputs: dict[str, Tensor], trunk_states: Tensor | None
) -> Tensor:
    """Last hidden states (N, P+R, H), from the trunk's states where they are known."""
    start = {"input_ids": inputs["input_ids"]}
    if trunk_states is not None:
        start = {"inputs_embeds": trunk_states}
    rest = {k: inputs[k] for k in ("attention_mask", "position_ids")}
    return top(**start, **rest, use_cache=False).last_hidden_state
