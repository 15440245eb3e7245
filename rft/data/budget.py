"""How much of a media may be shown, in the words of qwen-vl-utils."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from rft.errors import DataError
from rft.strict import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much of a media may be shown: the keys of qwen-vl-utils. None leaves a size to its default.

    `fps` (2.0 when neither is set) or `nframes` says how many frames; `min_frames` and `max_frames` clamp what `fps`
    asks for. `min_pixels` and `max_pixels` are per frame or image, `total_pixels` is over the clip, whose frames the
    library counts in pairs; `video_start` and `video_end` are seconds. Raises DataError where two keys contradict.
    """

    fps: float | None = None
    nframes: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    video_start: float | None = None
    video_end: float | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and self.nframes is not None:
            raise DataError("budget", f"fps={self.fps} and nframes={self.nframes} are both set", "keep one of them")
        if self.fps is None and self.nframes is None:
            object.__setattr__(self, "fps", 2.0)
        for key in ("fps", "nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise DataError("budget", f"{key}={value} is not positive", f"give {key} a value above zero")
        for low, high in (("min_frames", "max_frames"), ("min_pixels", "max_pixels"), ("video_start", "video_end")):
            a, b = getattr(self, low), getattr(self, high)
            if a is not None and b is not None and (a > b or (a == b and low == "video_start")):
                raise DataError("budget", f"{low}={a} leaves nothing below {high}={b}", f"lower {low} or raise {high}")

    def merged(self, row: Mapping[str, float]) -> Budget:
        """This budget under the keys that a row sets itself; its `nframes` takes the place of `fps` and vice versa.

        A key that is None is a column that Arrow filled in and is passed over. Raises DataError on an unknown key.
        """
        changes = {key: value for key, value in row.items() if value is not None}
        known = [f.name for f in fields(self)]
        for key in changes:
            if key not in known:
                raise DataError("budget", f"unknown key {key!r}", nearest(key, known))
        if "nframes" in changes:
            changes.setdefault("fps", None)
        elif "fps" in changes:
            changes["nframes"] = None
        return replace(self, **changes)
