"""What was measured, as one picture: phases of each arm, ratios beside their ideals, speed-up over G and P / C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def draw(found: Mapping[str, Any], output: Path) -> None:
    """Write the PNG; `found` is what the JSON holds."""
    scaling = found.get("scaling") or {}
    size, widths = (12 + 4 * len(scaling), 4.8), [1.5, 1.0] + [0.9] * len(scaling)
    figure, axes = plt.subplots(1, len(widths), figsize=size, width_ratios=widths)
    _bars(axes[0], found["arms"])
    _against(axes[1], found["ratios"], found["ideal"])
    for axis, (name, points) in zip(axes[2:], scaling.items(), strict=True):
        _lines(axis, name, points)
    work = found["work"]
    figure.suptitle(f"{work['model']} on {found['machine']}: P={work['prompt']}, C={work['completion']}, G={work['group']}")
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _bars(axis: Any, arms: Mapping[str, Mapping[str, float]]) -> None:
    left = dict.fromkeys(arms, 0.0)
    phases = list(next(iter(arms.values()), ()))
    for phase, colour in zip(phases, plt.get_cmap("tab20").colors, strict=False):
        axis.barh(list(arms), [arms[a][phase] for a in arms], left=list(left.values()), label=phase, color=colour)
        left = {a: left[a] + arms[a][phase] for a in arms}
    axis.invert_yaxis()
    axis.set_xlabel("seconds per step of one group")
    axis.legend(fontsize=7)


def _against(axis: Any, ratios: Mapping[str, float | None], ideal: Mapping[str, float]) -> None:
    names = [name for name, value in ratios.items() if value is not None]
    axis.barh(names, [ratios[n] for n in names], color="tab:blue", label="measured")
    axis.plot([ideal[n] for n in names], names, "k|", markersize=14, markeredgewidth=2, label="ideal")
    axis.axvline(1, color="0.6", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("times better than expanded")
    axis.legend(fontsize=7)


def _lines(axis: Any, name: str, points: Sequence[Mapping[str, float]]) -> None:
    xs = [p["group"] if name == "group" else p["prompt"] / p["completion"] for p in points]
    for key, label, style in (
        ("train", "train step", "o-"), ("train_cached_vision", "train step, cached vision", "s-"),
        ("ideal", "G (P + C) / (P + G C)", "k--"),
    ):  # fmt: skip
        axis.plot(xs, [p[key] for p in points], style, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(xs, [f"{x:g}" for x in xs])
    axis.set_xlabel("group size G" if name == "group" else "prompt / completion, P / C")
    axis.set_ylabel("speed-up")
    axis.legend(fontsize=7)
