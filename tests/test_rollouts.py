"""Sampling, masks and log-probabilities against unpadded forwards and known samplers."""

import copy

import pytest
import torch
from conftest import mistral
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GenerationConfig,
    GraniteConfig,
    LlamaConfig,
    NemotronConfig,
    StableLmConfig,
)

from starling_lib import generation, rollouts
from starling_lib.generation import left_pad
from starling_lib.prefix import packs, use_fast_backward
from starling_lib.rollouts import (
    TOKEN_FIELDS,
    Rollout,
    encode_prompt,
    layer_states,
    predicting_states,
    response_inputs,
    row_states,
    sample,
    scatter,
    sequence_logprobs,
    token_entropy,
    token_logprobs,
)
from starling_lib.trunk import split_trunk

pytestmark = pytest.mark.usefixtures("fp32")

EOS, PAD = 2, 0
PROMPTS = [
    [{"role": "user", "content": text}]
    for text in ("a rather long question of mine", "hi", "what now?", "and then?")
]


def with_logits(policy, logits):
    """The policy with the same next-token logits everywhere."""
    policy.lm_head.register_forward_hook(
        lambda module, args, out: logits.to(out).expand_as(out)
    )
    return policy


def scripted(policy, rows, monkeypatch):
    """The policy with a `generate` that appends `rows` to its prompts, then stops."""

    def generate(input_ids, **kwargs):
        return torch.cat([input_ids, torch.tensor(rows)], 1)

    monkeypatch.setattr(policy, "generate", generate)
    monkeypatch.setattr(generation, "CHUNK", 64)
    return policy


# --- prompts


def test_encode_prompt_ends_where_the_reply_begins(tokenizer):
    ids = encode_prompt(tokenizer, PROMPTS[1])
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == text
    assert encode_prompt(tokenizer, PROMPTS[1], max_length=5) == ids[-5:]
    assert encode_prompt(tokenizer, PROMPTS[1], max_length=500) == ids


def test_a_prompt_that_is_a_text_is_named(tokenizer):
    with pytest.raises(ValueError, match="the text 'Why\\?', expected messages"):
        encode_prompt(tokenizer, "Why?")


