"""Looking again: a `Look` names what to show of a sample's media, `look` makes the `View` of it, with its true seconds.

Every look speaks in one frame of reference: seconds and pixels of the file, frames by their index in the file or in an
earlier view. A model answers in the frame of what it was shown: `to_file` carries its box to the file and `to_view` back.

A look may show what was encoded before and nothing new: the pooled map of a picture, and later a region of it, gathered
from the same encoding (`cells`).

Whatever numbers a model can come up with, `look` answers with a `View` or with `Refused` and raises nothing. What only an
author can get wrong (fields that contradict each other, a budget that does) is a DataError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from rft import geometry
from rft.data import media as files
from rft.data.budget import Budget
from rft.data.cells import covering, extent, part, picture, shown
from rft.data.cells import whole as whole
from rft.errors import DataError
from rft.families import Family
from rft.types import Box, Media, Sample, Span, View

Why = Literal["media", "kind", "reversed", "empty", "outside", "frames", "size", "unreadable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What to show. With nothing set: the media as the budget shows it.

    A window `span` is shown at the budget's rate, at `fps`, or in up to `frames` frames (fewer where it holds fewer);
    `indices` are shown themselves, each once, in order of time. Two that follow each other share a temporal patch, and the
    tower mixes them, however far apart they are; `apart` gives each a patch of its own, which it fills by being shown
    again. `crop` is in pixels of the file. `min_pixels` and `max_pixels` of a frame take the place of the budget's: the first
    is how large a small crop is blown up.

    With `pool` all of this is encoded as ever, and shown as means over `pool` x `pool` of its tokens. `region`, in pixels of
    the file, is gathered from the unpooled encoding of `of`, of all its frames. `max_tokens` bounds the placeholder tokens:
    a window gives up frames and then pixels, chosen frames only pixels; where there is a `pool` above 1 or a region, the
    pool grows and nothing else is given up.

    Raises DataError for fields that contradict each other or are no numbers. Whether the media has what the numbers name
    is for `look` to say.
    """

    video: int = 0  # index in `Sample.media`
    span: Span | None = None  # seconds
    frames: int | None = None
    fps: float | None = None
    indices: tuple[int, ...] | None = None  # of the file's frames, or of the different ones of `of`
    apart: bool = False
    crop: Box | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_tokens: int | None = None
    of: View | None = None  # an earlier view: its media, what `indices` count in it, and what a region is part of
    pool: int = 1
    region: Box | None = None

    def __post_init__(self) -> None:
        for name, count in (("span", 2), ("crop", 4), ("region", 4)):
            value = getattr(self, name)
            if value is not None:
                is_listed = isinstance(value, (tuple, list)) and len(value) == count
                if not is_listed or not all(isinstance(x, (int, float)) for x in value):
                    raise DataError("look", f"{name}={value!r}", f"give {count} numbers")
                object.__setattr__(self, name, tuple(value))
        for name in ("frames", "fps", "min_pixels", "max_pixels", "max_tokens", "pool"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise DataError("look", f"{name}={value!r} is not positive", f"give {name} a value above zero")
        if self.indices is not None:
            if others := [name for name in ("span", "frames", "fps") if getattr(self, name) is not None]:
                raise DataError("look", f"indices beside {', '.join(others)}", "choose frames, or a window, not both")
            if not isinstance(self.indices, (tuple, list)) or not all(isinstance(i, int) for i in self.indices):
                raise DataError("look", f"indices={self.indices!r}", "give whole numbers")
            object.__setattr__(self, "indices", tuple(self.indices))
        if not isinstance(self.pool, int):
            raise DataError("look", f"pool={self.pool!r}", "give a whole number")
        if self.apart and self.indices is None:
            raise DataError("look", "apart without indices", "choose the frames that are shown apart")
        if self.region is not None:
            if self.of is None:
                raise DataError("look", "a region of no view", "pass the view whose encoding it is part of")
            if others := [n for n in ("span", "frames", "fps", "indices", "crop") if getattr(self, n) is not None]:
                raise DataError("look", f"region beside {', '.join(others)}", "a region is of all that its view encoded")
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
    does not exist or cannot be read (any more), a frame that is not there, and what does not fit into `max_tokens`. A
    region is cut or refused in the same way by what its view encoded. Where the row itself shows a part of the file only
    (`video_start`, `video_end`) nothing else can be looked at.

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
    if wanted.min_pixels or wanted.max_pixels:
        low, high = wanted.min_pixels or budget.min_pixels, wanted.max_pixels or budget.max_pixels
        if low and high and low > high:  # the look's own is the one that counts
            low, high = (low, low) if wanted.max_pixels is None else (high, high)
        budget = replace(budget, min_pixels=low, max_pixels=high)
    if wanted.crop is not None:
        (x0, y0, x1, y1), (height, width) = wanted.crop, size
        wanted = replace(wanted, crop=(max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)))
    own = replace(media, budget={})  # merged above: the row's window must not take the place of the look's
    try:
        if wanted.region is not None:
            region = covering(wanted.region, wanted.of, family)
            return part(wanted.of, family, pool=wanted.pool, region=region, max_tokens=wanted.max_tokens)
        limit = wanted.max_tokens if wanted.pool == 1 else None
        if frames is None:
            view = files.view(own, index, family=family, budget=budget, max_tokens=limit, crop=wanted.crop)
        else:
            copies = family.temporal_patch if wanted.apart else 1
            frames = tuple(i for i in frames for _ in range(copies))
            view = _chosen(own, index, frames, (size, seconds, duration), wanted.crop, limit, family, budget)
        return view if wanted.pool == 1 else part(view, family, pool=wanted.pool, max_tokens=wanted.max_tokens)
    except DataError as error:
        return Refused(why="size", what="it cannot be shown in a size that is allowed", where=where, detail=error.what)


