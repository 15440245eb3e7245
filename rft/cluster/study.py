"""A study: recipes that differ in one thing, run over seeds, and a claim about them that is judged.

    study:
      shared: warmup                       # this first phase is trained once per seed, and every trial starts from it
      seeds: [0, 1, 2]
      claim: nonlinear > grpo
      trials:
        grpo: {recipe: grpo.yaml}
        nonlinear: {recipe: nonlinear.yaml}
        sft: {recipe: sft.yaml, num_seeds: 1}

A trial is its recipe without the shared phase, `model` being what that phase left and `data` the world that it rendered.
The folder of the study holds these recipes as they are run, so that each can be run again alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from rft.cluster.outcome import Planned, conclude
from rft.cluster.paired import Claim
from rft.cluster.sweep import Job, command_of, cores, sweep
from rft.cluster.trials import check_seeds
from rft.errors import RecipeError
from rft.files import write_whole
from rft.layers import stack
from rft.loaded import load, resolved
from rft.plugins import find_file
from rft.recipe import SPLITS, Recipe
from rft.strict import build, differing, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One arm: a recipe (path near the study's file), over the first `num_seeds` seeds (0 is all)."""

    recipe: str
    num_seeds: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoke:
    """What `--smoke` runs in the study's place: the same machinery on so little that nothing can be claimed."""

    trials: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    sets: tuple[str, ...] = ()  # a.b=c, as for `--set`


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Everything under `study:`. `claim` is `one > other`, or several with commas, judged by `metric` on the test split."""

    trials: Mapping[str, Trial]
    seeds: tuple[int, ...]
    claim: str
    metric: str = "miou"
    shared: str = ""  # the first phase of all trials, trained once per seed; "" shares nothing
    smoke: Smoke | None = None
    sets: tuple[str, ...] = ()  # a.b=c, for every trial

    def __post_init__(self) -> None:
        sides = [name for claim in Claim.parse_all(self.claim) for name in (claim.better, claim.worse)]
        named = {"study.claim": sides, "study.smoke.trials": self.smoke.trials if self.smoke else ()}
        for at, names in named.items():
            for name in names:
                if name not in self.trials:
                    raise RecipeError(at, f"unknown trial {name!r}", nearest(name, self.trials))
        for name in self.trials:
            if not re.fullmatch(r"[\w-]+", name) or name in (self.shared, "frames"):
                raise RecipeError(f"study.trials.{name}", "is no name for a folder beside the others", "rename the trial")
        for at, seeds in (("study.seeds", self.seeds), ("study.smoke.seeds", self.smoke.seeds if self.smoke else (0,))):
            check_seeds(at, seeds)

    def smaller(self) -> Study:
        """The study that `--smoke` runs. Raises RecipeError where none is described."""
        if not self.smoke:
            raise RecipeError("study.smoke", "the study does not say what a smoke run is", "add e.g. smoke: {trials: [grpo]}")
        trials = {name: self.trials[name] for name in self.smoke.trials}
        sides = [name for claim in Claim.parse_all(self.claim) for name in (claim.better, claim.worse)]
        if not set(sides) <= set(trials):
            do = f"name {' and '.join(dict.fromkeys(sides))}"
            raise RecipeError("study.smoke.trials", "leaves out a side of the claim", do)
        return replace(self, trials=trials, seeds=self.smoke.seeds, sets=(*self.sets, *self.smoke.sets), smoke=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    study: Study


def run_study(name: str, *, seeds: Sequence[int] = (), smoke: bool = False, output: str | None = None) -> int:
    """Run what has not finished, write `table.txt`, `study.json` and `curves.png`, print the table.

    Returns 0, or 1 when a run failed or the claim does not hold; a smoke run is too short to be judged.

    Raises:
        RecipeError: the study or a trial's recipe is wrong, or the folder holds another study; nothing was run.
    """
    path = find_file(name)
    study = open_study(path)
    study = study.smaller() if smoke else study
    if seeds:
        check_seeds("--seeds", seeds)
        study = replace(study, seeds=tuple(seeds))
    folder = Path(output or f"runs/{path.stem}{'-smoke' if smoke else ''}").absolute()
    planned = plan(study, near=path.parent, folder=folder)
    settle(planned)
    slots = cores()
    print(f"{path.stem}: {len(planned)} runs, {min(slots, len(planned))} at once, in {folder}", flush=True)
    ended = sweep([p.job for p in planned], slots=slots)
    return conclude(
        planned,
        ended,
        folder=folder,
        title=path.stem,
        trials=list(study.trials),
        shared=study.shared,
        claims=Claim.parse_all(study.claim),
        metric=study.metric,
        is_judged=not smoke,
    )


def open_study(path: Path) -> Study:
    """Read a study's file. Raises RecipeError where it is not one, or says what nobody knows."""
    values, _ = stack(path)
    if "study" not in values:
        raise RecipeError(str(path), "is not a study: it has no `study:`", "run a recipe by `rft train`")
    return build(_File, values).study


