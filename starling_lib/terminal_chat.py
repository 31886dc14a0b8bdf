"""Talking to one model, or to two side by side, in a terminal.

Knows: lines in, replies out, each model's own history, columns. Does not know: where the
models came from.
"""

import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from starling_lib.chat import Message
from starling_lib.rollouts import encode_prompt, sample

HELP = "/reset forgets the conversation, /quit ends."
GAP = " │ "


@dataclass
class Speaker:
    """A model with its own half of the conversation."""

    name: str
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    system: str | None = None
    temperature: float = 0.7
    max_new_tokens: int = 256
    history: list[Message] = field(default_factory=list)

    def reply(self, text: str, seed: int) -> str:
        """What the model answers to `text`; a cut answer ends in " …"."""
        self.history.append({"role": "user", "content": text})
        rollout = sample(
            self.policy,
            self.tokenizer,
            [self._messages()],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=seed,
        )
        self.history.append({"role": "assistant", "content": rollout.texts[0]})
        return rollout.texts[0] + ("" if rollout.finished[0] else " …")

    def _messages(self) -> list[Message]:
        """The conversation; its oldest turns are forgotten where room is short."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        window = getattr(self.policy.config, "max_position_embeddings", None)
        while window and len(self.history) > 1:
            length = len(encode_prompt(self.tokenizer, opening + self.history))
            if length + self.max_new_tokens <= window:
                break
            del self.history[:2]
        return opening + self.history


def converse(
    speakers: list[Speaker],
    lines: Iterable[str],
    write: Callable[[str], None] = print,
    seed: int = 0,
) -> None:
    """Answer line by line until "/quit" or the end; "/reset" forgets what was said."""
    write(f"{' and '.join(one.name for one in speakers)}. {HELP}")
    for number, line in enumerate(lines):
        text = line.strip()
        if text == "/quit":
            return
        if text == "/reset":
            for one in speakers:
                one.history.clear()
            write("(forgotten)")
        elif text:
            replies = [one.reply(text, seed + number) for one in speakers]
            write(side_by_side([one.name for one in speakers], replies))


def side_by_side(names: list[str], replies: list[str], width: int | None = None) -> str:
    """Replies in columns under their names; a single one over the whole width."""
    width = width or shutil.get_terminal_size().columns
    column = max((width - len(GAP) * (len(names) - 1)) // len(names), 10)
    parts = [
        [f"[{name}]", *_wrapped(reply, column)]
        for name, reply in zip(names, replies, strict=True)
    ]
    rows = zip_longest(*parts, fillvalue="")
    return "\n".join(
        GAP.join(cell.ljust(column) for cell in row).rstrip() for row in rows
    )


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters; what a terminal would obey is left out."""
    text = text.expandtabs(4)
    lines = "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
    return [
        part
        for line in lines.split("\n")
        for part in textwrap.wrap(line, width, replace_whitespace=False) or [""]
    ]


def typed_lines(prompt: str = "you> ") -> Iterator[str]:
    """What is typed, or piped in, line by line; Ctrl-C and Ctrl-D end it."""
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            return
