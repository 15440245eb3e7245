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
from rft.rollout.perceptions.checked import check
from rft.types import Sample, Span, View


@dataclass(kw_only=True)
class Zoom:
    """`<zoom>[x0, y0, x1, y1]</zoom>`, or a `<tool_call>` in JSON, about what was shown last.

    A call in JSON may name one of several media by its number (`"image": 1`), and is then about what was shown of it last;
    otherwise it is the first of them, where that was shown. A box alone keeps to the window of what it is about. A reply
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
        check(self, above=("frames", "max_tokens", "fine"), least={"share": 0.0}, named=("tool",))
        try:
            self.failed.format(tool=self.tool)
        except (LookupError, ValueError) as error:
            raise RecipeError("failed", f"{self.failed!r} names {error}", "it knows {tool}") from error

    def start(self, sample: Sample, media: tuple[View, ...]) -> Turn:
        whole = [(v.media, (v.seconds[0], v.seconds[-1]), None) for v in media if v.kind == "video"]
        self.windows: list[tuple[int, Span, Span | None]] = whole  # of a media: seconds that were asked for, as a look
        return Turn()

    def observe(self, reply: str, media: tuple[View, ...], state: State) -> Turn | Final:
        named = actions.calls(reply, {self.tool: "boxes"})
        if parsing.tagged(reply, "answer") is not None or not state.shown or not named:
            return Final()
        sizes = {"frames": self.frames, "max_tokens": self.max_tokens, "share": self.share}
        looks, refused = [], []
        for place, call in enumerate(named):
            if (call.media or 0) >= len(media):
                refused.append("media")
                continue
            shown = _about(call.media, state, media)
            # what can be read depends on what it is about
            limits = actions.Limits(duration=shown.duration or inf, extent=extent(shown, state.family))
            reading = actions.calls(reply, {self.tool: "boxes"}, limits)[place]
            refused += [] if reading.is_usable else [reading.status]
            asked = actions.looks(reading, shown, state.family, **sizes) if reading.is_usable else ()
            looks += [replace(one, span=one.span or self._window(shown)) for one in asked]
        self.windows += [(one.video, one.span, one.span) for one in looks if one.span]
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
        box = to_view(box, _about(None, state, media), state.family)
        x0, y0, x1, y1 = (round(x, 6) for x in box)  # outwards below, so that a small box keeps an area
        return f"<{self.tool}>{[floor(x0), floor(y0), ceil(x1), ceil(y1)]}</{self.tool}>"

    def _window(self, shown: View) -> Span | None:
        """The window that a view was asked for with; None for the whole film. A view knows its frames alone."""
        if shown.kind != "video":
            return None
        first, last = shown.seconds[0], shown.seconds[-1]
        ours = [(seconds, span) for media, seconds, span in self.windows if media == shown.media]
        return min(ours, key=lambda one: abs(one[0][0] - first) + abs(one[0][1] - last))[1]


def _about(number: int | None, state: State, media: Sequence[View]) -> View:
    """The view that a call is about: the latest of the media that it names, else the first media's of what was shown last."""
    if number is None:
        return next((view for view in reversed(state.shown) if view.media == 0), state.shown[-1])
    return next((view for view in reversed(state.views) if view.media == number), media[number])
