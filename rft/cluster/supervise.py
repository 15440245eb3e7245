"""What a job runs on its first node: start the trainer on all nodes, ask it to stop in time, and see to what comes after.

`python -m rft.cluster.supervise FOLDER/slurm/N [INDEX]`, by `exec` in the batch script, so that Slurm's warning reaches it.
A signal is only remembered here. The trainer is asked by the run's stop file and never by a signal: launchers die of those.

    finished                                     exit code 0
    stopped by a warning, killed, node lost      the job goes back into the queue, or a follow-up takes its place
    stopped by a stop file of the user           exit code 0; `rft slurm resume` goes on
    failed, or twice without a new checkpoint    exit code 1, and state.json says why
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rft.cluster import queue
from rft.cluster.attempts import FRUITLESS, Attempt, attempts_of, fruitless, mark_of, unlucky_nodes
from rft.cluster.job import Asked, Here, free_port
from rft.cluster.launch import command, quoted
from rft.cluster.prune import look
from rft.cluster.requeue import come_back, spared, stay_away, wait_for_the_end
from rft.cluster.submission import Place, Submission, read_json
from rft.cluster.trials import pruned
from rft.errors import RftError
from rft.run.lock import HEARTBEAT, holder_of
from rft.run.state import STATE, STOP, attempt_folder, next_attempt, read_state, write_state

RULES = 15.0  # seconds between two looks at what a sweep's rules say
TURN = 0.3  # seconds between two looks at the trainer
LAST = 20.0  # seconds for its last words, when Slurm has begun to end the job
TAIL = 3  # lines of a log that a reason quotes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How the trainer's attempt went. `said` is the status that it wrote itself, "" for none; `began` that it wrote any."""

    code: int | None  # of srun; None while that is still being ended
    began: bool
    said: str
    facts: queue.Job | None  # Slurm's view of this job, where it has one

    def is_being_ended(self, here: Here) -> bool:
        """True when this is Slurm's doing: the job is no longer one that simply runs."""
        return self.facts is not None and (self.facts.state != "RUNNING" or self.facts.restarts > here.restart)


def supervise(folder: Path, index: int) -> int:
    """One start of the job; returns its exit code."""
    asked, here = Asked(), Here.read()
    submission = Submission.read(folder)
    run = submission.runs[index]
    say(f"job {here.name}, restart {here.restart}, on {' '.join(here.nodes)}: {run}")
    status, place = read_state(run).get("status"), Place.of(run)
    if status in ("finished", "cancelled") or (place and place.cancelled):
        say(f"the run is {'cancelled' if place and place.cancelled else status}: nothing to do")
        return 0
    if why := pruned(run):
        say(f"a rule of its sweep has stopped this run: {why}")
        return 0
    if other := held_by_another(run, here):
        say(f"{other} is training this run: this job leaves it alone")
        return 1
    Place(job=here.name, submission=str(folder), index=index).write(run)
    past = [a for a in attempts_of(run) if a.submission == str(folder)]
    if why := hopeless(submission, run, past):
        return give_up(run, why)
    if set(here.nodes) & set(avoid := spared(submission, here, unlucky_nodes(past))):
        say(f"{' '.join(avoid)} failed twice under this run: it goes elsewhere")
        if come_back(submission, index, here, avoid):
            wait_for_the_end(asked)
        return 0
    attempt = Attempt(
        number=next_attempt(run, {}), submission=str(folder), job=here.name, restart=here.restart, nodes=here.nodes,
        mark=mark_of(run),
    )  # fmt: skip
    attempt_folder(run, attempt.number)
    attempt.write(run)
    ended = train(submission, run, here, asked, attempt)
    return after(submission, index, here, asked, attempt, past, ended)


