"""Which frames of a film to show when part of it is known to matter: indices into the file, for `Look(indices=..)`.

A rule takes the presentation seconds of all frames, the windows that matter, a number of frames, how many times denser
the windows are to be than the rest, and the frames per temporal patch. It gives ascending indices, none twice.

    two_streams      a sparse stream over the whole film and a dense one over the windows. The number is met exactly
                     where the file has that many frames, and is whole temporal patches.
    videochat_r1_5   the released rule of VideoChat-R1.5 (arXiv:2509.21100). It counts frames and not seconds, forgets
                     the last frame, and may give fewer frames than asked for, and an odd number.

Seconds come from the file whatever the rule, so what a model is told is true. R1.5 itself keeps the rate of even sampling
for uneven frames and misses by seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from rft import geometry
from rft.errors import DataError

TIE = 1e-6  # seconds
Rule = Callable[..., tuple[int, ...]]


def two_streams(
    seconds: Sequence[float], windows: Iterable[Sequence[float]], num: int, *, ratio: float = 8.0, step: int = 2
) -> tuple[int, ...]:
    """`num` frames (rounded down to a multiple of `step`), `ratio` times as many per second inside the windows as outside.

    A frame belongs to a window when it is on screen at some time of it. Of L seconds on screen, L_in in the windows, the
    stream over the whole film gets num L / (L + (ratio - 1) L_in) frames, the windows the rest and at least one temporal
    patch. What the windows cannot take the film does. Windows are cut to the film; reversed ones and those beyond it are
    dropped, and with none left the film is shown evenly, first and last frame included.

    Raises DataError for a file without a whole temporal patch and for numbers that cannot be meant.
    """
    _check(seconds, num, ratio, step)
    times_F = np.asarray(seconds, float)
    lasting_F = np.diff(times_F, append=2 * times_F[-1] - times_F[-2] if len(times_F) > 1 else times_F[-1] + 1)
    num = min(num, len(times_F)) // step * step
    inside = _inside(times_F, times_F[-1] + lasting_F[-1], windows)
    num_local = 0
    if len(inside):
        length, within = lasting_F.sum(), lasting_F[inside].sum()
        num_local = num - round(num * length / (length + (ratio - 1) * within))
        num_local = min(max(num_local, step), max(num - step, step), len(inside))
    local = _evenly(inside, lasting_F, num_local)
    rest = np.setdiff1d(np.arange(len(times_F)), local)
    return tuple(np.union1d(local, _evenly(rest, lasting_F, num - num_local)).tolist())


def videochat_r1_5(
    seconds: Sequence[float], windows: Iterable[Sequence[float]], num: int, *, ratio: float = 1.5, step: int = 2
) -> tuple[int, ...]:
    """The released rule on a file: its mean frame rate, all frames but the last. `step` changes nothing."""
    _check(seconds, num, ratio, step)
    total, begin = len(seconds) - 1, seconds[0]
    if not total:
        return (0,)
    shifted = [(start - begin, end - begin) for start, end in map(_pair, windows)]
    return by_frame_rate(shifted, total_frames=total, num=num, ratio=ratio, fps=total / (seconds[-1] - begin))


def by_frame_rate(
    windows: Iterable[Sequence[float]], *, total_frames: int, num: int, ratio: float, fps: float
) -> tuple[int, ...]:
    """VideoChat-R1.5's resampler in its own terms: frame i is at i / fps, and there are `total_frames` of them.

    With K frames in the windows, counted with repetition, round(num K ratio / (K ratio + total - K)) of the frames go to
    the windows, at least one to each, evenly from first to last; the others evenly to the frames outside. Ours differs
    where the release is defective: a window that starts before the film gives no negative indices, and where the windows'
    shares are rounded up the rest gives way, so that there are never more than `num`.
    """
    ranges = []
    for window in windows:
        start, end = _pair(window)
        first, last = max(int(start * fps), 0), int(min(end * fps, total_frames - 1))
        if first <= last:
            ranges.append(np.arange(first, last + 1))
    count = sum(map(len, ranges))
    num_key = round(num * (count * ratio) / (count * ratio + (total_frames - count))) if count else 0
    shares = [max(1, round(num_key * len(r) / count)) for r in ranges]
    rest = np.setdiff1d(np.arange(total_frames), np.concatenate(ranges)) if ranges else np.arange(total_frames)
    picks = [_linspace(r, share) for r, share in zip(ranges, shares)]
    found = np.unique(np.concatenate([*picks, _linspace(rest, num - max(num_key, sum(shares)))]))
    return tuple((found if len(found) <= num else _linspace(found, num)).tolist())


RULES: Mapping[str, Rule] = {"two_streams": two_streams, "videochat_r1_5": videochat_r1_5}


def _check(seconds: Sequence[float], num: int, ratio: float, step: int) -> None:
    if num < step or step < 1:
        raise DataError("resampling", f"{num} frames in temporal patches of {step}", "ask for one patch or more")
    if not 1 <= ratio < np.inf:
        raise DataError("resampling", f"ratio={ratio}", "say how many times denser the windows are: 1 or more")
    if len(seconds) < step:
        raise DataError("resampling", f"the file has {len(seconds)} frame(s) and a clip needs {step}", "use it as an image")


def _pair(window: Sequence[float]) -> tuple[float, float]:
    if len(window) != 2 or not all(np.isfinite(window)):
        raise DataError("resampling", f"the window {window!r}", "give (start, end) in seconds")
    return float(window[0]), float(window[1])


def _inside(times_F: np.ndarray, end: float, windows: Iterable[Sequence[float]]) -> np.ndarray:
    """Ascending indices of the frames that are on screen at some time of some window."""
    is_inside_F = np.zeros(len(times_F), bool)
    for start, stop in geometry.merged(map(_pair, windows)):
        if start < end and stop >= times_F[0]:
            first = max(int(np.searchsorted(times_F, start + TIE, side="right")) - 1, 0)
            is_inside_F[first : int(np.searchsorted(times_F, stop + TIE, side="right"))] = True
    return np.flatnonzero(is_inside_F)


def _evenly(frames: np.ndarray, lasting_F: np.ndarray, num: int) -> np.ndarray:
    """`num` of the frames, from first to last, evenly on a clock that runs only while one of them is on screen."""
    if not num:
        return frames[:0]
    clock = np.cumsum(lasting_F[frames]) - lasting_F[frames]
    targets = np.linspace(clock[0], clock[-1], num) if num > 1 else np.array([(clock[0] + clock[-1]) / 2])
    right = np.searchsorted(clock, targets).clip(min(1, len(clock) - 1), len(clock) - 1)
    left = np.maximum(right - 1, 0)
    picks, k = np.where(targets - clock[left] <= clock[right] - targets + TIE, left, right), np.arange(num)
    # No frame twice: neighbours move aside, first later, then back from the end.
    picks = np.maximum.accumulate(picks - k) + k
    return frames[np.minimum(picks, len(frames) - num + k)]


def _linspace(frames: np.ndarray, num: int) -> np.ndarray:
    return frames[np.linspace(0, len(frames) - 1, num).astype(int)] if num > 0 and len(frames) else frames[:0]
