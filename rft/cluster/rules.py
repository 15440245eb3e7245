"""When a trial is not worth going on with: numbers that are none, nothing to learn from, or far behind the others.

    rules: {nan: true, no_signal: 50, median: {after: 100}}

`look` judges a trial from its folder while it runs. Who is stopped has `pruned.json`, which says why, and a `stop` file, by
which the trainer saves and ends. Nothing here imports more than the standard library and the run's folder needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from rft.cluster.metrics import VALIDATION, Curve, Rows, curve, read_rows, validated
from rft.errors import RecipeError
from rft.files import write_whole
from rft.run.state import STOP, read_state
from rft.strict import build

PRUNED, TRIALS = "pruned.json", "trials.json"
JUDGED = ("loss", "grad_norm", "reward")  # numbers that are always some
NOT_FINITE = "is not finite"  # how a run says that it stopped at such a number by itself


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
        return _behind(
            trial, others, rules.median, f"{VALIDATION}{metric.removeprefix(VALIDATION)}", -1 if goal == "min" else 1
        )
    return None


def look(run: Path) -> str:
    """Judge the trial in `run` by the rules of its sweep. Returns why it was stopped just now, "" where it was not."""
    described = run.parents[1] / TRIALS
    if not described.is_file():
        return ""  # a run of its own
    sweep = json.loads(described.read_text(encoding="utf-8"))
    rules = build(Rules, sweep["sweep"]["rules"])
    if rules == Rules() or pruned(run):
        return ""
    state = read_state(run)
    if state.get("status") == "finished":
        return ""
    rows = read_rows(run)
    metric, others = sweep["sweep"]["metric"], []
    if rules.median:
        setting = {t["name"]: t["setting"] for t in sweep["trials"]}
        names = [name for name, own in setting.items() if own != setting.get(run.name)]  # seeds are not compared
        others = [_validated(run.with_name(name), metric) for name in names]
    why = verdict(rows, others, rules, metric=metric, goal=sweep["sweep"]["goal"]) or ""
    if not why and rules.nan and state.get("status") == "failed" and NOT_FINITE in state.get("reason", ""):
        why = f"nan: {state['reason']}"
    if why:
        prune(run, why)
    return why


def prune(run: Path, why: str) -> None:
    """Ask the trial to stop for good."""
    write_whole(run / PRUNED, json.dumps({"reason": why}))
    write_whole(run / STOP, f"pruned: {why}\n")


def pruned(run: Path) -> str:
    """Why a rule has stopped this run; "" where none has."""
    try:
        found: dict[str, Any] = json.loads((run / PRUNED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    return str(found["reason"])


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


def _validated(run: Path, metric: str) -> Curve:
    """Read again only where there is more to read."""
    path = run / "metrics.jsonl"
    return _validated_once(run, metric, path.stat().st_mtime_ns) if path.is_file() else ()


@lru_cache(maxsize=4096)
def _validated_once(run: Path, metric: str, changed: int) -> Curve:
    return tuple(validated(run, metric))
