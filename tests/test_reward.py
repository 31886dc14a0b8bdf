"""K-wise losses against brute force; scores, saving and training of reward models."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from peft import LoraConfig
from scipy.stats import kendalltau
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)
from trl.data_utils import apply_chat_template

from starling_lib.models import load_reward_model
from starling_lib.prefix import RankingScorer
from starling_lib.reward import (
    KwiseRewardConfig,
    KwiseRewardTrainer,
    accuracy_by_gap,
    encode_ranking,
    encode_response,
    kwise_loss,
    pairwise_loss,
    reward_metrics,
    reward_tokenizer,
    score_responses,
)
from starling_lib.rollouts import encode_prompt
from tests.conftest import toy_rows

pytestmark = pytest.mark.usefixtures("fp32")

EOS = 2
# As most published models have it: a newline after every EOS, the last one too.
NEWLINE_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{{ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LOSSES = [kwise_loss, pairwise_loss]
F64 = torch.float64
score_rows = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(2, 6)),
    elements=st.floats(-30, 30),
)


def f64(*rows):
    return torch.tensor(rows, dtype=F64)


# --- losses


@pytest.mark.parametrize("k", [2, 3, 5])
def test_plackett_luce_of_all_orders_sums_to_one(k):
    scores = torch.randn(k, dtype=F64, generator=torch.Generator().manual_seed(k)) * 3
    orders = torch.tensor(list(itertools.permutations(range(k))))
    nll = torch.stack([kwise_loss(scores[order][None]) for order in orders]) * (k - 1)
    assert (-nll).exp().sum() == pytest.approx(1, abs=1e-12)


@settings(deadline=None)
@given(score_rows)
def test_kwise_loss_is_the_product_of_choices(rows):
    expected = []
    for row in rows.tolist():
        nll = 0.0
        for j in range(len(row)):  # choose the j-th best among those that remain
            top = max(row[j:])
            nll += math.log(sum(math.exp(s - top) for s in row[j:])) + top - row[j]
        expected.append(nll / (len(row) - 1))
    loss = kwise_loss(torch.tensor(rows)).item()
    assert loss == pytest.approx(np.mean(expected), rel=1e-9, abs=1e-9)


def test_kwise_loss_sums_over_the_worse_responses_not_the_better():
    assert 2 * kwise_loss(f64([2, 0.5, -1])) == pytest.approx(0.443, abs=5e-4)
    assert 2 * kwise_loss(f64([-1, 0.5, 2])) != pytest.approx(1.701, abs=5e-4)


def test_equal_scores_give_the_entropy_of_a_random_order():
    assert kwise_loss(torch.zeros(3, 7, dtype=F64)) == pytest.approx(1.4209, abs=5e-5)
    assert kwise_loss(torch.zeros(1, 7)) == pytest.approx(math.log(5040) / 6)
    assert pairwise_loss(torch.zeros(1, 7)) == pytest.approx(math.log(2))


@settings(deadline=None)
@given(st.floats(-40, 40), st.floats(-40, 40))
def test_two_responses_are_bradley_terry(better, worse):
    expected = -torch.nn.functional.logsigmoid(f64(better - worse)).item()
    for loss in LOSSES:
        assert loss(f64([better, worse])).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@settings(deadline=None)
@given(rows=score_rows, shift=st.floats(-100, 100))
def test_a_constant_added_to_a_row_changes_nothing(loss, rows, shift):
    scores = torch.tensor(rows)
    assert loss(scores + shift) == pytest.approx(loss(scores).item(), abs=1e-8)


@settings(deadline=None)
@given(score_rows)
def test_pairwise_loss_is_the_mean_over_pairs(rows):
    expected = np.mean(
        [
            np.mean([np.logaddexp(0, b - a) for a, b in itertools.combinations(row, 2)])
            for row in rows.tolist()
        ]
    )
    assert pairwise_loss(torch.tensor(rows)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("filler", [0.0, 1e4, math.nan])
def test_missing_responses_do_not_count(loss, filler):
    """Also in the middle of a row, with NaN there, and with finite gradients."""
    rows = [[1.0, filler, -0.5, 0.2], [0.3, 2.0, filler, filler], [1, filler] * 2]
    scores = f64(*rows).requires_grad_()
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    value = loss(scores, mask)
    kept = [f64([1.0, -0.5, 0.2]), f64([0.3, 2.0])]
    expected = sum(loss(row).item() for row in kept) / 3  # a single response: zero
    assert value.item() == pytest.approx(expected, abs=1e-12)
    value.backward()
    assert scores.grad.isfinite().all() and (scores.grad[~mask] == 0).all()
    assert (scores.grad[0, 0] < 0) and (scores.grad[0, 2:].sum() > 0)


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_gradients_stay_finite_at_large_scores(loss):
    scores = torch.tensor([[-300.0, 0, 300, 0]], requires_grad=True)
    loss(scores, torch.tensor([[True, True, True, False]])).backward()
    assert scores.grad.isfinite().all() and scores.grad[0, 0] < 0


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_make_a_weighted_mean(loss):
    scores = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    one, two, three = (loss(row[None]).item() for row in scores)
    expected = (1 * one + 0 * two + 3 * three) / 4
    assert loss(scores, weights=f64(1, 0, 3)[0:]).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_agree_with_finite_differences(loss):
    scores = torch.randn(2, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    assert torch.autograd.gradcheck(lambda s: loss(s, mask), scores.requires_grad_())


# --- metrics


def test_reward_metrics_against_loops_and_scipy():
    draw = np.random.default_rng(0)
    scores = draw.normal(size=(20, 5)).round(1)  # rounding makes ties
    lengths = draw.integers(1, 6, size=(20, 5))
    metrics = reward_metrics(scores, lengths)

    def wins(values, gap=None):
        pairs = [
            (a, b)
            for row in values
            for i, j in itertools.combinations(range(5), 2)
            for a, b in [(row[i], row[j])]
            if gap in (None, j - i)
        ]
        return np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])

    assert metrics["accuracy"] == pytest.approx(wins(scores))
    assert metrics["adjacent_accuracy"] == pytest.approx(wins(scores, 1))
    assert metrics["longer_wins"] == pytest.approx(wins(lengths))
    by_gap = accuracy_by_gap(scores)
    assert by_gap == pytest.approx({gap: wins(scores, gap) for gap in (1, 2, 3, 4)})
    assert metrics["nll"] == pytest.approx(kwise_loss(torch.tensor(scores)).item())


def test_kendall_tau_is_scipys():
    scores = np.random.default_rng(1).normal(size=(30, 6))
    expected = np.mean([kendalltau(row, -np.arange(6)).statistic for row in scores])
    assert reward_metrics(scores)["kendall_tau"] == pytest.approx(expected)


def test_metrics_of_a_perfect_an_inverted_and_an_indifferent_model():
    best_first = torch.arange(4.0, 0, -1).repeat(3, 1)
    names = ("accuracy", "adjacent_accuracy", "top1", "kendall_tau")

    def figures(scores):
        return [reward_metrics(scores)[name] for name in names]

    assert figures(best_first) == [1, 1, 1, 1]
    assert figures(-best_first) == [0, 0, 0, -1]
    assert figures(torch.zeros(3, 4)) == [0.5, 0.5, 0.25, 0]


def test_metrics_leave_missing_responses_out():
    nan = math.nan
    ragged = reward_metrics([[2, 1, nan], [1, 3, 2]], lengths=[[1, 2, 9], [3, 2, 1]])
    assert ragged["accuracy"] == pytest.approx((1 + 1) / 4)
    assert ragged["adjacent_accuracy"] == pytest.approx((1 + 1) / 3)
    assert ragged["top1"] == 0.5
    assert ragged["kendall_tau"] == pytest.approx((1 - 1 / 3) / 2)
    assert ragged["longer_wins"] == pytest.approx(3 / 4)


# --- text


def test_encode_response_ends_with_eos_only_where_it_finished(tokenizer):
    a, b = tokenizer("ab")["input_ids"]
    assert encode_response(tokenizer, "ab", True) == [a, b, EOS]
    assert encode_response(tokenizer, "ab", False) == [a, b]
    assert encode_response(tokenizer, "ab", True, max_length=2) == [a, b]
    assert encode_response(tokenizer, "", False) == [EOS]  # something must be scored


def test_reward_tokenizer_ends_at_the_last_eos(tokenizer, tmp_path):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho\n"},
    ]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = NEWLINE_TEMPLATE
    assert tokenizer.apply_chat_template(messages, tokenize=False).endswith("\n")
    ours = reward_tokenizer(reward_tokenizer(tokenizer))
    ours.save_pretrained(tmp_path)
    for each in (ours, AutoTokenizer.from_pretrained(tmp_path)):
        ids = each.apply_chat_template(messages, return_dict=False)
        prompt = encode_prompt(each, messages[:1])
        assert prompt == encode_prompt(tokenizer, messages[:1])
        assert ids == prompt + encode_response(each, "ho\n", True)
        assert each.padding_side == "right"


def test_reward_tokenizer_needs_a_template(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        reward_tokenizer(tokenizer)


def test_encode_ranking_fits_the_prompt_and_the_longest_response(tokenizer):
    row = {
        "prompt": [{"role": "user", "content": "p" * 60}],
        "responses": ["a" * 50, "b" * 5],
        "finished": [True, True],
    }
    packed = encode_ranking(row, tokenizer, max_length=40)
    segments = torch.tensor(packed["segment_ids"])
    assert [(segments == k).sum().item() for k in (0, 1, 2)] == [10, 30, 6]
    whole = encode_prompt(tokenizer, row["prompt"])
    assert packed["input_ids"][:10] == whole[-10:]
    assert packed["input_ids"][39] != EOS and packed["input_ids"][-1] == EOS
    assert packed["lengths"] == [50, 5]
    unlimited = encode_ranking(row, tokenizer)
    assert unlimited["segment_ids"].count(0) == len(whole)


# --- scoring


@pytest.fixture
def conversations():
    prompts = [
        [{"role": "user", "content": t}] for t in ("hi", "a longer question", "?")
    ]
    return prompts, ["ab", "some long answer it is", ""]


def test_score_responses_are_those_of_unpadded_forwards(
    reward_model, tokenizer, conversations
):
    prompts, responses = conversations
    finished = [True, False, True]
    scores = score_responses(
        reward_model, tokenizer, prompts, responses, finished, batch_size=2
    )
    for score, prompt, text, ended in zip(
        scores, prompts, responses, finished, strict=True
    ):
        ids = encode_prompt(tokenizer, prompt) + encode_response(tokenizer, text, ended)
        hidden = reward_model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert score.item() == pytest.approx(
            reward_model.score(hidden).item(), abs=1e-5
        )
    assert scores.std() > 0.01


def test_a_cut_response_scores_otherwise_than_a_finished_one(
    reward_model, tokenizer, conversations
):
    prompts, responses = conversations
    ended = score_responses(reward_model, tokenizer, prompts, responses)
    cut = score_responses(reward_model, tokenizer, prompts, responses, [False] * 3)
    assert ended[0] != cut[0] and ended[1] != cut[1]


def test_score_responses_wants_lists_of_one_length(
    reward_model, tokenizer, conversations
):
    prompts, responses = conversations
    with pytest.raises(ValueError, match="zip"):
        score_responses(reward_model, tokenizer, prompts, responses[:2])


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
