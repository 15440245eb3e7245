"""How a job comes back: into the queue by its own name, or as a follow-up job where that is refused."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress

from rft.cluster import queue
from rft.cluster.job import Asked, Here
from rft.cluster.submission import SCRIPT, Place, Submission
from rft.errors import ClusterError, RftError

KILLED_WITHIN = 120.0  # seconds between a requeue and the signal that comes with it
TRIES = 5  # commands that a dying job runs may be ended with it
PAUSE = 5.0  # seconds before a silent controller is asked again


def come_back(submission: Submission, index: int, here: Here, avoid: Sequence[str]) -> bool:
    """Let this job run once more, on other nodes than `avoid`: True when it is back in the queue, False for a follow-up job.

    Raises:
        ClusterError: neither was possible.
    """
    avoid = spared(submission, here, avoid)
    # Never the bare id: that of one element of an array is the array's own, and would requeue all of it.
    refused = _said("scontrol", "requeue", here.name)
    if not refused:
        stay_away(here, avoid)
        return True
    words = [f"--dependency=afterany:{here.name}"]
    words += [f"--array={index}"] if len(submission.runs) > 1 else []
    words += [f"--exclude={','.join(avoid)}"] if avoid else []
    job, why = queue.send(*words, str(submission.folder / SCRIPT))
    if why:
        raise ClusterError(f"job {here.name}", f"{refused}; {why}", "rft slurm resume goes on")
    name = submission.job_of(index, job)
    Place(job=name, submission=str(submission.folder), index=index).write(submission.runs[index])
    print(f"supervise: not put back into the queue ({refused}); job {name} goes on after this one", flush=True)
    return False


def stay_away(here: Here, nodes: Sequence[str]) -> None:
    """Exclude nodes from the next start of a job that waits again."""
    for _ in range(TRIES if nodes else 0):
        facts = here.facts()
        if facts and facts.excluded:
            print(f"supervise: {facts.excluded} failed twice under this run, and is avoided", flush=True)
            return
        _said("scontrol", "update", f"jobid={here.name}", f"excnodelist={','.join(nodes)}")
        time.sleep(0.2)


def spared(submission: Submission, here: Here, nodes: Sequence[str]) -> list[str]:
    """The nodes that can be avoided: none where too few others would be left, as the job would wait for ever."""
    with suppress(RftError):
        others = queue.usable(here.partition) - set(nodes)
        if len(others) >= submission.request.nodes:
            return list(nodes)
    return []


def wait_for_the_end(asked: Asked) -> None:
    """A job that is back in the queue is ended by Slurm: one that ended by itself before would count as completed."""
    if asked.signal != "SIGTERM":
        asked.wait(KILLED_WITHIN)


def _said(*words: str) -> str:
    """ "" for success, else what a command said. A controller that does not answer is asked again for some minutes."""
    why = ""
    for _ in range(TRIES):
        try:
            done = queue.ask(*words)
        except RftError as error:
            why = error.what
            if not shutil.which(words[0]):
                break
            time.sleep(PAUSE)
            continue
        if done.returncode >= 0:  # otherwise a signal that was meant for the job ended it
            return done.stderr.strip() or f"{words[0]}: exit code {done.returncode}" if done.returncode else ""
    return why or f"{words[0]} was killed with its job"
