"""Every notebook on the tiny preset: as a chain, and each alone in a fresh cache."""

import zlib
from pathlib import Path

import nbformat
import pytest
import run

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("0*.ipynb"))

pytestmark = pytest.mark.notebook
# In the order of the files and in one process, whatever the others do.
in_turn = pytest.mark.xdist_group("chain")


@pytest.fixture(scope="module")
def chain_cache(tmp_path_factory) -> Path:
    """A cache that the notebooks of the chain share, empty before the first."""
    return tmp_path_factory.mktemp("chain")


def execute_tiny(path: Path, cache: Path, folder: Path, **parameters) -> dict:
    """Run `path` in `folder`, all downloads going to `cache`; return its figures."""
    environment = run.kernel_environment() | {
        "STARLING_CACHE": str(cache),
        "HF_HOME": str(cache / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    nb = nbformat.read(path, as_version=4)
    nb = run.override_parameters(nb, {"PRESET": "tiny", **parameters})
    run.execute(nb, folder, environment)
    return run.key_figures(nb)


@in_turn
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_chain(path, chain_cache, tmp_path):
    assert execute_tiny(path, chain_cache, tmp_path)
    assert list(tmp_path.iterdir()) == [], "a notebook wrote into the working directory"


# 01, 02 and 05 take nothing from the others: in the chain they are alone already.
@pytest.mark.parametrize("path", NOTEBOOKS[2:-1], ids=lambda path: path.stem)
def test_alone(path, tmp_path):
    cache, folder = tmp_path / "cache", tmp_path / "elsewhere"
    cache.mkdir()
    folder.mkdir()
    assert execute_tiny(path, cache, folder)


@in_turn
def test_the_bench_asks_an_endpoint_instead(chain_cache, tmp_path, serve, monkeypatch):
    """Notebook 04 with a judge behind a server; what it says depends on every letter."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    def say(body, count):
        prompt = body["messages"][-1]["content"]
        number = zlib.crc32(prompt.encode())
        if "Rating: [[number]]" in prompt:
            return f"Rating: [[{number % 3 + 7}]]"
        return f"Verdict: [[{'ABC'[number % 3]}]]"

    server = serve(say)
    (path,) = [p for p in NOTEBOOKS if p.stem == "04_evaluation"]
    asked = {"JUDGE": "stub", "JUDGE_URL": server.url}
    figures = execute_tiny(path, chain_cache, tmp_path, **asked)
    assert 7 < figures["committed run, stub: tuned"] < 9  # the recorded judge: 1.5
    assert len(server.asked) == 622  # each text once; 18 of 640 are equal to another
    assert (tmp_path / "judge_replies.jsonl").exists()
