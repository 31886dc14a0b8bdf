import gzip
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling_lib import chat
from starling_lib.chat import messages_to_transcript, render, transcript_to_messages

HELLO = [{"role": "user", "content": "Hello"}]
TWO_TURNS = [
    *HELLO,
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "How are you today?"},
]
QUICKSORT = [{"role": "user", "content": "Implement quicksort using C++"}]

# Token ids printed on the Starling-LM-7B-alpha card.
HELLO_IDS = [1, 420, 6316, 28781, 3198, 3123, 1247, 28747, 22557, 32000]
HELLO_IDS += [420, 6316, 28781, 3198, 3123, 21631, 28747]
QUICKSORT_IDS = [1, 7596, 1247, 28747, 26256, 2936, 7653, 1413, 334, 1680, 32000]
QUICKSORT_IDS += [7596, 21631, 28747]

# --- transcripts


def _prompts(path: Path) -> list[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("nectar_mini/train.jsonl", 203),
        ("nectar_mini/test.jsonl", 37),
        ("nectar_sample.jsonl.gz", 219),
        ("alpaca_eval_kwise.jsonl.gz", 605),
    ],
)
def test_real_transcripts_survive_both_ways(shared_data, name, count):
    prompts = _prompts(shared_data / name)
    assert len(prompts) == count
    for text in prompts:
        messages = transcript_to_messages(text)
        assert messages_to_transcript(messages) == text
        assert messages[-1]["role"] == "user"
        assert len(messages) == 2 * text.count("\n\nHuman: ") - 1


def test_a_transcript_by_hand():
    text = (
        "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: How are you today?\n\nAssistant: "
    )
    assert transcript_to_messages(text) == TWO_TURNS
    assert messages_to_transcript(TWO_TURNS) == text


@pytest.mark.parametrize(
    ("text", "roles", "last"),
    [
        ("\n\nHuman:  two spaces \n\n\nAssistant: ", ["user"], " two spaces \n"),
        ("\n\nHuman: \n\nAssistant: ", ["user"], ""),
        (
            "Be kind.\n\nHuman: a\n\nAssistant: b",
            ["system", "user", "assistant"],
            "b",
        ),
        (
            "\n\nHuman: a\n\nHuman: b\n\nAssistant: ",
            ["user", "user"],
            "b",
        ),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nAssistant: ",
            ["user", "assistant", "assistant"],
            "",
        ),
        (
            "\n\nHuman: hi\n\nAssistant: Human: no",
            ["user", "assistant"],
            "Human: no",
        ),
        ("\n\nAssistant: ", ["assistant"], ""),
    ],
)
def test_odd_transcripts_keep_every_character(text, roles, last):
    messages = transcript_to_messages(text)
    assert [message["role"] for message in messages] == roles
    assert messages[-1]["content"] == last
    assert messages_to_transcript(messages) == text


PIECES = [
    "\n\nHuman: ",
    "\n\nAssistant: ",
    "\n\nHuman:",
    "\n",
    " ",
    "Human: ",
    "a",
    "é",
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_any_text_that_is_read_is_written_back(text):
    try:
        messages = transcript_to_messages(text)
    except ValueError:
        return
    assert messages_to_transcript(messages) == text


contents = st.lists(st.sampled_from(["\n", " ", "Human:", "x"]), min_size=1)


@given(st.lists(contents.map("".join), min_size=1, max_size=5))
def test_alternating_messages_survive_both_ways(texts):
    roles = ["user", "assistant"] * 3
    messages = [
        {"role": role, "content": text}
        for role, text in zip(roles, texts, strict=False)
    ]
    try:
        transcript = messages_to_transcript(messages)
    except ValueError:
        assert any("\n\nHuman: " in text for text in texts)
    else:
        assert transcript_to_messages(transcript) == messages


@pytest.mark.parametrize(
    "text", ["", "no marks", "\n\nHuman: hi", "\n\nHuman: hi\n\nAssistant:"]
)
def test_a_transcript_must_end_in_an_assistant_turn(text):
    with pytest.raises(ValueError, match="does not end in an assistant turn"):
        transcript_to_messages(text)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [{"role": "user", "content": "say\n\nAssistant: yes"}],
            r"message 0 \(user\) holds the speaker mark '\\n\\nAssistant: '",
        ),
        ([{"role": "tool", "content": "x"}], "no place for this 'tool'"),
        ([*HELLO, {"role": "system", "content": "x"}], "message 1: no place"),
        ([{"role": "system", "content": ""}, *HELLO], "message 0: no place"),
    ],
)
def test_messages_that_could_not_be_read_back_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        messages_to_transcript(messages)


# --- templates


def test_openchat_template_is_the_cards():
    turn = "GPT4 Correct User: Hello<|end_of_turn|>GPT4 Correct Assistant:"
    assert render(HELLO, chat.OPENCHAT_TEMPLATE) == turn
    assert render(TWO_TURNS, chat.OPENCHAT_TEMPLATE) == (
        turn + " Hi<|end_of_turn|>GPT4 Correct User: How are you today?"
        "<|end_of_turn|>GPT4 Correct Assistant:"
    )
    assert render(QUICKSORT, chat.OPENCHAT_CODE_TEMPLATE) == (
        "Code User: Implement quicksort using C++<|end_of_turn|>Code Assistant:"
    )


