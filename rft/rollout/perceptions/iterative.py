"""Ask, sample the video anew around the clue, ask again (VideoChat-R1.5, arXiv:2509.21100), in training and at test time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from rft import parsing
from rft.data.readings import clued
from rft.data.resample import RULES
from rft.data.views import Look, frame_seconds, longest
from rft.errors import RecipeError
from rft.rollout import actions
from rft.rollout.perceive import Allowance, Final, State, Turn
from rft.rollout.render import fill
from rft.types import Sample, Span, View


@dataclass(kw_only=True)
class Iterative:
    """`budget.rounds` rounds; each but the last answers and names the windows that matter, in `<clue>` or `<glue>`.

    rule     what a later round shows: `window`, the windows alone; or a rule of `rft/data/resample.py`, which shows the
             whole film too, more densely where it matters: `two_streams`, and the released `videochat_r1_5`.
    ratio    of a rule: how many times denser; by default its own.
    share    the clue is widened by this share of its length to either side, by `least` seconds at the least.
    memory   what becomes of earlier clues: `replace`, `union` or `intersect`.
    min_gain a round whose clue changes what is kept in mind by less, or does not come, ends the rollout; `agree` ends it
             at two equal answers.
    frames   of a later round; by default as many as the first showed. `coarse` are pixels of a frame of the first round at
             most, `fine` those of later rounds at least.
    again    the question of later rounds, `last` of the last one: format strings over the row's columns.
    write    what the annotation writes in all rounds but the last.

    A clue that cannot be used leaves the earlier one in place; without any, the rollout ends with what it answered. Clues
    are about the longest video; a fresh prompt shows the other media too. Visual tokens, where they are limited, are
    shared out evenly over the rounds.
    """

    budget: Allowance
    rule: Literal["window", "two_streams", "videochat_r1_5"] = "two_streams"
    ratio: float | None = None
    share: float = 0.1
    least: float = 0.0
    memory: actions.Policy = "replace"
    min_gain: float = 0.0
    agree: bool = False
    frames: int = 0
    coarse: int = 0
    fine: int = 0
    again: str = ""
    last: str = ""
    write: str = "{answer}<clue>{clue}</clue>"

    def __post_init__(self) -> None:
        if self.ratio is not None and self.rule == "window":
            do = "take ratio out, or choose rule: two_streams"
            raise RecipeError("ratio", "the rule window shows one density only: ratio does nothing", do)
        if self.ratio is not None and not 1 <= self.ratio < inf:
            raise RecipeError("ratio", f"ratio={self.ratio} is not 1 or more", "give e.g. 2")
        for name in ("frames", "coarse", "fine", "share", "least"):
            if (value := getattr(self, name)) < 0:
                raise RecipeError(name, f"{name}={value} is below 0", "give 0 or more")
        if self.frames == 1:
            raise RecipeError("frames", "frames=1 is one frame", "give 2 or more, or 0 for as many as at first")
        try:
            self.write.format(answer="", clue="")
        except (LookupError, ValueError) as error:
            raise RecipeError("write", f"{self.write!r} names {error}", "it knows {answer} and {clue}") from error

    def start(self, sample: Sample, media: tuple[View, ...]) -> Turn:
        self.windows: tuple[Span, ...] = ()
        self.film = longest(media)
        if self.film is not None:  # now, so that a file that goes away meanwhile is a look that is refused
            self.seconds = frame_seconds(sample.media[self.film.media])
        for template in (self.again, self.last):
            fill(template, sample.row, sample)
        tokens = self._tokens(len(media))
        if not self.coarse and all(tokens is None or view.tokens <= tokens for view in media):
            return Turn()
        return Turn(looks=[Look(video=v.media, max_tokens=tokens, max_pixels=self.coarse or None) for v in media])

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        if state.is_last or self.film is None:
            return Final()
        found = actions.clue(reply, actions.Limits(duration=self.film.duration))
        windows = actions.remember(self.windows, found.windows, self.memory)
        is_old = bool(self.windows) and self.min_gain > 0 and actions.is_unchanged(self.windows, windows, self.min_gain)
        if not windows or found.status == "empty" or is_old or (self.agree and self._agrees(state)):
            return Final()
        self.windows = windows
        template = (self.last if state.round + 1 == state.rounds else "") or self.again
        looks = self._looks(media, state)
        refused = () if found.is_usable else (found.status,)
        return Turn(text=fill(template, state.sample.row, state.sample) if template else None, looks=looks, refused=refused)

    def teach(self, answer: str, media: tuple[View, ...], state: State) -> str:
        known = state.sample.answer
        spans = clued(known)
        ends_early = self.agree or self.min_gain > 0  # at the second round, which says the same
        if not spans or self.film is None or state.round + 1 >= state.rounds or (state.round and ends_early):
            return answer
        return self.write.format(answer=answer, clue=", ".join(f"{start:g} to {end:g}" for start, end in spans))

    def _tokens(self, parts: int) -> int | None:
        """Visual tokens of one round's share for each of so many parts."""
        if not self.budget.visual_tokens:
            return None
        return max(self.budget.visual_tokens // max(self.budget.rounds, 1) // max(parts, 1), 1)

    def _looks(self, media: tuple[View, ...], state: State) -> list[Look]:
        film, others = self.film, [v.media for v in media if state.is_fresh and v.media != self.film.media]
        shown = next(v for v in state.views if v.media == film.media)
        num, tokens = self.frames or len(shown.frames), self._tokens(1 + len(others))
        kept = actions.Reading(status="parsed", windows=self.windows)
        looks = list(actions.looks(kept, film, state.family, share=self.share, least=self.least))
        if self.rule == "window":
            sizes = {"max_tokens": tokens and max(tokens // len(looks), 1), "frames": max(num // len(looks), 2)}
            looks = [replace(one, min_pixels=self.fine or None, **sizes) for one in looks]
        else:
            first, last = film.frames[0], film.frames[-1]  # a row may show a part of its file
            ratio = {} if self.ratio is None else {"ratio": self.ratio}
            given = {"step": state.family.temporal_patch, **ratio}
            indices = RULES[self.rule](self.seconds[first : last + 1], [one.span for one in looks], num, **given)
            indices = tuple(first + i for i in indices)
            looks = [Look(video=film.media, indices=indices, max_tokens=tokens, min_pixels=self.fine or None)]
        return sorted([*looks, *(Look(video=i, max_tokens=tokens) for i in others)], key=lambda one: one.video)

    def _agrees(self, state: State) -> bool:
        said = [parsing.tagged(reply, "answer") for reply in state.replies[-2:]]
        return len(said) == 2 and said[0] is not None and said[0] == said[1]
