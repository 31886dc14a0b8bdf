"""Reward models from K-wise rankings (Zhu, Jordan and Jiao 2023, arXiv 2301.11270).

Knows: the Plackett-Luce likelihood and its pairwise rival, training, scoring and judging
a reward model. Does not know: policies.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from starling_lib.checkpoints import (
    WrappedModelTrainer,
    check_arguments,
    machine_defaults,
)
from starling_lib.models import (
    inference,
    load_reward_model,
    load_tokenizer,
    reward_head,
)
from starling_lib.prefix import (
    RankingScorer,
    freeze_below,
    pack_ranking,
    stack_rankings,
)
from starling_lib.rankings import map_rows
from starling_lib.rollouts import Messages, encode_prompt

# --- losses: scores are (B, K), best first; False in `mask` means "no such response"


def kwise_loss(
    scores: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Plackett-Luce negative log-likelihood of the ranking, MLE_K (arXiv 2301.11270 §3).

    mean over rows of Σ_j [logsumexp(s_j, …, s_K) − s_j] / (K_i − 1), as Starling
    normalised it: equal scores at K = 7 give ln 7!/6 = 1.4209; K = 2 is Bradley-Terry.
    `weights` (B) makes it a weighted mean. Rows with one response count as zero loss.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    nll = torch.where(mask, _suffix_logsumexp(scores, mask) - scores, 0).sum(1)
    return _mean_rows(nll / (mask.sum(1) - 1).clamp(min=1), weights)


def pairwise_loss(
    scores: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Bradley-Terry loss of all K(K−1)/2 pairs, MLE_2 (Ouyang et al. 2022, eq. 1).

    mean over rows of the mean over pairs of −log σ(s_better − s_worse).
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    both = mask[:, better] & mask[:, worse]
    safe = torch.where(mask, scores, 0)
    losses = torch.where(both, -F.logsigmoid(safe[:, better] - safe[:, worse]), 0)
    return _mean_rows(losses.sum(1) / both.sum(1).clamp(min=1), weights)


def _suffix_logsumexp(scores: Tensor, mask: Tensor) -> Tensor:
    """logsumexp over each response and all that rank below it.

    `logcumsumexp` runs from the left, so flip, run, flip back: without the flips it sums
    over the better responses and the likelihood is wrong.
    """
    lowest = torch.finfo(scores.dtype).min / 4  # −inf − (−inf) is NaN
    filled = torch.where(mask, scores, lowest)
    return filled.flip(-1).logcumsumexp(-1).flip(-1)


def _mean_rows(losses: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return losses.mean()
    return (losses * weights).sum() / weights.sum()


LOSSES = {"kwise": kwise_loss, "pairwise": pairwise_loss}


# --- metrics


def reward_metrics(scores: Tensor, lengths: Tensor | None = None) -> dict[str, float]:
    """How well scores (B, K; best first, NaN = missing) recover the ranking.

    `accuracy`: share of all pairs ordered right (a tie counts ½); `adjacent_accuracy`:
    of neighbouring ranks only (the original's figure); `top1`: the best response scores
    highest (a tie of n counts 1/n); `kendall_tau`: mean over rows; `nll`: K-wise loss.
    With `lengths` (B, K) also `longer_wins`: the accuracy of preferring the longer
    response, the baseline to beat.
    """
    scores = torch.as_tensor(scores).double()
    mask = ~scores.isnan()
    wins, pairs, gap = _pair_wins(scores, mask)
    tau = (2 * wins.sum(1) - pairs.sum(1)) / pairs.sum(1).clamp(min=1)
    known = scores.nan_to_num(-torch.inf)
    best = known == known.amax(1, keepdim=True)
    metrics = {
        "accuracy": wins.sum() / pairs.sum(),
        "adjacent_accuracy": wins[:, gap == 1].sum() / pairs[:, gap == 1].sum(),
        "top1": (best[:, 0] / best.sum(1)).double().mean(),
        "kendall_tau": tau.mean(),
        "nll": kwise_loss(scores.nan_to_num(0), mask),
    }
    if lengths is not None:
        longer, _, _ = _pair_wins(torch.as_tensor(lengths).double(), mask)
        metrics["longer_wins"] = longer.sum() / pairs.sum()
    return {name: float(value) for name, value in metrics.items()}


def _pair_wins(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, pairs) wins of the better-ranked (tie ½), which pairs exist, rank gaps."""
    better, worse = torch.triu_indices(x.shape[1], x.shape[1], 1)
    exists = mask[:, better] & mask[:, worse]
    difference = x[:, better] - x[:, worse]
    wins = (difference > 0).double() + 0.5 * (difference == 0).double()
    return torch.where(exists, wins, 0), exists.double(), worse - better


def accuracy_by_gap(scores: Tensor) -> dict[int, float]:
    """Pair accuracy by rank gap 1 … K−1: far-apart responses are easier to tell."""
    scores = torch.as_tensor(scores).double()
    wins, pairs, gaps = _pair_wins(scores, ~scores.isnan())
    return {
        int(g): float(wins[:, gaps == g].sum() / pairs[:, gaps == g].sum())
        for g in gaps.unique()
    }


# --- text to tokens to scores

_REWARD_TEMPLATE = (
    "{{%- set text -%}}{policy_template}{{%- endset -%}}"
    "{{%- if add_generation_prompt -%}}{{{{ text }}}}"
    "{{%- else -%}}{{{{ text.rstrip('\\n') }}}}{{%- endif -%}}"
)


def reward_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy whose chat template ends at the last message's EOS, padding on the right.

    Chat templates often put a newline after EOS; a reward model read at the last token
    would then be read at that newline by `pipeline` and TRL, and at EOS by its trainer.
    """
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    template = tokenizer.chat_template
    if not template:
        raise ValueError(
            "the tokenizer has no chat template: set one (starling_lib.chat)"
        )
    if not template.startswith("{%- set text -%}"):
        tokenizer.chat_template = _REWARD_TEMPLATE.format(policy_template=template)
    return tokenizer


def encode_response(
    tokenizer: PreTrainedTokenizerBase, text: str, finished: bool, max_length: int = 0
) -> list[int]:
    """Token ids of a response; EOS follows only where it ended by itself.

    Over `max_length` tokens (0: no limit) the response is cut, and then has no EOS.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids += [tokenizer.eos_token_id] if finished or not ids else []
    return ids[:max_length] if max_length else ids


def encode_ranking(
    row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int = 0
) -> dict[str, list[int]]:
    """A row of `load_rankings` as a packed row, plus response `lengths` in characters.

    With `max_length`, responses keep at most three quarters of it and the prompt loses
    its oldest tokens so that prompt and longest response fit.
    """
    finished = row.get("finished") or [True] * len(row["responses"])
    limit = max_length * 3 // 4
    responses = [
        encode_response(tokenizer, text, ended, limit)
        for text, ended in zip(row["responses"], finished, strict=True)
    ]
    room = max_length - max(map(len, responses)) if max_length else None
    packed = pack_ranking(encode_prompt(tokenizer, row["prompt"], room), responses)
    return {**packed, "lengths": [len(text) for text in row["responses"]]}


def score_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    responses: Sequence[str],
    finished: Sequence[bool] | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Tensor:
    """(N,) float32 rewards, one for each prompt (messages) and response (text).

    Read at the last real token by the attention mask, so the padding side and the
    neighbours in a batch do not matter. `finished=None` takes every response as ended.
    Raises ValueError if the lists differ in length.
    """
    finished = [True] * len(responses) if finished is None else list(finished)
    rows = [
        encode_prompt(tokenizer, prompt) + encode_response(tokenizer, text, bool(ended))
        for prompt, text, ended in zip(prompts, responses, finished, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = torch.zeros(len(rows))
    with inference(model):
        for i in tqdm(
            range(0, len(order), batch_size),
            "scoring",
            disable=not progress,
            leave=False,
        ):
            part = order[i : i + batch_size]
            out[part] = _score_batch(model, [rows[j] for j in part]).cpu()
    return out


def _score_batch(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """(B,) scores of token rows, right-padded, read at each row's last token."""
    tensors = [torch.tensor(row, device=model.device) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(t) for t in tensors], True)
    ids = pad(tensors, True, padding_value=model.config.pad_token_id or 0)
    trunk = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    last = trunk.last_hidden_state[torch.arange(len(rows)), mask.sum(1) - 1]
    return reward_head(model, last)


# --- training


@dataclass
class KwiseRewardConfig(TrainingArguments):
    """Arguments of `KwiseRewardTrainer`; defaults that differ from Trainer's are ours.

    The original (starling.md §1.5): lr 1e-5, warm-up 5 %, one epoch, all layers, 320
    prompts a step, prompts cut on the left at 2000 tokens.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    num_train_epochs: float = field(
        default=1, metadata={"help": "Passes over the rows."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Steps between logs."})
    loss_type: str = field(
        default="kwise", metadata={"help": "'kwise' (MLE_K) or 'pairwise' (MLE_2)."}
    )
    num_layers_unfrozen: int | None = field(
        default=None, metadata={"help": "Train only the last N layers; None: all."}
    )
    max_length: int = field(
        default=2048, metadata={"help": "Tokens of a prompt and one response; 0: any."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: rows are packed by us."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "False: a NaN loss is shown, not hidden."}
    )

    def __post_init__(self):
        if self.loss_type not in LOSSES:
            raise ValueError(
                f"loss_type={self.loss_type!r}: choose from {list(LOSSES)}"
            )
        super().__post_init__()
        check_arguments(self)

    @classmethod
    def for_this_machine(cls, **arguments) -> "KwiseRewardConfig":
        """A config whose precision and device fit this machine."""
        return cls(**machine_defaults(arguments))


class KwiseRewardTrainer(WrappedModelTrainer):
    """Train a reward model on rankings, K responses of a prompt in one shared-prefix row.

    `model`: a sequence-classification model with one label, or a name for
    `load_reward_model`. `train_dataset` and `eval_dataset`: rows of `load_rankings`
    (`prompt`, `responses` best first, optional `finished`). Saves and resumes as
    `AutoModelForSequenceClassification`.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: KwiseRewardConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks=None,
        optimizers=(None, None),
    ):
        args = args or KwiseRewardConfig.for_this_machine(output_dir="reward-model")
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model)
            model = load_reward_model(model, processing_class, args.seed)
        if processing_class is None:
            raise ValueError("give the tokenizer as processing_class")
        self.loss_function = LOSSES[args.loss_type]
        freeze_below(model, args.num_layers_unfrozen)
        tokenizer = reward_tokenizer(processing_class)
        self.responses = _most_responses(train_dataset, eval_dataset)
        super().__init__(
            model=RankingScorer(model),
            args=args,
            data_collator=self._collate,
            train_dataset=_encode_rows(train_dataset, tokenizer, args.max_length),
            eval_dataset=_encode_rows(eval_dataset, tokenizer, args.max_length),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=lambda out: reward_metrics(*map(torch.tensor, out)),
        )
        self.loss_is_scaled_for_ga = False

    def inner_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model).reward_model

    def _collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """Packed tensors, and `lengths` (B, K) padded to the data's largest K."""
        batch = stack_rankings(rows, self.processing_class.pad_token_id)
        missing = self.responses - batch["ends"].shape[1]
        batch["ends"] = F.pad(batch["ends"], (0, missing), value=-1)
        lengths = [row["lengths"] + [0] * self.responses for row in rows]
        batch["lengths"] = torch.tensor([x[: self.responses] for x in lengths])
        return batch

    def compute_loss(
        self, model, inputs, return_outputs=False, num_items_in_batch=None
    ):
        inputs = {k: v for k, v in inputs.items() if k != "lengths"}
        scores = model(**inputs)
        mask = inputs["ends"] >= 0
        loss = self.loss_function(torch.where(mask, scores, 0), mask)
        return (loss, scores) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, scores = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, scores, inputs["lengths"]

    def score_rankings(self, dataset: Dataset | None = None) -> Tensor:
        """(rows, K) scores, best-ranked first, of raw rankings (default: eval set)."""
        rows = self.eval_dataset
        if dataset is not None:
            self.responses = max(self.responses, _most_responses(dataset))
            rows = _encode_rows(dataset, self.processing_class, self.args.max_length)
        return torch.as_tensor(self.predict(rows).predictions)


def _most_responses(*datasets: Dataset | None) -> int:
    """The largest K in the data sets; `ends` are padded to it so that batches agree."""
    sets = [d for d in datasets if d is not None]
    return max((len(r) for d in sets for r in d["responses"]), default=0)


def _encode_rows(dataset: Dataset | None, tokenizer, max_length: int) -> Dataset | None:
    """Packed rows of a ranking set; rows with fewer than two responses are left out."""
    if dataset is None:
        return None
    options = {"tokenizer": tokenizer, "max_length": max_length}
    rows = map_rows(
        dataset, encode_ranking, fn_kwargs=options, desc="encoding rankings"
    )
    kept = [i for i, ends in enumerate(rows["ends"]) if len(ends) > 1]
    if len(kept) < len(rows):
        lost = len(rows) - len(kept)
        warnings.warn(f"{lost} rows rank a single response: left out", stacklevel=3)
        rows = rows.select(kept)
    return rows
