"""What is installed, what is bundled, and the shape of the committed notebooks."""

import ast
import doctest
import re
import shutil
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import badges
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
    """What the package asks for, in itself and by its extras."""
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


def test_an_editable_install_reads_the_data_in_place():
    assert data_path("nectar_mini") == ROOT / "data" / "nectar_mini"


# --- the repository's address


REPOSITORY = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")


def opened_by(path: Path) -> tuple[str, str]:
    """Repository and file that the badge in a notebook's first cell opens."""
    colab = r"colab\.research\.google\.com/github/([\w-]+/[\w.-]+)/blob/main/([^)\s]+)"
    (found,) = re.findall(colab, read(path).cells[0].source)
    return found


def fetched_by(path: Path) -> str:
    """The repository that a notebook's guarded cell installs from."""
    (cell,) = [c for c in run.code_cells(read(path)) if "%pip install" in c.source]
    assert 'if importlib.util.find_spec("starling_lib") is None:' in cell.source
    (found,) = re.findall(r'git\+https://github\.com/([\w-]+/[\w.-]+)"', cell.source)
    return found


@pytest.fixture
def copy(tmp_path) -> Path:
    """The files that name the repository, to be changed at will."""
    for path in badges.files_of(ROOT):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    return tmp_path


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in badges.files_of(root)}


def test_links_of_the_readme_are_to_the_repository():
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"git\+https://github\.com/([\w-]+/[\w.-]*\w)", text)
    assert set(found) == {REPOSITORY}


def test_badges_point_everything_at_one_repository(copy, capsys):
    before = contents(copy)
    assert badges.main(["ada/cook.book", "--root", str(copy)]) == 0
    after = contents(copy)
    for path, data in after.items():
        # Nothing but the name differs, so the JSON is laid out as before.
        name = REPOSITORY.encode()
        assert data == before[path].replace(name, b"ada/cook.book"), path
        assert name not in data
    project = tomllib.loads(after[copy / "pyproject.toml"].decode())["project"]
    assert project["urls"]["Repository"] == "https://github.com/ada/cook.book"
    assert project["name"] == PROJECT["name"]
    for path in NOTEBOOKS:
        path = copy / "notebooks" / path.name
        assert opened_by(path) == ("ada/cook.book", f"notebooks/{path.name}")
        assert fetched_by(path) == "ada/cook.book"
    assert b"git+https://github.com/ada/cook.book" in after[copy / "README.md"]

    capsys.readouterr()
    times = [path.stat().st_mtime_ns for path in after]
    assert badges.main(["ada/cook.book", "--root", str(copy)]) == 0
    assert capsys.readouterr().out == "ada/cook.book: nothing to change\n"
    assert [path.stat().st_mtime_ns for path in after] == times
    assert badges.main([REPOSITORY, "--root", str(copy)]) == 0
    assert contents(copy) == before


def test_badges_mend_what_has_drifted(copy):
    wanted = contents(copy)
    path = copy / "notebooks" / NOTEBOOKS[0].name
    name = REPOSITORY.encode()
    drifted = wanted[path].replace(b"github/" + name, b"github/eve/old.book")
    drifted = drifted.replace(b"notebooks/" + path.name.encode(), b"old/name.ipynb")
    assert drifted != wanted[path]
    path.write_bytes(drifted)
    readme = copy / "README.md"
    others = b"\nhttps://github.com/lm-sys/FastChat, github.com/%b-2.\r\n" % name
    readme.write_bytes(wanted[readme] + others + b"github.com/eve/old.book.git\n")
    assert badges.main([REPOSITORY, "--root", str(copy)]) == 0
    wanted[readme] += others + b"github.com/%b.git\n" % name
    assert contents(copy) == wanted


@pytest.mark.parametrize(
    "name",
    ["", "owner/name", "ada", "ada/a/b", "https://github.com/ada/b", "ada/b.git"]
    + ["ada/b c", "ada/.", "ada/b\n"],
)
def test_badges_change_nothing_for_a_bad_name(copy, name, capsys):
    before = contents(copy)
    assert badges.main([name, "--root", str(copy)]) == 2
    assert "expected owner/name" in capsys.readouterr().err
    assert contents(copy) == before


def test_badges_change_nothing_where_a_notebook_lacks_one(copy, capsys):
    path = copy / "notebooks" / NOTEBOOKS[-1].name
    path.write_bytes(path.read_bytes().replace(b"colab-badge.svg", b"other.svg"))
    before = contents(copy)
    assert badges.main(["ada/cookbook", "--root", str(copy)]) == 2
    assert f"{path.name}: expected one Colab badge" in capsys.readouterr().err
    assert contents(copy) == before


def test_the_example_of_the_badges():
    found = doctest.testmod(badges)
    assert found.attempted and not found.failed


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
    first = ["01_nectar", "02_reward_model", "03_apa", "04_evaluation"]
    assert names == [*first, "05_full_scale"]
    assert names == list(run.BUDGETS) == list(run.SLOW_BUDGETS)


@each_notebook
def test_parameters_default_to_the_small_preset(path):
    nb = read(path)
    values = run.parameter_values(nb.cells[run.parameters_index(nb)].source)
    assert values["PRESET"] == "small"
    assert values["SEED"] == 0


@each_notebook
def test_badges_open_this_very_notebook(path):
    assert opened_by(path) == (REPOSITORY, f"notebooks/{path.name}")
    assert (ROOT / opened_by(path)[1]).samefile(path)


@each_notebook
def test_install_cells_fetch_from_the_repository(path):
    assert fetched_by(path) == REPOSITORY


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
