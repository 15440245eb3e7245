"""Looking again: which frames of real files, at which true second, how large, and boxes there and back."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rft.data.budget import Budget
from rft.data.frames import FrameStore
from rft.data.media import read, view
from rft.data.resample import two_streams
from rft.data.views import Look, Refused, look, to_file, to_view
from rft.errors import DataError
from rft.families import FAMILIES, Family
from rft.hf.pixels import patchify
from rft.types import Media, Sample, View
from tests import videos

QWEN25, QWEN3 = FAMILIES["qwen2_5_vl"], FAMILIES["qwen3_vl"]
BUDGET = Budget(fps=1.0, min_pixels=28 * 28, max_pixels=56 * 112)


def holding(*media: Media) -> Sample:
    return Sample(id="s7", media=media)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return videos.write_video(tmp_path_factory.mktemp("views") / "variable.mp4", videos.variable())  # 25, then 5 fps


@pytest.fixture(scope="module")
def sample(film: Path) -> Sample:
    image = film.with_name("a.png")
    Image.fromarray(videos.painted(5, (200, 400))).save(image)
    cells = []
    for k in range(6):
        cells.append(str(film.with_name(f"{k}.png")))
        Image.fromarray(videos.painted(k)).save(cells[-1])
    return holding(
        Media(kind="video", source=str(film)),
        Media(kind="image", source=str(image)),
        Media(kind="frames", source=tuple(cells), seconds=(0.0, 1.0, 4.0, 5.0, 9.0, 30.0)),
    )


def seen(sample: Sample, budget: Budget = BUDGET, family=QWEN25, **wanted) -> View:
    found = look(sample, Look(**wanted), family=family, budget=budget)
    assert isinstance(found, View), found
    return found


def marks(shown: View) -> list[int]:
    return [videos.mark(pixels) for pixels in read(shown)]


def true_second(number: int) -> float:
    return number / 25 if number < 250 else 10 + (number - 250) / 5


def test_a_look_without_wishes_is_the_view_of_the_prompt(sample: Sample) -> None:
    for i, media in enumerate(sample.media):
        assert seen(sample, video=i) == view(media, i, family=QWEN25, budget=BUDGET)


@pytest.mark.parametrize("span", [(2.0, 4.0), (9.0, 12.0), (20.0, 24.0), (26.0, 99.0), (-3.0, 2.0)], ids=str)
@pytest.mark.parametrize("rate", [{"frames": 8}, {"fps": 4.0}], ids=str)
def test_a_window_is_dense_and_its_seconds_are_true(sample: Sample, span: tuple, rate: dict) -> None:
    shown = seen(sample, span=span, **rate)
    assert [true_second(number) for number in marks(shown)] == pytest.approx(shown.seconds, abs=1e-3)
    assert all(span[0] <= s <= span[1] for s in shown.seconds)
    assert len(shown.frames) == (8 if rate.get("frames") else int(4 * (min(span[1], 29.84) - max(span[0], 0))) // 2 * 2)
    by_rate = [i / (350 / 29.84) for i in shown.frames]  # what index / mean rate would have told
    assert max(abs(a - b) for a, b in zip(by_rate, shown.seconds)) > 0.5
    assert shown.pair_seconds == QWEN25.pair_seconds(shown.seconds)


def test_chosen_frames_are_shown_once_in_order_with_their_own_seconds(sample: Sample) -> None:
    shown = seen(sample, indices=(300, 10, 10, 249))
    assert shown.frames == (10, 249, 300) and marks(shown) == [10, 249, 300]
    assert shown.seconds == pytest.approx((0.4, 9.96, 20.0), abs=1e-3)
    assert shown.grid[0] == 2  # the last of an odd number fills its patch
    strip = seen(sample, frames=8)
    again = seen(sample, indices=(6, 1), of=strip)
    assert again.frames == (strip.frames[1], strip.frames[6]) and again.media == 0
    paths = seen(sample, video=2, indices=(1, 4))
    assert (paths.seconds, marks(paths)) == ((1.0, 9.0), [1, 4])


@pytest.mark.parametrize("family", [QWEN25, QWEN3], ids=lambda family: family.name)
def test_frames_shown_apart_fill_a_patch_each(sample: Sample, family: Family) -> None:
    """In pixels of what the tower takes: each patch is that of its frame alone, and together they would not be."""
    shown = seen(sample, indices=(300, 10, 10, 249), apart=True, family=family)
    assert shown.frames == (10, 10, 249, 249, 300, 300) and marks(shown) == list(shown.frames)
    assert shown.seconds == pytest.approx((0.4, 0.4, 9.96, 9.96, 20.0, 20.0), abs=1e-3)
    assert shown.pair_seconds == shown.seconds[::2] and shown.grid[0] == 3
    store = FrameStore(2**24)
    patches = patchify(torch.tensor(store.get(shown)), shown, family).chunk(3)
    for patch, index in zip(patches, (10, 249, 300), strict=True):
        alone = seen(sample, indices=(index,), family=family)
        assert alone.size == shown.size and torch.equal(patch, patchify(torch.tensor(store.get(alone)), alone, family))
    beside = seen(sample, indices=(10, 249), family=family)
    assert not torch.equal(patchify(torch.tensor(store.get(beside)), beside, family), patches[0])
    again = seen(sample, indices=(2,), of=shown, family=family)  # frames are counted, not the times they are shown
    assert again.frames == (300,)
    assert look(sample, Look(indices=(3,), of=shown), family=family, budget=BUDGET).what == "frames are numbered 0 to 2"
    paths = seen(sample, video=2, indices=(1, 4), apart=True, family=family)
    assert (paths.seconds, marks(paths)) == ((1.0, 1.0, 9.0, 9.0), [1, 1, 4, 4])
    tight = seen(sample, indices=range_of(16), apart=True, max_tokens=16 * 3, family=family)
    assert tight.tokens <= 48 and tight.grid[0] == 16 and len(tight.frames) == 32


def test_frames_around_a_clue(sample: Sample) -> None:
    seconds = [true_second(i) for i in range(350)]
    shown = seen(sample, indices=two_streams(seconds, [(12.0, 16.0)], 16))
    assert len(shown.frames) == 16 and [true_second(n) for n in marks(shown)] == pytest.approx(shown.seconds, abs=1e-3)
    assert sum(12 <= s <= 16 for s in shown.seconds) >= 8  # 16 x 8 x 4 / (8 x 4 + 26) = 8.8


def test_a_crop_shows_that_part_of_the_file(sample: Sample) -> None:
    whole = read(seen(sample, video=1, budget=Budget(min_pixels=784, max_pixels=10**6)))[0]
    crop = seen(sample, video=1, crop=(100, 28, 212, 140))
    assert crop.crop == (100, 28, 212, 140) and crop.original == (200, 400)
    budget = Budget(min_pixels=112 * 112, max_pixels=112 * 112)
    exact = read(seen(sample, video=1, crop=(100, 28, 212, 140), budget=budget))[0]
    assert np.array_equal(exact, np.asarray(Image.open(sample.media[1].source))[28:140, 100:212])
    assert whole.shape != exact.shape
    small = seen(sample, video=1, crop=(100.2, 28, 101, 29), budget=budget)
    assert small.size == (112, 112) and small.crop == (100, 28, 101, 29)  # one pixel, blown up
    assert seen(sample, video=1, crop=(-50, 100, 90, 900)).crop == (0, 100, 90, 200)  # cut to the picture
    assert seen(sample, video=1, crop=(0, 0, float("inf"), 1e300)).crop == (0, 0, 400, 200)
    dense = seen(sample, span=(3, 5), frames=4, crop=(0, 0, 48, 48))
    chosen = seen(sample, indices=dense.frames, crop=(0, 0, 48, 48))
    assert replace(chosen, size=dense.size, grid=dense.grid, tokens=dense.tokens) == dense
    low_bits = [(np.arange(6) + 0.5) * frame.shape[1] / 6 for frame in read(dense)]  # the left half holds the six lowest
    marked = [sum(int(f[:, int(x)].mean() > 128) << b for b, x in enumerate(xs)) for f, xs in zip(read(dense), low_bits)]
    assert marked == [number & 63 for number in dense.frames]


def test_max_tokens_bounds_windows_by_frames_and_chosen_frames_by_pixels(sample: Sample) -> None:
    free = seen(sample, span=(2, 8), frames=16)
    tight = seen(sample, span=(2, 8), frames=16, max_tokens=free.tokens // 2)
    assert tight.tokens <= free.tokens // 2 and len(tight.frames) == 8 and tight.size == free.size
    free = seen(sample, indices=range_of(16))
    tight = seen(sample, indices=range_of(16), max_tokens=free.tokens // 2)
    assert tight.tokens <= free.tokens // 2 and tight.frames == free.frames and tight.size < free.size
    assert read(tight).shape == (16, *tight.size, 3)


def range_of(num: int) -> tuple[int, ...]:
    return tuple(range(0, num * 20, 20))


@pytest.mark.parametrize(
    ("why", "wanted"),
    [
        ("media", {"video": 3}),
        ("media", {"video": -1}),
        ("kind", {"video": 1, "span": (0, 1)}),
        ("kind", {"video": 1, "indices": (0,)}),
        ("reversed", {"span": (5, 2)}),
        ("empty", {"span": (5, 5)}),
        ("empty", {"span": (float("nan"), 5)}),
        ("outside", {"span": (30, 40)}),
        ("outside", {"span": (-4, -1)}),
        ("empty", {"span": (float("inf"), float("inf"))}),
        ("outside", {"span": (1e300, float("inf"))}),
        ("empty", {"indices": ()}),
        ("frames", {"indices": (0, 350)}),
        ("frames", {"indices": (-1, 3)}),
        ("frames", {"indices": tuple(range(60)), "budget": Budget(max_frames=40)}),
        ("reversed", {"crop": (50, 0, 20, 40)}),
        ("empty", {"crop": (50, 0, 50, 40)}),
        ("empty", {"crop": (float("nan"), 0, 50, 40)}),
        ("outside", {"crop": (96, 0, 120, 40)}),
        ("outside", {"crop": (-9, -9, 0, 0)}),
        ("size", {"video": 1, "crop": (0, 0, 400, 1)}),
        ("size", {"span": (2, 8), "max_tokens": 1}),
        ("size", {"indices": (1, 2, 3), "max_tokens": 1}),
    ],
    ids=str,
)
def test_what_a_model_may_ask_for_in_error_is_refused(sample: Sample, why: str, wanted: dict) -> None:
    wanted = dict(wanted)
    budget = wanted.pop("budget", BUDGET)
    found = look(sample, Look(**wanted), family=QWEN25, budget=budget)
    assert isinstance(found, Refused) and found.why == why, found
    assert "s7" in found.where and "/" not in found.what
    with pytest.raises(DataError, match="s7"):
        raise found.error


def test_a_file_that_is_gone_or_cut_between_rounds_is_refused(tmp_path: Path) -> None:
    path = videos.write_video(tmp_path / "a.mp4", videos.spaced(25, 100))
    media = Media(kind="video", source=str(path))
    first = seen(holding(media))
    whole = path.read_bytes()
    for damage in (lambda: path.write_bytes(whole[: len(whole) // 2]), lambda: path.write_bytes(b"no film"), path.unlink):
        damage()
        for wanted in (Look(span=(1, 2)), Look(indices=(1,), of=first)):
            found = look(holding(media), wanted, family=QWEN25, budget=BUDGET)
            assert isinstance(found, Refused) and found.why == "unreadable" and found.detail
            assert "s7" in str(found.error) and str(path) in str(found.error)


def test_the_rows_own_window_is_the_video(film: Path) -> None:
    part = holding(Media(kind="video", source=str(film), budget={"video_start": 4.0, "video_end": 14.0}))
    assert all(4 <= s <= 9 for s in seen(part, span=(0, 9), frames=6).seconds)
    assert all(5 <= s <= 6 for s in seen(part, span=(5, 6), frames=6).seconds)
    for wanted in (Look(span=(15, 20)), Look(indices=(10, 200)), Look(indices=(349,))):
        assert look(part, wanted, family=QWEN25, budget=BUDGET).why == "outside"


@pytest.mark.parametrize(
    "wanted",
    [
        {"frames": 4, "fps": 2.0},
        {"indices": (1,), "span": (0, 1)},
        {"indices": (1,), "frames": 4},
        {"indices": (1.5,)},
        {"indices": 3},
        {"span": (1, 2, 3)},
        {"span": 4.0},
        {"crop": (1, 2)},
        {"crop": ("a", 0, 1, 1)},
        {"frames": 0},
        {"fps": -1.0},
        {"max_tokens": 0},
    ],
    ids=str,
)
def test_what_only_an_author_can_get_wrong_is_an_error(wanted: dict) -> None:
    with pytest.raises(DataError, match=r"look: .*\n  what to do: "):
        Look(**wanted)


def test_a_budget_or_view_that_contradicts_the_sample_is_an_error(sample: Sample, film: Path) -> None:
    odd = holding(Media(kind="video", source=str(film), budget={"nframe": 4}))
    with pytest.raises(DataError, match="s7"):
        look(odd, Look(span=(1, 2)), family=QWEN25, budget=BUDGET)
    other = replace(seen(sample), source="elsewhere.mp4")
    with pytest.raises(DataError, match="s7"):
        look(sample, Look(of=other), family=QWEN25, budget=BUDGET)
    with pytest.raises(DataError, match="look"):
        Look(video=1, of=replace(other, media=2))


def test_boxes_of_a_view_by_hand(sample: Sample) -> None:
    whole = seen(sample, video=1, budget=Budget(min_pixels=784, max_pixels=56 * 112))
    assert (whole.size, whole.original) == ((56, 112), (200, 400))
    assert to_file((28, 14, 56, 56), whole, QWEN25) == (100, 50, 200, 200)  # pixels of the resized picture
    assert to_file((250, 250, 500, 1000), whole, QWEN3) == (100, 50, 200, 200)  # thousandths
    zoomed = seen(sample, video=1, crop=(100, 50, 200, 150), budget=Budget(min_pixels=56 * 56, max_pixels=56 * 56))
    assert to_file((0, 28, 56, 84), zoomed, QWEN25) == (100, 100, 200, 150)  # in the crop, cut to it
    assert to_view((125, 75, 900, 150), zoomed, QWEN25) == (14, 14, 56, 56)
    assert to_file((60, 60, 90, 90), zoomed, QWEN25) == (200, 150, 200, 150)  # missed: no area
    twice = seen(sample, video=1, crop=to_file((14, 14, 28, 28), zoomed, QWEN25))
    assert twice.crop == (125, 75, 150, 100)  # a zoom into a zoom


def test_boxes_go_there_and_back() -> None:
    rng = random.Random(0)
    for _ in range(300):
        family = rng.choice((QWEN25, QWEN3))
        height, width = rng.randrange(40, 2000), rng.randrange(40, 2000)
        x, y = sorted(rng.sample(range(width + 1), 2)), sorted(rng.sample(range(height + 1), 2))
        crop = rng.choice((None, (x[0], y[0], x[1], y[1])))
        size = (family.unit * rng.randrange(1, 20), family.unit * rng.randrange(1, 20))
        shown = View(
            media=0, kind="image", source="a.png", frames=(0,), seconds=(), pair_seconds=(), size=size,
            original=(height, width), grid=(1, 2, 2), tokens=1, crop=crop,
        )  # fmt: skip
        right, lower = family.box_extent(size)
        box = (rng.uniform(0, right), rng.uniform(0, lower), rng.uniform(0, right), rng.uniform(0, lower))
        assert to_view(to_file(box, shown, family), shown, family) == pytest.approx(box, abs=1e-6)
        left, top, end, bottom = crop or (0, 0, width, height)
        wild = [rng.uniform(-3000, 3000) for _ in range(4)]
        inside = to_file(wild, shown, family)
        assert all(low <= v <= high for v, low, high in zip(inside, (left, top) * 2, (end, bottom) * 2))
        file = (*(rng.uniform(a, b) for a, b in ((left, end), (top, bottom))), end, bottom)
        rounded = tuple(map(round, to_view(file, shown, family)))  # as a model writes it: within half a unit of the view
        off = [abs(a - b) for a, b in zip(to_file(rounded, shown, family), file)]
        limits = ((end - left) / right / 2, (bottom - top) / lower / 2) * 2
        assert all(o <= limit + 1e-9 for o, limit in zip(off, limits))
