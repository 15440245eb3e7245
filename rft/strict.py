"""A tree of plain values to a tree of frozen dataclasses, without forgiveness.

Unknown keys name the nearest known one, wrong types say what was expected, and every message names the dotted key.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

from rft.errors import RecipeError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], at: str = "") -> T:
    """An instance of the dataclass `cls` from a mapping; `at` is the dotted key of the mapping itself.

    Raises:
        RecipeError: an unknown key, a missing one or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(at or "recipe", f"expected a mapping, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for key in values:
        if key not in known:
            raise RecipeError(_join(at, key), "unknown key", nearest(str(key), known))
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise RecipeError(_join(at, name), "this key is required")
    try:
        return cls(**{key: _value(hints[key], value, _join(at, key)) for key, value in values.items()})
    except ValueError as error:
        raise RecipeError(at or "recipe", str(error)) from error


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """'did you mean X?' or the list of what is known."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def _value(hint: Any, value: Any, at: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _value(next(a for a in args if a is not type(None)), value, at)
    if origin is Literal:
        if value not in args:
            raise RecipeError(at, f"{value!r} is not one of {', '.join(map(str, args))}")
        return value
    if is_dataclass(hint):
        return build(hint, value, at)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(at, f"expected a list, got {value!r}")
        return tuple(_value(args[0], item, f"{at}.{i}") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise RecipeError(at, f"expected a mapping, got {value!r}")
        return {str(k): _value(args[1], v, _join(at, k)) for k, v in value.items()}
    if hint is Any:
        return value
    return _scalar(hint, value, at)


def _scalar(hint: type, value: Any, at: str) -> Any:
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 3e-4 as a string
        except ValueError:
            pass
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise RecipeError(at, f"expected {hint.__name__}, got {value!r}")


def _join(at: str, key: object) -> str:
    return f"{at}.{key}" if at else str(key)
