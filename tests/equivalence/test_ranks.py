"""Two gloo processes equal one with accumulation doubled, with video, image and text rows in one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.stages import relative

ROOT = Path(__file__).parents[2]


def run_alone(*command: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """A subprocess that sees no launcher of ours."""
    kept = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "WORLD_SIZE", "RANK", "LOCAL_RANK")}
    return subprocess.run(
        command, cwd=ROOT, env={**kept, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=timeout
    )


def launched(processes: int, *arguments: str) -> list[str]:
    port = str(29500 + os.getpid() % 1000)
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        "--main_process_port",
        port,
    ]
    return [sys.executable, *launcher, "-m", *arguments]


CASES = {
    "plain": ("qwen2_5_vl", {}),
    "much": ("qwen3_vl", {"objective": "dapo", "updates": 2, "kl": 0.1, "refill": 1}),
    "guided": ("qwen2_5_vl", {"guidance": {"probability": 0.6}, "estimator": "nonlinear", "updates": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(name: str, tiny_folders: dict[str, Path], mixed: Path, world: Path, tmp_path: Path) -> None:
    family, changes = CASES[name]
    data = world if name == "guided" else mixed  # where every row has an annotation that one template can write
    arguments = ("tests.rank_main", str(tmp_path), str(tiny_folders[family]), str(data), json.dumps(changes))
    for command in (launched(2, *arguments), [sys.executable, "-m", *arguments]):
        done = run_alone(*command)
        assert done.returncode == 0, done.stderr[:4000]
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert (one["accumulation"], first["accumulation"]) == (4, 2)
    assert len(one["gradients"]) == 2
    for alone, left, right in zip(one["gradients"], first["gradients"], second["gradients"], strict=True):
        assert alone.norm() > 1e-4
        assert torch.equal(left, right)
        assert relative(left, alone) <= 1e-5
    for alone, pair in zip(one["logs"], first["logs"], strict=True):
        for key in alone.keys() & {"reward", "completion_tokens", "entropy", "kl", "ratio", "muted", "reference/seats"}:
            assert pair[key] == pytest.approx(alone[key], rel=1e-5), key
