"""What a run has measured so far, as its folder tells: rows of `metrics.jsonl`, curves, the final score."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS, SUMMARY = "metrics.jsonl", "summary.json"
VALIDATION = "validation/"
Rows = Sequence[Mapping[str, Any]]
Curve = Sequence[tuple[int, float]]  # (step, value)


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The lines so far, [] where there are none. A last line that is still being written is left for later."""
    try:
        text = (run / METRICS).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def curve(rows: Rows, key: str) -> list[tuple[int, float]]:
    """(step, value) wherever a row has `key`. Steps are counted over all phases."""
    points, offset, last = [], 0, ("", 0)
    for row in rows:
        if (phase := row.get("phase", "")) != last[0]:
            offset, last = offset + last[1], (phase, 0)
        last = (phase, max(last[1], row["step"]))
        if key in row:
            points.append((offset + row["step"], row[key]))
    return points


def on_validation(metric: str) -> str:
    """The name of a metric on the validation split: `miou` and `validation/miou` are `validation/miou`."""
    return f"{VALIDATION}{metric.removeprefix(VALIDATION)}"


def validated(run: Path, metric: str) -> list[tuple[int, float]]:
    """A metric on the validation split over the steps of all phases: (step, value) points."""
    return curve(read_rows(run), on_validation(metric))


def final(run: Path, metric: str = "") -> dict[str, float]:
    """The metrics of a finished run on the test split; beside them `validation/...` as it was last, where it is asked for."""
    found: dict[str, float] = json.loads((run / SUMMARY).read_text(encoding="utf-8"))["final"]
    if metric.startswith(VALIDATION) and (points := validated(run, metric)):
        return {metric: points[-1][1], **found}
    return found
