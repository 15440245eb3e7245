"""A tool that crops: the model names a box, with or without a window, and is shown it large. Several calls, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, inf

from rft import parsing
from rft.data.cells import extent
from rft.data.views import to_view
from rft.errors import RecipeError
from rft.rollout import actions
from rft.rollout.perceive import Final, State, Turn
from rft.types import Sample, View


@dataclass(kw_only=True)
class Zoom:
    """`<zoom>[x0, y0, x1, y1]</zoom>`, or a `<tool_call>` in JSON, about what was shown last.

    Where that were several media, a call in JSON may name one by its number (`"image": 1`); 0 is the first. A reply
    without a call is the answer. `frames` and `max_tokens` are those of each crop, which is shown with `fine` pixels
    at least; `share` widens a window that is named beside the box. `told` stands behind what is shown, `failed` answers
    calls none of which can be read; a fresh prompt asks the question again.
    """

    tool: str = "zoom"
    frames: int | None = None
    max_tokens: int | None = None
    fine: int | None = None
    share: float = 0.0
    told: str = ""
    failed: str = "This call cannot be read. Write <{tool}>[x0, y0, x1, y1]</{tool}>, or answer."

    def __post_init__(self) -> None:
        try:
            self.failed.format(tool=self.tool)
        except (LookupError, ValueError) as error:
            raise RecipeError("failed", f"{self.failed!r} names {error}", "it knows {tool}") from error

    def start(self, sample: Sample, media: tuple[View, ...]) -> Turn:
        return Turn()

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        named = actions.calls(reply, {self.tool: "boxes"})
        if parsing.tagged(reply, "answer") is not None or not state.shown or not named:
            return Final()
        sizes = {"frames": self.frames, "max_tokens": self.max_tokens, "share": self.share}
        looks, refused = [], []
        for place, call in enumerate(named):
            shown = _about(call.media, state.shown)
            if call.media >= len(media):
                refused.append("media")
                continue
            # what can be read depends on what it is about
            limits = actions.Limits(duration=shown.duration or inf, extent=extent(shown, state.family))
            reading = actions.calls(reply, {self.tool: "boxes"}, limits)[place]
            refused += [] if reading.is_usable else [reading.status]
            looks += actions.looks(reading, shown, state.family, **sizes) if reading.is_usable else ()
        note = "" if looks else self.failed.format(tool=self.tool)
        return Turn(
            text=self.told if looks else "",
            note=note,
            looks=[replace(one, min_pixels=self.fine) for one in looks],
            refused=refused,
        )

    def teach(self, answer: str, media: tuple[View, ...], state: State) -> str:
        box = state.sample.answer.get("clue_box") or state.sample.answer.get("box")
        if state.round or box is None or state.rounds < 2 or not state.shown:
            return answer
        box = to_view(box, _about(0, state.shown), state.family)
        x0, y0, x1, y1 = (round(x, 6) for x in box)  # outwards below, so that a small box keeps an area
        return f"<{self.tool}>{[floor(x0), floor(y0), ceil(x1), ceil(y1)]}</{self.tool}>"


def _about(media: int, shown: Sequence[View]) -> View:
    """The view that a call with this number is about."""
    return next((view for view in reversed(shown) if view.media == media), shown[-1])
