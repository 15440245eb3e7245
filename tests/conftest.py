"""What every test needs before it imports anything of transformers, and the small worlds that several files share."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from rft.hf.tiny import make_tiny
from rft.recipe import Tiny, World
from rft.synthetic.world import make_world

SMALL = {"hidden": 64, "layers": 2, "heads": 4, "vision_hidden": 32, "vision_layers": 2}


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random model folder per family."""
    root = tmp_path_factory.mktemp("models")
    return {name: make_tiny(root / name, Tiny(family=name, **SMALL), seed=1) for name in ("qwen2_5_vl", "qwen3_vl")}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training clips and four of each other split, as mp4 and JSONL."""
    return make_world(tmp_path_factory.mktemp("world"), World(train=12, validation=4, test=4), seed=3)


@pytest.fixture(scope="session")
def mixed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of three modalities, so that ranks meet different ones in the same micro-step."""
    folder = tmp_path_factory.mktemp("mixed")
    clips = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    rng = np.random.default_rng(0)
    rows = []
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({**clips[i], "video": str(world / clips[i]["video"])})
        rows.append({"id": f"image{i}", "image": f"{i}.png", "question": "Which option?", "answer": "B", "task": "grounding"})
        rows.append({"id": f"text{i}", "question": f"Which option is right, {i}?", "answer": "A", "task": "grounding"})
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder
