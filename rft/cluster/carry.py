"""Carrying a sweep out: on this machine, slot by slot, or as a job array of Slurm. Either goes on with what is unfinished."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rft.cluster import queue, slurm
from rft.cluster.launch import count_gpus
from rft.cluster.prune import look
from rft.cluster.submission import Place, Request, read_json
from rft.cluster.sweep import Ended, Job, cores, no_more, print_now, sweep
from rft.cluster.trials import Swept, Trial
from rft.errors import ClusterError
from rft.files import write_whole
from rft.run.lock import Lock
from rft.strict import build

SUBMITTED = "submitted.json"  # beside the trials: how the sweep was last given to Slurm


def run_here(swept: Swept, *, slots: int = 0, say: Callable[[str], None] = print_now) -> Ended:
    """Train the unfinished trials, and those that a search asks for, `slots` at once (0: one per GPU, else per core).

    Raises:
        ClusterError: another process is at it.
        KeyboardInterrupt: after the trials were asked to stop, and did.
    """
    gpus = visible_gpus()
    slots = slots or len(gpus) or cores()
    lock = _lock(swept.folder)
    try:
        more: Callable[[], Job | None] = no_more
        if swept.sweep.search:
            from rft.cluster.search import Proposals

            search = Proposals(swept, say)
            swept, more = search.swept, search.next
        jobs = [trial.job for trial in swept.unfinished]
        say(f"{len(swept.trials) - len(jobs)} of {swept.num_wanted} trials are done; {slots} at once, in {swept.folder}")
        ended = sweep(jobs, slots=slots, say=say, devices=gpus or ("",), look=look, more=more)
        if swept.sweep.search:
            search.hear()
        return ended
    finally:
        lock.free()


def submit(swept: Swept, request: Request, *, max_running: int, dry_run: bool = False) -> tuple[str, int]:
    """Give the unfinished trials that are in no queue to Slurm, as one array. Returns (job id, how many trials).

    Of a search these are as many as may run at once: the next ones depend on what they are worth, so submit again.

    Raises:
        ClusterError: Slurm is not there, or does not take it.
    """
    for trial in swept.unfinished:
        look(trial.folder)  # who failed by a rule is not tried again
    if (search := swept.sweep.search) and not dry_run:
        from rft.cluster.search import Proposals

        asking = Proposals(swept)
        new = min(max_running - len(asking.swept.unfinished), search.trials - len(asking.swept.trials))
        for _ in range(new):
            asking.next()
        swept = asking.swept
    if not (runs := [trial.folder for trial in idle(swept)]):
        return "", 0
    job = slurm.submit(runs, request, folder=swept.folder, max_running=max_running, dry_run=dry_run)
    if not dry_run:
        write_whole(swept.folder / SUBMITTED, json.dumps({"max_running": max_running, **asdict(request)}, indent=1))
    return job, len(runs)


def submitted(swept: Swept) -> tuple[Request, int] | None:
    """(request, most at once) of the last submission; None where there was none."""
    values = dict(read_json(swept.folder / SUBMITTED))
    if not values:
        return None
    most = values.pop("max_running")
    return build(Request, values), most


def idle(swept: Swept) -> list[Trial]:
    """Unfinished trials that no job of Slurm's waits for or is at."""
    unfinished = swept.unfinished
    places = {t.name: place for t in unfinished if (place := Place.of(t.folder)) and place.job}
    if places:
        held = queue.queued([place.job for place in places.values()])
    return [t for t in unfinished if t.name not in places or places[t.name].job not in held]


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, each as a value of CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(one for one in named.split(",") if one.strip() and one.strip() != "-1")
    return tuple(map(str, range(count_gpus())))


def _lock(folder: Path) -> Lock:
    """One runner at a time; two would start the same trials."""
    try:
        return Lock.take(folder)
    except ClusterError as error:
        what = error.what.replace("training this run", "running this sweep")
        raise ClusterError(error.where, what, "wait for it, or interrupt it: its trials save and stop") from error
