"""Model cards: what the hub reads in them, and whether their examples run."""

import json
import math

import pytest
from huggingface_hub import ModelCard

from starling_lib.publish import (
    CardData,
    policy_card,
    reward_model_card,
    save_reward_card,
)
from starling_lib.statistics import Interval

pytestmark = pytest.mark.usefixtures("fp32")

FIGURES = {"accuracy": Interval(0.79912, 0.768, 0.828), "longer_wins": 0.353}


def card(**changes) -> str:
    arguments = {
        "name": "rm-small",
        "base_model": "smollm2-135m",
        "data": "nectar_mini",
        "license": "Apache-2.0",
        "figures": FIGURES,
    }
    return reward_model_card(**{**arguments, **changes})


def front_matter(text: str) -> dict:
    return ModelCard(text).data.to_dict()


def test_the_front_matter_is_read_by_the_hubs_own_reader():
    data = front_matter(card())
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["license"] == "apache-2.0" and data["language"] == "en"
    assert data["pipeline_tag"] == "text-classification"
    assert "datasets" not in data  # nectar_mini is on no hub
    results = {r.metric_type: r for r in ModelCard(card()).data.eval_results}
    accuracy = results["accuracy"]
    assert accuracy.metric_value == 0.7991
    assert accuracy.metric_args == {"low": 0.768, "high": 0.828, "level": 0.95}
    assert (accuracy.dataset_name, accuracy.dataset_split) == ("nectar_mini", "test")
    assert results["longer_wins"].metric_value == 0.353


def test_the_text_names_data_licences_figures_and_limits():
    text = card(limits=["English only."], loss_type="pairwise")
    for part in (
        "# rm-small",
        "SmolLM2-135M-Instruct (Q4_1, dequantised)",
        "the pairwise (Bradley-Terry) likelihood",
        "Licence of the data: Apache-2.0. Licence of this model: Apache-2.0.",
        "| accuracy | 0.799 | [0.768, 0.828] |\n| longer_wins | 0.353 |  |",
        "- English only.\n",
        "split `test`",
    ):
        assert part in text
    assert "{{" not in text and "{%" not in text
    assert "None were given." in card(figures={})


def test_the_set_and_the_part_of_it_that_was_trained_on():
    assert "nectar_mini: 240 prompts (203 in the split train, 37 in test)" in card()
    assert "This model was trained on" not in card()
    assert "an AI assistant.\nThis model was trained on 103 rankings of it.\nL" in card(
        rows=103
    )
    about = ("p", "smollm2-135m", "nectar_mini", "apache-2.0", "rm", "APA", {})
    assert "This model was trained on 1 prompt of it." in policy_card(*about, rows=1)
    with pytest.raises(ValueError, match="rows=0: expected 1 or more"):
        card(rows=0)


def test_every_loss_is_described():
    from starling_lib.reward import LOSSES

    for name in LOSSES:
        text = card(loss_type=name)
        assert f"by {name}." not in text and "likelihood of" in text


def test_nectars_condition_is_told():
    data = front_matter(card(data="berkeley-nest/Nectar"))
    assert data["datasets"] == ["berkeley-nest/Nectar"]
    assert "not used to compete with OpenAI" in card(data="berkeley-nest/Nectar")


@pytest.mark.parametrize(
    ("license", "fields"),
    [
        ("cc-by-nc-4.0", {"license": "cc-by-nc-4.0"}),
        ("Llama 2 Community: terms", {"license_name": "Llama 2 Community: terms"}),
    ],
)
def test_licences_the_hub_has_no_id_for_are_named(license, fields):
    data = front_matter(card(license=license))
    assert fields.items() <= data.items()
    assert data["license"] in (license, "other")


def test_a_folder_of_this_machine_stays_out_of_the_card(tmp_path):
    text = card(base_model=str(tmp_path / "my-base"))
    assert str(tmp_path) not in text and "from my-base," in text
    assert "base_model" not in front_matter(text)


def test_names_with_marks_of_yaml_and_jinja_stay_text():
    data = CardData("rows: {{ 6 * 7 }}", "CC0: #1", note="- a\n---\n")
    text = card(name='say "hi": {{ 1 }}', data=data)
    assert "{{ 6 * 7 }}" in text and "Licence of the data: CC0: #1." in text
    results = ModelCard(text).data.eval_results
    assert results[0].dataset_name == "rows: {{ 6 * 7 }}"
    assert ModelCard(text).data.model_name == 'say "hi": {{ 1 }}'


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "my rows"}, "data='my rows': its licence is not known here"),
        ({"license": " "}, "license is empty"),
        ({"data": CardData("mine", "")}, "data.license is empty"),
        ({"figures": {"ece": math.nan}}, "figure 'ece' is nan: need a number"),
        ({"figures": {"ece": (0.1, 0.2)}}, "figure 'ece' is .0.1, 0.2.: need"),
    ],
)
def test_what_a_card_needs(changes, message):
    with pytest.raises(ValueError, match=message):
        card(**changes)


def test_the_examples_of_a_saved_card_run(reward_model, tokenizer, tmp_path, capsys):
    """Both ways of loading print one score, the same."""
    from starling_lib.scoring import reward_tokenizer

    reward_model.save_pretrained(tmp_path)
    reward_tokenizer(tokenizer).save_pretrained(tmp_path)
    path = save_reward_card(
        tmp_path, "tiny", "nectar_mini", "apache-2.0", FIGURES, load_from=str(tmp_path)
    )
    assert path == tmp_path / "README.md" and not list(tmp_path.glob("*.tmp"))
    text = path.read_text()
    assert text.count(json.dumps(str(tmp_path))) == 3
    assert f"\n# {tmp_path.name}\n" in text
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    names = {}
    for block in blocks:
        exec(block, names)
    piped, scored = capsys.readouterr().out.strip().split("\n")[-2:]
    value = scored.removeprefix("tensor([").removesuffix("])")
    assert float(piped) == pytest.approx(float(value), abs=1e-3)
