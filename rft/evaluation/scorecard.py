"""Score a policy on samples: the same rendering, pixels and decoding as in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rft.evaluation.metrics import measure
from rft.evaluation.rounds import describe
from rft.rollout.loop import opening, roll_out
from rft.rollout.perceive import ONCE, Looking
from rft.rollout.policy import Limits, Policy
from rft.rollout.render import Renderer
from rft.types import Rollout, Sample, Segment, View

Ahead = Callable[[Sequence[View]], None]


def answer_all(
    samples: Sequence[Sample],
    policy: Policy,
    renderer: Renderer,
    limits: Limits,
    *,
    seed: int,
    looking: Looking = ONCE,
    at_once: int = 64,
    ahead: Ahead = lambda views: None,
) -> list[Rollout]:
    """One rollout per sample, in order. `ahead` hears what the next samples show while these are answered.

    Raises:
        DataError: a sample cannot be shown. An evaluation leaves nothing out.
    """
    rollouts: list[Rollout] = []
    chunks = [samples[start : start + at_once] for start in range(0, len(samples), at_once)]
    following: list[Segment] = [opening(s, renderer, looking) for s in chunks[0]] if chunks else []
    for chunk, next_chunk in zip(chunks, [*chunks[1:], []]):  # a rank may have no sample at all
        prompts, following = following, [opening(s, renderer, looking) for s in next_chunk]
        ahead([v for prompt in following for v in prompt.views])
        given = {"policy": policy, "renderer": renderer, "limits": limits, "looking": looking}
        groups = roll_out(chunk, prompts, [1] * len(chunk), draw=(seed, "evaluation"), **given)
        rollouts += [group[0] for group in groups]
    return rollouts


def scorecard(
    samples: Sequence[Sample],
    policy: Policy,
    renderer: Renderer,
    limits: Limits,
    *,
    seed: int,
    together: Any,
    looking: Looking = ONCE,
    ahead: Ahead = lambda views: None,
) -> tuple[dict[str, float], list[Rollout]]:
    """Metrics over all samples, with means of what was looked at, and the rollouts in order; ranks share the samples and all
    hear the result."""
    mine = range(together.rank, len(samples), together.size)
    answered = answer_all([samples[i] for i in mine], policy, renderer, limits, seed=seed, looking=looking, ahead=ahead)
    texts = dict(pair for part in together.gather(list(zip(mine, answered, strict=True))) for pair in part)
    rollouts = [texts[i] for i in range(len(samples))]
    told = {} if looking.is_single else describe(rollouts, looking.budget.rounds)
    return {**measure(samples, rollouts), **told}, rollouts
