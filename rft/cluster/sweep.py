"""Runs side by side on one machine, by default on a core each; the same call goes on where one was cut.

A run is a subprocess with a folder of its own; its `state.json` says whether it finished. Nothing else is remembered.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rft.cluster.launch import command
from rft.run.state import status

TAIL = 12  # lines of a failed run's log that are shown
PATIENCE = 120.0  # seconds that an interrupted run has to save and end by itself
TURN = 0.2  # seconds between two looks at who has ended
LOOK = 3.0  # seconds between two looks at what is measured


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
        return status(self.folder) == "finished"

    def tail(self) -> str:
        """The last lines of the log. Of a progress bar, which rewrites its line, the last state."""
        lines = [line.split("\r")[-1] for line in self.log.read_text(encoding="utf-8", errors="replace").split("\n")]
        return "\n".join([line for line in lines if line.strip()][-TAIL:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a sweep went, by names of jobs."""

    finished: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)  # -> why
    pruned: Mapping[str, str] = field(default_factory=dict)  # stopped by a rule -> why


def command_of(recipe: Path, folder: Path) -> tuple[str, ...]:
    """The command that trains a recipe into a folder."""
    return tuple(command(str(recipe), arguments=["--output", str(folder)]))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(device: str = "", threads: int = 1) -> dict[str, str]:
    """The environment of a job: by default one thread and no GPU. Results then do not depend on what runs beside it."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RFT_DECODE_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "CUDA_VISIBLE_DEVICES": device}


def no_more() -> None:
    """What `more` says where every job is known beforehand."""


def no_rules(folder: Path) -> str:
    """What `look` says where no job is stopped early."""
    return ""


def print_now(text: str) -> None:
    """Print, without waiting for more to print."""
    print(text, flush=True)


def sweep(
    jobs: Sequence[Job],
    *,
    slots: int,
    say: Callable[[str], None] = print_now,
    devices: Sequence[str] = ("",),
    look: Callable[[Path], str] = no_rules,
    more: Callable[[], Job | None] = no_more,
) -> Ended:
    """Run what has not finished yet, in order, `slots` at once. A failure is told and stops only what comes after it.

    `devices` are the GPUs (values of CUDA_VISIBLE_DEVICES) that the slots take in turn. `look(folder)` judges a run that is
    under way or has just ended, and says why it asked it to stop; such a run is neither finished nor failed. `more()` is
    asked for another job whenever a slot is free and nobody waits; None ends that.

    An interrupt (Ctrl-C, SIGTERM) asks the runs that are under way to stop; the next call goes on with them.

    Raises:
        KeyboardInterrupt: after every child has ended.
    """
    runner = _Runner(jobs, slots, say, devices, look, more)
    with _terminable():
        try:
            return runner.run()
        except KeyboardInterrupt:
            if num := len(runner.children):
                say(f"asking {num} runs to stop; interrupt again to kill them")
            raise
        finally:
            _end(runner.children)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    job: Job
    child: subprocess.Popen[bytes]
    since: float
    slot: int


class _Runner:
    """The state of one call of `sweep`."""

    def __init__(
        self,
        jobs: Sequence[Job],
        slots: int,
        say: Callable[[str], None],
        devices: Sequence[str],
        look: Callable[[Path], str],
        more: Callable[[], Job | None],
    ) -> None:
        self._slots, self._say, self._devices, self._look, self._more = slots, say, devices, look, more
        self._jobs = list(jobs)
        self._finished = [job.name for job in jobs if job.is_finished]
        self._failed: dict[str, str] = {}
        self._pruned: dict[str, str] = {}
        self._waiting = [job for job in jobs if job.name not in self._finished]
        self._running: dict[str, _Running] = {}

    @property
    def children(self) -> list[subprocess.Popen[bytes]]:
        """Who has not ended."""
        return [now.child for now in self._running.values()]

    def run(self) -> Ended:
        if self._finished:
            self._say(f"{len(self._finished)} of {len(self._jobs)} runs had finished before")
        looked = time.monotonic()
        while True:
            self._begin()
            if not self._running:
                break
            time.sleep(TURN)
            is_time = time.monotonic() - looked > LOOK
            looked = time.monotonic() if is_time else looked
            for now in list(self._running.values()):
                has_ended = now.child.poll() is not None
                if is_time or has_ended:
                    self._judge(now)
                if has_ended:
                    self._settle(now)
        finished = tuple(job.name for job in self._jobs if job.name in self._finished)
        return Ended(finished=finished, failed=self._failed, pruned=self._pruned)

    def _begin(self) -> None:
        """Start what waits for nobody, as far as there are slots; where nobody waits, ask for more."""
        while job := next((j for j in self._waiting if j.after in self._failed), None):
            self._waiting.remove(job)
            self._failed[job.name] = f"not run: {job.after} failed"
        while len(self._running) < self._slots:
            ready = next((j for j in self._waiting if not j.after or j.after in self._finished), None)
            if ready:
                self._waiting.remove(ready)
            elif not self._waiting and (ready := self._more()):
                self._jobs.append(ready)
            else:
                break
            slot = min(set(range(self._slots)) - {now.slot for now in self._running.values()})
            child = _start(ready, self._devices[slot % len(self._devices)], self._slots)
            self._running[ready.name] = _Running(job=ready, child=child, since=time.monotonic(), slot=slot)

    def _judge(self, now: _Running) -> None:
        if why := self._look(now.job.folder):
            self._pruned[now.job.name] = why
            self._say(f"{now.job.name}: stopped by a rule, {why}")

    def _settle(self, now: _Running) -> None:
        name, took = now.job.name, f"{time.monotonic() - now.since:.0f} s"
        del self._running[name]
        if now.child.returncode == 0 and now.job.is_finished:
            self._pruned.pop(name, None)  # it was faster
            self._finished.append(name)
            told = f"{name}: {took}"
        elif name in self._pruned:
            told = f"{name}: pruned after {took}"
        elif now.child.returncode == 0 and status(now.job.folder) == "stopped":
            self._failed[name] = f"stopped on request after {took}; the same command goes on with it"
            told = f"{name}: {self._failed[name]}"
        else:
            self._failed[name] = f"exit code {now.child.returncode} after {took}, see {now.job.log}"
            told = f"{name}: failed, {self._failed[name]}\n{now.job.tail()}"
        num = len(self._finished) + len(self._failed) + len(self._pruned)
        self._say(f"[{num}/{len(self._jobs)}] {told}")


def _start(job: Job, device: str, slots: int) -> subprocess.Popen[bytes]:
    """A session of its own: a Ctrl-C reaches this process alone, which asks its children to stop."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    own = environment(device, max(1, cores() // slots) if device else 1)
    with job.log.open("ab") as log:
        return subprocess.Popen(
            job.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=own, start_new_session=True
        )


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask all to stop and wait for them; who takes too long, or a second interrupt, kills."""
    for child in children:
        child.terminate()
    patience = time.monotonic() + PATIENCE
    try:
        for child in children:
            child.wait(max(0.0, patience - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for child in children:
            child.kill()
            child.wait()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP as interrupts: by default they would leave the children behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
