"""A tree of plain values to a tree of frozen dataclasses, without forgiveness.

Unknown keys name the nearest known one, wrong types say what was expected, and every message names the dotted key.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

from rft.errors import RecipeError, RftError

T = TypeVar("T")

KINDS = {
    int: ("a whole number", "write e.g. 8"),
    float: ("a number", "write e.g. 0.5"),
    str: ("text", "put it in quotes"),
    bool: ("true or false", "write true or false"),
}


def build(cls: type[T], values: Mapping[str, Any], at: str = "") -> T:
    """An instance of the dataclass `cls` from a mapping; `at` is the dotted key of the mapping itself.

    Raises:
        RecipeError: an unknown key, a missing one, a value of the wrong type, or one that `cls` refuses.
    """
    known = {f.name: f for f in fields(cls)}
    if not isinstance(values, Mapping):
        raise RecipeError(at or "recipe", f"expected a mapping, got {values!r}", f"known keys: {', '.join(known)}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in known:
            raise RecipeError(join(at, key), "unknown key", nearest(str(key), known))
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise RecipeError(join(at, name), "this key is required", f"give it {KINDS.get(hints[name], ('a value',))[0]}")
    built = {key: _value(hints[key], value, join(at, key)) for key, value in values.items()}
    try:
        return cls(**built)
    except RecipeError:
        raise
    except RftError as error:  # a class of another room, which knows nothing of recipes
        raise RecipeError(at or error.where, error.what, error.do) from error


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """'did you mean X?' or the list of what is known."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known) or 'none'}"


def join(at: str, key: object) -> str:
    """The dotted key of an entry of the mapping `at`."""
    return f"{at}.{key}" if at else str(key)


def _value(hint: Any, value: Any, at: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _value(next(a for a in args if a is not type(None)), value, at)
    if origin is Literal:
        if value not in args:
            raise RecipeError(at, f"{value!r} is not one of {', '.join(map(str, args))}", nearest(str(value), map(str, args)))
        return value
    if is_dataclass(hint):
        return build(hint, value, at)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(at, f"expected a list, got {value!r}", f"write [{value}]")
        return tuple(_value(args[0], item, f"{at}.{i}") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise RecipeError(at, f"expected a mapping, got {value!r}", "write key: value pairs below it")
        return {str(k): _value(args[1], v, join(at, k)) for k, v in value.items()}
    if hint is Any:
        return value
    return _scalar(hint, value, at)


def _scalar(hint: type, value: Any, at: str) -> Any:
    number = value
    if hint in (int, float) and isinstance(value, str):
        with suppress(ValueError):
            number = float(value)  # YAML 1.1 reads 3e-4 and 1e3 as text
    if isinstance(number, int | float) and not isinstance(number, bool):
        if hint is float and number == number:
            return float(number)
        if hint is int and float(number).is_integer():
            return int(number)
    if isinstance(value, hint) and hint in (str, bool):
        return value
    kind, do = KINDS[hint]
    raise RecipeError(at, f"expected {kind}, got {value!r}", do)


def differing(mine: Any, theirs: Any, at: str = "") -> str:
    """The first dotted key at which two trees of plain values differ; "" where they are equal."""
    if not (isinstance(mine, Mapping) and isinstance(theirs, Mapping)):
        return "" if mine == theirs else at or "everything"
    for key in [*mine, *(k for k in theirs if k not in mine)]:
        here = join(at, key)
        below = differing(mine[key], theirs[key], here) if key in mine and key in theirs else here
        if below:
            return below
    return ""
