"""Grouped prompts, ended rows, equal prompts: the same tokens as one prompt at a time."""

import pytest
import torch
from conftest import mistral
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig
from transformers.cache_utils import DynamicLayer

from starling_lib import generation
from starling_lib.generation import (
    RoomyLayer,
    common_beginning,
    generate_rows,
    keeps_states,
    left_pad,
    like_lengths,
    read_prompts,
    right_pad,
)

pytestmark = pytest.mark.usefixtures("fp32")

EOS, PAD = 2, 0
LENGTHS = (3, 4, 9, 30, 31, 30)


@pytest.fixture
def lively(policy):
    """A policy whose greedy text differs between prompts."""
    for weight in policy.model.layers.parameters():
        weight.data *= 8
    return policy


def prompts(lengths=LENGTHS):
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 259, (n,), generator=draw).tolist() for n in lengths]


def test_padding_by_hand():
    ids, mask = left_pad([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    ids, mask = right_pad([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize("window", [None, 16])
def test_rows_are_those_of_each_prompt_alone(lively, window):
    """Also where layers with a sliding window take the plain way."""
    model = lively if window is None else mistral(sliding_window=window).eval()
    rows = [[i % model.config.vocab_size for i in row] for row in prompts()]
    arguments = (EOS, PAD, 40, 0.0)
    with torch.no_grad():
        together, _ = generate_rows(model, rows, *arguments)
        alone = [generate_rows(model, [row], *arguments)[0][0] for row in rows]
    assert together == alone
    assert len(set(map(tuple, together))) == len(LENGTHS)


@pytest.mark.parametrize("begin", [[], [5], [5, 6, 7, 8]], ids=len)
def test_the_prompts_cache_is_that_of_one_padded_forward(policy, begin):
    rows = [begin + row for row in [*prompts(), prompts()[2]]]  # one of them twice
    ids, mask = left_pad([row[:-1] for row in rows], PAD)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = read_prompts(policy, rows, PAD)
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        whole = policy.base_model(**inputs, position_ids=positions, use_cache=True)
    for ours, theirs in zip(cache.layers, whole.past_key_values.layers, strict=True):
        for name in ("keys", "values"):
            found, expected = (getattr(x, name).transpose(1, 2) for x in (ours, theirs))
            assert found.shape == expected.shape
            assert torch.allclose(found[mask], expected[mask], atol=1e-5)


def test_a_roomy_layer_holds_what_a_dynamic_one_holds():
    """Through appending, more than there is room for, and dropping of rows."""
    ours, theirs = RoomyLayer(), DynamicLayer()
    draw = torch.Generator().manual_seed(0)
    for length in (3, 1, 1, 40, 1, 1):
        rows = 4 if theirs.keys is None else len(theirs.keys)
        new = torch.randn(2, rows, 2, length, 5, generator=draw)
        for layer in (ours, theirs):
            layer.update(*new)
        if length == 40:
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor([0, 3]))
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.fixture
def shapes(policy, monkeypatch):
    """Of what the policy's layers read."""
    shapes = []
    forward = policy.base_model.forward
    monkeypatch.setattr(
        policy.base_model,
        "forward",
        lambda *a, **k: shapes.append(tuple(k["input_ids"].shape)) or forward(*a, **k),
    )
    return shapes


def test_each_prompt_is_read_once_with_others_of_its_length(policy, shapes):
    with torch.no_grad():
        read_prompts(policy, prompts() * 3, PAD)
    assert shapes == [(1, 2), (1, 3), (1, 8), (3, 30)]


def test_what_all_prompts_begin_with_is_read_once(policy, shapes):
    system = [5, 6, 7, 8]
    with torch.no_grad():
        read_prompts(policy, [system + row for row in prompts()] * 3, PAD)
    assert shapes == [(1, 4), (1, 2), (1, 3), (1, 8), (3, 30)]


def test_no_pad_stands_between_a_prompt_and_the_common_beginning(policy, monkeypatch):
    """Some models measure distances by place."""
    masks, forward = [], policy.base_model.forward
    monkeypatch.setattr(
        policy.base_model,
        "forward",
        lambda *a, **k: masks.append(k["attention_mask"]) or forward(*a, **k),
    )
    with torch.no_grad():
        read_prompts(policy, [[5, 6, 7, *row] for row in prompts((9, 10, 8))], PAD)
    assert [mask.shape for mask in masks] == [(1, 3), (2, 11), (1, 12)]
    assert all((mask.diff(dim=1) <= 0).all() for mask in masks)
    assert any((mask == 0).any() for mask in masks)


def test_one_prompt_is_read_in_one_go(policy, shapes):
    with torch.no_grad():
        read_prompts(policy, [prompts()[2]] * 3, PAD)
    assert shapes == [(1, 8)]


def test_the_common_beginning_by_hand():
    assert common_beginning([[1, 2, 3], [1, 2, 4, 5]]) == [1, 2]
    assert common_beginning([[1, 2], [1, 2, 4, 5], [1, 2, 4]]) == [1]  # one is left
    assert common_beginning([[1], [2, 3]]) == []
    assert common_beginning([[1, 2, 3]]) == []  # alone: read it in one go


@given(st.lists(st.lists(st.integers(0, 2), min_size=1), min_size=2))
def test_the_common_beginning_is_the_longest_that_leaves_something(rows):
    begin = common_beginning(rows)
    assert all(row[: len(begin)] == begin and len(row) > len(begin) for row in rows)
    longer = {tuple(row[: len(begin) + 1]) for row in rows}
    assert len(longer) > 1 or min(map(len, rows)) == len(begin) + 1


def test_ended_rows_leave_the_batch(lively, monkeypatch):
    """Four rows whose texts end at different times; what a forward still computes."""
    texts = {40: [7] * 3 + [EOS], 41: [7] * 10 + [EOS], 42: [7] * 30, 43: [EOS]}
    sizes = []

    def logits(module, args, out):
        sizes.append(len(out))
        out = torch.full_like(out, -1e4)
        for i, row in enumerate(current):
            done = len(rows_so_far[row])
            token = texts[row][min(done, len(texts[row]) - 1)]
            rows_so_far[row].append(token)
            out[i, -1, token] = 0
        if len(sizes) % 4 == 0:  # a chunk ends: who goes on?
            current[:] = [r for r in current if EOS not in rows_so_far[r]]
        return out

    current, rows_so_far = list(texts), {row: [] for row in texts}
    lively.lm_head.register_forward_hook(logits)
    monkeypatch.setattr(generation, "CHUNK", 4)
    with torch.no_grad():
        rows, _ = generate_rows(lively, [[5, row] for row in texts], EOS, PAD, 20, 0.0)
    assert rows == [texts[40], texts[41], [7] * 20, [EOS]]
    assert sizes == [4] * 4 + [2] * 8 + [1] * 8


def test_nothing_is_generated_after_all_have_ended(lively):
    calls = []

    def only_eos(module, args, out):
        calls.append(1)
        return torch.full_like(out, -1e4).index_fill(-1, torch.tensor(EOS), 0.0)

    lively.lm_head.register_forward_hook(only_eos)
    with torch.no_grad():
        rows, _ = generate_rows(lively, prompts(), EOS, PAD, 60, 1.0)
    assert rows == [[EOS]] * len(LENGTHS) and len(calls) == 1


def test_a_prompt_of_one_token(lively):
    with torch.no_grad():
        rows, _ = generate_rows(lively, [[5], [5, 6, 7]], EOS, PAD, 5, 0.0)
        alone = [
            generate_rows(lively, [p], EOS, PAD, 5, 0.0)[0][0] for p in ([5], [5, 6, 7])
        ]
    assert rows == alone


@given(st.lists(st.integers(1, 300), min_size=1).map(sorted))
def test_groups_keep_every_row_and_little_padding(lengths):
    rows = [[0] * n for n in lengths]
    groups = list(like_lengths(rows))
    assert [row for group in groups for row in group] == rows
    assert all(len(g[0]) >= generation.LIKE_LENGTH * len(g[-1]) for g in groups)


# --- states kept while sampling

CUT = {40: 3, 41: 10, 43: 1, 44: 4}  # tokens until EOS; 42 goes on to the limit


@pytest.fixture
def endings(policy, monkeypatch):
    """A policy whose response to a prompt ending in 40 has 3 tokens, and so on.

    EOS falls inside a chunk of 4, on its last token and on the very first.
    """
    done = {}

    def logits(module, args, out):
        for i, row in enumerate(current):
            done[row] = done.get(row, 0) + 1
            token = EOS if done[row] == CUT.get(row) else 100 + done[row]
            out[i, -1] = torch.full_like(out[i, -1], -1e4).index_fill(
                0, torch.tensor(token), 0.0
            )
        if max(done.values()) % 4 == 0:
            current[:] = [r for r in current if done[r] < CUT.get(r, 99)]
        return out

    current = [40, 41, 42, 43, 44]
    policy.lm_head.register_forward_hook(logits)
    monkeypatch.setattr(generation, "CHUNK", 4)
    return policy


@pytest.mark.parametrize("head", [[], [5], [5, 6, 7]], ids=len)
def test_kept_states_are_those_of_a_forward_of_the_whole_row(endings, head):
    """Of every token: the last of a response, too, which sampling itself does not read."""
    asked = [[*head, 8, *range(50, 50 + n), n] for n in (40, 41, 42, 43, 44)]
    with torch.no_grad():
        rows, kept = generate_rows(endings, asked, EOS, PAD, 18, 0.0, [1, 2])
        assert [len(row) for row in rows] == [3, 10, 18, 1, 4]
        for prompt, row, states in zip(asked, rows, kept, strict=True):
            ids = torch.tensor([prompt + row])
            whole = endings.base_model(ids, output_hidden_states=True)
            assert torch.allclose(states[1], whole.hidden_states[1][0], atol=1e-5)
            last = endings.base_model.norm(states[2])
            assert torch.allclose(last, whole.last_hidden_state[0], atol=1e-5)


def test_keeping_states_changes_no_response_and_leaves_nothing_behind(lively):
    asked = [*prompts(), prompts()[2], [7]]
    with torch.no_grad():
        torch.manual_seed(3)
        rows, kept = generate_rows(lively, asked, EOS, PAD, 20, 1.0, [2])
        torch.manual_seed(3)
        again, nothing = generate_rows(lively, asked, EOS, PAD, 20, 1.0)
    assert rows == again and nothing == [{}] * len(asked)
    lengths = [len(p) + len(r) for p, r in zip(asked, rows, strict=True)]
    assert [len(states[2]) for states in kept] == lengths
    assert not any(layer._forward_hooks for layer in lively.base_model.layers)


def test_only_layers_like_those_of_llama_keep_states(lively):
    assert keeps_states(lively)
    assert not keeps_states(mistral(sliding_window=16))
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    neox = GPTNeoXConfig(**small, intermediate_size=16, vocab_size=50)
    assert not keeps_states(AutoModelForCausalLM.from_config(neox))  # other arguments
    gpt2 = GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=50, n_positions=64)
    assert not keeps_states(AutoModelForCausalLM.from_config(gpt2))  # other names


def test_a_model_without_layers_of_that_name_is_sampled():
    config = GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=259, n_positions=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        rows, kept = generate_rows(model, [[5, 6], [7]], EOS, PAD, 4, 0.0)
        alone = [
            generate_rows(model, [p], EOS, PAD, 4, 0.0)[0][0] for p in ([5, 6], [7])
        ]
    assert rows == alone and kept == [{}, {}]
