"""The command line: python -m starling_lib COMMAND RECIPE [key=value …].

Knows the commands and how their errors end. Does not know how any of them works.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from starling_lib.commands import COMMANDS, Command, bundled_recipes, read_command
from starling_lib.judges import JudgeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0, or 1 after saying on stderr what is wrong; 130 where Ctrl-C stopped it.
    """
    args = _parser().parse_args(arguments)
    try:
        name, overrides = _split(args.recipe, args.overrides)
        args.command.run(read_command(args.command, name, overrides))
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from here" * args.command.resumes
        print(f"stopped{goes_on}", file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(error, _expected()):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _expected() -> tuple[type[Exception], ...]:
    """Errors that say in words what is wrong; all others are shown with their trace."""
    errors: list[type[Exception]] = [JudgeError, ValueError, OSError]
    errors.append(FloatingPointError)  # a run that diverged
    if models := sys.modules.get("starling_lib.models"):  # else it raised nothing
        errors.append(models.ModelUnavailable)
    return tuple(errors)


def _split(name: str | None, overrides: list[str]) -> tuple[str | None, list[str]]:
    """Without a recipe, what stands in its place is a key with its value."""
    if name is not None and "=" in name and not Path(name).exists():
        return None, [name, *overrides]
    return name, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m starling_lib")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        _add(commands, command)
    return parser


def _add(commands, command: Command) -> None:
    own = commands.add_parser(
        command.name,
        help=command.summary,
        description=f"{command.summary[0].upper()}{command.summary[1:]}."
        + " Stopped at any moment, the same command goes on." * command.resumes,
        epilog=command.keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bundled = ", ".join(bundled_recipes(command.name)) or "none"
    first = fields(command.recipe)[0].name
    own.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?",
        help=f"a YAML file, or one of the bundled: {bundled}; none: keys alone",
    )
    own.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help=f"replaces a value of the recipe: {first}=runs/mine; dots lead into parts",
    )
    own.set_defaults(command=command)


if __name__ == "__main__":
    sys.exit(main())
