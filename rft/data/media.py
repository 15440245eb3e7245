"""Videos and images: which frames exist and when (`probe`), what is shown and how large (`view`), the pixels (`read`).

A frame's second is its presentation time: pts x time base, less the container's start when that is after zero. The file
is asked, never the frame rate: with a variable frame rate index / fps is wrong by seconds. Frames are picked by second
and matched by pts while decoding, and a frame that cannot be had is an error, never a replacement.

Budgets follow qwen-vl-utils (keys, `smart_resize`, defaults), so that pixels are those the models were trained on. A
still image is turned upright by its EXIF orientation and laid on white where it is transparent; the rotation that a
video container may ask for is not applied.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from rft.data.budget import Budget
from rft.errors import DataError
from rft.families import Family
from rft.types import Box, Media, View

Window = tuple[float, tuple[int, int]]  # second of the first target, range of frames to choose from
DECODE_THREADS = int(os.environ.get("RFT_DECODE_THREADS", "0"))  # of one decoder; 0 is one per core
TIE = 1e-6  # seconds: two frames this close to equally near count as a tie


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a file holds. Frames are in presentation order; `seconds[i]` and `pts[i]` tell when frame i is shown.

    `keys` are the pts of the key frames in file order, `groups[i]` the index of the key frame whose packets hold frame
    i; both are empty where only decoding could tell, and reading then decodes from the start.
    """

    seconds: tuple[float, ...]
    size: tuple[int, int]  # height, width
    duration: float  # second at which the last frame ends
    pts: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()


def probe(source: str) -> Probe:
    """The frames of a video file, from its packets; decoded only where packets carry no time. Cached per file version.

    Raises DataError for a file that is missing, not a media file, truncated, without a video stream or without frames.
    """
    return _probe(source, *stamp(source))


def stamp(source: str) -> tuple[int, int]:
    """(mtime in ns, size in bytes): tells one version of a file from another. Raises DataError when there is none."""
    try:
        info = os.stat(source)
    except OSError as error:
        raise DataError(source, f"cannot be opened ({error.strerror})", "check the path and the media root") from error
    return info.st_mtime_ns, info.st_size


@lru_cache(maxsize=1024)
def _probe(path: str, _mtime: int, num_bytes: int) -> Probe:
    with _opened(path) as (container, stream):
        reach = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        if reach > num_bytes:
            raise DataError(path, f"truncated: {num_bytes} of {reach} bytes are there", "download the file again")
        base, start = stream.time_base, max(container.start_time or 0, 0) / av.time_base
        size, keys, groups, lasting = (stream.height, stream.width), [], {}, {}
        for packet in container.demux(stream):
            if not packet.size:
                continue  # the mark of the end
            if packet.is_keyframe:
                keys.append(packet.pts)
            if packet.pts is None or not packet.is_discard:
                groups[packet.pts] = max(len(keys) - 1, 0)
                lasting[packet.pts] = packet.duration or 0
    # VP8 hides frames in packets of their own, and some containers give packets no time: there only the decoder knows.
    if stream.codec_context.name == "vp8" or None in lasting:
        with _opened(path) as (container, stream):
            lasting = {f.pts: f.duration or 0 for f in container.decode(stream)}
        keys = []
        if None in lasting:
            raise DataError(path, "its frames carry no presentation times", "remux it: ffmpeg -i in -c copy out.mp4")
    # A stream cut out of a longer one begins with frames that lean on a key frame which is not there.
    pts = sorted(p for p in lasting if not keys or p >= keys[0])
    if not pts:
        raise DataError(path, "has a video stream and not one frame", "leave the sample out or encode the file again")
    # The container's start is rounded to the microsecond: where the picture starts it, its own start is exact.
    lead = float(pts[0] * base) - start
    seconds = tuple(float((p - pts[0]) * base) + (lead if abs(lead) > TIE else 0.0) for p in pts)
    spacing = (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1)
    duration = seconds[-1] + (float(lasting[pts[-1]] * base) or spacing)
    groups = tuple(groups[p] for p in pts) if keys else ()
    return Probe(seconds=seconds, size=size, duration=duration, pts=tuple(pts), keys=tuple(keys), groups=groups)


