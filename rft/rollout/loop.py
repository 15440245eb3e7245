"""The loop of a rollout that looks: the world shows, the policy answers, and what it answered may show more.

`roll_out` walks many rollouts side by side, one call of the policy per round for all that are still open. `taught` walks one
along the annotation. Both show the same things for the same words.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice

from rft.data.views import Refused
from rft.errors import DataError, RolloutError
from rft.rollout.perceive import ONCE, Looking
from rft.rollout.policy import Limits, Policy
from rft.rollout.render import Renderer
from rft.rollout.walk import Walk, ask, failure, media_of, opened, started
from rft.types import Rollout, Sample, Segment, View

THREADS = 4  # that decode what the rollouts of a generation look at


def opening(sample: Sample, renderer: Renderer, looking: Looking) -> Segment:
    """The first prompt of a sample's rollouts.

    Raises:
        DataError: the media cannot be read, or the perception's first looks cannot be shown.
        RolloutError: the perception starts otherwise each time.
    """
    media = media_of(sample, renderer, looking)
    turn, again = (started(looking.make(), sample, media) for _ in range(2))
    if turn != again:
        do = "a group shares its first prompt: draw in `observe`, from `state.seed`"
        raise RolloutError(f"sample {sample.id}", "its perception starts otherwise each time", do)
    return opened(turn, sample, renderer)


def roll_out(
    samples: Sequence[Sample],
    prompts: Sequence[Segment],
    sizes: Sequence[int],
    *,
    policy: Policy,
    renderer: Renderer,
    limits: Limits,
    draw: Sequence[object],
    looking: Looking = ONCE,
    hints: Sequence[Segment] | None = None,
) -> list[tuple[Rollout, ...]]:
    """`sizes[i]` rollouts of sample i, in order. `draw` (seed, step ...) with the sample and the index keys the sampling.

    `prompts` are those of `opening`; `hints[i]`, if given, is what the annotation has already written behind prompt i.
    """
    began, walks = time.monotonic(), []
    met: Counter[str] = Counter()
    for place, (sample, prompt, size) in enumerate(zip(samples, prompts, sizes, strict=True)):
        again = (met[sample.id],) if met[sample.id] else ()  # a sample met twice is explored twice, not copied
        met[sample.id] += 1
        for index in range(size):
            walk = Walk(sample, prompt, renderer=renderer, looking=looking, draw=(*draw, sample.id, *again, index))
            walk.written = [hints[place]] if hints else []
            walks.append(walk)
    stops = looking.stops
    cut = replace(limits, until=_ends_with(stops, renderer)) if stops else limits
    live, turns_left = walks, looking.budget.rounds
    while live:
        # the last reply is not cut: nothing could be shown behind it
        replies = policy.extend([walk.context for walk in live], cut if turns_left > 1 else limits)
        for walk, reply in zip(live, replies, strict=True):
            segment = renderer.reply("policy", reply.ids, logprobs=reply.logprobs)
            walk.take(segment, reply.stop, weights=reply.weights, room=limits.max_tokens)
        late = 0 < looking.budget.seconds < time.monotonic() - began
        live, turns_left = look_around([walk for walk in live if walk.is_open], late=late), turns_left - 1
    if looking.goes_on:
        policy.extend([], limits)  # no turn follows: what it kept for one can go
    rollouts = iter([walk.rollout for walk in walks])
    return [tuple(islice(rollouts, size)) for size in sizes]


def taught(
    sample: Sample, prompt: Segment, renderer: Renderer, looking: Looking, write: Callable[..., Sequence[Segment]]
) -> Rollout:
    """The rollout that the annotation writes, turn by turn: `write(text, is_last=, is_cut=) -> segments` puts down each.

    A turn that is cut goes on behind an inline look, without an end of its own.

    Raises:
        DataError: the perception cannot be taught, what the annotation asks to see cannot be shown, or it does not come to
            its answer.
    """
    walk = Walk(sample, prompt, renderer=renderer, looking=looking, draw=("taught", sample.id))
    name = type(walk.perception).__name__
    if not looking.is_teachable:
        raise DataError(f"sample {sample.id}", f"{name} has no `teach`", "say there what the annotation would write")
    answer, stops = renderer.answer_text(sample), looking.stops
    while walk.is_open:
        text = ask(walk.perception, "teach", sample, answer, walk.media, walk.state)
        is_last = text == answer
        *before, last = write(text, is_last=is_last, is_cut=bool(stops) and not is_last and text.endswith(stops))
        walk.written = list(before)
        walk.take(last, "answered", weights=0, room=0)
        if walk.is_open:
            look_around([walk])
        if walk.refused:
            what = f"the annotation's look was refused: {walk.refused[-1]}"
            raise DataError(f"sample {sample.id}", what, "check the annotation against the media")
    if not is_last:
        do = f"see {name}.teach: its last turn is the answer"
        raise DataError(f"sample {sample.id}", f"the annotation ends in {text[:80]!r}", do)
    return walk.rollout


def look_around(walks: Sequence[Walk], *, late: bool = False) -> list[Walk]:
    """Show every walk what it asked for; those that go on. Views are decoded now: one that cannot be is refused."""
    asked = [[] if late else walk.views() for walk in walks]
    wanted = {v: walk.fetch for walk, views in zip(walks, asked, strict=True) for v in views if isinstance(v, View)}
    with ThreadPoolExecutor(THREADS) as pool:
        failed = dict(zip(wanted, pool.map(failure, wanted, wanted.values()), strict=True))
    for walk, views in zip(walks, asked, strict=True):
        gone = partial(Refused, why="unreadable", what="it cannot be read", where=f"sample {walk.sample.id}")
        walk.show([gone(detail=why) if (why := failed.get(v)) else v for v in views], late=late)
    return [walk for walk in walks if walk.is_open]


def _ends_with(stops: tuple[str, ...], renderer: Renderer) -> Callable[[Sequence[int]], bool]:
    """Whether the last token completed a stop, which may end inside of it (`><` is one token, often)."""
    longest = max(map(len, stops))  # a token is one character at least

    def holds(ids: Sequence[int]) -> bool:
        tail = list(ids)[-longest:]
        text, before = renderer.text(tail), renderer.text(tail[:-1])
        return any(text.count(stop) > before.count(stop) for stop in stops)

    return holds
