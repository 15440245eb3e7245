"""Multimodal rotary positions: three axes (temporal, height, width) per token, written here instead of by the library.

The library's `get_rope_index` knows one interval for a whole video and so cannot place frames that are unevenly spaced
(variable frame rate, a dense window, chosen frames). Here each pair stands at its own second:

    temporal position of pair k = start + floor(tokens_per_second * pair_seconds[k])       (clock == "axis", Qwen2.5-VL)

Seconds are absolute: a look at 12.4 to 18.0 s begins at tick 24, not at 0. On the input that the library knows, uniform
from 0 on, the result is the library's, bit for bit. A family that prints its seconds (Qwen3-VL) has every pair as a
block of its own with the temporal position of a still image, as in the library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rft.errors import RolloutError
from rft.families import Family
from rft.types import View

TEXT, IMAGE, VIDEO = 0, 1, 2


def modalities(ids: np.ndarray, image_pad_id: int, video_pad_id: int) -> np.ndarray:
    """int8 [T] of token ids [T]: 0 text, 1 image, 2 video; the `mm_token_type_ids` of transformers."""
    return (np.where(ids == image_pad_id, IMAGE, TEXT) + np.where(ids == video_pad_id, VIDEO, TEXT)).astype(np.int8)


def rope_positions(modality_T: np.ndarray, views: Sequence[View], family: Family) -> np.ndarray:
    """int64 [3, T]: temporal, height and width position of each token; `views` in the order of their placeholders.

    Text counts on by one on all three axes; a block of h x w placeholder tokens per pair advances it by max(h, w),
    however many seconds it spans (transformers 5.23). Raises RolloutError when placeholders and views disagree.
    """
    marks, used = np.flatnonzero(modality_T), 0
    positions = np.empty((3, len(modality_T)), np.int64)
    token, position = 0, 0
    for code, ticks, height, width in (block for view in views for block in _blocks(view, family)):
        size = len(ticks) * height * width
        begin = int(marks[used]) if used < len(marks) else len(modality_T)
        if not np.array_equal(modality_T[begin : begin + size], np.full(size, code)):
            raise _disagreement(modality_T, views, begin)
        positions[:, token:begin] = position + np.arange(begin - token)
        position += begin - token
        grid = np.meshgrid(ticks, np.arange(height), np.arange(width), indexing="ij")
        positions[:, begin : begin + size] = position + np.stack(grid).reshape(3, -1)
        token, position, used = begin + size, position + max(height, width), used + size
    if used < len(marks):
        raise _disagreement(modality_T, views, int(marks[used]))
    positions[:, token:] = position + np.arange(len(modality_T) - token)
    return positions


def _blocks(view: View, family: Family) -> Iterator[tuple[int, np.ndarray, int, int]]:
    """(modality, tick of each pair, height, width in tokens) of each run of placeholders of one view."""
    pairs, height, width = view.grid[0], view.grid[1] // family.merge, view.grid[2] // family.merge
    if view.kind == "image":
        yield IMAGE, np.arange(pairs), height, width
    elif len(view.pair_seconds) != pairs or len(view.seconds) != len(view.frames):
        what = f"{len(view.pair_seconds)} pair seconds for {pairs} pairs, {len(view.seconds)} seconds for "
        what += f"{len(view.frames)} frames"
        raise RolloutError(f"view of media {view.media}", what, "state one second per frame and per temporal patch")
    elif family.clock == "axis":
        yield VIDEO, _ticks(view, family), height, width
    else:
        for _ in range(pairs):
            yield VIDEO, np.zeros(1, np.int64), height, width


def _ticks(view: View, family: Family) -> np.ndarray:
    """int64 [pairs]: floor(tokens_per_second * second), on the library's own float32 path where it has one.

    Frames picked out of a denser file miss their targets by up to half the file's frame interval to either side: at 2
    fps out of 29.97 the frame of 16.983 s shows 17.0 s, and a bare floor would let the axis jump by 1 and 3 ticks where
    the model knows steady 2s. Such a pair is placed by the middle of its first frame's own time on screen.
    """
    rate, pairs, seconds = family.tokens_per_second, np.array(view.pair_seconds), np.array(view.seconds)
    is_uniform = np.allclose(seconds, np.linspace(seconds[0], seconds[-1], len(seconds)), rtol=0, atol=1e-9)
    if is_uniform and seconds[0] == 0:
        # The library multiplies in float32 and truncates: 3.9999998 is 3 there, and so it was in pre-training.
        interval = np.float32((pairs[-1] - pairs[0]) / max(len(pairs) - 1, 1))
        return np.floor(np.arange(len(pairs), dtype=np.float32) * (np.float32(rate) * interval)).astype(np.int64)
    stride = (view.frames[-1] - view.frames[0]) / max(len(seconds) - 1, 1)
    is_picked = not is_uniform and stride >= 2
    half_frame = (seconds[-1] - seconds[0]) / (view.frames[-1] - view.frames[0]) / 2 if is_picked else 0.0
    return np.floor(rate * (pairs + half_frame) + 1e-5).astype(np.int64)


def _disagreement(modality_T: np.ndarray, views: Sequence[View], token: int) -> RolloutError:
    kinds = (("image", IMAGE), ("video", VIDEO))
    have = ", ".join(f"{int((modality_T == code).sum())} {kind}" for kind, code in kinds)
    need = ", ".join(f"{sum(v.tokens for v in views if v.kind == kind)} {kind}" for kind, _ in kinds)
    what = f"{have} placeholder tokens, but {len(views)} views take {need} (they part at token {token})"
    return RolloutError("positions", what, "tokenise the text of Family.placeholder_text for exactly these views")