@contextmanager
def _opened(path: str):
    """(container, its first moving picture). Any error FFmpeg raises inside becomes a DataError that names the file."""
    try:
        with av.open(path) as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "no"
                raise DataError(path, f"has no video stream ({kinds} tracks)", "point the sample at a video")
            streams[0].thread_type = "AUTO"
            streams[0].codec_context.thread_count = DECODE_THREADS
            yield container, streams[0]
    except (av.error.FFmpegError, OSError) as error:
        what, do = (
            f"cannot be read as a video ({error.strerror})",
            "it is truncated or no media file: download it again",
        )
        raise DataError(path, what, do) from error


@lru_cache(maxsize=4096)
def _image_size(path: str, _mtime: int, _num_bytes: int) -> tuple[int, int]:
    with _picture(path) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _picture(path: str):
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(path, f"cannot be read as an image ({error})", "download it again") from error


def _listed(media: Media) -> Probe:
    """A media of kind frames, as if it were a file."""
    paths, seconds = media.source, media.seconds
    if isinstance(paths, str) or not paths or len(paths) != len(seconds):
        raise DataError("frames", f"{paths!r} has {len(seconds)} seconds", "give a list of files, and each its second")
    if any(b <= a for a, b in itertools.pairwise(seconds)):
        raise DataError(media.name, "the seconds of its frames do not ascend", "sort the frames by time")
    duration = seconds[-1] + (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1)
    return Probe(seconds=tuple(seconds), size=_image_size(paths[0], *stamp(paths[0])), duration=duration)


