"""Clips of static noise in which a bright square appears from one second to another, as real mp4 files and JSONL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from rft.recipe import SPLITS, World

QUESTION = "When is the square visible?"


def make_world(folder: Path, world: World, *, seed: int, progress: Callable[[int], None] = lambda done: None) -> Path:
    """Render all splits under `folder`: `train.jsonl`, `validation.jsonl`, `test.jsonl` and `videos/`.

    Splits are disjoint: each clip has noise, place and times of its own, drawn from (seed, world.seed, split, index).
    """
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    done = 0
    for number, split in enumerate(SPLITS):
        rows = []
        for index in range(getattr(world, split)):
            rng = np.random.default_rng((seed, world.seed, number, index))
            name = f"{split}_{index:05d}"
            span = draw_span(rng, world)
            encode(folder / "videos" / f"{name}.mp4", draw_frames(rng, world, span), world.fps)
            rows.append(
                {
                    "id": name,
                    "video": f"videos/{name}.mp4",
                    "question": QUESTION,
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


def draw_span(rng: np.random.Generator, world: World) -> tuple[float, float]:
    """Two different ticks of the clip, in order."""
    first, last = sorted(rng.choice(int(world.seconds / world.tick) + 1, size=2, replace=False).tolist())
    return first * world.tick, last * world.tick


def draw_frames(rng: np.random.Generator, world: World, span: tuple[float, float]) -> np.ndarray:
    """uint8 [F, H, W, 3]: dim noise, the same in every frame, and the square while it is visible."""
    size, side = world.size, max(4, world.size // 3)
    background = rng.integers(0, 100, size=(size, size, 1), dtype=np.uint8).repeat(3, axis=-1)
    y, x = rng.integers(0, size - side + 1, size=2)
    frames = background[None].repeat(round(world.seconds * world.fps), axis=0)
    seconds = np.arange(len(frames)) / world.fps
    visible = np.flatnonzero((seconds >= span[0]) & (seconds < span[1]))
    frames[visible, y : y + side, x : x + side] = 235
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
