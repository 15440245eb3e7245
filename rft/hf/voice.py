"""How a group is asked: prompts, what is looked at, and the rewards of what they ask for. A phase may have two such voices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rft.rollout.perceive import ONCE, Looking
from rft.rollout.render import Renderer
from rft.scoring import Reward

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """The prompts of a phase (`phase`) or those that it mixes in (`mix`), with their rewards."""

    name: str
    renderer: Renderer
    rewards: Sequence[Reward]
    looking: Looking = ONCE


def apart(voices: Sequence[Voice], work: Callable[[Voice, list[int]], Sequence[T]]) -> list[T]:
    """One result per entry of `voices`, in order: `work(voice, places)` does all places of a voice at once."""
    done: dict[int, T] = {}
    for name, voice in {voice.name: voice for voice in voices}.items():
        places = [i for i, one in enumerate(voices) if one.name == name]
        done |= dict(zip(places, work(voice, places), strict=True))
    return [done[i] for i in range(len(voices))]
