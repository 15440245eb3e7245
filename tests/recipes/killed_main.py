"""Trains one run over and over, each attempt killed at a random moment, until one comes to its end.

Called as `python -m tests.recipes.killed_main RECIPE RUN KILLS SEED LONGEST`. Attempts are forks of a process that has
imported everything, so that a kill falls into training and not into imports. Prints a JSON line per attempt:
{"killed": bool, "step": the last step that was told, "saved": the newest sound checkpoint's phase and step}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from rft.run import checkpoints
from rft.run.state import read_state
from rft.train import train


def told(run: Path) -> list[tuple[str, int]]:
    """(phase, step) of the optimizer steps in the log."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["phase"], line["step"]) for line in lines if "grad_norm" in line]


def saved(run: Path, phases: tuple[str, ...]) -> tuple[str, int] | None:
    """What the next attempt will go on from, by the files alone; a phase that left its model counts as its end."""
    for phase in reversed(phases):
        place = run / "checkpoint" if phase == phases[-1] else run / "phases" / phase
        found = place if place.exists() else checkpoints.last_good(run, phase, lambda line: None)
        if found:
            assert not checkpoints.fault(found), f"{found} is not whole"
            return phase, checkpoints.record_of(found)["step"]
    return None


def attempt(recipe: str, run: Path) -> int:
    """A forked attempt; returns its process id."""
    if pid := os.fork():
        return pid
    log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        train(recipe, output=str(run))
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)


def is_at_work(run: Path, pid: int) -> bool:
    """The attempt has the lock and says that it runs."""
    try:
        return json.loads((run / "lock").read_text())["pid"] == pid and read_state(run)["status"] == "running"
    except (OSError, ValueError, KeyError):
        return False


def main(recipe: str, run: Path, kills: int, seed: int, longest: float) -> None:
    draw = random.Random(seed)
    left = kills
    while True:
        pid = attempt(recipe, run)
        killed = False
        if left:
            done, before, early = 0, len(told(run)), draw.random() < 0.25  # some fall into loading, most into training
            while not done and not (is_at_work(run, pid) and (early or len(told(run)) != before)):
                time.sleep(0.01)
                done, _ = os.waitpid(pid, os.WNOHANG)
            time.sleep(draw.uniform(0.0, longest))
            done = done or os.waitpid(pid, os.WNOHANG)[0]
            if not done:
                os.kill(pid, signal.SIGKILL)
                killed = True
        code = 0 if left and not killed else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        left -= killed
        steps = told(run)
        line = {"killed": killed, "step": steps[-1] if steps else None, "saved": saved(run, ("warmup", "tune"))}
        print(json.dumps(line), flush=True)
        if not killed:
            sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
