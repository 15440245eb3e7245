"""What ranks tell each other: each call is made by every rank, the same number of times."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from rft.errors import ClusterError
from rft.hf.watchdog import NAMED, NOW, Doing, Meeting, Watchdog, patience


class Together:
    """Collectives over all ranks; without a process group, this process alone."""

    watchdog: ClassVar[Watchdog | None] = None  # of this process

    @classmethod
    def join(cls) -> Together:
        """Start the process group of this launch, where it has several processes. Raises what `check_launch` raises."""
        check_launch(gpus=torch.cuda.device_count())
        PartialState(cpu=not torch.cuda.is_available())
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.cuda.is_available():
            from deepspeed.comm import init_distributed

            init_distributed(dist_backend="gloo")  # accelerate does so on GPUs; a reference is sharded before any engine starts
        return cls()

    @property
    def size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return dist.get_rank() if self.size > 1 else 0

    @property
    def local_rank(self) -> int:
        """Rank of this process on its machine."""
        return int(os.environ.get("LOCAL_RANK", 0))

    def watch(self, folder: Path, ended: Callable[[str], None] = lambda reason: None) -> None:
        """From now on a rank that waits in vain says for whom, and ends: see `watchdog`. Every rank calls it, with one folder.

        `ended(reason)` is called before the process ends. Raises ClusterError when RFT_WATCHDOG is no number of seconds.
        """
        seconds = patience()
        self.unwatch()
        if self.size > 1 and seconds:
            Together.watchdog = Watchdog(folder, self.rank, self.size, seconds, ended=ended)
            Together.watchdog.begin()
        self.wait()  # from here on no file is one of an earlier attempt

    def unwatch(self) -> None:
        """This rank leaves: it needs the others no more."""
        if Together.watchdog:
            Together.watchdog.end()
            Together.watchdog = None

    def doing(self, what: str, samples: Iterable[str] = (), *, meets: bool = False) -> None:
        """Say what this rank does from now on, and on which samples (ids), to whoever waits for it.

        `meets` where ranks wait for each other inside, as in a forward of a sharded model or in a backward.
        """
        NOW.doing = Doing(what=what, samples=tuple(samples)[:NAMED], meets=meets)

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order.

        Raises:
            ClusterError: a rank is gone; or ranks ask from different lines of the program, and would hear something else.
        """
        if self.size == 1:
            return [value]
        heard: list[Any] = [None] * self.size
        with NOW.waiting(_caller()) as meeting:
            try:
                dist.all_gather_object(heard, (meeting.call, value))
            except RuntimeError as error:  # the other end of a connection is closed
                raise self._lonely(meeting, error) from error
        calls = [call for call, _ in heard]
        if len(set(calls)) > 1:
            odd = next(rank for rank, call in enumerate(calls) if call != calls[0])
            what = f"ranks ask for different things: rank 0 in {calls[0]}, rank {odd} in {calls[odd]}"
            raise ClusterError(f"collective {meeting.number}", what, "some ranks took a branch that others did not: a bug")
        return [value for _, value in heard]

    def _lonely(self, meeting: Meeting, error: RuntimeError) -> ClusterError:
        time.sleep(1.0)  # a process that is ending may still be there
        who = Together.watchdog.dead() if Together.watchdog else ""
        what = who or f"another rank is gone ({str(error).splitlines()[0]})"
        do = "look at the end of the other ranks' logs; started again, the run goes on from its last checkpoint"
        return ClusterError(f"rank {self.rank}, {meeting}", what, do)

    def any(self, value: bool) -> bool:
        """True when any rank says so."""
        return any(self.gather(value))

    def most(self, value: int) -> int:
        """The largest value of any rank."""
        return max(self.gather(value))

    def union(self, values: set[str]) -> set[str]:
        """What any rank has."""
        return set().union(*self.gather(values))

    def total(self, values: Sequence[float]) -> list[float]:
        """Elementwise sums over ranks."""
        return [float(sum(column)) for column in zip(*self.gather(list(values)), strict=True)]

    def means(self, values: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Mean of every name over all values of all ranks."""
        joined: dict[str, list[float]] = {}
        for one in self.gather({k: list(v) for k, v in values.items()}):
            for name, numbers in one.items():
                joined.setdefault(name, []).extend(numbers)
        return {name: sum(numbers) / len(numbers) for name, numbers in sorted(joined.items()) if numbers}

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum of every name over all ranks."""
        joined: dict[str, float] = {}
        for one in self.gather(dict(values)):
            for name, number in one.items():
                joined[name] = joined.get(name, 0.0) + number
        return joined

    def wait(self) -> None:
        """Return when every rank has called."""
        self.gather(None)


def _caller() -> str:
    """The line outside this file that asked."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def check_launch(environment: Mapping[str, str] = os.environ, gpus: int = 0) -> None:
    """Refuse launches that look like several processes and are one, or that look sharded and are not.

    `gpus` is how many this process sees.

    Raises:
        ClusterError: with the form of launch that does what was meant.
    """
    several = "several processes: `rft launch RECIPE --processes N`"
    if "WORLD_SIZE" not in environment:
        if "MASTER_ADDR" in environment:  # what `accelerate launch --cpu --num_processes 2` leaves
            what = "MASTER_ADDR is set but WORLD_SIZE is not: this is one process, whatever number was asked for"
            do = "use `accelerate launch --multi_gpu --num_processes N -m rft.train RECIPE`, on a CPU as well"
            raise ClusterError("launch", what, f"{do}; or `rft launch RECIPE --processes N`")
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if int(environment.get(name) or 1) > 1:
                what = f"{name} is {environment[name]} but WORLD_SIZE is not set: no launcher has made the tasks one training"
                raise ClusterError("launch", what, f"start one task per machine, and in it {several}; or `rft slurm submit`")
    local = int(environment.get("LOCAL_WORLD_SIZE") or 1)
    if gpus and local > gpus:
        what = f"{local} processes on a machine with {gpus} GPU{'s' * (gpus > 1)}: some would share one"
        raise ClusterError("launch", what, f"`rft launch RECIPE --processes {gpus}`")
    if "CROSS_SIZE" in environment and environment.get("ACCELERATE_USE_DEEPSPEED") != "true":
        what = "the `deepspeed` launcher alone trains without DeepSpeed: every rank would hold everything"
        raise ClusterError("launch", what, "ZeRO is `rft launch RECIPE --processes N --config zero3`")
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        if not gpus:
            what = "FSDP without a GPU: accelerate would run plain DDP in its place"
            raise ClusterError("launch", what, "`rft launch RECIPE --config ddp`, or zero3, which shards on a CPU as well")
        if environment.get("FSDP_VERSION", "1") != "2":
            what = "FSDP of the first version: its parameters are flat, and rollouts would not find them"
            raise ClusterError("launch", what, "write fsdp_version: 2, or `rft launch RECIPE --config fsdp2`")
