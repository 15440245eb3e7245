"""Runs as Slurm jobs: a plain script, checked by Slurm before anything is written, sent by sbatch.

One run is a plain job, several are one job array. The script asks for what the request says and ends in
`exec python -m rft.cluster.supervise`; its text comes from `launch/slurm/job.sbatch`, which a user can replace.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rft.cluster import queue
from rft.cluster.launch import config_file
from rft.cluster.submission import PLACE, SCRIPT, SLURM, Place, Request, Submission, array_range, new_folder
from rft.errors import ClusterError
from rft.plugins import find_file
from rft.run.lock import holder_of
from rft.run.state import STATE, STOP, read_state, write_state

TEMPLATE = "launch/slurm/job.sbatch"
TIME = r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}"
OURS = {
    "array": "", "chdir": "", "D": "", "error": "", "e": "", "output": "", "o": "", "open-mode": "", "requeue": "", "wrap": "",
    "ntasks": "", "n": "", "ntasks-per-node": "", "signal": "--signal-lead", "nodes": "--nodes", "N": "--nodes",
    "time": "--time", "t": "--time", "partition": "--partition", "p": "--partition", "account": "--account",
    "A": "--account", "gpus-per-node": "--gpus-per-node", "cpus-per-task": "--cpus-per-task", "c": "--cpus-per-task",
}  # fmt: skip
GONE_WITHIN = 90.0  # seconds that a cancelled job has to leave the queue


def submit(
    runs: Sequence[Path], request: Request, *, folder: Path, max_running: int = 0, dry_run: bool = False, name: str = ""
) -> str:
    """Give prepared run folders (each has its recipe.yaml) to Slurm; returns the job's id.

    `folder` gets `slurm/N/` with the script, the list of runs and the logs. `max_running` limits how many elements of an
    array run at once. With `dry_run` the script is printed, nothing is asked or written, and the id is "".

    Raises:
        ClusterError: a request that Slurm refuses, a run that is finished, waiting or being trained, or no Slurm at all.
            Nothing was submitted then, and no folder is left.
    """
    runs = [run.absolute() for run in runs]
    name = name or folder.absolute().name
    size = array_range(len(runs), max_running)
    if dry_run:
        print(script(request, folder.absolute() / SLURM / "N", name=name, array=size), end="")
        return ""
    check(request, array=size)
    for run in runs:
        refuse_taken(run)
    submission = Submission(folder=new_folder(folder.absolute()), runs=tuple(runs), request=request)
    before = [(run, read_state(run), Place.of(run)) for run in runs]
    job = ""
    try:
        text = script(request, submission.folder, name=name, array=size)
        (submission.folder / SCRIPT).write_text(text, encoding="utf-8")
        submission.write()
        for index, (run, state, _) in enumerate(before):  # before there is a job, so that no trainer writes at the same time
            Place(submission=str(submission.folder), index=index).write(run)
            write_state(run, **{**state, "status": "submitted", "reason": ""})
        job, refused = queue.send(str(submission.folder / SCRIPT))
        if refused:
            raise refusal(refused, request)
    finally:
        if not job:
            shutil.rmtree(submission.folder)
            for run, state, old in before:
                _put_back(run, state, old)
    for index, run in enumerate(runs):
        now = Place.of(run)
        if now is None or not now.job:  # otherwise its supervisor has been here
            Place(job=submission.job_of(index, job), submission=str(submission.folder), index=index).write(run)
    return job


def _put_back(run: Path, state: Mapping[str, Any], place: Place | None) -> None:
    """As it was before a submission that came to nothing."""
    if place:
        place.write(run)
    else:
        (run / PLACE).unlink(missing_ok=True)
    if state:
        write_state(run, **state)
    else:
        (run / STATE).unlink(missing_ok=True)


def check(request: Request, *, array: str = "") -> None:
    """Refuse what cannot run here, before anything is written.

    Raises:
        ClusterError: a value that is no value, no Slurm on the path, or what `sbatch --test-only` says against it.
    """
    text = script(request, Path.cwd() / SLURM / "N", name="rft", array=array)
    done = queue.ask("sbatch", "--test-only", stdin=text)
    if done.returncode:
        raise refusal(done.stderr, request)


def script(request: Request, folder: Path, *, name: str, array: str = "") -> str:
    """The batch script of a submission in `folder`. Raises ClusterError for a request that makes no sense."""
    check_request(request)
    outputs = str(folder).replace("%", "%%")
    options = {
        "job-name": name, "nodes": str(request.nodes), "ntasks-per-node": "1",
        "gpus-per-node": str(request.gpus_per_node or ""), "cpus-per-task": str(request.cpus_per_task or ""),
        "time": request.time, "partition": request.partition, "account": request.account, "array": array,
        "signal": f"B:USR1@{request.signal_lead}", "open-mode": "append",
        "output": f"{outputs}/{'%A_%a' if array else '%j'}.log",
    }  # fmt: skip
    lines = [f"#SBATCH --{key}={_quoted(value)}" for key, value in options.items() if value]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {extra}" for extra in request.sbatch)]
    path = find_file(request.template or TEMPLATE)
    text = path.read_text(encoding="utf-8")
    for mark, value in (
        ("@options@", "\n".join(lines)),
        ("@setup@", "\n".join(request.setup)),
        # exec: the warning is sent to the batch shell alone, and has to find the supervisor in its place
        ("@supervise@", f"exec {shlex.quote(sys.executable)} -m rft.cluster.supervise {shlex.quote(str(folder))}"),
    ):
        if text.count(mark) != 1:
            raise ClusterError(str(path), f"needs {mark} once, and has it {text.count(mark)} times", f"see {TEMPLATE}")
        text = text.replace(mark, value)
    return text


def check_request(request: Request) -> None:
    """Refuse values that Slurm would read otherwise than meant, or that cannot work. Raises ClusterError."""
    for flag, value, least in (
        ("--nodes", request.nodes, 1), ("--gpus-per-node", request.gpus_per_node, 0),
        ("--processes-per-node", request.processes_per_node, 0), ("--cpus-per-task", request.cpus_per_task, 0),
        ("--signal-lead", request.signal_lead, 1), ("--max-restarts", request.max_restarts, 0),
    ):  # fmt: skip
        if value < least:
            raise ClusterError(flag, f"{value} is too small", f"use {least} or more")
    if request.signal_lead > 65535:
        raise ClusterError("--signal-lead", f"{request.signal_lead} s is more than Slurm takes", "use 65535 or less")
    if request.time and not re.fullmatch(TIME, request.time):
        do = "write minutes, H:MM:SS, D-HH or D-HH:MM:SS, e.g. 4:00:00"
        raise ClusterError("--time", f"{request.time!r} is no time limit", do)
    if request.time and (limit := seconds_of(request.time)) <= request.signal_lead:
        what = f"a warning {request.signal_lead} s before the end comes at once where the limit is {limit} s"
        raise ClusterError("--signal-lead", what, f"use less than {limit}, but more than a step and a save take")
    if request.gpus_per_node and request.processes > request.gpus_per_node:
        what = f"{request.processes} processes on {request.gpus_per_node} GPUs: some would share one"
        raise ClusterError("--processes-per-node", what, f"use {request.gpus_per_node}, or leave it out")
    for extra in request.sbatch:
        key = re.match(r"--([a-z-]+)|-([a-zA-Z])", extra)
        if not key or "\n" in extra:
            raise ClusterError("--sbatch", f"{extra!r} is no option", 'write e.g. --sbatch="--constraint=h100"')
        if (known := key[1] or key[2]) in OURS:
            do = f"use {OURS[known]}" if OURS[known] else "leave it out: restarts and logs depend on it"
            raise ClusterError("--sbatch", f"{extra} is set by rft itself", do)
    config_file(request.config)


def refuse_taken(run: Path) -> None:
    """Raise ClusterError for a run that needs no job, or has one."""
    state, place = read_state(run), Place.of(run)
    if state.get("status") == "finished":
        raise ClusterError(str(run), "this run is finished", "choose another --output for a new one")
    if holder := holder_of(run):
        what = f"process {holder.get('pid')} on {holder.get('host')} is training this run"
        raise ClusterError(str(run), what, "wait for it, or stop it: rft slurm cancel, or touch its stop file")
    if place and place.job and (jobs := queue.queued([place.job])):
        job = jobs.get(place.job) or next(iter(jobs.values()))
        raise ClusterError(str(run), f"job {job.id} is {job.state.lower()} for this run", f"wait, or rft slurm cancel {run}")


def cancel(run: Path) -> str:
    """End a run's job, wait until it is gone, and say so in the run's state; returns the job's id, "" where none was queued.

    Raises:
        ClusterError: it was never submitted, it is finished, or its job does not end.
    """
    place, state = Place.of(run), read_state(run)
    if place is None:
        raise ClusterError(str(run), "was not submitted to Slurm", f"to stop it at its next step: touch {run / STOP}")
    if state.get("status") == "finished":
        raise ClusterError(str(run), "is finished", "there is nothing to cancel")
    jobs = queue.queued([place.job]) if place.job else {}
    replace(place, cancelled=True).write(run)  # its supervisor then does not put it back into the queue
    if jobs:
        queue.ask("scancel", place.job)
        until = time.monotonic() + GONE_WITHIN
        while queue.queued([place.job]):
            if time.monotonic() > until:
                what = f"is still there after {GONE_WITHIN:.0f} s"
                raise ClusterError(f"job {place.job}", what, f"see what holds it: squeue -j {place.job}")
            time.sleep(0.5)
    state = read_state(run)
    if state.get("status") == "finished":
        return place.job
    write_state(run, **{**state, "status": "cancelled", "reason": "cancelled by rft slurm cancel"})
    return place.job if jobs else ""


def resume(run: Path, *, allow_drift: bool = False, dry_run: bool = False) -> str:
    """Submit an unfinished run again, as it was submitted; returns the new job's id. Raises what `submit` raises.

    With `allow_drift` its trainer goes on although recipe, data or rewards have changed.
    """
    place = Place.of(run)
    if place is None:
        raise ClusterError(str(run), "was not submitted to Slurm", "use `rft slurm submit RECIPE --output RUN`")
    request = Submission.read(Path(place.submission)).request
    return submit([run], replace(request, allow_drift=allow_drift), folder=run, dry_run=dry_run)


def refusal(said: str, request: Request) -> ClusterError:
    """What Slurm has against a job, with what it has to offer."""
    lines = [re.sub(r"^(sbatch: )?(error|fatal|allocation failure): ", "", line) for line in said.strip().splitlines()]
    what = "; ".join(dict.fromkeys(line.removeprefix("Batch job submission failed: ") for line in lines)) or "refused"
    if "partition" in said:
        known = sorted(set(_offers("%R")))
        return ClusterError("--partition", f"{request.partition!r}: {what}", f"partitions here: {', '.join(known)}")
    if "node configuration" in said or "Node count" in said or "More processors" in said:
        asked = f"{request.nodes} nodes, {request.gpus_per_node} GPUs and {request.cpus_per_task or 1} CPUs on each"
        offers = "; ".join(_offers("%R: %D nodes with %c CPUs, %m MB, %G"))
        return ClusterError("sbatch", f"{what} ({asked})", f"there is {offers}")
    return ClusterError("sbatch", what, "ask for something else, or show this to the site's administrators")


def seconds_of(limit: str) -> int:
    """A Slurm time limit in seconds: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _offers(form: str) -> list[str]:
    return [line.strip() for line in queue.ask("sinfo", "-h", "-o", form).stdout.splitlines()]


def _quoted(value: str) -> str:
    """As sbatch reads it in a script."""
    return value if re.fullmatch(r"[\w./:@%+,=-]+", value) else '"' + value.replace('"', '\\"') + '"'
