"""How responses are written down for a reward model, and where scores are read."""

import copy

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

from starling_lib.metrics import rewardbench_scores
from starling_lib.rollouts import encode_prompt
from starling_lib.scoring import (
    encode_as_released,
    encode_ranking,
    encode_response,
    masked_inputs,
    released_inputs,
    response_features,
    reward_tokenizer,
    score_responses,
    score_rewardbench,
)

pytestmark = pytest.mark.usefixtures("fp32")

EOS = 2
# As most published models have it: a newline after every EOS, the last one too.
NEWLINE_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{{ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


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


def test_features_are_what_the_head_reads(reward_model, tokenizer, conversations):
    prompts, responses = conversations
    asked = (reward_model, tokenizer, prompts, responses, [True, False, True])
    features = response_features(*asked, batch_size=2)
    assert features.shape == (3, 64) and features.dtype == torch.float32
    heads = reward_model.score(features)[:, 0]
    assert torch.allclose(heads, score_responses(*asked), atol=1e-5)


def test_nothing_to_score(reward_model, tokenizer):
    assert score_responses(reward_model, tokenizer, [], []).shape == (0,)
    assert not score_responses(reward_model, tokenizer, [], []).requires_grad
    assert response_features(reward_model, tokenizer, [], []).shape == (0, 64)
    bench = pd.DataFrame(columns=["prompt", "chosen", "rejected", "subset"])
    assert score_rewardbench(reward_model, tokenizer, bench)["estimate"].empty


# --- RewardBench

TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "more"},
]
BENCH = [
    {"prompt": "two?", "chosen": "2", "rejected": "3 3", "subset": "math-prm", "id": 5},
    {"prompt": TURNS, "chosen": "so", "rejected": "no", "subset": "mt-bench-easy"},
    {"prompt": "three?", "chosen": "a b", "rejected": "c", "subset": "math-prm"},
]


def test_rewardbench_rows_are_scored_as_by_hand(reward_model, tokenizer):
    prompts = [
        row["prompt"] if i == 1 else [{"role": "user", "content": row["prompt"]}]
        for i, row in enumerate(BENCH)
    ]
    scored = pd.DataFrame({"subset": [row["subset"] for row in BENCH]})
    for side in ("chosen", "rejected"):
        texts = [row[side] for row in BENCH]
        scores = score_responses(reward_model, tokenizer, prompts, texts)
        scored[f"{side}_score"] = scores.numpy()
    wins = scored["chosen_score"] > scored["rejected_score"]
    assert 0 < wins.sum() < 3  # neither right nor wrong throughout
    expected = rewardbench_scores(scored)
    for rows in (BENCH, iter(BENCH), pd.DataFrame(BENCH)):
        table = score_rewardbench(reward_model, tokenizer, rows, batch_size=2)
        pd.testing.assert_frame_equal(table, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "row 1: 'chosen' is (None|nan), expected a text"),
        ({"rejected": ["a"]}, r"row 1: 'rejected' is \['a'\], expected a text"),
        ({"prompt": []}, r"row 1: 'prompt' is \[\], expected a text or messages"),
        (
            {"prompt": [{"role": "user"}]},
            "row 1: 'prompt' is .*expected a text or mess",
        ),
        ({"prompt": 3}, "row 1: 'prompt' is 3, expected a text or messages"),
        ({"subset": "shp"}, "row 1: subset 'shp' is none of RewardBench's"),
    ],
)
def test_malformed_rewardbench_rows_are_named(change, message):
    rows = [BENCH[0], {**BENCH[1], **change}]
    with pytest.raises(ValueError, match=message):
        score_rewardbench(None, None, rows)  # before anything is scored


def test_rewardbench_rows_without_a_field():
    rows = [{"prompt": "hi", "chosen": "a", "subset": "math-prm"}]
    message = "no field 'rejected' in the rows, which have prompt, chosen, subset"
    with pytest.raises(ValueError, match=message):
        score_rewardbench(None, None, rows)


# --- read as the released Starling code did


@pytest.mark.parametrize(
    ("attention", "rows"),
    [
        ("eager", [[5, 6, 7]]),
        ("sdpa", [[5, 6, 7], list(range(3, 40))]),
        ("sdpa", [[9] * 2047, [4, 5] * 1024]),  # one pad token, none
    ],
)
def test_one_pad_token_stands_for_all_of_2048(attention, rows, reward_model):
    """Against rows really padded to 2048, whose last index is read."""
    reward_model.set_attn_implementation(attention)
    padded = torch.zeros(len(rows), 2048, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(2048) < lengths[:, None]
    inputs, last = released_inputs(rows, 0)
    assert inputs["input_ids"].shape[1] == lengths.max() + 1
    all_rows = torch.arange(len(rows))
    with torch.no_grad():
        whole = reward_model.model(padded, attention_mask=mask.long())
        states = reward_model.model(**inputs).last_hidden_state[all_rows, last]
    expected = whole.last_hidden_state[:, -1]
    assert torch.allclose(states, expected, atol=1e-5)
    at_last_token = whole.last_hidden_state[all_rows, lengths - 1]
    short = lengths < 2048
    assert ((at_last_token - expected)[short].abs().amax(1) > 0.1).all()


def test_masked_inputs_are_padded_on_the_right():
    inputs, last = masked_inputs([[5], [6, 7, 8]], pad_id=3)
    assert inputs["input_ids"].tolist() == [[5, 3, 3], [6, 7, 8]]
    assert inputs["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert last.tolist() == [0, 2]


def test_released_scores_do_not_depend_on_the_batch(
    reward_model, tokenizer, conversations
):
    asked = (reward_model, tokenizer, *conversations)
    one, all_at_once = (
        score_responses(*asked, batch_size=size, score_position="released")
        for size in (1, 3)
    )
    assert torch.allclose(one, all_at_once, atol=1e-5)
    assert not torch.allclose(one, score_responses(*asked), atol=1e-3)


def test_a_long_conversation_loses_its_beginning_but_not_bos(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    messages = [
        {"role": "user", "content": "p" * 3000},
        {"role": "assistant", "content": "done"},
    ]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    ids = encode_as_released(tokenizer, messages)
    assert len(ids) == 2048 and ids == whole[:1] + whole[-2047:]
    tokenizer.bos_token = None
    assert encode_as_released(tokenizer, messages) == whole[-2048:]


def test_a_cut_response_is_not_closed(tokenizer):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    ]
    ended, cut = (encode_as_released(tokenizer, messages, e) for e in (True, False))
    assert ended == [*cut, EOS]


def test_a_position_of_the_config_holds_until_one_is_given(
    reward_model, tokenizer, conversations
):
    asked = (reward_model, tokenizer, *conversations)
    plain = score_responses(*asked)
    released = score_responses(*asked, score_position="released")
    reward_model.config.starling_score_position = "released"
    assert torch.equal(score_responses(*asked), released)
    back = score_responses(*asked, score_position="attention_mask")
    assert torch.allclose(back, plain, atol=1e-5)


def test_positions_that_cannot_be_read(reward_model, tokenizer, conversations):
    asked = (reward_model, tokenizer, *conversations)
    with pytest.raises(ValueError, match="score_position='first': choose from"):
        score_responses(*asked, score_position="first")
    reward_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="no state at padding, .*'sdpa'"):
        score_responses(*asked, score_position="released")
