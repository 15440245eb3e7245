"""`rft bench`: from flags to FILE.json, FILE.png and a table."""

from __future__ import annotations

import gc
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rft.bench.arms import ARMS, Arm
from rft.bench.chart import draw
from rft.bench.floors import Arithmetic, floor, ideals
from rft.bench.measure import best, ceilings
from rft.bench.memory import measure
from rft.bench.ratios import equality, ratios
from rft.bench.report import table
from rft.bench.runs import all_arms, short_prompt, sweep
from rft.bench.shapes import SHAPES
from rft.bench.stand import DEFAULT, TRL, has_trl, open_stand
from rft.bench.work import Work
from rft.errors import RecipeError, RftError
from rft.files import write_whole

TEXT = 256  # tokens of the prompt beside the visual ones
IN_MEMORY = ("trl-fair", "expanded", "ours")  # arms whose peak is measured, each in a process of its own


def bench(
    output: Path,
    *,
    device: str = "cpu",
    model: str = "tiny",
    frames: int | None = None,
    group: int = 8,
    completion: int | None = None,
    ragged: bool = False,
    repeats: int | None = None,
    arms: Sequence[str] = (),
    scaling: bool = False,
) -> dict[str, Any]:
    """Measure, print the table, write JSON and a chart beside it; returns what the JSON holds.

    Raises:
        RecipeError: an arm, a model or a device that is not there, or numbers that make no work.
    """
    if output.suffix != ".json":
        raise RecipeError("--output", f"{output} is no FILE.json", "the chart goes beside it as FILE.png")
    shape = _checked(model, device, frames, group, completion, repeats, arms)
    output.parent.mkdir(parents=True, exist_ok=True)  # before the minutes of measuring, not after
    work = Work(
        frames=frames or shape.frames,
        size=shape.size,
        group=group,
        completion=completion or shape.completion,
        text=TEXT,
        checkpointing=shape.checkpointing,
        ragged=ragged,
    )
    target = torch.device(device)
    if target.type == "cpu":
        torch.set_num_threads(1)
    left_out = {} if has_trl() else {name: "TRL is not installed" for name in arms or DEFAULT if name in TRL}
    names = [name for name in arms or DEFAULT if name not in left_out]
    names.sort(key=lambda name: name != "expanded")  # what the others are compared with comes first
    with tempfile.TemporaryDirectory(prefix="rft-bench-") as folder:
        stand = open_stand(model, work, target, Path(folder))
        dtype = next(stand.model.parameters()).dtype
        rates = ceilings(target, dtype)
        rounds = all_arms(stand, names, repeats or (5 if target.type == "cuda" else 2), _say)
        short_times, short_equality, short = short_prompt(stand)
        count, short_count = Arithmetic(stand.model, stand.material), Arithmetic(stand.model, short.material)
        points = sweep(stand, _say) if scaling else {}
        view, prompt = stand.material.view, len(stand.material.prompt)
        del stand, short  # the processes that follow want the memory of the device
        gc.collect()
        if target.type == "cuda":
            torch.cuda.empty_cache()
    left_out |= rounds.left_out
    done = [name for name in names if name in rounds.watches]
    memory = _memory([name for name in IN_MEMORY if name in done], model, work, device, left_out)
    found = {
        "equality": equality(rounds, short_equality),
        "ratios": ratios(rounds, "expanded", memory, short_times),
        "ratios_trl_fair": ratios(rounds, "trl-fair", memory, {}),
        "ideal": ideals(count, short_count, group, work.completion, rates),
        "arms": {name: rounds.phases(name) for name in done},
        "floor": {name: floor(_as_arm(name), count, group, rates, work.checkpointing) for name in done},
        "jobs": {name: {job: best(rounds.jobs(name, job)) for job in rounds.watches[name][0].jobs} for name in done},
        "memory": memory,
        "short_prompt_seconds": short_times,
        "scaling": points,
        "work": asdict(work) | {"model": model, "prompt": prompt, "visual": view.tokens if view else 0},
        "ceilings": rates,
        "machine": torch.cuda.get_device_name(target) if target.type == "cuda" else f"one core of {platform.machine()}",
        "clock": "wall time" if target.type == "cuda" else "process time of one thread",
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "left_out": left_out,
    }
    write_whole(output, json.dumps(found, indent=1) + "\n")
    draw(found, output.with_suffix(".png"))
    print(table(found))
    print(f"\nwritten to {output} and {output.with_suffix('.png')}")
    return found


def _checked(model: str, device: str, frames: Any, group: int, completion: Any, repeats: Any, arms: Sequence[str]) -> Any:
    if model not in SHAPES:
        raise RecipeError("--model", f"{model!r} is not known", f"use one of {', '.join(SHAPES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device", "torch sees no CUDA device here", "use --device cpu")
    known = (*TRL, *ARMS)
    if unknown := [name for name in arms if name not in known]:
        raise RecipeError("--arms", f"unknown arm {unknown[0]!r}", f"use some of {', '.join(known)}")
    if frames is not None and (frames < 2 or frames % 2):
        raise RecipeError("--frames", f"{frames} frames are no pairs", "give an even number from 2 on")
    if group < 2:
        raise RecipeError("--group", "a group has at least two members", "give 2 or more")
    if min(n for n in (completion, repeats, 2) if n is not None) < 1 or completion == 1:
        raise RecipeError("--completion, --repeats", "nothing would be measured", "give at least 2 tokens and 1 repeat")
    return SHAPES[model]


def _as_arm(name: str) -> Arm:
    """The settings of an arm; TRL's arms do the arithmetic of the expanded ones."""
    return ARMS[{"trl": "expanded", "trl-fair": "expanded-fair"}.get(name, name)]


def _memory(names: Sequence[str], model: str, work: Work, device: str, left_out: dict[str, str]) -> dict[str, int]:
    found = {}
    for name in names:
        try:
            found[name] = measure(name, model, work, device)
        except RftError as error:
            left_out[f"memory of {name}"] = error.what
        else:
            _say(f"{name}: a train step takes {found[name] / 1e6:.0f} MB at its peak")
    return found


def _say(line: str) -> None:
    """Progress, apart from the report."""
    print(line, file=sys.stderr, flush=True)
