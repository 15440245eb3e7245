"""From a sweep's file to its folder: every trial's recipe is tried, and only then is anything written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from rft.cluster.metrics import VALIDATION
from rft.cluster.space import Setting, Space, names, settings
from rft.cluster.trials import TRIALS, Sweep, Swept, Trial, contents, open_sweep
from rft.errors import RecipeError
from rft.files import write_whole
from rft.loaded import load, resolved
from rft.plugins import find_file
from rft.recipe import Recipe
from rft.strict import differing

LONGEST = 150  # characters of a trial's name
TOLD = 4  # trials that are named behind an error


def plan(name: str, output: str | None = None, *, dry_run: bool = False) -> Swept:
    """Make a sweep's folder, with every trial's recipe. Planning the same once more changes nothing.

    Raises:
        RecipeError: the sweep or any trial's recipe is wrong (all of them are told), or the folder holds something else.
            Nothing was written.
    """
    path = find_file(name)
    sweep = open_sweep(path)
    folder = Path(output or f"runs/{path.stem}").absolute()
    source = find_file(sweep.recipe, near=path.parent)
    base = _base(source, sweep, folder)
    seeds = sweep.seeds or (base.seed,)
    sweep = replace(sweep, recipe=str(source), seeds=seeds)
    swept = Swept(folder=folder, sweep=sweep, near=source.parent, trials=())
    if sweep.search:
        ends = _ends(sweep.space)
        _recipes(path.name, source, sweep, dict(zip(_named(ends), ends, strict=True)))
        recipes: dict[str, Recipe] = {}
    else:
        chosen = settings(sweep.space, sweep.exclude, num_random=sweep.num_random, seed=sweep.seed)
        of_setting = dict(zip(_named(chosen), chosen, strict=True))
        by_setting = _recipes(path.name, source, sweep, of_setting)
        trials = []
        for setting, values in of_setting.items():
            for seed in seeds:
                own = "_".join([setting] * (len(chosen) > 1) + [f"seed={seed}"] * (len(seeds) > 1)) or setting
                trials.append(_trial(folder, own, setting, values, seed))
        recipes = {t.name: frozen(by_setting[t.setting], base.name, t, folder) for t in trials}
        swept = replace(swept, trials=tuple(trials))
    is_there = _check_folder(swept, base, recipes)
    if not dry_run and not is_there:
        _write(swept, base, recipes)
    return swept


def with_trial(swept: Swept, setting: Setting, number: int) -> Swept:
    """The sweep with one more trial, which a search asked for; its folder is written first.

    Raises:
        RecipeError: the recipe refuses the setting; nothing was written.
    """
    (label,) = _named([setting], also=_ends(swept.sweep.space))
    name = f"{number:03d}_{label}"[:LONGEST]
    trial = _trial(swept.folder, name, name, setting, swept.sweep.seeds[0], number)
    recipe = _recipe(swept.folder / "recipe.yaml", (), setting, swept.near)
    trial.folder.mkdir(parents=True, exist_ok=True)
    base = yaml.safe_load((swept.folder / "recipe.yaml").read_text(encoding="utf-8"))["name"]
    write_whole(trial.file, _dumped(frozen(recipe, base, trial, swept.folder)))
    swept = replace(swept, trials=(*swept.trials, trial))
    write_whole(swept.folder / TRIALS, json.dumps(contents(swept), indent=1))
    return swept


def frozen(recipe: Recipe, base: str, trial: Trial, folder: Path) -> Recipe:
    """A setting's recipe as one trial's: its seed, a name of its own, one cache of frames where trials read the same files."""
    data = recipe.data
    if not (data.synthetic or data.frame_cache):
        data = replace(data, frame_cache=str(folder / "frames"))
    return replace(recipe, seed=trial.seed, name=f"{base}-{trial.name}", data=data)


def _trial(folder: Path, name: str, setting: str, values: Setting, seed: int, number: int | None = None) -> Trial:
    return Trial(name=name, setting=setting, values=dict(values), seed=seed, folder=folder / "trials" / name, number=number)


def _named(chosen: Sequence[Setting], also: Sequence[Setting] = ()) -> list[str]:
    """A folder's name for each; `also` are settings that it may differ from."""
    found = names([*chosen, *also])[: len(chosen)]
    if len(chosen) == 1 and not found[0]:
        return ["trial"]
    return [n if len(n) <= LONGEST else f"{n[:LONGEST]}~{i}" for i, n in enumerate(found)]


def _base(source: Path, sweep: Sweep, folder: Path) -> Recipe:
    """The recipe before anything varies, and what every trial has in common checked once."""
    base = load(str(source), sweep.sets).standing_alone()
    looks = sweep.rules.median or sweep.metric.startswith(VALIDATION)
    has_split = base.data.validation or (base.data.synthetic and base.data.synthetic.validation)
    if looks and not (has_split and any(phase.check_every for phase in base.phases.values())):
        key = "rules.median" if sweep.rules.median else "metric"
        raise RecipeError(f"sweep.{key}", "nothing is validated while it trains", "set data.validation and check_every")
    return base


