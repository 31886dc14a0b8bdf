"""Recipes: YAML files read into typed dataclasses.

Knows: fields, types, overrides `key=value`, what a misspelt key was meant to be. Does not
know what any recipe does.
"""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


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
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    data = {} if data is None else data
    for text in overrides:
        _override(data, text)
    return _typed(cls, data, "")


def _override(data: Any, text: str) -> None:
    name, equals, value = text.partition("=")
    *parts, last = name.split(".")
    for part in parts:
        data = data.setdefault(part, {}) if isinstance(data, dict) else None
    if not equals or not isinstance(data, dict):
        raise RecipeError(f"{text!r}: expected key=value, or part.key=value")
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"{text!r}: the value is not YAML; quote it") from None


def _typed(kind: Any, value: Any, name: str) -> Any:
    """`value` as the annotation `kind` wants it, part by part. Raises RecipeError."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _typed_fields(kind, value, name)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in inner:
            return None
        (kind,) = (one for one in inner if one is not types.NoneType)
        return _typed(kind, value, name)
    if origin is list and isinstance(value, list):
        return [_typed(inner[0], v, f"{name}[{i}]") for i, v in enumerate(value)]
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not (origin or kind):  # `bool` is no `int` here
        wanted = getattr(kind, "__name__", str(kind))
        hint = " (YAML wants a point in 1.0e-4)" if kind is float else ""
        raise RecipeError(f"{name}: expected {wanted}, got {value!r:.60}{hint}")
    return value


def _typed_fields(cls: type, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise RecipeError(
            f"{name or 'recipe'}: expected keys and values, got {value!r:.60}"
        )
    kinds = typing.get_type_hints(cls)
    prefix = f"{name}." if name else ""
    for key in value:
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, 1, cutoff=0.5)
            advice = (
                f"did you mean {near[0]!r}?" if near else f"known: {', '.join(kinds)}"
            )
            raise RecipeError(f"{prefix}{key}: no such key; {advice}")
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
        shown = kind.__name__ if isinstance(kind, type) else str(kind)
        # The parts of a part say more than its class's name.
        parts = [
            p for p in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(p)
        ]
        default = "" if one.default is dataclasses.MISSING else f" = {one.default}"
        head = f"{prefix}{one.name}" + ("" if parts else f": {shown}{default}")
        lines.append(f"  {head}\n      {one.metadata['help']}")
        mark = "[]." if typing.get_origin(kind) is list else "."
        lines += [describe_recipe(part, f"{prefix}{one.name}{mark}") for part in parts]
    return "\n".join(lines)
