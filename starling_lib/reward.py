"""Reward models from K-wise rankings: training (arXiv 2301.11270).

Knows: rankings, a model that scores, the loss between them. Does not know: policies. What
it is made of stands in `losses`, `metrics` and `scoring`; their names are here too.
"""

import math
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from starling_lib.checkpoints import (
    WrappedModelTrainer,
    check_arguments,
    machine_defaults,
)
from starling_lib.losses import (
    best_worst_loss,
    centering_penalty,
    kwise_loss,
    pairwise_loss,
)
from starling_lib.metrics import (
    accuracy_by,
    accuracy_by_gap,
    calibration,
    reward_metrics,
    rewardbench_scores,
)
from starling_lib.models import inference, load_reward_model, load_tokenizer
from starling_lib.pessimism import PessimisticReward
from starling_lib.prefix import RankingScorer, stack_rankings
from starling_lib.rankings import map_rows
from starling_lib.scoring import (
    encode_ranking,
    encode_response,
    reward_tokenizer,
    score_responses,
    score_rewardbench,
)
from starling_lib.sharding import is_sharded
from starling_lib.trunk import TrunkCache, add_adapters, freeze_below

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = [
    "KwiseRewardConfig",
    "KwiseRewardTrainer",
    "PessimisticReward",
    "accuracy_by",
    "accuracy_by_gap",
    "best_worst_loss",
    "calibration",
    "centering_penalty",
    "encode_ranking",
    "encode_response",
    "kwise_loss",
    "pairwise_loss",
    "reward_metrics",
    "reward_tokenizer",
    "rewardbench_scores",
    "score_responses",
    "score_rewardbench",
]

