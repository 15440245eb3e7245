"""Does looking again help, or only asking again? The same policy with more and more rounds, and with other hands on the clue.

The recipe's own number of rounds is asked as the recipe says, and what it shows of a sample is that sample's budget. Any other
number K may show as much of it: each round a K-th, which the first look fills with as many frames of the whole media as fit,
and which later looks keep to. One round asks the sample's own prompt: who could only call would have no turn to answer in.
Three controls look as the recipe does (in two rounds by this rule, where it looks once), behind another clue:

    oracle_clue   the annotation's clue in place of the model's: what a perfect first look would be worth
    random_clue   a clue of the same extent in a place that is drawn
    same_frames   what was shown first is shown again: asking twice
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from statistics import fmean
from typing import Any

from rft import parsing
from rft.data.readings import retold
from rft.data.views import Look, Refused, longest, look
from rft.errors import DataError
from rft.rollout import actions
from rft.rollout.loop import opening
from rft.rollout.perceive import Allowance, Final, Looking, Perception, Single, State, Turn
from rft.rollout.render import Renderer
from rft.rollout.walk import Walk, ask
from rft.types import Box, Rollout, Sample, Span, View

CONTROLS = ("oracle_clue", "random_clue", "same_frames")
TOOLS = ("zoom", "frames")  # tags that are calls; JSON may name any
ALL = 10**6  # frames: as many as the recipe's max_frames


def spent(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """Visual tokens that were shown of each sample, by its id."""
    return {r.sample_id: sum(v.tokens for v in r.views) for r in rollouts}


def at_rounds(looking: Looking, rounds: int, renderer: Renderer, tokens: Mapping[str, int]) -> Looking:
    """The same in so many rounds, which together show as many visual tokens as `tokens` says by sample.

    Other limits of the recipe are for its own number of rounds, and do not hold.
    """
    make = Single if rounds == 1 else looking.make
    given = {"rounds": rounds, "renderer": renderer, "tokens": tokens}
    return replace(looking, make=lambda: Shared(make, **given), budget=Allowance(rounds=rounds))


def widened(renderer: Renderer) -> Renderer:
    """The same for prompts of any length: what the rounds of the recipe show apart, one round shows at once."""
    return replace(renderer, max_prompt_tokens=10**9)


def controlled(looking: Looking, control: str) -> Looking:
    """The same under one of `CONTROLS`."""
    kind = {"oracle_clue": Led, "random_clue": Misled, "same_frames": Again}[control]
    return replace(looking, make=lambda: kind(looking.make()))


def describe(rollouts: Sequence[Rollout], rounds: int) -> dict[str, float]:
    """Means per sample: visual tokens, turns, refusals; and `valid_clues`, the share of clues (or calls) that led to a look.

    Of a single round it is the share that can be read. A turn that ended its rollout with an answer, and with neither clue
    nor call, was not asked for one; 0 where none was.
    """
    asked = [(r, turn) for r in rollouts for turn in range(max(min(len(r.turns), rounds - 1), 1)) if _is_asked(r, turn)]
    return {
        "visual_tokens": fmean(sum(v.tokens for v in r.views) for r in rollouts),
        "turns": fmean(len(r.turns) for r in rollouts),
        "valid_clues": fmean(_is_valid(r, turn, rounds) for r, turn in asked) if asked else 0.0,
        "refused": fmean(len(r.refused) for r in rollouts),
    }


class Shared:
    """Each turn shows an equal part of the sample's visual tokens at most, and the first one fills it."""

    def __init__(self, make: Callable[[], Perception], *, rounds: int, renderer: Renderer, tokens: Mapping[str, int]) -> None:
        self._make, self._rounds, self._renderer, self._tokens = make, rounds, renderer, tokens
        self._inner = make()
        self.stops = tuple(getattr(self._inner, "stops", ()))

    def start(self, sample: Sample, media: tuple[View, ...]) -> Turn:
        make, tokens = self._make, self._tokens[sample.id]
        self._sample, self._share = sample, tokens // self._rounds
        if isinstance(make, partial) and "budget" in make.keywords:  # it shares its tokens out itself
            self._inner = make(budget=Allowance(rounds=self._rounds, visual_tokens=tokens))
        turn = self._inner.start(sample, media)
        pooled = {one.video: one.pool for one in turn.looks or () if isinstance(one, Look) and one.pool > 1}
        first = [
            Look(
                video=v.media, pool=pooled.get(v.media, 1), frames=ALL if v.kind == "video" and v.media not in pooled else None
            )
            for v in media
        ]
        return self._within(replace(turn, looks=first))

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        turn = self._inner.observe(reply, media, state)
        return turn if isinstance(turn, Final) else self._within(turn)

    def teach(self, answer: str, media: tuple[View, ...], state: State) -> str:
        return self._inner.teach(answer, media, state)

    def _within(self, turn: Turn) -> Turn:
        """Smaller media leave what they do not need to the larger ones."""
        if not turn.looks:
            return turn
        looks, left = list(turn.looks), self._share
        whole = [self._shown(one) for one in looks]
        for place, i in enumerate(sorted(range(len(looks)), key=lambda i: whole[i])):
            room = max(left // (len(looks) - place), 1)
            if isinstance(looks[i], Look):
                looks[i] = self._fitting(looks[i], room)
            left -= self._shown(looks[i])
        return replace(turn, looks=looks)

    def _shown(self, one: Look | View) -> int:
        """Tokens of a look; those of a refused one are nobody's."""
        view = one if isinstance(one, View) else self._view(one)
        return 0 if isinstance(view, Refused) else view.tokens

    def _fitting(self, one: Look, tokens: int) -> Look:
        """The look in so many tokens. What is shown in its smallest size gives up frames, and then that size."""
        one = replace(one, max_tokens=min(one.max_tokens or tokens, tokens))
        step = self._renderer.family.temporal_patch
        while one.indices and one.of is None and len(one.indices) > step and self._is_large(one):
            num = max(len(one.indices) // 2 // step * step, step)
            one = replace(one, indices=tuple(one.indices[i * len(one.indices) // num] for i in range(num)))
        if self._is_large(one) and one.of is None and one.indices is None and self._sample.media[one.video].kind != "image":
            one = replace(one, frames=step, fps=None)
        if self._is_large(one):
            one = replace(one, min_pixels=self._renderer.family.unit**2)
        return one

    def _is_large(self, one: Look) -> bool:
        view = self._view(one)
        return isinstance(view, Refused) and view.why == "size"

    def _view(self, one: Look) -> View | Refused:
        return look(self._sample, one, family=self._renderer.family, budget=self._renderer.budget)


class Led:
    """The model is asked as ever, and its clue is the annotation's, as long as that has something to look at."""

    def __init__(self, inner: Perception) -> None:
        self._inner = inner
        self.stops = tuple(getattr(inner, "stops", ()))

    def start(self, sample: Sample, media: tuple[View, ...]) -> Turn:
        return self._inner.start(sample, media)

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        has_ended = bool(self.stops) and not reply.rstrip().endswith(self.stops)  # nothing goes on in its words
        if state.is_last or has_ended:
            return self._inner.observe(reply, media, state)
        before = replace(state, sample=self._told(state), round=state.round - 1)
        return self._inner.observe(self._inner.teach("", media, before) or reply, media, state)

    def teach(self, answer: str, media: tuple[View, ...], state: State) -> str:
        return self._inner.teach(answer, media, state)

    def _told(self, state: State) -> Sample:
        return state.sample


class Misled(Led):
    """Its clue is as large as the annotation's, and elsewhere in what the row shows: wherever the draw puts it."""

    def _told(self, state: State) -> Sample:
        draw, answer = random.Random(state.seed), dict(state.sample.answer)
        film = longest(state.views)
        row = state.sample.media[film.media].budget if film else {}
        low, end = row.get("video_start") or 0.0, film.duration if film else 0.0
        reach = (low, max(min(end, row.get("video_end") or end), low))
        for key in ("clue", "spans"):
            if key in answer:
                answer[key] = tuple(_moved(span, reach, draw) for span in answer[key])
        if "span" in answer:
            answer["span"] = _moved(answer["span"], reach, draw)
        for key in ("box", "clue_box"):
            if key in answer and state.views:
                answer[key] = _placed(answer[key], state.views[0].original, draw)
        if "clue_boxes" in answer and state.views:
            answer["clue_boxes"] = tuple(_placed(box, state.views[0].original, draw) for box in answer["clue_boxes"])
        if "frames" in answer and film:
            count = len(set(film.frames))
            answer["frames"] = tuple(draw.sample(range(count), min(len(answer["frames"]), count)))
        return retold(state.sample, answer)


class Again(Led):
    """Every round shows what the first one did."""

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        if state.round == 1:
            self._first = state.shown
        turn = super().observe(reply, media, state)
        return turn if isinstance(turn, Final) else replace(turn, looks=self._first, refused=())


def can_be_led(samples: Sequence[Sample], renderer: Renderer, looking: Looking) -> bool:
    """Whether every annotation has something to look at first, for this perception."""
    return looking.is_teachable and all(_leads(sample, renderer, looking) for sample in samples)


def report(
    measured: Mapping[str, float], rollouts: Sequence[Rollout], rounds: int, seconds: float, *, ranks: int = 1
) -> dict[str, Any]:
    """What one way of looking gave: metrics, means per sample, seconds of one rank's work per sample and per turn.

    `seconds` are those of the wall, in which each of so many `ranks` answered its share of the samples.
    """
    told = describe(rollouts, rounds)
    each = seconds * ranks / max(len(rollouts), 1)
    return {**measured, **told, "seconds": each, "seconds_per_round": each / max(told["turns"], 1e-9)}


def _leads(sample: Sample, renderer: Renderer, looking: Looking) -> bool:
    walk = Walk(sample, opening(sample, renderer, looking), renderer=renderer, looking=looking, draw=("led", sample.id))
    try:
        return bool(ask(walk.perception, "teach", sample, "", walk.media, walk.state))
    except DataError:  # nothing that this annotation says can be shown
        return False


def _is_asked(rollout: Rollout, turn: int) -> bool:
    """Whether a clue or a call was due: not in an answer that ended its rollout without."""
    if turn + 1 < len(rollout.turns) or rollout.stop != "answered" or not rollout.turns:
        return True
    text = rollout.turns[turn]
    return actions.clue(text).status != "absent" or bool(parsing.calls(text, TOOLS))


def _is_valid(rollout: Rollout, turn: int, rounds: int) -> bool:
    if turn >= len(rollout.turns):
        return False
    end = max((v.duration for v in rollout.views), default=0.0) or float("inf")
    clue = actions.clue(rollout.turns[turn], actions.Limits(duration=end))
    if clue.status != "absent" and (rounds == 1 or not clue.is_usable):
        return clue.is_usable
    return _led_to_a_look(rollout)[turn]  # of a call too: it was answered


def _led_to_a_look(rollout: Rollout) -> list[bool]:
    """Of each turn, whether something was shown for it; a new prompt behind a refusal shows again what was there."""
    turns, shown = [], ()
    for is_world, run in groupby(rollout.segments, key=lambda s: s.author == "world"):
        segments = list(run)
        views = tuple(v for s in segments for v in s.views)
        if not is_world:
            turns.append(False)
        elif turns:
            is_again = segments[0].is_fresh and views == shown and bool(rollout.refused)
            turns[-1] = bool(views) and not is_again
        shown = views or shown
    return turns


def _moved(span: Span, reach: Span, draw: random.Random) -> Span:
    length = min(span[1] - span[0], reach[1] - reach[0])
    start = draw.uniform(reach[0], reach[1] - length)
    return (start, start + length)


def _placed(box: Box, size: tuple[int, int], draw: random.Random) -> Box:
    width, height = box[2] - box[0], box[3] - box[1]
    x, y = draw.uniform(0, max(size[1] - width, 0)), draw.uniform(0, max(size[0] - height, 0))
    return (x, y, x + width, y + height)
