"""One look, one answer: the plain rollout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

from rft.rollout.policy import Context, Limits, Policy, stream_key
from rft.rollout.render import Renderer
from rft.types import Rollout, Sample, Segment


def roll_out(
    samples: Sequence[Sample],
    prompts: Sequence[Segment],
    sizes: Sequence[int],
    *,
    policy: Policy,
    renderer: Renderer,
    limits: Limits,
    draw: Sequence[object],
) -> list[tuple[Rollout, ...]]:
    """`sizes[i]` rollouts of sample i, in order. `draw` (seed, step ...) with the sample and the index keys the sampling."""
    contexts: list[Context] = []
    asked: list[Sample] = []
    met: Counter[str] = Counter()
    for sample, prompt, size in zip(samples, prompts, sizes, strict=True):
        again = (met[sample.id],) if met[sample.id] else ()  # a sample met twice is explored twice, not copied
        met[sample.id] += 1
        contexts += [Context(segments=(prompt,), key=stream_key(*draw, sample.id, *again, index)) for index in range(size)]
        asked += [sample] * size
    replies = policy.extend(contexts, limits)
    rollouts = iter(
        Rollout(
            sample_id=sample.id,
            segments=(*context.segments, renderer.reply("policy", reply.ids, logprobs=reply.logprobs)),
            stop=reply.stop,
            weights=reply.weights,
        )
        for sample, context, reply in zip(asked, contexts, replies, strict=True)
    )
    return [tuple(islice(rollouts, size)) for size in sizes]
