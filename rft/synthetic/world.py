"""Clips of static noise in which squares appear from one second to another, as real mp4 files and JSONL.

One bright square, or up to several in different colours: then each has a span of its own, and the question names one of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import av
import numpy as np

from rft.recipe import SPLITS, World

QUESTION = "When is the square visible?"
BRIGHT = (235, 235, 235)
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
            squares = draw_squares(rng, world)
            asked, span = next(iter(squares.items()))
            encode(folder / "videos" / f"{name}.mp4", draw_frames(rng, world, squares), world.fps)
            rows.append(
                {
                    "id": name,
                    "video": f"videos/{name}.mp4",
                    "question": f"When is the {asked} square visible?" if asked else QUESTION,
                    "answer": {"span": span},
                    "task": "grounding",
                    "duration": world.seconds,
                }
            )
            done += 1
            progress(done)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


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
        visible = np.flatnonzero((seconds >= span[0]) & (seconds < span[1]))
        frames[visible, y : y + side, x : x + side] = COLOURS.get(colour, BRIGHT)
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
