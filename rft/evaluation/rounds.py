"""Does looking again help, or only asking again? The same policy with more and more rounds, and with other hands on the clue.

All rounds of a sample together may show as many visual tokens as one round alone may. Three controls stand beside the recipe's
own number of rounds:

    oracle_clue   the annotation's clue in place of the model's: what a perfect first look would be worth
    random_clue   a clue of the same extent in a place that is drawn
    same_frames   what was shown first is shown again: asking twice
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from rft.data.readings import retold
from rft.data.views import Look, longest
from rft.rollout import actions
from rft.rollout.perceive import Final, Looking, Perception, State, Turn
from rft.rollout.render import Renderer
from rft.types import Box, Rollout, Sample, Span, View

CLUES = ("clue", "spans", "span", "clue_box", "clue_boxes", "box", "frames")  # of an annotation: what a first look is about
CONTROLS = ("oracle_clue", "random_clue", "same_frames")


def at_rounds(looking: Looking, rounds: int, visual_tokens: int) -> Looking:
    """The same with so many rounds, and visual tokens for all of them together."""
    budget = replace(looking.budget, rounds=rounds, visual_tokens=visual_tokens)
    make = looking.make
    if looking.is_single:
        return replace(looking, budget=budget)
    if isinstance(make, partial) and "budget" in make.keywords:  # it shares its tokens out itself
        return replace(looking, make=partial(make, budget=budget), budget=budget)
    return replace(looking, make=lambda: Shared(make(), visual_tokens // rounds), budget=budget)


def one_look(samples: Sequence[Sample], renderer: Renderer) -> int:
    """Visual tokens that the sample's own prompt shows, at most."""
    return max(sum(v.tokens for v in renderer.prompt(sample).views) for sample in samples)


def controlled(looking: Looking, control: str) -> Looking:
    """The same under one of `CONTROLS`."""
    kind = {"oracle_clue": Led, "random_clue": Misled, "same_frames": Again}[control]
    return replace(looking, make=lambda: kind(looking.make()))


def describe(rollouts: Sequence[Rollout], rounds: int) -> dict[str, float]:
    """Means per sample: visual tokens, turns, and the share of clues (or calls) that led to a look or could be read."""
    asked = [(r, turn) for r in rollouts for turn in range(max(min(len(r.turns), rounds - 1), 1))]
    return {
        "visual_tokens": fmean(sum(v.tokens for v in r.views) for r in rollouts),
        "turns": fmean(len(r.turns) for r in rollouts),
        "valid_clues": fmean(_is_valid(r, turn) for r, turn in asked),
        "refused": fmean(len(r.refused) for r in rollouts),
    }


class Shared:
    """Each turn shows so many visual tokens at most, in equal parts."""

    def __init__(self, inner: Perception, tokens: int) -> None:
        self._inner, self._tokens = inner, tokens
        self.stops = tuple(getattr(inner, "stops", ()))

    def start(self, sample: Sample, media: tuple[View, ...]) -> Turn:
        turn = self._inner.start(sample, media)
        if turn.looks is None and sum(view.tokens for view in media) > self._tokens:
            turn = replace(turn, looks=[Look(video=view.media) for view in media])
        return self._within(turn)

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        turn = self._inner.observe(reply, media, state)
        return turn if isinstance(turn, Final) else self._within(turn)

    def teach(self, answer: str, media: tuple[View, ...], state: State) -> str:
        return self._inner.teach(answer, media, state)

    def _within(self, turn: Turn) -> Turn:
        if not turn.looks:
            return turn
        each = max(self._tokens // len(turn.looks), 1)
        return replace(turn, looks=[one if isinstance(one, View) else _within(one, each) for one in turn.looks])


class Led:
    """The model is asked as ever, and its clue is the annotation's."""

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
        return self._inner.observe(self._inner.teach("", media, before), media, state)

    def _told(self, state: State) -> Sample:
        return state.sample


class Misled(Led):
    """Its clue is as large as the annotation's, and elsewhere: wherever the draw puts it."""

    def _told(self, state: State) -> Sample:
        draw, answer = random.Random(state.seed), dict(state.sample.answer)
        film = longest(state.views)
        end = film.duration if film else 0.0
        for key in ("clue", "spans"):
            if key in answer:
                answer[key] = tuple(_moved(span, end, draw) for span in answer[key])
        if "span" in answer:
            answer["span"] = _moved(answer["span"], end, draw)
        for key in ("box", "clue_box"):
            if key in answer and state.views:
                answer[key] = _placed(answer[key], state.views[0].original, draw)
        if "clue_boxes" in answer and state.views:
            answer["clue_boxes"] = tuple(_placed(box, state.views[0].original, draw) for box in answer["clue_boxes"])
        if "frames" in answer and film:
            answer["frames"] = tuple(draw.sample(range(len(film.frames)), min(len(answer["frames"]), len(film.frames))))
        return retold(state.sample, answer)


class Again(Led):
    """Every round shows what the first one did."""

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        if state.round == 1:
            self._first = state.shown
        turn = super().observe(reply, media, state)
        return turn if isinstance(turn, Final) else replace(turn, looks=self._first, refused=())


def can_be_led(samples: Sequence[Sample]) -> bool:
    """Whether every annotation says what a first look should find."""
    return all(sample.answer.keys() & set(CLUES) for sample in samples)


def report(measured: Mapping[str, float], rollouts: Sequence[Rollout], rounds: int, seconds: float) -> dict[str, Any]:
    """What one way of looking gave: metrics, means per sample, wall seconds per sample and per turn."""
    told = describe(rollouts, rounds)
    each = seconds / max(len(rollouts), 1)
    return {**measured, **told, "seconds": each, "seconds_per_round": each / max(told["turns"], 1e-9)}


def _is_valid(rollout: Rollout, turn: int) -> bool:
    if turn >= len(rollout.turns):
        return False
    end = max((v.duration for v in rollout.views), default=0.0) or float("inf")
    clue = actions.clue(rollout.turns[turn], actions.Limits(duration=end))
    if clue.status != "absent":
        return clue.is_usable
    starts = [i for i, s in enumerate(rollout.segments) if s.author != "world" and rollout.segments[i - 1].author == "world"]
    behind = rollout.segments[starts[turn + 1] - 1].views if turn + 1 < len(starts) else ()
    return bool(behind)  # a call of a tool, which was answered


def _within(one: Look, tokens: int) -> Look:
    return replace(one, max_tokens=min(one.max_tokens or tokens, tokens))


def _moved(span: Span, end: float, draw: random.Random) -> Span:
    length = min(span[1] - span[0], end)
    start = draw.uniform(0, end - length)
    return (start, start + length)


def _placed(box: Box, size: tuple[int, int], draw: random.Random) -> Box:
    width, height = box[2] - box[0], box[3] - box[1]
    x, y = draw.uniform(0, max(size[1] - width, 0)), draw.uniform(0, max(size[0] - height, 0))
    return (x, y, x + width, y + height)
