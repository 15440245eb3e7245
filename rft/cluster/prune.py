"""Stopping a trial that a rule of its sweep is against, while it runs: on this machine, and in a Slurm job.

Who is stopped has `pruned.json`, which says why, and a `stop` file, by which the trainer saves and ends.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from rft.cluster.metrics import METRICS, Curve, read_rows, validated
from rft.cluster.rules import Rules, verdict
from rft.cluster.trials import PRUNED, TRIALS, open_folder, pruned
from rft.files import write_whole
from rft.run.state import STOP, read_state

NOT_FINITE = "is not finite"  # how a run says that it stopped at such a number by itself


def look(run: Path) -> str:
    """Judge the trial in `run` by the rules of its sweep. Returns why it was stopped just now, "" where it was not."""
    folder = run.parents[1]
    if not (folder / TRIALS).is_file():
        return ""  # a run of its own
    swept = open_folder(str(folder))
    rules, metric = swept.sweep.rules, swept.sweep.metric
    state = read_state(run)
    if rules == Rules() or pruned(run) or state.get("status") == "finished":
        return ""
    others: list[Curve] = []
    if rules.median:
        own = next((t.setting for t in swept.trials if t.name == run.name), None)
        others = [_validated(t.folder, metric) for t in swept.trials if t.setting != own]  # seeds are not compared
    why = verdict(read_rows(run), others, rules, metric=metric, goal=swept.sweep.goal) or ""
    if not why and rules.nan and state.get("status") == "failed" and NOT_FINITE in state.get("reason", ""):
        why = f"nan: {state['reason']}"
    if why:
        write_whole(run / PRUNED, json.dumps({"reason": why}))
        write_whole(run / STOP, f"pruned: {why}\n")
    return why


def _validated(run: Path, metric: str) -> Curve:
    """Read again only where there is more to read."""
    path = run / METRICS
    return _validated_once(run, metric, path.stat().st_mtime_ns) if path.is_file() else ()


@lru_cache(maxsize=4096)
def _validated_once(run: Path, metric: str, changed: int) -> Curve:
    return tuple(validated(run, metric))