def plan(study: Study, *, near: Path, folder: Path) -> list[Planned]:
    """Every run with its recipe, seed by seed, the shared phase of a seed before its trials.

    Raises:
        RecipeError: a recipe is wrong, or trials would not share what they are said to share.
    """
    return [p for place, seed in enumerate(study.seeds) for p in _of_seed(study, place, seed, near, folder / f"seed-{seed}")]


def _of_seed(study: Study, place: int, seed: int, near: Path, folder: Path) -> Iterator[Planned]:
    shared: Recipe | None = None
    for name, trial in study.trials.items():
        if trial.num_seeds and place >= trial.num_seeds:
            continue
        at = f"study.trials.{name}"
        recipe = load(str(find_file(trial.recipe, near=near)), [*study.sets, f"seed={seed}"]).standing_alone()
        recipe = replace(recipe, data=replace(recipe.data, frame_cache=recipe.data.frame_cache or str(folder / "frames")))
        if study.shared:
            first, *rest = recipe.phases
            if first != study.shared or not rest:
                what = f"its phases are {', '.join(recipe.phases)}: {study.shared} should be the first of several"
                raise RecipeError(at, what, "let all trials extend one base")
            own = replace(recipe, name=first, output="runs/{name}", phases={first: recipe.phases[first]})
            if shared is None:
                shared = own
                yield _planned(first, seed, own, folder)
            elif where := differing(resolved(own), resolved(shared)):
                raise RecipeError(at, f"{where} is another than in {next(iter(study.trials))}", f"they share {study.shared}")
            recipe = after_shared(recipe, folder / first)
        yield _planned(name, seed, recipe, folder, after=study.shared)


def after_shared(recipe: Recipe, run: Path) -> Recipe:
    """The recipe from its second phase on, going on from the finished run of its first one."""
    data = recipe.data
    if world := data.synthetic:
        files = {split: str(run / "world" / f"{split}.jsonl") if getattr(world, split) else "" for split in SPLITS}
        data = replace(data, synthetic=None, **files)
    phases = dict(list(recipe.phases.items())[1:])
    family = recipe.tiny.family if recipe.model == "tiny" else recipe.family
    return replace(recipe, model=str(run / "checkpoint"), family=family, data=data, phases=phases)


def settle(planned: Sequence[Planned]) -> None:
    """Write every run's recipe into the folder.

    Raises:
        RecipeError: one is there already and says something else; what is finished would not be of this study.
    """
    for p in planned:
        values = resolved(p.recipe)
        if p.file.is_file():
            where = differing(values, yaml.safe_load(p.file.read_text(encoding="utf-8")))
            if where:
                what = f"holds a study in which {where} was another"
                raise RecipeError(str(p.file), what, "choose another --output, or move that folder away")
    for p in planned:
        p.file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(p.file, yaml.safe_dump(resolved(p.recipe), sort_keys=False, allow_unicode=True))


def _planned(name: str, seed: int, recipe: Recipe, folder: Path, after: str = "") -> Planned:
    file, run = folder / f"{name}.yaml", folder / name
    job = Job(
        name=_job_name(seed, name), folder=run, command=command_of(file, run), after=_job_name(seed, after) if after else ""
    )
    return Planned(trial=name, seed=seed, recipe=recipe, file=file, job=job)


def _job_name(seed: int, name: str) -> str:
    return f"seed {seed}: {name}"
