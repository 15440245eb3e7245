"""Score a policy on samples: the same rendering, pixels and decoding as in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rft.evaluation.metrics import measure
from rft.rollout.policy import Limits, Policy
from rft.rollout.render import Renderer
from rft.rollout.single import roll_out
from rft.types import Rollout, Sample


def answer_all(
    samples: Sequence[Sample],
    policy: Policy,
    renderer: Renderer,
    limits: Limits,
    *,
    seed: int,
    at_once: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Rollout]:
    """One rollout per sample, in order.

    Raises:
        DataError: a sample cannot be shown. An evaluation leaves nothing out.
    """
    rollouts: list[Rollout] = []
    for start in range(0, len(samples), at_once):
        chunk = samples[start : start + at_once]
        prompts = [renderer.prompt(s) for s in chunk]
        groups = roll_out(chunk, prompts, 1, policy=policy, renderer=renderer, limits=limits, draw=(seed, "evaluation"))
        rollouts += [group[0] for group in groups]
        progress(len(rollouts))
    return rollouts


def scorecard(
    samples: Sequence[Sample], policy: Policy, renderer: Renderer, limits: Limits, *, seed: int, together: Any
) -> tuple[dict[str, float], list[Rollout]]:
    """Metrics over all samples and the rollouts in order; ranks share the samples and all hear the result."""
    mine = range(together.rank, len(samples), together.size)
    answered = answer_all([samples[i] for i in mine], policy, renderer, limits, seed=seed)
    texts = dict(pair for part in together.gather(list(zip(mine, answered, strict=True))) for pair in part)
    rollouts = [texts[i] for i in range(len(samples))]
    return measure(samples, rollouts), rollouts
