"""Numbers about groups for the log, so that "the reward does not move" has a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

from rft.types import Group


def describe(groups: Sequence[Group], *, guided: bool = False) -> dict[str, list[float]]:
    """Per-group and per-rollout values by metric name; the caller averages them over ranks.

    Rollouts in which the annotation wrote anything, hints included, are left out of rewards, lengths and stops: these
    describe the policy. With `guided` they have curves of their own: seats per group, reward, tokens. Where any rollout looked
    again or was refused a look: turns, refusals, and visual tokens of every rollout.
    """
    looks = any(len(m.rollout.turns) > 1 or m.rollout.refused for g in groups for m in g.members)
    values: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        values.setdefault(name, []).append(float(value))

    for group in groups:
        members = [m for m in group.members if not m.rollout.is_reference]
        if guided:
            add("reference/seats", len(group.members) - len(members))
            for member in (m for m in group.members if m.rollout.is_reference):
                add("reference/reward", member.reward)
                add("reference/tokens", member.rollout.num_tokens)
        add("muted", bool(group.muted))
        if not members:
            continue
        rewards = [m.reward for m in members]
        add("reward", fmean(rewards))
        add("reward_std", pstdev(rewards))
        for member in members:
            add("completion_tokens", member.rollout.num_tokens)
            add("truncated", member.rollout.stop == "length")
            add("answered", member.rollout.answer is not None)
            if looks:
                add("turns", len(member.rollout.turns))
                add("refused", len(member.rollout.refused))
                add("visual_tokens", sum(v.tokens for v in member.rollout.views))
            for name, part in member.parts.items():
                add(f"reward/{name}/coverage", part is not None)
                if part is not None:
                    add(f"reward/{name}", part)
    return values


def shares(sums: Mapping[str, float]) -> dict[str, float]:
    """The sums of a whole step for the log: `reference/gradient_share` in [0, 1] in place of the two pulls of the loss.

    It is the part of sum |d loss / d log p|, over all tokens of the step, that falls on what the annotation wrote; not a
    share of the gradient's norm, in which tokens may cancel.
    """
    out = {name: value for name, value in sums.items() if name not in ("pull", "reference/pull")}
    if sums.get("pull"):
        out["reference/gradient_share"] = sums["reference/pull"] / sums["pull"]
    return out
