"""What a sweep varies: values of dotted keys, combined, drawn or paired, and a short name for every combination.

    values:
      phases.grpo.learning_rate: [1e-4, 2e-4]                            # a grid: all combinations; also {grid: [...]}
      phases.grpo.kl.weight: {random: {log_uniform: [1e-4, 1e-2]}}       # drawn; uniform, integers and choice as well
    paired: [{a.b: 1, c.d: 2}, {a.b: 4, c.d: 8}]                         # keys that vary together
    exclude: [{phases.grpo.learning_rate: 1e-4, a.b: 4}]                 # combinations that are left out

Every point of the grid is combined with every draw, so that draws are compared on the same grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from random import Random
from typing import Any

from rft.errors import RecipeError
from rft.strict import build, nearest

LONGEST = 40  # characters of a value in a name
MOST = 10_000  # settings of a sweep
TRIES = 1000  # draws per setting before a space counts as used up
Setting = Mapping[str, Any]  # dotted key -> value


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Where a value is drawn from: one of the four. Integers include both ends; drawn numbers have 6 digits."""

    uniform: tuple[float, ...] | None = None
    log_uniform: tuple[float, ...] | None = None
    integers: tuple[int, ...] | None = None
    choice: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            raise RecipeError("", f"{', '.join(given) or 'nothing'} is not one kind of draw", DRAWS)
        if self.choice is not None:
            _check_values("choice", self.choice)
            return
        ends = self.ends
        if len(ends) != 2 or not ends[0] < ends[1] or not all(map(math.isfinite, ends)) or (self.log_uniform and ends[0] <= 0):
            above = ", both above 0" if self.log_uniform is not None else ""
            raise RecipeError(given[0], f"{list(ends)} is no range", f"write [least, most]{above}")

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values at which a recipe is tried: the bounds, or every choice."""
        return next(v for f in fields(self) if (v := getattr(self, f.name)) is not None)

    def value(self, random: Random) -> Any:
        """One value."""
        if self.choice is not None:
            return random.choice(self.choice)
        if self.integers is not None:
            return random.randint(*self.integers)
        low, high = self.ends
        drawn = math.exp(random.uniform(math.log(low), math.log(high))) if self.log_uniform else random.uniform(low, high)
        return min(max(float(f"{drawn:.6g}"), low), high)


DRAWS = "write e.g. {random: {log_uniform: [1e-4, 1e-2]}}; also uniform, integers and choice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The keys of a sweep: lists of values, draws, and keys that vary together."""

    grids: Mapping[str, tuple[Any, ...]]
    draws: Mapping[str, Draw]
    paired: tuple[Setting, ...]
    keys: tuple[str, ...]  # every dotted key that varies, in the order of the file


def read_space(values: Mapping[str, Any], paired: Sequence[Setting], at: str = "sweep") -> Space:
    """The keys under `values:` and `paired:`.

    Raises:
        RecipeError: an empty or repeated value, a range that is none, a key that is set twice.
    """
    grids: dict[str, tuple[Any, ...]] = {}
    draws: dict[str, Draw] = {}
    for key, value in values.items():
        here = f"{at}.values.{key}"
        if isinstance(value, Mapping) and list(value) == ["random"]:
            try:
                draws[key] = build(Draw, value["random"], "")
            except RecipeError as error:
                where = ".".join(part for part in (here, "random", error.where.removeprefix("recipe")) if part)
                raise RecipeError(where, error.what, error.do) from error
            continue
        listed = value["grid"] if isinstance(value, Mapping) and list(value) == ["grid"] else value
        if not isinstance(listed, list | tuple):
            raise RecipeError(here, f"{value!r} is no list of values", f"write [1, 2] or {{grid: [1, 2]}}; to draw, {DRAWS}")
        _check_values(here, listed)
        grids[key] = tuple(listed)
    for number, row in enumerate(paired):
        here = f"{at}.paired.{number}"
        if not row or set(row) != set(paired[0]):
            raise RecipeError(here, f"sets {', '.join(row) or 'nothing'}", f"every entry sets {', '.join(paired[0]) or 'keys'}")
        if twice := [key for key in row if key in values]:
            raise RecipeError(f"{here}.{twice[0]}", "is under values as well", "keep it in one of them")
    _check_values(f"{at}.paired", paired, is_optional=True)
    keys = (*values, *(paired[0] if paired else ()))
    space = Space(grids=grids, draws=draws, paired=tuple(paired), keys=keys)
    for key in space.keys:
        if above := [other for other in space.keys if key.startswith(f"{other}.")]:
            raise RecipeError(f"{at}.values.{key}", f"is a part of {above[0]}, which varies as well", "vary one of them")
    return space


