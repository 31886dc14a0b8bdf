"""Conversations as text: Nectar transcripts, chat templates, OpenChat's tokenizer.

Knows how a list of messages `{"role": ..., "content": ...}` is written down for each
model of the Starling system. Knows nothing of rankings, weights or training.

The templates are Jinja strings that give the same text in `render` and as a
tokenizer's `chat_template`. BOS belongs to the tokenizer: `render` leaves it out, so
`tokenizer(render(...))` and `tokenizer.apply_chat_template(...)` both put exactly one.
"""

import re
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]

_MARKS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
_ROLES = {mark: role for role, mark in _MARKS.items()}
_ANY_MARK = re.compile("(" + "|".join(_ROLES) + ")")

# OpenChat 3.5 and both Starling-LM cards. No space after "Assistant:" in the cue.
_OPENCHAT = (
    "{{{{ bos_token }}}}{{% for message in messages %}}"
    "{{{{ '{speaker} ' + message['role'] | title + ': ' + message['content']"
    " + '<|end_of_turn|>' }}}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '{speaker} Assistant:' }}}}{{% endif %}}"
)
OPENCHAT_TEMPLATE = _OPENCHAT.format(speaker="GPT4 Correct")
OPENCHAT_CODE_TEMPLATE = _OPENCHAT.format(speaker="Code")

# What Starling's policy code hands to the reward model: "[INST] u [/INST] a</s>",
# turns joined by one space. There is no place for a system message in it.
_LLAMA2 = (
    "{{{{ bos_token }}}}{{% for message in messages %}}"
    "{{% if message['role'] == 'user' %}}"
    "{{{{ ' ' if not loop.first }}}}[INST] {{{{ message['content'] }}}}{end} [/INST]"
    "{{% elif message['role'] == 'assistant' %}}"
    "{{{{ ' ' + message['content'] }}}}</s>"
    "{{% else %}}"
    "{{{{ raise_exception('the Llama-2 rendering of Starling has no '"
    " + message['role'] + ' messages') }}}}"
    "{{% endif %}}{{% endfor %}}"
)
LLAMA2_TEMPLATE = _LLAMA2.format(end="")
# The reward model's card closes the user's turn too: "[INST] u </s> [/INST] a</s>".
LLAMA2_CARD_TEMPLATE = _LLAMA2.format(end=" </s>")

# The newline stands between messages, so that a finished conversation ends at the last
# message's end token: where a reward model reads its score.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '\\n' if not loop.first }}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


def transcript_to_messages(text: str) -> list[Message]:
    """Read a Nectar transcript; the cue that ends it is left out of the messages.

    Nothing is stripped: `messages_to_transcript` gives back the same text exactly.
    Text before the first speaker mark becomes a system message. Raises ValueError when
    there is no mark or the text does not end in an assistant turn.

    >>> transcript_to_messages("\\n\\nHuman: Hi\\n\\nAssistant: ")
    [{'role': 'user', 'content': 'Hi'}]
    """
    opening, *parts = _ANY_MARK.split(text)
    messages = [{"role": "system", "content": opening}] if opening else []
    messages += [
        {"role": _ROLES[mark], "content": content}
        for mark, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if not parts or messages[-1]["role"] != "assistant":
        raise ValueError(
            "the transcript does not end in an assistant turn: expected "
            f"{_MARKS['assistant']!r} at the end, got {text[-30:]!r}"
        )
    roles = [message["role"] for message in messages[-2:]]
    is_cue = messages[-1]["content"] == "" and roles == ["user", "assistant"]
    return messages[:-1] if is_cue else messages


def messages_to_transcript(messages: list[Message]) -> str:
    """Write messages as a Nectar transcript, with the cue when the user spoke last.

    Raises ValueError on content that holds a speaker mark (it would be read back as
    another turn), on a role the format lacks, and on a system message that is empty
    or not the first.
    """
    text = ""
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if mark := _ANY_MARK.search(content):
            raise ValueError(
                f"message {i} ({role}) holds the speaker mark {mark[0]!r}: a reader "
                "would see a new turn there; remove or rewrite it"
            )
        if role in _MARKS:
            text += _MARKS[role] + content
        elif role == "system" and i == 0 and content:
            text += content
        else:
            raise ValueError(f"message {i}: no place for this {role!r} message")
    if messages and messages[-1]["role"] == "user":
        text += _MARKS["assistant"]
    return text


def render(
    messages: list[Message], template: str, add_generation_prompt: bool = True
) -> str:
    """Text of a conversation under a Jinja chat template, without a BOS token.

    Raises `jinja2.TemplateError` where the template refuses the conversation.

    >>> render([{"role": "user", "content": "Hello"}], OPENCHAT_TEMPLATE)
    'GPT4 Correct User: Hello<|end_of_turn|>GPT4 Correct Assistant:'
    """
    return _compiled(template).render(
        messages=messages, add_generation_prompt=add_generation_prompt, bos_token=""
    )


@cache
def _compiled(template: str) -> jinja2.Template:
    # The same environment as transformers' apply_chat_template.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def openchat_tokenizer(source: str | Path) -> "PreTrainedTokenizerFast":
    """OpenChat 3.5's tokenizer from Mistral 7B's SentencePiece model.

    `source` is the model file or a folder that holds it as `tokenizer.model`. Gives
    the token ids of the Starling-LM-7B-alpha card, also after `save_pretrained`.
    Raises FileNotFoundError when there is no such file.
    """
    from tokenizers import AddedToken
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    path = Path(source)
    path = path / "tokenizer.model" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no SentencePiece model at {path}")
    # Without `legacy`, text after a special token loses its word-initial mark (28777
    # instead of 420), and `save_pretrained` forgets the flag: the wrapper below keeps
    # what the flag built.
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / "tokenizer.model")
        llama = LlamaTokenizer.from_pretrained(folder, legacy=True, add_bos_token=True)
    special = ["<|end_of_turn|>", "<|pad_0|>"]
    llama.add_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=llama.backend_tokenizer,
        bos_token="<s>",
        eos_token="<|end_of_turn|>",
        unk_token="<unk>",
        pad_token="<|pad_0|>",
        padding_side="left",
        chat_template=OPENCHAT_TEMPLATE,
    )
