"""Point badges, install lines and links at another repository (`make badges`).

Knows: where notebooks, README and pyproject.toml name the repository on GitHub. Does not
know: anything else in them; every other byte stays as it is.

    python notebooks/badges.py owner/name

Whatever the files name now is replaced, in each of them or in none. A second run changes
nothing.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from starling_lib.journal import write_atomically

ROOT = Path(__file__).resolve().parents[1]
# Links end at a full stop, but names may hold one: owner/name.py, owner/name.git
NAME = r"[\w-]+/[\w-]+(?:\.(?!git\b)[\w-]+)*"
COLAB = r"https://colab\.research\.google\.com/github/"
BADGE = re.compile(
    rf"(colab-badge\.svg\)\]\({COLAB})({NAME})(/blob/[^/)\s]+/)([^)\s]+)"
)
INSTALL = re.compile(rf"(%pip install [^\n]*?git\+https://github\.com/)({NAME})")
LINK = re.compile(
    rf"((?:{COLAB}|\bgithub\.com/|\braw\.githubusercontent\.com/))({NAME})"
)


class BadgeError(ValueError):
    """A file that does not name its repository where it must, or a bad name."""


def check_repository(repository: str) -> str:
    """Return `repository` if it has the form owner/name, else raise BadgeError."""
    if not re.fullmatch(NAME, repository, re.ASCII) or repository == "owner/name":
        raise BadgeError(
            f"expected owner/name, such as ada/starling-cookbook, not {repository!r}: "
            "make badges REPO=owner/name"
        )
    return repository


def project_repository(pyproject: str) -> str:
    """Return owner/name from `[project.urls]` of a pyproject.toml's text."""
    address = tomllib.loads(pyproject)["project"]["urls"]["Repository"]
    found = LINK.search(address)
    if not found:
        raise BadgeError(f"pyproject.toml: Repository {address!r} is not on GitHub")
    return found[2]


def point_notebook(text: str, name: str, repository: str) -> str:
    """Return a notebook's text with badge and install line of `repository`.

    `name` is the file's name: the badge opens this notebook, whichever it opened.
    Raises BadgeError unless there is one badge and one install line.
    """
    text, badges = BADGE.subn(rf"\g<1>{repository}\g<3>notebooks/{name}", text)
    text, installs = INSTALL.subn(rf"\g<1>{repository}", text)
    for what, count in (("Colab badge", badges), ("%pip install line", installs)):
        if count != 1:
            raise BadgeError(
                f"{name}: expected one {what} with git+https, found {count}"
            )
    return text


def point_links(text: str, known: Iterable[str], repository: str) -> str:
    """Return `text` with links to one of the `known` repositories led to `repository`.

    >>> text = "github.com/ada/book, github.com/ada/books"
    >>> point_links(text, ["ada/book"], "bob/book")
    'github.com/bob/book, github.com/ada/books'
    """
    return LINK.sub(
        lambda link: link[1] + (repository if link[2] in known else link[2]), text
    )


def pointed(texts: Mapping[str, str], repository: str) -> dict[str, str]:
    """Return every file's text pointed at `repository`.

    Args:
        texts: by path from the root: pyproject.toml and any README or notebook.
    """
    notebooks = {path for path in texts if path.endswith(".ipynb")}
    known = {project_repository(texts["pyproject.toml"])}
    for path in notebooks:
        found = [*BADGE.finditer(texts[path]), *INSTALL.finditer(texts[path])]
        known |= {match[2] for match in found}
    result = {}
    for path, text in texts.items():
        if path in notebooks:
            text = point_notebook(text, Path(path).name, repository)
        result[path] = point_links(text, known, repository)
    return result


def files_of(root: Path) -> list[Path]:
    """Return the files that name the repository."""
    readmes = [root / "README.md", root / "data" / "README.md"]
    notebooks = sorted((root / "notebooks").glob("0*.ipynb"))
    return [root / "pyproject.toml", *filter(Path.is_file, readmes), *notebooks]


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the files; return 0, or 2 where a name or a file is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("repository", help="owner/name on GitHub")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    options = parser.parse_args(arguments)
    # Bytes, not text mode: line ends stay what they are.
    old = {
        path.relative_to(options.root).as_posix(): path.read_bytes().decode("utf-8")
        for path in files_of(options.root)
    }
    try:
        new = pointed(old, check_repository(options.repository))
    except BadgeError as problem:
        print(f"badges.py: {problem}", file=sys.stderr)
        return 2
    changed = [path for path in old if new[path] != old[path]]
    for path in changed:
        write_atomically(options.root / path, new[path].encode("utf-8"))
    print(f"{options.repository}: {', '.join(changed) or 'nothing to change'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