def settings(space: Space, exclude: Sequence[Setting], *, num_random: int, seed: int, at: str = "sweep") -> list[Setting]:
    """Every combination that is not excluded, in the order of the file; draws change fastest.

    Raises:
        RecipeError: draws without a number of them, more than the space holds, an exclusion that fits nothing.
    """
    if bool(space.draws) != bool(num_random):
        what = "nothing is drawn" if num_random else f"{', '.join(space.draws)} is drawn, nobody says how often"
        raise RecipeError(f"{at}.num_random", what, f"take it out, or {DRAWS}" if num_random else "write e.g. num_random: 20")
    total = math.prod(map(len, space.grids.values())) * max(1, len(space.paired)) * max(1, num_random)
    if total > MOST:
        raise RecipeError(at, f"{total} settings are too many", f"use {MOST} or less; draw them, or search")
    points = [dict(zip(space.grids, point, strict=True)) for point in product(*space.grids.values())]
    drawn = _drawn(space.draws, num_random, seed, at) if num_random else [{}]
    combined = [{**p, **pair, **d} for p in points for pair in space.paired or ({},) for d in drawn]
    everything: list[Setting] = [{key: one[key] for key in space.keys} for one in combined]
    for number, row in enumerate(exclude):
        here = f"{at}.exclude.{number}"
        for key in row:
            if key not in space.keys:
                raise RecipeError(f"{here}.{key}", "is no key that varies", nearest(key, space.keys))
        kept = [s for s in everything if not row or not all(same(s[key], value) for key, value in row.items())]
        if len(kept) == len(everything):
            raise RecipeError(here, f"{dict(row)} leaves nothing out", "write values as they are in the lists, or take it out")
        everything = kept
    if not everything:
        raise RecipeError(f"{at}.exclude", "every combination is excluded", "take an exclusion out")
    return everything


def _drawn(draws: Mapping[str, Draw], number: int, seed: int, at: str) -> list[Setting]:
    """Different draws. A key draws from a stream of its own: adding another changes nothing."""
    streams = {key: Random(f"{seed}/{key}") for key in draws}
    found: list[Setting] = []
    for _ in range(number * TRIES):
        row = {key: draw.value(streams[key]) for key, draw in draws.items()}
        if row not in found:
            found.append(row)
        if len(found) == number:
            return found
    raise RecipeError(f"{at}.num_random", f"only {len(found)} different draws found", f"use {len(found)}, or a grid")


def same(one: Any, other: Any) -> bool:
    """Whether two values of a file are equal; YAML 1.1 reads 1e-4 as text. `true` is not 1."""
    return plain(one) == plain(other) and isinstance(one, bool) == isinstance(other, bool)


def plain(value: Any) -> Any:
    """Text that is a number, as that number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _check_values(at: str, values: Sequence[Any], *, is_optional: bool = False) -> None:
    if not values and not is_optional:
        raise RecipeError(at, "is an empty list: there would be no trial", "give it values, or take the key out")
    for number, value in enumerate(values):
        if any(same(value, v) for v in values[:number]):
            raise RecipeError(at, f"{value!r} is there twice", "the same trial would be run again: take one out")


def names(all_settings: Sequence[Setting]) -> list[str]:
    """A name per setting, by what differs: `learning_rate=0.0001_weight=0.01`. "" where nothing does."""
    keys = list(dict.fromkeys(key for s in all_settings for key in s))
    varying = [k for k in keys if any(not same(s.get(k), all_settings[0].get(k)) for s in all_settings[1:])]
    short = short_keys(varying)
    labels = {key: _labels([s.get(key) for s in all_settings]) for key in varying}
    return ["_".join(f"{short[key]}={labels[key][i]}" for key in varying) for i in range(len(all_settings))]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The last part of a dotted key, and as many before it as tell it from the others."""
    short = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        short[key] = next(e for e in ends if e == key or not any(o == e or o.endswith(f".{e}") for o in keys if o != key))
    return short


def label(value: Any) -> str:
    """A value as part of a folder's name."""
    number = plain(value)
    if isinstance(number, int | float) and not isinstance(number, bool):
        return str(int(number)) if float(number).is_integer() and abs(number) < 1e9 else f"{number:g}"
    if isinstance(value, Mapping):
        text = "-".join(f"{k}-{label(v)}" for k, v in value.items()) or "none"
    elif isinstance(value, list | tuple):
        text = "-".join(map(label, value)) or "none"
    else:
        text = str(value).lower() if isinstance(value, bool) or value is None else str(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")[-LONGEST:] or "none"


def _labels(values: Sequence[Any]) -> list[str]:
    """Different values have different labels."""
    kinds: list[Any] = []
    for value in values:
        if not any(same(value, k) for k in kinds):
            kinds.append(value)
    texts = [label(k) for k in kinds]
    unlike = [t if texts.count(t) == 1 else f"{t}~{texts[: i + 1].count(t)}" for i, t in enumerate(texts)]
    return [next(u for u, k in zip(unlike, kinds, strict=True) if same(value, k)) for value in values]