LOSSES = {
    "kwise": kwise_loss,
    "pairwise": pairwise_loss,
    "best_worst": best_worst_loss,
}
TOKEN_FIELDS = ("input_ids", "position_ids", "segment_ids", "ends")


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
        default="kwise",
        metadata={"help": "'kwise' (MLE_K), 'pairwise' (MLE_2) or 'best_worst'."},
    )
    loss_top: int | None = field(
        default=None, metadata={"help": "Only the first m picks of 'kwise'; None: all."}
    )
    center_rewards_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of (mean score of a row)²."}
    )
    num_layers_unfrozen: int | None = field(
        default=None, metadata={"help": "Train only the last N layers; None: all."}
    )
    max_length: int = field(
        default=2048, metadata={"help": "Tokens of a prompt and one response; 0: any."}
    )
    cache_trunk: bool = field(
        default=False, metadata={"help": "Keep the frozen layers' states on disk."}
    )
    trunk_cache_dir: str | None = field(
        default=None, metadata={"help": "Where; None: in output_dir."}
    )
    trunk_cache_gb: float = field(
        default=20.0, metadata={"help": "Refuse a cache larger than this."}
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
        top = self.loss_top
        if top is not None and (self.loss_type != "kwise" or top < 1):
            raise ValueError(
                f"loss_top={self.loss_top} with loss_type={self.loss_type!r}: give a "
                "positive number with 'kwise', or None"
            )
        if self.cache_trunk and self.num_layers_unfrozen is None:
            raise ValueError(
                "cache_trunk=True keeps the frozen layers' states, but all layers are "
                "trained: set num_layers_unfrozen"
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
    (`prompt`, `responses` best first, optional `finished`, `ranks` that may tie, and a
    `weight` in the loss; a table's count beside their mean, a stream's as they are).
    `peft_config`: train adapters (LoRA), in the last `num_layers_unfrozen` layers or in
    all. Saves and resumes as `AutoModelForSequenceClassification`, or as peft's adapters.

    `train_dataset` may be a stream, an `IterableDataset`, of any length. Its rows are
    encoded when they are read, in its own order: shuffle it before, by
    `.shuffle(seed, buffer_size=…)` with one seed for all processes. Processes read
    different shards (row groups of a Parquet file), or take turns where there are fewer
    shards than processes: do not split it by process yourself. `max_steps` says when to
    stop; a stream that ends before begins anew, in the same order. Resuming reads, and
    encodes, what was read before. `eval_dataset` is a table always.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: KwiseRewardConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks=None,
        optimizers=(None, None),
        peft_config: "PeftConfig | None" = None,
    ):
        args = args or KwiseRewardConfig.for_this_machine(output_dir="reward-model")
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model)
            model = load_reward_model(model, processing_class, args.seed)
        if processing_class is None:
            raise ValueError("give the tokenizer as processing_class")
        self.loss_function = _loss_function(args)
        if peft_config is None:
            freeze_below(model, args.num_layers_unfrozen)
            self.peft_model = None
        else:
            with torch.random.fork_rng():
                torch.manual_seed(args.seed)  # the adapters' initial weights
                self.peft_model = add_adapters(
                    model, peft_config, args.num_layers_unfrozen
                )
        tokenizer = reward_tokenizer(processing_class)
        is_stream = isinstance(train_dataset, IterableDataset)
        if is_stream:
            _check_stream(args)
            # Each process reads its own rows; the default would have one read for all.
            args.accelerator_config.dispatch_batches = False
        _check_table(eval_dataset)
        tables = (eval_dataset,) if is_stream else (train_dataset, eval_dataset)
        self.responses = _most_responses(*tables)
        self.eval_rankings = eval_dataset
        # The split is verified when it is made, which only the cache has a use for.
        cached = args.cache_trunk and not is_sharded(model)
        split_at = args.num_layers_unfrozen if cached else None
        scorer = RankingScorer(model, split_at)
        encode = _encode_stream if is_stream else _encode_rows
        train_rows = encode(train_dataset, tokenizer, args.max_length)
        eval_rows = _encode_rows(eval_dataset, tokenizer, args.max_length)
        self.trunk_cache = _open_cache(args, scorer, train_rows, eval_rows)
        super().__init__(
            model=scorer,
            args=args,
            data_collator=self._collate,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=lambda out: reward_metrics(out.predictions, *out.label_ids),
        )
        self.loss_is_scaled_for_ga = False

    def inner_model(self) -> PreTrainedModel:
        return self.peft_model or self._scorer.reward_model

    @property
    def _scorer(self) -> RankingScorer:
        return self.accelerator.unwrap_model(self.model)

    # --- data

    def _collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """Packed tensors; what the loss reads is (B, K) for the tables' largest K.

        A stream's largest K is not known: its batches may be wider.
        """
        batch = stack_rankings(rows, self.processing_class.pad_token_id)
        found = batch["ends"].shape[1]
        width = max(self.responses, found)
        batch["ends"] = F.pad(batch["ends"], (0, width - found), value=-1)
        # A missing rank is NaN: zeros would be taken for ranks better than the first.
        for name, fill in (("lengths", 0), ("ranks", math.nan)):
            values = [row[name] + [fill] * width for row in rows]
            batch[name] = torch.tensor([x[:width] for x in values])
        batch["weight"] = torch.tensor([row["weight"] for row in rows])
        if self.trunk_cache is not None:
            states = [self.trunk_cache.get(row) for row in rows]
            if all(x is not None for x in states):
                batch["trunk_states"] = torch.cat(states)
        return batch

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs on the device; the first time, the frozen layers' states are kept."""
        inputs = super()._prepare_inputs(inputs)
        if self.trunk_cache is None or "trunk_states" in inputs:
            return inputs
        tokens = {name: inputs[name] for name in TOKEN_FIELDS}
        with inference(self._scorer, self.accelerator.autocast()):
            states = self._scorer.trunk_states(**tokens)
        real = inputs["segment_ids"] >= 0
        parts = states.split(real.sum(1).tolist())
        for i, part in enumerate(parts):
            names = ("input_ids", "segment_ids")
            row = {name: inputs[name][i][real[i]].tolist() for name in names}
            self.trunk_cache.put(row, part)
        return {**inputs, "trunk_states": states}

    # --- loss

    def compute_loss(
        self, model, inputs, return_outputs=False, num_items_in_batch=None
    ):
        names = (*TOKEN_FIELDS, "trunk_states")
        scores = model(**{name: inputs[name] for name in names if name in inputs})
        mask, weight = inputs["ends"] >= 0, inputs["weight"]
        loss = self.loss_function(scores, mask, weight, ranks=inputs["ranks"])
        if coefficient := self.args.center_rewards_coefficient:
            loss = loss + coefficient * centering_penalty(scores, mask, weight)
        # From the batch's weighted mean to Σ w·l / B: a row counts the same in whatever
        # batch it comes, alone in one as well.
        loss = loss * weight.mean()
        return (loss, scores) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, scores = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, scores, (inputs["lengths"], inputs["ranks"])

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """Metrics of raw rankings, or of rows as the trainer keeps them."""
        return super().evaluate(self._encoded(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset, *args, **kwargs):
        """Scores of raw rankings with two responses or more, or of rows kept here."""
        return super().predict(self._encoded(test_dataset), *args, **kwargs)

    def _encoded(self, dataset):
        """Packed rows of raw rankings; anything else as it is."""
        _check_table(dataset)
        if not isinstance(dataset, Dataset) or "responses" not in dataset.column_names:
            return dataset
        self.responses = max(self.responses, _most_responses(dataset))
        return _encode_rows(dataset, self.processing_class, self.args.max_length)

    def score_rankings(self, dataset: Dataset | None = None) -> Tensor:
        """(rows, K) scores, best-ranked first, of raw rankings (default: eval set).

        NaN where there is no such response, and in rows of a single one: left out.
        """
        rows, rankings = self.eval_dataset, self.eval_rankings
        if dataset is not None:
            rows = rankings = dataset
        found = torch.as_tensor(self.predict(rows).predictions)
        scores = found.new_full((len(rankings), found.shape[1]), torch.nan)
        scores[several_responses(rankings)] = found
        return scores


def _loss_function(args: KwiseRewardConfig):
    top = {} if args.loss_top is None else {"top": args.loss_top}
    return partial(LOSSES[args.loss_type], **top)


def _check_stream(args: KwiseRewardConfig) -> None:
    """Raise ValueError for what needs to know all rows in advance."""
    if args.max_steps <= 0:
        raise ValueError(
            "train_dataset is a stream, which does not say how long it is: set max_steps"
            " (for one pass, rows / (per_device_train_batch_size × "
            "gradient_accumulation_steps × processes))"
        )
    if args.cache_trunk:
        raise ValueError(
            "cache_trunk=True keeps the states of rows that come again, and its size is "
            "that of all rows: not with a stream. Set cache_trunk=False, or give a table"
        )


def _check_table(dataset: Dataset | None) -> None:
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "a stream can be trained on, not evaluated: give a table, such as "
            "Dataset.from_list(list(stream.take(1000)))"
        )


