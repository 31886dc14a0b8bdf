"""Before and after: what a policy does on held-out prompts, and how sure we are.

Knows how to sample from a policy, to ask any reward function for its opinion, and to
compare two policies with intervals over prompts. Does not know how a policy or a reward
was trained. One row of a frame is one sampled response; the unit of every interval is
the prompt, because samples of one prompt resemble each other.
"""

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from starling_lib.bench_compare import compare as compare
from starling_lib.mt_bench import RewardFunction
from starling_lib.mt_bench import read_judgments as read_judgments
from starling_lib.mt_bench import read_questions as read_questions
from starling_lib.mt_bench import score_table as score_table
from starling_lib.statistics import paired_difference
from starling_lib.win_rates import (
    length_controlled_win_rate as length_controlled_win_rate,
)

if TYPE_CHECKING:
    from IPython.display import HTML
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from starling_lib.rollouts import Rollout

Messages = list[dict[str, str]]
SAMPLE_KEYS = ["prompt_index", "sample"]


def distinct_n(texts: Iterable[str], n: int = 2) -> float:
    """Share of different word n-grams among all of them, over all texts together.

    1 when no n-gram is said twice, near 0 when one phrase repeats; NaN when no text has
    n words. Falls with the amount of text, so compare equal amounts only.
    Source: Li et al. 2016, arXiv 1510.03055 (distinct-1, distinct-2).
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.lower().split()
        counts.update(zip(*(words[i:] for i in range(n)), strict=False))
    return len(counts) / counts.total() if counts else float("nan")


def evaluate_policy(
    policy: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Messages],
    reward_fn: RewardFunction,
    *,
    reference: "PreTrainedModel | None" = None,
    samples: int = 4,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Sample from `policy` at temperature 1 and score what it says.

    Args:
        prompts: message lists that end in a user turn.
        reward_fn: (prompts, responses, finished) → one number a response.
        reference: policy that the KL is measured to; the policy itself gives zeros.
        samples: responses a prompt.
        batch_size: responses sampled at once.

    Returns:
        One row a sample: `prompt_index`, `sample`, `prompt` (last user turn),
        `response`, `reward`, `tokens` (EOS included), `finished` (ended by its own
        EOS), `kl` (nats: k3 summed over the response; NaN without a reference).

    Raises:
        ValueError: when `reward_fn` returns another number of rewards than responses.
    """
    from starling_lib.rollouts import sample

    rollout = sample(
        policy,
        tokenizer,
        list(prompts),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        samples=samples,
        progress=progress,
    )
    finished = rollout.finished.tolist()
    rewards = [float(r) for r in reward_fn(rollout.prompts, rollout.texts, finished)]
    if len(rewards) != len(rollout.texts):
        raise ValueError(
            f"reward_fn returned {len(rewards)} rewards for {len(rollout.texts)} "
            "responses; it must return one a response, in their order"
        )
    return pd.DataFrame(
        {
            "prompt_index": np.repeat(np.arange(len(prompts)), samples),
            "sample": np.tile(np.arange(samples), len(prompts)),
            "prompt": [messages[-1]["content"] for messages in rollout.prompts],
            "response": rollout.texts,
            "reward": rewards,
            "tokens": rollout.lengths.tolist(),
            "finished": finished,
            "kl": _response_kl(policy, reference, rollout).tolist(),
        }
    )


def _response_kl(
    policy: "PreTrainedModel", reference: "PreTrainedModel | None", rollout: "Rollout"
) -> "Tensor":
    """(N,) nats of KL(policy ‖ reference) per response: k3 summed over its tokens.

    Both log-probs come from the same forward over whole rows: those kept while sampling
    carry another rounding, which k3 would count as divergence.
    """
    import torch

    from starling_lib.objectives import response_kl
    from starling_lib.rollouts import sequence_logprobs

    if reference is None:
        return torch.full((len(rollout.texts),), float("nan"))
    if reference is policy:
        return torch.zeros(len(rollout.texts))
    logprobs = sequence_logprobs(policy, rollout)
    reference_logprobs = sequence_logprobs(reference, rollout)
    return response_kl(logprobs, reference_logprobs, rollout.response_mask)


