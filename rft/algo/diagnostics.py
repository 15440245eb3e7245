"""Numbers about groups for the log, so that "the reward does not move" has a reason."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev

from rft.types import Group


def describe(groups: Sequence[Group]) -> dict[str, list[float]]:
    """Per-group and per-rollout values by metric name; the caller averages them over ranks.

    Reference rows are left out of rewards, lengths and stops: these describe the policy.
    """
    values: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        values.setdefault(name, []).append(float(value))

    for group in groups:
        members = [m for m in group.members if not m.rollout.is_reference]
        if not members:
            continue
        rewards = [m.reward for m in members]
        add("reward", fmean(rewards))
        add("reward_std", pstdev(rewards))
        add("muted", bool(group.muted))
        for member in members:
            add("completion_tokens", member.rollout.num_tokens)
            add("truncated", member.rollout.stop == "length")
            add("answered", member.rollout.answer is not None)
            for name, part in member.parts.items():
                add(f"reward/{name}/coverage", part is not None)
                if part is not None:
                    add(f"reward/{name}", part)
    return values
