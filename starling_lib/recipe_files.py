"""Recipes: YAML files read into typed dataclasses.

Knows: fields, types, overrides `key=value`, what a misspelt key was meant to be, and
which recipe a folder was made with. Does not know what any recipe does.
"""

import ast
import copy
import dataclasses
import datetime
import difflib
import enum
import json
import os
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from starling_lib.journal import write_atomically

RECIPES = Path(__file__).with_name("recipes")
# What is written beside results never holds these: an address may hold a password.
_SECRET = ("base_url", "hub_token")
_MANY = 25  # more known keys than this are not listed in an error


class RecipeError(ValueError):
    """A recipe that cannot be read; the message names the key and the fix."""


def recipe_key(help: str, **default: Any) -> Any:
    """A field that a recipe may set, with its explanation."""
    return dataclasses.field(metadata={"help": help}, **default)


def read_recipe(
    cls: type, path: str | os.PathLike, overrides: Sequence[str] = ()
) -> Any:
    """Read a YAML file into the dataclass `cls`; `overrides` are "key=value" texts.

    Values of overrides are YAML too, and dots lead into parts: "judge.model=some-name".
    Raises RecipeError for an unknown key (with the nearest right one), a missing one,
    or a value of the wrong type.
    """
    return recipe_from(cls, read_yaml(path), overrides)


def read_yaml(path: str | os.PathLike) -> Any:
    """What a YAML file holds; {} if it is empty. Raises RecipeError."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    return {} if data is None else data


def recipe_from(cls: type, data: Any, overrides: Sequence[str] = ()) -> Any:
    """The dataclass `cls` from keys and values, as `read_recipe` makes it."""
    data = copy.deepcopy(data)
    for text in overrides:
        _override(data, text)
    return _typed(cls, data, "")


def _override(data: Any, text: str) -> None:
    name, equals, value = text.partition("=")
    *parts, last = name.split(".")
    for part in parts:
        if isinstance(data, dict) and data.get(part) is None:
            data[part] = {}  # also what a recipe leaves out by null
        data = data[part] if isinstance(data, dict) else None
    if not equals or not isinstance(data, dict):
        raise RecipeError(f"{text!r}: expected key=value, or part.key=value")
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"{text!r}: the value is not YAML; quote it") from None


def _typed(kind: Any, value: Any, name: str) -> Any:
    """`value` as the annotation `kind` wants it, part by part. Raises RecipeError."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or (origin is typing.Literal and value in inner):
        return value
    if dataclasses.is_dataclass(kind):
        return _typed_fields(kind, value, name)
    if origin in (typing.Union, types.UnionType):
        return _typed_union(inner, value, name)
    if origin is list and isinstance(value, list):
        return [_typed(inner[0], v, f"{name}[{i}]") for i, v in enumerate(value)]
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and isinstance(value, datetime.date):
        return str(value)  # YAML makes dates of what looks like one
    if isinstance(kind, enum.EnumType) and value in [one.value for one in kind]:
        return value
    if type(value) is not (origin or kind):  # `bool` is no `int` here
        raise _wrong_type([kind], value, name)
    return value


def _typed_union(kinds: Sequence[Any], value: Any, name: str) -> Any:
    """`value` as the first of `kinds` that takes it. Raises RecipeError."""
    if value is None and types.NoneType in kinds:
        return None
    kinds = [one for one in kinds if one is not types.NoneType]
    if len(kinds) == 1:
        return _typed(kinds[0], value, name)
    for kind in kinds:
        try:
            return _typed(kind, value, name)
        except RecipeError:
            continue
    raise _wrong_type(kinds, value, name)


def _wrong_type(kinds: Sequence[Any], value: Any, name: str) -> RecipeError:
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    hint = " (YAML wants a point in 1.0e-4)" if float in kinds else ""
    if str in kinds and isinstance(value, bool | int | float):
        hint = " (YAML reads no, yes and figures so; as text: key=\"'no'\")"
    return RecipeError(f"{name}: expected {wanted}, got {value!r:.60}{hint}")


def _check_key(key: Any, known: Sequence[str], prefix: str) -> None:
    """Raise RecipeError with the nearest right key, unless `key` is known."""
    if key in known:
        return
    near = difflib.get_close_matches(str(key), known, 1, cutoff=0.5)
    listed = ", ".join(known) if len(known) <= _MANY else "see --help"
    advice = f"did you mean {near[0]!r}?" if near else f"known: {listed}"
    raise RecipeError(f"{prefix}{key}: no such key; {advice}")


