"""The pooled map of a picture and regions of it: which cells, how many tokens, and boxes about them there and back."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest
from PIL import Image

from rft.data.budget import Budget
from rft.data.cells import part
from rft.data.frames import entry_name
from rft.data.views import Look, Refused, look, to_file, to_view, whole
from rft.errors import DataError
from rft.families import FAMILIES
from rft.types import Media, Sample, View
from tests import videos

QWEN25, QWEN3 = FAMILIES["qwen2_5_vl"], FAMILIES["qwen3_vl"]
BUDGET = Budget(fps=1.0, min_pixels=112 * 224, max_pixels=112 * 224)  # 4 x 8 cells, 50 x 50 pixels of the picture each


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A picture of 400 x 200 pixels, and four seconds of a film of 96 x 48."""
    folder = tmp_path_factory.mktemp("cells")
    Image.fromarray(videos.painted(5, (200, 400))).save(folder / "a.png")
    film = videos.write_video(folder / "film.mp4", videos.spaced(25, 100))
    media = (Media(kind="image", source=str(folder / "a.png")), Media(kind="video", source=str(film)))
    return Sample(id="s7", media=media)


def seen(sample: Sample, family=QWEN25, budget: Budget = BUDGET, **wanted) -> View:
    found = look(sample, Look(**wanted), family=family, budget=budget)
    assert isinstance(found, View), found
    return found


def test_a_map_is_a_smaller_grid_of_the_same_encoding(sample: Sample) -> None:
    plain = seen(sample)
    assert (plain.size, plain.tokens, whole(plain, QWEN25)) == ((112, 224), 32, plain)
    shown = seen(sample, pool=3)
    assert (shown.pool, shown.region, shown.size) == (3, None, (112, 224))
    assert (shown.grid, shown.tokens) == ((1, 4, 6), 6) and QWEN25.tokens(shown.grid) == 6  # ceil(4 / 3) x ceil(8 / 3)
    assert whole(shown, QWEN25) == plain and entry_name(shown) == entry_name(plain)
    tight = seen(sample, pool=3, max_tokens=5)  # by 4 it is 1 x 2: what is encoded stays
    assert (tight.pool, tight.tokens, whole(tight, QWEN25)) == (4, 2, plain)
    film = seen(sample, video=1)
    shown = seen(sample, video=1, pool=2)
    assert film.grid == (2, 8, 16) and shown.grid == (2, 4, 8) and shown.tokens == 16
    assert (shown.frames, shown.pair_seconds, shown.size) == (film.frames, film.pair_seconds, film.size)
    chosen = seen(sample, video=1, indices=(3, 50), pool=2)
    assert (chosen.frames, chosen.tokens, whole(chosen, QWEN25)) == ((3, 50), 8, seen(sample, video=1, indices=(3, 50)))


