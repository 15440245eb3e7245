"""A world of marks: the scene is the clue, and the mark on it is there in its span and nowhere at half the size."""

import json
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from rft.errors import RecipeError
from rft.recipe import World
from rft.synthetic.world import CONTRAST, MARK_QUESTION, SCENE, draw_marked, draw_scene, make_world

WORLD = World(train=6, validation=2, test=1, seconds=16.0, fps=2, tick=2.0, longest=6.0, mark=2.0, size=56)
SIDE = 37  # two thirds of the picture


def is_scene(frames: np.ndarray) -> np.ndarray:
    """bool [F]: a frame [H, W] shows the square, whole or in the bright half of its mark's fields. The noise is below 100."""
    return (frames >= SCENE).sum((1, 2)) >= SIDE * SIDE // 2


def is_marked(frames: np.ndarray) -> np.ndarray:
    """bool [F]: half of the square's pixels are brighter than the square."""
    return (frames == SCENE + CONTRAST).sum((1, 2)) >= SIDE * SIDE // 2


def halved(frames: np.ndarray) -> np.ndarray:
    """uint8 [F, H, W] at half the size, as a look of a quarter of the pixels shows them."""
    pixels = torch.from_numpy(frames)[:, None]
    size = [n // 2 for n in frames.shape[1:]]
    return torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)[:, 0].numpy()


def test_the_mark_is_there_in_its_span_and_the_scene_in_its_own() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scene, mark = draw_scene(rng, WORLD)
        frames = draw_marked(rng, WORLD, scene, mark)
        assert frames.shape == (32, 56, 56, 3)
        assert (frames == frames[..., :1]).all()
        seconds = np.arange(32) / 2
        assert np.array_equal(is_scene(frames[..., 0]), (seconds >= scene[0]) & (seconds < scene[1]))
        assert np.array_equal(is_marked(frames[..., 0]), (seconds >= mark[0]) & (seconds < mark[1]))


def test_scenes_are_longer_than_marks_and_all_of_them_occur() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_scene(rng, WORLD) for _ in range(4000)]
    whole = [(float(c), float(c + n)) for n in (4, 6) for c in range(0, 17 - n, 2)]
    assert {scene for scene, _ in drawn} == set(whole)
    inside = {(c, d, a, a + n) for (c, d), n in product(whole, (1.0, 2.0)) for a in np.arange(c, d - n + 1)}
    assert {(*scene, *mark) for scene, mark in drawn} == inside


def test_at_half_the_size_the_mark_is_gone_and_the_scene_is_not() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scene, mark = draw_scene(rng, WORLD)
        frames = draw_marked(rng, WORLD, scene, mark)[..., 0]
        marked = np.flatnonzero(is_marked(frames))
        unmarked = np.setdiff1d(np.flatnonzero(is_scene(frames)), marked)[0]
        empty = np.flatnonzero(~is_scene(frames))[0]
        small = halved(frames[[marked[0], unmarked, empty]]).astype(int)
        assert np.abs(small[0] - small[1]).max() < CONTRAST / 8  # at corners of the square; inside nothing is left
        assert np.abs(small[0] - small[1]).mean() < 0.1
        assert (np.abs(small[0] - small[2]) > 60).sum() >= 17 * 17
        assert np.abs(frames[marked[0]].astype(int) - frames[unmarked]).max() == CONTRAST  # at full size it is plain


def test_rows_ask_for_the_mark_and_name_the_scene_as_the_clue(tmp_path: Path) -> None:
    """In the file itself: encoded, the mark is still in the frames of its span and in no other."""
    make_world(tmp_path, WORLD, seed=1)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert len({str(row["answer"]) for row in rows}) > 1
    for row in rows:
        assert (row["question"], row["task"], row["duration"]) == (MARK_QUESTION, "grounding", 16.0)
        (a, b), ((c, d),) = row["answer"]["span"], row["answer"]["clue"]
        assert c <= a < b <= d
        with av.open(str(tmp_path / row["video"])) as container:
            frames = np.stack([f.to_ndarray(format="gray") for f in container.decode(video=0)])
        bright = (frames > SCENE + CONTRAST / 2).sum((1, 2)) > SIDE * SIDE // 3
        square = (frames > SCENE - CONTRAST / 2).sum((1, 2)) > SIDE * SIDE // 3
        assert (np.flatnonzero(bright) / 2).tolist() == np.arange(a, b, 0.5).tolist()
        assert (np.flatnonzero(square) / 2).tolist() == np.arange(c, d, 0.5).tolist()


@pytest.mark.parametrize(
    "bad",
    [
        {"mark": 0.5},  # less than half a tick
        {"mark": 6.0},  # no scene is longer
        {"mark": 4.0, "longest": 5.0},  # nor one of whole ticks
        {"mark": -1.0},
        {"objects": 2},
        {"fps": 1, "tick": 1.0, "mark": 1.0},  # no frame in half a tick
    ],
)
def test_marks_that_cannot_be_drawn_are_refused(bad: dict[str, float]) -> None:
    fields = {"seconds": 16.0, "fps": 2, "tick": 2.0, "longest": 6.0, "mark": 2.0, "size": 56} | bad
    with pytest.raises(RecipeError, match=r"data\.synthetic\.mark"):
        World(**fields)
