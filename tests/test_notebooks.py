"""Every notebook on the tiny preset: as a chain, and each alone in a fresh cache."""

from pathlib import Path

import nbformat
import pytest
import run

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("0*.ipynb"))

pytestmark = pytest.mark.notebook


@pytest.fixture(scope="module")
def chain_cache(tmp_path_factory) -> Path:
    """A cache that the notebooks of the chain share, empty before the first."""
    return tmp_path_factory.mktemp("chain")


def execute_tiny(path: Path, cache: Path, folder: Path) -> dict:
    """Run `path` in `folder`, all downloads going to `cache`; return its figures."""
    environment = run.kernel_environment() | {
        "STARLING_CACHE": str(cache),
        "HF_HOME": str(cache / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    nb = nbformat.read(path, as_version=4)
    nb = run.override_parameters(nb, {"PRESET": "tiny"})
    run.execute(nb, folder, environment)
    return run.key_figures(nb)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_chain(path, chain_cache, tmp_path):
    assert execute_tiny(path, chain_cache, tmp_path)
    assert list(tmp_path.iterdir()) == [], "a notebook wrote into the working directory"


# The first has nothing before it: in the chain it is alone already.
@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_alone(path, tmp_path):
    cache, folder = tmp_path / "cache", tmp_path / "elsewhere"
    cache.mkdir()
    folder.mkdir()
    assert execute_tiny(path, cache, folder)
