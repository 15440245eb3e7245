"""Token log-probs -> loss. Shapes: `N` trained tokens of all rows of a forward, flat; `R` rows.

A loss is a sum over tokens of (token loss) x (token weight). The weight holds the aggregation, normalised over the whole
optimizer step (all micro-steps and ranks), so that 4 micro-steps of 1 group equal 1 micro-step of 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Normaliser:
    """Sizes of the whole optimizer step, over all ranks."""

    rows: float  # rows, the left-out and muted ones included
    tokens: float  # trained tokens of rows that are not left out
    seen: float  # those of them that a forward runs over; silent groups may be spared
    forwards: float  # micro-steps x ranks; only `bnpo` looks at it
    max_tokens: int  # completion limit; only `dr_grpo` looks at it


@dataclass(frozen=True, slots=True, kw_only=True)
class KL:
    """Penalty towards the reference model. Estimators: Schulman, "Approximating KL divergence" (2020).

    k3 is added to the loss. The gradient of k1 as a loss term has expectation 0, so k1 is taken off the advantage.
    """

    weight: float = 0.0
    estimator: Literal["k1", "k3"] = "k3"


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped importance-weighted policy loss, minimised.

    token loss = -min(w A, clip(w, 1 - low, 1 + high) A), with w = exp(log p - log p_old). Without `old_N` the step is on
    policy: w = exp(log p - sg[log p]), 1 in value and d log p in gradient. `ratio="sequence"` uses the row's geometric
    mean of w for all its tokens (GSPO, Zheng et al. 2025, arXiv:2507.18071). With `importance_cap` the token loss is
    weighted by min(p_old / p_sampler, cap): the sampler may round differently from the forward that is trained (truncated
    importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").

    Returns the loss and detached token means for the log: clipped share, KL, ratio.
    """
    kl = kl or KL()
    logprobs_N = columns.logprobs_N
    old_N = logprobs_N.detach() if columns.old_N is None else columns.old_N
    log_ratio_N = logprobs_N - old_N
    if ratio == "sequence":
        log_ratio_N = row_mean(log_ratio_N, columns)[columns.row_N]
    ratio_N = log_ratio_N.exp()
    weights_N = token_weights(columns, normaliser, aggregation)
    share_N = columns.weight_R[columns.row_N] / max(normaliser.seen, 1.0)  # what is logged means the same everywhere
    advantages_N = columns.advantages_N
    metrics: dict[str, Tensor] = {}
    if kl.weight and kl.estimator == "k1":
        k1_N = (logprobs_N - columns.ref_N).detach()
        advantages_N = advantages_N - kl.weight * k1_N
        metrics["kl"] = (k1_N * share_N).sum()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    unclipped_loss_N, clipped_loss_N = -ratio_N * advantages_N, -clipped_N * advantages_N
    token_loss_N = torch.maximum(unclipped_loss_N, clipped_loss_N)
    if importance_cap:
        correction_N = (old_N.detach() - columns.sampler_N).exp().clamp(max=importance_cap).nan_to_num(nan=1.0)
        token_loss_N = token_loss_N * correction_N
        metrics["correction"] = (correction_N * share_N).sum()
    if kl.weight and kl.estimator == "k3":
        k3_N = k3(logprobs_N, columns.ref_N)
        token_loss_N = token_loss_N + kl.weight * k3_N
        metrics["kl"] = (k3_N.detach() * share_N).sum()
    metrics["clipped"] = ((clipped_loss_N > unclipped_loss_N).float() * share_N).sum().detach()
    metrics["ratio"] = (ratio_N.detach() * share_N).sum()
    return (token_loss_N * weights_N).sum(), metrics


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


Objective = Callable[..., tuple[Tensor, dict[str, Tensor]]]

OBJECTIVES: dict[str, Objective] = {
    "nll": nll,
    "grpo": partial(surrogate, aggregation="grpo"),
    "dapo": partial(surrogate, aggregation="dapo"),
    "dr_grpo": partial(surrogate, aggregation="dr_grpo"),
    "bnpo": partial(surrogate, aggregation="bnpo"),
    "gspo": partial(surrogate, aggregation="grpo", ratio="sequence"),
}
