"""The model card of a trained folder, from what its own run left there.

Knows: the files of `training_runs` and of a bench's report, and which of their figures a
card shows. Does not know: how a card looks (`publish`), how a model was trained.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from starling_lib.checkpoints import MARKER
from starling_lib.command_recipes import CardRecipe
from starling_lib.publish import (
    KNOWN_DATA,
    KNOWN_LICENSES,
    CardData,
    derived_license,
    policy_card,
    report_figures,
    reward_model_card,
    write_card,
)
from starling_lib.recipe_files import RecipeError

# Figures of `APAConfig`'s log that a reader of a card can make sense of.
_CURVES = ("reward", "kl", "length", "eos_rate", "entropy")
_METHODS = {
    "apa": "APA (arXiv 2306.02231)",
    "awr": "AWR (advantage-weighted regression)",
    "ppo": "PPO (arXiv 1707.06347)",
}
_SHOWN = ("model", "data", "split", "eval_split", "half", "rows", "seed", "base")


def write_run_card(recipe: CardRecipe) -> Path:
    """Write README.md into a folder that `reward` or `apa` made; return its path.

    Raises RecipeError for a folder that neither has finished, and where a licence is not
    known and not given.
    """
    folder = Path(recipe.folder)
    if not (folder / "recipe.json").exists() or not (folder / MARKER).exists():
        raise RecipeError(
            f"folder: {folder} holds no model that reward or apa finished"
        )
    run = json.loads((folder / "recipe.json").read_text("utf-8"))
    data, license = _licenses(recipe, run)
    about = (recipe.name or folder.resolve().name, run["model"], data, license)
    options: dict[str, Any] = {
        "limits": recipe.limits,
        "load_from": recipe.load_from,
        "settings": _settings(run),
    }
    if "reward_model" in run:
        text = _policy_text(about, run, folder, recipe.bench, options)
    else:
        loss = run["trainer"].get("loss_type", "kwise")
        figures = _report_figures(folder)
        text = reward_model_card(*about, figures, loss_type=loss, **options)
    return write_card(folder, text)


def _licenses(recipe: CardRecipe, run: dict[str, Any]) -> tuple[CardData, str]:
    """The data's card entry and the model's licence: as given, else as known."""
    name = run["data"]
    data = KNOWN_DATA.get(name)
    if recipe.data_license is not None:
        plain = data or CardData(Path(name).name, recipe.data_license)
        data = dataclasses.replace(plain, license=recipe.data_license)
    if data is None:
        raise RecipeError(f"data_license: that of {name} is not known here; give it")
    if run.get("eval_split"):
        data = dataclasses.replace(data, split=run["eval_split"])
    license = recipe.license
    if license is None:
        if run["model"] not in KNOWN_LICENSES:
            raise RecipeError(
                f"license: that of {run['model']} is not known here; give this model's"
            )
        license = derived_license(KNOWN_LICENSES[run["model"]], data)
    return data, license


def _policy_text(
    about: tuple[str, str, CardData, str],
    run: dict[str, Any],
    folder: Path,
    bench: str | None,
    options: dict[str, Any],
) -> str:
    method = _METHODS[run["trainer"].get("loss_type", "apa")]
    log = json.loads((folder / "log_history.json").read_text("utf-8"))
    logs = [row for row in log if "kl" in row]
    curves = {
        name: (logs[0][name], logs[-1][name])
        for name in _CURVES
        if logs and name in logs[0]
    }
    findings = _findings(bench) if bench else []
    rest = (run["reward_model"], method, curves, findings)
    return policy_card(*about, *rest, **options)


def _settings(run: dict[str, Any]) -> dict[str, Any]:
    """What decided the weights, flat; a folder of this machine by its end only."""
    shown = {name: run[name] for name in _SHOWN if run.get(name) is not None}
    for name in ("model", "data"):
        if Path(str(shown[name])).exists():
            shown[name] = Path(shown[name]).name
    for part in ("lora", "trainer"):
        for name, value in (run.get(part) or {}).items():
            shown[f"{part}.{name}"] = value
    return shown


def _report_figures(folder: Path) -> dict[str, Any]:
    path = folder / "reward_report.json"
    return report_figures(json.loads(path.read_text("utf-8"))) if path.exists() else {}


def _findings(bench: str) -> list[str]:
    """Sentences of a bench's report. Raises RecipeError where there is none."""
    path = Path(bench) / "report.json"
    if not path.exists():
        raise RecipeError(f"bench: no report.json in {bench}; run the command report")
    return json.loads(path.read_text("utf-8"))["in_short"]
