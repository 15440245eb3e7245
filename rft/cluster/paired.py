"""Means, intervals and paired differences over seeds, and what a claim needs to hold.

Intervals are two-sided 95 % t intervals with n - 1 degrees of freedom. One value has a mean and no interval.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from rft.errors import RecipeError

# The 97.5 % quantile of Student's t for 1, 2, ... 30 degrees of freedom; more are taken as 30, which is a little too wide.
T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314,
    2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
ENOUGH = 3  # seeds from which on the interval has a say


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Values over seeds in short. `half` is the half-width of the interval, None for a single value."""

    num: int
    mean: float
    half: float | None

    @property
    def low(self) -> float | None:
        """Lower bound of the interval."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """Upper bound of the interval."""
        return None if self.half is None else self.mean + self.half


def spread(values: Sequence[float]) -> Spread:
    """Mean and interval of at least one value."""
    num = len(values)
    half = T_975[min(num - 1, len(T_975)) - 1] * stdev(values) / sqrt(num) if num > 1 else None
    return Spread(num=num, mean=fmean(values), half=half)


def differences(mine: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Mine minus theirs for every seed that both have."""
    return {seed: mine[seed] - theirs[seed] for seed in mine if seed in theirs}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """`better > worse`, two trials of a study."""

    better: str
    worse: str

    @classmethod
    def parse(cls, text: str, where: str = "study.claim") -> Claim:
        """Raises RecipeError when `text` is not `one > other`."""
        match = re.fullmatch(r"\s*([\w-]+)\s*>\s*([\w-]+)\s*", text)
        if not match or match[1] == match[2]:
            raise RecipeError(where, f"cannot read {text!r}", 'write e.g. "nonlinear > grpo"')
        return cls(better=match[1], worse=match[2])

    @classmethod
    def parse_all(cls, text: str, where: str = "study.claim") -> tuple[Claim, ...]:
        """Claims with commas between them: all of them have to hold."""
        return tuple(cls.parse(part, where) for part in text.split(","))

    def __str__(self) -> str:
        return f"{self.better} > {self.worse}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a claim holds, and on what grounds."""

    holds: bool
    grounds: str


def judge(paired: Mapping[int, float]) -> Verdict:
    """By the paired differences per seed: the mean is above 0 and, from 3 seeds on, so is the interval's lower bound."""
    if not paired:
        return Verdict(holds=False, grounds="no seed has both results")
    seen = spread(list(paired.values()))
    seeds = f"{seen.num} seed{'s' if seen.num > 1 else ''}"
    if seen.num < ENOUGH:
        return Verdict(holds=seen.mean > 0, grounds=f"sign only: mean difference {seen.mean:+.3f} over {seeds}")
    bounds = f"95 % interval {seen.low:+.3f} to {seen.high:+.3f}"
    return Verdict(holds=seen.mean > 0 and seen.low > 0, grounds=f"mean difference {seen.mean:+.3f} over {seeds}, {bounds}")
