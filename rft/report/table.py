"""Metrics as one table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

COLUMNS = (
    "miou", "r1@0.3", "r1@0.5", "r1@0.7", "box_iou", "box@0.5", "accuracy", "mr_map", "mr_map@0.5", "mr_map@0.75",
    "mr_r1@0.5", "mr_r1@0.7", "hl_map", "hit@1", "format",
)  # fmt: skip


def table(rows: Mapping[str, Mapping[str, float]], more: Sequence[str] = ()) -> str:
    """A line per label, a column per metric that any of them has, and those named in `more`."""
    columns = [c for c in (*COLUMNS, *more) if any(c in metrics for metrics in rows.values())]
    width = max([14, *map(len, rows)])
    wide = {c: max(9, len(c) + 2) for c in columns}
    lines = [" " * width + "".join(f"{c:>{wide[c]}}" for c in columns)]
    for label, metrics in rows.items():
        cells = "".join(f"{metrics[c]:{wide[c]}.3f}" if c in metrics else f"{'-':>{wide[c]}}" for c in columns)
        lines.append(f"{label:<{width}}{cells}")
    return "\n".join(lines)
