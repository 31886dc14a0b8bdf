"""What a saved model says of itself: its model card.

Knows: base model, data and licences, settings and figures, how the model is loaded. Does
not know: how any of them came about. Nothing here uploads anything.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from starling_lib.journal import write_atomically
from starling_lib.models import BUNDLED_ALIAS, BUNDLED_NAME, LICENSES
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

_POLICY_LIMITS = (
    "It was tuned to please one reward model. What that model overrates, this one does "
    "more often; a higher reward is not by itself a better answer.",
    "Tuning on preferences changes style, length and tone more than knowledge or "
    "reasoning.",
    "It may say what is false or harmful, and that it is another assistant.",
)

_LOSSES = {
    "kwise": "the K-wise (Plackett-Luce) likelihood of whole rankings (arXiv 2301.11270)",
    "pairwise": "the pairwise (Bradley-Terry) likelihood of all pairs of a ranking",
    "best_worst": "the Bradley-Terry likelihood of the best response of a ranking against "
    "the worst",
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
{%- if trained_on %}
{{ trained_on }}{% endif %}
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
"""


_CLOSING = """{% if settings %}
## Settings

| setting | value |
|---|---|
{% for name, value in settings -%}
| {{ name }} | {{ value }} |
{% endfor %}
{%- endif %}
## Limits

{% for limit in limits -%}
- {{ limit }}
{% endfor %}"""

_POLICY_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A chat model: {{ base }}, tuned with the Starling cookbook {{ version }} against the reward
model `{{ reward_model }}` by {{ method }}.

## Use

```python
from transformers import pipeline

chat = pipeline("text-generation", model={{ load_from }})
messages = [{"role": "user", "content": "What is the capital of France?"}]
print(chat(messages, max_new_tokens=64)[0]["generated_text"][-1]["content"])
```

The chat template is that of the model it began as.

## Training data

Prompts of {{ data.name }}{{ ": " + data.note if data.note }}
{%- if trained_on %}
{{ trained_on }}{% endif %}
Licence of the data: {{ data.license }}. Licence of this model: {{ license }}.
{%- if base_note %} {{ base_note }}{% endif %}

## Figures

{% if rows -%}
Means over the responses of an iteration, sampled from the training prompts; the reward is
that of the reward model it was tuned against.

| figure | first iteration | last iteration |
|---|---|---|
{% for figure, first, last in rows -%}
| {{ figure }} | {{ first }} | {{ last }} |
{% endfor %}
{%- else -%}
None were given.
{% endif %}
{%- if findings %}
On MT-Bench's kind of questions:

