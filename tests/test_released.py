"""Released reward models: a random checkpoint in their layout, a forward of our own."""

import json
import math
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from starling_lib import models
from starling_lib.chat import LLAMA2_CARD_TEMPLATE, LLAMA2_TEMPLATE
from starling_lib.released import (
    CheckpointError,
    load_starling_rm,
    load_starling_tokenizer,
    released_text,
)
from starling_lib.scoring import encode_as_released, score_responses

pytestmark = pytest.mark.usefixtures("fp32")

UNK, BOS, EOS = 0, 1, 2
SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "again?"},
    {"role": "assistant", "content": "no"},
]


# --- a checkpoint as released, and Llama by hand


def released_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden, inner, narrow = 32, 48, 16

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=draw) / columns**0.5

    weights = {"transformer.embed_tokens.weight": 5 * matrix(259, hidden)}
    for i in range(2):
        layer = f"transformer.layers.{i}"
        shapes = {"q": hidden, "k": narrow, "v": narrow, "o": hidden}
        for name, rows in shapes.items():
            weights[f"{layer}.self_attn.{name}_proj.weight"] = 2 * matrix(rows, hidden)
        weights[f"{layer}.mlp.gate_proj.weight"] = matrix(inner, hidden)
        weights[f"{layer}.mlp.up_proj.weight"] = matrix(inner, hidden)
        weights[f"{layer}.mlp.down_proj.weight"] = matrix(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{norm}.weight"] = 1 + 0.1 * matrix(1, hidden)[0]
    weights["transformer.norm.weight"] = 1 + 0.1 * matrix(1, hidden)[0]
    weights["v_head.weight"] = matrix(1, hidden)
    return weights


def forward_by_hand(weights, ids: list[int], real: int) -> torch.Tensor:
    """(T,) scores at every position, of which the last T − `real` are padding.

    Llama from its parts: RMS norm, rotary positions, grouped heads, SwiGLU.
    """

    def norm(x, name):
        scale = (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
        return x * scale * weights[name]

    def rotate(x):  # (heads, T, 8)
        angle = torch.outer(torch.arange(x.shape[1]), 1e4 ** -(torch.arange(4) / 4))
        cos, sin = angle.cos(), angle.sin()
        a, b = x[..., :4], x[..., 4:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["transformer.embed_tokens.weight"][ids]
    steps = torch.arange(len(ids))
    visible = steps[None, :real] <= steps[:, None]
    for i in range(2):
        layer = f"transformer.layers.{i}"
        y = norm(x, f"{layer}.input_layernorm.weight")
        q, k, v = (
            (y @ weights[f"{layer}.self_attn.{n}_proj.weight"].T)
            .unflatten(-1, (-1, 8))
            .transpose(0, 1)
            for n in "qkv"
        )
        q, k = rotate(q), rotate(k)
        k, v = (x[:, :real].repeat_interleave(2, 0) for x in (k, v))  # padding: no keys
        logits = (q @ k.mT / math.sqrt(8)).masked_fill(~visible, -torch.inf)
        mixed = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ weights[f"{layer}.self_attn.o_proj.weight"].T
        y = norm(x, f"{layer}.post_attention_layernorm.weight")
        gate = F.silu(y @ weights[f"{layer}.mlp.gate_proj.weight"].T)
        up = y @ weights[f"{layer}.mlp.up_proj.weight"].T
        x = x + (gate * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
    return norm(x, "transformer.norm.weight") @ weights["v_head.weight"][0]


def write(folder, weights, form: str):
    """`form`: bin, safetensors, or either of them in two "…-shards"."""
    kind = form.removesuffix("-shards")
    stem = {"bin": "pytorch_model", "safetensors": "model"}[kind]
    save = torch.save if kind == "bin" else save_file
    LlamaConfig(**SIZES).save_pretrained(folder)
    if form == kind:
        save(weights, folder / f"{stem}.{kind}")
        return folder
    names = sorted(weights)
    parts = {f"{stem}-0000{i + 1}-of-00002.{kind}": names[i::2] for i in range(2)}
    for file, chosen in parts.items():
        save({name: weights[name] for name in chosen}, folder / file)
    index = {name: file for file, chosen in parts.items() for name in chosen}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / f"{stem}.{kind}.index.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def weights():
    return released_weights()


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory):
    """A folder with a byte tokenizer that has Llama's special tokens and puts BOS."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    special = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    backend = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    folder = tmp_path_factory.mktemp("llama-tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


# --- weights


@pytest.mark.parametrize(
    "form", ["bin", "safetensors", "bin-shards", "safetensors-shards"]
)
def test_every_form_gives_the_scores_of_a_forward_by_hand(form, weights, tmp_path):
    model = load_starling_rm(write(tmp_path, weights, form))
    ids = [BOS, 50, 60, 70, 80, EOS]
    expected = forward_by_hand(weights, ids, len(ids))
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
    assert torch.allclose(model.score(hidden)[:, 0], expected, atol=1e-5)
    assert model(torch.tensor([ids])).logits.item() == pytest.approx(
        expected[-1].item(), abs=1e-5
    )
    assert expected.std() > 0.1 and not model.training
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_a_weight_file_by_itself_and_half_precision(weights, tmp_path):
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    write(tmp_path, halves, "bin")
    (tmp_path / "config.json").unlink()
    file = (tmp_path / "pytorch_model.bin").rename(tmp_path / "rm.bin")
    model = load_starling_rm(file, LlamaConfig(**SIZES))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    kept = load_starling_rm(file, LlamaConfig(**SIZES), dtype=torch.bfloat16)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert torch.equal(model.score.weight, weights["v_head.weight"].bfloat16().float())


def test_training_a_mapped_checkpoint_leaves_the_file_alone(weights, tmp_path):
    file = write(tmp_path, weights, "bin") / "pytorch_model.bin"
    before = file.read_bytes()
    model = load_starling_rm(tmp_path)
    model(torch.tensor([[1, 5, 6]])).logits.sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.score.weight, weights["v_head.weight"])
    assert file.read_bytes() == before


def test_a_loaded_model_is_saved_as_one_of_ours(weights, llama_tokenizer, tmp_path):
    released, ours = tmp_path / "released", tmp_path / "ours"
    released.mkdir()
    write(released, weights, "bin")
    model = load_starling_rm(released, score_position="released")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert model.config.pad_token_id == UNK
    model.save_pretrained(ours)
    tokenizer = load_starling_tokenizer(llama_tokenizer)
    tokenizer.save_pretrained(ours)
    again = models.load_reward_model(ours)
    assert again.config.starling_score_position == "released"
    asked = [CONVERSATION[:1], CONVERSATION[:3]], ["ho", "no"]
    one, two = (score_responses(m, tokenizer, *asked) for m in (model, again))
    assert torch.equal(one, two)
    assert models.load_starling_rm is load_starling_rm


def test_without_a_config_it_is_llama_2_7b(weights, tmp_path):
    write(tmp_path, weights, "safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError) as error:
        load_starling_rm(tmp_path)
    sizes = "embed_tokens.weight is (259, 32), by the config (32000, 4096)"
    assert sizes in str(error.value)
    assert "(291 problems)" in str(error.value)  # 32 layers of nine, and three
    assert "and 279 more" in str(error.value)


def test_all_that_is_wrong_with_the_keys_is_listed(weights, tmp_path):
    wrong = dict(weights)
    wrong["lm_head.weight"] = torch.zeros(1)
    wrong["model.norm.weight"] = torch.zeros(32)  # our name, not theirs
    wrong["v_head.weight"] = torch.zeros(2, 32)
    del wrong["transformer.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError) as error:
        load_starling_rm(write(tmp_path, wrong, "bin"))
    for line in (
        "4 problems",
        "unexpected: lm_head.weight",
        "unexpected: model.norm.weight",
        "misshapen: v_head.weight is (2, 32), by the config (1, 32)",
        "missing: transformer.layers.1.mlp.up_proj.weight",
    ):
        assert line in str(error.value)


def test_a_tensor_in_two_shards_is_an_error(weights, tmp_path):
    write(tmp_path, weights, "safetensors-shards")
    second = "model-00002-of-00002.safetensors"
    chosen = {n: weights[n] for n in [*sorted(weights)[1::2], sorted(weights)[0]]}
    save_file(chosen, tmp_path / second)
    with pytest.raises(CheckpointError, match=f"repeated: transformer.*{second}"):
        load_starling_rm(tmp_path)


def test_rotary_tables_of_old_files_are_passed_over(weights, tmp_path):
    table = {"transformer.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    model = load_starling_rm(write(tmp_path, {**weights, **table}, "bin"))
    assert model.model.rotary_emb.inv_freq[1] == pytest.approx(0.1)


# --- files that are damaged, missing or hostile


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_pickle_is_run(weights, tmp_path, zipped):
    mark = tmp_path / "was-run"
    write(tmp_path, weights, "bin")
    content = {**weights, "extra": Hostile(mark)}
    torch.save(
        content,
        tmp_path / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match="nothing in it was run") as error:
        load_starling_rm(tmp_path)
    assert "weights_only=False" not in str(error.value)
    assert not mark.exists()


def test_files_from_before_torch_zipped_them(weights, tmp_path):
    write(tmp_path, weights, "bin")
    file = tmp_path / "pytorch_model.bin"
    torch.save(weights, file, _use_new_zipfile_serialization=False)
    model = load_starling_rm(tmp_path)
    assert torch.equal(model.score.weight, weights["v_head.weight"])


@pytest.mark.parametrize("content", [b"", b"<html>", "half", pickle.dumps([1], 2)])
def test_a_damaged_file_is_named(weights, tmp_path, content):
    file = write(tmp_path, weights, "bin") / "pytorch_model.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    message = "model.bin: (not a file of tensors|expected tensors by name)"
    with pytest.raises(CheckpointError, match=message):
        load_starling_rm(tmp_path)


def test_damaged_safetensors_are_named(weights, tmp_path):
    file = write(tmp_path, weights, "safetensors") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="model.safetensors: .*SafetensorError"):
        load_starling_rm(tmp_path)


def test_what_is_not_a_tensor_is_named(weights, tmp_path):
    write(tmp_path, weights, "bin")
    torch.save({**weights, "epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="'epoch' is no tensor"):
        load_starling_rm(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected tensors by name"):
        load_starling_rm(tmp_path)


@pytest.mark.parametrize("name", ["gone.bin", "../elsewhere.bin"])
def test_an_index_leads_to_no_other_folder(weights, tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, weights, "bin-shards")
    torch.save(weights, tmp_path / "elsewhere.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"v_head.weight": name}}))
    with pytest.raises(CheckpointError, match=f"names '{name}', which is not in"):
        load_starling_rm(folder)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="no `weight_map`"):
        load_starling_rm(folder)


def test_a_folder_without_weights_and_a_name_without_a_hub(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="no weights. Expected one of model.safe"):
        load_starling_rm(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="the hub did not give it .* that folder"):
        load_starling_rm("berkeley-nest/Starling-RM-7B-alpha-not-here")


def test_an_unknown_score_position(weights, tmp_path):
    with pytest.raises(ValueError, match="'last': choose from .*'released'"):
        load_starling_rm(write(tmp_path, weights, "bin"), score_position="last")


# --- texts


def test_the_two_renderings():
    policy = "[INST] hi [/INST] ho</s> [INST] again? [/INST] no</s>"
    card = "[INST] hi </s> [/INST] ho</s> [INST] again? </s> [/INST] no</s>"
    assert released_text(CONVERSATION) == policy
    assert released_text(CONVERSATION, "card") == card
    with pytest.raises(ValueError, match="style='blog': choose from"):
        released_text(CONVERSATION, "blog")


@pytest.mark.parametrize("style", ["policy", "card"])
def test_the_tokenizer_renders_the_same_with_one_bos(style, llama_tokenizer):
    tokenizer = load_starling_tokenizer(llama_tokenizer, style)
    applied = tokenizer.apply_chat_template(CONVERSATION, return_dict=False)
    assert applied == tokenizer(released_text(CONVERSATION, style))["input_ids"]
    assert applied[0] == BOS and applied.count(BOS) == 1 and applied[-1] == EOS
    assert tokenizer.pad_token_id == UNK
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "left")
    template = {"policy": LLAMA2_TEMPLATE, "card": LLAMA2_CARD_TEMPLATE}[style]
    assert tokenizer.chat_template == template


def test_the_cards_own_text_begins_with_two_bos(llama_tokenizer):
    """Its code: `<s>` in the text, cut on the left at 2048, BOS by the tokenizer."""
    tokenizer = load_starling_tokenizer(llama_tokenizer, "card_two_bos")
    for user in ("Hello?", "long " * 450):
        messages = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": "Hi"},
        ]
        card = f"<s>[INST] {user} </s> [/INST] Hi</s>"
        assert released_text(messages, "card_two_bos") == card
        expected = tokenizer(card, truncation=True, max_length=2048)["input_ids"]
        assert encode_as_released(tokenizer, messages) == expected
        begin = [BOS, BOS] if user == "Hello?" else [BOS, expected[1]]
        assert expected[:2] == begin and expected.count(BOS) == begin.count(BOS)
    once = load_starling_tokenizer(llama_tokenizer, "card")
    short = [{"role": "user", "content": "hi"}]
    one, two = (
        t.apply_chat_template(short, return_dict=False) for t in (once, tokenizer)
    )
    assert two == [BOS, *one]


def test_a_tokenizer_without_unk_is_refused(llama_tokenizer, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama_tokenizer)
    tokenizer.unk_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no <unk> token"):
        load_starling_tokenizer(tmp_path)


# --- where the score is read


@pytest.mark.parametrize("style", ["policy", "card"])
def test_both_score_positions_against_the_forward_by_hand(
    style, weights, llama_tokenizer, tmp_path
):
    """The released one really padded to 2048 and read at index −1, with a full row."""
    model = load_starling_rm(write(tmp_path, weights, "bin"))
    tokenizer = load_starling_tokenizer(llama_tokenizer, style)
    prompts = [CONVERSATION[:1], CONVERSATION[:3], [{"role": "user", "content": "x"}]]
    responses = ["ho", "no", "long " * 450]
    texts = [
        released_text([*p, {"role": "assistant", "content": r}], style)
        for p, r in zip(prompts, responses, strict=True)
    ]
    # As the card did: <unk> to 2048 on the right, the beginning cut.
    tokenized = tokenizer(texts, truncation=True, padding="max_length", max_length=2048)
    rows, lengths = tokenized["input_ids"], map(sum, tokenized["attention_mask"])
    # The card's search for padding takes the first id of "<unk>", which is BOS: it is
    # found at index 0, and the position before it is the last.
    pad_id = tokenizer(tokenizer.pad_token)["input_ids"][0]
    assert pad_id == BOS
    by_hand = [
        (scores[length - 1].item(), scores[row.index(pad_id) - 1].item())
        for row, length in zip(rows, lengths, strict=True)
        for scores in [forward_by_hand(weights, row, length)]
    ]
    last_token, as_the_card = zip(*by_hand, strict=True)
    released = score_responses(
        model, tokenizer, prompts, responses, score_position="released"
    )
    assert released.tolist() == pytest.approx(as_the_card, abs=1e-4)
    short = score_responses(model, tokenizer, prompts[:2], responses[:2])
    assert short.tolist() == pytest.approx(last_token[:2], abs=1e-4)
    assert abs(released[:2] - short).min() > 0.01  # the two are different readings
    assert last_token[2] == as_the_card[2]  # a full row has no padding


def test_the_position_is_remembered_in_the_config(weights, llama_tokenizer, tmp_path):
    write(tmp_path, weights, "bin")
    tokenizer = load_starling_tokenizer(llama_tokenizer)
    asked = [CONVERSATION[:1]], ["ho"]
    plain, quirk = (
        load_starling_rm(tmp_path, score_position=position)
        for position in ("attention_mask", "released")
    )
    at_last = score_responses(plain, tokenizer, *asked)
    at_end = score_responses(quirk, tokenizer, *asked)
    assert at_last != at_end
    override = {"score_position": "attention_mask"}
    assert torch.equal(score_responses(quirk, tokenizer, *asked, **override), at_last)
