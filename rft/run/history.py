"""Logs that grow by a line per step, and are cut back to where a run goes on: a step is told once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rft.files import write_whole


def cut_back(run: Path, phases: Sequence[str], phase: str, step: int, aside: Path) -> int:
    """Leave only what was told up to `step` optimizer steps of `phase`; what came later goes to the folder `aside`.

    `phases` are the names in order. A rollout belongs to the step that it led to. Returns how many lines were moved.
    """
    order = {name: i for i, name in enumerate(phases)}
    here = order[phase]

    def stays(line: Mapping[str, Any]) -> bool:
        place = order.get(line.get("phase", ""), -1)
        return place < here or (place == here and line.get("step", 0) <= step)

    moved = _cut(run / "metrics.jsonl", stays, aside) + _cut(run / "gradients.jsonl", stays, aside)
    for path in sorted((run / "rollouts").glob("*.jsonl")):
        place = order.get(path.stem.rpartition("-")[0], -1)
        if place == here:
            moved += _cut(path, lambda line: line.get("step", 0) < step, aside / "rollouts")
        elif place > here:
            moved += _cut(path, lambda line: False, aside / "rollouts")
    return moved


def _cut(path: Path, stays: Callable[[Mapping[str, Any]], bool], aside: Path) -> int:
    """A line that was cut by a crash does not stay."""
    if not path.exists():
        return 0
    kept, gone = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            (kept if stays(json.loads(line)) else gone).append(line)
        except ValueError:
            gone.append(line)
    if gone:
        aside.mkdir(parents=True, exist_ok=True)
        write_whole(aside / path.name, "".join(f"{line}\n" for line in gone))
        write_whole(path, "".join(f"{line}\n" for line in kept))
    return len(gone)
