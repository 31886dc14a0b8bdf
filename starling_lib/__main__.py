"""The command line: python -m starling_lib COMMAND RECIPE.yaml [key=value …].

Knows the commands and their recipes; does not know how any of them works.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from starling_lib.judges import JudgeError
from starling_lib.labeling import (
    LabelRecipe,
    describe_recipe,
    label,
    read_recipe,
)

RECIPES = Path(__file__).parent / "recipes"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, or 1 after saying on stderr what is wrong."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (JudgeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m starling_lib")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser(
        "label",
        help="let a judge rank responses (RLAIF) and write Nectar rows",
        description="Let a judge rank responses and write rows in the Nectar schema. "
        "Stopped at any moment, the same command goes on.",
        epilog="Keys of the recipe:\n" + describe_recipe(LabelRecipe),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "recipe",
        metavar="RECIPE.yaml",
        help=f"a file, or one of the bundled: {', '.join(_bundled('label'))}",
    )
    command.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="replaces a value of the recipe: judge.model=some-name split=test",
    )
    command.set_defaults(run=_label)
    return parser


def _bundled(command: str) -> list[str]:
    return sorted(path.stem for path in (RECIPES / command).glob("*.yaml"))


def _recipe_path(command: str, name: str) -> Path:
    bundled = RECIPES / command / f"{name}.yaml"
    return bundled if name in _bundled(command) else Path(name)


def _label(args: argparse.Namespace) -> None:
    path = _recipe_path("label", args.recipe)
    recipe = read_recipe(LabelRecipe, path, args.overrides)
    report = label(recipe)
    print(json.dumps(report, indent=1, ensure_ascii=False))
    print(f"written to {recipe.output_dir}")


if __name__ == "__main__":
    sys.exit(main())
