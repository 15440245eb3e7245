"""Token log-probs -> loss. Shapes: `N` trained tokens of all rows of a forward, flat; `R` rows.

A loss is a sum over tokens of (token loss) x (token weight). The weight holds the aggregation, normalised over the whole
optimizer step (all micro-steps and ranks), so that 4 micro-steps of 1 group equal 1 micro-step of 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rft.errors import RftError


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What a loss sees of one forward. `old_N` and `ref_N` carry no gradient; None means "nobody needed it"."""

    logprobs_N: Tensor
    advantages_N: Tensor
    row_N: Tensor  # int64, 0..R-1
    weight_R: Tensor  # 1, or 0 for a row that is left out of the loss (truncated)
    old_N: Tensor | None = None
    ref_N: Tensor | None = None
    sampler_N: Tensor | None = None  # the sampler's, for a capped correction; NaN where nobody sampled
    is_reference_N: Tensor | None = None  # bool: the annotation wrote it; None is nowhere, or nobody tells them apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Normaliser:
    """Sizes of the whole optimizer step, over all ranks."""

    rows: float  # rows, the left-out and muted ones included
    tokens: float  # trained tokens of rows that are not left out
    seen: float  # those of them that a forward runs over; silent groups may be spared
    forwards: float  # micro-steps x ranks; only `bnpo` looks at it
    max_tokens: int  # completion limit, of all turns together; only `dr_grpo` looks at it
    reference: float = 0.0  # those of `seen` that the annotation wrote


@dataclass(frozen=True, slots=True, kw_only=True)
class KL:
    """Penalty towards the reference model. Estimators: Schulman, "Approximating KL divergence" (2020).

    k3 is added to the loss. The gradient of k1 as a loss term has expectation 0, so k1 is taken off the advantage.
    The reference is the model that the phase started from, or (`run`) the one that the run did.
    """

    weight: float = 0.0
    estimator: Literal["k1", "k3"] = "k3"
    reference: Literal["phase", "run"] = "phase"


@dataclass(frozen=True, slots=True, kw_only=True)
class OffPolicy:
    """How tokens that the annotation wrote are weighed: nobody knows the probability with which it was written.

    ratio   what w is, with p the token's probability now.
            `one`            w = p / sg[p]: 1 in value, A in gradient, at every update (TempSamp-R1)
            `recomputed`     w = p / p_old, as for the policy's own tokens; p_old is the model's at rollout time
            `behaviour_one`  w = p, which starves rare tokens
            `luffy`          w = p / (p + gamma), A gamma p / (p + gamma)^2 in gradient (LUFFY, arXiv:2504.14945)
    clip    whether `recomputed` is clipped as the policy's ratio is; rare tokens rise fastest and would be cut off first.
    kl      whether these tokens are held to the reference model too.
    """

    ratio: Literal["one", "recomputed", "behaviour_one", "luffy"] = "one"
    clip: bool = False
    kl: bool = True
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.clip and self.ratio != "recomputed":
            raise RftError("off-policy ratio", f"{self.ratio!r} has no clip", "leave clip out, or use ratio: recomputed")
        if not self.gamma > 0:
            raise RftError("off-policy ratio", f"gamma={self.gamma:g} is not above 0", "use 0.1")

    def base(self, logprobs_N: Tensor, old_N: Tensor) -> Tensor:
        """The log-probs that log p is compared with, without gradient."""
        if self.ratio == "one":
            return logprobs_N.detach()
        return old_N if self.ratio == "recomputed" else torch.zeros_like(old_N)

    def bend(self, ratio_N: Tensor) -> tuple[Tensor, Tensor]:
        """w, and d w / d log p without gradient, from exp(log p - base)."""
        if self.ratio != "luffy":
            return ratio_N, ratio_N.detach()
        bent_N = ratio_N / (ratio_N + self.gamma)
        return bent_N, (bent_N * (1 - bent_N)).detach()


def nll(columns: Columns, normaliser: Normaliser, **_: object) -> tuple[Tensor, dict[str, Tensor]]:
    """Supervised loss: mean of -log p over the trained tokens of the step."""
    weights_N = token_weights(columns, normaliser, "dapo")
    loss = -(columns.logprobs_N * weights_N).sum()
    return loss, {"nll": loss.detach()}


