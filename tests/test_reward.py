"""Training, saving and reading of reward models."""

import copy
import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)
from trl.data_utils import apply_chat_template

from starling_lib import reward
from starling_lib.metrics import response_table
from starling_lib.models import load_reward_model
from starling_lib.prefix import RankingScorer
from starling_lib.recipes import report_reward_model
from starling_lib.reward import (
    KwiseRewardConfig,
    KwiseRewardTrainer,
    kwise_loss,
    pairwise_loss,
    score_responses,
)
from starling_lib.trunk import freeze_below
from tests.conftest import toy_rows

pytestmark = pytest.mark.usefixtures("fp32")


# --- training


def config(folder, **changes) -> KwiseRewardConfig:
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return KwiseRewardConfig.for_this_machine(**{**arguments, **changes})


def make_trainer(
    folder, model, tokenizer, rankings, evaluate=None, peft_config=None, **changes
):
    return KwiseRewardTrainer(
        model=copy.deepcopy(model),
        args=config(folder, **changes),
        train_dataset=rankings,
        eval_dataset=evaluate,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def weights(trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.inner_model().state_dict().items()}


def same(a, b, atol=0.0) -> bool:
    return all(torch.allclose(a[k], b[k], rtol=0, atol=atol) for k in a)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.fixture(scope="module")
def trained(tmp_path_factory, _reward_model, tokenizer, toy_rankings):
    """A trainer after a few passes over the toy rankings, and its folder."""
    folder = tmp_path_factory.mktemp("reward")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARLING_PRECISION", "fp32")
        trainer = make_trainer(
            folder,
            _reward_model,
            tokenizer,
            toy_rankings,
            toy_rankings,
            max_steps=25,
            learning_rate=5e-3,
        )
        trainer.train()
        trainer.save_model()
    return trainer, folder


def test_training_learns_a_ranking(trained, _reward_model):
    trainer, _ = trained
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert np.mean(losses[-3:]) < 0.3 * np.mean(losses[:3])
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] > 0.95 and metrics["eval_nll"] < 0.3
    assert {"eval_top1", "eval_kendall_tau", "eval_longer_wins"} <= set(metrics)


def test_four_readers_of_a_saved_reward_model_agree(trained, toy_rankings):
    """Our scorer, padded batches, transformers' pipeline and TRL's reward path."""
    folder = str(trained[1])
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [p for p in toy_rankings["prompt"] for _ in range(4)]
    responses = [r for row in toy_rankings["responses"] for r in row]
    ours = score_responses(model, tokenizer, prompts, responses)
    assert ours.std() > 0.5

    texts = [
        tokenizer.apply_chat_template(
            [*p, {"role": "assistant", "content": r}], tokenize=False
        )
        for p, r in zip(prompts, responses, strict=True)
    ]
    with torch.no_grad():
        for side in ("right", "left"):
            batch = tokenizer(
                texts, return_tensors="pt", padding=True, padding_side=side
            )
            assert batch["attention_mask"].sum(1).unique().numel() > 3
            padded = model(**batch).logits[:, 0]
            assert torch.allclose(padded, ours, atol=1e-5)

    classify = pipeline("text-classification", model=folder, tokenizer=folder)
    for options in ({"function_to_apply": "none"}, {}):  # a sigmoid would show
        piped = torch.tensor([out["score"] for out in classify(texts, **options)])
        assert torch.allclose(piped, ours, atol=1e-5)

    # The lines of GRPOTrainer and RLOOTrainer (`_calculate_rewards`), TRL 1.16.
    messages = [
        {"messages": [*p, {"role": "assistant", "content": r}]}
        for p, r in zip(prompts, responses, strict=True)
    ]
    inputs = tokenizer(
        text=[apply_chat_template(x, tokenizer)["text"] for x in messages],
        return_tensors="pt",
        padding=True,
        padding_side="right",
        add_special_tokens=False,
    )
    with torch.inference_mode():
        assert torch.allclose(model(**inputs).logits[:, 0], ours, atol=1e-5)


def test_trainer_scores_are_those_of_score_responses(trained, toy_rankings):
    trainer, folder = trained
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    packed = trainer.score_rankings(toy_rankings)
    apart = [
        score_responses(
            model, trainer.processing_class, [row["prompt"]] * 4, *row_values(row)
        )
        for row in toy_rankings
    ]
    assert torch.allclose(packed, torch.stack(apart), atol=1e-4)
    assert torch.equal(packed, trainer.score_rankings())


