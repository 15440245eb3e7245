"""`metrics.jsonl` as one picture: what was rewarded, what was learnt, and whether the policy still explores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

PANELS = (
    ("validation", ("validation/miou", "validation/accuracy", "validation/box_iou", "validation/hl_map")),
    ("reward", ("reward",)),
    ("loss", ("nll", "kl", "loss")),
    ("groups without signal", ("muted",)),
    ("entropy per token", ("entropy",)),
    ("completion tokens", ("completion_tokens",)),
)


def draw_curves(metrics: Path, output: Path, *, lines: Mapping[str, float] | None = None) -> None:
    """Write a PNG with a panel per subject over all phases; `lines` are dashed levels in the validation panel."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    phases = list(dict.fromkeys(r["phase"] for r in rows))
    offsets, end = {}, 0
    for phase in phases:
        offsets[phase] = end
        end += max(r["step"] for r in rows if r["phase"] == phase)
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5))
    for axis, (title, names) in zip(axes.flat, PANELS, strict=True):
        _panel(axis, rows, names, offsets)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_xlim(0, end)
        for phase in phases:
            axis.axvline(offsets[phase], color="0.8", linewidth=0.8)
            axis.text(offsets[phase] + end / 100, 0.01, phase, fontsize=7, color="0.5", transform=axis.get_xaxis_transform())
    for label, level in (lines or {}).items():
        axes.flat[0].axhline(level, linestyle="--", linewidth=1, color="0.4")
        axes.flat[0].text(0.99, level, label, fontsize=7, ha="right", va="bottom", transform=axes.flat[0].get_yaxis_transform())
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _panel(axis: Any, rows: list[dict[str, Any]], names: tuple[str, ...], offsets: Mapping[str, int]) -> None:
    drawn = False
    for name in names:
        points = [(offsets[r["phase"]] + r["step"], r[name]) for r in rows if isinstance(r.get(name), int | float)]
        if not points or (name == "loss" and drawn):
            continue
        drawn = True
        xs, ys = zip(*points, strict=True)
        if len(ys) > 40:
            axis.plot(xs, ys, color="tab:blue", alpha=0.2, linewidth=0.7)
            axis.plot(xs, _smooth(ys), linewidth=1.5, label=name.removeprefix("validation/"))
        else:
            axis.plot(xs, ys, marker=".", linewidth=1.5, label=name.removeprefix("validation/"))
    if drawn:
        axis.legend(fontsize=7)
    else:
        axis.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=axis.transAxes, color="0.6")


def _smooth(values: tuple[float, ...], keep: float = 0.9) -> list[float]:
    mean, out = values[0], []
    for value in values:
        mean = keep * mean + (1 - keep) * value
        out.append(mean)
    return out
