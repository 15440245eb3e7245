"""One run, one trainer: a lock that a dead trainer does not keep, and the heartbeat by which others see that it lives.

The lock is a file that appears whole (a hard link, atomic on network file systems as well). Its holder is gone when its
process is (same machine), when its job was restarted since, or when its heartbeat has been still for `STILL` seconds by the
file system's own clock.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rft.errors import ClusterError
from rft.files import write_whole

LOCK, HEARTBEAT = "lock", "heartbeat"
BEAT = 10.0  # seconds between two signs of life
STILL = 60.0  # seconds without one after which a trainer on another machine counts as dead


class Lock:
    """Held by the process that trains the run in `folder`; `take` gets it, `free` gives it back."""

    def __init__(self, folder: Path, text: str) -> None:
        self._path, self._text = folder / LOCK, text

    @classmethod
    def take(cls, folder: Path, *, job: str = "", restart: int = 0, say: Callable[[str], None] = print) -> Lock:
        """The lock of the run in `folder`, after waiting for a silent holder on another machine to show life or none.

        `job` and `restart` name this process's cluster job and how often that was restarted.

        Raises:
            ClusterError: another trainer lives.
        """
        mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": _began(os.getpid()),
            "job": job,
            "restart": restart,
        }
        lock = cls(folder, json.dumps(mine))
        own = folder / f".{LOCK}.{mine['host']}.{mine['pid']}"
        try:
            own.write_text(lock._text, encoding="utf-8")
            told = False
            while not lock._appear(own):
                text = lock._read()
                if text is None:
                    continue  # freed between the two looks
                holder = _parse(text)
                still = _age(folder, own)
                if _is_gone(holder, mine, still):
                    lock._remove(text)
                    continue
                if holder.get("host") == mine["host"] or still < BEAT * 2:
                    raise ClusterError(
                        str(folder),
                        f"process {holder.get('pid')} on {holder.get('host')} is training this run",
                        f"wait for it, or ask it to stop: touch {folder / 'stop'}",
                    )
                if not told:
                    say(
                        f"{folder}: its trainer on {holder.get('host')} has been silent for {still:.0f} s; "
                        f"it counts as dead after {STILL:.0f} s"
                    )
                    told = True
                time.sleep(1.0)
                own.write_text(lock._text, encoding="utf-8")  # the file system's clock goes on
        finally:
            own.unlink(missing_ok=True)
        return lock

    @property
    def is_mine(self) -> bool:
        """False when another took it over: this process was thought dead, and has to leave the run alone."""
        return self._read() == self._text

    def free(self) -> None:
        """Give it back, if it is still this process's."""
        if self.is_mine:
            self._path.unlink(missing_ok=True)

    def _appear(self, own: Path) -> bool:
        try:
            os.link(own, self._path)
        except FileExistsError:
            return False
        return True

    def _read(self) -> str | None:
        try:
            return self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def _remove(self, stale: str) -> None:
        """Take away a dead holder's lock. Of several who try one moves it, and that may be a living one's by then."""
        aside = self._path.with_name(f".{LOCK}.stale.{socket.gethostname()}.{os.getpid()}")
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return
        if aside.read_text(encoding="utf-8") != stale:
            with suppress(FileExistsError):
                os.link(aside, self._path)
        aside.unlink(missing_ok=True)


def holder_of(folder: Path) -> dict[str, Any] | None:
    """Who holds the lock and seems to live; None for nobody. A look from outside: nothing is changed."""
    try:
        holder = _parse((folder / LOCK).read_text(encoding="utf-8"))
        still = time.time() - max(p.stat().st_mtime for p in (folder / LOCK, folder / HEARTBEAT) if p.exists())
    except (FileNotFoundError, ValueError):
        return None
    return None if _is_gone(holder, {"host": socket.gethostname()}, still) else holder


class Heartbeat:
    """A thread that writes `heartbeat` every `BEAT` seconds: that the trainer lives, and when it last made progress."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / HEARTBEAT
        self._progress: dict[str, Any] = {"progress": round(time.time(), 1), "phase": "", "step": 0}
        self._end = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._go_on, daemon=True, name="heartbeat")
        self._thread.start()

    @property
    def at(self) -> dict[str, Any]:
        """Phase and step of the last progress; "" and 0 where there was none yet."""
        return {key: self._progress[key] for key in ("phase", "step")}

    def step(self, phase: str, step: int) -> None:
        """Progress was made."""
        self._progress = {"progress": round(time.time(), 1), "phase": phase, "step": step}

    def close(self) -> None:
        """No more signs of life."""
        self._end.set()
        self._thread.join()

    def _go_on(self) -> None:
        while not self._end.wait(BEAT):
            self._write()

    def _write(self) -> None:
        with suppress(OSError):  # a full disk is told where something is lost by it
            write_whole(self._path, json.dumps({"alive": round(time.time(), 1), **self._progress}))


def _is_gone(holder: Mapping[str, Any], mine: Mapping[str, Any], still: float) -> bool:
    if holder.get("host") == mine["host"]:
        return _began(int(holder.get("pid") or 0)) != holder.get("began")
    if holder.get("job") and holder["job"] == mine.get("job") and int(holder.get("restart") or 0) < mine.get("restart", 0):
        return True
    return still >= STILL


def _age(folder: Path, own: Path) -> float:
    """Seconds since the holder's last sign of life, by the clock that stamps files."""
    marks = [p.stat().st_mtime for p in (folder / LOCK, folder / HEARTBEAT) if p.exists()]
    return own.stat().st_mtime - max(marks, default=0.0)


def _parse(text: str) -> dict[str, Any]:
    try:
        holder = json.loads(text)
    except ValueError:
        holder = None
    return holder if isinstance(holder, dict) else {}


def _began(pid: int) -> str:
    """When a process began, as the system counts; "" when there is none, or a zombie. A pid alone may be another's by now."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if Path("/proc").is_dir() or not _lives(pid) else "unknown"
    return "" if fields[0] in "ZX" else fields[19]


def _lives(pid: int) -> bool:
    """Without /proc: whether a process of this number exists."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
