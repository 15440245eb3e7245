"""Metrics as one table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping

COLUMNS = ("miou", "r1@0.3", "r1@0.5", "r1@0.7", "box_iou", "box@0.5", "accuracy", "format")
NAMES = {"random": "random", "best_constant": "best constant", "final": "final", "checkpoint": "checkpoint"}


def table(summary: Mapping[str, Mapping[str, float]]) -> str:
    """A row per entry of the summary, a column per metric that any of them has."""
    columns = [c for c in COLUMNS if any(c in metrics for metrics in summary.values())]
    width = max([14, *(len(_label(n)) for n in summary)])
    lines = [" " * width + "".join(f"{c:>9}" for c in columns)]
    for name, metrics in summary.items():
        cells = "".join(f"{metrics[c]:9.3f}" if c in metrics else f"{'-':>9}" for c in columns)
        lines.append(f"{_label(name):<{width}}{cells}")
    return "\n".join(lines)


def _label(name: str) -> str:
    return NAMES.get(name, f"after {name}")
