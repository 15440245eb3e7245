"""A sweep as files: what `sweep.yaml` may say, and the folder with one frozen recipe per trial that it becomes.

sweep:
  recipe: recipes/quickstart.yaml
  sets: [log_rollouts=false]           # a.b=c, for every trial
  values: ...                          # rft.cluster.space: what varies; paired and exclude as well
  seeds: [0, 1, 2]                     # every setting is trained with each; the recipe's own where there are none
  metric: validation/miou              # what `best` and `report` go by: as it was last, or miou on the test split
  rules: {nan: true}                   # rft.cluster.rules
  search: {trials: 40}                 # rft.cluster.search, in the place of lists of trials

SWEEP/sweep.yaml      what was planned            SWEEP/recipe.yaml    the recipe before anything varies
SWEEP/trials.json     every trial: values, seed   SWEEP/trials/NAME/   the run of a trial, NAME says what differs
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rft.cluster.rules import Rules
from rft.cluster.space import Setting, Space, read_space
from rft.cluster.submission import read_json
from rft.cluster.sweep import Job, command_of
from rft.errors import RecipeError
from rft.layers import stack
from rft.run.lock import holder_of
from rft.run.state import read_state
from rft.strict import build

TRIALS, PRUNED = "trials.json", "pruned.json"
DONE = ("finished", "pruned")


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Settings are asked for one by one, by what the finished ones were worth."""

    trials: int
    sampler: Literal["tpe", "random"] = "tpe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Everything under `sweep:`."""

    recipe: str
    values: Mapping[str, Any] = field(default_factory=dict)
    paired: tuple[Mapping[str, Any], ...] = ()
    exclude: tuple[Mapping[str, Any], ...] = ()
    sets: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    num_random: int = 0
    seed: int = 0  # of what is drawn
    metric: str = "miou"
    goal: Literal["max", "min"] = "max"
    rules: Rules = field(default_factory=Rules)
    search: Search | None = None

    def __post_init__(self) -> None:
        for key in ("seed", "num_random"):
            if getattr(self, key) < 0:
                raise RecipeError(f"sweep.{key}", f"{getattr(self, key)} is below 0", "use 0 or more")
        if self.seeds:
            check_seeds("sweep.seeds", self.seeds)
        if "seed" in self.space.keys:
            raise RecipeError("sweep.values.seed", "a seed is no value to choose by", "write seeds: [0, 1, 2]")
        if not self.search:
            return
        for key, why in (("exclude", "a search goes where it likes"), ("num_random", "a search says itself how many")):
            if getattr(self, key):
                raise RecipeError(
                    f"sweep.{key}", why, f"take it out; with search, write search: {{trials: {self.search.trials}}}"
                )
        if len(self.seeds) > 1:
            raise RecipeError(
                "sweep.seeds", "a search trains each setting once", "give one seed, then sweep the best over seeds"
            )
        if self.search.trials < 1:
            raise RecipeError("sweep.search.trials", f"{self.search.trials} is no number of trials", "use e.g. 40")
        if not self.space.keys:
            raise RecipeError("sweep.values", "there is nothing to search", "give it keys and what they may be")

    @property
    def space(self) -> Space:
        """What varies."""
        return read_space(self.values, self.paired)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run of a sweep. `setting` is its name without the seed; `number` is that of a search."""

    name: str
    setting: str
    values: Setting
    seed: int
    folder: Path
    number: int | None = None

    @property
    def file(self) -> Path:
        """Its frozen recipe."""
        return self.folder / "recipe.yaml"

    @property
    def job(self) -> Job:
        """What trains it."""
        return Job(name=self.name, folder=self.folder, command=command_of(self.file, self.folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """A sweep and its trials; `near` is the folder that relative paths of values start from."""

    folder: Path
    sweep: Sweep
    near: Path
    trials: tuple[Trial, ...]

    @property
    def num_wanted(self) -> int:
        """How many trials there will be: a search adds them one by one."""
        return self.sweep.search.trials if self.sweep.search else len(self.trials)

    @property
    def unfinished(self) -> list[Trial]:
        """Trials that have neither finished nor been stopped by a rule, in order."""
        return [t for t in self.trials if standing(t.folder)[0] not in DONE]


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    sweep: Sweep


def open_sweep(path: Path) -> Sweep:
    """Read a sweep's file. Raises RecipeError where it is not one, or says what nobody knows."""
    values, _ = stack(path)
    if "sweep" not in values:
        raise RecipeError(str(path), "is not a sweep: it has no `sweep:`", "run a recipe by `rft train`")
    try:
        return build(_File, values).sweep
    except RecipeError as error:
        raise RecipeError(f"{path.name}: {error.where}", error.what, error.do) from error


def check_seeds(at: str, seeds: Sequence[int]) -> None:
    """Raises RecipeError where there are none, or the same twice."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise RecipeError(at, f"{list(seeds)} are not different seeds from 0 on", "write e.g. 0,1,2")


def open_folder(name: str) -> Swept:
    """The sweep that was planned into a folder. Raises RecipeError where there is none."""
    folder = Path(name).absolute()
    if not (folder / TRIALS).is_file():
        raise RecipeError(str(folder), "holds no sweep", "make one: rft sweep plan sweep.yaml --output DIR")
    found = json.loads((folder / TRIALS).read_text(encoding="utf-8"))
    trials = tuple(Trial(**row, folder=folder / "trials" / row["name"]) for row in found["trials"])
    return Swept(folder=folder, sweep=build(Sweep, found["sweep"], "sweep"), near=Path(found["near"]), trials=trials)


def standing(run: Path) -> tuple[str, str]:
    """(status, why) of a trial: what its state says, or planned, pruned by a rule, cut (running, and nobody is at it)."""
    state = read_state(run)
    status, why = str(state.get("status", "planned")), str(state.get("reason", ""))
    if status != "finished" and (rule := pruned(run)):
        return "pruned", rule
    if status == "running" and holder_of(run) is None:
        return "cut", "its trainer is gone"
    return status, "" if status == "finished" else why


def pruned(run: Path) -> str:
    """Why a rule has stopped this run; "" where none has."""
    return str(read_json(run / PRUNED).get("reason", ""))


def contents(swept: Swept) -> dict[str, Any]:
    """What `trials.json` holds."""
    rows = [
        {"name": t.name, "setting": t.setting, "values": dict(t.values), "seed": t.seed, "number": t.number}
        for t in swept.trials
    ]
    return {"sweep": asdict(swept.sweep), "near": str(swept.near), "trials": rows}
