"""Who earned it, token by token: a group becomes examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rft.algo import advantages as estimators
from rft.types import AUTHOR_CODES, WORLD, Example, Group, Rollout, Scored

Estimator = Callable[..., Tensor]
Accuracy = Mapping[str, float]  # weight by name, of the rewards that say how right an answer is


def credit(
    group: Group,
    estimator: Estimator | None,
    *,
    accuracy: Accuracy | None = None,
    mask_truncated: bool = False,
    **params: object,
) -> tuple[Example, ...]:
    """One example per member, in order; every trained token of a member carries the member's advantage.

    `estimator` None is supervised training: advantages are 0 and the objective does not look at them. Estimators that
    reshape rewards reshape the part that `accuracy` names and leave the rest, a format reward, say, as it is; with None
    they reshape the total. With `mask_truncated` a rollout that was cut at the limit keeps its place in the group's
    statistics and has weight 0.
    """
    given = [0.0] * len(group.members)
    if estimator is not None and not group.muted:
        given = advantages(group, estimator, accuracy=accuracy, **params)
    return tuple(
        example(m.rollout, a, weight=0.0 if mask_truncated and m.rollout.stop == "length" else 1.0)
        for m, a in zip(group.members, given, strict=True)
    )


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


def example(rollout: Rollout, advantage: float, *, weight: float = 1.0) -> Example:
    """A rollout as columns: `advantage` where someone is trained, 0 on what the world wrote."""
    ids, authors, sampler = [], [], []
    for segment in rollout.segments:
        ids.extend(segment.ids)
        authors.extend([AUTHOR_CODES[segment.author]] * len(segment.ids))
        sampler.extend(segment.logprobs if segment.logprobs is not None else [float("nan")] * len(segment.ids))
    authors_T = np.asarray(authors, dtype=np.int8)
    return Example(
        sample_id=rollout.sample_id,
        ids_T=np.asarray(ids, dtype=np.int64),
        authors_T=authors_T,
        advantages_T=np.where(authors_T == WORLD, 0.0, advantage).astype(np.float32),
        sampler_T=np.asarray(sampler, dtype=np.float32),
        views=rollout.views,
        weight=weight,
    )


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
