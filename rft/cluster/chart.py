"""The validation metric of every trial over its steps (a line for the mean over seeds, a band), and scores over values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

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


def draw_values(columns: Mapping[str, Sequence[Any]], scores: Sequence[Sequence[float]], output: Path, *, metric: str) -> None:
    """Write a PNG with a panel per key: the value of each setting, and what it scored with each seed (a dot, the mean a dash).

    `columns`: key -> its value in every setting; `scores`: the scores of every setting.
    """
    wide = min(3, len(columns))
    high = -(-len(columns) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(4.5 * wide, 3.5 * high), squeeze=False, sharey=True)
    for axis, (key, values) in zip(axes.flat, columns.items()):
        numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        names = list(dict.fromkeys(map(str, values)))
        xs = list(values) if numeric else [names.index(str(v)) for v in values]
        for x, seeds in zip(xs, scores, strict=True):
            axis.plot([x] * len(seeds), seeds, ".", color="tab:blue", alpha=0.5)
            axis.plot([x], [fmean(seeds)], "_", color="tab:red", markersize=12)
        if not numeric:
            axis.set_xticks(range(len(names)), [name[:20] for name in names], fontsize=8)
        elif min(xs) > 0 and max(xs) >= 10 * min(xs):
            axis.set_xscale("log")
        axis.set_xlabel(key)
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel(metric)
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    plt.close(figure)
