"""Worlds in which the true reward is known: what does each ranking loss recover?

A prompt shows K responses with random features x ~ N(0, I); the true reward is θ*·x. A
judge orders them, a loss of `losses` is minimised over θ, and θ is held against θ*. The
theory says (arXiv 2301.11270, Theorems 4.1 to 4.3): where the judge follows the
Plackett-Luce model, MLE_K and MLE_2 both find θ*, and MLE_K with the smaller error. Other
judges, for which it proves nothing, stand beside it. The settings are ours, chosen to
have seven responses like Nectar and to take seconds.

Knows: random numbers and losses. Does not know: text, models, data sets.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize
from torch import Tensor
from tqdm.auto import tqdm

from starling_lib.losses import kwise_loss, pairwise_loss
from starling_lib.statistics import student_interval

Generator = np.random.Generator
Judge = Callable[[np.ndarray, Generator], np.ndarray]
Loss = Callable[[Tensor], Tensor]


# --- judges: rewards (N, K) → orders (N, K), column numbers best first


def plackett_luce(rewards: np.ndarray, rng: Generator) -> np.ndarray:
    """Choose the best, then the best of the rest: rewards plus Gumbel noise, sorted.

    Luce 1959, Plackett 1975; the noise is Yellott's (1977) form of the same model.
    """
    return np.argsort(-(rewards + rng.gumbel(size=rewards.shape)), axis=1)


def elimination(rewards: np.ndarray, rng: Generator) -> np.ndarray:
    """Throw out the worst, then the worst of the rest: Plackett-Luce from below.

    Each single pair is Bradley-Terry with the same rewards, so MLE_2 stays consistent;
    from K = 3 on the ranking as a whole is not Plackett-Luce, and MLE_K does not.
    """
    return plackett_luce(-rewards, rng)[:, ::-1]


def thurstone(rewards: np.ndarray, rng: Generator) -> np.ndarray:
    """Rewards plus normal noise (Thurstone 1927), as spread out as Gumbel noise."""
    noise = rng.normal(scale=np.pi / np.sqrt(6), size=rewards.shape)
    return np.argsort(-(rewards + noise), axis=1)


def careful_at_the_top(rewards: np.ndarray, rng: Generator, top: int = 3) -> np.ndarray:
    """Plackett-Luce for the first `top` places, the others in any order at all.

    What a judge does that looks for the good responses and shuffles the rest.
    """
    order = plackett_luce(rewards, rng)
    return np.hstack([order[:, :top], rng.permuted(order[:, top:], axis=1)])


JUDGES: dict[str, Judge] = {
    "Plackett-Luce": plackett_luce,
    "elimination": elimination,
    "Thurstone": thurstone,
    "careful at the top": careful_at_the_top,
}
ESTIMATORS: dict[str, Loss] = {
    "MLE_K": kwise_loss,
    "MLE_2": pairwise_loss,
    "top 3": partial(kwise_loss, top=3),
}


# --- one estimate


def fit(features: Tensor, loss: Loss, bound: float = 10.0) -> np.ndarray:
    """(d,) minimiser over θ of `loss(features @ θ)`; features (N, K, d), best first.

    θ stays in the box |θ_i| ≤ `bound`, as the paper bounds its norm: a handful of
    rankings may be separable, and their likelihood then grows without end.
    """

    def value_and_slope(theta: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.tensor(theta, requires_grad=True)
        value = loss(features @ theta)
        value.backward()
        return value.item(), theta.grad.numpy()

    start = np.zeros(features.shape[-1])
    box = [(-bound, bound)] * len(start)
    options = {"ftol": 1e-11, "gtol": 1e-6}
    found = minimize(value_and_slope, start, jac=True, bounds=box, options=options)
    return found.x


def reward_error(theta: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """How far the rewards of θ are from the true ones, over pairs of responses.

    `error`: root mean square difference in Δr (nats), ‖θ − θ*‖_Σ with Σ = E ΔxΔxᵀ, the
    paper's semi-norm; `cosine`: correlation of the two Δr, and `angle`, its arccosine in
    degrees, are blind to the scale of θ. The features are N(0, I), so Σ = 2I exactly.
    """
    size = np.linalg.norm(theta) * np.linalg.norm(truth)
    cosine = np.clip(theta @ truth / size, -1, 1) if size > 0 else np.nan
    error = np.sqrt(2) * np.linalg.norm(theta - truth)
    angle = np.degrees(np.arccos(cosine))
    return {"error": float(error), "cosine": float(cosine), "angle": float(angle)}


# --- the experiment


def simulate(
    judges: Mapping[str, Judge] = JUDGES,
    estimators: Mapping[str, Loss] = ESTIMATORS,
    sizes: Sequence[int] = (50, 100, 200, 500),
    seeds: int = 30,
    responses: int = 7,
    dimension: int = 8,
    scale: float = 2.0,
    progress: bool = True,
) -> pd.DataFrame:
    """Fit every estimator to every judge's rankings, for several sizes and seeds.

    θ* is a random direction of length `scale`: the standard deviation of a response's
    reward. A seed's larger sets contain its smaller ones, and all estimators see the
    same rankings: compare them within a seed (`efficiency`).

    Returns one row a fit: `judge, estimator, n, seed, error, cosine, angle`.
    """
    rows = []
    runs = [(name, seed) for name in judges for seed in range(seeds)]
    for name, seed in tqdm(runs, "simulating", disable=not progress, leave=False):
        rng = np.random.default_rng(seed)
        truth = rng.normal(size=dimension)
        truth *= scale / np.linalg.norm(truth)
        features = rng.normal(size=(max(sizes), responses, dimension))
        order = judges[name](features @ truth, rng)
        ranked = torch.tensor(np.take_along_axis(features, order[:, :, None], 1))
        for estimator, loss in estimators.items():
            for n in sizes:
                key = {"judge": name, "estimator": estimator, "n": n, "seed": seed}
                rows.append(key | reward_error(fit(ranked[:n], loss), truth))
    return pd.DataFrame(rows)


def efficiency(
    results: pd.DataFrame,
    estimator: str = "MLE_2",
    reference: str = "MLE_K",
    measure: str = "error",
) -> pd.DataFrame:
    """How many times the error of `reference` an estimator's error is, seed by seed.

    `results` as `simulate` returns them; `measure` "error" or "angle" (of the reward's
    direction only). Geometric mean of the ratio over seeds with Student's interval of its
    logarithm: above 1 the reference is better, and its square is how many times as many
    rankings the estimator needs. Columns `judge, n, ratio, low, high`.
    Raises KeyError on an estimator that was not simulated.
    """
    keys = ["judge", "n", "seed"]
    errors = results.pivot_table(measure, keys, "estimator", sort=False)
    logs = np.log(errors[estimator] / errors[reference])
    rows = []
    for (judge, n), values in logs.groupby(keys[:2], sort=False):
        ratio, low, high = np.exp(student_interval(values))
        rows.append({"judge": judge, "n": n, "ratio": ratio, "low": low, "high": high})
    return pd.DataFrame(rows)
