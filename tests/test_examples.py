"""Every example in a docstring or in README's section for other projects runs."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import starling_lib

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    path.stem
    for path in Path(starling_lib.__file__).parent.glob("*.py")
    if ">>>" in path.read_text()
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(f"starling_lib.{module}"))
    assert found.attempted and not found.failed


def test_public_names_are_there_and_explained():
    for name in starling_lib.__all__:
        thing = getattr(starling_lib, name)
        if callable(thing):
            assert (thing.__doc__ or "").strip(), name
    assert set(starling_lib.__all__) <= set(dir(starling_lib))
    with pytest.raises(AttributeError, match="no attribute 'kwise_los'"):
        starling_lib.kwise_los  # noqa: B018


def readme_snippets() -> list[str]:
    text = (ROOT / "README.md").read_text()
    section = text.split("## Use the helpers in your own project")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


@pytest.mark.parametrize("number", range(5))
def test_snippets_of_the_readme(number, monkeypatch, tmp_path, fp32):
    snippets = readme_snippets()
    assert len(snippets) == 5
    monkeypatch.chdir(tmp_path)
    exec(compile(snippets[number], f"README snippet {number + 1}", "exec"), {})
