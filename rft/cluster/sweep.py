"""Runs side by side on one machine: a thread each, as many at once as there are cores, resumed where they were cut.

A run is a subprocess with a folder of its own; its `state.json` says whether it finished. Nothing else is remembered.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TAIL = 12  # lines of a failed run's log that are shown
PATIENCE = 10.0  # seconds that an interrupted run has to end by itself
TURN = 0.2  # seconds between two looks at what runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run: `command` makes `folder`, once the run `after` has finished. What it prints goes to `log`."""

    name: str
    folder: Path
    command: tuple[str, ...]
    after: str = ""

    @property
    def log(self) -> Path:
        """Beside the folder, because the run makes that itself."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def is_finished(self) -> bool:
        """What the run's own state says."""
        state = self.folder / "state.json"
        return state.is_file() and json.loads(state.read_text(encoding="utf-8")).get("status") == "finished"

    def set_aside(self) -> None:
        """What a cut or failed attempt left goes out of the way: a run wants a folder without one."""
        for path in (self.folder, self.log):
            if path.exists():
                taken = (path.with_name(f"{path.name}.cut-{n}") for n in range(1, 10_000))
                path.rename(next(p for p in taken if not p.exists()))

    def tail(self) -> str:
        """The last lines of the log. Of a progress bar, which rewrites its line, the last state."""
        lines = [line.split("\r")[-1] for line in self.log.read_text(encoding="utf-8", errors="replace").split("\n")]
        return "\n".join([line for line in lines if line.strip()][-TAIL:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a sweep went, by names of jobs."""

    finished: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)  # -> why


def command_of(recipe: Path, folder: Path) -> tuple[str, ...]:
    """The command that trains a recipe into a folder."""
    return (sys.executable, "-m", "rft.train", str(recipe), "--output", str(folder))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_thread() -> dict[str, str]:
    """The environment of a job: one thread, no GPU. Results then do not depend on what runs beside it."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RFT_DECODE_THREADS"), "1")
    return {**os.environ, **threads, "CUDA_VISIBLE_DEVICES": ""}


def sweep(jobs: Sequence[Job], *, slots: int, say: Callable[[str], None] = print) -> Ended:
    """Run what has not finished yet, in order, `slots` at once. A failure is told and stops only what comes after it.

    An interrupt (Ctrl-C, SIGTERM) ends the runs that are under way; their folders are begun anew by the next call.

    Raises:
        KeyboardInterrupt: after every child has ended.
    """
    finished = [job.name for job in jobs if job.is_finished]
    failed: dict[str, str] = {}
    waiting = [job for job in jobs if job.name not in finished]
    running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}
    if finished:
        say(f"{len(finished)} of {len(jobs)} runs had finished before")
    with _terminable():
        try:
            while waiting or running:
                for job in [j for j in waiting if j.after in failed]:
                    waiting.remove(job)
                    failed[job.name] = f"not run: {job.after} failed"
                ready = [j for j in waiting if not j.after or j.after in finished]
                for job in ready[: slots - len(running)]:
                    waiting.remove(job)
                    running[job.name] = (job, _start(job), time.monotonic())
                time.sleep(TURN)
                for job, child, since in list(running.values()):
                    if child.poll() is None:
                        continue
                    del running[job.name]
                    took = f"{time.monotonic() - since:.0f} s"
                    if child.returncode == 0 and job.is_finished:
                        finished.append(job.name)
                        say(f"[{len(finished) + len(failed)}/{len(jobs)}] {job.name}: {took}")
                    else:
                        failed[job.name] = f"exit code {child.returncode} after {took}, see {job.log}"
                        say(f"[{len(finished) + len(failed)}/{len(jobs)}] {job.name}: failed, {failed[job.name]}\n{job.tail()}")
        finally:
            _end([child for _, child, _ in running.values()])
    return Ended(finished=tuple(j.name for j in jobs if j.name in finished), failed=failed)


def _start(job: Job) -> subprocess.Popen[bytes]:
    job.set_aside()
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        return subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=one_thread())


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        child.terminate()
    patience = time.monotonic() + PATIENCE
    for child in children:
        try:
            child.wait(max(0.0, patience - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM as an interrupt: by default it would leave the children behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
