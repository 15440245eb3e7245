"""The `perception` of a recipe as what rollouts ask: shipped by name or a class of the user's by path, tried at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rft.errors import RecipeError
from rft.plugins import load_object
from rft.rollout.perceive import Fetch, Looking, Perception, PerceptionSpec, unread
from rft.rollout.perceptions import SHIPPED
from rft.strict import build, nearest


def looking(spec: PerceptionSpec, at: str, *, near: Path | None = None, fetch: Fetch = unread) -> Looking:
    """How rollouts look, from the key `at` of a recipe whose folder is `near`.

    Raises:
        RecipeError: there is no such perception, or it does not take these arguments.
    """
    if spec.use == "single":
        if spec.args:
            raise RecipeError(f"{at}.args", "single takes no arguments", "take them out, or name a perception that looks")
        return Looking(fetch=fetch)
    if spec.context == "append" and spec.history != "none":
        do = "take it out, or set context: fresh"
        raise RecipeError(f"{at}.history", "in a growing context the model reads its own words anyway", do)
    make = _maker(spec, at, near)
    return Looking(make=make, context=spec.context, history=spec.history, budget=spec.budget, fetch=fetch)


def _maker(spec: PerceptionSpec, at: str, near: Path | None) -> Callable[[], Perception]:
    if spec.use not in SHIPPED and ":" not in spec.use:
        do = nearest(spec.use, SHIPPED) + " Or name a class: path/file.py:Class"
        raise RecipeError(f"{at}.use", f"unknown perception {spec.use!r}", do)
    kind: Any = SHIPPED.get(spec.use) or load_object(spec.use, near=near)
    for method in ("start", "observe"):
        if not callable(getattr(kind, method, None)):
            raise RecipeError(f"{at}.use", f"{spec.use} has no method {method!r}", "see rft/rollout/perceive.py, Perception")
    args, takes = dict(spec.args), set(inspect.signature(kind).parameters)
    if "budget" in takes:
        args["budget"] = spec.budget
    try:
        if is_dataclass(kind) and takes == {f.name for f in fields(kind) if f.init}:  # checked like any other key
            built = build(kind, {**args, "budget": asdict(spec.budget)} if "budget" in args else args, f"{at}.args")
            args = {name: getattr(built, name) for name in args}
        kind(**args)
    except RecipeError as error:
        raise error if error.where.startswith(at) else RecipeError(f"{at}.args.{error.where}", error.what, error.do) from error
    except Exception as error:  # the class is its author's: whatever it raises is told in one line
        known = ", ".join(sorted(takes - {"budget"})) or "nothing"
        raise RecipeError(f"{at}.args", f"{type(error).__name__}: {error}", f"{spec.use} takes: {known}") from error
    return partial(kind, **args)
