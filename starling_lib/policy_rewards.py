"""From what reward functions say to the rewards that a policy is trained on.

    reward functions → weighted sum → scale, clip, shift → − missing EOS → last token
    log π − log π_init → × KL coefficient → − at every token

Knows: rollouts, reward models and functions, running statistics. Does not know: policies'
losses, trainers.
"""

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from starling_lib.models import load_tokenizer, reward_head, without_wrapper
from starling_lib.prefix import use_fast_backward
from starling_lib.rollouts import Rollout, encode_prompt, row_states
from starling_lib.scoring import encode_response, reads_last_token, score_responses
from starling_lib.trunk import shared_layers, split_trunk

RewardFunction = PreTrainedModel | Callable[..., Sequence[float]]
# What to do about a value that is no reward, by where it came from.
FUNCTION_HINT = "return one finite number (float32) for each sample"
MODEL_HINT = (
    "the model's weights are not finite, or overflow: try STARLING_PRECISION=fp32"
)


class RewardOnTrunk:
    """A reward model that shares lower layers with the policy: only its upper ones run.

    The scores are those of `score_responses` up to rounding, for every response whose text
    is tokenised again as it was sampled.
    """

    def __init__(self, model: PreTrainedModel, layers: int):
        """`layers`: how many the policy's frozen trunk and the model have in common."""
        self.model, self.layers = model, layers
        use_fast_backward(model)
        _, self.top = split_trunk(model, len(model.base_model.layers) - layers)

    def __call__(self, states: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """(N,) scores from the (N, P+R, H) states after the common layers."""
        hidden = row_states(self.top, tokens, states)
        # Prompts are padded on the left: every response begins at position P.
        last = tokens["prompt_ids"].shape[1] + tokens["response_mask"].sum(1) - 1
        return reward_head(self.model, hidden[torch.arange(len(last)), last])


def retokenised(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Rows that a reward model reads as other tokens than the policy has sampled.

    A policy may spell a word in pieces that no tokeniser would choose; or the reward model
    has another chat template.
    """
    rows = []
    for i, (prompt, text) in enumerate(
        zip(rollout.prompts, rollout.texts, strict=True)
    ):
        read = encode_response(tokenizer, text, bool(rollout.finished[i]))
        sampled = rollout.response_ids[i][rollout.response_mask[i]].tolist()
        asked = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
        if read != sampled or encode_prompt(tokenizer, prompt) != asked:
            rows.append(i)
    return rows


class RewardSum:
    """Weighted sum of reward functions: rollout → (N,) scores, each mean kept for logs."""

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        tokenizers: Sequence[PreTrainedTokenizerBase | None] | None = None,
        weights: Sequence[float] | None = None,
    ):
        self.functions = [without_wrapper(f) for f in _listed(functions)]
        self.tokenizers = list(tokenizers or [None] * len(self.functions))
        self.weights = weights or [1.0] * len(self.functions)
        if not len(self.functions) == len(self.tokenizers) == len(self.weights):
            raise ValueError(
                f"{len(self.functions)} reward functions, {len(self.tokenizers)} "
                f"tokenizers, {len(self.weights)} weights: give one of each per function"
            )
        for i, function in enumerate(self.functions):
            if isinstance(function, PreTrainedModel):
                function.requires_grad_(False).eval()
                name = function.config._name_or_path
                self.tokenizers[i] = self.tokenizers[i] or load_tokenizer(name)
        self.last_means: dict[str, float] = {}
        self.on_trunk: dict[int, RewardOnTrunk] = {}

    def share_trunk(self, trunk: PreTrainedModel | None) -> None:
        """Find the reward models that have the lower layers of a policy's frozen trunk."""
        for i, model in enumerate(self.functions if trunk is not None else ()):
            if not isinstance(model, PreTrainedModel) or not reads_last_token(model):
                continue
            shared = shared_layers(trunk, model.base_model)
            # One layer of the model's own is left: a split needs two halves.
            if shared and (layers := min(shared, len(model.base_model.layers) - 1)):
                self.on_trunk[i] = RewardOnTrunk(model, layers)

    @property
    def trunk_layers(self) -> list[int]:
        """After which layers of the trunk its states must be known for `read`."""
        return [reward.layers for reward in self.on_trunk.values()]

    def read(
        self, below: dict[int, Tensor], tokens: dict[str, Tensor]
    ) -> dict[int, Tensor]:
        """Scores (N,) of the reward models on the trunk, by their numbers.

        `below`: states (N, P+R, H) after the `trunk_layers`.
        """
        shared = self.on_trunk.items()
        return {i: reward(below[reward.layers], tokens) for i, reward in shared}

    def to(self, device) -> None:
        for function in self.functions:
            if hasattr(function, "to"):  # a model, or a function that holds one
                function.to(device)

    def __call__(
        self,
        prompts: Dataset,
        rollout: Rollout,
        known: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """`known`: scores of reward models, by number, that were read on the trunk."""
        total = torch.zeros(len(rollout))
        for scores, weight in zip(
            self.each(prompts, rollout, known), self.weights, strict=True
        ):
            total += weight * scores
        return total

    def each(
        self,
        prompts: Dataset | None,
        rollout: Rollout,
        known: dict[int, Tensor] | None = None,
    ) -> list[Tensor]:
        """(N,) scores of every function, in order; their means are kept for logs."""
        told = []
        for i, function in enumerate(self.functions):
            name = getattr(function, "__name__", type(function).__name__)
            name = f"rewards/{i}_{name}"
            if known and i in known:
                values = self._completed(i, known[i], rollout)
            else:
                values = self._call(i, name, prompts, rollout)
            is_model = isinstance(function, PreTrainedModel)
            hint = MODEL_HINT if is_model else FUNCTION_HINT
            scores = checked_scores(values, rollout, name, hint)
            self.last_means[name] = scores.mean().item()
            told.append(scores)
        return told

    def _completed(self, i: int, scores: Tensor, rollout: Rollout) -> Tensor:
        """Scores read on the trunk, and the others read from their texts."""
        model, tokenizer = self.functions[i], self.tokenizers[i]
        scores = scores.float().cpu()
        if rows := retokenised(rollout, tokenizer):
            some = rollout.select(rows)
            texts = some.prompts, some.texts, some.finished
            scores[rows] = score_responses(model, tokenizer, *texts)
        return scores

    def _call(self, i: int, name: str, prompts: Dataset | None, rollout: Rollout):
        """What a function or a model, `name` in the logs, says; not checked yet."""
        function, tokenizer = self.functions[i], self.tokenizers[i]
        if isinstance(function, PreTrainedModel):
            return score_responses(
                function, tokenizer, rollout.prompts, rollout.texts, rollout.finished
            )
        names = [] if prompts is None else prompts.column_names
        columns = {c: list(prompts[c]) for c in names if c != "prompt"}
        completions = [
            [{"role": "assistant", "content": text}] for text in rollout.texts
        ]
        known = inspect.signature(function).parameters
        if "completion_finished" in known:
            columns["completion_finished"] = rollout.finished.tolist()
        columns |= {"prompts": rollout.prompts, "completions": completions}
        try:
            return function(**columns)
        except Exception as error:
            raise RuntimeError(
                f"{name} raised {type(error).__name__}: {error}; "
                + _failing_sample(function, columns, rollout)
            ) from error


def _listed(functions) -> list[RewardFunction]:
    """One reward function or a sequence of them as a list; TypeError where one is none."""
    several = isinstance(functions, Sequence) and not isinstance(functions, str)
    functions = list(functions) if several else [functions]
    for i, function in enumerate(functions):
        if not callable(function):
            raise TypeError(
                f"reward function {i} is {function!r}: give a reward model "
                "(`load_reward_model` reads a name or folder) or a function "
                "f(prompts, completions, **columns)"
            )
    return functions


def _failing_sample(function, columns: dict, rollout: Rollout) -> str:
    """The first sample on which the function raises when asked alone, in words."""
    for i in range(len(rollout)):
        try:
            function(**{name: values[i : i + 1] for name, values in columns.items()})
        except Exception:
            return f"alone on {_shown(rollout, i)} it raises, too"
    return "on no sample alone does it raise"


def _shown(rollout: Rollout, i: int) -> str:
    prompt = rollout.prompts[i][-1]["content"]
    return f"sample {i}: prompt {prompt[:200]!r}, response {rollout.texts[i][:200]!r}"


def _number(value) -> float:
    """A reward as a float, NaN where it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def _told(value) -> str:
    """A value as an error message names it, at most 100 characters."""
    return (repr(value) if isinstance(value, str) else f"{value}")[:100]


def checked_scores(
    values, rollout: Rollout, name: str, hint: str = FUNCTION_HINT
) -> Tensor:
    """Reward values as (N,) float32, or a ValueError that shows the offending sample.

    `name`: of the reward; `hint`: what to do about a value that is not finite.
    """
    try:
        values = list(values)
    except TypeError as error:
        forgotten = "; is a `return` missing?" if values is None else ""
        raise ValueError(
            f"{name} returned {_told(values)} for {len(rollout)} samples: it must "
            f"return a list of one number for each{forgotten}"
        ) from error
    if len(values) != len(rollout):
        raise ValueError(
            f"{name} returned {len(values)} rewards for {len(rollout)} samples"
        )
    # By way of float64: what float32 cannot hold becomes infinite, and is named, too.
    scores = torch.tensor([_number(v) for v in values], dtype=torch.float64).float()
    if bad := (~scores.isfinite()).nonzero().flatten().tolist():
        i = bad[0]
        raise ValueError(
            f"{name} returned {_told(values[i])} for {_shown(rollout, i)}; {hint}"
        )
    return scores


class RunningMoments:
    """Count, mean and variance of all rewards so far (Chan et al. 1979, parallel form)."""

    def __init__(self, count: float = 0.0, mean: float = 0.0, m2: float = 0.0):
        self.count, self.mean, self.m2 = count, mean, m2

    def update(self, count: float, mean: float, m2: float) -> None:
        """Add a batch given by its size, mean and Σ(x − mean)²."""
        total, delta = self.count + count, mean - self.mean
        self.m2 += m2 + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Sample standard deviation; 1 until there are two different values."""
        variance = self.m2 / (self.count - 1) if self.count > 1 else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0


class RewardScale:
    """Scores → scores / std, clipped to ± `limit`, plus `shift`.

    `kind`: "running" divides by the standard deviation of all rewards so far, "reference"
    by that of the first batch, "none" leaves scores alone, unclipped. Starling's authors
    shifted rewards slightly above zero, so that ending gains something (its code was not
    released: that the shift comes last is ours).
    """

    def __init__(self, kind: str, limit: float, shift: float = 0.0):
        self.kind, self.limit, self.shift = kind, limit, shift
        self.moments = RunningMoments()

    @property
    def std(self) -> float:
        return 1.0 if self.kind == "none" else self.moments.std

    def __call__(self, scores: Tensor, everyone: Tensor | None = None) -> Tensor:
        """(N,) scaled scores; `everyone`: those of all processes, for the statistics."""
        known = self.kind == "reference" and self.moments.count > 0
        if self.kind != "none" and not known:
            everyone = (scores if everyone is None else everyone).double()
            spread = ((everyone - everyone.mean()) ** 2).sum().item()
            self.moments.update(len(everyone), everyone.mean().item(), spread)
        if self.kind != "none":
            scores = (scores / self.std).clamp(-self.limit, self.limit)
        return scores + self.shift

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold: arguments of `RunningMoments`."""
        return dict(vars(self.moments))


class KLCoefficient:
    """Weight of the KL in the reward, steered to a target where there is one.

    β ← β (1 + clip(KL/target − 1, ± 0.2) · n / horizon) after n responses (Ziegler et al.
    2019, arXiv 1909.08593, §2.2, whose K_β = 0.1 a batch is n / horizon here, as in trlx;
    at most 1, or β could turn negative and pay for distance).
    """

    def __init__(self, value: float, target: float | None = None, horizon: float = 1e4):
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl: float, responses: int) -> None:
        """Take in the mean KL of that many responses, in nats a response."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * min(responses / self.horizon, 1)


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """(N, R) rewards: −β (log π − log π_init) a token, the score on the last token."""
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0)
    last = mask.sum(1) - 1
    rewards[torch.arange(len(mask)), last] += scores
    return rewards