def view(
    media: Media, index: int, *, family: Family, budget: Budget, max_tokens: int | None = None, crop: Box | None = None
) -> View:
    """What to show of `media` (number `index` of its sample) under a budget. Opens the file, decodes nothing.

    The row's own keys go first (`budget.merged(media.budget)`). Where `fps` asks for n frames of the clip or its window
    and no clamp interferes, the targets are start + k / fps, otherwise n targets evenly from the first to the last frame.
    Each takes the frame nearest in presentation time (a tie: the earlier), no frame twice. A window that holds fewer
    frames than a temporal patch takes those nearest to its middle.
    `max_tokens` bounds the placeholder tokens: frames are dropped evenly down to two temporal patches, then pixels down
    to `min_pixels`. `crop` is in original pixels and clipped to the picture. Raises DataError with the arithmetic when
    nothing fits, and for every unusable file.
    """
    budget = budget.merged(media.budget)
    if is_image := media.kind == "image":
        found = Probe(seconds=(), size=_image_size(media.source, *stamp(media.source)), duration=0.0)
        num, is_exact, window = 1, False, None
    else:
        found = probe(media.source) if media.kind == "video" else _listed(media)
        num, is_exact, window = _frames(media.name, found, family, budget)
    crop = crop and clipped(media.name, crop, found.size)
    shown = found.size if crop is None else (int(crop[3] - crop[1]), int(crop[2] - crop[0]))
    size, low = sized(media, shown, num, family, budget)
    if max_tokens is not None and family.tokens(family.grid(num, size)) > max_tokens:
        step, area, asked, full = 1 if is_image else family.temporal_patch, family.unit**2, num, size
        num = max(max_tokens // family.tokens(family.grid(1, size)) * step, min(num, 2 * step))
        is_exact = is_exact and num == asked
        if family.tokens(family.grid(num, size)) > max_tokens:
            size, _ = sized(media, shown, asked, family, budget, max_tokens // (num // step) * area)
        if family.tokens(family.grid(num, size)) > max_tokens:
            first, least = (f"{n} x {s} is {family.tokens(family.grid(n, s))}" for n, s in ((asked, full), (num, size)))
            what = f"frames x size in tokens: {first}, with min_pixels={low:g} {least}, max_tokens is {max_tokens}"
            raise DataError(media.name, what, "raise max_tokens or lower min_pixels")
    frames = (0,) if is_image else tuple(_picked(found.seconds, window, num, budget.fps if is_exact else None))
    seconds = () if is_image else tuple(found.seconds[i] for i in frames)
    grid = family.grid(num, size)
    return View(
        media=index,
        kind="image" if is_image else "video",
        source=media.source,
        frames=frames,
        seconds=seconds,
        pair_seconds=family.pair_seconds(seconds),
        size=size,
        original=found.size,
        grid=grid,
        tokens=family.tokens(grid),
        duration=found.duration,
        crop=crop,
    )


def _frames(where: str, found: Probe, family: Family, budget: Budget) -> tuple[int, bool, Window]:
    """(number of frames, whether `fps` gave it unclamped, window)."""
    step = family.temporal_patch
    if len(found.seconds) < step:
        raise DataError(where, f"has {len(found.seconds)} frame(s) and a clip needs {step}", "use it as an image")
    start = max(found.seconds[0], budget.video_start or 0.0)
    end = found.duration if budget.video_end is None else min(found.duration, budget.video_end)
    if start >= end:
        raise DataError(where, f"shows nothing from {start:.3f} to {end:.3f} s", "check video_start and video_end")
    seconds = np.asarray(found.seconds)
    first = int(np.searchsorted(seconds, start - TIE))
    last = int(np.searchsorted(seconds, end + TIE))
    if last - first < step:
        near = int(_nearest(seconds, np.array([(start + end) / 2]))[0])
        first = min(max(near - (step - 1) // 2, 0), len(seconds) - step)
        return step, False, (start, (first, first + step))
    most = (last - first) // step * step
    if budget.nframes is not None:
        return min(max(round(budget.nframes / step), 1) * step, most), False, (start, (first, last))
    asked = math.floor((end - start) * budget.fps / step + TIE) * step
    low, high = -(-budget.min_frames // step) * step, max(budget.max_frames // step, 1) * step
    num = min(max(asked, low), high, most)
    return num, num == asked, (start, (first, last))


def _picked(seconds: Sequence[float], window: Window, num: int, fps: float | None) -> list[int]:
    """`num` ascending frame indices: nearest to start + k / fps, or without `fps` evenly from first to last."""
    start, (first, last) = window
    inside = np.asarray(seconds[first:last])
    targets = start + np.arange(num) / fps if fps else np.linspace(inside[0], inside[-1], num)
    picks, k = _nearest(inside, targets), np.arange(num)
    # Where the file has fewer frames than targets, neighbours move aside: first later, then back from the end.
    picks = np.maximum.accumulate(picks - k) + k
    picks = np.minimum(picks, len(inside) - num + k)
    return (picks + first).tolist()


def _nearest(seconds: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Index of the nearest of two or more ascending seconds for each target; the earlier of two equally near."""
    right = np.searchsorted(seconds, targets).clip(1, len(seconds) - 1)
    is_left = targets - seconds[right - 1] <= seconds[right] - targets + TIE
    return np.where(is_left, right - 1, right)


def sized(
    media: Media, size: tuple[int, int], num_frames: int, family: Family, budget: Budget, room: float = math.inf
) -> tuple[tuple[int, int], int]:
    """((height, width) to show, least pixels): `fetch_video` and `fetch_image` of qwen-vl-utils, under `room` pixels.

    A video's frame has at most max(min(768 unit^2, 2 total_pixels / frames), 1.05 least) pixels, then `max_pixels`. A
    default for the least gives way to a smaller `max_pixels`, and `room` does not go below the least.
    """
    from qwen_vl_utils import vision_process as rule

    area, is_image = family.unit**2, media.kind == "image"
    low = budget.min_pixels or (rule.IMAGE_MIN_TOKEN_NUM if is_image else rule.VIDEO_MIN_TOKEN_NUM) * area
    low = min(low, budget.max_pixels or low)
    high = max(rule.IMAGE_MAX_TOKEN_NUM * area, low)
    if not is_image:
        per_frame = (budget.total_pixels or rule.MODEL_SEQ_LEN * area * 0.9) / num_frames * rule.FRAME_FACTOR
        high = max(min(rule.VIDEO_MAX_TOKEN_NUM * area, per_frame), int(low * 1.05))
    high = min(high, budget.max_pixels or high, max(room, low))
    try:
        height, width = rule.smart_resize(*size, factor=family.unit, min_pixels=low, max_pixels=high)
    except ValueError as error:
        raise DataError(media.name, f"{size[0]} x {size[1]} pixels: {error}", "crop it, or leave it out") from error
    return (max(height, family.unit), max(width, family.unit)), low


def clipped(where: str, crop: Box, size: tuple[int, int]) -> Box:
    """The crop in whole pixels, cut to a picture of (height, width). Raises DataError when it misses the picture."""
    x0, y0 = max(math.floor(crop[0]), 0), max(math.floor(crop[1]), 0)
    x1, y1 = min(math.ceil(crop[2]), size[1]), min(math.ceil(crop[3]), size[0])
    if x0 >= x1 or y0 >= y1:
        raise DataError(where, f"crop {crop} misses a {size[1]} x {size[0]} picture", "use x0, y0, x1, y1 in pixels")
    return (x0, y0, x1, y1)


def read(view: View) -> np.ndarray:
    """The pixels a view names: uint8 [frames, height, width, 3], RGB, at `view.size`.

    Cropped, then resized in uint8 (bicubic, antialiased); untouched where the size is right. Of a video only the groups
    of pictures that hold a wanted frame are decoded, a frame that is named twice once. Raises DataError when a wanted frame
    cannot be decoded.
    """
    different = tuple(dict.fromkeys(view.frames))
    if len(different) < len(view.frames):
        return read(replace(view, frames=different))[[different.index(i) for i in view.frames]]
    out = np.empty((len(view.frames), *view.size, 3), np.uint8)
    if view.kind == "video" and isinstance(view.source, str):
        found = probe(view.source)
        missing = {found.pts[i]: row for row, i in enumerate(view.frames)}
        # Some containers seek past the place asked for: what was missed is looked for again from the start.
        for is_seeking in (True, False):
            if missing:
                _decode(view, found, missing, out, is_seeking)
        if missing:
            first = min(found.seconds[view.frames[row]] for row in missing.values())
            what = f"{len(missing)} of {len(view.frames)} wanted frames do not decode, the first at {first:.3f} s"
            raise DataError(view.source, what, "the file is damaged or cut: download it again or leave the sample out")
        return out
    paths = [view.source] if isinstance(view.source, str) else [view.source[i] for i in view.frames]
    for row, path in enumerate(paths):
        stamp(path)
        with _picture(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            pixels_HWC = np.array(image.convert("RGB"))
        out[row] = _shown(path, pixels_HWC, view)
    return out


def _decode(view: View, found: Probe, missing: dict[int, int], out: np.ndarray, is_seeking: bool) -> None:
    """Move `missing` (pts to row) into `out`, in one pass that feeds the decoder the groups of pictures it needs."""
    groups = {found.groups[i] for i in view.frames} if found.groups else set()
    # Frames shown before their own key frame (open groups) lean on the group before as well.
    groups |= {g - 1 for i in view.frames if groups and (g := found.groups[i]) and found.pts[i] < found.keys[g]}
    wanted = {found.keys[g] for g in groups}

    reformatter = VideoReformatter()  # a frame's own would set up its colour conversion anew each time

    def keep(frames: Sequence[av.VideoFrame]) -> None:
        for frame in frames:
            if frame.pts in missing and not frame.is_corrupt:
                pixels_HWC = reformatter.reformat(frame, format="rgb24").to_ndarray()
                out[missing.pop(frame.pts)] = _shown(view.source, pixels_HWC, view)

    with _opened(view.source) as (container, stream):
        if is_seeking and groups and min(groups) > 0:
            container.seek(found.keys[min(groups)], stream=stream)
        is_feeding = not groups
        for packet in container.demux(stream):
            if groups and packet.is_keyframe:
                if is_feeding and packet.pts not in wanted:
                    keep(stream.decode(None))
                    stream.codec_context.flush_buffers()
                is_feeding = packet.pts in wanted
            if is_feeding:
                keep(packet.decode())
            if not missing:
                return


def _shown(path: str, pixels_HWC: np.ndarray, view: View) -> np.ndarray:
    if pixels_HWC.shape[:2] != view.original:
        raise DataError(path, f"{pixels_HWC.shape[:2]} pixels, not {view.original}", "frames of a media need one size")
    if view.crop is not None:
        x0, y0, x1, y1 = (int(edge) for edge in view.crop)
        pixels_HWC = pixels_HWC[y0:y1, x0:x1]
    if pixels_HWC.shape[:2] == view.size:
        return pixels_HWC
    pixels_CHW = torch.from_numpy(np.ascontiguousarray(pixels_HWC)).permute(2, 0, 1)
    resized = torch.nn.functional.interpolate(pixels_CHW[None], size=view.size, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
