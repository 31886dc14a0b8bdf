"""What a saved model says of itself: its model card.

Knows: base model, data and its licence, figures, how the model is loaded. Does not know:
how any of them came about. Nothing here uploads anything.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from starling_lib.journal import write_atomically
from starling_lib.models import BUNDLED_ALIAS, BUNDLED_NAME
from starling_lib.statistics import Interval

Figure = float | Interval | tuple[float, float, float]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # not a path of this machine
_LICENSE_ID = re.compile(r"[a-z0-9.-]+")
_BUNDLED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_LIMITS = (
    "A score compares responses to one prompt. Scores of different prompts, or of "
    "different reward models, have no common zero.",
    "It has learnt what its judge preferred, the judge's biases included; look at length "
    "and format before optimising against it.",
    "A policy trained on it will find what it overrates: stay close to the responses it "
    "was trained on, and judge the outcome by something else.",
    "A response cut by a token limit is read at its last token, a finished one at its "
    "end-of-turn token. The two are not comparable where cutting was not in the data.",
)

_LOSSES = {
    "kwise": "the K-wise (Plackett-Luce) likelihood of whole rankings (arXiv 2301.11270)",
    "pairwise": "the pairwise (Bradley-Terry) likelihood of all pairs of a ranking",
}

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A reward model: it reads a conversation and gives one score to the last response, higher
for what the judge of its training rankings would have preferred. Made with the Starling
cookbook {{ version }} from {{ base }},
by {{ loss }}.

## Use

```python
from transformers import pipeline

reward = pipeline("text-classification", model={{ load_from }}, function_to_apply="none")
messages = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
]
text = reward.tokenizer.apply_chat_template(messages, tokenize=False)
print(reward(text)[0]["score"])
```

Many responses at once, padding and cut responses taken care of:

```python
from starling_lib.models import load_reward_model, load_tokenizer
from starling_lib.scoring import score_responses

model, tokenizer = load_reward_model({{ load_from }}), load_tokenizer({{ load_from }})
print(score_responses(model, tokenizer, [messages[:1]], ["Paris."]))
```

In TRL, give the folder or hub id as `reward_funcs` to `GRPOTrainer` or `RLOOTrainer`.
The chat template is the reward model's own and ends at the last end-of-turn token, where
the score is read.

## Training data

{{ data.name }}{{ ": " + data.note if data.note }}
Licence of the data: {{ data.license }}. Licence of this model: {{ license }}.

## Figures

{% if rows -%}
Measured on the split `{{ data.split }}`, whose prompts were not trained on; intervals are
95 %, over prompts.

| figure | value | interval |
|---|---|---|
{% for figure, value, interval in rows -%}
| {{ figure }} | {{ value }} | {{ interval }} |
{% endfor %}
{%- else -%}
None were given.
{% endif %}
## Limits

{% for limit in limits -%}
- {{ limit }}
{% endfor %}"""


@dataclass(frozen=True)
class CardData:
    """The rankings behind a reward model: name, licence, split of the figures."""

    name: str
    license: str
    note: str = ""
    split: str = "test"
    hub_id: str | None = None


KNOWN_DATA = {
    "nectar_mini": CardData(
        "nectar_mini",
        "Apache-2.0",
        "203 prompts with seven responses, six of them by SmolLM2-135M-Instruct, ranked "
        "by an AI assistant.",
    ),
    "berkeley-nest/Nectar": CardData(
        "berkeley-nest/Nectar",
        "Apache-2.0 on the condition that it is not used to compete with OpenAI",
        "183 thousand prompts with seven responses of other models, ranked by GPT-4.",
        hub_id="berkeley-nest/Nectar",
    ),
}


