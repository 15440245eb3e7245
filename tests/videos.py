"""Real media files made at test time, in milliseconds each. Every frame carries its number as twelve bars.

`mark` reads the number back from pixels, so that a test knows which frame it was given, whatever any clock says.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 12


def painted(number: int, size: tuple[int, int] = (48, 96)) -> np.ndarray:
    """uint8 [height, width, 3]: the bars of `number`, the lowest bit on the left."""
    bits = (np.arange(size[1]) * BITS // size[1])[None, :]
    return np.broadcast_to(((number >> bits & 1) * 200 + 28).astype(np.uint8)[..., None], (*size, 3)).copy()


def mark(pixels_HWC: np.ndarray) -> int:
    """The number that `painted` drew, after any codec and any resize that keeps a few pixels per bar."""
    width = pixels_HWC.shape[1]
    centres = [int((bit + 0.5) * width / BITS) for bit in range(BITS)]
    return sum(int(pixels_HWC[:, x].mean() > 128) << bit for bit, x in enumerate(centres))


def spaced(fps: float | Fraction, num_frames: int, start: float = 0.0) -> list[Fraction]:
    """Presentation seconds at a constant rate."""
    return [Fraction(start) + k / Fraction(fps).limit_denominator(1001) for k in range(num_frames)]


def variable() -> list[Fraction]:
    """25 frames per second for ten seconds, then 5 for twenty."""
    return spaced(25, 250) + spaced(5, 100, start=10)


def write_video(
    path: Path,
    seconds: Sequence[Fraction],
    *,
    size: tuple[int, int] = (48, 96),
    codec: str = "libx264",
    clock: Fraction = Fraction(1, 90000),
    tone: bool = False,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
) -> Path:
    """Encode one marked frame per second given, in key-frame groups of 30 with B-frames unless `options` say otherwise.

    `tone` adds a second of sound that starts at zero, so that a picture that starts later does so in the file too.
    """
    with av.open(str(path), "w", options=muxer or {}) as container:
        rate = 1 / (seconds[1] - seconds[0]) if len(seconds) > 1 else Fraction(25)
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = clock
        stream.options = options if options is not None else {"preset": "veryfast", "g": "30", "bf": "2", "crf": "20"}
        if tone:
            _add_tone(container)
        for number, second in enumerate(seconds):
            frame = av.VideoFrame.from_ndarray(painted(number, size), format="rgb24")
            frame.time_base, frame.pts = clock, round(second / clock)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """A second of sound and no picture."""
    with av.open(str(path), "w") as container:
        _add_tone(container)
    return path


def _add_tone(container: av.container.OutputContainer) -> None:
    stream = container.add_stream("aac", rate=8000, layout="mono")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_empty(path: Path) -> Path:
    """A video stream that was announced and never given a frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 96, "yuv420p"
        container.start_encoding()
    return path


def decoded(path: Path) -> list[tuple[Fraction, int]]:
    """(presentation second, mark) of every frame by plain decoding from the start, in the order of presentation."""
    with av.open(str(path)) as container:
        start = max(Fraction(container.start_time or 0, av.time_base), 0)
        frames = [(f.pts * f.time_base - start, mark(f.to_ndarray(format="rgb24"))) for f in container.decode(video=0)]
    return sorted(frames)
