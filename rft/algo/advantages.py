"""Reward -> advantage, one group at a time. Shapes: `G` members of a group.

Every estimator is `f(rewards_G, is_reference_G, **params) -> advantages_G`, where `is_reference_G` marks the members whose
answer the annotation wrote. What the estimator compares being all equal teaches nothing: exactly 0, before any division.

Equations are those of TempSamp-R1 (arXiv:2509.18056v2), which puts the annotation into the group. `std` and `eps` matter
there: shaping leaves late groups with a spread of 1e-3 or less. `cap` keeps |A| below a bound, after everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Estimator = Callable[..., Tensor]


def grpo(
    rewards_G: Tensor,
    is_reference_G: Tensor,
    *,
    std: str = "sample",
    eps: float = 1e-4,
    batch_std: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """A = (r - mean) / (std + eps), over all members. Shao et al. 2024 (arXiv:2402.03300), section 4.1.

    With the annotation among the members this is Eq. 2 of TempSamp-R1, its "mixed" strategy.

    `std`: "sample" divides by G - 1, "population" by G, "batch" uses `batch_std` (one value for the whole generation
    batch, from the caller), "none" leaves the centred rewards (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).

    Raises:
        ValueError: `std` is unknown, "batch" comes without `batch_std`, or `cap` is not above 0.
    """
    rewards_G = _floats(rewards_G)
    divisor = _divisor(rewards_G, std, eps, batch_std)
    if _tied(rewards_G):
        return torch.zeros_like(rewards_G)
    return _capped((rewards_G - rewards_G.mean()) / divisor, cap)


def leave_one_out(rewards_G: Tensor, is_reference_G: Tensor, *, cap: float | None = None) -> Tensor:
    """A_i = r_i - mean of the others. RLOO, Ahmadian et al. 2024 (arXiv:2402.14740)."""
    rewards_G = _floats(rewards_G)
    if _tied(rewards_G):
        return torch.zeros_like(rewards_G)
    num = rewards_G.numel()
    return _capped((rewards_G - rewards_G.mean()) * num / (num - 1), cap)


def downscale(
    rewards_G: Tensor,
    is_reference_G: Tensor,
    *,
    factor: float = 0.8,
    max_reward: float = 1.0,
    accuracy_G: Tensor | None = None,
    weight_G: Tensor | None = None,
    std: str = "sample",
    eps: float = 1e-4,
    batch_std: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """The annotation counts as `factor` x `max_reward`, then GRPO over all members (section 3.2 of TempSamp-R1).

    Members of the policy that do better than that outrank the annotation, which is then pushed down: in a group in which
    everyone is perfect it gets -1.5 at G = 4. `accuracy_G`, `weight_G`: see `rescored`.
    """
    values_G = downscaled(
        rewards_G, is_reference_G, factor=factor, max_reward=max_reward, accuracy_G=accuracy_G, weight_G=weight_G
    )
    return grpo(values_G, is_reference_G, std=std, eps=eps, batch_std=batch_std, cap=cap)


def anchor(
    rewards_G: Tensor,
    is_reference_G: Tensor,
    *,
    scale: float = 1.2,
    floor: float | None = None,
    std: str = "sample",
    eps: float = 1e-4,
    batch_std: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """GRPO among the policy's members; the annotation gets `scale` x the largest of their advantages (Eq. 3).

    Where the policy's members tie, that is 0: silence in the very groups in which nothing works, unless `floor` keeps the
    annotation's advantage above itself. Advantages do not sum to 0.
    """
    rewards_G = _floats(rewards_G)
    policy_G = ~_mask(is_reference_G)
    if policy_G.all() or not policy_G.any() or _tied(rewards_G):
        return grpo(rewards_G, is_reference_G, std=std, eps=eps, batch_std=batch_std, cap=cap)
    policy = grpo(rewards_G[policy_G], is_reference_G, std=std, eps=eps, batch_std=batch_std)
    best = scale * policy.max()
    advantages_G = torch.empty_like(rewards_G)
    advantages_G[policy_G] = policy
    advantages_G[~policy_G] = best if floor is None else best.clamp(min=floor)
    return _capped(advantages_G, cap)


def nonlinear(
    rewards_G: Tensor,
    is_reference_G: Tensor,
    *,
    tau: float = 0.8,
    alpha1: float = 0.01,
    alpha2: float = 1.0,
    shape_groups: str = "all",
    accuracy_G: Tensor | None = None,
    weight_G: Tensor | None = None,
    std: str = "sample",
    eps: float = 1e-4,
    batch_std: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """Every reward goes through `shape` (Eq. 4), then GRPO over all members: the default of TempSamp-R1.

    `shape_groups`: "all" (the paper), or "guided": a group without the annotation is plain GRPO. Shaping cannot repair a
    group in which the policy's members tie: with a standard deviation of the group the annotation gets (G - 1) / sqrt(G)
    and the others -1 / sqrt(G), however small the gap. What does: a gate, `std` "none" or "batch", a `cap`.
    `accuracy_G`, `weight_G`: see `rescored`.

    Raises:
        ValueError: `shape_groups` is unknown, `alpha1` is below 0, or what `grpo` raises.
    """
    values_G = shaped(
        rewards_G,
        is_reference_G,
        tau=tau,
        alpha1=alpha1,
        alpha2=alpha2,
        shape_groups=shape_groups,
        accuracy_G=accuracy_G,
        weight_G=weight_G,
    )
    return grpo(values_G, is_reference_G, std=std, eps=eps, batch_std=batch_std, cap=cap)


def policy_stats(
    rewards_G: Tensor,
    is_reference_G: Tensor,
    *,
    std: str = "sample",
    eps: float = 1e-4,
    batch_std: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """Mean and spread of the policy's members, for everyone: LUFFY's code (arXiv:2504.14945). A tie divides by 1."""
    rewards_G = _floats(rewards_G)
    policy = rewards_G[~_mask(is_reference_G)]
    if not len(policy) or len(policy) == len(rewards_G) or _tied(rewards_G):
        return grpo(rewards_G, is_reference_G, std=std, eps=eps, batch_std=batch_std, cap=cap)
    divisor = 1.0 if _tied(policy) else _divisor(policy, std, eps, batch_std)
    return _capped((rewards_G - policy.mean()) / divisor, cap)


def shape(reward: float, tau: float = 0.8, alpha1: float = 0.01, alpha2: float = 1.0) -> float:
    """Eq. 4: flat above `tau` (slope about alpha1), steep below; increasing, continuous at tau, where it is tau.

    From tau on: tau + alpha1 ln(r - tau + 1). Below: tau - (e^(alpha2 (tau - r)) - 1) / (e^alpha2 - 1), which is r itself
    as alpha2 goes to 0.
    """
    if alpha1 < 0:
        raise ValueError(f"alpha1 must be 0 or more, got {alpha1}: a better answer would earn less")
    if reward >= tau:
        return tau + alpha1 * math.log(reward - tau + 1)
    if alpha2 == 0:
        return float(reward)
    return tau - math.expm1(alpha2 * (tau - reward)) / math.expm1(alpha2)


def shaped(
    rewards_G: Tensor,
    is_reference_G: Tensor,
    *,
    tau: float = 0.8,
    alpha1: float = 0.01,
    alpha2: float = 1.0,
    shape_groups: str = "all",
    accuracy_G: Tensor | None = None,
    weight_G: Tensor | None = None,
    **_: object,
) -> Tensor:
    """What `nonlinear` compares."""
    if shape_groups not in ("all", "guided"):
        raise ValueError(f"shape_groups must be all or guided, got {shape_groups!r}")
    rewards_G = _floats(rewards_G)
    if shape_groups == "guided" and not _mask(is_reference_G).any():
        return rewards_G
    plain_G = rewards_G if accuracy_G is None else _floats(accuracy_G)
    # one by one: equal rewards stay equal to the last bit, which lanes of a vectorised exp do not promise
    new_G = torch.tensor([shape(r, tau, alpha1, alpha2) for r in plain_G.tolist()], dtype=torch.float64)
    return rescored(rewards_G, new_G, accuracy_G, weight_G)


def downscaled(
    rewards_G: Tensor,
    is_reference_G: Tensor,
    *,
    factor: float = 0.8,
    max_reward: float = 1.0,
    accuracy_G: Tensor | None = None,
    weight_G: Tensor | None = None,
    **_: object,
) -> Tensor:
    """What `downscale` compares."""
    rewards_G = _floats(rewards_G)
    plain_G = rewards_G if accuracy_G is None else _floats(accuracy_G)
    new_G = plain_G.masked_fill(_mask(is_reference_G), factor * max_reward)
    return rescored(rewards_G, new_G, accuracy_G, weight_G)


def rescored(rewards_G: Tensor, new_G: Tensor, accuracy_G: Tensor | None, weight_G: Tensor | None) -> Tensor:
    """Total rewards in which `new_G` takes the place of the part that was reshaped.

    Without `accuracy_G` that part is everything. With it, the total holds `weight_G` (1 where None) x `accuracy_G`, and
    the rest, a format reward, say, stays as it is; a member whose accuracy does not change keeps its total to the last bit.
    """
    if accuracy_G is None:
        return new_G.to(rewards_G.dtype)
    change_G = new_G - _floats(accuracy_G)
    return (rewards_G + (change_G if weight_G is None else weight_G * change_G)).to(rewards_G.dtype)


SHAPERS: dict[Estimator, Callable[..., Tensor]] = {downscale: downscaled, nonlinear: shaped}
HANDED = ("accuracy_G", "weight_G", "batch_std")  # parameters that come from the step, never from a recipe


def compared(estimator: Estimator, rewards_G: Tensor, is_reference_G: Tensor, **params: object) -> Tensor:
    """The values whose spread over a batch is the estimator's `batch_std`: reshaped, or the policy's alone."""
    if estimator in SHAPERS:
        return SHAPERS[estimator](rewards_G, is_reference_G, **params)
    rewards_G, is_reference_G = _floats(rewards_G), _mask(is_reference_G)
    return rewards_G[~is_reference_G] if estimator in (anchor, policy_stats) else rewards_G


def _divisor(rewards_G: Tensor, std: str, eps: float, batch_std: float | None) -> Tensor | float:
    if std not in ("sample", "population", "batch", "none"):
        raise ValueError(f"std must be sample, population, batch or none, got {std!r}")
    if std == "none":
        return 1.0
    if std == "batch":
        if batch_std is None:
            raise ValueError("std='batch' needs batch_std, the standard deviation over the whole batch")
        return batch_std + eps
    if rewards_G.numel() < 2:
        return 1.0
    return rewards_G.std(correction=1 if std == "sample" else 0) + eps


def _capped(advantages_G: Tensor, cap: float | None) -> Tensor:
    if cap is None:
        return advantages_G
    if not cap > 0:
        raise ValueError(f"cap must be above 0, got {cap}")
    return advantages_G.clamp(-cap, cap)


def _floats(rewards_G: Tensor) -> Tensor:
    """Rewards of 0 and 1 may come as integers or a list; a mean needs floats."""
    rewards_G = torch.as_tensor(rewards_G)
    return rewards_G if rewards_G.is_floating_point() else rewards_G.double()


def _mask(is_reference_G: Tensor) -> Tensor:
    return torch.as_tensor(is_reference_G, dtype=torch.bool)


def _tied(rewards_G: Tensor) -> bool:
    return bool(rewards_G.max() == rewards_G.min())