def _open_cache(args, scorer: RankingScorer, *datasets) -> TrunkCache | None:
    """The cache that `args` ask for; None, with a warning, where the model has no split."""
    if not args.cache_trunk:
        return None
    if not scorer.can_split:
        warnings.warn("cache_trunk: this model has no split: no cache", stacklevel=3)
        return None
    folder = args.trunk_cache_dir or Path(args.output_dir) / "trunk-cache"
    # What `Trainer` computes in, be it from its arguments or from accelerate's config.
    number_format = {"no": "fp32"}.get(args.mixed_precision, args.mixed_precision)
    half, limit = scorer.frozen_half, args.trunk_cache_gb
    cache = TrunkCache(folder, half, limit, number_format)
    # Counted by where the rows end: all their tokens would fill the memory.
    tables = [data for data in datasets if data is not None]
    cache.check_size(sum(ends[-1] + 1 for data in tables for ends in data["ends"]))
    return cache


def _most_responses(*datasets: Dataset | None) -> int:
    """The largest K in the data sets; `ends` are padded to it so that batches agree."""
    sets = [d for d in datasets if d is not None]
    return max((len(r) for d in sets for r in d["responses"]), default=0)


def several_responses(rankings: Dataset) -> list[int]:
    """Numbers of the rows that a trainer keeps: those with two responses or more."""
    responses = enumerate(rankings["responses"])
    return [i for i, texts in responses if len(texts) > 1]


def _encode_rows(dataset: Dataset | None, tokenizer, max_length: int) -> Dataset | None:
    """Packed rows of a ranking set; rows with fewer than two responses are left out."""
    if dataset is None:
        return None
    kept = several_responses(dataset)
    if not kept:
        raise ValueError(
            f"none of {len(dataset)} rows has two responses: nothing to compare"
        )
    if lost := len(dataset) - len(kept):
        warnings.warn(f"{lost} rows rank a single response: left out", stacklevel=3)
        dataset = dataset.select(kept)
    options = {"tokenizer": tokenizer, "max_length": max_length}
    rows = map_rows(dataset, _encode_row, fn_kwargs=options, desc="encoding rankings")
    return _mean_weight_one(rows)


def _mean_weight_one(rows: Dataset) -> Dataset:
    """The rows with their weights over the mean weight, so that the loss keeps its size."""
    weights = rows["weight"]
    mean = sum(weights) / max(len(weights), 1)
    if mean in (0, 1):
        return rows
    scaled = [weight / mean for weight in weights]
    return rows.remove_columns("weight").add_column("weight", scaled)


def _encode_stream(
    rankings: IterableDataset, tokenizer, max_length: int
) -> IterableDataset:
    """Packed rows of a stream, made when they are read; after the last comes the first.

    Trainer sees one pass without an end. At the end of a pass it would keep the gradient
    of an unfinished step for the next one, and resuming would not find its place; a
    process with fewer rows would leave the others waiting.
    """
    options = {"tokenizer": tokenizer, "max_length": max_length}
    rows = map_rows(rankings, _encode_row, fn_kwargs=options)
    return rows.filter(_ranks_several).repeat(None)


def _ranks_several(row: dict) -> bool:
    """Whether there is anything to learn from a packed row; a warning, once, if not."""
    if len(row["ends"]) > 1:
        return True
    warnings.warn("some rows rank a single response: left out", stacklevel=2)
    return False


def _encode_row(row: dict, tokenizer, max_length: int) -> dict:
    """`encode_ranking` with what the loss reads beside the scores."""
    count = len(row["responses"])
    ranks = row.get("ranks") or list(range(1, count + 1))
    if len(ranks) != count:  # the rest would count as missing, and drop out unseen
        raise ValueError(f"{len(ranks)} ranks for {count} responses: give one for each")
    weight = row.get("weight")
    return {
        **encode_ranking(row, tokenizer, max_length),
        "ranks": [float(rank) for rank in ranks],
        "weight": 1.0 if weight is None else float(weight),
    }
