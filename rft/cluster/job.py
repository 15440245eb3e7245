"""A job from inside: what its environment says, the signals that reach it, a port that is free."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.cluster import queue
from rft.errors import ClusterError, RftError
from rft.files import write_whole
from rft.run.state import STOP

PORTS = range(20000, 30000)  # below those that systems hand out by themselves
STRIDE = 379  # between two tries: the jobs of one hour have neighbouring numbers, and would meet


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """This job."""

    id: str
    name: str  # the id, or ARRAY_INDEX: the id of one element is the whole array's as well
    restart: int
    partition: str
    nodes: tuple[str, ...]
    cpus: int  # of a node

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Here:
        """Raises ClusterError outside of a job."""
        if "SLURM_JOB_ID" not in environment:
            raise ClusterError("supervise", "this is no Slurm job", "use `rft slurm submit RECIPE`")
        array, index = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        each = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_JOB_CPUS_PER_NODE", ""))
        nodes: list[str] = []
        with suppress(RftError):
            nodes = queue.hosts(environment.get("SLURM_JOB_NODELIST", ""))
        return cls(
            id=environment["SLURM_JOB_ID"],
            name=f"{array}_{index}" if array and index else environment["SLURM_JOB_ID"],
            restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
            partition=environment.get("SLURM_JOB_PARTITION", ""),
            nodes=tuple(nodes or [socket.gethostname()]),
            cpus=int(environment.get("SLURM_CPUS_PER_TASK", "0")) or min(map(int, each), default=1),
        )

    def facts(self) -> queue.Job | None:
        """What Slurm says of this job now; None where it says nothing."""
        with suppress(RftError):
            return queue.shown(self.name)
        return None

    def deadline(self, environment: Mapping[str, str] = os.environ) -> float:
        """The unix time of the job's limit; 0 where it has none, or nobody says."""
        if told := environment.get("SLURM_JOB_END_TIME"):  # Slurm 23.02 and later
            return float(told)
        facts = self.facts()
        return facts.end if facts else 0.0


class Asked:
    """Remembers SIGUSR1 (Slurm's warning) and SIGTERM (the end, when it is Slurm that sends it)."""

    def __init__(self) -> None:
        self.signal, self.terms = "", 0
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        self.signal = signal.Signals(number).name
        self.terms += number == signal.SIGTERM

    @property
    def text(self) -> str:
        """What the stop file says."""
        return f"{self.signal} to the job\n"

    def pass_on(self, run: Path) -> None:
        """Ask the trainer. It takes away what an earlier attempt was asked, so this is said until it has ended."""
        if self.signal and not (run / STOP).exists():
            write_whole(run / STOP, self.text)

    def wait(self, seconds: float) -> None:
        """Sleep; a signal does not shorten it by more than a moment."""
        until, before = time.monotonic() + seconds, self.signal
        while time.monotonic() < until and self.signal == before:
            time.sleep(0.1)


def free_port(job: int) -> int:
    """A TCP port that nobody on this machine listens on; where the search begins depends on the job."""
    return next(port for port in _tried(job) if all(_is_free(family, port) for family in (socket.AF_INET, socket.AF_INET6)))


def _tried(job: int) -> Iterator[int]:
    for k in range(len(PORTS)):
        yield PORTS[(job + k * STRIDE) % len(PORTS)]


def _is_free(family: socket.AddressFamily, port: int) -> bool:
    try:
        with socket.socket(family) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(("", port))
    except OSError as error:
        return family == socket.AF_INET6 and error.errno not in (98, 48)  # no IPv6 here; 98 and 48 are "in use"
    return True