def row_values(row):
    return row["responses"], row["finished"]


def test_scoring_rows_with_more_responses_than_training_had(
    reward_model, tokenizer, toy_rankings, tmp_path
):
    few = toy_rankings.map(lambda r: {"responses": r["responses"][:2]})
    few = few.remove_columns("finished")
    trainer = make_trainer(tmp_path, reward_model, tokenizer, few)
    assert trainer.score_rankings(toy_rankings).shape == (10, 4)
    ragged = [{**few[0]}, {**toy_rankings[1], "finished": None}]
    scores = trainer.score_rankings(Dataset.from_list(ragged))
    assert scores.isnan().tolist() == [[False, False, True, True], [False] * 4]


def test_raw_rankings_are_evaluated_as_the_trainers_own(trained, toy_rankings):
    trainer, _ = trained
    few = toy_rankings.select([1, 4])
    own = trainer.evaluate(trainer.eval_dataset.select([1, 4]))
    found = trainer.evaluate(few, metric_key_prefix="test")
    assert found["test_accuracy"] == own["eval_accuracy"]
    assert found["test_loss"] == pytest.approx(own["eval_loss"])
    scores = torch.as_tensor(trainer.predict(few).predictions)
    assert torch.equal(scores, trainer.score_rankings(few))


def test_the_ranks_of_a_short_row_begin_at_one(reward_model, tokenizer, tmp_path):
    rows = Dataset.from_list(toy_rows()[:2])
    short = {"responses": ["a", "b"], "finished": [True, True]}
    rows = Dataset.from_list([{**rows[0], **short}, rows[1]])
    trainer = make_trainer(tmp_path, reward_model, tokenizer, rows, rows)
    held_out = trainer.predict(trainer.eval_dataset)
    table = response_table(held_out.predictions, *held_out.label_ids)
    assert table["rank"].tolist() == [1, 2, 1, 2, 3, 4]


def test_scores_and_report_of_rows_beside_a_single_response(
    reward_model, tokenizer, toy_rankings, tmp_path
):
    rows = [
        {**row, "source": ["even", "odd"][i % 2]} for i, row in enumerate(toy_rows())
    ]
    whole = make_trainer(tmp_path, reward_model, tokenizer, toy_rankings, toy_rankings)
    rows[1] |= {"responses": ["only"], "finished": [True]}
    table = Dataset.from_list(rows)
    with pytest.warns(UserWarning, match="1 rows rank a single response"):
        trainer = make_trainer(tmp_path, reward_model, tokenizer, toy_rankings, table)
    scores = trainer.score_rankings()
    expected = whole.score_rankings()
    expected[1] = torch.nan
    assert torch.allclose(scores, expected, atol=1e-5, equal_nan=True)
    with pytest.warns(UserWarning, match="1 rows rank a single response"):
        again = trainer.score_rankings(table)
    assert torch.allclose(again, expected, atol=1e-5, equal_nan=True)
    report = report_reward_model(trainer, table, tmp_path)
    prompts = {row["group"]: row["prompts"] for row in report["by_source"]}
    assert prompts == {"even": 5, "odd": 4}


@pytest.mark.parametrize("loss_type", ["kwise", "pairwise"])
def test_only_the_last_layers_move(
    loss_type, reward_model, tokenizer, toy_rankings, tmp_path
):
    trainer = make_trainer(
        tmp_path,
        reward_model,
        tokenizer,
        toy_rankings,
        num_layers_unfrozen=1,
        loss_type=loss_type,
        max_steps=2,
    )
    trainer.train()
    before, after = reward_model.state_dict(), weights(trainer)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert {k.split(".")[0] for k in changed} == {"model", "score"}
    layers = {k for k in changed if k.startswith("model.")}
    assert layers and all(
        k.startswith(("model.layers.1", "model.norm")) for k in layers
    )


def test_first_loss_is_the_loss_of_separate_scores(
    reward_model, tokenizer, toy_rankings, tmp_path
):
    for loss_type, loss in (("kwise", kwise_loss), ("pairwise", pairwise_loss)):
        trainer = make_trainer(
            tmp_path,
            reward_model,
            tokenizer,
            toy_rankings,
            loss_type=loss_type,
            per_device_train_batch_size=10,
            max_steps=1,
        )
        trainer.train()
        scores = torch.stack(
            [
                score_responses(
                    reward_model, tokenizer, [row["prompt"]] * 4, *row_values(row)
                )
                for row in toy_rankings
            ]
        )
        first = trainer.state.log_history[0]["loss"]
        assert first == pytest.approx(loss(scores).item(), abs=1e-4)


