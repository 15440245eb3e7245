"""The model as a rollout sees it: token ids and media manifests in, token ids out.

The boundary is narrow on purpose: another engine can stand behind it, and its fake is a few lines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from rft.types import Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the policy continues. `key` names the stream of random numbers of this continuation."""

    segments: tuple[Segment, ...]
    key: int

    @property
    def ids(self) -> tuple[int, ...]:
        """All token ids so far."""
        return tuple(i for s in self.segments for i in s.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How to continue. Only the recipe sets these; temperature 0 is greedy, top_k 0 and top_p 1 are off.

    A reply also ends where `until(ids so far)` holds: the world has something to say in the middle of it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    until: Callable[[Sequence[int]], bool] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One continuation, the end-of-turn token included when it was written.

    `logprobs` are under the policy at the sampling temperature, before top-k and top-p.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: Literal["answered", "length"]
    weights: int = 0


class Policy(Protocol):
    """Continues contexts, one reply each, in order."""

    def extend(self, contexts: Sequence[Context], limits: Limits) -> list[Reply]: ...


class Scripted:
    """A policy that says what it is told: `script(context index, context) -> text`. For tests and baselines."""

    def __init__(self, script: Callable[[int, Context], str], encode: Callable[[str], Sequence[int]], eos: int) -> None:
        self._script, self._encode, self._eos = script, encode, eos

    def extend(self, contexts: Sequence[Context], limits: Limits) -> list[Reply]:
        replies = []
        for index, context in enumerate(contexts):
            ids = (*self._encode(self._script(index, context)), self._eos)
            cuts = range(1, len(ids) + 1) if limits.until else ()
            ids = next((ids[:n] for n in cuts if limits.until(ids[:n])), ids)
            stop = "answered" if len(ids) <= limits.max_tokens else "length"
            ids = ids[: limits.max_tokens]
            replies.append(Reply(ids=ids, logprobs=(0.0,) * len(ids), stop=stop))
        return replies


def stream_key(*parts: object) -> int:
    """A 64-bit key from (seed, step, sample, rollout, turn ...): the same parts give the same stream in any process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(keys: np.ndarray, position: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for each stream at one position, shape like `keys` (uint64).

    splitmix64 (Steele, Lea, Flood 2014) evaluated at key + position x its increment: no state, any order.
    """
    with np.errstate(over="ignore"):
        z = keys + np.uint64(position + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
