"""What an MT-Bench judge is asked, and how its rating or verdict is read.

Knows texts only: templates in the file format of FastChat's `judge_prompts.jsonl`, and
replies. The bundled templates are worded anew; a file of FastChat's loads unchanged and
is then used to the letter. Does not know how a judge is reached, nor what is done with
a rating. Source: Zheng et al. 2023, arXiv 2306.05685 (MT-Bench).
"""

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starling_lib.bench_files import check_fields, numbered_rows
from starling_lib.chat import Message

BUNDLED = Path(__file__).parent / "prompts" / "judge_prompts.jsonl"
RATING, VERDICT = "[[rating]]", "[[A]]"  # values of a template's `output_format`
LOWEST, HIGHEST = 1, 10

_FIELDS = dict.fromkeys(
    ("name", "type", "system_prompt", "prompt_template", "output_format"), str
)
_TURNED = ("question", "answer", "answer_a", "answer_b", "ref_answer")
_PLACEHOLDERS = {"question", "answer", "answer_a", "answer_b"} | {
    f"{name}_{turn}" for name in _TURNED for turn in (1, 2)
}


# --- asking


@dataclass(frozen=True)
class JudgePrompt:
    """One template of a `judge_prompts.jsonl`."""

    name: str
    type: str  # "single" or "pairwise"
    system_prompt: str
    prompt_template: str
    output_format: str

    def user_prompt(self, fields: Mapping[str, str]) -> str:
        """The template with its places filled in; further `fields` are left out.

        Raises ValueError when the template names a place that has no text.
        """
        try:
            return self.prompt_template.format_map(dict(fields))
        except KeyError as error:
            raise ValueError(
                f"judge prompt {self.name!r}: no text for the place {error}"
            ) from None

    def messages(self, user_prompt: str) -> list[Message]:
        """What is sent: the system prompt, where there is one, and the user's."""
        system = [{"role": "system", "content": self.system_prompt}]
        return system * bool(self.system_prompt) + [
            {"role": "user", "content": user_prompt}
        ]


def read_judge_prompts(path: str | Path | None = None) -> dict[str, JudgePrompt]:
    """Templates by name, from a file in the format of FastChat's `judge_prompts.jsonl`.

    Args:
        path: a file; default the bundled templates, under MT-Bench's eight names.

    Raises:
        ValueError: naming file, line and field: one is missing or no text, a `type`
            unknown, a name taken, a place in the template that nothing can fill.
    """
    prompts: dict[str, JudgePrompt] = {}
    for where, row in numbered_rows(path or BUNDLED):
        check_fields(row, _FIELDS, where)
        prompt = JudgePrompt(**{name: row[name] for name in _FIELDS})
        if prompt.type not in ("single", "pairwise"):
            raise ValueError(f"{where}: field 'type' must be 'single' or 'pairwise'")
        if prompt.name in prompts:
            raise ValueError(f"{where}: field 'name': {prompt.name!r} is taken")
        _check_places(prompt.prompt_template, where)
        prompts[prompt.name] = prompt
    return prompts


def _check_places(template: str, where: str) -> None:
    """Raise ValueError unless every place of the template is a plain, known name."""
    try:
        places = {
            name + (f"!{conversion}" if conversion else "") + (spec and f":{spec}")
            for _, name, spec, conversion in string.Formatter().parse(template)
            if name is not None
        }
    except ValueError as error:
        raise ValueError(f"{where}: field 'prompt_template': {error}") from None
    if unknown := sorted(places - _PLACEHOLDERS):
        raise ValueError(
            f"{where}: field 'prompt_template': nothing fills {{{unknown[0]}}} "
            "(write a literal brace twice)"
        )


# --- reading a reply


class JudgmentParseError(ValueError):
    """A reply that does not give one rating or verdict clearly; says what it gives."""


_RATING = re.compile(r"\[\[([0-9]+\.?[0-9]*)\]\]")
_RATING_BACKUP = re.compile(r"\[([0-9]+\.?[0-9]*)\]")
_VERDICT = re.compile(r"\[\[([ABC])\]\]")


def parse_rating(reply: str) -> float:
    """The rating in a judge's reply: `[[5]]` or `[[5.5]]`, else `[5]`, from 1 to 10.

    FastChat's two patterns, stricter: FastChat takes the first match, of any size. Here
    all matches of the pattern that counts must be equal, because a reply that quotes a
    rating from the answer, or the form from the prompt, could be read either way. What
    a file of FastChat's says is its `score`; tables use that and parse nothing again.

    Raises:
        JudgmentParseError: no rating, several different ones, or one out of range.

    >>> parse_rating("Short but right. Rating: [[7.5]]")
    7.5
    """
    found = _RATING.findall(reply) or _RATING_BACKUP.findall(reply)
    ratings = dict.fromkeys(map(float, found))
    if not ratings:
        raise JudgmentParseError(f"no rating; the reply ends in {reply[-60:]!r}")
    if len(ratings) > 1:
        shown = ", ".join(f"{rating:g}" for rating in list(ratings)[:5])
        raise JudgmentParseError(f"different ratings: {shown}")
    (rating,) = ratings
    if not LOWEST <= rating <= HIGHEST:
        raise JudgmentParseError(
            f"the rating {rating:g} is not between {LOWEST} and {HIGHEST}"
        )
    return rating


def parse_verdict(reply: str) -> str:
    """The verdict in a judge's reply: `[[A]]` → "A", `[[B]]` → "B", `[[C]]` → "tie".

    FastChat looks for A first, so that a reply which names several counts for A; here
    different verdicts in one reply are none.

    Raises:
        JudgmentParseError: no verdict, or different ones.
    """
    found = sorted(set(_VERDICT.findall(reply)))
    if not found:
        raise JudgmentParseError(f"no verdict; the reply ends in {reply[-60:]!r}")
    if len(found) > 1:
        raise JudgmentParseError(f"different verdicts: {', '.join(found)}")
    return "tie" if found[0] == "C" else found[0]
