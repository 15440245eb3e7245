"""How runs are doing: what their folders say, refined by what Slurm says where it answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rft.cluster import queue
from rft.cluster.submission import Place, read_json
from rft.errors import ClusterError, RftError
from rft.run.lock import HEARTBEAT, STILL
from rft.run.state import ATTEMPTS, next_attempt, read_state

QUIET = 600.0  # seconds without a step after which a run that lives is worth a word
HEADS = ("run", "state", "slurm", "phase", "step", "attempt", "last sign")


def lines(runs: Sequence[Path], *, strict: bool) -> Iterator[str]:
    """A table of runs and a line per run that needs a word.

    With `strict`, a folder that holds no run raises ClusterError. Where Slurm does not answer, the folders still do.
    """
    states = {}
    for run in runs:
        states[run] = read_state(run)
        if strict and not states[run]:
            raise ClusterError(str(run), "holds no run", "name the folder that `rft slurm submit` printed")
    places = {run: place for run in runs if (place := Place.of(run)) and place.job}
    jobs, silent = _jobs(places)
    rows, words = [HEADS], []
    for run, state in states.items():
        place = places.get(run)
        job = jobs.get(place.job) if place else None
        pulse = read_json(run / HEARTBEAT)
        in_slurm = f"{job.id} {job.state.lower()}" if job else "?" if place and silent else "-"
        attempt = state.get("attempt") or next_attempt(run, {}) - 1
        cells = (state.get("status"), in_slurm, state.get("phase"), state.get("step"), attempt, _ago(pulse.get("alive")))
        rows.append((run.name, *("-" if cell in (None, "") else str(cell) for cell in cells)))
        words += [f"{run.name}: {word}" for word in _words(run, state, job, pulse, None if silent else place)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    yield from ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    yield from words
    if silent:
        yield f"Slurm: {silent} The above is what the runs' folders say."


def _jobs(places: Mapping[Path, Place]) -> tuple[dict[str, queue.Job], str]:
    """Jobs by id, and why Slurm says nothing ("" where it does)."""
    try:
        return queue.queued([place.job for place in places.values()]), ""
    except RftError as error:
        return {}, f"{error.what}."


def _words(
    run: Path, state: Mapping[str, Any], job: queue.Job | None, pulse: Mapping[str, Any], place: Place | None
) -> Iterator[str]:
    """What somebody should know about a run; `place` is None where Slurm knows nothing of it, or does not answer."""
    status, now = state.get("status"), time.time()
    if state.get("reason"):
        yield str(state["reason"])
    if job and job.state == "PENDING":
        yield f"waits in the queue ({job.reason})"
    if status == "running" and now - pulse.get("alive", now) > STILL:
        yield f"no sign of life for {_ago(pulse['alive'])}"
    elif status == "running" and now - pulse.get("progress", now) > QUIET:
        yield f"no step for {_ago(pulse['progress'])}"
    if place and not job and status in ("submitted", "running"):
        how = queue.ended(place.job).lower()
        yield f"its job is gone{f' ({how})' if how else ''}; see {place.log}, then rft slurm resume {run}"


def is_over(run: Path) -> bool:
    """True when nothing more will happen to a run by itself."""
    status, place = read_state(run).get("status"), Place.of(run)
    if status != "stopped":
        return status in ("finished", "failed", "cancelled")
    return not (place and place.job and _jobs({run: place})[0])


def _ago(then: float | None) -> str:
    if not then:
        return "-"
    seconds = max(0.0, time.time() - then)
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def log_files(run: Path, *, rank: int | None, attempt: int | None, strict: bool) -> list[Path]:
    """The logs of an attempt (default: the last), as far as they exist: all of a rank, or those of job, nodes and rank 0.

    With `strict`, none at all raises ClusterError.
    """
    place = Place.of(run)
    last = next_attempt(run, {}) - 1
    folder = run / ATTEMPTS / str(last if attempt is None else attempt)
    names = [folder / f"rank-{rank or 0}.log"]
    if rank is None:
        batch = [place.log] if place and attempt is None else []
        names = [*batch, folder / "srun.log", *sorted(folder.glob("node-*.log")), *names]
    found = [path for path in names if path.is_file()]
    if strict and not found:
        there = sorted(p.name for p in folder.glob("*.log"))
        what = f"no such log in {folder}" if last else "no attempt has begun"
        raise ClusterError(str(run), what, f"there are {', '.join(there)}" if there else f"rft slurm status {run}")
    return found