def to_file(box: Box, view: View, family: Family) -> Box:
    """A box that a model wrote about a view, in pixels of the file, cut to what the view showed.

    A reversed box stays reversed, and one that misses the view has no area: `look` refuses both.
    """
    return geometry.carried(box, (0, 0, *extent(view, family)), shown(view, family))


def to_view(box: Box, view: View, family: Family) -> Box:
    """A box in pixels of the file as a model that is shown the view should write it, cut to the view; not rounded."""
    return geometry.carried(box, shown(view, family), (0, 0, *extent(view, family)))


def _facts(media: Media, index: int, family: Family) -> tuple[tuple[int, int], tuple[float, ...], float]:
    """((height, width), second of each frame, duration) of the file. Raises DataError when it cannot be read."""
    if media.kind == "video":
        found = files.probe(media.source)
        return found.size, found.seconds, found.duration
    view = files.view(replace(media, budget={}), index, family=family, budget=Budget(nframes=family.temporal_patch))
    return view.original, media.seconds, view.duration


def _frames(wanted: Look, seconds: tuple[float, ...]) -> tuple[int, ...] | None:
    """The chosen frames of the file, ascending; -1 among them where one is not there. None without a choice."""
    if wanted.indices is None:
        return None
    there = range(len(seconds)) if wanted.of is None else _different(wanted.of)
    return tuple(sorted({there[i] if 0 <= i < len(there) else -1 for i in wanted.indices}))


def _different(view: View) -> tuple[int, ...]:
    """The frames of a view, each once."""
    return tuple(dict.fromkeys(view.frames))


def _misfit(
    wanted: Look,
    frames: tuple[int, ...] | None,
    size: tuple[int, int],
    seconds: tuple[float, ...],
    allowed: Span,
    budget: Budget,
) -> tuple[Why, str] | None:
    """Why the numbers of a look name nothing in this media; None when they do."""
    if not seconds and (frames is not None or any(x is not None for x in (wanted.span, wanted.frames, wanted.fps))):
        return "kind", "an image has no times and no frames"
    if wanted.span is not None:
        (start, end), (low, high) = wanted.span, allowed
        name = f"the window {start:g} to {end:g} s"
        if not start < end:
            return ("reversed", f"{name} is reversed") if start > end else ("empty", f"{name} has no length")
        if start >= high or end <= low:
            return "outside", f"{name} is outside of the video, {low:g} to {high:g} s"
    if frames is not None:
        if not frames:
            return "empty", "no frame was chosen"
        if frames[0] < 0:
            count = len(seconds) if wanted.of is None else len(_different(wanted.of))
            return "frames", f"frames are numbered 0 to {count - 1}"
        if len(frames) > budget.max_frames:
            return "frames", f"{len(frames)} frames are more than {budget.max_frames}"
        if seconds[frames[0]] < allowed[0] or seconds[frames[-1]] > allowed[1]:
            return "outside", f"a chosen frame is outside of the video, {allowed[0]:g} to {allowed[1]:g} s"
    if wanted.crop is not None:
        return _missing(wanted.crop, (0, 0, size[1], size[0]))
    if wanted.region is not None:
        return _missing(wanted.region, picture(wanted.of))
    return None


def _missing(box: Box, area: Box) -> tuple[Why, str] | None:
    """Why a box names nothing in a picture; None when it does."""
    x0, y0, x1, y1 = box
    if x0 > x1 or y0 > y1:
        return "reversed", "the box is reversed"
    if not (x0 < x1 and y0 < y1):
        return "empty", "the box has no area"
    if x0 >= area[2] or y0 >= area[3] or x1 <= area[0] or y1 <= area[1]:
        return "outside", "the box is outside of the picture"
    return None


def _chosen(
    media: Media,
    index: int,
    frames: tuple[int, ...],
    facts: tuple[tuple[int, int], tuple[float, ...], float],
    crop: Box | None,
    limit: int | None,
    family: Family,
    budget: Budget,
) -> View:
    """A view of exactly these frames. Raises DataError when they take more than `limit` tokens at their smallest."""
    size, seconds, duration = facts
    crop = crop and files.clipped(media.name, crop, size)
    area = size if crop is None else (int(crop[3] - crop[1]), int(crop[2] - crop[0]))
    room = math.inf
    if limit is not None:
        room = limit // family.grid(len(frames), area)[0] * family.unit**2
    resized, _ = files.sized(media, area, len(frames), family, budget, room)
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


def frame_seconds(media: Media) -> tuple[float, ...]:
    """The presentation second of every frame of a video or a list of frames; () for an image.

    Raises DataError when the file cannot be read.
    """
    return files.probe(media.source).seconds if media.kind == "video" else media.seconds


def longest(views: Iterable[View]) -> View | None:
    """The longest video among some views; None without one."""
    return max((v for v in views if v.kind == "video"), key=lambda v: v.duration, default=None)