def train(submission: Submission, run: Path, here: Here, asked: Asked, attempt: Attempt) -> Ended:
    """Run the trainer on all nodes until it ends, or Slurm begins to end the job."""
    logs, request = attempt_folder(run, attempt.number), submission.request
    address, port = here.nodes[0], free_port(int(here.id))
    environment = {**os.environ, "RFT_ATTEMPT": str(attempt.number), "RFT_RUN": str(run), "RFT_LOGS": str(logs)}
    environment["PYTHONUNBUFFERED"] = "1"
    if deadline := here.deadline():
        environment["RFT_DEADLINE"] = str(deadline)
    words = list(request.command) or trainer(submission, run, address, port)
    size = str(request.nodes)
    srun = [
        "srun", "--nodes", size, "--ntasks", size, "--ntasks-per-node=1", f"--cpus-per-task={here.cpus}", "--export=ALL",
        "--kill-on-bad-exit=1", "--wait=120", "--mpi=none", "--open-mode=append",
        "--output", f"{str(logs).replace('%', '%%')}/node-%n.log", "bash", "-c", f"exec {quoted(words)}",
    ]  # fmt: skip
    say(f"attempt {attempt.number}: {quoted(words)}")
    (run / STOP).unlink(missing_ok=True)
    before, began, facts, terms, slow = text_of(run / STATE), time.time(), None, 0, False
    looked = time.monotonic()
    with (logs / "srun.log").open("w", encoding="utf-8") as out:
        process = subprocess.Popen(srun, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
        while process.poll() is None:
            asked.pass_on(run)
            if asked.terms > terms:
                terms = asked.terms
                if (facts := here.facts()) and facts.state != "RUNNING":
                    break  # its trainer has some seconds, and so has this process
            if time.monotonic() - looked > RULES:
                looked = time.monotonic()
                if why := look(run):
                    say(f"a rule of its sweep stops this run: {why}")
            if not slow and (pause := pause_of(run, began)) > request.signal_lead / 2:
                slow = True
                say(f"no step for {pause:.0f} s, and a warning leaves {request.signal_lead} s: give more --signal-lead")
            time.sleep(TURN)
    changed = text_of(run / STATE) != before
    said = str(read_state(run).get("status", "")) if changed else ""
    if said != "finished" and (facts is None or facts.state == "RUNNING"):
        facts = here.facts()
    return Ended(code=process.poll(), began=changed, said=said, facts=facts)


def after(
    submission: Submission, index: int, here: Here, asked: Asked, attempt: Attempt, past: Sequence[Attempt], ended: Ended
) -> int:
    """What follows from how an attempt ended; returns the exit code of the job."""
    run, facts = submission.runs[index], ended.facts
    if ended.said == "finished":
        replace(attempt, ended="finished").write(run)
        say("finished")
        return 0
    lost = lost_nodes(run, here, attempt)
    # put back by somebody else: evicted without notice, or by an administrator
    preempted = facts is not None and (facts.was_preempted or (facts.restarts > here.restart and not lost))
    attempt = replace(attempt, ended=ended.said or "died", preempted=preempted, lost=lost)
    attempt.write(run)
    if held_by_another(run, here):
        say("another job trains this run: this one has nothing more to do with it")
        return 1
    if ended.said == "failed":
        say(f"failed: {read_state(run).get('reason', '')}")
        return 1
    if ended.said == "stopped" and (run / STOP).exists() and text_of(run / STOP) != asked.text:
        say(f"stopped: {read_state(run).get('reason', '')}; `rft slurm resume` goes on")
        return 0
    if (place := Place.of(run)) and place.cancelled:
        return 1  # whoever cancelled it writes so
    ending = facts is not None and ended.is_being_ended(here)
    if ending and not (preempted or lost or facts.restarts > here.restart or facts.reason == "TimeLimit"):
        last_words(run, "cancelled", "the job was cancelled in Slurm", wait=True)
        return 1
    if not (asked.signal or ended.began or ending or lost):
        return give_up(run, f"the trainer never began: {last_lines(run, attempt.number) or f'exit code {ended.code}'}")
    reason = ""
    if ended.said != "stopped":
        how = asked.signal or ("node lost" if lost else facts.reason if ending else f"exit code {ended.code}, without a word")
        reason = f"killed before it could save ({how}): it goes on from {mark_of(run) or 'the beginning'}"
    return again(submission, index, here, asked, [*past, attempt], facts, reason)


def again(
    submission: Submission, index: int, here: Here, asked: Asked, past: Sequence[Attempt], facts: queue.Job | None, reason: str
) -> int:
    """Bring the job back, unless that is hopeless. `reason` becomes the state's where the trainer could not write one."""
    run, unlucky = submission.runs[index], unlucky_nodes(past)
    if why := hopeless(submission, run, past):
        return give_up(run, f"{reason}; {why}" if reason else why)
    back, refused = facts is not None and facts.restarts > here.restart, ""
    if back:
        say("Slurm has put this job back into the queue")
        stay_away(here, unlucky)
    else:
        try:
            back = come_back(submission, index, here, unlucky)
        except RftError as error:
            refused = f"not put back into the queue: {error.what}; `rft slurm resume` goes on"
            reason = "; ".join(filter(None, (reason or read_state(run).get("reason"), refused)))
    if reason:
        last_words(run, "stopped", reason, wait=facts is not None and facts.state != "RUNNING")
    if back:
        wait_for_the_end(asked)
    return 1 if refused else 0


def pause_of(run: Path, began: float) -> float:
    """Seconds between the last step and the last sign of life of a trainer that began then; 0 before it has said anything."""
    pulse = read_json(run / HEARTBEAT)
    return pulse["alive"] - pulse["progress"] if pulse and pulse["progress"] > began else 0.0


def hopeless(submission: Submission, run: Path, past: Sequence[Attempt]) -> str:
    """Why another attempt is not worth a start; "" when it is."""
    if len(past) > (most := submission.request.max_restarts):
        return f"all {most} restarts are used up (--max-restarts)"
    if (count := fruitless(past, mark := mark_of(run))) >= FRUITLESS:
        return f"{count} attempts in a row brought nothing new: each began from {mark or 'the beginning'}"
    return ""


def give_up(run: Path, why: str) -> int:
    """No further attempt by itself. A run that stopped well stays stopped, with a word more."""
    state = read_state(run)
    status = "stopped" if state.get("status") == "stopped" else "failed"
    said = f"{state.get('reason')}; " if status == "stopped" and state.get("reason") else ""
    write_state(run, **{**state, "status": status, "reason": f"{said}{why}"})
    say(why)
    return 1


def last_words(run: Path, status: str, reason: str, *, wait: bool) -> None:
    """Write the state of a trainer that did not, or add to what it said; with `wait`, after it had its chance."""
    until = time.monotonic() + LAST * wait
    while (state := read_state(run)).get("status") == "running" and holder_of(run) and time.monotonic() < until:
        time.sleep(TURN)
    if state.get("status") in ("finished", "failed"):
        return
    write_state(run, **{**state, "status": status, "reason": reason})
    say(reason)


def trainer(submission: Submission, run: Path, address: str, port: int) -> list[str]:
    """The words that train the run on one node; every rank writes to a file of its own."""
    request = submission.request
    words = command(
        str(run / "recipe.yaml"), config=request.config, processes=request.processes, nodes=request.nodes,
        machine_rank="$SLURM_NODEID" if request.nodes > 1 else "0", address=address, port=port,
        arguments=["--output", str(run), *(["--allow-drift"] if request.allow_drift else [])],
    )  # fmt: skip
    words.insert(words.index("rft.train"), "rft.cluster.rank")
    return words


def held_by_another(run: Path, here: Here) -> str:
    """The job or process that trains this run at present, if it is not this job (or a dead restart of it)."""
    holder = holder_of(run)
    if not holder or str(holder.get("job")) == here.id:
        return ""
    if job := str(holder.get("job") or ""):
        with suppress(RftError):
            known = queue.queued([job])
            return f"job {job}" if any(j.state in ("RUNNING", "SUSPENDED") for j in known.values()) else ""
    return f"process {holder.get('pid')} on {holder.get('host')}"


def lost_nodes(run: Path, here: Here, attempt: Attempt) -> tuple[str, ...]:
    """Nodes that failed under this job, as srun was told, or as Slurm sees them now."""
    said = text_of(attempt_folder(run, attempt.number) / "srun.log")
    named = {node for word in re.findall(r"Node failure on (\S+)", said) for node in word.split(",")}
    with suppress(RftError):
        named |= set(queue.down(",".join(here.nodes)))
    return tuple(sorted(named & set(here.nodes)))


def last_lines(run: Path, number: int) -> str:
    """The end of what the launch printed."""
    logs = attempt_folder(run, number)
    for path in (logs / "rank-0.log", logs / "node-0.log", logs / "srun.log"):
        if lines := [line.strip() for line in text_of(path).splitlines() if line.strip()]:
            return " | ".join(lines[-TAIL:])
    return ""


def text_of(path: Path) -> str:
    """A file's text; "" without one."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def say(text: str) -> None:
    """Into the job's log, with the time."""
    print(f"{time.strftime('%F %T')} supervise: {text}", flush=True)


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code of the job."""
    try:
        return supervise(Path(argv[0]), int(argv[1] if len(argv) > 1 else os.environ.get("SLURM_ARRAY_TASK_ID", "0")))
    except RftError as error:
        say(f"{type(error).__name__}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