def _typed_fields(cls: type, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise RecipeError(
            f"{name or 'recipe'}: expected keys and values, got {value!r:.60}"
        )
    kinds = typing.get_type_hints(cls)
    prefix = f"{name}." if name else ""
    for key in value:
        _check_key(key, list(kinds), prefix)
    for one in dataclasses.fields(cls):
        has_default = (one.default, one.default_factory) != (dataclasses.MISSING,) * 2
        if one.name not in value and not has_default:
            raise RecipeError(
                f"{prefix}{one.name}: missing, {one.metadata.get('help')}"
            )
    return cls(**{k: _typed(kinds[k], v, f"{prefix}{k}") for k, v in value.items()})


def describe_recipe(cls: type, prefix: str = "") -> str:
    """Every key of a recipe with its type, default and meaning."""
    lines = []
    kinds = typing.get_type_hints(cls)
    for one in dataclasses.fields(cls):
        kind = kinds[one.name]
        is_plain = isinstance(kind, type) and not typing.get_args(kind)
        shown = kind.__name__ if is_plain else str(kind).replace("typing.", "")
        # The parts of a part say more than its class's name.
        parts = [
            p for p in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(p)
        ]
        default = "" if one.default is dataclasses.MISSING else f" = {one.default}"
        head = f"{prefix}{one.name}" + ("" if parts else f": {shown}{default}")
        meaning = textwrap.wrap(one.metadata["help"], 80, break_long_words=False)
        lines.append("\n      ".join([f"  {head}", *meaning]))
        mark = "[]." if typing.get_origin(kind) is list else "."
        lines += [describe_recipe(part, f"{prefix}{one.name}{mark}") for part in parts]
    return "\n".join(lines)


def check_arguments(cls: type, arguments: Mapping[str, Any], name: str) -> None:
    """Raise RecipeError unless the dataclass `cls` takes `arguments`, by name and type.

    `name` is the key of the recipe under which they stand.
    """
    kinds = typing.get_type_hints(cls)
    known = [one.name for one in dataclasses.fields(cls) if one.init]
    for key, value in arguments.items():
        _check_key(key, known, f"{name}.")
        _typed(kinds[key], value, f"{name}.{key}")


def describe_source(path: str | os.PathLike, cls: str, prefix: str) -> str:
    """As `describe_recipe`, the fields that a class adds to its base, from its source.

    Nothing is imported: help must not wait for a deep-learning library.
    """
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls)
    lines = []
    for node in found.body:
        if isinstance(node, ast.AnnAssign):
            given = {one.arg: one.value for one in node.value.keywords}
            kind, default = ast.unparse(node.annotation), ast.unparse(given["default"])
            lines.append(f"  {prefix}{node.target.id}: {kind} = {default}")
            lines.append(f"      {ast.literal_eval(given['metadata'])['help']}")
    return "\n".join(lines)


# --- which recipe a folder was made with


def keep_recipe(recipe: Any, path: Path, is_fixed: Callable[[str], bool]) -> None:
    """Write a recipe down as JSON. Raises RecipeError as `check_recipe`."""
    check_recipe(recipe, path, is_fixed)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain_fields(recipe), indent=1, ensure_ascii=False)
    write_atomically(path, text.encode())


def check_recipe(recipe: Any, path: Path, is_fixed: Callable[[str], bool]) -> None:
    """Raise RecipeError where the folder of `path` belongs to another recipe.

    `is_fixed` says of a key, dots leading into parts, whether another value would make
    other results under the same names.
    """
    for name, before, now in recipe_differences(recipe, path, is_fixed):
        raise RecipeError(
            f"{name}: {path.parent} was made with {before!r:.80}, not with {now!r:.80}; "
            "name another output_dir"
        )


def recipe_differences(
    recipe: Any, path: Path, is_fixed: Callable[[str], bool]
) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of fixed keys; nothing where no recipe is kept."""
    if not path.exists():
        return []
    before = dict(_flat(json.loads(path.read_text(encoding="utf-8"))))
    now = dict(_flat(_plain_fields(recipe)))
    return [
        (name, before.get(name), now.get(name))
        for name in {**before, **now}
        if is_fixed(name) and before.get(name) != now.get(name)
    ]


def _plain_fields(recipe: Any) -> dict[str, Any]:
    """The recipe and its kind as JSON has them, without what may hold a secret."""
    fields = {"recipe": type(recipe).__name__, **dataclasses.asdict(recipe)}
    return json.loads(json.dumps(_without_secrets(fields)))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in _SECRET}
        return {k: _without_secrets(v) for k, v in kept.items()}
    return [_without_secrets(v) for v in value] if isinstance(value, list) else value


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by their keys, "trainer.learning_rate" for one inside a part."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