def test_accumulated_gradients_equal_those_of_a_larger_batch(
    reward_model, tokenizer, toy_rankings, tmp_path
):
    runs = []
    for batch, accumulation in ((2, 1), (1, 2)):
        trainer = make_trainer(
            tmp_path,
            reward_model,
            tokenizer,
            toy_rankings,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        runs.append((weights(trainer), trainer.state.log_history))
    assert same(runs[0][0], runs[1][0], atol=1e-5)
    assert not same(runs[0][0], reward_model.state_dict(), atol=1e-2)
    first, second = (history[0]["loss"] for _, history in runs)
    assert first == pytest.approx(second, abs=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_one(
    reward_model, tokenizer, toy_rankings, tmp_path
):
    """Bit for bit, with dropout, in the middle of an epoch."""
    for layer in reward_model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    arguments = (reward_model, tokenizer, toy_rankings)
    saving = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    whole = make_trainer(tmp_path / "whole", *arguments, **saving)
    whole.train()
    first = make_trainer(tmp_path / "parts", *arguments, **saving)
    first.add_callback(StopAt(3))
    first.train()
    assert first.state.global_step == 3
    torch.manual_seed(99)  # the random state must come from the checkpoint
    second = make_trainer(tmp_path / "parts", *arguments, **saving)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 6
    assert same(weights(whole), weights(second))
    assert not same(weights(whole), weights(first))


def test_the_best_checkpoint_is_really_loaded(
    reward_model, tokenizer, toy_rankings, tmp_path, monkeypatch
):
    trainer = make_trainer(
        tmp_path,
        reward_model,
        tokenizer,
        toy_rankings,
        toy_rankings,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )

    def worse_each_step(*args, **kwargs):
        return {"eval_loss": float(trainer.state.global_step)}

    monkeypatch.setattr(trainer, "evaluate", worse_each_step)
    trainer.train()
    best = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-1")
    last = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3")
    assert same(best.state_dict(), weights(trainer))
    assert not same(last.state_dict(), weights(trainer))


def test_weights_that_train_in_low_precision_are_told_of(
    reward_model, tokenizer, toy_rankings, tmp_path, recwarn
):
    make_trainer(tmp_path, reward_model, tokenizer, toy_rankings)
    assert not [w for w in recwarn if "weights that train" in str(w.message)]
    low = reward_model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="that train are torch.bfloat16: .*float32"):
        make_trainer(tmp_path, low, tokenizer, toy_rankings)


def test_precision_follows_the_machine(
    reward_model, tokenizer, toy_rankings, tmp_path, monkeypatch
):
    monkeypatch.setenv("STARLING_PRECISION", "bf16")
    trainer = make_trainer(tmp_path, reward_model, tokenizer, toy_rankings, max_steps=1)
    seen = []
    projection = trainer.inner_model().model.layers[0].mlp.down_proj
    projection.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    trainer.train()
    assert seen == [torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in trainer.inner_model().parameters())


# --- what the loss reads beside the scores


def first_loss(folder, model, tokenizer, rows, **changes):
    trainer = make_trainer(folder, model, tokenizer, Dataset.from_list(rows), **changes)
    batch = trainer._collate(list(trainer.train_dataset))
    with torch.no_grad():
        loss, scores = trainer.compute_loss(trainer.model.eval(), batch, True)
    return loss, scores


def test_ties_and_weights_of_the_rows_reach_the_loss(reward_model, tokenizer, tmp_path):
    rows = [
        {**row, "ranks": [1.0, 2.0, 2.0, 4.0], "weight": float(i)}
        for i, row in enumerate(toy_rows()[:3])
    ]
    loss, scores = first_loss(tmp_path, reward_model, tokenizer, rows)
    swapped = scores[:, [0, 2, 1, 3]]
    both = [
        torch.stack([kwise_loss(row[None]) for row in order])
        for order in (scores, swapped)
    ]
    expected = (sum(both) / 2 * torch.tensor([0.0, 1.0, 2.0])).sum() / 3
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_rows_weight_counts_whatever_batch_it_comes_in(
    reward_model, tokenizer, tmp_path
):
    """Alone it would be divided by itself: the sum over batches is that of one batch."""
    weights = (0.1, 10.0, 3.0)
    rows = [{**row, "weight": weights[i]} for i, row in enumerate(toy_rows()[:3])]
    trainer = make_trainer(tmp_path, reward_model, tokenizer, Dataset.from_list(rows))
    encoded = list(trainer.train_dataset)

    def loss(some):
        batch = trainer._collate(some)
        with torch.no_grad():
            return trainer.compute_loss(trainer.model.eval(), batch).item()

    alone = [loss([row]) for row in encoded]
    assert sum(alone) / 3 == pytest.approx(loss(encoded), rel=1e-5)
    assert alone[1] > 20 * alone[0] > 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss_type": "best_worst"}, lambda s: pairwise_loss(s[:, [0, -1]])),
        ({"loss_top": 1}, lambda s: (s.logsumexp(1) - s[:, 0]).mean()),
        (
            {"center_rewards_coefficient": 3.0},
            lambda s: kwise_loss(s) + 3 * (s.mean(1) ** 2).mean(),
        ),
    ],
)
def test_losses_of_the_config(reward_model, tokenizer, tmp_path, changes, expected):
    loss, scores = first_loss(tmp_path, reward_model, tokenizer, toy_rows(), **changes)
    assert loss == pytest.approx(expected(scores).item(), rel=1e-5)


