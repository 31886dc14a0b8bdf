"""The data card's figures are what its own command prints."""

import contextlib
import io
import re

from starling_lib.rankings import data_path


def test_figures_of_the_data_card(monkeypatch):
    card = data_path("README.md").read_text(encoding="utf-8")
    command = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    printed = re.search(r"```text\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(data_path().parent)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(command, {})
    assert output.getvalue() == printed
    assert len(printed.splitlines()) > 10
