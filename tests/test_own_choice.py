"""The bundled multiple-choice questions and their task file for lm-eval."""

import json
from collections import Counter

import pytest
import yaml
from datasets import load_dataset
from jinja2 import Environment, StrictUndefined

from starling_lib.rankings import data_path

FOLDER = data_path("own_choice")
ROWS = [json.loads(line) for line in (FOLDER / "own_choice.jsonl").open()]
TASK = yaml.safe_load((FOLDER / "own_choice.yaml").read_text())


def context(row: dict) -> str:
    """What the task shows a model before a choice."""
    return f"Question: {row['question']}\nAnswer:"


# --- what holds without lm-eval


def test_questions_are_whole():
    assert len(ROWS) == 12
    assert len({row["question"] for row in ROWS}) == 12
    for row in ROWS:
        assert list(row) == ["question", "choices", "answer"]
        assert row["question"].endswith("?")
        assert len(set(row["choices"])) == 4
        assert all(choice == choice.strip() != "" for choice in row["choices"])
    # Whoever always takes one place gets a quarter right.
    assert Counter(row["answer"] for row in ROWS) == {0: 3, 1: 3, 2: 3, 3: 3}


def test_length_does_not_give_the_answer_away():
    def right(pick) -> int:
        places = [[len(choice) for choice in row["choices"]] for row in ROWS]
        return sum(
            sizes.index(pick(sizes)) == row["answer"]
            for sizes, row in zip(places, ROWS, strict=True)
        )

    assert right(max) <= 5
    assert right(min) <= 5


def test_sums_are_right():
    sums = {"7 times 8": 7 * 8, "15 minus 9": 15 - 9, "half of 90": 90 // 2}
    for words, value in sums.items():
        (row,) = [row for row in ROWS if words in row["question"]]
        assert row["choices"][row["answer"]] == str(value)


def test_the_task_file_reads_the_questions(monkeypatch, tmp_path):
    # What lm-eval does with these keys, from the folder that the data card names.
    monkeypatch.chdir(data_path().parent)
    data = load_dataset(
        TASK["dataset_path"], cache_dir=str(tmp_path), **TASK["dataset_kwargs"]
    )
    rows = data[TASK["test_split"]]
    assert rows.to_list() == ROWS
    template = Environment(undefined=StrictUndefined).from_string(TASK["doc_to_text"])
    assert [template.render(**row) for row in rows] == [context(row) for row in ROWS]
    # Names of columns, which lm-eval takes as they are.
    assert {TASK["doc_to_choice"], TASK["doc_to_target"]} <= set(rows.column_names)


def test_the_task_asks_for_both_accuracies():
    assert TASK["task"] == "own_choice"
    assert TASK["output_type"] == "multiple_choice"
    assert [metric["metric"] for metric in TASK["metric_list"]] == ["acc", "acc_norm"]


# --- by lm-eval itself, where it is installed


@pytest.fixture
def evaluate(monkeypatch):
    """Run the task on an lm-eval model; its figures."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(data_path().parent)
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)

    def run(model) -> dict:
        found = lm_eval.simple_evaluate(
            model=model, tasks=["own_choice"], task_manager=manager, bootstrap_iters=0
        )
        return found["results"]["own_choice"]

    return run


@pytest.mark.slow
def test_lm_eval_asks_as_the_data_card_says(evaluate):
    from lm_eval.api.model import LM

    asked = []

    class Knowing(LM):
        """Gives the right choice 0 nats and each other a nat."""

        def loglikelihood(self, requests):
            pairs = [request.args for request in requests]
            asked.extend(pairs)
            return [(self.value(*pair), False) for pair in pairs]

        def value(self, before, choice):
            (row,) = [row for row in ROWS if context(row) == before]
            right = row["choices"][row["answer"]] == choice.removeprefix(" ")
            return 0.0 if right else -1.0

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

        def generate_until(self, requests):
            raise NotImplementedError

    figures = evaluate(Knowing())
    wanted = {(context(row), f" {choice}") for row in ROWS for choice in row["choices"]}
    assert set(asked) == wanted
    assert figures["acc,none"] == 1
    assert figures["acc_norm,none"] == 1


@pytest.mark.slow
def test_lm_eval_scores_a_model_as_one_would_by_hand(evaluate, policy, tokenizer, fp32):
    from lm_eval.models.huggingface import HFLM

    right = right_by_length = 0
    for row in ROWS:
        scores = [by_hand(policy, tokenizer, row, choice) for choice in row["choices"]]
        right += max(range(4), key=scores.__getitem__) == row["answer"]
        lengths = [len(choice) for choice in row["choices"]]
        norms = [score / length for score, length in zip(scores, lengths, strict=True)]
        right_by_length += max(range(4), key=norms.__getitem__) == row["answer"]
    figures = evaluate(HFLM(pretrained=policy, tokenizer=tokenizer, batch_size=5))
    assert figures["acc,none"] == pytest.approx(right / 12)
    assert figures["acc_norm,none"] == pytest.approx(right_by_length / 12)


def by_hand(policy, tokenizer, row: dict, choice: str) -> float:
    """Log-likelihood of a choice after its question, token by token."""
    import torch

    start = tokenizer.encode(context(row), add_special_tokens=False)
    tokens = tokenizer.encode(f"{context(row)} {choice}", add_special_tokens=False)
    with torch.no_grad():
        logprobs = policy(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(
        float(logprobs[i - 1, tokens[i]]) for i in range(len(start), len(tokens))
    )
