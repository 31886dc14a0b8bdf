"""Reward models from K-wise rankings: training (arXiv 2301.11270).

Knows: rankings, a model that scores, the loss between them. Does not know: policies. What
it is made of stands in `losses`, `metrics` and `scoring`; their names are here too.
"""

import warnings
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from starling_lib.checkpoints import (
    WrappedModelTrainer,
    check_arguments,
    machine_defaults,
)
from starling_lib.losses import kwise_loss, pairwise_loss
from starling_lib.metrics import accuracy_by_gap, reward_metrics
from starling_lib.models import load_reward_model, load_tokenizer
from starling_lib.prefix import RankingScorer, freeze_below, stack_rankings
from starling_lib.rankings import map_rows
from starling_lib.scoring import (
    encode_ranking,
    encode_response,
    reward_tokenizer,
    score_responses,
)

__all__ = [
    "KwiseRewardConfig",
    "KwiseRewardTrainer",
    "accuracy_by_gap",
    "encode_ranking",
    "encode_response",
    "kwise_loss",
    "pairwise_loss",
    "reward_metrics",
    "reward_tokenizer",
    "score_responses",
]

LOSSES = {"kwise": kwise_loss, "pairwise": pairwise_loss}


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