def reward_model_card(
    name: str,
    base_model: str,
    data: CardData | str,
    license: str,
    figures: Mapping[str, Figure],
    limits: Sequence[str] = (),
    loss_type: str = "kwise",
    load_from: str | None = None,
    language: str = "en",
) -> str:
    """The text of a README.md whose front matter the Hugging Face hub understands.

    `data`: a name in KNOWN_DATA or a CardData. `figures`: numbers by name, or (estimate,
    low, high) at 95 % over prompts. `limits` come after those of every reward model.
    `loss_type`: as in KwiseRewardConfig, or the loss in words. `load_from`: what the
    examples load, by default `name`. Raises ValueError on unknown data, an empty licence
    or a figure that is not finite.
    """
    from starling_lib import __version__

    data = _known(data)
    for what, text in (("license", license), ("data.license", data.license)):
        if not text.strip():
            raise ValueError(f"{what} is empty: say under which licence it stands")
    base_id = _BUNDLED_HUB_ID if base_model == BUNDLED_ALIAS else base_model
    card_data = ModelCardData(
        base_model=base_id if _HUB_ID.fullmatch(base_id) else None,
        datasets=[data.hub_id] if data.hub_id else None,
        eval_results=[_result(data, *figure) for figure in figures.items()] or None,
        language=language,
        library_name="transformers",
        model_name=name,
        pipeline_tag="text-classification",
        tags=["reward-model", "rlaif"],
        **_license_fields(license),
    )
    card = ModelCard.from_template(
        card_data,
        template_str=_TEMPLATE,
        name=name,
        version=__version__,
        base=BUNDLED_NAME if base_model == BUNDLED_ALIAS else Path(base_model).name,
        loss=_LOSSES.get(loss_type, loss_type),
        load_from=json.dumps(load_from or name),
        data=data,
        license=license,
        rows=[_row(*figure) for figure in figures.items()],
        limits=[*_LIMITS, *limits],
    )
    return str(card)


def save_reward_card(
    folder: str | Path,
    base_model: str,
    data: CardData | str,
    license: str,
    figures: Mapping[str, Figure],
    name: str | None = None,
    **options,
) -> Path:
    """Write the card as README.md into a saved reward model's folder; return its path.

    `name` is the folder's own by default; the rest is as in `reward_model_card`.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    text = reward_model_card(name, base_model, data, license, figures, **options)
    write_atomically(folder / "README.md", text.encode())
    return folder / "README.md"


def _known(data: CardData | str) -> CardData:
    if isinstance(data, CardData):
        return data
    if data not in KNOWN_DATA:
        raise ValueError(
            f"data={data!r}: its licence is not known here; give a CardData with it, or "
            f"one of {', '.join(KNOWN_DATA)}"
        )
    return KNOWN_DATA[data]


def _license_fields(license: str) -> dict[str, str]:
    """The hub takes ids such as "apache-2.0"; anything else is "other" with a name."""
    if _LICENSE_ID.fullmatch(license.lower()):
        return {"license": license.lower()}
    return {"license": "other", "license_name": license}


def _interval(name: str, figure: Figure) -> tuple[float, ...]:
    """(estimate,) or (estimate, low, high) as plain numbers."""
    values = tuple(figure) if isinstance(figure, Sequence) else (figure,)
    numbers = tuple(float(value) for value in values)
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"figure {name!r} is {figure}: need a number or (est., low, high)"
        )
    return numbers


def _row(name: str, figure: Figure) -> tuple[str, str, str]:
    estimate, *ends = (f"{number:.3f}" for number in _interval(name, figure))
    return name, estimate, f"[{', '.join(ends)}]" if ends else ""


def _result(data: CardData, name: str, figure: Figure) -> EvalResult:
    estimate, *ends = _interval(name, figure)
    ends = {"low": ends[0], "high": ends[1], "level": 0.95} if ends else None
    return EvalResult(
        task_type="text-classification",
        task_name="Reward modelling",
        dataset_type=data.hub_id or data.name,
        dataset_name=data.name,
        dataset_split=data.split,
        metric_type=name,
        metric_value=round(estimate, 4),
        metric_args=ends,
    )
