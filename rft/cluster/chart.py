"""The validation metric of every trial over its steps: a line for the mean over seeds, a band from the least to the most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def draw(
    curves: Mapping[str, Mapping[int, Sequence[tuple[int, float]]]], output: Path, *, metric: str, title: str, after: str = ""
) -> None:
    """Write a PNG. `curves`: trial -> seed -> (step, value) points; a step is drawn where every seed of the trial has it."""
    figure, axis = plt.subplots(figsize=(8, 5))
    for name, by_seed in curves.items():
        seeds = [dict(points) for points in by_seed.values() if points]
        steps = sorted(set.intersection(*(set(points) for points in seeds)))
        columns = [[points[step] for points in seeds] for step in steps]
        (line,) = axis.plot(steps, [fmean(c) for c in columns], marker=".", label=f"{name} ({len(seeds)})")
        if len(seeds) > 1:
            axis.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=line.get_color(), alpha=0.12)
    axis.set_xlabel(f"steps after {after}" if after else "steps")
    axis.set_ylabel(f"{metric}, validation split")
    axis.set_title(f"{title}: mean over seeds (how many), band from the least to the most", fontsize=10)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    plt.close(figure)