{% for finding in findings -%}
- {{ finding }}
{% endfor %}
{%- endif %}
"""


@dataclass(frozen=True)
class CardData:
    """The rankings behind a model: name, licence, split of the figures.

    `note` is about the data set as a whole, whatever part of it a model was trained on.
    """

    name: str
    license: str
    note: str = ""
    split: str = "test"
    hub_id: str | None = None


KNOWN_DATA = {
    "nectar_mini": CardData(
        "nectar_mini",
        "Apache-2.0",
        "240 prompts (203 in the split train, 37 in test) with seven responses, six of "
        "them by SmolLM2-135M-Instruct, ranked by an AI assistant.",
    ),
    "berkeley-nest/Nectar": CardData(
        "berkeley-nest/Nectar",
        "Apache-2.0 on the condition that it is not used to compete with OpenAI",
        "183 thousand prompts with seven responses of other models, ranked by GPT-4.",
        hub_id="berkeley-nest/Nectar",
    ),
}
# Of models that runs begin from; those of `models` included.
KNOWN_LICENSES = LICENSES | {
    "openchat/openchat_3.5": "apache-2.0",
    "meta-llama/Llama-2-7b-chat-hf": "llama2",
}
_BASE_NOTES = {
    "openchat/openchat_3.5": "OpenChat 3.5 was itself trained on conversations with "
    "GPT-4 (ShareGPT), to whose use OpenAI's terms apply.",
    "meta-llama/Llama-2-7b-chat-hf": "The Llama 2 Community License and its acceptable "
    "use policy apply to everything derived from Llama 2.",
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
    settings: Mapping[str, Any] | None = None,
    rows: int | None = None,
) -> str:
    """The text of a README.md whose front matter the Hugging Face hub understands.

    `data`: a name in KNOWN_DATA or a CardData. `figures`: numbers by name, or (estimate,
    low, high) at 95 % over prompts. `limits` come after those of every reward model.
    `loss_type`: as in KwiseRewardConfig, or the loss in words. `load_from`: what the
    examples load, by default `name`. `settings`: of the run, seeds included. `rows`: how
    many of the data it was trained on; None does not say. Raises ValueError on unknown
    data, an empty licence, a figure that is not finite or `rows` below 1.
    """
    data = known_data(data)
    return _card(
        _TEMPLATE + _CLOSING,
        (name, base_model, data, license, load_from),
        {
            "eval_results": [_result(data, *one) for one in figures.items()] or None,
            "pipeline_tag": "text-classification",
            "tags": ["reward-model", "rlaif"],
            "language": language,
        },
        trained_on=_trained_on(rows, "ranking"),
        loss=_LOSSES.get(loss_type, loss_type),
        rows=[_row(*figure) for figure in figures.items()],
        settings=_setting_rows(settings),
        limits=[*_LIMITS, *limits],
    )


def policy_card(
    name: str,
    base_model: str,
    data: CardData | str,
    license: str,
    reward_model: str,
    method: str,
    figures: Mapping[str, tuple[float, float]],
    findings: Sequence[str] = (),
    limits: Sequence[str] = (),
    load_from: str | None = None,
    language: str = "en",
    settings: Mapping[str, Any] | None = None,
    rows: int | None = None,
) -> str:
    """The same for a tuned policy.

    `method`: in words, such as "APA (arXiv 2306.02231)". `figures`: (first, last) of the
    run's iterations by name. `findings`: sentences of a bench's report. The rest is as in
    `reward_model_card`, and so are the errors.
    """
    data = known_data(data)
    for what, pair in figures.items():
        for value in pair:
            _interval(what, value)
    return _card(
        _POLICY_TEMPLATE + _CLOSING,
        (name, base_model, data, license, load_from),
        {
            "pipeline_tag": "text-generation",
            "tags": ["rlaif", "apa"],
            "language": language,
        },
        trained_on=_trained_on(rows, "prompt"),
        reward_model=_plain_name(reward_model),
        method=method,
        base_note=_BASE_NOTES.get(base_model, ""),
        rows=[(what, *(f"{x:.3f}" for x in pair)) for what, pair in figures.items()],
        findings=[" ".join(finding.split()) for finding in findings],
        settings=_setting_rows(settings),
        limits=[*_POLICY_LIMITS, *limits],
    )


def _card(
    template: str,
    about: tuple[str, str, CardData, str, str | None],
    matter: Mapping[str, Any],
    **texts: Any,
) -> str:
    """A card's front matter and text, from what cards of both kinds say."""
    from starling_lib import __version__

    name, base_model, data, license, load_from = about
    for what, text in (("license", license), ("data.license", data.license)):
        if not text.strip():
            raise ValueError(f"{what} is empty: say under which licence it stands")
    base_id = _BUNDLED_HUB_ID if base_model == BUNDLED_ALIAS else base_model
    card_data = ModelCardData(
        base_model=base_id if _HUB_ID.fullmatch(base_id) else None,
        datasets=[data.hub_id] if data.hub_id else None,
        library_name="transformers",
        model_name=name,
        **matter,
        **_license_fields(license),
    )
    card = ModelCard.from_template(
        card_data,
        template_str=template,
        name=name,
        version=__version__,
        base=BUNDLED_NAME if base_model == BUNDLED_ALIAS else Path(base_model).name,
        load_from=json.dumps(load_from or name),
        data=data,
        license=license,
        **texts,
    )
    return re.sub(r"\n{3,}", "\n\n", str(card))  # left where a section is empty


def _trained_on(rows: int | None, what: str) -> str:
    """Of how many rows a training took place; nothing where that is not known."""
    if rows is None:
        return ""
    if rows < 1:
        raise ValueError(f"rows={rows}: expected 1 or more, or None where not known")
    return f"This model was trained on {rows} {what}{'s' * (rows > 1)} of it."


def _plain_name(model: str) -> str:
    """A hub id as it is; of a path of this machine only the end."""
    is_hub_id = _HUB_ID.fullmatch(model) and not Path(model).exists()
    return model if is_hub_id else Path(model).name


def _setting_rows(settings: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Settings as cells of a table, without what would end a cell."""
    return [
        (name, " ".join(str(value).split()).replace("|", "\\|"))
        for name, value in (settings or {}).items()
    ]


def derived_license(base_license: str, data: CardData) -> str:
    """Under which licence a model stands that was made from a model and data.

    A condition of the data goes on to the model, as with Starling-LM, which is under
    Nectar's. This is what its authors did, no legal advice.
    """
    if _LICENSE_ID.fullmatch(data.license.lower()):
        return base_license
    if base_license.lower() == "apache-2.0" and data.license.startswith("Apache-2.0"):
        return data.license
    return f"{base_license}, and for the data: {data.license}"


def report_figures(report: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures for a card from what `reports.reward_report` returns."""
    lines = {
        name: (line["estimate"], line["low"], line["high"])
        for name, line in report["metrics"].items()
    }
    return {name: line for name, line in lines.items() if None not in line}


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
    name = name or Path(folder).resolve().name
    text = reward_model_card(name, base_model, data, license, figures, **options)
    return write_card(folder, text)


def write_card(folder: str | Path, text: str) -> Path:
    """Write a card as README.md into a model's folder, all of it or nothing."""
    path = Path(folder) / "README.md"
    write_atomically(path, text.encode())
    return path


def known_data(data: CardData | str) -> CardData:
    """A CardData by its name. Raises ValueError where its licence is not known."""
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
