"""Train a recipe, top to bottom: open the run, one phase after the other, the table.

`python -m rft.train RECIPE` is the entry point for `accelerate launch`; `rft train RECIPE` is its short form.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rft import train_cli
from rft.attempt import Attempt, Finished, Resume, Stopped, attempt_at
from rft.errors import DataError, RecipeError, RftError
from rft.evaluation.baselines import best_constant, random_answer
from rft.hf.models import LoadedModel, open_policy, renderer_for
from rft.hf.tiny import make_tiny
from rft.hf.together import Together
from rft.loaded import load
from rft.phase import open_phase, score_phase, train_phase
from rft.recipe import Phase, Recipe
from rft.report.curves import draw_curves
from rft.report.table import table
from rft.rollout.loop import opening
from rft.run import checkpoints


def train(
    name: str,
    sets: Sequence[str] = (),
    output: str | None = None,
    *,
    resume: Resume = "auto",
    allow_drift: bool = False,
    stop_after: int = 0,
    digests: bool = False,
) -> dict[str, Any]:
    """Run every phase of a recipe that is not done yet, and return the summary that is written to `summary.json`.

    A run that was asked to stop returns what is done so far, and its state says so. `stop_after` asks for that after so
    many generations; `digests` writes a hash of every step's gradients.
    """
    loaded = load(name, sets)
    together = Together.join()
    given = {"output": output, "resume": resume, "allow_drift": allow_drift, "stop_after": stop_after, "digests": digests}
    try:
        with attempt_at(loaded, together, **given) as run:
            return _train(run)
    except Finished as done:
        if together.rank == 0:
            print(f"{done}: this run has finished; there is nothing left to train", flush=True)
        path = Path(str(done), "summary.json")
        if not path.exists():
            raise DataError(str(path), "is missing from a finished run", "restore it, or choose another --output") from None
        return json.loads(path.read_text(encoding="utf-8"))


def _train(run: Attempt) -> dict[str, Any]:
    recipe = run.loaded.recipe
    run.note(status="running", **run.at)
    try:
        summary = _phases(run)
    except Stopped as asked:
        run.note(status="stopped", reason=str(asked), **run.at)
        run.say(f"\n{recipe.name}: stopped ({asked}); the same command goes on with it, in {run.folder}")
        return run.summary()
    except BaseException as error:
        run.note(status="failed", reason=f"{type(error).__name__}: {error}", **run.at)
        raise
    if run.together.rank == 0:
        levels = {
            f"{k.replace('_', ' ')} (test)": summary[k]["miou"]
            for k in ("random", "best_constant")
            if "miou" in summary.get(k, {})
        }
        draw_curves(run.folder / "metrics.jsonl", run.folder / "curves.png", lines=levels)
    last = list(recipe.phases)[-1]
    labels = {"random": "random", "best_constant": "best constant", "final": f"after {last}"}
    run.say("\n" + table({labels.get(name, f"after {name}"): metrics for name, metrics in summary.items()}))
    run.say(f"\n{recipe.name}: {run.seconds:.0f} s, everything is in {run.folder}")
    frames = {
        "decoded_here": run.frames.misses,
        "found": run.frames.hits,
        "rebuilt": run.frames.rebuilt,
        "decoders_replaced": run.prefetcher.restarts if run.prefetcher else 0,
    }
    run.note(status="finished", **run.at, reason="all phases done", quarantined=len(run.quarantine), frames=frames)
    return summary


def _phases(run: Attempt) -> dict[str, Any]:
    recipe, together = run.loaded.recipe, run.together
    model = _start(run)
    summary, start, names = run.summary(), model, list(recipe.phases)
    _refuse_adapter(start, recipe)
    for name in names:
        target = checkpoints.model_of(run.folder, names, name)
        key = "final" if name == names[-1] else name
        is_trained = together.gather(_is_trained(run, target, name) if together.rank == 0 else False)[0]
        if is_trained:
            record = checkpoints.record_of(target)
            run.quarantine.restore(record["quarantine"])
            run.note(status="running", phase=name, step=record["step"])
        if is_trained and key in summary:
            run.say(f"phase {name}: done by an earlier attempt")
            model = str(target)
            continue
        run.stop_if_asked()
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            is_trained = False  # its engine starts with an optimizer only: the end of the phase is trained again
        together.doing("loading the model", meets=True)
        torch.manual_seed(recipe.seed)  # adapters begin at random, the same in any attempt
        policy = open_policy(str(target) if is_trained else model, recipe, train=True)
        if not summary:
            summary = _before(run, policy, recipe.phases[name])
            run.sum_up(summary)
        this = open_phase(run, name, policy, start)
        summary = {**summary, key: score_phase(this) if is_trained else train_phase(this, target)}
        run.sum_up(summary)
        model = str(target)
        del policy, this
        gc.collect()
    return summary


def _is_trained(run: Attempt, target: Path, name: str) -> bool:
    """Whether a phase has left its model, sound. What is there and is not gets a line, and is made again."""
    if not target.exists():
        return False
    if why := checkpoints.fault(target) or checkpoints.is_of_another(target, name):
        run.say(f"{target} cannot be used ({why}): phase {name} goes on from its last checkpoint")
    return not why


def _start(run: Attempt) -> str:
    """The folder of the model that the run begins with; a tiny one is made there, and appears whole."""
    recipe = run.loaded.recipe
    if recipe.model != "tiny":
        return recipe.model
    place, half = run.folder / "model", run.folder / ".model"
    if run.together.rank == 0 and not place.exists():
        shutil.rmtree(half, ignore_errors=True)
        make_tiny(half, recipe.tiny, seed=recipe.seed)
        os.replace(half, place)
    run.together.wait()
    return str(place)


def _refuse_adapter(start: str, recipe: Recipe) -> None:
    """With adapters the reference is the model without them: not where a run begins that begins with an adapter."""
    pulled = [name for name, phase in recipe.phases.items() if phase.kl.weight and not phase.supervised]
    if pulled and Path(start, "adapter_config.json").is_file():
        what = f"an adapter: the model without it is no reference for the KL of phase {pulled[0]}"
        raise RecipeError(f"model {start}", what, "`rft export --merge` it and start from that folder, or set kl.weight to 0")


def _before(run: Attempt, policy: LoadedModel, phase: Phase) -> dict[str, Any]:
    """What can be known before training: whether the evaluations can be shown, and the trivial baselines on the test split."""
    recipe, together, renderer = run.loaded.recipe, run.together, renderer_for(run.loaded.recipe, policy, phase)
    run.loaded.check_perceptions()
    looking = run.loaded.looking_at_eval(phase)
    if recipe.model != "tiny" and policy.family.name != recipe.family:
        raise RecipeError("family", f"{recipe.model} is {policy.family.name}, not {recipe.family}", "set family in the recipe")
    for split in ("validation", "test"):
        for sample in run.evaluated(split)[together.rank :: together.size]:
            opening(sample, renderer, looking)  # an evaluation leaves nothing out: what cannot be shown ends the run now
    train_split, test = run.splits["train"], run.evaluated("test")
    if not test:
        return {}
    return {
        "random": random_answer(test, train_split, renderer, run.loaded.recipe.seed),
        "best_constant": best_constant(test, train_split, renderer),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="rft train", description="Train a recipe.")
    train_cli.add_arguments(parser)
    try:
        train(**train_cli.asked(parser.parse_args(argv)))
    except RftError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
