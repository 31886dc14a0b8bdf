"""Pessimistic rewards: what a reward model says, less what its rankings leave open.

Where few rankings compared responses like this one, a high score is luck as often as
merit, and a policy trained on the score finds just those. Zhu, Jordan and Jiao
(arXiv 2301.11270, §3) train on a lower bound instead: with φ the last hidden state,

    r(x) − β · ‖φ(x) − v‖ under (Σ + λI)⁻¹,
    Σ = mean over rankings of 2 / K(K−1) · Σ over pairs of ΔφΔφᵀ

where Δφ is the difference of two ranked responses, v a reference, 0 unless another is
given, and λ a damping that shrinks faster than the weight of one ranking. With these
defaults the bound picks a good action in their bandit (Theorem 3.9), where the score
alone stays wrong for any amount of data. Their bound is for a reward linear in fixed
features. Here the features were learnt from the same rankings, so it is a heuristic with
their formula: look at `uncertainty` of texts you know before choosing β. (The reward
model of notebook 02, fitted to 24 rankings: a good answer cut in half is 2.5 times as far
as the whole one, with its words shuffled 1.2 times, said three times 1.07 times.)

Knows: features, rankings, a reward model as a function. Does not know: policies.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from starling_lib.models import load_reward_model, load_tokenizer, quiet, reward_head
from starling_lib.rollouts import Messages
from starling_lib.scoring import response_features

FILE = "pessimism.safetensors"
AT_ONCE = 256  # rankings that `fit` reads together, batched by length


@dataclass(frozen=True)
class Coverage:
    """What n rankings compared, in a feature space of d dimensions. float64.

    `covariance` (d, d) is the paper's Σ (Theorem 4.1; K = 2: Theorem 3.1): the mean over
    rankings of the mean outer product of the differences φ(better) − φ(worse), so that it
    does not grow with n. `center` (d) is the mean feature of all ranked responses.
    """

    covariance: Tensor
    center: Tensor
    rankings: int

    def root(self, ridge: float | None = None) -> Tensor:
        """(d, d) lower Cholesky root of Σ + λI, with λ = ridge × Σ's mean diagonal.

        Relative, because features have no unit that a number could be given in. None is
        1/n², at least 1e-9: a ranking weighs 1/n in Σ, and λ must vanish beside even one.
        At 1/n, one imagined ranking in every direction, what was compared once would look
        better known than it is, whatever n: in the paper's bandit with two features that
        is enough for the worst actions to win. Raises ValueError if Σ is zero.
        """
        size = self.covariance.diagonal().mean()
        if size == 0:
            raise ValueError(
                "the ranked responses all have the same features, so nothing was "
                "compared: fit on rankings whose texts differ"
            )
        if ridge is None:
            ridge = max(self.rankings**-2, 1e-9)  # less is lost in float64's rounding
        damping = ridge * size
        eye = torch.eye(len(self.center), dtype=torch.float64)
        return torch.linalg.cholesky(self.covariance + damping * eye)


def distance(features: Tensor, reference: Tensor, root: Tensor) -> Tensor:
    """(N,) float64 norms ‖φ − v‖ under (root · rootᵀ)⁻¹ of (N, d) features.

    In units of the data: 1 along any axis is the size of its typical ranked difference.
    """
    offsets = (features.double() - reference.double()).T
    return torch.linalg.solve_triangular(root, offsets, upper=False).norm(dim=0)


def coverage(
    features: Iterable[Tensor], ranks: Sequence[Sequence[float]] | None = None
) -> Coverage:
    """Accumulate rankings: `features` yields (K, d) for each, K may differ.

    `ranks` holds the K ranks of each (1 best); responses of equal rank were not told
    apart and form no pair. Without it all pairs count. Rankings without a pair are left
    out. Raises ValueError when nothing is left or a feature is not finite.
    """
    total = center = torch.zeros((), dtype=torch.float64)
    rankings = responses = 0
    for row, one in enumerate(features):
        if not one.isfinite().all():
            raise ValueError(f"ranking {row}: a feature is not finite; check the model")
        differences = _differences(one.double(), None if ranks is None else ranks[row])
        if len(differences):
            total = total + differences.T @ differences / len(differences)
            center = center + one.double().sum(0)
            rankings, responses = rankings + 1, responses + len(one)
    if not rankings:
        raise ValueError(
            "no ranking with two responses of different rank to learn from"
        )
    return Coverage(total / rankings, center / responses, rankings)


def _differences(features: Tensor, ranks: Sequence[float] | None) -> Tensor:
    """(pairs, d) differences of all pairs of a ranking (their sign does not matter)."""
    i, j = torch.triu_indices(len(features), len(features), 1)
    if ranks is not None:
        ranks = torch.as_tensor(ranks)
        ordered = ranks[i] != ranks[j]
        i, j = i[ordered], j[ordered]
    return features[i] - features[j]


def confidence_radius(
    rankings: int, dimension: int, delta: float = 0.05, scale: float = 1.0
) -> float:
    """β = scale · √((d + ln 1/δ) / n): how the paper's bound shrinks (Theorem 3.1).

    Its constant, in `scale`, is far larger than what helps in practice: tune β by what
    the policy reaches, and use this to carry a β from one amount of data to another.
    """
    return scale * math.sqrt((dimension + math.log(1 / delta)) / rankings)


def _check_conversations(prompts: Sequence, completions: Sequence) -> None:
    for name, texts in (("prompts", prompts), ("completions", completions)):
        for i, text in enumerate(texts):
            if isinstance(text, str) or not text:
                raise ValueError(
                    f"{name}[{i}]: expected messages, got {text!r:.60}; give prompts as "
                    'lists of {"role": …, "content": …}'
                )


class PessimisticReward:
    """A reward model with its lower confidence bound, as a reward function.

    Takes the place of the reward in any trainer: `reward(prompts=…, completions=…)` gives
    a list of floats, as TRL's reward functions do. `fit` it once on the rankings that the
    reward model was trained on. The model is only read: its mode and the `requires_grad`
    of its parameters stay as they are, and no gradient reaches them.

    `reference` is "zero" (the paper's plainest form, ‖φ‖ itself), "mean" (of the ranked
    responses) or a (d) tensor. The features of a language model have a large part that
    all responses share. It cancels in every difference, so from zero it counts as never
    compared: it adds much the same to every response, and what one has of its own shows
    less, or not at all (a random two-layer model: gibberish no further than the ranked
    texts). "mean" takes it out, and what is unlike all ranked responses stands out (there
    1.9 times as far; in notebook 02 a good answer said three times is 24 % further than
    said once, from zero 7 %). But what the data only compare among themselves then looks
    certain, in the paper's bandit the two worst actions, so it has no guarantee.

    `ridge` is the damping relative to Σ, None 1/n² for n rankings, see `Coverage.root`.
    A direction that no ranking compared then counts up to n times its usual size; where
    the rankings span few of the directions that is most of the distance, and a larger
    ridge, such as 0.01, softens it. A β belongs to its reference and ridge: choose it
    anew with them.
    """

    __name__ = "pessimistic_reward"

    def __init__(
        self,
        reward_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        coverage: Coverage | None = None,
        *,
        beta: float,
        ridge: float | None = None,
        reference: str | Tensor = "zero",
        batch_size: int = 16,
    ):
        if beta < 0 or (ridge is not None and ridge <= 0):
            raise ValueError(f"beta={beta}, ridge={ridge}: need beta ≥ 0 and ridge > 0")
        if isinstance(reference, str) and reference not in ("mean", "zero"):
            raise ValueError(f"reference={reference!r}: 'mean', 'zero' or a tensor")
        self.reward_model, self.tokenizer = reward_model, tokenizer
        self.coverage = coverage
        self.beta, self.ridge, self.reference = beta, ridge, reference
        self.batch_size = batch_size

    def fit(self, rankings: Dataset, progress: bool = True) -> "PessimisticReward":
        """Learn from rows of `load_rankings` which differences were ever compared."""
        ranked = "ranks" in rankings.column_names
        ranks = list(rankings["ranks"]) if ranked else None
        self.coverage = coverage(self._ranked_features(rankings, progress), ranks)
        return self

    def _ranked_features(self, rankings: Dataset, progress: bool) -> Iterator[Tensor]:
        """(K, d) features of each ranking; those of AT_ONCE rankings are held."""
        starts = range(0, len(rankings), AT_ONCE)
        for start in tqdm(starts, "features", disable=not progress, leave=False):
            prompts, responses, finished, sizes = [], [], [], []
            end = min(start + AT_ONCE, len(rankings))
            for row in rankings.select(range(start, end)):
                count = len(row["responses"])
                prompts += [row["prompt"]] * count
                responses += row["responses"]
                finished += row.get("finished") or [True] * count
                sizes.append(count)
            yield from self.features(prompts, responses, finished).split(sizes)

    def __call__(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[Messages],
        completion_finished: Sequence[bool] | None = None,
        **columns,
    ) -> list[float]:
        """Lower bounds, one for each completion (messages, the answer last).

        `completion_finished`: False where the token limit cut a completion, which is then
        read at its last token and not at an EOS it never had. Without it every completion
        counts as ended, as in TRL. Other columns are ignored.
        """
        _check_conversations(prompts, completions)
        pairs = list(zip(prompts, completions, strict=True))
        asked = [[*prompt, *completion[:-1]] for prompt, completion in pairs]
        texts = [completion[-1]["content"] for completion in completions]
        return self.lower_bounds(asked, texts, completion_finished).tolist()

    def lower_bounds(
        self,
        prompts: Sequence[Messages],
        responses: Sequence[str],
        finished: Sequence[bool] | None = None,
    ) -> Tensor:
        """(N,) float64 rewards less β times their uncertainty."""
        features = self.features(prompts, responses, finished)
        return self.scores(features).double() - self.beta * self.uncertainty(features)

    def features(self, prompts, responses, finished=None, progress=False) -> Tensor:
        """(N, d) features: the states that the reward model's head reads."""
        return response_features(
            self.reward_model,
            self.tokenizer,
            prompts,
            responses,
            finished,
            self.batch_size,
            progress,
        )

    def scores(self, features: Tensor) -> Tensor:
        """(N,) rewards of the model itself."""
        with torch.no_grad():
            features = features.to(self.reward_model.device)
            return reward_head(self.reward_model, features).cpu()

    def uncertainty(self, features: Tensor) -> Tensor:
        """(N,) distances from the reference, see `distance`."""
        if self.coverage is None:
            raise ValueError("no coverage yet: call fit(rankings), or give one")
        reference = self.reference
        if isinstance(reference, str):
            center = self.coverage.center
            reference = center if reference == "mean" else torch.zeros_like(center)
        return distance(features, reference, self.coverage.root(self.ridge))

    def to(self, device: str | torch.device) -> "PessimisticReward":
        """Move the reward model; the covariance stays where it is."""
        self.reward_model.to(device)
        return self

    def save(self, folder: str | Path) -> None:
        """Write the reward model, its tokenizer and, beside them, what `fit` learnt.

        The folder stays one that `load_reward_model` reads.
        """
        if self.coverage is None:
            raise ValueError("nothing to save before fit(rankings)")
        folder = Path(folder)
        with quiet():
            self.reward_model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        known = self.coverage
        tensors = {"covariance": known.covariance, "center": known.center}
        settings = {"beta": self.beta, "ridge": self.ridge, "rankings": known.rankings}
        if isinstance(self.reference, Tensor):
            tensors["reference"] = self.reference.contiguous()
        else:
            settings["reference"] = self.reference
        partial = folder / f"{FILE}.tmp"
        save_file(tensors, partial, metadata={"settings": json.dumps(settings)})
        os.replace(partial, folder / FILE)

    @classmethod
    def load(cls, folder: str | Path, **changes) -> "PessimisticReward":
        """Read what `save` wrote; `changes` are other settings, such as `beta`."""
        folder = Path(folder)
        tensors = load_file(folder / FILE)
        with safe_open(folder / FILE, framework="pt") as file:
            settings = json.loads(file.metadata()["settings"])
        settings.setdefault("reference", tensors.pop("reference", None))
        known = Coverage(**tensors, rankings=settings.pop("rankings"))
        tokenizer = load_tokenizer(folder)
        model = load_reward_model(folder, tokenizer)
        return cls(model, tokenizer, known, **{**settings, **changes})
