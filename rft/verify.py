"""Is a resumed run the uninterrupted one? Runs a recipe both ways, for a few generations a phase, and compares bit by bit."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from rft.cluster.launch import command
from rft.errors import RecipeError, RftError
from rft.loaded import load, resolved
from rft.recipe import Recipe
from rft.run.state import read_state

TIMES = ("seconds", "step_time", "profiling", "num_tokens_per_second")  # what may differ: how long things took


def verify_resume(
    name: str, sets: Sequence[str] = (), *, generations: int = 2, processes: int = 1, config: str = "ddp", output: str = ""
) -> bool:
    """Train each phase for twice `generations`, once in one go and once stopped and resumed half-way; print what differs.

    The folder has both runs, `straight` and `resumed`. Returns whether losses, gradients and weights are equal to the bit.

    Raises:
        RecipeError: the recipe is wrong, or the folder is not empty.
        RftError: a run failed; its output is in the folder.
    """
    loaded = load(name, sets)
    folder = Path(output or f"runs/verify-{loaded.recipe.name}").absolute()
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(str(folder), "the folder is not empty", "move it away, or give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    recipe = shortened(loaded.standing_alone(), generations)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8")

    def run(place: str, *arguments: str) -> str:
        asked = ["--output", str(folder / place), "--digest-gradients", *arguments]
        argv = command(str(file), config=config, processes=processes, arguments=asked)
        with (folder / f"{place}.log").open("ab") as log:
            done = subprocess.run(argv, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise RftError(place, f"ended with exit code {done.returncode}", f"see {folder / place}.log")
        return str(read_state(folder / place).get("status"))

    print(f"{recipe.name}: {2 * generations} generations of each phase in one go", flush=True)
    run("straight")
    if (world := folder / "straight" / "world").is_dir():
        shutil.copytree(world, folder / "resumed" / "world")
    attempts, status = 0, ""
    while status != "finished":
        attempts += 1
        print(f"the same, {generations} generations at a time: attempt {attempts}", flush=True)
        status = run("resumed", "--stop-after", str(generations))
        if attempts > 2 * len(recipe.phases) + 1:
            raise RftError("resumed", f"is {status} after {attempts} attempts", f"see {folder / 'resumed.log'}")
    found = compare(folder / "straight", folder / "resumed")
    if not any(line["gradients"] for line in _lines(folder / "straight" / "gradients.jsonl")):
        print("  the engine keeps its gradients to itself: their norms are compared, among the losses")
    for what, difference in found.items():
        print(f"  {what:<10} {difference or 'equal'}")
    is_equal = not any(found.values())
    print("the resumed run is the uninterrupted one, bit for bit" if is_equal else "the resumed run is another run")
    return is_equal


def shortened(recipe: Recipe, generations: int) -> Recipe:
    """The recipe with phases of twice so many generations, which nothing ends early, saved half-way."""
    phases = {
        name: replace(phase, steps=2 * generations * phase.updates, until="", check_every=0)
        for name, phase in recipe.phases.items()
    }
    evaluation = replace(recipe.evaluation, max_samples=min(recipe.evaluation.max_samples or 4, 4))
    return replace(recipe, phases=phases, evaluation=evaluation, save_every=f"{generations} generations", trackers=())


def compare(one: Path, other: Path) -> dict[str, str]:
    """Of two run folders: losses (every number that was logged), gradients and weights -> the first difference, "" for none."""
    return {
        "losses": _first(_lines(one / "metrics.jsonl"), _lines(other / "metrics.jsonl")),
        "gradients": _first(_lines(one / "gradients.jsonl"), _lines(other / "gradients.jsonl")),
        "weights": next(_differing_weights(one, other), ""),
    }


def _lines(path: Path) -> list[Mapping[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMES)} for line in text.splitlines()]


def _first(ones: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> str:
    if not ones:
        return "nothing was logged"
    for a, b in zip(ones, others, strict=False):
        for key in {**a, **b}:
            if json.dumps(a.get(key)) != json.dumps(b.get(key)):  # as text: a NaN equals a NaN
                return f"phase {a.get('phase')} step {a.get('step')}: {key} is {a.get(key)} and {b.get(key)}"
    return "" if len(ones) == len(others) else f"{len(ones)} steps and {len(others)}"


def _differing_weights(one: Path, other: Path) -> Iterator[str]:
    files = {p.relative_to(one) for p in one.rglob("*.safetensors") if "checkpoints" not in p.parts}
    if not files:
        yield "no weights were saved"
    for file in sorted(files):
        if not (other / file).exists():
            yield f"{file} is missing"
            continue
        ours, theirs = load_file(one / file), load_file(other / file)
        for name in {**ours, **theirs}:
            if name not in ours or name not in theirs:
                yield f"{file}: only one has {name}"
            elif not torch.equal(_bits(ours[name]), _bits(theirs[name])):
                most = float((ours[name].double() - theirs[name].double()).abs().max())
                yield f"{file}: {name} differs by up to {most:.3g}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
