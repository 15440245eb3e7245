"""The decoded-frame store: same bytes, decoded once, within its bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rft.data.budget import Budget
from rft.data.frames import FrameStore
from rft.data.media import read, view
from rft.errors import DataError
from rft.families import FAMILIES
from rft.types import Media, View
from tests import videos


def clip(path: Path, num_frames: int = 50) -> View:
    videos.write_video(path, videos.spaced(25, num_frames))
    budget = Budget(nframes=4, min_pixels=28 * 28, max_pixels=1600)
    return view(Media(kind="video", source=str(path)), 0, family=FAMILIES["qwen2_5_vl"], budget=budget)


BYTES = 4 * 28 * 56 * 3  # of one clip: 48 x 96 scaled to 1600 pixels is 28.3 x 56.6


def test_a_second_look_is_the_same_array(tmp_path: Path) -> None:
    store, shown = FrameStore(10 * BYTES), clip(tmp_path / "a.mp4")
    first = store.get(shown)
    assert store.get(replace(shown, media=7)) is first  # where it stands in the sample is not what it shows
    assert (store.hits, store.misses, store.bytes) == (1, 1, BYTES)
    np.testing.assert_array_equal(first, read(shown))
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0


def test_the_least_recently_used_leaves(tmp_path: Path) -> None:
    store = FrameStore(2 * BYTES)
    a, b, c = (clip(tmp_path / f"{name}.mp4") for name in "abc")
    for shown in (a, b, a, c):  # c drives out b
        store.get(shown)
    assert (store.hits, store.misses, store.bytes) == (1, 3, 2 * BYTES)
    store.get(a)
    assert store.hits == 2
    store.get(b)
    assert (store.hits, store.misses, store.bytes) == (2, 4, 2 * BYTES)


def test_a_clip_that_does_not_fit_is_read_and_not_kept(tmp_path: Path) -> None:
    store, shown = FrameStore(BYTES - 1), clip(tmp_path / "a.mp4")
    assert store.get(shown).nbytes == BYTES
    assert (store.get(shown).shape, store.misses, store.bytes) == ((4, 28, 56, 3), 2, 0)


def test_a_rewritten_file_is_read_again(tmp_path: Path) -> None:
    store, shown = FrameStore(10 * BYTES), clip(tmp_path / "a.mp4")
    store.get(shown)
    store.get(clip(tmp_path / "a.mp4", 100))
    store.get(shown)  # these frame numbers in the new file
    assert (store.hits, store.misses) == (0, 3)


def test_threads_wait_for_one_decode(tmp_path: Path) -> None:
    store, shown = FrameStore(10 * BYTES), clip(tmp_path / "a.mp4")
    with ThreadPoolExecutor(8) as pool:
        arrays = list(pool.map(store.get, [shown] * 32))
    assert (store.hits, store.misses, store.bytes) == (31, 1, BYTES)
    assert all(array is arrays[0] for array in arrays)


def test_an_error_is_raised_every_time_and_not_kept(tmp_path: Path) -> None:
    store, shown = FrameStore(10 * BYTES), clip(tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) // 2])
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.mp4"):
            store.get(shown)
    assert (store.misses, store.bytes) == (2, 0)
