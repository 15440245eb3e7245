"""Clips of static noise in which squares appear from one second to another, as real mp4 files and JSONL.

One bright square, or up to several in different colours: then each has a span of its own, and the question names one of them.

Or one that a single look does not settle (`mark`): the square is the scene, and for a short time of it the square carries the
mark, a pattern so fine that it is gone when the picture is scaled to half its size. The question is when the mark shows, and
the scene is the clue to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np

from rft.recipe import SPLITS, World

QUESTION = "When is the square visible?"
MARK_QUESTION = "When is the mark visible?"
BRIGHT = (235, 235, 235)
SCENE, CONTRAST = 150, 100  # brightness of a scene; the fields of its mark's chequered pattern are as much above and below
COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "yellow": (250, 250, 0)}
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))  # quarters of the picture, a square in each at most: none hides another
Span = tuple[float, float]


def make_world(folder: Path, world: World, *, seed: int, progress: Callable[[int], None] = lambda done: None) -> Path:
    """Render all splits under `folder`: `train.jsonl`, `validation.jsonl`, `test.jsonl` and `videos/`.

    Splits are disjoint: each clip has noise, places and times of its own, drawn from (seed, world.seed, split, index).
    """
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    done = 0
    for number, split in enumerate(SPLITS):
        rows = []
        for index in range(getattr(world, split)):
            rng = np.random.default_rng((seed, world.seed, number, index))
            name = f"{split}_{index:05d}"
            question, answer, frames = draw_clip(rng, world)
            encode(folder / "videos" / f"{name}.mp4", frames, world.fps)
            rows.append(
                {
                    "id": name,
                    "video": f"videos/{name}.mp4",
                    "question": question,
                    "answer": answer,
                    "task": "grounding",
                    "duration": world.seconds,
                }
            )
            done += 1
            progress(done)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def draw_clip(rng: np.random.Generator, world: World) -> tuple[str, dict[str, Any], np.ndarray]:
    """(question, answer, uint8 frames [F, H, W, 3])."""
    if world.mark:
        scene, mark = draw_scene(rng, world)
        return MARK_QUESTION, {"span": mark, "clue": [scene]}, draw_marked(rng, world, scene, mark)
    squares = draw_squares(rng, world)
    asked, span = next(iter(squares.items()))
    question = f"When is the {asked} square visible?" if asked else QUESTION
    return question, {"span": span}, draw_frames(rng, world, squares)


def draw_squares(rng: np.random.Generator, world: World) -> dict[str, Span]:
    """Colour -> span, the one that is asked for first. A world of one object has no colours: its square is "".

    A world of several shows one to all of them: clips with a single square are what a policy begins to see by, before it
    can tell which square is meant.
    """
    if world.objects == 1:
        return {"": draw_span(rng, world)}
    colours = rng.permutation(list(COLOURS)[: world.objects]).tolist()
    return {colour: draw_span(rng, world) for colour in colours[: int(rng.integers(1, world.objects + 1))]}


def draw_span(rng: np.random.Generator, world: World) -> Span:
    """Two different ticks of the clip, in order; or, under `longest`, a length and then a place for it."""
    ticks = int(world.seconds / world.tick)
    if world.longest:
        length = int(rng.integers(1, int(world.longest / world.tick) + 1))
        first = int(rng.integers(0, ticks - length + 1))
        return first * world.tick, (first + length) * world.tick
    first, last = sorted(rng.choice(ticks + 1, size=2, replace=False).tolist())
    return first * world.tick, last * world.tick


def draw_scene(rng: np.random.Generator, world: World) -> tuple[Span, Span]:
    """(scene, mark): the scene lasts some ticks more than the mark may, the mark some halves of a tick inside of it."""
    least = math.floor(world.mark / world.tick) + 1
    length = int(rng.integers(least, int((world.longest or world.seconds) / world.tick) + 1))
    first = int(rng.integers(0, int(world.seconds / world.tick) - length + 1))
    half = world.tick / 2
    shown = int(rng.integers(1, int(world.mark / half) + 1))
    begin = first * world.tick + int(rng.integers(0, 2 * length - shown + 1)) * half
    return (first * world.tick, (first + length) * world.tick), (begin, begin + shown * half)


def draw_marked(rng: np.random.Generator, world: World, scene: Span, mark: Span) -> np.ndarray:
    """uint8 [F, H, W, 3]: dim noise, a grey square during the scene, and on it a chequered pattern while the mark shows.

    The pattern alternates from pixel to pixel around the square's own grey: any scaling by half, which averages evenly
    over neighbours, gives the plain square back.
    """
    size, side = world.size, world.size * 2 // 3
    frames = rng.integers(0, 100, size=(size, size, 1), dtype=np.uint8).repeat(3, axis=-1)
    frames = frames[None].repeat(round(world.seconds * world.fps), axis=0)
    y, x = rng.integers(0, size - side + 1, size=2)
    seconds = np.arange(len(frames)) / world.fps
    frames[_within(seconds, scene), y : y + side, x : x + side] = SCENE
    sign = 1 - 2 * ((np.arange(y, y + side)[:, None] + np.arange(x, x + side)) % 2)
    frames[_within(seconds, mark), y : y + side, x : x + side] = (SCENE + CONTRAST * sign)[..., None]
    return frames


def _within(seconds: np.ndarray, span: Span) -> np.ndarray:
    """Indices of the frames that are shown in a span."""
    return np.flatnonzero((seconds >= span[0]) & (seconds < span[1]))


def draw_frames(rng: np.random.Generator, world: World, squares: Mapping[str, Span]) -> np.ndarray:
    """uint8 [F, H, W, 3]: dim noise, the same in every frame, and each square while it is visible."""
    size = world.size
    background = rng.integers(0, 100, size=(size, size, 1), dtype=np.uint8).repeat(3, axis=-1)
    if "" in squares:
        side = max(4, size // 3)
        corners = [rng.integers(0, size - side + 1, size=2)]
    else:
        side = size // 2 - 2  # a colour is harder to see than white: larger
        cells = rng.permutation(np.array(CELLS))[: len(squares)] * (size // 2)
        corners = [cell + rng.integers(0, size // 2 - side + 1, size=2) for cell in cells]
    frames = background[None].repeat(round(world.seconds * world.fps), axis=0)
    seconds = np.arange(len(frames)) / world.fps
    for (colour, span), (y, x) in zip(squares.items(), corners, strict=True):
        frames[_within(seconds, span), y : y + side, x : x + side] = COLOURS.get(colour, BRIGHT)
    return frames


def encode(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write uint8 frames [F, H, W, 3] as an H.264 mp4 with one key frame a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "20"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = fps
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