def test_encode_prompt_adds_no_second_bos(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    expected = tokenizer.apply_chat_template(
        PROMPTS[1], add_generation_prompt=True, return_dict=False
    )
    ids = encode_prompt(tokenizer, PROMPTS[1])
    assert ids == expected and ids[:2] == [tokenizer.bos_token_id] * 2  # BOS, then mark


# --- sampling


def test_sampling_is_repeatable_and_leaves_the_random_state_alone(policy, tokenizer):
    policy.train()
    before = torch.get_rng_state()
    first = sample(policy, tokenizer, PROMPTS, max_new_tokens=6, seed=5)
    assert torch.equal(torch.get_rng_state(), before) and policy.training
    torch.rand(3)
    again = sample(policy, tokenizer, PROMPTS, max_new_tokens=6, seed=5)
    other = sample(policy, tokenizer, PROMPTS, max_new_tokens=6, seed=6)
    assert torch.equal(first.response_ids, again.response_ids)
    assert not torch.equal(first.response_ids, other.response_ids)


def test_greedy_rows_are_those_of_each_prompt_alone_in_the_order_given(
    policy, tokenizer
):
    for weight in policy.model.layers.parameters():
        weight.data *= 8  # as drawn, the model only repeats its last token
    arguments = {"max_new_tokens": 6, "temperature": 0}
    together = sample(policy, tokenizer, PROMPTS, batch_size=3, **arguments)
    for i, prompt in enumerate(PROMPTS):
        alone = sample(policy, tokenizer, [prompt], **arguments)
        assert together.prompts[i] == prompt
        assert together.texts[i] == alone.texts[0]
        ids = together.prompt_ids[i][together.prompt_mask[i]].tolist()
        assert ids == encode_prompt(tokenizer, prompt)
    assert len(set(together.texts)) == 4


def test_samples_of_a_prompt_are_consecutive_and_differ(policy, tokenizer):
    rollout = sample(policy, tokenizer, PROMPTS[:2], samples=3, max_new_tokens=6)
    assert rollout.prompts == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert len(rollout) == len(set(rollout.texts)) == 6


def test_the_whole_distribution_is_sampled(policy, tokenizer):
    """259 tokens with a long tail: `generate` by default would keep the first 50."""
    logits = -torch.arange(259.0) / 60
    rollout = sample(
        with_logits(policy, logits),
        tokenizer,
        [PROMPTS[1]],
        samples=3000,
        batch_size=3000,
        max_new_tokens=1,
    )
    counts = torch.bincount(rollout.response_ids[:, 0], minlength=259)
    expected = 3000 * logits.double().softmax(0)
    groups = counts.view(37, 7).sum(1), expected.view(37, 7).sum(1)
    assert stats.chisquare(*groups).pvalue > 0.01
    assert counts[50:].sum() == pytest.approx(expected[50:].sum().item(), rel=0.05)


def test_temperature_sharpens_and_zero_is_greedy(policy, tokenizer):
    logits = torch.full((259,), -1e4)
    logits[[70, 80]] = torch.tensor([1.0, 0.0])
    policy = with_logits(policy, logits)

    def share(temperature):
        rollout = sample(
            policy,
            tokenizer,
            [PROMPTS[1]],
            samples=1000,
            batch_size=1000,
            max_new_tokens=1,
            temperature=temperature,
        )
        return (rollout.response_ids == 70).float().mean().item()

    for temperature in (1.0, 0.5):
        exact = torch.tensor(1 / temperature).sigmoid().item()
        assert share(temperature) == pytest.approx(exact, abs=0.04)
    assert share(0) == 1


def test_generation_settings_of_a_published_model_are_ignored(policy, tokenizer):
    plain = sample(policy, tokenizer, PROMPTS, max_new_tokens=8)
    published = GenerationConfig(
        repetition_penalty=5.0,
        top_k=3,
        top_p=0.5,
        temperature=0.3,
        min_new_tokens=8,
        suppress_tokens=list(range(20, 200)),
        do_sample=True,
    )
    policy.generation_config = published
    again = sample(policy, tokenizer, PROMPTS, max_new_tokens=8)
    assert torch.equal(plain.response_ids, again.response_ids)
    assert policy.generation_config is published


# --- masks and endings


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"])
def test_the_mask_includes_eos_whatever_pads(policy, tokenizer, pad, monkeypatch):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad
    fill = tokenizer.pad_token_id
    rows = [[70, 71, EOS, fill], [EOS, fill, fill, fill], [70, 71, 72, 73]]
    policy = scripted(policy, rows, monkeypatch)
    prompts = [PROMPTS[1]] * 3  # of one length, so that rows keep their order
    rollout = sample(policy, tokenizer, prompts)
    assert rollout.lengths.tolist() == [3, 1, 4]
    assert rollout.response_mask.tolist() == [
        [True, True, True, False],
        [True, False, False, False],
        [True] * 4,
    ]
    assert rollout.finished.tolist() == [True, True, False]
    texts = [tokenizer.decode(ids) for ids in ([70, 71], [], [70, 71, 72, 73])]
    assert rollout.texts == texts


def test_a_sampled_pad_token_is_a_choice_of_the_policy(policy, tokenizer, monkeypatch):
    policy = scripted(policy, [[70, PAD, 71, EOS], [PAD, PAD, PAD, PAD]], monkeypatch)
    rollout = sample(policy, tokenizer, [PROMPTS[1]] * 2)
    assert rollout.lengths.tolist() == [4, 4]
    assert rollout.finished.tolist() == [True, False]


def test_a_short_batch_is_padded_to_the_longest(policy, tokenizer, monkeypatch):
    policy = scripted(policy, [[EOS]], monkeypatch)
    one = sample(policy, tokenizer, [PROMPTS[1]] * 2, batch_size=1)
    assert one.response_ids.tolist() == [[EOS], [EOS]]
    assert one.texts == ["", ""]


def test_select_keeps_fields_together(policy, tokenizer):
    rollout = sample(policy, tokenizer, PROMPTS, max_new_tokens=5)
    part = rollout.select(torch.tensor([2, 0]))
    assert part.prompts == [PROMPTS[2], PROMPTS[0]]
    assert part.texts == [rollout.texts[2], rollout.texts[0]]
    for name in ("prompt_ids", "response_mask", "finished"):
        assert torch.equal(getattr(part, name), getattr(rollout, name)[[2, 0]])
    chosen = torch.arange(len(rollout)) == 2
    for mask in (chosen, chosen.tolist(), chosen.numpy()):
        assert rollout.select(mask).texts == [rollout.texts[2]]
    assert len(rollout.select([])) == 0


@pytest.mark.parametrize("change", [{"temperature": -1.0}, {"max_new_tokens": 0}])
def test_sampling_refuses_settings_without_a_meaning(change, policy, tokenizer):
    with pytest.raises(ValueError, match="need a temperature ≥ 0 and at least one"):
        sample(policy, tokenizer, PROMPTS, **change)


# --- states kept while sampling


def test_kept_states_stand_where_their_tokens_stand(policy, tokenizer):
    arguments = {"max_new_tokens": 9, "samples": 2, "batch_size": 3, "seed": 1}
    rollout = sample(policy, tokenizer, PROMPTS, **arguments, keep_after=[1, 2])
    plain = sample(policy, tokenizer, PROMPTS, **arguments)
    assert torch.equal(rollout.response_ids, plain.response_ids)
    assert plain.states is None
    tokens = {name: getattr(rollout, name) for name in TOKEN_FIELDS}
    mask = response_inputs(**tokens)["attention_mask"].bool()
    expected = layer_states(policy.base_model, tokens, [1, 2])
    for after, states in rollout.states.items():
        assert torch.allclose(states[mask], expected[after][mask], atol=1e-5)
        assert (states[~mask] == 0).all()
    chosen = rollout.select([5, 0])
    assert torch.equal(chosen.states[2], rollout.states[2][[5, 0]])


def test_states_of_another_precision_or_of_windows_are_not_kept(
    policy, tokenizer, monkeypatch
):
    windowed = mistral(sliding_window=16).eval()
    asked = {"max_new_tokens": 3, "keep_after": [1]}
    windowed.resize_token_embeddings(259)
    assert sample(windowed, tokenizer, PROMPTS, **asked).states is None
    monkeypatch.setattr(rollouts, "half_precision_copy", copy.deepcopy)
    assert sample(policy, tokenizer, PROMPTS, **asked).states is None


# --- log-probabilities


def known_rollout():
    """Three responses of 3, 1 and 4 tokens behind prompts of 2, 5 and 1."""
    prompts, responses = (
        [[5, 6], [7, 8, 9, 10, 11], [12]],
        [[20, 21, EOS], [EOS], [22, PAD, 23, 24]],
    )
    prompt_ids, prompt_mask = left_pad(prompts, PAD)
    right, right_mask = left_pad([r[::-1] for r in responses], PAD)
    rollout = Rollout(
        prompts=[PROMPTS[0]] * 3,
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=right.flip(1),
        response_mask=right_mask.flip(1),
        texts=["", "", ""],
        finished=torch.tensor([True, True, False]),
    )
    return rollout, prompts, responses


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_sequence_logprobs_are_those_of_unpadded_forwards(policy, batch_size):
    rollout, prompts, responses = known_rollout()
    logprobs = sequence_logprobs(policy, rollout, batch_size=batch_size)
    assert logprobs.dtype == torch.float32 and logprobs.shape == (3, 4)
    assert (logprobs[~rollout.response_mask] == 0).all()
    for row, prompt, response in zip(logprobs, prompts, responses, strict=True):
        logits = policy(torch.tensor([prompt + response])).logits[0]
        log_softmax = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected = [log_softmax[t, token].item() for t, token in enumerate(response)]
        assert row[: len(response)].tolist() == pytest.approx(expected, abs=1e-4)


def test_logprobs_of_greedy_tokens_are_the_largest(policy, tokenizer):
    rollout = sample(policy, tokenizer, PROMPTS, max_new_tokens=4, temperature=0)
    greedy = sequence_logprobs(policy, rollout)
    rollout.response_ids = (rollout.response_ids + 1) % 259
    other = sequence_logprobs(policy, rollout)
    assert (greedy[:, 0] > other[:, 0]).all()  # later tokens have other contexts


def sizes(**changes):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    return small | {"pad_token_id": 0} | changes


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**sizes()),
        Gemma2Config(**sizes(head_dim=8, final_logit_softcapping=0.5)),
        GraniteConfig(**sizes(logits_scaling=4.0)),
        CohereConfig(**sizes(logit_scale=3.0)),
    ],
    ids=lambda config: config.model_type,
)
def test_logprobs_are_those_of_the_whole_model(config, fp32):
    """Some architectures scale or cap the logits behind their output layer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # logits large enough to be capped
    rollout, prompts, responses = known_rollout()
    logprobs = sequence_logprobs(model, rollout)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        with torch.no_grad():
            whole = model(torch.tensor([prompt + response])).logits[0]
        expected = whole.log_softmax(-1)[len(prompt) - 1 : -1]
        expected = expected.gather(-1, torch.tensor(response)[:, None])[:, 0]
        assert torch.allclose(logprobs[i, : len(response)], expected, atol=1e-4)


def test_token_logprobs_and_entropy():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    ids = torch.arange(6)
    logprobs = token_logprobs(logits.bfloat16(), ids)
    entropy = token_entropy(logits.bfloat16())
    reference = torch.distributions.Categorical(logits=logits.bfloat16().float())
    assert torch.allclose(logprobs, reference.log_prob(ids), atol=1e-6)
    assert torch.allclose(entropy, reference.entropy(), atol=1e-6)
    assert logprobs.dtype == torch.float32
    assert logprobs.requires_grad and not entropy.requires_grad


def test_states_that_predict_the_response():
    positions = torch.arange(7.0).repeat(2, 1)[..., None]  # P = 4, R = 3
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert predicting_states(positions, mask).squeeze(-1).tolist() == [3, 4, 5, 3]


def test_scatter_inverts_masking_and_keeps_gradients():
    mask = torch.tensor([[True, False], [True, True]])
    values = torch.tensor([1.0, 2, 3], requires_grad=True)
    spread = scatter(values, mask)
    assert spread.tolist() == [[1, 0], [2, 3]]
    (spread * torch.tensor([[1.0, 10], [100, 1000]])).sum().backward()
    assert values.grad.tolist() == [1, 100, 1000]


def test_response_inputs_positions_follow_the_mask():
    rollout, *_ = known_rollout()
    names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
    inputs = response_inputs(**{n: getattr(rollout, n) for n in names})
    assert inputs["attention_mask"][0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0]
    assert inputs["position_ids"][0, 3:8].tolist() == [0, 1, 2, 3, 4]
    assert (inputs["position_ids"] >= 0).all()


def test_only_a_float32_policy_under_bf16_autocast_is_sampled_from_a_copy(policy):
    assert rollouts.half_precision_copy(policy) is policy
    with torch.autocast("cpu", dtype=torch.bfloat16):
        copied = rollouts.half_precision_copy(policy)
        assert rollouts.half_precision_copy(copied) is copied
    assert copied is not policy and copied.dtype == torch.bfloat16
    assert policy.dtype == torch.float32


def test_a_half_precision_copy_rounds_parameters_and_no_angles(policy):
    """Rounded, the frequencies would turn far tokens by a radian too much."""
    policy.config.tie_word_embeddings = True
    policy.tie_weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        copied = rollouts.half_precision_copy(policy)
    assert all(p.dtype == torch.bfloat16 for p in copied.parameters())
    assert all(p.requires_grad for p in copied.parameters())
    mine, its = (m.base_model.rotary_emb.inv_freq for m in (policy, copied))
    assert torch.equal(mine, its) and not torch.equal(its, its.bfloat16().float())
    assert copied.lm_head.weight is copied.get_input_embeddings().weight
    assert copied.lm_head.weight is not policy.lm_head.weight


def test_a_wrapped_policy_gives_the_log_probabilities_of_its_adapters(policy):
    rollout, *_ = known_rollout()
    start = sequence_logprobs(policy, rollout)
    wrapped = get_peft_model(policy, LoraConfig(r=2, init_lora_weights=False))
    found = sequence_logprobs(wrapped, rollout)
    assert torch.equal(found, sequence_logprobs(wrapped.get_base_model(), rollout))
    assert not torch.allclose(found, start, atol=1e-3)


# --- rows without their padding


def known_tokens() -> dict[str, torch.Tensor]:
    rollout, *_ = known_rollout()
    return {name: getattr(rollout, name) for name in TOKEN_FIELDS}


@pytest.fixture(params=["shared_prefix", "sdpa", "eager"])
def trunk(request, policy):
    """The trunk of a policy with each attention; ours passes rows without padding."""
    policy.set_attn_implementation(request.param)
    assert packs(policy.config) == (request.param == "shared_prefix")
    return policy.base_model.eval()


def test_each_rows_states_are_those_of_a_forward_of_its_own(trunk):
    tokens = known_tokens()
    found = row_states(trunk, tokens)
    after = layer_states(trunk, tokens, [1, 2])
    mask = response_inputs(**tokens)["attention_mask"].bool()
    assert not mask.all() and found.shape[:2] == mask.shape
    for row, real in enumerate(mask):
        ids = response_inputs(**tokens)["input_ids"][row][real][None]
        alone = trunk(ids, output_hidden_states=True)
        assert torch.allclose(found[row][real], alone.last_hidden_state[0], atol=1e-5)
        below = alone.hidden_states[1][0]  # [0] is the embedding
        assert torch.allclose(after[1][row][real], below, atol=1e-5)
    assert torch.allclose(trunk.norm(after[2])[mask], found[mask], atol=1e-5)


def test_upper_layers_read_states_and_pass_gradients_to_them(trunk, policy):
    lower, upper = split_trunk(policy, 1)
    tokens = known_tokens()
    states = row_states(lower, tokens).detach().requires_grad_()
    mask = response_inputs(**tokens)["attention_mask"].bool()
    found = row_states(upper, tokens, states)
    assert torch.allclose(found[mask], row_states(trunk, tokens)[mask], atol=1e-5)
    found[mask].square().sum().backward()
    assert states.grad[mask].abs().sum(-1).min() > 0
    assert (states.grad[~mask] == 0).all() or not packs(trunk.config)


@pytest.mark.parametrize("kind", [NemotronConfig, StableLmConfig])
def test_architectures_that_drop_the_layout_keep_their_padding(kind):
    """Packed without it, every row would read all others, and later tokens."""
    small = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = kind(**small, **heads, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    use_fast_backward(model)
    tokens = known_tokens()
    mask = response_inputs(**tokens)["attention_mask"].bool()
    with torch.no_grad():
        found = row_states(model.base_model, tokens)
        again = layer_states(model.base_model, tokens, [1])
        for row, real in enumerate(mask):
            ids = response_inputs(**tokens)["input_ids"][row][real][None]
            alone = model.base_model(ids, output_hidden_states=True)
            assert torch.allclose(
                found[row][real], alone.last_hidden_state[0], atol=1e-5
            )
            below = alone.hidden_states[1][0]
            assert torch.allclose(again[1][row][real], below, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"sliding_window": 4}, {"layer_types": ["full_attention", "other"]}]
)
def test_windows_and_other_kinds_of_layers_keep_their_padding(policy, settings):
    use_fast_backward(policy)
    assert packs(policy.config)
    for name, value in settings.items():
        setattr(policy.config, name, value)
    assert not packs(policy.config)
