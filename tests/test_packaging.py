"""What is installed, what is bundled, and the shape of the committed notebooks."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
import run
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from starling_lib.rankings import data_path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# An absolute path of somebody's machine; addresses and relative paths do not match.
LOCAL_PATH = re.compile(
    r"(?<![\w.:/~-])/(?:home|root|work|Users|tmp|opt|mnt|usr(?!/bin/env)|private)/\w"
    r"|\b[A-Z]:\\+Users"
)
REGISTRY = re.compile(
    r"Looking in (?:indexes|links)|index-url|find-links|files\.pythonhosted"
    r"|localhost:\d|127\.0\.0\.1|/simple\b"
)


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def declared() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *EXTRAS.values()]
    return [Requirement(text) for group in groups for text in group]


def test_text_checks_see_what_they_are_for():
    for text in ("at /home/ann/x", '"/tmp/y"', "in /Users/ann", r"C:\Users\ann"):
        assert LOCAL_PATH.search(text), text
    for text in ("https://a.org/home/x", "./tmp/x", "data/tmp/x", "~/work/x", "1/2"):
        assert not LOCAL_PATH.search(text), text
    assert REGISTRY.search("Looking in indexes: https://mirror.example/simple")


# --- requirements


def test_conda_installs_the_same_set():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip_part,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip_part == requirements()
    assert "python=3.11" in environment["dependencies"]


def test_the_tested_set_is_exact_and_complete():
    tested = {}
    for text in requirements():
        requirement = Requirement(text)
        assert requirement.url is None, text
        assert re.fullmatch(
            r"==[\d.]+(?:\.?(?:post|rc|a|b)\d+)?", f"{requirement.specifier}"
        )
        tested[canonicalize_name(requirement.name)] = requirement
    assert str(tested["torch"].specifier) == "==2.13.0"
    for wanted in declared():
        (exact,) = tested[canonicalize_name(wanted.name)].specifier
        assert wanted.specifier.contains(exact.version), wanted


def test_the_package_caps_and_pins_nothing():
    for requirement in declared():
        assert {part.operator for part in requirement.specifier} <= {">="}, requirement
    assert {"torch", "numpy"} <= {
        r.name for r in map(Requirement, PROJECT["dependencies"])
    }


def test_every_imported_library_is_declared():
    owners = packages_distributions()
    used = set()
    for path in (ROOT / "starling_lib").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                used.add(node.module.split(".")[0])
    used -= {"starling_lib", *sys.stdlib_module_names}
    names = {canonicalize_name(requirement.name) for requirement in declared()}
    missing = {
        name
        for name in used
        if names.isdisjoint(map(canonicalize_name, owners.get(name, [])))
    }
    assert missing == set()


def test_our_files_name_no_machine():
    folders = [ROOT / name for name in ("starling_lib", "notebooks", "tests", "data")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    for path in [*files, ROOT / ".ci" / "run"]:
        if path.suffix not in {".pyc", ".ipynb", ".jsonl"} and path.name != "LICENSE":
            text = path.read_text(encoding="utf-8")
            if path != Path(__file__):
                assert not LOCAL_PATH.search(text), path


def test_the_runner_offers_the_bundled_presets():
    recipes = (ROOT / "starling_lib" / "recipes").glob("*.yaml")
    assert {path.stem for path in recipes} == set(run.PRESETS)


@pytest.mark.slow
def test_an_installed_wheel_brings_its_data(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("starling_cookbook-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "starling_lib").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert "starling_lib/recipes/small.yaml" in package
    assert package <= names
    bundled = {
        f"starling_lib/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "data").rglob("*")
        if path.is_file()
    }
    assert "starling_lib/data/nectar_mini/train.jsonl" in bundled
    assert bundled <= names
    assert not [
        name for name in names if name.startswith(("tests", "notebooks", "data"))
    ]
    code = (
        "from starling_lib.rankings import data_path, load_rankings\n"
        "print(data_path('nectar_mini')); assert len(load_rankings(split='test')) == 37"
    )
    shown = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert Path(shown.strip()) == tmp_path / "site" / "starling_lib/data/nectar_mini"


def test_an_editable_install_reads_the_data_in_place():
    assert data_path("nectar_mini") == ROOT / "data" / "nectar_mini"


# --- notebooks


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def shown_text(nb: nbformat.NotebookNode) -> str:
    """Return all that a reader sees of a notebook as text: sources and text outputs."""
    parts = [cell.source for cell in nb.cells]
    for cell in run.code_cells(nb):
        for output in cell.outputs:
            parts += [output.get("text", ""), "\n".join(output.get("traceback", []))]
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/"):
                    parts.append(value)
    return "\n".join(parts)


def test_the_chain_is_complete():
    names = [path.stem for path in NOTEBOOKS]
    assert names[:4] == ["01_nectar", "02_reward_model", "03_apa", "04_evaluation"]
    assert names[:4] == list(run.BUDGETS)


@each_notebook
def test_parameters_default_to_the_small_preset(path):
    nb = read(path)
    values = run.parameter_values(nb.cells[run.parameters_index(nb)].source)
    assert values["PRESET"] == "small"
    assert values["SEED"] == 0


@each_notebook
def test_badges_open_this_very_notebook(path):
    colab = r"colab\.research\.google\.com/github/([\w-]+/[\w-]+)/blob/main/([^)\s]+)"
    ((repository, file),) = re.findall(colab, read(path).cells[0].source)
    assert repository.endswith("/starling-cookbook")
    assert file == f"notebooks/{path.name}"


@each_notebook
def test_cells_are_short(path):
    for cell in run.code_cells(read(path)):
        lines = cell.source.splitlines()
        assert len(lines) <= 15, cell.source
        assert max(map(len, lines)) <= 88, cell.source


@each_notebook
def test_notebooks_name_no_machine_and_no_registry(path):
    text = shown_text(read(path))
    assert not LOCAL_PATH.search(text), LOCAL_PATH.search(text)
    assert not REGISTRY.search(text), REGISTRY.search(text)


@each_notebook
def test_committed_notebooks_ran_from_top_to_bottom(path):
    cells = run.code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        if "raises-exception" not in cell.metadata.get("tags", []):
            assert all(output.output_type != "error" for output in cell.outputs)


@each_notebook
def test_the_last_cell_reports_key_figures(path):
    nb = read(path)
    last = ast.parse(run.code_cells(nb)[-1].source).body[-1]
    assert isinstance(last, ast.Expr), (
        "the last cell must end in recipes.KeyFigures(...)"
    )
    assert ast.unparse(last.value.func) == "recipes.KeyFigures"
    assert ast.literal_eval(last.value.args[0]) == path.stem
    assert run.key_figures(nb)
