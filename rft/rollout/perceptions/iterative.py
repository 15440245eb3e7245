"""Ask, sample the video anew around the clue, ask again (VideoChat-R1.5, arXiv:2509.21100), in training and at test time."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from rft import parsing
from rft.data.budget import Budget
from rft.data.media import sized
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
    are about the longest video, or the part of it that its row shows; a fresh prompt shows the other media too. Visual
    tokens, where they are limited, are shared out evenly over the rounds; where they are not, a media that the first prompt
    had to show smaller takes no more later. Where `fine` frames are too large for their share, there are fewer of them.
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
            self.file = sample.media[self.film.media]
            self.seconds, row = frame_seconds(self.file), self.file.budget
            ends = (row.get("video_start"), row.get("video_end"))
            self.reach = (ends[0] or 0.0, inf if ends[1] is None else ends[1])  # what may be looked at
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
        template = (self.last if state.round + 1 == state.rounds else "") or self.again
        text = fill(template, state.sample.row, state.sample) if template else None
        refused = () if found.is_usable else (found.status,)
        looks = self._looks(windows, media, state)
        if not looks:
            low, high = self.reach[0], min(self.reach[1], self.film.duration)
            note = f"Not shown: the clue is outside of the video, {low:g} to {high:g} s."
            return Turn(text=text, note=note, looks=(), refused=(*refused, "outside"))
        self.windows = windows
        return Turn(text=text, looks=looks, refused=refused)

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

    def _looks(self, windows: tuple[Span, ...], media: tuple[View, ...], state: State) -> list[Look]:
        """Of the next round; none where a rule has no window that it may look at."""
        film, others = self.film, [v for v in media if state.is_fresh and v.media != self.film.media]
        shared = self._tokens(1 + len(others))
        first = {v.media: v for v in reversed(state.views)}
        room = {v.media: shared or self._shrunk(v, first[v.media]) for v in (film, *others)}
        num, tokens = self.frames or len(first[film.media].frames), room[film.media]
        kept = actions.Reading(status="parsed", windows=windows)
        looks = list(actions.looks(kept, film, state.family, share=self.share, least=self.least))
        if self.rule == "window":
            each = tokens and max(tokens // len(looks), 1)
            num, fine = self._fitting(max(num // len(looks), 2), each, state)
            looks = [replace(one, frames=num, max_tokens=each, min_pixels=fine) for one in looks]
        elif not any(one.span[0] < self.reach[1] and one.span[1] > self.reach[0] for one in looks):
            return []
        else:
            begin = min(bisect_left(self.seconds, self.reach[0]), film.frames[0])  # a row may show less than a patch
            end = max(bisect_right(self.seconds, self.reach[1]), film.frames[-1] + 1)
            ratio = {} if self.ratio is None else {"ratio": self.ratio}
            given = {"step": state.family.temporal_patch, **ratio}
            num, fine = self._fitting(num, tokens, state)
            indices = RULES[self.rule](self.seconds[begin:end], [one.span for one in looks], num, **given)
            indices = tuple(begin + i for i in indices)
            looks = [Look(video=film.media, indices=indices, max_tokens=tokens, min_pixels=fine)]
        return sorted([*looks, *(Look(video=v.media, max_tokens=room[v.media]) for v in others)], key=lambda one: one.video)

    def _shrunk(self, whole: View, first: View) -> int | None:
        """The tokens of a media that the first prompt had to show smaller than its budget has it."""
        return first.tokens if not self.coarse and first.tokens < whole.tokens else None

    def _fitting(self, num: int, tokens: int | None, state: State) -> tuple[int, int | None]:
        """As many of `num` frames as fit into the tokens in `fine` pixels, in whole temporal patches, and these pixels.

        Where not even one patch fits it is shown in fewer.
        """
        if not self.fine or tokens is None:
            return num, self.fine or None
        family, pixels = state.family, Budget(min_pixels=self.fine, max_pixels=self.fine)
        size, _ = sized(self.file, self.film.original, num, family, pixels)
        patches = tokens // family.tokens(family.grid(family.temporal_patch, size))
        return min(num, max(patches, 1) * family.temporal_patch), self.fine if patches else None

    def _agrees(self, state: State) -> bool:
        said = [parsing.tagged(reply, "answer") for reply in state.replies[-2:]]
        return len(said) == 2 and said[0] is not None and said[0] == said[1]
