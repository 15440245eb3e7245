"""One look, one answer: the plain rollout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rft.rollout.policy import Context, Limits, Policy, stream_key
from rft.rollout.render import Renderer
from rft.types import Rollout, Sample, Segment


def roll_out(
    samples: Sequence[Sample],
    prompts: Sequence[Segment],
    size: int,
    *,
    policy: Policy,
    renderer: Renderer,
    limits: Limits,
    draw: Sequence[object],
) -> list[tuple[Rollout, ...]]:
    """`size` rollouts of each sample, in order. `draw` (seed, step ...) with the sample and the index keys the sampling."""
    contexts = []
    met: Counter[str] = Counter()
    for sample, prompt in zip(samples, prompts, strict=True):
        again = (met[sample.id],) if met[sample.id] else ()  # a sample met twice is explored twice, not copied
        met[sample.id] += 1
        contexts += [Context(segments=(prompt,), key=stream_key(*draw, sample.id, *again, index)) for index in range(size)]
    replies = policy.extend(contexts, limits)
    rollouts = [
        Rollout(
            sample_id=samples[i // size].id,
            segments=(*context.segments, renderer.reply("policy", reply.ids, logprobs=reply.logprobs)),
            stop=reply.stop,
            weights=reply.weights,
        )
        for i, (context, reply) in enumerate(zip(contexts, replies, strict=True))
    ]
    return [tuple(rollouts[i : i + size]) for i in range(0, len(rollouts), size)]