def surrogate(
    columns: Columns,
    normaliser: Normaliser,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl: KL | None = None,
    aggregation: str = "grpo",
    ratio: str = "token",
    importance_cap: float = 0.0,
    off_policy: OffPolicy | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped importance-weighted policy loss, minimised.

    token loss = -min(w A, clip(w, 1 - low, 1 + high) A), with w = exp(log p - log p_old). Without `old_N` the step is on
    policy: w = exp(log p - sg[log p]), 1 in value and d log p in gradient. `ratio="sequence"` uses the row's geometric
    mean of w for all its tokens (GSPO, Zheng et al. 2025, arXiv:2507.18071). With `importance_cap` the token loss is
    weighted by min(p_old / p_sampler, cap): the sampler may round differently from the forward that is trained (truncated
    importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").

    Tokens of `is_reference_N` have the w of `off_policy` (by default 1), no clip unless it says so, and no sampler to be
    corrected for. A sequence ratio is then taken over each author's tokens of the row apart.

    Returns the loss and detached numbers for the log, which add up over the forwards of the step. Means over the tokens
    that the policy wrote: `clipped`, `ratio`, `kl`, `correction`. Where the annotation wrote any, means over those:
    `reference/logprob`, `reference/ratio`; and two sums that `diagnostics.shares` divides: `pull` over all tokens, of
    |d loss / d log p| as far as the advantage makes it (no k3), and `reference/pull`, the annotation's part of it.
    """
    kl, off_policy = kl or KL(), off_policy or OffPolicy()
    logprobs_N, ref_N, is_reference_N = columns.logprobs_N, columns.ref_N, columns.is_reference_N
    old_N = logprobs_N.detach() if columns.old_N is None else columns.old_N
    base_N = old_N
    if is_reference_N is not None:
        base_N = torch.where(is_reference_N, off_policy.base(logprobs_N, old_N), old_N)
        if ref_N is not None and not off_policy.kl:  # as if the reference model agreed: no value, no gradient
            ref_N = torch.where(is_reference_N, logprobs_N.detach(), ref_N)
    log_ratio_N = logprobs_N - base_N
    if ratio == "sequence":
        log_ratio_N = _author_mean(log_ratio_N, columns)
    ratio_N = log_ratio_N.exp()
    slope_N, clipped_N = ratio_N.detach(), ratio_N.clamp(1 - clip_low, 1 + clip_high)
    if is_reference_N is not None:
        bent_N, bent_slope_N = off_policy.bend(ratio_N)
        clipped_N = torch.where(is_reference_N, clipped_N if off_policy.clip else bent_N, clipped_N)
        ratio_N, slope_N = torch.where(is_reference_N, bent_N, ratio_N), torch.where(is_reference_N, bent_slope_N, slope_N)
    weights_N = token_weights(columns, normaliser, aggregation)
    share_N = policy_share(columns, normaliser)  # what is logged means the same under every aggregation
    advantages_N = columns.advantages_N
    metrics: dict[str, Tensor] = {}
    if kl.weight and kl.estimator == "k1":
        k1_N = (logprobs_N - ref_N).detach()
        advantages_N = advantages_N - kl.weight * k1_N
        metrics["kl"] = (k1_N * share_N).sum()
    unclipped_loss_N, clipped_loss_N = -ratio_N * advantages_N, -clipped_N * advantages_N
    token_loss_N = torch.maximum(unclipped_loss_N, clipped_loss_N)
    is_clipped_N = clipped_loss_N > unclipped_loss_N
    pull_N = (slope_N * advantages_N).abs() * ~is_clipped_N * weights_N
    if importance_cap:
        correction_N = (old_N.detach() - columns.sampler_N).exp().clamp(max=importance_cap).nan_to_num(nan=1.0)
        token_loss_N, pull_N = token_loss_N * correction_N, pull_N * correction_N
        metrics["correction"] = (correction_N * share_N).sum()
    if kl.weight and kl.estimator == "k3":
        k3_N = k3(logprobs_N, ref_N)
        token_loss_N = token_loss_N + kl.weight * k3_N
        metrics["kl"] = (k3_N.detach() * share_N).sum()
    metrics["clipped"] = (is_clipped_N.float() * share_N).sum().detach()
    metrics["ratio"] = (ratio_N.detach() * share_N).sum()
    if is_reference_N is not None and normaliser.reference:
        theirs_N = columns.weight_R[columns.row_N] * is_reference_N / normaliser.reference
        metrics["reference/logprob"] = (logprobs_N.detach() * theirs_N).sum()
        metrics["reference/ratio"] = (ratio_N.detach() * theirs_N).sum()
        metrics["pull"] = pull_N.sum()
        metrics["reference/pull"] = (pull_N * is_reference_N).sum()
    return (token_loss_N * weights_N).sum(), metrics


def policy_share(columns: Columns, normaliser: Normaliser) -> Tensor:
    """[N] the weight of each token in a mean over what the policy wrote; over the step they sum to 1.

    Without `is_reference_N` it is a mean over all trained tokens.
    """
    kept_N = columns.weight_R[columns.row_N]
    if columns.is_reference_N is None:
        return kept_N / max(normaliser.seen, 1.0)
    return kept_N * ~columns.is_reference_N / max(normaliser.seen - normaliser.reference, 1.0)


def k3(logprobs_N: Tensor, ref_N: Tensor) -> Tensor:
    """exp(ref - p) - (ref - p) - 1 >= 0, per token; unbiased for KL(p || ref) under samples of p."""
    difference_N = ref_N - logprobs_N
    return difference_N.exp() - difference_N - 1


def token_weights(columns: Columns, normaliser: Normaliser, aggregation: str) -> Tensor:
    """The share of each token in the step's loss; over the whole step they sum to 1, but for `dr_grpo`.

    grpo      mean over rows of the row's token mean (arXiv:2402.03300)
    dapo      mean over all tokens of the step (DAPO, arXiv:2503.14476)
    bnpo      mean over the tokens of each forward, then over forwards; depends on the micro-batch by definition
    dr_grpo   sum over tokens / (rows x completion limit) (arXiv:2503.20783)
    """
    kept_N = columns.weight_R[columns.row_N]
    if aggregation == "grpo":
        return kept_N / (row_lengths(columns)[columns.row_N] * normaliser.rows)
    if aggregation == "dapo":
        return kept_N / max(normaliser.tokens, 1.0)
    if aggregation == "bnpo":
        return kept_N / (kept_N.sum().clamp(min=1.0) * normaliser.forwards)
    if aggregation == "dr_grpo":
        return kept_N / (normaliser.rows * normaliser.max_tokens)
    raise ValueError(f"unknown aggregation {aggregation!r}")


def row_lengths(columns: Columns) -> Tensor:
    """[R] trained tokens per row, at least 1."""
    zeros_R = torch.zeros_like(columns.weight_R)
    return zeros_R.index_add(0, columns.row_N, torch.ones_like(columns.logprobs_N.detach())).clamp(min=1.0)


def row_mean(values_N: Tensor, columns: Columns) -> Tensor:
    """[R] mean over each row's trained tokens."""
    sums_R = torch.zeros_like(columns.weight_R).index_add(0, columns.row_N, values_N)
    return sums_R / row_lengths(columns)


def _author_mean(values_N: Tensor, columns: Columns) -> Tensor:
    """[N] mean over the tokens that the same author wrote in the row."""
    if columns.is_reference_N is None:
        return row_mean(values_N, columns)[columns.row_N]
    part_N = 2 * columns.row_N + columns.is_reference_N
    parts = replace(columns, row_N=part_N, weight_R=columns.weight_R.repeat_interleave(2))
    return row_mean(values_N, parts)[part_N]


Objective = Callable[..., tuple[Tensor, dict[str, Tensor]]]

OBJECTIVES: dict[str, Objective] = {
    "nll": nll,
    "grpo": partial(surrogate, aggregation="grpo"),
    "dapo": partial(surrogate, aggregation="dapo"),
    "dr_grpo": partial(surrogate, aggregation="dr_grpo"),
    "bnpo": partial(surrogate, aggregation="bnpo"),
    "gspo": partial(surrogate, aggregation="grpo", ratio="sequence"),
}
