"""The library's import order, and which modules stay light.

A module may import only modules above it in ORDER, lazily or not: so every concept can
be read, tested and re-used with nothing but those above it.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "starling_lib"
ORDER = [
    "journal",
    "statistics",
    "studies",
    "chat",
    "audit",
    "win_rates",
    "agreement",
    "rankings",
    "released",
    "vocabulary",
    "models",
    "sharding",
    "checkpoints",
    "trunk",
    "prefix",
    "arranged",
    "generation",
    "rollouts",
    "losses",
    "metrics",
    "simulation",
    "scoring",
    "pessimism",
    "reward",
    "vote_panel",
    "judges",
    "served_rollouts",
    "ranking_prompt",
    "recipe_files",
    "responders",
    "command_recipes",
    "labeling",
    "bench_files",
    "bench_answers",
    "judge_prompts",
    "bench_scores",
    "mt_bench",
    "plots",
    "report_files",
    "bench_tables",
    "bench_reports",
    "bench_compare",
    "objectives",
    "actor_critic",
    "policy_rewards",
    "apa",
    "evaluation",
    "reports",
    "publish",
    "planner",
    "recipes",
    "training_runs",
    "run_plans",
    "run_cards",
    "terminal_chat",
    "commands",
    "__main__",
]
# Judging a reply or reading a report must not load a deep-learning stack.
LIGHT = [
    "statistics",
    "studies",
    "chat",
    "audit",
    "win_rates",
    "agreement",
    "vote_panel",
    "judges",
    "labeling",
    "mt_bench",
    "bench_compare",
    "evaluation",
    "plots",
    "command_recipes",
    "run_plans",
    "commands",
    "__main__",
]
HEAVY = {"torch", "transformers", "trl"}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imported(source: str) -> list[str]:
    """Return every dotted name that `source` imports, relative ones made absolute."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = ["starling_lib"] * bool(node.level) + [node.module or ""]
            base = ".".join(filter(None, parts))
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def own_imports(source: str) -> set[str]:
    """Return the modules of the library that `source` imports."""
    parts = [name.split(".") for name in imported(source)]
    return {p[1] for p in parts if p[0] == "starling_lib" and len(p) > 1}


def test_every_module_has_a_place():
    assert set(MODULES) <= set(ORDER)
    folders = [
        path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()
    ]
    assert folders == []


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_one_below_it(module):
    above = set(ORDER[: ORDER.index(module)])
    found = own_imports((PACKAGE / f"{module}.py").read_text()) & set(ORDER)
    assert found <= above, f"{module} imports {sorted(found - above)}"


def test_the_package_itself_imports_none_of_its_modules():
    assert own_imports((PACKAGE / "__init__.py").read_text()) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import starling_lib.reward as r", {"reward"}),
        ("from starling_lib import plots, chat", {"plots", "chat"}),
        ("from starling_lib.apa import APATrainer", {"apa"}),
        ("from . import models\nfrom .prefix import f", {"models", "prefix"}),
        ("def f():\n    from starling_lib import recipes", {"recipes"}),
        ("import torch, datasets.models\nfrom math import exp", set()),
    ],
)
def test_the_check_sees_every_form_of_import(source, found):
    assert own_imports(source) == found


def test_light_modules_load_no_deep_learning_library():
    """One after another in one process: the first that loads one is the one at fault."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(f'starling_lib.{name}')\n"
        f"    print(name, *sorted({HEAVY} & set(sys.modules)))\n"
    )
    assert set(LIGHT) <= set(MODULES)
    done = subprocess.run(
        [sys.executable, "-c", code, *LIGHT],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert done.stdout.splitlines() == LIGHT
