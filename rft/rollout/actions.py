"""What a model wrote -> what it wants to see. Nothing here raises on model text, whatever it is.

    windows, boxes, indices    the inside of a tag as a `Reading`: the values that can be used, and how they came about
    clue                       the last `<clue>` or `<glue>` of a turn
    calls                      every call of a tool in a turn, `<zoom>[..]</zoom>` or {"name": "zoom", "arguments": {..}}
    looks                      a reading as looks, its boxes carried to the pixels of the file
    remember, is_unchanged     a clue over several rounds

A reading holds usable values alone: inside of what was shown, in order, none reversed. `Limits` says what was shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from rft import geometry, parsing
from rft.data.views import Look, to_file
from rft.families import Family
from rft.types import Box, Span, View

Status = Literal["parsed", "repaired", "empty", "unparsable", "out of range", "absent", "unknown"]
Kind = Literal["windows", "boxes", "indices"]
Policy = Literal["replace", "union", "intersect"]

_BARE = re.compile(r"[-0-9.,\s\[\]()]*+")  # brackets and numbers
NOTHING = ("", "[]", "()", "{}", "none", "null", "n/a")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a model may name: times within `duration`, boxes within `extent` (`Family.box_extent`), frames below `num_frames`.

    What is written reversed is swapped, or left out with `reversed="drop"`. Values beyond the first `most` are left out.
    """

    duration: float = inf  # seconds
    extent: tuple[float, float] = (inf, inf)  # x, y
    num_frames: int = 10**9
    most: int = 8
    reversed: Literal["swap", "drop"] = "swap"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a piece of model text names.

    `parsed`: as the grammar has it. `repaired`: usable after help (a loose format, swapped, cut or left-out values).
    `empty`: it says that there is nothing. `unparsable`: nothing can be read. `out of range`: read, and all of it misses
    what was shown or has no extent. `absent`: there is no such tag. `unknown`: a call of a tool that does not exist.
    """

    status: Status
    windows: tuple[Span, ...] = ()  # merged, in order of time
    boxes: tuple[Box, ...] = ()  # in the model's own coordinates
    indices: tuple[int, ...] = ()  # ascending, each once
    name: str = ""  # the tag or the tool
    media: int | None = None  # of a call: the media it names

    @property
    def is_usable(self) -> bool:
        """Whether there is anything to look at."""
        return self.status in ("parsed", "repaired")


def windows(text: str | None, limits: Limits = Limits(), *, is_strict: bool = True) -> Reading:
    """Windows of time: a list of pairs, tuples or objects, "a to b", clocks and units (`parsing.windows`).

    Cut to [0, duration], then merged: that they overlap is no fault. An instant is kept as a window without length.
    Without `is_strict` a loose format is no fault either, here and in the other readers.
    """
    found = parsing.windows(text)
    if not found:
        return _nothing(text)
    kept = found[: limits.most]
    ordered = [(a, b) if a <= b else (b, a) for a, b in kept if a <= b or limits.reversed == "swap"]
    inside = [(max(a, 0.0), min(b, limits.duration)) for a, b in ordered if a < limits.duration and (b > 0 or a == 0)]
    is_clean = inside == found and (not is_strict or parsing.time_spans(text) is not None)
    return Reading(status=_status(inside, is_clean), windows=geometry.merged(inside))


def boxes(text: str | None, limits: Limits = Limits(), *, is_strict: bool = True) -> Reading:
    """Boxes [x0, y0, x1, y1] in the coordinates of the model, cut to the picture; those without area are left out."""
    found = parsing.boxes(text)
    if not found:
        return _nothing(text)
    inside = []
    for x0, y0, x1, y1 in found[: limits.most]:
        if limits.reversed == "swap":
            x0, y0, x1, y1 = min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
        box = (max(x0, 0.0), max(y0, 0.0), min(x1, limits.extent[0]), min(y1, limits.extent[1]))
        inside += [box] if box[0] < box[2] and box[1] < box[3] else []
    is_clean = inside == found and (not is_strict or _BARE.fullmatch(text) is not None)
    return Reading(status=_status(inside, is_clean), boxes=tuple(inside))


def indices(text: str | None, limits: Limits = Limits(), *, is_strict: bool = True) -> Reading:
    """Numbers of frames: one list, with or without brackets. A repeated one counts once."""
    found = parsing.indices(text)
    if not found:
        return _nothing(text)
    inside = [i for i in dict.fromkeys(found) if i < limits.num_frames][: limits.most]
    is_clean = inside == found and (not is_strict or _BARE.fullmatch(text) is not None)
    return Reading(status=_status(inside, is_clean), indices=tuple(sorted(inside)))


READERS = {"windows": windows, "boxes": boxes, "indices": indices}


def clue(
    text: str | None, limits: Limits = Limits(), *, kind: Kind = "windows", tags: Sequence[str] = ("clue", "glue")
) -> Reading:
    """The last complete block of one of the tags in a turn. One that is opened and never closed is unparsable."""
    found = parsing.blocks(text, tags)
    if not found:
        is_opened = any(f"<{tag}>" in (text or "") for tag in tags)
        return Reading(status="unparsable" if is_opened else "absent")
    name, inside = found[-1]
    return replace(READERS[kind](inside, limits), name=name)


def calls(text: str | None, known: Mapping[str, Kind], limits: Limits = Limits(), *, most: int = 16) -> tuple[Reading, ...]:
    """Every call in a turn, in order, up to `most`. `known` says by tool what its argument is.

    A tag of its own (`<zoom>[10, 20, 60, 80]</zoom>`), a `<tool_call>` with JSON, or JSON by itself where no tag is. A call
    with a box may name windows too. JSON that names another tool gives `unknown`, and a block without a name `unparsable`.
    """
    return tuple(_call(name, body, media, known, limits) for name, body, media in parsing.calls(text, tuple(known))[:most])


def _call(name: str, arguments: str, media: int | None, known: Mapping[str, Kind], limits: Limits) -> Reading:
    if name not in known:
        return Reading(status="unknown" if name else "unparsable", name=name, media=media)
    # JSON around a list is this tool's grammar, not a fault
    reading = READERS[known[name]](arguments, limits, is_strict="{" not in arguments and '"' not in arguments)
    if known[name] == "boxes" and reading.is_usable:
        reading = replace(reading, windows=windows(arguments, limits).windows)
    return replace(reading, name=name, media=media)


def looks(
    reading: Reading,
    shown: View,
    family: Family,
    *,
    frames: int | None = None,
    fps: float | None = None,
    max_tokens: int | None = None,
    share: float = 0.0,
    least: float = 0.0,
) -> tuple[Look, ...]:
    """A reading about the view `shown` as looks: one per box, else one per window, else one for the indices.

    Indices count the frames of `shown`. Windows are padded to either side by `share` of their length, at least `least`
    seconds. `frames`, `fps` and `max_tokens` are those of each look; chosen frames and images take `max_tokens` alone.
    """
    spans = geometry.padded(reading.windows, share, least, 0.0, shown.duration or inf)
    rate = {} if shown.kind == "image" else {"frames": frames, "fps": fps}
    if reading.boxes:
        when = {**rate, "span": spans[0] if spans else None} if rate else {}
        crops = (to_file(box, shown, family) for box in reading.boxes)
        return tuple(Look(video=shown.media, crop=crop, max_tokens=max_tokens, **when) for crop in crops)
    if spans:
        return tuple(Look(video=shown.media, span=span, max_tokens=max_tokens, **rate) for span in spans)
    if reading.indices:
        return (Look(indices=reading.indices, of=shown, max_tokens=max_tokens),)
    return ()


def remember(old: Sequence[Span], new: Sequence[Span], policy: Policy = "replace") -> tuple[Span, ...]:
    """The windows to keep in mind after a round. A clue that names nothing changes nothing.

    `intersect` keeps what both name, and the new ones where they have no time in common.
    """
    if not new or not old:
        return geometry.merged(new or old)
    if policy == "union":
        return geometry.merged((*old, *new))
    return (geometry.shared_spans(old, new) if policy == "intersect" else ()) or geometry.merged(new)


def is_unchanged(old: Sequence[Span], new: Sequence[Span], min_gain: float = 0.05) -> bool:
    """Whether 1 - IoU of the two sets of windows is below `min_gain`. Nothing and then something is a change."""
    return 1 - geometry.spans_iou(old, new) < min_gain


def _nothing(text: str | None) -> Reading:
    """Of a text in which no value was found: it says so, or nobody knows what it says."""
    return Reading(status="empty" if (text or "").strip().lower() in NOTHING else "unparsable")


def _status(inside: Sequence, is_clean: bool) -> Status:
    return ("parsed" if is_clean else "repaired") if inside else "out of range"
