"""Who earned it, token by token: a group becomes examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rft.algo import advantages as estimators
from rft.types import AUTHOR_CODES, Example, Group, Rollout, Scored

Estimator = Callable[..., Tensor]
Accuracy = Mapping[str, float]  # weight by name, of the rewards that say how right an answer is
Per = Literal["rollout", "turn"]


def credit(
    group: Group,
    estimator: Estimator | None,
    *,
    accuracy: Accuracy | None = None,
    per: Per = "rollout",
    mask_truncated: bool = False,
    mask_over_turns: bool = False,
    **params: object,
) -> tuple[Example, ...]:
    """The examples of each member, in order: one, or one per prompt where the world asked anew.

    Every trained token of a member carries the member's advantage; with `per="turn"` that of its turn, where what each
    member's first turn was worth is compared with the other first turns, and so on. A turn that one member alone had has
    advantage 0.

    `estimator` None is supervised training: advantages are 0 and the objective does not look at them. Estimators that
    reshape rewards reshape the part that `accuracy` names and leave the rest, a format reward, say, as it is; with None
    they reshape the total. With `mask_truncated` a rollout that was cut at the limit keeps its place in the group's
    statistics and has weight 0; with `mask_over_turns` so does one that the budget stopped before it answered.
    """
    given = [[0.0] * len(m.rollout.turns) for m in group.members]
    if estimator is not None and not group.muted:
        given = turn_advantages(group, estimator, accuracy=accuracy, per=per, **params)
    left_out = {stop for stop, is_masked in (("length", mask_truncated), ("turns", mask_over_turns)) if is_masked}
    return tuple(
        one
        for m, turns in zip(group.members, given, strict=True)
        for one in examples(m.rollout, turns, weight=0.0 if m.rollout.stop in left_out else 1.0)
    )


def by_rollout(found: Sequence[Example]) -> list[tuple[Example, ...]]:
    """Examples of the same rollout together, in order."""
    rollouts: list[tuple[Example, ...]] = []
    for one in found:
        if one.continues:
            rollouts[-1] += (one,)
        else:
            rollouts.append((one,))
    return rollouts


def turn_advantages(
    group: Group, estimator: Estimator, *, accuracy: Accuracy | None = None, per: Per = "rollout", **params: object
) -> list[list[float]]:
    """The advantage of each turn of each member; the arguments are those of `credit`."""
    lengths = [len(m.rollout.turns) for m in group.members]
    if per == "rollout":
        return [[a] * n for a, n in zip(advantages(group, estimator, accuracy=accuracy, **params), lengths, strict=True)]
    given: list[list[float]] = [[] for _ in lengths]
    for turn in range(max(lengths, default=0)):
        there = [i for i, n in enumerate(lengths) if n > turn]
        members = [group.members[i] for i in there]
        told = replace(group, members=tuple(replace(m, reward=m.turns[turn] if m.turns else m.reward) for m in members))
        worth = advantages(told, estimator, accuracy=accuracy, **params) if len(there) > 1 else [0.0]
        for i, a in zip(there, worth, strict=True):
            given[i].append(a)
    return given


def advantages(group: Group, estimator: Estimator, *, accuracy: Accuracy | None = None, **params: object) -> list[float]:
    """What the estimator gives each member, in order; the arguments are those of `credit`."""
    return estimator(*_earned(group), **_part(group, estimator, accuracy), **params).tolist()


def compared(group: Group, estimator: Estimator, *, accuracy: Accuracy | None = None, **params: object) -> list[float]:
    """What the estimator compares in this group, after reshaping; the arguments are those of `credit`. For `batch_std`."""
    return estimators.compared(estimator, *_earned(group), **_part(group, estimator, accuracy), **params).tolist()


def accuracy_of(member: Scored, accuracy: Accuracy | None) -> tuple[float, float]:
    """(value, weight): the weighted mean of the accuracy rewards that apply to a member, and the sum of their weights.

    The member's reward holds value x weight; both are 0 where none applies. With None the whole reward counts.
    """
    if accuracy is None:
        return member.reward, 1.0
    said = [(weight, value) for name, weight in accuracy.items() if (value := member.parts.get(name)) is not None]
    total = sum(weight for weight, _ in said)
    return (sum(weight * value for weight, value in said) / total if total else 0.0), total


def is_annotation(rollout: Rollout) -> bool:
    """True when the annotation wrote the answer; a rollout that the policy finished, after a hint, is its own."""
    return next((s.author for s in reversed(rollout.segments) if s.author != "world"), "world") == "reference"


def examples(rollout: Rollout, advantages: Sequence[float], *, weight: float = 1.0) -> tuple[Example, ...]:
    """A rollout as columns, once per prompt: the advantage of its turn where someone is trained, 0 where the world wrote."""
    found: list[Example] = []
    turn, was_world = -1, True
    for segments in rollout.contexts:
        ids, authors, sampler, given = [], [], [], []
        for segment in segments:
            is_world = segment.author == "world"
            turn, was_world = turn + (was_world and not is_world), is_world
            ids.extend(segment.ids)
            authors.extend([AUTHOR_CODES[segment.author]] * len(segment.ids))
            sampler.extend(segment.logprobs if segment.logprobs is not None else [float("nan")] * len(segment.ids))
            given.extend([0.0 if is_world else advantages[turn]] * len(segment.ids))
        found.append(
            Example(
                sample_id=rollout.sample_id,
                ids_T=np.asarray(ids, dtype=np.int64),
                authors_T=np.asarray(authors, dtype=np.int8),
                advantages_T=np.asarray(given, dtype=np.float32),
                sampler_T=np.asarray(sampler, dtype=np.float32),
                views=tuple(v for s in segments for v in s.views),
                weight=weight,
                continues=bool(found),
            )
        )
    return tuple(found)


def batch_std(values: Sequence[Sequence[float]]) -> float:
    """Sample standard deviation over what all groups of all ranks compare; 0 for fewer than two values."""
    flat = torch.tensor([value for group in values for value in group], dtype=torch.float64)
    return float(flat.std()) if flat.numel() > 1 else 0.0


def _earned(group: Group) -> tuple[Tensor, Tensor]:
    """`rewards_G` and `is_reference_G`."""
    rewards_G = torch.tensor([m.reward for m in group.members], dtype=torch.float64)
    return rewards_G, torch.tensor([is_annotation(m.rollout) for m in group.members])


def _part(group: Group, estimator: Estimator, accuracy: Accuracy | None) -> dict[str, Tensor]:
    """The part of the rewards that the estimator reshapes, where it is not the whole."""
    if accuracy is None or estimator not in estimators.SHAPERS:
        return {}
    pairs_G2 = torch.tensor([accuracy_of(m, accuracy) for m in group.members], dtype=torch.float64)
    return {"accuracy_G": pairs_G2[:, 0], "weight_G": pairs_G2[:, 1]}
