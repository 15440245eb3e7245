"""Reward -> advantage, one group at a time. Shapes: `G` members of a group.

Every estimator is `f(rewards_G, is_reference_G, **params) -> advantages_G`. A group whose rewards are all equal teaches
nothing and gets exactly 0, before any division.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grpo(
    rewards_G: Tensor,
    is_reference_G: Tensor,
    *,
    std: str = "sample",
    eps: float = 1e-4,
    batch_std: float | None = None,
) -> Tensor:
    """A = (r - mean) / (std + eps), over all members. Shao et al. 2024 (arXiv:2402.03300), section 4.1.

    `std`: "sample" divides by G - 1, "population" by G, "batch" uses `batch_std` (one value for the whole generation
    batch, from the caller), "none" leaves the centred rewards (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).

    Raises:
        ValueError: `std` is unknown, or "batch" without `batch_std`.
    """
    if std not in ("sample", "population", "batch", "none"):
        raise ValueError(f"std must be sample, population, batch or none, got {std!r}")
    if std == "batch" and batch_std is None:
        raise ValueError("std='batch' needs batch_std, the standard deviation over the whole batch")
    rewards_G = _floats(rewards_G)
    if _tied(rewards_G):
        return torch.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    if std == "none":
        return centred_G
    scale = batch_std if std == "batch" else rewards_G.std(correction=1 if std == "sample" else 0)
    return centred_G / (scale + eps)


def leave_one_out(rewards_G: Tensor, is_reference_G: Tensor) -> Tensor:
    """A_i = r_i - mean of the others. RLOO, Ahmadian et al. 2024 (arXiv:2402.14740)."""
    rewards_G = _floats(rewards_G)
    if _tied(rewards_G):
        return torch.zeros_like(rewards_G)
    num = rewards_G.numel()
    return (rewards_G - rewards_G.mean()) * num / (num - 1)


def _floats(rewards_G: Tensor) -> Tensor:
    """Rewards of 0 and 1 may come as integers or a list; a mean needs floats."""
    rewards_G = torch.as_tensor(rewards_G)
    return rewards_G if rewards_G.is_floating_point() else rewards_G.double()


def _tied(rewards_G: Tensor) -> bool:
    return bool(rewards_G.max() == rewards_G.min())
