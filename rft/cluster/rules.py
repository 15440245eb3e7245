"""When a trial is not worth going on with: numbers that are none, nothing to learn from, or far behind the others.

    rules: {nan: true, no_signal: 50, median: {after: 100}}

`verdict` judges a trial by its numbers and those of the others; `rft.cluster.prune` looks at the folders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rft.cluster.metrics import Curve, Rows, curve, on_validation
from rft.errors import RecipeError

JUDGED = ("loss", "grad_norm", "reward")  # numbers that are always some


@dataclass(frozen=True, slots=True, kw_only=True)
class Median:
    """From step `after` on (over all phases) the best validation so far is not below the median of the others' there."""

    after: int = 0
    others: int = 3  # that have come as far; fewer say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Everything under `rules:`. The default stops nobody."""

    nan: bool = False
    no_signal: int = 0  # steps in a row in which every group was muted
    median: Median | None = None

    def __post_init__(self) -> None:
        if self.no_signal < 0:
            raise RecipeError("sweep.rules.no_signal", f"{self.no_signal} is no number of steps", "use e.g. 50, or 0 for never")
        if self.median and (self.median.after < 0 or self.median.others < 1):
            raise RecipeError("sweep.rules.median", "counts from 0 steps and 1 other on", "use e.g. {after: 100, others: 3}")


def verdict(trial: Rows, others: Sequence[Curve], rules: Rules, *, metric: str = "miou", goal: str = "max") -> str | None:
    """Why a trial should stop, in words that begin with the rule; None to go on.

    `trial` is its rows of `metrics.jsonl`, `others` what the other trials have of `metric` on the validation split.
    """
    if rules.nan and (why := _nan(trial)):
        return f"nan: {why}"
    if rules.no_signal:
        muted = [row["muted"] for row in trial if "muted" in row][-rules.no_signal :]
        if len(muted) == rules.no_signal and min(muted) >= 1.0:
            return f"no_signal: every group of the last {rules.no_signal} steps was muted"
    if rules.median:
        return _behind(trial, others, rules.median, on_validation(metric), -1 if goal == "min" else 1)
    return None


def _nan(rows: Rows) -> str:
    for row in rows:
        for key in JUDGED:
            if isinstance(value := row.get(key), float) and not math.isfinite(value):
                return f"{key} of step {row['step']} of {row['phase']} is {value}"
    return ""


def _behind(trial: Rows, others: Sequence[Curve], rule: Median, key: str, sign: int) -> str | None:
    """`sign` makes more better."""
    points = curve(trial, key)
    if not points or (step := points[-1][0]) < rule.after:
        return None
    there = [other for other in others if other and other[0][0] <= step <= other[-1][0]]
    if len(there) < rule.others:
        return None
    best = max(sign * value for _, value in points)
    middle = median(max(sign * value for at, value in other if at <= step) for other in there)
    if best >= middle:
        return None
    return f"median: {sign * best:.3f} at step {step}, the median of {len(there)} others is {sign * middle:.3f}"