@pytest.mark.parametrize(
    ("box", "region"),
    [
        ((60, 40, 160, 110), (0, 1, 3, 4)),  # columns 1.2 to 3.2, rows 0.8 to 2.2
        ((50, 50, 100, 100), (1, 1, 2, 2)),  # on the edges of cells
        ((399.5, 199.5, 400, 200), (3, 7, 4, 8)),
        ((120, 120, 120.01, 199), (2, 2, 4, 3)),
        ((-50, -50, 1e300, inf), (0, 0, 4, 8)),
        ((-inf, 100, 10, 900), (2, 0, 4, 1)),
    ],
    ids=str,
)
def test_the_cells_that_a_box_touches_are_gathered(sample: Sample, box: tuple, region: tuple) -> None:
    plain = seen(sample)
    shown = seen(sample, of=plain, region=box)
    rows, columns = region[2] - region[0], region[3] - region[1]
    assert (shown.region, shown.pool, shown.size) == (region, 1, plain.size)
    assert (shown.grid, shown.tokens) == ((1, 2 * rows, 2 * columns), rows * columns)
    assert whole(shown, QWEN25) == plain and entry_name(shown) == entry_name(plain)
    assert seen(sample, of=seen(sample, pool=3), region=box) == shown  # of the map as of the whole
    assert seen(sample, of=shown, region=box) == shown  # and of another region
    doubled = seen(sample, of=plain, region=box, pool=2)
    assert doubled.tokens == -(-rows // 2) * -(-columns // 2) and doubled.region == region


def test_a_region_with_too_many_tokens_is_pooled(sample: Sample) -> None:
    plain, everything = seen(sample), (0, 0, 400, 200)
    pools = {limit: seen(sample, of=plain, region=everything, max_tokens=limit) for limit in (32, 31, 8, 7, 1)}
    assert {limit: (v.pool, v.tokens) for limit, v in pools.items()} == {
        32: (1, 32), 31: (2, 8), 8: (2, 8), 7: (3, 6), 1: (8, 1),
    }  # fmt: skip
    film = seen(sample, video=1, pool=2)
    assert seen(sample, of=film, region=(0, 0, 1, 1), max_tokens=2).grid == (2, 2, 2)
    found = look(sample, Look(of=film, region=(0, 0, 1, 1), max_tokens=1), family=QWEN25, budget=BUDGET)
    assert isinstance(found, Refused) and found.why == "size" and "2 pairs" in found.detail


def test_a_region_of_a_crop_counts_its_cells(sample: Sample) -> None:
    crop = seen(sample, crop=(200, 0, 400, 100))  # 4 x 8 cells of 25 x 25 pixels
    shown = seen(sample, of=crop, region=(260, 30, 300, 60))
    assert crop.size == (112, 224) and shown.region == (1, 2, 3, 4) and shown.crop == crop.crop
    assert to_file((0, 0, 56, 56), shown, QWEN25) == (250, 25, 300, 75)
    found = look(sample, Look(of=crop, region=(0, 0, 200, 100)), family=QWEN25, budget=BUDGET)
    assert found.why == "outside"  # in the file, and not in what was encoded


def test_boxes_about_a_region_by_hand(sample: Sample) -> None:
    for shown in (
        seen(sample, of=seen(sample), region=(60, 40, 160, 110)),
        seen(sample, of=seen(sample, pool=2), region=(60, 40, 160, 110), max_tokens=4),
    ):
        assert shown.region == (0, 1, 3, 4)  # 50 to 200 by 0 to 150 in the file, 84 x 84 pixels as encoded
        assert to_file((28, 28, 56, 84), shown, QWEN25) == (100, 50, 150, 150)
        assert to_view((100, 50, 150, 150), shown, QWEN25) == (28, 28, 56, 84)
        assert to_view((0, 0, 400, 200), shown, QWEN25) == (0, 0, 84, 84)
    budget = Budget(min_pixels=128 * 256, max_pixels=128 * 256)
    shown = seen(sample, QWEN3, budget, of=seen(sample, QWEN3, budget), region=(60, 40, 160, 110))
    assert shown.region == (0, 1, 3, 4)
    assert to_file((0, 500, 1000, 1000), shown, QWEN3) == (50, 75, 200, 150)
    pooled = seen(sample, pool=2)
    assert to_file((56, 28, 112, 56), pooled, QWEN25) == (100, 50, 200, 100)  # in pixels of the encoding


def test_regions_go_there_and_back(sample: Sample) -> None:
    rng = random.Random(0)
    for _ in range(300):
        family = rng.choice((QWEN25, QWEN3))
        rows, columns = rng.randrange(1, 40), rng.randrange(1, 40)
        size, original = (rows * family.unit, columns * family.unit), (rng.randrange(20, 2000), rng.randrange(20, 2000))
        x, y = sorted(rng.sample(range(original[1] + 1), 2)), sorted(rng.sample(range(original[0] + 1), 2))
        grid = family.grid(1, size)
        full = replace(seen(sample), size=size, original=original, grid=grid, tokens=family.tokens(grid))
        full = replace(full, crop=rng.choice((None, (x[0], y[0], x[1], y[1]))))
        r, c = sorted(rng.sample(range(rows + 1), 2)), sorted(rng.sample(range(columns + 1), 2))
        shown = part(full, family, region=(r[0], c[0], r[1], c[1]), pool=rng.randrange(1, 4))
        right, lower = family.box_extent(((r[1] - r[0]) * family.unit, (c[1] - c[0]) * family.unit))
        covered = to_file((0, 0, right, lower), shown, family)
        own = replace(sample.media[0])
        again = look(Sample(id="s7", media=(own,)), Look(of=full, region=covered), family=family, budget=BUDGET)
        assert again.region == shown.region  # its own box names the cells again, and no neighbour
        box = (rng.uniform(0, right), rng.uniform(0, lower), rng.uniform(0, right), rng.uniform(0, lower))
        assert to_view(to_file(box, shown, family), shown, family) == pytest.approx(box, abs=1e-6)


@pytest.mark.parametrize(
    ("why", "box"),
    [
        ("reversed", (160, 40, 60, 110)),
        ("reversed", (60, 110, 160, 40)),
        ("empty", (60, 40, 60, 110)),
        ("empty", (nan, 40, 60, 110)),
        ("empty", (60, 40, 160, nan)),
        ("empty", (inf, 0, inf, 1)),
        ("outside", (400, 0, 500, 50)),
        ("outside", (-9, -9, 0, 0)),
    ],
    ids=str,
)
def test_bad_boxes_are_refused(sample: Sample, why: str, box: tuple) -> None:
    found = look(sample, Look(of=seen(sample, pool=2), region=box), family=QWEN25, budget=BUDGET)
    assert isinstance(found, Refused) and found.why == why, found
    assert "s7" in found.where and "/" not in found.what


def test_a_region_of_a_file_that_is_gone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(videos.painted(5, (200, 400))).save(path)
    one = Sample(id="s7", media=(Media(kind="image", source=str(path)),))
    shown = seen(one, pool=2)
    path.unlink()
    found = look(one, Look(of=shown, region=(0, 0, 50, 50)), family=QWEN25, budget=BUDGET)
    assert found.why == "unreadable" and str(path) in str(found.error)


def test_what_only_an_author_can_get_wrong_is_an_error(sample: Sample) -> None:
    shown = seen(sample)
    for wanted in (
        {"region": (0, 0, 1, 1)},
        {"of": shown, "region": (0, 0, 1)},
        {"of": shown, "region": (0, 0, 1, 1), "crop": (0, 0, 1, 1)},
        {"of": shown, "region": (0, 0, 1, 1), "indices": (0,)},
        {"pool": 0},
        {"pool": 1.5},
        {"apart": True},
    ):
        with pytest.raises(DataError, match=r"look: .*\n  what to do: "):
            Look(**wanted)