# --- the cached trunk


def test_the_cache_is_named_after_what_accelerate_computes_in(
    reward_model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    rows = Dataset.from_list(toy_rows())
    changes = {"cache_trunk": True, "num_layers_unfrozen": 1, "bf16": False}
    trainer = make_trainer(tmp_path, reward_model, tokenizer, rows, **changes)
    assert trainer.accelerator.mixed_precision == "bf16"
    assert trainer.trunk_cache.folder.name.endswith("-bf16")


def test_a_cached_trunk_changes_nothing_and_is_computed_once(
    reward_model, tokenizer, toy_rankings, tmp_path, monkeypatch
):
    """Bit for bit the same weights, and three epochs ask the frozen layers once a row."""
    calls = []
    compute = RankingScorer.trunk_states

    def counted(self, **tokens):
        calls.append(len(tokens["ends"]))
        return compute(self, **tokens)

    monkeypatch.setattr(RankingScorer, "trunk_states", counted)
    arguments = {"num_layers_unfrozen": 1, "max_steps": -1, "num_train_epochs": 3}
    arguments |= {"per_device_train_batch_size": 5, "dataloader_prefetch_factor": None}
    plain = make_trainer(
        tmp_path / "plain", reward_model, tokenizer, toy_rankings, **arguments
    )
    plain.train()
    assert not calls
    arguments["cache_trunk"] = True
    cached = make_trainer(
        tmp_path / "cached", reward_model, tokenizer, toy_rankings, **arguments
    )
    cached.train()
    assert sum(calls) == len(toy_rankings)
    assert same(weights(plain), weights(cached), atol=1e-6)
    files = list((tmp_path / "cached" / "trunk-cache").rglob("*.safetensors"))
    assert len(files) == len(toy_rankings)


def test_a_cache_needs_frozen_layers(tmp_path):
    with pytest.raises(ValueError, match="all layers are trained: set num_layers"):
        config(tmp_path, cache_trunk=True)


def test_a_cache_too_large_is_refused_before_training(
    reward_model, tokenizer, toy_rankings, tmp_path
):
    with pytest.raises(ValueError, match="trunk_cache_gb=1e-09"):
        make_trainer(
            tmp_path,
            reward_model,
            tokenizer,
            toy_rankings,
            cache_trunk=True,
            num_layers_unfrozen=1,
            trunk_cache_gb=1e-9,
        )


def test_the_size_of_a_cache_is_counted_without_all_tokens_in_memory(
    reward_model, tmp_path
):
    rows = {"input_ids": [np.arange(1000, 6000)] * 100, "ends": [[9, 4999]] * 100}
    table = Dataset.from_dict(rows)
    freeze_below(reward_model, 1)
    changes = {"cache_trunk": True, "num_layers_unfrozen": 1, "trunk_cache_gb": 1e-9}
    args, scorer = config(tmp_path, **changes), RankingScorer(reward_model, 1)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="cache of 1,000,000 tokens"):
            reward._open_cache(args, scorer, table, None, table)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5e6, "as Python numbers the tokens take 36 MB"


# --- a stream


