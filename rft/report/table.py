"""Metrics as one table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping

COLUMNS = ("miou", "r1@0.3", "r1@0.5", "r1@0.7", "box_iou", "box@0.5", "accuracy", "format")


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A line per label, a column per metric that any of them has."""
    columns = [c for c in COLUMNS if any(c in metrics for metrics in rows.values())]
    width = max([14, *map(len, rows)])
    lines = [" " * width + "".join(f"{c:>9}" for c in columns)]
    for label, metrics in rows.items():
        cells = "".join(f"{metrics[c]:9.3f}" if c in metrics else f"{'-':>9}" for c in columns)
        lines.append(f"{label:<{width}}{cells}")
    return "\n".join(lines)
