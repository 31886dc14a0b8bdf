"""The built wheel alone: what it brings, and the notebooks' beginnings as on Colab.

"Colab" is a fresh environment that sees the tested set of packages and not the editable
install: a path that a `.pth` file names is searched, but its own `.pth` files are not
read. Whatever opens a file of the checkout there is written down.
"""

import json
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
import run

ROOT = Path(__file__).resolve().parents[1]
# How many of a notebook's sections are run (else 2): enough to read data or run a model.
SECTIONS = {"02_reward_model": 4, "03_apa": 3}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
INSTALL = re.compile(r'(%pip install -q) "([^"]+)"')

WATCH = """
import os, sys

CHECKOUT, TESTED, LOG = {values}

def watch(event, arguments):
    if event in ("open", "os.listdir", "os.scandir"):
        if isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(arguments[0])) + os.sep
            if path.startswith(CHECKOUT) and not path.startswith(TESTED):
                with open(LOG, "a") as log:
                    print(path, file=log)

sys.addaudithook(watch)
"""
PROBE = """
import json as _json, sys as _sys
from importlib import resources as _resources
from starling_lib.rankings import data_path as _data_path
from starling_lib.recipes import load_settings as _load_settings
_load_settings(PRESET)
print("PROBE", _json.dumps({
    "data": str(_data_path()),
    "recipes": str(_resources.files("starling_lib") / "recipes"),
    "modules": [
        module.__file__ for name, module in _sys.modules.items()
        if name.split(".")[0] == "starling_lib"
    ],
    "path": _sys.path,
}))
"""

pytestmark = pytest.mark.slow


class Colab(NamedTuple):
    """A fresh environment: its interpreter, its packages, what it read of ours."""

    python: Path
    site: Path
    log: Path

    def reads(self) -> str:
        """The files of the checkout that a process in it opened, one a line."""
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True)
    (file,) = folder.glob("starling_cookbook-*.whl")
    return file


def make_colab(folder: Path) -> Colab:
    """Make an environment with the tested packages, without the cookbook."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    scheme = "nt" if sys.platform == "win32" else "posix_prefix"
    places = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", scheme, vars=places))
    python = Path(sysconfig.get_path("scripts", scheme, vars=places)) / "python"
    log = folder / "reads_of_the_checkout.txt"
    tested = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "tested.pth").write_text("\n".join(sorted(tested)) + "\n")
    values = f"{ROOT}/", f"{Path(sys.prefix)}/", str(log)
    (site / "checkout_watch.py").write_text(WATCH.format(values=values))
    (site / "watch.pth").write_text("import checkout_watch\n")
    return Colab(python, site, log)


@pytest.fixture(scope="module")
def colab(wheel, tmp_path_factory) -> Colab:
    """The fresh environment with the wheel installed."""
    made = make_colab(tmp_path_factory.mktemp("colab"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
    command += ["--no-deps", "--target", str(made.site), str(wheel)]
    subprocess.run(command, check=True)
    return made


def execute(
    nb: nbformat.NotebookNode, colab: Colab, folder: Path, monkeypatch
) -> nbformat.NotebookNode:
    """Run `nb` in an empty folder, in a kernel of the fresh environment."""
    working, cache = folder / "empty", folder / "cache"
    working.mkdir()
    cache.mkdir()
    environment = run.kernel_environment() | {
        "STARLING_CACHE": str(cache),
        "HF_HOME": str(cache / "hub"),
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(cache / "ipython"),
        "PIP_NO_INDEX": "1",
    }
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        environment.pop(name, None)
    # The runner starts the kernel by the interpreter that `sys.executable` names.
    monkeypatch.setattr(sys, "executable", str(colab.python))
    run.execute(nb, working, environment)
    assert list(working.iterdir()) == []
    return nb


def first_cells(path: Path, headings: int) -> nbformat.NotebookNode:
    """The notebook up to the end of its first `headings` sections."""
    nb = nbformat.read(path, as_version=4)
    starts = [
        index
        for index, cell in enumerate(nb.cells)
        if cell.cell_type == "markdown" and cell.source.startswith("## ")
    ]
    nb.cells = nb.cells[: starts[headings]]
    return nb


def install_cell(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The one cell that installs the cookbook where it is missing."""
    (cell,) = [cell for cell in run.code_cells(nb) if INSTALL.search(cell.source)]
    return cell


def probed(nb: nbformat.NotebookNode) -> dict:
    """What the last cell said about where things came from."""
    text = "".join(output.get("text", "") for output in nb.cells[-1].outputs)
    return json.loads(text.split("PROBE", 1)[1])


def assert_all_of_the_wheel(found: dict, colab: Colab) -> None:
    package = colab.site / "starling_lib"
    assert Path(found["data"]) == package / "data"
    assert Path(found["recipes"]) == package / "recipes"
    assert package / "rankings.py" in map(Path, found["modules"])
    assert all(Path(file).is_relative_to(package) for file in found["modules"])
    assert str(ROOT) not in found["path"]
    assert colab.reads() == ""


# --- what is inside


def test_the_wheel_holds_the_package_and_its_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
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
    outside = [name for name in names if not name.startswith("starling_")]
    assert outside == []


def test_the_data_are_found_inside(colab, tmp_path):
    code = (
        "from starling_lib.rankings import data_path, load_rankings\n"
        "print(data_path('nectar_mini')); assert len(load_rankings(split='test')) == 37"
    )
    shown = subprocess.run(
        [colab.python, "-P", "-c", code],
        env={"HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert Path(shown.strip()) == colab.site / "starling_lib/data/nectar_mini"
    assert colab.reads() == ""


# --- as on Colab


def test_reads_of_the_checkout_are_noticed(tmp_path):
    colab = make_colab(tmp_path / "colab")
    file = ROOT / "pyproject.toml"
    code = f"import os, numpy; os.listdir({str(ROOT / 'data')!r}); open({str(file)!r})"
    subprocess.run([colab.python, "-P", "-c", code], cwd=tmp_path, check=True)
    assert colab.reads().splitlines() == [f"{ROOT / 'data'}/", f"{file}/"]


@each_notebook
def test_first_sections_run_where_the_wheel_is_installed(
    path, colab, tmp_path, monkeypatch
):
    nb = first_cells(path, SECTIONS.get(path.stem, 2))
    nb = run.override_parameters(nb, {"PRESET": "tiny"})
    nb.cells.append(nbformat.v4.new_code_cell(PROBE))
    execute(nb, colab, tmp_path, monkeypatch)
    assert install_cell(nb).outputs == [], "it installs what is there already"
    assert_all_of_the_wheel(probed(nb), colab)


@each_notebook
def test_the_install_cell_installs_where_nothing_is(path, wheel, tmp_path, monkeypatch):
    colab = make_colab(tmp_path / "colab")
    nb = first_cells(path, 0)
    cell = install_cell(nb)
    # The wheel in place of the address, beside the tested set, which stays as it is.
    chosen = f'--no-deps --target "{colab.site}" "{wheel}"'
    cell.source = INSTALL.sub(lambda found: f"{found[1]} {chosen}", cell.source)
    probe = nbformat.v4.new_code_cell("PRESET = 'tiny'\n" + PROBE)
    nb.cells = [cell, probe]
    assert not (colab.site / "starling_lib").exists()
    execute(nb, colab, tmp_path, monkeypatch)
    assert_all_of_the_wheel(probed(nb), colab)
