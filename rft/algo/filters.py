"""Groups that teach nothing are silenced, and the log says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rft.types import Group

Advantages = Callable[[Group], Sequence[float]]


def mute(groups: Sequence[Group], advantages: Advantages | None = None) -> tuple[Group, ...]:
    """Mark groups that teach nothing; marked groups stay as they are.

    `advantages` gives those that the estimator would credit; without it, equal rewards are silence.
    """
    return tuple(
        g if g.muted else replace(g, muted=why_no_signal(g, None if advantages is None else advantages(g))) for g in groups
    )


def why_no_signal(group: Group, advantages: Sequence[float] | None = None) -> str:
    """'' when there is a signal; else which kind of silence it is (failed, saturated, tied).

    Members with the same rewards, part by part, teach nothing either, whatever an estimator makes of who wrote them.
    """
    rewards = [m.reward for m in group.members]
    parts = [(m.reward, dict(m.parts), m.turns) for m in group.members]
    is_signal = any(advantages) if advantages is not None else max(rewards) != min(rewards)
    if is_signal and any(part != parts[0] for part in parts):
        return ""
    if all(m.rollout.answer is None for m in group.members):
        return "no signal: no member has an answer"
    if max(rewards) != min(rewards):
        return "no signal: rewards differ, and the estimator makes nothing of it"
    if rewards[0] <= 0:
        return "no signal: every member earns nothing"
    return f"no signal: every member earns {rewards[0]:.3g}"
