"""Who waits for whom. A collective that one rank never enters hangs without a word; here it gets one within a minute.

Every rank says in a small file of its own what it does, in which collective it waits, on which samples, and that it is
alive. A rank that has waited for `patience` seconds reads the files of the others and names the odd one. One that is slow is
told of once per `patience` and left alone. Where nobody will ever come (its process is gone, or waits elsewhere) this
process ends, and with it the launch. Durations are measured by the rank they are about: clocks need not agree.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rft.errors import ClusterError
from rft.files import write_whole

PATIENCE = 50.0  # seconds; RFT_WATCHDOG says otherwise, 0 is off
ELSEWHERE = 10  # times the patience, before a rank of another machine is given up
NAMED = 4  # samples that a line names
LIBRARIES = tuple({*sysconfig.get_paths().values(), os.path.dirname(os.__file__)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Doing:
    """A stage of the work. In one that `meets`, ranks wait for each other in collectives that only a framework sees."""

    what: str = "starting"
    samples: tuple[str, ...] = ()
    meets: bool = False
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """A collective that this process waits in: its number since the start, and the line that asked for it."""

    number: int
    call: str
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"collective {self.number} ({self.call})"


class Now:
    """What this process does. Its main thread writes, its watchdog reads; each write replaces one reference."""

    def __init__(self) -> None:
        self.doing, self.meeting, self.number = Doing(), None, 0

    @contextmanager
    def waiting(self, call: str) -> Iterator[Meeting]:
        """Inside, the process waits for the others."""
        self.number += 1
        meeting = self.meeting = Meeting(number=self.number, call=call)
        try:
            yield meeting
        finally:
            self.meeting = None


NOW = Now()


def patience(environment: Mapping[str, str] = os.environ) -> float:
    """Seconds before a rank that waits asks why. Raises ClusterError when RFT_WATCHDOG is not a number of seconds."""
    text = environment.get("RFT_WATCHDOG", "")
    try:
        seconds = float(text or PATIENCE)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ClusterError("RFT_WATCHDOG", f"{text!r} is no number of seconds", f"unset it ({PATIENCE:g}), or 0 to turn it off")
    return seconds


class Watchdog:
    """The thread of one rank. `ended(reason)` is called before it ends the process."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        patience: float,
        *,
        now: Now = NOW,
        ended: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._folder, self._rank, self._size, self._patience = folder, rank, size, patience
        self._now, self._ended = now, ended
        self._tick = min(5.0, patience / 10)
        self._beat, self._told = 0, 0.0
        self._seen: dict[int, tuple[int, int]] = {}  # last beat of a rank, and how many looks it has not changed for
        self._doomed: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def begin(self) -> None:
        """Write this rank's file and start."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()
        atexit.register(self.end)
        self._thread.start()

    def end(self) -> None:
        """Stop watching, and say that this rank has left."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(self._tick + 1)
        self._write(has_left=True)
        atexit.unregister(self.end)

    def _watch(self) -> None:
        while not self._stop.wait(self._tick):
            self._write()
            self._look()

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    def _write(self, has_left: bool = False) -> None:
        now, doing, meeting = time.monotonic(), self._now.doing, self._now.meeting
        self._beat += 1
        state = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "beat": self._beat,
            "has_left": has_left,
            "doing": doing.what,
            "samples": list(doing.samples[:NAMED]),
            "meets": doing.meets,
            "for": round(now - doing.since, 1),
            "at": _place(),
            "number": meeting.number if meeting else 0,
            "call": meeting.call if meeting else "",
            "waits": round(now - meeting.since, 1) if meeting else 0.0,
        }
        with suppress(OSError):  # a full disk is the step's business
            write_whole(self._path(self._rank), json.dumps(state))

    def _look(self) -> None:
        """Judge the others, where this rank has needed them for long."""
        doing, meeting, now = self._now.doing, self._now.meeting, time.monotonic()
        needed = now - meeting.since if meeting else now - doing.since if doing.meets else 0.0
        if needed < self._patience / 2:
            self._seen, self._doomed, self._told = {}, set(), 0.0
            return
        states = {rank: self._read(rank) for rank in range(self._size) if rank != self._rank}
        for rank, state in states.items():
            beat, looks = self._seen.get(rank, (0, 0))
            self._seen[rank] = (state["beat"], looks + 1 if state["beat"] == beat else 0) if state else (0, 0)
        if needed < self._patience:
            return
        lost = {r: why for r, s in states.items() if s and (why := self._loss(r, s, meeting))}
        if lost and set(lost) == self._doomed:  # seen twice
            self._give_up(meeting, lost, states)
        self._doomed = set(lost)
        if not lost and now - self._told >= self._patience and self._speaks(states, meeting):
            self._told = now
            print(f"\nwatchdog: {self._report(states, meeting, needed)}", file=sys.stderr, flush=True)

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            return json.loads(self._path(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # never there, or between two states on a shared disk
            return None

    def _loss(self, rank: int, state: Mapping[str, Any], meeting: Meeting | None) -> str:
        """Why this rank will never come; empty where it may."""
        if end := _end(state):
            return end
        # Counted in looks: a machine that slept has not missed any. Work that keeps the interpreter, as writing a large file
        # may, gives no sign of life either: here the process can be asked whether it was stopped, elsewhere it gets longer.
        silent = self._seen[rank][1] * self._tick
        is_here = state["host"] == socket.gethostname()
        if silent >= self._patience * (1 if is_here else ELSEWHERE) and not (is_here and _status(state["pid"]) not in "Tt"):
            return f"has given no sign of life for {silent:.0f} s" + " and is stopped" * is_here
        is_elsewhere = meeting and state["number"] not in (0, meeting.number)
        if is_elsewhere and state["waits"] >= self._patience:
            return f"waits in another one, collective {state['number']} ({state['call']})"
        return ""

    def _speaks(self, states: Mapping[int, dict[str, Any] | None], meeting: Meeting | None) -> bool:
        """Whether this is the first of the ranks that wait as it does: one line is enough for all of them."""
        number = meeting.number if meeting else 0
        return not any(s and r < self._rank and s["number"] == number and (number or s["meets"]) for r, s in states.items())

    def _report(self, states: Mapping[int, dict[str, Any] | None], meeting: Meeting | None, needed: float) -> str:
        if meeting:
            odd = {r: s for r, s in states.items() if not s or s["number"] != meeting.number}
            where = f"rank {self._rank} has waited {needed:.0f} s in {meeting}"
            if not odd:
                return f"{where}, and so have all ranks: the network, or a collective of a framework that only some ran"
        else:
            odd, where = dict(states), f"rank {self._rank} has been {self._now.doing.what} for {needed:.0f} s at {_place()}"
        return f"{where}, for {'; '.join(self._about(r, s) for r, s in list(odd.items())[:8])}"

    def _about(self, rank: int, state: Mapping[str, Any] | None) -> str:
        if state is None:
            return f"rank {rank}, which left no file in {self._folder}"
        silent = self._seen.get(rank, (0, 0))[1] * self._tick
        signs = f", no sign of life for {silent:.0f} s" if silent >= 3 * self._tick else ""
        place = f"in collective {state['number']}, {state['call']}" if state["number"] else f"at {state['at']}"
        return f"rank {rank} ({state['host']}, pid {state['pid']}), {_work(state)}, {place}{signs}"

    def _blame(self, lost: Mapping[int, str], states: Mapping[int, Any]) -> str:
        told = []
        for rank, why in lost.items():
            s = states[rank]
            told.append(f"rank {rank} ({s['host']}, pid {s['pid']}) {why}; it was {_work(s)}, at {s['at']}")
        return "; ".join(told)

    def dead(self) -> str:
        """Which ranks have left or are gone, as far as this machine can see; empty when all are there."""
        states = {rank: s for rank in range(self._size) if rank != self._rank and (s := self._read(rank))}
        return self._blame({rank: why for rank, s in states.items() if (why := _end(s))}, states)

    def _give_up(self, meeting: Meeting | None, lost: Mapping[int, str], states: Mapping[int, Any]) -> None:
        what = f"nobody will come: {self._blame(lost, states)}"
        do = f"look at the end of the log of rank {min(lost)}; started again, the run goes on from its last checkpoint"
        error = ClusterError(f"rank {self._rank}, {meeting or self._now.doing.what}", what, do)
        print(f"\nClusterError: {error}", file=sys.stderr, flush=True)
        with suppress(Exception):
            self._ended(f"ClusterError: {error}")
        sys.stdout.flush()
        os._exit(1)  # the main thread cannot be woken; the launcher ends the other ranks


def _end(state: Mapping[str, Any]) -> str:
    """How a rank's process ended; empty where it runs, or cannot be seen from here."""
    if state["has_left"]:
        return "has left: its program ended"
    is_here = state["host"] == socket.gethostname()
    return "is gone: its process ended without a word" if is_here and _status(state["pid"]) in "XZ" else ""


def _work(state: Mapping[str, Any]) -> str:
    """What a rank does, on what, since when."""
    samples: Sequence[str] = state["samples"]
    on = f" of sample{'s' * (len(samples) > 1)} {', '.join(samples)}" if samples else ""
    return f"{state['doing']}{on} for {state['for']:.0f} s"


def _place() -> str:
    """The innermost line of the main thread that is not a library's."""
    frame = innermost = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame and frame.f_code.co_filename.startswith((*LIBRARIES, "<")):
        frame = frame.f_back
    frame = frame or innermost
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else "an unknown place"


def _status(pid: int) -> str:
    """The state letter of a process of this machine: Z where it only waits to be collected, T where it was stopped.

    X where there is none, R where it cannot be known.
    """
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return "X"
    except (OSError, IndexError):  # not ours to signal, or no /proc
        return "R"
