"""What is done to an annotated span or sentence that cannot be used as it stands. Every deed has a name."""

from __future__ import annotations

from typing import Literal

from rft.data.importers.outcome import Note
from rft.data.samples import OVERSHOOT
from rft.geometry import span_iou
from rft.types import Span

Reversed = Literal["swap", "drop"]
NOISE = 1e-6  # seconds: an end this little after the video is one float written in two ways
LEAST_IOU = 0.99  # of a span with itself as two decimals say it


def mend_span(start: float, end: float, duration: float | None, reversed: Reversed) -> tuple[Span, tuple[Note, ...]]:
    """A span in seconds that its completion can say, and what was done to it; a last note that is a drop ends it.

    In this order: `reversed` ends are swapped (or the annotation is dropped), `zero_length` is dropped, as is what
    `starts_after_video` or `ends_before_video`; an end after the video is clamped to it under one of three reasons
    (`end_by_float_noise`, `end_after_video`, and `end_far_after_video` for more than 2 s), `start_before_video` to 0. Then
    both ends are rounded to the two decimals that completions have: `rounded` where that moves one, and
    `lost_in_rounding` is a drop where the rounded span overlaps its own annotation by less than 0.99.
    """
    notes: list[Note] = []
    if start > end:
        if reversed == "drop":
            return (start, end), (("dropped", "reversed"),)
        notes.append(("repaired", "reversed"))
        start, end = end, start
    if start == end:
        return (start, end), (*notes, ("dropped", "zero_length"))
    if end <= 0:
        return (start, end), (*notes, ("dropped", "ends_before_video"))
    if duration is not None and start >= duration:
        return (start, end), (*notes, ("dropped", "starts_after_video"))
    if start < 0:
        notes.append(("clamped", "start_before_video"))
        start = 0.0
    if duration is not None and end > duration:
        over = end - duration
        how = "end_by_float_noise" if over < NOISE else "end_after_video" if over <= OVERSHOOT else "end_far_after_video"
        notes.append(("clamped", how))
        end = duration
    said = (round(start, 2), round(end, 2))
    if span_iou(said, (start, end)) < LEAST_IOU:
        return said, (*notes, ("dropped", "lost_in_rounding"))
    if abs(said[0] - start) > NOISE or abs(said[1] - end) > NOISE:
        notes.append(("repaired", "rounded"))
    return said, tuple(notes)


def mend_text(text: str) -> tuple[str, tuple[Note, ...]]:
    """The text with single blanks and none around it; case and full stop stay. An `empty_text` is a drop."""
    mended = " ".join(text.split())
    if not mended:
        return mended, (("dropped", "empty_text"),)
    return mended, (("repaired", "blanks"),) if mended != text else ()