def uneven() -> Dataset:
    """Two to four responses a row, in an order that no batch of two hides."""
    rows = toy_rows()
    for i, row in enumerate(rows):
        for field in ("responses", "finished"):
            row[field] = row[field][: 2 + i % 3]
    return Dataset.from_list(rows)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_a_stream_trains_what_a_table_trains(reward_model, tokenizer, tmp_path):
    """Unshuffled, beyond its end, though no batch knows the data's largest K."""
    table = uneven()
    order = {"train_sampling_strategy": "sequential", "max_steps": 7}
    trainers = [
        make_trainer(tmp_path, reward_model, tokenizer, rows, **order)
        for rows in (table, table.to_iterable_dataset())
    ]
    for trainer in trainers:
        trainer.train()
    assert losses(trainers[0]) == losses(trainers[1])
    assert len(set(losses(trainers[0]))) == 7
    assert same(*map(weights, trainers))
    widths = [
        trainer._collate(list(trainer.train_dataset.take(2)))["ends"].shape[1]
        for trainer in trainers
    ]
    assert widths == [4, 3]
    assert trainers[1].score_rankings(table).shape == (10, 4)


def test_a_stream_is_encoded_as_it_is_read(reward_model, tokenizer, tmp_path):
    read = []

    def rows():
        for row in toy_rows():
            read.append(row)
            yield row

    stream = IterableDataset.from_generator(rows)
    trainer = make_trainer(tmp_path, reward_model, tokenizer, stream, max_steps=2)
    looked = len(read)  # at the first row, for the names of columns
    assert looked <= 1
    trainer.train()
    assert 4 <= len(read) - looked <= 6, "two batches, and one ahead"


def test_a_resumed_stream_equals_the_uninterrupted_one(
    reward_model, tokenizer, tmp_path
):
    """Bit for bit, with dropout, in the second pass over the rows."""
    for layer in reward_model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    stream = uneven().to_iterable_dataset().shuffle(seed=3, buffer_size=4)
    saving = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "linear"}
    saving |= {"gradient_accumulation_steps": 2, "max_steps": 6}
    arguments = (reward_model, tokenizer, stream)
    whole = make_trainer(tmp_path / "whole", *arguments, **saving)
    whole.train()
    first = make_trainer(tmp_path / "parts", *arguments, **saving)
    first.add_callback(StopAt(4))  # 16 of 10 rows
    first.train()
    torch.manual_seed(99)
    second = make_trainer(tmp_path / "parts", *arguments, **saving)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 6 and losses(second) == losses(whole)
    assert same(weights(whole), weights(second))
    assert not same(weights(whole), weights(first))


@pytest.mark.parametrize("shards", [5, 1])
def test_processes_share_a_shuffled_stream(shards, reward_model, tokenizer, tmp_path):
    """By shards, each process's over and over; taking turns where there is one shard."""
    stream = Dataset.from_list(toy_rows()).to_iterable_dataset(num_shards=shards)
    stream = stream.shuffle(seed=1, buffer_size=4)
    trainer = make_trainer(tmp_path, reward_model, tokenizer, stream, max_steps=2)
    # By default, one process would read for all and send the others theirs.
    assert trainer.accelerator.dispatch_batches is False
    loader = DataLoader(trainer.train_dataset, batch_size=2, collate_fn=list)
    read = []
    for rank in range(2):
        share = {"num_processes": 2, "process_index": rank, "dispatch_batches": False}
        batches = itertools.islice(prepare_data_loader(loader, **share), 6)
        read.append([str(row["input_ids"]) for batch in batches for row in batch])
    if shards == 1:  # a batch of four, halved
        whole = [str(row["input_ids"]) for row in trainer.train_dataset.take(24)]
        halves = [[0, 1], [2, 3]]
        assert read == [
            [whole[4 * n + i] for n in range(6) for i in half] for half in halves
        ]
    else:
        counts = [Counter(rows) for rows in read]
        assert [set(count.values()) for count in counts] == [{2}, {3}]
        assert not set(counts[0]) & set(counts[1])
        assert len(set(counts[0]) | set(counts[1])) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "a stream, which does not say how long it is: set max_st"),
        (
            {"cache_trunk": True, "num_layers_unfrozen": 1},
            "not with a stream. Set cach",
        ),
    ],
)
def test_what_must_know_all_rows_refuses_a_stream(
    changes, message, reward_model, tokenizer, toy_rankings, tmp_path
):
    stream = toy_rankings.to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, reward_model, tokenizer, stream, **changes)


def test_a_stream_is_not_evaluated(reward_model, tokenizer, toy_rankings, tmp_path):
    arguments = (tmp_path, reward_model, tokenizer)
    stream = toy_rankings.to_iterable_dataset()
    with pytest.raises(ValueError, match="not evaluated: give a table"):
        make_trainer(*arguments, toy_rankings, stream)
    trainer = make_trainer(*arguments, stream)
    with pytest.raises(ValueError, match="not evaluated: give a table"):
        trainer.score_rankings(stream)