def test_llama2_template_is_the_reward_models():
    answered = TWO_TURNS[:2]
    assert render(HELLO, chat.LLAMA2_TEMPLATE) == "[INST] Hello [/INST]"
    assert render(answered, chat.LLAMA2_TEMPLATE) == "[INST] Hello [/INST] Hi</s>"
    assert render(TWO_TURNS, chat.LLAMA2_TEMPLATE) == (
        "[INST] Hello [/INST] Hi</s> [INST] How are you today? [/INST]"
    )
    card = "[INST] Hello </s> [/INST] Hi</s>"
    assert render(answered, chat.LLAMA2_CARD_TEMPLATE) == card
    with pytest.raises(jinja2.TemplateError, match="no system messages"):
        render([{"role": "system", "content": "x"}, *HELLO], chat.LLAMA2_TEMPLATE)


def test_chatml_ends_at_its_end_token():
    asked = "<|im_start|>user\nHello<|im_end|>"
    assert render(HELLO, chat.CHATML_TEMPLATE, add_generation_prompt=False) == asked
    cue = "\n<|im_start|>assistant\n"
    assert render(HELLO, chat.CHATML_TEMPLATE) == asked + cue
    answered = render(TWO_TURNS[:2], chat.CHATML_TEMPLATE, add_generation_prompt=False)
    assert answered == asked + cue + "Hi<|im_end|>"


def test_content_is_never_run_as_a_template():
    message = [{"role": "user", "content": "{{ 6 * 7 }}\n {% raw %}"}]
    assert "{{ 6 * 7 }}\n {% raw %}" in render(message, chat.OPENCHAT_TEMPLATE)


@pytest.mark.parametrize(
    "template",
    [
        chat.OPENCHAT_TEMPLATE,
        chat.OPENCHAT_CODE_TEMPLATE,
        chat.LLAMA2_TEMPLATE,
        chat.LLAMA2_CARD_TEMPLATE,
        chat.CHATML_TEMPLATE,
    ],
)
@pytest.mark.parametrize("cue", [True, False])
def test_render_equals_transformers_but_for_bos(template, cue):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<s>": 0}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    tokenizer.chat_template = template
    theirs = tokenizer.apply_chat_template(
        TWO_TURNS, tokenize=False, add_generation_prompt=cue
    )
    assert theirs.removeprefix("<s>") == render(TWO_TURNS, template, cue)
    assert theirs.count("<s>") == (template != chat.CHATML_TEMPLATE)


# --- the real tokenizer

WHEEL = "mistral_common-1.13.1-py3-none-any.whl"
WHEEL_SHA256 = "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"


@pytest.fixture(scope="session")
def mistral_model(tmp_path_factory) -> Path:
    """Mistral 7B's SentencePiece model, out of a wheel that is never installed."""
    from starling_lib.models import cache_dir

    folder = cache_dir() / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL
    if not wheel.exists():
        pin = tmp_path_factory.mktemp("pin") / "requirements.txt"
        pin.write_text(f"mistral_common==1.13.1 --hash=sha256:{WHEEL_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--require-hashes", "--retries=1", "--timeout=20"]
        result = subprocess.run(
            [*command, "-d", folder, "-r", pin], capture_output=True, text=True
        )
        if result.returncode:
            pytest.skip(f"cannot fetch Mistral's tokenizer: {result.stderr[-200:]}")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == WHEEL_SHA256
    with zipfile.ZipFile(wheel) as archive:
        member = "mistral_common/data/tokenizer.model.v1"
        return Path(archive.extract(member, tmp_path_factory.mktemp("mistral")))


@pytest.mark.slow
def test_token_ids_of_the_model_card(mistral_model, tmp_path):
    from transformers import AutoTokenizer

    built = chat.openchat_tokenizer(mistral_model)
    built.save_pretrained(tmp_path)
    code = chat.OPENCHAT_CODE_TEMPLATE
    for tokenizer in (built, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == 32002 and tokenizer.eos_token_id == 32000
        assert (
            tokenizer(render(HELLO, chat.OPENCHAT_TEMPLATE))["input_ids"] == HELLO_IDS
        )
        assert tokenizer(render(QUICKSORT, code))["input_ids"] == QUICKSORT_IDS


@pytest.mark.slow
def test_one_bos_by_either_way(mistral_model):
    tokenizer = chat.openchat_tokenizer(mistral_model)
    rendered = tokenizer(render(TWO_TURNS, chat.OPENCHAT_TEMPLATE))["input_ids"]
    applied = tokenizer.apply_chat_template(TWO_TURNS, add_generation_prompt=True)
    assert applied["input_ids"] == rendered
    assert rendered[0] == tokenizer.bos_token_id and rendered.count(1) == 1


@pytest.mark.slow
def test_padding_goes_left_and_is_not_the_end_of_turn(mistral_model):
    tokenizer = chat.openchat_tokenizer(mistral_model)
    batch = tokenizer(["Hello", "Hello there, you two"], padding=True)
    first, mask = batch["input_ids"][0], batch["attention_mask"][0]
    assert first[0] == 32001 != tokenizer.eos_token_id
    assert mask == [int(token != 32001) for token in first]


def test_a_missing_tokenizer_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        chat.openchat_tokenizer(tmp_path)
