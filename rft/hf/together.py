"""What ranks tell each other: each call is made by every rank, the same number of times."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from rft.errors import ClusterError


class Together:
    """Collectives over all ranks; without a process group, this process alone."""

    @classmethod
    def join(cls) -> Together:
        """Start the process group of this launch, where it has several processes. Raises what `check_launch` raises."""
        check_launch()
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

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

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


def check_launch(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse launches that look like several processes and are one.

    Raises:
        ClusterError: MASTER_ADDR is set without WORLD_SIZE, which is what `accelerate launch --cpu --num_processes 2` does.
    """
    if "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise ClusterError(
            "launch",
            "MASTER_ADDR is set but WORLD_SIZE is not: this is one process, whatever number was asked for",
            "use `accelerate launch --multi_gpu --num_processes N -m rft.train RECIPE`, on a CPU as well",
        )