def _recipes(file: str, source: Path, sweep: Sweep, chosen: Mapping[str, Setting]) -> dict[str, Recipe]:
    """The recipe of every setting. Raises RecipeError with all that are wrong, and with those that are the same."""
    made: dict[str, Recipe] = {}
    wrong: dict[str, list[str]] = {}  # what -> trials
    for name, setting in chosen.items():
        rest = dict(setting)
        while name not in made:
            try:
                recipe = _recipe(source, sweep.sets, rest, source.parent)
            except RecipeError as error:
                where = re.sub(r"^--set ", "", error.where)
                to_blame = [k for k in rest if f"{where}.".startswith(f"{k}.") or k.startswith(f"{where}.")]
                if to_blame or rest == setting:
                    told = f"{where}: {error.what}" + (f" ({error.do})" if error.do else "")
                    wrong.setdefault(told, []).append(name)
                if not to_blame:
                    break
                rest = {k: v for k, v in rest.items() if k not in to_blame}  # what else is wrong?
            else:
                if rest != setting:
                    break
                made[name] = recipe
    if wrong:
        num = len(chosen) - len(made)
        lines = []
        for told, of in wrong.items():
            more = f" and {len(of) - TOLD} more" if len(of) > TOLD else ""
            lines.append(f"{told}\n    in {', '.join(of[:TOLD])}{more}")
        what = f"{num} of {len(chosen)} settings cannot be trained:\n  " + "\n  ".join(lines)
        raise RecipeError(file, what, "correct the values, or leave combinations out by `exclude`")
    seen: dict[str, str] = {}
    for name, recipe in made.items():
        text = json.dumps(resolved(recipe), sort_keys=True)
        if text in seen:
            what = f"{seen[text]} and {name} are the same recipe"
            raise RecipeError(file, what, "take one of the values out")
        seen[text] = name
    return made


def _recipe(source: Path, sets: Sequence[str], setting: Setting, near: Path) -> Recipe:
    own = [f"{key}={_as_yaml(value)}" for key, value in setting.items()]
    loaded = replace(load(str(source), [*sets, *own]), folder=near)
    for phase in loaded.recipe.phases.values():
        loaded.rewards(phase)  # their files are there, and can be imported
    return loaded.standing_alone()


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True).removesuffix("...\n").strip()


def _ends(space: Space) -> list[Setting]:
    """Settings that take every value of a list, and the bounds of every draw, at least once."""
    columns = {**space.grids, **{key: draw.ends for key, draw in space.draws.items()}}
    rows = space.paired or ({},)
    most = max([len(rows), *map(len, columns.values())])
    return [{**{k: v[min(i, len(v) - 1)] for k, v in columns.items()}, **rows[min(i, len(rows) - 1)]} for i in range(most)]


def _check_folder(swept: Swept, base: Recipe, recipes: Mapping[str, Recipe]) -> bool:
    """Whether this very sweep is there already. Raises RecipeError where something else is."""
    folder = swept.folder
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / TRIALS).is_file():
        raise RecipeError(str(folder), "holds something that is no sweep", "choose another --output, or move it away")
    theirs = json.loads((folder / TRIALS).read_text(encoding="utf-8"))
    mine = json.loads(json.dumps(contents(swept)))
    if swept.sweep.search:
        mine["trials"] = theirs["trials"]
    where = differing(mine, theirs)
    files = {folder / "recipe.yaml": base, **{folder / "trials" / n / "recipe.yaml": r for n, r in recipes.items()}}
    for file, recipe in files.items():
        if where:
            break
        where = differing(resolved(recipe), yaml.safe_load(file.read_text(encoding="utf-8")))
    if where:
        raise RecipeError(
            str(folder), f"holds a sweep in which {where} was another", "choose another --output, or move it away"
        )
    return True


def _write(swept: Swept, base: Recipe, recipes: Mapping[str, Recipe]) -> None:
    """The folder appears as a whole, or not at all."""
    folder = swept.folder
    stage = folder.with_name(f".{folder.name}.{os.getpid()}")
    values = json.loads(json.dumps(contents(swept)))
    try:
        (stage / "trials").mkdir(parents=True)
        write_whole(stage / "recipe.yaml", _dumped(base))
        text = yaml.safe_dump({"sweep": values["sweep"]}, sort_keys=False, allow_unicode=True)
        write_whole(stage / "sweep.yaml", text)
        write_whole(stage / TRIALS, json.dumps(values, indent=1))
        for name, recipe in recipes.items():
            (stage / "trials" / name).mkdir()
            write_whole(stage / "trials" / name / "recipe.yaml", _dumped(recipe))
        os.replace(stage, folder)
    except OSError as error:
        raise RecipeError(str(folder), f"cannot be written: {error.strerror}", "choose another --output") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _dumped(recipe: Recipe) -> str:
    return yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True)
