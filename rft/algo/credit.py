"""Who earned it, token by token: a group becomes examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rft.types import AUTHOR_CODES, WORLD, Example, Group, Rollout

Estimator = Callable[..., torch.Tensor]


def credit(group: Group, estimator: Estimator | None, *, mask_truncated: bool = False, **params: object) -> tuple[Example, ...]:
    """One example per member, in order; every trained token of a member carries the member's advantage.

    `estimator` None is supervised training: advantages are 0 and the objective does not look at them. With
    `mask_truncated` a rollout that was cut at the limit keeps its place in the group's statistics and has weight 0.
    """
    advantages = [0.0] * len(group.members)
    if estimator is not None and not group.muted:
        rewards_G = torch.tensor([m.reward for m in group.members], dtype=torch.float64)
        is_reference_G = torch.tensor([m.rollout.is_reference for m in group.members])
        advantages = estimator(rewards_G, is_reference_G, **params).tolist()
    return tuple(
        example(m.rollout, a, weight=0.0 if mask_truncated and m.rollout.stop == "length" else 1.0)
        for m, a in zip(group.members, advantages, strict=True)
    )


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


def batch_std(rewards: Sequence[Sequence[float]]) -> float:
    """Sample standard deviation over the rewards of all groups; 0 for fewer than two."""
    flat = torch.tensor([r for group in rewards for r in group], dtype=torch.float64)
    return float(flat.std()) if flat.numel() > 1 else 0.0