def _match_samples(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Both frames side by side on (prompt_index, sample), suffixes `_before`, `_after`.

    Raises:
        ValueError: when the frames do not hold the same samples of the same prompts.
    """
    pairs = before.merge(
        after,
        on=SAMPLE_KEYS,
        suffixes=("_before", "_after"),
        validate="one_to_one",
    )
    if not len(pairs) == len(before) == len(after):
        raise ValueError(
            f"{len(before)} samples before and {len(after)} after share {len(pairs)} "
            "(prompt_index, sample) pairs; evaluate both policies on the same prompts "
            "with the same number of samples"
        )
    differing = pairs.loc[pairs.prompt_before != pairs.prompt_after, "prompt_index"]
    if len(differing):
        raise ValueError(
            f"prompt {differing.iloc[0]} differs between the two frames; "
            "evaluate both policies on the same list of prompts"
        )
    return pairs


def _wins(pairs: pd.DataFrame) -> pd.Series:
    """1 where `after` got the higher reward, 0 where the lower, one half for a tie."""
    return (np.sign(pairs.reward_after - pairs.reward_before) + 1) / 2


def win_rate(before: pd.DataFrame, after: pd.DataFrame) -> float:
    """Share of (prompt, sample) pairs in which `after` has the higher reward, ties ½.

    Raises:
        ValueError: when the frames do not hold the same samples of the same prompts.
    """
    return float(_wins(_match_samples(before, after)).mean())


def prompt_metrics(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a prompt: its samples' mean reward, KL, tokens, EOS rate, distinct-2."""
    groups = frame.groupby("prompt_index")
    return pd.DataFrame(
        {
            "reward": groups["reward"].mean(),
            "kl": groups["kl"].mean(),
            "tokens": groups["tokens"].mean(),
            "eos_rate": groups["finished"].mean(),
            "distinct_2": groups["response"].agg(distinct_n),
        }
    )


def compare_policies(
    before: pd.DataFrame, after: pd.DataFrame, *, seed: int = 0
) -> pd.DataFrame:
    """Both policies' metrics and the paired difference with its interval over prompts.

    Each metric is first averaged within a prompt, then over prompts; the interval is a
    bootstrap over prompts and the p-value comes from flipping the signs of the prompts'
    differences (`statistics.paired_difference`). `win_rate` is compared with ½.

    Args:
        before, after: frames of `evaluate_policy` on the same prompts.

    Returns:
        Index `metric` (reward, win_rate, kl, tokens, eos_rate, distinct_2), columns
        `before, after, difference, low, high, p_value`, all over the prompts on which
        both have a figure (`distinct_2` takes a response of two words). Where no prompt
        has both, `before` and `after` are each over its own; NaN where nothing was
        measured.

    Raises:
        ValueError: when the frames do not hold the same samples of the same prompts.
    """
    pairs = _match_samples(before, after)
    old, new = prompt_metrics(before), prompt_metrics(after)
    old["win_rate"] = 0.5
    new["win_rate"] = _wins(pairs).groupby(pairs.prompt_index).mean()
    metrics = ["reward", "win_rate", "kl", "tokens", "eos_rate", "distinct_2"]
    rows = [_difference_row(old[name], new[name], seed) for name in metrics]
    return pd.DataFrame(rows, index=pd.Index(metrics, name="metric"))


def _difference_row(old: pd.Series, new: pd.Series, seed: int) -> dict[str, float]:
    """Means and paired difference over the prompts on which both have a figure."""
    both = pd.concat([old, new], axis=1, keys=["before", "after"]).dropna()
    if both.empty:
        nothing = dict.fromkeys(("difference", "low", "high", "p_value"), np.nan)
        return {"before": old.mean(), "after": new.mean(), **nothing}
    paired = paired_difference(both["after"], both["before"], seed=seed)
    return {
        "before": both["before"].mean(),
        "after": both["after"].mean(),
        "difference": paired.difference,
        "low": paired.low,
        "high": paired.high,
        "p_value": paired.p_value,
    }


def _evenly_by_gain(pairs: pd.DataFrame, n: int) -> pd.DataFrame:
    """`n` rows from the largest gain to the largest loss, evenly spaced in between.

    One candidate a prompt (its sample 0), so that no prompt comes twice.
    """
    candidates = pairs[pairs["sample"] == pairs["sample"].min()]
    gain = candidates.reward_after - candidates.reward_before
    ordered = candidates.assign(gain=gain).sort_values(
        "gain", ascending=False, kind="stable"
    )
    picks = np.linspace(0, len(ordered) - 1, min(n, len(ordered))).round().astype(int)
    return ordered.iloc[picks]


def _response_cell(row: pd.Series, side: str) -> str:
    """One table cell: the escaped response, a mark if it was cut, reward and tokens."""
    text = html.escape(row[f"response_{side}"])
    if not row[f"finished_{side}"]:
        text += ' <b title="cut at the token limit">[cut]</b>'
    figures = f"reward {row[f'reward_{side}']:+.2f} · {row[f'tokens_{side}']} tokens"
    return f"<td>{text}<br><small><i>{figures}</i></small></td>"


SIDE_BY_SIDE_STYLE = """<style>
.side-by-side { border-collapse: collapse; width: 100%; table-layout: fixed }
.side-by-side caption { caption-side: top; text-align: left; padding: 4px 0 }
table.side-by-side thead th, table.side-by-side tbody td { text-align: left;
  vertical-align: top; padding: 8px; white-space: pre-wrap; overflow-wrap: anywhere;
  border-top: 1px solid rgba(128, 128, 128, .4) }
table.side-by-side thead th:first-child { width: 24% }
</style>"""


def side_by_side(before: pd.DataFrame, after: pd.DataFrame, n: int = 6) -> "HTML":
    """A table of prompts with the response before and after, for reading.

    The rows are picked by a fixed rule that the caption states, never by taste: each
    prompt's first sample, ordered by its gain in reward, from the largest gain to the
    largest loss in even steps. All text is escaped.

    Raises:
        ValueError: when the frames do not hold the same samples of the same prompts.
    """
    from IPython.display import HTML

    pairs = _match_samples(before, after)
    rows = [
        f"<tr><td>{html.escape(row.prompt_before)}<br><small><i>gain "
        f"{row.gain:+.2f}</i></small></td>"
        f"{_response_cell(row, 'before')}{_response_cell(row, 'after')}</tr>"
        for _, row in _evenly_by_gain(pairs, n).iterrows()
    ]
    caption = (
        f"{len(rows)} of {pairs.prompt_index.nunique()} prompts, first sample of each: "
        "from the largest gain in reward to the largest loss, in even steps."
    )
    head = "<tr><th>prompt</th><th>before</th><th>after</th></tr>"
    return HTML(
        f'{SIDE_BY_SIDE_STYLE}<table class="side-by-side"><caption>{caption}</caption>'
        f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    )
