"""Core frames: the model sees a coarse strip and names the frames that matter by their number, which it is then shown large
(the selector's part in VideoEspresso, arXiv:2411.14794)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rft.data.readings import clued
from rft.data.views import Look, longest
from rft.errors import RecipeError
from rft.rollout import actions
from rft.rollout.perceive import Final, State, Turn
from rft.rollout.perceptions.checked import check
from rft.rollout.render import fill
from rft.types import Sample, Span, View


@dataclass(kw_only=True)
class Frames:
    """`<frames>[2, 5]</frames>` counts the frames of the strip from 0: of the longest video, where there are several.

    The strip has `strip` frames of `coarse` pixels at most; `most` of them may be picked, and are shown in up to
    `max_tokens`, a frame of `fine` pixels at least. Each picked frame is encoded by itself. `told` is the second question, a
    format string over the row.
    """

    strip: int | None = None
    coarse: int | None = None
    fine: int | None = None
    most: int = 8
    max_tokens: int | None = None
    tag: str = "frames"
    told: str = ""
    failed: str = "Name frames of the strip by their number, from 0 to {last}, in <{tag}>[..]</{tag}>."

    def __post_init__(self) -> None:
        check(self, above=("strip", "coarse", "fine", "max_tokens"), least={"most": 1}, named=("tag",))
        try:
            self.failed.format(last=0, tag=self.tag)
        except (LookupError, ValueError) as error:
            raise RecipeError("failed", f"{self.failed!r} names {error}", "it knows {last} and {tag}") from error

    def start(self, sample: Sample, media: tuple[View, ...]) -> Turn:
        fill(self.told, sample.row, sample)
        if self.strip is None and self.coarse is None:
            return Turn()
        films = {v.media for v in media if v.kind == "video"}
        strip = {"frames": self.strip, "max_pixels": self.coarse}
        return Turn(looks=[Look(video=v.media, **(strip if v.media in films else {})) for v in media])

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        strip = _strip(state)
        if strip is None or not any(view is strip for view in state.shown):
            return Final()
        count = len(set(strip.frames))
        limits = actions.Limits(num_frames=count, most=self.most)
        found = actions.clue(reply, limits, kind="indices", tags=(self.tag,))
        if found.status == "absent":
            return Final()
        if not found.is_usable:
            return Turn(text="", note=self.failed.format(last=count - 1, tag=self.tag), looks=(), refused=(found.status,))
        picked = Look(indices=found.indices, of=strip, max_tokens=self.max_tokens, min_pixels=self.fine, apart=True)
        return Turn(text=fill(self.told, state.sample.row, state.sample) if self.told else None, looks=[picked])

    def teach(self, answer: str, media: tuple[View, ...], state: State) -> str:
        strip, known = _strip(state), state.sample.answer
        spans = clued(known)
        if state.round or state.rounds < 2 or strip is None or not (spans or "frames" in known):
            return answer
        seconds = tuple(dict.fromkeys(strip.seconds))
        wanted = [int(i) for i in known["frames"]] if "frames" in known else _inside(seconds, spans)
        least = max(len(wanted), 1) / self.most
        if least > 1:  # more than may be picked: evenly out of them
            wanted = [wanted[int(i * least)] for i in range(self.most)]
        return f"<{self.tag}>{wanted}</{self.tag}>"


def _strip(state: State) -> View | None:
    """What the numbers count: the longest video as it was shown first."""
    return longest(state.views)


def _inside(seconds: Sequence[float], spans: Sequence[Span]) -> list[int]:
    """The frames in the spans, or the one nearest to the middle of the first."""
    inside = [i for i, s in enumerate(seconds) if any(start <= s <= end for start, end in spans)]
    return inside or [min(range(len(seconds)), key=lambda i: abs(seconds[i] - sum(spans[0]) / 2))]
