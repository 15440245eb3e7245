"""Groups that teach nothing are silenced, and the log says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rft.types import Group


def mute(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Mark groups whose rewards are all equal: their advantages are exactly 0. Marked groups stay as they are."""
    return tuple(g if g.muted else replace(g, muted=why_no_signal(g)) for g in groups)


def why_no_signal(group: Group) -> str:
    """'' when the rewards differ; else which kind of silence it is (failed, saturated, tied)."""
    rewards = [m.reward for m in group.members]
    if max(rewards) != min(rewards):
        return ""
    if all(m.rollout.answer is None for m in group.members):
        return "no signal: no member has an answer"
    if rewards[0] <= 0:
        return "no signal: every member earns nothing"
    return f"no signal: every member earns {rewards[0]:.3g}"
