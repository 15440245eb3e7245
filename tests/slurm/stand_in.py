"""A trainer of one number, which keeps the promises of the real one: lock, state, stop requests, whole checkpoints.

RUN/stand_in.json says how it goes: steps, seconds per step, save_every (steps, 0 is only when asked to stop), save_seconds,
fail_at and die_at (steps), deaf (asks are not heard). Only the first task works; the others are there as long as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path

from rft.errors import ClusterError
from rft.run import checkpoints
from rft.run.lock import Heartbeat, Lock
from rft.run.state import attempt_folder, read_state, write_state
from rft.run.stops import Stops, deadline

PLAN = {"steps": 10, "seconds": 0.1, "save_every": 1, "save_seconds": 0.0, "fail_at": -1, "die_at": -1, "deaf": False}


def trained(steps: int, weights: str = "") -> str:
    """What the weights are after so many steps."""
    for _ in range(steps):
        weights = hashlib.sha256(weights.encode()).hexdigest()
    return weights


def save(run: Path, step: int, weights: str, seconds: float) -> None:
    staged = checkpoints.staging(run, checkpoints.name_of("only", step))
    staged.mkdir(parents=True, exist_ok=True)
    (staged / "weights").write_text(weights)
    time.sleep(seconds)
    place = staged.with_name(checkpoints.name_of("only", step))
    checkpoints.seal(staged, place, {"step": step})
    checkpoints.point_to(run, place)


def work(run: Path, attempt: int, plan: dict[str, float], stops: Stops) -> None:
    step, weights, say = 0, "", lambda **more: write_state(run, **{"attempt": attempt, "phase": "only", "step": step, **more})
    checkpoints.clear_leftovers(run)
    if good := checkpoints.last_good(run, "only"):
        step, weights = checkpoints.record_of(good)["step"], (good / "weights").read_text()
    print(f"attempt {attempt} begins at step {step}", flush=True)
    (attempt_folder(run, attempt) / "resume.json").write_text(json.dumps({"step": step}))
    say(status="running")
    while step < plan["steps"]:
        if step == plan["die_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == plan["fail_at"]:
            say(status="failed", reason="ValueError: it went wrong")
            raise SystemExit(1)
        if (why := stops.reason(first_rank=True)) and not plan["deaf"]:
            save(run, step, weights, plan["save_seconds"])
            return say(status="stopped", reason=why)
        time.sleep(plan["seconds"])
        step, weights = step + 1, trained(1, weights)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "weights": weights}) + "\n")
        if plan["save_every"] and step % plan["save_every"] == 0:
            save(run, step, weights, plan["save_seconds"])
    (run / "weights").write_text(weights)
    say(status="finished")


def main(run: Path, attempt: int) -> None:
    over = attempt_folder(run, attempt) / "over"
    if os.environ["SLURM_PROCID"] != "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while not over.exists():
            time.sleep(0.1)
        return
    if read_state(run).get("status") == "finished":
        return
    plan = {**PLAN, **json.loads((run / "stand_in.json").read_text())}
    stops = Stops(run, deadline=deadline())
    try:
        lock = Lock.take(run, job=os.environ["SLURM_JOB_ID"], restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    except ClusterError as error:
        raise SystemExit(str(error)) from error
    pulse = Heartbeat(run)
    stops.forget_file()
    try:
        with stops.listening():
            work(run, attempt, plan, stops)
    finally:
        over.touch()
        pulse.close()
        lock.free()


if __name__ == "__main__":
    main(Path(os.environ["RFT_RUN"]), int(os.environ["RFT_ATTEMPT"]))
