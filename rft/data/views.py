"""Looking again: a `Look` names what to show of a sample's media, `look` makes the `View` of it, with its true seconds.

Every look speaks in one frame of reference: seconds and pixels of the file, frames by their index in the file or in an
earlier view. A model answers in the frame of what it was shown: `to_file` carries its box to the file and `to_view` back.

Whatever numbers a model can come up with, `look` answers with a `View` or with `Refused` and raises nothing. What only an
author can get wrong (fields that contradict each other, a budget that does) is a DataError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from rft import geometry
from rft.data import media as files
from rft.data.budget import Budget
from rft.errors import DataError
from rft.families import Family
from rft.types import Box, Media, Sample, Span, View

Why = Literal["media", "kind", "reversed", "empty", "outside", "frames", "size", "unreadable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What to show. With nothing set: the media as the budget shows it.

    A window `span` is shown at the budget's rate, at `fps`, or in up to `frames` frames (fewer where it holds fewer);
    `indices` are shown themselves, each once, in order of time. `crop` is in pixels of the file; the budget's
    `min_pixels` is how large a small crop is blown up. `max_tokens` bounds the placeholder tokens: a window gives up
    frames and then pixels, chosen frames only pixels.

    Raises DataError for fields that contradict each other or are no numbers. Whether the media has what the numbers name
    is for `look` to say.
    """

    video: int = 0  # index in `Sample.media`
    span: Span | None = None  # seconds
    frames: int | None = None
    fps: float | None = None
    indices: tuple[int, ...] | None = None  # of the file's frames, or of those of `of`
    crop: Box | None = None
    max_tokens: int | None = None
    of: View | None = None  # an earlier view: its media, and what `indices` count in it

    def __post_init__(self) -> None:
        for name, count in (("span", 2), ("crop", 4)):
            value = getattr(self, name)
            if value is not None:
                is_listed = isinstance(value, (tuple, list)) and len(value) == count
                if not is_listed or not all(isinstance(x, (int, float)) for x in value):
                    raise DataError("look", f"{name}={value!r}", f"give {count} numbers")
                object.__setattr__(self, name, tuple(value))
        for name in ("frames", "fps", "max_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise DataError("look", f"{name}={value!r} is not positive", f"give {name} a value above zero")
        if self.indices is not None:
            if others := [name for name in ("span", "frames", "fps") if getattr(self, name) is not None]:
                raise DataError("look", f"indices beside {', '.join(others)}", "choose frames, or a window, not both")
            if not isinstance(self.indices, (tuple, list)) or not all(isinstance(i, int) for i in self.indices):
                raise DataError("look", f"indices={self.indices!r}", "give whole numbers")
            object.__setattr__(self, "indices", tuple(self.indices))
        if self.frames is not None and self.fps is not None:
            raise DataError("look", f"frames={self.frames} and fps={self.fps} are both set", "keep one of them")
        if self.of is not None and self.video not in (0, self.of.media):
            raise DataError("look", f"video={self.video} and a view of media {self.of.media}", "leave video out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A look that is not shown. `what` is said in words that a model may be told; `detail` is for the log."""

    why: Why
    what: str
    where: str  # the sample and the media
    detail: str = ""

    @property
    def error(self) -> DataError:
        """To raise where an author, not a model, asked for the look."""
        what = self.what + (f" ({self.detail})" if self.detail else "")
        return DataError(self.where, what, "check the look against the media, or leave the sample out")


def look(sample: Sample, wanted: Look, *, family: Family, budget: Budget) -> View | Refused:
    """The view that a look asks for, or why there is none. Opens the file, decodes nothing.

    A window or crop that reaches out of the media is cut to it; one that misses it is refused, and so is a media that
    does not exist or cannot be read (any more), a frame that is not there, and what does not fit into `max_tokens`. Where
    the row itself shows a part of the file only (`video_start`, `video_end`) nothing else can be looked at.

    Raises DataError when the row's budget and `budget` contradict each other, and when `of` is no view of the sample.
    """
    index = wanted.video if wanted.of is None else wanted.of.media
    at = f"sample {sample.id}" + (f" ({sample.origin})" if sample.origin else "")
    if not 0 <= index < len(sample.media):
        return Refused(why="media", what=f"there is no video or image number {index}", where=at)
    media = sample.media[index]
    where = f"{at}, {media.name}"
    if wanted.of is not None and wanted.of.source != media.source:
        raise DataError(where, f"is not what the earlier view shows ({wanted.of.source})", "pass a view of this sample")
    try:
        budget = budget.merged(media.budget)
    except DataError as error:
        raise DataError(where, error.what, error.do) from error
    try:
        size, seconds, duration = _facts(media, index, family)
    except DataError as error:
        return Refused(why="unreadable", what="it cannot be read", where=where, detail=error.what)

    low, high = budget.video_start or 0.0, math.inf if budget.video_end is None else budget.video_end
    low, high = (max(low, seconds[0]), min(high, duration)) if seconds else (low, high)
    frames = _frames(wanted, seconds)
    if refusal := _misfit(wanted, frames, size, seconds, (low, high), budget):
        return Refused(why=refusal[0], what=refusal[1], where=where)
    if wanted.span is not None:
        budget = replace(budget, video_start=max(wanted.span[0], low), video_end=min(wanted.span[1], high))
    if wanted.frames is not None:
        budget = replace(budget, fps=None, nframes=min(int(wanted.frames), budget.max_frames))
    elif wanted.fps is not None:
        budget = replace(budget, fps=wanted.fps, nframes=None)
    if wanted.crop is not None:
        (x0, y0, x1, y1), (height, width) = wanted.crop, size
        wanted = replace(wanted, crop=(max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)))
    own = replace(media, budget={})  # merged above: the row's window must not take the place of the look's
    try:
        if frames is None:
            limit = wanted.max_tokens
            return files.view(own, index, family=family, budget=budget, max_tokens=limit, crop=wanted.crop)
        return _chosen(own, index, frames, (size, seconds, duration), wanted, family, budget)
    except DataError as error:
        return Refused(why="size", what="it cannot be shown in a size that is allowed", where=where, detail=error.what)


def to_file(box: Box, view: View, family: Family) -> Box:
    """A box that a model wrote about a view, in pixels of the file, cut to what the view showed.

    A reversed box stays reversed, and one that misses the view has no area: `look` refuses both.
    """
    return geometry.carried(box, (0, 0, *family.box_extent(view.size)), _shown(view))


def to_view(box: Box, view: View, family: Family) -> Box:
    """A box in pixels of the file as a model that is shown the view should write it, cut to the view; not rounded."""
    return geometry.carried(box, _shown(view), (0, 0, *family.box_extent(view.size)))


def _shown(view: View) -> Box:
    return view.crop or (0, 0, view.original[1], view.original[0])


def _facts(media: Media, index: int, family: Family) -> tuple[tuple[int, int], tuple[float, ...], float]:
    """((height, width), second of each frame, duration) of the file. Raises DataError when it cannot be read."""
    if media.kind == "video":
        found = files.probe(media.source)
        return found.size, found.seconds, found.duration
    whole = files.view(replace(media, budget={}), index, family=family, budget=Budget(nframes=family.temporal_patch))
    return whole.original, media.seconds, whole.duration


def _frames(wanted: Look, seconds: tuple[float, ...]) -> tuple[int, ...] | None:
    """The chosen frames of the file, ascending; -1 among them where one is not there. None without a choice."""
    if wanted.indices is None:
        return None
    there = range(len(seconds)) if wanted.of is None else wanted.of.frames
    return tuple(sorted({there[i] if 0 <= i < len(there) else -1 for i in wanted.indices}))


def _misfit(
    wanted: Look,
    frames: tuple[int, ...] | None,
    size: tuple[int, int],
    seconds: tuple[float, ...],
    shown: Span,
    budget: Budget,
) -> tuple[Why, str] | None:
    """Why the numbers of a look name nothing in this media; None when they do."""
    if not seconds and (frames is not None or any(x is not None for x in (wanted.span, wanted.frames, wanted.fps))):
        return "kind", "an image has no times and no frames"
    if wanted.span is not None:
        (start, end), (low, high) = wanted.span, shown
        name = f"the window {start:g} to {end:g} s"
        if not start < end:
            return ("reversed", f"{name} is reversed") if start > end else ("empty", f"{name} has no length")
        if start >= high or end <= low:
            return "outside", f"{name} is outside of the video, {low:g} to {high:g} s"
    if frames is not None:
        if not frames:
            return "empty", "no frame was chosen"
        if frames[0] < 0:
            count = len(seconds) if wanted.of is None else len(wanted.of.frames)
            return "frames", f"frames are numbered 0 to {count - 1}"
        if len(frames) > budget.max_frames:
            return "frames", f"{len(frames)} frames are more than {budget.max_frames}"
        if seconds[frames[0]] < shown[0] or seconds[frames[-1]] > shown[1]:
            return "outside", f"a chosen frame is outside of the video, {shown[0]:g} to {shown[1]:g} s"
    if wanted.crop is not None:
        x0, y0, x1, y1 = wanted.crop
        if x0 > x1 or y0 > y1:
            return "reversed", "the box is reversed"
        if not (x0 < x1 and y0 < y1):
            return "empty", "the box has no area"
        if x0 >= size[1] or y0 >= size[0] or x1 <= 0 or y1 <= 0:
            return "outside", "the box is outside of the picture"
    return None


def _chosen(
    media: Media,
    index: int,
    frames: tuple[int, ...],
    facts: tuple[tuple[int, int], tuple[float, ...], float],
    wanted: Look,
    family: Family,
    budget: Budget,
) -> View:
    """A view of exactly these frames. Raises DataError when they do not fit into `max_tokens` at their smallest."""
    size, seconds, duration = facts
    crop = wanted.crop and files._clipped(media.name, wanted.crop, size)
    area = size if crop is None else (int(crop[3] - crop[1]), int(crop[2] - crop[0]))
    limit, room = wanted.max_tokens, math.inf
    if limit is not None:
        room = limit // family.grid(len(frames), area)[0] * family.unit**2
    resized, _ = files._sized(media, area, len(frames), family, budget, room)
    grid = family.grid(len(frames), resized)
    if limit is not None and family.tokens(grid) > limit:
        what = f"{len(frames)} frames take {family.tokens(grid)} tokens at their smallest, max_tokens is {limit}"
        raise DataError(media.name, what, "raise max_tokens or lower min_pixels")
    times = tuple(seconds[i] for i in frames)
    return View(
        media=index,
        kind="video",
        source=media.source,
        frames=frames,
        seconds=times,
        pair_seconds=family.pair_seconds(times),
        size=resized,
        original=size,
        grid=grid,
        tokens=family.tokens(grid),
        duration=duration,
        crop=crop,
    )
