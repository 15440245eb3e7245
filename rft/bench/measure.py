"""Clocks, the order of arms, and the two ceilings of a machine."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch

PHASES = (
    "decode", "preprocess", "vision", "prefill", "decode tokens", "reward", "old/ref", "train forward", "backward",
    "optimizer", "other",
)  # fmt: skip


class Stopwatch:
    """Seconds by phase and by job. Phases nest, and time in an inner one is not the outer one's; jobs are whole.

    CPU: process time, so that waiting for a core does not count. CUDA: wall time behind a synchronize, which phases cost
    too; they are looked at only when `profiled`.
    """

    def __init__(self, device: torch.device, *, profiled: bool = True) -> None:
        self.phases: dict[str, float] = defaultdict(float)
        self.jobs: dict[str, float] = defaultdict(float)
        self._device, self._profiled = device, profiled
        self._open: list[str] = []
        self._since = 0.0

    def now(self) -> float:
        """The clock, after everything that was asked for is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return time.perf_counter()
        return time.process_time()

    def enter(self, phase: str) -> None:
        """Open a phase; the one around it pauses."""
        if self._profiled:
            self._charge()
            self._open.append(phase)

    def leave(self) -> None:
        """Close the innermost phase."""
        if self._profiled:
            self._charge()
            self._open.pop()

    @property
    def innermost(self) -> str:
        """The phase that is open now."""
        return self._open[-1] if self._open else "other"

    def _charge(self) -> None:
        now = self.now()
        if self._open:
            self.phases[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase as a block."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def job(self, name: str, phase: str) -> Iterator[None]:
        """A job as a block; what no inner phase claims is `phase`."""
        begin = self.now()
        with self.phase(phase):
            yield
        self.jobs[name] += self.now() - begin


def abba(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Each name once per round, every second round backwards: a drift of the machine falls on all alike."""
    for turn in range(rounds):
        yield from names if turn % 2 == 0 else reversed(names)


def best(rounds: Sequence[float]) -> dict[str, float]:
    """Least and middle of repeated times."""
    return {"min": min(rounds), "median": median(rounds)}


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measured `flops` per second of a large matmul, and `bytes` per second of a large copy, read and written."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.randn(size, 16 * size, device=device, dtype=dtype)
    target = torch.empty_like(source)
    watch = Stopwatch(device)
    matmul = _fastest(watch, lambda: a @ a)
    copy = _fastest(watch, lambda: target.copy_(source))
    return {"flops": 2 * size**3 / matmul, "bytes": 2 * source.nbytes / copy}


def _fastest(watch: Stopwatch, work: Callable[[], object], tries: int = 8) -> float:
    work()
    times = []
    for _ in range(tries):
        begin = watch.now()
        work()
        times.append(watch.now() - begin)
    return min(times)
