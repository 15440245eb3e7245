"""Asking Slurm: squeue, scontrol and, where a site has it, sacct. Only formats that stay: `-h -o` and `key=value`.

A controller that does not answer costs its clients 10 to 20 seconds each; whoever gets `ClusterError` once need not ask again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from rft.errors import ClusterError

PATIENCE = 30.0  # seconds for one answer
UNKNOWN = "Invalid job id specified"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What Slurm says of a job. `end` is the unix time of its limit, 0 for none."""

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    excluded: str = ""
    restarts: int = 0
    end: float = 0.0
    was_preempted: bool = False


def ask(*words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Raises:
        ClusterError: it is not on the path, or its controller does not answer.
    """
    if not shutil.which(words[0]):
        raise ClusterError("Slurm", f"there is no {words[0]} on the path", "run this where Slurm is, e.g. on its login node")
    environment = {**os.environ, "SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            words, input=stdin, stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True, text=True, timeout=PATIENCE, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ClusterError("Slurm", f"{words[0]} has not answered in {PATIENCE:.0f} s", "try again later") from error
    if "Unable to contact slurm controller" in done.stderr:
        raise ClusterError("Slurm", "its controller does not answer", "try again later, or ask the site's administrators")
    return done


def send(*words: str) -> tuple[str, str]:
    """Run sbatch. Returns (id of the new job, ""), or ("", what Slurm says against it). Raises what `ask` raises."""
    done = ask("sbatch", "--parsable", *words)
    if done.returncode:
        return "", done.stderr.strip() or f"sbatch: exit code {done.returncode}"
    return done.stdout.strip().partition(";")[0], ""


def queued(ids: Sequence[str]) -> dict[str, Job]:
    """Those of the jobs that wait, run, or are being ended, by id (ARRAY_INDEX for an element of an array)."""
    if not ids:
        return {}
    done = ask("squeue", "-h", "-a", "-r", "-j", ",".join(ids), "-o", "%i|%A|%T|%r|%N|%e")
    if done.returncode and UNKNOWN not in done.stderr:
        raise ClusterError("squeue", done.stderr.strip(), "try squeue by hand, or ask the site's administrators")
    found = {}
    for line in done.stdout.splitlines():
        name, number, state, reason, nodes, end = line.split("|")
        if {name, number, name.partition("_")[0]} & set(ids):
            found[name] = Job(id=name, state=state, reason=reason, nodes=nodes, end=unix(end))
    return found


def shown(job: str) -> Job | None:
    """All that the controller remembers of a job, also when it has just ended; None for nothing."""
    done = ask("scontrol", "show", "job", "-o", job)
    if done.returncode:
        return None
    said = dict(re.findall(r"(?:^| )([A-Z][A-Za-z]*)=(\S*)", done.stdout.splitlines()[0] if done.stdout else ""))
    return Job(
        id=job,
        state=said.get("JobState", ""),
        reason=said.get("Reason", ""),
        nodes=_named(said.get("NodeList", "")),
        excluded=_named(said.get("ExcNodeList", "")),
        restarts=int(said.get("Restarts", "0")),
        end=unix(said.get("EndTime", "")),
        was_preempted=said.get("PreemptTime", "None") not in ("None", ""),
    )


def ended(job: str) -> str:
    """How a job ended that is not queued: "COMPLETED", "FAILED"...; "" where nobody remembers.

    The controller forgets within minutes; after that only sites with a database (sacct) know.
    """
    if job_ := shown(job):
        return job_.state
    if shutil.which("sacct"):
        done = ask("sacct", "-n", "-X", "-P", "-j", job, "-o", "State")
        if not done.returncode and done.stdout.strip():
            return done.stdout.split()[0]
    return ""


def hosts(nodes: str) -> list[str]:
    """`n[1-2]` spelled out."""
    return ask("scontrol", "show", "hostnames", nodes).stdout.split() if nodes else []


def down(nodes: str) -> list[str]:
    """Those of the nodes that Slurm calls down or failing."""
    done = ask("sinfo", "-h", "-N", "-n", nodes, "-o", "%N %T")
    pairs = (line.split() for line in done.stdout.splitlines())
    return sorted({pair[0] for pair in pairs if len(pair) == 2 and pair[1].startswith(("down", "fail"))})


def usable(partition: str) -> set[str]:
    """Nodes of a partition that run jobs or could."""
    done = ask("sinfo", "-h", "-a", "-N", *(["-p", partition] if partition else []), "-o", "%N %T")
    pairs = [line.split() for line in done.stdout.splitlines()]
    return {pair[0] for pair in pairs if len(pair) == 2 and pair[1].startswith(("idle", "alloc", "mix", "comp", "reserved"))}


def unix(text: str) -> float:
    """Slurm's local time as unix seconds; 0 for N/A, Unknown and their like."""
    with suppress(ValueError):
        return datetime.fromisoformat(text).timestamp()
    return 0.0


def _named(text: str) -> str:
    return "" if text == "(null)" else text
