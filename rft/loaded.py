"""A recipe as it is read: a file, what it extends, `--set a.b=c` on top; and shown, with the origin of each value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from rft.errors import RecipeError
from rft.layers import stack
from rft.perceiving import looking
from rft.plugins import find_file, load_object
from rft.recipe import SPLITS, Phase, Recipe
from rft.rollout.perceive import Fetch, Looking, PerceptionSpec, unread
from rft.scoring import Reward
from rft.strict import build, join

WIDEST = 72  # columns of `rft show` before an origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A recipe, the folder its relative paths start from, and where each value came from (dotted key -> origin)."""

    recipe: Recipe
    folder: Path
    origins: Mapping[str, str]

    def path(self, name: str) -> Path:
        """A data file named by the recipe. Raises RecipeError when there is none, with the places tried."""
        return find_file(name, near=self.folder)

    def standing_alone(self) -> Recipe:
        """The recipe with every file it names made absolute: what a run folder keeps."""
        data = replace(self.recipe.data, **{s: str(self.path(n)) for s in SPLITS if (n := getattr(self.recipe.data, s))})
        specs = {}
        for name, spec in self.recipe.rewards.items():
            place, _, function = spec.use.rpartition(":")
            use = f"{find_file(place, near=self.folder)}:{function}" if place.endswith(".py") else spec.use
            specs[name] = replace(spec, use=use)
        alone = replace(self.recipe, data=data, rewards=specs)
        alone = replace(alone, perception=self._found(alone.perception))
        phases = {}
        for name, phase in alone.phases.items():
            mix = phase.mix and replace(phase.mix, perception=self._found(phase.mix.perception))
            own = {"perception": self._found(phase.perception), "eval_perception": self._found(phase.eval_perception)}
            phases[name] = replace(phase, **own, mix=mix)
        return replace(alone, phases=phases)

    def _found(self, spec: PerceptionSpec | None) -> PerceptionSpec | None:
        """With its file made absolute, if it has one."""
        place, _, name = spec.use.rpartition(":") if spec else ("", "", "")
        return replace(spec, use=f"{find_file(place, near=self.folder)}:{name}") if place.endswith(".py") else spec

    def looking(self, phase: Phase, fetch: Fetch = unread) -> Looking:
        """How the rollouts of a phase look. Raises RecipeError when its perception cannot be made."""
        name = next((n for n, p in self.recipe.asked.items() if p == phase and p.perception), "")
        at = f"phases.{name}.perception" if name else "perception"
        return looking(self.recipe.perception_of(phase), at, near=self.folder, fetch=fetch)

    def check_perceptions(self) -> None:
        """Raises RecipeError when any perception of the recipe cannot be made, or not be taught where it has to be."""
        for name, phase in self.recipe.asked.items():
            self.looking_at_eval(phase)
            if not self.looking(phase).is_teachable and (phase.supervised or phase.guidance):
                what = f"{self.recipe.perception_of(phase).use} has no `teach`, and the annotation has to look too"
                do = "write what it would say in each turn (see README), or give this phase perception: {use: single}"
                raise RecipeError(f"phases.{name}", what, do)

    def looking_at_eval(self, phase: Phase, fetch: Fetch = unread) -> Looking:
        """How a policy looks when the phase is scored."""
        if (spec := phase.eval_perception) is None:
            return self.looking(phase, fetch)
        name = next(n for n, p in self.recipe.asked.items() if p.eval_perception == spec)
        return looking(spec, f"phases.{name}.eval_perception", near=self.folder, fetch=fetch)

    def rewards(self, phase: Phase) -> list[Reward]:
        """The phase's rewards, with their functions. Raises RecipeError when one cannot be loaded."""
        return [
            Reward(
                name=name,
                function=load_object(spec.use, near=self.folder),
                **{f.name: getattr(spec, f.name) for f in fields(spec) if f.name != "use"},
            )
            for name, spec in self.recipe.rewards_of(phase).items()
        ]


def load(name: str, sets: Sequence[str] = ()) -> Loaded:
    """Read a recipe, what it extends, and `a.b=c` overrides on top.

    Raises:
        RecipeError: a file, a key or a value is wrong; the message names it.
    """
    path = find_file(name)
    values, origins = stack(path, sets)
    return Loaded(recipe=build(Recipe, values), folder=path.parent, origins=origins)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The whole tree as plain values, defaults included; `build(Recipe, resolved(r)) == r`."""
    return _plain(asdict(recipe))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def show(loaded: Loaded) -> str:
    """The resolved recipe as YAML, with the origin behind every value that is not a default."""
    lines = list(_shown(resolved(loaded.recipe), loaded.origins))
    column = max(len(text) for text, origin in lines if origin and len(text) <= WIDEST)
    shown = [f"{text:<{column}}  # {origin}" if origin else text for text, origin in lines]
    return "\n".join(["# What has no remark is a default.", *shown]) + "\n"


def _shown(tree: Mapping[str, Any], origins: Mapping[str, str], at: str = "", indent: str = "") -> Iterator[tuple[str, str]]:
    """(line of YAML, origin or "")."""
    for key, value in tree.items():
        here = join(at, key)
        is_branch = isinstance(value, Mapping) and value
        text = yaml.dump({key: None if is_branch else value}, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=10**6)
        first, *rest = text.splitlines()
        yield indent + (first.removesuffix(" null") if is_branch else first), "" if is_branch else origins.get(here, "")
        yield from ((indent + line if line else "", "") for line in rest)
        if is_branch:
            yield from _shown(value, origins, here, indent + "  ")


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, a list on one line."""


_Dumper.add_representer(str, lambda d, s: d.represent_scalar("tag:yaml.org,2002:str", s, style="|" if "\n" in s else None))
_Dumper.add_representer(list, lambda d, items: d.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True))
