"""The `perception` of a recipe as what rollouts ask: shipped by name or a class of the user's by path, tried at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rft.errors import RecipeError
from rft.plugins import load_object
from rft.rollout.perceive import ONCE, Fetch, Looking, Perceive, Perception
from rft.rollout.perceptions import SHIPPED
from rft.strict import build, nearest


def looking(spec: Perceive, at: str, *, near: Path | None = None, fetch: Fetch = ONCE.fetch) -> Looking:
    """How rollouts look, from the key `at` of a recipe whose folder is `near`.

    Raises:
        RecipeError: there is no such perception, or it does not take these arguments.
    """
    if spec.use == "single":
        if spec.args:
            raise RecipeError(f"{at}.args", "single takes no arguments", "take them out, or name a perception that looks")
        return Looking(fetch=fetch)
    make = _maker(spec, at, near)
    return Looking(make=make, context=spec.context, history=spec.history, budget=spec.budget, fetch=fetch)


def _maker(spec: Perceive, at: str, near: Path | None) -> Callable[[], Perception]:
    if spec.use not in SHIPPED and ":" not in spec.use:
        do = nearest(spec.use, SHIPPED) + " Or name a class: path/file.py:Class"
        raise RecipeError(f"{at}.use", f"unknown perception {spec.use!r}", do)
    kind: Any = SHIPPED.get(spec.use) or load_object(spec.use, near=near)
    for method in ("start", "observe"):
        if not callable(getattr(kind, method, None)):
            raise RecipeError(f"{at}.use", f"{spec.use} has no method {method!r}", "see rft/rollout/perceive.py, Perception")
    args = dict(spec.args)
    if "budget" in inspect.signature(kind).parameters:
        args["budget"] = spec.budget
    try:
        if is_dataclass(kind):  # its arguments are checked like any other key
            told = {**args, "budget": asdict(spec.budget)} if "budget" in args else args
            args = {name: getattr(build(kind, told, f"{at}.args"), name) for name in args}
        kind(**args)
    except TypeError as error:
        takes = ", ".join(n for n in inspect.signature(kind).parameters if n != "budget") or "nothing"
        raise RecipeError(f"{at}.args", str(error), f"{spec.use} takes: {takes}") from error
    return partial(kind, **args)
