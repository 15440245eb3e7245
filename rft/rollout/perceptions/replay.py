"""Replay of visual memory (VGR, arXiv:2506.11991): the prompt shows a pooled map of the picture, the model names a box while it
thinks, and the tokens of that region follow from the features that were made at the start; no picture is encoded again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Literal

from rft import parsing
from rft.data.views import Look, to_file, to_view
from rft.rollout import actions
from rft.rollout.perceive import Final, State, Turn
from rft.rollout.perceptions.checked import check
from rft.types import Box, Sample, View


@dataclass(kw_only=True)
class Replay:
    """`<sot>[x0, y0, x1, y1]<eot>` in the middle of a reply; the region stands right behind it, in the same message.

    `back_end` gathers unpooled `features`, or encodes a `crop` anew; the transcript is the same. The map shows means over
    `pool` x `pool` tokens. `unit` says what boxes are written in: shares of the picture, as in VGR, or the family's own.
    A box that cannot be read or shown adds nothing, and the reply goes on; one behind an answer is not looked at, and one
    that nothing was shown for before an answer is refused as `unread`. Boxes are about the first media. A turn of the budget's
    `rounds` is what is written up to a box, or from there on.
    """

    back_end: Literal["features", "crop"] = "features"
    pool: int = 2
    max_tokens: int | None = 256
    begin: str = "<sot>"
    end: str = "<eot>"
    unit: Literal["share", "family"] = "share"

    def __post_init__(self) -> None:
        check(self, above=("max_tokens",), least={"pool": 1}, named=("begin", "end"))

    @property
    def stops(self) -> tuple[str, ...]:
        """A reply is cut behind the box."""
        return (self.end,)

    def start(self, sample: Sample, media: tuple[View, ...]) -> Turn:
        return Turn(looks=[Look(video=v.media, pool=self.pool) for v in media])

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        has_answered, is_cut = parsing.tagged(reply, "answer") is not None, reply.rstrip().endswith(self.end)
        *before, _ = (reply.partition("<answer>")[0] if has_answered else reply).split(self.end)
        if not before or (has_answered and is_cut):
            return Final()
        if has_answered or (state.is_last and not is_cut):  # nobody cut it behind its boxes
            unread = self._unread(before)
            return Turn(looks=(), refused=unread, inline=True) if unread else Final()
        unread = self._unread(before[:-1])
        box, status = self._box(before[-1], state)  # what stands behind it was in the same token
        if box is None:
            return Turn(looks=(), refused=(*unread, status), inline=True)
        shown = state.views[0]
        if self.back_end == "crop":
            return Turn(looks=[Look(video=shown.media, crop=box, max_tokens=self.max_tokens)], refused=unread, inline=True)
        return Turn(looks=[Look(of=shown, region=box, max_tokens=self.max_tokens)], refused=unread, inline=True)

    def teach(self, answer: str, media: tuple[View, ...], state: State) -> str:
        known = state.sample.answer
        boxes = known.get("clue_boxes") or [box for box in (known.get("clue_box") or known.get("box"),) if box]
        if state.round >= len(boxes) or state.round + 1 >= state.rounds or not state.views:
            return answer
        shown = state.views[0]
        box = to_view(boxes[state.round], shown, state.family)
        sides = state.family.box_extent(shown.size) * 2
        if self.unit == "share":
            box, digits = [100 * x / side for x, side in zip(box, sides, strict=True)], 2
        else:
            digits = 0
        whole = (*(floor(round(x, 6)) for x in box[:2]), *(ceil(round(x, 6)) for x in box[2:]))  # a small box keeps an area
        return f"{self.begin}[{', '.join(f'{x / 10**digits:.{digits}f}' for x in whole)}]{self.end}"

    def _unread(self, pieces: Sequence[str]) -> list[str]:
        """A refusal for every box that ends one of the pieces."""
        return ["unread"] * sum(self.begin in piece for piece in pieces)

    def _box(self, text: str, state: State) -> tuple[Box | None, str]:
        """The box that ends a text, in pixels of the file, or why there is none."""
        _, is_begun, inside = text.rpartition(self.begin)
        if not is_begun or not state.views:
            return None, "unparsable" if state.views else "media"
        shown = state.views[0]
        extent = state.family.box_extent(shown.size)
        found = parsing.boxes(inside)
        if found and self.unit == "share" and all(x <= 1 for x in found[0]):
            inside = "[" + ", ".join(f"{x * side:.6f}" for x, side in zip(found[0], extent * 2, strict=True)) + "]"
        reading = actions.boxes(inside, actions.Limits(extent=extent, most=1))
        if not reading.is_usable:
            return None, reading.status
        return to_file(reading.boxes[0], shown, state.family), reading.status