def test_a_streamed_row_with_a_single_response_is_left_out(
    reward_model, tokenizer, tmp_path
):
    rows = toy_rows()[:3]
    rows[1] = {**rows[1], "responses": ["only"], "finished": [True]}
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = make_trainer(tmp_path, reward_model, tokenizer, stream)
    with pytest.warns(UserWarning, match="some rows rank a single response"):
        read = list(trainer.train_dataset.take(4))
    assert read[0] == read[2] != read[1] == read[3]


# --- adapters


def test_lora_is_trained_resumed_and_read_again(
    reward_model, tokenizer, toy_rankings, tmp_path
):
    reward_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def adapted(folder):
        return make_trainer(
            folder,
            load_reward_model(tmp_path / "base"),
            tokenizer,
            toy_rankings,
            peft_config=LoraConfig(r=2, task_type="SEQ_CLS"),
            **arguments,
        )

    whole = adapted(tmp_path / "whole")
    whole.train()
    moved = {n for n, p in whole.model.named_parameters() if p.requires_grad}
    assert moved and all("lora" in n or "score" in n for n in moved)
    second = adapted(tmp_path / "parts")
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(weights(whole), weights(second))
    whole.save_model(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()
    again = load_reward_model(tmp_path / "saved")
    prompts, responses = [row["prompt"] for row in toy_rows()], ["aa"] * 10
    expected = score_responses(
        whole.model.reward_model, whole.processing_class, prompts, responses
    )
    found = score_responses(again, whole.processing_class, prompts, responses)
    start = score_responses(
        load_reward_model(tmp_path / "base"), whole.processing_class, prompts, responses
    )
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, start, atol=1e-4)


def test_lora_without_a_task_type_trains_and_saves_a_new_head(
    policy, tokenizer, toy_rankings, tmp_path
):
    policy.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = load_reward_model(tmp_path / "base", seed=7)
    lora = LoraConfig(r=2)
    trainer = make_trainer(
        tmp_path, model, tokenizer, toy_rankings, peft_config=lora, max_steps=2
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    again = load_reward_model(tmp_path / "saved")
    trained = trainer.model.reward_model
    asked = trainer.processing_class, toy_rankings["prompt"], ["aa"] * 10
    found, expected = (score_responses(m, *asked) for m in (again, trained))
    assert torch.allclose(found, expected, atol=1e-6) and expected.std() > 1e-4
    assert not torch.equal(trained.score.weight, model.score.weight)


# --- bad input


def test_rows_with_a_single_response_are_left_out_with_a_warning(
    reward_model, tokenizer, toy_rankings, tmp_path
):
    rows = [*toy_rankings.to_list(), {**toy_rankings[0], "responses": ["only"]}]
    rows[-1]["finished"] = [True]
    with pytest.warns(UserWarning, match="1 rows rank a single response"):
        trainer = make_trainer(
            tmp_path, reward_model, tokenizer, Dataset.from_list(rows)
        )
    assert len(trainer.train_dataset) == 10


def test_rows_of_single_responses_only_are_refused(
    reward_model, tokenizer, toy_rankings, tmp_path
):
    rows = Dataset.from_list([{**toy_rankings[0], "responses": ["only"]}])
    with pytest.raises(ValueError, match="none of 1 rows has two responses"):
        make_trainer(tmp_path, reward_model, tokenizer, rows)


def test_a_rank_for_each_response_is_needed(
    reward_model, tokenizer, toy_rankings, tmp_path
):
    rows = Dataset.from_list([{**toy_rankings[0], "ranks": [1.0]}])
    with pytest.raises(ValueError, match="1 ranks for 4 responses"):
        make_trainer(tmp_path, reward_model, tokenizer, rows)


def test_unknown_loss(tmp_path):
    with pytest.raises(ValueError, match="'hinge': choose from .*'kwise'"):
        config(tmp_path, loss_type="hinge")


def test_a_save_limit_of_one_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="save_total_limit=1 deletes the last complete"
    ):
        config(tmp_path, save_total_limit=1)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 GPUs are visible .*torchrun"):
        config(tmp_path)


def test_a_tokenizer_is_needed(reward_model, toy_rankings, tmp_path):
    with pytest.raises(ValueError, match="processing_class"):
        make_trainer(tmp_path, reward_model, None, toy_rankings)
